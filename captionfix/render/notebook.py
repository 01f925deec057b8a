"""How an explanation shows itself: a table in a terminal, a figure in a notebook."""

from __future__ import annotations

import base64
import html as markup
import math

from captionfix.explanation import Explanation, Word
from captionfix.render.figure import png as figure_png

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


def png(explanation: Explanation) -> bytes:
    """The figure as a PNG for a notebook."""
    return figure_png(explanation, dpi=130)


def html(explanation: Explanation) -> str:
    """The figure, self-contained, with the table folded under it."""
    picture = base64.b64encode(png(explanation)).decode()
    caption = markup.escape(explanation.caption, quote=True)
    return (
        f'<figure style="margin:0"><img src="data:image/png;base64,{picture}" alt="{caption}" style="max-width:100%">'
        f"<details><summary>numbers</summary><pre>{markup.escape(table(explanation))}</pre></details></figure>"
    )


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
