"""The web application: a page to draw on, and the API behind it."""

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mnist_flax.data import prepare
from mnist_flax.inference import explain, mistakes
from mnist_flax.inference.classifier import CalibratedClassifier
from mnist_flax.inference.predictor import BATCH_SIZES
from mnist_flax.ocr import decode, page_reader
from mnist_flax.runtime import cli, run_dir
from mnist_flax.runtime.cli import UserError
from mnist_flax.serving import json_api, micro_batching, openapi, schema

PAGE = Path(__file__).parent / "page"
MOST_JSON = 1_000_000  # bytes
PATIENCE = 30.0  # seconds for a request, a body, or a client that is to read its answer
UPLOADS = 8  # of the largest size, that are kept in memory at a time

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Limits(NamedTuple):
    """What an upload may be."""

    bytes: int
    pixels: int


@dataclass
class UploadBudget:
    """Bytes that bodies of requests may still take."""

    free: int


class Service(NamedTuple):
    """What requests are served with."""

    reader: CalibratedClassifier
    limits: Limits
    room: UploadBudget
    recognise: Callable[[micro_batching.Images], Coroutine[Any, Any, micro_batching.Scores]]
    explain: Callable[[np.ndarray, int], explain.Explanation]
    pictures: Executor  # decodes and finds digits
    network: Executor  # one thread: passes through the network
    mistakes: Callable[[], Awaitable[schema.Mistakes | None]]


def make_app(reader: CalibratedClassifier, limits: Limits, hosts: Collection[str] | None) -> ASGIApp:
    """The application of one run, its programs compiled.

    `hosts` are the names that a request may call the server by; others are refused, so that no website can make
    a browser talk to it under a name of its own (DNS rebinding). None allows all.
    """
    pictures, network = ThreadPoolExecutor(2, "pictures"), ThreadPoolExecutor(1, "network")
    explainer = explain.make_explain(reader.run, reader.temperature)
    warm_up(reader, explainer)
    found: list[schema.Mistakes | None] = []
    searching = asyncio.Lock()

    async def mistakes_once() -> schema.Mistakes | None:
        async with searching:
            if not found:
                result = await _in_thread(pictures, mistakes.find_mistakes, reader)
                found.append(result and json_api.mistakes_to_json(result, reader.threshold))
        return found[0]

    recognise = micro_batching.make_batcher(reader.log_probabilities, network)
    room = UploadBudget(UPLOADS * max(limits.bytes, MOST_JSON))
    service = Service(reader, limits, room, recognise, explainer, pictures, network, mistakes_once)

    @asynccontextmanager
    async def lifespan(app: Starlette):
        yield
        for executor in (pictures, network):
            await asyncio.to_thread(executor.shutdown, cancel_futures=True)  # what they do may wait for this loop

    def route(path: str, endpoint: Callable[[Service, Request], Awaitable[Response]], method: str) -> Route:
        async def handle(request: Request) -> Response:
            try:
                return await endpoint(service, request)
            except asyncio.CancelledError as error:  # by the server, which stops and has waited long enough
                raise HTTPException(503, "the server was stopped before it had the answer: ask again") from error

        return Route(path, handle, methods=[method])

    routes = [
        Mount(
            "/api",
            routes=[
                route("/predict", predict, "POST"),
                route("/explain", explain_digit, "POST"),
                route("/mistakes", list_mistakes, "GET"),
                route("/run", describe_run, "GET"),
            ],
        ),
        route("/healthz", health, "GET"),
        Route("/openapi.json", JSONResponse(openapi.document()), methods=["GET"]),
        Mount("/", StaticFiles(directory=PAGE, html=True)),
    ]
    handlers: dict[Any, Any] = {HTTPException: _refuse, UserError: _complain, Exception: _fail}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    return secured(app, hosts)


def warm_up(reader: CalibratedClassifier, explainer: Callable[[np.ndarray, int], explain.Explanation]) -> None:
    """Compiles what a first visitor would have to wait for."""
    for size in BATCH_SIZES[:5]:
        reader.log_probabilities(np.zeros((size, 28, 28), np.uint8))
    explainer(np.zeros((28, 28), np.uint8), 0)


# Endpoints


async def predict(service: Service, request: Request) -> Response:
    """Reads a picture, or a digit given as JSON."""
    choices = json_api.parse_choices(request.query_params.multi_items())
    kind = _content_type(request)
    if kind == "application/json":
        if request.query_params:
            raise UserError("parameters are for pictures: a digit in JSON takes none")
        async with _body(service, request, MOST_JSON) as body:
            image, _ = json_api.parse_digit(body)
        (scores,) = await service.recognise(image[None])
        return JSONResponse(json_api.digit_to_json(scores, image, service.reader.threshold))
    if not (kind.startswith("image/") or kind == "application/octet-stream"):
        raise HTTPException(415, "send an image (Content-Type: image/png and the like) or JSON (application/json)")
    loop = asyncio.get_running_loop()

    def recognise(digits: micro_batching.Images) -> micro_batching.Scores:
        return asyncio.run_coroutine_threadsafe(service.recognise(digits), loop).result()

    def read(body: bytes) -> dict[str, Any]:
        picture = decode.load(io.BytesIO(body), "the image", service.limits.pixels)
        (result,) = page_reader.read([picture], choices.layout, recognise, service.reader.threshold)
        return json_api.reading_to_json(picture, result, choices)

    try:
        async with _body(service, request, service.limits.bytes) as body:
            return JSONResponse(await _in_thread(service.pictures, read, body))
    except decode.TooManyPixels as error:
        raise HTTPException(413, str(error)) from error


