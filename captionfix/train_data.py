"""Data for training: captioned images from files, scenes drawn once, batches."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from captionfix.errors import DataError
from captionfix.function_words import FUNCTION_WORDS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, as parts of width and height."""

Boxes = tuple[Box, ...]


@dataclass(frozen=True)
class Captioned:
    """An image file and its captions; where it is known, also what the captions' words speak of.

    Attributes:
        image: the file.
        captions: words with spaces between them.
        boxes: none, or for each caption the boxes of each of its words (none for a word that no region belongs to).
    """

    image: Path
    captions: tuple[str, ...]
    boxes: tuple[tuple[Boxes, ...], ...] = ()


def read_lines(path: Path, images: Path) -> list[Captioned]:
    """Photographs of a JSON-lines file: `{"photo": file, "captions": [{"words": [...], "phrases": [{"span": [first,
    past], "boxes": [[left, top, right, bottom], ...]}, ...]}, ...]}` a line; phrases may be absent, and so may boxes.

    Raises:
        DataError: the file or a photograph is missing, or a line is not of this form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror}; give the folder that holds it") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            captions = tuple(" ".join(caption["words"]) for caption in entry["captions"])
            found.append(Captioned(images / entry["photo"], captions, tuple(map(_word_boxes, entry["captions"]))))
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(f"{path}, line {number} is not a photograph with captions ({error!r})") from error
    return _checked(found, path)


def _word_boxes(caption: dict[str, Any]) -> tuple[Boxes, ...]:
    """Of the words that name something: an article's evidence need not lie where its noun's does."""
    words: list[str] = caption["words"]
    found: list[Boxes] = [()] * len(words)
    for phrase in caption.get("phrases", ()):
        boxes = tuple((float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in phrase.get("boxes") or ())
        for k in range(*phrase["span"]):
            found[k] = () if words[k].lower() in FUNCTION_WORDS else boxes
    return tuple(found)


def read_coco(annotations: Path, images: Path) -> list[Captioned]:
    """Images of a COCO captions file, `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`.

    Raises:
        DataError: the file or an image is missing, or the file is not of this form.
    """
    try:
        data = json.loads(annotations.read_text(encoding="utf-8"))
        captions: dict[int, list[str]] = {entry["id"]: [] for entry in data["images"]}
        for entry in data["annotations"]:
            captions[entry["image_id"]].append(entry["caption"])
        found = [Captioned(images / entry["file_name"], tuple(captions[entry["id"]])) for entry in data["images"]]
    except OSError as error:
        raise DataError(f"can't read {annotations}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{annotations} is not a COCO captions file ({error!r})") from error
    return _checked(found, annotations)


def _checked(found: list[Captioned], source: Path) -> list[Captioned]:
    found = [entry for entry in found if any(caption.strip() for caption in entry.captions)]
    if not found:
        raise DataError(f"{source} has no captioned image")
    missing = [entry.image for entry in found if not entry.image.is_file()]
    if missing:
        raise DataError(f"{len(missing)} images that {source} names are missing, such as {missing[0]}")
    return found


@dataclass(frozen=True)
class View:
    """How an image is seen in one epoch.

    Attributes:
        box: what is cut out of it; None: all.
        mirrored: whether left and right are changed, after that.
    """

    box: Box | None = None
    mirrored: bool = False

    def of(self, box: Box) -> Box | None:
        """Where a box of the image lies in the view; None where nothing of it is seen."""
        left, top, right, bottom = self.box or (0.0, 0.0, 1.0, 1.0)
        width, height = right - left, bottom - top
        x0, x1 = ((min(max(x, left), right) - left) / width for x in (box[0], box[2]))
        y0, y1 = ((min(max(y, top), bottom) - top) / height for y in (box[1], box[3]))
        if self.mirrored:
            x0, x1 = 1 - x1, 1 - x0
        return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


@dataclass
class Examples:
    """A data set for the Trainer: item i is an array and captions; `collate` makes a batch of them.

    What is drawn for an item (which captions, the view) depends on seed, epoch and index alone, so a training that
    goes on after an interruption sees what it would have seen.

    Attributes:
        captions: word ids from start to end, per image.
        read: index and view -> (C, H, W) or (F, h, w) array: uint8 pixels in 0..255 or features.
        name: "pixel_values" or "features".
        pad: the id that fills up.
        each: captions of an image in a batch (some twice where it has fewer).
        seed: of the drawing.
        crop: views are cut at random to between this part and all of either side (see `cut`).
        mirrored: half of the views are mirrored.
        boxes: of each word id of `captions`, or None: batches hold no regions.
        grid: height and width of the feature map that regions are drawn on.
        epoch: `fit` sets it.
    """

    captions: Sequence[Sequence[Sequence[int]]]
    read: Callable[[int, View], np.ndarray]
    name: str
    pad: int
    each: int = 1
    seed: int = 0
    crop: float = 1.0
    mirrored: bool = False
    boxes: Sequence[Sequence[Sequence[Boxes]]] | None = None
    grid: tuple[int, int] = (1, 1)
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Item:
        own = range(len(self.captions[index]))
        rng = random.Random(f"{self.seed} {self.epoch} {index}")
        chosen = rng.sample(own, min(self.each, len(own)))
        chosen += rng.choices(own, k=self.each - len(chosen))
        view = View(cut(self.crop, rng), self.mirrored and rng.random() < 0.5)
        captions = [self.captions[index][k] for k in chosen]
        array = self.read(index, view)
        if self.boxes is None:
            return array, captions, None
        return array, captions, [regions(self.boxes[index][k], view, self.grid) for k in chosen]

    def collate(self, items: list[Item]) -> dict[str, torch.Tensor]:
        import torch

        longest = max(len(caption) for _, captions, _ in items for caption in captions)
        labels = torch.full((len(items), self.each, longest), self.pad, dtype=torch.long)
        where = torch.zeros(*labels.shape, *self.grid)
        for i, (_, captions, found) in enumerate(items):
            for k, caption in enumerate(captions):
                labels[i, k, : len(caption)] = torch.as_tensor(caption)
                if found is not None:
                    where[i, k, : len(caption)] = torch.from_numpy(found[k])
        inputs = torch.from_numpy(np.stack([array for array, _, _ in items]))
        if inputs.dtype == torch.uint8:
            inputs = (inputs.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        batch = {self.name: inputs.float(), "labels": labels}
        return batch if self.boxes is None else {**batch, "regions": where}


Item = tuple[np.ndarray, list[Sequence[int]], list[np.ndarray] | None]
"""An image's array, its captions, and the regions of each caption's words."""


def regions(words: Sequence[Boxes], view: View, grid: tuple[int, int]) -> np.ndarray:
    """(n, h, w) float32: how much of each cell of a feature map a word's boxes cover, the most covered cell being 1;
    nothing for a word without boxes in the view. Where boxes overlap, the one that covers more counts."""
    table = np.zeros((len(words), *grid), np.float32)
    for row, boxes in zip(table, words, strict=True):
        for box in filter(None, map(view.of, boxes)):
            across, down = (
                np.clip(np.minimum(past * n, np.arange(n) + 1) - np.maximum(first * n, np.arange(n)), 0, 1)
                for first, past, n in ((box[0], box[2], grid[1]), (box[1], box[3], grid[0]))
            )
            np.maximum(row, down[:, None] * across, out=row)
        row /= row.max() or 1
    return table


def encode_captions(
    tokenizer: PreTrainedTokenizerFast, groups: Sequence[Sequence[str]], max_words: int
) -> list[list[list[int]]]:
    """Word ids from start to end of every image's captions; longer captions are cut, empty ones left out."""
    return [
        [_cut_short(ids, max_words) for ids in tokenizer(list(captions))["input_ids"] if len(ids) > 2]
        for captions in groups
    ]


