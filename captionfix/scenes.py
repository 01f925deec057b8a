"""Generated pictures, each with a caption that the picture determines and an exact mask for every word.

A scene holds two or three things (shape x colour x size x surface) on a textured, noisy background. Its caption is
``a SIZE SURFACE COLOUR SHAPE RELATION a SIZE SURFACE COLOUR SHAPE`` and follows two rules:

* Order of mention: large things before small ones; among things of one size, left before right (by their centres,
  which are at least ``MARGIN`` apart in x). The first two are mentioned; a third stays unmentioned.
* Relation: along the axis on which the two centres lie further apart (the two distances differ by at least ``MARGIN``).

No two things of a scene share both colour and shape. The (colour, shape) pairs in ``HELD_OUT`` never occur in "train".

Drawing uses only operations that IEEE 754 rounds exactly (no sine, no matrix product), so a seed gives one picture on
every machine whose numpy draws the same random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from captionfix.errors import DataError
from captionfix.scene_shapes import SHAPES, Array

if TYPE_CHECKING:
    from torch.utils.data import Dataset

Pair = tuple[float, float]
Triple = tuple[float, float, float]
Pattern = tuple[float, float, float, float, float]
Split = Literal["train", "test", "held-out"]

SIZES: dict[str, Pair] = {"large": (19.0, 23.0), "small": (11.0, 13.0)}  # radii at 128 pixels
SURFACES = ("plain", "striped", "dotted")
COLOURS: dict[str, Triple] = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.98, 0.52, 0.04),
    "yellow": (0.96, 0.90, 0.14),
    "green": (0.14, 0.64, 0.18),
    "cyan": (0.14, 0.84, 0.88),
    "blue": (0.14, 0.26, 0.88),
    "purple": (0.50, 0.14, 0.70),
    "pink": (0.98, 0.60, 0.78),
}
RELATIONS: dict[str, tuple[str, ...]] = {
    "left": ("left", "of"),
    "right": ("right", "of"),
    "above": ("above",),
    "below": ("below",),
}
# Each colour and each shape once, so that none is rarer than another in training.
HELD_OUT: tuple[tuple[str, str], ...] = (
    ("red", "star"),
    ("orange", "circle"),
    ("yellow", "heart"),
    ("green", "arrow"),
    ("cyan", "square"),
    ("blue", "triangle"),
    ("purple", "cross"),
    ("pink", "diamond"),
)
SPLITS: dict[str, int] = {"train": 0, "test": 1, "held-out": 2}  # part of the random seed: the streams never meet
MARGIN = 10.0  # pixels at 128: see the two rules above
MOST_HIDDEN = 0.15  # share of a thing's own area that others may cover
SIDE = 128  # pixels for which the lengths in this file are stated; other sizes scale them
STRENGTH = 0.36  # the darker tone of stripes and dots, as a factor on the colour


VOCABULARY: tuple[str, ...] = ("a", *SIZES, *SURFACES, *COLOURS, *SHAPES, "left", "right", "of", "above", "below")


@dataclass(frozen=True)
class Thing:
    """One object of a scene. Lengths in pixels; pixel (row j, column i) has its centre at x = i, y = j."""

    size: str
    surface: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float
    layer: int  # things of a higher layer cover those of a lower one
    rgb: Triple  # 0..1, the colour with its jitter
    tilt: Pair  # cosine and sine of the shape's rotation
    pattern: Pattern  # its direction (cosine, sine), two phases, period


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture with its caption and, for every word, what it refers to.

    Attributes:
        image: (H, W, 3) uint8.
        caption: the words, joined by spaces.
        words: the caption's words.
        kinds: per word "size", "surface", "colour", "shape", "relation" or "other".
        referents: per word the indices of the objects it is about (none for "a").
        objects: the things in order of mention; a third is not mentioned.
        owner: (H, W) uint8, which thing is seen at a pixel: 0 the background, k the thing ``objects[k - 1]``.
        seed: the scene's seed within its split.
        split: "train", "test" or "held-out".
    """

    image: NDArray[np.uint8]
    caption: str
    words: tuple[str, ...]
    kinds: tuple[str, ...]
    referents: tuple[tuple[int, ...], ...]
    objects: tuple[Thing, ...]
    owner: NDArray[np.uint8]
    seed: int
    split: str

    def mask(self, word: int) -> NDArray[np.bool_]:
        """Where the pixels that a word is about are seen: (H, W) bool."""
        seen = np.zeros(self.owner.shape, dtype=bool)
        for thing in self.referents[word]:
            seen |= self.owner == thing + 1
        return seen

    def masks(self) -> NDArray[np.bool_]:
        """Every word's ``mask``: (number of words, H, W) bool."""
        return np.stack([self.mask(word) for word in range(len(self.words))])


