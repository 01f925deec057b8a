from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from captionfix.explanation import Explanation
from captionfix.render import figure
from captionfix.render.contact import contact_sheet, fitted, strip, telling, thumbnail


def test_a_strip_each(explanation: Explanation, invent: Callable[..., Explanation]) -> None:
    tall = invent("a ball", size=(100, 400))
    sheet = contact_sheet([explanation, tall], ["one.jpg", "two.jpg"], words=3, tile=120)
    first, second = (strip(one, name, words=3, tile=120) for one, name in ((explanation, "one.jpg"), (tall, "two.jpg")))
    assert sheet.size == (28 + max(first.width, second.width), 28 + first.height + second.height)
    beside = contact_sheet([explanation, tall], words=3, tile=120, columns=2)
    assert beside.width > 2 * max(first.width, second.width)
    assert beside.height == 28 + max(first.height, second.height)
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])
    with pytest.raises(ValueError, match="1 names for 2"):
        contact_sheet([explanation, tall], ["one"])


def test_the_tiles_of_a_strip(explanation: Explanation) -> None:
    picture = np.asarray(strip(explanation, words=4, tile=120)).astype(int)
    width = 160  # of a tile: the photograph is 4 to 3
    assert picture.shape[1] == 4 * width + 3 * 8  # a and the name nothing: there are three words to show
    photo, *words = (picture[24:144, place * (width + 8) : place * (width + 8) + width] for place in range(4))
    assert np.ptp(photo, axis=2).max() < 2  # the grey ramp, without a map
    dog, _, ball = words
    colour = [np.ptp(tile[60, 40]) for tile in (dog, ball)], [np.ptp(tile[30, 120]) for tile in (dog, ball)]
    assert colour[0][0] > 60 > 30 > colour[0][1]
    assert colour[1][1] > 60 > 30 > colour[1][0]


def test_a_strip_is_no_wider_than_what_it_shows(invent: Callable[..., Explanation]) -> None:
    short, full = (strip(invent("a dog", size=(120, 120)), words=count, tile=120) for count in (1, 5))
    assert short.size == full.size == (120 + 8 + 120, 120 + 70)
    # a long caption is not cut for want of tiles: it has the room of a full row
    long = invent("of the dog and " + "the of a " * 12, size=(120, 120))
    assert strip(long, words=5, tile=120).width == 6 * 120 + 5 * 8
    dark = np.asarray(strip(long, words=5, tile=120).convert("L"))[:22] < 128
    assert np.flatnonzero(dark.any(axis=0)).max() > 6 * 120


def test_telling_words(invent: Callable[..., Explanation]) -> None:
    made = invent("the red dog and the red ball run")
    effects = dict(zip(("red", "dog", "ball", "run"), (0.1, 2.0, float("nan"), 3.0), strict=True))
    words = [replace(word, image_effect=effects.get(word.text, 9.0)) for word in made.words]
    whole = replace(made, words=tuple(words))
    assert [word.text for word in telling(whole, 9)] == ["red", "dog", "ball", "run"]
    assert [word.text for word in telling(whole, 2)] == ["dog", "run"]
    assert [word.text for word in telling(invent("of the"), 2)] == ["of", "the"]


def test_a_thumbnail_is_the_overlay_made_small(explanation: Explanation) -> None:
    word = explanation["dog"]
    size = fitted(explanation.image.size, (100, 100))
    assert size == (100, 75)
    small = np.asarray(thumbnail(word, size, figure.scale(explanation))).astype(float)
    large = np.asarray(word.overlay(common_scale=True).resize(size, Image.Resampling.BOX)).astype(float)
    assert np.abs(small - large).mean() < 2
    boxed = np.asarray(thumbnail(word, size, figure.scale(explanation), box=True))
    changed = np.argwhere((boxed != small).any(axis=2))
    x0, y0, x1, y1 = word.box() or (0, 0, 0, 0)
    assert changed.min(axis=0) == pytest.approx([y0 / 3.2, x0 / 3.2], abs=1)
    assert changed.max(axis=0) + 1 == pytest.approx([y1 / 3.2, x1 / 3.2], abs=1)
