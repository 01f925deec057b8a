"""Operations that multiply and add in one, or multiply by a gate inside, spelled out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..registry import register_expansion
from ..trace import Operation


@register_expansion("addcmul")
def addcmul(op: Operation, own: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    return own + a * b * value


@register_expansion("addcdiv")
def addcdiv(op: Operation, own: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    return own + a * value / b


@register_expansion("lerp")
def lerp(op: Operation, own: Tensor, end: Tensor, weight: Tensor | float) -> Tensor:
    return own * (1 - weight) + end * weight


_PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "addmm": torch.mm,
    "addmv": torch.mv,
    "baddbmm": torch.bmm,
    "addr": torch.outer,
}


@register_expansion(*_PRODUCTS)
def added_product(op: Operation, own: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = _PRODUCTS[op.name](a, b)
    product = product if alpha == 1 else product * alpha
    if beta == 0:  # then PyTorch does not look at it either
        return product
    return (own if beta == 1 else own * beta) + product


@register_expansion("addbmm")
def addbmm(op: Operation, own: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = torch.bmm(a, b).sum(0) * alpha
    return product if beta == 0 else own * beta + product


@register_expansion("glu")
def glu(op: Operation, own: Tensor, dim: int = -1) -> Tensor:
    """Dauphin et al.'s gated linear unit: one half is the signal, the other its gate."""
    signal, gate = own.chunk(2, dim)
    return signal * torch.sigmoid(gate)
