"""Invariants 5 and 6: recording changes nothing, and the record is what ran."""

from __future__ import annotations

import gc
import weakref
from itertools import product

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import FOLLOWED, captioner
from test_conservation import record
from torch import nn
from torch.nn.modules import module as hooks

from captionfix.unravel import Policy, Slot, Trace, Value, start, walk
from captionfix.unravel.registry import find


def hook_counts() -> tuple[int, int]:
    return len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)


def built(make) -> nn.Module:
    """A network with PyTorch's quick initial weights; the models' own initialisation takes seconds."""
    with torch.device("meta"):
        network = make()
    network.to_empty(device="cpu")
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return network.eval()


def small_vgg():
    network = torchvision.models.vgg11(init_weights=False)
    network.classifier = nn.Sequential(nn.Linear(25088, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 10))
    return network


def transformers_model(kind: str):
    import transformers

    if kind == "resnet":
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="bottleneck", num_labels=5
        )
        return transformers.ResNetForImageClassification(config)
    return transformers.MobileNetV2ForImageClassification(
        transformers.MobileNetV2Config(depth_multiplier=0.25, image_size=64, num_labels=5)
    )


NETWORKS = {
    "vgg11": (lambda: built(small_vgg), 64),
    "resnet18": (lambda: built(lambda: torchvision.models.resnet18(num_classes=10)), 64),
    "mobilenet_v2": (lambda: built(lambda: torchvision.models.mobilenet_v2(num_classes=10)), 64),
    "mobilenet_v3_small": (lambda: built(lambda: torchvision.models.mobilenet_v3_small(num_classes=10)), 64),
    "shufflenet": (lambda: built(lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10)), 64),
    "densenet": (lambda: built(lambda: torchvision.models.DenseNet(8, (2, 2, 2), 16, num_classes=10)), 64),
    "googlenet": (lambda: built(lambda: torchvision.models.googlenet(init_weights=False, num_classes=10)), 64),
    "inception_v3": (lambda: built(lambda: torchvision.models.inception_v3(init_weights=False, num_classes=10)), 75),
    "transformers resnet": (lambda: transformers_model("resnet").eval(), 64),
    "transformers mobilenet_v2": (lambda: transformers_model("mobilenet").eval(), 64),
}


def replay(trace: Trace) -> int:
    """Runs every recorded operation again on what the record holds of its inputs, and compares; how many
    could be run. One that cannot has a rule that does not look, and inputs that were overwritten."""
    done = 0
    for operation in trace.operations:
        if any(slot.value.base is None for slot in operation.inputs()):
            # then nobody who was recorded may want to read it
            assert not any(slot.value.base is None and slot.value.read_later for slot in operation.inputs()), str(
                operation
            )
            continue
        writes = (
            operation.func._schema.is_mutable
        )  # on a copy, then; else on the very same memory, so that the same kernel runs
        with torch.inference_mode():
            again = operation.call(lambda slot, writes=writes: slot.read().clone() if writes else slot.read())
        again = again if isinstance(again, (tuple, list)) else (again,)
        for slot, tensor in zip(operation.outputs, again, strict=True):
            if slot is not None and slot.value.base is not None:
                # a weight read back asks for no gradient; matmul chooses its kernel by that: equal but for the last bit
                torch.testing.assert_close(
                    slot.read(), tensor, atol=1e-6, rtol=1e-5, msg=lambda m, operation=operation: f"{operation}: {m}"
                )
                done += 1
    return done


