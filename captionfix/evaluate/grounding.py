"""Scores the maps of a caption's words against the regions of its phrases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from . import metrics
from .data import Phrase

DISJOINT = 0.1  # two phrases count as a pair for word discrimination if intersection over the smaller is at most this


@dataclass(frozen=True)
class Score:
    """One value of one metric for one phrase (or pair of phrases) of one image."""

    image: int
    kind: str
    metric: str
    value: float


def score(maps: NDArray[np.floating], phrases: Sequence[Phrase], image: int) -> list[Score]:
    """Pointing and mass of every phrase, and discrimination of every pair of phrases with disjoint regions.

    Args:
        maps: (words, H, W), one map a word of the caption. A phrase's map is the sum of its words' normalised maps.
        phrases: with regions over the whole image, and the words they consist of.
        image: number of the image, for intervals over images.
    """
    total = maps.sum((1, 2), keepdims=True, dtype=np.float64)
    plain = np.divide(maps, total, out=np.zeros(maps.shape), where=total > 0)
    grid = (maps.shape[2], maps.shape[1])
    known = [p for p in phrases if max(p.words) < len(maps)]
    regions = [p.region(grid) for p in known]
    summed = [plain[list(p.words)].sum(0) for p in known]
    scores = []
    for phrase, region, heatmap in zip(known, regions, summed, strict=True):
        scores.append(Score(image, phrase.kind, "pointing", metrics.pointing(heatmap, region)))
        scores.append(Score(image, phrase.kind, "mass", metrics.mass(heatmap, region)))
    for a, b in combinations(range(len(known)), 2):
        if metrics.overlap(regions[a], regions[b]) <= DISJOINT:
            value = metrics.discrimination(summed[a], summed[b], regions[a], regions[b])
            scores.append(Score(image, "pair", "discrimination", value))
    return scores


def centre(shape: tuple[int, int], sigma: float) -> NDArray[np.float64]:
    """A Gaussian in the image's middle, (H, W): the baseline that needs no model."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    distance = (y - (shape[0] - 1) / 2) ** 2 + (x - (shape[1] - 1) / 2) ** 2
    return np.asarray(np.exp(-distance / (2 * sigma**2)))
