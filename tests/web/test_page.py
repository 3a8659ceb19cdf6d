"""The page in a real browser: what a person does, and what a person sees."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MODELS_FOLDER, ROOT, SHIPPED, QuintetServer, StartQuintet

from .browser import Browser

SEVEN = [(0.28, 0.24), (0.42, 0.24), (0.56, 0.24), (0.7, 0.25), (0.63, 0.44), (0.55, 0.6), (0.47, 0.82)]
CELLS = ROOT / "clients" / "web" / "assets" / "samples" / "cells.jpg"
CAT = CELLS.with_name("cat.jpg")

LEFT, RIGHT, UP, DOWN, DELETE, TAB = "\ue012", "\ue014", "\ue013", "\ue015", "\ue017", "\ue004"


def verdict(page: Browser, model: str) -> str:
    return page.text(f"[data-model={model}] [data-verdict] b")


def meta(page: Browser, model: str) -> str:
    return page.text(f"[data-model={model}] [data-meta]")


# ---- draw a digit ----


@pytest.mark.parametrize("touch", [False, True], ids=["mouse", "finger"])
def test_a_drawn_seven_is_a_seven(page: Browser, touch: bool) -> None:
    page.draw("#pad", SEVEN, touch=touch)
    page.wait(lambda: verdict(page, "digit") == "7", "the drawing is read as 7")
    assert "sure" in page.text("[data-model=digit] [data-verdict]")
    shares = page.run(
        "return [...document.querySelectorAll('#digit-bars li')]"
        ".map((bar) => Number(bar.style.getPropertyValue('--share')))"
    )
    assert len(shares) == 10
    assert shares.index(max(shares)) == 7
    page.wait(lambda: "batch" in meta(page, "digit") or "alone" in meta(page, "digit"), "the batch is told")
    assert "ms there and back" in meta(page, "digit")


def test_the_bars_move_while_the_hand_draws(page: Browser) -> None:
    page.run(
        "window.seen = new Set();"
        "new MutationObserver(() => seen.add(document.querySelector('#digit-bars').innerHTML))"
        ".observe(document.querySelector('#digit-bars'), {subtree: true, attributes: true});"
    )
    for end in range(2, len(SEVEN)):
        page.draw("#pad", SEVEN[end - 2 : end + 1])
    page.wait(lambda: page.run("return seen.size") > 3, "the bars move")


def test_what_was_drawn_can_be_undone_and_cleared(page: Browser) -> None:
    page.draw("#pad", SEVEN)
    page.wait(lambda: verdict(page, "digit") == "7", "the drawing is read as 7")
    page.draw("#pad", [(0.2, 0.9), (0.9, 0.9)])
    page.click("#pad-undo")
    page.wait(lambda: verdict(page, "digit") == "7", "the drawing is read as 7 again")
    page.click("#pad-clear")
    assert verdict(page, "digit") == "?"
    assert meta(page, "digit") == ""


def test_a_digit_can_be_drawn_by_keyboard(page: Browser) -> None:
    page.run("document.querySelector('#pad').focus()")
    page.press(UP * 2 + " " + DOWN * 16 + " ")
    page.wait(lambda: verdict(page, "digit") == "1", "the line is read as 1")
    page.press(DELETE)
    assert verdict(page, "digit") == "?"


# ---- the request, to copy ----


def recipe(page: Browser, model: str, tab: str) -> str:
    page.run(
        "const panel = document.querySelector(`[data-model=${arguments[0]}]`);"
        "panel.querySelector('details').open = true;"
        "panel.querySelector(`[data-tab=${arguments[1]}]`).click();",
        model,
        tab,
    )
    return page.text(f"[data-model={model}] [data-code]")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_request_that_is_shown_can_be_repeated(page: Browser, tmp_path: Path) -> None:
    page.draw("#pad", SEVEN)
    page.wait(lambda: verdict(page, "digit") == "7", "the drawing is read as 7")
    page.devtools("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.click("#pad-save")
    page.wait(lambda: (tmp_path / "drawing.png").exists(), "the drawing is saved")
    line = recipe(page, "digit", "curl")
    curl = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(curl.stdout)["predictions"][0]["label"] == "7", line
    code = recipe(page, "digit", "python")
    python = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert python.stdout.startswith("7 ("), code + python.stderr
    assert json.loads(recipe(page, "digit", "answer"))["model"] == "digit"


def test_the_tabs_can_be_walked_with_arrows(page: Browser) -> None:
    recipe(page, "digit", "curl")
    page.press(RIGHT)
    assert page.run("return document.activeElement.dataset.tab") == "python"
    page.press(LEFT * 2)
    assert page.run("return document.activeElement.dataset.tab") == "answer"


# ---- the other models ----


@pytest.mark.room("image")
def test_a_picture_is_named(page: Browser) -> None:
    page.drop("[data-model=image] [data-drop]", CAT, "image/jpeg")
    page.wait(lambda: verdict(page, "image") in CLASSES, "the picture has a name")
    assert page.count("#image-bars li") == 5


CLASSES = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"}


@pytest.mark.room("detection")
def test_cells_are_found_and_boxed(page: Browser) -> None:
    seen = "return document.querySelector('[data-model=detection] canvas').toDataURL()"
    page.drop("[data-model=detection] [data-drop]", CELLS, "image/jpeg")
    page.wait(lambda: verdict(page, "detection").isdecimal(), "cells are counted")
    assert int(verdict(page, "detection")) >= 8
    assert int(page.text("#counts li:first-child b")) >= 5
    few = page.run(seen)
    page.run(
        "const slider = document.querySelector('#min-confidence');"
        "slider.value = 0.95; slider.dispatchEvent(new Event('input'));"
    )
    page.wait(lambda: page.run(seen) != few, "surer boxes are fewer")


@pytest.mark.parametrize("model", ["image", "detection"])
def test_what_is_no_picture_is_told_kindly(page: Browser, model: str, tmp_path: Path) -> None:
    if model not in SHIPPED:
        pytest.skip("its room is not there yet")
    (tmp_path / "notes.txt").write_text("no picture")
    page.drop(f"[data-model={model}] [data-drop]", tmp_path / "notes.txt", "text/plain")
    said = f"[data-model={model}] [data-verdict]"
    page.wait(lambda: "notes.txt is not a picture" in page.text(said), "the file is named")


@pytest.mark.room("image")
def test_a_picture_can_be_chosen_as_a_file(page: Browser) -> None:
    page.type("[data-model=image] input[type=file]", str(CAT))
    page.wait(lambda: verdict(page, "image") in CLASSES, "the picture has a name")


@pytest.mark.room("sentiment")
def test_a_sentence_has_a_mood(page: Browser) -> None:
    page.type("#text", "A wonderful film; I loved every minute of it.")
    page.wait(lambda: verdict(page, "sentiment") == "positive", "the sentence is positive")
    page.type("#text", "A dull, awful waste of two hours.")
    page.wait(lambda: verdict(page, "sentiment") == "negative", "the sentence is negative")


@pytest.mark.room("generator")
def test_ten_digits_are_invented_and_can_be_read(page: Browser) -> None:
    page.wait(lambda: page.count("#grid img") == 10, "ten pictures are there")
    first = page.run("return document.querySelector('#grid img').src")
    page.click("#shuffle")
    page.wait(lambda: page.run("return document.querySelector('#grid img').src") != first, "others come")
    page.type("#digits", "314")
    page.click("#generator-form button.solid")
    page.wait(lambda: page.count("#grid img") == 3, "three pictures are there")
    page.click("#grid li:first-child button")
    page.wait(lambda: verdict(page, "digit") == "3", "the invented 3 is read as 3")


# ---- the service, seen from the page ----


def test_the_strip_counts_requests(page: Browser) -> None:
    page.draw("#pad", SEVEN)
    page.wait(lambda: page.text("#rate")[:1].isdigit() and page.text("#rate") != "0", "requests are counted")
    page.wait(lambda: page.text("#p95").endswith(" ms"), "their time is told")


@pytest.fixture(scope="module")
def digit_only(
    start_quintet: StartQuintet, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[QuintetServer]:
    """A service of our own with one model, behind a key."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(MODELS_FOLDER / "digit", folder / "digit")
    with start_quintet(workers=1, models=folder, api_keys=["open sesame"]) as quintet:
        yield quintet


