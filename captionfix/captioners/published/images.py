"""How published captioners make an image the CNN's input, where that is not a plain resize and crop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captionfix.captioners.captioner import Prepared
from captionfix.captioners.preprocess import Preprocess


@dataclass(frozen=True)
class AsItIs:
    """No resize and no crop; only what is larger than any image of COCO is made as small.

    Attributes:
        longest: side in pixels that is allowed; COCO's is 640.
    """

    longest: int = 640

    def __call__(self, image: Image.Image) -> Prepared:
        shrink = self.longest / max(image.size)
        size = (max(1, round(image.height * shrink)), max(1, round(image.width * shrink))) if shrink < 1 else None
        return Preprocess(resize=size)(image)


@dataclass(frozen=True)
class TensorFlow1:
    """Bilinear resize as TensorFlow 1 does it, centre crop, scaled to [-1, 1].

    Pixel j of the smaller image is read at j times the factor in the larger, from its two neighbours: neither are the
    centres of pixels aligned nor is anything averaged over.

    Attributes:
        resize: side of the square to squash to.
        crop: side of the central square that is kept.
    """

    resize: int = 346
    crop: int = 299

    def __call__(self, image: Image.Image) -> Prepared:
        width, height = image.size
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
        pixels = _stretch(_stretch(pixels, 1, self.resize), 2, self.resize)
        first = (self.resize - self.crop) // 2
        pixels = pixels[:, first : first + self.crop, first : first + self.crop]
        x, y = width / self.resize, height / self.resize
        left, top = (first - 0.5) * x + 0.5, (first - 0.5) * y + 0.5  # half a pixel off what others do
        return Prepared((pixels - 0.5) * 2, image.size, (left, top, left + self.crop * x, top + self.crop * y))


def _stretch(pixels: Tensor, axis: int, size: int) -> Tensor:
    length = pixels.shape[axis]
    at = torch.arange(size, dtype=torch.float32) * (torch.tensor(length, dtype=torch.float32) / size)
    low = at.floor().long().clamp(max=length - 1)
    weight = (at - low).view([-1 if i == axis else 1 for i in range(pixels.dim())])
    first, second = pixels.index_select(axis, low), pixels.index_select(axis, (low + 1).clamp(max=length - 1))
    return first + (second - first) * weight
