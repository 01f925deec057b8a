"""Tiny captioners with random weights, one of each family."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from captionfix.captioners import models
from captionfix.captioners.pretrained import PretrainedCaptioner
from captionfix.captioners.words import SPECIAL, square_processor, word_tokenizer

sys.path.insert(0, str(Path(__file__).parent))  # families.py

CNN = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
WORDS = [*SPECIAL, "a", "red", "dog", "runs", "t-shirt", "man's"]


def tiny(family: str, seed: int = 0, **settings: object) -> PretrainedCaptioner:
    torch.manual_seed(seed)
    common = {
        "cnn": CNN,
        "image_size": 32,
        "feature_size": 12,
        "vocab_size": len(WORDS),
        "word_size": 16,
        "hidden_size": 16,
        "dropout": 0.3,
        "max_words": 8,
    }
    model: models.CaptionerModel
    if family == "show-tell":
        model = models.ShowTellModel(models.ShowTellConfig(**{**common, "pool": 2, **settings}))
    else:
        attention = {"value_size": 14, "attention_size": 10, "positions": (4, 4), "tie_words": True}
        model = models.ShowAttendTellModel(models.ShowAttendTellConfig(**{**common, **attention, **settings}))
    with torch.no_grad():  # larger weights: words differ clearly in probability, captions in length
        for parameter in model.decoder.parameters():
            parameter.mul_(2.5)
    return PretrainedCaptioner(model, word_tokenizer(WORDS), square_processor(32), "tiny")


@pytest.fixture(params=["show-attend-tell", "show-tell"])
def captioner(request: pytest.FixtureRequest) -> PretrainedCaptioner:
    return tiny(request.param)


@pytest.fixture
def make():
    return tiny


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(7))