def test_a_key_is_asked_for_and_a_stop_is_survived(browser: Browser, digit_only: QuintetServer) -> None:
    browser.look(1280, 900)
    browser.open(digit_only.http_url)
    browser.wait(lambda: "wants a key" in browser.text("#notice"), "a key is asked for")
    browser.type("#key", "open sesame")
    browser.click("#key-form button")
    browser.wait(lambda: browser.text("#notice") == "", "the notice goes")
    for model in ("image", "sentiment", "generator", "detection"):
        said = f"[data-model={model}] header"
        browser.wait(lambda said=said: "not loaded" in browser.text(said), f"{model} is called not loaded")
    assert "not loaded" not in browser.text("[data-model=digit] header")
    browser.draw("#pad", SEVEN)
    browser.wait(lambda: verdict(browser, "digit") == "7", "the drawing is read as 7")
    assert "YOUR-KEY" in recipe(browser, "digit", "curl")
    assert "open sesame" not in browser.run("return document.documentElement.outerHTML")

    digit_only.kill()
    browser.wait(lambda: "stopped answering" in browser.text("#notice"), "the stop is told")
    browser.draw("#pad", [(0.4, 0.5), (0.7, 0.5)])
    threading.Timer(0, digit_only.launch_again).start()
    browser.wait(lambda: "is back" in browser.text("#notice"), "the return is told", seconds=120)
    browser.wait(lambda: verdict(browser, "digit") == "7", "what was drawn meanwhile is read")
    browser.console()  # a browser itself writes down each connection that was refused


