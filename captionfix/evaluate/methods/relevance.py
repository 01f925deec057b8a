"""Layer-wise relevance propagation, epsilon-plus."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...captioners.captioner import Captioner
from ...errors import PolicyError
from ...word_to_map import Caption
from .. import needed
from .autograd import differentiable, evidence, feature_gradients
from .gradients import Replaced

EPSILON = 1e-6


def lrp(captioner: Captioner, pixels: Tensor, features: Tensor, caption: Caption) -> Tensor:
    """Bach et al. 2015, epsilon-plus: the z+ rule at convolutions, the epsilon rule at linear layers, by zennit.

    Relevance at the feature map is the feature times the score's gradient, which is what the epsilon rule comes to
    where layers are linear; no tool has other rules for an LSTM decoder at hand. From there zennit's rules lead to
    the pixels, with batch norms merged into the convolutions before them. Residual sums, which zennit knows as
    modules alone and would else count twice, share relevance in proportion to their summands. Summed over channels,
    negative parts cut.
    """
    with differentiable(captioner):
        relevance = features * feature_gradients(captioner, features, caption)[:, 0]
    return evidence(through_cnn(captioner, pixels, relevance))


def through_cnn(captioner: Captioner, pixels: Tensor, relevance: Tensor) -> Tensor:
    """(n, F, h, w) signed relevance at the feature map -> (n, C, H, W) at the pixels; the CNN runs forward once.

    Raises:
        PolicyError: zennit is not installed, or the captioner names no module for its rules.
    """
    composites, canonizers = needed("zennit.composites"), needed("zennit.canonizers")
    module = getattr(captioner, "model", None)
    if not isinstance(module, nn.Module):
        raise PolicyError(f"captioner {captioner.name!r} names no module (its `model`) to which LRP's rules could go")
    with differentiable(captioner):
        merge = canonizers.NamedMergeBatchNorm([((conv,), norm) for conv, norm in merged(captioner, module, pixels)])
        composite = composites.EpsilonPlus(epsilon=EPSILON, stabilizer=EPSILON, canonizers=[merge])
        with composite.context(module), Replaced(SHARED):
            image = pixels.detach().clone().requires_grad_()
            top = captioner.encode(image)
            return torch.cat([torch.autograd.grad(top, image, one[None], retain_graph=True)[0] for one in relevance])


def merged(captioner: Captioner, module: nn.Module, pixels: Tensor) -> list[tuple[str, str]]:
    """Names of each convolution and the batch norm that reads its output and nothing else does.

    zennit's own search takes modules in the order in which they were registered, which is not always the order in
    which they run.
    """
    made: list[tuple[str, Tensor]] = []
    calls: dict[str, int] = {}
    pairs: dict[str, str] = {}

    def seen(name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls[name] = calls.get(name, 0) + 1
        if isinstance(layer, nn.Conv2d):
            made.append((name, output))
        else:
            pairs.update({conv: name for conv, tensor in made if tensor is inputs[0]})

    def is_norm(layer: nn.Module) -> bool:
        return isinstance(layer, nn.BatchNorm2d) and layer.affine and layer.track_running_stats

    handles = [
        layer.register_forward_hook(lambda layer, inputs, output, name=name: seen(name, layer, inputs, output))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Conv2d) or is_norm(layer)
    ]
    try:
        with torch.no_grad():
            captioner.encode(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return [(conv, norm) for conv, norm in pairs.items() if calls[conv] == calls[norm] == 1]


def _sum(a: Any, b: Any = None, **options: Any) -> Tensor | None:
    both = isinstance(a, Tensor) and isinstance(b, Tensor) and a.requires_grad and b.requires_grad
    return _Shared.apply(a, b) if both and a.shape == b.shape and not options else None


# Sums of two signals share relevance in proportion to their summands.
SHARED = dict.fromkeys(("add", "__add__", "__iadd__", "__radd__"), _sum)


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a + b

    @staticmethod
    def backward(ctx: Any, *upper: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        total = a + b
        part = upper[0] / (total + EPSILON * torch.where(total < 0, -1.0, 1.0))
        return a * part, b * part
