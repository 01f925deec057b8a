"""Figures with matplotlib, drawn without its global state: the caption word by word, and single overlays."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from captionfix import maps
from captionfix.explanation import Explanation, Word
from captionfix.function_words import FUNCTION_WORDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from captionfix.render.shown import ShownFigure

COLOURS = "plasma"
"""Perceptually uniform, and even its dark end is a colour, so that faint evidence shows on dark things as well."""
DRAWN = 0.03
"""Standard deviation of the Gaussian in pictures, a fraction of the CNN's input: wider than that of the maps which are
measured (`captionfix.maps.SIGMA`), since an eye at some distance needs spots that it can see."""

_OPAQUE = 0.8  # of the colour at the scale's top, so that even there the photograph's edges remain visible
_RISE = 0.9  # alpha = _OPAQUE * value ** _RISE
_GREY = 0.7  # how far the photograph under a map is drained of its own colour
_LIGHT = 0.15  # and lightened, so that the map's dark colours show on dark things too
_BEND = 0.5  # colours go with the square root of the density: a whole object's is far below a small spot's
_DIM = 0.6  # how far a function word's panel is drawn towards white
_PANEL_PIXELS = 480  # a panel needs no more, however large the photograph


@dataclass(frozen=True)
class Scale:
    """What the colours mean: densities from 0 to ``top``, in multiples of evidence spread evenly over the CNN's
    input.
    """

    top: float
    colours: str = COLOURS
    clipped: bool = False

    def __call__(self, densities: NDArray[np.floating]) -> NDArray[np.float32]:
        """Densities as 0..1 along the colours."""
        if self.top <= 0:
            return np.zeros(densities.shape, dtype=np.float32)
        return (np.clip(densities / self.top, 0, 1) ** _BEND).astype(np.float32)


def is_function(word: Word) -> bool:
    """Whether figures show the word dimmed."""
    return word.text.lower() in FUNCTION_WORDS


def densities(explanation: Explanation, specific: bool = True, sigma: float | None = None) -> NDArray[np.float32]:
    """The words' maps in multiples of evenly spread evidence: (words, grid height, grid width)."""
    cells = np.float32(explanation.grid[0] * explanation.grid[1])
    return explanation.maps(specific, DRAWN if sigma is None else sigma) * cells


def scale(explanation: Explanation, specific: bool = True, sigma: float | None = None, colours: str = COLOURS) -> Scale:
    """The one scale for all of a caption's words.

    Its top is the largest density of any word, but at most 2.5 times the middle one of the content words' largest: a
    single word with all its evidence in one spot must not leave the others dark.
    """
    values = densities(explanation, specific, sigma)
    tops = values.max(axis=(1, 2), initial=0)
    content = [top for word, top in zip(explanation.words, tops, strict=True) if not is_function(word) and top > 0]
    largest = float(tops.max(initial=0))
    top = min(largest, 2.5 * float(np.median(content))) if content else largest
    return Scale(top, colours, clipped=largest > top)


def blend(
    photo: NDArray[np.uint8], values: NDArray[np.floating], colours: str = COLOURS, dim: bool = False
) -> NDArray[np.uint8]:
    """A map over a photograph.

    Args:
        photo: (H, W, 3).
        values: (H, W) in 0..1 along the colours; 0 leaves the photograph, drained of part of its colour.
        colours: Name of a matplotlib colour map.
        dim: Whether the result is drawn towards white.

    Returns:
        (H, W, 3).
    """
    from matplotlib import colormaps

    under = photo.astype(np.float32)
    grey = under @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    under += _GREY * (grey[..., None] - under)
    under += _LIGHT * (255 - under)
    colour = colormaps[colours](values)[..., :3].astype(np.float32) * 255
    alpha = (_OPAQUE * np.power(values, _RISE))[..., None].astype(np.float32)
    result = under + alpha * (colour - under)
    if dim:
        result += _DIM * (255 - result)
    return (result + 0.5).astype(np.uint8)


