"""Draws the pictures of the documents and of README from real results: ``python docs/pictures.py [FOLDER]``.

Needs nothing but the package: a generated scene, and the public-domain portrait that matplotlib ships.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cbook import get_sample_data
from matplotlib.figure import Figure
from PIL import Image

import captionfix
from captionfix.render.figure import figure
from captionfix.scenes import scene

WORDS = ("circle", "triangle")
SCENE = 6  # the demo's
COLOURS = "plasma"


def main(folder: Path) -> None:
    """Writes scene.jpg, two-legs.jpg and portrait.jpg."""
    image = Image.fromarray(scene(SCENE, split="test").image)
    result = captionfix.explain(captionfix.load("scenes"), image)
    _write(figure(result, columns=5, width=8.0), folder / "scene.jpg")
    _write(two_legs(result), folder / "two-legs.jpg")
    portrait = Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False))
    shown = captionfix.explain(captionfix.load("photos"), portrait)
    _write(figure(shown, boxes=True, columns=5, width=8.0), folder / "portrait.jpg")


def two_legs(result: captionfix.Explanation) -> Figure:
    """A row a word: the word, its evidence at the feature map, its fixations, its map."""
    drawn = Figure(figsize=(10, 5.1), facecolor="white")
    grid = drawn.add_gridspec(
        len(WORDS),
        4,
        left=0.01,
        right=0.99,
        top=0.82,
        bottom=0.02,
        wspace=0.12,
        hspace=0.06,
        width_ratios=[0.8, 1, 1, 1],
    )
    axes = grid.subplots()
    for row, text in enumerate(WORDS):
        _row(axes[row], result[text])
    rows, columns = result[WORDS[0]].feature_map.shape
    heads = (
        "a word of the caption",
        f"its evidence on the CNN's\nlast feature map, {columns} x {rows} cells",
        "its fixations:\nsingle pixels with a mass",
        "its map: smoothed, less what\nall words have in common",
    )
    for axis, head in zip(axes[0], heads, strict=True):
        axis.set_title(head, fontsize=11, pad=10)
    for left, right, leg in ((0, 1, "first leg: the decoder"), (1, 2, "second leg: the CNN")):
        start = axes[0][left].get_position()
        end = axes[0][right].get_position()
        x0, x1 = (start.x0 + start.x1) / 2, (end.x0 + end.x1) / 2
        drawn.text((x0 + x1) / 2, 0.965, leg, ha="center", va="center", fontsize=11, color="#b03060", weight="bold")
        arrow = {"arrowstyle": "-|>", "color": "#b03060", "lw": 1.5}
        axes[0][0].annotate(
            "", (x1 - 0.01, 0.935), (x0 + 0.01, 0.935), xycoords="figure fraction", textcoords="figure fraction",
            arrowprops=arrow, annotation_clip=False,
        )  # fmt: skip
    return drawn


def _row(axes: np.ndarray, word: captionfix.Word) -> None:
    image = word.explanation.image
    width, height = image.size
    pale = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, "white"), 0.35)
    said, cells, points, heat = axes
    said.axis("off")
    said.set(xlim=(0, 1), ylim=(0, 1))
    said.text(0.5, 0.6, word.text, ha="center", fontsize=20, weight="bold")
    said.text(0.5, 0.44, f"probability {word.probability:.2f}", ha="center", fontsize=10)
    said.text(0.5, 0.34, f"the image's effect {word.image_effect:+.1f} nats", ha="center", fontsize=10)
    for axis in (cells, points, heat):
        axis.imshow(pale, extent=(0, width, height, 0))
        _plain(axis)
    share = word.feature_map / word.feature_map.max()
    x0, y0, x1, y1 = word.explanation.window
    cells.imshow(share, extent=(x0, x1, y1, y0), cmap=COLOURS, alpha=0.9 * np.sqrt(share), interpolation="nearest")
    rows, columns = share.shape
    cells.set_xticks(np.linspace(x0, x1, columns + 1), labels=[])
    cells.set_yticks(np.linspace(y0, y1, rows + 1), labels=[])
    cells.grid(color="white", lw=0.6)
    x, y, mass = word.fixations[np.argsort(word.fixations[:, 2])].T
    heavy = mass.cumsum() > 0.05  # without the many that hold next to nothing
    size = np.sqrt(mass[heavy] / mass.max())
    points.scatter(x[heavy], y[heavy], c=size, s=2 + 14 * size, alpha=0.3 + 0.7 * size, cmap=COLOURS, linewidths=0)
    points.set(xlim=(0, width), ylim=(height, 0))
    heat.clear()
    heat.imshow(word.overlay(), extent=(0, width, height, 0))
    _plain(heat)


def _plain(axis: Axes) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.tick_params(length=0)


def _write(drawn: Figure, path: Path) -> None:
    drawn.savefig(path, dpi=110, pil_kwargs={"quality": 84, "optimize": True, "subsampling": 0})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
