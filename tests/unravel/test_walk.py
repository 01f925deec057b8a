"""Sequences against cells, the feature map, operations without a rule, and rules of one's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import FOLLOWED, Attend, Captioning, Sequence_
from torch import nn

from captionfix.errors import UnsupportedOperation
from captionfix.unravel import RULES, Link, Policy, Trace, find_feature_map, register, start, walk
from captionfix.unravel.registry import find


def on_input(run, x, elements, policy, tokens=None):
    """(words, ...) mass on x, on the tokens, and on the rest, when ``run`` computes something of them."""
    with Trace() as trace:
        x = x.clone()
        at_x = trace.slot(trace.watch("x", x))
        at_tokens = None if tokens is None else trace.slot(trace.watch("tokens", tokens))
        target = trace.slot(run(x) if tokens is None else run(x, tokens))
    account = walk(trace, [(target, start(target, elements))], policy)
    torch.testing.assert_close(account.total(), torch.ones(len(elements), dtype=x.dtype))
    found = [account.at(at_x).dense(len(elements), x.numel())]
    if at_tokens is not None:
        found.append(account.at(at_tokens).dense(len(elements), at_tokens.numel))
    return [*found, account.share(at_x)]


# sequences ----------------------------------------------------------------------------------------------------------


def cells_of(rnn):
    """The same layers as cells."""
    cells = []
    for layer in range(rnn.num_layers):
        size = rnn.input_size if layer == 0 else rnn.hidden_size
        cell = (nn.LSTMCell if isinstance(rnn, nn.LSTM) else nn.GRUCell)(size, rnn.hidden_size).to(
            rnn.weight_ih_l0.dtype
        )
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(cell, name).data.copy_(getattr(rnn, f"{name}_l{layer}"))
        cells.append(cell)
    return cells


def looped(rnn, x):
    """What an nn.LSTM or nn.GRU over (B, T, features) does, cell by cell, written into a tensor."""
    steps = list(x.unbind(1))
    for cell in cells_of(rnn):
        h = torch.zeros(len(x), rnn.hidden_size, dtype=x.dtype)
        c, out = h, []
        for step in steps:
            if isinstance(cell, nn.LSTMCell):
                h, c = cell(step, (h, c))
            else:
                h = cell(step, h)
            out.append(h)
        steps = out
    result = torch.zeros(len(x), len(steps), rnn.hidden_size, dtype=x.dtype)
    for t, h in enumerate(steps):
        result[:, t] = h
    return result


@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_sequence_equals_its_cells(name, kind, layers):
    rnn = kind(4, 5, layers, batch_first=True).double().eval()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    elements = [2 * 5 + 1, (3 + 1) * 5 + 4, (3 + 2) * 5]
    expected = on_input(lambda x: looped(rnn, x), x, elements, FOLLOWED[name])
    assert float(expected[0].sum()) > 0.1
    forms = {
        "batch first": lambda x: rnn(x)[0],
        "time first": lambda x: time_first(x)[0].transpose(0, 1),
        "packed": lambda x: nn.utils.rnn.pad_packed_sequence(
            rnn(nn.utils.rnn.pack_padded_sequence(x, [3, 3], batch_first=True))[0], batch_first=True
        )[0],
    }
    time_first_rnn = kind(4, 5, layers).double().eval()
    time_first_rnn.load_state_dict(rnn.state_dict())

    def time_first(x):
        return time_first_rnn(x.transpose(0, 1))

    if FOLLOWED[name].neurons is not None and FOLLOWED[name].neurons < 15:
        del forms["packed"]  # its packed data is one more tensor that the budget of neurons applies to
    for form, run in forms.items():
        for mine, other in zip(on_input(run, x, elements, FOLLOWED[name]), expected, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-9, msg=lambda m, form=form: f"{form}: {m}")


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_last_state_of_a_packed_sequence_is_each_sequence_s_own_last_step(kind):
    rnn = kind(4, 5, batch_first=True).double().eval()
    x = torch.randn(3, 4, 4, dtype=torch.float64)

    def last(x):
        packed = nn.utils.rnn.pack_padded_sequence(x, [4, 3, 1], batch_first=True)
        state = rnn(packed)[1]
        return state[0] if kind is nn.LSTM else state

    found = on_input(last, x, [2, 5 + 2, 10 + 2], Policy())[0].view(3, 3, 4, 4)
    for sequence, length in enumerate([4, 3, 1]):
        part = x[sequence : sequence + 1, :length]
        alone = on_input(lambda part: looped(rnn, part), part, [(length - 1) * 5 + 2], Policy())[0].view(length, 4)
        torch.testing.assert_close(found[sequence, sequence, :length], alone, atol=1e-12, rtol=1e-9)
        assert float(found[sequence].sum()) == pytest.approx(
            float(alone.sum())
        )  # padding and other sequences get nothing


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_bidirectional_sequence_is_refused(kind):
    rnn = kind(4, 5, bidirectional=True).eval()
    with pytest.raises(UnsupportedOperation, match="bidirectional"):
        on_input(lambda x: rnn(x)[0], torch.randn(2, 1, 4), [0], Policy())


def test_a_sequence_with_projections_is_refused():
    rnn = nn.LSTM(4, 5, proj_size=2).eval()
    with pytest.raises(UnsupportedOperation, match="proj_size"):
        on_input(lambda x: rnn(x)[0], torch.randn(2, 1, 4), [0], Policy())


@pytest.mark.parametrize(
    "decoder",
    [
        lambda: Sequence_((4, 2, 2), False, "lstm", 2, True, False, False),
        lambda: Sequence_((4, 2, 2), True, "gru", 1, False, False, True),
        lambda: Attend((4, 2, 2), False, "lstm", True),
    ],
)
def test_language_evidence_lands_on_the_right_token(decoder):
    """Only words that were read before, and changing what stands elsewhere changes nothing."""
    made = decoder().double().eval()
    features, tokens = torch.rand(1, 4, 2, 2, dtype=torch.float64), torch.tensor([[0, 3, 5, 2]])
    elements = [t * 7 + 1 for t in range(4)]
    _, credits, _ = on_input(made, features, elements, Policy(sums=None, linear=None), tokens)
    assert credits.shape == (4, 4)
    assert float(credits.triu(1).sum()) == 0
    assert bool((credits.diagonal() > 0).any())
    # a decoder whose word vectors are all zero but one: only that position gets credit
    with torch.no_grad():
        made.embedding.weight.zero_()
        made.embedding.weight[5] = torch.randn(5, dtype=torch.float64)
    _, credits, _ = on_input(made, features, elements, Policy(), tokens)
    assert set(torch.nonzero(credits)[:, 1].tolist()) == {2}


# dense against sparse -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mass", ["share", "set"])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False),
        nn.Conv2d(4, 4, (3, 2), padding=(2, 1), groups=4),
        nn.Conv2d(4, 3, 2, stride=3, dilation=2),
        nn.Conv2d(4, 6, 1),
        nn.Conv2d(4, 6, 1, stride=2),
        nn.Conv2d(4, 6, 1, stride=(3, 1)),
        nn.Conv1d(4, 3, 1, stride=2),
        nn.Conv2d(4, 3, 3, padding="same", dilation=2),
        nn.Conv1d(4, 3, 3, padding=1),
        nn.Conv3d(4, 2, 2),
        nn.Linear(5, 6),
        nn.Linear(5, 3, bias=False),
    ],
)
def test_everything_kept_is_the_same_dense_and_sparse(layer, mass):
    layer = layer.double().eval()
    shape = {nn.Conv1d: (2, 4, 7), nn.Conv3d: (2, 4, 3, 4, 3), nn.Linear: (2, 3, 5)}.get(type(layer), (2, 4, 7, 6))
    for x in (
        torch.randn(shape, dtype=torch.float64),
        torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=torch.float64).transpose(-1, -2),
    ):
        count = layer(x).numel()
        elements = torch.randperm(count)[:9]
        dense = on_input(layer, x, elements, Policy(sums=None, convolutions=None, neurons=None, mass=mass))
        sparse = on_input(
            layer, x, elements, Policy(sums=None, convolutions=10**6, linear=10**6, neurons=None, mass=mass)
        )
        for mine, other in zip(dense, sparse, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("mass", ["share", "set"])
@pytest.mark.parametrize(
    "run",
    [
        lambda x: x.tanh() + x.flip(2),
        lambda x: torch.sub(x, x.flip(1), alpha=0.3),
        lambda x: torch.rsub(x, x.flip(1), alpha=-2),
        lambda x: x.add_(x.flip(3)) - 1,
        lambda x: 1 - x,
        lambda x: x.transpose(2, 3) + x[:, :, :6, :6].transpose(2, 3),
        lambda x: x + x[:, :1].flip(2),
        lambda x: x.relu() + x.clamp_max(-1).relu(),
        lambda x: F.pad(x.tanh(), (1, 2, 0, 3)),
        lambda x: F.pad(x.transpose(2, 3), (2, -1, -2, 1, 1, 0)),
        lambda x: F.pad(x.tanh(), (1, 2, 0, 1), mode="reflect"),
        lambda x: F.avg_pool2d(x.tanh(), 3, 2, 1),
        lambda x: F.avg_pool2d(x.transpose(2, 3), (2, 3), ceil_mode=True),
        lambda x: F.avg_pool2d(x[0].relu(), 2, 1),
        lambda x: torch.cat([x, torch.ones(2, 1, 6, 6).double(), x.tanh(), x[:, 1:3]], 1),
        lambda x: torch.cat([x.transpose(0, 1), torch.zeros(0).double(), x.transpose(0, 1)]),
    ],
    ids=[
        *("add", "sub", "rsub", "in place", "from one", "strided", "broadcast", "no agreement", "pad", "cut"),
        *("reflect", "average", "average to the edge", "average of one", "cat", "cat with nothing"),
    ],
)
def test_full_tables_are_the_same_as_neuron_by_neuron(run, mass):
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    elements = torch.randperm(run(x.clone()).numel())[:60]
    few = Policy(sums=None, convolutions=None, neurons=10**6, mass=mass)  # a budget, so that tables are sparse
    tables = on_input(run, x, elements, Policy(sums=None, convolutions=None, neurons=None, mass=mass))
    for whole, sparse in zip(tables, on_input(run, x, elements, few), strict=True):
        torch.testing.assert_close(whole, sparse, atol=1e-12, rtol=1e-9)


def test_full_tables_on_deep_maps_hold_what_everything_kept_holds_there():
    """And nearer to the image, where maps are larger, only few are kept."""
    network = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.Tanh()),
        *(nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)),
    )
    network = network.double().eval()
    with Trace(network) as trace:
        x = torch.rand(1, 3, 12, 12, dtype=torch.float64)
        image = trace.slot(trace.watch("image", x))
        target = trace.slot(network(x))
    cuts = {name: trace.module_outputs[name] for name in ("6", "3", "0")}  # 9, 36 and 144 positions
    policies = {
        "few": Policy(sums=2, convolutions=2, neurons=10),
        "deep": Policy(sums=2, convolutions=2, neurons=10, full=9),
        "all deep": Policy(sums=2, convolutions=2, neurons=10, full=10**6),
        "all": Policy(sums=None, convolutions=None, neurons=None),
    }
    accounts = {k: walk(trace, [(target, start(target, range(5)))], p, cuts=cuts) for k, p in policies.items()}

    def at(name, cut):
        return accounts[name].cuts[cut].dense(5, cuts[cut].numel)

    torch.testing.assert_close(at("deep", "6"), at("all", "6"))
    assert not torch.allclose(at("few", "6"), at("all", "6"))
    assert (at("deep", "0") > 0).sum(1).max() <= 20 < (at("all", "0") > 0).sum(1).min()
    everything = accounts["all"].at(image).dense(5, image.numel)
    torch.testing.assert_close(accounts["all deep"].at(image).dense(5, image.numel), everything)
    torch.testing.assert_close(accounts["deep"].total(), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3, padding=1), nn.Linear(5, 6)])
def test_layers_without_a_batch_dimension(layer):
    layer = layer.double().eval()
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    for policy in FOLLOWED.values():
        alone = on_input(layer, x, [1, 7], policy)
        batched = on_input(lambda x: layer(x[None])[0], x, [1, 7], policy)
        for mine, other in zip(alone, batched, strict=True):
            torch.testing.assert_close(mine, other)


# the feature map ----------------------------------------------------------------------------------------------------


def feature_map(network, *inputs):
    with Trace(network) as trace:
        image = trace.slot(trace.watch("image", inputs[0]))
        if len(inputs) > 1:
            trace.watch("tokens", inputs[1])
        target = trace.slot(network(*inputs))
    return trace, find_feature_map(trace, image, target)


def test_feature_map_of_a_residual_network_is_its_last_stage():
    network = torchvision.models.resnet18(num_classes=4).eval()
    trace, found = feature_map(network, torch.randn(1, 3, 64, 64))
    assert found.value is trace.module_outputs["layer4"].value
    assert found.shape == (1, 512, 2, 2)


def test_feature_map_of_a_plain_network_is_what_its_classifier_reads():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(True),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 3),
    ).eval()
    trace, found = feature_map(network, torch.randn(1, 3, 18, 18))
    assert found.value is trace.module_outputs["6"].value


@pytest.mark.parametrize("kind", ["attend", "sequence"])
def test_feature_map_of_a_captioner_is_what_its_decoder_reads(kind):
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    head = (
        Attend((4, 4, 4), False, "lstm", True)
        if kind == "attend"
        else Sequence_((4, 4, 4), False, "lstm", 1, True, False, False)
    )
    network = Captioning(encoder, head).eval()
    trace, found = feature_map(network, torch.randn(1, 3, 8, 8), torch.tensor([[0, 1, 2]]))
    assert found.value is trace.module_outputs["encoder"].value


def test_a_network_without_positions_has_no_feature_map():
    assert feature_map(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).eval(), torch.randn(1, 6))[1] is None


# operations without a rule, and rules of one's own ------------------------------------------------------------------


class Strange(nn.Module):
    def forward(self, x):
        return torch.cumprod(x, 1)


class Complex(nn.Module):
    def forward(self, x):
        return torch.fft.fft(x).real


def test_an_operation_without_a_rule_is_named_with_its_place_and_the_remedy():
    network = nn.Sequential()
    network.add_module("first", nn.Linear(4, 4))
    network.add_module("odd", Strange())
    network.add_module("last", nn.Linear(4, 2))
    network.eval()
    with Trace(network) as trace:
        target = trace.slot(network(trace.watch("x", torch.randn(1, 4))))
    with pytest.raises(UnsupportedOperation) as raised:
        walk(trace, [(target, start(target, [0]))], Policy())
    text = str(raised.value)
    assert "aten::cumprod in odd" in text
    assert "@captionfix.unravel.register('cumprod')" in text


def test_reading_memory_as_another_type_is_refused():
    network = nn.Sequential(nn.Linear(4, 4), Complex(), nn.Linear(4, 2)).eval()
    with pytest.raises(UnsupportedOperation, match=r"view_as_real in 1.*register"), Trace(network) as trace:
        network(trace.watch("x", torch.randn(1, 4)))
    with Trace(network):  # of no interest where it depends on no input
        network(torch.randn(1, 4))


@pytest.fixture
def doubled():
    """An operation of somebody else's library."""
    with torch.library._scoped_library("captionfix_test", "FRAGMENT") as library:
        library.define("doubled(Tensor x) -> Tensor")
        library.impl("doubled", lambda x: x * 2, "CPU")
        yield torch.ops.captionfix_test.doubled
    name = next((n for n in RULES if "doubled" in n), None)
    if name is not None:
        del RULES[name]
    find.cache_clear()


def test_a_rule_of_one_s_own(doubled):
    def run(x):
        return doubled(F.relu(x))

    x = torch.tensor([[1.0, 2.0, 3.0]])
    with pytest.raises(UnsupportedOperation, match="doubled") as raised:
        on_input(run, x, [1], Policy())
    name = str(raised.value).split("register(")[1].split(")")[0].strip("'\"")  # as the message says

    @register(name)
    def rule(op, output, neurons, direction, policy):
        return [Link(op.args[0], neurons[:, None], torch.ones(len(neurons), 1), direction[:, None])]

    mass, share = on_input(run, x, [1], Policy())
    assert mass.tolist() == [[0.0, 1.0, 0.0]]
    assert share.tolist() == [1.0]
