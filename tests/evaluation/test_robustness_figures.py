import numpy as np
import pytest

from mnist_flax.evaluation import robustness, robustness_figures
from tests.evaluation.test_robustness import by_brightness, some_digits


@pytest.mark.parametrize("temperature", [2.0, None])
def test_figures_show_the_results(temperature):
    split = some_digits()
    found = robustness.measure(by_brightness, split)
    results = robustness.summarize(found, split.labels, temperature)
    figures = robustness_figures.draw(results, split.images)
    cells = [text.get_text() for text in figures["corrupted_accuracy"].axes[0].texts]
    shares = np.array(list(found.corrupted.values()))
    assert cells == [f"{100 * share:.1f}" for share in (*shares.ravel(), *shares.mean(axis=0))]
    assert len(figures["corruptions"].axes[0].images) == 15 * 6
    for figure in figures.values():
        figure.canvas.draw()
    assert {axes.get_ylabel() for axes in figures["affine"].axes} == {"accuracy"}
    clean, corrupted = figures["calibration"].axes
    ways = [text.get_text().partition(":")[0] for text in clean.get_legend().get_texts()]
    assert ways == ["unscaled", "temperature scaled"][: len(results["calibration"]["clean"])]
    last, first = clean.get_xticklabels()[-1], corrupted.get_xticklabels()[0]
    assert first.get_window_extent().x0 - last.get_window_extent().x1 > 10  # pixels, of 992
