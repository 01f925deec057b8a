"""What ``benchmarks/speed.py`` and ``benchmarks/boxes.py`` measure is what `captionfix.explain` does."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import captionfix
from captionfix.scenes import scene
from captionfix.unravel import Policy
from captionfix.word_to_map import Caption

FOLDER = Path(__file__).parents[1] / "benchmarks"


def benchmark(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("policy", ["default", "thorough"])
def test_everything_is_what_explain_shows(policy):
    speed = benchmark("speed")
    captioner, images = captionfix.load("scenes"), [Image.fromarray(scene(i, split="test").image) for i in (6, 7)]
    pixels = torch.stack([captioner.prepare(image).pixels for image in images])
    ids = captioner.tokenize("a large red star")
    found = speed.everything(captioner, pixels, Caption(captioner.vocabulary.start, ids), Policy.named(policy))
    shown = captionfix.explain(captioner, images, caption="a large red star", method="joined", policy=policy)
    words = [word for explanation in shown for word in explanation]
    assert len(found) == len(words) == 8
    for mass, word in zip(found.sum(1).numpy(), words, strict=True):
        x, y, points = word.evidence.T
        there = np.zeros(mass.shape)
        np.add.at(there, (y.astype(int), x.astype(int)), points)
        np.testing.assert_allclose(mass / mass.sum(), there, atol=1e-6)


def test_boxes_are_scored_against_what_the_words_name():
    found = benchmark("boxes").scores("scenes", ["default"], 1, 2)
    captioner, expected = captionfix.load("scenes"), []
    for number in (1, 2):
        made = scene(100_000 + number, split="test")
        explained = captionfix.explain(captioner, Image.fromarray(made.image), caption=made.caption)
        for place, kind in enumerate(made.kinds):
            if kind in ("other", "relation"):
                continue
            rows, columns = np.nonzero(made.mask(place))
            named, drawn = np.zeros((1280, 1280), bool), np.zeros((1280, 1280), bool)  # tenths of pixels
            named[rows.min() * 10 : rows.max() * 10 + 10, columns.min() * 10 : columns.max() * 10 + 10] = True
            x0, y0, x1, y1 = (round(10 * edge) for edge in explained[place].box())
            drawn[y0:y1, x0:x1] = True
            expected.append((number, (named & drawn).sum() / (named | drawn).sum()))
    np.testing.assert_allclose(found["default"], expected, atol=0.01)
    assert len(found["whole image"]) == len(expected) > 10