@pytest.mark.parametrize("name", NETWORKS)
def test_recording_a_known_network_changes_nothing(name):
    make, size = NETWORKS[name]
    network, x = make(), torch.randn(1, 3, size, size)
    with torch.inference_mode():
        plain = network(x.clone())
    before = hook_counts()
    with Trace(network, keep=True) as trace:
        image = trace.slot(trace.watch("image", x))
        traced = network(x)
        plain, traced = (o if isinstance(o, torch.Tensor) else o[0] for o in (plain, traced))
        target = trace.slot(traced)
    assert torch.equal(plain, traced)
    assert hook_counts() == before
    assert replay(trace) >= 7
    # and its rules account for everything
    for policy in (Policy(), Policy(sums=2, convolutions=1, neurons=20, opposed="input")):
        account = walk(trace, [(target, start(target, [0, 3]))], policy)
        torch.testing.assert_close(account.total(), torch.ones(2), atol=1e-4, rtol=0)
    assert float(account.share(image).min()) > 0.1


@settings(settings.get_profile("engine"), max_examples=20)
@given(st.data())
def test_recording_a_random_captioner_changes_nothing_and_replays(data):
    network, pixels, tokens = captioner(lambda options: data.draw(st.sampled_from(options)))
    state = {k: v.clone() for k, v in network.state_dict().items()}
    with torch.inference_mode():
        plain = network(pixels.clone(), tokens.clone())
    given_pixels = pixels.clone()
    with Trace(network, keep=True) as trace:
        trace.watch("image", pixels)
        trace.watch("tokens", tokens)
        traced = network(pixels, tokens)
        target = trace.slot(traced)
    assert torch.equal(plain, traced)
    assert torch.equal(target.read(), traced)
    assert replay(trace) > 0
    walk(trace, [(target, start(target, [0]))], FOLLOWED["marginal"])
    with torch.inference_mode():  # nor does walking
        assert torch.equal(network(given_pixels, tokens), plain)
    assert not network.training
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert all(p.grad is None for p in network.parameters())


class Written(nn.Module):
    """One network, written twice: in place, with one reused ReLU and views, or in functions."""

    def __init__(self, inplace: bool):
        super().__init__()
        torch.manual_seed(1)
        self.inplace = inplace
        self.a, self.b, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.c, self.head, self.relu = nn.Conv2d(6, 6, 1), nn.Linear(6, 4), nn.ReLU(inplace=inplace)

    def forward(self, x):
        if self.inplace:
            x = self.relu(self.a(x))
            y = self.norm(self.b(x))
            y += x  # the rule of the sum reads x and y, both overwritten later
            self.relu(y)
            y.mul_(torch.sigmoid(self.c(y)))
            y[:, :3].neg_()
            y[:, 1:2] = y[:, 4:5] + y[:, 5:6]
            y.sub_(0.1).clamp_(-1, 1)
            out = torch.empty(len(y), 4, dtype=y.dtype)
            pooled = y.mean((2, 3))
            for i in range(len(y)):
                out[i] = self.head(pooled[i])
            return out
        x = F.relu(self.a(x))
        y = F.relu(self.norm(self.b(x)) + x)
        y = y * torch.sigmoid(self.c(y))
        y = torch.cat([-y[:, :3], y[:, 3:]], 1)
        y = torch.cat([y[:, :1], y[:, 4:5] + y[:, 5:6], y[:, 2:]], 1)
        y = torch.clamp(y - 0.1, -1, 1)
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("name", FOLLOWED)
def test_in_place_and_functional_networks_have_the_same_evidence(name):
    x, tables = torch.randn(2, 3, 7, 6, dtype=torch.float64), []
    for inplace, keep in product((True, False), (True, False)):  # and whether it keeps what no rule reads
        network = Written(inplace).double().eval()
        with Trace(network, keep) as trace:
            image = trace.slot(trace.watch("image", x.clone()))
            target = trace.slot(network(image.value.base))
        assert replay(trace) > (5 if keep else 0)
        account = walk(trace, [(target, start(target, [0, 2, 5]))], FOLLOWED[name])
        torch.testing.assert_close(account.total(), torch.ones(3, dtype=torch.float64))
        tables.append((target.read(), account.at(image).dense(3, x.numel()), account.bias))
    assert float(tables[0][1].sum()) > 0.5
    for each in tables[1:]:
        for mine, other in zip(tables[0], each, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-9)


