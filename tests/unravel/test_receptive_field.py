"""Invariant 3: a fixation lies inside the receptive field of the neuron that it came from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import FOLLOWED, LOCAL, cnn
from torch import nn

from captionfix.unravel import Trace, start, walk


def receptive_field(network: nn.Module, shape: torch.Size) -> torch.Tensor:
    """(neurons, pixels): which elements of a (1, C, H, W) input each output neuron sees. NaN is put in one
    element at a time; an output that then is NaN has seen it, whatever the values of weights and activations."""
    count = shape.numel()
    poisoned = torch.zeros(count, count, dtype=torch.float64)
    poisoned.fill_diagonal_(torch.nan)
    with torch.no_grad():
        return network(poisoned.view(count, *shape[1:])).isnan().flatten(1).T


@settings(settings.get_profile("engine"), max_examples=15)
@given(st.data())
def test_fixations_lie_in_the_receptive_field(data):
    def pick(options):
        return data.draw(st.sampled_from(options))

    torch.manual_seed(pick(range(1000)))
    network = cnn(pick, (pick([6, 7]), pick([6, 8])), LOCAL, depth=5).double()
    x = torch.randn(1, 3, *pick([(8, 7), (9, 9)]), dtype=torch.float64)
    inside = receptive_field(network, x.shape)
    check(network, x, inside)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 2, 3, padding=2, stride=2),
        nn.Conv2d(3, 3, 3, padding=1, groups=3),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        nn.Conv2d(3, 2, (2, 3), padding="same", bias=False),
        nn.Conv2d(3, 3, 2, dilation=3, padding=(3, 2)),
    ],
)
def test_all_negative_windows_never_send_evidence_into_the_padding(layer):
    """Nothing agrees, so that padding's zero is the least opposed contributor: it is no input."""
    layer = layer.double().eval()
    for parameter in layer.parameters():
        parameter.data.abs_()
    x = -torch.rand(1, 3, 5, 6, dtype=torch.float64) - 0.1
    check(layer, x, receptive_field(layer, x.shape))


def check(network, x, inside):
    with Trace(network) as trace:
        x = x.clone()
        image = trace.slot(trace.watch("image", x))
        at = trace.slot(network(x))
    neurons = torch.randperm(at.numel)[:24]
    for name, policy in FOLLOWED.items():
        for direction in (1.0, -1.0):
            found = walk(trace, [(at, start(at, neurons, direction))], policy).at(image)
            assert bool(inside[neurons[found.word], found.element].all()), name
