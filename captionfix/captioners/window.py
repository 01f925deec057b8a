"""Which part of the original image a CNN's input shows, for any function that prepares images: asked of the function
itself, by pictures whose brightness says where a pixel was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captionfix.captioners.calm import same_random_numbers
from captionfix.captioners.captioner import Prepared
from captionfix.errors import CaptionerError

Box = tuple[float, float, float, float]
REMEDY = (
    "Give window=: a function of the original's (width, height) that says which part of it the input shows, "
    "(x0, y0, x1, y1) in its pixels; for instance window=lambda w, h: (0, 0, w, h) where all is squashed"
)


class Preparation:
    """Makes a captioner's own preprocessing tell where its pixels come from.

    The window is found by preparing, at each new image size, ramps of brightness along x and along y beside a black
    and a white image. What comes out must be the same each time (nothing random) and affine in the output's columns
    and rows (scaled and cut, neither turned nor bent, and no change of tone other than a linear one).

    Args:
        function: an RGB image -> a (C, H, W) float tensor (also with a leading 1, as an array, or under
            "pixel_values"), or a `Prepared`.
        window: of the original that the input shows, x0, y0, x1, y1 in its pixels, or a function of its width and
            height that says so. None: found.
    """

    def __init__(self, function: Callable[[Any], Any], window: Box | Callable[[int, int], Box] | None = None) -> None:
        self.function = function
        self.window = window
        self._found: dict[tuple[int, int], Box] = {}

    def __call__(self, image: Image.Image) -> Prepared:
        """An RGB image, prepared.

        Raises:
            CaptionerError: the function fails, returns something else, is random, or its window can't be found.
        """
        with same_random_numbers():
            made = self._run(image)
            if isinstance(made, Prepared):
                return made if self.window is None else replace(made, window=self._window(image.size))
            pixels = as_pixels(made)
            return Prepared(pixels, image.size, self._window(image.size))

    def _run(self, image: Image.Image) -> Any:
        try:
            return self.function(image)
        except Exception as error:
            raise CaptionerError(
                f"preprocess failed on an RGB image of {image.width} x {image.height}: {_first_line(error)}. It must "
                "take a PIL image and return a (C, H, W) tensor"
            ) from error

    def _window(self, size: tuple[int, int]) -> Box:
        if callable(self.window):
            x0, y0, x1, y1 = self.window(*size)
            return float(x0), float(y0), float(x1), float(y1)
        if self.window is not None:
            return self.window
        if size not in self._found:
            if len(self._found) >= 256:
                self._found.clear()
            self._found[size] = self._look(size)
        return self._found[size]

    def _look(self, size: tuple[int, int]) -> Box:
        width, height = size
        black, white = (self._tones(np.full((height, width), tone, np.uint8)) for tone in (0, 255))
        tones_x, tones_y = self._ramp(size, 1), self._ramp(size, 0)
        for _ in range(1 if self._found else 6):  # a flip that comes half of the time must not slip through
            again = self._ramp(size, 1)
            if again.shape != tones_x.shape or not torch.equal(again, tones_x):
                raise CaptionerError(
                    "preprocess is random: the same image came out differently twice. Use the transform of evaluation "
                    "(no random crop, flip or colour)"
                )
        if not black.shape == white.shape == tones_x.shape == tones_y.shape:
            raise CaptionerError(f"preprocess gives sizes that depend on what the image shows. {REMEDY}")
        span = (white - black).abs()
        seen = (span > 0.2 * span.amax()).all(0)  # what is padded is the same in black and in white
        if not bool(seen.any()):
            raise CaptionerError(f"preprocess gives the same for a black and for a white image. {REMEDY}")
        scale = torch.where(span > 0, white - black, 1)
        edges = []
        for axis, first in ((1, tones_x), (0, tones_y)):
            length, name = size[1 - axis], "yx"[axis]
            found = _edges(((first - black) / scale).mean(0) * length, seen, length, axis, name)
            # Where one output pixel is about one of the ramp's 255 steps, rounding follows the place: tilt it a little.
            top = _tilted((found[1] - found[0]) / first.shape[1 + axis] / length)
            again = ((self._ramp(size, axis, top) - black) / scale).mean(0) * (length * 255 / top)
            edges.append(_edges(again, seen, length, axis, name))
        (x0, x1), (y0, y1) = edges
        return x0, y0, x1, y1

    def _ramp(self, size: tuple[int, int], axis: int, top: int = 255) -> Tensor:
        """What comes out of brightness that rises along an axis, 0 at one edge and `top` at the other."""
        width, height = size
        length = size[1 - axis]
        ramp = np.round((np.arange(length) + 0.5) / length * top).astype(np.uint8)
        return self._tones(np.broadcast_to(ramp if axis else ramp[:, None], (height, width)))

    def _tones(self, grey: np.ndarray[Any, Any]) -> Tensor:
        made = self._run(Image.fromarray(np.ascontiguousarray(np.repeat(grey[..., None], 3, 2))))
        return as_pixels(made).double()


def _tilted(share: float) -> int:
    """How high a ramp should rise so that its steps and an output's pixels, each `share` of the length, do not beat."""
    tops = np.arange(128, 256)
    part = tops * share % 1
    return int(tops[np.minimum(abs(part - 0.382), abs(part - 0.618)).argmin()])


