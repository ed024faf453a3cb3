"""What the input campaign feeds, and with what: every place where the product reads what others may have written.

A target is a function of bytes. It returns for input that is valid, and raises `UserError` or `RunError`, which a user
sees as one line, for input that is not; anything else that it raises is a finding. `experiments.fuzz` runs them under a
coverage-guided fuzzer, `tests/experiments/test_fuzz.py` with random inputs.
"""

import asyncio
import contextlib
import gzip
import io
import json
import string
import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from absl import flags
from PIL import Image
from rich.console import Console

from mnist_flax.data import idx, prepare
from mnist_flax.evaluation import metrics, report
from mnist_flax.inference import classifier
from mnist_flax.inference.predictor import make_logits
from mnist_flax.inference.run import Run
from mnist_flax.ocr import decode, page_reader
from mnist_flax.runtime import cli, config_flag, run_dir, terminal
from mnist_flax.runtime import config as config_lib
from mnist_flax.runtime.metrics_log import read_records
from mnist_flax.serving import json_api

Feed = Callable[[bytes], object]


class Target(NamedTuple):
    make: Callable[[Path], Feed]  # from an empty directory of its own
    seeds: Callable[[], Sequence[bytes]]  # valid inputs, to start from
    is_json: bool = False  # so that values can be exchanged, and not bytes alone
    modules: tuple[str, ...] = ()  # that are imported when they are first needed, and are to be followed too


# Archives and datasets


def feed_idx(directory: Path) -> Feed:
    """One of four small archives; the first byte says which, and whether the rest is still to be compressed."""
    idx.SPLIT_SIZES = {"train": 3, "test": 2}
    names = [name for files in idx.ARCHIVES.values() for name in files]
    for name, content in zip(names, idx_seeds(), strict=True):
        (directory / name).write_bytes(gzip.compress(content[1:]))

    def feed(data: bytes) -> None:
        choice, content = data[:1] or b"\0", data[1:]
        path = directory / names[choice[0] % 4]
        before = path.read_bytes()
        path.write_bytes(gzip.compress(content, 1) if choice[0] & 4 else content)
        try:
            splits = idx.read(idx.find(directory), {}, {})
        finally:
            path.write_bytes(before)
        assert all(labels.max() <= 9 for _, labels in splits.values())

    return feed


def idx_seeds() -> list[bytes]:
    shapes = [(3, 28, 28), (3,), (2, 28, 28), (2,)]
    heads = [struct.pack(f">I{len(shape)}I", 0x0800 + len(shape), *shape) for shape in shapes]
    return [bytes([4 + i]) + head + bytes(int(np.prod(shapes[i]))) for i, head in enumerate(heads)]


def feed_dataset(directory: Path) -> Feed:
    """dataset_info.json of a prepared dataset."""
    place = prepare.prepare("digits", str(directory))
    path = place.directory / "dataset_info.json"

    def feed(data: bytes) -> None:
        path.write_bytes(data)
        prepare.check_shards(prepare.prepare("digits", str(directory)).directory)

    return feed


def dataset_seeds() -> list[bytes]:
    shards = [{"name": "train", "shardLengths": ["1438"]}, {"name": "test", "shardLengths": ["359"]}]
    info = {"name": "digits", "version": "1.0.0", "fileFormat": "array_record", "splits": shards}
    return [json.dumps(info | {"alternativeFileFormats": ["tfrecord"]}).encode()]


# Configs


def feed_flags(directory: Path) -> Feed:
    """Overrides as a user types them, one a line, each after `--config.`."""

    def feed(data: bytes) -> None:
        lines = data.decode(errors="surrogateescape").replace("\0", "").splitlines()
        before = set(flags.FLAGS)
        complaint = io.StringIO()
        try:
            with contextlib.redirect_stderr(complaint):
                _, arguments = config_flag.define_flag(["main", *(f"--config.{line}" for line in lines)])
            cli._parse_flags(arguments)
            config_flag.recipe_path()
            config_lib.check_config(flags.FLAGS["config"].value)
        except SystemExit as error:
            assert error.code == 2
            raise cli.UserError(complaint.getvalue()) from error
        finally:
            for name in set(flags.FLAGS) - before:
                delattr(flags.FLAGS, name)

    flags.FLAGS(["main"])
    return feed


