"""A page to explore an explanation: one self-contained HTML file that needs no network and nothing beside it.

Its parts lie next to this file: ``page.html`` (a `string.Template`), ``page_base.css``, ``page.css``, ``page.js``. All
text of the caption is escaped where it is markup, and the script only ever sets it as text. The page's own policy (CSP)
admits its one script and its one style by their hashes and nothing else, so that even a mistake there could run
nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import os
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from captionfix import maps
from captionfix.explanation import Explanation, Word
from captionfix.files import atomic_write
from captionfix.render import figure

LARGEST = 1280
"""Of the embedded image's sides, in pixels."""
GRID = 96
"""Of the embedded maps' sides, in cells: three to a standard deviation of the drawn Gaussian."""
POINTS = 250
"""Fixations embedded of a word, the heaviest first."""
_DRAWN_PIXELS = 50_000
_KINDS = {"specific": True, "raw": False}


def write(explanation: Explanation, path: str | os.PathLike[str]) -> Path:
    """Writes `page` into a file, in one step.

    Raises:
        OutputError: The file can't be written.
    """
    atomic_write(path, page(explanation))
    return Path(path)


def page(explanation: Explanation, largest: int = LARGEST, grid: int = GRID) -> str:
    """The page's HTML.

    Args:
        explanation: What it shows.
        largest: The image is embedded with no side longer than this, in pixels.
        grid: The maps are embedded with no side longer than this, in cells.
    """
    words = explanation.words
    style = part("page_base.css") + part("page.css") + _style(explanation)
    script = part("page.js")
    made = ", ".join(part for part in (explanation.captioner, explanation.method) if part)
    return Template(part("page.html")).substitute(
        style=style,
        script=script,
        style_hash=digest(style),
        script_hash=digest(script),
        version=html.escape(explanation.version),
        caption=html.escape(explanation.caption) or "captionfix",
        alt=html.escape(f"Image, captioned: {explanation.caption}"),
        made=html.escape(made),
        photo=photo(explanation.image, largest),
        width=explanation.image.width,
        height=explanation.image.height,
        listed=" listed" if _is_list(explanation) else "",
        words="\n".join(_button(word) for word in words),
        rows="\n".join(_row(word) for word in words),
        data=script_json(_data(explanation, grid)),
    )


def photo(image: Image.Image, largest: int, quality: int = 88) -> str:
    """A picture as a data URL, with no side longer than ``largest``: a PNG where that is small, else a JPEG."""
    factor = min(1.0, largest / max(image.size))
    if factor < 1:
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    elif image.width * image.height <= _DRAWN_PIXELS:  # a small drawing, whose blocks a JPEG would show
        return url(image, "png", optimize=True)
    return url(image, "jpeg", quality=quality, optimize=True)


def url(image: Image.Image, kind: str, **options: Any) -> str:
    """A picture as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def script_json(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def colours(name: str = figure.COLOURS) -> NDArray[np.uint8]:
    """(256, 3): a matplotlib colour map."""
    from matplotlib import colormaps

    table: NDArray[np.uint8] = np.round(colormaps[name](np.arange(256))[:, :3] * 255).astype(np.uint8)
    return table


def small_maps(values: NDArray[np.floating], longest: int) -> NDArray[np.uint8]:
    """(words, height, width) in 0..1 as bytes, with no side longer than ``longest``, each cell the mean of what it
    covers.
    """
    _, height, width = values.shape
    factor = min(1.0, longest / max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    whole = (0.0, 0.0, float(size[0]), float(size[1]))
    each = [np.round(255 * maps.resize(one, size, whole)).astype(np.uint8) for one in values]
    return np.stack(each) if each else np.zeros((0, size[1], size[0]), dtype=np.uint8)


def where(box: maps.Box | None, peak: tuple[float, float] | None, size: tuple[int, int]) -> str:
    """A map in words, for those who don't see it."""
    if box is None or peak is None:
        return "no evidence"
    across = ("left", "centre", "right")[min(2, int(3 * peak[0] / size[0]))]
    down = ("upper", "middle", "lower")[min(2, int(3 * peak[1] / size[1]))]
    place = "the centre" if (across, down) == ("centre", "middle") else f"the {down} {across}"
    area = (box[2] - box[0]) * (box[3] - box[1]) / (size[0] * size[1])
    return f"strongest at {place}; its box covers {100 * min(area, 1):.0f} % of the image"


def _data(explanation: Explanation, grid: int) -> dict[str, Any]:
    size, window = explanation.image.size, explanation.window
    embedded, scales = {}, {}
    shape = (0, 0, 0)
    for kind, specific in _KINDS.items():
        scale = figure.scale(explanation, specific)
        cells = small_maps(scale(figure.densities(explanation, specific)), grid)
        embedded[kind] = base64.b64encode(cells.tobytes()).decode()
        shape = cells.shape
        top = scale.top or 1.0
        ticks = [[round((tick / top) ** figure._BEND, 4), f"{tick:g}"] for tick in figure._ticks(top)]
        scales[kind] = {"ticks": ticks, "clipped": scale.clipped}
    edges = _fractions(window, size)
    return {
        "size": list(size),
        "window": edges,
        "partial": max(edges[:2]) > 0.004 or min(edges[2:]) < 0.996,
        "colours": base64.b64encode(colours().tobytes()).decode(),
        "scales": scales,
        "several": len(explanation) > 1,
        "known": {
            "effect": any(math.isfinite(word.image_effect) for word in explanation.words),
            "language": any(word.language for word in explanation.words),
        },
        "maps": {**embedded, "grid": [shape[2], shape[1]]},
        "words": [_word(word) for word in explanation.words],
    }


