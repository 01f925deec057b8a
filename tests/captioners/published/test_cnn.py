"""The CNNs at their real sizes, against torchvision's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from networks_of_others import lively
from torch import nn
from torch.nn import functional as F

from captionfix.captioners.published.cnn import NAMED, NUMBERED, Unpadded, channels, depth, inception, resnet
from captionfix.captioners.published.weights import Weights

IMAGE = torch.rand(1, 3, 75, 83)


@pytest.mark.parametrize(
    ("name", "known"),
    [("resnet18", "ResNet-18"), ("resnet50", "ResNet-50"), ("resnext50_32x4d", "ResNet-50")],
)
@torch.no_grad()
def test_resnets(name, known):
    model = lively(torchvision.models.get_model(name, weights=None))
    trunk = nn.Sequential(*list(model.children())[:-2])
    expected = trunk(IMAGE)
    numbered = Weights(Path("f"), {f"resnet.{k}": v for k, v in trunk.state_dict().items()})
    found = resnet(numbered, "resnet.", NUMBERED).eval()
    assert torch.equal(found(IMAGE), expected)
    assert channels(found) == expected.shape[1]
    assert depth(numbered, "resnet.", NUMBERED) == known
    named = resnet(Weights(Path("f"), model.state_dict()), "", NAMED, caffe=True).eval()
    assert not torch.allclose(named(IMAGE), expected)  # the same tensors, another network


def test_deep_resnets_are_told_apart():
    for name in ("resnet34", "resnet101", "resnet152"):
        with torch.device("meta"):
            state = torchvision.models.get_model(name, weights=None).state_dict()
        assert depth(Weights(Path("f"), state), "", NAMED) == f"ResNet-{name[6:]}"


@torch.no_grad()
def test_inception():
    model = lively(torchvision.models.Inception3(aux_logits=False, init_weights=False, transform_input=True))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    expected = []
    model.Mixed_7c.register_forward_hook(lambda module, args, out: expected.append(out))
    model(IMAGE)
    found = inception(model.state_dict(), "f", transform_input=True).eval()
    assert torch.allclose(found(IMAGE), expected[0], rtol=1e-4, atol=1e-4)
    plain = inception(model.state_dict(), "f", transform_input=False).eval()
    assert not torch.allclose(plain(IMAGE), expected[0], rtol=1e-2, atol=1e-2)


def test_padding_does_not_count():
    x = torch.rand(2, 3, 5, 4)
    found = Unpadded()(F.avg_pool2d(x, 3, 1, 1))
    assert torch.allclose(found, F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), atol=1e-6)
