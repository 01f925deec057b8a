"""Pictures with captions and the regions that their words stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError
from ..images import read_image
from ..render.figure import FUNCTION_WORDS


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
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    mask: NDArray[np.bool_] | None = None

    def region(self, grid: tuple[int, int]) -> NDArray[np.bool_]:
        """(height, width) of a grid (width, height) over the whole image: cells whose centre lies in the phrase's
        boxes or mask.
        """
        width, height = grid
        if self.mask is not None:
            rows = ((np.arange(height) + 0.5) / height * self.mask.shape[0]).astype(int)
            columns = ((np.arange(width) + 0.5) / width * self.mask.shape[1]).astype(int)
            return self.mask[rows[:, None], columns[None, :]]
        x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
        region = np.zeros((height, width), dtype=bool)
        for x0, y0, x1, y1 in self.boxes:
            region |= ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))[None, :]
        return region


@dataclass(frozen=True, eq=False)
class Grounded:
    """A picture, a person's (or the generator's) caption, and its phrases."""

    name: str
    image: Image.Image
    words: tuple[str, ...]
    phrases: tuple[Phrase, ...]


CONTENT = ("colour", "shape", "size", "surface")  # of a scene's words, those that one object determines


def lines(path: Path | str, limit: int | None = None) -> Iterator[Grounded]:
    """The lines format: a JSON object a photograph with ``photo``, ``captions`` of ``words`` and ``phrases`` with
    ``boxes`` as fractions; photographs in ``images/`` beside the file. The first caption of each photograph is read;
    words are lower-cased, punctuation is dropped; a phrase's words are its content words.

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
                words, phrases = _caption(record["captions"][0])
                photo = path.parent / "images" / record["photo"]
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise DataError(f"{path}, line {number + 1}: not of the lines format ({error!r})") from error
            yield Grounded(record["photo"], read_image(photo), words, phrases)


def _caption(record: dict) -> tuple[tuple[str, ...], tuple[Phrase, ...]]:
    place: dict[int, int] = {}
    words: list[str] = []
    for i, word in enumerate(record["words"]):
        plain = word.lower()
        if re.search(r"\w", plain):
            place[i] = len(words)
            words.append(plain)
    phrases = []
    for phrase in record["phrases"]:
        if not phrase.get("boxes") or not phrase["entity"]:
            continue
        content = tuple(
            place[i] for i in range(*phrase["span"]) if i in place and words[place[i]] not in FUNCTION_WORDS
        )
        if content:
            phrases.append(Phrase(content, phrase["types"][0], tuple(tuple(box) for box in phrase["boxes"])))
    return tuple(words), tuple(phrases)


def scenes(count: int, first_seed: int = 0, split: str = "test") -> Iterator[Grounded]:
    """Generated scenes: every content word (colour, shape, size, surface) is a phrase of its own with the object's
    visible mask.
    """
    from ..scenes import scene

    for seed in range(first_seed, first_seed + count):
        made = scene(seed, split=split)  # type: ignore[arg-type]
        masks = made.masks()
        phrases = tuple(Phrase((i,), kind, mask=masks[i]) for i, kind in enumerate(made.kinds) if kind in CONTENT)
        yield Grounded(f"scene {split} {seed}", Image.fromarray(made.image), tuple(made.words), phrases)
