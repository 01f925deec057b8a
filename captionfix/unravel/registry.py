"""Which rule belongs to which operation.

A rule says, for one operation, which inputs each of its output neurons depends on. It is a function

    rule(operation, output, neurons, direction, policy) -> list[Link]

where ``neurons`` (D,) are row-major numbers of distinct elements of the operation's output number ``output`` and
``direction`` (D,) is +1 or -1. What the links' shares leave of 1 goes to the bias. An *expansion* replaces a whole
operation (an LSTM over a sequence)
by the equations it stands for: it is a function of the operation's tensors that is run under a trace of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Link(NamedTuple):
    """From each of D neurons to k elements of one input.

    ``element`` (D, k) are row-major element numbers of ``slot``; ``share`` (D, k) >= 0 is the part of the neuron's mass
    that goes there; ``direction`` (D, k) or (D, 1) is +1 or -1.
    """

    slot: Any
    element: Tensor
    share: Tensor
    direction: Tensor


@dataclass(frozen=True)
class Rule:
    """A registered rule.

    Attributes:
        reads: whether it looks at its inputs' contents, which are then held and survive in-place writes; or the
            positions of the arguments that it looks at (keyword arguments always).
        expansion: the equations that are walked instead of the operation, where there is no function.
        equations: the equations that are walked instead of the function where everything is kept.
        tables: says the same of full tables, all neurons at once, where it can (see `register_tables`).
        pointwise: whether it gives one link with k = 1 that takes distinct neurons to distinct elements, all mass with
            them; or a function that says so of an operation.
        alike: whether the rule says the same of an element whichever output it is of, so that evidence on all outputs
            is followed together.
    """

    function: Callable[..., list[Link]] | None
    expansion: Callable[..., Any] | None = None
    reads: bool | frozenset[int] = True
    pointwise: bool | Callable[[Any], bool] = False
    equations: Callable[..., Any] | None = None
    tables: Tables | None = None
    alike: bool = False

    def is_pointwise(self, operation: Any) -> bool:
        """Whether this operation hands each neuron's mass to one element of its own."""
        return self.pointwise if isinstance(self.pointwise, bool) else self.pointwise(operation)


Tables = Callable[[Any, int, Tensor, int, Any], "list[tuple[Any, int, Tensor]] | None"]
"""(operation, output, (words, elements) mass, its direction, policy) -> for each input that gets some the slot, the
direction there and (words, elements) mass on all of its elements; None where the rule must be asked after all."""

RULES: dict[str, Rule] = {}


def register(
    *names: str,
    reads: bool | Iterable[int] = True,
    pointwise: bool | Callable[[Any], bool] = False,
    alike: bool = False,
) -> Callable[[Callable[..., list[Link]]], Callable[..., list[Link]]]:
    """Registers a rule for operations by the name they have in ``torch.ops.aten``, as ``"conv2d"``.

    An in-place form (``relu_``) and every overload follow the same rule. ``reads=False`` promises that the rule does
    not look at its inputs' contents, ``reads=(1,)`` that it looks at those of argument 1 (and of keyword arguments)
    only; ``pointwise=True`` (or a function of the operation that says so), that it gives one link with k = 1, taking
    distinct neurons to distinct elements; ``alike=True``, that it does not look at which output is meant.
    """

    looked = reads if isinstance(reads, bool) else frozenset(reads)

    def decorate(function: Callable[..., list[Link]]) -> Callable[..., list[Link]]:
        for name in names:
            RULES[name] = Rule(function, reads=looked, pointwise=pointwise, alike=alike)
        find.cache_clear()
        return function

    return decorate


def register_expansion(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the equations that an operation stands for: a function of its arguments, tensors given."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            RULES[name] = Rule(None, expansion=function)
        find.cache_clear()
        return function

    return decorate


def register_equations(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers, for operations that have a rule, the equations to walk instead where everything is kept: a function as
    for `register_expansion`. The rule and the equations must say the same.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            RULES[name] = replace(RULES[name], equations=function)
        find.cache_clear()
        return function

    return decorate


def register_tables(*names: str) -> Callable[[Tables], Tables]:
    """Registers, for operations that have a rule, a function that moves full tables without looking up each neuron. It
    must say the same as the rule; mass that it hands to no input is the bias's.
    """

    def decorate(function: Tables) -> Tables:
        for name in names:
            RULES[name] = replace(RULES[name], tables=function)
        find.cache_clear()
        return function

    return decorate


@cache
def op_name(func: Any) -> str:
    """``aten.add_.Tensor`` -> ``"add"``; ``aten.lstm.input`` -> ``"lstm"``."""
    name = str(func._schema.name).removeprefix("aten::")
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
    return name[:-1] if writes and name.endswith("_") and not name.endswith("__") else name


@cache
def find(func: Any) -> Rule | None:
    """The rule of an operation, or None."""
    # an overload may have a rule of its own: lstm over packed data takes other arguments than lstm over padded
    return RULES.get(f"{op_name(func)}.{func._overloadname}") or RULES.get(op_name(func))


@cache
def is_composite(func: Any) -> bool:
    """Whether PyTorch defines the operation through others."""
    return bool(func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd))
