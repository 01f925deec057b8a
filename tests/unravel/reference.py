# ruff: noqa: B023 - each lambda is called at once, in its own turn of the loop
"""The published rules once more, as plain loops over single neurons: what the engine is compared with.

A network is a list of `Node`s in the order they run. `run` computes it with PyTorch's own operations (so the
engine can record it); `unravel` goes back through it neuron by neuron, from the description of CNN Fixations
(Mopuri et al. 2018, Algorithm 1) alone: numbers in dictionaries, no code shared with the engine.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Rules:
    """``paper``: Algorithm 1. Otherwise the ``keep`` largest agreeing contributors, in proportion (None: all)."""

    paper: bool = False
    centre: bool = False
    released: bool = False  # the authors' code: stride * position, and one contributor at the flattened map
    sums: int | None = None
    convolutions: int | None = None
    opposed: bool = False  # a neuron without agreement goes to the least opposed input


@dataclass(frozen=True)
class Node:
    kind: str
    inputs: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def run(nodes: list[Node], inputs: dict[str, Tensor]) -> list[Any]:
    """Every node's value."""
    values: list[Any] = []
    for node in nodes:
        args, o = [values[i] for i in node.inputs], node.options
        values.append(
            {
                "input": lambda: inputs[o["name"]],
                "conv": lambda: F.conv2d(
                    args[0], o["weight"], o["bias"], o["stride"], o["padding"], o["dilation"], o["groups"]
                ),
                "linear": lambda: F.linear(args[0], o["weight"], o["bias"]),
                "norm": lambda: F.batch_norm(args[0], o["mean"], o["var"], o["weight"], o["bias"]),
                "relu": lambda: F.relu(args[0]),
                "max": lambda: F.max_pool2d(args[0], o["kernel"], o["stride"], o["padding"]),
                "mean": lambda: args[0].mean((2, 3)),
                "flatten": lambda: args[0].flatten(1),
                "add": lambda: args[0] + args[1],
                "cat": lambda: torch.cat(args, 1),
                "lstm": lambda: torch.lstm_cell(args[0], (args[1], args[2]), *o["weights"]),
                "pick": lambda: args[0][o["number"]],
                "embed": lambda: F.embedding(args[0][:, o["position"]], o["weight"]),
            }[node.kind]()
        )
    return values


Place = tuple[int, ...]
Term = tuple[int, Place, float, float]  # node, element, contribution, sign of its weight


def unravel(
    nodes: list[Node], values: list[Any], target: Place, rules: Rules, direction: int = 1
) -> tuple[dict[tuple[int, Place, int], float], float]:
    """Evidence of one element of the last node on all inputs, (node, element, direction) -> mass; mass on the bias."""
    held: dict[int, dict[tuple[Place, int], float]] = defaultdict(lambda: defaultdict(float))
    held[len(nodes) - 1][target, direction] = 1.0
    ended: dict[tuple[int, Place, int], float] = {}
    bias = 0.0
    for number in range(len(nodes) - 1, -1, -1):
        node = nodes[number]
        for (place, d), mass in list(held[number].items()):
            if node.kind == "input":
                ended[number, place, d] = mass
                continue
            shares = _step(nodes, values, number, place, d, rules)
            for source, element, towards, share in shares:
                held[source][element, towards] += mass * share
            bias += mass * (1 - sum(s for *_, s in shares))
    return ended, bias


def _step(
    nodes: list[Node], values: list[Any], number: int, at: Place, d: int, rules: Rules
) -> list[tuple[int, Place, int, float]]:
    """Where one neuron's mass goes: (node, element, direction, share)."""
    node, o = nodes[number], nodes[number].options
    first = node.inputs[0]
    x = values[first]
    if node.kind in ("relu", "flatten", "cat", "pick", "embed", "norm", "max"):
        return [_passed(node, values, at, d)]
    if node.kind == "conv":
        return _convolution(first, x, o, at, d, rules)
    if node.kind == "linear":
        row, unit = at
        terms = [
            (first, (row, k), float(x[row, k] * o["weight"][unit, k]), float(o["weight"][unit, k]))
            for k in range(x.shape[1])
        ]
        keep = None if rules.paper else rules.sums
        return _split(terms, d, 1 if rules.released and nodes[first].kind == "flatten" else keep, rules)
    if node.kind == "mean":
        row, channel = at
        terms = [
            (first, (row, channel, i, j), float(x[row, channel, i, j]), 1.0)
            for i in range(x.shape[2])
            for j in range(x.shape[3])
        ]
        return _split(terms, d, 1 if rules.paper else rules.sums, rules)
    if node.kind == "add":
        return _split(
            [(i, at, float(values[i][at]), 1.0) for i in node.inputs], d, 1 if rules.paper else rules.sums, rules
        )
    assert node.kind == "lstm"
    return _lstm(node, values, at, d, rules)


