"""Gradients at the pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...captioners.captioner import Captioner
from ...word_to_map import Caption
from .autograd import BATCH, differentiable, evidence, pixel_gradients


def input_x_gradient(captioner: Captioner, pixels: Tensor, features: Tensor, caption: Caption) -> Tensor:
    """Shrikumar et al. 2016: x * ds/dx, summed over channels, negative parts cut."""
    with differentiable(captioner):
        return evidence(pixels * pixel_gradients(captioner, pixels, caption)[:, 0])


def integrated_gradients(
    captioner: Captioner, pixels: Tensor, features: Tensor, caption: Caption, *, steps: int = 50
) -> Tensor:
    """Sundararajan, Taly, Yan 2017: x * the mean of ds/dx along the line from 0 (the CNN's mean colour) to x, by the
    Gauss-Legendre rule that captum uses; summed over channels, negative parts cut.
    """
    import numpy as np

    at, weight = np.polynomial.legendre.leggauss(steps)
    with differentiable(captioner):
        total = torch.zeros_like(pixels[0]).expand(len(caption.ids), -1, -1, -1).clone()
        for first in range(0, steps, BATCH):
            scale = torch.tensor((at[first : first + BATCH] + 1) / 2, dtype=pixels.dtype, device=pixels.device)
            share = torch.tensor(weight[first : first + BATCH] / 2, dtype=pixels.dtype, device=pixels.device)
            gradients = pixel_gradients(captioner, pixels * scale.view(-1, 1, 1, 1), caption)
            total += torch.einsum("nbchw,b->nchw", gradients, share)
        return evidence(pixels * total)


def smoothgrad(
    captioner: Captioner,
    pixels: Tensor,
    features: Tensor,
    caption: Caption,
    *,
    samples: int = 25,
    noise: float = 0.15,
    seed: int = 0,
) -> Tensor:
    """Smilkov et al. 2017: the mean gradient over noisy copies of the image, its size summed over channels.

    The noise is Gaussian, its deviation ``noise`` times the image's range; all words see the same copies.
    """
    noisy = pixels + noise * (pixels.max() - pixels.min()) * _normal((samples, *pixels.shape[1:]), seed, pixels)
    with differentiable(captioner):
        total = torch.zeros_like(pixels[0]).expand(len(caption.ids), -1, -1, -1).clone()
        for part in noisy.split(BATCH):
            total += pixel_gradients(captioner, part, caption).sum(1)
    return (total / samples).abs().sum(1)


def guided_backprop(captioner: Captioner, pixels: Tensor, features: Tensor, caption: Caption) -> Tensor:
    """Springenberg et al. 2015: the gradient, where every ReLU passes back only what is positive; its size summed over
    channels.

    captum and grad-cam guide ``nn.ReLU`` modules alone, so in a MobileNet (ReLU6) or with functional ReLUs they give
    the plain gradient; here every kind counts, wherever it is called.
    """
    with differentiable(captioner), Replaced(GUIDED):
        return pixel_gradients(captioner, pixels, caption)[:, 0].abs().sum(1)


class Replaced(TorchFunctionMode):
    """Runs other functions in the place of some, wherever they are called; in place where they were.

    Args:
        table: name -> function of the same arguments, which may return None to let the call be.
    """

    def __init__(self, table: Mapping[str, Callable[..., Tensor | None]]) -> None:
        super().__init__()
        self.table = table

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        written = name.endswith("_") and not name.endswith("__")
        other = self.table.get(name.rstrip("_") if written else name)
        if other is not None:
            inplace = written or kwargs.get("inplace") is True or any(a is True for a in args)
            options = {key: value for key, value in kwargs.items() if key != "inplace"}
            result = other(args[0].clone() if inplace else args[0], *args[1:], **options)
            if result is not None:
                return args[0].copy_(result) if inplace else result
        return func(*args, **kwargs)


def _relu(x: Tensor, *_: Any) -> Tensor | None:
    return _Guided.apply(x, 0.0, math.inf)


def _relu6(x: Tensor, *_: Any) -> Tensor | None:
    return _Guided.apply(x, 0.0, 6.0)


def _hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, *_: Any) -> Tensor | None:
    return _Guided.apply(x, 0.0, float(max_val)) if min_val == 0 else None  # a ReLU6 is one from 0 to 6


GUIDED = {"relu": _relu, "relu6": _relu6, "hardtanh": _hardtanh}


class _Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward((x > low) & (x < high))
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *upper: Tensor) -> tuple[Tensor, None, None]:
        (passes,) = ctx.saved_tensors
        return upper[0].clamp_min(0) * passes, None, None


def _normal(shape: tuple[int, ...], seed: int, like: Tensor) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(like.device, like.dtype)
