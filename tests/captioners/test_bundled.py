"""The captioners that come with the package: they are whole, small enough, and as good as their cards say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from captionfix.captioners.loading import bundled, load
from captionfix.evaluate.data import lines
from captionfix.evaluate.measure import Plan
from captionfix.evaluate.report import ALL, summarise
from captionfix.evaluate.run import fingerprint, run
from captionfix.scoring import score_captions, score_scenes
from captionfix.train_data import read_lines

LIMITS = {"scenes": 8e6, "photos": 25e6, "photos-show-and-tell": 18e6, "scenes-show-and-tell": 16e6}
SHARED = Path(os.environ.get("CAPTIONFIX_SHARED", Path(__file__).parents[3] / "shared"))


def test_scenes_and_photos_are_there():
    assert {"scenes", "photos", "photos-show-and-tell"} <= set(bundled()) <= set(LIMITS)


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


@pytest.mark.parametrize("name", ["photos", "photos-show-and-tell"])
def test_photos_carry_their_terms(name):
    card = (bundled()[name] / "README.md").read_text(encoding="utf-8")
    assert "non-commercial research" in card
    assert "Apache-2.0" in card
    assert all(name in card for name in ("Hodosh", "Young", "Plummer"))


def test_scenes_are_captioned_as_the_card_says():
    score = score_scenes(load("scenes"), 100, start=5000)
    assert score.words > 0.975
    assert score.captions > 0.8


photographs = pytest.mark.skipif(not (SHARED / "photos").is_dir(), reason="no photographs: set CAPTIONFIX_SHARED")


@photographs
@pytest.mark.parametrize(
    ("name", "unigrams", "fourgrams"), [("photos", 0.57, 0.15), ("photos-show-and-tell", 0.48, 0.1)]
)
def test_photographs_are_captioned_as_the_card_says(name, unigrams, fourgrams):
    examples = read_lines(SHARED / "photos" / "dev.jsonl", SHARED / "photos" / "images")
    score = score_captions(load(name), examples[:60])
    assert score.bleu[0] > unigrams
    assert score.bleu[3] > fourgrams


@photographs
@pytest.mark.parametrize("name", ["photos", "photos-show-and-tell"])
def test_phrases_of_photographs_are_found_and_told_apart(name, tmp_path):
    """The default is above the centre (0.49, 0.35, 0.50) by far on twelve photographs too."""
    captioner, place, wanted = load(name), SHARED / "photos" / "dev.jsonl", ("pointing", "mass", "discrimination")
    plan = Plan(name, fingerprint(captioner), {"data": str(place)}, ("default",), wanted)
    records, _ = run(captioner, lambda: lines(place, 12), plan, tmp_path)
    means = {line.metric: line.mean.value for line in summarise(records) if (line.maps, line.kind) == ("raw", ALL)}
    assert means["pointing"] > 0.57
    assert means["mass"] > 0.5
    assert means["discrimination"] > 0.65
