"""A scripted list of attacks on the served page: what is refused is refused in a sentence, and nobody else notices."""

import contextlib
import json
import re
import socket
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from tests.experiments.test_fuzz import dots
from tests.ocr.test_decode import chunk
from tests.server import Server, running
from tests.serving.test_app import png

# The real command, less patient, so that the tests need not be.
IMPATIENT = (
    "import mnist_flax.serving.app as web; web.PATIENCE = 2.0; "
    "import runpy; runpy.run_module('mnist_flax.serve', run_name='__main__')"
)


@pytest.fixture(scope="module")
def server(digits_run):
    with running(digits_run, "--max_megabytes=2", "--max_megapixels=3", script=IMPATIENT) as server:
        server.get("/healthz")
        yield server


@pytest.fixture(autouse=True)
def healthy(server):
    """Whatever a test did, the server answers others, and has logged no failure (`running` checks that at its end)."""
    yield
    assert server.get("/healthz") == {"status": "ok"}


@contextlib.contextmanager
def connected(server: Server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        yield connection


def everything(connection: socket.socket) -> bytes:
    """What the server says until it closes the connection."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            answer += part
    return answer


def say(server: Server, request: bytes) -> bytes:
    with connected(server) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(request)
        return everything(connection)


def head(*lines: str, start: str = "POST /api/predict HTTP/1.1", host: str = "localhost") -> bytes:
    return "\r\n".join([start, f"Host: {host}", *lines, "", ""]).encode("latin-1")


JSON = "Content-Type: application/json"
DIGIT = json.dumps({"strokes": [[[0.3, 0.3], [0.7, 0.8]]]}).encode()


# Slow ones


@pytest.mark.parametrize("length", ["Content-Length: 1000000", "Transfer-Encoding: chunked"])
def test_a_body_that_trickles_is_given_up(server, length):
    with connected(server) as connection:
        connection.sendall(head("Content-Type: image/png", length, "Connection: close"))
        connection.settimeout(0.1)
        answer = b""
        for _ in range(600):
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"1\r\nx\r\n" if "chunked" in length else b"x")
            try:
                answer += connection.recv(1 << 16)
                break
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408")


def test_what_is_sent_after_a_refusal_does_not_keep_the_connection(server):
    with connected(server) as connection:
        connection.sendall(head("Content-Type: text/plain", "Content-Length: 1000000"))
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 415")
        with pytest.raises(ConnectionError):
            for _ in range(600):
                connection.sendall(b"x")
                time.sleep(0.1)


def test_uploads_that_stall_do_not_fill_the_memory(server):
    """Eight of the largest have room; the ninth is told to come back, and all room is given back in the end."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected(server)) for _ in range(10)]
        for connection in connections:
            connection.sendall(head("Content-Type: image/png", "Content-Length: 2000000", "Connection: close"))
            with contextlib.suppress(ConnectionError):
                connection.sendall(bytes(1_900_000))
        statuses = [everything(connection)[9:12] for connection in connections]
    assert set(statuses) <= {b"503", b"408", b""} and statuses.count(b"408") == 8
    for _ in range(10):
        assert server.ask("POST", "/api/predict", bytes(2_000_000), "image/png").status == 400  # no image, but read


# Large ones


def resident(server: Server, field: str = "VmHWM") -> int:
    """Most memory that the server ever had, in MiB."""
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.exists():
        pytest.skip("there is no /proc to tell what memory a process takes")
    return int(re.search(rf"{field}:\s+(\d+) kB", status.read_text()).group(1)) // 1024


def text_bomb(key: str) -> bytes:
    """A megabyte of JSON that NumPy would make an array of 36 GB of: many short texts and a long one."""
    items = ",".join(['"a"'] * 100_000)
    inner = f'["{"a" * 90_000}",{items}]' if key == "pixels" else f'[["{"a" * 90_000}",1],[{items}]]'
    return f'{{"{key}": [{inner}]}}'.encode()


def bare_png(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(chunks)
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


ZEROS = zlib.compress(bytes(50_000_000), 9)
BOMBS = {
    "texts in pixels": (text_bomb("pixels"), "application/json", 400),
    "texts in strokes": (text_bomb("strokes"), "application/json", 400),
    "nested lists": (b'{"pixels":' + b"[" * 900_000, "application/json", 400),
    "nested objects": (b'{"a":' * 150_000, "application/json", 400),
    "a long number": (b'{"about": ' + b"9" * 900_000 + b"}", "application/json", 400),
    "many keys": (json.dumps({f"k{i}": 0 for i in range(60_000)}).encode(), "application/json", 400),
    "huge claimed size": (bare_png(50_000, 50_000), "image/png", 413),
    "largest claimed size": (bare_png(2**31 - 1, 2**31 - 1), "image/png", 413),
    "no size": (bare_png(0, 0), "image/png", 400),
    "a picture of zeros": (png(np.zeros((4_000, 2_000), np.uint8)), "image/png", 413),
    "compressed text": (bare_png(9, 9, *[chunk(b"zTXt", b"k\0\0" + ZEROS)] * 5), "image/png", 400),
    "compressed profile": (bare_png(9, 9, chunk(b"iCCP", b"k\0\0" + ZEROS)), "image/png", 400),
    "nothing but marks": (png(np.uint8(255 * dots(500))), "image/png", 400),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_body_that_would_grow_is_refused_small(server, name):
    body, kind, status = BOMBS[name]
    before = resident(server, "VmRSS")
    answer = server.ask("POST", "/api/predict?layout=line" if "image" in kind else "/api/predict", body, kind)
    assert answer.status == status and answer.json["error"], answer
    assert resident(server) < before + 400


@pytest.mark.parametrize(
    "request_head",
    [
        head("Content-Type: image/png", "Content-Length: 2000001"),
        head("Content-Type: image/png", f"Content-Length: {10**15}"),
        head(JSON, "Content-Length: 1000001"),
    ],
)
def test_a_body_that_says_it_is_too_large_is_not_waited_for(server, request_head):
    with connected(server) as connection:
        connection.sendall(request_head)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "flood",
    [
        head(*(f"X-{i}: {i}" for i in range(100_000)), start="GET / HTTP/1.1"),
        head("X: " + "x" * 10**7, start="GET / HTTP/1.1"),
        b"GET /" + b"x" * 10**7 + b" HTTP/1.1\r\n",
        b"GET /?" + b"a=1&" * 10**6 + b" HTTP/1.1\r\n",
    ],
    ids=["many headers", "a long header", "a long path", "many parameters"],
)
def test_floods_of_headers_are_refused(server, flood):
    before = resident(server, "VmRSS")
    answer = say(server, flood)
    assert not answer or answer.startswith(b"HTTP/1.1 400")
    assert resident(server) < before + 400


# Wrong ones


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\0" * 1000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"G\xe9T / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        head(JSON, "Content-Length: -1") + DIGIT,
        head(JSON, "Content-Length: 1e9") + DIGIT,
        head(JSON, "Content-Length: 5", "Content-Length: 6") + DIGIT,
        head(JSON, "Transfer-Encoding: chunked") + b"zz\r\n",
        head(JSON, "Transfer-Encoding: chunked") + b"fffffffffffffffffffff\r\n",
        head(JSON, "Transfer-Encoding: gzip, chunked") + DIGIT,
        head("X: a\0b", start="GET / HTTP/1.1"),
    ],
    ids=lambda request: ascii(request[:60]),
)
def test_what_is_no_http_is_refused(server, request_bytes):
    answer = say(server, request_bytes)
    assert not answer or re.match(rb"HTTP/1.1 (400|421|501)", answer), answer[:200]


