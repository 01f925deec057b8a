"""Sums: only contributions that agree with the direction carry evidence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import kernels
from ..policy import Policy, split
from ..registry import Link, register, register_tables
from ..trace import Operation, Slot
from .common import broadcast, chunks, concatenated, coordinates, ravel, same, sign
from .pointwise import is_gate


def weighted(
    slot: Slot, index: Tensor, weights: Tensor | None, direction: Tensor, keep: int | None, policy: Policy
) -> Link:
    """The rule of every sum ``sum_k weight_k * x_k``, for D neurons at once.

    Args:
        slot: where x lies.
        index: (D, K) element numbers of x, -1 where there is none (padding).
        weights: (D, K), or None for equal positive weights.
        direction: (D,) of the neurons.

    Returns:
        the link to the kept contributors. A contributor that agrees has the direction of its own sign: the word wants
        a positive one higher and a negative one lower, whatever its weight.
    """
    missing = index < 0
    x = torch.where(missing, 0, slot.take(index.clamp_min(0)))
    column, share, towards = _agreeing(x, weights, direction, keep, policy, missing)
    return Link(slot, index.gather(1, column).clamp_min(0), share, towards)


def _agreeing(
    x: Tensor, weights: Tensor | None, direction: Tensor, keep: int | None, policy: Policy, missing: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of the contributors kept of ``x`` (D, K), their shares and directions, each (D, k)."""
    contributions = (x if weights is None else x * weights) * direction[:, None]
    if policy.opposed == "bias":
        column, share = split(contributions, keep, policy)
        return column, share, sign(x.gather(1, column))
    if missing is not None:  # padding's zero is no input, even where it is the least opposed
        contributions = torch.where(missing, -torch.inf, contributions)
    column, share = split(contributions, keep, policy)
    if missing is not None:
        share = torch.where(missing.gather(1, column), torch.zeros_like(share), share)
    towards = direction[:, None] if weights is None else direction[:, None] * sign(weights.gather(1, column))
    return column, share, towards


