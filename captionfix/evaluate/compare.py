"""Ways to explain a caption, side by side: each image is encoded and decoded once, and every way's maps come from
that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .. import map_to_pixels, maps
from ..captioners.captioner import Captioner
from ..explain import METHODS, Leg
from ..unravel import Policy
from ..word_to_map import Caption, flow
from .data import Grounded
from .grounding import Score, centre, score

# name -> (first leg, policy)
WAYS: dict[str, tuple[str, str]] = {
    "default": ("joined", "default"),
    "removal": ("removal", "default"),
    "flow": ("flow", "default"),
    "attention": ("attention", "default"),
    "paper": ("flow", "paper"),
    "marginal": ("flow", "marginal"),
}
UPSAMPLED = "attention weights"
BASELINES = ("centre", "random")


@dataclass(frozen=True)
class Row:
    """Scores of one way on one image; ``specific`` says which kind of map they are of."""

    way: str
    specific: bool
    scores: list[Score]


def compare(
    captioner: Captioner, items: Iterable[Grounded], ways: Sequence[str], sigma: float | None = None
) -> Iterator[list[Row]]:
    """Scores of every way on every item, item by item.

    Args:
        captioner: what reads the items' captions, teacher-forced; words it does not know are fed as its unknown word.
        items: pictures with captions and regions.
        ways: of `WAYS`, `UPSAMPLED` (attention weights, bilinear, nothing unraveled) and `BASELINES`.
        sigma: of the maps' Gaussian, a fraction of the CNN's input; None for the default.
    """
    rng = np.random.default_rng(0)
    for number, item in enumerate(items):
        caption = Caption(captioner.vocabulary.start, _ids(captioner, item.words))
        prepared = captioner.prepare(item.image)
        encoded = map_to_pixels.encode(captioner, prepared.pixels[None].to(captioner.device))
        rows = []
        for way, raw in _maps(captioner, caption, encoded, ways, sigma, rng).items():
            kinds = [(False, raw)] if way in BASELINES else [(False, raw), (True, maps.specific(raw))]
            rows += [Row(way, specific, score(each, item.phrases, number)) for specific, each in kinds]
        yield rows


def _ids(captioner: Captioner, words: Sequence[str]) -> tuple[int, ...]:
    unknown = captioner.vocabulary.unknown
    ids = [captioner.vocabulary.id(word) for word in words[: captioner.max_words]]
    return tuple(i if i is not None else unknown if unknown is not None else captioner.vocabulary.end for i in ids)


def _maps(
    captioner: Captioner,
    caption: Caption,
    encoded: map_to_pixels.Encoded,
    ways: Sequence[str],
    sigma: float | None,
    rng: np.random.Generator,
) -> dict[str, NDArray[np.floating]]:
    """(words, H, W) maps of each way."""
    features, count = encoded.features, len(caption.ids)
    shape = (encoded.image.shape[2], encoded.image.shape[3])
    flows = {}
    legs: dict[str, list[tuple[str, Leg]]] = {}
    for way in ways:
        if way not in WAYS:
            continue
        method, policy = WAYS[way]
        if policy not in flows:
            flows[policy] = flow(captioner, features, caption, Policy.named(policy))
        with torch.inference_mode():
            legs.setdefault(policy, []).append((way, METHODS[method](captioner, features, caption, flows[policy])))
    result: dict[str, NDArray[np.floating]] = {}
    for policy, several in legs.items():
        mass, _ = map_to_pixels.pixels(encoded, torch.cat([leg.evidence for _, leg in several]), Policy.named(policy))
        for (way, leg), mine in zip(several, mass.split(count), strict=True):
            found = mine if leg.place is None else map_to_pixels.agreeing(mine, leg.place)
            result[way] = _smooth(found.cpu().numpy(), sigma)
    for way in ways:
        if way == UPSAMPLED:
            with torch.inference_mode():
                weights = captioner.attention(features, caption.inputs(features.device))
                if weights is not None:
                    up = torch.nn.functional.interpolate(weights, size=shape, mode="bilinear")[0]
                    result[way] = (up / up.sum((1, 2), keepdim=True)).cpu().numpy()
        elif way in BASELINES:
            result[way] = _BASELINES[way](count, shape, rng)
    return result


def _smooth(mass: NDArray[np.floating], sigma: float | None) -> NDArray[np.floating]:
    height, width = mass.shape[1:]
    grid, window = (width, height), (0.0, 0.0, float(width), float(height))
    rows, columns = np.mgrid[:height, :width]
    points = np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5], 1)
    each = []
    for one in mass:
        held = one.ravel() > 0
        each.append(maps.density(np.column_stack([points[held], one.ravel()[held]]), grid, window, grid, sigma))
    return np.stack(each)


def _centre(count: int, shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.floating]:
    return np.repeat(centre(shape, shape[0] / 4)[None], count, 0)


def _random(count: int, shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.floating]:
    return np.asarray(rng.random((count, *shape)))


_BASELINES: dict[str, Callable[[int, tuple[int, int], np.random.Generator], NDArray[np.floating]]] = {
    "centre": _centre,
    "random": _random,
}
