"""What a person sees of an evaluation: names that can be read and belong to their points."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from captionfix.evaluate import plots
from captionfix.evaluate.metrics import Mean
from captionfix.evaluate.report import ALL, Line

# (method, seconds a picture, raw maps, specific maps): 500 scenes, where many methods are alike
CROWDED = [
    ("flow", 0.12, 0.99, 0.992),
    ("attention", 0.127, 0.995, 0.995),
    ("joined:policy=thorough", 0.155, 0.99, 0.991),
    ("guided-backprop", 0.177, 0.976, 0.979),
    ("input-x-gradient", 0.158, 0.975, 0.976),
    ("default", 0.289, 0.988, 0.991),
    ("fast", 0.27, 0.988, 0.991),
    ("layercam", 0.088, 0.61, 0.6),
    ("gradcam", 0.052, 0.2, 0.14),
    ("centre", 0.028, 0.1, None),
]


def lines_of(rows):
    kinds = [(name, kind, value) for name, _, *both in rows for kind, value in zip(plots.KINDS, both, strict=True)]
    return [
        Line(name, kind, "pointing", ALL, Mean(value, value - 0.01, value + 0.01, 100, 0))
        for name, kind, value in kinds
        if value is not None
    ]


def drawn(rows):
    """The figure as it is written, drawn."""
    figure = plots.by_seconds(lines_of(rows), {name: (seconds, 1.0) for name, seconds, *_ in rows})
    figure.set_dpi(150)
    FigureCanvasAgg(figure).draw()
    return figure


def gap(box, point):
    return np.hypot(*np.maximum(np.maximum(box.min - point, point - box.max), 0))


def test_names_cover_nothing_and_belong_to_their_points():
    figure = drawn(CROWDED)
    axes = figure.axes[0]
    names = {text.get_text(): text.get_window_extent() for text in figure.texts}
    assert list(names) == [name for name, *_ in CROWDED]
    for one, other in itertools.combinations(names.values(), 2):
        assert not one.overlaps(other)
    place = {
        name: [axes.transData.transform((seconds, value)) for value in both if value is not None]
        for name, seconds, *both in CROWDED
    }
    leads = [line.get_transform().transform(line.get_xydata()) for line in figure.artists]
    assert len(leads) < 4
    for name, box in names.items():
        assert not box.overlaps(axes.get_legend().get_window_extent())
        assert (axes.bbox.min <= box.min).all()
        assert (box.max <= axes.bbox.max).all()
        assert min(gap(box, point) for each in place.values() for point in each) > 2
        nearest = min(place, key=lambda other: min(gap(box, point) for point in place[other]))
        led = any(gap(box, start) < 4 and np.hypot(*(np.array(place[name]) - end).T).min() < 12 for start, end in leads)
        assert nearest == name or led


@pytest.mark.parametrize("span", [1.0, 1.3, 3.0, 30.0, 3000.0])
def test_seconds_can_be_read_off_whatever_their_range(span):
    axes = drawn([("a", 0.21, 0.5, 0.6), ("b", 0.21 * span, 0.7, 0.8)]).axes[0]
    low, high = axes.get_xlim()
    ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    seen = [(at, label) for at, label in ticks if low <= at <= high]
    assert len(seen) >= 2
    for at, label in seen:
        assert float(label.get_text()) == pytest.approx(at)
    for (_, one), (_, other) in itertools.pairwise(seen):
        assert not one.get_window_extent().overlaps(other.get_window_extent())


def test_both_kinds_of_a_method_are_seen_where_they_are_alike():
    image = np.asarray(drawn([("a", 0.1, 0.5, 0.5), ("b", 1.0, 0.7, 0.7)]).canvas.buffer_rgba())[..., :3].astype(int)
    for colour in plots.KINDS.values():
        near = np.abs(image - [int(colour[k : k + 2], 16) for k in (1, 3, 5)]).sum(2) < 30
        assert near[image.shape[0] // 4 :].sum() > 100  # the legend lies above
