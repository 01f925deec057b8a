"""The first leg by itself, against loops."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import captionfix
from captionfix import map_to_pixels
from captionfix.errors import PolicyError
from captionfix.legs import METHODS, unraveled
from captionfix.scenes import scene
from captionfix.unravel import Policy
from captionfix.word_to_map import Caption, flow, joined, multiscale


@pytest.fixture
def precise():
    """The captioner of scenes in double precision: drops of a millionth of a nat are no rounding there."""
    captioner = captionfix.load("scenes")
    captioner.model.double()
    return captioner


def told(captioner, seed, caption=None):
    """A scene's input and feature map, a caption (the true one, if none is given), and its flow."""
    made = scene(seed, split="test")
    pixels = captioner.prepare(Image.fromarray(made.image)).pixels[None].double()
    ids = tuple(captioner.tokenize(made.caption) if caption is None else caption)
    with torch.inference_mode():
        features = captioner.encode(pixels)
    said = Caption(captioner.vocabulary.start, ids)
    return pixels, features, said, flow(captioner, features, said, Policy())


def test_removal_is_believed_by_what_it_takes_and_the_flow_for_the_rest(precise):
    pixels, features, caption, found = told(precise, 6)
    tokens = torch.tensor([[caption.start, *caption.ids[:-1]]])
    start, place, lost = joined(precise, features, caption, found)
    leg = METHODS["joined"](precise, pixels, features, caption, found, Policy())
    parts = []
    with torch.no_grad():
        whole = precise.decode(features, tokens).log_softmax(-1)[0]
        blank = precise.decode(features.mean((2, 3), keepdim=True).expand_as(features), tokens).log_softmax(-1)[0]
        for word, token in enumerate(caption.ids):
            drops = torch.zeros(8, 8, dtype=torch.double)
            for row in range(8):
                for column in range(8):
                    cut = features.clone()
                    cut[:, :, row, column] = 0
                    without = precise.decode(cut, tokens).log_softmax(-1)[0]
                    drops[row, column] = whole[word, token] - without[word, token]
            drops = drops.clamp_min(0)
            taken = float(drops.sum())
            part = taken / (taken + 0.01)
            flowing = found.features[word] / found.features[word].sum()
            along = flowing.sum(0)
            away = part * drops / taken + (1 - part) * along
            mean = (away * away * along) ** (1 / 3)
            mean /= mean.sum()
            assert float(lost[word]) == pytest.approx(taken, rel=1e-6, abs=1e-12)
            torch.testing.assert_close(start[word], mean, atol=1e-8, rtol=1e-5)
            torch.testing.assert_close(place[word], (away + along) / 2, atol=1e-8, rtol=1e-5)
            active = features[0].clamp_min(0) / features[0].clamp_min(0).sum(0)
            expected = part * mean * active + (1 - part) * flowing
            torch.testing.assert_close(leg.evidence[word], expected, atol=1e-8, rtol=1e-5)
            effect = max(0.0, float(whole[word, token] - blank[word, token]))
            assert float(leg.trust[word]) == pytest.approx(taken / (taken + 0.01 + 0.1 * effect), rel=1e-5, abs=1e-9)
            parts.append((part, float(leg.trust[word])))
    assert min(part for part, _ in parts) < 0.05
    assert max(part for part, _ in parts) > 0.8  # of this caption's words some are sure, some are not
    assert max(part - trust for part, trust in parts) > 0.3  # and of some the image does far more than single cells


def test_a_sure_captioner_is_explained_by_its_flow(precise):
    """With logits a hundred times as large hardly a removal changes a probability, and all contributions stay the same
    shares: the join says what the flow says, channels and all."""
    linear = [module for module in precise.model.decoder.modules() if isinstance(module, torch.nn.Linear)]
    (output,) = [module for module in linear if module.out_features == len(precise.vocabulary)]
    with torch.no_grad():
        output.weight *= 100
        output.bias *= 100
    _, features, _, _ = told(precise, 6)
    own = precise.generate_from(features)[0]
    pixels, features, caption, found = told(precise, 6, own)
    legs = [METHODS[name](precise, pixels, features, caption, found, Policy()) for name in ("joined", "flow")]
    trust = legs[0].trust
    sure = trust < 1e-9
    assert int(sure.sum()) >= len(own) // 2
    for name in ("evidence", "place"):
        torch.testing.assert_close(getattr(legs[0], name)[sure], getattr(legs[1], name)[sure], atol=1e-8, rtol=1e-6)
    encoded = map_to_pixels.encode(precise, pixels)
    joint, plain = (unraveled(encoded, [leg], Policy())[0].sum(1) for leg in legs)
    torch.testing.assert_close(joint[sure], plain[sure], atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("trust", [None, 0.0, 0.5])
def test_places_at_several_sizes_are_those_of_the_resized_image(trust):
    captioner = captionfix.load("photos-show-and-tell")
    ids = captioner.tokenize("a red square")
    pixels = captioner.prepare(Image.fromarray(scene(6, split="test").image)).pixels[None]
    assert pixels.shape[2:] == (320, 320)
    tokens = torch.tensor([[captioner.vocabulary.start, *ids[:-1]]])

    def drops(image):
        with torch.no_grad():
            features = captioner.encode(image)
            whole = captioner.decode(features, tokens).log_softmax(-1)[0]
            height, width = features.shape[2:]
            cut = features.repeat(height * width, 1, 1, 1)
            for k in range(height * width):
                cut[k, :, k // width, k % width] = features.mean((0, 2, 3))
            without = captioner.decode(cut, tokens.expand(len(cut), -1)).log_softmax(-1)
            result = torch.stack([whole[k, i] - without[:, k, i].view(height, width) for k, i in enumerate(ids)])
        return result.clamp_min(0)

    def even(maps):
        return maps / maps.sum((1, 2), keepdim=True)

    views = [drops(pixels)]
    for side, cells in ((256, 8), (416, 13)):  # 0.8 and 1.3 of 10 cells of 32 pixels
        resized = torch.nn.functional.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        views.append(drops(resized))
        assert views[-1].shape[1:] == (cells, cells)
    place = even(views[0])
    believed = None if trust is None else torch.full((len(ids),), trust)
    found = multiscale(captioner, pixels, place, Caption(captioner.vocabulary.start, ids), "mean", believed)
    views = [even(torch.nn.functional.interpolate(view[None], (40, 40), mode="bilinear")[0]) for view in views]
    expected = even(views[0] + (1.0 if trust is None else trust) * (views[1] + views[2]))
    assert found.shape == (len(ids), 40, 40)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


def test_a_decoder_of_one_size_is_named():
    with pytest.raises(PolicyError, match=r"scenes.*96 x 96.*36.*64.*joined"):  # it has places for 8 x 8 cells
        captionfix.explain(captionfix.load("scenes"), scene(6, split="test").image, method="multiscale")
