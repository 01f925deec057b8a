"""Invariant 4: the batch, the caption's length and other words change nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import FOLLOWED, WORDS, Captioning, captioner
from test_conservation import record

from captionfix.unravel import start, walk

POLICIES = [FOLLOWED[name] for name in ("default", "paper", "marginal", "small", "full", "opposed")]


def tables(network: Captioning, pixels, tokens, elements, policy):
    """(words, ...) mass at the image, the tokens and the feature map, and on the bias."""
    trace, image, words, at, logits = record(network, pixels, tokens)
    account = walk(trace, [(logits, start(logits, elements))], policy, cuts={"map": at})
    n = len(elements)
    cut = account.cuts.get("map")
    return (
        account.at(image).dense(n, image.numel).view(n, *image.shape),
        account.at(words).dense(n, words.numel).view(n, *words.shape),
        torch.zeros(n, *at.shape) if cut is None else cut.dense(n, at.numel).view(n, *at.shape),
        account.bias,
    )


def tied(network: Captioning, pixels, tokens) -> bool:
    """Whether a channel of the feature map holds one number twice, as after a pooling to more positions. Which of the
    two is the largest then depends on the last bit, and that on the size of the batch."""
    at = record(network, pixels, tokens)[3].read().flatten(2).sort(-1).values
    gaps, size = at.diff(dim=-1), at.abs().amax()
    return bool(((gaps <= 1e-9 * size) & (at[..., 1:].abs() > 1e-9 * size)).any())


@settings(settings.get_profile("engine"), max_examples=20)
@given(st.data())
def test_batch_length_and_other_words_change_nothing(data):
    network, pixels, tokens = captioner(lambda options: data.draw(st.sampled_from(options)))
    network.double()
    pixels = torch.randn(2, *pixels.shape[1:], dtype=torch.float64)
    tokens = torch.randint(WORDS, (2, 3))
    if getattr(network.decoder, "packed", False):
        network.decoder.packed = False
    assume(not tied(network, pixels, tokens))
    b, t, v = data.draw(st.sampled_from([(0, 0, 2), (0, 1, 5), (1, 1, 1), (1, 0, 6)]))
    others = [(i, j, k) for i in range(2) for j in range(3) for k in (0, 3)]
    for policy in POLICIES:
        # this word among others of both images, against the word alone in a batch of one with a shorter caption
        elements = [((i * 3) + j) * WORDS + k for i, j, k in [*others, (b, t, v)]]
        many = tables(network, pixels, tokens, elements, policy)
        one = tables(network, pixels[b : b + 1], tokens[b : b + 1, : t + 1], [t * WORDS + v], policy)
        tolerance = {"atol": 1e-9, "rtol": 1e-7}
        torch.testing.assert_close(many[0][-1, b], one[0][0, 0], **tolerance)
        torch.testing.assert_close(many[1][-1, b, : t + 1], one[1][0, 0], **tolerance)
        torch.testing.assert_close(many[2][-1, b].double(), one[2][0, 0].double(), **tolerance)
        torch.testing.assert_close(many[3][-1], one[3][0], **tolerance)
        # and nothing at all on the other image or on later words
        assert float(many[0][-1, 1 - b].abs().max()) == 0
        assert float(many[1][-1, 1 - b].abs().max()) == 0
        assert float(many[1][-1, b, t + 1 :].abs().sum()) == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_word_twice_has_the_same_evidence(policy):
    """Neurons that several words reach are looked up once; each word gets its own."""
    import random

    network, pixels, tokens = captioner(random.Random(3).choice)
    elements = [1, 1, 4, 1]
    mass, words, at_map, bias = tables(network, pixels, tokens, elements, policy)
    for table in (mass, words, at_map, bias):
        torch.testing.assert_close(table[0], table[1])
        torch.testing.assert_close(table[0], table[3])
