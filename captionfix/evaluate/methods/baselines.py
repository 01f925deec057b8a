"""What a method has to beat, and the weights that a model brings along."""

from __future__ import annotations

import torch
from torch import Tensor

from ...captioners.captioner import Captioner
from ...word_to_map import Caption, attention
from .cams import upsampled


def attention_weights(captioner: Captioner, pixels: Tensor, features: Tensor, caption: Caption) -> Tensor:
    """Xu et al. 2015: the model's own attention, bilinear on the input, nothing unraveled."""
    return upsampled(attention(captioner, features, caption), pixels)


def centre(captioner: Captioner, pixels: Tensor, features: Tensor, caption: Caption, *, sigma: float = 0.25) -> Tensor:
    """A Gaussian in the image's middle for every word, its deviation ``sigma`` times each side."""
    axes = [(torch.arange(n, device=pixels.device) + 0.5) / n - 0.5 for n in pixels.shape[2:]]
    y, x = (torch.exp(-(axis**2) / (2 * sigma**2)) for axis in axes)
    return (y[:, None] * x[None, :]).expand(len(caption.ids), -1, -1).contiguous()


def random(captioner: Captioner, pixels: Tensor, features: Tensor, caption: Caption, *, seed: int = 0) -> Tensor:
    """Independent numbers between 0 and 1."""
    drawn = torch.rand(len(caption.ids), *pixels.shape[2:], generator=torch.Generator().manual_seed(seed))
    return drawn.to(pixels.device)
