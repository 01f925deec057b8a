"""What ``benchmarks/speed.py`` measures is what `captionfix.explain` does."""

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

FILE = Path(__file__).parents[1] / "benchmarks" / "speed.py"


@pytest.mark.parametrize("policy", ["default", "thorough"])
def test_everything_is_what_explain_shows(policy):
    spec = importlib.util.spec_from_file_location("speed", FILE)
    speed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(speed)
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
