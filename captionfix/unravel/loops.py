"""The loops that numba compiles for `captionfix.unravel.kernels`, on NumPy arrays. Numba must be there."""

from __future__ import annotations

from functools import partial
from types import FunctionType
from typing import Any

import numpy as np
from numba import njit, prange

_LANES = 64  # products whose largest is looked for together
_TILE = 16  # channels gathered together
_PRIME = 11400714819323198485  # 2 ** 64 / golden ratio


def _loop(function: Any, **more: Any) -> Any:
    # numbers are finite (checked before), so comparisons may become vector operations
    options = {"error_model": "numpy", "fastmath": {"nnan", "nsz"}, **more}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to write: compiled anew in every process
        return njit(**options)(function)


_inlined = partial(_loop, inline="always")  # compiled where it stands, which takes less than linking


class _InParts:
    """A loop whose last argument says in how many parts what stands under ``prange`` is done, at once."""

    def __init__(self, function: Any):
        others = ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "fusion", "stencil")
        alone = FunctionType(function.__code__, function.__globals__)  # numba keeps one result for each name
        alone.__qualname__ += "_alone"
        self.alone = _loop(alone)
        self.together = _loop(function, parallel={"prange": True, **dict.fromkeys(others, False)})

    def __call__(self, *arguments: Any) -> Any:  # one processor needs no pool of threads
        return (self.alone if arguments[-1] == 1 else self.together)(*arguments)


@_inlined
def _bits(keys):
    """Of the number of slots of a hash table at most half of which is taken."""
    bits = 2
    while (1 << bits) < 2 * keys:
        bits += 1
    return bits


@_inlined
def _slot(key, bits):
    """Where a key's search begins (Fibonacci hashing)."""
    return np.int64((np.uint64(key) * np.uint64(_PRIME)) >> np.uint64(64 - bits))


# merging ------------------------------------------------------------------------------------------------------------


@_InParts
def merge(word, element, direction, mass, words, budget, parts):
    """Rows of the same word, element and direction added up, sorted by word; of each word the ``budget`` (-1: all)
    heaviest, scaled so that the word keeps its mass.
    """
    first, order = _by_word(word, words)
    keys, masses, counts = np.empty(len(word), np.int64), np.empty(len(word), mass.dtype), np.zeros(words, np.int64)
    for part in prange(parts):
        begin, end = words * part // parts, words * (part + 1) // parts
        _merge_words(begin, end, first, order, element, direction, mass, budget, keys, masses, counts)
    total = 0
    for w in range(words):
        total += counts[w]
    to_word, to_element = np.empty(total, np.int64), np.empty(total, np.int64)
    to_direction, to_mass = np.empty(total, direction.dtype), np.empty(total, mass.dtype)
    end = 0
    for w in range(words):
        for j in range(first[w], first[w] + counts[w]):
            to_word[end], to_element[end], to_mass[end] = w, keys[j] >> 1, masses[j]
            to_direction[end] = 1 if keys[j] & 1 else -1
            end += 1
    return to_word, to_element, to_direction, to_mass


@_inlined
def _by_word(word, words):
    """Where each word's rows begin, and the rows in their order (empty where they lie in it)."""
    first, is_sorted = np.zeros(words + 1, np.int64), True
    for i in range(len(word)):
        first[word[i] + 1] += 1
        is_sorted &= i == 0 or word[i - 1] <= word[i]
    for w in range(words):
        first[w + 1] += first[w]
    order = np.empty(0 if is_sorted else len(word), np.int64)
    if not is_sorted:
        end = first[:-1].copy()
        for i in range(len(word)):
            order[end[word[i]]] = i
            end[word[i]] += 1
    return first, order


