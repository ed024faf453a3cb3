"""The page in a real browser: Chromium, headless, driven by Playwright."""

import base64
import graphlib
import io
import json
import re
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from mnist_flax.data import datasets
from mnist_flax.experiments.benchmarks import form_generator
from mnist_flax.runtime import run_dir
from mnist_flax.serving import app
from tests import strokes
from tests.server import Server, running

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
PATIENCE = 60_000  # milliseconds: machines that test may be slow, or busy
expect.set_options(timeout=PATIENCE)

FLAGS = ["--no-sandbox", "--no-first-run", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}


@pytest.fixture(scope="module")
def browser() -> Iterator:
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not executable:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(browser, digits_run) -> Iterator[Server]:
    with running(digits_run) as server:
        yield server


def is_complaint(message) -> bool:
    """Not what these tests bring about: refused requests, and canvases that are read."""
    ours = "status of 400" in message.text or "willReadFrequently" in message.text
    return message.type in ("error", "warning") and not ours


@pytest.fixture
def open_page(browser, server):
    """Opens the page as a device would; in the end checks that nothing went wrong or out to another place."""
    pages, complaints, requests = [], [], []

    def open_page(device: dict = DESKTOP, view: str = ""):
        page = browser.new_context(**device).new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: complaints.append(message.text) if is_complaint(message) else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(server.address + view)
        expect(page.locator("#run")).to_contain_text("parameters")
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.context.close()
    assert not complaints
    assert all(url.startswith((server.address, "data:")) for url in requests)


def test_no_module_of_the_page_imports_itself_in_a_circle():
    imports = {path.name: re.findall(r'from "\./([^"]+)"', path.read_text()) for path in app.PAGE.glob("*.js")}
    assert imports["app.js"] and set().union(*imports.values()) < imports.keys()
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError


def place(page, point) -> tuple[float, float]:
    box = page.locator("#pad").bounding_box()
    return box["x"] + point[0] * box["width"], box["y"] + point[1] * box["height"]


def draw(page, digit: int) -> None:
    for stroke in strokes.DIGITS[digit]:
        page.mouse.move(*place(page, stroke[0]))
        page.mouse.down()
        for point in stroke[1:]:
            page.mouse.move(*place(page, point))
        page.mouse.up()


def sent_strokes(page, action) -> list:
    """The strokes of the last prediction that an action leads to."""
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data) if "api/predict" in request.url else 0)
    action()
    seen = -1
    while seen != len(bodies):  # a busy machine sends the last one late
        seen = len(bodies)
        page.wait_for_timeout(1_000)
    return json.loads(bodies[-1])["strokes"]


def shown_bars(page) -> np.ndarray:
    """Heights of the bars, as shares of their tracks."""
    page.wait_for_timeout(300)  # until they have moved
    script = "bars => bars.map(bar => bar.offsetHeight / bar.parentNode.offsetHeight)"
    return np.array(page.locator(".bars .fill").evaluate_all(script))


def pixels_of(page, selector: str) -> np.ndarray:
    script = "c => [c.height, c.width, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    height, width, *levels = page.locator(selector).evaluate(script)
    return np.array(levels, np.uint8).reshape(height, width, 4)


@pytest.mark.parametrize("digit", [0, 3, 7])
def test_a_drawn_digit_is_answered_as_the_network_answers(open_page, server, digit):
    page = open_page()
    expect(page.locator("#sentence")).to_have_text("Nothing is drawn yet.")
    drawn = sent_strokes(page, lambda: draw(page, digit))
    assert len(drawn) == len(strokes.DIGITS[digit])
    answer = server.post("/api/predict", {"strokes": drawn})
    expect(page.locator("#digit")).to_have_text("?" if answer["digit"] is None else str(answer["digit"]))
    np.testing.assert_allclose(shown_bars(page), answer["probabilities"], atol=0.02)
    np.testing.assert_array_equal(pixels_of(page, "#seen")[..., 0], answer["pixels"])