def _passed(node: Node, values: list[Any], at: Place, d: int) -> tuple[int, Place, int, float]:
    """Operations that hand a neuron's mass to one other neuron."""
    o, first = node.options, node.inputs[0]
    x = values[first]
    if node.kind == "norm":
        return first, at, d if o["weight"][at[1]] >= 0 else -d, 1.0
    if node.kind == "flatten":
        area = x.shape[2] * x.shape[3]
        return first, (at[0], at[1] // area, at[1] % area // x.shape[3], at[1] % x.shape[3]), d, 1.0
    if node.kind == "cat":
        channel = at[1]
        for source in node.inputs:
            if channel < values[source].shape[1]:
                return source, (at[0], channel, *at[2:]), d, 1.0
            channel -= values[source].shape[1]
    if node.kind == "pick":
        return first, (o["number"], *at), d, 1.0
    if node.kind == "embed":
        return first, (at[0], o["position"]), d, 1.0
    if node.kind == "max":
        row, channel, i, j = at
        seen = [
            (a, b)
            for a in range(i * o["stride"] - o["padding"], i * o["stride"] - o["padding"] + o["kernel"])
            for b in range(j * o["stride"] - o["padding"], j * o["stride"] - o["padding"] + o["kernel"])
            if 0 <= a < x.shape[2] and 0 <= b < x.shape[3]
        ]
        return first, (row, channel, *max(seen, key=lambda p: float(x[row, channel, p[0], p[1]]))), d, 1.0
    return first, at, d, 1.0


def _split(terms: list[Term], d: int, keep: int | None, rules: Rules) -> list[tuple[int, Place, int, float]]:
    """Only contributions that agree with the direction, the largest first."""
    ordered = sorted(terms, key=lambda t: -t[2] * d)
    agreeing = [t for t in ordered if t[2] * d > 0][:keep]
    if not agreeing and rules.opposed:
        node, place, _, weight = ordered[0]
        return [(node, place, d if weight >= 0 else -d, 1.0)]
    total = sum(t[2] * d for t in agreeing)
    return [
        (node, place, d if weight >= 0 else -d, 1 / len(agreeing) if rules.paper else value * d / total)
        for node, place, value, weight in agreeing
    ]


def _convolution(
    source: int, x: Tensor, o: dict[str, Any], at: Place, d: int, rules: Rules
) -> list[tuple[int, Place, int, float]]:
    row, unit, i, j = at
    weight, per_group = o["weight"], o["weight"].shape[1]
    first = unit // (weight.shape[0] // o["groups"]) * per_group
    window: dict[int, dict[tuple[int, int], Term]] = defaultdict(dict)
    for channel, a, b in itertools.product(range(per_group), range(weight.shape[2]), range(weight.shape[3])):
        y = i * o["stride"][0] - o["padding"][0] + a * o["dilation"][0]
        z = j * o["stride"][1] - o["padding"][1] + b * o["dilation"][1]
        if 0 <= y < x.shape[2] and 0 <= z < x.shape[3]:
            w = float(weight[unit, channel, a, b])
            window[channel][a, b] = (source, (row, first + channel, y, z), float(x[row, first + channel, y, z]) * w, w)
    if not rules.paper:
        return _split([t for taps in window.values() for t in taps.values()], d, rules.convolutions, rules)
    if not window:
        return []
    # Algorithm 1: the feature with the largest summed contribution, then the location inside it
    best = max(window, key=lambda c: sum(t[2] for t in window[c].values()) * d)
    total = sum(t[2] for t in window[best].values()) * d
    if rules.released:
        place = (row, first + best, i * o["stride"][0], j * o["stride"][1])
        if total <= 0 or place[2] >= x.shape[2] or place[3] >= x.shape[3]:
            return []
        return [(source, place, 1 if float(x[place]) >= 0 else -1, 1.0)]
    if rules.centre:
        middle = window[best].get((weight.shape[2] // 2, weight.shape[3] // 2))
        if middle is None or not (total > 0 or rules.opposed):
            return []
        return (
            [(middle[0], middle[1], 1 if float(x[middle[1]]) >= 0 else -1, 1.0)]
            if not rules.opposed
            else [(middle[0], middle[1], d if middle[3] >= 0 else -d, 1.0)]
        )
    return _split(list(window[best].values()), d, 1, rules)


def _lstm(node: Node, values: list[Any], at: Place, d: int, rules: Rules) -> list[tuple[int, Place, int, float]]:
    """``h = o * tanh(c)`` goes to c; ``c = f * c' + i * g`` is two terms; ``g = tanh(W x + U h + b)`` a sum."""
    (from_x, from_h, from_c), (_, row, unit) = node.inputs, at
    x, h, c = (values[i][row] for i in node.inputs)
    weight_x, weight_h, bias_x, bias_h = node.options["weights"]
    size = len(h)

    def gate(k: int) -> float:
        n = k * size + unit
        return float((weight_x[n] * x).sum() + (weight_h[n] * h).sum() + bias_x[n] + bias_h[n])

    i, f, g = (1 / (1 + torch.tensor(-gate(k)).double().exp().item()) for k in (0, 1, 2))
    g = torch.tensor(gate(2)).double().tanh().item()
    terms = [(from_c, (row, unit), f * float(c[unit]), 1.0), (-1, (), i * g, 1.0)]
    result = []
    for source, place, towards, share in _split(terms, d, 1 if rules.paper else rules.sums, rules):
        if source >= 0:
            result.append((source, place, towards, share))
            continue
        n = 2 * size + unit
        inside = [(from_x, (row, k), float(x[k] * weight_x[n, k]), float(weight_x[n, k])) for k in range(len(x))]
        inside += [(from_h, (row, k), float(h[k] * weight_h[n, k]), float(weight_h[n, k])) for k in range(size)]
        result += [
            (s, p, t, share * q) for s, p, t, q in _split(inside, towards, None if rules.paper else rules.sums, rules)
        ]
    return result
