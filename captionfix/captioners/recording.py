"""One run of a captioner, recorded with the calls of its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from captionfix.captioners.calm import tensors_in
from captionfix.captioners.signatures import Reading
from captionfix.unravel import Slot, Trace

Run = Callable[[Tensor, Tensor], Any]  # (B, C, H, W) images and (B, T) captions -> whatever the captioner returns


@dataclass(eq=False)
class Call:
    """One call of a module during a recorded pass.

    Attributes:
        nth: which of its calls, from 0.
        begin, end: moments, counted in entries and exits.
        parent: the call inside which it happened.
        key: where its output lies, if that is one tensor.
        shape: of it.
        template: shapes of the output, from which an empty one can be made; None where it is something else.
        depends: whether the output depends on the image.
    """

    module: nn.Module
    nth: int
    begin: int
    parent: Call | None
    end: int = -1
    key: tuple[Any, ...] | None = None
    shape: tuple[int, ...] = ()
    template: Any = None
    depends: bool = False


def record(
    run: Run, images: Tensor, captions: Tensor, reading: Reading
) -> tuple[list[Call], Trace, Slot, Slot, Tensor]:
    """Runs a captioner once.

    Returns:
        its modules' calls in the order of their beginnings, the trace, where the images and the logits lie in it, and
        the (B, T', V) logits.
    """
    calls: list[Call] = []
    with Trace() as trace, _calls_into(calls, trace):
        images = images.clone()
        image = trace.slot(trace.watch("image", images))
        output = run(images, captions)
        target = trace.slot(reading.tensor(output))
    return calls, trace, image, target, reading(output, *captions.shape)


@contextmanager
def _calls_into(calls: list[Call], trace: Trace) -> Iterator[None]:
    open_calls: list[Call] = []
    moment = 0
    count: dict[nn.Module, int] = {}

    def enter(module: nn.Module, args: Any) -> None:
        nonlocal moment
        moment += 1
        number = count[module] = count.get(module, -1) + 1
        call = Call(module, number, moment, open_calls[-1] if open_calls else None)
        calls.append(call)
        open_calls.append(call)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal moment
        moment += 1
        while open_calls and open_calls[-1].module is not module:
            open_calls.pop()  # it ended with an exception that somebody caught
        if open_calls:
            call = open_calls.pop()
            call.end = moment
            call.template = _template(output)
            call.depends = any(trace.locate(tensor).value.variable for tensor in tensors_in(output))
            if isinstance(output, Tensor):
                call.key, call.shape = key(trace.locate(output)), tuple(output.shape)

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def key(slot: Slot) -> tuple[Any, ...]:
    """The same for two slots that are one tensor."""
    return slot.value, slot.shape, slot.stride, slot.offset


# Operations whose four-dimensional outputs are channels x rows x columns. Others that keep the shape of such a tensor
# keep that meaning; a linear layer over permuted axes does not.
_SPATIAL = ("conv", "_convolution", "pool", "upsample", "batch_norm", "group_norm", "instance_norm", "pixel_", "pad")


def planes_of(trace: Trace, image: Slot) -> set[tuple[Any, tuple[int, ...]]]:
    """The (value, shape) of every four-dimensional tensor whose axes are known to be batch, channels, rows, columns."""
    planes = {(image.value, image.shape)}
    for operation in trace.operations:
        inputs = [slot for slot in operation.inputs() if len(slot.shape) == 4]
        spatial = any(part in operation.name for part in _SPATIAL)
        whole = operation.name == "cat" and operation.argument(1, "dim", 0) in (1, -3)
        if whole:
            whole = all((slot.value, slot.shape) in planes for slot in inputs)
        for slot in operation.outputs:
            if slot is not None and len(slot.shape) == 4:
                kept = any(s.shape == slot.shape and (s.value, s.shape) in planes for s in inputs)
                if spatial or whole or kept:
                    planes.add((slot.value, slot.shape))
    return planes


def _template(output: Any) -> Any:
    """Shapes and types of tensors in tuples, lists and dictionaries; None where there is something else."""
    if isinstance(output, Tensor):
        return tuple(output.shape), output.dtype
    if type(output) in (list, tuple):
        inner = [_template(item) for item in output]
        return None if None in inner else type(output)(inner) if output else None
    if type(output) is dict:
        named = {key: _template(value) for key, value in output.items()}
        return None if None in named.values() else named
    return None
