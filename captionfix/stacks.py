"""Inputs that are no pictures: sketches of one channel, stacked optical flow, what a sensor gives. How they are
recognised, checked and drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from captionfix.errors import ImageError


def channels_of(cnn: nn.Module) -> int | None:
    """How many channels a network's input has, by its first convolution; None where it has none."""
    for module in cnn.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return module.in_channels
    return None


def is_input(image: Any, channels: int | None) -> bool:
    """Whether an image is the network's own input: an array or tensor that can't be a picture (more than four channels,
    two channels, values outside 0..1), or that has as many channels as the network takes where those are not three.
    """
    if not isinstance(image, (np.ndarray, Tensor)):
        return False
    given = _channels(image)
    if given not in (1, 3, 4) or (channels not in (None, 3) and given == channels):
        return True
    values = torch.as_tensor(image)
    return values.is_floating_point() and not bool(((values >= -1e-6) & (values <= 1 + 1e-6)).all())


def as_input(image: Any, channels: int | None) -> Tensor:
    """(C, H, W) float32 from a tensor (C, H, W) or (H, W), or an array (H, W, C) or (H, W); also with a leading 1.

    Raises:
        ImageError: other shapes, other channels than the network's, values that are not finite or not floating point.
    """
    values = torch.as_tensor(image).detach().cpu()
    if values.dim() == 4 and len(values) == 1:
        values = values[0]
    if values.dim() == 2:
        values = values[None]
    elif isinstance(image, np.ndarray) and values.dim() == 3:
        values = values.permute(2, 0, 1)
    shape = tuple(torch.as_tensor(image).shape)
    if values.dim() != 3 or values.numel() == 0:
        raise ImageError(
            f"shape {shape} is no input: give a tensor (channels, height, width) or an array with channels last"
        )
    if channels is not None and len(values) != channels:
        raise ImageError(
            f"an input of shape {shape} has {len(values)} channels and the network takes {channels} "
            "(channels come first in tensors and last in arrays)"
        )
    if not values.is_floating_point():
        raise ImageError(
            f"the input's values are {values.dtype}: scale them as the network's training did and give floating point"
        )
    if not bool(torch.isfinite(values).all()):
        raise ImageError("the input has values that are not finite")
    return values.float().contiguous()


def rendered(pixels: Tensor) -> Image.Image:
    """A picture of (C, H, W) numbers: one channel in grey, three in colour, each stretched from its least to its
    greatest value; of other numbers of channels, how far they are from their medians (the root mean square over
    channels: for optical flow, how much moves).
    """
    values = pixels.double()
    if len(values) not in (1, 3):
        middle = values.flatten(1).median(1).values[:, None, None]
        values = (values - middle).square().mean(0, keepdim=True).sqrt()
        low, high = torch.zeros(()), values.flatten().quantile(0.99) if values.numel() < 1 << 24 else values.max()
    else:
        low, high = values.min(), values.max()
    scaled = ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    grey = (scaled * 255 + 0.5).to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(np.repeat(grey, 3, 2) if grey.shape[2] == 1 else np.ascontiguousarray(grey)).convert("RGB")


def _channels(image: np.ndarray[Any, Any] | Tensor) -> int | None:
    shape = tuple(image.shape)
    if len(shape) == 4 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) == 2:
        return 1
    return None if len(shape) != 3 else int(shape[0] if isinstance(image, Tensor) else shape[2])
