"""How fast a trained model is in use: `python -m experiments.bench_use RUN`.

Prints the time of one prediction in the process, of the predict command from its start to its first answer, of a
page of 500 digits, and what the server does for 32 clients at once. Clients and server share this machine.
"""

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
import asyncio
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags

from mnist_flax.inference import model_flags
from mnist_flax.runtime import cli

_SECONDS = flags.DEFINE_float("seconds", 8.0, "how long the server is asked.", lower_bound=0.1)
_CLIENTS = flags.DEFINE_integer("clients", 32, "how many ask it at once.", lower_bound=1)


def single_predictions(reader, images: np.ndarray) -> list[float]:
    """Milliseconds of 2,000 predictions of one image each, after a warm-up."""
    times = []
    for call in range(-100, 2_000):
        image = images[call % len(images)][None]
        start = time.perf_counter()
        reader.log_probabilities(image)
        if call >= 0:
            times.append((time.perf_counter() - start) * 1e3)
    return times


def command_starts(directory: str, picture: Path) -> list[float]:
    """Seconds from the start of the predict command to its first answer, five times."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        command = [sys.executable, "-m", "mnist_flax.predict", directory, str(picture)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise cli.RunError("the predict command gave no answer: run it by hand to see why")
            times.append(time.perf_counter() - start)
    return times


def page_of(digits, count: int):
    """A form (see `form_generator`) of at least `count` digits, in as few lines of six numbers as it takes."""
    from mnist_flax.experiments.benchmarks import form_generator

    drawings = (
        form_generator.draw(digits, np.random.default_rng(0), lines=lines, numbers=6)
        for lines in itertools.count(count // 20)
    )
    return next(drawn for drawn in drawings if len(drawn.boxes) >= count)


async def ask(port: int, bodies: list[bytes], until: float, times: list[float]) -> None:
    """One client: the next request as soon as the last was answered, over one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        "POST /api/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
    )
    turn = 0
    while time.perf_counter() < until:
        body = bodies[turn % len(bodies)]
        turn += 1
        start = time.perf_counter()
        writer.write(head.format(len(body)).encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        if not answer.startswith("http/1.1 200"):
            raise cli.RunError(f"the server refused: {answer.splitlines()[0]}")
        await reader.readexactly(int(answer.partition("content-length: ")[2].partition("\r\n")[0]))
        times.append((time.perf_counter() - start) * 1e3)
    writer.close()
    await writer.wait_closed()


async def load(port: int, bodies: list[bytes], clients: int, seconds: float) -> list[float]:
    """Milliseconds of each request; any that fails ends the measurement with its error."""
    await asyncio.gather(*(ask(port, bodies, time.perf_counter() + 1, []) for _ in range(clients)))  # warm-up
    times: list[float] = []
    until = time.perf_counter() + seconds
    await asyncio.gather(*(ask(port, bodies, until, times) for _ in range(clients)))
    return times


def page_reading(reader, digits) -> str:
    """How long a page of 500 digits takes, in the process: median of three times, after a warm-up."""
    from mnist_flax.ocr import page_reader

    drawn = page_of(digits, 500)
    picture = drawn.image.astype(np.float32) / 255
    finding, recognising, sizes = [], [], []
    for turn in range(4):
        start = time.perf_counter()
        sheet = page_reader.find(picture, "page")
        middle = time.perf_counter()
        passes: list[int] = []

        def counted(images, passes=passes):
            passes.append(len(images))
            return reader.log_probabilities(images)

        (result,) = page_reader.recognise([sheet], counted, reader.threshold)
        if turn:
            finding.append(middle - start)
            recognising.append(time.perf_counter() - middle)
        sizes = passes
    return (
        f"a page of {len(drawn.boxes)} digits, {picture.shape[1]} x {picture.shape[0]} pixels: found in "
        f"{np.median(finding):.2f} s, recognised in {np.median(recognising):.2f} s, in {len(sizes)} batch of "
        f"{sum(sizes)} candidates; {len(result.digits)} digits were read"
    )


def serving(directory: str, images: np.ndarray) -> str:
    """What the serve command does for many clients at once."""
    command = [sys.executable, "-m", "mnist_flax.serve", directory, "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line.startswith("serving"):
                raise cli.RunError("the server did not start: run it by hand to see why")
            bodies = [json.dumps({"pixels": image.tolist()}).encode() for image in images[:100]]
            port = int(line.split(":")[2].split()[0])
            times = asyncio.run(load(port, bodies, _CLIENTS.value, _SECONDS.value))
        finally:
            server.terminate()
            server.communicate()
    return (
        f"the server, {_CLIENTS.value} clients for {_SECONDS.value:g} s: {len(times) / _SECONDS.value:,.0f} requests a "
        f"second, no error, {spread(times)} ms, 99 % within {np.percentile(times, 99):.1f} ms"
    )


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise cli.UserError("name one run directory: python -m experiments.bench_use RUN")
    from PIL import Image

    from mnist_flax.inference import classifier
    from mnist_flax.runtime import devices

    devices.keep_compiled_programs()
    reader = classifier.load_classifier(model_flags.load(argv[1]))
    splits = classifier.splits_at_hand(reader.run)
    if splits is None:
        raise cli.UserError(f"the dataset of {argv[1]} is not at hand: name its place with --data_dir=DIR")
    device = devices.describe(devices.make_mesh())
    print(f"{argv[1]} on {device['count']} x {device['kind']}; times are median (5 % to 95 %)")

    times = single_predictions(reader, splits.test.images)
    print(f"one prediction in the process: {spread(times)} ms")

    print(page_reading(reader, splits.test))

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "digit.png"
        Image.fromarray(255 - splits.test.images[0]).resize((280, 280)).save(path)
        print(f"the predict command, start to first answer: {spread(command_starts(argv[1], path))} s")

    print(serving(argv[1], splits.test.images))


def spread(times: list[float]) -> str:
    low, middle, high = np.percentile(times, (5, 50, 95))
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


if __name__ == "__main__":
    cli.run(main)
