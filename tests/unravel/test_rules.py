"""Rules of single operations against PyTorch's own derivatives.

Where an operation only moves or chooses numbers, a neuron's gradient is 1 at the one element it came from.
Where it is pointwise, the gradient's sign is the direction. Where it is a sum, contributions are gradient
times input. So autograd says where evidence must go.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captionfix.unravel import Policy, Trace, start, walk

ALL = Policy(sums=None, convolutions=10**6, linear=10**6, neurons=None)


def gradients(run, x, elements):
    rows = []
    for e in elements:
        leaf = x.clone().requires_grad_()
        # an in-place operation needs something that is no leaf
        rows.append(torch.autograd.grad(run(leaf * 1).flatten()[e], leaf)[0].flatten())
    return torch.stack(rows)


def evidence(run, x, elements, direction=1.0):
    """(n, x) mass, (n, x) direction, (n,) bias."""
    with Trace() as trace:
        x = x.clone()
        at_x = trace.slot(trace.watch("x", x))
        target = trace.slot(run(x))
    account = walk(trace, [(target, start(target, elements, direction))], ALL)
    torch.testing.assert_close(account.total(), torch.ones(len(elements), dtype=x.dtype))
    found = account.at(at_x)
    towards = torch.zeros(len(elements), x.numel(), dtype=x.dtype)
    towards[found.word, found.element] = found.direction
    return found.dense(len(elements), x.numel()), towards, account.bias


def image():
    return torch.randn(2, 4, 6, 5, dtype=torch.float64)


def written(x, where, what):
    x[where] = what
    return x


INDEX, ROWS = torch.tensor([3, 0, 2]), torch.tensor([[0, 1, 3, 1, 0], [2, 2, 1, 0, 3]])

MOVES = {
    "transpose": lambda x: x.transpose(1, 3),
    "permute": lambda x: x.permute(3, 1, 0, 2).contiguous(),
    "reshape": lambda x: x.transpose(1, 2).reshape(4, -1),
    "slice": lambda x: x[:, 1:4:2, ::2].clone(),
    "select": lambda x: x[1, :, 2] + 0,
    "flip": lambda x: x.flip(1, 3),
    "roll": lambda x: x.roll((2, 1), (2, 3)),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "pad by nothing": lambda x: F.pad(x, (0, 0, 0, 0)),
    "pad that cuts": lambda x: F.pad(x, (-1, 2, 1, -1)),
    "pad with a value": lambda x: F.pad(x, (1, 2), value=3.0),
    "reflect": lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"),
    "replicate": lambda x: F.pad(x, (1, 2, 2, 1), mode="replicate"),
    "circular": lambda x: F.pad(x, (1, 2, 2, 1), mode="circular"),
    "expand": lambda x: x[:, :, :1, :1].expand(2, 4, 3, 2).clone(),
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "cat": lambda x: torch.cat([x[:, 2:], x, x[:, :1]], 1),
    "stack": lambda x: torch.stack([x[0], x[1], x[0]], 2),
    "split": lambda x: x.split([1, 3], 1)[1] * 1,
    "chunk": lambda x: x.chunk(2, 2)[1] * 1,
    "unbind": lambda x: torch.stack(x.unbind(1)[::-1]),
    "index": lambda x: x[:, INDEX],
    "index pair": lambda x: x[:, INDEX, INDEX],
    "mask": lambda x: x[x > 0],
    "index_select": lambda x: x.index_select(1, INDEX),
    "gather": lambda x: x.gather(1, ROWS[:, None, None].expand(2, 2, 3, 5) % 4),
    "take_along_dim": lambda x: x.take_along_dim(x.argsort(1), 1),
    "sort": lambda x: x.sort(2)[0],
    "sort falling": lambda x: x.sort(dim=1, descending=True, stable=True)[0],
    "topk": lambda x: x.topk(2, 1)[0],
    "kthvalue": lambda x: x.kthvalue(2, 1)[0],
    "mode": lambda x: x.mode(1)[0],
    "median": lambda x: x.median(2)[0],
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x[:, :, :, :4], 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "unfold": lambda x: F.unfold(x, 3, padding=1),
    "windows": lambda x: x.unfold(2, 3, 1) + 0,
    "tril": lambda x: x.tril(),
    "triu": lambda x: x.triu(1),
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0),
    "masked_fill": lambda x: x.masked_fill(x > 1, 0.0),
    "masked_fill tensor": lambda x: x.masked_fill(x > 1, torch.tensor(0.0).double()),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "where two": lambda x: torch.where(x > 0, x, x.flip(1)),
    "diagonal": lambda x: x.diagonal(0, 2, 3) + 0,
    "movedim": lambda x: x.movedim(1, -1).contiguous(),
    "unflatten": lambda x: x.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2),
    "set slice": lambda x: written(x * 1, (slice(None), 1), x[:, 2]),
    "set value": lambda x: written(x * 1, (slice(None), 1), 0.5),
    "set mask": lambda x: written(x * 1, x > 0.5, 0.0),
    "set index": lambda x: written(x * 1, (slice(None), INDEX), x[:, INDEX.flip(0)]),
    "scatter": lambda x: (
        torch.zeros(2, 4, 6, 5).double().scatter(1, INDEX[None, :, None, None].expand(2, 3, 6, 5), x[:, :3])
    ),
    "index_copy": lambda x: (x * 1).index_copy(1, INDEX, x[:, :3]),
    "zeroed": lambda x: (x * 1).index_fill(1, INDEX[:1], 0.0),
    "max_pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool dilated": lambda x: F.max_pool2d(x, 2, 2, 1, 2, ceil_mode=True),
    "max_pool1d": lambda x: F.max_pool1d(x[0], 2),
    "adaptive max": lambda x: F.adaptive_max_pool2d(x, (4, 3)),
    "amax": lambda x: x.amax((1, 2)),
    "amin": lambda x: x.amin(3),
    "max": lambda x: x.max(1)[0],
    "max of all": lambda x: x.max(),
    "maximum": lambda x: torch.maximum(x, x.flip(1)),
    "minimum": lambda x: torch.minimum(x, x.roll(1, 1)),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves_and_choices_send_everything_where_the_gradient_is(name):
    run, x = MOVES[name], image()
    elements = torch.randperm(run(x).numel())[:12]
    expected = gradients(run, x, elements).round()
    mass, towards, bias = evidence(run, x, elements, -1.0)
    torch.testing.assert_close(mass, expected)
    torch.testing.assert_close(towards, -expected)
    torch.testing.assert_close(bias, 1 - expected.sum(1))


POINTWISE = {
    **{
        f: getattr(F, f)
        for f in (
            "relu6",
            "leaky_relu",
            "elu",
            "selu",
            "celu",
            "softplus",
            "tanh",
            "sigmoid",
            "gelu",
            "silu",
            "mish",
            "hardswish",
            "softsign",
            "logsigmoid",
        )
    },
    **{f: getattr(torch, f) for f in ("exp", "neg", "abs", "square", "expm1", "atan", "erf")},
    "reciprocal": lambda x: 1 / (x.abs() + 1),
    "rsqrt": lambda x: (x * x + 1).rsqrt(),
    "log": lambda x: (x.abs() + 1).log(),
    "cube": lambda x: x**3,
    "minus": lambda x: 2 - x,
    "minus two": lambda x: x - 2,
    "scaled": lambda x: x * -3,
    "divided": lambda x: x / -2.0,
    "prelu": lambda x: F.prelu(x, torch.tensor([-0.3, 0.2, 0.1, -1.0]).double()),
    "base": lambda x: 2**x,
    "power of a tensor": lambda x: torch.pow(x, torch.tensor([2.0, 3.0, 1.0, 2.0, 3.0]).double()),
    "sub alpha": lambda x: torch.sub(torch.ones(5).double(), x, alpha=2),
    "batch norm": lambda x: F.batch_norm(
        x, torch.zeros(4).double(), torch.ones(4).double(), torch.tensor([1.0, -2.0, 0.5, -1]).double()
    ),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_functions_turn_where_the_gradient_does(name):
    run, x = POINTWISE[name], image()
    elements = torch.randperm(x.numel())[:60]
    slope = gradients(run, x, elements)
    mass, towards, bias = evidence(run, x, elements)
    known = slope.abs().sum(1) > 1e-9  # where a function is flat, any direction will do
    assert int(known.sum()) > 20
    torch.testing.assert_close(mass[torch.arange(len(elements)), elements], torch.ones(len(elements), dtype=x.dtype))
    torch.testing.assert_close(towards[known], slope[known].sign())
    assert float(bias.abs().max()) == 0


class Weights:
    """Constants of the sums below."""

    generator = torch.Generator().manual_seed(4)
    a, b = (
        torch.randn(5, 7, dtype=torch.float64, generator=generator),
        torch.randn(2, 4, 3, 6, dtype=torch.float64, generator=generator),
    )


SUMS = {
    "linear": lambda x: F.linear(x, Weights.a.T.contiguous()),
    "matmul": lambda x: x @ Weights.a,
    "matmul left": lambda x: Weights.b @ x,
    "bmm": lambda x: torch.bmm(Weights.b[0], x[0]),
    "mm": lambda x: torch.mm(x[0, 0], Weights.a),
    "mv": lambda x: torch.mv(x[0, 0], Weights.a[:, 0]),
    "addmm": lambda x: torch.addmm(torch.zeros(7).double(), x[0, 0], Weights.a),
    "dot": lambda x: torch.dot(x[0, 0, 0], Weights.a[:, 1]),
    "einsum": lambda x: torch.einsum("bchw,wk->bkch", x, Weights.a),
    "sum": lambda x: x.sum((1, 3)),
    "mean": lambda x: x.mean(2, keepdim=True),
    "sum of all": lambda x: x.sum(),
    "cumsum": lambda x: x.cumsum(2),
    "add": lambda x: x + x.flip(1),
    "sub": lambda x: x - x.roll(1, 2),
    "add alpha": lambda x: torch.add(x, x.flip(2), alpha=-0.5),
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg_pool no pad": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "avg_pool1d": lambda x: F.avg_pool1d(x[0], 2),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (4, 9)),
    "bilinear": lambda x: F.interpolate(x, size=(9, 7), mode="bilinear"),
    "conv": lambda x: F.conv2d(x, Weights.b.view(2, 4, 3, 6)[..., :3], padding=1),
    "conv1d": lambda x: F.conv1d(x[0], Weights.b[0, :, :, :3].reshape(2, 6, 3)),
    "conv3d": lambda x: F.conv3d(x[None], Weights.b[None, :, :2, :2, :2]),
    "gate": lambda x: x * torch.sigmoid(Weights.b[:, :, :1, :5]),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_sums_split_in_proportion_to_what_agrees(name, direction):
    run, x = SUMS[name], image()
    elements = torch.randperm(run(x).numel())[:12]
    agreeing = (gradients(run, x, elements) * x.flatten() * direction).clamp_min(0)
    if name in ("conv1d", "gate"):
        agreeing = agreeing.clamp_min(0)
    total = agreeing.sum(1, keepdim=True)
    mass, towards, bias = evidence(run, x, elements, direction)
    if name == "gate":  # a constant factor: all passes, agreeing or not
        torch.testing.assert_close(mass.sum(1), torch.ones(len(elements), dtype=x.dtype))
        return
    torch.testing.assert_close(
        mass, torch.where(total > 0, agreeing / total.clamp_min(1e-300), 0.0), atol=1e-9, rtol=1e-6
    )
    assert bool((towards[mass > 1e-12] == x.flatten().sign().expand_as(towards)[mass > 1e-12]).all())
    torch.testing.assert_close(bias, (total[:, 0] == 0).to(x.dtype), atol=1e-9, rtol=0)


def test_gates_are_constant_factors_and_two_signals_share():
    x = torch.rand(1, 4, dtype=torch.float64) + 0.1
    gate = nn.Linear(4, 4).double()

    def gated(x):
        return torch.cat([x[:, :2], torch.sigmoid(gate(x))[:, 2:] * x[:, 2:]], 1)

    mass, _, _ = evidence(gated, x, [2, 3])
    assert mass.tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]
    mass, _, _ = evidence(lambda x: x[:, :2] * x[:, 2:], x, [0])
    assert mass.tolist() == [[0.5, 0, 0.5, 0]]
    mass, towards, _ = evidence(lambda x: -x[:, :2] * x[:, 2:], x, [0])
    assert towards.tolist() == [[-1, 0, -1, 0]]
    mass, _, _ = evidence(
        lambda x: (x.view(2, 2).softmax(1) @ x.view(2, 2)).flatten(), x, [0, 3]
    )  # attention: to the values
    assert float(mass[0, [1, 3]].sum() + mass[1, [0, 2]].sum()) == 0


def test_rows_at_a_leaf_are_merged_though_a_view_shows_an_element_several_times():
    x = torch.rand(1, 1, 6, dtype=torch.float64) + 0.1
    with Trace() as trace:
        at_x = trace.slot(trace.watch("x", x))
        target = trace.slot(F.relu(x.unfold(2, 3, 1)).sum())
    found = walk(trace, [(target, start(target, [0]))], ALL).at(at_x)
    assert sorted(found.element.tolist()) == list(range(6))
    torch.testing.assert_close(
        found.dense(1, 6)[0],
        x[0, 0]
        * torch.tensor([1.0, 2, 3, 3, 2, 1]).double()
        / (x[0, 0] * torch.tensor([1.0, 2, 3, 3, 2, 1]).double()).sum(),
    )


@pytest.mark.parametrize("cast", [False, True])
def test_a_mask_made_from_tokens_is_a_constant_factor(cast: bool) -> None:
    """`x * (tokens != pad)`, as captioners silence padding: the mask takes no evidence."""
    tokens, x = torch.tensor([[3, 0, 5]]), torch.rand(1, 3, dtype=torch.float64) + 1
    with Trace() as trace:
        x, tokens = x.clone(), tokens.clone()
        at = trace.slot(trace.watch("x", x))
        trace.watch("tokens", tokens)
        mask = tokens != 0
        out = trace.slot(x * (mask.to(x.dtype) if cast else mask))
    account = walk(trace, [(out, start(out, [0, 2]))], Policy())
    assert account.at(at).dense(2, 3).tolist() == [[1, 0, 0], [0, 0, 1]]
