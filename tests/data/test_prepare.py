import contextlib
import fcntl
import functools
import gzip
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

from mnist_flax.data import datasets, idx, prepare
from mnist_flax.runtime.cli import UserError
from tests import tiny_mnist
from tests.commands import ROOT, refusal


@pytest.fixture
def archives(tmp_path, monkeypatch):
    tiny_mnist.install(monkeypatch.setattr)
    return tiny_mnist.write(tmp_path / "archives")


def holds(place: prepare.Place) -> dict[str, list[bytes]]:
    """What is prepared: each split's examples, sorted, as read by plain TFDS."""
    import tensorflow_datasets as tfds

    name = place.directory.parent.name
    source = tfds.data_source(name, data_dir=place.directory.parent.parent)
    return {
        split: sorted(e["image"].tobytes() + bytes([e["label"]]) for e in source[split].__getitems__(positions))
        for split in source
        for positions in [list(range(len(source[split])))]
    }


EXPECTED = {split: tiny_mnist.examples(split) for split in tiny_mnist.SIZES}


def start(program: str, *arguments: str, env=None) -> subprocess.Popen:
    """Starts a Python process in which `mnist` is the tiny one and INFO is logged."""
    setup = "import sys; from tests import tiny_mnist; tiny_mnist.install()\n"
    setup += "from absl import logging; logging.set_verbosity('info')\n"
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", setup + program, *map(str, arguments)],
        env={**(env or os.environ), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


PREPARE = """
from mnist_flax.data import prepare
from mnist_flax.runtime.cli import UserError
try:
    prepare.prepare("mnist", sys.argv[1], sys.argv[2])
except UserError as error:
    print(error)
    sys.exit(2)
assert "tensorflow" not in sys.modules and "jax" not in sys.modules
"""


def test_archives_are_prepared_where_plain_tfds_reads_them(archives, tmp_path):
    place = prepare.prepare("mnist", str(tmp_path / "data"), str(archives))
    assert place.directory == tmp_path / "data" / "mnist" / "3.0.1"
    assert holds(place) == EXPECTED
    info = json.loads((place.directory / "dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record" and info["version"] == "3.0.1"
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [".mnist_flax", "mnist"]
    assert [path.name for path in place.work.iterdir()] == ["mnist.lock"]


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_builders_keep_names_versions_features_and_checksums_of_tfds(name, tmp_path):
    import tensorflow_datasets as tfds

    theirs = tfds.builder(name, data_dir=tmp_path)
    ours = prepare._idx_builder(name, None)(data_dir=tmp_path)
    assert (ours.name, ours.version, ours.data_dir) == (theirs.name, theirs.version, theirs.data_dir)
    assert ours.info.features.to_json() == theirs.info.features.to_json()
    assert ours.info.citation == theirs.info.citation and ours.url_infos == theirs.url_infos
    assert str(theirs.version) == prepare.VERSIONS[name]
    assert tfds.builder_cls(name) is type(theirs)  # ours is not registered in its place


def test_real_mnist_is_prepared_as_tfds_would(mnist_data_dir, mnist_archives):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import hashing

    directory = prepare.prepare("mnist", str(mnist_data_dir)).directory
    shards = [f"mnist-{split}.array_record-00000-of-00001" for split in ("test", "train")]
    assert sorted(path.name for path in directory.iterdir()) == ["dataset_info.json", "features.json", *shards]
    decoded = datasets._decoded("mnist", prepare.prepare("mnist", str(mnist_data_dir)))
    for split, (images_file, labels_file) in idx.ARCHIVES.items():
        images = np.frombuffer(gzip.decompress((mnist_archives / images_file).read_bytes())[16:], np.uint8)
        labels = np.frombuffer(gzip.decompress((mnist_archives / labels_file).read_bytes())[8:], np.uint8)
        # TFDS shuffles by a hash of the key: this is the order of a dataset that TFDS itself prepares.
        hasher = hashing.Hasher(split)
        order = sorted(range(len(labels)), key=hasher.hash_key)
        np.testing.assert_array_equal(decoded[split].images, images.reshape(-1, 28, 28)[order])
        np.testing.assert_array_equal(decoded[split].labels, labels[order])

        source = tfds.data_source("mnist", split=split, data_dir=mnist_data_dir)
        assert len(source) == len(labels)
        positions = np.random.default_rng(0).choice(len(source), 300, replace=False)
        for position, example in zip(positions, source.__getitems__(positions.tolist()), strict=True):
            np.testing.assert_array_equal(example["image"][..., 0], decoded[split].images[position])
            assert example["label"] == decoded[split].labels[position]


def test_digits_are_scikit_learns_in_mnists_form(digits_data_dir):
    from sklearn.datasets import load_digits

    splits = prepare.digits()
    assert [len(labels) for _, labels in splits.values()] == [1_438, 359]
    images = np.concatenate([images for images, _ in splits.values()]).astype(float)
    original = load_digits()
    assert len(images) == len(original.target)
    for label in range(10):  # the test split is a fifth of each class
        counts = [np.sum(labels == label) for _, labels in splits.values()]
        assert sum(counts) == np.sum(original.target == label) and abs(counts[1] / sum(counts) - 0.2) < 0.01
    assert images.max() == 255 and images.min() == 0
    rows, columns = images.sum(2), images.sum(1)
    for profile in (rows, columns):
        centre = profile @ np.arange(28) / profile.sum(1)
        assert np.abs(centre - 14).max() <= 0.51
        nonzero = profile > 0
        extent = 28 - nonzero.argmax(1) - nonzero[:, ::-1].argmax(1)
        assert extent.max() <= 20
    # The ink is that of the original, 6.25 pixels for each of its.
    ink = sorted(images.sum((1, 2)) / 255)
    expected = sorted(original.images.sum((1, 2)) / 16 * 6.25)
    np.testing.assert_allclose(ink, expected, rtol=0.1)
    place = prepare.prepare("digits", str(digits_data_dir))
    prepared = {
        split: sorted(image.tobytes() + bytes([label]) for image, label in zip(*arrays, strict=True))
        for split, arrays in splits.items()
    }
    assert holds(place) == prepared


def test_digits_have_not_changed():
    """A change of these bytes is a change of the dataset: give it another version in `prepare.VERSIONS`."""
    splits = {split: datasets.Split(*arrays) for split, arrays in prepare.digits().items()}
    assert {split: datasets.examples_sha256(value)[:16] for split, value in splits.items()} == {
        "train": "392ecd7cad077793",
        "test": "affa5a42f7cc50da",
    }


@pytest.mark.slow
def test_killed_at_random_moments_then_run_again(archives, tmp_path):
    """Preparations are killed; what stands after each is whole or absent, and the next run is sound."""
    program = """
import os, pathlib, random, shutil, signal, time
import tensorflow_datasets, tensorflow_datasets.image_classification
from mnist_flax.data import datasets, prepare
import PIL.PngImagePlugin, rich.progress, rich.console

def fork(function):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return pid

def run():
    datasets._decoded("mnist", prepare.prepare("mnist", sys.argv[1], sys.argv[2]))

def verify():
    from tests.data import test_prepare
    place = prepare.prepare("mnist", sys.argv[1], "/nowhere")
    assert test_prepare.holds(place) == test_prepare.EXPECTED
    decoded = datasets._decoded("mnist", place)
    for split, expected in test_prepare.EXPECTED.items():
        pairs = zip(decoded[split].images, decoded[split].labels, strict=True)
        assert sorted(image.tobytes() + bytes([label]) for image, label in pairs) == expected

def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

dataset = pathlib.Path(sys.argv[1], "mnist")
durations = []
for _ in range(3):  # the shortest: the machine may be busy just now, and kills are to land before the end
    started = time.monotonic()
    assert wait(fork(run)) == 0
    durations.append(time.monotonic() - started)
    shutil.rmtree(dataset)
    shutil.rmtree(os.path.join(sys.argv[1], ".mnist_flax"))
generator, unfinished = random.Random(0), 0
for trial in range(96):
    if trial >= 24 and unfinished > 6:  # more, where the machine has become faster than it was measured
        break
    pid = fork(run)
    time.sleep(generator.uniform(0, 1.1 * min(durations)))
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    if dataset.exists() and any(dataset.iterdir()):
        assert wait(fork(verify)) == 0, trial
        shutil.rmtree(dataset)
        os.remove(os.path.join(sys.argv[1], ".mnist_flax", "mnist.npz"))
    else:
        unfinished += 1
    if trial % 8 == 7:  # over all that the kills before it left behind
        assert wait(fork(run)) == 0 and wait(fork(verify)) == 0, trial
        assert sorted(os.listdir(os.path.join(sys.argv[1], ".mnist_flax"))) == ["mnist.lock", "mnist.npz"]
        shutil.rmtree(dataset)
print(unfinished)
"""
    process = start(program, tmp_path / "data", archives)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert int(output) > 6  # the kills did land in preparation


def test_two_processes_at_once_prepare_once(archives, tmp_path):
    work = tmp_path / "data" / ".mnist_flax"
    work.mkdir(parents=True)
    with open(work / "mnist.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        processes = [start(PREPARE, tmp_path / "data", archives) for _ in range(2)]
        heads = [process.stderr.readline() for process in processes]
        assert all("another process is preparing mnist" in head for head in heads)
        assert not (tmp_path / "data" / "mnist").exists()
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert sum("preparing mnist in" in text for text in errors) == 1
    assert holds(prepare.prepare("mnist", str(tmp_path / "data"))) == EXPECTED


def test_a_dead_holder_frees_the_lock(archives, tmp_path):
    program = """
from mnist_flax.data import prepare
from pathlib import Path
place = prepare._place("mnist", Path(sys.argv[1]))
with prepare.lock("mnist", place):
    print("held", flush=True)
    import time; time.sleep(600)
"""
    holder = start(program, tmp_path / "data")
    assert holder.stdout.readline() == "held\n"
    waiting = start(PREPARE, tmp_path / "data", archives)
    assert "waiting" in waiting.stderr.readline()
    holder.kill()
    holder.communicate()
    waiting.communicate(timeout=120)
    assert waiting.returncode == 0


def one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


@contextlib.contextmanager
def mounted(directory, options):
    directory.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", directory]).returncode:
        pytest.skip("a small disk can be mounted by root only")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def test_a_full_disk_leaves_nothing_behind_that_is_trusted(tmp_path):
    with mounted(tmp_path / "disk", "size=600k") as disk:
        with pytest.raises(UserError) as caught:
            prepare.prepare("digits", str(disk))
        message = one_line(caught)
        assert "No space left on device" in message and "make room" in message
        assert not (disk / "digits").exists() and os.listdir(disk / ".mnist_flax") == ["digits.lock"]
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        assert len(holds(prepare.prepare("digits", str(disk)))["test"]) == 359


@pytest.mark.parametrize("limit", [2_000, 40_000, 100_000])
def test_a_write_that_fails_is_one_line(archives, tmp_path, limit):
    """A limit on the size of a file stands in for a full disk, where mounting one is not permitted."""
    program = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n" + PREPARE
    process = start(program, tmp_path / "data", archives)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in errors
    assert output.count("\n") == 1 and "File too large" in output and str(tmp_path / "data") in output
    assert not (tmp_path / "data" / "mnist").exists()
    assert holds(prepare.prepare("mnist", str(tmp_path / "data"), str(archives))) == EXPECTED


def test_a_read_only_disk_is_one_line_and_what_it_holds_can_be_read(archives, tmp_path):
    with mounted(tmp_path / "disk", "size=10m") as disk:
        prepare.prepare("mnist", str(disk), str(archives))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert holds(prepare.prepare("mnist", str(disk))) == EXPECTED
        with pytest.raises(UserError, match="Read-only file system"):
            prepare.prepare("digits", str(disk))


def test_a_data_dir_that_is_a_file_or_remote_is_one_line(archives, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        prepare.prepare("mnist", str(tmp_path / "file"), str(archives))
    assert "Not a directory" in one_line(caught)
    with pytest.raises(UserError, match="gs://bucket/tfds is a URL"):
        prepare.prepare("mnist", "gs://bucket/tfds", str(archives))


def test_a_faulty_archive_is_one_line_and_prepares_nothing(archives, tmp_path):
    images = archives / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:-20])
    with pytest.raises(UserError) as caught:
        prepare.prepare("mnist", str(tmp_path / "data"), str(archives))
    assert f"{images} is cut off" in one_line(caught)
    assert not (tmp_path / "data" / "mnist").exists()


def test_archives_of_another_dataset_are_refused(archives, tmp_path):
    with pytest.raises(UserError, match="is not the original archive"):
        prepare.prepare("fashion_mnist", str(tmp_path / "data"), str(archives))


@pytest.mark.parametrize("format_line", [{}, {"fileFormat": "tfrecord"}])
def test_a_tfrecord_directory_stays_intact(archives, tmp_path, format_line, caplog):
    theirs = tmp_path / "data" / "mnist" / "3.0.1"
    theirs.mkdir(parents=True)
    info = {"name": "mnist", "version": "3.0.1", "splits": [{"name": "train", "shardLengths": ["200"]}]}
    (theirs / "dataset_info.json").write_text(json.dumps(info | format_line))
    (theirs / "mnist-train.tfrecord-00000-of-00001").write_bytes(b"records")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in theirs.iterdir()}
    with caplog.at_level("INFO", logger="absl"):
        place = prepare.prepare("mnist", str(tmp_path / "data"), str(archives))
    assert place.directory == tmp_path / "data" / "array_record" / "mnist" / "3.0.1"
    assert sum("left as it is" in message for message in caplog.messages) == 1
    assert holds(place) == EXPECTED
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in theirs.iterdir()}
    assert prepare.prepare("mnist", str(tmp_path / "data")) == place


def cut_file(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


SHARD = "mnist-train.array_record-00000-of-00001"


@pytest.mark.parametrize(
    "damage, problem",
    [
        (lambda d: cut_file(d / SHARD, 100_000), f"{SHARD} is damaged"),
        (lambda d: cut_file(d / SHARD, 0), f"{SHARD} is damaged"),
        (lambda d: (d / SHARD).unlink(), f"{SHARD} is missing"),
        (lambda d: shutil.copy(d / SHARD.replace("train", "test"), d / SHARD), f"{SHARD} is damaged"),
        (lambda d: cut_file(d / "dataset_info.json", 50), "dataset_info.json is damaged"),
        (lambda d: (d / "dataset_info.json").write_text("[]"), "dataset_info.json is damaged"),
        (
            lambda d: (d / "dataset_info.json").write_text(
                '{"name": "mnist", "fileFormat": "array_record", "splits": [{}]}'
            ),
            "dataset_info.json is damaged",
        ),
        (lambda d: (d / "dataset_info.json").unlink(), "has no dataset_info.json"),
    ],
)
def test_a_prepared_directory_that_is_not_whole_is_named(archives, tmp_path, damage, problem):
    place = prepare.prepare("mnist", str(tmp_path / "data"), str(archives))
    damage(place.directory)
    with pytest.raises(UserError) as caught:
        prepare.check_shards(prepare.prepare("mnist", str(tmp_path / "data"), str(archives)).directory)
    message = one_line(caught)
    assert (problem in message and f"delete {place.directory}" in message) or "delete it" in message
    shutil.rmtree(place.directory)  # as the message says
    assert holds(prepare.prepare("mnist", str(tmp_path / "data"), str(archives))) == EXPECTED


def test_data_dir_defaults_as_in_tfds(archives, tmp_path):
    program = """
from mnist_flax.data import prepare
import tensorflow_datasets as tfds
assert str(prepare.prepare("mnist", None, sys.argv[1]).root) == str(tfds.core.constants.DATA_DIR)
assert len(tfds.data_source("mnist", split="test")) == 60
"""
    for settings, root in [({"TFDS_DATA_DIR": "set"}, "set"), ({}, "home/tensorflow_datasets")]:
        environment = {key: value for key, value in os.environ.items() if key != "TFDS_DATA_DIR"}
        environment |= {key: str(tmp_path / value) for key, value in settings.items()}
        environment["HOME"] = str(tmp_path / "home")
        process = start(program, archives, env=environment)
        assert process.wait(timeout=120) == 0, process.stderr.read()
        assert (tmp_path / root / "mnist" / "3.0.1" / "dataset_info.json").exists()


def test_preparing_is_silent_where_there_is_no_terminal(archives, tmp_path):
    process = start(PREPARE, tmp_path / "data", archives)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and output == ""
    assert errors.count("\n") == 1 and "preparing mnist in" in errors


def test_unknown_dataset_names_the_known():
    with pytest.raises(UserError, match="mnist, fashion_mnist, kmnist, digits"):
        prepare.prepare("mnits")


# Downloads, from a server of our own


class Server(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def address(archives, monkeypatch):
    """The archives on a local server; its address and their checksums take the place of those in TFDS."""
    import tensorflow_datasets as tfds

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=archives))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    use_address(monkeypatch, f"http://127.0.0.1:{server.server_port}/", archives)
    yield tfds.image_classification.MNIST.URL
    server.shutdown()
    thread.join()
    server.server_close()


def use_address(monkeypatch, url, archives):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import checksums

    infos = {url + path.name: checksums.compute_url_info(tfds.core.Path(path)) for path in archives.iterdir()}
    monkeypatch.setattr(tfds.image_classification.MNIST, "URL", url)
    monkeypatch.setattr(tfds.image_classification.MNIST, "url_infos", infos)


def test_without_archives_tfds_downloads_and_keeps_them(address, archives, tmp_path):
    place = prepare.prepare("mnist", str(tmp_path / "data"))
    assert holds(place) == EXPECTED and "tensorflow" not in sys.modules
    shutil.rmtree(place.directory)
    shutil.rmtree(archives)  # the second time nothing is fetched
    assert holds(prepare.prepare("mnist", str(tmp_path / "data"))) == EXPECTED


@pytest.mark.parametrize("fault", ["missing", "changed", "refused", "silent"])
def test_a_download_that_fails_names_the_two_ways_out(address, archives, tmp_path, monkeypatch, fault):
    labels = archives / "t10k-labels-idx1-ubyte.gz"
    monkeypatch.setattr(prepare, "DOWNLOAD_TIMEOUT", (0.2, 0.2))
    with contextlib.ExitStack() as stack:
        match fault:
            case "missing":
                labels.unlink()
            case "changed":
                labels.write_bytes(labels.read_bytes() + b"\0")
            case "refused":
                with socket.socket() as unused:
                    unused.bind(("127.0.0.1", 0))
                    use_address(monkeypatch, f"http://127.0.0.1:{unused.getsockname()[1]}/", archives)
            case "silent":  # accepts, and never answers
                server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
                use_address(monkeypatch, f"http://127.0.0.1:{server.getsockname()[1]}/", archives)
        with pytest.raises(UserError) as caught:
            prepare.prepare("mnist", str(tmp_path / "data"))
    message = one_line(caught)
    assert "127.0.0.1" in message
    assert not list((tmp_path / "data" / "downloads").rglob("*.tmp.*"))
    assert "config.archive_dir=" in message and "config.dataset=digits" in message
    assert not (tmp_path / "data" / "mnist").exists()


def test_a_wrong_archive_dir_is_said_before_anything_is_made(tmp_path):
    for name in ("nowhere", "n" * 300):
        place = (f"--config.archive_dir={tmp_path / name}", f"--config.data_dir={tmp_path / 'data'}")
        error = refusal("mnist_flax.main", *place)
        assert error.startswith("error: archive_dir ")
    assert not (tmp_path / "data").exists()
