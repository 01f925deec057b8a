"""Convolutions: which (channel, location) pairs of the window agree most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..dense import each
from ..policy import Policy, split
from ..registry import Link, register
from ..trace import Operation, Slot
from .common import chunks, concatenated, coordinates, ravel, sign


class Geometry(NamedTuple):
    """A convolution's or a pooling's window, one number a spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def window(where: Sequence[Tensor], extent: Sequence[int], geometry: Geometry) -> Tensor:
    """Which input positions each output position sees.

    Args:
        where: the output's spatial coordinates, one (D,) tensor a dimension.
        extent: the input's spatial size.

    Returns:
        (D, K) row-major numbers of input positions, K the window's size, -1 in the padding.
    """
    if {*geometry.kernel, *geometry.stride} == {1} and not any(geometry.padding):
        return ravel(where, extent)[:, None]
    result = inside = None
    for axis, (place, size) in enumerate(zip(where, extent, strict=True)):
        taps = torch.arange(geometry.kernel[axis], device=place.device) * geometry.dilation[axis]
        at = (place * geometry.stride[axis] - geometry.padding[axis])[:, None] + taps
        ok = (at >= 0) & (at < size)
        if result is None or inside is None:
            result, inside = at, ok
        else:
            result = (result[:, :, None] * size + at[:, None, :]).flatten(1)
            inside = (inside[:, :, None] & ok[:, None, :]).flatten(1)
    assert result is not None
    assert inside is not None
    return torch.where(inside, result, -1)


@register("conv1d", "conv2d", "conv3d", "convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
def convolution(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    slot, weight = op.args[0], op.args[1].read()
    out = op.outputs[output]
    assert out is not None
    unbatched = len(slot.shape) == weight.dim() - 1
    shape = (1, *slot.shape) if unbatched else slot.shape
    geometry, groups = _geometry(op, weight)
    if policy.plain and policy.convolutions is not None and kernels.usable(weight, direction):
        spatial = kernels.Window(out.shape[1 if unbatched else 2 :], shape[2:], *geometry, groups)
        x = slot.read().reshape(shape).flatten(2)
        found = kernels.contributors(x, weight.flatten(2), neurons, direction, spatial, policy.convolutions)
        return [Link(slot, *found)]
    channels = weight.shape[1]
    image, filters, *where = coordinates(neurons, (1, *out.shape) if unbatched else out.shape)
    positions = window(where, shape[2:], geometry)
    # the input with channels last and one row of zeros for the padding, so that a window is a few rows
    rows, weights = _rows(op, slot, shape), _taps(op, weight)
    area, group = (rows.shape[0] - 1) // shape[0], filters.div(weight.shape[0] // groups, rounding_mode="floor")
    row = torch.where(positions < 0, rows.shape[0] - 1, positions + image[:, None] * area)
    links, falling = [], bool((direction < 0).any())
    for part in chunks(len(neurons), positions.shape[1] * channels, neurons.device):
        if groups == 1:
            seen = rows[row[part]]
        else:
            column = group[part, None] * channels + torch.arange(channels, device=neurons.device)
            seen = rows[row[part, :, None], column[:, None, :]]
        contributions = weights[filters[part]].mul_(seen)
        if falling:
            contributions.mul_(direction[part, None, None])
        padding = positions[part] < 0
        if policy.opposed == "input":  # padding's zero is no input, even where it is the least opposed
            contributions = torch.where(padding[:, :, None], -torch.inf, contributions)
        column, share = _kept(contributions, policy, geometry)
        tap, channel = column.div(channels, rounding_mode="floor"), column.remainder(channels)
        chosen = seen.flatten(1).gather(1, column)
        index = ravel(
            [image[part, None], group[part, None] * channels + channel, positions[part].gather(1, tap).clamp_min(0)],
            (shape[0], shape[1], area),
        )
        if policy.winner and policy.location == "released":
            there = [w[part] * step for w, step in zip(where, geometry.stride, strict=True)]
            inside = torch.stack([at < size for at, size in zip(there, shape[2:], strict=True)]).all(0)[:, None]
            place = ravel(there, shape[2:])[:, None].where(inside, 0)
            index = index - index.remainder(area) + place
            chosen = slot.take(index)
            share = torch.where(inside, share, torch.zeros_like(share))
        towards = sign(chosen)
        if policy.opposed == "input":
            towards = direction[part, None] * sign(weights[filters[part]].flatten(1).gather(1, column))
        if (policy.location == "centre" or policy.opposed == "input") and policy.location != "released":
            # a window that reaches into the padding may have its centre there, or lie in it altogether
            share = torch.where(padding.gather(1, tap), torch.zeros_like(share), share)
        links.append(Link(slot, index, share, towards))
    return [concatenated(links)]


def _kept(contributions: Tensor, policy: Policy, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Columns (tap * channels + channel) kept of (D, taps, channels) contributions, and their shares."""
    if not policy.winner:
        return split(contributions.flatten(1), policy.convolutions, policy)
    # Algorithm 1: the channel with the largest summed contribution, then the location inside it
    taps, channels = contributions.shape[1:]
    summed = contributions if policy.opposed == "bias" else contributions.where(contributions > -torch.inf, 0)
    total, channel = summed.sum(1).max(1, keepdim=True)
    inside = contributions.gather(2, channel[:, None].expand(-1, taps, 1))[..., 0]
    best, tap = inside.max(1, keepdim=True)
    if policy.location != "location":
        middle = [k // 2 for k in geometry.kernel]
        centre = ravel([torch.tensor(m) for m in middle], geometry.kernel)
        tap, best = torch.full_like(tap, int(centre)), total
    agrees = best > 0 if policy.opposed == "bias" else torch.ones_like(best, dtype=torch.bool)
    return tap * channels + channel, agrees.to(contributions.dtype)


def _rows(op: Operation, slot: Slot, shape: Sequence[int]) -> Tensor:
    if "rows" not in op.memo:
        x = slot.read().reshape(shape).flatten(2).movedim(1, 2).reshape(-1, shape[1])
        op.memo["rows"] = torch.cat([x, x.new_zeros(1, x.shape[1])])
    rows: Tensor = op.memo["rows"]
    return rows


def _taps(op: Operation, weight: Tensor) -> Tensor:
    if "taps" not in op.memo:
        op.memo["taps"] = weight.flatten(2).movedim(1, 2).contiguous()
    taps: Tensor = op.memo["taps"]
    return taps


def _geometry(op: Operation, weight: Tensor) -> tuple[Geometry, int]:
    dimensions = weight.dim() - 2
    kernel = tuple(weight.shape[2:])
    if op.name == "mkldnn_convolution":
        padding, stride, dilation, groups = op.args[3:7]
    elif op.name == "cudnn_convolution":
        padding, stride, dilation, groups = op.args[2:6]
    else:
        stride, padding = op.argument(3, "stride", 1), op.argument(4, "padding", 0)
        dilation = op.argument(5, "dilation", 1)
        groups = op.argument(8 if op.name in ("convolution", "_convolution") else 6, "groups", 1)
    dilation = each(dilation, dimensions)
    if padding == "valid":
        padding = 0
    elif padding == "same":  # what is odd goes to the far side, so the near side has the smaller half
        padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    return Geometry(kernel, each(stride, dimensions), each(padding, dimensions), dilation), groups