def overlay(
    word: Word,
    *,
    specific: bool = True,
    sigma: float | None = None,
    box: bool = False,
    fixations: bool = False,
    colours: str = COLOURS,
    common_scale: bool = False,
) -> Image.Image:
    """A word's map over the whole image.

    Args:
        word: A word of an explanation.
        specific: Whether the mean over the caption's words is taken off.
        sigma: The Gaussian's standard deviation as a fraction of the CNN's input; None for ``DRAWN``.
        box: Whether to draw the word's box.
        fixations: Whether to draw its fixations, the heavier the larger.
        colours: Name of a matplotlib colour map.
        common_scale: Whether colours compare with the caption's other words; else the map's own maximum is the top.

    Returns:
        An RGB image of the original's size.
    """
    whole = word.explanation
    values = densities(whole, specific, sigma)[word.index]
    colour_scale = scale(whole, specific, sigma, colours) if common_scale else Scale(float(values.max()), colours)
    shown = maps.resize(colour_scale(values), whole.image.size, whole.window)
    result = Image.fromarray(blend(np.asarray(whole.image), shown, colours))
    if fixations or box:
        _mark(result, word, fixations, word.box() if box else None)
    return result


def figure(
    explanation: Explanation,
    words: Sequence[int | str] | None = None,
    *,
    specific: bool = True,
    sigma: float | None = None,
    boxes: bool = False,
    fixations: bool = False,
    columns: int | None = None,
    width: float = 7.2,
    colours: str = COLOURS,
    title: bool = True,
) -> ShownFigure:
    """The photograph, then each word's map over it, all on one colour scale; function words are dimmed.

    Under each word stand its probability and its image share (where no flow was run: its image effect, in nats).

    Args:
        explanation: What to draw.
        words: Places or texts of the words to show; None for all.
        specific: Whether the mean over the caption's words is taken off each map.
        sigma: The Gaussian's standard deviation as a fraction of the CNN's input; None for ``DRAWN``.
        boxes: Whether to draw each content word's box.
        fixations: Whether to draw fixations as dots.
        columns: Panels in a row; None to choose by their number and shape.
        width: The figure's width in inches (7.2: a page of two columns).
        colours: Name of a matplotlib colour map; perceptually uniform ones are viridis, inferno, magma, plasma,
            cividis.
        title: Whether the caption stands above.

    Returns:
        A matplotlib figure that belongs to no window and shows itself in a notebook;
        ``figure.savefig("caption.pdf")`` writes it.

    Raises:
        CaptionError: A word that the caption does not have.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from captionfix.render.shown import ShownFigure

    chosen = [explanation[key] for key in (range(len(explanation)) if words is None else words)]
    plan = _plan(explanation, len(chosen) + 1, columns, width, title)
    result = ShownFigure(figsize=(plan.width, plan.height), facecolor="white")
    FigureCanvasAgg(result)
    if title:
        top = 1 - 0.08 / plan.height
        result.text(0.5, top, plan.title, ha="center", va="top", size=plan.title_size, style="italic", parse_math=False)

    colour_scale = scale(explanation, specific, sigma, colours)
    values = densities(explanation, specific, sigma)
    photo, factor = _reduced(explanation.image)
    window = tuple(edge * by for edge, by in zip(explanation.window, (*factor, *factor), strict=True))
    pixels = np.asarray(photo)

    axes = _panel(result, plan, 0, pixels)
    _label(axes, plan, "image", "", False)
    for place, word in enumerate(chosen, start=1):
        dim = is_function(word)
        shown = maps.resize(colour_scale(values[word.index]), photo.size, window)  # type: ignore[arg-type]
        axes = _panel(result, plan, place, blend(pixels, shown, colours, dim))
        if fixations and len(word.fixations):
            size = 14 * np.sqrt(word.fixations[:, 2] / word.fixations[:, 2].max())
            axes.scatter(
                word.fixations[:, 0] * factor[0] - 0.5,
                word.fixations[:, 1] * factor[1] - 0.5,
                s=size, c="white", edgecolors="black", linewidths=0.3, alpha=0.35 if dim else 0.8,
            )  # fmt: skip
        edges = word.box() if boxes and not dim else None
        if edges is not None:
            _rectangle(axes, edges, factor)
        name = word.text if word.contrast is None else f"{word.text}, not {word.contrast}"
        _label(axes, plan, name, facts(word), dim)
    _colour_bar(result, plan, colour_scale, specific)
    return result


def png(explanation: Explanation, dpi: float = 160, **options: Any) -> bytes:
    """`figure` as the bytes of a PNG."""
    buffer = io.BytesIO()
    fast = {"compress_level": 2}  # the usual 6 takes three times as long for a file that is a twelfth smaller
    figure(explanation, **options).savefig(buffer, format="png", dpi=dpi, pil_kwargs=fast)
    return buffer.getvalue()


def facts(word: Word) -> str:
    """What stands under a word: its probability and image share, or image effect where no flow was run."""
    parts = [f"p {word.probability:.2f}"]
    if math.isfinite(word.image_share):
        parts.append(f"image {100 * word.image_share:.0f} %")
    elif math.isfinite(word.image_effect):
        parts.append(f"effect {word.image_effect:+.1f}")
    return "  ".join(parts)


@dataclass(frozen=True)
class _Plan:
    """Where everything stands, in inches."""

    width: float
    height: float
    columns: int
    panel: tuple[float, float]
    gap: float
    label: float  # height of the text under a panel
    left: float
    head: float
    foot: float
    word_size: float
    fact_size: float
    title: str
    title_size: float


def _plan(explanation: Explanation, panels: int, columns: int | None, width: float, title: bool) -> _Plan:
    ratio = min(max(explanation.image.width / explanation.image.height, 0.45), 4.0)  # beyond, panels have margins
    margin, gap, title_size = 0.1, 0.1, 10.5
    if columns is None:
        # narrow panels for tall photographs, wide ones for wide, and fewer columns than would leave labels no room
        wanted = {True: 5.0, False: 6.0}[panels <= 10] if ratio > 1.15 else 6.0
        wanted = 7.0 if panels > 16 and ratio <= 1.6 else wanted
        wanted = wanted if ratio <= 1.6 else 4.0
        rows = math.ceil(panels / min(wanted, panels))
        columns = math.ceil(panels / rows)
    columns = max(1, min(columns, panels))
    across = min((width - 2 * margin - (columns - 1) * gap) / columns, 2.2 * max(1.0, ratio**0.5))
    down = across / ratio
    used = columns * across + (columns - 1) * gap
    word_size = min(max(5.5 + 2.6 * across, 6.5), 10)
    fact_size = min(max(4.4 + 1.5 * across, 5.2), 7.5)
    label = (word_size * 1.25 + fact_size * 1.35 + 4) / 72
    rows = math.ceil(panels / columns)
    full = max(used + 2 * margin, 3.4)
    lines = textwrap.wrap(explanation.caption, max(20, int(full * 72 / (title_size * 0.52)))) or [""]
    head = 0.14 + len(lines) * title_size * 1.25 / 72 if title else 0.06
    foot = 0.46
    height = head + rows * (down + label) + (rows - 1) * 0.04 + foot
    left = (full - used) / 2
    return _Plan(full, height, columns, (across, down), gap, label, left, head, foot, word_size, fact_size,
                 "\n".join(lines), title_size)  # fmt: skip


def _panel(result: Figure, plan: _Plan, place: int, pixels: NDArray[np.uint8]) -> Axes:
    row, column = divmod(place, plan.columns)
    across, down = plan.panel
    x = plan.left + column * (across + plan.gap)
    y = plan.height - plan.head - row * (down + plan.label + 0.04) - down
    axes = result.add_axes((x / plan.width, y / plan.height, across / plan.width, down / plan.height))
    axes.imshow(pixels, interpolation="antialiased")
    axes.set_xlim(-0.5, pixels.shape[1] - 0.5)
    axes.set_ylim(pixels.shape[0] - 0.5, -0.5)
    axes.set_anchor("S")
    axes.axis("off")
    return axes


def _label(axes: Axes, plan: _Plan, name: str, below: str, dim: bool) -> None:
    """The word in bold and its numbers, shrunk where they would run into the neighbour's."""
    ink = "#8a8a8a" if dim else "black"
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center", "va": "top"}
    for text, size, offset, weight in (
        (name, plan.word_size, 2.5, "normal" if dim or not below else "bold"),
        (below, plan.fact_size, 2.5 + plan.word_size * 1.25, "normal"),
    ):
        if text:
            note = axes.annotate(
                text, (0.5, 0), (0, -offset), size=size, weight=weight, color=ink, annotation_clip=False,
                parse_math=False, **place,
            )  # fmt: skip
            room = (plan.panel[0] + 0.6 * plan.gap) * axes.figure.dpi
            needed = note.get_window_extent().width
            if needed > room:
                note.set_fontsize(size * room / needed)


