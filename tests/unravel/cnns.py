"""The CNNs that must unravel: families of torchvision's registry, transformers' and timm's, and how one is measured.

Weights are random (no downloads); batch normalisation takes its statistics from random pictures, and what starts at
zero or one (layer scales, gammas) is moved away, so that no branch is idle. ``benchmarks/architectures.py`` runs
whole registries, ``test_architectures.py`` one small member of each family.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from captionfix.unravel import Policy, Trace, start, walk


@dataclass(frozen=True)
class Family:
    """Architectures that share their operations.

    Attributes:
        pattern: full match of the registered names.
        small: the member that the tests run.
        size: height and width that it accepts: odd where it can be.
        options: for its constructor.
    """

    pattern: str
    small: str
    size: tuple[int, int] = (47, 53)
    options: dict[str, Any] = field(default_factory=dict)


TORCHVISION = (
    Family("alexnet", "alexnet", (65, 71)),
    Family(r"vgg\d+(_bn)?", "vgg11_bn", (33, 39), {"init_weights": False}),
    Family(r"resnet\d+", "resnet18"),
    Family(r"resnext\d+_.*", "resnext50_32x4d"),
    Family(r"wide_resnet.*", "wide_resnet50_2", (33, 35)),
    Family("inception_v3", "inception_v3", (77, 79), {"init_weights": False, "aux_logits": False}),
    Family("googlenet", "googlenet", (47, 53), {"init_weights": False, "aux_logits": False}),
    Family(r"densenet\d+", "densenet121", (37, 41)),
    Family(r"squeezenet.*", "squeezenet1_1"),
    Family(r"shufflenet_v2.*", "shufflenet_v2_x0_5"),
    Family("mobilenet_v2", "mobilenet_v2"),
    Family(r"mobilenet_v3.*", "mobilenet_v3_small"),
    Family(r"mnasnet.*", "mnasnet0_5"),
    Family(r"efficientnet_b\d", "efficientnet_b0"),
    Family(r"efficientnet_v2.*", "efficientnet_v2_s", (33, 37)),
    Family(r"regnet_x.*", "regnet_x_400mf"),
    Family(r"regnet_y.*", "regnet_y_400mf"),
    Family(r"convnext.*", "convnext_tiny"),
)
EXCLUDED = {
    r"vit_.*": "a transformer over patches: no feature map that convolutions lead to",
    r"swin_.*": "a transformer over windows of patches",
    r"maxvit_.*": "attention over blocks and grids makes up half of every stage",
}

TIMM = (
    "resnet10t",  # average pooling in the shortcut
    "resnetv2_50x1_bit",  # standardised weights, group norm, padded pooling
    "tf_efficientnet_b0",  # TensorFlow's padding
    "tf_efficientnet_cc_b0_4e",  # filters that depend on the picture
    "convnextv2_atto",  # global response norm
    "convnext_zepto_rms",  # a norm that is spelled out
    "eca_nfnet_l0",  # a gate by a one-dimensional convolution
)


def family(name: str) -> Family | None:
    """The family of torchvision's that a registered name belongs to."""
    return next((each for each in TORCHVISION if re.fullmatch(each.pattern, name)), None)


def excluded(name: str) -> str | None:
    """Why a registered name of torchvision's is left out, or None."""
    return next((why for pattern, why in EXCLUDED.items() if re.fullmatch(pattern, name)), None)


def torchvision_cnn(name: str, **options: Any) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, **options)


def timm_cnn(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **options)


