"""Every CNN unravels from a class's logit down to pixels: torchvision's whole registry by families, transformers' and
timm's."""

from __future__ import annotations

import pytest
import torch
import torchvision
from cnns import (
    TIMM,
    TORCHVISION,
    awake,
    excluded,
    family,
    measure,
    timm_cnn,
    torchvision_cnn,
    transformers_cnns,
)

HF = transformers_cnns(tiny=True)


def check(model: torch.nn.Module, size: tuple[int, int], policies: tuple[str, ...] = ("default", "paper")) -> None:
    found = measure(awake(model, size), size, policies=policies)
    assert found.equal
    assert found.error < 1e-4
    assert found.reached > 0.05


def test_every_registered_name_of_torchvision_belongs_to_one_family_or_is_excluded():
    names = torchvision.models.list_models(module=torchvision.models)
    assert len(names) >= 80
    unknown = [name for name in names if (family(name) is None) == (excluded(name) is None)]
    assert unknown == []
    assert all(each.small in names for each in TORCHVISION)


@pytest.mark.parametrize("each", TORCHVISION, ids=lambda each: each.small)
def test_torchvision(each):
    light = ("alexnet", "resnet18", "googlenet", "squeezenet1_1", "mobilenet_v2", "regnet_y_400mf")
    policies = ("default", "paper") if each.small in light else ("default",)
    check(torchvision_cnn(each.small, num_classes=7, **each.options), each.size, policies)


@pytest.mark.parametrize("name", HF)
def test_transformers(name):
    check(HF[name](), (47, 53))


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    pytest.importorskip("timm", reason="timm is not installed")
    check(timm_cnn(name, num_classes=7), (64, 64), ("default",))
