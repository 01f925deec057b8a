"""Records become a table: means with intervals, as text, CSV, JSON and plots (`captionfix.evaluate.plots`)."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import atomic_write
from . import boxes, metrics, plots
from .measure import LOWER, Plan, Record

if TYPE_CHECKING:
    from rich.table import Table

ALL = "all"


@dataclass(frozen=True)
class Line:
    """One number of the table: a metric of one method and kind of map, over one kind of phrase or over all."""

    method: str
    maps: str
    metric: str
    kind: str
    mean: metrics.Mean


def summarise(records: Sequence[Record], seed: int = 0) -> list[Line]:
    """Means over all phrases (pairs, words) with intervals over pictures; the time of every method, as a median."""
    values: dict[tuple[str, str, str, str], tuple[list[float], list[int]]] = {}
    events: dict[tuple[str, str], list[boxes.Event]] = {}
    for record in records:
        for maps, kind, metric, value in record.scores:
            for name in (ALL, kind):
                each = values.setdefault((record.method, maps, metric, name), ([], []))
                each[0].append(value)
                each[1].append(record.image)
        for maps, side, name, hit, located in record.events:
            event = boxes.Event(record.image, side, name, hit, located)  # type: ignore[arg-type]
            events.setdefault((record.method, maps), []).append(event)
    lines = [Line(*key, metrics.mean(each, images, seed)) for key, (each, images) in values.items()]
    lines = [line for line in lines if line.kind == ALL or _several(values, line)]
    for (method, maps), each_event in events.items():
        for mode in ("all", "loc"):
            lines.append(Line(method, maps, f"f1-{mode}", ALL, boxes.f1(each_event, mode, seed)))
    return lines


def _several(values: dict[tuple[str, str, str, str], Any], line: Line) -> bool:
    """Whether the kind is not all there is."""
    return len(values[line.method, line.maps, line.metric, ALL][0]) > line.mean.count + line.mean.undefined


def seconds(records: Sequence[Record]) -> dict[str, tuple[float, float]]:
    """Of each method the median of seconds a picture, and of its ratio to plain captioning."""
    found: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        found.setdefault(record.method, []).append((record.seconds, record.seconds / record.plain))
    return {method: (float(m[0]), float(m[1])) for method, each in found.items() for m in [np.median(each, 0)]}


def tables(records: Sequence[Record], lines: Sequence[Line], width: int) -> list[Table]:
    """For the terminal: a row a method and kind of map, a column a metric; as many tables as its width needs."""
    from rich.table import Table

    overall = {(line.method, line.maps, line.metric): line.mean for line in lines if line.kind == ALL}
    names = list(dict.fromkeys(line.metric for line in lines))
    methods = list(dict.fromkeys((line.method, line.maps) for line in lines))
    took = seconds(records)
    left = width - 18 - max((len(method) for method, _ in methods), default=0)
    each = max(1, left // (5 + max([14, *map(len, names)])))
    result = []
    for first in range(0, len(names), each):
        part = names[first : first + each]
        one = Table(caption=_counts(overall, part))
        for head in ("method", "maps"):
            one.add_column(head, no_wrap=True)
        for name in part:
            one.add_column(f"{name} {'↓' if name in LOWER else '↑'}", justify="right", no_wrap=True)
        for method, maps in methods:
            cells = [overall.get((method, maps, name)) for name in part]
            one.add_row(method, maps, *("" if m is None or math.isnan(m.value) else _cell(m) for m in cells))
        result.append(one)
    times = Table(caption="medians")
    for head in ("method", "seconds a picture", "x captioning"):
        times.add_column(head, no_wrap=True, justify="left" if head == "method" else "right")
    for method, (spent, ratio) in took.items():
        times.add_row(method, f"{spent:.3g}", f"{ratio:.3g}")
    return [*result, times]


def _cell(mean: metrics.Mean) -> str:
    return f"{mean.value:.3f}\n[{mean.low:.3f}, {mean.high:.3f}]"


def _counts(overall: dict[tuple[str, str, str], metrics.Mean], names: Sequence[str]) -> str:
    parts = []
    for name in names:
        counts = [m.count for (_, _, metric), m in overall.items() if metric == name]
        parts.append(f"{name} n={max(counts)}")
    return "means with 95 % bootstrap intervals over pictures; " + ", ".join(parts)


def write(out: Path, plan: Plan, records: Sequence[Record], left_out: dict[str, str]) -> list[Line]:
    """Writes ``results.csv``, ``results.json`` (with the configuration) and ``plots/``."""
    lines = summarise(records, plan.seed)
    took = seconds(records)
    rows = [_row(line) for line in lines]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(_HEAD), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(out / "results.csv", text.getvalue())
    result = {
        "configuration": plan.as_dict() | {"methods_left_out": left_out, "torch": _torch()},
        "pictures": len({record.image for record in records}),
        "seconds": {method: {"median": s, "times_captioning": ratio} for method, (s, ratio) in took.items()},
        "results": rows,
    }
    atomic_write(out / "results.json", json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    plots.write(out / "plots", [line for line in lines if line.kind == ALL], took)
    return lines


_HEAD = ("method", "maps", "metric", "kind", "value", "low", "high", "count", "undefined", "better")


def _row(line: Line) -> dict[str, Any]:
    m = line.mean
    numbers = [None if math.isnan(v) else v for v in (m.value, m.low, m.high)]
    better = "lower" if line.metric in LOWER else "higher"
    return dict(
        zip(
            _HEAD,
            (line.method, line.maps, line.metric, line.kind, *numbers, m.count, m.undefined, better),
            strict=True,
        )
    )


def _torch() -> str:
    import torch

    return str(torch.__version__)
