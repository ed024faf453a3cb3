import numpy as np

from mnist_flax.data import datasets
from mnist_flax.inference import classifier, mistakes
from mnist_flax.inference.run import load_run


def test_they_are_found_surest_first_and_counted(digits_run):
    """Against a loop over the examples; the answers are made up."""
    trained = load_run(digits_run)
    test = datasets.load(trained.config).test
    probabilities = np.random.default_rng(0).dirichlet(np.full(10, 0.3), len(test.labels))
    reader = classifier.CalibratedClassifier(trained, lambda images: np.log(probabilities), 1.0, 0.6)
    found = mistakes.find_mistakes(reader)
    wrong = [i for i, each in enumerate(probabilities) if each.argmax() != test.labels[i]]
    wrong.sort(key=lambda i: -probabilities[i].max())
    assert [mistake.number for mistake in found.mistakes] == wrong and found.examples == len(test.labels)
    assert found.unanswered == sum(each.max() < 0.6 for each in probabilities)
    assert found.doubtful == sum(probabilities[i].max() < 0.6 for i in wrong)
    for mistake in found.mistakes:
        assert mistake.label == test.labels[mistake.number]
        np.testing.assert_array_equal(mistake.image, test.images[mistake.number])
        np.testing.assert_array_equal(mistake.scores, np.log(probabilities[mistake.number]))


def test_there_are_none_where_the_dataset_is_not_at_hand(digits_run, tmp_path):
    trained = load_run(digits_run)
    trained.config.dataset, trained.config.data_dir = "mnist", str(tmp_path)
    reader = classifier.CalibratedClassifier(trained, lambda images: images, 1.0, 0.5)
    assert mistakes.find_mistakes(reader) is None and not any(tmp_path.iterdir())