def flags_seeds() -> list[bytes]:
    fields = config_lib.flatten(config_lib.default_config())
    lines = [f"{key}={value}" for key, value in fields.items() if value is not None]
    odd = ["model.channels=(1,2)", "seed=1e3", "validation_examples=5", "data_dir=~x", "optimizer.nesterov", "seed="]
    return ["\n".join(lines).encode(), *(line.encode() for line in lines + odd)]


def feed_file(name: str, read: Callable[[Path], object], directory: Path) -> Feed:
    """A file of a run directory, and the function that reads the directory."""

    def feed(data: bytes) -> None:
        (directory / name).write_bytes(data)
        read(directory)

    return feed


def read_run(directory: Path) -> None:
    run_dir.read_config(directory)
    run_dir.read_members(directory)


def config_seeds() -> list[bytes]:
    config = config_lib.default_config().to_dict()
    recorded = {"config": config, "versions": {}, "device": {"count": 1}, "git_revision": None}
    member = {"path": "runs/a", "seed": 0, "test_accuracy": 0.9, "config": config}
    return [json.dumps(recorded).encode(), json.dumps(recorded | {"members": [member, member]}).encode()]


# The other files of a run directory


SUMMARY: dict[str, Any] = {
    **{"dataset": "digits", "seed": 0, "parameters": 1, "steps": 2, "epochs": 1, "device": "1 x cpu"},
    **{"train_accuracy": 1.0, "validation_accuracy": None, "test_accuracy": 0.5, "test_loss": 0.1, "test_errors": 3},
    **{name: 1.5 for name in ("train_seconds", "test_seconds", "total_seconds", "compile_seconds")},
    "images_per_second": 10.0,
}
SCORES = metrics.evaluate_logits(np.eye(10), np.arange(10))


def show_summary(directory: Path) -> None:
    """Reads summary.json, prints it, and shows it in a report and to the server's page."""
    summary = run_dir.read_summary(directory)
    assert summary is not None
    terminal.print_summary(summary, Console(file=io.StringIO(), markup=False))
    report.page("run", summary, SCORES, classifier.DIGITS, {}, {}).encode(errors="backslashreplace")
    json.dumps(summary, ensure_ascii=False).encode()  # as a terminal would have it
    json.dumps({"test_accuracy": summary.get("test_accuracy")}, allow_nan=False)


def metrics_seeds() -> list[bytes]:
    record = {"step": 11, "epoch": 1, "split": "train", "loss": 0.5, "accuracy": 0.9, "learning_rate": 1e-3}
    lines = [record | {"epoch": epoch, "split": split} for epoch in (1, 2) for split in ("train", "validation")]
    return ["".join(json.dumps(line) + "\n" for line in lines).encode(), (json.dumps(record) + "\n").encode()]


def calibration_seeds() -> list[bytes]:
    recorded = {"temperature": 1.2, "threshold": 0.9, "accepted_error": 0.002, "errors": 1, "digest": "00ff"}
    return [json.dumps(recorded).encode()]


def feed_study(directory: Path) -> Feed:
    """study.json, and what the report makes of it."""
    from mnist_flax.experiments import report as study_report
    from mnist_flax.experiments.research import directory as study_directory
    from mnist_flax.experiments.research import study_axes

    (directory / "config.json").write_bytes(config_seeds()[0])
    trial = study_axes.Trial(0, {"seed": 1}, "complete", 0.1, [])

    def feed(data: bytes) -> None:
        (directory / "study.json").write_bytes(data)
        record = study_directory.read(directory)
        for key, scale in record.scales.items():
            study_axes.make_axis(key, scale)
        study_report.page(record, [trial], [], [], None, {}).encode(errors="backslashreplace")

    return feed


