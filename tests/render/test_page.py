"""The page to explore an explanation, as a browser shows it."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from captionfix.errors import OutputError
from captionfix.explanation import Explanation, Word
from captionfix.maps import resize
from captionfix.render import figure
from captionfix.render.page import colours, credits, page, small_maps, where

MARKUP = "</script><script>document.title='run'</script> <img src=x onerror=\"document.title='run'\"> dog"
MOST = 1_500_000


class Elements(HTMLParser):
    """All start tags of a document."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def data(document: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', document, re.S)
    assert found is not None
    result: dict[str, Any] = json.loads(found[1])
    return result


# The file


def test_one_file_that_needs_nothing_beside_it(explanation: Explanation, tmp_path: Path) -> None:
    path = explanation.to_html(tmp_path / "new" / "page.html")
    document = path.read_text(encoding="utf-8")
    assert path == tmp_path / "new" / "page.html"
    assert "://" not in document
    for tag, attributes in Elements(document).found:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        assert tag not in ("link", "iframe", "object")
        if "src" in attributes:
            assert str(attributes["src"]).startswith("data:image/")
    with pytest.raises(OutputError, match="can't write"):
        explanation.to_html(tmp_path)


def test_a_photograph_and_twelve_words_stay_small(invent: Callable[..., Explanation]) -> None:
    made = invent("a dog beside the ball and a dog beside the red ball", size=(640, 480))
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)  # nothing compresses worse
    big = replace(made, image=Image.fromarray(noise), grid=(384, 384))
    assert len(big) == 12
    assert len(page(big).encode()) < MOST


def test_a_large_photograph_is_embedded_smaller(invent: Callable[..., Explanation]) -> None:
    document = page(invent(size=(3000, 2000)))
    (source,) = (a["src"] for tag, a in Elements(document).found if tag == "img")
    photo = Image.open(io.BytesIO(base64.b64decode(str(source).partition(",")[2])))
    assert photo.size == (1280, 853)
    assert data(document)["size"] == [3000, 2000]


def test_numbers_of_the_words(explanation: Explanation) -> None:
    document = page(explanation)
    held = data(document)
    dog = held["words"][1]
    assert (dog["text"], dog["p"], dog["share"], dog["contrast"]) == ("dog", 0.55, 0.7, "cat")
    assert held["words"][2]["share"] is None
    assert dog["alternatives"] == [["dog", 0.55], ["cat", 0.2], ["<end>", 0.1]]
    assert dog["credits"] == [0.05]
    x0, y0, x1, y1 = explanation["dog"].box(False) or (0, 0, 0, 0)
    assert dog["box"]["raw"] == pytest.approx([x0 / 320, y0 / 240, x1 / 320, y1 / 240], abs=1e-4)
    points = np.array(dog["points"]).reshape(-1, 3)
    assert np.allclose(points[:, :2] / 1e4 * (320, 240), explanation["dog"].fixations[:, :2], atol=0.05)
    assert held["partial"] is False
    columns, rows = held["maps"]["grid"]
    raw = np.frombuffer(base64.b64decode(held["maps"]["raw"]), np.uint8).reshape(5, rows, columns)
    scale = figure.scale(explanation, False)
    assert np.abs(raw / 255 - scale(figure.densities(explanation, False))).max() < 0.003


def test_words_without_evidence_and_captions_without_words(invent: Callable[..., Explanation]) -> None:
    made = invent("a dog")
    bare = replace(made, words=tuple(replace(word, fixations=np.zeros((0, 3), np.float32)) for word in made.words))
    held = data(page(bare))
    assert held["words"][0]["box"] == {"specific": None, "raw": None}
    assert held["words"][0]["where"]["raw"] == "no evidence"
    assert data(page(replace(made, words=(), caption="")))["words"] == []


def test_credits_go_by_place() -> None:
    none = np.zeros((0, 3), np.float32)
    word = Word("b", 3, 0, 1.0, none, none, language=(("<start>", 0.5), ("a", 0.2), ("b", float("nan")), ("a", 0.1)))
    assert credits(word) == [0.2, 0.0, 0.1]
    assert credits(replace(word, language=())) == []


