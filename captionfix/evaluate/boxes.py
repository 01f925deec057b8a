"""Boxes out of maps, and how well they ground words: the map-to-box rule, IoU, and grounding's precision and recall.

Boxes are x0, y0, x1, y1 in any one unit; IoU does not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from . import needed
from .metrics import Map, Mean

Box = tuple[float, float, float, float]

THRESHOLD = 0.2
"""Of the map's maximum: the part of the map that its box encloses."""
HIT = 0.5
"""A box is right if its IoU is larger."""


def box_of(heatmap: Map, threshold: float = THRESHOLD) -> Box | None:
    """The map-to-box rule: of the pixels that hold at least ``threshold`` of the map's maximum, the box around the
    largest connected part (neighbours share a side; of equal parts the first in reading order).

    Zhou et al. 2016, "Learning deep features for discriminative localization", with their 20 %. One rule for all
    methods; `captionfix.Word.box` has a rule of its own, made for points.

    Returns:
        x0, y0, x1, y1 in pixels of the map, the far edges exclusive, or None for an empty map.
    """
    top = float(heatmap.max(initial=0.0))
    if not top > 0:
        return None
    labels, _ = needed("scipy.ndimage").label(heatmap >= threshold * top)
    largest = int(np.argmax(np.bincount(labels.ravel())[1:])) + 1
    rows, columns = np.nonzero(labels == largest)
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)


def iou(first: Box, second: Box) -> float:
    """Intersection over union, 0..1; NaN where both are empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [max(b[2] - b[0], 0.0) * max(b[3] - b[1], 0.0) for b in (first, second)]
    total = sum(areas) - shared
    return shared / total if total > 0 else math.nan


def best_iou(found: Box | None, boxes: Sequence[Box]) -> float:
    """IoU with the best of a phrase's boxes, 0..1; higher is better. NaN without a map's box or without any."""
    return max((iou(found, box) for box in boxes), default=math.nan) if found is not None else math.nan


def bounds(mask: NDArray[np.bool_]) -> Box | None:
    """The box around a mask's true pixels, in pixels, the far edges exclusive; None for an empty mask."""
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return None
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)


@dataclass(frozen=True)
class Mentions:
    """What a caption by a person mentions: (class, boxes) of each boxed word in order, and classes without a box."""

    boxed: tuple[tuple[str, tuple[Box, ...]], ...]
    unboxed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Event:
    """One decision of the grounding F1.

    Attributes:
        image: number of the image.
        side: precision asks about a word of the model's caption, recall about one of a person's.
        name: the word's class.
        hit: whether the box is right.
        located: false where there was nothing to compare with: a word that no reference has, or that was not said.
    """

    image: int
    side: Literal["precision", "recall"]
    name: str
    hit: bool
    located: bool


def ground(predicted: Sequence[tuple[str, Box | None]], references: Sequence[Mentions], image: int = 0) -> list[Event]:
    """The events of one image: what its caption's object words are worth against every reference caption.

    Zhou et al. 2019 (CVPR), "Grounded video description", its evaluation on Flickr30k Entities. A predicted word meets,
    in each reference, the first boxed word of its class; where the reference has the class without a box the word is
    passed over; where it lacks it, the word is a hallucination. A reference's boxed word meets the first predicted
    word of its class, or was missed. A predicted word without a box is a miss.
    """
    events = []
    first = dict(reversed(predicted))
    for reference in references:
        known = dict(reversed(reference.boxed))
        for name, box in predicted:
            if name in known:
                events.append(Event(image, "precision", name, _hit(box, known[name]), True))
            elif name not in reference.unboxed:
                events.append(Event(image, "precision", name, False, False))
        for name, boxes in reference.boxed:
            said = name in first
            events.append(Event(image, "recall", name, said and _hit(first[name], boxes), said))
    return events


def _hit(box: Box | None, boxes: Sequence[Box]) -> bool:
    return best_iou(box, boxes) > HIT  # NaN is no hit


def f1(events: Sequence[Event], mode: Literal["all", "loc"] = "all", seed: int = 0, draws: int = 1000) -> Mean:
    """Grounding F1, 0..1, with a 95 % bootstrap interval over images. Higher is better.

    Precision and recall are sums over classes of the class's mean of hits, divided by the number of classes in the
    references, so every class weighs the same; F1 = 2 P R / (P + R), and 0 where both are 0. ``all`` counts
    hallucinated and missed words as 0, ``loc`` leaves them out and so measures localisation alone. Its source says
    that averages over classes reward diverse captions.
    """
    if not any(event.side == "recall" for event in events):
        return Mean(math.nan, math.nan, math.nan, 0, len(events))
    classes = {name: i for i, name in enumerate(dict.fromkeys(event.name for event in events))}
    _, image = np.unique([event.image for event in events], return_inverse=True)
    name = np.array([classes[event.name] for event in events])
    hit = np.array([event.hit for event in events], dtype=np.float64)
    recall = np.array([event.side == "recall" for event in events])
    counted = np.array([event.located or mode == "all" for event in events])

    def value(times: NDArray[np.float64]) -> float:
        weight = times[image]
        here = int((np.bincount(name[recall], weights=weight[recall], minlength=len(classes)) > 0).sum())
        sides = []
        for side in (~recall, recall):
            chosen = side & counted
            total = np.bincount(name[chosen], weights=weight[chosen], minlength=len(classes))
            right = np.bincount(name[chosen], weights=(weight * hit)[chosen], minlength=len(classes))
            sides.append(float((right[total > 0] / total[total > 0]).sum()) / here if here else 0.0)
        return 2 * sides[0] * sides[1] / sum(sides) if sum(sides) > 0 else 0.0

    number = int(image.max()) + 1
    generator = np.random.default_rng(seed)
    drawn = [
        value(np.bincount(generator.integers(0, number, number), minlength=number).astype(float)) for _ in range(draws)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Mean(value(np.ones(number)), float(low), float(high), int(counted.sum()), int((~counted).sum()))
