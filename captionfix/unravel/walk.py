"""Walks a trace backwards: from targets to the leaves, and to any cut on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as default
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedOperation
from . import kernels
from .dense import DENSE, Field, Fields, move, to_evidence, to_field
from .evidence import Evidence, settle
from .policy import Policy
from .registry import RULES, Link, Rule, find
from .rules.gradient import gradient
from .trace import Operation, Slot, Trace, Value


@dataclass
class Account:
    """Where the evidence of each word ended.

    Attributes:
        words: how many words were explained.
        bias: (words,) mass that no input agreed with.
        cuts: evidence at each cut asked for, by its name; elements of the cut's tensor.
    """

    words: int
    bias: Tensor
    cuts: dict[str, Evidence] = default(default_factory=dict)
    _leaves: dict[Value, Evidence] = default(default_factory=dict)

    def at(self, slot: Slot) -> Evidence:
        """Evidence that ended in a leaf; elements of the slot's tensor. Empty where none did."""
        found = self._leaves.get(slot.value)
        if found is None:
            nothing = torch.empty(0, dtype=torch.long, device=self.bias.device)
            return Evidence(nothing, nothing, self.bias.new_empty(0), self.bias.new_empty(0))
        return found.at(slot.elements(found.element))

    def share(self, slot: Slot) -> Tensor:
        """(words,) mass that ended in a leaf."""
        return self.at(slot).per_word(self.words)

    def rest(self, known: Iterable[Slot]) -> Tensor:
        """(words,) mass on leaves other than the ``known``: initial states, constants."""
        values = {slot.value for slot in known}
        total = torch.zeros_like(self.bias)
        for value, evidence in self._leaves.items():
            if value not in values:
                total += evidence.per_word(self.words)
        return total

    def total(self) -> Tensor:
        """(words,) mass over all leaves and the bias: 1 for every word, if nothing was stopped at a cut."""
        return self.rest(()) + self.bias


def start(slot: Slot, elements: Sequence[int] | Tensor, direction: float = 1.0) -> Evidence:
    """Mass 1 for each word on one element of a tensor, as on its own logit."""
    device = slot.value.device
    element = torch.as_tensor(elements, dtype=torch.long, device=device)
    ones = torch.ones(len(element), device=device, dtype=slot.value.dtype)
    return Evidence(torch.arange(len(element), device=device), element, ones * direction, ones)


@torch.inference_mode()
def walk(
    trace: Trace,
    targets: Sequence[tuple[Slot, Evidence]],
    policy: Policy,
    words: int | None = None,
    cuts: Mapping[str, Slot] | None = None,
    stop: bool = False,
) -> Account:
    """Unravels evidence on ``targets`` back to the leaves.

    Args:
        trace: the recorded pass.
        targets: where evidence starts: tensors of the pass, each with evidence on its elements.
        policy: what is kept.
        words: how many words there are; the highest word number plus one where it is not said.
        cuts: tensors on the way whose evidence is wanted too.
        stop: evidence that reaches a cut stays there.

    Raises:
        UnsupportedOperation: evidence reached an operation that has no rule.
    """
    if words is None:
        words = max((int(e.word.max()) + 1 for _, e in targets if len(e)), default=0)
    reference = targets[0][1].mass
    account = Account(words, reference.new_zeros(words))
    pending: dict[Value, list[Evidence]] = {}
    for slot, evidence in targets:
        pending.setdefault(slot.value, []).append(evidence.at(slot.cells(evidence.element)))
    wanted: dict[Value, list[tuple[str, Slot]]] = {}
    for name, slot in (cuts or {}).items():
        wanted.setdefault(slot.value, []).append((name, slot))
    tables = policy.everything or (policy.neurons is None and _small(trace))
    first = 0 if tables else _first_full(trace.operations, targets, policy.full)
    operations = trace.operations
    if first < len(operations):
        fields = Fields(words, reference)
        for slot, evidence in targets:
            fields.add_field(slot, to_field(evidence, words, slot.numel))
        _walk_dense(operations[first:], fields, account, policy if tables else policy.unlimited, wanted, stop)
        pending = {value: [to_evidence(field)] for value, field in fields.waiting.items()}
    _walk(operations[:first], pending, account, policy, wanted, stop)
    for value, parts in pending.items():
        evidence = settle(parts, words)
        stopped = _cut(value, evidence, account, wanted)
        if not (stop and stopped):
            account._leaves[value] = evidence
    return account


def _first_full(operations: Sequence[Operation], targets: Sequence[tuple[Slot, Evidence]], full: int) -> int:
    """The first operation after the last one that evidence reaches at a map of more than ``full`` positions.

    Maps are what lies before the last convolution or pooling with height and width (``conv2d``, ``max_pool2d``): a
    decoder's tables of (batch, steps, vocabulary) or (batch, heads, steps, positions) have as many numbers in their
    last two dimensions, and those grow with the caption.
    """
    reached = {slot.value for slot, _ in targets}
    if not full:
        return len(operations)
    maps = False
    for number in range(len(operations) - 1, -1, -1):
        operation = operations[number]
        written = [slot for slot in operation.outputs if slot is not None and slot.value in reached]
        if not written:
            continue
        maps = maps or "2d" in operation.name
        # height and width come last, with a batch dimension or without
        if maps and any(len(slot.shape) > 2 and math.prod(slot.shape[-2:]) > full for slot in written):
            return number + 1
        reached.update(slot.value for slot in operation.inputs())
    return 0


