"""Whatever comes in, an upright 8-bit RGB picture comes out, or an error that says what was wrong."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from captionfix.errors import ImageError
from captionfix.images import read_image


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colours(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, with no pixels behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_every_kind_of_source_gives_the_same_picture(picture: Image.Image, tmp_path: Path) -> None:
    import torch

    path = tmp_path / "picture.png"
    picture.save(path)
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    sources = [
        path,
        str(path),
        path.read_bytes(),
        picture,
        array,
        array / 255.0,
        tensor,
        tensor / 255,
        array.astype("u2") * 257,
    ]
    for source in sources:
        np.testing.assert_array_equal(colours(read_image(source)), array)
    half = np.abs(colours(read_image((tensor / 255).bfloat16())).astype(int) - array)
    assert half.max() <= 1


def test_the_caller_keeps_an_untouched_image(picture: Image.Image) -> None:
    result = read_image(picture)
    result.putpixel((0, 0), (1, 2, 3))
    assert picture.getpixel((0, 0)) != (1, 2, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (2, 1)])
def test_tiny_pictures_are_accepted(size: tuple[int, int]) -> None:
    assert read_image(encoded(Image.new("RGB", size, "red"), "png")).size == size


def test_missing_folder_and_empty(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nothing\.jpg: there is no such file"):
        read_image(tmp_path / "nothing.jpg")
    with pytest.raises(ImageError, match="is a folder"):
        read_image(tmp_path)
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ImageError, match=r"empty\.jpg: the file is empty"):
        read_image(tmp_path / "empty.jpg")
    with pytest.raises(ImageError, match="no bytes"):
        read_image(b"")
    with pytest.raises(ImageError, match="can't be read"):
        read_image("null\0byte.jpg")


@pytest.mark.parametrize("content", [b"hello, this is text", b"\x00" * 1000, b"%PDF-1.7\n", b"\xff\xd8\xff"])
def test_not_an_image(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "letter.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"letter\.jpg: not an image"):
        read_image(path)


@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "webp", "tiff", "bmp"])
@pytest.mark.parametrize("part", [0.5, 0.9])
def test_truncated(picture: Image.Image, kind: str, part: float) -> None:
    content = encoded(picture, kind)
    with pytest.raises(ImageError, match=r"damaged|not an image"):
        read_image(content[: int(len(content) * part)])


def test_over_the_limit_is_refused_before_decoding(picture: Image.Image) -> None:
    with pytest.raises(ImageError, match=r"400000000 pixels.*smaller than 100,000,000"):
        read_image(huge_png(20_000, 20_000))
    with pytest.raises(ImageError, match=r"12000 x 10000 is over the limit of 100,000,000 pixels"):
        read_image(huge_png(12_000, 10_000))
    with pytest.raises(ImageError, match="64 x 48 is over the limit of 3,071 pixels"):
        read_image(picture, max_pixels=48 * 64 - 1)
    with pytest.raises(ImageError, match="64 x 48 is over"):
        read_image(np.asarray(picture), max_pixels=48 * 64 - 1)
    assert read_image(picture, max_pixels=48 * 64).size == (64, 48)


def test_greyscale_bilevel_and_palette() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = colours(read_image(encoded(Image.fromarray(ramp), "png")))
    np.testing.assert_array_equal(grey, np.repeat(ramp[..., None], 3, 2))
    np.testing.assert_array_equal(colours(read_image(ramp)), grey)
    np.testing.assert_array_equal(colours(read_image(ramp[..., None])), grey)
    assert colours(read_image(encoded(Image.new("1", (3, 3), 1), "png"))).min() == 255
    palette = Image.new("RGB", (8, 8), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert palette.mode == "P"
    assert (colours(read_image(encoded(palette, "gif"))) == (10, 200, 30)).all()


def test_transparency_lies_over_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert (colours(read_image(encoded(clear, "png"))) == 255).all()
    np.testing.assert_allclose(colours(read_image(encoded(half, "png")))[0, 0], (255, 127, 127), atol=1)
    np.testing.assert_allclose(colours(read_image(np.asarray(half)))[0, 0], (255, 127, 127), atol=1)
    assert (colours(read_image(Image.new("LA", (4, 4), (0, 0)))) == 255).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    assert (colours(read_image(encoded(palette, "png", transparency=1))) == 255).all()
    assert (colours(read_image(encoded(palette, "png", transparency=0))) == (0, 0, 255)).all()


def test_cmyk() -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    for source in (cyan, encoded(cyan, "tiff"), encoded(cyan, "jpeg")):
        np.testing.assert_allclose(colours(read_image(source))[8, 8], (0, 255, 255), atol=3)


def test_sixteen_bit_is_scaled() -> None:
    deep = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for source in (encoded(Image.fromarray(deep), "png"), encoded(Image.fromarray(deep), "tiff"), deep):
        assert colours(read_image(source))[0, :, 0].tolist() == [0, 1, 128, 255]
    floating = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    assert colours(read_image(encoded(Image.fromarray(floating), "tiff")))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = Image.new("RGB", (40, 24), "white")
    upright.paste("red", (0, 0, 20, 12))  # the upper left quarter, as a person sees it
    stored = {
        1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM], 5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE], 8: [Image.Transpose.ROTATE_270],
    }[orientation]  # fmt: skip
    image = upright
    for step in stored:
        image = image.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(image, "png", exif=exif)
    for source in (content, Image.open(io.BytesIO(content))):
        np.testing.assert_array_equal(colours(read_image(source)), np.asarray(upright))


def test_damaged_exif_does_no_harm(picture: Image.Image) -> None:
    content = encoded(picture, "jpeg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff garbage")
    assert read_image(content).size == picture.size


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "webp" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (colours(read_image(content)) == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((4, 4, 5)), r"shape \(4, 4, 5\)"),
        (np.zeros((3, 8, 8)), r"shape \(3, 8, 8\)"),
        (np.zeros((0, 4, 3)), "has no pixels"),
        (np.zeros(7), r"shape \(7,\)"),
        (np.full((4, 4, 3), 255.0), "from 255 to 255, not 0 to 1"),
        (np.full((4, 4, 3), -2.1), "undo a mean-and-deviation scaling"),
        (np.full((4, 4, 3), np.nan), "not 0 to 1"),
        (np.zeros((4, 4, 3), dtype=np.int64), "type int64"),
        (None, "can't read an image from a NoneType"),
        (7, "can't read an image from a int"),
    ],
)
def test_wrong_arrays(source: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        read_image(source)
