"""From fixations to maps and boxes (METHOD: fixations, heatmap, specific map, box). numpy alone.

Coordinates are those of the original image, x before y, continuous: the image spans 0..width and 0..height, so the
centre of its first pixel is (0.5, 0.5). Maps are computed on the grid of the CNN's input, where fixations lie, and only
the finished map is resized to the original: a photograph of 12 million pixels costs little more than a small one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Box = tuple[float, float, float, float]

SIGMA = 0.01
"""Standard deviation of the heatmap's Gaussian, as a fraction of the CNN's input (each side by itself)."""
NEIGHBOURHOOD = 0.10
"""Radius, as a fraction of the original's diagonal, in which a fixation needs company (the paper's value)."""
COMPANY = 0.05
"""Part of a word's mass that has to lie in that neighbourhood (the paper's value)."""
SHARED = 0.25
"""Part of the mean over the caption's words that is taken off a map before its box is sought."""
EVEN = 0.5
"""Of what an even map would hold in a box: what a box has to hold more than (`box`)."""
BLOCKS = 64
"""Parts of either side at whose edges a box may begin and end."""


def histogram(points: NDArray[np.floating], window: Box, grid: tuple[int, int]) -> NDArray[np.float64]:
    """Mass of the fixations on the grid of the CNN's input.

    Args:
        points: (n, 3): x, y in original pixels, mass.
        window: x0, y0, x1, y1: the part of the original that the input shows.
        grid: Width and height of the input.

    Returns:
        (grid height, grid width). Points outside the window are left out.
    """
    columns, rows, inside = _cells(points, window, grid)
    result = np.zeros((grid[1], grid[0]))
    np.add.at(result, (rows[inside], columns[inside]), points[inside, 2].astype(np.float64))
    return result


