"""The second leg's end: fixations count by the place where they lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from captionfix.map_to_pixels import agreeing
from captionfix.maps import density


def bilinear(cells, x, y, size):
    """A map of (h, w) cells at the centre of pixel x, y of a (size, size) picture, by hand: constant at the edges."""
    height, width = cells.shape
    down, across = (y + 0.5) * height / size - 0.5, (x + 0.5) * width / size - 0.5
    down, across = min(max(down, 0.0), height - 1.0), min(max(across, 0.0), width - 1.0)
    top, left = int(down), int(across)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    v, u = down - top, across - left
    upper = (1 - u) * cells[top, left] + u * cells[top, right]
    lower = (1 - u) * cells[bottom, left] + u * cells[bottom, right]
    return float((1 - v) * upper + v * lower)


@pytest.mark.parametrize(
    ("common", "even", "power"), [(0.0, 0.0, 1.0), (0.5, 0.0, 2.0), (1.0, 0.0, 1.0), (0.5, 0.5, 2.0), (0.0, 1.0, 1.0)]
)
@pytest.mark.parametrize("sure", ["all", "some"])
def test_a_fixation_counts_by_its_place(common, even, power, sure):
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(3, 8, 8, generator=generator) * (torch.rand(3, 8, 8, generator=generator) < 0.3)
    mass /= mass.sum((1, 2), keepdim=True)
    mass[2] *= 0.4  # what ended in biases is not there
    place = torch.rand(3, 2, 3, generator=generator)
    trust = torch.tensor([1.0, 0.3, 0.0]) if sure == "some" else None
    parts = agreeing(mass, place, common, even, power, trust)
    assert parts.shape == (3, 2 if even else 1, 8, 8)
    found = parts.sum(1)
    dials = common, even, power
    for word in range(3):
        believed = 1.0 if trust is None else float(trust[word])
        common, even, power = dials[0] * believed, dials[1] * believed, 1 + (dials[2] - 1) * believed
        total = float(mass[word].sum())
        expected = torch.zeros(8, 8)
        for y in range(8):
            for x in range(8):
                shared = sum(float(mass[k, y, x] / mass[k].sum()) for k in range(3)) / 3
                own = float(mass[word, y, x]) / total
                there = (1 - even) * ((1 - common) * own + common * shared) + even / 64
                expected[y, x] = there * bilinear(place[word], x, y, 8) ** power
        assert torch.allclose(found[word], expected * total / expected.sum(), atol=1e-6)
        if dials[1]:  # 8 pixels are fewer than 40 points: one on every pixel
            level = [[bilinear(place[word], x, y, 8) ** power for x in range(8)] for y in range(8)]
            evenly = torch.tensor(level) * even / 64 * total / expected.sum()
            assert torch.allclose(parts[word, 1], evenly, atol=1e-6)


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1), st.floats(0.5, 3), st.floats(0, 1))
def test_every_word_keeps_its_mass(seed, common, even, power, sure):
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(4, 6, 5, generator=generator) * torch.tensor([1.0, 1e-6, 3.0, 0.0])[:, None, None]
    place = torch.rand(4, 3, 3, generator=generator) * (torch.rand(4, 3, 3, generator=generator) < 0.5)
    place[0] = 0  # a place that says nothing leaves the word as it is
    trust = torch.tensor([1.0, 0.5, sure, 1.0])
    found = agreeing(mass, place, common, even, power, trust).sum(1)
    assert torch.allclose(found.sum((1, 2)), mass.sum((1, 2)), rtol=1e-4)
    assert bool((found >= 0).all())
    if common == 0 and even == 0:
        assert torch.equal(found[0], mass[0])
    assert not found[3].any()  # a word without evidence gets none of the others'


@pytest.mark.parametrize("size", [(224, 224), (320, 320), (299, 200)])
def test_what_lies_evenly_is_even_when_it_is_smoothed(size):
    mass = torch.zeros(1, *size)
    mass[0, 3, 5] = 1
    found = agreeing(mass, torch.ones(1, 1, 1), even=1.0)[0, 1]
    assert int((found > 0).sum()) < 4700
    row, column = torch.nonzero(found, as_tuple=True)
    points = torch.stack([column + 0.5, row + 0.5, found[row, column]], 1).numpy()
    image = (size[1], size[0])
    smooth = density(points, image, (0.0, 0.0, float(image[0]), float(image[1])), image)
    inner = smooth[size[0] // 10 : -size[0] // 10, size[1] // 10 : -size[1] // 10]
    assert inner.max() < 1.05 * inner.min()
