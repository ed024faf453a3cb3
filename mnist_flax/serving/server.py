"""The server's process: the application in uvicorn, until a signal comes."""

import logging
import signal
import socket
from collections.abc import Sequence

import uvicorn

from mnist_flax.inference.classifier import CalibratedClassifier
from mnist_flax.serving import app, http_limits

SECONDS_TO_FINISH = 5  # for requests that are under way when the server is stopped


def serve(
    listener: socket.socket, hosts: Sequence[str] | None, reader: CalibratedClassifier, limits: app.Limits, ready: str
) -> None:
    """Serves a run until SIGINT or SIGTERM comes; requests under way are then finished.

    Args:
      hosts: names that requests may call the server by: see `listen.names`.
      ready: printed when the server is about to answer.
    """
    server = uvicorn.Server(
        uvicorn.Config(
            app.make_app(reader, limits, hosts),
            http=http_limits.Protocol,
            ws="none",
            log_level=logging.ERROR,  # who sends nonsense is told so, and fills no log
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=SECONDS_TO_FINISH,
        )
    )
    # The server stops by itself at these, and then raises them again, which is not to end the process by force.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: None)
    print(ready, flush=True)
    server.run(sockets=[listener])
