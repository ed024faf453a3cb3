import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from mnist_flax.configs import default
from mnist_flax.data import datasets, prepare
from mnist_flax.runtime.cli import UserError
from tests import tiny_mnist
from tests.commands import environment


def config_for(data_dir, /, **changes) -> ConfigDict:
    config = ConfigDict(default.get_config().to_dict(), type_safe=False)
    config.update({"dataset": "digits", "validation_examples": 143, "data_dir": str(data_dir), **changes})
    return config


@pytest.fixture(scope="module")
def tiny_data_dir(tmp_path_factory):
    """A data_dir with the tiny MNIST prepared and decoded."""
    directory = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny_mnist.install(monkeypatch.setattr)
        prepare.prepare("mnist", str(directory), str(tiny_mnist.write(directory / "archives")))
    return directory


@pytest.fixture
def tiny(tiny_data_dir, monkeypatch):
    tiny_mnist.install(monkeypatch.setattr)
    defaults = {"dataset": "mnist", "validation_examples": 20, "batch_size": 16}
    return lambda **changes: config_for(tiny_data_dir, **(defaults | changes))


# Batch order


def philox(key: tuple[int, int], count: int) -> list[int]:
    """Philox4x64-10 as in figure 2 and table 2 of Salmon et al. 2011; NumPy's counter starts at one."""
    mask, output = 2**64 - 1, []
    for block in range(1, -(-count // 4) + 1):
        x, k = [block, 0, 0, 0], list(key)
        for _ in range(10):
            low, high = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
            x = [(high >> 64) ^ x[1] ^ k[0], high & mask, (low >> 64) ^ x[3] ^ k[1], low & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        output += x
    return output[:count]


@given(st.integers(0, 2**64 - 1), st.integers(0, 10_000), st.integers(0, 70), st.integers(1, 20))
@settings(deadline=None)
def test_order_is_philox_under_seed_and_epoch(seed, epoch, num_examples, batch_size):
    order = datasets.epoch_order(seed, epoch, num_examples, batch_size)
    draws = philox((seed, epoch), num_examples)
    expected = sorted(range(num_examples), key=draws.__getitem__)
    steps = num_examples // batch_size
    assert order.dtype == np.int32 and order.shape == (steps, batch_size)
    assert order.ravel().tolist() == expected[: steps * batch_size]


def test_order_has_not_changed():
    """Runs that were stopped resume by this order: a change of it makes them other runs."""
    assert datasets.epoch_order(0, 0, 10, 5).tolist() == [[0, 2, 9, 1, 8], [5, 4, 3, 6, 7]]
    assert datasets.epoch_order(-1, 3, 10, 4).tolist() == [[3, 2, 8, 0], [1, 6, 9, 5]]


def test_orders_of_epochs_and_seeds_are_unrelated():
    orders = np.stack([datasets.epoch_order(s, e, 1_000, 1_000)[0] for s in range(5) for e in range(5)])
    agreement = (orders[:, None] == orders[None]).sum(-1)
    np.fill_diagonal(agreement, 0)
    assert agreement.max() < 10  # by chance one position in a thousand
    correlation = np.corrcoef(orders)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 0.15


# Splits


@given(st.lists(st.integers(0, 9), min_size=1, max_size=200), st.floats(0, 1))
def test_stratified_choice_is_proportional_and_exact(labels, fraction):
    labels = np.array(labels, np.int32)
    count = int(fraction * len(labels))
    chosen = datasets.stratified(labels, count)
    assert len(chosen) == count and (np.diff(chosen) > 0).all()
    assert count == 0 or (chosen[0] >= 0 and chosen[-1] < len(labels))
    for label in range(10):
        share = np.sum(labels == label) * count / len(labels)
        assert abs(np.sum(labels[chosen] == label) - share) < 1


def test_splits_divide_the_training_set(digits_data_dir):
    whole = datasets.load(config_for(digits_data_dir, validation_examples=0))
    splits = datasets.load(config_for(digits_data_dir))
    assert [len(split.labels) for split in splits[:3]] == [1_295, 143, 359]
    assert len(whole.validation.labels) == 0 and whole.validation.images.shape == (0, 28, 28)
    assert all(split.images.dtype == np.uint8 and split.labels.dtype == np.int32 for split in splits[:3])
    np.testing.assert_array_equal(whole.train_indices, np.arange(1_438))
    np.testing.assert_array_equal(splits.train.images, whole.train.images[splits.train_indices])
    np.testing.assert_array_equal(splits.train.labels, whole.train.labels[splits.train_indices])
    held_out = np.setdiff1d(whole.train_indices, splits.train_indices)
    np.testing.assert_array_equal(splits.validation.images, whole.train.images[held_out])
    np.testing.assert_array_equal(splits.validation.labels, whole.train.labels[held_out])
    np.testing.assert_array_equal(splits.test.images, whole.test.images)
    counts = np.bincount(splits.validation.labels)
    assert np.abs(counts - np.bincount(whole.train.labels) / 10).max() <= 1
    # Held-out examples are spread over the set, not a run of neighbours.
    assert np.diff(held_out).max() < 100


def test_validation_defaults_to_a_twelfth(digits_data_dir):
    assert len(datasets.load(config_for(digits_data_dir, validation_examples=None)).validation.labels) == 119


def test_splits_do_not_depend_on_seed_batch_size_or_feed(digits_data_dir):
    first = datasets.load(config_for(digits_data_dir))
    other = datasets.load(config_for(digits_data_dir, seed=7, batch_size=64, feed="stream"))
    np.testing.assert_array_equal(first.train_indices, other.train_indices)
    np.testing.assert_array_equal(first.validation.images, other.validation.images)


def test_train_examples_are_a_stratified_part_of_what_is_left(digits_data_dir):
    everything = datasets.load(config_for(digits_data_dir))
    part = datasets.load(config_for(digits_data_dir, train_examples=200))
    assert len(part.train.labels) == 200 and set(part.train_indices) < set(everything.train_indices)
    np.testing.assert_array_equal(part.validation.images, everything.validation.images)
    counts = np.bincount(part.train.labels, minlength=10)
    assert np.abs(counts - np.bincount(everything.train.labels) * 200 / 1_295).max() < 1
    all_of_them = datasets.load(config_for(digits_data_dir, train_examples=1_295))
    np.testing.assert_array_equal(all_of_them.train_indices, everything.train_indices)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"validation_examples": 1_438}, "validation_examples=1438 does not fit"),
        ({"validation_examples": -1}, "validation_examples=-1 does not fit"),
        ({"train_examples": 1_296}, "train_examples=1296 does not fit: 1,295 are left"),
        ({"train_examples": 0}, "train_examples=0 does not fit"),
        ({"batch_size": 1_296}, "config.batch_size=1296 is larger than the 1,295 training examples: use at most 1295"),
        ({"train_examples": 100}, "batch_size=128 is larger than the 100 training examples"),
        ({"dataset": "cifar10"}, "dataset 'cifar10' is unknown"),
    ],
)
def test_what_does_not_fit_is_one_line(digits_data_dir, changes, message):
    with pytest.raises(UserError, match=message):
        datasets.load(config_for(digits_data_dir, **changes))


