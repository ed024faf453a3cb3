"""Prepares datasets with TFDS, without TensorFlow: once, as ArrayRecord that plain `tfds.data_source` reads.

TFDS's own builders of MNIST, Fashion-MNIST and KMNIST read and encode with TensorFlow. The subclasses here keep
their names, versions, features and checksums, and do that work with gzip, NumPy and Pillow. `digits` is a builder
of ours over scikit-learn's bundled digits.

A dataset is prepared under `<data_dir>/.mnist_flax`, checked, and only then renamed to its place, by one process
at a time: what stands at `<data_dir>/<name>/<version>` is whole, whenever a process was killed.
"""

import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from absl import logging

from mnist_flax.cli import UserError

VERSIONS = {"mnist": "3.0.1", "fashion_mnist": "3.0.1", "kmnist": "3.0.1", "digits": "1.0.0"}
IMAGE_SIZE = 28
NUM_CLASSES = 10

# The archives' names are the last part of TFDS's addresses, the same for the three datasets.
ARCHIVES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
SPLIT_SIZES = {"train": 60_000, "test": 10_000}

# SHA-256 of the decompressed archives, so that a recompressed one is accepted. For Fashion-MNIST and KMNIST only
# the sums of the archives themselves are published (in TFDS's url_checksums), and those are checked instead.
CONTENT_SHA256 = {
    "mnist": {
        "train-images-idx3-ubyte.gz": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte.gz": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte.gz": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    }
}

WAYS_OUT = (
    "give a directory of the four original archives with --config.archive_dir=DIR, "
    "or train on the embedded digits with --config.dataset=digits"
)


class Place(NamedTuple):
    """Where a dataset lives."""

    root: Path  # TFDS's data_dir
    directory: Path  # the prepared dataset: its shards, dataset_info.json and features.json
    work: Path  # ours: lock, staging and the decoded arrays; TFDS skips names that begin with a dot


def prepare(name: str, data_dir: str | None = None, archive_dir: str | None = None) -> Place:
    """Returns where the dataset `name` is prepared, preparing it first when it is not.

    Args:
      name: `mnist`, `fashion_mnist`, `kmnist` or `digits`.
      data_dir: where TFDS keeps its datasets; None is `TFDS_DATA_DIR`, else `~/tensorflow_datasets`, as in TFDS.
      archive_dir: directory of the four original IDX archives, used instead of a download.

    Raises:
      UserError: an unknown dataset, an archive that is missing or not what it should be, no network, a disk that
        is full or read-only, or a prepared directory that is not whole.
    """
    if name not in VERSIONS:
        raise UserError(f"dataset {name!r} is unknown: choose one of {', '.join(VERSIONS)}")
    root = _resolve(data_dir)
    try:
        place = _place(name, root)
        if _is_prepared(place.directory):
            return place
        with lock(name, place):
            place = _place(name, root)
            if not _is_prepared(place.directory):
                _build(name, place, Path(archive_dir).expanduser() if archive_dir else None)
        return place
    except OSError as error:
        raise UserError(
            f"cannot prepare {name} in {root}: {_reason(error)}; "
            "make room or let it be written to, or choose another directory with --config.data_dir="
        ) from error


