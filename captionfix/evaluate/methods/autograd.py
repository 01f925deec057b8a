"""What the gradient methods share: gradients of every word's score, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...captioners.captioner import Captioner
from ...errors import PolicyError
from ...word_to_map import Caption

BATCH = 8
"""Images that go through the CNN at once; it bounds the memory."""


@contextmanager
def differentiable(captioner: Captioner) -> Iterator[None]:
    """Autograd is on, and no weight takes part in it: nothing is left in any ``grad``."""
    module = getattr(captioner, "model", None)
    weights = [w for w in module.parameters() if w.requires_grad] if isinstance(module, nn.Module) else []
    for weight in weights:
        weight.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def scores(captioner: Captioner, features: Tensor, caption: Caption) -> Tensor:
    """(B, n): each word's score on each of (B, F, h, w) feature maps, with gradients."""
    tokens = caption.inputs(features.device).expand(len(features), -1)
    with torch.backends.cudnn.flags(enabled=False):  # cuDNN's LSTM has no backward pass in eval mode
        return caption.scores(captioner.decode(features, tokens))


def feature_gradients(captioner: Captioner, features: Tensor, caption: Caption) -> Tensor:
    """(n, B, F, h, w): every word's gradient at (B, F, h, w) feature maps, all in one pass and back.

    Raises:
        PolicyError: the captioner's decoder can't be differentiated.
    """
    count = len(caption.ids)
    copies = features.detach().clone().expand(count, *features.shape).flatten(0, 1).requires_grad_()
    own = scores(captioner, copies, caption).unflatten(0, (count, len(features))).diagonal(dim1=0, dim2=2)
    return _gradient(captioner, own.sum(), copies).unflatten(0, (count, len(features)))


def pixel_gradients(captioner: Captioner, pixels: Tensor, caption: Caption) -> Tensor:
    """(n, B, C, H, W): every word's gradient at (B, C, H, W) pixels.

    The CNN runs forward once, the decoder forward and back once, and the CNN back once a word.

    Raises:
        PolicyError: the captioner can't be differentiated.
    """
    parts = []
    for part in pixels.split(BATCH):
        image = part.detach().clone().requires_grad_()
        features = captioner.encode(image)
        upper = feature_gradients(captioner, features, caption)
        parts.append(torch.stack([_gradient(captioner, features, image, one) for one in upper]))
    return torch.cat(parts, 1)


def _gradient(captioner: Captioner, output: Tensor, source: Tensor, upper: Tensor | None = None) -> Tensor:
    if not output.requires_grad:
        raise PolicyError(
            f"captioner {captioner.name!r} can't be differentiated (it computes without gradients); use a method "
            "that needs none, such as 'default', 'removal', 'occlusion' or 'rise'"
        )
    return torch.autograd.grad(output, source, upper, retain_graph=True)[0]


def evidence(attribution: Tensor) -> Tensor:
    """(n, C, H, W) signed attributions -> (n, H, W): what speaks for the word, summed over channels."""
    return attribution.detach().sum(1).clamp_min(0)