def test_labels_beyond_the_classes_are_refused(digits_data_dir, monkeypatch):
    monkeypatch.setitem(datasets.CLASS_NAMES, "digits", datasets.CLASS_NAMES["digits"][:9])
    config = config_for(digits_data_dir)
    with pytest.raises(UserError, match="labels beyond the 9 classes: delete it"):
        datasets.load(config)


def test_real_mnist_loads(mnist_data_dir):
    splits = datasets.load(config_for(mnist_data_dir, dataset="mnist", validation_examples=5_000))
    assert [len(split.labels) for split in splits[:3]] == [55_000, 5_000, 10_000]
    assert np.bincount(splits.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    counts = np.bincount(splits.train.labels) + np.bincount(splits.validation.labels)
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


# The decoded copy


def run(program: str, *arguments) -> None:
    line = [sys.executable, "-W", "error", "-c", "import sys\n" + program, *map(str, arguments)]
    subprocess.run(line, env=environment(), check=True, timeout=120)


def test_the_second_start_reads_the_copy_and_needs_neither_tfds_nor_jax(digits_data_dir):
    datasets.load(config_for(digits_data_dir))
    run(
        """
from mnist_flax.data import datasets
from mnist_flax.configs import default
config = default.get_config()
config.dataset, config.data_dir, config.validation_examples = "digits", sys.argv[1], 143
assert len(datasets.load(config).train.labels) == 1_295
heavy = {"tensorflow", "tensorflow_datasets", "jax", "grain", "sklearn", "array_record", "PIL"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
""",
        digits_data_dir,
    )


def same(one: datasets.Splits, other: datasets.Splits) -> bool:
    import jax

    return all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1_000])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


def encrypt(path):
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")  # of the archive's last file, in its directory
    content[entry + 8] |= 1  # says that a password is needed
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, empty, remove, encrypt])
def test_a_damaged_copy_is_made_again(tiny, tiny_data_dir, damage):
    before = datasets.load(tiny())
    copy = tiny_data_dir / ".mnist_flax" / "mnist.npz"
    whole = copy.read_bytes()
    damage(copy)
    assert same(datasets.load(tiny()), before)
    assert len(copy.read_bytes()) == len(whole)


def test_a_copy_of_other_files_is_not_used(tiny, tiny_data_dir, monkeypatch):
    before = datasets.load(tiny())
    copy = tiny_data_dir / ".mnist_flax" / "mnist.npz"
    with np.load(copy) as arrays:
        changed = {name: arrays[name] for name in arrays.files}
    changed |= {"fingerprint": np.array("of other files"), "train_images": 255 - changed["train_images"]}
    np.savez(copy, **changed)
    assert same(datasets.load(tiny()), before)


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: {"train_images": arrays["train_images"][:, ::2, ::2]},
        lambda arrays: {"test_labels": arrays["test_labels"][:-1]},
        lambda arrays: {"train_labels": arrays["train_labels"].astype(np.int64)},
    ],
)
def test_a_copy_that_another_program_made_otherwise_is_not_used(tiny, tiny_data_dir, change):
    before = datasets.load(tiny())
    copy = tiny_data_dir / ".mnist_flax" / "mnist.npz"
    with np.load(copy) as arrays:
        changed = {name: arrays[name] for name in arrays.files}
    np.savez(copy, **(changed | change(changed)))
    assert same(datasets.load(tiny()), before)