def test_probabilities_move_while_drawing(open_page):
    page = open_page()
    stroke = strokes.DIGITS[0][0]
    page.mouse.move(*place(page, stroke[0]))
    page.mouse.down()
    seen = []
    for point in stroke[1:]:
        page.mouse.move(*place(page, point))
        page.wait_for_timeout(40)
        seen.append(tuple(page.locator(".bars button").evaluate_all("all => all.map(b => b.ariaLabel)")))
    assert len(set(seen)) > 5  # and the pen is still down
    page.mouse.up()


def test_it_can_be_drawn_on_by_keyboard_alone(open_page):
    page = open_page()
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "pad":
            break

    def write_seven():
        for keys in (["ArrowUp"] * 8 + ["ArrowLeft"] * 6, [" "], ["ArrowRight"] * 12):
            for key in keys:
                page.keyboard.press(key)
        for _ in range(16):
            page.keyboard.press("ArrowDown")
            page.keyboard.press("ArrowLeft")
        page.keyboard.press(" ")

    (drawn,) = sent_strokes(page, write_seven)
    assert drawn[0] == [0.35, 0.3] and drawn[12] == [0.65, 0.3] and drawn[-1] == [0.25, 0.7]
    expect(page.locator("#sentence")).to_contain_text(re.compile("network reads|doubtful"))
    page.keyboard.press("Backspace")
    expect(page.locator("#sentence")).to_have_text("Nothing is drawn yet.")


def test_undo_and_clear(open_page):
    page = open_page()
    undo, clear = page.locator("#undo"), page.locator("#clear")
    expect(undo).to_be_disabled()
    draw(page, 4)  # two strokes
    one_left = sent_strokes(page, undo.click)
    assert len(one_left) == 1
    draw(page, 1)
    clear.click()
    expect(page.locator("#digit")).to_have_text(re.compile(r"^\W$"))
    expect(clear).to_be_disabled()
    assert shown_bars(page).max() == 0 and not pixels_of(page, "#seen").any()


@pytest.mark.parametrize("key", ["undo", "clear"])
def test_a_stroke_taken_back_while_it_is_drawn_is_gone(open_page, key):
    page = open_page()
    draw(page, 1)
    expect(page.locator(f"#{key}")).to_be_enabled()
    page.mouse.move(*place(page, (0.1, 0.1)))
    page.mouse.down()
    page.locator(f"#{key}").press("Space")
    page.mouse.move(*place(page, (0.9, 0.1)))
    page.mouse.up()
    left = sent_strokes(page, lambda: draw(page, 1))
    assert left == left[-1:] * (2 if key == "undo" else 1)


def test_looking_inside(open_page, server):
    page = open_page()
    drawn = sent_strokes(page, lambda: draw(page, 3))
    expect(page.locator("#layers figure")).to_have_count(3)
    explained = server.post("/api/explain", {"strokes": drawn})
    expect(page.locator("#mattered-caption")).to_contain_text(f"speaks for {explained['about']}")
    expect(page.locator("#layers")).to_contain_text(re.compile("8 features, each looked for at 14 . 14 places"))
    map_ = pixels_of(page, "#layers figure:nth-child(1) canvas")[:14, :14, :3].astype(int).sum(2)
    first = np.frombuffer(base64.b64decode(explained["layers"][0]["values"]), np.uint8)[:196].reshape(14, 14)
    assert np.corrcoef(map_.ravel(), first.ravel())[0, 1] > 0.9  # brighter is more
    occlusion = pixels_of(page, "#mattered")
    page.get_by_label("gradient").check()
    expect(page.locator("#mattered-caption")).to_contain_text("gradient")
    assert (pixels_of(page, "#mattered") != occlusion).any()
    other = (explained["about"] + 1) % 10
    page.locator(".bars button").nth(other).click()
    expect(page.locator("#mattered-caption")).to_contain_text(f"odds of {other}")
    expect(page.locator(".bars button").nth(other)).to_have_attribute("aria-pressed", "true")


