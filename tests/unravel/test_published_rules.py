"""Invariant 7: the engine against plain loops over single neurons, in float64, exactly."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest
import torch
from reference import Node, Rules, run, unravel

from captionfix.unravel import POLICIES, Policy, Trace, start, walk

PAPER = {"sums": 1, "convolutions": 1, "neurons": None, "winner": True, "linear": None, "mass": "set"}
COMPARED = {
    "paper": (POLICIES["paper"], Rules(paper=True)),
    "paper, centre": (Policy(**PAPER, location="centre"), Rules(paper=True, centre=True)),
    "released": (POLICIES["released"], Rules(paper=True, released=True)),
    "paper, opposed": (Policy(**PAPER, opposed="input"), Rules(paper=True, opposed=True)),
    "default": (Policy(neurons=None), Rules(sums=16, convolutions=4)),
    "keep 3 and 2": (Policy(sums=3, convolutions=2, neurons=None), Rules(sums=3, convolutions=2)),
    "opposed": (
        Policy(sums=3, convolutions=2, neurons=None, opposed="input"),
        Rules(sums=3, convolutions=2, opposed=True),
    ),
    "marginal": (POLICIES["marginal"], Rules()),
    "all, sparse": (Policy(sums=None, convolutions=10**6, linear=10**6, neurons=None), Rules()),
}


class Net:
    """Writes down a network node by node; weights are random, float64."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.nodes: list[Node] = [Node("input", (), {"name": "image"})]
        self.width = [3]

    def add(self, kind: str, inputs: tuple[int, ...] | int | None = None, width: int = 0, **options) -> int:
        inputs = (len(self.nodes) - 1,) if inputs is None else (inputs,) if isinstance(inputs, int) else inputs
        self.nodes.append(Node(kind, inputs, options))
        self.width.append(width or self.width[inputs[0]] if inputs else width)
        return len(self.nodes) - 1

    def conv(
        self, width: int, kernel: int, stride=1, padding=0, dilation=1, groups=1, at: int | None = None, bias=True
    ) -> int:
        at = len(self.nodes) - 1 if at is None else at
        weight = torch.randn(width, self.width[at] // groups, kernel, kernel, dtype=torch.float64) / kernel
        return self.add(
            "conv",
            at,
            width,
            weight=weight,
            bias=torch.randn(width, dtype=torch.float64) * 0.1 if bias else None,
            stride=(stride, stride),
            padding=(padding, padding),
            dilation=(dilation, dilation),
            groups=groups,
        )

    def norm(self) -> int:
        w = self.width[-1]
        random_ = [torch.randn(w, dtype=torch.float64) for _ in range(3)]
        return self.add(
            "norm",
            weight=random_[0],
            bias=random_[1] * 0.2,
            mean=random_[2] * 0.2,
            var=torch.rand(w, dtype=torch.float64) + 0.5,
        )

    def linear(self, rows: int, columns: int, at: int | None = None) -> int:
        return self.add(
            "linear",
            at,
            rows,
            weight=torch.randn(rows, columns, dtype=torch.float64) / 3,
            bias=torch.randn(rows, dtype=torch.float64) * 0.1,
        )

    def max(self, kernel: int, stride: int, padding: int = 0, at: int | None = None) -> int:
        return self.add("max", at, kernel=kernel, stride=stride, padding=padding)


def alexnet(seed: int) -> Net:
    net = Net(seed)
    net.conv(6, 5, stride=2, padding=2)
    net.add("relu")
    net.max(3, 2)
    net.conv(6, 3, padding=1, groups=2)  # AlexNet's two halves
    net.add("relu")
    net.conv(4, 3, padding=2, dilation=2)
    net.add("relu")
    net.max(2, 1)
    net.add("flatten")
    net.linear(10, 4 * 2 * 2)
    net.add("relu")
    net.linear(5, 10)
    return net


def vgg(seed: int) -> Net:
    net = Net(seed)
    for width in (4, 5):
        for _ in range(2):
            net.conv(width, 3, padding=1)
            net.norm()
            net.add("relu")
        net.max(2, 2)
    net.add("flatten")
    net.linear(8, 5 * 4 * 4)
    net.add("relu")
    net.linear(5, 8)
    return net


def googlenet(seed: int) -> Net:
    net = Net(seed)
    net.conv(4, 3, stride=2, padding=1)
    stem = net.max(3, 1, 1)
    for _ in range(2):
        heads = [net.conv(2, 1, at=stem)]
        net.conv(3, 1, at=stem)
        net.add("relu")
        heads.append(net.conv(3, 3, padding=1))
        net.max(3, 1, 1, at=stem)
        heads.append(net.conv(2, 1))
        net.add("cat", tuple(heads), 7)
        stem = net.add("relu")
    net.add("mean")
    net.linear(5, 7)
    return net


def resnet(seed: int) -> Net:
    net = Net(seed)
    net.conv(4, 3, stride=2, padding=1, bias=False)
    net.norm()
    trunk = net.add("relu")
    for stride, width in ((1, 4), (2, 5)):
        net.conv(width, 3, stride=stride, padding=1, at=trunk, bias=False)
        net.norm()
        net.add("relu")
        net.conv(width, 3, padding=1, bias=False)
        body, side = net.norm(), trunk
        if stride > 1:
            net.conv(width, 1, stride=stride, at=trunk, bias=False)
            side = net.norm()
        net.add("add", (body, side), width)
        trunk = net.add("relu")
    net.add("mean")
    net.linear(5, 5)
    return net


def captioner(seed: int) -> Net:
    """A small VGG, its mean as first input of an LSTM over three words, scores at the last."""
    net, hidden, vector = Net(seed), 5, 4
    net.conv(4, 3, stride=2, padding=1)
    net.add("relu")
    net.add("mean")
    step = net.linear(vector, 4)
    tokens = net.add("input", (), name="tokens")
    h, c = net.add("input", (), hidden, name="h"), net.add("input", (), hidden, name="c")
    table = torch.randn(6, vector, dtype=torch.float64)
    weights = [torch.randn(4 * hidden, n, dtype=torch.float64) for n in (vector, hidden)]
    weights += [torch.randn(4 * hidden, dtype=torch.float64) * 0.1 for _ in range(2)]
    for position in range(4):
        both = net.add("lstm", (step, h, c), hidden, weights=weights)
        h, c = net.add("pick", both, hidden, number=0), net.add("pick", both, hidden, number=1)
        if position < 3:
            step = net.add("embed", tokens, vector, weight=table, position=position)
    net.linear(5, hidden, at=h)
    return net


NETS = {f.__name__: f for f in (alexnet, vgg, googlenet, resnet, captioner)}


# the paper's sets on three networks of each shape; one where all is kept, which is slow in loops
CASES = [
    (name, shape, seed)
    for name, (_, rules) in COMPARED.items()
    for shape in NETS
    for seed in range(3 if rules.paper else 2 if rules.convolutions else 1)
]


@pytest.mark.parametrize(("name", "shape", "seed"), CASES)
def test_engine_equals_a_loop_over_single_neurons(name, shape, seed):
    net = NETS[shape](seed)
    policy, rules = COMPARED[name]
    inputs = {
        "image": torch.randn(1, 3, 16, 16, dtype=torch.float64),
        "tokens": torch.tensor([[1, 4, 2]]),
        "h": torch.zeros(1, 5, dtype=torch.float64),
        "c": torch.zeros(1, 5, dtype=torch.float64),
    }
    with Trace() as trace:
        inputs = {k: v.clone() for k, v in inputs.items()}
        slots = {k: trace.slot(trace.watch(k, v)) for k, v in inputs.items()}
        values = run(net.nodes, inputs)
        target = trace.slot(values[-1])
    units = [int(values[-1].argmax()), int(values[-1].argmin())]
    evidence = start(target, units)
    evidence.direction[1] = -1.0
    account = walk(trace, [(target, evidence)], policy)
    for word, (unit, direction) in enumerate(zip(units, (1, -1), strict=True)):
        ended, bias = unravel(net.nodes, values, (0, unit), rules, direction)
        expected: dict[tuple[str, int, int], float] = defaultdict(float)
        for (number, place, towards), mass in ended.items():
            key = net.nodes[number].options["name"]
            expected[key, int(torch.arange(inputs[key].numel()).view(inputs[key].shape)[place]), towards] += mass
        found = {}
        for key, slot in slots.items():
            rows = account.at(slot)
            rows = rows.where(rows.word == word)
            found.update(
                {
                    (key, e, int(d)): m
                    for e, d, m in zip(rows.element.tolist(), rows.direction.tolist(), rows.mass.tolist(), strict=True)
                }
            )
        if not name.startswith("marginal"):
            assert set(found) == set(expected)
        for key in set(found) | set(expected):  # sets, and masses too
            assert found.get(key, 0.0) == pytest.approx(expected.get(key, 0.0), rel=1e-7, abs=1e-11)
        assert float(account.bias[word]) == pytest.approx(bias, abs=1e-9)


def test_the_networks_compared_do_reach_the_image():
    """Equal empty sets would say nothing."""
    reached = []
    for make in NETS.values():
        net = make(0)
        values = run(
            net.nodes,
            {
                "image": torch.randn(1, 3, 16, 16, dtype=torch.float64),
                "tokens": torch.tensor([[1, 4, 2]]),
                "h": torch.zeros(1, 5, dtype=torch.float64),
                "c": torch.zeros(1, 5, dtype=torch.float64),
            },
        )
        ended, _ = unravel(net.nodes, values, (0, int(values[-1].argmax())), Rules(paper=True))
        reached.append(sum(number == 0 for number, *_ in ended))
    assert min(reached) >= 1
    assert sum(reached) >= 20
