"""Captioners that keep each image's own size, or see more than the image."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import captionfix
from captionfix.captioners.module import ModuleCaptioner
from captionfix.captioners.preprocess import Preprocess


def test_images_of_different_size_are_explained_together_as_alone(make):
    tiny = make("show-tell")
    captioner = ModuleCaptioner(
        tiny.model, tiny.encode, tiny.decode, tiny.vocabulary, Preprocess(None), name="own size", max_words=6
    )
    random = np.random.default_rng(0)
    images = [
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in [(40, 52), (33, 37), (40, 52)]
    ]
    captions = ["a red dog", "dog runs", "a dog"]
    together = captionfix.explain(captioner, images, captions)
    assert [each.caption for each in together] == captions
    assert [each.grid for each in together] == [(52, 40), (37, 33), (52, 40)]
    for image, caption, found in zip(images, captions, together, strict=True):
        alone = captionfix.explain(captioner, image, caption)
        for word, same in zip(found, alone, strict=True):
            assert word.image_share == pytest.approx(same.image_share, abs=1e-5)
            np.testing.assert_allclose(word.heatmap(specific=False), same.heatmap(specific=False), atol=1e-3)


def test_fixations_on_padding_are_left_out(make):
    tiny = make("show-tell")
    captioner = ModuleCaptioner(
        tiny.model, tiny.encode, tiny.decode, tiny.vocabulary, Preprocess((20, 20), 32), name="padded", max_words=6
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    prepared = captioner.prepare(image)
    assert prepared.window == pytest.approx((-18, -12, 78, 52))
    result = captionfix.explain(captioner, image, "a red dog", method="flow", policy="marginal")
    for word in result:
        x, y, mass = word.fixations.T
        assert len(mass) > 100
        assert 0 < x.min() < 3
        assert 57 < x.max() < 60
        assert 0 < y.min() < 2
        assert 38 < y.max() < 40
        assert mass.sum() == pytest.approx(1, abs=1e-4)
