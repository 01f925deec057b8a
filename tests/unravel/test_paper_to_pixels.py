"""The paper from a picture to its box, through `explain_classes`, against loops that share nothing with it: sets of
fixations in the picture's own pixels (crop's offset, resize's factor), outliers, heatmap, bounding box."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from reference import Node, Rules, run, unravel
from test_published_rules import NETS
from torch import nn

from captionfix import explain_classes
from captionfix.captioners.preprocess import Preprocess

SHAPES = ("alexnet", "vgg", "googlenet", "resnet")
MEAN, STD = (0.4, 0.5, 0.6), (0.25, 0.3, 0.2)
WIDTH, HEIGHT, SHORTER, SIDE = 75, 50, 20, 16


class Written(nn.Module):
    """A network that is written down as nodes."""

    def __init__(self, nodes: list[Node]):
        super().__init__()
        self.nodes = nodes
        self.precision = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        return run(self.nodes, {"image": x})[-1]


def photograph(seed: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def prepared(picture: Image.Image) -> tuple[torch.Tensor, int, int, int, int]:
    """The centre of the picture after its shorter side is ``SHORTER``; the crop's offset and the resized size."""
    wide, high = SHORTER * WIDTH // HEIGHT, SHORTER
    small = np.asarray(picture.resize((wide, high), Image.Resampling.BILINEAR)).astype(np.float32) / np.float32(255)
    left, top = (wide - SIDE) // 2, (high - SIDE) // 2
    cut = small[top : top + SIDE, left : left + SIDE]
    cut = (cut - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(cut.transpose(2, 0, 1).copy()).double()[None], left, top, wide, high


def slow_outliers(points: list[tuple[float, float]], width: int, height: int) -> list[bool]:
    """The released inequality: more than 5 % of all points, itself one of them, nearer than a tenth of the diagonal."""
    radius = 0.1 * math.hypot(width, height)
    kept = []
    for x, y in points:
        near = sum(math.hypot(x - a, y - b) < radius for a, b in points)
        kept.append(near > 0.05 * len(points))
    return kept


@pytest.mark.parametrize("policy", ["paper", "released"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(2))
def test_fixations_and_box_equal_those_of_slow_loops(shape, seed, policy):
    net, picture = NETS[shape](seed), photograph(seed)
    pixels, left, top, wide, high = prepared(picture)
    values = run(net.nodes, {"image": pixels})
    units = values[-1][0].topk(2).indices.tolist()
    preprocess = Preprocess(resize=SHORTER, crop=SIDE, mean=MEAN, std=STD)
    result = explain_classes(Written(net.nodes), picture, top=2, preprocess=preprocess, policy=policy)
    assert [word.token for word in result] == units
    reached = 0
    for word in result:
        ended, _ = unravel(net.nodes, values, (0, word.token), Rules(paper=True, released=policy == "released"))
        places = {(place[2], place[3]) for number, place, _ in ended if number == 0}
        reached += len(places)
        # where the published code puts a pixel of the crop in the picture: int((place + offset) / factor)
        expected = {(int((c + left) * WIDTH / wide + 1e-9), int((r + top) * HEIGHT / high + 1e-9)) for r, c in places}
        half = (WIDTH / wide / 2, HEIGHT / high / 2)  # ours are the centres of what these pixels show
        corners = {(int(x - half[0] + 1e-3), int(y - half[1] + 1e-3)) for x, y, _ in word.fixations.tolist()}
        assert corners == expected
        assert len(word.fixations) == len(places)
        np.testing.assert_allclose(word.fixations[:, 2], 1 / max(len(places), 1), rtol=1e-6)
        if not places:
            assert word.box() is None
            continue
        centres = [((c + left + 0.5) * WIDTH / wide, (r + top + 0.5) * HEIGHT / high) for r, c in sorted(places)]
        kept = [point for point, stays in zip(centres, slow_outliers(centres, WIDTH, HEIGHT), strict=True) if stays]
        kept = kept or centres
        (x0, y0), (x1, y1) = np.min(kept, axis=0), np.max(kept, axis=0)
        box = (max(x0 - half[0], 0), max(y0 - half[1], 0), min(x1 + half[0], WIDTH), min(y1 + half[1], HEIGHT))
        np.testing.assert_allclose(word.box(), box, atol=1e-4)
    assert reached > 0


class Shapes(nn.Module):
    """A small AlexNet whose last layer keeps many contributors, so that there are many fixations."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.features = nn.Sequential(
            nn.Conv2d(3, 12, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(12, 16, 5, padding=2),
            nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(16 * 13 * 13, 7)

    def forward(self, x):
        return self.head(self.features(x))


def test_outliers_and_heatmap_at_the_papers_scale():
    """A Gaussian of 20 pixels on a picture of 500 x 375, ImageNet's usual size; some fixations lie far from others."""
    width, height, sigma = 500, 375, 20.0
    random = np.random.default_rng(1)
    values = np.full((height, width, 3), 124, np.uint8)  # about the mean, so little speaks for anything
    values[200:350, 100:300] = random.integers(0, 256, (150, 200, 3))
    values[60:66, 380:388] = random.integers(0, 256, (6, 8, 3))
    result = explain_classes(Shapes(), Image.fromarray(values), policy="paper")
    word = result[0]
    points = [(x, y) for x, y, _ in word.fixations.tolist()]
    assert len(points) > 100
    x0, y0, x1, y1 = result.window
    kept = [point for point, stays in zip(points, slow_outliers(points, width, height), strict=True) if stays]
    assert 5 < len(points) - len(kept) < 50
    spread = sigma / (x1 - x0)  # the fraction of the CNN's input that 20 of the picture's pixels are
    assert spread == pytest.approx(sigma / (y1 - y0), rel=2e-3)
    found = word.heatmap(specific=False, sigma=spread)
    rows, columns = np.mgrid[int(y0) + 4 : int(y1) - 3 : 9, int(x0) + 4 : int(x1) - 3 : 9]
    slow = np.zeros(rows.shape)
    for x, y in kept:
        for across in (x, 2 * x0 - x, 2 * x1 - x):  # mirrored at the edges, as OpenCV's blur is
            for down in (y, 2 * y0 - y, 2 * y1 - y):
                slow += np.exp(-((columns + 0.5 - across) ** 2 + (rows + 0.5 - down) ** 2) / (2 * sigma**2))
    compared = found[rows, columns]
    np.testing.assert_allclose(compared / compared.max(), slow / slow.max(), atol=0.02)
    assert compared.max() > 0.95
    xs, ys = np.array(kept).T
    half = ((x1 - x0) / 224 / 2, (y1 - y0) / 224 / 2)
    expected = (xs.min() - half[0], ys.min() - half[1], xs.max() + half[0], ys.max() + half[1])
    np.testing.assert_allclose(word.box(), expected, atol=1e-3)
