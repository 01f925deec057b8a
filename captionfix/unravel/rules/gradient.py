"""What is followed by explicit request where an operation has no rule: its local gradient times its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedOperation
from ..policy import Policy, split
from ..registry import Link
from ..trace import Operation, Slot
from .common import sign


def gradient(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    """One operation's neurons as if they were the sums ``sum_k dy/dx_k * x_k``: for a linear operation they are, and
    the rule is that of the sums. The derivative is taken of this operation alone, at its recorded inputs.

    Raises:
        UnsupportedOperation: PyTorch knows no derivative of the operation either.
    """
    slots = [s for s in dict.fromkeys(op.inputs()) if s.value.variable and s.read().is_floating_point()]
    slopes = _slopes(op, output, neurons, slots)
    values = torch.cat([slot.read().reshape(-1) for slot in slots]) if slots else direction.new_zeros(0)
    contributions = slopes * values * direction[:, None]
    column, share = split(contributions, policy.sums, policy)
    towards = sign(values)[column]
    if policy.opposed == "input":
        towards = direction[:, None] * sign(slopes.gather(1, column))
    links, first = [], 0
    for slot in slots:
        mine = (column >= first) & (column < first + slot.numel)
        links.append(
            Link(slot, torch.where(mine, column - first, 0), torch.where(mine, share, torch.zeros_like(share)), towards)
        )
        first += slot.numel
    return links


def _slopes(op: Operation, output: int, neurons: Tensor, slots: list[Slot]) -> Tensor:
    """(D, numbers of all slots): the derivative of each neuron."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = {slot: slot.read().clone().requires_grad_() for slot in slots}

        def argument(slot: Slot) -> Tensor:
            # the operation may write in place, which a leaf does not allow
            return leaves[slot].clone() if slot in leaves else slot.read().clone()

        try:
            result: Any = op.call(argument)
            result = result[output] if isinstance(result, (tuple, list)) else result
            flat = result.reshape(-1)
            rows = [
                torch.autograd.grad(flat[neuron], list(leaves.values()), retain_graph=True, allow_unused=True)
                for neuron in neurons.tolist()
            ]
        except (RuntimeError, NotImplementedError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UnsupportedOperation(
                f"no rule for {op}, and PyTorch has no derivative of it to fall back on ({reason}). Register a rule: "
                f"@captionfix.unravel.register({op.name!r})"
            ) from error
        return torch.stack(
            [
                torch.cat(
                    [
                        (leaf.new_zeros(leaf.numel()) if row is None else row.reshape(-1))
                        for row, leaf in zip(each, leaves.values(), strict=True)
                    ]
                )
                for each in rows
            ]
        ).detach()