def _word(word: Word) -> dict[str, Any]:
    size = word.explanation.image.size
    heaviest = np.argsort(-word.fixations[:, 2], kind="stable")[:POINTS]
    points = word.fixations[heaviest].astype(np.float64)
    if len(points):
        radius = 100 * np.sqrt(points[:, 2] / points[0, 2]) if points[0, 2] > 0 else np.zeros(len(points))
        points = np.stack([1e4 * points[:, 0] / size[0], 1e4 * points[:, 1] / size[1], radius], 1)
    box = word.box()
    return {
        "text": word.text,
        "p": _number(word.probability),
        "share": _number(word.image_share),
        "effect": _number(word.image_effect),
        "other": _number(word.other),
        "language": [[text, _number(share)] for text, share in word.language],
        "credits": credits(word),
        "alternatives": [[text, _number(share)] for text, share in word.alternatives[:5]],
        "contrast": word.contrast,
        "count": len(word.fixations),
        "points": np.round(points).astype(int).ravel().tolist(),
        "box": None if box is None else _fractions(box, size),
        "where": {kind: where(box, word.point(specific), size) for kind, specific in _KINDS.items()},
    }


def credits(word: Word) -> list[float]:
    """The word's language credits by the earlier words' places: a caption may say a word twice."""
    shares = [share if math.isfinite(share) else 0.0 for _, share in word.language]
    first = len(shares) - word.index  # what comes before the caption's own words: the start
    return [round(share, 5) for share in shares[max(first, 0) :]]


def _style(explanation: Explanation) -> str:
    """What CSS has to know of this explanation: underlines, the image's ratio, the colours."""
    table = colours()[:: 255 // 15]
    stops = ",".join("#" + bytes(row).hex() for row in table)
    width, height = explanation.image.size
    rules = [f":root{{--strength:.8;--ratio:{width / height:.5f};--colours:{stops}}}"]
    largest = max((word.image_effect for word in explanation.words if math.isfinite(word.image_effect)), default=0)
    for word in explanation.words:
        effect = word.image_effect / largest if largest > 0 else math.nan
        named = (("share", word.image_share), ("effect", effect), ("p", word.probability))
        values = ";".join(f"--{name}:{_part_of_one(value):.4f}" for name, value in named)
        rules.append(f"#word-{word.index}{{{values}}}")
    return "\n".join(rules)


def _button(word: Word) -> str:
    said = figure.facts(word)
    first = 0 if word.index == 0 else -1
    against = "" if word.contrast is None else f'data-not="{html.escape(word.contrast)}" '
    return (
        f'<button type="button" class="word" id="word-{word.index}" aria-pressed="false" tabindex="{first}" '
        f'{against}title="{html.escape(said)}"><bdi class="text">{html.escape(word.text)}</bdi>'
        '<span class="rule"></span><span class="under"></span></button>'
    )


def _is_list(explanation: Explanation) -> bool:
    """Whether the words are a list, as a classifier's classes are, and no sentence."""
    return len(explanation) > 1 and explanation.caption == ", ".join(word.text for word in explanation.words)


def _row(word: Word) -> str:
    name = word.text if word.contrast is None else f"{word.text} (not {word.contrast})"
    cells = (
        f"{word.probability:.3f}",
        percent(word.image_share),
        f"{word.image_effect:+.2f}" if math.isfinite(word.image_effect) else "–",
        _listed((text, percent(share)) for text, share in word.language if share >= 0.005),
        _listed((text, f"{share:.2f}") for text, share in word.alternatives[:5]),
        where(word.box(), word.point(), word.explanation.image.size),
    )
    return (
        f'<tr><th scope="row">{html.escape(name)}</th>' + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>"
    )


def _listed(pairs: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{text} {number}" for text, number in pairs) or "–"


def percent(share: float) -> str:
    """``42 %``, or a dash where it is not known."""
    return f"{100 * share:.0f} %" if math.isfinite(share) else "–"


def _fractions(box: maps.Box, size: tuple[int, int]) -> list[float]:
    return [round(float(edge) / size[place % 2], 5) for place, edge in enumerate(box)]


def _part_of_one(value: float) -> float:
    return min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0


def _number(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def digest(text: str) -> str:
    """By which a page's policy admits a script or a style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def part(name: str) -> str:
    """A file of the pages'."""
    return resources.files("captionfix.render").joinpath(name).read_text(encoding="utf-8")
