"""Every way of letting an image into a decoder: wrapped as it is, and the engine's invariants hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import CELLS, FAMILIES, SIZE, WORDS, C, Sentinel
from PIL import Image

import captionfix
from captionfix import map_to_pixels
from captionfix.captioners.preprocess import Preprocess
from captionfix.unravel import Policy, Trace
from captionfix.word_to_map import Caption, flow, flows

CAPTION = "a red ball runs"
PREPROCESS = Preprocess((SIZE, SIZE))


def made(name):
    torch.manual_seed(3)
    family = FAMILIES[name]
    model = family.model(len(WORDS)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.mul_(1.5 if parameter.dim() > 1 else 1)
            if key.endswith("body.5.bias"):
                parameter.add_(0.2)  # no dead channels
    return model, captionfix.wrap(model, WORDS, PREPROCESS, **family.given(model))


@pytest.fixture(scope="module", params=FAMILIES)
def wrapped(request):
    """A family, its model, its captioner."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield FAMILIES[request.param], *made(request.param)
    torch.set_num_threads(threads)


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8))


def batch(captioner, count=3):
    return torch.stack([captioner.prepare(picture(seed)).pixels for seed in range(count)])


TOKENS = torch.tensor([[1, 4, 5, 6], [1, 6, 7, 8], [1, 9, 4, 10]])


def test_logits_are_the_authors(wrapped):
    family, model, captioner = wrapped
    pixels = batch(captioner)
    with torch.no_grad():
        torch.testing.assert_close(captioner.logits(pixels, TOKENS), family.plain(model, pixels, TOKENS))


def test_feature_map_and_first_word_are_found(wrapped):
    family, _, captioner = wrapped
    assert captioner.recognised.parts.name == family.feature_map
    assert captioner.recognised.parts.before or "." not in family.feature_map  # the CNN's layers do not run in decode
    assert captioner.recognised.first == family.first
    channels = 16 if family.feature_map == "to_model" else C
    assert captioner.encode(batch(captioner)).shape == (3, channels, CELLS, CELLS)


def test_one_image_gives_what_it_gives_in_a_batch(wrapped):
    _, _, captioner = wrapped
    pixels = batch(captioner)
    with torch.no_grad():
        together = captioner.logits(pixels, TOKENS)
        for k in range(3):
            alone = captioner.logits(pixels[k : k + 1], TOKENS[k : k + 1])
            torch.testing.assert_close(alone, together[k : k + 1], atol=1e-5, rtol=1e-4)
            shorter = captioner.logits(pixels[k : k + 1], TOKENS[k : k + 1, :1])
            torch.testing.assert_close(shorter, together[k : k + 1, :1], atol=1e-5, rtol=1e-4)


def test_the_flows_of_a_batch_are_those_of_its_captions(wrapped):
    _, _, captioner = wrapped
    captions = [Caption(1, ids) for ids in ((4, 5, 6), (6, 7), (9, 4, 10, 5))]
    with torch.no_grad():
        features = captioner.encode(batch(captioner))
    policy = Policy(
        sums=None, convolutions=None, neurons=100_000
    )  # everything is kept: nothing hangs on nearly equal sums
    together = flows(captioner, features, captions, policy)
    for k, (caption, found) in enumerate(zip(captions, together, strict=True)):
        alone = flow(captioner, features[k : k + 1], caption, policy)
        for one, other in zip(vars(alone).values(), vars(found).values(), strict=True):
            assert isinstance(one, bool) or one.shape == other.shape
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_recording_changes_nothing(wrapped):
    _, model, captioner = wrapped
    pixels = batch(captioner, 1)
    with torch.inference_mode():
        plain = captioner.logits(pixels, TOKENS[:1])
    with Trace(model) as trace:
        trace.watch("image", pixels)
        recorded = captioner.logits(pixels, TOKENS[:1])
    assert torch.equal(plain, recorded)


