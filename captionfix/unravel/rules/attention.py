"""Fused attention, expanded into the products and the softmax that it stands for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..registry import register_expansion
from ..trace import Operation


@register_expansion("scaled_dot_product_attention")
def scaled_dot_product_attention(
    op: Operation,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention weights are gates: evidence follows the values."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = query @ key.transpose(-2, -1) * (scale if scale is not None else 1 / math.sqrt(query.shape[-1]))
    if is_causal:
        rows, columns = scores.shape[-2:]
        scores = scores.masked_fill(
            ~torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril(), -math.inf
        )
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return torch.softmax(scores, -1) @ value
