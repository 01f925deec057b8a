"""The second leg: from the feature map to the pixels."""

from __future__ import annotations

import pytest
import torch

import captionfix
from captionfix import PolicyError, map_to_pixels
from captionfix.scenes import scene
from captionfix.unravel import Policy


@pytest.fixture(scope="module")
def encoded():
    captioner = captionfix.load("scenes")
    pixels = torch.from_numpy(scene(3, split="test").image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    return map_to_pixels.encode(captioner, pixels)


@pytest.mark.parametrize("start", [1, 7, 40])
def test_a_word_starts_at_its_heaviest_neurons(encoded, start):
    """As if the evidence had only those, scaled so that the word keeps its mass."""
    shape = encoded.features.shape[1:]
    evidence = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)) * (encoded.features > 0)
    evidence /= evidence.flatten(1).sum(1).view(-1, 1, 1, 1)
    flat = evidence.flatten(1)
    threshold = flat.topk(start, 1).values[:, -1:]
    few = torch.where(flat >= threshold, flat, 0.0)
    few /= few.sum(1, keepdim=True)
    found, ended = map_to_pixels.pixels(encoded, evidence, Policy(start=start, full=64))
    expected, expected_ended = map_to_pixels.pixels(encoded, few.view_as(evidence), Policy(start=None, full=64))
    assert int((few > 0).sum()) == 3 * start
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum((1, 2)) + ended, torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(ended, expected_ended)
    everything, _ = map_to_pixels.pixels(encoded, evidence, Policy(start=None, full=64))
    assert float((everything - found).abs().max()) > 1e-4


@pytest.mark.parametrize("start", [0, -3, 2.5, True, "all"])
def test_a_start_that_is_no_number_is_refused(start):
    with pytest.raises(PolicyError, match="start"):
        Policy(start=start)