def test_an_overwritten_input_keeps_its_own_evidence():
    """Normalising the picture in place, and reading a tensor again after writing to it."""
    x = torch.rand(1, 1, 4, 4)
    original = x.clone()
    with Trace() as trace:
        image = trace.slot(trace.watch("image", x))
        x.sub_(0.5).div_(0.25)
        first = x.sum()
        x[0, 0, 0] = 0.0
        second = x.sum() + 0 * first
        at = trace.slot(second)
    # the sums read what x held at the time; the picture itself need not be kept, since no rule reads it
    held = [op.args[0].read() for op in trace.operations if op.name == "sum"]
    torch.testing.assert_close(held[0], (original - 0.5) / 0.25)
    assert float(held[1][0, 0, 0].abs().sum()) == 0
    assert image.value is trace.watched["image"].value
    account = walk(trace, [(at, start(at, [0]))], Policy(sums=None))
    found = account.at(image).dense(1, 16)
    assert float(found[0, :4].sum()) == 0  # overwritten before the second sum
    torch.testing.assert_close(account.total(), torch.ones(1))


def test_state_that_is_not_an_input_may_be_changed_in_place():
    """A buffer of constants that was used already and is written to again depends on nothing."""
    x, mask = torch.rand(1, 4) + 0.5, torch.ones(1, 4)
    with Trace() as trace:
        image = trace.slot(trace.watch("image", x))
        y = x + mask
        mask += 1
        z = torch.cat([y, mask], 1).mul(torch.ones(1, 8)) + 0
        h = torch.lstm_cell(z, (mask, mask), torch.ones(16, 8), torch.ones(16, 4))[0]
        at = trace.slot(h)
    account = walk(trace, [(at, start(at, [0]))], Policy())
    torch.testing.assert_close(account.total(), torch.ones(1))
    assert 0 < float(account.share(image)) < 1


def test_hooks_are_removed_after_an_error_and_the_next_trace_is_sound():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(self.first(x))  # shapes do not fit

    network, before = Breaks().eval(), hook_counts()
    trace = Trace(network)
    with pytest.raises(RuntimeError, match="shapes"), trace:
        network(trace.watch("x", torch.randn(2, 3)))
    assert hook_counts() == before
    assert not torch.is_inference_mode_enabled()
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    network.second = nn.Linear(3, 3)
    with Trace(network) as trace:
        y = network(trace.watch("x", torch.randn(2, 3)))
    assert [(op.name, op.module) for op in trace.operations] == [("linear", "first"), ("linear", "second")]
    assert trace.module_outputs[""].value is trace.slot(y).value


def test_an_error_that_the_network_catches_leaves_later_names_right():
    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.bad, self.good = nn.Linear(9, 3), nn.Linear(3, 3)

        def forward(self, x):
            try:
                x = self.bad(x)
            except RuntimeError:
                x = self.good(x)
            return x * 2

    network = Tries().eval()
    with Trace(network) as trace:
        network(trace.watch("x", torch.randn(2, 3)))
    assert [(op.name, op.module) for op in trace.operations] == [("linear", "good"), ("mul", "")]


def test_training_mode_parameters_and_inference_state_are_untouched():
    network = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).eval()
    with Trace(network) as trace:
        assert torch.is_inference_mode_enabled()
        network(trace.watch("x", torch.randn(2, 3)))
    assert not torch.is_inference_mode_enabled()
    y = network(torch.randn(2, 3))  # still trains
    y.sum().backward()
    assert network[0].weight.grad is not None


# slots --------------------------------------------------------------------------------------------------------------