@register("linear", "mm", "mv")
def linear(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    """A fully connected layer. Its weights are constants, also where they depend on the input themselves; if they
    alone do, evidence goes to them.
    """
    x, weight = op.args[0], op.argument(1, "weight")
    if weight.value.variable and op.name != "linear":
        return bilinear(op, output, neurons, direction, policy)
    if weight.value.variable and not x.value.variable:
        return _to_weights(x, weight, neurons, direction, policy)
    rows = weight.read() if op.name == "linear" else torch.atleast_2d(weight.read().t())
    keep = policy.linear_keeps(op)
    features = x.shape[-1]
    values = x.read().reshape(-1, features)
    if policy.plain and keep is not None and kernels.usable(values, direction):
        found = kernels.contributors(values[:, :, None], rows[:, :, None], neurons, direction, kernels.Window(), keep)
        return [Link(x, *found)]
    links = []
    for part in chunks(len(neurons), features, neurons.device):
        row, unit = neurons[part].div(len(rows), rounding_mode="floor"), neurons[part].remainder(len(rows))
        column, share, towards = _agreeing(values[row], rows[unit], direction[part], keep, policy, None)
        links.append(Link(x, row[:, None] * features + column, share, towards))
    return [concatenated(links)]


def _to_weights(x: Slot, weight: Slot, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    features = x.shape[-1]
    units = weight.numel // features
    row, unit = neurons.div(units, rounding_mode="floor"), neurons.remainder(units)
    steps = torch.arange(features, device=neurons.device)
    values = x.take(row[:, None] * features + steps)
    return [weighted(weight, unit[:, None] * features + steps, values, direction, policy.linear_kept, policy)]


@register("matmul", "bmm", "dot")
def bilinear(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    """A matrix product. A constant or a gate (softmax weights) is a weight; of two signals each gets half."""
    a, b = op.args[0], op.args[1]
    out = op.outputs[output]
    assert out is not None
    left = a.shape if len(a.shape) > 1 else (1, *a.shape)
    right = b.shape if len(b.shape) > 1 else (*b.shape, 1)
    batch = torch.broadcast_shapes(left[:-2], right[:-2])
    where = coordinates(neurons, (*batch, left[-2], right[-1]))
    k = torch.arange(left[-1], device=neurons.device)
    batch_number = ravel([*where[:-2]], batch) if batch else torch.zeros_like(neurons)
    base_a = broadcast(batch_number, batch, left[:-2]) * left[-2] + where[-2]
    base_b = broadcast(batch_number, batch, right[:-2]) * right[-2]
    index_a = base_a[:, None] * left[-1] + k
    index_b = (base_b[:, None] + k) * right[-1] + where[-1][:, None]
    values_a, values_b = a.take(index_a), b.take(index_b)
    variable_a = a.value.variable and not (b.value.variable and is_gate(a) and not is_gate(b))
    variable_b = b.value.variable and not (a.value.variable and is_gate(b) and not is_gate(a))
    links = []
    if variable_a:
        links.append(weighted(a, index_a, values_b, direction, policy.sums, policy))
    if variable_b:
        links.append(weighted(b, index_b, values_a, direction, policy.sums, policy))
    return [link._replace(share=link.share / len(links)) for link in links]


@register("add", "sub", "rsub")
def add(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    """Two terms; a term that depends on no input is the bias."""
    out = op.outputs[output]
    assert out is not None
    terms = _terms(op)
    elements = [broadcast(neurons, out.shape, slot.shape) for slot, _ in terms]
    if len(terms) == 1:
        slot, factor = terms[0]
        return same(slot, elements[0], direction if factor > 0 else -direction)
    taken = [slot.take(e) if f == 1 else slot.take(e) * f for (slot, f), e in zip(terms, elements, strict=True)]
    values = torch.stack(taken, 1)
    column, share = split(values * direction[:, None], policy.sums, policy)
    shares = torch.zeros_like(values).scatter_(1, column, share)
    return [
        Link(slot, e[:, None], shares[:, i : i + 1], (direction if f > 0 else -direction)[:, None])
        for i, ((slot, f), e) in enumerate(zip(terms, elements, strict=True))
    ]


def _terms(op: Operation) -> list[tuple[Slot, float]]:
    """Those that depend on an input, each with its factor."""
    alpha = op.kwargs.get("alpha", 1)
    factors = {"add": (1, alpha), "sub": (1, -alpha), "rsub": (-alpha, 1)}[op.name]
    return [
        (a, f)
        for a, f in zip((op.args[0], op.argument(1, "other")), factors, strict=True)
        if isinstance(a, Slot) and a.value.variable
    ]


@register_tables("add", "sub", "rsub")
def added(
    op: Operation, output: int, mass: Tensor, direction: int, policy: Policy
) -> list[tuple[Slot, int, Tensor]] | None:
    out, terms = op.outputs[output], _terms(op)
    assert out is not None
    if policy.sums == 1 or policy.opposed == "input" or any(slot.shape != out.shape for slot, _ in terms):
        return None
    towards = [direction if factor > 0 else -direction for _, factor in terms]
    if len(terms) == 1:
        return [(terms[0][0], towards[0], mass)]
    agree = [(slot.read().to(mass.dtype) * (factor * direction)).clamp_min(0).reshape(-1) for slot, factor in terms]
    if policy.mass == "set":
        agree = [part.ne(0).to(part.dtype) for part in agree]
    total = agree[0] + agree[1]
    whole = total.clamp_min(torch.finfo(total.dtype).tiny)
    return [(slot, to, mass * (part / whole)) for (slot, _), to, part in zip(terms, towards, agree, strict=True)]


@register("sum", "mean", "nansum")
def reduction(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    slot, axes = op.args[0], op.argument(1, "dim")
    parts = [
        weighted(slot, index, None, direction[part], policy.sums, policy)
        for part, index in along(slot.shape, axes, neurons)
    ]
    return [concatenated(parts)]


def along(shape: Sequence[int], axes: int | Sequence[int] | None, neurons: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """What each neuron of a reduction over ``axes`` (None or none: all) was reduced from: slices of the neurons, and
    their (D, K) element numbers.
    """
    rank = len(shape)
    if axes is None or axes == []:
        axes = range(rank)
    axes = sorted(a % rank for a in ([axes] if isinstance(axes, int) else axes))
    kept = [i for i in range(rank) if i not in axes]
    strides = [1] * rank
    for i in range(rank - 2, -1, -1):
        strides[i] = strides[i + 1] * shape[i + 1]
    base = torch.zeros_like(neurons)
    for i, where in zip(kept, coordinates(neurons, [shape[i] for i in kept]), strict=True):
        base = base + where * strides[i]
    inner = torch.zeros(1, dtype=torch.long, device=neurons.device)
    for i in axes:
        inner = (inner[:, None] + torch.arange(shape[i], device=neurons.device) * strides[i]).reshape(-1)
    for part in chunks(len(neurons), len(inner), neurons.device):
        yield part, base[part, None] + inner


@register("linalg_vector_norm", "norm", "frobenius_norm", "var", "std")
def size(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    """How large or how scattered numbers are: a sum of ``|x|^p``, or of squared distances from the mean. It grows with
    every term, so where it is wanted smaller nothing agrees.
    """
    slot = op.args[0]
    spread, power = op.name in ("var", "std"), 2.0
    if op.name in ("linalg_vector_norm", "norm"):
        given = op.argument(1, "ord" if op.name == "linalg_vector_norm" else "p", 2.0)
        power = 2.0 if given is None else float(given)
    axes = op.argument(2 if op.name in ("linalg_vector_norm", "norm") else 1, "dim")
    parts = []
    for part, index in along(slot.shape, None if isinstance(axes, bool) else axes, neurons):
        x = slot.take(index)
        x = x - x.mean(1, keepdim=True) if spread else x
        if math.isinf(power):  # the largest or the smallest alone
            best = x.abs().argmax(1) if power > 0 else x.abs().argmin(1)
            terms = torch.nn.functional.one_hot(best, x.shape[1]).to(x.dtype)
        else:
            terms = x.abs() ** power
        column, share = split(terms * direction[part, None], policy.sums, policy)
        parts.append(Link(slot, index.gather(1, column), share, direction[part, None] * sign(x.gather(1, column))))
    return [concatenated(parts)]


@register("cumsum")
def cumulative(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    slot, axis = op.args[0], op.argument(1, "dim") % len(op.args[0].shape)
    where = coordinates(neurons, slot.shape)
    steps = torch.arange(slot.shape[axis], device=neurons.device)
    index = ravel(
        [w[:, None] if i != axis else steps[None].expand(len(neurons), -1) for i, w in enumerate(where)], slot.shape
    )
    index = torch.where(steps[None] <= where[axis][:, None], index, -1)
    return [weighted(slot, index, None, direction, policy.sums, policy)]
