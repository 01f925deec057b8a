"""Metrics that run the captioner, against models whose answer is known, and against straightforward loops."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from captionfix.evaluate import causal
from captionfix.word_to_map import Caption

CAPTION = Caption(0, (0, 1))


class Corner:
    """Word 0 asks whether the upper left quarter is bright, word 1 whether anything is."""

    name = "corner"

    def encode(self, pixels):
        return pixels

    def decode(self, features, tokens):
        corner, every = features[:, 0, :4, :4].mean((1, 2)), features[:, 0].mean((1, 2))
        none = torch.zeros_like(corner)
        return torch.stack([torch.stack([4 * corner, none], 1), torch.stack([none, 4 * every], 1)], 1)


PIXELS = torch.ones(1, 1, 8, 8)
HERE, AWAY = np.zeros((8, 8)), np.zeros((8, 8))
HERE[:4, :4] = 1
AWAY[4:, 4:] = 1


def test_deletion_and_insertion_by_hand():
    maps = np.stack([HERE, AWAY])
    deletion, insertion = causal.deletion_insertion(Corner(), PIXELS, CAPTION, maps, [0], steps=4)
    p = [1 / (1 + math.exp(-4 * share)) for share in (1.0, 0.0)]  # all of the corner, none of it
    # a quarter of the pixels a step; the first is the corner, ties go in reading order
    assert deletion[0] == pytest.approx((p[0] + p[1]) / 8 + 3 / 4 * p[1], abs=1e-5)
    assert insertion[0] == pytest.approx((p[1] + p[0]) / 8 + 3 / 4 * p[0], abs=1e-5)


def test_a_right_map_deletes_sooner_than_a_wrong_one():
    right, wrong = (
        causal.deletion_insertion(Corner(), PIXELS, CAPTION, np.stack([m, m]), [0], steps=8) for m in (HERE, AWAY)
    )
    assert right[0][0] < wrong[0][0]
    assert right[1][0] > wrong[1][0]


def test_deletion_on_a_real_captioner_against_a_loop(captioner, picture):
    caption = Caption(captioner.vocabulary.start, captioner.tokenize("a red dog"))
    pixels = captioner.prepare(picture).pixels[None]
    maps = np.random.default_rng(0).random((3, 32, 32))
    deletion, insertion = causal.deletion_insertion(captioner, pixels, caption, maps, [1, 2], steps=5)
    with torch.no_grad():
        for at, k in enumerate((1, 2)):
            order = np.argsort(-maps[k], axis=None, kind="stable")
            curves: tuple[list[float], list[float]] = ([], [])
            for cut in np.round(np.linspace(0, 1024, 6)).astype(int):
                first = np.zeros(1024, dtype=bool)
                first[order[:cut]] = True
                for curve, shown in zip(curves, (~first, first), strict=True):
                    image = pixels * torch.from_numpy(shown.reshape(32, 32))
                    logits = captioner.logits(image, caption.inputs(pixels.device))
                    curve.append(float(logits[0, k].softmax(-1)[caption.ids[k]]))
            fractions = np.round(np.linspace(0, 1024, 6)) / 1024
            for found, curve in zip((deletion[at], insertion[at]), curves, strict=True):
                expected = sum(
                    (b - a) * (c + d) / 2 for (a, b), (c, d) in zip(pairwise(fractions), pairwise(curve), strict=True)
                )
                assert found == pytest.approx(expected, abs=1e-5)


def test_an_empty_map_has_no_deletion():
    deletion, insertion = causal.deletion_insertion(Corner(), PIXELS, CAPTION, np.zeros((2, 8, 8)), [0])
    assert math.isnan(deletion[0])
    assert math.isnan(insertion[0])


def test_occlusion_agreement_knows_the_right_map():
    hidden, drops = causal.occlusion_drops(Corner(), PIXELS, CAPTION, squares=40, side=0.25, seed=1)
    assert hidden.shape == (40, 8, 8)
    assert (hidden.sum((1, 2)) == 4).all()
    share = (hidden & (HERE > 0)).sum((1, 2)) / 16
    expected = math.log(1 + math.exp(-4)) - np.log(1 + np.exp(-4 * (1 - share)))
    np.testing.assert_allclose(drops[0], -expected, atol=1e-5)
    assert causal.occlusion_agreement(HERE, hidden, drops[0]) > 0.95
    assert causal.occlusion_agreement(AWAY, hidden, drops[0]) < 0
    assert math.isnan(causal.occlusion_agreement(np.zeros((8, 8)), hidden, drops[0]))


def test_rank_correlation_is_spearmans():
    pytest.importorskip("scipy")
    rng = np.random.default_rng(0)
    a, b = rng.permutation(30), rng.permutation(30)  # ranks themselves: Spearman by its textbook formula
    expected = 1 - 6 * ((a - b) ** 2).sum() / (30 * (30**2 - 1))
    assert causal.rank_correlation(a, b) == pytest.approx(expected)
    assert causal.rank_correlation(a, np.exp(a / 9.0)) == pytest.approx(1.0)
    assert math.isnan(causal.rank_correlation(a, np.ones(30)))


def test_noise_sensitivity_is_the_largest_relative_change():
    maps = np.stack([HERE, AWAY, np.zeros((8, 8))])
    found = causal.noise_sensitivity(
        maps, [maps, np.stack([1.5 * HERE, AWAY, HERE]), np.stack([HERE, 1.1 * AWAY, HERE])]
    )
    assert found[:2] == [pytest.approx(0.5), pytest.approx(0.1)]
    assert math.isnan(found[2])


def test_noise_is_small_and_of_a_seed():
    image = Image.fromarray(np.full((8, 8, 3), 254, dtype=np.uint8))
    one, again = list(causal.noisy(image, 2, seed=3)), list(causal.noisy(image, 2, seed=3))
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(one, again, strict=True))
    values = np.stack([np.asarray(a).astype(int) for a in one])
    assert values.max() == 255
    assert values.min() >= 249
    assert not np.array_equal(values[0], values[1])


def test_share_agreement():
    pytest.importorskip("scipy")
    assert causal.share_agreement([0.1, 0.5, 0.9], [0.0, 2.0, 3.0]) == pytest.approx(1.0)
    assert causal.share_agreement([0.1, 0.5, 0.9], [3.0, 2.0, -1.0]) == pytest.approx(-1.0)
    assert math.isnan(causal.share_agreement([0.1, math.nan, 0.9], [3.0, 2.0, 1.0]))
    assert math.isnan(causal.share_agreement([0.1, 0.2], [3.0, 2.0]))


def test_blanking_is_the_drop_without_the_picture():
    drops = causal.blanking(Corner(), PIXELS, CAPTION)
    assert drops == [pytest.approx(math.log(2 / (1 + math.exp(-4))), abs=1e-5)] * 2


@pytest.fixture
def inputs(captioner, picture):
    caption = Caption(captioner.vocabulary.start, captioner.tokenize("a red dog runs"))
    return captioner, captioner.prepare(picture).pixels[None], caption


def test_weights_come_in_the_order_in_which_they_run(inputs):
    captioner = inputs[0]
    decoder, cnn = ([name for name, _ in part] for part in causal.weights_in_order(*inputs))
    assert {*decoder, *cnn} == {name for name, _ in captioner.model.named_parameters()}
    assert all(name.startswith("decoder") for name in decoder)
    lstm = next(i for i, name in enumerate(decoder) if ".lstm." in name or ".cell." in name)
    first = {"show-tell": "decoder.image", "show-attend-tell": "decoder.value"}[captioner.name]
    assert decoder[0].startswith("decoder.output")
    assert lstm < next(i for i, name in enumerate(decoder) if name.startswith(first))
    assert "stages.1" in cnn[0]
    assert "embedder" in cnn[-1]


def test_randomisation_goes_top_down_and_gives_the_weights_back(inputs):
    captioner, pixels, caption = inputs
    before = {name: value.clone() for name, value in captioner.model.state_dict().items()}
    parameters = dict(captioner.model.named_parameters())

    def changed() -> set[str]:
        return {name for name, weight in parameters.items() if not torch.equal(before[name], weight)}

    stages: dict[str, set[str]] = {}
    for stage in causal.randomised(captioner, pixels, caption):
        stages[stage] = changed()
    assert changed() == set()
    names = list(stages)
    assert names[-1] == "CNN alone"
    assert names[-2] == "everything"
    cascade = [stages[name] for name in names[:-1]]
    assert cascade[0]  # the trained model is no stage
    assert all(a < b for a, b in pairwise(cascade))
    assert all(name.startswith("decoder") for name in stages["decoder"])
    assert not any(name.startswith("decoder") for name in stages["CNN alone"])
    assert stages["decoder"] | stages["CNN alone"] == stages["everything"]


def test_weights_come_back_when_the_iteration_is_closed(inputs):
    captioner = inputs[0]
    before = {name: value.clone() for name, value in captioner.model.state_dict().items()}
    stages = causal.randomised(*inputs)
    next(stages)
    assert any(not torch.equal(before[name], value) for name, value in captioner.model.state_dict().items())
    stages.close()
    assert all(torch.equal(before[name], value) for name, value in captioner.model.state_dict().items())


def test_random_weights_keep_their_size_and_sign_and_have_seeds_of_their_own(inputs):
    captioner, *_ = inputs
    before = {name: value.clone() for name, value in captioner.model.named_parameters()}
    for stage in causal.randomised(*inputs):
        if stage != "everything":
            continue
        drawn = [w for w in captioner.model.parameters() if w.numel() > 100 and w.dim() > 1]
        assert all((w < 0).any() for w in drawn)  # not all positive, as a known tool draws them
        for name, weight in captioner.model.named_parameters():
            if weight.numel() > 300:
                assert float(weight.detach().std()) == pytest.approx(float(before[name].std()), rel=0.3)
        shapes: dict[tuple[int, ...], torch.Tensor] = {}
        for weight in drawn:
            if weight.shape in shapes:  # the same seed for each layer would give equal layers
                unit = (weight - weight.mean()) / weight.std()
                other = shapes[weight.shape]
                assert not torch.allclose(unit, (other - other.mean()) / other.std(), atol=1e-2)
            shapes[weight.shape] = weight.detach().clone()


def test_map_correlation_leaves_out_empty_maps():
    pytest.importorskip("scipy")
    rng = np.random.default_rng(0)
    maps = rng.random((2, 8, 8))
    assert causal.map_correlation(maps, maps) == pytest.approx(1.0)
    assert causal.map_correlation(maps, np.stack([-maps[0], np.zeros((8, 8))])) == pytest.approx(-1.0)
    assert math.isnan(causal.map_correlation(maps, np.zeros((2, 8, 8))))