# ---- for everybody ----


def test_every_control_has_a_name(page: Browser) -> None:
    nameless = page.run(
        "return [...document.querySelectorAll('button, input, textarea, a, canvas, summary')]"
        ".filter((one) => !(one.textContent.trim() || one.labels?.length || one.ariaLabel"
        "  || one.hasAttribute('data-view')))"
        ".map((one) => one.outerHTML)"
    )
    assert nameless == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(page: Browser, scheme: str) -> None:
    page.look(1280, 900, scheme=scheme)
    page.draw("#pad", SEVEN)
    page.wait(lambda: verdict(page, "digit") == "7", "the drawing is read as 7")
    recipe(page, "digit", "curl")
    faint = page.run(CONTRAST)
    assert faint == []


CONTRAST = """
// WCAG 2.2, success criterion 1.4.3: 4.5 to 1, and 3 to 1 for large text.
const sheet = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
const rgba = (colour) => {
  sheet.clearRect(0, 0, 1, 1); sheet.fillStyle = colour; sheet.fillRect(0, 0, 1, 1);
  return [...sheet.getImageData(0, 0, 1, 1).data];
};
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, place) => sum + v * [0.2126, 0.7152, 0.0722][place], 0);
const ground = (one) => {
  for (let up = one; up; up = up.parentElement) {
    const colour = rgba(getComputedStyle(up).backgroundColor);
    if (colour[3] === 255) return colour;
  }
};
const faint = [];
for (const one of document.querySelectorAll('body *')) {
  const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  const seen = one.checkVisibility({visibilityProperty: true, opacityProperty: true});
  if (!own || !seen || one.closest('[inert]')) continue;
  const style = getComputedStyle(one);
  const [ink, paper] = [light(rgba(style.color)), light(ground(one))];
  const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  const size = parseFloat(style.fontSize);
  const needed = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
  if (ratio < needed) faint.push(`${one.tagName} ${one.innerText}: ${ratio.toFixed(2)}`);
}
return faint;
"""


@pytest.mark.parametrize(
    ("width", "phone"), [(360, True), (390, True), (820, False), (1280, False), (1900, False)]
)
def test_nothing_has_to_be_scrolled_sideways(page: Browser, width: int, phone: bool) -> None:
    page.look(width, 800, phone=phone)
    assert page.run("return document.documentElement.scrollWidth") <= width


def test_who_wants_no_motion_gets_none(page: Browser) -> None:
    page.devtools(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}]
    )
    page.draw("#pad", SEVEN)
    page.wait(lambda: verdict(page, "digit") == "7", "the drawing is read as 7")
    assert page.run("return document.getAnimations().length") == 0


def test_every_control_can_be_reached_by_keyboard(page: Browser) -> None:
    page.run("document.activeElement.blur(); scrollTo(0, 0)")
    reached = set()
    for _ in range(60):
        page.press(TAB)
        reached.add(page.run("return document.activeElement.id || document.activeElement.innerText"))
    wanted = {"pad", "pad-undo", "pad-clear", "The request"}
    if "sentiment" in SHIPPED:
        wanted.add("text")
    if "generator" in SHIPPED:
        wanted |= {"digits", "seed", "shuffle"}
    assert wanted <= reached
