"""Recurrent cells: ``h = o * tanh(c)`` goes to c, ``c = f * c' + i * g`` is a sum of two terms, g is a sum over x and
h'. Gates are constants. Whole sequences (nn.LSTM, nn.GRU) are expanded into their cells."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedOperation
from .. import kernels
from ..policy import Policy, split
from ..registry import Link, register, register_equations, register_expansion
from ..trace import Operation, Slot
from .common import chunks, concatenated, sign


@register("lstm_cell", alike=True)
def lstm_cell(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    """Hochreiter and Schmidhuber's cell with a forget gate, PyTorch's order of gates: i, f, g, o."""
    x, (h, c) = op.args[0], op.args[1]
    weight_x, weight_h = op.args[2], op.args[3]
    hidden = h.shape[-1]
    gates = _preactivations(op, x, h)
    row, unit = neurons.div(hidden, rounding_mode="floor"), neurons.remainder(hidden)
    i, f, g = (gates[row, unit + hidden * n] for n in range(3))
    # h = o * tanh(c) follows c, o being positive; so both outputs are read at c
    before = torch.sigmoid(f) * c.take(neurons) * direction
    new = torch.sigmoid(i) * torch.tanh(g) * direction
    column, share = split(torch.stack([before, new], 1), policy.sums, policy)
    terms = torch.zeros_like(torch.stack([before, new], 1)).scatter_(1, column, share)
    links = [Link(c, neurons[:, None], terms[:, :1], direction[:, None])]
    return links + _inputs(
        x, h, weight_x.read(), weight_h.read(), row, unit + 2 * hidden, direction, terms[:, 1], policy
    )


@register_equations("lstm_cell")
def lstm_cell_equations(
    op: Operation,
    x: Tensor,
    state: list[Tensor],
    weight_x: Tensor,
    weight_h: Tensor,
    bias_x: Tensor | None = None,
    bias_h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`lstm_cell` spelled out; one matrix over input and state, since they are one sum."""
    h, c = state
    bias = None if bias_x is None or bias_h is None else bias_x + bias_h
    gates = torch.nn.functional.linear(torch.cat([x, h], 1), torch.cat([weight_x, weight_h], 1), bias)
    i, f, g, o = gates.chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


