"""Methods that change the image or the feature map and look what happens. All words are scored in one decoder pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...captioners.captioner import Captioner
from ...word_to_map import Caption
from .cams import upsampled

BATCH = 16


@torch.inference_mode()
def occlusion(
    captioner: Captioner,
    pixels: Tensor,
    features: Tensor,
    caption: Caption,
    *,
    window: float = 1 / 7,
    stride: float = 1 / 14,
    fill: float = 0.0,
) -> Tensor:
    """Zeiler, Fergus 2014: the drop of a word's score under a square of the CNN's mean colour that slides over the
    image; each pixel gets the mean over the squares that cover it (captum's rule), negative parts cut.

    ``window`` and ``stride`` are fractions of the input's sides.
    """
    whole = caption.scores(captioner.decode(features, caption.inputs(features.device)))[0]
    total = torch.zeros(len(caption.ids), *pixels.shape[2:], device=pixels.device)
    covered = torch.zeros(pixels.shape[2:], device=pixels.device)
    places = list(windows(pixels.shape[2], pixels.shape[3], window, stride))
    for first in range(0, len(places), BATCH):
        part = places[first : first + BATCH]
        hidden = pixels.repeat(len(part), 1, 1, 1)
        for image, (rows, columns) in zip(hidden, part, strict=True):
            image[:, rows, columns] = fill
        for drop, (rows, columns) in zip(whole - score(captioner, hidden, caption), part, strict=True):
            total[:, rows, columns] += drop[:, None, None]
            covered[rows, columns] += 1
    return (total / covered.clamp_min(1)).clamp_min(0)


def windows(height: int, width: int, window: float, stride: float) -> Iterator[tuple[slice, slice]]:
    """Squares that slide over an image until its far edges are reached."""

    def starts(length: int) -> list[slice]:
        side, step = max(1, round(window * length)), max(1, round(stride * length))
        count = 1 + max(0, -(-(length - side) // step))
        return [slice(k * step, min(k * step + side, length)) for k in range(count)]

    return ((rows, columns) for rows in starts(height) for columns in starts(width))


@torch.inference_mode()
def rise(
    captioner: Captioner,
    pixels: Tensor,
    features: Tensor,
    caption: Caption,
    *,
    masks: int = 1000,
    cells: int = 7,
    keep: float = 0.5,
    seed: int = 0,
) -> Tensor:
    """Petsiuk, Das, Saenko 2018: random soft masks M, each weighed with the word's probability under it.

    Published as the mean of p M. That map is nearly even, since every mask counts for something; its best form
    is the covariance of p and M, which takes off the mean of both, negative parts cut.
    """
    height, width = pixels.shape[2:]
    draw = torch.Generator().manual_seed(seed)
    step = (-(-height // cells), -(-width // cells))
    size = ((cells + 1) * step[0], (cells + 1) * step[1])
    count = len(caption.ids)
    both = torch.zeros(count, height, width, device=pixels.device)
    seen, likely = torch.zeros(height, width, device=pixels.device), torch.zeros(count, device=pixels.device)
    for first in range(0, masks, BATCH):
        number = min(BATCH, masks - first)
        coarse = (torch.rand(number, 1, cells, cells, generator=draw) < keep).float()
        fine = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
        shift = torch.stack([torch.randint(0, s, (number,), generator=draw) for s in step], 1).tolist()
        mask = torch.stack([one[:, y : y + height, x : x + width] for one, (y, x) in zip(fine, shift, strict=True)]).to(
            pixels.device
        )
        p = score(captioner, pixels * mask, caption).exp()
        both += torch.einsum("bn,bhw->nhw", p, mask[:, 0])
        seen += mask.sum((0, 1))
        likely += p.sum(0)
    return (both / masks - (likely / masks)[:, None, None] * seen / masks).clamp_min(0)


@torch.inference_mode()
def region_feeding(captioner: Captioner, pixels: Tensor, features: Tensor, caption: Caption) -> Tensor:
    """Ramanishka et al. 2017, "Top-down visual saliency guided by captions": each cell of the feature map is fed alone
    as the whole image, and the word's log-probability is the cell's worth. Scaled to 0..1 a word, less its mean,
    negative parts cut (as published), bilinear on the input. The CNN does not run.
    """
    cells = features[0].flatten(1).T  # (N, F)
    tokens = caption.inputs(features.device)
    each = [
        caption.scores(
            captioner.decode(
                part[:, :, None, None].expand(-1, -1, *features.shape[2:]).contiguous(), tokens.expand(len(part), -1)
            )
        )
        for part in cells.split(BATCH * 4)
    ]
    worth = torch.cat(each).T.reshape(-1, *features.shape[2:])
    low, high = worth.amin((1, 2), keepdim=True), worth.amax((1, 2), keepdim=True)
    scaled = (worth - low) / (high - low).clamp_min(torch.finfo(worth.dtype).tiny)
    return upsampled((scaled - scaled.mean((1, 2), keepdim=True)).clamp_min(0), pixels)


def score(captioner: Captioner, pixels: Tensor, caption: Caption) -> Tensor:
    """(B, n): each word's score on each of (B, C, H, W) images."""
    return caption.scores(
        captioner.decode(captioner.encode(pixels), caption.inputs(pixels.device).expand(len(pixels), -1))
    )
