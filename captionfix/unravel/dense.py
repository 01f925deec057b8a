"""Evidence when everything is kept: a full table instead of a sparse one, (2 directions, words, cells of a storage).

The rules are the same; each is asked once for all neurons that hold anything, and its links move all words at once.
Convolutions and
fully connected layers are computed for all neurons together: for a neuron ``z = sum_k w_k x_k`` with direction d,
contributor k gets ``max(d w_k x_k, 0) / sum_j max(d w_j x_j, 0)`` of the mass. With ``x = x+ + x-`` and ``w = w+ +
w-`` the agreeing contributions are linear in R / z+ (the rule z+ of deep Taylor decomposition; excitation backprop's
rule without its restriction to positive activations), so a few passes of the operation and of its transpose do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from .evidence import Evidence
from .policy import Policy
from .registry import Link
from .trace import Operation, Slot, Value

_CONVOLUTIONS = {
    "conv1d": (1, conv1d_input),
    "conv2d": (2, conv2d_input),
    "conv3d": (3, conv3d_input),
}
DENSE = frozenset({*_CONVOLUTIONS, "linear"})
_NUMBERS = 1 << 24  # products held at once


def move(operation: Operation, number: int, field: Tensor, policy: Policy) -> tuple[Slot, Tensor]:
    """Moves evidence through a linear operation, everything kept.

    Args:
        operation: a convolution or a fully connected layer.
        number: which output the evidence is on.
        field: (2, words, elements) mass on the output's elements; first direction +1, then -1.
        policy: with ``mass="set"`` all that agree count alike.

    Returns:
        the input's slot, and (2, words, elements) mass on its elements. What is missing found no agreement.
    """
    slot: Slot = operation.args[0]
    out = operation.outputs[number]
    assert out is not None
    x, weight = slot.read(), operation.args[1].read()
    forward, transpose = _both_ways(operation, slot)
    signals = [
        (towards, signal) for towards, signal in ((1, x.clamp_min(0)), (-1, x.clamp_max(0))) if bool(signal.any())
    ]
    gains = field.new_zeros(2, field.shape[1], slot.numel)
    for direction, mass in zip((1, -1), field, strict=True):
        if not bool(mass.any()):
            continue
        # contributions that agree: signs of signal and weight alike for direction +1, unlike for -1
        pairs = [
            (towards, signal, (weight * (direction * towards)).clamp_min(0) * towards) for towards, signal in signals
        ]
        if policy.mass == "set":
            pairs = [(towards, signal.ne(0).to(x.dtype), taps.ne(0).to(x.dtype)) for towards, signal, taps in pairs]
        total = sum((forward(signal, taps).reshape(-1) for _, signal, taps in pairs), x.new_zeros(out.numel))
        ratio = torch.where(total > 0, mass / total.clamp_min(torch.finfo(total.dtype).tiny), torch.zeros_like(mass))
        for towards, signal, taps in pairs:
            back = transpose(ratio.view(-1, *out.shape), taps).reshape(len(ratio), -1)
            gains[0 if towards > 0 else 1] += back * signal.reshape(-1)
    return slot, gains


def to_field(evidence: Evidence, words: int, elements: int) -> Tensor:
    """(2, words, elements) from a table."""
    field = evidence.mass.new_zeros(2 * words * elements)
    index = ((evidence.direction < 0).long() * words + evidence.word) * elements + evidence.element
    return field.index_add_(0, index, evidence.mass).view(2, words, elements)


def to_evidence(field: Tensor) -> Evidence:
    """The table of a (2, words, elements) field, sorted by word."""
    word, negative, element = torch.nonzero(field.transpose(0, 1) > 0, as_tuple=True)
    mass = field[negative, word, element]
    return Evidence(word, element, (1 - 2 * negative).to(mass.dtype), mass, True)


class Fields:
    """Evidence that waits on values, as full tables over the values' cells."""

    def __init__(self, words: int, reference: Tensor):
        self.words, self.reference = words, reference
        self.waiting: dict[Value, Tensor] = {}

    def at(self, slot: Slot) -> Tensor:
        """The table (2, words, cells) of a slot's value, made where there is none."""
        if slot.value not in self.waiting:
            cells = (
                slot.value.cells
                if slot.value.base is not None
                else 1
                + slot.offset
                + sum((extent - 1) * stride for extent, stride in zip(slot.shape, slot.stride, strict=True))
            )
            self.waiting[slot.value] = self.reference.new_zeros(2, self.words, cells)
        return self.waiting[slot.value]

    def add(self, slot: Slot, field: Tensor) -> None:
        """Adds (2, words, elements) to a slot's elements."""
        target = self.at(slot)
        if slot.is_plain() and slot.numel == target.shape[2]:
            target += field
        else:
            target.index_add_(2, slot.cells(torch.arange(slot.numel, device=field.device)), field)

    def follow(self, links: Sequence[Link], mass: Tensor, neurons: int) -> Tensor:
        """Moves (words, neurons) mass along a rule's links; what moved of each word."""
        moved = mass.new_zeros(self.words)
        for slot, index, share, direction in links:
            target = self.at(slot)
            width = index.shape[1]
            for first in range(0, neurons, step := max(1, _NUMBERS // max(1, self.words * width))):
                part = slice(first, first + step)
                cells = slot.cells(index[part]).reshape(-1)
                amount = (mass[:, part, None] * share[part]).flatten(1)
                moved += amount.sum(1)
                up = (direction[part].expand(-1, width) > 0).reshape(-1)
                for row, which in ((0, up), (1, ~up)):
                    if bool(which.all()):
                        target[row].index_add_(1, cells, amount)
                    elif bool(which.any()):
                        target[row].index_add_(1, cells[which], amount[:, which])
        return moved


def each(number: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """``3`` or ``[3]`` -> ``(3, 3)``."""
    numbers = (number,) if isinstance(number, int) else tuple(number)
    return numbers * dimensions if len(numbers) == 1 else numbers


def _both_ways(
    operation: Operation, slot: Slot
) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """The operation as a function of signal and weight, without bias; and its transpose for (words, *output)
    tensors.
    """
    if operation.name == "linear":
        return lambda x, weight: operation.func(x, weight), lambda ratio, weight: ratio @ weight
    dimensions, backward = _CONVOLUTIONS[operation.name]
    stride, dilation = (
        each(operation.argument(i, name, 1), dimensions) for i, name in ((3, "stride"), (5, "dilation"))
    )
    padding, groups = operation.argument(4, "padding", 0), operation.argument(6, "groups", 1)
    padding = padding if isinstance(padding, str) else each(padding, dimensions)

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = operation.func(x, weight, None, stride, padding, dilation, groups)
        return result

    def transpose(ratio: Tensor, weight: Tensor) -> Tensor:
        lead = ratio.shape[: ratio.dim() - dimensions - 1]  # words, and images where there is a batch
        size = (lead.numel(), *slot.shape[-dimensions - 1 :])
        grad = ratio.reshape(size[0], *ratio.shape[-dimensions - 1 :])
        if isinstance(padding, str):
            with torch.inference_mode(False), torch.enable_grad():
                leaf = torch.zeros(size, dtype=ratio.dtype, device=ratio.device, requires_grad=True)
                return torch.autograd.grad(forward(leaf, weight.clone()), leaf, grad.clone())[0]
        result: Tensor = backward(size, weight, grad, stride, padding, dilation, groups)
        return result

    return forward, transpose
