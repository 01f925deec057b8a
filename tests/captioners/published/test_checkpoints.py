"""Every published captioner: files of its structure are written, opened, and compared with its author's code."""

from __future__ import annotations

import numpy as np
import pytest
import samples
import torch
from PIL import Image
from torch import Tensor

import captionfix
from captionfix import map_to_pixels
from captionfix.captioners.captioner import Prepared
from captionfix.unravel import Policy

CLOSE = 2e-6
EXPLAINED = [
    "yunjey",
    "sgrvinod",
    "Udacity, three layers behind",
    "im2txt",
    "ruotianluo, NewFC",
    "ruotianluo, ShowTell",
    "ruotianluo, Att2in2",
    "ruotianluo, with_finetune",
    "aladdinpersson",
]


def photograph(width: int = 97, height: int = 61) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(params=samples.CASES)
def opened(request, tmp_path):
    sample = samples.CASES[request.param](tmp_path)
    return sample, captionfix.load(tmp_path)


def batch(captioner) -> Tensor:
    pixels = captioner.prepare(photograph()).pixels
    return torch.stack([pixels, pixels.flip(2)])


def test_scores_equal_the_authors(opened):
    sample, captioner = opened
    pixels, tokens = batch(captioner), samples.some_tokens(sample)
    assert samples.difference(sample, captioner, pixels, tokens) < CLOSE
    with torch.no_grad():
        scores = captioner.logits(pixels, tokens)
    assert float((scores[0] - scores[1]).abs().max()) > 1e-3  # image and words make a difference
    assert float(scores[0].std(0).max()) > 1e-2
    assert not captioner.model.training
    words = captioner.vocabulary
    assert (list(words.words), words.start, words.end) == (sample.words, sample.start, sample.end)
    assert pixels.shape[2:] == ((sample.side,) * 2 if sample.side else (61, 97))


def test_greedy_captions_equal_the_authors(opened):
    """One word after the other from the author's own scores, special words left out, until the end."""
    sample, captioner = opened
    pixels = batch(captioner)
    expected = []
    for one in pixels:
        tokens = [sample.start]
        while len(tokens) <= 6:
            with torch.no_grad():
                scores = sample.scores(one[None], torch.tensor([tokens]))[0, -1].clone()
            scores[list(captioner.vocabulary.special - {sample.end})] = -torch.inf
            if len(tokens) == 1:
                scores[sample.end] = -torch.inf
            tokens.append(int(scores.argmax()))
            if tokens[-1] == sample.end:
                break
        expected.append(tuple(t for t in tokens[1:] if t != sample.end))
    assert captioner.generate(pixels, beams=1, max_words=6) == expected


@pytest.mark.parametrize("name", EXPLAINED)
def test_explained_end_to_end(tmp_path, name):
    """Every word's mass is accounted for: image, words, biases; and down to the pixels."""
    samples.CASES[name](tmp_path)
    captioner = captionfix.load(tmp_path)
    result = captionfix.explain(captioner, photograph(), caption="a dog on the beach", method="flow")
    assert [word.text for word in result.words] == ["a", "dog", "on", "the", "beach"]
    for word in result.words:
        assert word.image_share + sum(mass for _, mass in word.language) + word.other == pytest.approx(1, abs=1e-4)
        assert np.isfinite(word.image_effect)
        x, y, _ = word.fixations.T
        x0, y0, x1, y1 = result.window
        assert ((x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)).all()
    assert sum(word.image_share for word in result.words) > 0.01
    assert any(len(word.fixations) for word in result.words)
    encoded = map_to_pixels.encode(captioner, batch(captioner)[:1])
    evidence = map_to_pixels.channels(encoded.features[0], torch.rand(2, *encoded.features.shape[2:]))
    mass, ended = map_to_pixels.pixels(encoded, evidence, Policy.named("default"))
    assert torch.allclose(mass.sum((1, 2)) + ended, evidence.sum((1, 2, 3)), rtol=1e-4)
    assert float(mass.sum()) > 0.05 * float(evidence.sum())


