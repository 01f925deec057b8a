"""Pointwise functions and per-channel affine maps: the same position; the direction turns where the function falls."""

from __future__ import annotations

import torch
from torch import Tensor

from ..policy import Policy
from ..registry import Link, register
from ..trace import Operation, Slot
from .common import broadcast, coordinates, same, sign


@register(
    "relu",
    "relu6",
    "hardtanh",
    "leaky_relu",
    "elu",
    "selu",
    "celu",
    "softplus",
    "tanh",
    "sigmoid",
    "hardsigmoid",
    "clamp",
    "clamp_min",
    "clamp_max",
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "log_softmax",
    "_log_softmax",
    "exp",
    "log",
    "log1p",
    "expm1",
    "sqrt",
    "softmax",
    "_softmax",
    "log_sigmoid",
    "positive",
    "threshold",
    "log2",
    "log10",
    "exp2",
    "round",
    "floor",
    "ceil",
    "trunc",
    "sign",
    "nan_to_num",
    "hardshrink",
    "softshrink",
    "sinh",
    "asinh",
    "asin",
    "erf",
    "erfinv",
    "logit",
    "atan",
    "softsign",
    "_to_copy",
    "to",
    "_convert_element_type",
    reads=False,
    pointwise=True,
)
def rising(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    """Functions that never fall. A softmax rises with its own input; what it does to the others is its denominator's
    business.
    """
    return same(_signal(op), neurons, direction)


@register("neg", "reciprocal", "rsqrt", reads=False, pointwise=True)
def falling(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    return same(_signal(op), neurons, -direction)


# where the derivative of a function that first falls and then rises changes its sign
_TURNS = {
    "gelu": -0.7517916243494656,
    "silu": -1.2784645427610738,
    "mish": -1.1924312105,
    "hardswish": -1.5,
    "abs": 0.0,
    "square": 0.0,
}


@register(*_TURNS, pointwise=True)
def turning(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    slot = _signal(op)
    values = slot.take(neurons)
    return same(slot, neurons, torch.where(values < _TURNS[op.name], -direction, direction))


@register("pow")
def power(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    base, exponent, out = op.argument(0, "self"), op.argument(1, "exponent"), op.outputs[output]
    assert out is not None
    if not isinstance(base, Slot):  # 2 ** x
        return same(exponent, neurons, direction if base >= 1 else -direction)
    if isinstance(exponent, Slot):
        exponent = exponent.take(broadcast(neurons, out.shape, exponent.shape)).to(direction.dtype)
    elements = broadcast(neurons, out.shape, base.shape)
    slope = exponent * base.take(elements).to(direction.dtype) ** (exponent - 1)
    return same(base, elements, direction * sign(slope))


@register("prelu", "_prelu_kernel")
def prelu(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    slot, weight = _signal(op), op.argument(1, "weight").read().reshape(-1)
    values = slot.take(neurons)
    channel = coordinates(neurons, slot.shape)[1] % len(weight)
    return same(slot, neurons, torch.where(values < 0, direction * sign(weight[channel]), direction))


@register(
    "batch_norm",
    "instance_norm",
    "native_batch_norm",
    "_native_batch_norm_legit_no_training",
    reads=(1,),
    pointwise=True,
)
def batch_norm(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    return _affine(op, 1, neurons, direction, channel_axis=1)


@register("layer_norm", reads=(2,), pointwise=True)
def layer_norm(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    """Its statistics are constants."""
    slot, weight = _signal(op), op.argument(2, "weight")
    if weight is None:
        return same(slot, neurons, direction)
    return same(slot, neurons, direction * sign(weight.read().reshape(-1))[neurons % weight.numel])


@register("group_norm", reads=(2,), pointwise=True)
def group_norm(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    """Its statistics are constants."""
    return _affine(op, 2, neurons, direction, channel_axis=1)


def _affine(op: Operation, position: int, neurons: Tensor, direction: Tensor, channel_axis: int) -> list[Link]:
    slot, weight = _signal(op), op.argument(position, "weight")
    if weight is not None and float(weight.read().min()) < 0:
        channel = coordinates(neurons, slot.shape)[channel_axis]
        direction = direction * sign(weight.read())[channel]
    return same(slot, neurons, direction)


@register("mul", "div", "true_divide")
def product(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    """A gate or a constant is a constant factor, and a divisor is one too; of two signals each gets half, since a
    relative change of either changes the product alike."""
    out = op.outputs[output]
    assert out is not None
    operands = [op.argument(0, "self"), op.argument(1, "other")]
    values = [a.take(broadcast(neurons, out.shape, a.shape)) if isinstance(a, Slot) else a for a in operands]
    signals = [i for i, a in enumerate(operands) if isinstance(a, Slot) and a.value.variable]
    if op.name != "mul" and 0 in signals:
        signals = [0]
    if len(signals) == 2 and sum(is_gate(operands[i]) for i in signals) == 1:
        signals = [i for i in signals if not is_gate(operands[i])]
    links = []
    for i in signals:
        other = values[1 - i]
        factor = sign(other if isinstance(other, Tensor) else torch.tensor(float(other), device=direction.device)).to(
            direction.dtype
        )
        turned = direction * factor * (-1 if op.name != "mul" and i == 1 else 1)
        index = broadcast(neurons, out.shape, operands[i].shape)[:, None]
        links.append(Link(operands[i], index, torch.full_like(direction, 1 / len(signals))[:, None], turned[:, None]))
    return links


GATES = frozenset({"sigmoid", "softmax", "_softmax", "hardsigmoid"})
MASKS = frozenset(
    {"ne", "eq", "gt", "lt", "ge", "le", "logical_not", "logical_and", "logical_or", "isnan", "bitwise_not"}
)
NORMS = frozenset({"linalg_vector_norm", "norm", "frobenius_norm", "std", "rsqrt"})
CASTS = frozenset({"_to_copy", "to", "div"})


def is_gate(operand: object) -> bool:
    """Whether a tensor is the output of a squashing function to 0..1, a mask, or a statistic that normalises (as in
    global response norm, or a layer norm that is spelled out), through any number of views; divided or cast, it still
    is.
    """
    producer = operand.value.producer if isinstance(operand, Slot) else None
    if producer is None:
        return False
    return producer.name in GATES | MASKS | NORMS or (producer.name in CASTS and is_gate(producer.args[0]))


def _signal(op: Operation) -> Slot:
    slot = op.argument(0, "self", op.kwargs.get("input"))
    assert isinstance(slot, Slot)
    return slot
