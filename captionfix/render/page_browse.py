"""The page of a folder's words, sorted by how suspicious they are: one self-contained HTML file, as `page`."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from captionfix import maps
from captionfix.render import contact, figure
from captionfix.render.page import digest, part, script_json, url


@dataclass(frozen=True)
class Card:
    """A word on the page.

    Attributes:
        image: The image's name.
        words: All words of the caption.
        place: The word's among them.
        probability, share, effect: Of the word; None where not known.
        miss: As of `captionfix.browse.Entry`.
        alternatives: The most probable words at this place.
        link: Where more of it is to be seen, from the page.
        picture: The word's map over the photograph, small.
    """

    image: str
    words: tuple[str, ...]
    place: int
    probability: float | None
    share: float | None
    effect: float | None
    miss: float | None
    alternatives: tuple[tuple[str, float | None], ...]
    link: str | None
    picture: Image.Image | None


def browse_page(cards: Sequence[Card], title: str, summary: str, sort: str) -> str:
    """The page's HTML.

    Args:
        cards: The words.
        title: What they are of.
        summary: Under the title.
        sort: ``share``, ``probability``, ``effect`` or ``pointing``: the order that it opens with.
    """
    style, script = part("page_base.css") + part("page_browse.css"), part("page_browse.js")
    pointing = any(card.miss is not None for card in cards)
    return Template(part("page_browse.html")).substitute(
        style=style,
        script=script,
        style_hash=digest(style),
        script_hash=digest(script),
        title=html.escape(title),
        summary=html.escape(summary),
        pointing="" if pointing else "disabled",
        data=script_json({"sort": sort, "cards": [_plain(card) for card in cards]}),
    )


def row_thumbnail(image: Image.Image, row: Mapping[str, Any], longest: int) -> Image.Image:
    """A row's evidence at the feature map over its photograph, small, with its box."""
    size = contact.fitted(image.size, (longest, longest))
    factor = (size[0] / image.width, size[1] / image.height) * 2
    small = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    cells = np.array(row.get("feature_map") or [[0.0]], dtype=np.float32)
    values = figure.Scale(float(cells.max()))(cells)
    window = tuple(edge * by for edge, by in zip(row["window"], factor, strict=True))
    result = Image.fromarray(figure.blend(np.asarray(small), maps.resize(values, size, window)))
    if row.get("box"):
        contact.outline(result, tuple(edge * by for edge, by in zip(row["box"], factor, strict=True)))
    return result


def _plain(card: Card) -> dict[str, Any]:
    return {
        "image": card.image,
        "words": card.words,
        "place": card.place,
        "probability": card.probability,
        "share": card.share,
        "effect": card.effect,
        "pointing": card.miss,
        "alternatives": card.alternatives,
        "link": card.link,
        "picture": None if card.picture is None else url(card.picture, "jpeg", quality=78),
        "size": None if card.picture is None else card.picture.size,
    }
