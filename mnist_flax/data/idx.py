"""Reads the four original archives of MNIST, and of the datasets that took its form: gzipped IDX files."""

import gzip
import hashlib
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from mnist_flax.runtime.cli import UserError

IMAGE_SIZE = 28
NUM_CLASSES = 10
# Images and labels of each split; TFDS's addresses end in these names, the same for each dataset.
ARCHIVES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
SPLIT_SIZES = {"train": 60_000, "test": 10_000}


def find(directory: Path) -> dict[str, Path]:
    """The four archives in a directory, by file name.

    Raises:
      UserError: the directory or one of the archives is missing, or may not be read.
    """
    try:
        found = directory.is_dir()
        problem = "is not a directory" if directory.exists() else "does not exist"
    except OSError as error:  # a name that no directory can have
        found, problem = False, f"cannot be used ({error.strerror})"
    if not found:
        raise UserError(f"archive_dir {directory} {problem}: it should hold the four original archives")
    paths = {file: directory / file for files in ARCHIVES.values() for file in files}
    for path in paths.values():
        if os.access(directory, os.X_OK) and not path.is_file():
            raise UserError(f"{path} is missing: archive_dir should hold {', '.join(paths)}")
        if not os.access(path, os.R_OK):
            raise UserError(f"{path} may not be read: change its permissions, or name a copy as archive_dir")
    return paths


def read(
    paths: Mapping[str, Path], content_sums: Mapping[str, str], archive_sums: Mapping[str, str]
) -> dict[str, tuple[UInt8[np.ndarray, "n 28 28"], UInt8[np.ndarray, " n"]]]:
    """Reads and checks the four archives.

    Args:
      paths: of each archive, by its original file name.
      content_sums: SHA-256 of the decompressed bytes, by file name; checked where there is one.
      archive_sums: SHA-256 of the archive itself, by file name; checked where there is one.

    Returns:
      `(images, labels)` of `train` and `test`.

    Raises:
      UserError: an archive is not what it should be; one line that names it.
    """
    splits = {}
    for split, (images_file, labels_file) in ARCHIVES.items():
        count = SPLIT_SIZES[split]
        arrays = []
        for file, shape in ((images_file, (count, IMAGE_SIZE, IMAGE_SIZE)), (labels_file, (count,))):
            path = paths[file]
            try:
                arrays.append(_read_archive(path, shape, content_sums.get(file), archive_sums.get(file)))
            except ValueError as error:
                raise UserError(f"{path} {error}: replace it with the original {file}") from error
        splits[split] = (arrays[0], arrays[1])
    return splits


def _read_archive(path: Path, shape: tuple[int, ...], content_sum: str | None, archive_sum: str | None) -> np.ndarray:
    content = decompress(path, _header_bytes(shape) + math.prod(shape))
    array = parse(content, shape)
    if len(shape) == 1 and array.max(initial=0) >= NUM_CLASSES:
        raise ValueError(f"holds the label {array.max()}, beyond {NUM_CLASSES - 1}")
    if content_sum and hashlib.sha256(content).hexdigest() != content_sum:
        raise ValueError("holds other data than the original (the SHA-256 of its content differs)")
    if archive_sum:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != archive_sum:
                raise ValueError("is not the original archive (its SHA-256 differs)")
    return array


def decompress(path: Path, size: int) -> bytes:
    """The content of a gzip archive, but never more than `size` + 1 bytes of it, whatever it would grow to.

    Raises:
      ValueError: the archive is cut off, damaged or cannot be read.
    """
    try:
        with gzip.open(path) as file:
            return file.read(size + 1)
    except EOFError as error:
        raise ValueError("is cut off") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"is not a sound gzip archive ({error})") from error
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from error


def parse(content: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Parses an IDX file of unsigned bytes: magic number, big-endian sizes, data.

    Raises:
      ValueError: the content is not exactly an array of this shape.
    """
    kinds = {1: "labels", 3: "images"}  # by the number of dimensions, the last byte of the magic number
    if len(content) < 4 or content[:3] != b"\0\0\x08" or content[3] not in kinds:
        raise ValueError("is no IDX file of labels or images")
    if content[3] != len(shape):
        raise ValueError(f"holds {kinds[content[3]]} where {kinds[len(shape)]} are expected")
    header = _header_bytes(shape)
    if len(content) < header:
        raise ValueError("is cut off in its header")
    sizes = tuple(int(size) for size in np.frombuffer(content, ">u4", len(shape), 4))
    if sizes != shape:
        found, expected = (" x ".join(map(str, numbers)) for numbers in (sizes, shape))
        raise ValueError(f"holds {found} {kinds[len(shape)]} where {expected} are expected")
    if len(content) != header + math.prod(shape):
        raise ValueError(f"holds {'less' if len(content) < header + math.prod(shape) else 'more'} data than it says")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _header_bytes(shape: tuple[int, ...]) -> int:
    return 4 + 4 * len(shape)
