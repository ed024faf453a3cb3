import contextlib
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from mnist_flax.data import datasets
from mnist_flax.experiments.benchmarks import form_generator
from mnist_flax.runtime import run_dir
from tests.commands import finish
from tests.server import launch
from tests.serving.test_app import POINTS, png


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_when_asked_and_finishes_what_it_began(digits_run, number):
    server = launch(digits_run)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(server.post, "/api/explain", POINTS) for _ in range(8)]
        while not any(answer.done() for answer in answers):
            pass
        server.process.send_signal(number)
        ended = finish(server.process, 0)
        assert (ended.stdout, ended.stderr) == ("stopped\n", "")
        for answer in answers:  # served, or never accepted
            with contextlib.suppress(OSError):
                assert answer.result()["layers"]
        assert any(answer.exception() is None for answer in answers)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), timeout=2)


IMPATIENT = """
from mnist_flax import serve
from mnist_flax.runtime import cli
from mnist_flax.serving import server
server.SECONDS_TO_FINISH = 0.1
cli.run(serve.main)
"""


def test_it_stops_although_a_picture_takes_longer_to_read_than_it_waits(digits_run):
    """The thread that reads then asks for the network, in the loop that waits for the thread."""
    digits = datasets.load(run_dir.read_config(digits_run)).test
    form = form_generator.draw(digits, np.random.default_rng(1), paper="ruled", lines=2)
    server = launch(digits_run, script=IMPATIENT)
    large = png(np.asarray(Image.fromarray(form.image).resize((5000, 5000))))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.ask, "POST", "/api/predict?layout=page", large, "image/png")
        while not answer.running() or server.get("/healthz")["status"] != "ok":
            pass
        time.sleep(0.5)  # received and begun, far from done
        server.process.send_signal(signal.SIGTERM)
        assert finish(server.process, 0).stdout == "stopped\n"
