import numpy as np
import pytest

from mnist_flax.experiments.research import study_axes, study_figures
from mnist_flax.experiments.research.study_axes import Axis, Trial
from tests.experiments.test_space import RATE


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


def test_axes_of_choices():
    names = study_axes.make_axis("optimizer.name", {"kind": "choice", "values": ["sgd", "adam"]})
    assert names == Axis("optimizer.name", 0.0, 1.0, False, ("sgd", "adam"))
    grid = study_axes.make_axis(RATE, {"kind": "choice", "values": [10.0**-k for k in range(10)]})
    assert grid.log and (grid.low, grid.high) == (1e-9, 1.0) and grid.share(1e-9) == 0
    widths = study_axes.make_axis("model.dense", {"kind": "choice", "values": [[8], [16, 8]]})
    assert widths.ticks == ("(8,)", "(16, 8)")
