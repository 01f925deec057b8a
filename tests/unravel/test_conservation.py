"""Invariants 1 and 2: evidence is conserved, at the leaves and at any cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import FOLLOWED, captioner

from captionfix.unravel import Trace, start, walk

POLICY_NAMES = list(FOLLOWED)


def record(network, pixels, tokens):
    """A trace of a captioner, and where image, tokens, feature map and logits lie."""
    with Trace(network) as trace:
        pixels, tokens = pixels.clone(), tokens.clone()
        image, words = trace.slot(trace.watch("image", pixels)), trace.slot(trace.watch("tokens", tokens))
        features = network.encoder(pixels)
        at = trace.slot(features)
        logits = network.decoder(features, tokens)
    return trace, image, words, at, trace.slot(logits)


@settings(settings.get_profile("engine"), max_examples=30)
@given(st.data())
def test_evidence_is_conserved_at_the_leaves_and_at_the_feature_map(data):
    network, pixels, tokens = captioner(lambda options: data.draw(st.sampled_from(options)))
    trace, image, words, at, logits = record(network, pixels, tokens)
    scores = logits.read()
    # the likeliest word of every position, and one more, wanted lower
    best = scores.argmax(-1).flatten() + torch.arange(scores[..., 0].numel()) * scores.shape[-1]
    if (
        network.decoder.__class__.__name__ == "Sequence_" and network.decoder.packed
    ):  # padding after the end is a constant
        best = best[: scores.shape[1]]
    evidence = start(logits, best)
    evidence.direction[-1] = -1.0
    for name, policy in FOLLOWED.items():
        account = walk(trace, [(logits, evidence)], policy, cuts={"map": at})
        one = torch.ones(len(best))
        torch.testing.assert_close(account.total(), one, atol=1e-4, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
        assert bool((account.bias >= -1e-5).all())
        # everything lies on what was watched, on constants or on the bias
        known = account.share(image) + account.share(words) + account.rest([image, words]) + account.bias
        torch.testing.assert_close(known, one, atol=1e-4, rtol=0)
        if name not in ("default", "paper", "opposed"):
            continue
        stopped = walk(trace, [(logits, evidence)], policy, cuts={"map": at}, stop=True)
        reached = [
            a.cuts["map"].per_word(len(best)) if "map" in a.cuts else torch.zeros(len(best)) for a in (account, stopped)
        ]
        # at the cut plus what left before it
        torch.testing.assert_close(stopped.total() + reached[1], one, atol=1e-4, rtol=0)
        torch.testing.assert_close(reached[0], reached[1], atol=1e-6, rtol=1e-5)
        if "map" in account.cuts:
            dense = [a.cuts["map"].dense(len(best), at.numel) for a in (account, stopped)]
            torch.testing.assert_close(dense[0], dense[1], atol=1e-6, rtol=1e-5)
        assert len(stopped.at(image)) == 0 or at.value is image.value


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_evidence_within_every_layer_is_conserved(name):
    """A cut at every single operation of a chain holds all mass that has not left before."""
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(6, 4, 3),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 5),
    ).eval()
    with Trace(layers) as trace:
        image = trace.slot(trace.watch("image", torch.randn(1, 3, 8, 8)))
        target = trace.slot(layers(image.read()))
    evidence = start(target, [0, 1, 2])
    before = torch.ones(3)
    for operation in reversed(trace.operations[:-1]):
        cut = operation.outputs[0]
        account = walk(trace, [(target, evidence)], FOLLOWED[name], cuts={"cut": cut}, stop=True)
        torch.testing.assert_close(account.cuts["cut"].per_word(3) + account.bias, torch.ones(3), atol=1e-5, rtol=0)
        assert bool((account.cuts["cut"].per_word(3) <= before + 1e-5).all())  # nothing comes back
        before = account.cuts["cut"].per_word(3)