async def explain_digit(service: Service, request: Request) -> Response:
    """Says what the layers find in a digit and which pixels mattered."""
    if _content_type(request) != "application/json":
        raise HTTPException(415, "send JSON (Content-Type: application/json)")
    async with _body(service, request, MOST_JSON) as body:
        image, about = json_api.parse_digit(body)
    (scores,) = await service.recognise(image[None])
    answer = json_api.digit_to_json(scores, image, service.reader.threshold)
    about = answer["likeliest"] if about is None else about
    explanation = await _in_thread(service.network, service.explain, image, about)
    return JSONResponse(json_api.explanation_to_json(answer, explanation, about))


async def list_mistakes(service: Service, request: Request) -> Response:
    found = await service.mistakes()
    if found is None:
        raise HTTPException(404, f"the test examples are not at hand: start the server with {prepare.place_option()}")
    return JSONResponse(found)


async def describe_run(service: Service, request: Request) -> Response:
    return JSONResponse(describe(service.reader))


async def health(service: Service, request: Request) -> Response:
    """Healthy is a server that can still recognise a digit."""
    try:
        async with asyncio.timeout(10):
            await service.recognise(np.zeros((1, 28, 28), np.uint8))
    except TimeoutError:
        raise HTTPException(503, "the network does not answer") from None
    return JSONResponse({"status": "ok"})


def describe(reader: CalibratedClassifier) -> schema.Run:
    """What the page says of the run."""
    import jax

    summary = run_dir.read_summary(reader.run.directory) or {}
    return {
        "name": reader.run.directory.resolve().name,
        "dataset": reader.run.config.dataset,
        "members": max(1, len(reader.run.members)),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(reader.run.variables["params"])),
        "test_accuracy": summary.get("test_accuracy"),
        "threshold": reader.threshold,
    }


# What endpoints share


async def _in_thread(executor: Executor, function: Callable, *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(executor, function, *arguments)


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


@asynccontextmanager
async def _body(service: Service, request: Request, most: int) -> AsyncIterator[bytes]:
    """The body, refused as soon as it is known to be too large, or there is no room for it beside the others."""
    too_large = HTTPException(413, f"the body is larger than {most:,} bytes, which is the limit")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > most:
        raise too_large
    body = bytearray()
    taken = 0
    try:
        try:
            async with asyncio.timeout(PATIENCE):
                async for part in request.stream():
                    taken += len(part)
                    service.room.free -= len(part)
                    if taken > most:
                        raise too_large
                    if service.room.free < 0:
                        raise HTTPException(503, "the server is busy: try again", {"retry-after": "10"})
                    body += part
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive in {PATIENCE:.0f} seconds") from None
        except ClientDisconnect:
            raise HTTPException(400, "the connection was closed before the body was there") from None
        if not body:
            raise HTTPException(400, "the body is empty: send an image, or JSON")
        yield bytes(body)
    finally:
        service.room.free += taken


def _problem(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": sentence}, status, headers)


async def _refuse(request: Request, error: HTTPException) -> Response:
    sentences = {404: "there is nothing at this address", 405: "this address does not take this method"}
    detail = sentences.get(error.status_code, "") if error.detail in ("Not Found", "Method Not Allowed") else ""
    return _problem(error.status_code, f"{detail}: see /openapi.json" if detail else error.detail, error.headers)


async def _complain(request: Request, error: UserError) -> Response:
    return _problem(400, str(error))


async def _fail(request: Request, error: Exception) -> Response:
    path = cli.one_line(request.scope["path"])
    logging.error("%s %s failed", request.method, path)  # the traceback follows from the server
    return _problem(500, "the server failed: its log says why")


def is_from_another_website(method: str, headers: Mapping[bytes, bytes]) -> bool:
    """Whether a browser sends a request that changes or costs something on behalf of a page that is not ours.

    By Sec-Fetch-Site, which survives a proxy, and where a browser sends none by Origin (Valsorda, "Cross-site request
    forgery", 2025, as in Go's CrossOriginProtection). What is no browser sends neither.
    """
    if method in ("GET", "HEAD", "OPTIONS"):
        return False
    if site := headers.get(b"sec-fetch-site"):
        return site not in (b"same-origin", b"none")
    origin = headers.get(b"origin")
    return origin is not None and origin.partition(b"://")[2] != headers.get(b"host")


def secured(app: ASGIApp, hosts: Collection[str] | None) -> ASGIApp:
    """Puts `HEADERS` on every response, and refuses a Host that is none of `hosts`, and other websites' requests."""
    raw = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        fresh = (b"cache-control", b"no-store" if scope["path"].startswith(("/api/", "/healthz")) else b"no-cache")

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *raw, fresh]
            await send(message)

        headers = dict(scope["headers"])
        named = headers.get(b"host", b"").decode("latin-1").lower()
        host = named.rpartition(":")[0] if named.rpartition(":")[2].isdecimal() else named
        if hosts is not None and host not in hosts:
            sentence = "this server does not answer to this name: use the address that it printed, or --allowed_hosts"
            refusal = _problem(421, sentence)
            return await refusal(scope, receive, send_guarded)
        if is_from_another_website(scope["method"], headers):
            refusal = _problem(403, "requests on behalf of other websites are refused")
            return await refusal(scope, receive, send_guarded)
        await app(scope, receive, send_guarded)

    return guard


BUSY = secured(
    _problem(503, "there are too many connections: try again", {"retry-after": "10", "connection": "close"}), None
)
