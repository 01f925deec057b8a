"""Reading anything that may be meant as a picture into one form: upright, 8-bit RGB."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from captionfix.errors import ImageError

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Any"
"""A path, an encoded file's bytes, a PIL image, an array (H, W[, C]) or a torch tensor (C, H, W)."""

MAX_PIXELS = 100_000_000


def read_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads a picture as a person sees it.

    Args:
        source: A path; the bytes of an encoded file; a PIL image; a numpy array (H, W), (H, W, 1), (H, W, 3) or (H,
            W, 4), uint8, uint16, bool or float in 0..1; a torch tensor (C, H, W) or (H, W) of the same kinds, on any
            device.
        max_pixels: Larger pictures are refused before they are decoded. Above Pillow's own limit
            (``PIL.Image.MAX_IMAGE_PIXELS``, about 179 million pixels with its margin) that one has to be raised too.

    Returns:
        An RGB image, turned as its EXIF orientation says, first frame of an animation (a PIL image: the frame it
        shows), transparency laid over white, 16-bit values scaled to 8, CMYK and palettes converted. Any size from 1
        x 1 on.

    Raises:
        ImageError: Missing, not an image, damaged, empty, or over the limit.
    """
    if isinstance(source, (str, os.PathLike)):
        name = str(source)
        return _decode(_read_bytes(Path(source)), name, max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(bytes(source), "the given bytes", max_pixels)
    if isinstance(source, Image.Image):
        return _normalise(source, "the given image", max_pixels)
    if hasattr(source, "detach") and hasattr(source, "cpu"):  # a torch tensor, recognised without importing torch
        return _from_array(_tensor_to_array(source), "the given tensor", max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, "the given array", max_pixels)
    raise ImageError(
        f"can't read an image from a {type(source).__name__}; "
        "give a path, bytes, a PIL image, a numpy array (H, W, C) or a tensor (C, H, W)"
    )


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{path}: is a folder, not an image") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})") from error
    if not data:
        raise ImageError(f"{path}: the file is empty")
    return data


def _decode(data: bytes, name: str, max_pixels: int) -> Image.Image:
    if not data:
        raise ImageError(f"{name}: no bytes at all")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked below
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: too large ({error}); make it smaller than {max_pixels:,} pixels") from None
    except Exception as error:  # files come from strangers, and Pillow's readers raise many kinds
        raise ImageError(
            f"{name}: not an image that can be read (JPEG, PNG, WebP, GIF, TIFF, BMP and others can)"
        ) from error
    return _normalise(image, name, max_pixels)


def _normalise(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: has no pixels ({width} x {height})")
    _check_size(width, height, name, max_pixels)
    try:
        image.load()
    except Exception as error:
        raise ImageError(f"{name}: the image is damaged or cut off ({error})") from error
    return _to_rgb(_upright(image))


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} is over the limit of {max_pixels:,} pixels; make it smaller first"
        )


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data says nothing about the pixels: show them as they are stored
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _wide_to_rgb(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        paper = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(paper, rgba).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _wide_to_rgb(image: Image.Image) -> Image.Image:
    """16-bit integers are 0..65535; floating-point pixels are 0..1 or, where one is above 1, 0..255."""
    values = np.asarray(image).astype(np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    full = 65535.0 if image.mode != "F" else (1.0 if values.max() <= 1.0 else 255.0)
    grey = np.clip(values / full * 255.0 + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _tensor_to_array(tensor: Any) -> np.ndarray:
    values = tensor.detach().cpu()
    if values.dtype.is_floating_point:
        values = values.float()  # numpy has no bfloat16
    array: np.ndarray = values.numpy()
    if array.ndim == 3:
        return np.moveaxis(array, 0, -1)
    return array


def _from_array(array: np.ndarray, name: str, max_pixels: int) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ImageError(
            f"{name}: shape {array.shape} is not (height, width) with none, 1, 3 or 4 channels "
            "(channels first for tensors)"
        )
    if array.size == 0:
        raise ImageError(f"{name}: has no pixels (shape {array.shape})")
    _check_size(array.shape[1], array.shape[0], name, max_pixels)
    return _to_rgb(Image.fromarray(_to_bytes(array, name)))


def _to_bytes(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= -1e-6 and high <= 1 + 1e-6):  # false for NaN as well
            raise ImageError(
                f"{name}: floating-point values go from {low:g} to {high:g}, not 0 to 1; "
                "divide by 255, or undo a mean-and-deviation scaling first"
            )
        return (np.clip(array, 0, 1) * 255 + 0.5).astype(np.uint8)
    raise ImageError(f"{name}: values of type {array.dtype} are not pixels; use uint8, uint16 or float in 0..1")
