"""Where the CNN ends: the feature map, found in a recorded pass."""

from __future__ import annotations

from collections.abc import Callable

from .registry import find
from .rules.layout import constant
from .trace import Operation, Slot, Trace, Value


def find_feature_map(
    trace: Trace, image: Slot, target: Slot, accept: Callable[[Slot], bool] = lambda slot: True
) -> Slot | None:
    """The CNN's feature map: the last four-dimensional tensor with more than one position that every path from the
    image to the target passes. None where there is no such tensor.

    Args:
        trace: the recorded pass.
        image: where the image lies.
        target: where the logits lie.
        accept: which tensors come into question.
    """
    from_image: set[Value] = {image.value}
    depending: list[Operation] = []
    for operation in trace.operations:
        rule = find(operation.func)
        if rule is not None and rule.function is constant:  # new_zeros of the image's type is no path from it
            continue
        if any(value in from_image for value in _read_values(operation)):
            from_image.update(slot.value for slot in operation.outputs if slot is not None)
            depending.append(operation)
    needed: set[Value] = {target.value}
    last_use: dict[Value, int] = {target.value: len(depending)}
    relevant: list[tuple[int, Operation]] = []
    for number in range(len(depending) - 1, -1, -1):
        operation = depending[number]
        if not any(slot is not None and slot.value in needed for slot in operation.outputs):
            continue
        relevant.append((number, operation))
        for value in _read_values(operation):
            if value in from_image:
                needed.add(value)
                last_use.setdefault(value, number)
    live: set[Value] = {image.value}
    found = image if len(image.shape) == 4 and image.value in needed else None
    for number, operation in reversed(relevant):
        live.update(slot.value for slot in operation.outputs if slot is not None and slot.value in last_use)
        live = {value for value in live if last_use.get(value, -1) > number}
        if len(live) == 1:
            for slot in operation.outputs:
                if (
                    slot is not None
                    and slot.value in live
                    and len(slot.shape) == 4
                    and slot.shape[2] * slot.shape[3] > 1
                    and accept(slot)
                ):
                    found = slot
    return found if found is not image else None


def _read_values(operation: Operation) -> set[Value]:
    values = {slot.value for slot in operation.inputs()}
    values.update(
        slot.value.previous for slot in operation.outputs if slot is not None and slot.value.previous is not None
    )
    return values
