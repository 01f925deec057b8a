"""The verb, on the bundled captioner of scenes: what it says adds up, lands where it should, and refuses what it
must.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import captionfix
from captionfix import map_to_pixels
from captionfix.errors import CaptionerError, CaptionError, PolicyError
from captionfix.explain import settle
from captionfix.legs import Leg, followed, unraveled, weighed
from captionfix.scenes import scene
from captionfix.unravel import Policy

METHODS = ["joined", "removal", "flow", "attention"]


@pytest.fixture(scope="module")
def captioner():
    return captionfix.load("scenes")


@pytest.fixture(scope="module")
def made():
    return scene(6, split="test")


@pytest.fixture(scope="module")
def explained(captioner, made):
    return captionfix.explain(captioner, made.image, caption=made.caption)


def test_words_are_the_captions(explained, made):
    assert explained.caption == made.caption
    assert [word.text for word in explained] == list(made.words)
    assert explained.image.size == (128, 128)


def test_the_account_of_every_word_sums_to_one(explained):
    for word in explained:
        credits = sum(share for _, share in word.language)
        assert word.image_share + credits + word.other == pytest.approx(1, abs=1e-4)
        assert [text for text, _ in word.language] == ["<start>", *(w.text for w in explained[: word.index])]


def test_fixations_lie_in_the_image_and_weigh_one(explained):
    for word in explained:
        x, y, mass = word.fixations.T
        assert x.min() > 0
        assert x.max() < 128
        assert y.min() > 0
        assert y.max() < 128
        assert mass.sum() == pytest.approx(1, abs=1e-4)
        assert word.feature_map.sum() == pytest.approx(1, abs=1e-4)


def test_with_the_join_a_part_lies_evenly_and_the_flow_follows_all(captioner, made):
    evenly = []
    for method, even in (("joined", True), ("flow", False), ("gradcam", False)):
        for word in captionfix.explain(captioner, made.image, caption=made.caption, method=method):
            assert (len(word.even) > 0) == even
            assert word.evidence[:, 2].sum() == pytest.approx(1, abs=1e-4)
            if even:
                evenly.append(word.even[:, 2].sum())
                steps = np.unique(np.diff(np.unique(word.even[:, 0])))
                assert steps.tolist() == [2.0]  # a sixtieth of 128 pixels
    assert min(evenly) < 1e-4  # of words that no removal changes: the flow says all of them
    assert 0.01 < max(evenly) < 0.9


def test_probability_is_the_teacher_forced_one(captioner, explained, made):
    ids = captioner.tokenize(made.caption)
    pixels = captioner.prepare(Image.fromarray(made.image)).pixels[None]
    with torch.no_grad():
        for k, word in enumerate(explained):
            prefix = torch.tensor([[captioner.vocabulary.start, *ids[:k]]])
            p = captioner.logits(pixels, prefix)[0, -1].softmax(-1)
            assert word.probability == pytest.approx(float(p[ids[k]]), abs=1e-5)
            assert word.alternatives[0] == (
                captioner.vocabulary.word(int(p.argmax())),
                pytest.approx(float(p.max()), abs=1e-5),
            )


def test_image_effect_is_the_drop_when_the_map_is_its_mean(captioner, explained, made):
    ids = captioner.tokenize(made.caption)
    pixels = captioner.prepare(Image.fromarray(made.image)).pixels[None]
    with torch.no_grad():
        features = captioner.encode(pixels)
        tokens = torch.tensor([[captioner.vocabulary.start, *ids[:-1]]])
        blank = features.mean((2, 3), keepdim=True).expand_as(features)
        drop = captioner.decode(features, tokens).log_softmax(-1) - captioner.decode(blank, tokens).log_softmax(-1)
    for k, word in enumerate(explained):
        assert word.image_effect == pytest.approx(float(drop[0, k, ids[k]]), abs=1e-3)


def test_removal_is_the_drop_without_the_cell(captioner, made):
    result = captionfix.explain(captioner, made.image, caption=made.caption, method="removal")
    ids = captioner.tokenize(made.caption)
    pixels = captioner.prepare(Image.fromarray(made.image)).pixels[None]
    tokens = torch.tensor([[captioner.vocabulary.start, *ids[:-1]]])
    with torch.no_grad():
        features = captioner.encode(pixels)
        whole = captioner.decode(features, tokens).log_softmax(-1)[0]
        drops = np.zeros((len(ids), 8, 8))
        for row in range(8):
            for column in range(8):
                cut = features.clone()
                cut[:, :, row, column] = 0
                without = captioner.decode(cut, tokens).log_softmax(-1)[0]
                drops[:, row, column] = [float(whole[k, i] - without[k, i]) for k, i in enumerate(ids)]
    drops = np.maximum(drops, 0)
    for word, drop in zip(result, drops, strict=True):
        if drop.sum() > 1e-3:  # smaller drops are rounding
            np.testing.assert_allclose(word.feature_map, drop / drop.sum(), atol=1e-3)


WAYS = [*((method, "default") for method in METHODS), ("flow", "marginal"), ("joined", "marginal")]


@pytest.mark.parametrize(("method", "policy"), WAYS)
def test_methods_and_policies_point_at_the_objects(captioner, method, policy):
    hits = []
    for seed in (6, 7):
        made = scene(seed, split="test")
        result = captionfix.explain(captioner, made.image, caption=made.caption, method=method, policy=policy)
        masks = made.masks()
        for word, kind in zip(result, made.kinds, strict=True):
            if kind in ("colour", "shape", "surface"):
                point = word.point()
                hits.append(point is not None and masks[word.index][int(point[1]), int(point[0])])
    assert np.mean(hits) >= 0.8  # by chance a point is in the right object in about one of fourteen


def test_a_captioner_brings_its_own_setting(captioner, made):
    own = captionfix.explain(captioner, made.image, caption=made.caption)
    assert (own.method, own.policy) == ("joined", Policy.named("default").as_dict())  # models/scenes has none
    with_setting = captionfix.load("scenes")
    with_setting.defaults = {"method": "flow", "policy": {"neurons": 50}}
    set_by_it, named, alike = (
        captionfix.explain(with_setting, made.image, caption=made.caption, **options)
        for options in ({}, {"method": "joined"}, {"method": "flow", "policy": Policy(neurons=50)})
    )
    assert (set_by_it.method, set_by_it.policy) == ("flow", alike.policy)
    assert (named.method, named.policy) == ("joined", Policy.named("default").as_dict())
    for word, other in zip(set_by_it, alike, strict=True):
        np.testing.assert_array_equal(word.fixations, other.fixations)
    photos, without_attention = (captionfix.load(name) for name in ("photos", "photos-show-and-tell"))
    assert settle(photos).policy == Policy(neurons=2000, full=400)  # models/photos/config.json
    photos.defaults = {}
    assert (settle(photos).method, settle(photos).policy) == ("joined", Policy())
    assert settle(without_attention).method == "multiscale"  # models/photos-show-and-tell/config.json


def test_published_sets_stay_sets(captioner, made):
    for word in captionfix.explain(captioner, made.image, caption=made.caption, policy="paper"):
        np.testing.assert_allclose(word.fixations[:, 2], 1 / len(word.fixations), rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "policy"),
    [("default", "default"), ("joined", "default"), ("joined", "thorough"), ("flow", "paper"), (None, "default")],
)
def test_a_list_gives_what_single_calls_give(captioner, without_attention, method, policy):
    scenes = [scene(seed, split="test") for seed in (6, 7, 9)]
    captions = [s.caption for s in scenes]
    if method is None:  # a captioner whose captions are unraveled once
        captioner, captions, method = without_attention(1), ["a red star", "a star", "a red red star"], "default"
    assert len({len(caption.split()) for caption in captions[:2]}) == 2
    how = {"method": method, "policy": policy}
    together = captionfix.explain(captioner, [s.image for s in scenes], caption=captions, batch_size=2, **how)
    assert isinstance(together, captionfix.Explanations)
    for made, caption, result in zip(scenes, captions, together, strict=True):
        alone = captionfix.explain(captioner, made.image, caption=caption, **how)
        assert alone.policy == result.policy
        for one, other in zip(alone, result, strict=True):
            np.testing.assert_allclose(one.feature_map, other.feature_map, atol=1e-4)
            assert one.image_share == pytest.approx(other.image_share, abs=1e-4)
            difference = np.abs(alone.maps(False)[one.index] - result.maps(False)[one.index]).sum()
            assert difference < 0.05  # equal contributions may be kept in another order


def test_own_caption_is_the_generated_one(captioner, made):
    result = captionfix.explain(captioner, made.image)
    pixels = captioner.prepare(Image.fromarray(made.image)).pixels[None]
    assert result.caption == captioner.text(captioner.generate(pixels)[0])


def test_an_image_of_another_size_gives_points_of_that_size(captioner, made, explained):
    large = Image.fromarray(made.image).resize((256, 384), Image.Resampling.NEAREST)
    result = captionfix.explain(captioner, large, caption=made.caption)
    for small, big in zip(explained, result, strict=True):
        if made.kinds[small.index] == "colour":
            (x, y), (u, v) = small.point(), big.point()
            assert abs(u / 2 - x) < 6
            assert abs(v / 3 - y) < 6


def test_contrast_changes_only_its_word(captioner, made, explained):
    colour = next(word.text for word, kind in zip(explained, made.kinds, strict=True) if kind == "colour")
    other = "green" if colour != "green" else "red"
    result = captionfix.explain(captioner, made.image, caption=made.caption, contrast={colour: other})
    assert result[colour].contrast == other
    for before, after in zip(explained, result, strict=True):
        same = np.allclose(before.feature_map, after.feature_map, atol=1e-5)
        assert same == (after.contrast is None)


def test_alternatives_start_the_flow_from_what_the_word_has_beyond_them(captioner, made):
    plain = captionfix.explain(captioner, made.image, caption=made.caption, method="flow")
    against = captionfix.explain(captioner, made.image, caption=made.caption, method="flow", contrast="alternatives")
    masks, inside = made.masks(), []
    for one, other, kind in zip(plain, against, made.kinds, strict=True):
        credits = sum(share for _, share in other.language)
        assert other.image_share + credits + other.other == pytest.approx(1, abs=1e-4)
        if kind in ("colour", "shape"):
            assert not np.allclose(one.feature_map, other.feature_map, atol=1e-4)
            x, y = other.point()
            inside.append(masks[other.index][int(y), int(x)])
    assert np.mean(inside) >= 0.75


def test_paper_is_the_flow_and_its_fixations_are_a_set(captioner, made):
    result = captionfix.explain(captioner, made.image, caption=made.caption, policy="paper")
    assert result.method == "flow"
    for word in result:
        if len(word.fixations):
            assert np.ptp(word.fixations[:, 2]) < 1e-6


def test_saved_and_read_again(explained, tmp_path):
    explained.save(tmp_path / "one")
    again = captionfix.read(tmp_path / "one")
    for one, other in zip(explained, again, strict=True):
        np.testing.assert_array_equal(one.heatmap(), other.heatmap())
        assert one.language == other.language
        assert one.box() == other.box()


def test_the_model_is_left_as_it_was(captioner, made):
    before = {name: value.clone() for name, value in captioner.model.state_dict().items()}
    captionfix.explain(captioner, made.image, caption=made.caption)
    assert not captioner.model.training
    assert all(torch.equal(before[name], value) for name, value in captioner.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in captioner.model.modules())


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"caption": ""}, CaptionError, "no words"),
        ({"caption": "a zebra left of a tree"}, CaptionError, "tree, zebra"),
        ({"caption": "a red star " * 40}, CaptionError, "words"),
        ({"caption": ["a red star", "a blue star"]}, CaptionError, "2 captions for 1"),
        ({"contrast": {"zebra": "red"}}, CaptionError, "not in the caption"),
        ({"contrast": {"a": "zebra"}}, CaptionError, "does not know the word 'zebra'"),
        ({"contrast": {"a": "a"}}, CaptionError, "itself"),
        ({"contrast": {99: "red"}}, CaptionError, "not in the caption"),
        ({"contrast": "cat"}, CaptionError, "alternatives"),
        ({"method": "magic"}, PolicyError, "joined.*multiscale.*removal.*flow.*attention"),
        ({"method": "flow:steps=3"}, PolicyError, "flow:policy=fast"),
        ({"method": "flow:policy=fast", "policy": "paper"}, PolicyError, "once"),
        ({"method": "flow:policy=magic"}, PolicyError, "default.*paper.*marginal"),
        ({"policy": "magic"}, PolicyError, "default.*paper.*marginal"),
        ({"policy": {"sums": 0}}, PolicyError, "sums"),
        ({"policy": {"summs": 3}}, PolicyError, "summs"),
    ],
)
def test_bad_requests_are_named(captioner, made, options, error, says):
    with pytest.raises(error, match=f"(?s){says}"):
        captionfix.explain(captioner, made.image, **options)


def test_unknown_words_may_be_mapped(captioner, made):
    result = captionfix.explain(captioner, made.image, caption="a zebra left of a red star", unknown="map")
    assert len(result) == 7


@pytest.fixture
def without_attention():
    """Makes tiny Show-and-Tell captioners: pool -> captioner."""
    from captionfix.captioners import models
    from captionfix.captioners.pretrained import PretrainedCaptioner
    from captionfix.captioners.words import SPECIAL, square_processor, word_tokenizer

    words = [*SPECIAL, "a", "red", "star"]
    cnn = {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 12],
        "depths": [1, 1],
        "layer_type": "basic",
    }
    settings = {"cnn": cnn, "image_size": 32, "feature_size": 12, "vocab_size": len(words), "max_words": 8}

    def make(pool):
        torch.manual_seed(0)
        model = models.ShowTellModel(models.ShowTellConfig(**settings, word_size=16, hidden_size=16, pool=pool))
        return PretrainedCaptioner(model, word_tokenizer(words), square_processor(32), "tiny")

    return make


def test_attention_is_refused_where_there_is_none(made, without_attention):
    captioner = without_attention(1)
    with pytest.raises(PolicyError, match="no attention"):
        captionfix.explain(captioner, made.image, caption="a red star", method="attention")
    result = captionfix.explain(captioner, made.image, caption="a red star")
    assert any(abs(word.image_effect) > 1e-4 for word in result)  # the pooled map's mean is itself: zero instead


@pytest.mark.parametrize(("pool", "policy", "power"), [(1, "default", 5), (1, "thorough", 1.5), (2, "default", None)])
def test_a_decoder_that_reads_the_mean_alone_starts_from_what_cells_add_to_it(
    made, without_attention, pool, policy, power
):
    """And only such a one: where places are read, the flow counts too."""
    captioner = without_attention(pool)
    result = captionfix.explain(captioner, made.image, caption="a red star", policy=policy)
    with torch.no_grad():
        features = captioner.encode(captioner.prepare(Image.fromarray(made.image)).pixels[None])
        ids = captioner.tokenize("a red star")
        tokens = torch.tensor([[captioner.vocabulary.start, *ids[:-1]]])
        mean = features.mean((2, 3))
        drops = torch.zeros(3, *features.shape[2:])
        for row in range(features.shape[2]):
            for column in range(features.shape[3]):
                changed = features.clone()
                changed[:, :, row, column] = mean
                for k, word in enumerate(ids):
                    before, after = (
                        captioner.decode(f, tokens).log_softmax(2)[0, k, word] for f in (features, changed)
                    )
                    drops[k, row, column] = before - after
    needed = drops.clamp(min=0) / drops.clamp(min=0).sum((1, 2), keepdim=True)
    same = [np.allclose(word.feature_map, cells, atol=1e-3) for word, cells in zip(result, needed, strict=True)]
    assert same == [pool == 1] * 3
    if pool == 1:  # all fixations are the caption's, so words' masses differ by their places alone, to a power
        places = torch.nn.functional.interpolate(needed[:, None], size=(32, 32), mode="bilinear")[:, 0].numpy()
        first, *others = ({(int(x // 4), int(y // 4)): mass for x, y, mass in word.fixations} for word in result)
        for k, other in enumerate(others, 1):
            shared = [point for point in first if point in other]
            ratios = [other[x, y] / first[x, y] * (places[0, y, x] / places[k, y, x]) ** power for x, y in shared]
            assert len(shared) > 20
            np.testing.assert_allclose(ratios, ratios[0], rtol=0.02)


@pytest.mark.parametrize("policy", ["marginal", "default", "thorough"])
def test_what_a_caption_shares_is_unraveled_once_and_is_its_words_mean(captioner, policy):
    """Where all is kept, by linearity; with a budget it is the evidence's mean, followed with all words' neurons."""
    policy = Policy.named(policy)
    pictures = [scene(i, split="test").image for i in (6, 7)]
    pixels = torch.stack([captioner.prepare(Image.fromarray(each)).pixels for each in pictures])
    encoded = map_to_pixels.encode(captioner, pixels)
    height, width = encoded.features.shape[2:]
    places = torch.rand(2, 3, height, width) ** 8
    places[0, 1] = 0  # a word that nothing is known of
    places /= places.sum((2, 3), keepdim=True).clamp_min(1e-9)
    legs = [
        Leg(map_to_pixels.channels(features, place), place, common=1.0, even=0.2, power=1.5)
        for features, place in zip(encoded.features, places, strict=True)
    ]
    kept = followed(policy, legs)
    together = unraveled(encoded, legs, kept, [0, 1])
    for i, (leg, found) in enumerate(zip(legs, together, strict=True)):
        known = leg.evidence.sum((1, 2, 3)) > 0
        if policy.neurons is None:
            mass, _ = map_to_pixels.pixels(encoded, leg.evidence[known], policy, torch.full((int(known.sum()),), i))
        else:
            more = Policy(neurons=4 * policy.neurons, full=policy.full)  # it is for all words
            mass, _ = map_to_pixels.pixels(encoded, leg.evidence[known].mean(0, keepdim=True), more, torch.tensor([i]))
        fixations = mass.mean(0) * torch.ones(len(known), 1, 1) * known[:, None, None]
        expected = map_to_pixels.agreeing(fixations, leg.place, even=0.2, power=1.5)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)
        assert ((found.sum((1, 2, 3)) > 0) == known).all()


@pytest.mark.parametrize("policy", ["default", "thorough"])
def test_more_lies_evenly_where_few_neurons_are_held(captioner, made, policy):
    """The dials of docs/method.md, and that they reach the pixels."""
    policy = Policy.named(policy)
    pixels = captioner.prepare(Image.fromarray(made.image)).pixels[None]
    encoded = map_to_pixels.encode(captioner, pixels)
    place = torch.rand(2, *encoded.features.shape[2:])
    place /= place.sum((1, 2), keepdim=True)
    leg = weighed(map_to_pixels.channels(encoded.features[0], place), place, False, policy)
    even, power = (0.3, 1.5) if policy.full else (0.6, 2.5)
    mass, _ = map_to_pixels.pixels(encoded, leg.evidence, policy)
    expected = map_to_pixels.agreeing(mass, place, 0.5, even, power)
    torch.testing.assert_close(unraveled(encoded, [leg], policy)[0], expected, atol=1e-6, rtol=1e-3)


def test_weights_that_are_not_finite_are_an_error(made):
    captioner = captionfix.load("scenes")
    with torch.no_grad():
        next(captioner.model.encoder.parameters()).fill_(float("nan"))
    with pytest.raises(CaptionerError, match="not finite"):
        captionfix.explain(captioner, made.image)
