"""The first leg by itself, against loops."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import captionfix
from captionfix.errors import PolicyError
from captionfix.scenes import scene
from captionfix.word_to_map import Caption, multiscale


def test_places_at_several_sizes_are_those_of_the_resized_image():
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
    found = multiscale(captioner, pixels, place, Caption(captioner.vocabulary.start, ids), "mean")
    expected = (
        sum(even(torch.nn.functional.interpolate(view[None], (40, 40), mode="bilinear")[0]) for view in views) / 3
    )
    assert found.shape == (len(ids), 40, 40)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


def test_a_decoder_of_one_size_is_named():
    with pytest.raises(PolicyError, match=r"scenes.*96 x 96.*36.*64.*joined"):  # it has places for 8 x 8 cells
        captionfix.explain(captionfix.load("scenes"), scene(6, split="test").image, method="multiscale")
