"""The two families: what is computed, and that generation finds what it claims."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from captionfix.captioners import decoders
from captionfix.errors import CaptionError

TOKENS = torch.tensor([[1, 4, 5, 6, 7], [1, 4, 6, 7, 2], [1, 5, 5, 4, 8], [1, 6, 7, 4, 9]])


@torch.no_grad()
def log_probability(captioner, features, ids):
    """Of a finished caption: words and the end, each given what precedes it."""
    tokens = torch.tensor([[captioner.vocabulary.start, *ids]])
    table = captioner.decode(features, tokens).log_softmax(2)[0]
    return sum(float(table[t, word]) for t, word in enumerate((*ids, captioner.vocabulary.end)))


@torch.no_grad()
def test_forward_is_decode_of_encode(captioner, pixels):
    whole = captioner.model(pixel_values=pixels, input_ids=TOKENS).logits
    assert whole.shape == (4, 5, len(captioner.vocabulary))
    torch.testing.assert_close(whole, captioner.decode(captioner.encode(pixels), TOKENS), rtol=0, atol=0)
    torch.testing.assert_close(whole, captioner.logits(pixels, TOKENS), rtol=0, atol=0)


@torch.no_grad()
def test_a_logit_depends_on_earlier_words_alone(captioner, pixels):
    other = TOKENS.clone()
    other[:, 3:] = 5
    a, b = captioner.logits(pixels, TOKENS), captioner.logits(pixels, other)
    torch.testing.assert_close(a[:, :3], b[:, :3], rtol=0, atol=1e-6)
    assert (a[:, 3:] - b[:, 3:]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("fill", ["zero", "mean"])
def test_cells_taken_out_are_decoded_as_if_each_were_encoded_so(captioner, pixels, fill):
    features = captioner.encode(pixels[:1])
    filling = features.mean((2, 3), keepdim=True) * (fill == "mean")
    gone = torch.rand(7, *features.shape[2:], generator=torch.Generator().manual_seed(0)) < 0.4
    found = captioner.decode_without(features, gone, filling, TOKENS[:1])
    for row, cells in zip(found, gone, strict=True):
        changed = features.clone()
        changed[0, :, cells] = filling[0, :, 0]
        torch.testing.assert_close(row, captioner.decode(changed, TOKENS[:1])[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_teacher_forcing_equals_step_by_step(captioner, pixels):
    decoder = captioner.model.decoder
    features = captioner.encode(pixels)
    state = decoder.begin(features)
    for t, logits in enumerate(captioner.decode(features, TOKENS).unbind(1)):
        step, state = decoder.step(state, TOKENS[:, t])
        torch.testing.assert_close(step, logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_greedy_equals_a_plain_loop(captioner, pixels):
    v = captioner.vocabulary
    for image, found in zip(pixels, captioner.generate(pixels, beams=1), strict=True):
        words: list[int] = []
        while len(words) < captioner.max_words:
            logits = captioner.logits(image[None], torch.tensor([[v.start, *words]]))[0, -1]
            logits[list(v.special - {v.end})] = -torch.inf
            if not words:
                logits[v.end] = -torch.inf
            best = int(logits.argmax())
            if best == v.end:
                break
            words.append(best)
        assert found == tuple(words)


@pytest.mark.parametrize("family", ["show-attend-tell", "show-tell"])
@pytest.mark.parametrize(("seed", "power"), [(0, 1.0), (1, 1.0), (2, 1.0), (0, 0.5), (1, 0.0)])
@torch.no_grad()
def test_wide_beam_equals_exhaustive_search(make, pixels, family, seed, power):
    captioner = make(family, seed, beam_length_power=power)
    v, longest = captioner.vocabulary, 3
    features = captioner.encode(pixels[:1])
    words = [i for i in range(len(v)) if i not in v.special]
    captions = [ids for n in range(1, longest) for ids in itertools.product(words, repeat=n)]
    scores = {ids: log_probability(captioner, features, ids) / (len(ids) + 1) ** power for ids in captions}
    # A caption that is cut at the longest length has no end: it counts with its words alone.
    for ids in itertools.product(words, repeat=longest):
        table = captioner.decode(features, torch.tensor([[v.start, *ids[:-1]]])).log_softmax(2)[0]
        scores[ids] = sum(float(table[t, word]) for t, word in enumerate(ids)) / longest**power
    found = captioner.generate(pixels[:1], beams=40, max_words=longest)[0]
    assert scores[found] == pytest.approx(max(scores.values()), abs=1e-5)


@torch.no_grad()
def test_beam_is_batch_independent(captioner, pixels):
    together = captioner.generate(pixels, beams=3)
    assert together == [captioner.generate(image[None], beams=3)[0] for image in pixels]
    assert len(set(together)) > 1 or captioner.generate(pixels * 3, beams=3) != []


def test_samples_follow_the_seed_and_leave_the_global_generator(captioner, pixels):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    a = captioner.generate(pixels, sample=True, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert a == captioner.generate(pixels, sample=True, seed=1)
    assert len({tuple(captioner.generate(pixels, sample=True, seed=s)) for s in range(4)}) > 1


@torch.no_grad()
def test_sampled_words_follow_the_models_distribution(make, pixels):
    captioner = make("show-attend-tell")
    many = pixels[:1].expand(4000, -1, -1, -1)
    firsts = [ids[0] for ids in captioner.generate(many, sample=True, seed=0, max_words=1)]
    logits = captioner.logits(pixels[:1], torch.tensor([[captioner.vocabulary.start]]))[0, 0]
    logits[list(captioner.vocabulary.special)] = -torch.inf  # one word, so not the end either
    seen = torch.bincount(torch.tensor(firsts), minlength=len(captioner.vocabulary)) / len(firsts)
    assert (seen - logits.softmax(0)).abs().max() < 0.03


@torch.no_grad()
def test_attention_is_a_distribution_and_explains_the_context(make, pixels):
    captioner = make("show-attend-tell")
    features = captioner.encode(pixels)
    weights = captioner.attention(features, TOKENS)
    assert weights.shape == (4, 5, 4, 4)
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(4, 5))
    assert make("show-tell").attention(features, TOKENS) is None


def test_loss_is_the_mean_over_words_whatever_the_padding(captioner, pixels):
    model = captioner.model
    rows = [[1, 4, 6, 2], [1, 5, 7, 4, 6, 2], [1, 4, 2], [1, 6, 7, 7, 2]]
    labels = torch.zeros(2, 2, 9, dtype=torch.long)
    for row, ids in zip(labels.view(4, 9), rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    loss = model(pixel_values=pixels[:2], labels=labels).loss
    losses = []
    with torch.no_grad():
        for i, ids in enumerate(rows):
            table = captioner.logits(pixels[i // 2][None], torch.tensor([ids[:-1]])).log_softmax(2)[0]
            losses += [-float(table[t, word]) for t, word in enumerate(ids[1:])]
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_attention_is_held_to_regions_where_they_are_known(make, pixels):
    captioner = make("show-attend-tell", region_loss=0.7)
    labels = torch.tensor([[[1, 4, 6, 2, 0], [1, 5, 7, 4, 2]], [[1, 4, 2, 0, 0], [1, 6, 7, 2, 0]]])
    regions = torch.rand(2, 2, 5, 4, 4, generator=torch.manual_seed(0)).round()
    regions[0, 0, 2:] = regions[1, 1] = 0  # nothing is known
    with torch.no_grad():
        with_regions, plain = (
            captioner.model(pixel_values=pixels[:2], labels=labels, regions=r).loss for r in (regions, None)
        )
        logs = []
        for i, k in ((i, k) for i in range(2) for k in range(2)):
            weights = captioner.attention(captioner.encode(pixels[i][None]), labels[i, k][None, :-1])[0]
            for t in range(1, int((labels[i, k] > 0).sum())):  # the word at t is predicted with the weights before it
                if regions[i, k, t].any():
                    logs.append(float((weights[t - 1] * regions[i, k, t]).sum().log()))
    assert 4 < len(logs) < 12
    assert float(with_regions - plain) == pytest.approx(-0.7 * sum(logs) / len(logs), rel=1e-4)
    with torch.no_grad():  # a batch of which nothing is known is a plain one
        assert captioner.model(pixel_values=pixels[:2], labels=labels, regions=0 * regions).loss == plain


@pytest.mark.parametrize("pool", [1, 3])
def test_without_attention_words_are_told_apart_by_patches(make, pixels, pool, monkeypatch):
    captioner = make("show-tell", region_loss=0.7, pool=pool)
    labels = torch.tensor([[[1, 4, 6, 2, 0], [1, 5, 7, 4, 2]], [[1, 4, 2, 0, 0], [1, 6, 7, 2, 0]]])
    left, right, top = (torch.zeros(4, 4) for _ in range(3))
    left[:, :2] = right[:, 2:] = top[:2] = 1
    regions = torch.zeros(2, 2, 5, 4, 4)
    regions[0, 0, 1], regions[0, 0, 2] = left, right
    regions[0, 1, 3] = top  # half of two patches lies in it: neither its own nor another's
    regions[1, 1, 1:3] = left
    corner = torch.zeros(4, 4)
    corner[3, 3] = 1
    patches = torch.stack([left, right, corner])
    monkeypatch.setattr(decoders, "draw_patches", lambda r, grid: patches.flatten(1).expand(len(r), -1, -1))
    monkeypatch.setattr(decoders, "WAY", (0.5, 0.5))
    model = captioner.model
    loss = model(pixel_values=pixels[:2], labels=labels, regions=regions).loss

    def score(image, caption, word, patch):
        features = captioner.encode(pixels[image][None])
        mean = features.mean((2, 3), keepdim=True)
        covered = torch.nn.functional.adaptive_avg_pool2d(patch[None], pool).max()
        more = mean + 0.5 * patch / covered * (features - mean)
        table = captioner.decode(more, labels[image, caption, :word][None]).log_softmax(2)
        return float(table[0, -1, labels[image, caption, word]].detach())

    logs = []
    for image, caption, word, own, others in (
        (0, 0, 1, (left,), (right, corner)),
        (0, 0, 2, (right, corner), (left,)),
        (1, 1, 1, (left,), (right, corner)),
        (1, 1, 2, (left,), (right, corner)),
    ):
        against = sum(math.exp(score(image, caption, word, patch)) for patch in others)
        for patch in own:
            likely = math.exp(score(image, caption, word, patch))
            logs.append(math.log(likely / (likely + against)))
    with torch.no_grad():
        plain = model(pixel_values=pixels[:2], labels=labels).loss
        assert model(pixel_values=pixels[:2], labels=labels, regions=0 * regions).loss == pytest.approx(float(plain))
        regions[0, 0], regions[1, 1] = 0, 1  # what is known tells nothing apart
        assert model(pixel_values=pixels[:2], labels=labels, regions=regions).loss == pytest.approx(float(plain))
    assert (loss - plain).item() == pytest.approx(-0.7 * sum(logs) / len(logs), rel=1e-3)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@given(st.data())
def test_patches_lie_in_a_word_s_region_in_another_s_and_anywhere(data):
    height, width = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    seed = data.draw(st.integers(0, 10**6))
    torch.manual_seed(seed)
    regions = (torch.rand(3, 4, height, width) < torch.rand(3, 4, 1, 1)).float()
    regions[:, 1, 0, 0] = 1  # each has a word with a region
    patches = decoders.draw_patches(regions.flatten(2), (height, width))
    assert patches.shape == (3, 3, height * width)
    assert patches.any(2).all()
    for words, (first, second, rectangle) in zip(regions.flatten(2), patches, strict=True):
        drawn_from = [[k for k, word in enumerate(words) if (word >= patch).all()] for patch in (first, second)]
        size = words.sum(1)
        apart = (torch.minimum(words[:, None], words).sum(2) <= 0.1 * torch.minimum(size[:, None], size)) & (size > 0)
        # whichever word the first was drawn from, the second's lies apart from it if any does
        assert any(apart[k, drawn_from[1]].any() or not apart[k].any() for k in drawn_from[0])
        assert drawn_from[1]
        rows, columns = rectangle.view(height, width).nonzero().T
        assert rows.max() - rows.min() < max(1, height // 2)
        assert columns.max() - columns.min() < max(1, width // 2)


def test_frozen_norms_keep_their_statistics_in_training(make, pixels):
    for frozen in (True, False):
        model = make("show-tell", frozen_norms=frozen).model.train()
        before = {k: v.clone() for k, v in model.state_dict().items() if "running_mean" in k}
        model.encoder(pixels)
        same = all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
        assert same == frozen


@pytest.mark.parametrize("size", [(40, 20), (1, 1), (1, 50), (3, 200)])
def test_prepare_squashes_any_picture_to_the_square(captioner, size):
    prepared = captioner.prepare(Image.new("RGB", size, (255, 0, 51)))
    assert prepared.pixels.shape == (3, 32, 32)
    assert prepared.pixels[:, 5, 9].tolist() == pytest.approx([1.0, -1.0, -0.6], abs=1e-5)
    assert prepared.size == size
    assert prepared.window == (0, 0, *size)


def test_nonsense_is_refused(captioner, pixels):
    with pytest.raises(CaptionError, match="at least 1"):
        captioner.generate(pixels, beams=0)
    with pytest.raises(CaptionError, match="at least 1"):
        captioner.generate(pixels, max_words=0)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet18", (512, 2, 2)),
        ("mobilenet_v2", (1280, 2, 2)),
        ("densenet121", (1024, 2, 2)),
        ("googlenet", (1024, 2, 2)),
        ("vgg11", (512, 2, 2)),
    ],
)
@torch.no_grad()
def test_torchvision_networks_end_at_their_last_map(name, shape):
    from captionfix.captioners.models import torchvision_features

    features = torchvision_features(name).eval()(torch.randn(1, 3, 64, 64))
    assert features.shape == (1, *shape)
    assert name == "mobilenet_v2" or features.min() >= 0  # all end in a ReLU or after one