def test_two_lengths_do_not_smuggle_a_request(server):
    """Chunked wins over a length (RFC 9112, 6.3), or the request is refused; what follows is no second request."""
    smuggled = b"0\r\n\r\n" + head(start="GET /api/run HTTP/1.1", host="evil.example")
    answer = say(server, head(JSON, "Content-Length: 5", "Transfer-Encoding: chunked") + smuggled)
    assert b" 200 " not in answer and b'"dataset"' not in answer


PATHS = r"""
    /../app.py /..%2fapp.py /%2e%2e/app.py /....//app.py /..\app.py /%5c..%5capp.py /~root //etc/passwd /CON
    /%00 /app.js%00.html /page/../../app.py /%ff%fe /.git/config /app.js/x /index.html/../../app.py
    /%252e%252e/app.py
"""
ODD_PATHS = [*PATHS.split(), "/\xff", "/" + "../" * 40 + "etc/passwd", "/" + "x" * 5000]


@pytest.mark.parametrize("path", ODD_PATHS, ids=lambda path: ascii(path[:40]))
def test_no_path_leads_outside(server, path):
    answer = say(server, head("Connection: close", start=f"GET {path} HTTP/1.1"))
    assert re.match(rb"HTTP/1.1 (400|404|307)", answer), answer[:200]
    assert b"import " not in answer and b"root:" not in answer


