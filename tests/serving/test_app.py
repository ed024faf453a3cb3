import base64
import io
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mnist_flax.data import datasets
from mnist_flax.experiments.benchmarks import form_generator
from mnist_flax.inference.run import load_run
from mnist_flax.runtime import run_dir
from mnist_flax.serving import openapi
from tests import strokes
from tests.commands import command
from tests.server import Server, running

SEVEN = {"strokes": [[[0.3, 0.3], [0.7, 0.3], [0.5, 0.8]]]}
POINTS = {"strokes": [[[0.1, 0.1], [0.9, 0.9]]]}


@pytest.fixture(scope="module")
def server(digits_run):
    with running(digits_run, "--max_megabytes=2", "--max_megapixels=3") as server:
        yield server


@pytest.fixture(scope="module")
def test_split(digits_run):
    return datasets.load(run_dir.read_config(digits_run)).test


@pytest.fixture(scope="module")
def form(test_split) -> form_generator.Form:
    return form_generator.draw(test_split, np.random.default_rng(1), paper="ruled", lines=2)


def png(levels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(levels).save(file, format=kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def description(server: Server) -> dict:
    return server.get("/openapi.json")


def conforms(description: dict, name: str, content) -> None:
    """Checks what came back against the description of the API."""
    jsonschema.validate(content, description | {"$ref": f"#/components/schemas/{name}"})


def float32_model(directory: Path) -> tuple:
    """The Linen model of a run, and its variables."""
    trained = load_run(directory)
    return trained.model.clone(compute_dtype=np.dtype("float32"), impl="lax"), trained.variables


# What it answers


def test_pixels_get_the_models_own_probabilities(server, digits_run, test_split, description):
    model, variables = float32_model(digits_run)
    calibration = json.loads((digits_run / "calibration.json").read_text())
    logits = np.asarray(model.apply(variables, test_split.images[:5] / np.float32(255)), np.float64)
    expected = np.exp(logits / calibration["temperature"])
    expected /= expected.sum(1, keepdims=True)
    for image, probabilities in zip(test_split.images[:5], expected, strict=True):
        answer = server.post("/api/predict", {"pixels": image.tolist()})
        conforms(description, "Digit", answer)
        np.testing.assert_allclose(answer["probabilities"], probabilities, atol=1e-5)
        assert answer["likeliest"] == probabilities.argmax() and answer["pixels"] == image.tolist()
        sure = answer["confidence"] >= calibration["threshold"]
        assert answer["digit"] == (answer["likeliest"] if sure else None)


def test_a_picture_is_read_as_the_command_reads_it(server, digits_run, form, tmp_path, description):
    path = tmp_path / "form.png"
    path.write_bytes(png(form.image))
    for layout in ("page", "line", "digit"):
        answer = server.ask("POST", f"/api/predict?layout={layout}", path.read_bytes(), "image/png").json
        conforms(description, "Reading", answer)
        (line,) = command("mnist_flax.predict", digits_run, path, f"--layout={layout}", "--json").stdout.splitlines()
        by_command = json.loads(line)
        assert {key: answer[key] for key in ("text", "lines", "layout")} == {
            key: by_command[key] for key in ("text", "lines", "layout")
        }
        assert (answer["height"], answer["width"]) == form.image.shape


def test_an_annotated_copy_comes_back_with_the_pixels_of_each_digit(server, form, description):
    answer = server.ask("POST", "/api/predict?layout=page&annotated=true", png(form.image), "image/png").json
    conforms(description, "Reading", answer)
    image = Image.open(io.BytesIO(base64.b64decode(answer["annotated"].partition(",")[2])))
    assert image.size == form.image.shape[::-1]
    colours = np.asarray(image.convert("RGB")).astype(int)
    assert (np.ptp(colours, axis=2) > 80).sum() > 100  # boxes in colour on a grey picture
    digits = [digit for line in answer["lines"] for number in line["numbers"] for digit in number["digits"]]
    again = server.post("/api/predict", {"pixels": digits[0]["pixels"]})
    np.testing.assert_allclose(again["probabilities"], digits[0]["probabilities"], atol=1e-5)


def test_an_explanation_is_of_what_was_asked_about(server, description):
    likeliest = server.post("/api/explain", SEVEN)
    conforms(description, "Explanation", likeliest)
    assert likeliest["about"] == likeliest["likeliest"]
    other = (likeliest["likeliest"] + 1) % 10
    asked = server.post("/api/explain", SEVEN | {"about": other})
    assert asked["about"] == other and asked["gradient"] != likeliest["gradient"]
    assert asked["layers"] == likeliest["layers"]
    assert [layer["shape"] for layer in asked["layers"]] == [[8, 14, 14], [16, 7, 7], [64]]


def test_mistakes_are_those_of_the_test_split(server, digits_run, test_split, description):
    found = server.get("/api/mistakes")
    conforms(description, "Mistakes", found)
    model, variables = float32_model(digits_run)
    logits = np.asarray(model.apply(variables, test_split.images / np.float32(255)))
    wrong = np.flatnonzero(logits.argmax(1) != test_split.labels)
    assert found["examples"] == len(test_split.labels) and found["errors"] == len(wrong)
    assert sorted(mistake["index"] for mistake in found["mistakes"]) == wrong.tolist()
    confidences = [mistake["confidence"] for mistake in found["mistakes"]]
    assert confidences == sorted(confidences, reverse=True)
    for mistake in found["mistakes"]:
        assert mistake["label"] == test_split.labels[mistake["index"]] != mistake["likeliest"]
        assert mistake["pixels"] == test_split.images[mistake["index"]].tolist()


def test_run_and_health(server, digits_run, description):
    described = server.get("/api/run")
    conforms(description, "Run", described)
    summary = json.loads((digits_run / "summary.json").read_text())
    assert described["parameters"] == summary["parameters"] and described["test_accuracy"] == summary["test_accuracy"]
    assert server.get("/healthz") == {"status": "ok"}


def test_the_description_is_served_as_it_is(description):
    assert description == json.loads(json.dumps(openapi.document()))


def test_clients_at_once_each_get_their_own(server, test_split):
    bodies = [{"pixels": image.tolist()} for image in test_split.images[:64]]
    alone = [server.post("/api/predict", body) for body in bodies]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda body: server.post("/api/predict", body), bodies))
    for one, other in zip(alone, together, strict=True):
        assert one["pixels"] == other["pixels"]
        np.testing.assert_allclose(one["probabilities"], other["probabilities"], atol=1e-5)


