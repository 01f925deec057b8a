"""Data for training: captioned images from files, scenes drawn once, batches."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from captionfix.errors import DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Captioned:
    """An image file and its captions."""

    image: Path
    captions: tuple[str, ...]


def read_lines(path: Path, images: Path) -> list[Captioned]:
    """Photographs of a JSON-lines file: `{"photo": file, "captions": [{"words": [...]}, ...]}` a line.

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
            found.append(Captioned(images / entry["photo"], captions))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number} is not a photograph with captions ({error!r})") from error
    return _checked(found, path)


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


@dataclass
class Examples:
    """A data set for the Trainer: item i is an array and captions; `collate` makes a batch of them.

    What is drawn for an item (which captions, a mirror image) depends on seed, epoch and index alone, so a training
    that goes on after an interruption sees what it would have seen.

    Attributes:
        captions: word ids from start to end, per image.
        read: index and random generator -> (C, H, W) or (F, h, w) array: uint8 pixels in 0..255 or features.
        name: "pixel_values" or "features".
        pad: the id that fills up.
        each: captions of an image in a batch (some twice where it has fewer).
        seed: of the drawing.
        epoch: `fit` sets it.
    """

    captions: Sequence[Sequence[Sequence[int]]]
    read: Callable[[int, random.Random], np.ndarray]
    name: str
    pad: int
    each: int = 1
    seed: int = 0
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> tuple[np.ndarray, list[Sequence[int]]]:
        own = list(self.captions[index])
        rng = random.Random(f"{self.seed} {self.epoch} {index}")
        chosen = rng.sample(own, min(self.each, len(own)))
        return self.read(index, rng), chosen + rng.choices(own, k=self.each - len(chosen))

    def collate(self, items: list[tuple[np.ndarray, list[Sequence[int]]]]) -> dict[str, torch.Tensor]:
        import torch

        longest = max(len(caption) for _, captions in items for caption in captions)
        labels = torch.full((len(items), self.each, longest), self.pad, dtype=torch.long)
        for i, (_, captions) in enumerate(items):
            for k, caption in enumerate(captions):
                labels[i, k, : len(caption)] = torch.as_tensor(caption)
        inputs = torch.from_numpy(np.stack([array for array, _ in items]))
        if inputs.dtype == torch.uint8:
            inputs = (inputs.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        return {self.name: inputs.float(), "labels": labels}


def encode_captions(
    tokenizer: PreTrainedTokenizerFast, groups: Sequence[Sequence[str]], max_words: int
) -> list[list[list[int]]]:
    """Word ids from start to end of every image's captions; longer captions are cut, empty ones left out."""
    end = tokenizer.eos_token_id
    encoded = []
    for captions in groups:
        rows = [ids for ids in tokenizer(list(captions))["input_ids"] if len(ids) > 2]
        encoded.append([ids if len(ids) <= max_words + 2 else [*ids[: max_words + 1], end] for ids in rows])
    return encoded


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


Box = tuple[float, float, float, float]
"""Left, top, right and bottom, as parts of width and height."""


def cut(crop: float, rng: random.Random) -> Box | None:
    """A box of between `crop` and all of the width, and of the height, anywhere; None where `crop` is 1."""
    if crop == 1:
        return None
    width, height = rng.uniform(crop, 1), rng.uniform(crop, 1)
    left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    return left, top, left + width, top + height


@dataclass(frozen=True)
class Photographs:
    """Photographs as `Examples` reads them: cut (see `cut`), squashed, as often as not their mirror image."""

    files: Sequence[Path]
    size: int
    crop: float = 1.0

    def __call__(self, index: int, rng: random.Random) -> np.ndarray:
        return mirror(read_square(self.files[index], self.size, cut(self.crop, rng)), rng)


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


def mirror(array: np.ndarray, rng: random.Random) -> np.ndarray:
    """The (C, H, W) array or, as often, its mirror image."""
    return array[:, :, ::-1].copy() if rng.random() < 0.5 else array