def keep(points: NDArray[np.floating], size: tuple[int, int], window: Box, grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Which fixations are no outliers.

    The paper (its section on localisation) drops a fixation with fewer than 5 % of the others within a tenth of the
    image's diagonal. Here fixations have mass, so it is counted by mass: a fixation stays if at least 5 % of the
    word's mass, its own included, lies within a tenth of the diagonal. If none would stay, all do.

    Args:
        points: (n, 3): x, y in original pixels, mass.
        size: Width and height of the original.
        window: The part of the original that the CNN's input shows.
        grid: Width and height of the input. Fixations are taken to be at the centres of its pixels.

    Returns:
        (n,) true where the fixation stays.
    """
    mass = histogram(points, window, grid)
    total = mass.sum()
    if total <= 0:
        return np.ones(len(points), dtype=bool)
    near = _neighbourhood(mass, NEIGHBOURHOOD * float(np.hypot(*size)), window)
    columns, rows, inside = _cells(points, window, grid)
    kept = np.zeros(len(points), dtype=bool)
    kept[inside] = near[rows[inside], columns[inside]] >= (COMPANY - 1e-9) * total
    return kept if points[kept, 2].sum() > 0 else np.ones(len(points), dtype=bool)


def density(
    points: NDArray[np.floating],
    size: tuple[int, int],
    window: Box,
    grid: tuple[int, int],
    sigma: float | None = None,
    drop_outliers: bool = False,
) -> Floats:
    """A word's smooth map: its fixations under a Gaussian.

    Args:
        points: (n, 3): x, y in original pixels, mass.
        size: Width and height of the original.
        window: The part of the original that the CNN's input shows.
        grid: Width and height of the input.
        sigma: The Gaussian's standard deviation as a fraction of the input's width and height; None for ``SIGMA``. 0
            for none.
        drop_outliers: Whether outliers (`keep`) are left out, as in the paper, where all fixations weigh the same. With
            masses a stray one weighs little, and without it a whole region may hold nothing.

    Returns:
        (grid height, grid width), sum 1 (all 0 without fixations). The Gaussian is reflected at the edges, so that no
        mass is lost.
    """
    mass = histogram(points[keep(points, size, window, grid)] if drop_outliers else points, window, grid)
    total = mass.sum()
    if total <= 0:
        return np.zeros((grid[1], grid[0]), dtype=np.float32)
    spread = SIGMA if sigma is None else sigma
    smooth = _gaussian(grid[1], spread * grid[1]) @ (mass / total) @ _gaussian(grid[0], spread * grid[0]).T
    return smooth.astype(np.float32)


def specific(maps: NDArray[np.floating], part: float = 1.0) -> Floats:
    """What each word's map has more than the caption's words have on average.

    A word's normalised map minus ``part`` of the mean over those words that have a map, negative parts cut to 0. With
    fewer than two such words there is nothing to compare with, and the maps stay as they are.

    Args:
        maps: (words, height, width), each with sum 1 or all 0.
        part: How much of the mean is taken off.

    Returns:
        (words, height, width), not normalised: a word that shares its evidence with all others keeps little.
    """
    present = maps.sum(axis=(1, 2)) > 0
    if present.sum() < 2:
        return maps.astype(np.float32)
    excess = np.maximum(maps - part * maps[present].mean(axis=0), 0)
    excess[~present] = 0
    return excess.astype(np.float32)


def resize(grid_map: NDArray[np.floating], size: tuple[int, int], window: Box) -> Floats:
    """A map on the grid of the CNN's input, bilinearly on the original's pixels (averaged where those are larger).

    Args:
        grid_map: (grid height, grid width).
        size: Width and height of the original.
        window: The part of the original that the grid covers.

    Returns:
        (height, width), 0 outside the window.
    """
    height, width = grid_map.shape
    across = _interpolation(size[0], width, window[0], window[2])
    down = _interpolation(size[1], height, window[1], window[3])
    return down @ grid_map.astype(np.float32) @ across.T


def box(grid_map: NDArray[np.floating], size: tuple[int, int], window: Box) -> Box | None:
    """The box in which a word's map stands out.

    Of all boxes the one with the largest sum of sqrt(m) / sum(sqrt(m)) - ``EVEN`` / N over its pixels, where m is the
    map and N the number of its pixels: what the box holds, less a part of what it would hold of an even map (a box with
    the largest sum of scores: Lampert, Blaschko, Hofmann 2008, "Beyond sliding windows"). The square root, since
    evidence is dense on what decides, and a thing is as large as all that speaks for it. The box's edges are those of
    ``BLOCKS`` blocks along either side.

    Args:
        grid_map: (grid height, grid width).
        size: Width and height of the original.
        window: The part of the original that the grid covers.

    Returns:
        x0, y0, x1, y1 in original pixels, not beyond the image, or None for a map of zeros.
    """
    score = np.sqrt(np.maximum(grid_map, 0).astype(np.float64))
    if not score.any():
        return None
    score = score / score.sum() - EVEN / score.size
    down, across = (np.unique(np.linspace(0, side, BLOCKS + 1).round().astype(int)) for side in score.shape)
    blocks = np.add.reduceat(np.add.reduceat(score, down[:-1], axis=0), across[:-1], axis=1)
    above = np.concatenate([np.zeros((1, blocks.shape[1])), blocks.cumsum(0)])
    top, bottom = np.triu_indices(len(above), 1)
    left_of = np.concatenate([np.zeros((len(top), 1)), (above[bottom] - above[top]).cumsum(1)], axis=1)
    held = left_of[:, 1:] - np.minimum.accumulate(left_of[:, :-1], axis=1)
    rows, right = np.unravel_index(held.argmax(), held.shape)
    left = left_of[rows, : right + 1].argmin()
    edges = np.array([across[left], down[top[rows]], across[right + 1], down[bottom[rows]]])
    corner, step = np.array(window[:2]), (np.array(window[2:]) - window[:2]) / (score.shape[1], score.shape[0])
    x0, y0, x1, y1 = (np.tile(corner, 2) + edges * np.tile(step, 2)).clip(0, np.tile(size, 2)).tolist()
    return x0, y0, x1, y1


def around(
    points: NDArray[np.floating], size: tuple[int, int], window: Box, grid: tuple[int, int], share: float = 1.0
) -> Box | None:
    """The box around a word's points, as published.

    Outliers are dropped; then each axis by itself is cut to the central part that holds ``share`` of the mass. The
    box reaches to the outer edges of the input's pixels that hold it, and not beyond the image.

    Args:
        points: (n, 3): x, y in original pixels, mass.
        size: Width and height of the original.
        window: The part of the original that the CNN's input shows.
        grid: Width and height of the input.
        share: Part of the mass to hold along each axis, 0 < share <= 1; with 1 all that are no outliers.

    Returns:
        x0, y0, x1, y1 in original pixels, or None without points.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, not above 0 and at most 1")
    kept = points[keep(points, size, window, grid)]
    kept = kept[kept[:, 2] > 0]
    if len(kept) == 0:
        return None
    half = (window[2] - window[0]) / grid[0] / 2, (window[3] - window[1]) / grid[1] / 2
    x0, x1 = _central(kept[:, 0], kept[:, 2], share, half[0], size[0])
    y0, y1 = _central(kept[:, 1], kept[:, 2], share, half[1], size[1])
    return x0, y0, x1, y1


def peak(grid_map: NDArray[np.floating], window: Box) -> tuple[float, float] | None:
    """x, y in original pixels of a map's maximum (the centre of that grid pixel), or None for a map of zeros."""
    if not np.any(grid_map > 0):
        return None
    row, column = np.unravel_index(int(np.argmax(grid_map)), grid_map.shape)
    height, width = grid_map.shape
    return (
        float(window[0] + (column + 0.5) * (window[2] - window[0]) / width),
        float(window[1] + (row + 0.5) * (window[3] - window[1]) / height),
    )


def _cells(
    points: NDArray[np.floating], window: Box, grid: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Grid column and row of each point, and whether it lies in the window."""
    across = (points[:, 0].astype(np.float64) - window[0]) / (window[2] - window[0]) * grid[0]
    down = (points[:, 1].astype(np.float64) - window[1]) / (window[3] - window[1]) * grid[1]
    inside = (across > -0.5) & (across < grid[0] + 0.5) & (down > -0.5) & (down < grid[1] + 0.5)
    columns = np.clip(np.floor(np.where(inside, across, 0)).astype(np.int64), 0, grid[0] - 1)
    rows = np.clip(np.floor(np.where(inside, down, 0)).astype(np.int64), 0, grid[1] - 1)
    return columns, rows, inside


def _neighbourhood(mass: NDArray[np.float64], radius: float, window: Box) -> NDArray[np.float64]:
    """For each grid pixel the mass within ``radius`` original pixels of it: a convolution with a disc."""
    height, width = mass.shape
    step_x, step_y = (window[2] - window[0]) / width, (window[3] - window[1]) / height
    reach_x, reach_y = min(int(radius / step_x), width - 1), min(int(radius / step_y), height - 1)
    dx = np.arange(-reach_x, reach_x + 1) * step_x
    dy = np.arange(-reach_y, reach_y + 1) * step_y
    disc = (dx[None, :] ** 2 + dy[:, None] ** 2 <= radius**2 * (1 + 1e-9)).astype(np.float64)
    shape = (height + 2 * reach_y, width + 2 * reach_x)  # large enough that nothing wraps around
    spectrum = np.fft.rfft2(mass, shape) * np.fft.rfft2(disc, shape)
    near = np.fft.irfft2(spectrum, shape)
    return near[reach_y : reach_y + height, reach_x : reach_x + width]


def _gaussian(length: int, sigma: float) -> NDArray[np.float64]:
    """(length, length): a Gaussian blur along one axis as a matrix, reflected at both ends; rows and columns sum to
    1.
    """
    if sigma <= 0:
        return np.eye(length)
    reach = int(np.ceil(4 * sigma))
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    source = (np.arange(length)[:, None] + offsets[None, :]) % (2 * length)
    source = np.where(source < length, source, 2 * length - 1 - source)
    matrix = np.zeros((length, length))
    np.add.at(matrix, (np.arange(length)[:, None], source), weights[None, :])
    return matrix


def _interpolation(length: int, cells: int, low: float, high: float) -> Floats:
    """(length, cells): weights of the grid's cells, which span low..high, at ``length`` pixels.

    Bilinear; where a pixel is larger than a cell the triangle is as wide as the pixel, so that no cell is passed over.
    """
    per_pixel = cells / (high - low)
    at = (np.arange(length) + 0.5 - low) * per_pixel - 0.5
    inside = (at >= -0.5) & (at <= cells - 0.5)
    distance = np.abs(at[:, None] - np.arange(cells)[None, :])
    matrix = np.maximum(1 - distance / max(1.0, per_pixel), 0) * inside[:, None]
    total = matrix.sum(axis=1, keepdims=True)
    return (matrix / np.where(total > 0, total, 1)).astype(np.float32)


def _central(
    values: NDArray[np.floating], mass: NDArray[np.floating], share: float, half: float, limit: int
) -> tuple[float, float]:
    order = np.argsort(values, kind="stable")
    ordered = values[order].astype(np.float64)
    rising = np.cumsum(mass[order].astype(np.float64))
    tail = (1 - share) / 2 * rising[-1]
    little = 1e-9 * rising[-1]
    first = int(np.searchsorted(rising, tail + little, side="right"))
    last = int(np.searchsorted(rising, rising[-1] - tail - little, side="left"))
    first, last = min(first, len(ordered) - 1), min(last, len(ordered) - 1)
    return max(0.0, float(ordered[first]) - half), min(float(limit), float(ordered[last]) + half)
