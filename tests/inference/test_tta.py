import json
import shutil

import jax
import numpy as np
import pytest
from scipy import ndimage

from mnist_flax.data import datasets
from mnist_flax.evaluation.metrics import evaluate_logits
from mnist_flax.inference import tta
from mnist_flax.inference.run import Run, load_run
from mnist_flax.runtime.cli import UserError
from mnist_flax.training import augment
from tests.commands import command, refusal

COUNT = 5


@pytest.fixture(scope="module")
def trained(digits_run) -> Run:
    return load_run(digits_run)


@pytest.fixture(scope="module")
def network(trained):
    return trained.model.clone(compute_dtype=np.dtype("float32"))


@pytest.fixture(scope="module")
def split(trained) -> datasets.Split:
    return datasets.load(trained.config).test


def test_it_is_the_mean_over_moved_copies(trained, network, split):
    """The copies made by SciPy, the mean taken of probabilities in float64."""
    images = split.images[:40] / np.float32(255)
    looking = tta.make_tta(network, trained.config, COUNT)
    assert looking.strength["rotation"] == pytest.approx(0.3 * trained.config.augment.rotation)
    answers = []
    for key in jax.random.split(jax.random.key(0), COUNT):
        rotation, zoom, shear, *shift = 2 * np.asarray(jax.random.uniform(key, (7,)), np.float64)[:5] - 1
        matrix = augment.affine_matrix(
            np.array([rotation * looking.strength["rotation"]]),
            np.array([shift]) * looking.strength["shift"],
            np.array([1 + zoom * looking.strength["zoom"]]),
            np.array([shear * looking.strength["shear"]]),
            (28, 28),
        )[0]
        moved = np.stack([ndimage.affine_transform(i, np.asarray(matrix), order=1, output=np.float32) for i in images])
        logits = np.asarray(network.apply(trained.variables, moved), np.float64)
        odds = np.exp(logits - logits.max(1, keepdims=True))
        answers.append(odds / odds.sum(1, keepdims=True))
    actual = np.exp(np.asarray(jax.jit(looking.apply)(trained.variables, images), np.float64))
    np.testing.assert_allclose(actual, np.mean(answers, 0), atol=2e-4)
    assert np.abs(answers[0] - answers[1]).max() > 1e-3  # they do differ


def test_an_answer_depends_on_no_other_image(trained, network, split):
    images = split.images[:9] / np.float32(255)
    look = jax.jit(tta.make_tta(network, trained.config, COUNT).apply)
    alone = np.concatenate([look(trained.variables, image[None]) for image in images])
    np.testing.assert_allclose(look(trained.variables, images), alone, atol=1e-5)


def test_any_number_of_views_takes_no_more_memory(trained, network, split):
    images = split.images[:40] / np.float32(255)
    look = jax.jit(tta.make_tta(network, trained.config, 3_000_000).apply)
    assert look.lower(trained.variables, images).compile().memory_analysis().temp_size_in_bytes < 100e6


def test_the_command_scores_it_beside_the_other_score(digits_run, tmp_path, trained, split):
    place = tmp_path / "run"
    shutil.copytree(digits_run, place)
    before = (place / "evaluation_test.json").read_text()
    command("mnist_flax.evaluate", place, f"--views={COUNT}")
    assert (place / "evaluation_test.json").read_text() == before
    scores = json.loads((place / f"evaluation_test_{COUNT}_views.json").read_text())
    looking = tta.make_tta(trained.model, trained.config, COUNT)
    logits = np.asarray(looking.apply(trained.variables, split.images / np.float32(255)))
    assert abs(scores["errors"] - evaluate_logits(logits, split.labels)["errors"]) <= 1  # compiled otherwise
    assert scores["examples"] == len(split.labels)


def test_an_ensemble_looks_again_too(digits_ensemble, tmp_path):
    place = tmp_path / "ensemble"
    shutil.copytree(digits_ensemble[0], place)
    command("mnist_flax.evaluate", place, "--views=2")
    assert json.loads((place / "evaluation_test_2_views.json").read_text())["accuracy"] > 0.8


def test_mistakes(digits_run, trained, network):
    assert "--views" in refusal("mnist_flax.evaluate", digits_run, "--views=0")
    assert "leave out --views" in refusal("mnist_flax.evaluate", digits_run, "--views=4", "--corruptions")
    config = trained.config.copy_and_resolve_references()
    for kind in ("rotation", "shift", "zoom", "shear"):
        config.augment[kind] = 0.0
    with pytest.raises(UserError, match="nothing in this run"):
        tta.make_tta(network, config, 4)
