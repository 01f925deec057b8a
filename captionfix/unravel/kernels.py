"""The sparse step compiled: what the engine does with a word's few neurons, as loops instead of tensor operations.

A layer's step is little arithmetic in some forty tensor operations, each of which costs more to start than to do. On a
CPU, with numba installed (the extra ``compiled``), the four that take the time run as loops over neurons. They give
what the tensor operations give, but for the order in which numbers are added and which of two equal ones is taken;
without numba, on other devices and for other types the tensor operations run. ``CAPTIONFIX_COMPILED=0`` keeps to
those everywhere. The first call in an environment compiles, which takes some seconds; later ones find the result.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_TYPES = (torch.float32, torch.float64)
_BLOCK = 16  # products looked at together
_PRIME = 11400714819323198485  # 2 ** 64 / golden ratio: Fibonacci hashing


class Window(NamedTuple):
    """Which input positions a convolution's output positions see: up to three numbers each, one a dimension. By default
    the one position that there is.
    """

    output: Sequence[int] = ()
    input: Sequence[int] = ()
    kernel: Sequence[int] = ()
    stride: Sequence[int] = ()
    padding: Sequence[int] = ()
    dilation: Sequence[int] = ()
    groups: int = 1

    def numbers(self) -> NDArray[np.int64]:
        """(6, 3): missing dimensions first, with one position."""
        table = np.ones((6, 3), np.int64)
        table[4] = 0
        for row, numbers in zip(table, self[:6], strict=True):
            row[3 - len(numbers) :] = numbers
        return table


wanted = os.environ.get("CAPTIONFIX_COMPILED", "1") != "0" and importlib.util.find_spec("numba") is not None
"""Whether the loops are used: numba is there and nobody asked to go without."""


def usable(*tensors: Tensor) -> bool:
    """Whether these tensors can be worked on by the compiled loops."""
    return wanted and all(t.dtype in _TYPES and t.device.type == "cpu" for t in tensors)


def merge(
    word: Tensor, element: Tensor, direction: Tensor, mass: Tensor, words: int, budget: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of the same word, element and direction added up, sorted by word; of each word the ``budget`` heaviest,
    scaled so that the word keeps its mass. Rows without mass are dropped.
    """
    found = _compiled(_merge)(
        word.numpy(), element.numpy(), direction.numpy(), mass.numpy(), words, -1 if budget is None else budget
    )
    return tuple(map(torch.from_numpy, found))  # type: ignore[return-value]


