"""What a run reads wrong on its test split, the surest first."""

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from mnist_flax.recogniser import Reader, splits_at_hand


class Mistake(NamedTuple):
    number: int  # of the example in the test split
    label: int
    probabilities: tuple[float, ...]
    image: UInt8[np.ndarray, "28 28"]


class Mistakes(NamedTuple):
    examples: int  # in the test split
    mistakes: tuple[Mistake, ...]  # the most confident first
    unanswered: int  # examples, read right or wrong, whose answer is "?"


def find_mistakes(reader: Reader) -> Mistakes | None:
    """Every test example whose likeliest class is not its label; None if the dataset is not at hand.

    Raises UserError if the dataset is damaged.
    """
    splits = splits_at_hand(reader.run)
    if splits is None:
        return None
    images, labels = splits.test
    probabilities = np.exp(reader.recogniser(images))
    confidence = probabilities.max(axis=1)
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    found = (
        Mistake(int(i), int(labels[i]), tuple(map(float, probabilities[i])), images[i])
        for i in wrong[np.argsort(-confidence[wrong], kind="stable")]
    )
    return Mistakes(len(labels), tuple(found), int((confidence < reader.threshold).sum()))