def view(base, pick):
    """A random view that shows no cell twice."""
    x = base
    for _ in range(pick(range(5))):
        kind = pick(["transpose", "slice", "select", "unsqueeze", "split", "flip"])
        if kind == "transpose" and x.dim() > 1:
            a, b = pick(range(x.dim())), pick(range(x.dim()))
            x = x.transpose(a, b)
        elif kind == "slice" and x.dim():
            axis = pick(range(x.dim()))
            first = pick(range(x.shape[axis]))
            x = x[(slice(None),) * axis + (slice(first, None, pick([1, 2, 3])),)]
        elif kind == "select" and x.dim() > 1:
            axis = pick(range(x.dim()))
            x = x.select(axis, pick(range(x.shape[axis])))
        elif kind == "unsqueeze":
            x = x.unsqueeze(pick(range(x.dim() + 1)))
        elif kind == "split" and x.dim() and x.shape[-1] % 2 == 0:
            x = x.unflatten(-1, (2, x.shape[-1] // 2))
    return x


@settings(settings.get_profile("engine"), max_examples=100)
@given(st.data())
def test_cells_and_elements_are_inverse_for_any_view(data):
    def pick(options):
        return data.draw(st.sampled_from(options))

    base = torch.arange(pick([24, 60, 36])).view(pick([(2, -1), (3, 4, -1), (-1, 6)])).clone()
    x = view(base, pick)
    slot = Slot(Value(0, base, None, None, True), tuple(x.shape), x.stride(), x.storage_offset())
    elements = torch.arange(x.numel())
    cells = slot.cells(elements)
    # the base holds its own cell numbers, so a view's contents are its cells
    assert torch.equal(cells, x.reshape(-1))
    assert torch.equal(slot.read(), x)
    assert torch.equal(slot.take(elements.flip(0)), x.reshape(-1).flip(0))
    assert torch.equal(slot.elements(cells), elements)
    every = torch.arange(base.numel())
    back = slot.elements(every)
    assert torch.equal(back >= 0, torch.isin(every, cells))
    assert torch.equal(slot.cells(back[back >= 0]), every[back >= 0])


def test_a_broadcast_view_can_be_read_and_walked():
    slot_base = torch.randn(3, 1)
    with Trace() as trace:
        image = trace.slot(trace.watch("x", slot_base))
        y = slot_base.expand(3, 5)
        z = (y * torch.ones(3, 5)).sum(1)
        at = trace.slot(z)
    assert trace.slot(y).value is image.value
    account = walk(trace, [(at, start(at, [0, 2], 1.0))], Policy(sums=None, opposed="input"))
    torch.testing.assert_close(account.at(image).dense(2, 3), torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]))


def test_every_operation_of_known_networks_has_a_rule():
    seen = set()
    for name in ("mobilenet_v3_small", "shufflenet", "densenet"):
        make, size = NETWORKS[name]
        network = make()
        with Trace(network) as trace:
            network(trace.watch("image", torch.randn(1, 3, size, size)))
        seen.update((op.name, find(op.func) is not None) for op in trace.operations)
    assert all(known for _, known in seen), seen


def test_only_what_a_rule_reads_is_held():
    """A convolution's input is read; what a batch norm and a ReLU pass on between is not, and goes as it would
    unrecorded."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(1, 3, 16, 16)
    with Trace(network) as trace:
        trace.watch("image", x)
        logits = network(x)
        trace.slot(logits)
    conv, norm, relu, last = (op.outputs[0] for op in trace.operations)
    assert [slot.value.base is None for slot in (conv, norm, relu, last)] == [True, True, False, False]
    assert conv.value.reserved.expired()
    assert norm.value.reserved.expired()
    with pytest.raises(RuntimeError, match="reads=False"):
        norm.read()


def test_what_a_pass_held_goes_with_its_trace():
    network, pixels, tokens = captioner(lambda options: options[0])
    gc.collect()
    gc.disable()  # memory must not wait until circles of references are looked for
    try:
        trace, _, _, _, logits = record(network, pixels, tokens)
        walk(trace, [(logits, start(logits, [0, 1]))], FOLLOWED["default"])
        held = [weakref.ref(operation) for operation in trace.operations]
        assert len(held) > 5
        del trace, logits, _
        assert [made() for made in held] == [None] * len(held)
    finally:
        gc.enable()
