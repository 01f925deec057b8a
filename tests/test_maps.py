"""Maps against straightforward loops over the definitions."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captionfix import maps

SIZE, WINDOW, GRID = (300, 200), (0.0, 0.0, 300.0, 200.0), (30, 40)


def scattered(seed: int, count: int = 80) -> np.ndarray:
    """Fixations at centres of the grid's pixels, two clusters and some strays, with unequal mass."""
    random = np.random.default_rng(seed)
    centres = random.random((2, 2))
    points = np.where(
        random.random((count, 1)) < 0.8,
        centres[random.integers(0, 2, count)] + random.normal(0, 0.04, (count, 2)),
        random.random((count, 2)),
    )
    cells = np.floor(np.clip(points, 0, 0.999) * GRID) + 0.5
    mass = random.exponential(1, count)
    return np.column_stack([cells / GRID * SIZE, mass / mass.sum()]).astype(np.float32)


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_outliers_are_those_of_a_loop_over_pairs(seed: int) -> None:
    points = scattered(seed).astype(np.float64)
    radius = 0.1 * np.hypot(*SIZE)
    near = np.array([points[np.hypot(*(points[:, :2] - p[:2]).T) <= radius + 1e-3, 2].sum() for p in points])
    expected = near >= 0.05 * points[:, 2].sum()
    clear = np.abs(near - 0.05) > 1e-6  # at the threshold itself, rounding decides
    np.testing.assert_array_equal(maps.keep(points, SIZE, WINDOW, GRID)[clear], expected[clear])


def test_a_heavy_fixation_is_no_outlier_and_a_light_stray_is() -> None:
    points = np.array([[15, 100, 0.9], [285, 100, 0.06], [285, 30, 0.04]], dtype=np.float32)
    assert maps.keep(points, SIZE, WINDOW, GRID).tolist() == [True, True, False]


def test_if_all_are_outliers_none_is() -> None:
    side = np.linspace(5, 295, 8)
    points = np.array([[x, y, 1 / 64] for x in side for y in side])
    everywhere = (1000, 1000), (0.0, 0.0, 1000.0, 1000.0), (30, 40)
    spread = points * [1000 / 300, 1000 / 300, 1]
    assert maps.keep(spread * [1, 1, 1], *everywhere).any()
    assert maps.keep(np.array([[5.0, 5.0, 0.0]]), SIZE, WINDOW, GRID).all()


@pytest.mark.parametrize("place", [(15.5, 20.5), (0.5, 0.5), (29.5, 3.5)])
def test_density_of_one_fixation_is_a_reflected_gaussian(place: tuple[float, float]) -> None:
    sigma = 0.1
    points = np.array([[place[0] * 10, place[1] * 5, 0.7]], dtype=np.float32)
    result = maps.density(points, SIZE, WINDOW, GRID, sigma)

    def along(length: int, centre: float, spread: float) -> np.ndarray:
        at = np.arange(length) + 0.5
        images = [centre, -centre, 2 * length - centre]
        values = sum(np.exp(-0.5 * ((at - image) / spread) ** 2) for image in images)
        return np.asarray(values / (spread * np.sqrt(2 * np.pi)))

    expected = np.outer(along(GRID[1], place[1], sigma * GRID[1]), along(GRID[0], place[0], sigma * GRID[0]))
    np.testing.assert_allclose(result, expected, atol=2e-4 * expected.max())
    assert result.dtype == np.float32


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.02, 0.5, None]))
@settings(max_examples=20, deadline=None)
def test_density_conserves_mass(seed: int, sigma: float | None) -> None:
    result = maps.density(scattered(seed), SIZE, WINDOW, GRID, sigma)
    assert result.shape == (GRID[1], GRID[0])
    assert result.min() >= 0
    assert result.sum() == pytest.approx(1, abs=1e-4)


def test_no_fixations_no_map() -> None:
    nothing = np.zeros((0, 3), dtype=np.float32)
    empty = maps.density(nothing, SIZE, WINDOW, GRID)
    assert not empty.any()
    assert maps.around(nothing, SIZE, WINDOW, GRID) is None
    assert maps.peak(empty, WINDOW) is None
    assert not maps.resize(empty, SIZE, WINDOW).any()


def test_histogram_leaves_out_what_lies_outside_the_window() -> None:
    window = (100.0, 0.0, 200.0, 200.0)
    points = np.array([[50, 100, 0.5], [101, 1, 0.25], [200, 200, 0.25]], dtype=np.float32)
    result = maps.histogram(points, window, (10, 10))
    assert result[0, 0] == 0.25
    assert result[9, 9] == 0.25
    assert result.sum() == 0.5


def test_specific_is_the_excess_over_the_mean() -> None:
    random = np.random.default_rng(0)
    each = random.random((3, 4, 5))
    each /= each.sum(axis=(1, 2), keepdims=True)
    each = np.concatenate([each, np.zeros((1, 4, 5))])  # a word without evidence does not count
    result = maps.specific(each)
    for word in range(3):
        np.testing.assert_allclose(result[word], np.maximum(each[word] - each[:3].sum(0) / 3, 0), atol=1e-7)
    assert not result[3].any()
    assert not maps.specific(np.stack([each[0], each[0]])).any()
    np.testing.assert_allclose(maps.specific(each[[0, 3]])[0], each[0], atol=1e-7)