@pytest.mark.parametrize(
    "method", ["PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "OPTIONS", "PROPFIND", "get", "X" * 3000]
)
@pytest.mark.parametrize("path", ["/", "/api/predict", "/healthz"])
def test_other_methods_are_refused(server, method, path):
    answer = say(server, head("Connection: close", start=f"{method} {path} HTTP/1.1"))
    assert re.match(rb"HTTP/1.1 (404|405)", answer), answer[:200]


@pytest.mark.parametrize(
    "kind",
    [
        *("text/plain", "text/html", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "*/*"),
        *("application/xml", "application/zip", "application/python-pickle", "application/jsonx", "json", "image"),
    ],
)
def test_other_types_are_refused(server, kind):
    answer = server.ask("POST", "/api/predict", DIGIT, kind or None)
    assert answer.status == 415 and answer.json["error"]


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("image/svg+xml", b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'),
        ("image/x-eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n"),
        ("image/gif", png(np.zeros((9, 9), np.uint8), "GIF")),
        ("image/png", b"\x1f\x8b\x08" + bytes(100)),
    ],
    ids=["SVG", "EPS", "GIF", "gzip"],
)
def test_formats_that_could_do_more_are_not_even_tried(server, kind, content):
    answer = server.ask("POST", "/api/predict", content, kind)
    assert answer.status == 400 and "is no PNG, JPEG, TIFF, WEBP or BMP image" in answer.json["error"]


# Other websites


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "localhost:80@evil.example", "localhost,evil"),
        *("0.0.0.0", "127.0.0.2", "[::]", "localhost.", "2130706433", ""),
    ],
)
def test_a_name_that_may_lead_here_by_rebinding_is_refused(server, host):
    answer = say(server, head("Connection: close", start="GET /api/run HTTP/1.1", host=host))
    assert re.match(rb"HTTP/1.1 (421|400)", answer) and b'"dataset"' not in answer, answer[:200]


def test_the_address_in_the_request_line_does_not_stand_in_for_the_host(server):
    answer = say(server, head("Connection: close", start="GET http://localhost/api/run HTTP/1.1", host="evil.example"))
    assert answer.startswith(b"HTTP/1.1 421")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://localhost:PORT"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://behind.a.proxy"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost:PORT"}, 403),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/api/predict", "/api/explain"])
def test_only_this_page_may_send_digits(server, path, headers, status):
    headers = {name: value.replace("PORT", str(server.port)) for name, value in headers.items()}
    answer = server.ask("POST", path, DIGIT, "application/json", Host=f"localhost:{server.port}", **headers)
    assert answer.status == status
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_a_preflight_allows_nothing(server):
    answer = server.ask(
        "OPTIONS", "/api/predict", **{"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    )
    assert answer.status == 405 and not any(name.startswith("access-control") for name in answer.headers)


def test_websockets_are_not_spoken(server):
    upgrade = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eHh4")
    answer = say(server, head(*upgrade, start="GET /api/run HTTP/1.1", host="evil.example"))
    assert answer.startswith(b"HTTP/1.1 421")


REFUSED = [
    ("GET", "/nothing", None, {}, 404),
    ("PUT", "/api/predict", b"x", {}, 405),
    ("POST", "/api/predict", b"x", {"Content-Type": "text/plain"}, 415),
    ("POST", "/api/predict", bytes(2_000_001), {"Content-Type": "image/png"}, 413),
    ("POST", "/api/predict", b"x", {"Content-Type": "image/png"}, 400),
    ("GET", "/", None, {"Host": "evil.example"}, 421),
    ("POST", "/api/predict", DIGIT, {"Content-Type": "application/json", "Origin": "https://evil.example"}, 403),
]


@pytest.mark.parametrize(("method", "path", "body", "headers", "status"), REFUSED, ids=[str(c[4]) for c in REFUSED])
def test_refusals_have_the_headers_too(server, method, path, body, headers, status):
    answer = server.ask(method, path, body, **headers)
    assert answer.status == status and answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["x-frame-options"] == "DENY"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