@pytest.mark.parametrize("method", ["flow", "removal"])
def test_every_word_s_account_sums_to_one(wrapped, method):
    _, _, captioner = wrapped
    result = captionfix.explain(captioner, picture(0), caption=CAPTION, method=method)
    assert [word.text for word in result] == CAPTION.split()
    for word in result:
        credits = sum(share for _, share in word.language)
        assert word.image_share + credits + word.other == pytest.approx(1, abs=1e-4)
        assert word.feature_map.shape == (CELLS, CELLS)
        if word.feature_map.any():
            assert word.feature_map.sum() == pytest.approx(1, abs=1e-4)
            assert word.fixations[:, 2].sum() == pytest.approx(1, abs=1e-4)
    assert any(word.image_share > 0.01 for word in result)
    assert any(word.feature_map.any() for word in result)


def test_other_images_and_later_words_change_no_explanation(wrapped):
    _, _, captioner = wrapped
    alone = captionfix.explain(captioner, picture(0), caption="a red", method="flow", policy="marginal")
    beside, _ = captionfix.explain(
        captioner, [picture(0), picture(1)], caption=[CAPTION, "a dog"], method="flow", policy="marginal"
    )
    for word, same in zip(alone, beside, strict=False):
        assert word.image_share == pytest.approx(same.image_share, abs=1e-4)
        np.testing.assert_allclose(word.feature_map, same.feature_map, atol=1e-4)


def test_removal_is_the_drop_of_the_author_s_own_logits(wrapped):
    """One cell of the feature map is taken out by a hook on the author's module, whole and unchanged."""
    family, model, captioner = wrapped
    pixels = batch(captioner, 1)
    tokens = TOKENS[:1]

    def zero(module, args, output):
        output = output.clone()
        output[:, :, 1, 2] = 0
        return output

    with torch.no_grad():
        hook = model.get_submodule(family.feature_map).register_forward_hook(zero)
        wanted = family.plain(model, torch.cat([pixels, pixels]), tokens.expand(2, -1))[:1]
        hook.remove()
        features = captioner.encode(pixels)
        features[:, :, 1, 2] = 0
        torch.testing.assert_close(captioner.decode(features, tokens), wanted, atol=1e-5, rtol=1e-4)


def test_evidence_stays_in_the_receptive_field():
    model, captioner = made("additive attention")
    pixels = batch(captioner, 1)
    encoded = map_to_pixels.encode(captioner, pixels)
    cells = [(0, 0), (1, 2), (3, 3)]
    evidence = torch.zeros(3, C, CELLS, CELLS)
    for k, (row, column) in enumerate(cells):
        evidence[k, :, row, column] = encoded.features[0, :, row, column] + 1e-3
    mass, ended = map_to_pixels.pixels(encoded, evidence / evidence.sum((1, 2, 3), keepdim=True), Policy())
    torch.testing.assert_close(mass.sum((1, 2)) + ended, torch.ones(3), atol=1e-4, rtol=0)
    for k, (row, column) in enumerate(cells):
        poisoned = pixels.clone().requires_grad_()
        seen = torch.nn.Sequential(
            *[m for m in model.cnn.body if isinstance(m, torch.nn.Conv2d)]
        )  # linear: all it sees
        (inside,) = torch.autograd.grad(seen(poisoned)[0, :, row, column].abs().sum(), poisoned)
        assert (mass[k] > 0).any()
        assert not (mass[k] > 0)[inside[0].abs().sum(0) == 0].any()


def test_a_sentinel_s_mass_is_not_the_image_s():
    torch.manual_seed(3)
    model = Sentinel(len(WORDS)).eval()
    share = {}
    for preference in (-30.0, 0.0, 30.0):
        with torch.no_grad():
            model.preference.fill_(preference)
            model.encoder.body[5].bias.fill_(0.2)
        captioner = captionfix.wrap(model, WORDS, PREPROCESS) if preference < 30 else captioner  # noqa: F821
        result = captionfix.explain(captioner, picture(0), caption=CAPTION, method="flow")
        share[preference] = [word.image_share for word in result]
        for word in result:
            credits = sum(s for _, s in word.language)
            assert word.image_share + credits + word.other == pytest.approx(1, abs=1e-4)
    assert max(share[30.0]) < 1e-6  # all attention on the sentinel: language and biases alone
    assert min(share[-30.0]) > 0.05
    for most, some in zip(share[-30.0], share[0.0], strict=True):
        assert most > some > 0