@pytest.mark.parametrize("name", ["sgrvinod", "ruotianluo, Att2in2", "ruotianluo, UpDown", "ruotianluo, with_finetune"])
def test_attention_is_spread_over_the_cells_that_were_pooled(tmp_path, name):
    sample = samples.CASES[name](tmp_path)
    captioner = captionfix.load(tmp_path)
    pixels, tokens = batch(captioner), samples.some_tokens(sample)
    with torch.no_grad():
        features = captioner.encode(pixels)
        found = captioner.attention(features, tokens)
        alphas = sample.alphas(pixels, tokens)
    height, width = features.shape[2:]
    grid = 14 if "finetune" not in name else height
    expected = torch.zeros(*tokens.shape, height, width)
    for i in range(grid):
        for j in range(grid):
            top, bottom = i * height // grid, -(-(i + 1) * height // grid)
            left, right = j * width // grid, -(-(j + 1) * width // grid)
            share = alphas[:, :, i * grid + j] / ((bottom - top) * (right - left))
            expected[:, :, top:bottom, left:right] += share[..., None, None]
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(found.sum((2, 3)), torch.ones(tokens.shape))
    assert "attention" in captionfix.explain(captioner, photograph(), caption="a dog", method="attention").method


def prepared(name: str, tmp_path, image: Image.Image) -> Prepared:
    samples.CASES[name](tmp_path)
    return captionfix.load(tmp_path).prepare(image)


def normalised(image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    values = np.asarray(image, np.float64) / 255
    return torch.from_numpy(((values - mean) / std).transpose(2, 0, 1)).float()


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_yunjey_s_images(tmp_path):
    image = photograph(300, 200)
    expected = normalised(image.resize((224, 224), Image.Resampling.LANCZOS), *IMAGENET)
    assert torch.allclose(prepared("yunjey", tmp_path, image).pixels, expected, atol=1e-6)


def test_sgrvinod_s_images(tmp_path):
    """Scaled to [0, 1] once: what made every caption the same was dividing by 255 again."""
    image = photograph(300, 200)
    found = prepared("sgrvinod", tmp_path, image)
    expected = normalised(image.resize((256, 256), Image.Resampling.BILINEAR), *IMAGENET)
    assert torch.allclose(found.pixels, expected, atol=1e-6)
    assert found.window == (0, 0, 300, 200)


def test_udacity_s_images(tmp_path):
    image = photograph(384, 256)
    found = prepared("Udacity, two layers", tmp_path, image)
    assert torch.allclose(found.pixels, normalised(image.crop((80, 16, 304, 240)), *IMAGENET), atol=1e-6)
    assert found.window == (80, 16, 304, 240)


def test_aladdinpersson_s_images(tmp_path):
    image = photograph(300, 200)
    found = prepared("aladdinpersson", tmp_path, image)
    half = (0.5,) * 3
    assert torch.allclose(
        found.pixels, normalised(image.resize((299, 299), Image.Resampling.BILINEAR), half, half), atol=1e-6
    )


def test_images_with_finetune(tmp_path):
    image = photograph(300, 200)
    found = prepared("ruotianluo, with_finetune", tmp_path, image)
    middle = image.resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
    assert torch.allclose(found.pixels, normalised(middle, *IMAGENET), atol=1e-6)


def test_images_without_resize(tmp_path):
    image = photograph(301, 200)
    found = prepared("ruotianluo, FC", tmp_path, image)
    assert torch.allclose(found.pixels, normalised(image, *IMAGENET), atol=1e-6)
    large = captionfix.load(tmp_path).prepare(photograph(1280, 720))
    assert large.pixels.shape == (3, 360, 640)  # as large as COCO's largest
    assert large.window == (0, 0, 1280, 720)


def test_im2txt_s_images(tmp_path):
    """TensorFlow 1's resize, pixel by pixel."""
    image = photograph(500, 260)
    found = prepared("im2txt", tmp_path, image)
    values = np.asarray(image, np.float64) / 255
    for row, column in ((0, 0), (17, 250), (298, 298), (151, 3)):
        y, x = (row + 23) * 260 / 346, (column + 23) * 500 / 346
        top, left = int(y), int(x)
        bottom, right = min(top + 1, 259), min(left + 1, 499)
        upper = values[top, left] + (values[top, right] - values[top, left]) * (x - left)
        lower = values[bottom, left] + (values[bottom, right] - values[bottom, left]) * (x - left)
        expected = ((upper + (lower - upper) * (y - top)) - 0.5) * 2
        assert found.pixels[:, row, column].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
        x0, y0, x1, y1 = found.window  # that pixel's middle lies where it was read
        assert x0 + (column + 0.5) * (x1 - x0) / 299 == pytest.approx(x + 0.5)
        assert y0 + (row + 0.5) * (y1 - y0) / 299 == pytest.approx(y + 0.5)
