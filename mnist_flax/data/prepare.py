"""Prepares datasets with TFDS, without TensorFlow: once, as ArrayRecord that plain `tfds.data_source` reads.

TFDS's own builders of MNIST, Fashion-MNIST and KMNIST read and encode with TensorFlow. The subclasses here
keep their names, versions, features and checksums, and do that work with gzip, NumPy and Pillow. `digits` is
a builder of ours over scikit-learn's bundled digits.

A dataset is prepared under `<data_dir>/.mnist_flax`, checked, and only then renamed to its place, by one
process at a time: what stands in `<data_dir>/<name>/<version>` is whole, whenever a process was killed.
"""

import contextlib
import fcntl
import io
import json
import logging as std_logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from absl import flags, logging
from jaxtyping import UInt8

from mnist_flax.data import idx
from mnist_flax.runtime import files
from mnist_flax.runtime.cli import UserError, check_path, option, reason

VERSIONS = {"mnist": "3.0.1", "fashion_mnist": "3.0.1", "kmnist": "3.0.1", "digits": "1.0.0"}

# SHA-256 of the decompressed archives, so that a recompressed one is accepted. Of Fashion-MNIST and KMNIST
# only the sums of the archives themselves are known (TFDS's url_checksums): those are checked instead.
CONTENT_SHA256 = {
    "mnist": {
        "train-images-idx3-ubyte.gz": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte.gz": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte.gz": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    }
}
DOWNLOAD_TIMEOUT = (10, 30)  # seconds to connect, and to wait for more bytes


class Place(NamedTuple):
    """Where a dataset lives."""

    root: Path  # TFDS's data_dir
    directory: Path  # the prepared dataset: its shards, dataset_info.json and features.json
    work: Path  # ours: locks, staging and decoded arrays (TFDS overlooks names that begin with a dot)


def prepare(name: str, data_dir: str | None = None, archive_dir: str | None = None) -> Place:
    """Returns where the dataset `name` is prepared, preparing it first when it is not.

    Args:
      name: `mnist`, `fashion_mnist`, `kmnist` or `digits`.
      data_dir: where TFDS keeps datasets; None is `TFDS_DATA_DIR`, else `~/tensorflow_datasets`, as in TFDS.
      archive_dir: directory of the four original IDX archives, to prepare from in place of a download.

    Raises:
      UserError: an unknown dataset, an archive that is missing or not what it should be, no network, a disk
        that is full or read-only, or a prepared directory that is not whole.
    """
    train_examples(name)  # refuses an unknown one
    check_path(f"archive_dir {archive_dir}", archive_dir or "")
    root = _root(data_dir)
    try:
        place = _place(name, root)
        if not _is_prepared(place.directory):
            archives = idx.find(Path(archive_dir).expanduser()) if archive_dir and name != "digits" else None
            with lock(name, place):
                place = _place(name, root)
                if not _is_prepared(place.directory):
                    _build(name, place, archives)
        return place
    except OSError as error:
        where = f": {error.filename}" if error.strerror and error.filename else ""
        raise UserError(
            f"cannot prepare {name} in {root} ({error.strerror or reason(error)}{where}): "
            f"make room or make it writable, or choose another directory with {place_option()}"
        ) from error


def train_examples(name: str) -> int:
    """How many training examples a dataset has, before any are held out; raises UserError for an unknown one."""
    if name not in VERSIONS:
        raise UserError(f"dataset {name!r} is unknown: choose one of {', '.join(VERSIONS)}")
    return 1_438 if name == "digits" else idx.SPLIT_SIZES["train"]


def place_option() -> str:
    """How this command is told where datasets are."""
    if "config" in flags.FLAGS:
        return "--config.data_dir=DIR"
    return "--data_dir=DIR" if "data_dir" in flags.FLAGS else "TFDS_DATA_DIR=DIR in the environment"


def _ways_out() -> str:
    ways = f"name where it is prepared with {place_option()}"
    if flags.FLAGS.is_parsed() and "config" not in flags.FLAGS:  # its runs, or its recipe, name the dataset
        return ways
    return (
        f"{ways}, give the four original archives with {option('config.archive_dir', 'DIR')}, "
        f"or train on the embedded digits with {option('config.dataset', 'digits')}"
    )