def test_small_maps_are_means() -> None:
    values = np.random.default_rng(0).random((2, 64, 96)).astype(np.float32)
    small = small_maps(values, 48)
    assert small.shape == (2, 32, 48)
    blocks = values.reshape(2, 32, 2, 48, 2).mean(axis=(2, 4))
    # the triangle reaches over the block's edges, so a cell is near its block's mean and the whole's mean is kept
    assert abs(small.mean() / 255 - values.mean()) < 0.01
    assert np.corrcoef(small.ravel(), blocks.ravel())[0, 1] > 0.85


def test_a_map_in_words() -> None:
    assert where((0, 0, 10, 10), (5, 5), (100, 100)) == "strongest at the upper left; its box covers 1 % of the image"
    assert where((0, 0, 100, 50), (50, 50), (100, 100)).startswith("strongest at the centre; its box covers 50 %")
    assert where(None, None, (100, 100)) == "no evidence"


def test_drawing_needs_no_torch(explanation: Explanation, tmp_path: Path) -> None:
    explanation.save(tmp_path / "saved")
    code = (
        "import sys, captionfix; captionfix.read(sys.argv[1]).to_html(sys.argv[2]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "saved", tmp_path / "page.html"], check=True)
    assert (tmp_path / "page.html").stat().st_size > 10_000


# The page in a browser


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    contexts = []

    def start(explanation: Explanation, where: str = "", **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1000, "height": 720}, "offline": True, **options})
        contexts.append(context)
        shown = context.new_page()
        shown.set_default_timeout(120_000)  # only a machine at its limit needs it
        shown.trouble = []
        shown.on("pageerror", lambda error: shown.trouble.append(str(error)))
        shown.on("console", lambda message: shown.trouble.append(message.text))
        path = explanation.to_html(tmp_path / "page.html")
        shown.goto(path.as_uri() + where)
        return shown

    yield start
    for context in contexts:
        for shown in context.pages:
            assert shown.trouble == []
        context.close()


def pixels(shown: Any, what: str = "#stage") -> NDArray[np.float64]:
    return np.asarray(Image.open(io.BytesIO(shown.locator(what).screenshot())).convert("RGB")).astype(np.float64)


def at(picture: NDArray[np.float64], x: float, y: float) -> NDArray[np.float64]:
    """The mean colour around a place given in fractions."""
    row, column = int(y * picture.shape[0]), int(x * picture.shape[1])
    mean: NDArray[np.float64] = picture[row - 2 : row + 3, column - 2 : column + 3].mean(axis=(0, 1))
    return mean


def test_pointing_at_a_word_shows_its_map(opened: Callable[..., Any], explanation: Explanation) -> None:
    shown = opened(explanation)
    before = pixels(shown)
    grey = at(before, 0.25, 0.5)
    assert np.ptp(grey) < 2  # the photograph is a grey ramp, 40 at the left and 215 at the right
    assert abs(grey[0] - (40 + 0.25 * 175)) < 4
    shown.locator("#word-1").hover()
    after = pixels(shown)
    # what the figures draw at that place, by their own way
    scale = figure.scale(explanation)
    size = (after.shape[1], after.shape[0])
    values = resize(scale(figure.densities(explanation))[1], size, (0.0, 0.0, *size))
    drawn = figure.blend(np.asarray(explanation.image.resize(size)), values).astype(np.float64)
    for x, y in ((0.25, 0.5), (0.2, 0.45), (0.75, 0.25), (0.9, 0.9)):
        assert np.abs(at(after, x, y) - at(drawn, x, y)).max() < 10, (x, y)
    assert np.ptp(at(after, 0.25, 0.5)) > 60
    assert "dog" in str(shown.locator("#stage .map").get_attribute("aria-label"))
    detail = shown.locator("#detail").inner_text()
    for part in ("dog", "not cat", "0.55", "70 %", "+1.25", "<end>"):
        assert part in detail
    # the same word's map at the other word's place and the other way round
    shown.locator("#word-4").hover()
    other = pixels(shown)
    assert np.ptp(at(other, 0.75, 0.25)) > 60
    assert np.ptp(at(other, 0.25, 0.5)) < 30


def test_arrow_keys_enter_and_escape(opened: Callable[..., Any], explanation: Explanation) -> None:
    shown = opened(explanation)
    shown.locator("#word-0").focus()
    names = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowRight", "Home"):
        shown.keyboard.press(key)
        names.append(shown.locator("#detail h2").evaluate("e => e.firstChild.textContent"))
    assert names == ["dog", "beside", "dog", "ball", "ball", "a"]
    assert shown.locator(".word[tabindex='0']").count() == 1  # one stop of the tab key
    shown.keyboard.press("ArrowRight")
    assert "dog" in shown.locator("#status").inner_text()
    shown.keyboard.press("Enter")
    assert shown.locator("#word-1").get_attribute("aria-pressed") == "true"
    shown.keyboard.press("Escape")
    assert np.ptp(at(pixels(shown), 0.25, 0.5)) < 2
    assert shown.locator(".pin").count() == 1