def _colour_bar(result: Figure, plan: _Plan, colour_scale: Scale, specific: bool) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm

    across = min(2.4, plan.width - 0.6)
    place = ((plan.width - across) / 2 / plan.width, 0.27 / plan.height, across / plan.width, 0.075 / plan.height)
    axes = result.add_axes(place)
    top = colour_scale.top or 1.0
    mappable = ScalarMappable(PowerNorm(_BEND, 0, top), colour_scale.colours)
    extend = "max" if colour_scale.clipped else "neither"
    bar = result.colorbar(mappable, cax=axes, orientation="horizontal", extend=extend)
    ticks = _ticks(top)
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.outline.set_linewidth(0.4)
    axes.tick_params(labelsize=5.5, length=1.5, width=0.4, pad=1)
    what = "evidence beyond the mean of all words" if specific else "evidence"
    bar.set_label(f"{what} (times even spread)", size=6, labelpad=1.5)


def _ticks(top: float) -> list[float]:
    """Round numbers from 0 to ``top`` that stand well apart under the bend of the colours."""
    exponent = math.floor(math.log10(top))
    round_ones = [digit * 10.0**power for power in range(exponent, exponent - 4, -1) for digit in (5, 2, 1)]
    ticks: list[float] = []
    for tick in round_ones:
        place = (tick / top) ** _BEND
        if place <= 1 and all(abs(place - (other / top) ** _BEND) >= 0.14 for other in (*ticks, 0.0)):
            ticks.append(tick)
    return [0.0, *sorted(ticks)]


