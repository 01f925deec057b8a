"""Metrics against values worked out by hand or by other code."""

from __future__ import annotations

import math

import numpy as np
import pytest

from captionfix.evaluate import data, metrics
from captionfix.evaluate.measure import of_regions


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
    found = {metric: value for _, metric, value in of_regions(maps, [phrase], [phrase.region((10, 10))])}
    assert found["mass"] == pytest.approx(0.5)
    assert found["attention-correctness"] == pytest.approx(1.0)  # the better of its words


def test_only_disjoint_phrases_make_pairs():
    maps = np.stack([spot(2, 2), spot(2, 8), spot(2, 3)])
    phrases = [data.Phrase((k,), "thing") for k in range(3)]
    regions = [LEFT, RIGHT, block(slice(0, 10), slice(0, 4))]  # the third lies in the first
    found = of_regions(maps, phrases, regions, ["discrimination", "discrimination-joint"])
    assert found == [("pair", "discrimination", 1.0), ("pair", "discrimination-joint", 1.0)] * 2


def test_joint_discrimination_compares_sums_once():
    first, second = 0.9 * spot(1, 1) + 0.1 * spot(1, 8), 0.8 * spot(1, 1) + 0.2 * spot(1, 8)
    nearly = (first, second, LEFT, RIGHT)  # own 0.9 + 0.2 against 0.8 + 0.1
    assert metrics.discrimination_joint(*nearly) == 1.0
    assert metrics.discrimination_joint(second, first, LEFT, RIGHT) == 0.0
    assert metrics.discrimination_joint(first, first, LEFT, RIGHT) == 0.5
    small = block(slice(1, 2), slice(1, 2))  # of regions that are not all the picture the two can differ
    elsewhere = 0.5 * spot(1, 1) + 0.45 * spot(1, 8) + 0.05 * spot(9, 0)
    other = 0.6 * spot(1, 1) + 0.4 * spot(1, 9)
    far = block(slice(1, 2), slice(9, 10))
    assert metrics.discrimination(elsewhere, other, small, far) == 0.5  # 0.5 < 0.6 lost, 0.4 > 0 won
    assert metrics.discrimination_joint(elsewhere, other, small, far) == 1.0  # 0.5 + 0.4 > 0.6 + 0
    assert math.isnan(metrics.discrimination_joint(np.zeros((10, 10)), other, small, far))


def test_rank_accuracy_against_sorting():
    rng = np.random.default_rng(3)
    heatmap = rng.random((10, 10))
    region = block(slice(2, 5), slice(3, 9))
    order = sorted((-heatmap[r, c], r, c) for r in range(10) for c in range(10))[: int(region.sum())]
    assert metrics.rank(heatmap, region) == pytest.approx(np.mean([region[r, c] for _, r, c in order]))
    assert math.isnan(metrics.rank(np.zeros((10, 10)), region))


def test_inside_outside_is_a_ratio_of_means_that_ends():
    even = np.ones((10, 10))
    assert metrics.inside_outside(even, LEFT) == pytest.approx(1.0)
    assert metrics.inside_outside(even + 2 * LEFT, LEFT) == pytest.approx(3.0)
    assert metrics.inside_outside(spot(1, 1), LEFT) == 100.0  # nothing outside
    assert math.isnan(metrics.inside_outside(even, np.ones((10, 10), dtype=bool)))
    assert math.isnan(metrics.inside_outside(np.zeros((10, 10)), LEFT))


def test_attention_correctness_is_of_the_best_word_and_of_untouched_maps():
    """The tool known for this metric zeroes its map in place, so that the order of boxes changes its answer."""
    maps = np.stack([spot(1, 1) + spot(1, 8), spot(1, 1) + 3 * spot(2, 2)])
    before = maps.copy()
    assert metrics.attention_correctness(maps, LEFT) == 1.0
    assert metrics.attention_correctness(maps[:1], RIGHT) == 0.5
    np.testing.assert_array_equal(maps, before)


def test_boxes_and_masks_become_the_cells_whose_centres_they_hold():
    box = data.Phrase((0,), "thing", boxes=((0.25, 0.5, 0.75, 1.0),))
    np.testing.assert_array_equal(box.region((4, 2)), [[0, 0, 0, 0], [0, 1, 1, 0]])
    mask = data.Phrase((0,), "thing", mask=np.kron(np.array([[1, 0], [0, 1]]), np.ones((5, 5))).astype(bool))
    np.testing.assert_array_equal(mask.region((2, 2)), [[1, 0], [0, 1]])


def test_regions_of_a_grid_that_covers_a_part_or_more():
    box = data.Phrase((0,), "thing", boxes=((0.5, 0.0, 1.0, 1.0),))
    np.testing.assert_array_equal(box.region((4, 1), (0.25, 0.0, 0.75, 1.0)), [[0, 0, 1, 1]])
    mask = data.Phrase((0,), "thing", mask=np.array([[True, False]]))
    np.testing.assert_array_equal(mask.region((4, 1), (-0.5, 0.0, 1.5, 1.0)), [[0, 1, 0, 0]])
    assert mask.all_boxes == ((0.0, 0.0, 0.5, 1.0),)


def test_scenes_give_each_content_word_its_objects_visible_pixels():
    from captionfix.scenes import scene

    (item,) = data.scenes(1, first_seed=11)
    made = scene(11, split="test")
    assert [p.kind for p in item.phrases] == ["size", "surface", "colour", "shape"] * 2
    for phrase in item.phrases:
        np.testing.assert_array_equal(phrase.region((128, 128)), made.mask(phrase.words[0]))
