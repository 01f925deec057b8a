"""Pictures with captions and the regions that their words stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..captioners.captioner import Captioner
from ..errors import DataError
from ..function_words import FUNCTION_WORDS
from ..images import read_image
from .boxes import Box, Mentions, bounds

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
_IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot", "teeth": "tooth",
    "mice": "mouse", "geese": "goose", "knives": "knife", "wolves": "wolf", "shelves": "shelf", "leaves": "leaf",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Phrase:
    """A part of a caption that stands for a region.

    Attributes:
        words: places in the caption of the words whose maps are summed.
        kind: what sort of phrase it is: an object's attribute, or an entity's type.
        boxes: x0, y0, x1, y1 as fractions of the image; or
        mask: (H, W) the exact region.
    """

    words: tuple[int, ...]
    kind: str
    boxes: tuple[Box, ...] = ()
    mask: NDArray[np.bool_] | None = None

    def region(self, grid: tuple[int, int], window: Box = WHOLE) -> NDArray[np.bool_]:
        """(height, width): the cells of a grid (width, height) whose centre lies in the phrase's boxes or mask.

        ``window``: the part of the image that the grid covers, in fractions; it may reach beyond the image.
        """
        width, height = grid
        x = window[0] + (np.arange(width) + 0.5) / width * (window[2] - window[0])
        y = window[1] + (np.arange(height) + 0.5) / height * (window[3] - window[1])
        if self.mask is not None:
            rows, columns = np.floor(y * self.mask.shape[0]).astype(int), np.floor(x * self.mask.shape[1]).astype(int)
            inside = ((y >= 0) & (y < 1))[:, None] & ((x >= 0) & (x < 1))[None, :]
            last = np.array(self.mask.shape) - 1
            picked = self.mask[rows.clip(0, last[0])[:, None], columns.clip(0, last[1])[None, :]]
            return np.asarray(picked & inside)
        region = np.zeros((height, width), dtype=bool)
        for x0, y0, x1, y1 in self.boxes:
            region |= ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))[None, :]
        return region

    @cached_property
    def all_boxes(self) -> tuple[Box, ...]:
        """The boxes, or the one around the mask, as fractions of the image."""
        found = None if self.mask is None else bounds(self.mask)
        if self.mask is None or found is None:
            return self.boxes
        height, width = self.mask.shape
        return ((found[0] / width, found[1] / height, found[2] / width, found[3] / height),)


@dataclass(frozen=True, eq=False)
class Reference:
    """A caption by a person (or a generator), and its phrases."""

    words: tuple[str, ...]
    phrases: tuple[Phrase, ...]

    @cached_property
    def mentions(self) -> Mentions:
        """Classes of the caption, for the grounding F1: a phrase's is the stem of its last word."""
        boxed = tuple((stem(self.words[p.words[-1]]), p.all_boxes) for p in self.phrases if p.all_boxes)
        said = {stem(word) for word in self.words if word not in FUNCTION_WORDS}
        return Mentions(boxed, frozenset(said - {name for name, _ in boxed}))


@dataclass(frozen=True, eq=False)
class Grounded:
    """A picture, the caption that is explained, its phrases, and all captions that people gave.

    Attributes:
        name: of the picture.
        source: the picture, or its file.
        words: the caption.
        phrases: what is known of it.
        references: all captions of the picture.
    """

    name: str
    source: Path | Image.Image
    words: tuple[str, ...]
    phrases: tuple[Phrase, ...]
    references: tuple[Reference, ...] = ()

    @property
    def image(self) -> Image.Image:
        return read_image(self.source)


def grounded(name: str, source: Path | Image.Image, references: Sequence[Reference]) -> Grounded:
    """With the first of several captions as the one to explain."""
    return Grounded(name, source, references[0].words, references[0].phrases, tuple(references))


CONTENT = ("colour", "shape", "size", "surface")  # of a scene's words, those that one object determines


