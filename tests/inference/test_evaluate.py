import numpy as np
import pytest

from mnist_flax.data import datasets
from mnist_flax.inference import evaluate
from mnist_flax.inference.run import load_run
from mnist_flax.runtime.cli import UserError


@pytest.mark.parametrize("split", ["validation", "test"])
def test_scores_are_those_of_plain_flax(split, digits_run):
    trained = load_run(digits_run)
    examples = getattr(datasets.load(trained.config), split)
    scores = evaluate.evaluate(trained, split, "last")
    logits = np.asarray(trained.model.apply(trained.variables, examples.images / np.float32(255)))
    assert (scores["dataset"], scores["split"], scores["checkpoint"]) == ("digits", split, "last")
    assert scores["examples"] == len(examples.labels)
    assert abs(scores["errors"] - int((logits.argmax(1) != examples.labels).sum())) <= 1  # compiled otherwise


def test_a_split_that_is_none_or_has_no_examples_is_refused(digits_run):
    trained = load_run(digits_run)
    with pytest.raises(UserError, match="'held_out' is unknown: use 'train', 'validation' or 'test'"):
        evaluate.load_split(trained, "held_out")
    trained.config.validation_examples = 0
    with pytest.raises(UserError, match="has no validation examples"):
        evaluate.load_split(trained, "validation")