def transformers_cnns(tiny: bool) -> dict[str, Callable[[], nn.Module]]:
    """transformers' CNNs from their configurations, as published or small."""
    import transformers as hf

    narrow = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]} if tiny else {}
    small = {"embedding_size": 8, **narrow} if tiny else {}
    groups = {"groups_width": 8} if tiny else {}
    thin = {"depth_multiplier": 0.25} if tiny else {}
    flat = {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320} if tiny else {}
    bit = {"embedding_size": 32, "hidden_sizes": [128, 128], "depths": [1, 1], "num_groups": 8} if tiny else {}
    basic: dict[str, Any] = {"layer_type": "basic", **small}
    classes = {"num_labels": 7 if tiny else 1000}
    made: dict[str, tuple[Any, Any]] = {
        "ResNet": (hf.ResNetForImageClassification, hf.ResNetConfig(**classes, **(basic if tiny else {}))),
        "RegNet": (hf.RegNetForImageClassification, hf.RegNetConfig(**classes, **small, **groups)),
        "ConvNext": (hf.ConvNextForImageClassification, hf.ConvNextConfig(**classes, **narrow)),
        "ConvNextV2": (hf.ConvNextV2ForImageClassification, hf.ConvNextV2Config(**classes, **narrow)),
        "MobileNetV1": (hf.MobileNetV1ForImageClassification, hf.MobileNetV1Config(**classes, **thin)),
        "MobileNetV2": (hf.MobileNetV2ForImageClassification, hf.MobileNetV2Config(**classes, **thin)),
        "EfficientNet": (hf.EfficientNetForImageClassification, hf.EfficientNetConfig(**classes, **flat)),
        "BiT": (hf.BitForImageClassification, hf.BitConfig(**classes, **bit)),
        "BiT, SAME": (hf.BitForImageClassification, hf.BitConfig(global_padding="SAME", **classes, **bit)),
    }
    return {name: lambda make=make, config=config: make(config) for name, (make, config) in made.items()}


def awake(model: nn.Module, size: tuple[int, int]) -> nn.Module:
    """The model in eval mode, no part of it idle."""
    model.train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2 or min(parameter.shape[:2]) == 1 or not bool(parameter.any()):
                parameter.add_(torch.randn_like(parameter) * 0.3)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = None  # the statistics of this batch alone
        model(torch.randn(2, 3, *size))
    return model.eval()


@dataclass(frozen=True)
class Measured:
    """What one model gave.

    Attributes:
        operations: the kinds of operation met between pixels and logits.
        equal: whether recording left the logits equal to the last bit.
        error: the worst distance of a class's mass from 1, over classes and policies.
        reached: the least part of a class's mass that ended in pixels.
        classify: seconds of one plain forward pass.
        unravel: seconds to record and unravel one class with the default policy.
    """

    operations: tuple[str, ...]
    equal: bool
    error: float
    reached: float
    classify: float
    unravel: float


@torch.inference_mode()
def measure(
    model: nn.Module, size: tuple[int, int], classes: int = 3, policies: tuple[str, ...] = ("default",)
) -> Measured:
    """Classifies a random picture and unravels its likeliest classes down to the pixels."""
    picture = torch.randn(1, 3, *size)

    def logits(x: Tensor) -> Tensor:
        out = model(x)
        return out.logits if hasattr(out, "logits") else out

    def timed(run: Callable[[], Any]) -> tuple[Any, float]:
        begin = time.perf_counter()
        result = run()
        return result, time.perf_counter() - begin

    def record() -> tuple[Trace, Any, Any]:
        with Trace(model) as trace:
            pixels = picture.clone()
            image = trace.slot(trace.watch("image", pixels))
            return trace, image, trace.slot(logits(pixels))

    plain = logits(picture)
    _, classify = timed(lambda: logits(picture))
    (trace, image, out), recorded = timed(record)
    best = plain.flatten().topk(classes).indices
    accounts = [walk(trace, [(out, start(out, best))], Policy.named(name), words=classes) for name in policies]
    _, walked = timed(lambda: walk(trace, [(out, start(out, best[:1]))], Policy.named(policies[0])))
    return Measured(
        operations=tuple(sorted({operation.name for operation in trace.operations})),
        equal=torch.equal(plain, out.read()),
        error=max(float((account.total() - 1).abs().max()) for account in accounts),
        reached=min(float(account.share(image).min()) for account in accounts),
        classify=classify,
        unravel=recorded + walked,
    )
