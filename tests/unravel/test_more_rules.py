"""Rules against PyTorch's own derivatives, continued: writes that add, products and sums in one operation,
sizes, the fast path of attention; and the fallback on request."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_rules import ALL, Weights, evidence, gradients, image
from torch import nn

from captionfix.errors import PolicyError, UnsupportedOperation
from captionfix.unravel import RULES, Policy, Trace, start, walk
from captionfix.unravel.registry import find
from captionfix.unravel.rules.attention import native_multi_head_attention, transformer_encoder_layer

ROW = torch.tensor([1, 0, 1, 3, 1])
ROWS = (
    torch.tensor([[0, 1, 1, 3, 0], [2, 2, 1, 2, 3]])
    .repeat(2, 1)
    .view(2, 2, 5)[:, [0, 1, 1, 0], None]
    .expand(2, 4, 6, 5)
)


def onto(x, write):
    """A write into a tensor that itself depends on the input."""
    return write(x * 0.5)


SUMS = {
    "index_put": lambda x: onto(x, lambda y: y.index_put((torch.arange(2)[:, None], ROW), x.flip(2)[:, :1], True)),
    "index_put in place": lambda x: onto(x, lambda y: y.index_put_((torch.tensor([0, 0, 1]),), x[:1] * 2, True)),
    "scatter_add": lambda x: torch.zeros(2, 4, 6, 5).double().scatter_add(1, ROWS[:, :2], x[:, 2:]),
    "scatter_add part": lambda x: torch.zeros(2, 4, 6, 5).double().scatter_add(1, ROWS[:, :2], x[:, 2:] * 1),
    "scatter_add in place": lambda x: onto(x, lambda y: y.scatter_add_(1, ROWS, x)),
    "scatter_reduce": lambda x: onto(x, lambda y: y.scatter_reduce(1, ROWS, x, "sum")),
    "scatter_reduce alone": lambda x: onto(x, lambda y: y.scatter_reduce(1, ROWS, x, "sum", include_self=False)),
    "scatter_reduce mean": lambda x: onto(x, lambda y: y.scatter_reduce(1, ROWS, x, "mean")),
    "index_add": lambda x: x[:1].clone().index_add(2, ROW, x[1:, :, 1:], alpha=-2),
    "index_add constant": lambda x: torch.ones(2, 4, 6, 5).double().index_add(2, ROW, x[:, :, 1:]),
    "addr": lambda x: torch.addr(x[0, 0], x[0, 1, :, 0], Weights.a[:, 0], alpha=0.3),
    "addcmul": lambda x: torch.addcmul(x, x.flip(1), Weights.b[:, :, :1, :1], value=-2),
    "addcdiv": lambda x: torch.addcdiv(x, x.flip(1), Weights.b[:, :, :1, :1]),
    "lerp": lambda x: torch.lerp(x, x.flip(2), 0.3),
    "lerp tensor": lambda x: torch.lerp(x, x.flip(2), torch.full((5,), 0.7).double()),
    "constant @ variable weight": lambda x: F.linear(Weights.a.T.contiguous(), x[0, 0]),
    "constant mm variable": lambda x: torch.mm(Weights.a.T.contiguous(), x[0, 0, :5]),
}


def once(x):
    """Several independent pieces of an input: an element that comes in through two terms is two contributions."""
    return x[0, 1, :2, :3], x[0, 0, :2], x[1, 0, :5], x[1, 1, 0], x[1, 2, :4, 0]


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_sums_split_in_proportion_to_what_agrees(name, direction):
    run, x = SUMS[name], image()
    elements = torch.randperm(run(x).numel())[:12]
    agreeing = (gradients(run, x, elements) * x.flatten() * direction).clamp_min(0)
    total = agreeing.sum(1, keepdim=True)
    mass, _, bias = evidence(run, x, elements, direction)
    torch.testing.assert_close(
        mass, torch.where(total > 0, agreeing / total.clamp_min(1e-300), 0.0), atol=1e-9, rtol=1e-6
    )
    torch.testing.assert_close(bias, (total[:, 0] == 0).to(x.dtype), atol=1e-9, rtol=0)


SPELLED_OUT = {
    "addmm": (
        lambda o, a, b, v, w: torch.addmm(o, a, Weights.a[:, :3], beta=0.5, alpha=2),
        lambda o, a, b, v, w: o * 0.5 + (a @ Weights.a[:, :3]) * 2,
    ),
    "addmm of two signals": (lambda o, a, b, v, w: torch.addmm(o, a, b[:, :3]), lambda o, a, b, v, w: o + a @ b[:, :3]),
    "addmv": (
        lambda o, a, b, v, w: torch.addmv(v, b, Weights.a[:, 0], alpha=-1),
        lambda o, a, b, v, w: v - b @ Weights.a[:, 0],
    ),
    "baddbmm": (
        lambda o, a, b, v, w: torch.baddbmm(o[None], a[None], Weights.a[None, :, :3], beta=3),
        lambda o, a, b, v, w: o * 3 + a @ Weights.a[:, :3],
    ),
    "baddbmm without": (
        lambda o, a, b, v, w: torch.baddbmm(o[None], a[None], Weights.a[None, :, :3], beta=0),
        lambda o, a, b, v, w: a @ Weights.a[:, :3],
    ),
    "addbmm": (
        lambda o, a, b, v, w: torch.addbmm(o, torch.stack([a, a * 0.5]), Weights.a[None, :, 1:4].expand(2, 5, 3)),
        lambda o, a, b, v, w: o + (torch.stack([a, a * 0.5]) @ Weights.a[:, 1:4]).sum(0),
    ),
    "addr": (
        lambda o, a, b, v, w: torch.addr(b[:4], w, Weights.a[0, :5], alpha=0.3),
        lambda o, a, b, v, w: b[:4] + w[:, None] * Weights.a[0, :5] * 0.3,
    ),
    "ones": (lambda o, a, b, v, w: v + torch.ones_like(v) * 3 + (v > 0), lambda o, a, b, v, w: v + 3),
}


@pytest.mark.parametrize("name", SPELLED_OUT)
def test_fused_operations_go_as_if_they_were_spelled_out(name):
    fused, spelled = SPELLED_OUT[name]
    x = image()
    elements = torch.arange(4)
    found = evidence(lambda x: fused(*once(x)), x, elements)
    expected = evidence(lambda x: spelled(*once(x)), x, elements)
    if name == "ones":  # what does not depend on the input takes its part of the sum with it
        assert bool((found[0] <= expected[0]).all())
        return
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-6)
    assert float(found[0].sum()) > 0.5


CHOICES = {
    "amax": lambda x: onto(x, lambda y: y.scatter_reduce(1, ROWS, x.flip(2), "amax")),
    "amin alone": lambda x: onto(x, lambda y: y.scatter_reduce(1, ROWS, x, "amin", include_self=False)),
    "index amax": lambda x: onto(x, lambda y: y.index_reduce(2, ROW, x[:, :, 1:], "amax")),
    "infinite norm": lambda x: torch.linalg.vector_norm(x, torch.inf, (1, 3)),
    "replacing": lambda x: onto(x, lambda y: y.scatter(1, ROWS[:, :1], x[:, :1] * 1)),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices_send_everything_where_the_gradient_is(name):
    run, x = CHOICES[name], image().abs() if name == "infinite norm" else image()
    elements = torch.randperm(run(x).numel())[:12]
    mass, towards, bias = evidence(run, x, elements)
    where = gradients(run, x, elements)
    torch.testing.assert_close(mass, (where != 0).to(x.dtype))
    assert bool((towards == where.sign()).all())
    assert float(bias.abs().max()) == 0


def test_products_that_meet_in_one_place_share_alike():
    x = torch.tensor([2.0, -3.0, 0.5, 4.0], dtype=torch.float64)
    index = torch.tensor([0, 0, 1])
    mass, towards, _ = evidence(lambda x: (x[:2] * 1).scatter_reduce(0, index, x[1:], "prod"), x, [0, 1])
    # out[0] = x0 * x1 * x2 < 0: higher means the negative one higher, the positive ones lower
    torch.testing.assert_close(mass[0], torch.tensor([1, 1, 1, 0]).double() / 3)
    assert towards[0, :3].tolist() == [-1, 1, -1]
    torch.testing.assert_close(mass[1], torch.tensor([0, 0.5, 0, 0.5]).double())
    again = evidence(lambda x: (x[:2] * 1).scatter(0, index, x[1:], reduce="multiply"), x, [0, 1])[0]
    torch.testing.assert_close(again, mass)


SIZES = {
    "norm": lambda x: torch.linalg.vector_norm(x, dim=(1, 3)),
    "norm 3": lambda x: torch.linalg.vector_norm(x, 3, dim=2, keepdim=True),
    "norm of all": lambda x: x.norm(),
    "var": lambda x: x.var((1, 3)),
    "std": lambda x: x.std(2, correction=0),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_grow_with_every_term(name):
    """The share is proportional to the derivative times the distance from zero, or from the mean."""
    run, x = SIZES[name], image()
    elements = torch.randperm(run(x).numel())[:6]
    slope = gradients(run, x, elements)
    distance = x.flatten()
    if name in ("var", "std"):
        distance = (x - x.mean((1, 3) if name == "var" else 2, keepdim=True)).flatten()
    share = slope * distance
    mass, towards, bias = evidence(run, x, elements)
    torch.testing.assert_close(mass, share / share.sum(1, keepdim=True))
    assert bool((towards[mass > 0] == slope.sign()[mass > 0]).all())
    assert float(bias.abs().max()) < 1e-9
    torch.testing.assert_close(evidence(run, x, elements, -1.0)[2], torch.ones(len(elements)).double())


def test_a_statistic_that_normalises_is_a_constant_factor():
    def response_norm(x):  # ConvNeXt V2's
        size = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        return x * (size / (size.mean(1, keepdim=True) + 1e-6))

    x = image()
    for run in (response_norm, lambda x: x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)):
        mass, _, _ = evidence(run, x, [7, 100])
        assert mass[0, 7] == 1
        assert mass[1, 100] == 1


# attention's fast path -----------------------------------------------------------------------------------------------


def attention_module():
    return nn.MultiheadAttention(8, 2, batch_first=True).eval()


@pytest.mark.parametrize("kind", ["attention", "layer", "norm first"])
def test_the_fast_path_of_attention_is_followed(kind):
    """It arrives as one operation and unravels as the slow path does; recording leaves it alone."""
    if kind == "attention":
        module = attention_module()
        run = lambda x: module(x, x, x, need_weights=False)[0]  # noqa: E731
    else:
        module = nn.TransformerEncoderLayer(
            8, 2, 16, activation="gelu", batch_first=True, norm_first=kind == "norm first"
        ).eval()
        run = module
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    x = torch.randn(2, 5, 8)
    with torch.inference_mode():
        plain = run(x)
    found = {}
    for fast in (True, False):
        torch.backends.mha.set_fastpath_enabled(fast)
        try:
            with Trace(module) as trace:
                at = trace.slot(trace.watch("x", signal := x.clone()))
                target = trace.slot(run(signal))
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        if fast:
            assert torch.equal(target.read(), plain)
        names = {operation.name for operation in trace.operations}
        assert fast == bool(names & {"_native_multi_head_attention", "_transformer_encoder_layer_fwd"})
        account = walk(trace, [(target, start(target, plain.flatten().topk(2).indices))], ALL)
        torch.testing.assert_close(account.total(), torch.ones(2))
        found[fast] = account.at(at).dense(2, x.numel())
    torch.testing.assert_close(found[True], found[False], atol=1e-4, rtol=1e-3)
    assert float(found[True].sum()) > 0.5


@pytest.mark.parametrize("mask_type", [None, 0, 1, 2])
def test_the_equations_of_fused_attention_equal_it(mask_type):
    module, x = attention_module(), torch.randn(3, 5, 8)
    mask = {
        None: None,
        0: torch.ones(5, 5, dtype=torch.bool).triu(1),
        1: torch.arange(5)[None] >= torch.tensor([[5], [3], [4]]),
        2: (torch.ones(5, 5, dtype=torch.bool).triu(1)).expand(3, 2, 5, 5).contiguous(),
    }[mask_type]
    args = (x, x, x, 8, 2, module.in_proj_weight, module.in_proj_bias, module.out_proj.weight, module.out_proj.bias)
    with torch.inference_mode():
        ours = native_multi_head_attention(None, *args, mask, True, False, mask_type)
        theirs = torch._native_multi_head_attention(*args, mask, True, False, mask_type)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        weights = (module.in_proj_weight, module.in_proj_bias, module.out_proj.weight, module.out_proj.bias)
        norms = (layer.norm1.weight, layer.norm1.bias, layer.norm2.weight, layer.norm2.bias)
        forward = (layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias)
        args = (x, 8, 2, *weights, False, False, 1e-5, *norms, *forward, mask, mask_type)
        torch.testing.assert_close(
            transformer_encoder_layer(None, *args), torch._transformer_encoder_layer_fwd(*args), atol=1e-5, rtol=1e-4
        )


# the fallback --------------------------------------------------------------------------------------------------------


@pytest.fixture
def _without_rules(monkeypatch):
    """Forgets a few rules."""
    for name in ("linear", "conv2d", "tanh", "mul", "cumsum", "sub"):
        monkeypatch.delitem(RULES, name)
    find.cache_clear()
    yield
    monkeypatch.undo()
    find.cache_clear()


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 5 * 5, 6)

    def forward(self, x):
        return self.head(F.relu(self.conv(x)).flatten(1))


@pytest.mark.parametrize("keep", [None, 3])
def test_the_fallback_of_a_linear_operation_is_the_rule_of_sums(request, keep):
    module, x = Plain().double().eval(), torch.randn(1, 3, 5, 5, dtype=torch.float64)
    policy = Policy(sums=keep, convolutions=10**6 if keep is None else keep, neurons=None, linear=keep or 10**6)
    with Trace(module) as trace:
        at = trace.slot(trace.watch("x", signal := x.clone()))
        target = trace.slot(module(signal))
    rules = walk(trace, [(target, start(target, [0, 4], -1.0))], policy)
    request.getfixturevalue("_without_rules")
    with pytest.raises(UnsupportedOperation, match=r"aten::linear.*fallback='gradient'"):
        walk(trace, [(target, start(target, [0, 4], -1.0))], policy)
    asked = Policy(**{**policy.as_dict(), "fallback": "gradient"})
    account = walk(trace, [(target, start(target, [0, 4], -1.0))], asked)
    torch.testing.assert_close(account.at(at).dense(2, 75), rules.at(at).dense(2, 75))
    torch.testing.assert_close(account.bias, rules.bias)
    assert float(account.at(at).per_word(2).min()) > 0.1


FALLEN_BACK = {
    "fold": lambda x: F.fold(F.unfold(x, 3), (6, 5), 3),
    "grid_sample": lambda x: F.grid_sample(x, torch.linspace(-0.9, 0.9, 24).double().view(2, 3, 2, 2)),
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "prod": lambda x: x.prod(1),
    "two inputs": lambda x: torch.hypot(x, x.flip(1)),
    "in place": lambda x: (x * 1).sin_(),
    "opposed": lambda x: x.prod(1),
}


@pytest.mark.parametrize("name", FALLEN_BACK)
def test_the_fallback_splits_by_gradient_times_input_and_is_conserved(name):
    run, x = FALLEN_BACK[name], image()
    elements = torch.randperm(run(x).numel())[:5]
    opposed = "input" if name == "opposed" else "bias"
    policy = Policy(sums=None, convolutions=None, neurons=None, fallback="gradient", opposed=opposed)
    with Trace() as trace:
        at = trace.slot(trace.watch("x", signal := x.clone()))
        target = trace.slot(run(signal))
    account = walk(trace, [(target, start(target, elements))], policy)
    torch.testing.assert_close(account.total(), torch.ones(5, dtype=x.dtype))
    agreeing = (gradients(run, x, elements) * x.flatten()).clamp_min(0)
    total = agreeing.sum(1, keepdim=True)
    expected = torch.where(total > 0, agreeing / total.clamp_min(1e-300), 0.0)
    known = total[:, 0] > 0
    assert bool(known.any())
    torch.testing.assert_close(account.at(at).dense(5, x.numel())[known], expected[known])
    assert float(account.bias[~known].sum()) == (0 if name == "opposed" else int((~known).sum()))


def test_an_operation_without_rule_and_derivative_says_so():
    with Trace() as trace:
        trace.watch("x", x := torch.rand(3, 4))
        target = trace.slot(torch.heaviside(x, x + 1))
    with pytest.raises(UnsupportedOperation, match=r"aten::heaviside.*no derivative"):
        walk(trace, [(target, start(target, [0]))], Policy(fallback="gradient"))
    with pytest.raises(PolicyError, match="fallback"):
        Policy(fallback="zeros")
