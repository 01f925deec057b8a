"""The sparse step compiled: what the engine does with a word's few neurons, as loops instead of tensor operations.

A layer's step is little arithmetic in some forty tensor operations, each of which costs more to start than to do. On a
CPU, with numba installed (the extra ``compiled``), those that take the time run as loops over neurons. They give
what the tensor operations give, but for the order in which numbers are added and which of two equal ones is taken;
without numba, on other devices and for other types the tensor operations run. ``CAPTIONFIX_COMPILED=0`` keeps to
those everywhere. The first call in an environment compiles, which takes some seconds; later ones find the result.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_TYPES = (torch.float32, torch.float64)
_LANES = 64  # products whose largest is looked for together
_TILE = 16  # channels gathered together
_POSITIONS = 1 << 22  # seen by neurons that are looked up together
_PRIME = 11400714819323198485  # 2 ** 64 / golden ratio: Fibonacci hashing


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
    word: Tensor, which: Tensor, mass: Tensor, index: Tensor, share: Tensor, direction: Tensor, moved: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows (word, neuron number, mass) moved along a link: (word, element, direction, mass) of what arrives. What each
    row gave away is added to ``moved``.
    """
    rows = (word.numpy(), which.numpy(), mass.numpy())
    found = _compiled(_follow)(*rows, index.numpy(), share.numpy(), direction.numpy(), moved.numpy())
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
    size = (len(neurons), min(keep, weights[0].numel()))
    element, share = np.zeros(size, np.int64), np.zeros(size, x.numpy().dtype)
    towards = np.ones(size, share.dtype)
    given, geometry = (x.numpy(), weights.contiguous().numpy()), _geometry(window)
    step = max(1, _POSITIONS // weights.shape[2])
    for part in (slice(first, first + step) for first in range(0, len(neurons), step)):
        each = (neurons[part].numpy(), direction[part].numpy())
        found = (element[part], share[part], towards[part])
        _compiled(_contributors)(*given, *each, geometry, window.groups, *found)
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
    first, sorted_by_word = np.zeros(words + 1, np.int64), True
    for i in range(len(word)):
        first[word[i] + 1] += 1
        sorted_by_word &= i == 0 or word[i - 1] <= word[i]
    most = 0
    for w in range(words):
        most = max(most, first[w + 1])
        first[w + 1] += first[w]
    order, end = np.empty(0 if sorted_by_word else len(word), np.int64), first[:-1].copy()
    if not sorted_by_word:
        for i in range(len(word)):
            order[end[word[i]]] = i
            end[word[i]] += 1
    bits = 2
    while (1 << bits) < 2 * most:
        bits += 1
    known, place = np.zeros(1 << bits, np.int64), np.empty(1 << bits, np.int64)
    to_word, to_key = np.empty(len(word), np.int64), np.empty(len(word), np.int64)
    to_mass, part = np.empty(len(word), mass.dtype), np.empty(most, mass.dtype)
    level = np.empty(1 << 11, np.int32)
    end_of = 0
    for w in range(words):
        begin = end_of
        total = 0.0
        for j in range(first[w], first[w + 1]):
            i = j if sorted_by_word else order[j]
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
            # in which class of size the lightest is that stays: its exponent and three more bits
            level[:] = 0
            size = to_mass[begin:end_of].astype(np.float32).view(np.int32) >> 20
            for j in range(count):
                level[size[j]] += 1
            heavier, least_size = 0, size.max()
            while heavier + level[least_size] < budget:
                heavier += level[least_size]
                least_size -= 1
            held = 0
            for j in range(count):
                part[held] = to_mass[begin + j]
                held += 1 if size[j] == least_size else 0
            # which of that class, by quickselect
            low, high, target = 0, held - 1, held - (budget - heavier)
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
            least, ties = part[target], budget
            for j in range(begin, end_of):
                ties -= 1 if to_mass[j] > least else 0
            kept, last = 0.0, begin
            for j in range(begin, end_of):  # without branches, which would be taken at random
                moved, equal = to_mass[j], 1 if to_mass[j] == least else 0
                stays = (1 if moved > least else 0) | (equal & (1 if ties > 0 else 0))
                ties -= equal
                to_key[last], to_mass[last] = to_key[j], moved
                kept += moved * stays
                last += stays
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


def _follow(word, which, mass, index, share, direction, gave):  # type: ignore[no-untyped-def]
    width, turned = index.shape[1], direction.shape[1] - 1
    count = len(word) * width
    to_word, to_element = np.empty(count, np.int64), np.empty(count, np.int64)
    to_direction, to_mass = np.empty(count, direction.dtype), np.empty(count, mass.dtype)
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
    return to_word[:at], to_element[:at], to_direction[:at], to_mass[:at]


def _contributors(x, weights, neurons, direction, geometry, groups, element, share, towards):  # type: ignore[no-untyped-def]
    filters, channels, taps = weights.shape
    out, extent, kernel, stride, padding, dilation = geometry
    places, area = out[0] * out[1] * out[2], extent[0] * extent[1] * extent[2]
    all_channels, group, keep = channels * groups, filters // groups, element.shape[1]
    zero = weights.dtype.type(0)
    # the input positions that each neuron sees, of all images' (-1 in the padding), and neurons by filter
    seen, is_seen = np.full((len(neurons), taps), -1), np.zeros(len(x) * area, np.bool_)
    first, order = np.zeros(filters + 1, np.int64), np.empty(len(neurons), np.int64)
    for n in range(len(neurons)):
        place, tap = neurons[n] % places, -1
        first[neurons[n] // places % filters + 1] += 1
        image = neurons[n] // places // filters
        low_2 = place % out[2] * stride[2] - padding[2]
        low_1 = place // out[2] % out[1] * stride[1] - padding[1]
        low_0 = place // out[2] // out[1] * stride[0] - padding[0]
        for a in range(kernel[0]):
            at_0 = low_0 + a * dilation[0]
            for b in range(kernel[1]):
                at_1 = low_1 + b * dilation[1]
                for c in range(kernel[2]):
                    at_2 = low_2 + c * dilation[2]
                    tap += 1
                    if 0 <= at_0 < extent[0] and 0 <= at_1 < extent[1] and 0 <= at_2 < extent[2]:
                        seen[n, tap] = image * area + (at_0 * extent[1] + at_1) * extent[2] + at_2
                        is_seen[seen[n, tap]] = True
    for f in range(filters):
        first[f + 1] += first[f]
    for n in range(len(neurons)):
        f = neurons[n] // places % filters
        order[first[f]] = n
        first[f] += 1
    # what is seen of the input, channels last, where a neuron sees several
    where = np.nonzero(is_seen)[0]
    rows = np.empty((len(where) if channels > 1 else 0, all_channels), weights.dtype)
    row_of, row = np.empty(len(is_seen), np.int64), 0
    while row < len(rows):
        image, first_row = where[row] // area, row
        while row < len(rows) and where[row] < (image + 1) * area:
            row_of[where[row]] = row
            row += 1
        source = x[image]
        for begin in range(0, all_channels, _TILE):
            end = np.uint64(min(begin + _TILE, all_channels))
            for r in range(np.uint64(first_row), np.uint64(row)):
                position = np.uint64(where[r] - image * area)
                for i in range(np.uint64(begin), end):
                    rows[r, i] = source[i, position]
    flat = rows.reshape(-1)
    own, value = np.empty(taps * channels, weights.dtype), np.empty(taps * channels + _LANES, weights.dtype)
    inside, top, best_of = np.empty(taps, np.int64), np.empty(_LANES, weights.dtype), np.empty(8, weights.dtype)
    last = -1
    for o in range(len(order)):
        n = order[o]
        chosen = neurons[n] // places % filters
        base = chosen // group * channels
        if chosen != last:  # its weights, channels last
            last = chosen
            for tap in range(taps):
                for i in range(channels):
                    own[tap * channels + i] = weights[chosen, i, tap]
        count = 0
        for tap in range(taps):
            if seen[n, tap] < 0:
                continue
            inside[count] = seen[n, tap]
            if channels == 1:
                value[count] = x[seen[n, tap] // area, base, seen[n, tap] % area] * own[tap] * direction[n]
                count += 1
                continue
            at = np.uint64(row_of[seen[n, tap]] * all_channels + base)
            w, v = np.uint64(tap * channels), np.uint64(count * channels)
            for i in range(np.uint64(channels)):
                value[v + i] = flat[at + i] * own[w + i] * direction[n]
            count += 1
        kept, which = share[n], element[n]
        numbers = count * channels
        value[numbers : numbers + _LANES] = zero
        # the largest of each lane, and of those the largest, as often as wanted: a maximum is a vector operation
        for j in range(np.uint64(_LANES)):
            top[j] = value[j]
        for begin in range(np.uint64(_LANES), np.uint64(numbers), np.uint64(_LANES)):
            for j in range(np.uint64(_LANES)):
                top[j] = max(top[j], value[begin + j])
        for j in range(np.uint64(8)):
            best_of[j] = top[j]
        for begin in range(np.uint64(8), np.uint64(_LANES), np.uint64(8)):
            for j in range(np.uint64(8)):
                best_of[j] = max(best_of[j], top[begin + j])
        held = 0
        while held < keep:
            best = max(
                max(max(best_of[0], best_of[1]), max(best_of[2], best_of[3])),
                max(max(best_of[4], best_of[5]), max(best_of[6], best_of[7])),
            )
            if not best > zero:
                break
            column = 0
            for j in range(8):
                column = j if best_of[j] == best else column
            lane = 0
            for j in range(column, _LANES, 8):
                lane = j if top[j] == best else lane
            found, second = lane, zero
            while value[found] != best and found + _LANES < numbers:  # which it is at last, but for NaN
                found += _LANES
            value[found] = zero
            for q in range(lane, numbers, _LANES):
                second = max(second, value[q])
            top[lane], second = second, zero
            for j in range(column, _LANES, 8):
                second = max(second, top[j])
            best_of[column] = second
            kept[held], which[held] = best, found
            held += 1
        total = zero
        for k in range(held):
            total += kept[k]
        for k in range(held):
            kept[k] /= total
            position, channel = inside[which[k] // channels], base + which[k] % channels
            towards[n, k] = -1 if x[position // area, channel, position % area] < 0 else 1
            which[k] = (position // area * all_channels + channel) * area + position % area
        kept[held:], which[held:] = 0, 0