def _edges(place: Tensor, seen: Tensor, length: int, axis: int, name: str) -> tuple[float, float]:
    """Where the output's first and last edges lie, from the place that each of its pixels shows."""
    rows, columns = torch.nonzero(seen, as_tuple=True)
    centres = (torch.stack([rows, columns]) + 0.5).double()
    value = place[rows, columns]
    # At the original's own edges a filter has nothing to go on with, and a ramp bends: leave them out.
    inner = (value > 0.06 * length) & (value < 0.94 * length)
    if length < 4 or int(inner.sum()) < 4:
        return 0.0, float(length)
    centres, value = centres[:, inner], value[inner]
    design = torch.stack([centres[0], centres[1], torch.ones_like(value)], 1)
    found = torch.linalg.lstsq(design, value[:, None], driver="gelsd").solution[:, 0]
    off = float((design @ found - value).abs().max())
    slope, across = float(found[axis]), float(found[1 - axis])
    extent = place.shape[axis]
    if slope < 0 < abs(slope) * extent > abs(across) * place.shape[1 - axis]:
        raise CaptionerError(f"preprocess mirrors the image along {name}; captionfix follows scaling and cutting only")
    if off > max(1.5, 0.02 * length) or abs(across) * place.shape[1 - axis] > max(1.0, 0.02 * length) or slope <= 0:
        raise CaptionerError(
            f"preprocess does more than scale and cut: where its pixels come from is not linear in {name} (a rotation, "
            f"a warp, or tones that are changed nonlinearly). {REMEDY}"
        )
    first, last = float(found[2]), float(found[2]) + slope * extent
    near = max(0.5, 0.002 * length)  # what an 8-bit ramp leaves open
    return (
        0.0 if abs(first) < near else first,
        float(length) if abs(last - length) < near else last,
    )


def as_pixels(made: Any) -> Tensor:
    """The (C, H, W) float32 tensor in what a preprocessing returns.

    Raises:
        CaptionerError: there is none.
    """
    if isinstance(made, Mapping):
        made = made.get("pixel_values")
    made = getattr(made, "pixel_values", made)
    if isinstance(made, (list, tuple)) and len(made) == 1:
        made = made[0]
    pixels = torch.from_numpy(made.copy()) if isinstance(made, np.ndarray) else made
    if isinstance(pixels, Tensor) and pixels.dim() == 4 and len(pixels) == 1:
        pixels = pixels[0]
    if not isinstance(pixels, Tensor) or pixels.dim() != 3:
        what = f"shape {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else type(made).__name__
        raise CaptionerError(f"preprocess must return a (C, H, W) tensor for one image, not {what}")
    if not pixels.is_floating_point():
        raise CaptionerError(f"preprocess returns {pixels.dtype}; the CNN's input must be floating point (ToTensor())")
    return pixels.detach().float()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else '(no message)'}"
