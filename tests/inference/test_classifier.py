import json
import shutil

import numpy as np
import pytest
from scipy.special import log_softmax

from mnist_flax.data import datasets
from mnist_flax.inference import classifier
from mnist_flax.inference.run import load_run
from mnist_flax.runtime.cli import UserError


def test_calibration_is_kept_and_made_anew_for_other_parameters(digits_run, tmp_path):
    place = shutil.copytree(digits_run, tmp_path / "run")
    path = place / "calibration.json"
    path.unlink(missing_ok=True)
    trained = load_run(place)
    classifier.load_classifier(trained)
    kept = json.loads(path.read_text())
    assert 0.1 <= kept["temperature"] <= 10 and 0 < kept["threshold"] <= 1
    assert kept["errors"] <= kept["accepted_error"] * kept["answered"]
    path.write_text(json.dumps(kept | {"threshold": 0.123}))
    assert classifier.load_classifier(trained).threshold == 0.123  # it is read, not fitted
    path.write_text(json.dumps(kept | {"digest": "of another model", "threshold": 0.123}))
    classifier.load_classifier(trained)
    assert json.loads(path.read_text()) == kept
    path.write_text("{")
    with pytest.raises(UserError, match=r"calibration\.json is damaged: delete it"):
        classifier.load_classifier(trained)
    path.unlink()
    classifier.load_classifier(trained)
    assert json.loads(path.read_text()) == kept


def test_probabilities_are_the_linen_models_at_the_temperature_that_was_fitted(digits_run, tmp_path):
    trained = load_run(shutil.copytree(digits_run, tmp_path / "run"))
    reader = classifier.load_classifier(trained)
    splits = datasets.load(trained.config)
    model = trained.model.clone(compute_dtype=np.dtype("float32"), impl="lax")

    def log_probabilities(split, temperature):
        logits = np.asarray(model.apply(trained.variables, split.images / np.float32(255)), np.float64)
        return log_softmax(logits / temperature, axis=1)

    np.testing.assert_allclose(
        reader.log_probabilities(splits.test.images), log_probabilities(splits.test, reader.temperature), atol=1e-4
    )
    validation = splits.validation
    losses = [
        -log_probabilities(validation, reader.temperature * factor)[
            np.arange(len(validation.labels)), validation.labels
        ]
        for factor in (0.9, 1.0, 1.1)
    ]
    assert np.mean(losses[1]) <= min(np.mean(losses[0]), np.mean(losses[2])) + 1e-6
    assert classifier.load_classifier(trained, 0.25).threshold == 0.25


def test_a_run_that_cannot_be_calibrated_says_so_and_answers_at_the_default(digits_run, tmp_path, caplog):

    trained = load_run(shutil.copytree(digits_run, tmp_path / "run"))
    (tmp_path / "run" / "calibration.json").unlink(missing_ok=True)
    trained.config.validation_examples = 0
    caplog.set_level("INFO", "absl")
    reader = classifier.load_classifier(trained)
    assert (reader.temperature, reader.threshold) == (1.0, classifier.DEFAULT_THRESHOLD)
    (said,) = caplog.messages
    assert "\n" not in said and "is not calibrated, since no examples were held out" in said
    classifier.load_classifier(trained, 0.5)
    assert len(caplog.messages) == 1 and not (tmp_path / "run" / "calibration.json").exists()


def test_a_run_that_does_not_read_digits_is_refused(digits_run):
    trained = load_run(digits_run)
    trained.config.dataset = "fashion_mnist"
    with pytest.raises(UserError, match="was trained on fashion_mnist, not on digits"):
        classifier.load_classifier(trained._replace(class_names=tuple("abcdefghij")))
