"""Class activation maps with gradients, for words: one decoder pass and back for all words, from the feature map that
is there already; no pass through the CNN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...captioners.captioner import Captioner
from ...word_to_map import Caption
from .autograd import differentiable, feature_gradients


def gradcam(captioner: Captioner, pixels: Tensor, features: Tensor, caption: Caption) -> Tensor:
    """Selvaraju et al. 2017: ReLU(sum_c mean_xy(ds/dA_c) A_c) on the feature map A, bilinear on the input."""
    gradient = _gradients(captioner, features, caption)
    return upsampled((gradient.mean((2, 3), keepdim=True) * features).sum(1).clamp_min(0), pixels)


def hirescam(captioner: Captioner, pixels: Tensor, features: Tensor, caption: Caption) -> Tensor:
    """Draelos, Carin 2020: ReLU(sum_c ds/dA_c * A_c), bilinear on the input."""
    return upsampled((_gradients(captioner, features, caption) * features).sum(1).clamp_min(0), pixels)


def layercam(captioner: Captioner, pixels: Tensor, features: Tensor, caption: Caption) -> Tensor:
    """Jiang et al. 2021: ReLU(sum_c ReLU(ds/dA_c) * A_c), bilinear on the input."""
    return upsampled((_gradients(captioner, features, caption).clamp_min(0) * features).sum(1).clamp_min(0), pixels)


def upsampled(maps: Tensor, pixels: Tensor) -> Tensor:
    """(n, h, w) maps, bilinear on the input: (n, H, W)."""
    size = (pixels.shape[2], pixels.shape[3])
    return torch.nn.functional.interpolate(maps[:, None], size=size, mode="bilinear")[:, 0].clamp_min(0)


def _gradients(captioner: Captioner, features: Tensor, caption: Caption) -> Tensor:
    with differentiable(captioner):
        return feature_gradients(captioner, features, caption)[:, 0]
