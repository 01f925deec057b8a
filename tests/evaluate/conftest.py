"""Tiny captioners with random weights, one of each family, and a picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from captionfix.captioners import models
from captionfix.captioners.pretrained import PretrainedCaptioner
from captionfix.captioners.words import SPECIAL, square_processor, word_tokenizer

RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 12], "depths": [2, 1], "layer_type": "basic"}
WORDS = [*SPECIAL, "a", "red", "dog", "runs", "ball", "left", "of", "black"]


def tiny(family: str, seed: int = 0) -> PretrainedCaptioner:
    torch.manual_seed(seed)
    common = {
        "cnn": RESNET,
        "image_size": 32,
        "feature_size": 12,
        "vocab_size": len(WORDS),
        "word_size": 16,
        "hidden_size": 16,
        "max_words": 8,
    }
    model: models.CaptionerModel
    if family == "show-tell":
        model = models.ShowTellModel(models.ShowTellConfig(**common, pool=2))
    else:
        model = models.ShowAttendTellModel(models.ShowAttendTellConfig(**common, value_size=14, attention_size=10))
    with torch.no_grad():  # larger weights: the words depend on the picture
        for parameter in model.decoder.parameters():
            parameter.mul_(2.5)
        for module in model.encoder.modules():  # norms that do something
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return PretrainedCaptioner(model, word_tokenizer(WORDS), square_processor(32), family)


@pytest.fixture(scope="session")
def captioners() -> dict[str, PretrainedCaptioner]:
    return {family: tiny(family) for family in ("show-attend-tell", "show-tell")}


@pytest.fixture(params=["show-attend-tell", "show-tell"])
def captioner(request: pytest.FixtureRequest, captioners: dict[str, PretrainedCaptioner]) -> PretrainedCaptioner:
    return captioners[request.param]


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