def lines(path: Path | str, limit: int | None = None) -> Iterator[Grounded]:
    """The lines format: a JSON object a photograph with ``photo``, ``captions`` of ``words`` and ``phrases`` with
    ``boxes`` as fractions; photographs in ``images/`` beside the file. The first caption of each photograph is the one
    to explain; words are lower-cased, punctuation is dropped; a phrase's words are its content words.

    Raises:
        DataError: the file is missing or a line is not of this form.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            if limit is not None and number >= limit:
                return
            try:
                record = json.loads(line)
                photo = path.parent / "images" / record["photo"]
                references = [
                    reference(
                        caption["words"],
                        [
                            (tuple(p["span"]), p["types"][0], tuple(tuple(box) for box in p["boxes"]))
                            for p in caption["phrases"]
                            if p.get("boxes") and p["entity"]
                        ],
                    )
                    for caption in record["captions"]
                ]
                if not references:
                    raise ValueError("no captions")
                yield grounded(record["photo"], photo, references)
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise DataError(f"{path}, line {number + 1}: not of the lines format ({error!r})") from error


def reference(words: Sequence[str], phrases: Sequence[tuple[tuple[int, int], str, tuple[Box, ...]]]) -> Reference:
    """A caption as it is annotated: words with punctuation among them; spans (first, past), types and boxes."""
    place: dict[int, int] = {}
    kept: list[str] = []
    for i, word in enumerate(words):
        if re.search(r"\w", word):
            place[i] = len(kept)
            kept.append(word.lower())
    found = []
    for span, kind, boxes in phrases:
        content = tuple(place[i] for i in range(*span) if i in place and kept[place[i]] not in FUNCTION_WORDS)
        if content:
            found.append(Phrase(content, kind, boxes))
    return Reference(tuple(kept), tuple(found))


def scenes(count: int, first_seed: int = 0, split: str = "test") -> Iterator[Grounded]:
    """Generated scenes: every content word (colour, shape, size, surface) is a phrase of its own with the object's
    visible mask.
    """
    from ..scenes import scene

    for seed in range(first_seed, first_seed + count):
        made = scene(seed, split=split)  # type: ignore[arg-type]
        masks = made.masks()
        phrases = tuple(Phrase((i,), kind, mask=masks[i]) for i, kind in enumerate(made.kinds) if kind in CONTENT)
        yield grounded(f"scene {split} {seed}", Image.fromarray(made.image), [Reference(tuple(made.words), phrases)])


def generated(captioner: Captioner, item: Grounded, beams: int = 3) -> Grounded:
    """The picture with the captioner's own caption. Its phrases are single words that a reference supports: those
    whose stem is that of a content word of some phrase with a region; their region is all such phrases' together.
    """
    import torch

    pixels = captioner.prepare(item.image).pixels[None].to(captioner.device)
    with torch.inference_mode():
        (ids,) = captioner.generate(pixels, beams=beams)
    words = tuple(captioner.vocabulary.word(i) for i in ids)
    known: dict[str, list[Phrase]] = {}
    for caption in item.references:
        for phrase in caption.phrases:
            for name in {stem(caption.words[k]) for k in phrase.words}:
                known.setdefault(name, []).append(phrase)
    phrases = []
    for k, word in enumerate(words):
        same = known.get(stem(word), [])
        if same and word not in FUNCTION_WORDS:
            masks = [phrase.mask for phrase in same if phrase.mask is not None]
            boxes = tuple(dict.fromkeys(box for phrase in same for box in phrase.boxes))
            region = np.logical_or.reduce(masks) if masks else None
            phrases.append(Phrase((k,), same[0].kind, boxes, region))
    return Grounded(item.name, item.source, words, tuple(phrases), item.references)


@lru_cache(maxsize=100_000)
def stem(word: str) -> str:
    """A word's stem, the same for its plural: Porter's, by nltk, and a table of irregular nouns."""
    return _stemmer().stem(_IRREGULAR.get(word, word))


@lru_cache(maxsize=1)
def _stemmer():  # type: ignore[no-untyped-def]
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()
