import re

import matplotlib.image
import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from mnist_flax.experiments import report
from mnist_flax.experiments.research import directory, space, storage, study_axes, study_figures, worker
from mnist_flax.experiments.research.study_axes import Axis, Trial
from mnist_flax.runtime.config import default_config
from tests.commands import command, refusal
from tests.experiments import test_space
from tests.experiments.test_space import RATE
from tests.experiments.test_study import open_study

SPACE = {key: test_space.SPACE[key] for key in ("optimizer.name", RATE, "optimizer.momentum", "num_epochs")}


def value_of(params):
    """Known: the learning rate matters most, and best at the upper end; momentum and epochs little."""
    name = 0.01 * (params["optimizer.name"] == "sgd")
    return 0.02 + 0.05 * (np.log10(params[RATE]) + 1) ** 2 + name + 1e-4 * params["num_epochs"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A study directory of 40 trials that nobody trained, one of each kind of end among them."""
    place = tmp_path_factory.mktemp("studies") / "known"
    plan = space.Plan(question="What is known & <sure>?", scientific=("optimizer.name",))
    definition = space.Definition(default_config(), SPACE, [], plan)
    record = directory.prepare(place, definition, None)
    database = storage.connect(record.storage, heartbeat=60)
    study = worker.join(record.name, definition, database, place)
    random = np.random.default_rng(0)
    for number in range(40):
        trial = study.ask()
        params = {RATE: 10 ** random.uniform(-4, -1), "num_epochs": int(random.integers(1, 5))}
        params["optimizer.name"] = str(random.choice(["adam", "sgd"]))
        if params["optimizer.name"] == "sgd":
            params["optimizer.momentum"] = random.uniform(0.5, 0.99)
        for key, value in params.items():
            span = SPACE[key]
            if span.kind == "choice":
                study._storage.set_trial_param(trial._trial_id, key, span.values.index(value),
                                               optuna.distributions.CategoricalDistribution(span.values))  # fmt: skip
            elif span.kind == "integer":
                study._storage.set_trial_param(trial._trial_id, key, value, optuna.distributions.IntDistribution(1, 4))
            else:
                spread = optuna.distributions.FloatDistribution(span.low, span.high, log=span.log)
                study._storage.set_trial_param(trial._trial_id, key, value, spread)
        value = value_of(params)
        trial.set_user_attr("config", {})
        trial.set_user_attr("curve", [[e * 100, e, 0.5, 0.5, 1 - value * (1 + 1 / e)] for e in range(1, 4)])
        if number == 5:
            trial.set_user_attr("diverged_at_step", 3)
            study.tell(trial, state=TrialState.PRUNED)
        elif number == 6:
            trial.report(0.5, 1)
            study.tell(trial, state=TrialState.PRUNED)
        elif number == 7:
            trial.set_user_attr("error", "out of <memory>")
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, value)
    return place


@pytest.fixture(scope="module")
def page(place):
    assert "written" in command("experiments.report", place).stdout
    return (place / "report.html").read_text()


def test_page_tells_what_happened_and_needs_no_other_file(page, place):
    assert "What is known &amp; &lt;sure&gt;?" in page and "out of &lt;memory&gt;" in page
    assert "37 complete, 1 stopped early" in page and "Nothing is confirmed yet" in page
    assert "upper end of the range of optimizer.learning_rate" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page) and "<script" not in page
    names = {path.stem for path in (place / "figures").iterdir()}
    assert names == {"scientific", "isolation", "parallel", "importance", "curves", "budget"}
    for path in (place / "figures").iterdir():
        picture = matplotlib.image.imread(path)
        assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.05  # there is something on it


def test_importance_finds_the_range_that_matters(place):
    found = report.importances(open_study(place), forests=3)
    assert next(iter(found)) == RATE and found[RATE][0] > 0.7
    assert "optimizer.momentum" not in found  # not all trials have it


def test_the_ring_of_the_best_lies_on_its_dot_also_where_dots_are_spread():
    names = ["adam", "lion", "sgd"]
    axes_of = [study_axes.make_axis("optimizer.name", {"kind": "choice", "values": names})]
    trials = [Trial(i, {"optimizer.name": names[i % 3]}, "complete", 0.02 + 0.001 * i, []) for i in range(12)]
    panel = study_figures.figure_isolation(trials, axes_of, "validation_error").axes[0]
    (ring,) = (line for line in panel.lines if line.get_label() == "best")
    (dots,) = (c.get_offsets() for c in panel.collections if c.get_label() == "complete")
    assert ring.get_xydata()[0].tolist() in dots.tolist() and ring.get_ydata()[0] == 0.02


@pytest.mark.parametrize("highest", [0.22, 0.9, 1e10])
def test_nothing_is_cut_off_without_an_arrow_and_its_number(highest):
    ranges = {
        "train_examples": {"kind": "choice", "values": [100, 1_000]},
        "optimizer.name": {"kind": "choice", "values": ["adam", "sgd"]},
        RATE: {"kind": "log_uniform", "low": 1e-4, "high": 0.1, "log": True},
    }
    key, *others = axes_of = [study_axes.make_axis(*each) for each in ranges.items()]
    values = [highest, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08]
    places = [
        {key.key: (100, 1_000)[i % 2], "optimizer.name": ("adam", "sgd")[i % 4 > 1], RATE: 0.01} for i in range(8)
    ]
    trials = [Trial(i, *each, []) for i, each in enumerate(zip(places, ["complete"] * 8, values, strict=True))]
    for figure in (
        study_figures.figure_scientific(trials, key, others, "validation_loss"),
        study_figures.figure_isolation(trials, axes_of, "validation_loss"),
    ):
        figure.draw_without_rendering()
        for axes in (axes for axes in figure.axes if axes.axison):
            drawn = [y for c in axes.collections for y in c.get_offsets()[:, 1]]
            drawn += [y for line in axes.lines if line.get_marker() for y in line.get_ydata() if y not in (0, 1)]
            low, high = axes.get_ylim()
            assert low < min(drawn) and max(drawn) < high
            numbers = [float(text.get_text()) for text in axes.texts]
            arrows = [
                line.get_ydata()[0]
                for line in axes.lines
                if line.get_marker() == "^" and line.get_fillstyle() == "none"
            ]
            assert len(numbers) == len(arrows) == (highest > 1)
            of_means = [pytest.approx(highest / n, rel=0.01) for n in (1, 2, 4)]
            assert all(number in of_means for number in numbers)
            assert (max(drawn) >= 0.1 * highest) != bool(numbers)


def test_a_curve_that_comes_to_no_error_at_all_is_drawn_to_its_end():
    curve = [[step, step, 0.5, 0.5, accuracy] for step, accuracy in ((1, 0.5), (2, 0.9), (3, 1.0))]
    axes = study_figures.figure_curves([Trial(0, {}, "complete", 0.0, curve)]).axes[0]
    assert axes.get_yscale() == "linear" and axes.get_ylim()[0] < 0


def test_a_trial_without_rivals_is_drawn_as_the_best():
    axis = study_axes.make_axis("num_epochs", {"kind": "integer", "low": 1, "high": 4, "log": False})
    trial = Trial(0, {"num_epochs": 2}, "complete", 0.02, [])
    panel = study_figures.figure_parallel([trial], [axis], "validation_error").axes[0]
    (best,) = (text.xy for text in panel.texts if text.get_text() == "best")
    assert panel.lines[0].get_xydata()[-1].tolist() == list(best)


def test_a_short_logarithmic_axis_has_plain_numbers():
    axis = study_axes.make_axis("batch_size", {"kind": "integer", "low": 16, "high": 64, "log": True})
    trials = [Trial(i, {"batch_size": size}, "complete", 0.02, []) for i, size in enumerate((16, 32, 64))]
    figure = study_figures.figure_isolation(trials, [axis], "validation_error")
    figure.draw_without_rendering()
    ticks = figure.axes[0].xaxis
    assert {"20", "50"} <= {text.get_text() for text in ticks.get_ticklabels()}
    assert not any(text.get_text() for text in ticks.get_ticklabels(minor=True))


def test_trials_are_counted_in_whole_numbers():
    trials = [Trial(i, {}, "complete", 0.02 + 0.01 * i, []) for i in range(4)]
    ticks = study_figures.figure_budget(trials, "validation_error").axes[0].get_xticks()
    assert all(tick == round(tick) for tick in ticks)


def test_every_value_of_a_scientific_choice_is_drawn_each_in_its_own_way():
    widths = [[4 * i, 8 * i] for i in range(1, 11)]
    ranges = {
        "model.channels": {"kind": "choice", "values": widths},
        "optimizer.name": {"kind": "choice", "values": ["adam", "sgd"]},
    }
    key, other = (study_axes.make_axis(*each) for each in ranges.items())
    params = [{key.key: width, other.key: name} for width in key.ticks for name in other.ticks]
    trials = [Trial(i, each, "complete", 0.02 + 0.001 * i, []) for i, each in enumerate(params)]
    all_trials, panel = study_figures.figure_scientific(trials, key, [other], "validation_error").axes
    assert len(all_trials.collections) == len(panel.lines) == 10
    assert len({(line.get_color(), line.get_marker()) for line in panel.lines}) == 10


def test_means_of_a_confirmation_are_drawn_where_they_are():
    values = {"baseline": [0.9, 0.91, 0.98], "winner": [0.97, 0.99, 0.98]}
    gaps = {"values": [0.07, 0.08, 0.0], "mean": 0.05, "half_interval": 0.1}
    scores = {role: {"values": column} for role, column in values.items()} | {"difference": gaps}
    pairs = study_figures.figure_seeds({"test_accuracy": scores}).axes[0]
    shown = {text.get_text(): text.xy[1] for text in pairs.texts}
    assert shown == {"mean\n93.00 %": pytest.approx(93.0), "mean\n98.00 %": pytest.approx(98.0)}


def test_bootstrap_of_the_best_is_that_of_the_binomial():
    values = np.arange(1.0, 101.0)
    median, low, high = study_figures.best_so_far(values, samples=20_000)
    for n in (1, 5, 20):  # P(best of n > k) = (1 - k/100)^n
        for found, share in ((median, 0.5), (low, 0.05), (high, 0.95)):
            assert found[n - 1] == pytest.approx(100 * (1 - (1 - share) ** (1 / n)), abs=2)
    assert (np.diff(median) <= 0).all() and (low <= median).all() and (median <= high).all()


@pytest.mark.parametrize(
    ("value", "warned"), [(1e-4, "lower"), (1.2e-4, "lower"), (1e-2, None), (0.09, "upper"), (0.1, "upper")]
)
def test_a_best_trial_at_the_end_of_its_range_is_pointed_out(value, warned):
    axes = [study_axes.make_axis(RATE, {"kind": "log_uniform", "low": 1e-4, "high": 0.1, "log": True, "values": ()})]
    found = report.edge_warnings(Trial(0, {RATE: value}, "complete", 0.1, []), axes)
    assert [warned in sentence for sentence in found] == ([True] if warned else [])


def test_off_is_no_end_of_a_range():
    axes = [study_axes.make_axis("model.dropout_rate", {"kind": "uniform", "low": 0.0, "high": 0.5, "log": False})]
    assert not report.edge_warnings(Trial(0, {"model.dropout_rate": 0.0}, "complete", 0.1, []), axes)
    assert report.edge_warnings(Trial(0, {"model.dropout_rate": 0.49}, "complete", 0.1, []), axes)


def test_axes_of_choices():
    names = study_axes.make_axis("optimizer.name", {"kind": "choice", "values": ["sgd", "adam"]})
    assert names == Axis("optimizer.name", 0.0, 1.0, False, ("sgd", "adam"))
    grid = study_axes.make_axis(RATE, {"kind": "choice", "values": [10.0**-k for k in range(10)]})
    assert grid.log and (grid.low, grid.high) == (1e-9, 1.0) and grid.share(1e-9) == 0
    widths = study_axes.make_axis("model.dense", {"kind": "choice", "values": [[8], [16, 8]]})
    assert widths.ticks == ("(8,)", "(16, 8)")


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_a_sweep_of_seeds_alone_has_a_report(seeds, tmp_path):
    ranges = {"seed": space.choice(*seeds)}
    definition = space.Definition(default_config(), ranges, [{"seed": seed} for seed in seeds], space.Plan())
    record = directory.prepare(tmp_path / "seeds", definition, None)
    study = worker.join(record.name, definition, storage.connect(record.storage, heartbeat=60), tmp_path / "seeds")
    for seed in seeds:
        trial = study.ask()
        assert trial.suggest_categorical("seed", seeds) == seed
        trial.set_user_attr("curve", [[10, 1, 0.5, 0.5, 0.9]])
        study.tell(trial, 0.1)
    assert "written" in command("experiments.report", tmp_path / "seeds").stdout
    # More trials than one bought something.
    assert (tmp_path / "seeds" / "figures" / "budget.png").exists() == (len(seeds) > 1)


def test_a_study_without_a_result_is_refused(tmp_path):
    definition = space.Definition(default_config(), SPACE, [], space.Plan())
    record = directory.prepare(tmp_path / "new", definition, None)
    assert "no study" in refusal("experiments.report", tmp_path / "new")
    worker.join(record.name, definition, storage.connect(record.storage, heartbeat=60), tmp_path / "new")
    assert "no complete trial" in refusal("experiments.report", tmp_path / "new")
    assert "no study directory" in refusal("experiments.report", tmp_path)
