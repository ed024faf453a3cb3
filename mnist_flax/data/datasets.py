"""The input pipeline: splits as arrays, the batch order, and the feed that streams from disk.

The order of the batches is a function of (seed, epoch) alone, so the number of a step is the whole state of
the input pipeline: both feeds take the batch of step s from `epoch_order`, wherever they start.
"""

import hashlib
import io
import os
import sys
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Int32, UInt8
from ml_collections import ConfigDict

from mnist_flax.data import idx, prepare
from mnist_flax.runtime.cli import UserError, reason

# Splits depend on the labels and on this number only, never on a run's seed: runs that differ in seed, batch
# size or feed are validated on the same examples, and can be compared.
SPLIT_KEY = 0x6D6E697374

# `examples_sha256` of a dataset's splits. The archives are checked when they are read; this checks what was
# prepared from them, by us or by another program that uses TFDS.
EXAMPLES_SHA256 = {
    "mnist": {
        "train": "386a0fff07efe9ae3f934853780556ca1fe630371d4964508a3e3256c2063b0e",
        "test": "292a2c8e9008782f6c6c94df46012a17c808c2666413d175e62502bbcf68dd61",
    }
}

_DIGITS = tuple("0123456789")
CLASS_NAMES = {
    "mnist": _DIGITS,
    "digits": _DIGITS,
    "fashion_mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
}


class Split(NamedTuple):
    """Examples of one split, in the dataset's order."""

    images: UInt8[np.ndarray, "n 28 28"]
    labels: Int32[np.ndarray, " n"]


class Splits(NamedTuple):
    """What a run trains on, is chosen by, and is scored with."""

    train: Split
    validation: Split
    test: Split
    train_indices: Int32[np.ndarray, " n"]  # where train's examples are in the dataset's own train split


def load(config: ConfigDict) -> Splits:
    """Returns the splits that a config asks for, preparing and decoding the dataset if that was not yet done.

    Validation examples are taken off the dataset's train split in proportion to its classes (None is a
    twelfth: 5,000 of MNIST's), then `train_examples` (None is all) off the rest likewise; both keep the
    dataset's order.

    Args:
      config: `dataset`, `data_dir`, `archive_dir`, `validation_examples`, `train_examples`, `batch_size`.

    Raises:
      UserError: the dataset cannot be prepared or is damaged, or has fewer examples than the config asks for.
    """
    check_sizes(config)
    place = prepare.prepare(config.dataset, config.data_dir, config.archive_dir)
    decoded = _decoded(config.dataset, place)
    classes = len(CLASS_NAMES[config.dataset])
    if any(split.labels.min() < 0 or split.labels.max() >= classes for split in decoded.values()):
        raise UserError(f"{place.directory} has labels beyond the {classes} classes: delete it and run again")
    labels = decoded["train"].labels
    held_out = check_sizes(config, len(labels))
    validation = stratified(labels, held_out)
    train_indices = np.setdiff1d(np.arange(len(labels), dtype=np.int32), validation)
    if config.train_examples is not None:
        train_indices = train_indices[stratified(labels[train_indices], config.train_examples)]
    train = Split(*(array[train_indices] for array in decoded["train"]))
    held = Split(*(array[validation] for array in decoded["train"]))
    return Splits(train, held, decoded["test"], train_indices)


def check_sizes(config: ConfigDict, total: int | None = None) -> int:
    """Gives the number of validation examples, of `total` training examples (None: as many as the dataset has).

    Raises:
      UserError: the config asks for more examples than there are.
    """
    total = prepare.train_examples(config.dataset) if total is None else total
    held_out = total // 12 if config.validation_examples is None else config.validation_examples
    if not 0 <= held_out < total:
        raise UserError(
            f"config.validation_examples={held_out} does not fit: {config.dataset} has {total:,} training examples "
            "to take them from; choose fewer"
        )
    left = total - held_out
    count = left if config.train_examples is None else config.train_examples
    if not 1 <= count <= left:
        raise UserError(
            f"config.train_examples={count} does not fit: {left:,} are left after validation_examples={held_out}"
        )
    if count < config.batch_size:
        raise UserError(
            f"config.batch_size={config.batch_size} is larger than the {count:,} training examples: use at most {count}"
        )
    return held_out


