"""The page to explore an explanation, as a browser shows it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from captionfix.explanation import Explanation
from captionfix.maps import resize
from captionfix.render import figure
from captionfix.render.page import colours

MARKUP = "</script><script>document.title='run'</script> <img src=x onerror=\"document.title='run'\"> dog"


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


def classes(made: Explanation, *names: str) -> Explanation:
    """As `captionfix.explain_classes` makes them: no earlier words, no effect, a list for a caption."""
    each = [
        replace(word, text=name, language=(), image_effect=float("nan"), contrast=None, image_share=0.7)
        for word, name in zip(made.words[1:], names, strict=False)
    ]
    words = tuple(replace(word, index=place) for place, word in enumerate(each))
    return replace(made, words=words, caption=", ".join(names))


def test_classes_in_place_of_words(opened: Callable[..., Any], explanation: Explanation) -> None:
    shown = opened(classes(explanation, "Labrador retriever", "tabby"))
    assert shown.locator(".word .text").all_inner_texts() == ["Labrador retriever", "tabby"]
    first, second = (shown.locator(f"#word-{place}").bounding_box() for place in (0, 1))
    assert second["x"] - first["x"] - first["width"] >= 12  # a name of two words is seen to be one
    # what classes have nothing of is not offered
    assert [shown.locator(f"#{name}").is_visible() for name in ("kinds", "effects", "credits")] == [True, False, False]
    shown.locator("#word-0").hover()
    assert np.ptp(at(pixels(shown), 0.25, 0.5)) > 60
    keys = shown.locator("#detail .keys li").all_inner_texts()
    assert keys == ["image 70 %", "biases 10 %"]
    detail = shown.locator("#detail").inner_text()
    assert "Most probable" in detail
    assert not [part for part in ("effect", "at this place") if part in detail]


def test_a_single_class_shows_all_of_its_evidence(opened: Callable[..., Any], explanation: Explanation) -> None:
    shown = opened(classes(explanation, "Labrador retriever"))  # beyond the mean over one there is nothing
    shown.locator("#word-0").hover()
    assert np.ptp(at(pixels(shown), 0.25, 0.5)) > 60
    assert not shown.locator("#kinds").is_visible()
    assert "all words" not in shown.locator("#scale figcaption").inner_text()


def test_small_credits_are_one_part(opened: Callable[..., Any], explanation: Explanation) -> None:
    many = (*((f"w{place}", 0.004) for place in range(20)), ("dog", 0.12))
    words = [replace(word, language=many) if word.text == "ball" else word for word in explanation.words]
    shown = opened(replace(explanation, words=tuple(words)))
    shown.locator("#word-4").hover()
    keys = shown.locator("#detail .keys li").all_inner_texts()
    assert keys == ["image 70 %", "dog 12 %", "other words 8 %", "biases and earlier states 10 %"]
    # no gaps: the bar is of the parts' colours from end to end
    widths = shown.locator("#detail .stack i").evaluate_all("all => all.map((e) => e.getBoundingClientRect().width)")
    whole = shown.locator("#detail .stack").bounding_box()["width"]
    assert np.array(widths) / whole == pytest.approx([0.7, 0.12, 0.08, 0.1], abs=0.01)


def test_a_contrast_is_seen_in_the_caption(opened: Callable[..., Any], explanation: Explanation) -> None:
    shown = opened(explanation)
    said = "e => getComputedStyle(e, '::after').content"
    assert "not " in shown.locator("#word-1").evaluate(said)
    assert shown.locator("#word-1").get_attribute("data-not") == "cat"
    assert shown.locator("#word-2").evaluate(said) == "none"


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
    # the rings around pinned neighbours do not touch, nor those around words and their underlines
    places = [shown.locator(f"#word-{k}").evaluate(
        "e => ['.text', '.rule'].flatMap((name) => { const box = e.querySelector(name).getBoundingClientRect();"
        " return [box.left, box.right, box.top, box.bottom]; })") for k in (0, 1, 2)]  # fmt: skip
    ring = 3
    assert all(right[0] - left[1] >= 2 * ring for left, right in pairwise(places))
    assert all(place[6] - place[3] >= ring for place in places)
    assert np.ptp(at(pixels(shown, ".pin:nth-child(1) .view"), 0.25, 0.5)) > 60
    assert np.ptp(at(pixels(shown, ".pin:nth-child(2) .view"), 0.75, 0.25)) > 60
    assert np.ptp(at(pixels(shown, ".pin:nth-child(2) .view"), 0.25, 0.5)) < 30
    shown.locator("#word-3").click()  # the first makes room
    assert panels.locator("h3").all_inner_texts() == ["ball", "a", "beside", "the"]
    shown.locator("#word-4").click()
    assert panels.locator("h3").all_inner_texts() == ["a", "beside", "the"]
    shown.get_by_role("button", name="Unpin a").click()
    assert panels.locator("h3").all_inner_texts() == ["beside", "the"]
    assert panels.nth(0).bounding_box()["width"] > 1.5 * boxes[0]["width"]  # two have more room than four


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
    assert (
        shown.locator("#scale")
        .get_attribute("aria-label")
        .startswith("Colours: evidence, in multiples of an even spread")
    )
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
    legend, panel = shown.locator("#scale").bounding_box(), shown.locator(".pin").bounding_box()
    assert legend["y"] < panel["y"]  # the colours are explained before anything else is read
    assert shown.locator(".finger").is_visible()
    assert not shown.locator(".mouse").is_visible()
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
