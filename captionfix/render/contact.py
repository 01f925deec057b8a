"""A contact sheet: many explained images in one picture, a strip each, with its most telling words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from captionfix import maps
from captionfix.explanation import Explanation, Word
from captionfix.render import figure

TILE = 150
"""Height of the photographs on a sheet, in pixels."""
_GAP, _MARGIN = 8, 14
_INK, _SOFT, _PAPER = "#15181d", "#59616d", "#ffffff"


def contact_sheet(
    explanations: Sequence[Explanation],
    names: Sequence[str] | None = None,
    *,
    words: int = 5,
    specific: bool = True,
    boxes: bool = False,
    tile: int = TILE,
    columns: int = 1,
) -> Image.Image:
    """Many explanations in one picture.

    A strip each: the photograph, then the maps of its words that name something and that the picture decided most
    (`telling`), all on the strip's own scale of colours; above them the caption.

    Args:
        explanations: What to show, in this order.
        names: What stands before the captions, such as file names; one each.
        words: At most so many words of each.
        specific: Whether the mean over the caption's words is taken off each map.
        boxes: Whether to draw the words' boxes.
        tile: Height of the photographs, in pixels.
        columns: Strips beside each other.

    Returns:
        An RGB picture.

    Raises:
        ValueError: There are no explanations, or not as many names.
    """
    if not explanations:
        raise ValueError("a contact sheet needs at least one explanation")
    if names is not None and len(names) != len(explanations):
        raise ValueError(f"{len(names)} names for {len(explanations)} explanations")
    titles = names or [""] * len(explanations)
    return stacked(
        [
            strip(one, name, words=words, specific=specific, boxes=boxes, tile=tile)
            for one, name in zip(explanations, titles, strict=True)
        ],
        columns,
    )


def strip(
    explanation: Explanation,
    name: str = "",
    *,
    words: int = 5,
    specific: bool = True,
    boxes: bool = False,
    tile: int = TILE,
) -> Image.Image:
    """One explanation's part of a contact sheet; as `contact_sheet`."""
    chosen = telling(explanation, words)
    size = fitted(explanation.image.size, (2 * tile, tile))
    photo = explanation.image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    scale = figure.scale(explanation, specific)
    tiles = [photo, *(thumbnail(word, size, scale, specific, boxes) for word in chosen)]
    head, word_font, fact_font = _font(15, True), _font(13, True), _font(11)
    across = max(size[0], 84)  # a label needs some room
    full, own = ((1 + count) * across + count * _GAP for count in (words, len(chosen)))
    label = _cut(f"{name}  ", _font(13), full // 3) if name else ""
    left = round(_font(13).getlength(label)) + 4 if name else 0
    # as wide as its tiles, or as its caption where that is longer, which has the room that a full row gives it
    width = max(own, min(full, left + math.ceil(head.getlength(explanation.caption))))
    result = Image.new("RGB", (width, size[1] + 70), _PAPER)
    draw = ImageDraw.Draw(result)
    draw.text((0, 3), label, _SOFT, _font(13))
    draw.text((left, 1), _cut(explanation.caption, head, width - left), _INK, head)
    for place, picture in enumerate(tiles):
        x = place * (across + _GAP)
        result.paste(picture, (x + (across - size[0]) // 2, 24))
        if place:
            word = chosen[place - 1]
            text = word.text if word.contrast is None else f"{word.text}, not {word.contrast}"
            for line, (said, font, ink) in enumerate(((text, word_font, _INK), (figure.facts(word), fact_font, _SOFT))):
                said = _cut(said, font, across + _GAP)
                at = x + (across - font.getlength(said)) / 2
                draw.text((at, 24 + size[1] + 2 + 17 * line), said, ink, font)
    return result


def stacked(strips: Sequence[Image.Image], columns: int = 1) -> Image.Image:
    """Strips under each other, in columns that are filled from left to right."""
    across = max(one.width for one in strips)
    rows = [strips[first : first + columns] for first in range(0, len(strips), columns)]
    heights = [max(one.height for one in row) for row in rows]
    count = min(columns, len(strips))
    size = (2 * _MARGIN + count * across + (count - 1) * 3 * _GAP, 2 * _MARGIN + sum(heights))
    result = Image.new("RGB", size, _PAPER)
    down = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for place, one in enumerate(row):
            result.paste(one, (_MARGIN + place * (across + 3 * _GAP), down))
        down += height
    return result


def telling(explanation: Explanation, most: int) -> list[Word]:
    """The words that name something, each text once; where they are more than ``most``, those on whose probability
    the picture had the largest effect. In the caption's order.
    """
    named: dict[str, Word] = {}
    for word in explanation.words:
        if not figure.is_function(word):
            named.setdefault(word.text, word)
    words = list(named.values()) or list(explanation.words)
    effects = {word.index: word.image_effect if math.isfinite(word.image_effect) else 0.0 for word in words}
    best = sorted(words, key=lambda word: -effects[word.index])[:most]
    return sorted(best, key=lambda word: word.index)


def thumbnail(
    word: Word, size: tuple[int, int], scale: figure.Scale, specific: bool = True, box: bool = False
) -> Image.Image:
    """A word's map over its photograph at a small size, without drawing it large first."""
    whole = word.explanation
    values = scale(figure.densities(whole, specific)[word.index])
    factor = (size[0] / whole.image.width, size[1] / whole.image.height) * 2
    window = tuple(edge * by for edge, by in zip(whole.window, factor, strict=True))
    small = whole.image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    shown = maps.resize(values, size, window)  # type: ignore[arg-type]
    result = Image.fromarray(figure.blend(np.asarray(small), shown, scale.colours))
    edges = word.box() if box else None
    if edges is not None:
        outline(result, tuple(edge * by for edge, by in zip(edges, factor, strict=True)))
    return result


def outline(picture: Image.Image, edges: tuple[float, ...]) -> None:
    """A box seen on light and on dark, drawn into the picture."""
    draw = ImageDraw.Draw(picture)
    x0, y0, x1, y1 = (round(edge) for edge in edges)
    draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline="black")
    if x1 - x0 > 3 and y1 - y0 > 3:
        draw.rectangle((x0 + 1, y0 + 1, x1 - 2, y1 - 2), outline="white")


def fitted(size: tuple[int, int], room: tuple[int, int]) -> tuple[int, int]:
    """The size with the same ratio that fits into the room's width and height."""
    factor = min(room[0] / size[0], room[1] / size[1])
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _cut(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """The text, or as much of its beginning as there is room for."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text + "…"


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib ships: it knows more scripts than Pillow's own."""
    from matplotlib import get_data_path

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/{name}", size)
