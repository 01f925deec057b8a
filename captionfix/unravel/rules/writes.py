"""Writing by index. Where a write replaces, it is layout; where it adds, multiplies or compares, several numbers meet
in one place, and the rule is that of the sum, the product or the choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..policy import Policy, split
from ..registry import Link, register
from ..trace import Operation, Slot
from .common import sign
from .layout import moved


@register("scatter_add", "scatter_reduce", "index_add", "index_reduce", "scatter", "index_put", "_index_put_impl")
def written(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    how = _how(op)
    if how is None:
        return moved(op, output, neurons, direction, policy)
    own: Slot = op.args[0]
    source, place, number = _places(op, neurons.device)
    order = place.argsort(stable=True)
    place, number = place[order], number[order]
    first = torch.searchsorted(place, neurons)
    count = torch.searchsorted(place, neurons, right=True) - first
    steps = torch.arange(int(count.max()) if len(count) else 0, device=neurons.device)
    there = steps < count[:, None]
    at = (first[:, None] + steps).clamp(max=max(len(number) - 1, 0))
    index = torch.where(there, number[at] if len(number) else at, 0)
    # the place's own number first; where it does not count, as if it were not there
    kept = torch.ones_like(there[:, :1]) if op.argument(5, "include_self", True) else count[:, None] == 0
    there = torch.cat([kept, there], 1)
    constant = torch.tensor([not own.value.variable] + [not _variable(source)] * len(steps), device=neurons.device)
    values = torch.cat([own.take(neurons)[:, None], _take(source, index)], 1).to(direction.dtype)
    factor = torch.ones_like(values)
    factor[:, 1:] = op.argument(4, "alpha", 1) if op.name == "index_add" else 1
    share, towards = _shares(values * factor, there, constant, direction, how, policy)
    links = []
    if own.value.variable:
        links.append(Link(own, neurons[:, None], share[:, :1], towards[:, :1] * sign(factor[:, :1])))
    if _variable(source):
        links.append(Link(source, index, share[:, 1:], towards[:, 1:] * sign(factor[:, 1:])))
    return links


_HOW = {"add": "sum", "multiply": "prod", "mean": "sum", "sum": "sum", "prod": "prod", "amax": "amax", "amin": "amin"}


def _how(op: Operation) -> str | None:
    """What happens where several numbers meet: None where the last one stays."""
    if op.name in ("scatter_add", "index_add"):
        return "sum"
    if op.name in ("index_put", "_index_put_impl"):
        return "sum" if op.argument(3, "accumulate", False) else None
    given = op.argument(4, "reduce")
    return None if given is None else _HOW[given]


def _places(op: Operation, device: torch.device) -> tuple[Any, Tensor, Tensor]:
    """The source, and for each of its numbers that are written: where to (an element of the target), and its own
    element number.
    """
    own: Slot = op.args[0]
    numbers = torch.arange(own.numel, device=device).view(own.shape)
    if op.name in ("index_put", "_index_put_impl"):
        source: Any = op.args[2]
        place = numbers[tuple(slice(None) if i is None else i.read() for i in op.args[1])]
        return source, place.reshape(-1), _numbered(source, device).expand(place.shape).reshape(-1)
    axis, index, source = op.args[1], op.args[2].read(), op.argument(3, "source" if "index" in op.name else "src")
    if op.name.startswith("index"):
        return source, numbers.index_select(axis, index).reshape(-1), _numbered(source, device).reshape(-1)
    place = numbers.gather(axis, index)
    taken = _numbered(source, device)
    taken = taken[tuple(slice(extent) for extent in index.shape)] if taken.dim() else taken.expand(index.shape)
    return source, place.reshape(-1), taken.reshape(-1)


def _numbered(source: Any, device: torch.device) -> Tensor:
    if not isinstance(source, Slot):  # one number for all
        return torch.zeros((), dtype=torch.long, device=device)
    return torch.arange(source.numel, device=device).view(source.shape)


def _take(source: Any, index: Tensor) -> Tensor:
    return (
        source.take(index) if isinstance(source, Slot) else torch.full(index.shape, float(source), device=index.device)
    )


def _variable(source: Any) -> bool:
    return isinstance(source, Slot) and source.value.variable


def _shares(
    values: Tensor, there: Tensor, constant: Tensor, direction: Tensor, how: str, policy: Policy
) -> tuple[Tensor, Tensor]:
    """Of (D, K) numbers that met, those ``there``: which part of the mass each gets, and its direction. As in `add` and
    `product`, a ``constant`` (K,) is no contributor; but it may be what was chosen.
    """
    turned = direction[:, None].expand_as(values)
    if how in ("amax", "amin"):
        ranked = torch.where(there, values if how == "amax" else -values, -torch.inf)
        return torch.zeros_like(values).scatter_(1, ranked.argmax(1, keepdim=True), 1.0), turned
    if how == "prod":  # a relative change of any changes the product alike
        whole = torch.where(there, sign(values), 1).prod(1, keepdim=True)
        there = there & ~constant
        return there / there.sum(1, keepdim=True).clamp_min(1).to(values.dtype), turned * whole * sign(values)
    contributions = torch.where(there & ~constant, values * turned, 0 if policy.opposed == "bias" else -torch.inf)
    column, share = split(contributions, policy.sums, policy)
    towards = sign(values) if policy.opposed == "bias" else turned
    return torch.zeros_like(values).scatter_(1, column, share), towards