@_loop
def _merge_words(begin_word, end_word, first, order, element, direction, mass, budget, keys, masses, counts):
    """Some words' rows: each word's ``counts`` keys (element and direction) and masses, from its first row on."""
    most = 0
    for w in range(begin_word, end_word):
        most = max(most, first[w + 1] - first[w])
    bits = _bits(most)
    known, place = np.full(1 << bits, -1), np.empty(1 << bits, np.int64)
    level, buffer = np.empty(1 << 11, np.int32), np.empty(most, mass.dtype)
    for w in range(begin_word, end_word):
        begin = end = first[w]
        total = 0.0
        for j in range(first[w], first[w + 1]):
            i = order[j] if len(order) else j
            if not mass[i] > 0:
                continue
            total += mass[i]
            key = element[i] * 2 + (1 if direction[i] > 0 else 0)
            slot = _slot(key, bits)
            while known[slot] == w and keys[place[slot]] != key:
                slot = (slot + 1) & ((1 << bits) - 1)
            if known[slot] == w:
                masses[place[slot]] += mass[i]
            else:
                known[slot], place[slot] = w, end
                keys[end], masses[end] = key, mass[i]
                end += 1
        if 0 <= budget < end - begin:
            end = begin + _keep_heaviest(keys[begin:end], masses[begin:end], budget, total, level, buffer)
        counts[w] = end - begin