def test_pins_up_to_four(opened: Callable[..., Any], explanation: Explanation) -> None:
    shown = opened(explanation)
    for place in (1, 4, 0, 2):
        shown.locator(f"#word-{place}").click()
    panels = shown.locator(".pin")
    assert panels.locator("h3").all_inner_texts() == ["dog, not cat", "ball", "a", "beside"]
    boxes = [panels.nth(i).bounding_box() for i in range(4)]
    assert len({round(box["y"]) for box in boxes}) == 1  # side by side
    assert np.ptp(at(pixels(shown, ".pin:nth-child(1) .view"), 0.25, 0.5)) > 60
    assert np.ptp(at(pixels(shown, ".pin:nth-child(2) .view"), 0.75, 0.25)) > 60
    assert np.ptp(at(pixels(shown, ".pin:nth-child(2) .view"), 0.25, 0.5)) < 30
    shown.locator("#word-3").click()  # the first makes room
    assert panels.locator("h3").all_inner_texts() == ["ball", "a", "beside", "the"]
    shown.locator("#word-4").click()
    assert panels.locator("h3").all_inner_texts() == ["a", "beside", "the"]
    shown.get_by_role("button", name="Unpin a").click()
    assert panels.locator("h3").all_inner_texts() == ["beside", "the"]


def test_toggles_change_what_is_drawn(opened: Callable[..., Any], explanation: Explanation) -> None:
    shown = opened(explanation)
    shown.locator("#word-1").hover()
    plain = pixels(shown)
    for name in ("box", "points"):
        shown.locator(f"[name={name}]").check()
        marked = pixels(shown)
        changed = np.argwhere(np.abs(marked - plain).max(axis=2) > 60)
        x0, y0, x1, y1 = explanation["dog"].box() or (0, 0, 0, 0)
        edges = np.array([y0 / 240, x0 / 320, y1 / 240, x1 / 320]) * np.tile(plain.shape[:2], 2)
        if name == "box":  # on its edges and nowhere else
            assert np.abs(changed.min(axis=0) - edges[:2]).max() < 3
            assert np.abs(changed.max(axis=0) + 1 - edges[2:]).max() < 3
        else:  # 200 points around the dog's place, some outside the box
            assert (changed.mean(axis=0) / plain.shape[:2]) == pytest.approx([0.5, 0.25], abs=0.03)
        shown.locator(f"[name={name}]").uncheck()
        assert np.array_equal(pixels(shown), plain)
    shown.locator("[name=kind][value=raw]").check()
    assert shown.locator("#scale").get_attribute("aria-label").startswith("Colours: evidence, times even spread")
    raw = pixels(shown)
    # a word's whole map has what all words share too; both by the figures' own scale
    assert np.abs(raw - plain).max() > 10
    shown.locator("[name=kind][value=specific]").check()
    assert np.array_equal(pixels(shown), plain)
    shown.locator("[name=opacity]").fill("0")
    assert np.ptp(at(pixels(shown), 0.25, 0.5)) < 2
    assert shown.locator("[name=strength]").inner_text() == "0 %"