def study_seeds() -> list[bytes]:
    from dataclasses import asdict

    from mnist_flax.experiments.research import space

    ranges = {
        "optimizer.learning_rate": space.log_uniform(1e-4, 1e-1),
        "batch_size": space.choice(16, 32),
        "optimizer.name": space.choice("adam", "sgd"),
        "optimizer.momentum": space.uniform(0.5, 0.9).when("optimizer.name", "sgd"),
        "num_epochs": space.integer(1, 4),
    }
    plan = asdict(space.Plan(question="Which?", scientific=("batch_size",)))
    scales = {key: asdict(dimension) for key, dimension in ranges.items()}
    return [json.dumps({"name": "s", "storage": "sqlite:///x", "plan": plan, "space": scales}).encode()]


# Pictures and requests


def feed_image(directory: Path) -> Feed:
    """An image file, as the predict command reads it; the first byte chooses the layout."""

    def recognise(digits: np.ndarray) -> np.ndarray:
        return np.full((len(digits), 10), -np.log(10))

    def feed(data: bytes) -> None:
        layout = page_reader.LAYOUTS[(data[0] if data else 0) % 3]
        picture = decode.load(io.BytesIO(data[1:]), "it", 1_000_000)
        assert picture.dtype == np.float32 and picture.min() >= 0 and picture.max() <= 1
        (result,) = page_reader.read([picture], layout, recognise, 0.5)
        json.dumps(page_reader.to_json(result), allow_nan=False)

    return feed


def image_seeds() -> list[bytes]:
    levels = np.full((40, 60), 255, np.uint8)
    levels[8:32, 10:14] = levels[8:32, 30:34] = levels[8:12, 26:34] = 0
    seeds = []
    for i, kind in enumerate(decode.FORMATS):
        for mode in ("L", "RGB", "P", "1", "RGBA", "I;16", "F", "CMYK"):
            file = io.BytesIO()
            try:
                picture = Image.fromarray(levels.astype(np.uint16) if mode == "I;16" else levels)
                (picture if mode == "I;16" else picture.convert(mode)).save(file, kind)
            except (OSError, ValueError):  # a mode that the format does not have
                continue
            seeds.append(bytes([i]) + file.getvalue())
    return seeds


def feed_json(directory: Path) -> Feed:
    """The body of a request with a digit."""

    def feed(data: bytes) -> None:
        image, _ = json_api.parse_digit(data)
        assert image.shape == (28, 28) and image.dtype == np.uint8

    return feed


def json_seeds() -> list[bytes]:
    strokes = {"strokes": [[[0.3, 0.3], [0.7, 0.3], [0.5, 0.8]], [[0.5, 1]]], "about": 3}
    return [json.dumps(body).encode() for body in (strokes, {"pixels": [[0, 255] * 14] * 28})]