def test_the_threshold_is_told_as_it_is(browser, digits_run):
    with running(digits_run, "--threshold=1") as server:
        page = browser.new_context(**DESKTOP).new_page()
        page.goto(server.address)
        expect(page.locator("#bars-caption")).to_contain_text("in percent; an answer below 100 % is “?”.")
        page.context.close()


@pytest.mark.parametrize("device", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_form_comes_back_annotated(open_page, server, digits_run, device):
    split = datasets.load(run_dir.read_config(digits_run)).test
    form = form_generator.draw(split, np.random.default_rng(3), paper="boxed", lines=2)
    file = io.BytesIO()
    Image.fromarray(form.image).save(file, format="JPEG", quality=90)
    page = open_page(device)
    page.get_by_role("tab", name="Photo or form").click()
    page.set_input_files("#file", {"name": "form.jpg", "mimeType": "image/jpeg", "buffer": file.getvalue()})
    buttons = page.locator("#lines button")
    expect(buttons.first).to_be_visible()
    answer = server.ask("POST", "/api/predict?layout=page", file.getvalue(), "image/jpeg").json
    assert "".join(buttons.all_inner_texts()) == re.sub(r"\s", "", answer["text"])
    expect(page.locator("#picture-status")).to_contain_text(f"{buttons.count()} digits found")
    size = page.locator("#annotated").evaluate("image => [image.naturalHeight, image.naturalWidth]")
    assert tuple(size) == form.image.shape
    buttons.nth(1).click()
    digits = [digit for line in answer["lines"] for number in line["numbers"] for digit in number["digits"]]
    np.testing.assert_allclose(shown_bars(page), digits[1]["probabilities"], atol=0.02)
    expect(page.locator("#seen-caption")).to_contain_text("found in the picture")


@pytest.mark.parametrize("device", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_high_picture_parts_no_cards(open_page, device):
    file = io.BytesIO()
    Image.new("L", (100, 300), 255).save(file, format="PNG")
    page = open_page(device, "#picture")
    page.set_input_files("#file", {"name": "high.png", "mimeType": "image/png", "buffer": file.getvalue()})
    expect(page.locator("#annotated")).to_be_visible()
    page.wait_for_timeout(300)  # until it is laid out
    answer, looks = (page.locator(part).bounding_box() for part in (".answer", ".looks"))
    assert looks["y"] - answer["y"] - answer["height"] < 16


DROP = """([name, encoded, place]) => {
  const bytes = Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type: "image/png" }));
  for (const kind of ["dragover", "drop"]) {
    const options = { dataTransfer: transfer, bubbles: true, cancelable: true };
    document.getElementById(place).dispatchEvent(new DragEvent(kind, options));
  }
}"""


@pytest.mark.parametrize(("view", "place"), [("#picture", "drop"), ("", "pad")])
def test_a_picture_can_be_dropped_and_read_in_another_way(open_page, digits_run, view, place):
    split = datasets.load(run_dir.read_config(digits_run)).test
    file = io.BytesIO()
    Image.fromarray(255 - split.images[0]).resize((200, 200)).save(file, format="PNG")
    page = open_page(view=view)
    page.evaluate(DROP, ["digit.png", base64.b64encode(file.getvalue()).decode(), place])
    expect(page.locator("#lines button")).to_have_count(1)
    page.get_by_label("one digit").check()
    doubtful = ", 1 too doubtful to answer" if page.locator("#lines .unsure").count() else ""
    expect(page.locator("#picture-status")).to_have_text(f"1 digit found{doubtful}.")
    page.locator("#lines button").click()
    expect(page.locator("#sentence")).to_contain_text(re.compile("network reads|doubtful"))


def test_what_is_no_picture_gets_a_sentence(open_page):
    page = open_page(view="#picture")
    page.set_input_files("#file", {"name": "x.tif", "mimeType": "application/octet-stream", "buffer": b"no image"})
    expect(page.locator("#picture-status")).to_contain_text("is no PNG, JPEG, TIFF, WEBP or BMP image")
    expect(page.locator("#picture-result")).to_be_hidden()


def test_mistakes_can_be_browsed(open_page, server):
    found = server.get("/api/mistakes")
    page = open_page(view="#mistakes")
    buttons = page.locator("#mistakes button")
    expect(buttons).to_have_count(found["errors"])
    if not found["errors"]:
        pytest.skip("the network made no mistake")
    expect(page.locator("#mistakes-status")).to_contain_text(f"{found['errors']} of {found['examples']} test images")
    expect(page.locator("#mistakes-status")).to_contain_text(f"{found['doubtful']} of these so doubtful")
    first = found["mistakes"][0]
    buttons.first.click()
    expect(page.locator("#sentence")).to_contain_text(f"labelled {first['label']}")
    expect(page.locator("#seen-caption")).to_contain_text("as the test set has them")
    np.testing.assert_allclose(shown_bars(page), first["probabilities"], atol=0.02)
    np.testing.assert_array_equal(pixels_of(page, "#seen")[..., 0], first["pixels"])


def test_a_network_without_mistakes_is_said_to_make_none(browser, server):
    page = browser.new_context(**DESKTOP).new_page()
    none = server.get("/api/mistakes") | {"mistakes": [], "errors": 0, "doubtful": 0}  # as of a better one
    page.route("**/api/mistakes", lambda route: route.fulfill(json=none))
    page.goto(f"{server.address}#mistakes")
    expect(page.locator("#mistakes-status")).to_have_text("None of the 359 test images is read wrong.")
    page.context.close()


def test_tabs_by_keyboard(open_page):
    page = open_page()
    page.locator("#tab-draw").focus()
    for key, name in (
        ("ArrowRight", "picture"),
        ("End", "mistakes"),
        ("ArrowRight", "draw"),
        ("ArrowLeft", "mistakes"),
    ):
        page.keyboard.press(key)
        expect(page.locator(f"#tab-{name}")).to_be_focused()
        expect(page.locator(f"#panel-{name}")).to_be_visible()
        expect(page.locator("[role=tabpanel]:visible")).to_have_count(1)


@pytest.mark.parametrize("view", ["", "#picture", "#mistakes"])
def test_a_phone_needs_no_sideways_scrolling(open_page, view):
    page = open_page(PHONE, view)
    if not view:
        for stroke in strokes.DIGITS[7]:
            page.touchscreen.tap(*place(page, stroke[0]))
        expect(page.locator("#sentence")).not_to_have_text("Nothing is drawn yet.")
        assert page.locator(".bars").bounding_box()["y"] < PHONE["viewport"]["height"] - 60  # in sight of the pad
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for button in page.locator("button, select, .drop").all():
        if button.is_visible() and button.is_enabled():
            box = button.bounding_box()
            assert box["height"] >= 24 and box["width"] >= 24  # WCAG 2.2, 2.5.8


CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
    const x = c[i] / 255;
    return sum + weight * (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  }, 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll("body *")]
    .filter((e) => e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
    .filter((e) => e.id !== "pad-hint" && !e.disabled && !e.closest(":disabled"))
    .map((e) => {
      const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 80)];
    });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(open_page, scheme):
    page = open_page(DESKTOP | {"color_scheme": scheme})
    draw(page, 3)
    expect(page.locator("#layers figure")).to_have_count(3)
    measured = page.evaluate(CONTRAST)
    assert len(measured) > 30
    assert min(measured)[0] >= 4.5, min(measured)  # WCAG AA
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")


def test_digits_drawn_by_mouse_are_read(browser, mnist_run):
    """With MNIST's weights, at least nine of the ten."""
    with running(mnist_run) as server:
        page = browser.new_context(**DESKTOP).new_page()
        page.goto(server.address)
        right = 0
        for digit in range(10):
            draw(page, digit)
            page.wait_for_load_state("networkidle")
            page.wait_for_timeout(200)
            labels = page.locator(".bars button").evaluate_all("all => all.map(b => b.ariaLabel)")
            bars = shown_bars(page)
            assert len(labels) == 10
            right += int(bars.argmax()) == digit
            page.locator("#clear").click()
        page.context.close()
    assert right >= 9