def test_underlines_credits_and_legend(opened: Callable[..., Any], explanation: Explanation) -> None:
    shown = opened(explanation)
    length = (
        "e => parseFloat(getComputedStyle(e.querySelector('.rule'), '::before').width) "
        "/ e.querySelector('.rule').offsetWidth"
    )
    assert shown.locator("#word-1").evaluate(length) == pytest.approx(0.7, abs=0.02)
    assert shown.locator("#word-2").evaluate(length) == 0  # not known
    shown.locator("[name=underline][value=p]").check()
    assert shown.locator("#word-2").evaluate(length) == pytest.approx(0.6, abs=0.02)
    shown.locator("#word-4").hover()
    assert shown.locator(".arcs path").count() == 4
    assert [shown.locator(f"#word-{place} .under").inner_text() for place in range(5)] == ["5 %"] * 4 + [""]
    shown.locator("[name=arcs]").uncheck()
    assert shown.locator(".arcs path").count() == 0
    scale = figure.scale(explanation)
    ticks = shown.locator("#scale .ticks span").all_inner_texts()
    assert float(ticks[0]) == 0
    assert 0.3 * scale.top < float(ticks[-1]) <= scale.top
    bar = pixels(shown, "#scale .bar")
    ends = bar[4, 3], bar[4, -4]
    for end, place in zip(ends, (0.01, 0.99), strict=True):
        assert np.abs(end - 255 * np.array(colormaps[figure.COLOURS](place)[:3])).max() < 12
    assert colours().shape == (256, 3)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_reads_it(opened: Callable[..., Any], invent: Callable[..., Explanation], scheme: str) -> None:
    made = invent("a dog beside the ball and another extraordinarily long caption beneath the photograph of a dog")
    shown = opened(
        made, viewport={"width": 360, "height": 700}, color_scheme=scheme, has_touch=True, is_mobile=True,
        device_scale_factor=2,
    )  # fmt: skip
    assert shown.evaluate("document.documentElement.scrollWidth") <= 360  # nothing to be moved sideways
    shown.locator("#word-1").tap()
    assert shown.locator("#detail h2").inner_text().startswith("dog")
    assert shown.locator(".pin").count() == 0
    assert np.ptp(at(pixels(shown), 0.25, 0.5)) > 60
    shown.locator("#word-1").tap()  # once more pins
    assert shown.locator(".pin h3").all_inner_texts() == ["dog, not cat"]
    size = shown.locator("#word-0").bounding_box()
    assert size["height"] >= 40
    paper = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = sum(map(int, re.findall(r"\d+", paper)[:3])) < 150
    assert dark is (scheme == "dark")
    shown.locator("#theme").click()
    assert (
        sum(map(int, re.findall(r"\d+", shown.evaluate("getComputedStyle(document.body).backgroundColor"))[:3])) < 150
    ) is not dark


def test_markup_in_the_caption_is_text(opened: Callable[..., Any], invent: Callable[..., Explanation]) -> None:
    made = invent(MARKUP)
    last = len(made) - 1
    words = [replace(word, contrast="<b>cat</b>", alternatives=(("<i>x</i>", 0.3),)) for word in made.words]
    shown = opened(replace(made, words=tuple(words)))
    assert shown.title() == MARKUP
    for place in range(len(made)):
        shown.locator(f"#word-{place}").click()
    assert shown.locator(".word .text").all_inner_texts() == MARKUP.split()
    assert shown.title() == MARKUP
    assert shown.locator("main img[src=x], main b:not(.meta b), main i:not(.stack i, .long i)").count() == 0
    assert "<b>cat</b>" in shown.locator("#detail h2").inner_text()
    assert "<i>x</i>" in shown.locator("#detail .bars").inner_text()
    assert shown.locator(f"#word-{last}").inner_text().strip() == "dog"


def test_an_address_opens_at_a_word(opened: Callable[..., Any], explanation: Explanation) -> None:
    assert opened(explanation, "#word-4").locator("#detail h2").inner_text() == "ball"


def test_what_the_cnn_does_not_see_is_marked(opened: Callable[..., Any], invent: Callable[..., Explanation]) -> None:
    shown = opened(invent(window=(40.0, 0.0, 280.0, 240.0)))
    shown.locator("#word-1").hover()
    assert "dashed" in shown.locator("#scale figcaption").inner_text()
    column = pixels(shown)[:, :, 0]
    left = column[:, int(column.shape[1] * 40 / 320) + 1]
    assert left.max() > 200  # dashes, white on black
    assert left.min() < 60


def test_the_notebook_frames_the_page(browser: Any, explanation: Explanation, tmp_path: Path) -> None:
    path = tmp_path / "notebook.html"
    path.write_text(f"<meta charset=utf-8><body>{explanation._repr_html_()}", encoding="utf-8")
    shown = browser.new_page(viewport={"width": 1000, "height": 900})
    shown.set_default_timeout(120_000)
    shown.goto(path.as_uri())
    frame = shown.frame_locator("iframe")
    frame.locator("#word-1").hover()
    assert frame.locator("#detail h2").inner_text().startswith("dog")
    assert shown.locator("figure img").evaluate("e => e.naturalWidth") > 600  # what is seen where frames are dropped
    shown.close()