def encode_boxes(
    tokenizer: PreTrainedTokenizerFast, examples: Sequence[Captioned], max_words: int
) -> list[list[list[Boxes]]]:
    """The boxes of every id that `encode_captions` gives for the same images' captions. A word of the caption that is
    several for the tokeniser (or none, as punctuation is) hands its boxes to each of them."""
    encoded = []
    for entry in examples:
        rows = []
        for caption, boxes in zip(entry.captions, entry.boxes or [()] * len(entry.captions), strict=True):
            found = tokenizer(caption, return_offsets_mapping=True)["offset_mapping"]
            word = np.cumsum([c == " " for c in caption])  # which of the caption's words a character belongs to
            own: list[Boxes] = [boxes[word[a]] if boxes and a < b else () for a, b in found]
            if len(own) > 2:
                rows.append(_cut_short(own, max_words))
        encoded.append(rows)
    return encoded


def _cut_short(row: list[T], max_words: int) -> list[T]:
    """At most so many words between the start and the end."""
    return row if len(row) <= max_words + 2 else [*row[: max_words + 1], row[-1]]


def draw_scenes(place: Path, count: int) -> tuple[np.ndarray, list[str]]:
    """(N, H, W, 3) uint8 pictures and their captions, kept in the work folder."""
    from captionfix.files import atomic_write
    from captionfix.scenes import SIDE, scene

    file, text = place / "images.npy", place / "captions.txt"
    if not (file.is_file() and text.is_file() and len(text.read_text().splitlines()) == count):
        part = place / f"images.{os.getpid()}.part"
        images = np.lib.format.open_memmap(part, "w+", np.uint8, (count, SIDE, SIDE, 3))
        captions = []
        for i in range(count):
            drawn = scene(i)
            images[i] = drawn.image
            captions.append(drawn.caption)
        images.flush()
        atomic_write(text, "\n".join(captions) + "\n")
        os.replace(part, file)
    return np.load(file, mmap_mode="r"), text.read_text().splitlines()


def cut(crop: float, rng: random.Random) -> Box | None:
    """A box of between `crop` and all of the width, and of the height, anywhere; None where `crop` is 1."""
    if crop == 1:
        return None
    width, height = rng.uniform(crop, 1), rng.uniform(crop, 1)
    left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    return left, top, left + width, top + height


@dataclass(frozen=True)
class Photographs:
    """Photographs as `Examples` reads them, squashed."""

    files: Sequence[Path]
    size: int

    def __call__(self, index: int, view: View) -> np.ndarray:
        array = read_square(self.files[index], self.size, view.box)
        return array[:, :, ::-1].copy() if view.mirrored else array


def read_square(path: Path, size: int, box: Box | None = None) -> np.ndarray:
    """(3, size, size) uint8, squashed: the image, or what is in the box."""
    from PIL import Image

    from captionfix.images import read_image

    image = read_image(path)
    if image.size != (size, size) or box is not None:
        left, top, right, bottom = box or (0, 0, 1, 1)
        width, height = image.size
        edges = (left * width, top * height, right * width, bottom * height)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=edges)
    return np.asarray(image).transpose(2, 0, 1)