@contextlib.contextmanager
def lock(name: str, place: Place) -> Iterator[None]:
    """Holds the dataset's lock, waiting while another process does; the kernel frees it when its holder dies.

    Raises:
      OSError: the directory cannot be written to.
    """
    place.work.mkdir(parents=True, exist_ok=True)
    with open(place.work / f"{name}.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.info("another process is preparing %s in %s: waiting for it", name, place.root)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check_shards(directory: Path) -> None:
    """Counts the records of every shard that `dataset_info.json` lists.

    Raises:
      UserError: a shard is missing, cut off, or holds another number of records than listed; it is named.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    info = _read_info(directory)
    for split in info["splits"]:
        lengths = [int(length) for length in split["shardLengths"]]
        for shard, length in enumerate(lengths):
            path = (
                directory / f"{info['name']}-{split['name']}.array_record-{shard:05d}-of-{len(lengths):05d}"
            )
            try:
                count = ArrayRecordReader(str(path)).num_records() if path.is_file() else None
            except (RuntimeError, ValueError):
                count = 0
            if count != length:
                problem = (
                    "is missing" if count is None else f"is damaged (holds {count:,} of {length:,} examples)"
                )
                raise UserError(f"{path} {problem}: delete the directory {directory} and run again")


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Keeps TFDS's messages back; its progress bars are shown when standard error is a terminal."""
    import tensorflow_datasets as tfds

    verbosity = logging.get_verbosity()
    tfds.display_progress_bar(sys.stderr.isatty())
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        tfds.display_progress_bar(True)


def _resolve(data_dir: str | None) -> Path:
    text = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in text:
        raise UserError(f"data_dir {text} is not a local directory: choose one with --config.data_dir=")
    return Path(text).expanduser().absolute()


def _place(name: str, root: Path) -> Place:
    """The dataset's place: TFDS's own, or beside it when TFDS keeps another file format there."""
    directory = root / name / VERSIONS[name]
    if (directory / "dataset_info.json").is_file():
        info = _read_info(directory)
        # Files of TFDS before 4.0 name no format: they are TFRecord.
        formats = [info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", [])]
        if "array_record" not in formats:
            directory = root / "array_record" / name / VERSIONS[name]
    return Place(root, directory, root / ".mnist_flax")


def _read_info(directory: Path) -> dict[str, Any]:
    path = directory / "dataset_info.json"
    try:
        info = json.loads(path.read_bytes())
        if not isinstance(info["splits"], list):
            raise TypeError("splits")
        return info
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: delete the directory {directory} and run again") from error


def _is_prepared(directory: Path) -> bool:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    if not (directory / "dataset_info.json").is_file():
        raise UserError(
            f"{directory} is not a dataset that TFDS prepared: delete it or choose another data_dir"
        )
    return True


def _reason(error: OSError) -> str:
    reason = f"{error.strerror}: {error.filename}" if error.strerror and error.filename else error.strerror
    return reason or " ".join(str(error).split())


def _build(name: str, place: Place, archive_dir: Path | None) -> None:
    import tensorflow_datasets as tfds

    if place.directory.parent.parent != place.root:
        logging.info(
            "%s holds %s in another file format: preparing it in %s", place.root, name, place.directory
        )
    logging.info("preparing %s in %s", name, place.directory)
    staging = place.work / f"{name}.incomplete"
    _remove(staging)  # what a killed process left
    try:
        builder_class = _digits_builder() if name == "digits" else _idx_builder(name, archive_dir)
        builder = builder_class(data_dir=staging)
        downloads = name != "digits" and archive_dir is None
        try:
            with quiet_tfds():
                builder.download_and_prepare(
                    download_dir=(place.root if downloads else staging) / "downloads",
                    download_config=tfds.download.DownloadConfig(force_checksums_validation=True),
                    file_format="array_record",
                )
        except RuntimeError as error:  # what ArrayRecord's writer raises when the disk is full
            raise OSError(" ".join(str(error).split())) from error
        prepared = Path(builder.data_dir)
        check_shards(prepared)
        _sync(prepared)
        place.directory.parent.mkdir(parents=True, exist_ok=True)
        os.rename(prepared, place.directory)
        _sync(place.directory.parent)
    finally:
        with contextlib.suppress(OSError):
            _remove(staging)


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


def _sync(directory: Path) -> None:
    """Flushes a directory and its files to disk: a rename alone may survive a power cut that its files do not."""
    for path in [*(p for p in directory.iterdir() if p.is_file()), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _Examples:
    """A split as TFDS wants it, encoded one by one; its length is the total of TFDS's progress bar."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        from PIL import Image

        for index, (image, label) in enumerate(zip(self.images, self.labels, strict=True)):
            png = io.BytesIO()
            Image.fromarray(image).save(png, format="png")
            png.seek(0)
            yield index, {"image": png, "label": int(label)}  # TFDS's own key, hence its own order


def _idx_builder(dataset: str, archive_dir: Path | None) -> Any:
    import tensorflow_datasets as tfds

    module = tfds.image_classification
    base: Any = {"mnist": module.MNIST, "fashion_mnist": module.FashionMNIST, "kmnist": module.KMNIST}[
        dataset
    ]
    urls = {file: base.URL + file for files in ARCHIVES.values() for file in files}
    content_sums = CONTENT_SHA256.get(dataset, {})
    archive_sums = {} if content_sums else {file: base.url_infos[url].checksum for file, url in urls.items()}

    with tfds.core.registered.skip_registration():

        class Builder(base):
            name = dataset
            VERSION = tfds.core.Version(VERSIONS[dataset])

            def _split_generators(self, dl_manager: Any) -> dict[str, _Examples]:
                paths = archives_in(archive_dir) if archive_dir else _download(dataset, dl_manager, urls)
                arrays = read_archives(paths, content_sums, archive_sums)
                return {split: _Examples(images, labels) for split, (images, labels) in arrays.items()}

    return Builder


def _digits_builder() -> Any:
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class Digits(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version(VERSIONS["digits"])

            def _info(self) -> Any:
                return tfds.core.DatasetInfo(
                    builder=self,
                    description=digits.__doc__ or "",
                    features=tfds.features.FeaturesDict(
                        {
                            "image": tfds.features.Image(shape=(IMAGE_SIZE, IMAGE_SIZE, 1)),
                            "label": tfds.features.ClassLabel(num_classes=NUM_CLASSES),
                        }
                    ),
                    supervised_keys=("image", "label"),
                    homepage="https://archive.ics.uci.edu/dataset/80",
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, _Examples]:
                return {split: _Examples(*arrays) for split, arrays in digits().items()}

            def _generate_examples(self) -> None:  # abstract in TFDS; the split generators are given whole
                raise NotImplementedError

    return Digits


def digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """1,797 real handwritten digits, bundled with scikit-learn, in MNIST's form.

    UCI's optical recognition of handwritten digits (Alpaydin and Kaynak 1998), of 8 x 8 pixels in 17 levels. Each is
    scaled to a box of 20 x 20 pixels (bicubic) and placed in 28 x 28 by its centre of mass, as MNIST's were. The
    test split is fixed: of each class, the third of every five examples in scikit-learn's order.

    Returns:
      `(images, labels)` of `train` and `test`: uint8 [n, 28, 28], int32 [n].
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    levels = (data.images * 255 / 16).round().astype(np.uint8)
    images = np.stack(
        [
            _centre(np.asarray(Image.fromarray(image).resize((20, 20), Image.Resampling.BICUBIC)))
            for image in levels
        ]
    )
    labels = data.target.astype(np.int32)
    rank = np.zeros(len(labels), int)  # of an example among those of its class
    for label in range(NUM_CLASSES):
        rank[labels == label] = np.arange(np.sum(labels == label))
    test = rank % 5 == 2
    return {"train": (images[~test], labels[~test]), "test": (images[test], labels[test])}


def _centre(digit: np.ndarray) -> np.ndarray:
    """Places a digit in a black square of 28 x 28 with its centre of mass in the middle, to the pixel."""
    margin = [IMAGE_SIZE - size for size in digit.shape]
    mass = digit.sum(dtype=np.float64)
    offsets = []
    for axis in (0, 1):
        centre = (digit.sum(axis=1 - axis, dtype=np.float64) * np.arange(digit.shape[axis])).sum() / mass
        offsets.append(int(np.clip(np.floor((IMAGE_SIZE - 1) / 2 - centre + 0.5), 0, margin[axis])))
    image = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    image[offsets[0] : offsets[0] + digit.shape[0], offsets[1] : offsets[1] + digit.shape[1]] = digit
    return image


def archives_in(directory: Path) -> dict[str, Path]:
    """The four archives of `archive_dir`, by file name.

    Raises:
      UserError: the directory or one of the archives is missing.
    """
    if not directory.is_dir():
        problem = "is not a directory" if directory.exists() else "does not exist"
        raise UserError(f"archive_dir {directory} {problem}: it should hold the four original archives")
    paths = {file: directory / file for files in ARCHIVES.values() for file in files}
    for path in paths.values():
        if not path.is_file():
            raise UserError(f"{path} is missing: archive_dir should hold {', '.join(paths)}")
    return paths


def _download(name: str, dl_manager: Any, urls: Mapping[str, str]) -> dict[str, Path]:
    """Fetches the archives with TFDS's download manager, which checks them and keeps them in `downloads`."""
    import requests
    import tensorflow_datasets as tfds

    original = requests.Session.request

    def request(session: requests.Session, *args: Any, **kwargs: Any) -> requests.Response:
        # TFDS sets no time limit and tries ten times, minutes apart in the end: a machine without network would wait.
        for adapter in session.adapters.values():
            adapter.max_retries.total = 2  # type: ignore[attr-defined]
        return original(session, *args, **{"timeout": (10, 60), **kwargs})

    try:
        with mock.patch.object(requests.Session, "request", request):
            return {file: Path(path) for file, path in dl_manager.download(dict(urls)).items()}
    except (requests.RequestException, tfds.download.DownloadError) as error:
        host = next(iter(urls.values())).split("/")[2]
        raise UserError(f"cannot download {name} from {host} ({type(error).__name__}): {WAYS_OUT}") from error
    except tfds.download.NonMatchingChecksumError as error:
        message = " ".join(str(error).split("To debug")[0].split())
        raise UserError(f"{message}: {WAYS_OUT}") from error


def read_archives(
    paths: Mapping[str, Path], content_sums: Mapping[str, str], archive_sums: Mapping[str, str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads and checks the four archives.

    Args:
      paths: of each archive, by original file name.
      content_sums: SHA-256 of the decompressed bytes, by file name; checked where there is one.
      archive_sums: SHA-256 of the archive itself, by file name; checked where there is one.

    Returns:
      `(images, labels)` of `train` and `test`: uint8 [n, 28, 28], uint8 [n].

    Raises:
      UserError: one line that names the file and what is wrong with it.
    """
    splits = {}
    for split, (images_file, labels_file) in ARCHIVES.items():
        count = SPLIT_SIZES[split]
        arrays = []
        for file, shape in ((images_file, (count, IMAGE_SIZE, IMAGE_SIZE)), (labels_file, (count,))):
            try:
                content = _decompress(paths[file], 4 + 4 * len(shape) + int(np.prod(shape)))
                array = parse_idx(content, shape)
                if len(shape) == 1 and array.max(initial=0) >= NUM_CLASSES:
                    raise ValueError(f"holds the label {array.max()}, beyond {NUM_CLASSES - 1}")
                if file in content_sums and hashlib.sha256(content).hexdigest() != content_sums[file]:
                    raise ValueError(
                        "holds other data than the original (the SHA-256 of its content differs)"
                    )
                if file in archive_sums:
                    with open(paths[file], "rb") as archive:
                        if hashlib.file_digest(archive, "sha256").hexdigest() != archive_sums[file]:
                            raise ValueError("is not the original archive (its SHA-256 differs)")
            except ValueError as error:
                raise UserError(f"{paths[file]} {error}: replace it with the original {file}") from error
            arrays.append(array)
        splits[split] = (arrays[0], arrays[1])
    return splits


def _decompress(path: Path, size: int) -> bytes:
    """The content of a gzip archive, never more than `size` + 1 bytes of it."""
    try:
        with gzip.open(path) as file:
            return file.read(size + 1)
    except EOFError as error:
        raise ValueError("is cut off") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"is not a sound gzip archive ({error})") from error
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from error


def parse_idx(content: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Parses unsigned bytes in the IDX format: magic number, big-endian sizes, data.

    Raises:
      ValueError: the content is not exactly an array of this shape.
    """
    header = 4 + 4 * len(shape)
    kind = {1: "labels", 3: "images"}
    magic = content[:4]
    if len(magic) < 4 or magic[:3] != b"\0\0\x08" or magic[3] not in kind:
        raise ValueError("is no IDX file of labels or images")
    if magic[3] != len(shape):
        raise ValueError(f"holds {kind[magic[3]]} where {kind[len(shape)]} are expected")
    if len(content) < header:
        raise ValueError("is cut off in its header")
    sizes = tuple(int(size) for size in np.frombuffer(content, ">u4", len(shape), 4))
    if sizes != shape:
        found, expected = (" x ".join(f"{size:,}" for size in sizes) for sizes in (sizes, shape))
        raise ValueError(f"holds {found} {kind[len(shape)]} where {expected} are expected")
    expected_bytes = header + int(np.prod(shape))
    if len(content) != expected_bytes:
        difference = "less" if len(content) < expected_bytes else "more"
        raise ValueError(f"holds {difference} data than its header says")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