@pytest.mark.parametrize("position", [40_000, 70_000])
def test_a_flipped_bit_in_a_prepared_file_is_found(tiny, tiny_data_dir, tmp_path, position):
    directory = shutil.copytree(tiny_data_dir, tmp_path / "copy")
    shard = directory / "mnist" / "3.0.1" / "mnist-train.array_record-00000-of-00001"
    content = bytearray(shard.read_bytes())
    content[position] ^= 16
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged .*: delete .* and run again") as caught:
        datasets.load(tiny(data_dir=str(directory)))
    assert "\n" not in str(caught.value)


def test_another_dataset_under_the_name_of_mnist_is_refused(tiny_data_dir):
    with pytest.raises(UserError, match="does not hold the train split of mnist"):
        datasets._decode("mnist", prepare.prepare("mnist", str(tiny_data_dir)))


def test_without_room_for_the_copy_each_start_decodes(tiny, tiny_data_dir, tmp_path, caplog):
    directory = shutil.copytree(tiny_data_dir, tmp_path / "copy")
    shutil.rmtree(directory / ".mnist_flax")
    (directory / ".mnist_flax").touch()  # no directory can be made here, even by root
    before = datasets.load(tiny())
    with caplog.at_level("WARNING", logger="absl"):
        assert same(datasets.load(tiny(data_dir=str(directory))), before)
    assert sum("for this run only" in message for message in caplog.messages) == 1


def test_a_copy_that_could_not_be_written_whole_is_not_left(tiny, tiny_data_dir, tmp_path):
    directory = shutil.copytree(tiny_data_dir, tmp_path / "copy")
    (directory / ".mnist_flax" / "mnist.npz").unlink(missing_ok=True)
    run(
        """
import resource
from tests import tiny_mnist
tiny_mnist.install()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from mnist_flax.data import datasets
from mnist_flax.configs import default
config = default.get_config()
config.data_dir, config.validation_examples = sys.argv[1], 20
assert len(datasets.load(config).train.labels) == 180
""",
        directory,
    )
    assert os.listdir(directory / ".mnist_flax") == ["mnist.lock"]


# The stream feed


def collect(config, splits, start, steps_per_block, **processes):
    return list(datasets.stream(config, splits.train_indices, start, steps_per_block, **processes))


@pytest.mark.parametrize("start, steps_per_block", [(0, 4), (0, 100), (5, 4), (11, 3), (12, 1), (33, 4)])
def test_stream_gives_the_batches_of_the_order(tiny, start, steps_per_block):
    config = tiny(num_epochs=3, seed=5)  # 180 examples: 11 batches of 16 an epoch
    splits = datasets.load(config)
    step = start
    for images, labels in collect(config, splits, start, steps_per_block):
        assert images.dtype == np.uint8 and labels.dtype == np.int32
        assert len(images) == len(labels) == min(steps_per_block, 11 - step % 11)
        for batch_images, batch_labels in zip(images, labels, strict=True):
            chosen = datasets.epoch_order(5, step // 11, 180, 16)[step % 11]
            np.testing.assert_array_equal(batch_images, splits.train.images[chosen])
            np.testing.assert_array_equal(batch_labels, splits.train.labels[chosen])
            step += 1
    assert step == 33


def test_processes_read_their_own_columns(tiny):
    config = tiny(num_epochs=2, train_examples=100)
    splits = datasets.load(config)
    whole = collect(config, splits, 0, 4)
    parts = [collect(config, splits, 0, 4, process_index=i, process_count=4) for i in range(4)]
    for (images, labels), *shares in zip(whole, *parts, strict=True):
        assert all(share[0].shape[1] == 4 for share in shares)
        np.testing.assert_array_equal(images, np.concatenate([share[0] for share in shares], axis=1))
        np.testing.assert_array_equal(labels, np.concatenate([share[1] for share in shares], axis=1))


def test_a_batch_that_does_not_divide_is_refused_at_once(tiny):
    config = tiny()
    with pytest.raises(UserError, match="batch_size=16 does not divide among 3 processes"):
        datasets.stream(config, np.arange(100, dtype=np.int32), 0, 4, process_index=0, process_count=3)


def test_a_stream_that_is_left_early_lets_the_process_end_in_silence(tiny, tiny_data_dir):
    datasets.load(tiny())
    run(
        """
from tests import tiny_mnist
tiny_mnist.install()
from mnist_flax.data import datasets
from mnist_flax.configs import default
config = default.get_config()
config.data_dir, config.validation_examples, config.batch_size = sys.argv[1], 20, 16
stream = datasets.stream(config, datasets.load(config).train_indices, 0, 4)
next(stream)
assert "tensorflow" not in sys.modules
""",
        tiny_data_dir,
    )
