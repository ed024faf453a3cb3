"""How well forms are read: `python -m experiments.forms RUN [--forms=20]`.

Draws forms from the test split's digits (form_generator.py), clean and degraded, on plain, ruled, boxed and squared
paper, and some whose digits touch, reads them as pages, and prints shares with 95 % intervals. A digit is read if the
answer at its place is right; `?` and digits that were not found count against it. A number is read if all its digits
are, and nothing else was taken for a part of it. It takes about 2 minutes on 2 cores.
"""

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
from typing import NamedTuple

import numpy as np
from absl import flags
from jaxtyping import Float

from mnist_flax.inference import model_flags
from mnist_flax.runtime import cli

_FORMS = flags.DEFINE_integer("forms", 20, "forms of each kind; every fourth is light on dark.", lower_bound=1)
_SPLIT = flags.DEFINE_enum("split", "test", ["validation", "test"], "whose digits are on the forms.")


class Score(NamedTuple):
    """Counts over forms."""

    digits: int = 0
    read: int = 0
    unsure: int = 0  # answered "?"
    wrong: int = 0  # answered, and wrong
    missed: int = 0  # not found at their place
    extra: int = 0  # found where there is none
    numbers: int = 0
    numbers_read: int = 0


def score(form, reading) -> Score:
    """Compares a reading with the form (see `form_generator.Form`) that it is of."""
    texts = [number for line in form.lines for number in line]
    truth, digits = "".join(texts), reading.digits
    places = matches(form.boxes, np.array([digit.box for digit in digits]).reshape(-1, 4))
    found = [(label, digits[j]) for label, j in zip(truth, places, strict=True) if j >= 0]

    numbers = [number for line in reading.lines for number in line]
    owner = [index for index, number in enumerate(numbers) for _ in number.digits]
    numbers_read, start = 0, 0
    for text in texts:
        owners = {owner[j] if j >= 0 else -1 for j in places[start : start + len(text)]}
        numbers_read += len(owners) == 1 and -1 not in owners and numbers[owners.pop()].text == text
        start += len(text)
    return Score(
        digits=len(truth),
        read=sum(digit.text == label for label, digit in found),
        unsure=sum(not digit.answered for _, digit in found),
        wrong=sum(digit.answered and digit.text != label for label, digit in found),
        missed=len(truth) - len(found),
        extra=len(digits) - len(found),
        numbers=len(texts),
        numbers_read=numbers_read,
    )


def matches(true: Float[np.ndarray, "digits 4"], found: Float[np.ndarray, "boxes 4"]) -> list[int]:
    """For each true box the index of the found one that is its own, or -1.

    Those belong together that overlap by more than 40 % of their union, each with one other at most, so that all
    overlap as much as they can.
    """
    from scipy.optimize import linear_sum_assignment

    low = np.maximum(true[:, None, :2], found[None, :, :2])
    high = np.minimum(true[:, None, 2:], found[None, :, 2:])
    common = np.prod(np.maximum(high - low, 0), axis=2)
    area, other = (np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (true, found))
    overlap = common / (area[:, None] + other[None] - common)
    overlap = np.where(overlap > 0.4, overlap, 0)
    result = np.full(len(true), -1)
    for i, j in zip(*linear_sum_assignment(overlap, maximize=True), strict=True):
        if overlap[i, j]:
            result[i] = j
    return result.tolist()


def total(scores: list[Score]) -> Score:
    return Score(*(sum(counts) for counts in zip(*scores, strict=True)))


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise cli.UserError("name one run directory: python -m experiments.forms RUN")
    from mnist_flax.data import datasets
    from mnist_flax.evaluation import metrics
    from mnist_flax.experiments.benchmarks import form_generator
    from mnist_flax.inference import classifier
    from mnist_flax.ocr import page_reader
    from mnist_flax.runtime import devices, terminal

    page_reader.require_packages()
    trained = model_flags.load(argv[1])
    config = trained.config
    devices.keep_compiled_programs()
    reader = classifier.load_classifier(trained)
    split = getattr(datasets.load(config), _SPLIT.value)
    if not len(split.labels):
        raise cli.UserError(f"the run has no {_SPLIT.value} examples: choose another --split")

    columns = ("forms", "paper", "digits", "read", "95 %", "?", "wrong", "missed", "extra", "numbers")
    table = terminal.table(*columns, title=f"{config.dataset} {_SPLIT.value} digits on forms")
    styles = {"clean": form_generator.CLEAN, "degraded": form_generator.DEGRADED, "touching": form_generator.JOINED}
    for name, style in styles.items():
        scores: dict[str, list[Score]] = {}
        for kind, paper in enumerate(form_generator.PAPERS):
            if style.touching and paper != "plain":
                continue
            for i in range(_FORMS.value):
                # The forms of one split are no copies of the other's: what was tuned on them would be known.
                generator = np.random.default_rng([kind, i, _SPLIT.value == "test"])
                form = form_generator.draw((split.images, split.labels), generator, style, paper, inverted=i % 4 == 3)
                grey = form.image.astype(np.float32) / 255
                result = page_reader.read([grey], "page", reader.log_probabilities, reader.threshold)[0]
                scores.setdefault(paper, []).append(score(form, result))
        rows = {paper: total(each) for paper, each in scores.items()}
        if len(rows) > 1:
            rows["all"] = total(list(rows.values()))
        for paper, s in rows.items():
            low, high = metrics.wilson_interval(s.read, s.digits)
            shares = (f"{count / s.digits:.1%}" for count in (s.unsure, s.wrong, s.missed, s.extra))
            interval = f"{100 * low:.1f}-{100 * high:.1f}"
            numbers = f"{s.numbers_read / s.numbers:.1%}"
            table.add_row(name, paper, f"{s.digits:,}", f"{s.read / s.digits:.1%}", interval, *shares, numbers)
        table.add_section()
    terminal.console.print(table)


if __name__ == "__main__":
    cli.run(main)
