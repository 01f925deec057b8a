"""What several families of rules need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..registry import Link
from ..trace import Slot


def coordinates(elements: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Row-major element numbers as one tensor a dimension."""
    result: list[Tensor] = []
    for extent in reversed(shape):
        result.append(elements.remainder(extent))
        elements = elements.div(extent, rounding_mode="floor")
    return result[::-1]


def ravel(index: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Inverse of `coordinates`; broadcasts."""
    result = index[0] if index else torch.zeros((), dtype=torch.long)
    for extent, i in zip(shape[1:], index[1:], strict=True):
        result = result * extent + i
    return result


def broadcast(elements: Tensor, out: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Which element of an input of ``shape`` an element of the broadcast result ``out`` came from."""
    if tuple(out) == tuple(shape):
        return elements
    index = coordinates(elements, out)[len(out) - len(shape) :]
    index = [torch.zeros_like(i) if extent == 1 else i for i, extent in zip(index, shape, strict=True)]
    return ravel(index, shape) if index else torch.zeros_like(elements)


def same(slot: Slot, elements: Tensor, direction: Tensor) -> list[Link]:
    """All mass to one element each."""
    return [Link(slot, elements[:, None], torch.ones_like(direction)[:, None], direction[:, None])]


def sign(values: Tensor) -> Tensor:
    """+1 or -1, +1 for zero."""
    return torch.where(values < 0, -1.0, 1.0).to(
        values.dtype if values.is_floating_point() else torch.get_default_dtype()
    )


def chunks(rows: int, width: int, device: torch.device) -> list[slice]:
    """Slices of rows so that rows x width numbers stay in a processor's caches, and on a GPU within its memory."""
    step = max(1, (1 << 20 if device.type == "cpu" else 1 << 26) // max(width, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def concatenated(parts: list[Link]) -> Link:
    """Links of consecutive rows as one."""
    if len(parts) == 1:
        return parts[0]
    return Link(parts[0].slot, *(torch.cat([getattr(p, n) for p in parts]) for n in ("element", "share", "direction")))