def describe(things: tuple[Thing, ...]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """The caption of things that stand in order of mention: words, kinds and referents, each one per word."""
    first, second = things[:2]
    dx, dy = second.x - first.x, second.y - first.y
    relation = ("left" if dx > 0 else "right") if abs(dx) > abs(dy) else ("above" if dy > 0 else "below")

    def phrase(index: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        thing = things[index]
        yield "a", "other", ()
        for kind in ("size", "surface", "colour", "shape"):
            yield getattr(thing, kind), kind, (index,)

    parts = [*phrase(0), *((word, "relation", (0, 1)) for word in RELATIONS[relation]), *phrase(1)]
    words, kinds, referents = zip(*parts, strict=True)
    return words, kinds, referents


def _patch(thing: Thing, side: int) -> tuple[tuple[slice, slice], Array, Array]:
    """The window of the picture that holds a thing, each pixel's displacement from its centre there as (x, y)."""
    reach = int(1.25 * thing.radius) + 2
    columns = slice(max(0, int(thing.x) - reach), min(side, int(thing.x) + reach + 1))
    rows = slice(max(0, int(thing.y) - reach), min(side, int(thing.y) + reach + 1))
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] - np.float32(thing.x)
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - np.float32(thing.y)
    return (rows, columns), x, y


def _coverage(thing: Thing, x: Array, y: Array) -> Array:
    """How much of each pixel the thing covers, 0..1 (a ramp one pixel wide across its outline)."""
    c, s = thing.tilt[0] / thing.radius, thing.tilt[1] / thing.radius
    return np.clip(0.5 - SHAPES[thing.shape](c * x + s * y, c * y - s * x) * thing.radius, 0.0, 1.0)


def _darkness(thing: Thing, x: Array, y: Array) -> Array | None:
    """How much of each pixel has the surface's darker tone, 0..1; None for a plain surface."""
    if thing.surface == "plain":
        return None
    c, s, along, across, period = thing.pattern
    c, s = c / period, s / period
    u = c * x + s * y + along
    u = np.abs(u - np.floor(u) - 0.5)
    if thing.surface == "striped":
        return np.clip(0.5 + (0.25 - u) * period, 0.0, 1.0)
    v = c * y - s * x + across
    v = np.abs(v - np.floor(v) - 0.5)
    return np.clip(0.5 + (0.32 - np.sqrt(u * u + v * v)) * period, 0.0, 1.0)


def _cover(things: tuple[Thing, ...], side: int) -> tuple[NDArray[np.uint8], float]:
    """Who is seen at each pixel (see ``Scene.owner``), and the largest share of a thing's area that others hide."""
    owner = np.zeros((side, side), dtype=np.uint8)
    area = {}
    for index in sorted(range(len(things)), key=lambda k: things[k].layer):
        window, x, y = _patch(things[index], side)
        inside = _coverage(things[index], x, y) >= 0.5
        area[index] = int(np.count_nonzero(inside))
        owner[window][inside] = index + 1
    hidden = max(1.0 - np.count_nonzero(owner == index + 1) / area[index] for index in area)
    return owner, float(hidden)


def render(things: tuple[Thing, ...], background: Array, noise: Array) -> NDArray[np.uint8]:
    """Draw things over a background.

    Args:
        things: what to draw, in any order (their ``layer`` decides who covers whom).
        background: (H, W, 3) float32, 0..255.
        noise: (H, W, 3) float32, added to everything, things included.

    Returns:
        The picture, (H, W, 3) uint8.
    """
    canvas = np.array(background.transpose(2, 0, 1), order="C")  # a copy, plane by plane: several times faster
    for thing in sorted(things, key=lambda t: t.layer):
        (rows, columns), x, y = _patch(thing, canvas.shape[1])
        part = canvas[:, rows, columns]
        tone = np.array(thing.rgb, dtype=np.float32)[:, None, None] * np.float32(255.0)
        dark = _darkness(thing, x, y)
        if dark is not None:
            tone = tone * (1.0 - (1.0 - STRENGTH) * dark)
        part += _coverage(thing, x, y) * (tone - part)
    canvas += noise.transpose(2, 0, 1)
    canvas += 0.5
    np.clip(canvas, 0.0, 255.0, out=canvas)
    image = np.empty(background.shape, dtype=np.uint8)
    for channel, plane in enumerate(canvas):
        image[:, :, channel] = plane
    return image


@lru_cache(maxsize=64)
def _steps(side: int, cells: int) -> tuple[NDArray[np.int64], Array]:
    """For each pixel of a row the cell to its left and the smooth weight (0..1) of the cell to its right."""
    place = np.arange(side, dtype=np.float32) * np.float32(cells / side)
    cell = place.astype(np.int64)
    f = place - cell.astype(np.float32)
    return cell, f * f * (3.0 - 2.0 * f)


def _smooth(rng: np.random.Generator, side: int, cells: int) -> Array:
    """Value noise in -1..1 with so many cells to a side: (side, side)."""
    cell, weight = _steps(side, cells)
    grid = rng.random((cells + 1, cells + 1), dtype=np.float32) * 2.0 - 1.0
    tall = grid[cell] + weight[:, None] * (grid[cell + 1] - grid[cell])
    return tall[:, cell] + weight[None, :] * (tall[:, 1:] - tall[:, :-1])[:, cell]


def _direction(rng: np.random.Generator) -> tuple[float, float]:
    """Cosine and sine of a uniformly drawn angle (by rejection from the square: no sine is computed)."""
    while True:
        x, y = (2.0 * rng.random(2) - 1.0).tolist()
        length = math.sqrt(x * x + y * y)
        if 0.05 < length < 1.0:
            return x / length, y / length


def _background(rng: np.random.Generator, side: int) -> tuple[Array, Array]:
    """A dim to light, nearly grey texture (gradient, value noise, at times a faint grating) and pixel noise."""
    light = np.full((side, side), 85.0 + 90.0 * rng.random(), dtype=np.float32)
    for cells, most in ((2, 38.0), (5, 26.0), (11, 20.0), (26, 18.0)):
        light += _smooth(rng, side, cells) * (most * rng.random())
    (c, s), (strength, period, phase, on) = _direction(rng), rng.random(4).tolist()
    if on < 0.4:
        period = (5.0 + 9.0 * period) * side / SIDE
        ramp = np.arange(side, dtype=np.float32)
        u = (c / period) * ramp[None, :] + ((s / period) * ramp + phase)[:, None]
        light += (np.abs(u - np.floor(u) - 0.5) - 0.25) * (4.0 * (4.0 + 12.0 * strength))
    tint, drift = (24.0 * rng.random((2, 3)) - 12.0).tolist()
    cloud, planes = _smooth(rng, side, 3), np.empty((3, side, side), dtype=np.float32)
    for plane, fixed, moving in zip(planes, tint, drift, strict=True):
        np.add(light, cloud * moving + fixed, out=plane)
    picture = np.clip(planes, 30.0, 225.0, out=planes).transpose(1, 2, 0)
    # Two half bytes summed: a triangular distribution of standard deviation 6.5.
    grain = np.frombuffer(rng.bytes(3 * side * side), dtype=np.uint8).reshape(3, side, side).transpose(1, 2, 0)
    noise = np.subtract((grain & 15) + (grain >> 4), 15.0, dtype=np.float32)
    noise *= 0.4 + 1.1 * rng.random()
    return picture, noise


def _details(rng: np.random.Generator, colour: str, unit: float) -> tuple[Triple, Pair, Pattern]:
    """What the caption does not tell of a thing: its exact colour, tilt and pattern (the last fields of ``Thing``)."""
    shine, *jitter = rng.random(4).tolist()
    bright = 0.9 + 0.14 * shine
    red, green, blue = (
        max(0.0, min(1.0, bright * c + 0.05 * (j - 0.5))) for c, j in zip(COLOURS[colour], jitter, strict=True)
    )
    lean = 0.24 * (rng.random() - 0.5)
    length = math.sqrt(1.0 + lean * lean)
    (c, s), (along, across, period) = _direction(rng), rng.random(3).tolist()
    return (red, green, blue), (1.0 / length, lean / length), (c, s, along, across, (6.0 + period) * unit)


def _looks(rng: np.random.Generator, count: int, split: str) -> list[tuple[str, str]]:
    """Different (colour, shape) pairs, as the split allows, for things in order of mention."""
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    forced = int(rng.integers(2)) if split == "held-out" else -1
    chosen: list[tuple[str, str]] = []
    while len(chosen) < count:
        source = HELD_OUT if len(chosen) == forced else pairs
        pair = source[int(rng.integers(len(source)))]
        if pair not in chosen and not (split == "train" and pair in HELD_OUT):
            chosen.append(pair)
    return chosen


def _places(
    rng: np.random.Generator, sizes: list[str], radii: list[float], side: int
) -> list[tuple[int, float, float]]:
    """Which size stands where, as (index, x, y) in order of mention, by the rules at the top of this file."""
    unit = side / SIDE
    while True:
        found = []
        for index, (fx, fy) in enumerate(rng.random((len(sizes), 2)).tolist()):
            edge = 1.25 * radii[index] + unit
            found.append((index, edge + fx * (side - 1 - 2 * edge), edge + fy * (side - 1 - 2 * edge)))
        found.sort(key=lambda place: (sizes[place[0]] == "small", place[1]))
        apart = [
            (a, b, abs(xa - xb), abs(ya - yb)) for k, (a, xa, ya) in enumerate(found) for b, xb, yb in found[k + 1 :]
        ]
        if (
            abs(apart[0][2] - apart[0][3]) >= MARGIN * unit
            and all(dx >= MARGIN * unit for a, b, dx, _ in apart if sizes[a] == sizes[b])
            and all(math.sqrt(dx * dx + dy * dy) > 0.7 * (radii[a] + radii[b]) for a, b, dx, dy in apart)
        ):
            return found


def scene(seed: int, *, size: int = SIDE, split: Split = "train") -> Scene:
    """Generate one scene; the same arguments always give the same scene.

    Args:
        seed: any whole number from 0; the seeds of different splits are unrelated.
        size: height and width in pixels, at least 64; things grow with it.
        split: "train" never has a ``HELD_OUT`` (colour, shape) pair, "test" may have any pair, and "held-out" has at
            least one of the held-out pairs among the things that it mentions.

    Raises:
        DataError: for an unknown split, a negative seed or a picture that is too small.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if seed < 0 or size < 64:
        raise DataError(f"a scene needs a seed of at least 0 and a size of at least 64 pixels, not {seed} and {size}")
    rng = np.random.default_rng((SPLITS[split], seed))
    unit = size / SIDE
    count = 2 + int(rng.integers(2))
    sizes = [list(SIZES)[k] for k in rng.integers(2, size=count).tolist()]
    ranges = [SIZES[s] for s in sizes]
    radii = [(low + f * (high - low)) * unit for (low, high), f in zip(ranges, rng.random(count).tolist(), strict=True)]
    surfaces = [SURFACES[k] for k in rng.integers(len(SURFACES), size=count).tolist()]
    looks = _looks(rng, count, split)
    layers = rng.permutation(count).tolist()
    details = [_details(rng, colour, unit) for colour, _ in looks]
    while True:
        things = tuple(
            Thing(sizes[index], surfaces[k], looks[k][0], looks[k][1], x, y, radii[index], layers[k], *details[k])
            for k, (index, x, y) in enumerate(_places(rng, sizes, radii, size))
        )
        owner, hidden = _cover(things, size)
        if hidden <= MOST_HIDDEN:
            break
    image = render(things, *_background(rng, size))
    words, kinds, referents = describe(things)
    return Scene(image, " ".join(words), words, kinds, referents, things, owner, seed, split)


class _Scenes:
    """What ``SceneDataset`` does, apart from being torch's."""

    def __init__(self, length: int, *, split: Split = "train", start: int = 0, size: int = SIDE) -> None:
        self.length, self.split, self.start, self.size = length, split, start, size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Scene:
        if not -self.length <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        return scene(self.start + index % self.length, size=self.size, split=self.split)


if TYPE_CHECKING:

    class SceneDataset(_Scenes, Dataset[Scene]):
        """A map-style ``torch.utils.data.Dataset``: item i is ``scene(start + i, size=size, split=split)``."""


def __getattr__(name: str) -> object:
    # The data set's class is made when it is first asked for: the rest of this file works without torch.
    if name != "SceneDataset":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torch.utils.data import Dataset

    doc = "A map-style ``torch.utils.data.Dataset``: item i is ``scene(start + i, size=size, split=split)``."
    made = type(name, (_Scenes, Dataset), {"__doc__": doc, "__module__": __name__})
    globals()[name] = made
    return made


def preview(
    n: int, path: str | Path, *, split: Split = "train", start: int = 0, columns: int = 6, scale: int = 2
) -> None:
    """Write a PNG contact sheet of scenes ``start`` to ``start + n - 1``, enlarged ``scale`` times, with captions.

    Raises:
        OutputError: if the file can't be written.
    """
    import io
    import textwrap

    from PIL import Image, ImageDraw, ImageFont

    from captionfix.files import atomic_write

    side, text, gap = SIDE * scale, 44, 8
    columns = max(1, min(columns, n))
    sheet = Image.new("RGB", (columns * (side + gap) + gap, -(-n // columns) * (side + text + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for k in range(n):
        one = scene(start + k, split=split)
        x, y = gap + k % columns * (side + gap), gap + k // columns * (side + text + gap)
        sheet.paste(Image.fromarray(one.image).resize((side, side), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + side + 3), textwrap.fill(one.caption, side // 7), fill="black", font=font)
    data = io.BytesIO()
    sheet.save(data, "PNG")
    atomic_write(path, data.getvalue())
