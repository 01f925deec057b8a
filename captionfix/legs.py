"""First legs by name, and how the two legs meet: what dependence on the feature map asks of the engine below it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import map_to_pixels
from .captioners.captioner import Captioner
from .unravel import Policy
from .word_to_map import (
    Caption,
    Fill,
    Flow,
    attention,
    believed,
    joined,
    multiscale,
    normalised,
    removal,
    removed,
)

ONCE = 4
"""How many words' neurons evidence of a whole caption may hold, where that is unraveled once."""


class Leg(NamedTuple):
    """What a first leg found.

    Attributes:
        evidence: (n, F, h, w) at the feature map's neurons, every word's sum 1 (or 0).
        place: (n, h, w), the evidence by which fixations count at their own place; None: they count as they are.
        common: part of a word's fixations that are the caption's (`map_to_pixels.agreeing`); where all are, they are
            unraveled once, from the mean of the words' evidence.
        even: part of a word's evidence that is not followed further than its cells.
        power: of the place's evidence.
        trust: (n,) how much of `place` tells the word from others; common, even and power - 1 are as much smaller.
            None: 1.
    """

    evidence: Tensor
    place: Tensor | None = None
    common: float = 0.0
    even: float = 0.0
    power: float = 1.0
    trust: Tensor | None = None

    @property
    def once(self) -> bool:
        """Whether all words share what is unraveled."""
        return self.place is not None and self.common == 1


def weighed(evidence: Tensor, place: Tensor, once: bool, policy: Policy, trust: Tensor | None = None) -> Leg:
    """A leg as the default weighs it.

    Args:
        evidence, place, trust: as `Leg`'s.
        once: whether all of the fixations are the caption's, or half of them.
        policy: what the engine will keep. Few neurons, without full tables, say less of single pixels: more of the
            evidence lies evenly then, and the place counts for more.
    """
    if policy.tables:
        even, power = 0.3, 1.5
    else:
        even, power = (0.8, 5.0) if once else (0.6, 2.5)
    return Leg(evidence, place, 1.0 if once else 0.5, even, power, trust)


def _by_join(
    captioner: Captioner, pixels: Tensor, features: Tensor, caption: Caption, found: Flow, policy: Policy
) -> Leg:
    if found.reads_the_mean:
        # the flow hands all words the same cells there, and so hardly tells their fixations apart (docs/method.md)
        place = removed(captioner, features, caption, found)
        return weighed(map_to_pixels.channels(features[0], place), place, True, policy)
    start, place, lost = joined(captioner, features, caption, found)
    share = believed(lost)[:, None, None, None]  # what is not removal's keeps the flow's own channels
    evidence = share * map_to_pixels.channels(features[0], start) + (1 - share) * normalised(found.features)
    return weighed(evidence, place, False, policy, believed(lost, found.image_effect))


def _by_scales(
    captioner: Captioner, pixels: Tensor, features: Tensor, caption: Caption, found: Flow, policy: Policy
) -> Leg:
    leg = _by_join(captioner, pixels, features, caption, found, policy)
    assert leg.place is not None
    fill: Fill = "mean" if leg.once else "zero"
    place = multiscale(captioner, pixels, leg.place, caption, fill, leg.trust)
    return leg._replace(place=place, even=0.9, power=2.25)


def _by_removal(
    captioner: Captioner, pixels: Tensor, features: Tensor, caption: Caption, found: Flow, policy: Policy
) -> Leg:
    return _by_cells(features, removal(captioner, features, caption))


def _by_flow(
    captioner: Captioner, pixels: Tensor, features: Tensor, caption: Caption, found: Flow, policy: Policy
) -> Leg:
    return Leg(normalised(found.features), normalised(found.features.sum(1)))


def _by_attention(
    captioner: Captioner, pixels: Tensor, features: Tensor, caption: Caption, found: Flow, policy: Policy
) -> Leg:
    return _by_cells(features, attention(captioner, features, caption))


def _by_cells(features: Tensor, maps: Tensor) -> Leg:
    place = normalised(maps)
    return Leg(map_to_pixels.channels(features[0], place), place)


METHODS: dict[str, Callable[[Captioner, Tensor, Tensor, Caption, Flow, Policy], Leg]] = {
    "joined": _by_join,
    "multiscale": _by_scales,
    "removal": _by_removal,
    "flow": _by_flow,
    "attention": _by_attention,
}


def followed(policy: Policy, legs: Sequence[Leg]) -> Policy:
    """What the engine keeps of these legs' evidence. Where all words share it, it is unraveled once for all of them,
    and there is room for more: the neurons of `ONCE` words."""
    if policy.mass == "set" or policy.neurons is None or not any(leg.once for leg in legs):
        return policy  # published sets stay every word's own
    return replace(policy, neurons=policy.neurons * ONCE)


def unraveled(
    encoded: map_to_pixels.Encoded, legs: Sequence[Leg], policy: Policy, images: Sequence[int] = (0,)
) -> list[Tensor]:
    """What first legs found, on the pixels: (n, 1 or 2, H, W) for each: fixations, and what lies evenly.

    Args:
        encoded: the recorded pass.
        legs: of a caption each.
        policy: what the engine keeps (`followed`).
        images: which image of the batch each is of.
    """
    if policy.mass == "set":  # as published: they stay as they are
        legs = [leg._replace(place=None) for leg in legs]
    once = [leg.once for leg in legs]
    present = [leg.evidence.flatten(1).sum(1) > 0 for leg in legs]
    rows = [
        leg.evidence.sum(0, keepdim=True) / known.sum().clamp_min(1) if alike else leg.evidence
        for leg, known, alike in zip(legs, present, once, strict=True)
    ]
    counts = [len(row) for row in rows]
    owner = torch.tensor([image for image, count in zip(images, counts, strict=True) for _ in range(count)])
    mass, _ = map_to_pixels.pixels(encoded, torch.cat(rows), policy, owner.to(encoded.features.device))
    return [
        part[:, None]
        if leg.place is None
        else map_to_pixels.agreeing(part * known[:, None, None], leg.place, leg.common, leg.even, leg.power, leg.trust)
        for part, leg, known in zip(mass.split(counts), legs, present, strict=True)
    ]
