"""Sums when everything is kept: the same redistribution computed for all neurons at once.

For a neuron ``z = sum_k w_k x_k`` with direction d, contributor k gets ``max(d w_k x_k, 0) / sum_j max(d w_j x_j, 0)`` of the mass. With
``x = x+ + x-`` and ``w = w+ + w-`` the agreeing contributions are linear in R / z+ (the rule z+ of deep Taylor decomposition;
excitation backprop's rule without its restriction to positive activations), so two passes of the operation and two of its transpose
do it for all neurons.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .evidence import Evidence
from .policy import Policy
from .trace import Operation, Slot, Value

DENSE = frozenset({"conv1d", "conv2d", "conv3d", "linear"})


def dense_links(
    operation: Operation, number: int, evidence: Evidence, words: int, policy: Policy, pending: dict[Value, list[Evidence]]
) -> Tensor:
    """Moves evidence on a linear operation's output to its input, everything kept.

    Args:
        evidence: on elements of the operation's output ``number``.
        pending: gets the evidence on the input.

    Returns:
        (words,) mass that moved; the rest found no agreement.
    """
    slot: Slot = operation.args[0]
    out = operation.outputs[number]
    assert out is not None
    x, weight = slot.read(), operation.args[1].read()
    run = _function(operation)
    moved = evidence.mass.new_zeros(words)
    for direction in (1.0, -1.0):
        mine = evidence.where(evidence.direction == direction)
        if not len(mine):
            continue
        # agreeing contributions: same signs for direction +1, opposite ones for -1
        pairs = [(x.clamp_min(0), (weight * direction).clamp_min(0), 1.0), (x.clamp_max(0), (weight * direction).clamp_max(0), -1.0)]
        if policy.mass == "set":  # all that agree count alike
            pairs = [(signal.ne(0).to(x.dtype), taps.ne(0).to(x.dtype), towards) for signal, taps, towards in pairs]
        total = torch.zeros(out.shape, dtype=x.dtype, device=x.device)
        for signal, taps, _ in pairs:
            total = total + run(signal, taps)
        total = total.reshape(-1)
        for word in torch.unique(mine.word).tolist():
            rows = mine.where(mine.word == word)
            mass = torch.zeros_like(total).index_add_(0, rows.element, rows.mass)
            ratio = torch.where(total > 0, mass / total.clamp_min(torch.finfo(total.dtype).tiny), torch.zeros_like(mass)).view(out.shape)
            for signal, taps, towards in pairs:
                back = (signal * _transpose(run, signal, taps, ratio)).reshape(-1)
                element = torch.nonzero(back > 0)[:, 0]
                if len(element):
                    part = back[element]
                    moved[word] += part.sum()
                    pending.setdefault(slot.value, []).append(
                        Evidence(torch.full_like(element, word), slot.cells(element), torch.full_like(part, towards), part))
    return moved


def _function(operation: Operation) -> Callable[[Tensor, Tensor], Tensor]:
    """The operation as a function of its signal and its weight, without bias."""
    if operation.name == "linear":
        return lambda x, weight: operation.func(x, weight)
    given = operation.args[3:]
    return lambda x, weight: operation.func(x, weight, None, *given, **{k: v for k, v in operation.kwargs.items() if k != "bias"})


def _transpose(run: Callable[[Tensor, Tensor], Tensor], signal: Tensor, weight: Tensor, ratio: Tensor) -> Tensor:
    """The operation's transpose, read off autograd: d<run(x), ratio>/dx."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = signal.clone().requires_grad_()
        (back,) = torch.autograd.grad(run(leaf, weight.clone()), leaf, ratio.clone())
    return back
