"""Metrics against values worked out by hand or by other code."""

from __future__ import annotations

import math

import numpy as np
import pytest

from captionfix.evaluate import data, metrics
from captionfix.evaluate.grounding import score


def spot(row: int, column: int) -> np.ndarray:
    heatmap = np.zeros((10, 10))
    heatmap[row, column] = 1.0
    return heatmap


def block(rows: slice, columns: slice) -> np.ndarray:
    region = np.zeros((10, 10), dtype=bool)
    region[rows, columns] = True
    return region


LEFT, RIGHT = block(slice(0, 10), slice(0, 5)), block(slice(0, 10), slice(5, 10))


def test_pointing_is_a_hit_inside_and_a_miss_outside():
    assert metrics.pointing(spot(3, 4), LEFT) == 1.0
    assert metrics.pointing(spot(3, 5), LEFT) == 0.0


@pytest.mark.parametrize(("tolerance", "hit"), [(2.0, 0.0), (2.1, 1.0)])
def test_pointing_tolerance_is_a_strict_distance_to_the_region(tolerance, hit):
    assert metrics.pointing(spot(3, 6), LEFT, tolerance) == hit


def test_ties_go_to_the_first_in_reading_order():
    both = spot(5, 2) + spot(5, 7)
    assert metrics.pointing(both, LEFT) == 1.0
    assert metrics.pointing(both, RIGHT) == 0.0


def test_nothing_is_never_a_hit():
    nowhere = np.zeros((10, 10), dtype=bool)
    assert math.isnan(metrics.pointing(np.zeros((10, 10)), LEFT))
    assert math.isnan(metrics.pointing(spot(1, 1), nowhere))
    assert math.isnan(metrics.mass(np.zeros((10, 10)), LEFT))
    assert math.isnan(metrics.discrimination(np.zeros((10, 10)), spot(1, 1), LEFT, RIGHT))


def test_mass_is_the_part_inside():
    assert metrics.mass(3 * spot(1, 1) + spot(1, 8), LEFT) == pytest.approx(0.75)


def test_discrimination_counts_both_comparisons():
    assert metrics.discrimination(spot(1, 1), spot(1, 8), LEFT, RIGHT) == 1.0
    assert metrics.discrimination(spot(1, 8), spot(1, 1), LEFT, RIGHT) == 0.0
    assert metrics.discrimination(spot(1, 1), spot(1, 1), LEFT, RIGHT) == 0.5  # the same map tells nothing
    middle = block(slice(0, 2), slice(8, 9))
    assert metrics.discrimination(spot(1, 1), spot(5, 5), LEFT, middle) == 0.75  # one won, one tied at nothing


def test_interval_resamples_images_not_words():
    values = [1.0] * 50 + [0.0] * 50
    together = metrics.mean(values, images=[0] * 50 + [1] * 50)
    apart = metrics.mean(values)
    assert (together.value, together.count) == (0.5, 100)
    assert (together.low, together.high) == (0.0, 1.0)  # two images: both, or one of them twice
    assert 0.35 < apart.low < apart.high < 0.65


def test_mean_leaves_out_and_counts_what_is_undefined():
    found = metrics.mean([1.0, math.nan, 0.0])
    assert (found.value, found.count, found.undefined) == (0.5, 2, 1)


def test_a_phrase_sums_its_words_normalised_maps():
    maps = np.stack([100 * spot(2, 2), spot(2, 8)])  # the strong map must not drown the weak one
    phrase = data.Phrase((0, 1), "thing", boxes=((0.0, 0.0, 0.5, 1.0),))
    found = {s.metric: s.value for s in score(maps, [phrase], 0)}
    assert found["mass"] == pytest.approx(0.5)


def test_boxes_and_masks_become_the_cells_whose_centres_they_hold():
    box = data.Phrase((0,), "thing", boxes=((0.25, 0.5, 0.75, 1.0),))
    np.testing.assert_array_equal(box.region((4, 2)), [[0, 0, 0, 0], [0, 1, 1, 0]])
    mask = data.Phrase((0,), "thing", mask=np.kron(np.array([[1, 0], [0, 1]]), np.ones((5, 5))).astype(bool))
    np.testing.assert_array_equal(mask.region((2, 2)), [[1, 0], [0, 1]])


def test_scenes_give_each_content_word_its_objects_visible_pixels():
    from captionfix.scenes import scene

    (item,) = data.scenes(1, first_seed=11)
    made = scene(11, split="test")
    assert [p.kind for p in item.phrases] == ["size", "surface", "colour", "shape"] * 2
    for phrase in item.phrases:
        np.testing.assert_array_equal(phrase.region((128, 128)), made.mask(phrase.words[0]))


def test_lines_format(tmp_path):
    import json

    from PIL import Image

    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    words = ["A", "black", "dog", ",", "running", "on", "the", "Grass", "."]
    phrases = [
        {"span": [0, 3], "entity": 1, "types": ["animals"], "boxes": [[0, 0, 0.5, 0.5]]},
        {"span": [6, 8], "entity": 2, "types": ["scene"]},
        {"span": [4, 5], "entity": 0, "types": ["notvisual"]},
    ]
    line = {"photo": "a.png", "width": 8, "height": 8, "captions": [{"words": words, "phrases": phrases}]}
    (tmp_path / "dev.jsonl").write_text(json.dumps(line) + "\n")
    (item,) = data.lines(tmp_path / "dev.jsonl")
    assert item.words == ("a", "black", "dog", "running", "on", "the", "grass")
    assert [(p.words, p.kind) for p in item.phrases] == [((1, 2), "animals")]


def test_damaged_lines_are_named(tmp_path):
    from captionfix.errors import DataError

    (tmp_path / "dev.jsonl").write_text('{"photo": "a.png"}\n')
    with pytest.raises(DataError, match="line 1"):
        list(data.lines(tmp_path / "dev.jsonl"))
    with pytest.raises(DataError, match="no such file"):
        list(data.lines(tmp_path / "none.jsonl"))