@pytest.mark.parametrize("path", ["/", "/app.js", "/style.css", "/openapi.json", "/healthz", "/api/run", "/nothing"])
def test_headers_let_the_page_use_this_server_alone(server, path):
    answer = server.ask("GET", path)
    assert answer.status == (404 if path == "/nothing" else 200)
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == ("no-store" if path.startswith(("/api", "/health")) else "no-cache")
    assert "server" not in answer.headers


# What it refuses


NOISE = np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)
REFUSALS = [
    (b"", "image/png", 400, "the body is empty"),
    (b"no image", "image/png", 400, "the image is no PNG, JPEG, TIFF, WEBP or BMP image"),
    (png(NOISE)[:300], "image/png", 400, "the image is cut off or damaged"),
    (png(np.zeros((2000, 1501), np.uint8)), "image/png", 413, "the image has 1,501 x 2,000 pixels: the limit is"),
    (bytes(2_000_001), "image/png", 413, "the body is larger than 2,000,000 bytes"),
    (b"[" * 1_000_001, "application/json", 413, "the body is larger than 1,000,000 bytes"),
    (b"a=1", "application/x-www-form-urlencoded", 415, "send an image"),
    (b"a=1", None, 415, "send an image"),
    (b"{", "application/json", 400, "not a digit in JSON (Input data was truncated)"),
    (b'{"pixels":' + b"[" * 100_000, "application/json", 400, "maximum recursion depth"),
    (b"\xff\xfe", "application/json", 400, "JSON is malformed"),
    (b'{"\xff": 1}', "application/json", 400, "not a digit in JSON ('utf-8' codec"),
    (b"[]", "application/json", 400, "Expected `object`, got `array`"),
    (b"{}", "application/json", 400, "missing required field `pixels`"),
    (json.dumps(SEVEN | {"pixels": []}).encode(), "application/json", 400, "unknown field `pixels`"),
    (json.dumps(SEVEN | {"colour\n": 1}).encode(), "application/json", 400, "unknown field `colour `"),
    (json.dumps(SEVEN | {"about": 10}).encode(), "application/json", 400, "`int` <= 9 - at `$.about`"),
    (json.dumps(SEVEN | {"about": True}).encode(), "application/json", 400, "`bool` - at `$.about`"),
    (json.dumps({"pixels": [[0] * 28] * 27}).encode(), "application/json", 400, "length >= 28 - at `$.pixels`"),
    (json.dumps({"pixels": [[0.5] * 28] * 28}).encode(), "application/json", 400, "`float` - at `$.pixels[0][0]`"),
    (json.dumps({"pixels": [[256] * 28] * 28}).encode(), "application/json", 400, "<= 255 - at `$.pixels[0][0]`"),
    (json.dumps({"pixels": [[0] * 28] * 27 + [[0]]}).encode(), "application/json", 400, "28 - at `$.pixels[27]`"),
    (b'{"pixels": [[1e999]]}', "application/json", 400, "out of range - at `$.pixels[0][0]`"),
    (b'{"strokes": []}', "application/json", 400, "length >= 1 - at `$.strokes`"),
    (b'{"strokes": [[]]}', "application/json", 400, "length >= 1 - at `$.strokes[0]`"),
    (b'{"strokes": [[[0, NaN]]]}', "application/json", 400, "JSON is malformed: invalid character (byte 18)"),
    (b'{"strokes": [[[0, 1.5]]]}', "application/json", 400, "<= 1.0 - at `$.strokes[0][0][1]`"),
    (b'{"strokes": [[["0", "1"]]]}', "application/json", 400, "`str` - at `$.strokes[0][0][0]`"),
    (b'{"strokes": [[{"x": 1}]]}', "application/json", 400, "`object` - at `$.strokes[0][0]`"),
    (json.dumps({"strokes": [[[0, 0]] * 10_001]}).encode(), "application/json", 400, "10,000 points in all"),
]