@pytest.mark.parametrize(
    ("size", "grid"),
    [((300, 200), (30, 40)), ((300, 200), (1, 1)), ((7, 5), (2, 3)), ((50, 40), (40, 40)), ((1, 1), (1, 1))],
)
def test_resize_reads_the_map_bilinearly(size: tuple[int, int], grid: tuple[int, int]) -> None:
    values = np.random.default_rng(1).random((grid[1], grid[0]))
    window = (0.1 * size[0], 0.0, 0.9 * size[0], float(size[1]))
    result = maps.resize(values, size, window)
    assert result.shape == (size[1], size[0])

    def at(row: int, column: int) -> float:
        x = (column + 0.5 - window[0]) / (window[2] - window[0]) * grid[0] - 0.5
        y = (row + 0.5 - window[1]) / (window[3] - window[1]) * grid[1] - 0.5
        if not (-0.5 <= x <= grid[0] - 0.5):
            return 0.0
        x, y = min(max(x, 0), grid[0] - 1), min(max(y, 0), grid[1] - 1)
        left, upper = int(x), int(y)
        right, lower = min(left + 1, grid[0] - 1), min(upper + 1, grid[1] - 1)
        above = values[upper, left] * (1 - x + left) + values[upper, right] * (x - left)
        below = values[lower, left] * (1 - x + left) + values[lower, right] * (x - left)
        return float(above * (1 - y + upper) + below * (y - upper))

    for row in {0, size[1] // 2, size[1] - 1}:
        for column in {0, size[0] // 10, size[0] // 2, size[0] - 1}:
            assert result[row, column] == pytest.approx(at(row, column), abs=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 5), (15, 20)])
def test_resize_to_fewer_pixels_passes_over_nothing(size: tuple[int, int]) -> None:
    window = (0.0, 0.0, float(size[0]), float(size[1]))
    np.testing.assert_allclose(maps.resize(np.ones((40, 30)), size, window), 1, atol=1e-5)
    for row, column in [(0, 0), (39, 29), (13, 17)]:
        spot = np.zeros((40, 30))
        spot[row, column] = 1
        result = maps.resize(spot, size, window)
        top = np.unravel_index(result.argmax(), result.shape)
        assert top == (int((row + 0.5) / 40 * size[1]), int((column + 0.5) / 30 * size[0]))


def test_box_holds_the_cluster_and_not_the_stray() -> None:
    cluster = [[x, y, 1.0] for x in (105, 115, 125) for y in (52.5, 57.5)]
    points = np.array([*cluster, [285, 12.5, 0.1]], dtype=np.float32)
    assert maps.around(points, SIZE, WINDOW, GRID, share=1) == (100, 50, 130, 60)


def test_box_cuts_the_tails_by_mass() -> None:
    points = np.array([[5 + 10 * k, 102.5, 1] for k in range(10)], dtype=np.float32)  # a row, 0 to 100
    assert maps.around(points, SIZE, WINDOW, GRID, share=1) == (0, 100, 100, 105)
    assert maps.around(points, SIZE, WINDOW, GRID, share=0.8) == (10, 100, 90, 105)
    points[0, 2] = 9  # half of the mass at the left
    assert maps.around(points, SIZE, WINDOW, GRID, share=0.8) == (0, 100, 90, 105)
    with pytest.raises(ValueError, match="share"):
        maps.around(points, SIZE, WINDOW, GRID, share=0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), height=st.integers(1, 9), width=st.integers(1, 9), few=st.floats(0.05, 1))
def test_no_other_box_stands_out_more(seed: int, height: int, width: int, few: float) -> None:
    generator = np.random.default_rng(seed)
    grid_map = generator.exponential(size=(height, width)) * (generator.random((height, width)) < few)
    grid_map[generator.integers(height), generator.integers(width)] = 1
    found = maps.box(grid_map, (width, height), (0.0, 0.0, float(width), float(height)))
    assert found is not None

    def stands_out(x0: int, y0: int, x1: int, y1: int) -> float:
        held = sum(grid_map[y][x] ** 0.5 for y in range(y0, y1) for x in range(x0, x1))
        return held / np.sqrt(grid_map).sum() - 0.5 * (x1 - x0) * (y1 - y0) / (width * height)

    columns, rows = list(combinations(range(width + 1), 2)), list(combinations(range(height + 1), 2))
    best = max(stands_out(x0, y0, x1, y1) for x0, x1 in columns for y0, y1 in rows)
    x0, y0, x1, y1 = (round(edge) for edge in found)
    assert stands_out(x0, y0, x1, y1) == pytest.approx(best)


def test_a_box_lies_in_the_image_where_its_map_does() -> None:
    assert maps.box(np.ones((40, 30)), SIZE, WINDOW) == (0, 0, *SIZE)  # an even map stands out nowhere
    assert maps.box(np.zeros((40, 30)), SIZE, WINDOW) is None
    spot = np.zeros((200, 300))
    spot[50:100, 90:120] = 1
    # a window of 400 x 300, 30 of it left of the image: 4/3 and 1.5 pixels each
    x0, y0, x1, y1 = maps.box(spot, (400, 320), (-30.0, 10.0, 370.0, 310.0)) or (0, 0, 0, 0)
    block = 400 / maps.BLOCKS  # edges lie between blocks
    assert (x0, y0, x1, y1) == pytest.approx((90, 85, 130, 160), abs=block)
    assert max(x0 - 90, y0 - 85, 130 - x1, 160 - y1) <= 1e-6
    spot[:] = 0
    spot[:, :60] = 1
    assert maps.box(spot, (400, 320), (-30.0, 10.0, 370.0, 310.0)) == pytest.approx((0, 10, 50, 310), abs=block)


def test_peak_is_in_original_pixels() -> None:
    values = np.zeros((4, 10))
    values[3, 2] = 1
    assert maps.peak(values, (100.0, 0.0, 200.0, 40.0)) == (125.0, 35.0)