def _small(trace: Trace) -> bool:
    """Whether full tables cost little. Without a budget of neurons they then beat sparse ones, which fill up in a
    decoder.
    """
    numbers = (slot.numel for operation in trace.operations for slot in operation.outputs if slot is not None)
    return max(numbers, default=0) <= 1 << 17


def _walk(
    operations: Sequence[Operation],
    pending: dict[Value, list[Evidence]],
    account: Account,
    policy: Policy,
    wanted: dict[Value, list[tuple[str, Slot]]],
    stop: bool,
) -> None:
    for operation in reversed(operations):
        arrived: dict[int, Evidence] = {}
        for number, slot in enumerate(operation.outputs):
            if slot is None or slot.value not in pending:
                continue
            if not slot.value.variable:  # a constant, though it was written to while the trace ran: a leaf
                continue
            evidence = settle(pending.pop(slot.value), account.words, policy.neurons)
            if _cut(slot.value, evidence, account, wanted) and stop:
                continue
            if not slot.covers():
                elements = slot.elements(evidence.element)
                written = elements >= 0
                if slot.value.previous is not None and not bool(written.all()):  # cells that the write did not touch
                    pending.setdefault(slot.value.previous, []).append(evidence.where(~written))
                evidence = evidence.at(elements).where(written)
            if len(evidence):
                arrived[number] = evidence
        if arrived:
            _apply(operation, arrived, pending, account, policy)
            operation.memo.clear()


def _cut(value: Value, evidence: Evidence, account: Account, wanted: dict[Value, list[tuple[str, Slot]]]) -> bool:
    for name, slot in wanted.get(value, ()):
        account.cuts[name] = evidence.at(slot.elements(evidence.element))
    return value in wanted


def _apply(
    operation: Operation,
    arrived: dict[int, Evidence],
    pending: dict[Value, list[Evidence]],
    account: Account,
    policy: Policy,
) -> None:
    rule = _rule(operation, policy)
    if rule.expansion is not None:
        inner, slots = _expanded(operation, rule.expansion)
        for number, evidence in arrived.items():
            pending.setdefault(slots[number].value, []).append(evidence.at(slots[number].cells(evidence.element)))
        _walk(inner, pending, account, policy, {}, False)
        return
    assert rule.function is not None
    if rule.alike and len(arrived) > 1:
        arrived = {min(arrived): settle([*arrived.values()], account.words)}
    for number, evidence in arrived.items():
        if operation.name in DENSE and policy.dense(operation):
            out = operation.outputs[number]
            assert out is not None
            slot, field, lost = move(operation, number, to_field(evidence, account.words, out.numel), policy)
            account.bias += lost
            part = to_evidence(field)
            pending.setdefault(slot.value, []).append(
                part.at(slot.cells(part.element))
                if not slot.repeats()
                else Evidence(part.word, slot.cells(part.element), part.direction, part.mass)
            )
            continue
        if rule.is_pointwise(operation):  # nothing to look up, and what was distinct stays so
            ((slot, index, _, direction),) = rule.function(
                operation, number, evidence.element, evidence.direction, policy
            )
            part = Evidence(
                evidence.word,
                slot.cells(index[:, 0]),
                direction[:, 0],
                evidence.mass,
                evidence.distinct and not slot.repeats(),
                evidence.most,
            )
            pending.setdefault(slot.value, []).append(part)
            continue
        # a neuron that several words reach is looked up once
        neurons, direction, which = evidence.neurons()
        links = rule.function(operation, number, neurons, direction, policy)
        _follow(links, which, evidence, pending, account)


def _follow(
    links: Sequence[Link], which: Tensor, evidence: Evidence, pending: dict[Value, list[Evidence]], account: Account
) -> None:
    moved = torch.zeros_like(evidence.mass)
    for slot, index, share, direction in links:
        if kernels.usable(evidence.mass, share):
            word, element, turned, mass = kernels.follow(
                evidence.word, which, evidence.mass, index, share, direction, moved
            )
            if len(word):
                pending.setdefault(slot.value, []).append(Evidence(word, slot.cells(element), turned, mass))
            continue
        mass = share[which] * evidence.mass[:, None]
        moved += mass.sum(1)
        row, column = torch.nonzero(mass > 0, as_tuple=True)
        if len(row) == 0:
            continue
        source = which[row]
        turned = direction[source, column] if direction.shape[1] > 1 else direction[source, 0]
        part = Evidence(evidence.word[row], slot.cells(index[source, column]), turned, mass[row, column])
        pending.setdefault(slot.value, []).append(part)
    account.bias.index_add_(0, evidence.word, (evidence.mass - moved).clamp_min(0))


