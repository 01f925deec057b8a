"""Pooling: a maximum is a choice, an average is a sum."""

from __future__ import annotations

import torch
from torch import Tensor

from ..policy import Policy
from ..registry import Link, register, register_tables
from ..trace import Operation, Slot
from .common import chunks, concatenated, coordinates, ravel, same
from .convolution import Geometry, each, window
from .sums import weighted


def _pooled(op: Operation, output: int, neurons: Tensor, kernel_at: int = 1) -> tuple[Slot, Tensor]:
    """The element numbers (D, K) that each pooled neuron saw, -1 in the padding."""
    slot, out = op.args[0], op.outputs[output]
    assert out is not None
    dimensions = int(next(c for c in op.name if c.isdigit()))
    kernel = each(op.argument(1, "kernel_size"), dimensions)
    stride = each(op.argument(2, "stride") or kernel, dimensions)
    padding = each(op.argument(3, "padding", 0), dimensions)
    dilation = each(op.argument(4, "dilation", 1), dimensions) if op.name.startswith("max") else (1,) * dimensions
    lead = len(slot.shape) - dimensions
    where = coordinates(neurons, out.shape)
    positions = window(where[lead:], slot.shape[lead:], Geometry(kernel, stride, padding, dilation))
    area = 1
    for extent in slot.shape[lead:]:
        area *= extent
    plane = ravel(where[:lead], slot.shape[:lead])[:, None]
    return slot, torch.where(positions < 0, -1, plane * area + positions)


@register(
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "max_pool1d_with_indices",
)
def max_pool(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    slot, index = _pooled(op, output, neurons)
    values = torch.where(index < 0, -torch.inf, slot.take(index.clamp_min(0)))
    return same(slot, index.gather(1, values.argmax(1, keepdim=True))[:, 0], direction)


@register("avg_pool1d", "avg_pool2d", "avg_pool3d")
def average_pool(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    slot, index = _pooled(op, output, neurons)
    return [weighted(slot, index, None, direction, policy.sums, policy)]


@register_tables("avg_pool2d")
def averaged(
    op: Operation, output: int, mass: Tensor, direction: int, policy: Policy
) -> list[tuple[Slot, int, Tensor]] | None:
    slot, out = op.args[0], op.outputs[output]
    assert out is not None
    if policy.sums is not None or policy.opposed == "input":
        return None
    agree = (slot.read() * direction).clamp_min(0)
    if policy.mass == "set":
        agree = agree.ne(0).to(agree.dtype)
    kernel = each(op.argument(1, "kernel_size"), 2)
    stride, padding = each(op.argument(2, "stride") or kernel, 2), each(op.argument(3, "padding", 0), 2)
    geometry = kernel, stride, padding, bool(op.argument(4, "ceil_mode", False)), True, 1  # divided by 1: plain sums
    total = torch.ops.aten.avg_pool2d(agree, *geometry).reshape(-1)
    ratio = torch.where(total > 0, mass / total, 0).view(-1, *out.shape[-3:])
    back = torch.ops.aten.avg_pool2d_backward(ratio, ratio.new_empty(len(ratio), *slot.shape[-3:]), *geometry)
    return [(slot, direction, back.reshape(len(mass), -1) * agree.reshape(-1))]


@register(
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"
)
def adaptive_average_pool(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    slot, index = _bins(op, output, neurons)
    return [
        concatenated(
            [
                weighted(slot, index[part], None, direction[part], policy.sums, policy)
                for part in chunks(len(neurons), index.shape[1], neurons.device)
            ]
        )
    ]


@register("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def adaptive_max_pool(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    slot, index = _bins(op, output, neurons)
    values = torch.where(index < 0, -torch.inf, slot.take(index.clamp_min(0)))
    return same(slot, index.gather(1, values.argmax(1, keepdim=True))[:, 0], direction)


def _bins(op: Operation, output: int, neurons: Tensor) -> tuple[Slot, Tensor]:
    """Adaptive pooling's bins: from floor(i * size / bins) to ceil((i + 1) * size / bins); they may overlap."""
    slot, out = op.args[0], op.outputs[output]
    assert out is not None
    dimensions = int(next(c for c in op.name if c.isdigit()))
    lead = len(slot.shape) - dimensions
    where = coordinates(neurons, out.shape)
    index = ravel(where[:lead], slot.shape[:lead])[:, None]
    for axis in range(lead, len(slot.shape)):
        size, bins = slot.shape[axis], out.shape[axis]
        first = (where[axis] * size).div(bins, rounding_mode="floor")
        past = ((where[axis] + 1) * size + bins - 1).div(bins, rounding_mode="floor")
        steps = torch.arange(int((past - first).max()), device=neurons.device)
        at = first[:, None] + steps
        at = torch.where(at < past[:, None], at, -1)
        known = (index[:, :, None] >= 0) & (at[:, None, :] >= 0)
        index = torch.where(known, index[:, :, None] * size + at[:, None, :], -1).flatten(1)
    return slot, index


@register("amax", "amin", "max", "min", "maximum", "minimum", "fmax", "fmin", "median")
def extreme(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    """The element that was chosen."""
    slot, out = op.args[0], op.outputs[output]
    assert out is not None
    second = op.argument(1, "other")
    if op.name in ("maximum", "minimum", "fmax", "fmin") or isinstance(second, Slot):
        return _of_two(op, out, neurons, direction)
    rank = len(slot.shape)
    axes = op.argument(1, "dim")
    axes = (
        list(range(rank))
        if axes is None or axes == []
        else [a % rank for a in ([axes] if isinstance(axes, int) else axes)]
    )
    kept = [i for i in range(rank) if i not in axes]
    values = slot.read().permute(*kept, *axes).reshape(-1, _product(slot.shape[a] for a in axes))
    numbers = (
        torch.arange(slot.numel, device=neurons.device).view(slot.shape).permute(*kept, *axes).reshape(values.shape)
    )
    if op.name == "median":
        best = values[neurons].median(1, keepdim=True).indices
    else:
        best = values[neurons].argmin(1, keepdim=True) if "min" in op.name else values[neurons].argmax(1, keepdim=True)
    return same(slot, numbers[neurons].gather(1, best)[:, 0], direction)


def _of_two(op: Operation, out: Slot, neurons: Tensor, direction: Tensor) -> list[Link]:
    from .common import broadcast

    a, b = op.args[0], op.argument(1, "other")
    elements = [broadcast(neurons, out.shape, s.shape) for s in (a, b)]
    first, second = a.take(elements[0]), b.take(elements[1])
    chose = first <= second if "min" in op.name else first >= second
    links = []
    for slot, element, mine in ((a, elements[0], chose), (b, elements[1], ~chose)):
        if slot.value.variable:
            links.append(Link(slot, element[:, None], mine.to(direction.dtype)[:, None], direction[:, None]))
    return links


def _product(numbers: object) -> int:
    result = 1
    for number in numbers:  # type: ignore[attr-defined]
        result *= number
    return result
