import io

import numpy as np
import pytest
from rich.console import Console

from mnist_flax.data import datasets
from mnist_flax.evaluation import metrics
from mnist_flax.runtime import terminal as progress


@pytest.fixture
def terminal(monkeypatch) -> io.StringIO:
    """What a terminal of 80 columns shows."""
    shown = io.StringIO()
    monkeypatch.setattr(
        progress, "console", Console(file=shown, width=80, soft_wrap=True, force_terminal=True, color_system=None)
    )
    return shown


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist"])
def test_a_confusion_matrix_of_thousands_fits_a_terminal(terminal, dataset):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, 10_000)
    logits = np.eye(10)[labels] + generator.normal(size=(10_000, 10)) / 3
    scores = metrics.evaluate_logits(logits, labels)
    progress.print_scores({"dataset": dataset, "split": "test"} | scores, datasets.CLASS_NAMES[dataset])
    lines = terminal.getvalue().splitlines()
    assert "\N{HORIZONTAL ELLIPSIS}" not in terminal.getvalue() and max(map(len, lines)) <= 90  # with codes of colour
    words = set(terminal.getvalue().split())
    expected = {str(count) for row in scores["confusion"] for count in row}
    expected |= {f"{row[key]:.2%}" for row in scores["per_class"] for key in ("precision", "recall")}
    assert expected <= words


def test_the_bar_shows_the_time_left_on_a_terminal(terminal):
    with progress.bar(6_000, 0) as bar:
        bar.update(1_000, 15, 0.1234, 0.9912, 12_345.0)
    wanted = ("17%", ":", "epoch 15", "loss 0.1234", "accuracy 99.12%", "12,345 images/s")
    assert any(all(text in line for text in wanted) for line in terminal.getvalue().splitlines())


def test_what_is_wider_than_the_terminal_is_folded(terminal):
    shown = progress.table("run", "a long heading")
    shown.add_row("r" * 100, "9" * 30)
    progress.console.print(shown)
    assert terminal.getvalue().count("r") >= 100 and terminal.getvalue().count("9") == 30
