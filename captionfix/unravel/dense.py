"""Evidence when everything is kept: full tables instead of a sparse one, (words, cells of a storage) a direction.

The rules are the same; each is asked once for all neurons that hold anything, and its links move all words at once.
Convolutions and
fully connected layers are computed for all neurons together: for a neuron ``z = sum_k w_k x_k`` with direction d,
contributor k gets ``max(d w_k x_k, 0) / sum_j max(d w_j x_j, 0)`` of the mass. With ``x = x+ + x-`` and ``w = w+ +
w-`` the agreeing contributions are linear in R / z+ (the rule z+ of deep Taylor decomposition; excitation backprop's
rule without its restriction to positive activations), so a few passes of the operation and of its transpose do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv_transpose1d, conv_transpose2d, conv_transpose3d

from .evidence import Evidence, join
from .policy import Policy
from .registry import Link
from .trace import Operation, Slot, Value

_CONVOLUTIONS = {
    "conv1d": (1, conv_transpose1d),
    "conv2d": (2, conv_transpose2d),
    "conv3d": (3, conv_transpose3d),
}
DENSE = frozenset({*_CONVOLUTIONS, "linear"})
_NUMBERS = 1 << 24  # products held at once


class Field:
    """What all words hold of a tensor: (words, elements) mass of direction +1 and of direction -1, None where there is
    none at all. After a ReLU all directions are +1, so half of the work is to know that.
    """

    __slots__ = ("parts",)

    def __init__(self, up: Tensor | None = None, down: Tensor | None = None):
        self.parts = [up, down]

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        """(0, +1, mass) and (1, -1, mass) of the directions that there are."""
        for row, direction in ((0, 1), (1, -1)):
            mass = self.parts[row]
            if mass is not None:
                yield row, direction, mass

    def at(self, cells: Tensor) -> Field:
        """The same field of some elements."""
        return Field(*(None if mass is None else mass[:, cells] for mass in self.parts))


def move(operation: Operation, number: int, field: Field, policy: Policy) -> tuple[Slot, Field, Tensor]:
    """Moves evidence through a linear operation, everything kept.

    Args:
        operation: a convolution or a fully connected layer.
        number: which output the evidence is on.
        field: mass on the output's elements.
        policy: with ``mass="set"`` all that agree count alike.

    Returns:
        the input's slot, mass on its elements, and (words,) the mass that found no agreement.
    """
    slot: Slot = operation.args[0]
    out = operation.outputs[number]
    assert out is not None
    x, weight = slot.read(), operation.args[1].read()
    forward, transpose = _both_ways(operation, slot)
    signals = [(0, x.clamp_min(0))]
    if bool((x < 0).any()):
        signals.append((1, x.clamp_max(0)))
    wanted = {row ^ turned for row, _ in signals for turned, _, _ in field}
    taps = {sign: weight.clamp_max(0) if sign else weight.clamp_min(0) for sign in wanted}
    if policy.mass == "set":
        signals = [(row, signal.ne(0).to(x.dtype)) for row, signal in signals]
        taps = {sign: part.ne(0).to(x.dtype) for sign, part in taps.items()}
    gains, lost = Field(), None
    for turned, direction, mass in field:
        # contributions that agree: signs of signal and weight alike for direction +1, unlike for -1
        pairs = [(row, signal, taps[row ^ turned]) for row, signal in signals]
        total = sum((forward(signal, part).reshape(-1) for _, signal, part in pairs), x.new_zeros(out.numel))
        total *= 1 if policy.mass == "set" else direction
        agrees = total > 0
        ratio = torch.where(agrees, 1 / total.clamp_min(torch.finfo(total.dtype).tiny), 0)
        ratio = mass * (ratio if policy.mass == "set" else ratio * direction)
        ended = mass @ (~agrees).to(mass.dtype)
        lost = ended if lost is None else lost + ended
        for row, signal, part in pairs:
            back = transpose(ratio.view(-1, *out.shape), part).reshape(len(ratio), -1)
            back *= signal.reshape(-1)
            known = gains.parts[row]
            gains.parts[row] = back if known is None else known.add_(back)
    assert lost is not None
    return slot, gains, lost


def to_field(evidence: Evidence, words: int, elements: int) -> Field:
    """A field of ``elements`` from a table."""
    parts: list[Tensor | None] = []
    for chosen in (evidence.direction > 0, evidence.direction < 0):
        if not bool(chosen.any()):
            parts.append(None)
            continue
        part = evidence.where(chosen)
        parts.append(part.dense(words, elements))
    return Field(*parts)


def to_evidence(field: Field) -> Evidence:
    """The table of a field that is not empty, sorted by word."""
    tables = []
    for _, direction, mass in field:
        word, element = torch.nonzero(mass > 0, as_tuple=True)
        held = mass[word, element]
        tables.append(Evidence(word, element, torch.full_like(held, direction), held, True))
    if len(tables) == 1:
        return tables[0]
    both = join(tables)
    order = torch.argsort(both.word, stable=True)
    return Evidence(both.word[order], both.element[order], both.direction[order], both.mass[order], True)


class Fields:
    """Evidence that waits on values, as full tables over the values' cells."""

    def __init__(self, words: int, reference: Tensor):
        self.words, self.reference = words, reference
        self.waiting: dict[Value, Field] = {}

    def target(self, slot: Slot, row: int) -> Tensor:
        """The (words, cells) mass of one direction on a slot's value, made where there is none."""
        field = self.waiting.setdefault(slot.value, Field())
        mass = field.parts[row]
        if mass is None:
            mass = field.parts[row] = self.reference.new_zeros(self.words, slot.value.cells)
        return mass

    def add(self, slot: Slot, row: int, mass: Tensor) -> None:
        """Adds (words, elements) of one direction to a slot's elements; the tensor is the field's from then on."""
        if not slot.covers():
            cells = slot.cells(torch.arange(slot.numel, device=mass.device))
            self.target(slot, row).index_add_(1, cells, mass)
            return
        parts = self.waiting.setdefault(slot.value, Field()).parts
        known = parts[row]
        parts[row] = mass if known is None else known.add_(mass)

    def add_field(self, slot: Slot, field: Field) -> None:
        for row, _, mass in field:
            self.add(slot, row, mass)

    def follow(self, links: Sequence[Link], mass: Tensor, neurons: Tensor) -> Tensor:
        """Moves (words, neurons) mass along a rule's links; (words,) what stayed."""
        kept = mass.new_zeros(len(neurons))
        for slot, index, share, direction in links:
            kept += share.sum(1)
            if index.data_ptr() == neurons.data_ptr() and index.shape[1] == 1 and len(neurons) == slot.numel:
                # every element to the same one: nothing to look up
                up = direction[:, 0] > 0
                for row, which in ((0, up), (1, ~up)):
                    if bool(which.any()):
                        self.add(slot, row, mass * torch.where(which, share[:, 0], 0))
                continue
            width = index.shape[1]
            for first in range(0, len(neurons), step := max(1, _NUMBERS // max(1, self.words * width))):
                part = slice(first, first + step)
                cells = slot.cells(index[part]).reshape(-1)
                amount = (mass[:, part, None] * share[part]).flatten(1)
                up = (direction[part].expand(-1, width) > 0).reshape(-1)
                for row, which in ((0, up), (1, ~up)):
                    if bool(which.all()):
                        self.target(slot, row).index_add_(1, cells, amount)
                    elif bool(which.any()):
                        self.target(slot, row).index_add_(1, cells[which], amount[:, which])
        return mass @ (1 - kept).clamp_min(0)


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

    one = all(extent == 1 for extent in operation.args[1].shape[2:]) and padding in ((0,) * dimensions, "valid")

    def transpose(ratio: Tensor, weight: Tensor) -> Tensor:
        if one and groups == 1:  # of the channels at each position: a matrix product
            flat = ratio.flatten(-dimensions)
            product = torch.matmul(weight.flatten(1).t(), flat.reshape(-1, *flat.shape[-2:]))
            if stride == (1,) * dimensions:
                return product
            spread = product.new_zeros(*product.shape[:2], *slot.shape[-dimensions:])
            steps = tuple(slice(0, n * s, s) for n, s in zip(ratio.shape[-dimensions:], stride, strict=True))
            spread[(slice(None), slice(None), *steps)] = product.unflatten(2, ratio.shape[-dimensions:])
            return spread
        lead = ratio.shape[: ratio.dim() - dimensions - 1]  # words, and images where there is a batch
        size = (lead.numel(), *slot.shape[-dimensions - 1 :])
        grad = ratio.reshape(size[0], *ratio.shape[-dimensions - 1 :])
        if isinstance(padding, str):
            with torch.inference_mode(False), torch.enable_grad():
                leaf = torch.zeros(size, dtype=ratio.dtype, device=ratio.device, requires_grad=True)
                return torch.autograd.grad(forward(leaf, weight.clone()), leaf, grad.clone())[0]
        extent, kernel = size[-dimensions:], weight.shape[2:]
        beyond = [  # input that the last window does not reach, as the stride goes over it
            n - ((o - 1) * s - 2 * p + d * (k - 1) + 1)
            for n, o, s, p, d, k in zip(extent, grad.shape[2:], stride, padding, dilation, kernel, strict=True)
        ]
        result: Tensor = backward(grad, weight, None, stride, padding, beyond, groups, dilation)
        return result

    return forward, transpose
