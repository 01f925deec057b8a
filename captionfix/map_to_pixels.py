"""Second leg: evidence at the CNN's feature map, unraveled down to the pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .captioners.captioner import Captioner
from .unravel import Evidence, Policy, Slot, Trace, heaviest, walk

SPACING = 1 / 60
"""Part of either side of the input between fixations that lie evenly: less than two of a map's Gaussian."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """A recorded pass of the CNN over a batch of images.

    Attributes:
        features: (B, F, h, w), the feature map.
        trace: the pass.
        image: where the (B, C, H, W) input lies.
        at: where the feature map lies.
    """

    features: Tensor
    trace: Trace
    image: Slot
    at: Slot


def encode(captioner: Captioner, pixels: Tensor) -> Encoded:
    """Runs the CNN on (B, C, H, W) pixels and records it."""
    module = getattr(captioner, "model", None)
    with Trace(module if isinstance(module, torch.nn.Module) else None) as trace:
        pixels = pixels.clone()  # a storage of its own
        image = trace.slot(trace.watch("image", pixels))
        features = captioner.encode(pixels)
        at = trace.slot(features)
    return Encoded(features, trace, image, at)


@torch.inference_mode()
def channels(features: Tensor, maps: Tensor) -> Tensor:
    """Spreads evidence on cells over channels in proportion to positive activation (to its size, where a cell has no
    positive one).

    Args:
        features: (F, h, w) one image's feature map.
        maps: (n, h, w) evidence on cells.

    Returns:
        (n, F, h, w), each cell's channels summing to its evidence.
    """
    positive = features.clamp_min(0)
    share = torch.where(positive.sum(0) > 0, positive, features.abs())
    share = share / share.sum(0).clamp_min(torch.finfo(share.dtype).tiny)
    return maps[:, None] * share


@torch.inference_mode()
def pixels(encoded: Encoded, evidence: Tensor, policy: Policy, owner: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Unravels evidence at the feature map down to the pixels.

    Args:
        encoded: the recorded pass.
        evidence: (n, F, h, w) mass on the feature map's neurons; n words over all images of the batch.
        policy: what the engine keeps.
        owner: (n,) which image of the batch a word belongs to; None: the first.

    Returns:
        (n, H, W) mass on each pixel (summed over its channels), and (n,) the mass that ended in the CNN's biases.
    """
    count, neurons = len(evidence), evidence[0].numel()
    table = heaviest(evidence.flatten(1), policy.neurons)
    element = table.element if owner is None else table.element + owner[table.word] * neurons
    falling = encoded.features.reshape(-1)[element] < 0
    table = Evidence(table.word, element, torch.where(falling, -1.0, 1.0).to(table.mass.dtype), table.mass, True)
    account = walk(encoded.trace, [(encoded.at, table)], policy, words=count)
    found = account.at(encoded.image)
    height, width = encoded.image.shape[2:]
    area = height * width
    place = found.element.remainder(area)
    ended = account.rest([encoded.image]) + account.bias
    at = Evidence(found.word, place, found.direction, found.mass)
    result = at.dense(count, area).view(count, height, width)
    if policy.mass == "set":  # a set of pixels: all weigh the same
        total = result.flatten(1).sum(1)
        members = (result > 0).to(result.dtype)
        result = members * (total / members.flatten(1).sum(1).clamp_min(1)).view(-1, 1, 1)
    return result, ended


@torch.inference_mode()
def agreeing(
    mass: Tensor,
    place: Tensor,
    common: float = 0.0,
    even: float = 0.0,
    power: float = 1.0,
    trust: Tensor | None = None,
) -> Tensor:
    """Lets a fixation count by the evidence of the place where it lies.

    A cell of a deep feature map sees nearly the whole image, so its evidence may unravel to pixels far from it. What
    remains heavy is what the unraveling and the first leg agree on.

    Args:
        mass: (n, H, W) mass on pixels, of one caption's words.
        place: (n, h, w) evidence on the feature map's cells, taken bilinearly at the pixels.
        common: part of a word's fixations that are the caption's: the mean of those of all words with any. Unraveling
            finds what is seen at all better than it tells words apart (with every agreeing contribution followed, all
            starts end alike: Sixt, Granz, Landgraf 2020, "When explanations lie"), so the place decides more.
        even: part of its mass that is not followed further than its cells: before it counts by the place it lies evenly
            over the image, on a point every ``SPACING`` of either side.
        power: of the place's evidence.
        trust: (n,) in 0..1: by how much common, even and power - 1 are smaller for each word; None: 1.

    Returns:
        (n, 2, H, W): the fixations, and what lies evenly (n, 1, H, W without that); together a word has the mass that
        it had.
    """
    height, width = mass.shape[1:]
    at = torch.nonzero(mass.any(0).flatten())[:, 0]  # few pixels: what lies nowhere need not be weighed
    held = mass.flatten(1)[:, at]
    before = held.sum(1, keepdim=True)
    sure = 1.0 if trust is None else trust[:, None]
    if common:
        present = before[:, 0] > 0
        whole = (held[present] / before[present]).sum(0) / max(1, int(present.sum()))
        held = (1 - common * sure) * held + common * sure * before * whole
    parts = [(at, held)]
    if even:
        points = _lattice(height, width).to(mass.device)
        evenly = even * sure * before / len(points) * torch.ones_like(points)
        parts = [(at, (1 - even * sure) * held), (points, evenly)]
    weighed = [part * _taken(place, pixels, height, width) ** (1 + (power - 1) * sure) for pixels, part in parts]
    after = sum((part.sum(1, keepdim=True) for part in weighed), torch.zeros_like(before))
    scale = before / after.clamp_min(torch.finfo(mass.dtype).tiny)
    result = mass.new_zeros(len(mass), len(parts), height * width)
    for k, ((pixels, part), own) in enumerate(zip(parts, weighed, strict=True)):
        result[:, k, pixels] = torch.where(after > 0, own * scale, part)
    return result.unflatten(2, (height, width))


def _taken(place: Tensor, pixels: Tensor, height: int, width: int) -> Tensor:
    """(n, h, w) tables of cells, bilinearly at K pixels of a larger picture: (n, K)."""
    row, column = pixels.div(width, rounding_mode="floor"), pixels.remainder(width)
    kind = torch.promote_types(place.dtype, torch.float32)  # 16 bits are too few to say which pixel
    spot = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], 1).to(kind)
    found = torch.nn.functional.grid_sample(
        place[:, None].to(kind),
        spot.expand(len(place), 1, -1, -1),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return found[:, 0, 0].to(place.dtype)


def _lattice(height: int, width: int) -> Tensor:
    """Pixels of a picture that a map's Gaussian smooths to an even surface."""
    down, across = (max(1, round(SPACING * side)) for side in (height, width))
    rows, columns = torch.arange(down // 2, height, down), torch.arange(across // 2, width, across)
    return (rows[:, None] * width + columns).flatten()
