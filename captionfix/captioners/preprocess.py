"""From an image to a CNN's input, and where on the image that input looks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from captionfix.captioners.captioner import Prepared

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """Resize, crop the centre, scale to [0, 1], normalise: what nearly every captioner does.

    Attributes:
        resize: (height, width) to squash to; or the length of the shorter side; None keeps the size.
        crop: side of the central square that is kept; None keeps all.
        mean: of each channel, taken off after scaling to [0, 1].
        std: of each channel, divided by.
        resample: PIL's filter.
    """

    resize: int | tuple[int, int] | None = (224, 224)
    crop: int | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resample: Image.Resampling = Image.Resampling.BILINEAR

    def __call__(self, image: Image.Image) -> Prepared:
        """An RGB image as (3, H, W) float32, with the window of the image that it shows."""
        size = image.size
        if self.resize is not None:
            image = image.resize(self._target(size), self.resample)
        x, y = size[0] / image.width, size[1] / image.height
        left, top, right, bottom = 0, 0, image.width, image.height
        if self.crop is not None:  # as torchvision's CenterCrop; where the image is smaller, PIL fills with black
            left, top = round((image.width - self.crop) / 2), round((image.height - self.crop) / 2)
            right, bottom = left + self.crop, top + self.crop
            image = image.crop((left, top, right, bottom))
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
        mean, std = torch.tensor(self.mean)[:, None, None], torch.tensor(self.std)[:, None, None]
        return Prepared((pixels - mean) / std, size, (left * x, top * y, right * x, bottom * y))

    def _target(self, size: tuple[int, int]) -> tuple[int, int]:
        assert self.resize is not None
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        width, height = size  # torchvision's Resize: the longer side is cut to whole pixels
        if width <= height:
            return self.resize, max(1, int(self.resize * height / width))
        return max(1, int(self.resize * width / height)), self.resize
