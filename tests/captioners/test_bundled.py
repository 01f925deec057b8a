"""The captioners that come with the package: they are whole, small enough, and as good as their cards say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from captionfix.captioners.loading import bundled, load
from captionfix.scoring import score_captions, score_scenes
from captionfix.train_data import read_lines

LIMITS = {"scenes": 8e6, "photos": 25e6, "scenes-show-and-tell": 16e6}
SHARED = Path(os.environ.get("CAPTIONFIX_SHARED", Path(__file__).parents[3] / "shared"))


def test_scenes_and_photos_are_there():
    assert {"scenes", "photos"} <= set(bundled()) <= set(LIMITS)


@pytest.mark.parametrize("name", sorted(bundled()))
def test_folder_is_whole_and_small(name):
    folder = bundled()[name]
    assert sum(file.stat().st_size for file in folder.iterdir()) < LIMITS[name]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert all(f"## {heading}" in card for heading in ("Data", "Recipe", "Scores", "Limits"))
    assert "captionfix train score" in card
    assert "@@" not in card
    assert "licence" in card or "Terms" in card
    captioner = load(name)
    assert captioner.name == name
    assert {p.dtype for p in captioner.model.parameters()} == {torch.float32}


def test_photos_carry_their_terms():
    card = (bundled()["photos"] / "README.md").read_text(encoding="utf-8")
    assert "non-commercial research" in card
    assert "Apache-2.0" in card
    assert all(name in card for name in ("Hodosh", "Young", "Plummer"))


def test_scenes_are_captioned_as_the_card_says():
    score = score_scenes(load("scenes"), 100, start=5000)
    assert score.words > 0.975
    assert score.captions > 0.8


@pytest.mark.skipif(not (SHARED / "photos").is_dir(), reason="no photographs: set CAPTIONFIX_SHARED")
def test_photographs_are_captioned_as_the_card_says():
    examples = read_lines(SHARED / "photos" / "dev.jsonl", SHARED / "photos" / "images")
    score = score_captions(load("photos"), examples[:100])
    assert score.bleu[0] > 0.57
    assert score.bleu[3] > 0.15
