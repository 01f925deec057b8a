"""What a figure shows, read from its pixels."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from captionfix.errors import CaptionError
from captionfix.explanation import Explanation
from captionfix.render.figure import DRAWN, blend, densities, facts, figure, overlay, png, scale

LONG = (
    "a dog beside the ball in front of the wall and a second dog on the grass under a tree by the old water tower now"
)


def panels(drawn: Figure) -> list[np.ndarray]:
    """The pixels handed to matplotlib, the photograph first."""
    return [np.asarray(axes.images[0].get_array()) for axes in drawn.axes if axes.images]


def colourfulness(pixels: np.ndarray) -> np.ndarray:
    """The test photograph is grey: whatever has a hue is the map."""
    values = pixels.astype(int)
    return values.max(-1) - values.min(-1)


def test_blend_shows_the_photograph_where_there_is_no_evidence() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    plain = blend(photo, np.zeros((40, 50)))
    grey = photo @ np.array([0.299, 0.587, 0.114])
    assert np.corrcoef(plain.mean(-1).ravel(), grey.ravel())[0, 1] > 0.95


def test_blend_is_the_colour_maps_top_at_the_maximum_and_still_shows_edges() -> None:
    photo = np.zeros((2, 2, 3), dtype=np.uint8)
    photo[:, 1] = 255
    full = blend(photo, np.ones((2, 2)), "viridis").astype(float)
    top = np.array(colormaps["viridis"](1.0)[:3]) * 255
    assert np.abs(full.mean(axis=(0, 1)) - top).max() < 45
    assert (full[:, 1] - full[:, 0]).min() > 20  # black and white beneath still differ
    dimmed = blend(photo, np.ones((2, 2)), "viridis", dim=True)
    assert (dimmed >= full.astype(np.uint8)).all()
    assert dimmed.min() > 100


def test_overlay_is_brightest_where_the_heatmap_is(explanation: Explanation) -> None:
    dog = explanation["dog"]
    shown = np.asarray(overlay(dog))
    assert shown.shape == (240, 320, 3)
    assert isinstance(dog.overlay(), Image.Image)
    heatmap = dog.heatmap(sigma=DRAWN)
    hue = colourfulness(shown)
    assert (hue[heatmap == 0] <= 1).all()  # grey stays grey
    top = np.array(colormaps["plasma"](1.0)[:3]) * 255
    distance = np.abs(shown.astype(float) - top).sum(-1)
    row, column = np.unravel_index(distance.argmin(), distance.shape)
    assert heatmap[row, column] > 0.9


def test_marks_are_drawn_where_asked(explanation: Explanation) -> None:
    dog = explanation["dog"]
    plain = np.asarray(overlay(dog)).astype(int)
    boxed = np.asarray(overlay(dog, box=True)).astype(int)
    changed = np.argwhere(np.abs(boxed - plain).sum(-1) > 0)
    box = dog.box()
    assert box is not None
    found = (changed[:, 1].min(), changed[:, 0].min(), changed[:, 1].max() + 1, changed[:, 0].max() + 1)
    assert found == pytest.approx(box, abs=2)
    dotted = np.asarray(overlay(dog, fixations=True)).astype(int)
    assert 100 < (np.abs(dotted - plain).sum(-1) > 0).sum() < 20_000


def test_one_scale_for_all_words(explanation: Explanation) -> None:
    values = densities(explanation)
    used = scale(explanation)
    drawn = panels(figure(explanation))
    photo = np.asarray(explanation.image)
    assert len(drawn) == 1 + len(explanation)
    np.testing.assert_array_equal(drawn[0], photo)
    from captionfix import maps

    for word, panel in zip(explanation, drawn[1:], strict=True):
        dim = word.text in ("a", "the")
        shown = maps.resize(used(values[word.index]), explanation.image.size, explanation.window)
        np.testing.assert_array_equal(panel, blend(photo, shown, dim=dim))
    strength = {word.text: colourfulness(panel).max() for word, panel in zip(explanation, drawn[1:], strict=True)}
    assert strength["dog"] > strength["beside"] > 0
    common = np.asarray(overlay(explanation["beside"], common_scale=True))
    assert colourfulness(common).max() < colourfulness(np.asarray(overlay(explanation["beside"]))).max()


def test_scale_is_not_set_by_one_spot(invent: Callable[..., Explanation]) -> None:
    assert not scale(invent("dog ball dog")).clipped
    crowd = invent("dog beside above behind around")
    assert scale(crowd).clipped
    assert scale(crowd).top < densities(crowd).max()
    assert scale(crowd)(densities(crowd)).max() == 1


@pytest.mark.parametrize("size", [(320, 240), (120, 500), (900, 200), (1, 60), (1500, 1000)])
@pytest.mark.parametrize("count", [3, 11, 25])
def test_texts_neither_overlap_nor_leave_the_figure(
    invent: Callable[..., Explanation], size: tuple[int, int], count: int
) -> None:
    drawn = figure(invent(" ".join(LONG.split()[:count]), size=size))
    drawn.canvas.draw()
    texts = [text for axes in drawn.axes for text in axes.texts if text.get_text()] + drawn.texts
    boxes = [text.get_window_extent() for text in texts]
    pictures = [axes.get_window_extent() for axes in drawn.axes]
    inside = drawn.bbox
    for place, box in enumerate(boxes):
        assert inside.x0 - 1 <= box.x0 <= box.x1 <= inside.x1 + 1
        assert inside.y0 - 1 <= box.y0 <= box.y1 <= inside.y1 + 1
        assert not any(box.shrunk(0.98, 0.9).overlaps(other) for other in boxes[place + 1 :])
        assert not any(box.shrunk(0.9, 0.8).overlaps(other) for other in pictures)
    assert min(text.get_fontsize() for text in texts) > 4


def test_chosen_words_and_their_facts(explanation: Explanation) -> None:
    drawn = figure(explanation, ["ball", 1], boxes=True, fixations=True, title=False)
    labels = [text.get_text() for axes in drawn.axes for text in axes.texts]
    assert labels == ["image", "ball", "p 0.70  image 70 %", "dog, not cat", "p 0.55  image 70 %"]
    assert facts(explanation["beside"]) == "p 0.60  effect +1.2"
    with pytest.raises(CaptionError, match="no word 'cat'"):
        figure(explanation, ["cat"])


def test_words_that_look_like_formulas(invent: Callable[..., Explanation]) -> None:
    drawn = figure(invent("dog costs $5$ or $x^ ball"))
    drawn.savefig(io.BytesIO(), format="png")
    assert "$x^" in [text.get_text() for axes in drawn.axes for text in axes.texts]


@pytest.mark.parametrize("kind", ["pdf", "svg", "png"])
def test_writes_every_format(explanation: Explanation, kind: str) -> None:
    buffer = io.BytesIO()
    figure(explanation, boxes=True).savefig(buffer, format=kind)
    assert len(buffer.getvalue()) > 5000


def test_png_shows_the_photograph_and_the_colours(explanation: Explanation) -> None:
    image = Image.open(io.BytesIO(png(explanation, dpi=100)))
    pixels = np.asarray(image.convert("RGB"))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    top = np.array(colormaps["plasma"](1.0)[:3]) * 255
    assert (np.abs(pixels - top).max(-1) < 12).any()  # the colour bar's end
