"""Who neither asks nor reads is cut off, and makes room for others."""

import contextlib
import socket
import time

import pytest

from tests.server import running
from tests.serving.test_attacks import IMPATIENT, JSON, connected, everything, head, healthy  # noqa: F401


@pytest.fixture(scope="module")
def server(digits_run):
    with running(digits_run, script=IMPATIENT) as server:
        server.get("/healthz")
        yield server


@pytest.mark.parametrize(
    "beginning",
    [b"", b"GET / HTTP/1.1\r\nHost: localho", head(JSON, "Content-Length: 9")[:-2], b"\x16\x03\x01\x02\x00\x01"],
    ids=["nothing", "half a line", "headers without an end", "a TLS handshake"],
)
def test_who_does_not_ask_is_cut_off(server, beginning):
    with connected(server) as connection:
        connection.sendall(beginning)
        assert not everything(connection).startswith(b"HTTP/1.1 2")


def test_headers_that_trickle_are_cut_off(server):
    with connected(server) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        with pytest.raises(ConnectionError):
            for number in range(600):  # each within what any single one may take
                connection.sendall(f"X-{number}: 1\r\n".encode())
                time.sleep(0.1)


def test_who_does_not_read_is_cut_off(server):
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", server.port))
        with pytest.raises(ConnectionError):
            for _ in range(100_000):  # far more than buffers hold, and no answer is read
                connection.sendall(head(start=f"GET /openapi.json?{'x' * 8_000} HTTP/1.1"))


def test_many_idle_connections_make_room_for_others(server):
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            with contextlib.suppress(ConnectionError):
                stack.enter_context(connected(server))
        answer = server.ask("GET", "/healthz")
        assert answer.status in (200, 503)
        deadline = time.monotonic() + 60
        while answer.status == 503 and time.monotonic() < deadline:
            assert "too many connections" in answer.json["error"] and answer.headers["x-frame-options"] == "DENY"
            time.sleep(0.2)
            answer = server.ask("GET", "/healthz")
        assert answer.status == 200  # while those 300 are still held at this end
