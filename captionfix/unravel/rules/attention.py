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


@register_expansion("_native_multi_head_attention")
def native_multi_head_attention(
    op: Operation,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What nn.MultiheadAttention runs in eval mode where it may (its fast path)."""
    parts = zip((query, key, value), qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
    q, k, v = (
        torch.nn.functional.linear(x, weight, bias).unflatten(-1, (num_head, -1)).transpose(1, 2)
        for x, weight, bias in parts
    )
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]))
    if mask is not None:
        scores = _masked(scores, mask, mask_type)
    weights = torch.softmax(scores, -1)
    seen = (weights @ v).transpose(1, 2).flatten(-2)
    return torch.nn.functional.linear(seen, proj_weight, proj_bias), (
        weights.mean(1) if average_attn_weights else weights
    )


@register_expansion("_transformer_encoder_layer_fwd")
def transformer_encoder_layer(
    op: Operation,
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """What nn.TransformerEncoderLayer runs in eval mode where it may (its fast path)."""
    function = torch.nn.functional

    def attend(x: Tensor) -> Tensor:
        weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        return native_multi_head_attention(op, x, x, x, embed_dim, num_heads, *weights, mask=mask, mask_type=mask_type)[
            0
        ]

    def forward(x: Tensor) -> Tensor:
        inner = function.linear(x, ffn_weight_1, ffn_bias_1)
        return function.linear(function.gelu(inner) if use_gelu else function.relu(inner), ffn_weight_2, ffn_bias_2)

    first = (src.shape[-1:], norm_weight_1, norm_bias_1, eps)
    second = (src.shape[-1:], norm_weight_2, norm_bias_2, eps)
    if norm_first:
        x = src + attend(function.layer_norm(src, *first))
        return x + forward(function.layer_norm(x, *second))
    x = function.layer_norm(src + attend(src), *first)
    return function.layer_norm(x + forward(x), *second)


def _masked(scores: Tensor, mask: Tensor, mask_type: int | None) -> Tensor:
    """Scores (B, heads, L, L) without what is masked: true in ``mask``, which is (L, L) for type 0, (B, L) keys for
    type 1, and (B, heads, L, L) for type 2 (PyTorch's ``merge_masks``).
    """
    mask = mask if mask.dtype == torch.bool else mask < 0
    if mask_type == 1:
        mask = mask[:, None, None, :]
    return scores.masked_fill(mask, -math.inf)
