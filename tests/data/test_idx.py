import gzip
import hashlib
import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnist_flax.data import idx
from mnist_flax.runtime.cli import UserError

SHAPES = [(6,), (3, 4, 5)]


def encoded(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def filled(shape: tuple[int, ...]) -> np.ndarray:
    return (np.arange(math.prod(shape)) % 10).astype(np.uint8).reshape(shape)


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """Sound archives of 20 and 10 examples, their arrays, and the SHA-256 of their contents."""
    monkeypatch.setattr(idx, "SPLIT_SIZES", {"train": 20, "test": 10})
    arrays = {}
    for split, files in idx.ARCHIVES.items():
        for file, shape in zip(files, [(idx.SPLIT_SIZES[split], 28, 28), (idx.SPLIT_SIZES[split],)], strict=True):
            arrays[file] = filled(shape)
            (tmp_path / file).write_bytes(gzip.compress(encoded(arrays[file])))
    sums = {file: hashlib.sha256(encoded(array)).hexdigest() for file, array in arrays.items()}
    return tmp_path, arrays, sums


def read(directory, content_sums=(), archive_sums=()):
    return idx.read(idx.find(directory), dict(content_sums), dict(archive_sums))


@pytest.mark.parametrize("shape", SHAPES)
@given(content=st.binary(max_size=100))
def test_any_bytes_are_refused_or_are_the_array(shape, content):
    try:
        array = idx.parse(content, shape)
    except ValueError:
        return
    assert encoded(array) == content and array.shape == shape


@pytest.mark.parametrize("shape", SHAPES)
@given(data=st.data())
def test_a_changed_file_is_refused_or_differs_only_in_its_data(shape, data):
    array = filled(shape)
    content = bytearray(encoded(array))
    position = data.draw(st.integers(0, len(content) - 1))
    match data.draw(st.sampled_from(["flip", "cut", "insert"])):
        case "flip":
            content[position] ^= data.draw(st.integers(1, 255))
        case "cut":
            del content[position:]
        case "insert":
            content.insert(position, 0)
    try:
        found = idx.parse(bytes(content), shape)
    except ValueError:
        return
    assert position >= 4 + 4 * len(shape) and np.sum(found != array) == 1


@given(content=st.binary(max_size=300), damage=st.integers(0, 10_000), flip=st.integers(0, 255))
def test_a_damaged_archive_is_refused_or_gives_its_content(tmp_path_factory, content, damage, flip):
    archive = bytearray(gzip.compress(content, mtime=0))
    archive[damage % len(archive)] ^= flip
    path = tmp_path_factory.getbasetemp() / "damaged.gz"
    path.write_bytes(archive)
    try:
        found = idx.decompress(path, len(content))
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        # A header's time may change; the checksum guards the rest, unless reading stopped at too much of it.
        assert found == content or len(found) == len(content) + 1


def test_an_archive_that_would_grow_is_read_no_further_than_needed(tmp_path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(bytes(50_000_000)))
    assert len(idx.decompress(path, 1_000)) == 1_001


def test_sound_archives_are_read(archives):
    directory, arrays, sums = archives
    splits = read(directory, sums)
    for split, files in idx.ARCHIVES.items():
        for found, file in zip(splits[split], files, strict=True):
            np.testing.assert_array_equal(found, arrays[file])


def test_a_recompressed_archive_is_accepted_by_its_content_and_refused_by_its_own_sum(archives):
    directory, arrays, sums = archives
    own_sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}
    read(directory, archive_sums=own_sums)
    for file, array in arrays.items():
        (directory / file).write_bytes(gzip.compress(encoded(array), compresslevel=1, mtime=1))
    read(directory, content_sums=sums)
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz is not the original archive"):
        read(directory, archive_sums=own_sums)


TRAIN_IMAGES, TRAIN_LABELS = idx.ARCHIVES["train"]
TEST_IMAGES, TEST_LABELS = idx.ARCHIVES["test"]


def exchange(directory, one, other):
    content = (directory / one).read_bytes()
    (directory / one).write_bytes((directory / other).read_bytes())
    (directory / other).write_bytes(content)


def change_pixel(directory, file):
    content = bytearray(gzip.decompress((directory / file).read_bytes()))
    content[100] ^= 1
    (directory / file).write_bytes(gzip.compress(content))


def set_label(directory, file, label):
    content = bytearray(gzip.decompress((directory / file).read_bytes()))
    content[-1] = label
    (directory / file).write_bytes(gzip.compress(content))


def cut(directory, file, keep):
    content = (directory / file).read_bytes()
    (directory / file).write_bytes(content[: int(len(content) * keep)])


def append(directory, file):
    content = gzip.decompress((directory / file).read_bytes())
    (directory / file).write_bytes(gzip.compress(content + b"\0"))


def make_directory(directory, file):
    (directory / file).unlink()
    (directory / file).mkdir()


@pytest.mark.parametrize(
    "damage, file, problem",
    [
        (lambda d: exchange(d, TRAIN_IMAGES, TEST_IMAGES), TRAIN_IMAGES, "holds 10 x 28 x 28 images"),
        (lambda d: exchange(d, TRAIN_LABELS, TEST_LABELS), TRAIN_LABELS, "holds 10 labels where 20"),
        (lambda d: exchange(d, TEST_IMAGES, TEST_LABELS), TEST_IMAGES, "holds labels where images"),
        (lambda d: change_pixel(d, TEST_IMAGES), TEST_IMAGES, "holds other data"),
        (lambda d: set_label(d, TEST_LABELS, 10), TEST_LABELS, "holds the label 10"),
        (lambda d: set_label(d, TEST_LABELS, 3), TEST_LABELS, "holds other data"),
        (lambda d: cut(d, TRAIN_IMAGES, 0.5), TRAIN_IMAGES, "is cut off"),
        (lambda d: cut(d, TRAIN_LABELS, 0.0), TRAIN_LABELS, "is no IDX file"),
        (lambda d: append(d, TEST_LABELS), TEST_LABELS, "holds more data"),
        (lambda d: (d / TEST_IMAGES).write_bytes(b"<html>"), TEST_IMAGES, "is not a sound gzip archive"),
        (lambda d: (d / TEST_IMAGES).unlink(), TEST_IMAGES, "is missing"),
        (lambda d: make_directory(d, TEST_IMAGES), TEST_IMAGES, "is missing"),
    ],
)
def test_each_fault_is_one_line_that_names_the_file(archives, damage, file, problem):
    directory, _, sums = archives
    damage(directory)
    with pytest.raises(UserError) as caught:
        read(directory, sums)
    assert f"{directory / file} {problem}" in str(caught.value) and "\n" not in str(caught.value)


def test_archive_dir_must_be_a_directory(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        idx.find(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a directory"):
        idx.find(tmp_path / "file")