@register("gru_cell")
def gru_cell(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    """Cho et al.'s cell in PyTorch's form: ``n = tanh(W x + r * (U h + b))``, ``h = (1 - z) * n + z * h'``; order of
    gates r, z, n.
    """
    x, h, weight_x, weight_h = op.args[:4]
    hidden = h.shape[-1]
    bias_x, bias_h = op.argument(4, "b_ih"), op.argument(5, "b_hh")
    if "gates" not in op.memo:
        op.memo["gates"] = (
            torch.nn.functional.linear(x.read(), weight_x.read(), None if bias_x is None else bias_x.read()),
            torch.nn.functional.linear(h.read(), weight_h.read(), None if bias_h is None else bias_h.read()),
        )
    from_x, from_h = op.memo["gates"]
    row, unit = neurons.div(hidden, rounding_mode="floor"), neurons.remainder(hidden)
    r = torch.sigmoid(from_x[row, unit] + from_h[row, unit])
    z = torch.sigmoid(from_x[row, unit + hidden] + from_h[row, unit + hidden])
    n = torch.tanh(from_x[row, unit + 2 * hidden] + r * from_h[row, unit + 2 * hidden])
    both = torch.stack([z * h.take(neurons), (1 - z) * n], 1) * direction[:, None]
    column, share = split(both, policy.sums, policy)
    terms = torch.zeros_like(both).scatter_(1, column, share)
    links = [Link(h, neurons[:, None], terms[:, :1], direction[:, None])]
    return links + _inputs(
        x, h, weight_x.read(), weight_h.read(), row, unit + 2 * hidden, direction, terms[:, 1], policy, scale_h=r
    )


def _inputs(
    x: Slot,
    h: Slot,
    weight_x: Tensor,
    weight_h: Tensor,
    row: Tensor,
    unit: Tensor,
    direction: Tensor,
    mass: Tensor,
    policy: Policy,
    scale_h: Tensor | None = None,
) -> list[Link]:
    """One sum over the input and the hidden state, for the candidate's preactivation."""
    wide, tall = weight_x.shape[1], weight_h.shape[1]
    values_x, values_h = x.read().reshape(-1, wide), h.read().reshape(-1, tall)
    kept = policy.linear_kept
    if policy.plain and kept is not None and scale_h is None and kernels.usable(weight_x, direction):
        first, count = int(unit.min()), int(unit.max() - unit.min()) + 1
        weights = torch.cat([weight_x[first : first + count], weight_h[first : first + count]], 1)
        column, share, towards = kernels.contributors(
            torch.cat([values_x, values_h], 1)[:, :, None],
            weights[:, :, None],
            row * count + unit - first,
            direction,
            kernels.Window(),
            kept,
        )
        return _of_both(x, h, column.remainder(wide + tall), share * mass[:, None], towards, row, wide, tall)
    parts = []
    for part in chunks(len(row), wide + tall, row.device):
        seen = torch.cat([values_x[row[part]], values_h[row[part]]], 1)
        second = weight_h[unit[part]]
        weights = torch.cat([weight_x[unit[part]], second if scale_h is None else second * scale_h[part, None]], 1)
        column, share = split(seen * weights * direction[part, None], policy.linear_kept, policy)
        towards = sign(seen.gather(1, column))
        if policy.opposed == "input":
            towards = direction[part, None] * sign(weights.gather(1, column))
        parts.append(_of_both(x, h, column, share * mass[part, None], towards, row[part], wide, tall))
    return [concatenated([part[k] for part in parts]) for k in range(2)]


def _of_both(
    x: Slot, h: Slot, column: Tensor, share: Tensor, towards: Tensor, row: Tensor, wide: int, tall: int
) -> list[Link]:
    """Columns of input and hidden state side by side, as a link to each."""
    in_x = column < wide
    zero = torch.zeros_like(share)
    return [
        Link(x, row[:, None] * wide + torch.where(in_x, column, 0), torch.where(in_x, share, zero), towards),
        Link(h, row[:, None] * tall + torch.where(in_x, 0, column - wide), torch.where(in_x, zero, share), towards),
    ]


def _preactivations(op: Operation, x: Slot, h: Slot) -> Tensor:
    if "gates" not in op.memo:
        biases = [op.argument(n, name) for n, name in ((4, "b_ih"), (5, "b_hh"))]
        bias_x, bias_h = (None if b is None else b.read() for b in biases)
        op.memo["gates"] = torch.nn.functional.linear(x.read(), op.args[2].read(), bias_x) + torch.nn.functional.linear(
            h.read(), op.args[3].read(), bias_h
        )
    gates: Tensor = op.memo["gates"]
    return gates


def _run(cell: Any, steps: list[Tensor], state: Any, weights: list[Tensor]) -> tuple[list[Tensor], Any]:
    """One layer over its time steps. ``steps`` may get shorter batches (packed data): the states of sequences that
    have ended stay.
    """
    outputs = []
    for x in steps:
        live = len(x)
        h = state[0] if isinstance(state, tuple) else state
        if live == len(h):
            state = cell(x, state, *weights)
        elif isinstance(state, tuple):
            new = cell(x, tuple(s[:live] for s in state), *weights)
            state = tuple(torch.cat([n, s[live:]]) for n, s in zip(new, state, strict=True))
        else:
            state = torch.cat([cell(x, state[:live], *weights), state[live:]])
        outputs.append((state[0] if isinstance(state, tuple) else state)[:live])
    return outputs, state


def _stack(
    kind: str,
    steps: list[Tensor],
    states: list[Any],
    params: list[Tensor],
    has_biases: bool,
    layers: int,
    bidirectional: bool,
) -> tuple[list[Tensor], list[Any]]:
    if bidirectional:
        raise UnsupportedOperation(
            f"aten::{kind} is bidirectional: a caption's word would depend on the words after it, so there is no "
            "account word by word. Wrap a captioner whose decoder reads from left to right."
        )
    each = 4 if has_biases else 2
    if len(params) != each * layers:
        raise UnsupportedOperation(
            f"aten::{kind} with projections (proj_size) has no rule; register one with register_expansion"
        )
    final = []
    for layer in range(layers):
        cell = torch.lstm_cell if kind == "lstm" else torch.gru_cell
        steps, state = _run(cell, steps, states[layer], params[each * layer : each * (layer + 1)])
        final.append(state)
    return steps, final


@register_expansion("lstm.input", "gru.input")
def sequence(
    op: Operation,
    x: Tensor,
    hx: Any,
    params: list[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    steps = list(x.unbind(1 if batch_first else 0))
    states = list(zip(hx[0].unbind(0), hx[1].unbind(0), strict=True)) if op.name == "lstm" else list(hx.unbind(0))
    steps, final = _stack(op.name, steps, states, params, has_biases, layers, bidirectional)
    return torch.stack(steps, 1 if batch_first else 0), *_final(op.name, final)


@register_expansion("lstm.data", "gru.data")
def packed_sequence(
    op: Operation,
    data: Tensor,
    batch_sizes: Tensor,
    hx: Any,
    params: list[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    steps = list(data.split(batch_sizes.tolist()))
    states = list(zip(hx[0].unbind(0), hx[1].unbind(0), strict=True)) if op.name == "lstm" else list(hx.unbind(0))
    steps, final = _stack(op.name, steps, states, params, has_biases, layers, bidirectional)
    return torch.cat(steps), *_final(op.name, final)


def _final(kind: str, states: list[Any]) -> tuple[Tensor, ...]:
    if kind == "lstm":
        return torch.stack([h for h, _ in states]), torch.stack([c for _, c in states])
    return (torch.stack(states),)