def _rectangle(axes: Axes, edges: maps.Box, factor: tuple[float, float]) -> None:
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = edges
    corner = (x0 * factor[0] - 0.5, y0 * factor[1] - 0.5)
    size = ((x1 - x0) * factor[0], (y1 - y0) * factor[1])
    for colour, line in (("black", 1.9), ("white", 0.9)):  # seen on light and on dark
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=line))


def _mark(image: Image.Image, word: Word, fixations: bool, edges: maps.Box | None) -> None:
    draw = ImageDraw.Draw(image)
    unit = max(1, round(max(image.size) / 400))
    if fixations and len(word.fixations):
        heaviest = float(word.fixations[:, 2].max())
        for x, y, mass in word.fixations.tolist():
            radius = unit * (0.6 + 1.8 * math.sqrt(mass / heaviest))
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill="white", outline="black")
    if edges is not None:
        x0, y0, x1, y1 = edges
        corners = (x0, y0, max(x1 - 1, x0), max(y1 - 1, y0))
        draw.rectangle(corners, outline="black", width=3 * unit)
        inner = tuple(edge + unit * (1 if place < 2 else -1) for place, edge in enumerate(corners))
        if inner[2] >= inner[0] and inner[3] >= inner[1]:
            draw.rectangle(inner, outline="white", width=unit)


def _reduced(image: Image.Image) -> tuple[Image.Image, tuple[float, float]]:
    """The image no larger than a panel needs, and the factors by which its sides shrank."""
    largest = max(image.size)
    if largest <= _PANEL_PIXELS:
        return image, (1.0, 1.0)
    size = tuple(max(1, round(side * _PANEL_PIXELS / largest)) for side in image.size)
    small = image.resize((size[0], size[1]), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return small, (size[0] / image.width, size[1] / image.height)