def _rule(operation: Operation, policy: Policy) -> Rule:
    rule = find(operation.func)
    if rule is None and policy.fallback == "gradient":
        return Rule(gradient)
    if rule is None:
        raise UnsupportedOperation(
            f"no rule for {operation}: evidence reached it and can go no further. Register one: "
            f"@captionfix.unravel.register({operation.name!r}); the docstring of captionfix.unravel.registry says what "
            f"a rule is ({len(RULES)} operations have one). Or ask for its local gradient times its input: "
            "Policy(fallback='gradient')."
        )
    return rule


def _expanded(operation: Operation, expansion: Callable[..., Any]) -> tuple[list[Operation], list[Slot]]:
    """The equations that an operation stands for, run under a trace of their own: its operations, and where its
    outputs lie.
    """
    inner = Trace()
    for slot in operation.inputs():
        if slot.value.base is not None:
            inner._values[slot.value.base.untyped_storage()._cdata] = slot.value

    def tensors(argument: Any) -> Any:
        if isinstance(argument, Slot):
            return argument.read()
        return [tensors(a) for a in argument] if isinstance(argument, (list, tuple)) else argument

    with inner:
        result = expansion(
            operation, *map(tensors, operation.args), **{k: tensors(v) for k, v in operation.kwargs.items()}
        )
        slots = [inner.slot(r) for r in (result if isinstance(result, (tuple, list)) else (result,))]
    for recorded in inner.operations:
        recorded.module = operation.module
    return inner.operations, slots


def _walk_dense(
    operations: Sequence[Operation],
    fields: Fields,
    account: Account,
    policy: Policy,
    wanted: dict[Value, list[tuple[str, Slot]]],
    stop: bool,
) -> None:
    """As `_walk`, over full tables."""
    for operation in reversed(operations):
        arrived: dict[int, Field] = {}
        for number, slot in enumerate(operation.outputs):
            if slot is None or slot.value not in fields.waiting or not slot.value.variable:
                continue
            field = fields.waiting.pop(slot.value)
            if slot.value in wanted and _cut(slot.value, to_evidence(field), account, wanted) and stop:
                continue
            if not slot.covers():
                cells = slot.cells(torch.arange(slot.numel, device=account.bias.device))
                whole, field = field, field.at(cells)
                if slot.value.previous is not None:  # cells that the write did not touch
                    for row, _, mass in whole:
                        mass[:, cells] = 0
                        if bool(mass.any()):
                            fields.add(Slot(slot.value.previous, (mass.shape[1],), (1,), 0), row, mass)
            arrived[number] = field
        if not arrived:
            continue
        rule = _rule(operation, policy)
        equations = rule.expansion or (rule.equations if policy.linear_kept is None else None)
        if equations is not None:
            inner, slots = _expanded(operation, equations)
            for number, field in arrived.items():
                fields.add_field(slots[number], field)
            _walk_dense(inner, fields, account, policy, {}, False)
            continue
        assert rule.function is not None
        for number, field in arrived.items():
            if operation.name in DENSE and policy.dense(operation):
                into, field, lost = move(operation, number, field, policy)
                fields.add_field(into, field)
                account.bias += lost
                continue
            for row, direction, mass in field:
                same = _unchanged(operation, rule, number, direction, policy) if rule.is_pointwise(operation) else None
                if same is not None:
                    fields.add(same, row, mass)
                    continue
                parts = rule.tables(operation, number, mass, direction, policy) if rule.tables is not None else None
                if parts is not None:
                    account.bias += (mass.sum(1) - sum(part.sum(1) for _, _, part in parts)).clamp_min(0)
                    for into, turned, part in parts:
                        fields.add(into, 0 if turned > 0 else 1, part)
                    continue
                held = mass.sum(0) > 0
                if 4 * int(held.sum()) > len(held):  # so many that it is cheaper not to choose them
                    neurons = torch.arange(len(held), device=mass.device)
                else:
                    neurons = torch.nonzero(held)[:, 0]
                    mass = mass[:, neurons]
                if len(neurons):
                    towards = mass.new_full((len(neurons),), float(direction))
                    links = rule.function(operation, number, neurons, towards, policy)
                    account.bias += fields.follow(links, mass, neurons)
        operation.memo.clear()


def _unchanged(operation: Operation, rule: Rule, number: int, direction: int, policy: Policy) -> Slot | None:
    """The input to whose elements a pointwise operation hands all evidence of a direction as it is, one to one; None
    where it turns some or puts them elsewhere."""
    out = operation.outputs[number]
    assert out is not None
    assert rule.function is not None
    neurons = torch.arange(out.numel, device=out.value.device)
    towards = torch.full((out.numel,), float(direction), dtype=out.value.dtype, device=neurons.device)
    ((slot, index, _, turned),) = rule.function(operation, number, neurons, towards, policy)
    alike = index.data_ptr() == neurons.data_ptr() and slot.numel == out.numel
    return slot if alike and (turned.data_ptr() == towards.data_ptr() or bool((turned == direction).all())) else None
