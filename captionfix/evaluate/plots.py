"""Plots of an evaluation: each metric against the methods, and against their seconds."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import atomic_write
from .measure import LOWER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .report import Line

KINDS = {"raw": "#0072b2", "specific": "#d55e00"}
"""Colours of the two kinds of maps (Okabe and Ito's, told apart by everybody)."""
_BESIDE = [(1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)]
"""Where a name may stand by its point: right or left of it, above or below."""


def write(folder: Path, lines: Sequence[Line], took: Mapping[str, tuple[float, float]]) -> None:
    """A PNG for each metric, and another against seconds.

    Args:
        folder: where they go.
        lines: of one kind of phrase.
        took: of each method seconds a picture and how many times as long as captioning that is.
    """
    known = [line for line in lines if not math.isnan(line.mean.value)]
    for metric in dict.fromkeys(line.metric for line in known):
        mine = [line for line in known if line.metric == metric]
        for figure, name in ((by_method(mine), metric), (by_seconds(mine, took), f"{metric}-seconds")):
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=150)
            atomic_write(folder / f"{name}.png", picture.getvalue())


def by_method(lines: Sequence[Line]) -> Figure:
    """One metric's means and intervals, a row a method."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(line.method for line in lines))
    figure = Figure(figsize=(7, 1.2 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    for kind, style, value, span in _each_kind(lines):
        shift = -0.12 if style["label"] == "raw maps" else 0.12
        axes.errorbar(value, [names.index(line.method) + shift for line in kind], xerr=span, **style)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(_label(lines))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def by_seconds(lines: Sequence[Line], took: Mapping[str, tuple[float, float]]) -> Figure:
    """One metric's means and intervals against seconds a picture; a line joins a method's two kinds of maps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    each = [took[line.method][0] for line in lines]
    wide = max(each) / min(each)
    points: dict[str, list[tuple[float, float]]] = {}
    for kind, style, value, span in _each_kind(lines):
        aside = wide ** (-0.004 if style["label"] == "raw maps" else 0.004)  # or intervals would lie on one another
        at = [aside * took[line.method][0] for line in kind]
        axes.errorbar(at, value, yerr=span, **style)
        for line, seconds in zip(kind, at, strict=True):
            points.setdefault(line.method, []).append((seconds, line.mean.value))
    for pair in points.values():
        axes.plot(*zip(*pair, strict=True), color="0.7", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.margins(0.08)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide > 4 else AutoLocator())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("seconds a picture (median)")
    axes.set_ylabel(_label(lines))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _name(figure, axes, points)
    return figure


def _each_kind(lines: Sequence[Line]) -> Iterator[tuple[list[Line], dict[str, Any], Any, Any]]:
    """Of each kind of maps its lines, how it is drawn, means, and how far intervals reach to either side."""
    for maps, colour in KINDS.items():
        kind = [line for line in lines if line.maps == maps]
        if kind:
            value = np.array([line.mean.value for line in kind])
            span = np.abs(np.array([[line.mean.low, line.mean.high] for line in kind]).T - value)
            style = {"fmt": "o", "color": colour, "capsize": 2, "markersize": 4, "label": f"{maps} maps"}
            yield kind, style, value, span


def _label(lines: Sequence[Line]) -> str:
    metric = lines[0].metric
    return f"{metric} ({'lower' if metric in LOWER else 'higher'} is better)"


def _name(figure: Figure, axes: Axes, points: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Writes names beside their points: where they lie in the axes, cover no point, interval, other name or legend, and
    no other point is nearly as near. One that finds no such place gives up the last, then all. A line leads to the
    point where that, or some distance, leaves a doubt."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.lines import Line2D
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    frame, legend = axes.get_window_extent(renderer), axes.get_legend()
    taken = [legend.get_window_extent(renderer)] if legend else []
    at = {name: axes.transData.transform(each) for name, each in points.items()}
    taken += [Bbox.from_bounds(x - 3, y - 3, 6, 6) for each in at.values() for x, y in each]
    for bars in axes.containers:
        for line in bars[2]:  # the intervals
            taken += [Bbox(axes.transData.transform(ends)).padded(2) for ends in line.get_segments()]

    def away(box: Bbox, name: str) -> float:
        beside = np.maximum(np.maximum(box.min - at[name], at[name] - box.max), 0)
        return float(np.hypot(*beside.T).min())

    def rank(box: Bbox, name: str) -> int:
        inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        if not inside or any(box.overlaps(other) for other in taken):
            return 2
        return int(any(away(box, other) < 1.5 * away(box, name) for other in at if other != name))

    for name in points:
        text = figure.text(0, 0, name, fontsize=7, va="bottom", in_layout=False)
        width, height = text.get_window_extent(renderer).size
        places = [
            Bbox.from_bounds(
                x + reach * across - width * (1 - across) / 2, y + reach * up - height * (1 - up) / 2, width, height
            )
            for reach in (6, 12, 20, 30)
            for x, y in at[name]
            for across, up in _BESIDE
        ]
        box = min(places, key=lambda box: rank(box, name))
        to_figure = figure.transFigure.inverted().transform
        x, y = to_figure(box.min)
        text.set_position((x, y))
        if rank(box, name) or away(box, name) > 12:
            ends = np.array([[np.clip(end, box.min, box.max), end] for end in at[name]])
            shortest = ends[np.hypot(*(ends[:, 0] - ends[:, 1]).T).argmin()]
            figure.add_artist(Line2D(*to_figure(shortest).T, color="0.5", linewidth=0.5))
        taken.append(box.padded(2))
