"""The sparse step compiled: what the engine does with a word's few neurons, as loops instead of tensor operations.

A layer's step is little arithmetic in some forty tensor operations, each of which costs more to start than to do. On a
CPU, with numba installed (the extra ``compiled``), those that take the time run as loops over neurons
(`captionfix.unravel.loops`), on as many processors as PyTorch may use. They give what the tensor operations give, but
for the order in which numbers are added and which of two equal ones is taken; without numba, on other devices and for
other types the tensor operations run. ``CAPTIONFIX_COMPILED=0`` keeps to those everywhere. The first call in an
environment compiles, which takes some seconds; later ones find the result.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_TYPES = (torch.float32, torch.float64)
_POSITIONS = 1 << 22  # seen by neurons that are looked up together
_PROCESSORS = 8  # more would wait for each other longer than they work


class Window(NamedTuple):
    """Which input positions a convolution's output positions see: up to three numbers each, one a dimension. By default
    the one position that there is.
    """

    output: tuple[int, ...] = ()
    input: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1


@lru_cache(maxsize=1024)
def _geometry(window: Window) -> NDArray[np.int64]:
    """(6, 3): a window's numbers, missing dimensions first, with one position."""
    table = np.ones((6, 3), np.int64)
    table[4] = 0
    for row, numbers in zip(table, window[:6], strict=True):
        row[3 - len(numbers) :] = numbers
    return table


wanted = os.environ.get("CAPTIONFIX_COMPILED", "1") != "0" and importlib.util.find_spec("numba") is not None
"""Whether the loops are used: numba is there and nobody asked to go without."""


def usable(*tensors: Tensor) -> bool:
    """Whether these tensors can be worked on by the compiled loops."""
    return wanted and all(t.is_cpu and t.dtype in _TYPES for t in tensors)


def merge(
    word: Tensor, element: Tensor, direction: Tensor, mass: Tensor, words: int, budget: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of the same word, element and direction added up, sorted by word; of each word the ``budget`` heaviest,
    scaled so that the word keeps its mass. Rows without mass are dropped.
    """
    rows = (word.numpy(), element.numpy(), direction.numpy(), mass.numpy())
    found = _in_parts(_loops().merge, words, *rows, words, -1 if budget is None else budget)
    return tuple(map(torch.from_numpy, found))  # type: ignore[return-value]


def distinct(element: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct neurons (element, direction), and which of them each row is."""
    found = _loops().distinct(element.numpy(), direction.numpy())
    return tuple(map(torch.from_numpy, found))  # type: ignore[return-value]


def follow(
    word: Tensor, which: Tensor, mass: Tensor, index: Tensor, share: Tensor, direction: Tensor, moved: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows (word, neuron number, mass) moved along a link: (word, element, direction, mass) of what arrives. What each
    row gave away is added to ``moved``.
    """
    rows = (word.numpy(), which.numpy(), mass.numpy())
    found = _loops().follow(*rows, index.numpy(), share.numpy(), direction.numpy(), moved.numpy())
    return tuple(map(torch.from_numpy, found))  # type: ignore[return-value]


def contributors(
    x: Tensor, weights: Tensor, neurons: Tensor, direction: Tensor, window: Window, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``keep`` contributions of a convolution's window that agree most with each neuron.

    Args:
        x: (images, channels, input positions).
        weights: (filters, channels of a group, taps).
        neurons: (D,) element numbers of the (images, filters, *output positions) output.
        direction: (D,).
        window: what each output position sees.
        keep: how many.

    Returns:
        (D, keep) elements of the (images, channels, *positions) input, shares of the mass (0 from where on none
        agrees), and the contributors' directions.
    """
    numbers = weights[0].numel()
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    memory = x.as_strided((span,), (1,))  # whatever the layout: each kind of argument is compiled by itself
    given = (memory.numpy(), tuple(x.shape), x.stride(), weights.contiguous().numpy())
    how = (_geometry(window), window.groups, min(keep, numbers))
    step = max(1, _POSITIONS // weights.shape[2])
    found = []
    for part in (slice(first, first + step) for first in range(0, max(1, len(neurons)), step)):
        each = (neurons[part].numpy(), direction[part].numpy())
        found.append(_in_parts(_loops().contributors, len(each[0]), *given, *each, *how))
    whole = found[0] if len(found) == 1 else map(np.concatenate, zip(*found, strict=True))
    return tuple(map(torch.from_numpy, whole))  # type: ignore[return-value]


@cache
def _loops() -> Any:
    import numba  # slow to import

    from . import loops

    global _alone
    threads = torch.get_num_threads()
    try:
        numba.get_num_threads()  # starts its threads, for which it sets OpenMP's number: PyTorch's too
    except ValueError:  # no pool, or not the one that NUMBA_THREADING_LAYER asks for
        _alone = True
    torch.set_num_threads(threads)
    return loops


_together = threading.Lock()
_alone = False
"""Whether loops never work in parts: no pool of threads is there, or one for a single caller, or a fork left it."""


def _in_parts(loop: Callable[..., Any], most: int, *arguments: Any) -> Any:
    """Calls a loop in as many parts as there are processors, ``most`` at most; in one while another thread works in
    parts.
    """
    global _alone
    threads = min(torch.get_num_threads(), _PROCESSORS)
    if min(threads, most) < 2 or _alone or not _together.acquire(blocking=False):
        return loop(*arguments, 1)
    import numba

    own = numba.get_num_threads()
    try:
        if own > threads:
            numba.set_num_threads(threads)
        found = loop(*arguments, min(threads, own, most))
        _alone = numba.threading_layer() == "workqueue"
        return found
    finally:
        if own > threads:
            numba.set_num_threads(own)
        _together.release()


def _forked() -> None:
    global _alone
    _alone = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
