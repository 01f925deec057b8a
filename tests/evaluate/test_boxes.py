"""Boxes and the grounding F1 against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from captionfix.evaluate import boxes
from captionfix.evaluate.boxes import Event, Mentions

pytest.importorskip("scipy")
LEFT, RIGHT = (0.0, 0.0, 1.0, 2.0), (1.0, 0.0, 2.0, 2.0)


def test_box_of_is_around_the_largest_part_above_the_threshold():
    heatmap = np.zeros((8, 8))
    heatmap[1:3, 1:4] = 0.5
    heatmap[6, 6] = 1.0  # higher, but smaller
    heatmap[3, 4] = 0.5  # touches the part by a corner alone
    heatmap[0, :] = 0.19
    assert boxes.box_of(heatmap) == (1.0, 1.0, 4.0, 3.0)
    assert boxes.box_of(heatmap, threshold=0.6) == (6.0, 6.0, 7.0, 7.0)
    assert boxes.box_of(np.zeros((8, 8))) is None


@pytest.mark.parametrize(
    ("first", "second", "value"),
    [
        (LEFT, LEFT, 1.0),
        (LEFT, RIGHT, 0.0),
        (LEFT, (0.0, 0.0, 2.0, 2.0), 0.5),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
        ((0, 0, 1, 1), (5, 5, 6, 6), 0.0),
    ],
)
def test_iou(first, second, value):
    assert boxes.iou(first, second) == pytest.approx(value)
    assert boxes.iou(second, first) == pytest.approx(value)


def test_iou_of_nothing_is_undefined():
    assert math.isnan(boxes.iou((0, 0, 0, 0), (1, 1, 1, 1)))
    assert math.isnan(boxes.best_iou(None, [LEFT]))
    assert math.isnan(boxes.best_iou(LEFT, []))
    assert boxes.best_iou(LEFT, [RIGHT, LEFT]) == 1.0


def sides(events: list[Event]) -> list[tuple[str, str, bool, bool]]:
    return [(e.side, e.name, e.hit, e.located) for e in events]


def test_events_of_one_reference():
    reference = Mentions((("dog", (LEFT,)), ("ball", (RIGHT,)), ("dog", (RIGHT,))), frozenset({"grass"}))
    said = [("dog", LEFT), ("cat", LEFT), ("grass", LEFT), ("dog", RIGHT)]
    assert sides(boxes.ground(said, [reference])) == [
        ("precision", "dog", True, True),
        ("precision", "cat", False, False),  # a hallucination; grass is there without a box and is passed over
        ("precision", "dog", False, True),  # compared with the reference's first dog alone
        ("recall", "dog", True, True),
        ("recall", "ball", False, False),  # missed
        ("recall", "dog", False, True),  # the first dog said alone
    ]


def test_half_is_no_hit_and_no_box_is_a_miss():
    reference = Mentions((("dog", ((0.0, 0.0, 2.0, 2.0),)),))
    assert not any(e.hit for e in boxes.ground([("dog", LEFT)], [reference]))  # IoU 0.5 exactly
    assert sides(boxes.ground([("dog", None)], [reference])) == [
        ("precision", "dog", False, True),
        ("recall", "dog", False, True),
    ]


def test_f1_averages_over_classes():
    """Dog: precision 3 of 4 hits, recall 1 of 2; ball: never said; cat: a hallucination, no class of the references."""
    events = [Event(k, "precision", "dog", k < 3, True) for k in range(4)]
    events += [Event(0, "precision", "cat", False, False)]
    events += [Event(0, "recall", "dog", True, True), Event(1, "recall", "dog", False, True)]
    events += [Event(2, "recall", "ball", False, False)]
    precision, recall = 0.75 / 2, 0.5 / 2
    assert boxes.f1(events, "all").value == pytest.approx(2 * precision * recall / (precision + recall))
    assert boxes.f1(events, "loc").value == pytest.approx(2 * precision * recall / (precision + recall))
    missed = [*events, Event(3, "recall", "dog", False, False)]
    assert boxes.f1(missed, "all").value < boxes.f1(missed, "loc").value == pytest.approx(0.3)
    found = boxes.f1(events, "all")
    assert found.low <= found.value <= found.high


def test_f1_has_no_division_by_zero():
    nothing = [Event(0, "precision", "dog", False, True), Event(0, "recall", "dog", False, True)]
    assert boxes.f1(nothing).value == 0.0
    assert math.isnan(boxes.f1([]).value)
