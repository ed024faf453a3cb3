import re

import matplotlib.image
import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from mnist_flax.experiments import report
from mnist_flax.experiments.research import directory, space, storage, study_axes, worker
from mnist_flax.experiments.research.study_axes import Trial
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