def stratified(labels: Int32[np.ndarray, " n"], count: int) -> Int32[np.ndarray, " count"]:
    """Chooses `count` positions, ascending, with the classes in proportion (largest remainders)."""
    classes, sizes = np.unique(labels, return_counts=True)
    quotas = sizes * count / max(len(labels), 1)
    counts = quotas.astype(int)
    largest = np.argsort(counts - quotas, kind="stable")
    counts[largest[: count - counts.sum()]] += 1
    shuffled = _permutation(len(labels), SPLIT_KEY, 0)
    chosen = [shuffled[labels[shuffled] == label][:n] for label, n in zip(classes, counts, strict=True)]
    return np.sort(np.concatenate([*chosen, np.zeros(0, np.int32)])).astype(np.int32)


def epoch_order(seed: int, epoch: int, num_examples: int, batch_size: int) -> Int32[np.ndarray, "steps batch"]:
    """Positions of the examples in each batch of an epoch, less those at its end that do not fill a batch.

    A permutation drawn with Philox (Salmon et al. 2011) under the key (seed, epoch): the same everywhere.
    """
    steps = num_examples // batch_size
    return _permutation(num_examples, seed, epoch)[: steps * batch_size].reshape(steps, batch_size)


def _permutation(count: int, *key: int) -> Int32[np.ndarray, " count"]:
    # NumPy promises a bit generator's raw output for good, but not what `permutation` makes of it.
    philox = np.random.Philox(key=np.array([number % 2**64 for number in key], np.uint64))
    return np.argsort(philox.random_raw(count), kind="stable").astype(np.int32)


def stream(
    config: ConfigDict,
    train_indices: Int32[np.ndarray, " n"],
    start_step: int,
    steps_per_block: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[tuple[UInt8[np.ndarray, "steps batch 28 28"], Int32[np.ndarray, "steps batch"]]]:
    """Reads the batches of the steps from `start_step` to the end of the run, from disk, ahead of their use.

    Grain reads and decodes in threads. With several processes each reads its own columns of every batch:
    contiguous, in the order of `process_index`.

    Args:
      config: `seed`, `num_epochs`, `batch_size`, `dataset`, `data_dir`, `archive_dir`.
      train_indices: from `load`.
      start_step: global step of the first batch.
      steps_per_block: batches stacked in one block; the last block of an epoch may have fewer.

    Yields:
      uint8 images [steps, local batch, 28, 28] and int32 labels [steps, local batch].

    Raises:
      UserError: the batch does not divide among the processes, or the dataset cannot be prepared.
    """
    import grain

    if config.batch_size % process_count:
        raise UserError(f"batch_size={config.batch_size} does not divide among {process_count} processes")
    local_batch = config.batch_size // process_count
    columns = slice(process_index * local_batch, (process_index + 1) * local_batch)
    steps_per_epoch = len(train_indices) // config.batch_size
    place = prepare.prepare(config.dataset, config.data_dir, config.archive_dir)
    source = _source(config.dataset, place, "train")

    @lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return train_indices[epoch_order(config.seed, epoch, len(train_indices), config.batch_size)]

    def read(step: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, row = divmod(step, steps_per_epoch)
        return _read(source, order(epoch)[row, columns].tolist())

    stop_step = config.num_epochs * steps_per_epoch
    # More threads only contend for the interpreter: 5,000 images a second on 2 cores with one or sixteen.
    batches = (
        grain.MapDataset.range(start_step, stop_step)
        .map(read)
        .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=max(16, 2 * steps_per_block)))
    )
    return _blocks(iter(batches), start_step, stop_step, steps_per_epoch, steps_per_block)


