"""What a run reads wrong on its test split, the surest first."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from mnist_flax.evaluation import calibration
from mnist_flax.inference.classifier import CalibratedClassifier, splits_at_hand


class Mistake(NamedTuple):
    number: int  # of the example in the test split
    label: int
    scores: Float[np.ndarray, " classes"]  # log probabilities
    image: UInt8[np.ndarray, "28 28"]


class Mistakes(NamedTuple):
    examples: int  # in the test split
    mistakes: tuple[Mistake, ...]  # the most confident first
    unanswered: int  # examples, read right or wrong, whose answer is "?"
    doubtful: int  # mistakes whose answer is "?"


def find_mistakes(reader: CalibratedClassifier) -> Mistakes | None:
    """Every test example whose likeliest class is not its label; None if the dataset is not at hand.

    Raises UserError if the dataset is damaged.
    """
    splits = splits_at_hand(reader.run)
    if splits is None:
        return None
    images, labels = splits.test
    scores = reader.log_probabilities(images)
    likeliest, answered = calibration.answers(scores, reader.threshold)
    wrong = np.flatnonzero(likeliest != labels)
    surest_first = wrong[np.argsort(-scores[wrong].max(axis=1), kind="stable")]
    found = tuple(Mistake(int(i), int(labels[i]), scores[i], images[i]) for i in surest_first)
    return Mistakes(len(labels), found, int((~answered).sum()), int((~answered[wrong]).sum()))