@pytest.mark.parametrize(("body", "kind", "status", "sentence"), REFUSALS, ids=[case[3] for case in REFUSALS])
def test_malformed_bodies_get_a_sentence(server, body, kind, status, sentence, description):
    answer = server.ask("POST", "/api/predict", body, kind)
    assert answer.status == status
    conforms(description, "Problem", answer.json)
    assert sentence in answer.json["error"] and "\n" not in answer.json["error"]
    assert server.get("/healthz")


@pytest.mark.parametrize(
    ("method", "path", "status", "sentence"),
    [
        ("GET", "/api/predict", 405, "does not take this method"),
        ("POST", "/", 405, "does not take this method"),
        ("GET", "/nothing", 404, "there is nothing at this address"),
        ("GET", "/../app.py", 404, "there is nothing"),
        ("GET", "/%2e%2e/app.py", 404, "there is nothing"),
        ("GET", "/..%2f..%2fpyproject.toml", 404, "there is nothing"),
        ("POST", "/api/predict?layout=book", 400, "`$.layout`: the parameters are layout=digit|line|page and"),
        ("POST", "/api/predict?layout=page&layout=line", 400, "given more than once"),
        ("POST", "/api/predict?lay=page", 400, "unknown field `lay`: the parameters are layout="),
    ],
)
def test_wrong_addresses_get_a_sentence(server, method, path, status, sentence):
    answer = server.ask(method, path, png(np.zeros((9, 9), np.uint8)) if method == "POST" else None, "image/png")
    assert answer.status == status and sentence in answer.json["error"]


def test_a_body_without_a_length_is_limited_too(server):
    def chunks():
        for _ in range(400):
            yield bytes(10_000)

    try:
        answer = server.ask("POST", "/api/predict", chunks(), "image/png")
        assert answer.status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server had said no before all was sent
    assert server.get("/healthz")


def test_other_names_are_refused(server):
    assert server.ask("GET", "/healthz", Host=f"localhost:{server.port}").status == 200
    answer = server.ask("GET", "/api/run", Host="evil.example")
    assert answer.status == 421 and "does not answer to this name" in answer.json["error"]


def test_it_listens_at_loopback_alone(server):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; tells this machine's own address
        except OSError:
            pytest.skip("this machine has no address but loopback")
        own = probe.getsockname()[0]
    if own.startswith("127."):
        pytest.skip("this machine has no address but loopback")
    with pytest.raises(OSError):
        socket.create_connection((own, server.port), timeout=2)


# Fuzzing: nothing that is sent breaks it

IMAGES = [
    png(np.arange(48 * 64, dtype=np.uint8).reshape(48, 64), kind) for kind in ("PNG", "JPEG", "TIFF", "WEBP", "BMP")
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["pixels", "strokes", "about"]), inner),
    max_leaves=20,
)


@st.composite
def damaged_images(draw) -> bytes:
    body = bytearray(draw(st.sampled_from(IMAGES)))
    for _ in range(draw(st.integers(0, 8))):
        body[draw(st.integers(0, min(len(body) - 1, 200)))] = draw(st.integers(0, 255))
    return bytes(body[: draw(st.integers(1, len(body)))] if draw(st.booleans()) else body)


bodies = st.one_of(
    st.tuples(damaged_images(), st.just("image/png")),
    st.tuples(st.binary(min_size=1, max_size=300), st.sampled_from(["image/png", "application/json"])),
    st.tuples(json_values.map(lambda value: json.dumps(value).encode()), st.just("application/json")),
    st.tuples(
        st.dictionaries(st.sampled_from(["pixels", "strokes", "about"]), json_values, min_size=1).map(
            lambda value: json.dumps(value).encode()
        ),
        st.just("application/json"),
    ),
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(bodies, st.sampled_from(["/api/predict", "/api/predict?layout=page&annotated=true", "/api/explain"]))
def test_no_body_breaks_it(server, body, path):
    content, kind = body
    answer = server.ask("POST", path, content, kind)
    assert answer.status < 500, answer
    assert answer.status == 200 or answer.json["error"]


def test_strokes_of_all_digits_are_read(mnist_run):
    """With MNIST's weights, digits as a hand draws them are read right."""
    with running(mnist_run) as server:
        read = [server.post("/api/predict", {"strokes": drawn}) for drawn in strokes.DIGITS.values()]
    assert sum(answer["likeliest"] == digit for answer, digit in zip(read, strokes.DIGITS, strict=True)) >= 9
