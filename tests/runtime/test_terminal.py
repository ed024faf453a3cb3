import contextlib
import io
import os
import pty
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from mnist_flax.data import datasets
from mnist_flax.evaluation import metrics
from mnist_flax.runtime import terminal
from tests.commands import environment


@pytest.fixture
def screen(monkeypatch) -> io.StringIO:
    """What a terminal of 80 columns shows."""
    shown = io.StringIO()
    monkeypatch.setattr(
        terminal, "console", Console(file=shown, width=80, soft_wrap=True, force_terminal=True, color_system=None)
    )
    return shown


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist"])
def test_a_confusion_matrix_of_thousands_fits_a_terminal(screen, dataset):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, 10_000)
    logits = np.eye(10)[labels] + generator.normal(size=(10_000, 10)) / 3
    scores = metrics.evaluate_logits(logits, labels)
    terminal.print_scores({"dataset": dataset, "split": "test"} | scores, datasets.CLASS_NAMES[dataset])
    lines = screen.getvalue().splitlines()
    assert "\N{HORIZONTAL ELLIPSIS}" not in screen.getvalue() and max(map(len, lines)) <= 90  # with codes of colour
    words = set(screen.getvalue().split())
    expected = {str(count) for row in scores["confusion"] for count in row}
    expected |= {f"{row[key]:.2%}" for row in scores["per_class"] for key in ("precision", "recall")}
    assert expected <= words


def test_the_bar_shows_the_time_left_on_a_terminal(screen):
    with terminal.bar(6_000, 0, terminal.console) as bar:
        bar.update(1_000, 15, 0.1234, 0.9912, 12_345.0)
    wanted = ("17%", ":", "epoch 15", "loss 0.1234", "accuracy 99.12%", "12,345 images/s")
    assert any(all(text in line for text in wanted) for line in screen.getvalue().splitlines())


def test_what_is_wider_than_the_terminal_is_folded(screen):
    shown = terminal.table("run", "a long heading")
    shown.add_row("r" * 100, "9" * 30)
    terminal.console.print(shown)
    assert screen.getvalue().count("r") >= 100 and screen.getvalue().count("9") == 30


NOISY = """
from absl import logging
from mnist_flax.runtime import cli, terminal

def main(argv):
    with terminal.bar(100, 0) as bar:
        bar.update(50, 1, 0.5, 0.5, 1.0)
        logging.warning("checkpoint %d is damaged", 7)
        logging.info("preparing digits")
        bar.line("epoch 1")

cli._is_worth_showing = lambda record: True
cli.run(main, ["noisy"])
"""


def on_terminal(code: str) -> str:
    """What a terminal shows of a program, errors included."""
    shown = b""
    master, slave = pty.openpty()
    variables = environment() | {"COLUMNS": "80", "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code], stdin=slave, stdout=slave, stderr=slave, env=variables)
    os.close(slave)
    with contextlib.suppress(OSError):  # of the end, on Linux
        while part := os.read(master, 65_536):
            shown += part
    os.close(master)
    assert process.wait() == 0, shown
    return shown.decode()


def test_log_lines_stand_above_the_bar_each_once_and_say_no_more_than_their_text():
    lines = [line.rpartition("\x1b[2K")[2] for line in on_terminal(NOISY).split("\r\n")]
    for text in ("warning: checkpoint 7 is damaged", "note: preparing digits", "epoch 1"):
        assert lines.count(text) == 1, lines  # with nothing of the bar in its line


def test_log_lines_stay_out_of_the_terminal_where_errors_go_to_a_file(tmp_path):
    code = f"import os; os.dup2(os.open({str(tmp_path / 'log')!r}, os.O_CREAT | os.O_WRONLY), 2)\n{NOISY}"
    assert "damaged" not in on_terminal(code)
    assert (tmp_path / "log").read_text() == "warning: checkpoint 7 is damaged\nnote: preparing digits\n"