def _blocks(
    batches: Iterator[tuple[np.ndarray, np.ndarray]], step: int, stop: int, steps_per_epoch: int, steps_per_block: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    while step < stop:
        count = min(steps_per_block, steps_per_epoch - step % steps_per_epoch)
        images, labels = zip(*(next(batches) for _ in range(count)), strict=True)
        yield np.stack(images), np.stack(labels)
        step += count


def _source(name: str, place: prepare.Place, split: str) -> Any:
    """TFDS's data source of a split, with images left encoded."""
    import tensorflow_datasets as tfds

    with prepare.quiet_tfds():
        decoders = {"image": tfds.decode.SkipDecoding()}
        return prepare.reading_builder(name, place).as_data_source(split, decoders=decoders)


def _read(source: Any, positions: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Reads and decodes examples: uint8 [n, 28, 28] and int32 [n]. Half the time of TFDS's own decoding."""
    from PIL import Image

    examples = source.__getitems__(positions)
    opened = [Image.open(io.BytesIO(example["image"]), formats=("PNG",)) for example in examples]
    if any(image.size != (idx.IMAGE_SIZE, idx.IMAGE_SIZE) for image in opened):  # before any is decoded
        raise ValueError("an image is not 28 x 28 pixels")
    pixels = b"".join(image.tobytes() for image in opened)
    images = np.frombuffer(pixels, np.uint8).reshape(len(examples), idx.IMAGE_SIZE, idx.IMAGE_SIZE)
    return images, np.array([example["label"] for example in examples], np.int32)


def _decoded(name: str, place: prepare.Place) -> dict[str, Split]:
    """The dataset's own splits, from the decoded copy beside it when that is of these very files."""
    cache = place.work / f"{name}.npz"
    fingerprint = _fingerprint(place.directory)
    if (decoded := _read_cache(cache, fingerprint)) is not None:
        return decoded
    try:
        with prepare.lock(name, place):
            if (decoded := _read_cache(cache, fingerprint)) is None:
                decoded = _decode(name, place)
                _write_cache(cache, fingerprint, decoded)
    except OSError as error:
        logging.warning("decoding %s for this run only: cannot write %s (%s)", name, cache, error.strerror or error)
        decoded = decoded or _decode(name, place)
    return decoded


def _fingerprint(directory: Path) -> str:
    """SHA-256 of the names and contents of a prepared dataset's files: 25 MB for MNIST, some 20 ms."""
    total = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix == ".json" or ".array_record-" in path.name:
            with open(path, "rb") as file:
                total.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _read_cache(path: Path, fingerprint: str) -> dict[str, Split] | None:
    try:
        with np.load(path) as arrays:  # zip's checksums of each array are checked in reading
            if arrays["fingerprint"].item() != fingerprint:
                return None
            decoded = {
                split: Split(arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in ("train", "test")
            }
    except (OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return None  # absent or damaged: decoded again
    whole = all(
        images.shape == (labels.size, 28, 28)
        and labels.ndim == 1
        and (images.dtype, labels.dtype) == (np.uint8, np.int32)
        for images, labels in decoded.values()
    )
    return decoded if whole else None


def _write_cache(path: Path, fingerprint: str, decoded: dict[str, Split]) -> None:
    arrays = {f"{split}_{key}": array for split, s in decoded.items() for key, array in s._asdict().items()}
    temporary = path.with_suffix(".incomplete.npz")  # under the lock: only one process writes it
    try:
        np.savez(temporary, allow_pickle=False, fingerprint=np.array(fingerprint), **arrays)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _decode(name: str, place: prepare.Place) -> dict[str, Split]:
    """Reads and decodes every example, with a progress bar on a terminal.

    Raises:
      UserError: the prepared files are damaged, or hold another dataset.
    """
    from rich.console import Console
    from rich.progress import track

    directory = place.directory
    prepare.check_shards(directory)
    again = f"delete the directory {directory} and run again"
    decoded = {}
    for split in ("train", "test"):
        try:
            source = _source(name, place, split)
            positions = list(range(len(source)))
            chunks = [positions[start : start + 500] for start in range(0, len(source), 500)]
            parts = track(
                (_read(source, chunk) for chunk in chunks),
                f"Decoding {name} ({split})",
                len(chunks),
                console=Console(stderr=True),
                transient=True,
                disable=not sys.stderr.isatty(),
            )
            images, labels = zip(*parts, strict=True)
        except Exception as error:  # damaged files make TFDS, ArrayRecord and Pillow raise nearly anything
            raise UserError(f"{directory} is damaged ({reason(error)}): {again}") from error
        decoded[split] = Split(np.concatenate(images), np.concatenate(labels))
    for split, expected in EXAMPLES_SHA256.get(name, {}).items():
        if examples_sha256(decoded[split]) != expected:
            raise UserError(f"{directory} does not hold the {split} split of {name}: {again}")
    return decoded


def examples_sha256(split: Split) -> str:
    """SHA-256 of the examples (pixels, then label, a byte each) sorted as bytes: of a split in any order."""
    pixels = split.images.reshape(len(split.images), -1)
    rows = np.ascontiguousarray(np.concatenate([pixels, split.labels.astype(np.uint8)[:, None]], axis=1))
    return hashlib.sha256(np.sort(rows.view(f"S{rows.shape[1]}"), axis=0).tobytes()).hexdigest()