def distinct(element: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct neurons (element, direction), and which of them each row is."""
    found = _compiled(_distinct)(element.numpy(), direction.numpy())
    return tuple(map(torch.from_numpy, found))  # type: ignore[return-value]


def follow(
    word: Tensor, which: Tensor, mass: Tensor, index: Tensor, share: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows (word, neuron number, mass) moved along a link: (word, element, direction, mass) of what arrives, and what
    each row gave away.
    """
    found = _compiled(_follow)(
        word.numpy(), which.numpy(), mass.numpy(), index.numpy(), share.numpy(), direction.numpy()
    )
    return tuple(map(torch.from_numpy, found))  # type: ignore[return-value]


def contributors(
    rows: Tensor, weights: Tensor, neurons: Tensor, direction: Tensor, window: Window, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``keep`` contributions of a convolution's window that agree most with each neuron.

    Args:
        rows: (images * input positions, or more, channels), the input with channels last.
        weights: (filters, taps, channels of a group).
        neurons: (D,) element numbers of the (images, filters, *output positions) output.
        direction: (D,).
        window: what each output position sees.
        keep: how many.

    Returns:
        (D, keep) elements of the (images, channels, *positions) input, shares of the mass (0 from where on none
        agrees), and the contributors' directions.
    """
    size = (len(neurons), min(keep, weights[0].numel()))
    element, share = np.zeros(size, np.int64), np.zeros(size, rows.numpy().dtype)
    towards = np.ones_like(share)
    given = (rows.contiguous().numpy(), weights.contiguous().numpy(), neurons.numpy(), direction.numpy())
    _compiled(_contributors)(*given, window.numbers(), window.groups, element, share, towards)
    return torch.from_numpy(element), torch.from_numpy(share), torch.from_numpy(towards)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    import numba

    # numbers are finite (checked before), so comparisons may become vector operations
    options: dict[str, Any] = {"error_model": "numpy", "fastmath": {"nnan", "nsz"}}
    loop: Callable[..., Any]
    try:
        loop = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to write: compiled anew in every process
        loop = numba.njit(**options)(function)
    return loop


def _merge(word, element, direction, mass, words, budget):  # type: ignore[no-untyped-def]
    first = np.zeros(words + 1, np.int64)
    for i in range(len(word)):
        first[word[i] + 1] += 1
    most = 0
    for w in range(words):
        most = max(most, first[w + 1])
        first[w + 1] += first[w]
    order, end = np.empty(len(word), np.int64), first[:-1].copy()
    for i in range(len(word)):
        order[end[word[i]]] = i
        end[word[i]] += 1
    bits = 2
    while (1 << bits) < 2 * most:
        bits += 1
    known, place = np.zeros(1 << bits, np.int64), np.empty(1 << bits, np.int64)
    to_word, to_key = np.empty(len(word), np.int64), np.empty(len(word), np.int64)
    to_mass, part = np.empty(len(word), mass.dtype), np.empty(most, mass.dtype)
    end_of = 0
    for w in range(words):
        begin = end_of
        total = 0.0
        for j in range(first[w], first[w + 1]):
            i = order[j]
            if not mass[i] > 0:
                continue
            total += mass[i]
            key = element[i] * 2 + (1 if direction[i] > 0 else 0)
            slot = np.int64((np.uint64(key) * np.uint64(_PRIME)) >> np.uint64(64 - bits))
            while known[slot] == w + 1 and to_key[place[slot]] != key:
                slot = (slot + 1) & ((1 << bits) - 1)
            if known[slot] == w + 1:
                to_mass[place[slot]] += mass[i]
            else:
                known[slot], place[slot] = w + 1, end_of
                to_key[end_of], to_mass[end_of], to_word[end_of] = key, mass[i], w
                end_of += 1
        count = end_of - begin
        if 0 <= budget < count:
            # the lightest of those that stay, by quickselect
            part[:count] = to_mass[begin:end_of]
            low, high, target = 0, count - 1, count - budget
            while low < high:
                pivot, left, right = part[(low + high) // 2], low, high
                while left <= right:
                    while part[left] < pivot:
                        left += 1
                    while part[right] > pivot:
                        right -= 1
                    if left <= right:
                        part[left], part[right] = part[right], part[left]
                        left, right = left + 1, right - 1
                if target <= right:
                    high = right
                elif target >= left:
                    low = left
                else:
                    break
            least = part[target]
            ties = budget
            for j in range(begin, end_of):
                if to_mass[j] > least:
                    ties -= 1
            kept, last = 0.0, begin
            for j in range(begin, end_of):
                if to_mass[j] == least:
                    ties -= 1
                if to_mass[j] > least or (to_mass[j] == least and ties >= 0):
                    kept += to_mass[j]
                    to_key[last], to_mass[last] = to_key[j], to_mass[j]
                    last += 1
            for j in range(begin, last):
                to_mass[j] *= total / kept
            end_of = last
    to_element, to_direction = np.empty(end_of, np.int64), np.empty(end_of, direction.dtype)
    for j in range(end_of):
        to_element[j], to_direction[j] = to_key[j] >> 1, 1 if to_key[j] & 1 else -1
    return to_word[:end_of], to_element, to_direction, to_mass[:end_of]


def _distinct(element, direction):  # type: ignore[no-untyped-def]
    bits = 2
    while (1 << bits) < 2 * len(element):
        bits += 1
    place = np.full(1 << bits, -1, np.int64)
    keys, which = np.empty(len(element), np.int64), np.empty(len(element), np.int64)
    count = 0
    for i in range(len(element)):
        key = element[i] * 2 + (1 if direction[i] > 0 else 0)
        slot = np.int64((np.uint64(key) * np.uint64(_PRIME)) >> np.uint64(64 - bits))
        while place[slot] >= 0 and keys[place[slot]] != key:
            slot = (slot + 1) & ((1 << bits) - 1)
        if place[slot] < 0:
            place[slot], keys[count] = count, key
            count += 1
        which[i] = place[slot]
    neurons, towards = np.empty(count, np.int64), np.empty(count, direction.dtype)
    for j in range(count):
        neurons[j], towards[j] = keys[j] >> 1, 1 if keys[j] & 1 else -1
    return neurons, towards, which


def _follow(word, which, mass, index, share, direction):  # type: ignore[no-untyped-def]
    width, turned = index.shape[1], direction.shape[1] - 1
    count = 0
    for i in range(len(word)):
        for k in range(width):
            if share[which[i], k] * mass[i] > 0:
                count += 1
    to_word, to_element = np.empty(count, np.int64), np.empty(count, np.int64)
    to_direction, to_mass = np.empty(count, direction.dtype), np.empty(count, mass.dtype)
    gave = np.zeros(len(word), mass.dtype)
    at = 0
    for i in range(len(word)):
        d = which[i]
        for k in range(width):
            moved = share[d, k] * mass[i]
            if moved > 0:
                to_word[at], to_element[at] = word[i], index[d, k]
                to_direction[at], to_mass[at] = direction[d, min(k, turned)], moved
                gave[i] += moved
                at += 1
    return to_word, to_element, to_direction, to_mass, gave


def _contributors(rows, weights, neurons, direction, geometry, groups, element, share, towards):  # type: ignore[no-untyped-def]
    filters, taps, channels = weights.shape
    out, extent, kernel, stride, padding, dilation = geometry
    places, area = out[0] * out[1] * out[2], extent[0] * extent[1] * extent[2]
    keep, all_channels = element.shape[1], rows.shape[1]
    flat_rows, flat_weights = rows.reshape(-1), weights.reshape(-1)
    for n in range(len(neurons)):
        place = neurons[n] % places
        chosen = neurons[n] // places % filters
        image = neurons[n] // places // filters
        low_2 = place % out[2] * stride[2] - padding[2]
        low_1 = place // out[2] % out[1] * stride[1] - padding[1]
        low_0 = place // out[2] // out[1] * stride[0] - padding[0]
        base = chosen // (filters // groups) * channels
        towards_n, element_n, share_n = towards[n], element[n], share[n]
        sense = direction[n]
        held, least = 0, rows.dtype.type(0)
        tap = -1
        for a in range(kernel[0]):
            at_0 = low_0 + a * dilation[0]
            for b in range(kernel[1]):
                at_1 = low_1 + b * dilation[1]
                for c in range(kernel[2]):
                    tap += 1
                    at_2 = low_2 + c * dilation[2]
                    if not (0 <= at_0 < extent[0] and 0 <= at_1 < extent[1] and 0 <= at_2 < extent[2]):
                        continue
                    position = (at_0 * extent[1] + at_1) * extent[2] + at_2
                    x = np.uint64((image * area + position) * all_channels + base)
                    w = np.uint64((chosen * taps + tap) * channels)
                    for begin in range(0, channels, _BLOCK):
                        end = min(begin + _BLOCK, channels)
                        better = np.int32(0)  # a count is a vector operation, a search is not
                        for i in range(np.uint64(begin), np.uint64(end)):
                            value = flat_rows[x + i] * flat_weights[w + i] * sense
                            better += np.int32(1) if value > least else np.int32(0)
                        if better == 0:
                            continue
                        for i in range(np.uint64(begin), np.uint64(end)):
                            value = flat_rows[x + i] * flat_weights[w + i] * sense
                            if value > least:  # into the sorted list of those kept so far
                                j = held if held < keep else keep - 1
                                while j > 0 and share_n[j - 1] < value:
                                    share_n[j], element_n[j] = share_n[j - 1], element_n[j - 1]
                                    j -= 1
                                share_n[j] = value
                                element_n[j] = (position * channels + np.int64(i)) * 2 + (flat_rows[x + i] < 0)
                                held = min(held + 1, keep)
                                if held == keep:
                                    least = share_n[keep - 1]
        total = rows.dtype.type(0)
        for j in range(held):
            total += share_n[j]
        for j in range(held):
            share_n[j] /= total
            towards_n[j] = 1 - 2 * (element_n[j] & 1)
            position, i = (element_n[j] >> 1) // channels, (element_n[j] >> 1) % channels
            element_n[j] = (image * all_channels + base + i) * area + position