def is_prepared(name: str, data_dir: str | None = None) -> bool:
    """Whether `prepare` would find the dataset `name` prepared."""
    return _is_prepared(_place(name, _root(data_dir)).directory)


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
    """Compares the number of records in every shard with what `dataset_info.json` says.

    Raises:
      UserError: a shard is missing, cut off, or holds another number of records; it is named.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    info = _read_info(directory)
    try:
        splits = {split["name"]: [int(length) for length in split["shardLengths"]] for split in info["splits"]}
        if splits.keys() != {"train", "test"}:
            raise ValueError(directory)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{directory / 'dataset_info.json'} is damaged: delete {directory} and run again") from error
    for split, lengths in splits.items():
        for shard, length in enumerate(lengths):
            suffix = f"array_record-{shard:05d}-of-{len(lengths):05d}"
            path = directory / f"{info['name']}-{split}.{suffix}"
            if not path.is_file():
                raise UserError(f"{path} is missing: delete {directory} and run again")
            try:
                count = ArrayRecordReader(str(path)).num_records()
            except (RuntimeError, ValueError):
                count = 0
            if count != length:
                raise UserError(
                    f"{path} is damaged ({count} of its {length} examples can be read): "
                    f"delete {directory} and run again"
                )


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Keeps back what TFDS and its libraries log, and progress bars unless standard error is a terminal."""
    import tensorflow_datasets as tfds

    level = std_logging.root.manager.disable
    std_logging.disable(std_logging.WARNING)
    tfds.display_progress_bar(sys.stderr.isatty())
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(True)
        std_logging.disable(level)


def _root(data_dir: str | None) -> Path:
    text = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    check_path(f"data_dir {text}", text)
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise UserError(f"data_dir {text}: there is no such user's home; name a directory") from error


def _place(name: str, root: Path) -> Place:
    """TFDS's own directory for the dataset, or one beside it where TFDS keeps another file format."""
    directory = root / name / VERSIONS[name]
    if (directory / "dataset_info.json").is_file():
        info = _read_info(directory)
        # TFDS before 4.0 named no format: it wrote TFRecord, which cannot be read without TensorFlow.
        formats = [info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", [])]
        if "array_record" not in formats:
            directory = root / "array_record" / name / VERSIONS[name]
    return Place(root, directory, root / ".mnist_flax")


def _read_info(directory: Path) -> dict[str, Any]:
    path = directory / "dataset_info.json"
    try:
        info = json.loads(path.read_bytes())
        lists = info["splits"], info.get("alternativeFileFormats", [])
        if info["name"] != directory.parent.name or not all(isinstance(each, list) for each in lists):
            raise TypeError(path)
        return info
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: delete {directory} and run again") from error


def _is_prepared(directory: Path) -> bool:
    if (directory / "dataset_info.json").is_file():
        return True
    if directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"{directory} has no dataset_info.json, so it is not whole: delete it and run again")
    return False


