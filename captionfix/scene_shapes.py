"""The outlines of the things in `captionfix.scenes`: signed distances, below 0 inside; lengths in units of the radius.

Only operations that IEEE 754 rounds exactly, as there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]  # float32 throughout
TIPS = ((0.0, -1.0), (0.9510565, -0.309017), (0.5877853, 0.809017), (-0.5877853, 0.809017), (-0.9510565, -0.309017))


def _circle(u: Array, v: Array) -> Array:
    return np.sqrt(u * u + v * v) - 0.92


def _square(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u), np.abs(v)) - 0.80


def _triangle(u: Array, v: Array) -> Array:
    return np.maximum(v, 0.8660254 * np.abs(u) - 0.5 * v) - 0.57


def _diamond(u: Array, v: Array) -> Array:
    return (np.abs(u) * 1.3889 + np.abs(v) * 0.9091 - 1.0) * 0.6025


def _cross(u: Array, v: Array) -> Array:
    a, b = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(a - 0.95, b - 0.34), np.maximum(a - 0.34, b - 0.95))


def _star(u: Array, v: Array) -> Array:
    # A pentagram is where at most one of five half-planes is left: the second largest distance decides.
    most = np.full_like(u, -9.0)
    second = most
    for nu, nv in TIPS:
        side = nu * u + nv * v
        second = np.maximum(second, np.minimum(most, side))
        most = np.maximum(most, side)
    return second - 1.18 * 0.3090170


def _heart(u: Array, v: Array) -> Array:
    v = v - 0.09
    p, q = (u - v) * 0.7071068, (-u - v) * 0.7071068
    body = np.maximum(np.abs(p), np.abs(q)) - 0.6
    lobes = np.minimum((p - 0.6) * (p - 0.6) + q * q, p * p + (q - 0.6) * (q - 0.6))
    return np.minimum(body, np.sqrt(lobes) - 0.6)


def _arrow(u: Array, v: Array) -> Array:
    a = np.abs(u)
    head = np.maximum(0.7415 * a - 0.6709 * v - 0.738, v + 0.05)
    shaft = np.maximum(a - 0.34, np.maximum(v - 1.0, -v - 0.1))
    return np.minimum(head, shaft)


# Signed distance to the outline, in radii, negative inside; u points right and v down from the centre. All shapes lie
# within a distance of 1.25.
SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "star": _star,
    "heart": _heart,
    "arrow": _arrow,
}
