"""The first leg by itself, against loops."""

from __future__ import annotations

import numpy as np
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
            result = torch.zeros(len(ids), *features.shape[2:])
            for row, column in np.ndindex(*features.shape[2:]):
                cut = features.clone()
                cut[:, :, row, column] = features.mean((2, 3))
                without = captioner.decode(cut, tokens).log_softmax(-1)[0]
                result[:, row, column] = torch.stack([whole[k, i] - without[k, i] for k, i in enumerate(ids)])
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