def _build(name: str, place: Place, archives: Mapping[str, Path] | None) -> None:
    import tensorflow_datasets as tfds

    if place.directory.parent.parent != place.root:
        logging.info("%s in %s is in a format that needs TensorFlow: it is left as it is", name, place.root)
    logging.info("preparing %s in %s", name, place.directory)
    staging = place.work / f"{name}.incomplete"
    if staging.exists():  # a killed process left it
        shutil.rmtree(staging)
    try:
        builder = _builder_class(name, archives)(data_dir=staging)
        downloads = name != "digits" and archives is None
        try:
            with quiet_tfds():
                builder.download_and_prepare(
                    download_dir=(place.root if downloads else staging) / "downloads",
                    download_config=tfds.download.DownloadConfig(force_checksums_validation=True),
                    file_format="array_record",
                )
        except RuntimeError as error:  # what ArrayRecord's writer raises when it cannot write
            raise OSError(str(error)) from error
        prepared = Path(builder.data_dir)
        check_shards(prepared)
        files.sync_tree(prepared)
        place.directory.parent.mkdir(parents=True, exist_ok=True)
        os.rename(prepared, place.directory)
        files.sync(place.directory.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # the next process to prepare this dataset will remove it


class _Examples:
    """A split as TFDS takes it, encoded one example at a time; its length is the progress bar's total."""

    def __init__(self, images: UInt8[np.ndarray, "n 28 28"], labels: UInt8[np.ndarray, " n"]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        from PIL import Image

        for index, (image, label) in enumerate(zip(self.images, self.labels, strict=True)):
            png = io.BytesIO()
            Image.fromarray(image).save(png, format="png")
            png.seek(0)
            yield index, {"image": png, "label": int(label)}  # the key that TFDS uses, hence its order


def reading_builder(name: str, place: Place) -> Any:
    """TFDS's builder of a prepared dataset, with the features that are ours.

    `tfds.builder_from_directory` would import whatever module the directory's features.json names.
    """
    return _builder_class(name, None)(data_dir=place.directory.parent.parent)


def _builder_class(name: str, archives: Mapping[str, Path] | None) -> Any:
    return _digits_builder() if name == "digits" else _idx_builder(name, archives)


def _idx_builder(dataset: str, archives: Mapping[str, Path] | None) -> Any:
    import tensorflow_datasets as tfds

    bases: dict[str, Any] = {
        "mnist": tfds.image_classification.MNIST,
        "fashion_mnist": tfds.image_classification.FashionMNIST,
        "kmnist": tfds.image_classification.KMNIST,
    }
    base = bases[dataset]
    urls = {file: base.URL + file for files in idx.ARCHIVES.values() for file in files}
    content_sums = CONTENT_SHA256.get(dataset, {})
    archive_sums = {} if content_sums else {file: base.url_infos[url].checksum for file, url in urls.items()}

    with tfds.core.registered.skip_registration():

        class Builder(base):  # type: ignore[misc, valid-type]
            name = dataset
            VERSION = tfds.core.Version(VERSIONS[dataset])
            url_infos = base.url_infos

            def _split_generators(self, dl_manager: Any) -> dict[str, _Examples]:
                paths = archives or _download(dataset, dl_manager, urls)
                splits = idx.read(paths, content_sums, archive_sums)
                return {split: _Examples(images, labels) for split, (images, labels) in splits.items()}

    return Builder


def _download(name: str, dl_manager: Any, urls: Mapping[str, str]) -> dict[str, Path]:
    """Fetches the archives with TFDS's download manager, which checks them and keeps them in `downloads`."""
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    folder = Path(dl_manager.download_dir) / name
    before = set(folder.glob("*.tmp.*"))
    original = requests.Session.request

    def bounded(session: requests.Session, *args: Any, **kwargs: Any) -> requests.Response:
        # TFDS sets no time limit and tries ten times, ever more slowly: minutes on a machine without network.
        for adapter in session.adapters.values():
            adapter.max_retries.total = 2  # type: ignore[attr-defined]
        return original(session, *args, **{"timeout": DOWNLOAD_TIMEOUT, **kwargs})

    try:
        with mock.patch.object(requests.Session, "request", bounded):
            # One after another: after a failure no thread of TFDS's is still at work on the others.
            return {file: Path(dl_manager.download(url)) for file, url in urls.items()}
    except (requests.RequestException, tfds.download.DownloadError) as error:
        host = next(iter(urls.values())).split("/")[2]
        raise UserError(f"cannot download {name} from {host} ({type(error).__name__}): {_ways_out()}") from error
    except NonMatchingChecksumError as error:
        raise UserError(f"{reason(error).split(' To debug')[0]}: {_ways_out()}") from error
    finally:  # TFDS leaves those of downloads that failed
        for unfinished in set(folder.glob("*.tmp.*")) - before:
            shutil.rmtree(unfinished, ignore_errors=True)


def _digits_builder() -> Any:
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class Digits(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version(VERSIONS["digits"])

            def _info(self) -> Any:
                return tfds.core.DatasetInfo(
                    builder=self,
                    description="1,797 handwritten digits of UCI's optdigits, in the form of MNIST.",
                    features=tfds.features.FeaturesDict(
                        {
                            "image": tfds.features.Image(shape=(idx.IMAGE_SIZE, idx.IMAGE_SIZE, 1)),
                            "label": tfds.features.ClassLabel(num_classes=idx.NUM_CLASSES),
                        }
                    ),
                    supervised_keys=("image", "label"),
                    homepage="https://archive.ics.uci.edu/dataset/80",
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, _Examples]:
                return {split: _Examples(images, labels) for split, (images, labels) in digits().items()}

            def _generate_examples(self) -> Any:  # abstract in TFDS; the splits above are given whole
                raise AssertionError

    return Digits


def digits() -> dict[str, tuple[UInt8[np.ndarray, "n 28 28"], UInt8[np.ndarray, " n"]]]:
    """1,797 real handwritten digits, bundled with scikit-learn, in MNIST's form.

    UCI's optical recognition of handwritten digits (Alpaydin and Kaynak 1998), 8 x 8 pixels in 17 levels.
    Each is scaled to 20 x 20 (bicubic) and placed in 28 x 28 by its centre of mass, as MNIST's were. The test
    split is fixed: the third of every five examples of a class, in scikit-learn's order.

    Returns:
      `(images, labels)` of `train` (1,438 examples) and `test` (359).
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    from mnist_flax.data.mnist_format import centred

    data = load_digits()
    small = (data.images * 255 / 16).round().astype(np.uint8)
    scaled = [np.asarray(Image.fromarray(image).resize((20, 20), Image.Resampling.BICUBIC)) for image in small]
    images = np.stack([centred(digit) for digit in scaled])
    labels = data.target.astype(np.uint8)
    rank = np.zeros(len(labels), int)  # among the examples of its class
    for label in range(idx.NUM_CLASSES):
        rank[labels == label] = np.arange(np.sum(labels == label))
    test = rank % 5 == 2
    return {"train": (images[~test], labels[~test]), "test": (images[test], labels[test])}
