"""The same methods as captum and grad-cam ship them: one word after another, the whole captioner each time.

For what they cost; the maps are those of the best forms (grad-cam's are scaled to 0..1 besides).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...captioners.captioner import Captioner
from ...word_to_map import Caption
from .. import needed
from .autograd import differentiable, evidence, scores
from .perturbations import windows


class Whole(nn.Module):
    """A captioner with its caption, as these libraries want a model: (B, C, H, W) -> (B, n) scores."""

    def __init__(self, captioner: Captioner, caption: Caption) -> None:
        super().__init__()
        self.cnn = _Cnn(captioner)
        self.captioner, self.caption = captioner, caption

    def forward(self, pixels: Tensor) -> Tensor:
        return scores(self.captioner, self.cnn(pixels), self.caption)


class _Cnn(nn.Module):
    """The CNN as a layer, so that its output can be hooked whatever the captioner's own modules are."""

    def __init__(self, captioner: Captioner) -> None:
        super().__init__()
        self.captioner = captioner
        module = getattr(captioner, "model", None)
        if isinstance(module, nn.Module):
            self.model = module  # captum hooks its ReLUs

    def forward(self, pixels: Tensor) -> Tensor:
        return self.captioner.encode(pixels)


def _cam(name: str) -> Callable[[Captioner, Tensor, Tensor, Caption], Tensor]:
    def method(captioner: Captioner, pixels: Tensor, features: Tensor, caption: Caption) -> Tensor:
        library = needed("pytorch_grad_cam")
        model = Whole(captioner, caption).eval()
        maps = []
        with differentiable(captioner):
            image = pixels.detach().clone().requires_grad_()
            with getattr(library, name)(model=model, target_layers=[model.cnn]) as cam:
                for k in range(len(caption.ids)):
                    (one,) = cam(input_tensor=image, targets=[lambda output, k=k: output[k]])
                    maps.append(torch.from_numpy(one))
        return torch.stack(maps).to(pixels.device)

    return method


gradcam, hirescam, layercam = _cam("GradCAM"), _cam("HiResCAM"), _cam("LayerCAM")


def input_x_gradient(captioner: Captioner, pixels: Tensor, features: Tensor, caption: Caption) -> Tensor:
    """captum's InputXGradient."""
    return evidence(_each("InputXGradient", captioner, pixels, caption))


def integrated_gradients(
    captioner: Captioner, pixels: Tensor, features: Tensor, caption: Caption, *, steps: int = 50
) -> Tensor:
    """captum's IntegratedGradients; the line's points go through in batches of 8."""
    return evidence(_each("IntegratedGradients", captioner, pixels, caption, n_steps=steps, internal_batch_size=8))


def guided_backprop(captioner: Captioner, pixels: Tensor, features: Tensor, caption: Caption) -> Tensor:
    """captum's GuidedBackprop, which sees ``nn.ReLU`` alone."""
    return _each("GuidedBackprop", captioner, pixels, caption).abs().sum(1)


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
    """captum's NoiseTunnel over its Saliency; every word has noise of its own."""
    attr = needed("captum.attr")
    deviation = float(noise * (pixels.max() - pixels.min()))
    with torch.random.fork_rng(devices=[pixels.device] if pixels.is_cuda else []), differentiable(captioner):
        torch.manual_seed(seed)
        tunnel = attr.NoiseTunnel(attr.Saliency(Whole(captioner, caption).eval()))
        image = pixels.detach().clone()
        found = [
            tunnel.attribute(image, nt_samples=samples, nt_samples_batch_size=8, stdevs=deviation, target=k, abs=False)
            for k in range(len(caption.ids))
        ]
    return torch.cat(found).detach().abs().sum(1)


def occlusion(
    captioner: Captioner,
    pixels: Tensor,
    features: Tensor,
    caption: Caption,
    *,
    window: float = 1 / 7,
    stride: float = 1 / 14,
) -> Tensor:
    """captum's Occlusion."""
    channels, height, width = pixels.shape[1:]
    (rows, columns), *_ = windows(height, width, window, stride)
    step = [max(1, round(stride * side)) for side in (height, width)]
    with torch.no_grad():
        found = _each(
            "Occlusion",
            captioner,
            pixels,
            caption,
            sliding_window_shapes=(channels, rows.stop, columns.stop),
            strides=(channels, *step),
            perturbations_per_eval=16,
        )
    return found[:, 0].clamp_min(0)


def _each(name: str, captioner: Captioner, pixels: Tensor, caption: Caption, **options: Any) -> Tensor:
    method = getattr(needed("captum.attr"), name)
    with differentiable(captioner), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum says that it sets hooks, and gradients
        model = Whole(captioner, caption).eval()
        image = pixels.detach().clone()
        return torch.cat(
            [method(model).attribute(image, target=k, **options).detach() for k in range(len(caption.ids))]
        )
