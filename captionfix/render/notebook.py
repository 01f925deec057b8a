"""How an explanation shows itself: a table in a terminal, a page to explore or a figure in a notebook."""

from __future__ import annotations

import base64
import html as markup
import io
import math
from collections.abc import Sequence

from PIL import Image

from captionfix.explanation import Explanation, Word
from captionfix.render.contact import strip
from captionfix.render.figure import figure, is_function
from captionfix.render.page import page

_FRAMED, _FRAMED_GRID = 640, 64  # of the photograph and the maps in a notebook, which should stay small
_MOST, _NAMED = 16, 100  # of a list, with pictures and with captions: hundreds must not make a notebook heavy
_TILE = 120  # height of a list's photographs, in pixels
_HEADINGS = ("word", "p", "image", "effect", "from earlier words", "instead")


def table(explanation: Explanation) -> str:
    """A plain-text table, a line a word.

    Columns: the word; its probability; its image share; its image effect (nats); the two earlier words with the most
    credit; the most probable other words. A dash where nothing is known.
    """
    rows = [_HEADINGS, *(_row(word) for word in explanation.words)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    right = (False, True, True, True, False, False)
    lines = []
    for row in rows:
        cells = (
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        )
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    head = f'"{explanation.caption}"  ({explanation.captioner}, {explanation.method})'
    return "\n".join([head, "", *lines])


def figure_jpeg(explanation: Explanation) -> bytes:
    """The figure for front ends that show no HTML."""
    return figure(explanation)._repr_jpeg_()


def smaller(picture: Image.Image) -> Image.Image:
    """No larger than a notebook shows it."""
    picture.thumbnail((_FRAMED, _FRAMED), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return picture


def jpeg(picture: Image.Image) -> bytes:
    """A picture's bytes as JPEG: a notebook keeps every picture that was shown in it."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "jpeg", quality=85)
    return buffer.getvalue()


def html(explanation: Explanation) -> str:
    """The page to explore, in a frame of its own; the figure and the table, where a viewer drops the frame.

    Front ends that do not trust a notebook, and sites that show one, take frames and scripts out; what lay under the
    frame is then what is seen.
    """
    caption = markup.escape(explanation.caption, quote=True)
    document = markup.escape(page(explanation, largest=_FRAMED, grid=_FRAMED_GRID), quote=True)
    return (
        '<div style="position:relative;min-height:600px;max-height:860px;overflow:hidden">'
        f'<figure style="margin:0"><img src="data:image/jpeg;base64,{_text(figure_jpeg(explanation))}" alt="{caption}" '
        'style="max-width:100%">'
        f"<details><summary>numbers</summary><pre>{markup.escape(table(explanation))}</pre></details></figure>"
        f'<iframe sandbox="allow-scripts" title="{caption}" srcdoc="{document}" '
        'style="position:absolute;left:0;top:0;width:100%;height:100%;border:0;background:white"></iframe></div>'
    )


def listing(explanations: Sequence[Explanation]) -> str:
    """Plain text, a line an explanation: its place, its caption, and the word that the picture decided least."""
    lines = [_count(explanations)]
    across = len(str(max(0, min(len(explanations), _NAMED) - 1)))
    lines += [f"{place:{across}}  {_line(one)}" for place, one in enumerate(explanations[:_NAMED])]
    return "\n".join([*lines, *_beyond(len(explanations), _NAMED)])


def sheet(explanations: Sequence[Explanation]) -> str:
    """A contact sheet: a strip of pictures for each explanation with its numbers folded in below it.

    Beyond the first few only captions are shown, and beyond the first hundred none, so that the length is bounded.
    """
    blocks = []
    for place, one in enumerate(explanations[:_MOST]):
        picture = strip(one, f"{place}", tile=_TILE)
        caption = markup.escape(one.caption, quote=True)
        blocks.append(
            f'<figure style="margin:0 0 .8em"><img src="data:image/jpeg;base64,{_text(jpeg(picture))}" alt="{caption}" '
            f'style="max-width:100%;background:white"><details><summary>numbers</summary>'
            f"<pre>{markup.escape(table(one))}</pre></details></figure>"
        )
    rest = [markup.escape(f"{place}  {_line(one)}") for place, one in enumerate(explanations[:_NAMED])][_MOST:]
    if rest:
        told = "\n".join([*rest, *_beyond(len(explanations), _NAMED)])
        blocks.append(f"<details><summary>{len(explanations) - _MOST} more</summary><pre>{told}</pre></details>")
    what = "; of each, the words that the picture decided most" if blocks else ""
    head = f"<p>{_count(explanations)}{what}</p>"
    return f'<div style="max-height:900px;overflow-y:auto">{head}{"".join(blocks)}</div>'


def _count(explanations: Sequence[Explanation]) -> str:
    return f"{len(explanations)} explanation{'' if len(explanations) == 1 else 's'}"


def _line(explanation: Explanation) -> str:
    """The caption, and which of its words that name something the picture decided least: the one to look at first."""
    named = [word for word in explanation.words if not is_function(word) and math.isfinite(word.image_effect)]
    text = f'"{explanation.caption}"'
    if not named:
        return text
    least = min(named, key=lambda word: word.image_effect)
    return f"{text}  (least image effect: {least.text} {least.image_effect:+.2f})"


def _beyond(count: int, shown: int) -> list[str]:
    return [f"... and {count - shown} more; a slice such as [{shown}:] shows them"] if count > shown else []


def _text(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def _row(word: Word) -> tuple[str, ...]:
    credits = sorted((pair for pair in word.language if pair[1] >= 0.005), key=lambda pair: -pair[1])[:2]
    others = [pair for pair in word.alternatives if pair[0] != word.text][:2]
    name = word.text if word.contrast is None else f"{word.text} (not {word.contrast})"
    return (
        name,
        f"{word.probability:.2f}",
        _percent(word.image_share),
        f"{word.image_effect:+.2f}" if math.isfinite(word.image_effect) else "-",
        ", ".join(f"{text} {_percent(share)}" for text, share in credits) or "-",
        ", ".join(f"{text} {share:.2f}" for text, share in others) or "-",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if math.isfinite(share) else "-"
