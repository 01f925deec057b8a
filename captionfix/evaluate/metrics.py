"""Metrics of grounding. Each takes maps and regions on the same grid of pixels, (H, W); a map is not negative.

Every function says its range and whether higher is better. A metric that is not defined (an empty map, an empty
region) is NaN, never a hit, and `mean` leaves it out and counts it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Map = NDArray[np.floating]
Region = NDArray[np.bool_]


def pointing(heatmap: Map, region: Region, tolerance: float = 0.0) -> float:
    """The pointing game: 1 if the map's maximum lies in the region, else 0. Higher is better.

    Zhang et al. 2018 (IJCV), "Top-down neural attention by excitation backprop". Of several equal maxima the first in
    reading order counts. ``tolerance``: a hit may lie this many pixels (strictly less) outside the region; TorchRay
    takes 15.
    """
    if not np.any(heatmap > 0) or not np.any(region):
        return math.nan
    row, column = np.unravel_index(int(np.argmax(heatmap)), heatmap.shape)
    if tolerance <= 0:
        return float(region[row, column])
    rows, columns = np.nonzero(region)
    return float(np.min((rows - row) ** 2 + (columns - column) ** 2) < tolerance**2)


def mass(heatmap: Map, region: Region) -> float:
    """Relevance mass accuracy: the part of the map's mass that lies in the region, 0..1. Higher is better.

    Arras, Osman, Samek 2022 (Information Fusion), "CLEVR-XAI".
    """
    total = float(heatmap.sum(dtype=np.float64))
    if total <= 0 or not np.any(region):
        return math.nan
    return float(heatmap[region].sum(dtype=np.float64)) / total


def rank(heatmap: Map, region: Region) -> float:
    """Relevance rank accuracy: of the map's K largest pixels, the part that lies in the region, where K is the
    region's size. 0..1, higher is better.

    Arras, Osman, Samek 2022, "CLEVR-XAI". Equal values are taken in reading order.
    """
    size = int(region.sum())
    if not np.any(heatmap > 0) or not size:
        return math.nan
    largest = np.argsort(-heatmap, axis=None, kind="stable")[:size]
    return float(region.ravel()[largest].mean())


def attention_correctness(maps: NDArray[np.floating], region: Region) -> float:
    """The mass of a word's map in its region; of a phrase, the largest over its words. 0..1, higher is better.

    Liu, Mao, Sha, Yuille 2017 (AAAI), "Attention correctness in neural image captioning", made for attention weights.
    Unlike `mass` of a phrase's summed map it lets one good word speak for all.

    Args:
        maps: (words, H, W) of the phrase.
        region: (H, W).
    """
    each = [value for value in (mass(one, region) for one in maps) if not math.isnan(value)]
    return max(each) if each else math.nan


def inside_outside(heatmap: Map, region: Region, most: float = 100.0) -> float:
    """The map's mean inside the region over its mean outside, 0..``most``; 1 is chance. Higher is better.

    Selvaraju et al. 2017, "Grad-CAM" (its section on dense captioning). A map without any mass outside would have an
    infinite ratio, which no mean survives, so ratios end at ``most``. Undefined where nothing is outside.
    """
    if not np.any(heatmap > 0) or not np.any(region) or np.all(region):
        return math.nan
    inside = float(heatmap[region].mean(dtype=np.float64))
    outside = float(heatmap[~region].mean(dtype=np.float64))
    return min(inside / outside, most) if outside > 0 else most


def overlap(first: Region, second: Region) -> float:
    """Intersection over the smaller of two regions, 0..1; NaN if one is empty."""
    smaller = min(int(first.sum()), int(second.sum()))
    return float((first & second).sum()) / smaller if smaller else math.nan


def discrimination(first: Map, second: Map, region_first: Region, region_second: Region) -> float:
    """Word discrimination of two phrases of one caption whose regions are disjoint: does each phrase's map hold more
    of its mass in its own region than the other's map does? The mean of the two comparisons, a tie being half.
    0, 0.5 or 1 and quarters; chance is 0.5. Higher is better.
    """
    own, other = _four_masses(first, second, region_first, region_second)
    if any(math.isnan(value) for value in own + other):
        return math.nan
    return float(np.mean([_won(a, b) for a, b in zip(own, other, strict=True)]))


def discrimination_joint(first: Map, second: Map, region_first: Region, region_second: Region) -> float:
    """Word discrimination with one comparison a pair: do the two maps hold more mass in their own regions, both
    counted together, than in each other's? 0, 0.5 (a tie) or 1; chance is 0.5. Higher is better.

    A pair of which one phrase wins clearly and the other loses narrowly counts in full here, and as half in
    `discrimination`.
    """
    own, other = _four_masses(first, second, region_first, region_second)
    if any(math.isnan(value) for value in own + other):
        return math.nan
    return _won(sum(own), sum(other))


def _four_masses(
    first: Map, second: Map, region_first: Region, region_second: Region
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Each map's mass in its own region; the other map's mass in the same region."""
    return (
        (mass(first, region_first), mass(second, region_second)),
        (mass(second, region_first), mass(first, region_second)),
    )


def _won(own: float, other: float) -> float:
    return 1.0 if own > other else 0.5 if own == other else 0.0


@dataclass(frozen=True)
class Mean:
    """A mean over images, with a 95 % bootstrap interval; ``count`` values of ``count + undefined``."""

    value: float
    low: float
    high: float
    count: int
    undefined: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] n={self.count}"


def mean(values: Sequence[float], images: Sequence[int] | None = None, seed: int = 0, draws: int = 1000) -> Mean:
    """The mean of what is defined, with an interval from resampling whole images.

    Args:
        values: one a word, phrase or pair; NaN where it is not defined.
        images: which image each belongs to (values of one image depend on each other); None: each its own.
    """
    table = np.asarray(values, dtype=np.float64)
    group = np.arange(len(table)) if images is None else np.asarray(images)
    defined = ~np.isnan(table)
    if not defined.any():
        return Mean(math.nan, math.nan, math.nan, 0, len(table))
    _, group = np.unique(group[defined], return_inverse=True)
    sums = np.bincount(group, weights=table[defined])
    counts = np.bincount(group)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (draws, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Mean(float(table[defined].mean()), float(low), float(high), int(defined.sum()), int((~defined).sum()))
