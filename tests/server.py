"""The real server in a process of its own, and a client."""

import contextlib
import http.client
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.commands import finish, start


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server(NamedTuple):
    process: Any
    port: int

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def ask(self, method: str, path: str, body: bytes | None = None, kind: str | None = None, **headers: str) -> Answer:
        """One request, over a connection of its own. `kind` is the Content-Type."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers | ({"Content-Type": kind} if kind else {}))
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, response.read())

    def post(self, path: str, content: Any, status: int = 200) -> Any:
        """Sends JSON, and checks the status; gives the JSON that came back."""
        answer = self.ask("POST", path, json.dumps(content).encode(), "application/json")
        assert answer.status == status, answer
        return answer.json

    def get(self, path: str) -> Any:
        answer = self.ask("GET", path)
        assert answer.status == 200, answer
        return answer.json


def launch(directory: Path, *flags: str, script: str | None = None) -> Server:
    """Starts the command, or a `script` that runs it, and waits until it says where it is."""
    process = start(script or "mnist_flax.serve", directory, "--port=0", *flags, option="-c" if script else "-m")
    line = process.stdout.readline()
    if not line.startswith("serving"):
        raise AssertionError(process.communicate())
    return Server(process, int(line.split(":")[2].split()[0]))


@contextlib.contextmanager
def running(directory: Path, *flags: str, script: str | None = None) -> Iterator[Server]:
    server = launch(directory, *flags, script=script)
    try:
        yield server
    finally:
        server.process.send_signal(signal.SIGTERM)
        assert finish(server.process, 0).stdout == "stopped\n"
