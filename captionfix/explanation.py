"""What an explanation is: frozen results that know nothing of models.

Points and boxes are in pixels of the original, upright image, x before y. Coordinates are continuous: the image spans
0..width and 0..height, so the centre of its first pixel is (0.5, 0.5).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import numpy as np
from PIL import Image

import captionfix
from captionfix import maps
from captionfix.errors import CaptionError
from captionfix.maps import Box, Floats

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Word:
    """One word of a caption and where it comes from.

    Attributes:
        text: The word.
        index: Its place in the caption, from 0.
        token: Its id in the captioner's vocabulary.
        probability: p(word | image, words before it), the caption fed to the decoder.
        fixations: (n, 3) float32: x, y in original pixels (centres of the CNN's input pixels), mass. The masses sum
            to 1.
        feature_map: (h, w) float32: evidence at the CNN's feature map, sum 1 (or all 0).
        image_share: 0..1: the part of the word's evidence that ends in the image; NaN where no flow was run.
        language: (earlier word or "<start>", share) in caption order.
        other: Share of biases and of prior states.
        image_effect: Drop of the word's log-probability (nats) when the feature map is replaced by its mean.
        alternatives: The five most probable words at this place and their probabilities.
        contrast: The word that it was explained against, if any.
        even: (m, 3) float32, as ``fixations``: what is not followed further than the feature map's cells, on points
            that lie evenly. The masses sum to the part of the word's evidence that this is, 0..1.
    """

    text: str
    index: int
    token: int
    probability: float
    fixations: Floats
    feature_map: Floats
    image_share: float = math.nan
    language: tuple[tuple[str, float], ...] = ()
    other: float = math.nan
    image_effect: float = math.nan
    alternatives: tuple[tuple[str, float], ...] = ()
    contrast: str | None = None
    even: Floats = field(default_factory=lambda: np.zeros((0, 3), dtype=np.float32))
    _explanation: Explanation | None = field(default=None, init=False, repr=False)

    @property
    def explanation(self) -> Explanation:
        """The explanation that the word belongs to."""
        if self._explanation is None:
            raise CaptionError(f"the word {self.text!r} belongs to no explanation yet; put it into one first")
        return self._explanation

    @property
    def evidence(self) -> Floats:
        """(n + m, 3): the fixations and what lies evenly, all of a word's evidence: what its map is made of."""
        followed = self.fixations * np.array([1, 1, 1 - self.even[:, 2].sum()], dtype=np.float32)
        return np.concatenate([followed, self.even])

    def heatmap(self, specific: bool = True, sigma: float | None = None) -> Floats:
        """The word's map over the original image.

        Args:
            specific: Whether the mean over the caption's words is taken off, which leaves what is the word's own.
            sigma: The Gaussian's standard deviation as a fraction of the CNN's input; None for the default, 0.01.

        Returns:
            (height, width) float32 with maximum 1, or all 0 where the word has no evidence (of its own).
        """
        whole = self.explanation
        result = maps.resize(whole.maps(specific, sigma)[self.index], whole.image.size, whole.window)
        top = result.max()
        return result / top if top > 0 else result

    def box(self, specific: bool = False, share: float | None = None) -> Box | None:
        """The box in which the word's map stands out (`captionfix.maps.box`).

        A quarter of the mean over the caption's words is taken off first, so that no box reaches to what only others
        speak of.

        Where fixations are a set, all alike (the policies ``"paper"`` and ``"released"``), it is the published one,
        around the points themselves without outliers.

        Args:
            specific: Whether the whole mean is taken off. What a word speaks of is as large as all that speaks for it,
                so a box of what is the word's own alone fits it less well.
            share: Part of the mass to hold along each axis, around all points: with 1 those that are no outliers. None:
                the box as said above.

        Returns:
            x0, y0, x1, y1 in original pixels, or None for a word without evidence.

        Raises:
            ValueError: ``share`` is not above 0 and at most 1, or given with ``specific``.
        """
        whole = self.explanation
        if specific and share is not None:
            raise ValueError("a box with a share is around all of the word's points: leave specific or share out")
        if specific or (share is None and whole.policy.get("mass") != "set"):
            own = whole._less(1.0 if specific else maps.SHARED)[self.index]
            return maps.box(own, whole.image.size, whole.window)
        return maps.around(self.evidence, whole.image.size, whole.window, whole.grid, 1.0 if share is None else share)

    def point(self, specific: bool = True, sigma: float | None = None) -> tuple[float, float] | None:
        """x, y in original pixels of the map's maximum, as the pointing game asks, or None for a word without
        evidence.
        """
        whole = self.explanation
        return maps.peak(whole.maps(specific, sigma)[self.index], whole.window)

    def overlay(self, **options: Any) -> Image.Image:
        """The word's map over the image, in the image's size; options as in `captionfix.render.figure.overlay`."""
        from captionfix.render.figure import overlay

        return overlay(self, **options)

    def __repr__(self) -> str:
        return f"Word({self.text!r}, index={self.index}, p={self.probability:.3g}, fixations={len(self.fixations)})"

    def _repr_jpeg_(self) -> bytes:
        from captionfix.render.notebook import jpeg, smaller

        return jpeg(smaller(self.overlay()))


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """A caption, explained word by word. Prints as a table, shows as a figure in a notebook.

    Attributes:
        image: The original image, upright, RGB.
        words: The caption's words in order.
        caption: The caption as text.
        captioner: The captioner's name.
        method: The method's name.
        policy: The policy's settings, plain values only.
        window: x0, y0, x1, y1: the part of the original that the CNN's input shows, in original pixels.
        grid: Width and height of the CNN's input.
        version: The version of captionfix that made it.
    """

    image: Image.Image
    words: tuple[Word, ...]
    caption: str
    captioner: str
    method: str
    policy: Mapping[str, Any]
    window: Box
    grid: tuple[int, int]
    version: str = captionfix.__version__
    _maps: dict[tuple[float, float | None], Floats] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        bound = []
        for place, word in enumerate(self.words):
            if word.index != place:
                raise ValueError(f"the word {word.text!r} says index {word.index} but is at {place}")
            copy = replace(word)  # the caller's word stays free
            object.__setattr__(copy, "_explanation", self)
            bound.append(copy)
        object.__setattr__(self, "words", tuple(bound))

    def __len__(self) -> int:
        return len(self.words)

    def __iter__(self) -> Iterator[Word]:
        return iter(self.words)

    @overload
    def __getitem__(self, key: int | str) -> Word: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Word, ...]: ...
    def __getitem__(self, key: int | slice | str) -> Word | tuple[Word, ...]:
        """A word by its place or its text (the first where it occurs several times), or several by a slice.

        Raises:
            CaptionError: The caption has no such word.
            IndexError: It has no such place.
        """
        if not isinstance(key, str):
            return self.words[key]
        for word in self.words:
            if word.text == key:
                return word
        raise CaptionError(
            f"the caption has no word {key!r}; its words are: {', '.join(word.text for word in self.words)}"
        )

    def maps(self, specific: bool = True, sigma: float | None = None) -> Floats:
        """All words' maps on the grid of the CNN's input (kept, so asking again is free).

        Args:
            specific: Whether the mean over the words is taken off and negative parts cut.
            sigma: The Gaussian's standard deviation as a fraction of the input; None for the default.

        Returns:
            (words, grid height, grid width) float32, read-only. Without ``specific`` each sums to 1 (or is all 0).
        """
        return self._less(1.0 if specific else 0.0, sigma)

    def _less(self, part: float, sigma: float | None = None) -> Floats:
        """The maps less a part of the mean over the words."""
        key = (part, sigma)
        if key not in self._maps:
            if part:
                result = maps.specific(self._less(0.0, sigma), part)
            else:
                published = self.policy.get("mass") == "set"  # all fixations weigh the same, strays too
                each = [
                    maps.density(word.evidence, self.image.size, self.window, self.grid, sigma, published)
                    for word in self.words
                ]
                result = np.stack(each) if each else np.zeros((0, self.grid[1], self.grid[0]), dtype=np.float32)
            result.setflags(write=False)
            self._maps[key] = result
        return self._maps[key]

    def figure(self, **options: Any) -> Figure:
        """A figure: the image, then each word's overlay; options as in `captionfix.render.figure.figure`."""
        from captionfix.render.figure import figure

        return figure(self, **options)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes a page to explore the explanation: one HTML file that needs no network and nothing beside it.

        Returns:
            The file.

        Raises:
            OutputError: It can't be written.
        """
        from captionfix.render.page import write

        return write(self, path)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes ``explanation.json``, ``arrays.npz`` and the image into a new folder, all or nothing.

        The image is a PNG, or a JPEG of quality 95 where it is larger than two million pixels.

        Returns:
            The folder.

        Raises:
            OutputError: The folder holds something already or can't be written.
        """
        from captionfix.saved import write

        return write(self, folder)

    def __str__(self) -> str:
        from captionfix.render.notebook import table

        return table(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from captionfix.render.notebook import html

        return html(self)

    def _repr_jpeg_(self) -> bytes:
        from captionfix.render.notebook import figure_jpeg

        return figure_jpeg(self)


class Explanations(list[Explanation]):
    """A list of explanations that prints a line each and shows as a contact sheet in a notebook."""

    @overload
    def __getitem__(self, key: SupportsIndex) -> Explanation: ...
    @overload
    def __getitem__(self, key: slice) -> Explanations: ...
    def __getitem__(self, key: SupportsIndex | slice) -> Explanation | Explanations:
        """One explanation, or several by a slice, which show themselves in the same way."""
        return Explanations(super().__getitem__(key)) if isinstance(key, slice) else super().__getitem__(key)

    def __repr__(self) -> str:
        from captionfix.render.notebook import listing

        return listing(self)

    def _repr_html_(self) -> str:
        from captionfix.render.notebook import sheet

        return sheet(self)