KINDS = (
    *("application/json", "image/png", "application/octet-stream", "text/plain", ""),
    *("multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "application/json; charset=utf-16"),
)
PATHS = ("/api/predict", "/api/explain", "/api/mistakes", "/api/run", "/healthz", "/", "/app.js")


def feed_web(directory: Path) -> Feed:
    """A request to the application of an untrained network: a line of method, path, query and type, then the body."""
    from mnist_flax.serving import app

    asgi = app.make_app(untrained(directory), app.Limits(100_000, 200_000), ["localhost"])
    loop = asyncio.new_event_loop()

    def feed(data: bytes) -> None:
        head, _, body = data.partition(b"\n")
        words = (head.decode("latin-1").split(" ") + [""] * 4)[:4]
        path = PATHS[ord(words[1][0]) % len(PATHS)] if words[1][:1].isdigit() else words[1]
        kind = KINDS[ord(words[3][0]) % len(KINDS)] if words[3][:1] else ""
        status, answer = loop.run_until_complete(ask(asgi, words[0] or "GET", path, words[2], kind, body))
        assert 200 <= status < 500, f"status {status}"
        if status >= 400:
            raise cli.UserError(json.loads(answer)["error"] if answer else "refused")

    return feed


def untrained(directory: Path) -> classifier.CalibratedClassifier:
    """A small network as it is before training, with the run directory that describes it."""
    from mnist_flax.data import datasets
    from mnist_flax.models import cnn
    from mnist_flax.training.state import hyperparameters, init_state

    config = config_lib.default_config()
    config.dataset, config.data_dir = "mnist", str(directory)
    config.model.channels, config.model.pool_sizes, config.model.dense = (4,), (2,), ()
    config_lib.check_config(config)
    run_dir.write_json(directory / "config.json", {"config": config.to_dict()})
    run_dir.write_json(directory / "summary.json", SUMMARY)
    names = datasets.CLASS_NAMES[config.dataset]
    network = cnn.make_model(config.model, hyperparameters(config), len(names))
    state = init_state(config, len(names), 0)
    trained = Run(directory, config, network, state.variables(), names)
    recognise = classifier.make_log_probabilities(make_logits(trained), 1.0)
    return classifier.CalibratedClassifier(trained, recognise, 1.0, 0.5)


async def ask(app: Any, method: str, path: str, query: str, kind: str, body: bytes) -> tuple[int, bytes]:
    """One request to an ASGI application; its status and body."""
    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http"},
        **{
            "path": path,
            "raw_path": quote(path).encode(),
            "query_string": quote(query, string.punctuation).encode(),
            "root_path": "",
        },
        "headers": [(b"host", b"localhost"), (b"content-type", kind.encode())],
        **{"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000)},
    }
    parts = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[dict] = []

    async def receive() -> dict:
        return parts.pop() if parts else {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def web_seeds() -> list[bytes]:
    digits = [b"POST 0  0\n" + body for body in json_seeds()] + [b"POST 1  0\n" + body for body in json_seeds()]
    pictures = [b"POST 0 layout=page&annotated=true 1\n" + seed[1:] for seed in image_seeds()[::4]]
    form = b'--x\r\nContent-Disposition: form-data; name="f"; filename="a.png"\r\n\r\nx\r\n--x--\r\n'
    rest = [b"POST 0  5\n" + form, b"GET 3\n", b"HEAD 6\n", b"GET /../app.py\n", b"GET /%00\n", b"GET /\0\n"]
    return [*digits, *pictures, *rest]


TARGETS = {
    "idx": Target(feed_idx, idx_seeds),
    "dataset": Target(feed_dataset, dataset_seeds, True),
    "flags": Target(feed_flags, flags_seeds),
    "config": Target(partial(feed_file, "config.json", read_run), config_seeds, True),
    "summary": Target(partial(feed_file, "summary.json", show_summary), lambda: [json.dumps(SUMMARY).encode()], True),
    "metrics": Target(
        partial(feed_file, "metrics.jsonl", lambda directory: read_records(directory / "metrics.jsonl")),
        metrics_seeds,
        True,
    ),
    "calibration": Target(
        partial(feed_file, "calibration.json", lambda directory: classifier._read(directory / "calibration.json")),
        calibration_seeds,
        True,
    ),
    "study": Target(feed_study, study_seeds, True, ("mnist_flax.experiments.report",)),
    "image": Target(feed_image, image_seeds),
    "json": Target(feed_json, json_seeds, True),
    "web": Target(feed_web, web_seeds, False, ("mnist_flax.serving.app", "mnist_flax.inference.explain")),
}


def feed_once(feed: Feed, data: bytes) -> bool:
    """Whether the input is valid; raises what is a finding.

    A message for a user that is not one short line is one too.
    """
    try:
        feed(data)
        return True
    except (cli.UserError, cli.RunError) as error:
        assert 0 < len(cli.one_line(str(error))) < 10_000, "a message of no use"
        return False