@_inlined
def _keep_heaviest(keys, masses, budget, total, level, buffer):
    """Moves the ``budget`` heaviest to the front, scaled to the ``total`` mass; how many there are."""
    # in which class of size the lightest is that stays: its exponent and three more bits
    level[:] = 0
    size = masses.astype(np.float32).view(np.int32)
    heavier, least_size = 0, 0
    for j in range(len(masses)):
        size[j] >>= 20
        level[size[j]] += 1
        least_size = max(least_size, size[j])
    while heavier + level[least_size] < budget:
        heavier += level[least_size]
        least_size -= 1
    held = 0
    for j in range(len(masses)):
        buffer[held] = masses[j]
        held += 1 if size[j] == least_size else 0
    # which of that class, by quickselect
    low, high, target = 0, held - 1, held - (budget - heavier)
    while low < high:
        pivot, left, right = buffer[(low + high) // 2], low, high
        while left <= right:
            while buffer[left] < pivot:
                left += 1
            while buffer[right] > pivot:
                right -= 1
            if left <= right:
                buffer[left], buffer[right] = buffer[right], buffer[left]
                left, right = left + 1, right - 1
        if target <= right:
            high = right
        elif target >= left:
            low = left
        else:
            break
    least, ties = buffer[target], budget
    for j in range(len(masses)):
        ties -= 1 if masses[j] > least else 0
    kept, last = 0.0, 0
    for j in range(len(masses)):  # without branches, which would be taken at random
        moved, equal = masses[j], 1 if masses[j] == least else 0
        stays = (1 if moved > least else 0) | (equal & (1 if ties > 0 else 0))
        ties -= equal
        keys[last], masses[last] = keys[j], moved
        kept += moved * stays
        last += stays
    for j in range(last):
        masses[j] *= total / kept
    return last


# looking up ---------------------------------------------------------------------------------------------------------


@_loop
def distinct(element, direction):
    """The distinct pairs of element and direction, and which of them each row is."""
    bits = _bits(len(element))
    place = np.full(1 << bits, -1, np.int64)
    keys, which = np.empty(len(element), np.int64), np.empty(len(element), np.int64)
    count = 0
    for i in range(len(element)):
        key = element[i] * 2 + (1 if direction[i] > 0 else 0)
        slot = _slot(key, bits)
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


@_loop
def follow(word, which, mass, index, share, direction, gave):
    """Rows moved along a link; what each gave away is added to ``gave``."""
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


# contributions ------------------------------------------------------------------------------------------------------


@_InParts
def contributors(x, shape, stride, weights, neurons, direction, geometry, groups, keep, parts):
    """The contributions of a window that agree most with each neuron; see `captionfix.unravel.kernels.contributors`.

    ``x`` is the input's memory, ``shape`` and ``stride`` say what lies where in it.
    """
    filters, channels, taps = weights.shape
    out, extent = geometry[0], geometry[1]
    places, area, count = out[0] * out[1] * out[2], extent[0] * extent[1] * extent[2], len(neurons)
    # filter by filter, whose weights are turned once, and no two processors write side by side
    order = _by_filter(neurons, places, filters)
    seen, row_of, where = _positions(neurons, order, geometry, filters, taps, shape[0])
    rows = np.empty((len(where) if channels > 1 else 0, shape[1]), x.dtype)
    for part in prange(parts):
        _gather(len(rows) * part // parts, len(rows) * (part + 1) // parts, x, shape, stride, where, rows)
    found, shares = np.zeros((count, keep), np.int64), np.zeros((count, keep), weights.dtype)
    turned = np.ones((count, keep), weights.dtype)
    for part in prange(parts):
        begin, end = count * part // parts, count * (part + 1) // parts
        given = (x, stride, weights, neurons, direction, order, seen, rows, row_of, places, area, groups)
        _choose(begin, end, given, found, shares, turned)
    element, share, towards = np.empty_like(found), np.empty_like(shares), np.empty_like(turned)
    for o in range(count):
        n = order[o]
        for k in range(keep):
            element[n, k], share[n, k], towards[n, k] = found[o, k], shares[o, k], turned[o, k]
    return element, share, towards


@_inlined
def _by_filter(neurons, places, filters):
    first, order = np.zeros(filters + 1, np.int64), np.empty(len(neurons), np.int64)
    for neuron in neurons:
        first[neuron // places % filters + 1] += 1
    for f in range(filters):
        first[f + 1] += first[f]
    for n in range(len(neurons)):
        f = neurons[n] // places % filters
        order[first[f]] = n
        first[f] += 1
    return order


@_inlined
def _positions(neurons, order, geometry, filters, taps, images):
    """The input positions, of all images', that neurons see in their order: (D, taps), -1 in the padding; which of
    those that are seen a position is; and those that are seen.
    """
    out, extent, kernel, stride, padding, dilation = geometry
    places, area = out[0] * out[1] * out[2], extent[0] * extent[1] * extent[2]
    seen, row_of = np.empty((len(neurons), taps), np.int64), np.zeros(images * area, np.int64)
    for o in range(len(order)):
        place, image, tap = neurons[order[o]] % places, neurons[order[o]] // places // filters, 0
        low_2 = place % out[2] * stride[2] - padding[2]
        low_1 = place // out[2] % out[1] * stride[1] - padding[1]
        low_0 = place // out[2] // out[1] * stride[0] - padding[0]
        for a in range(kernel[0]):
            at_0 = low_0 + a * dilation[0]
            for b in range(kernel[1]):
                at_1 = low_1 + b * dilation[1]
                for c in range(kernel[2]):
                    at_2 = low_2 + c * dilation[2]
                    seen[o, tap] = -1
                    if 0 <= at_0 < extent[0] and 0 <= at_1 < extent[1] and 0 <= at_2 < extent[2]:
                        seen[o, tap] = image * area + (at_0 * extent[1] + at_1) * extent[2] + at_2
                        row_of[seen[o, tap]] = 1
                    tap += 1
    count = 0
    for position in range(len(row_of)):
        count += row_of[position]
    where, count = np.empty(count, np.int64), 0
    for position in range(len(row_of)):
        if row_of[position]:
            where[count], row_of[position] = position, count
            count += 1
    return seen, row_of, where


@_loop
def _gather(begin_row, end_row, x, shape, stride, where, rows):
    """Some positions' channels, a row each."""
    channels, area = shape[1], shape[2]
    row = begin_row
    while row < end_row:
        image, first = where[row] // area, row
        while row < end_row and where[row] < (image + 1) * area:
            row += 1
        for begin in range(0, channels, _TILE):
            end = np.uint64(min(begin + _TILE, channels))
            for r in range(np.uint64(first), np.uint64(row)):
                at = image * stride[0] + (where[r] - image * area) * stride[2]
                for i in range(np.uint64(begin), end):
                    rows[r, i] = x[np.uint64(at) + i * np.uint64(stride[1])]


@_loop
def _choose(begin_neuron, end_neuron, given, element, share, towards):
    """Contributions to some of the neurons, in their order."""
    x, stride, weights, neurons, directions, order, seen, rows, row_of, places, area, groups = given
    filters, channels, taps = weights.shape
    all_channels, per_filter, per_channel = rows.shape[1], filters // groups, 1 / channels
    flat = rows.reshape(-1)
    own, value = np.empty(taps * channels, weights.dtype), np.empty(taps * channels + 4 * _LANES, weights.dtype)
    inside, taps_inside = np.empty(taps, np.int64), np.empty(taps, np.int64)
    top, best_of = np.empty(_LANES, weights.dtype), np.empty(8, weights.dtype)
    last = -1
    for n in range(begin_neuron, end_neuron):
        filter_of, direction = neurons[order[n]] // places, directions[order[n]]
        image, chosen = filter_of // filters, filter_of % filters
        base = chosen // per_filter * channels
        if chosen != last:  # its weights, channels last
            last = chosen
            for tap in range(taps):
                for i in range(channels):
                    own[tap * channels + i] = weights[chosen, i, tap]
        count = 0
        for tap in range(taps):
            if seen[n, tap] < 0:
                continue
            inside[count], taps_inside[count] = seen[n, tap], tap
            if channels == 1:  # too little to be gathered first
                at = image * stride[0] + base * stride[1] + (seen[n, tap] - image * area) * stride[2]
                value[count] = x[at] * own[tap] * direction
                count += 1
                continue
            at = np.uint64(row_of[seen[n, tap]] * all_channels + base)
            w, v = np.uint64(tap * channels), np.uint64(count * channels)
            for i in range(np.uint64(channels)):
                value[v + i] = flat[at + i] * own[w + i] * direction
            count += 1
        held = _largest(value, count * channels, top, best_of, n, element, share)
        total = weights.dtype.type(0)
        for k in range(held):
            total += share[n, k]
        for k in range(held):
            share[n, k] /= total
            at = np.int64((element[n, k] + 0.5) * per_channel)  # a division that costs a multiplication
            channel = element[n, k] - at * channels
            # a contribution that agrees has its input's sign from its weight
            towards[n, k] = -1 if own[taps_inside[at] * channels + channel] * direction < 0 else 1
            element[n, k] = inside[at] + (image * (all_channels - 1) + base + channel) * area


@_inlined
def _largest(value, numbers, top, best_of, n, element, share):
    """Moves the largest positive ones of the first ``numbers`` values to row ``n`` of ``element`` and ``share`` (zero
    stays in their place); how many there are.

    The largest of each of 64 lanes first, and of those the largest as often as wanted: a maximum is a vector operation.
    """
    zero = value.dtype.type(0)
    value[numbers : numbers + 4 * _LANES] = zero
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
    while held < element.shape[1]:
        best = max(
            max(max(best_of[0], best_of[1]), max(best_of[2], best_of[3])),
            max(max(best_of[4], best_of[5]), max(best_of[6], best_of[7])),
        )
        if not best > zero:
            break
        column = 0
        for j in range(8):
            column = j if best_of[j] == best else column
        lane = column
        for j in range(column, _LANES, 8):
            lane = j if top[j] == best else lane
        found, second = np.uint64(lane), zero
        if numbers > _LANES:  # where in its lane it is, and the lane's next, four side by side
            equal, a, b, c, d = 0, zero, zero, zero, zero
            for q in range(np.uint64(lane), np.uint64(numbers), np.uint64(4 * _LANES)):
                r, s, t = q + np.uint64(_LANES), q + np.uint64(2 * _LANES), q + np.uint64(3 * _LANES)
                v0, v1, v2, v3 = value[q], value[r], value[s], value[t]
                i0, i1, i2, i3 = v0 == best, v1 == best, v2 == best, v3 == best
                found = q if i0 else r if i1 else s if i2 else t if i3 else found
                equal += i0 + i1 + i2 + i3
                a, b = max(a, zero if i0 else v0), max(b, zero if i1 else v1)
                c, d = max(c, zero if i2 else v2), max(d, zero if i3 else v3)
            value[found] = zero
            second = best if equal > 1 else max(max(a, b), max(c, d))
        top[lane] = second
        second = zero
        for j in range(column, _LANES, 8):
            second = max(second, top[j])
        best_of[column] = second
        share[n, held], element[n, held] = best, found
        held += 1
    return held
