"""Records one forward pass, operation by operation.

The record is taken below modules, at PyTorch's own operations, so it holds whatever a module's ``forward`` does:
functional or in-place, reused or not. Its unit of memory is the *value*: what one storage holds between two writes.
Every tensor is a strided `Slot` on a value, which makes views free (a view is another slot on the same value and no
operation at all), and an in-place write simply begins the storage's next value.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import UnsupportedOperation
from .registry import find, is_composite, op_name

_OVERWRITTEN = (
    "a rule wants to read a value that was not held, or was overwritten in place; it must not be registered with "
    "reads=False"
)


class Value:
    """What one storage held between two writes.

    Its contents are held only where something wants to read them: most of what a pass computes is read by no rule and
    goes as it would unrecorded. The storage's address stays taken as long as the value is there.

    Attributes:
        base: a tensor on the storage, or None where nothing wants to read the contents.
        producer: the operation that wrote it, or None for a leaf (an input, a weight, a constant).
        previous: the storage's value before that write: what lies in the cells that the producer did not write.
        variable: whether it depends on a watched input.
        read_later: whether a rule of an operation that was recorded so far will want to read it.
        size: bytes an element.
        cells: how many elements the storage holds.
        device: where it lies.
        dtype: type of its elements.
    """

    __slots__ = (
        "_producer",
        "base",
        "cells",
        "device",
        "dtype",
        "number",
        "parameter",
        "previous",
        "read_later",
        "reserved",
        "size",
        "variable",
    )

    def __init__(self, number: int, tensor: Tensor, producer: Operation | None, previous: Value | None, variable: bool):
        storage = tensor.untyped_storage()
        self.number = number
        self.base: Tensor | None = tensor if producer is None else None
        self.reserved = StorageWeakRef(storage) if producer is not None else None  # else the tensor holds it
        self._producer = None if producer is None else weakref.ref(producer)
        self.previous = previous
        self.variable = variable
        self.read_later = False
        self.size = tensor.element_size()
        self.cells = storage.nbytes() // self.size
        self.device, self.dtype = tensor.device, tensor.dtype
        self.parameter = isinstance(tensor, nn.Parameter)

    @property
    def producer(self) -> Operation | None:
        # held by its trace: held here too, a trace would be a circle, and its memory stay until such are collected
        return None if self._producer is None else self._producer()

    def keep(self) -> None:
        """Copies the contents away, because the storage is about to be overwritten."""
        if self.base is not None:
            self.base = self.base.detach().as_strided((self.cells,), (1,), 0).clone()


@dataclass(eq=False, slots=True)  # not frozen: that would make recording a third slower
class Slot:
    """Where a tensor's elements lie: a strided window on a value."""

    value: Value
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def read(self) -> Tensor:
        """The tensor's contents at the time when it was recorded."""
        if self.value.base is None:
            raise RuntimeError(_OVERWRITTEN)
        return self.value.base.detach().as_strided(self.shape, self.stride, self.offset)

    def take(self, elements: Tensor) -> Tensor:
        """The contents of some elements, in the shape of their numbers, whatever the layout."""
        if self.value.base is None:
            raise RuntimeError(_OVERWRITTEN)
        flat = self.value.base.detach().as_strided((self.value.cells,), (1,), 0)
        return flat[self.cells(elements)]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def repeats(self) -> bool:
        """Whether several elements may lie in one cell (an expanded tensor, overlapping windows)."""
        span = 0  # cells from the first to the last element of the dimensions so far
        for stride, extent in sorted(zip(self.stride, self.shape, strict=True)):
            if extent > 1:
                if stride <= span:
                    return True
                span += stride * (extent - 1)
        return False

    def is_plain(self) -> bool:
        """Whether element i lies in cell i."""
        expected = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if extent != 1 and stride != expected:
                return False
            expected *= extent
        return self.offset == 0

    def covers(self) -> bool:
        """Whether element i lies in cell i, and there are no other cells."""
        return self.is_plain() and self.numel == self.value.cells

    def cells(self, elements: Tensor) -> Tensor:
        """The storage cells of row-major element numbers."""
        if self.is_plain():
            return elements
        cells = torch.full_like(elements, self.offset)
        rest = elements
        for extent, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if extent != 1:
                if stride:
                    cells += rest.remainder(extent) * stride
                rest = rest.div(extent, rounding_mode="floor")
        return cells

    def elements(self, cells: Tensor) -> Tensor:
        """The row-major element numbers that lie in storage cells, -1 where the tensor does not cover the cell."""
        if self.is_plain():
            return cells if self.covers() else torch.where(cells < self.numel, cells, -1)
        last = self.offset + sum((extent - 1) * stride for extent, stride in zip(self.shape, self.stride, strict=True))
        table = torch.full((max(last + 1, 1),), -1, dtype=torch.long, device=cells.device)
        numbers = torch.arange(self.numel, device=cells.device).view(self.shape)
        table.as_strided(self.shape, self.stride, self.offset).copy_(numbers)
        return torch.where(cells <= last, table[cells.clamp(max=last)], -1)


class Operation:
    """One recorded operation: its arguments with every tensor replaced by its slot."""

    __slots__ = ("__weakref__", "args", "func", "kwargs", "memo", "module", "name", "outputs")

    def __init__(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], module: str):
        self.func, self.name, self.args, self.kwargs, self.module = func, name, args, kwargs, module
        self.outputs: tuple[Slot | None, ...] = ()
        self.memo: dict[str, Any] = {}

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name, whichever way the caller gave it."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def inputs(self) -> Iterator[Slot]:
        """All tensor arguments, those inside lists too."""
        yield from _slots_in(self.args)
        yield from _slots_in(tuple(self.kwargs.values()))

    def call(self, replace: Callable[[Slot], Any]) -> Any:
        """Runs the operation's functional form again, each tensor argument replaced."""

        def fill(argument: Any) -> Any:
            if isinstance(argument, Slot):
                return replace(argument)
            if isinstance(argument, (list, tuple)):
                return [fill(item) for item in argument]
            return argument

        return self.func(*[fill(a) for a in self.args], **{k: fill(v) for k, v in self.kwargs.items()})

    def __str__(self) -> str:
        return f"aten::{self.name}" + (f" in {self.module}" if self.module else "")


class Trace(TorchDispatchMode):
    """Records what runs inside the ``with`` block. The block runs under ``torch.inference_mode()``.

    Example:
        >>> with Trace(network) as trace:
        ...     trace.watch("image", pixels)
        ...     logits = network(pixels)
        >>> trace.slot(logits)

    Args:
        module: the module whose submodules' names operations should carry; None to go without names.
        keep: hold the contents of every tensor, also of those that no rule reads.
    """

    def __init__(self, module: nn.Module | None = None, keep: bool = False):
        super().__init__()
        self.keep = keep
        self.operations: list[Operation] = []
        self.watched: dict[str, Slot] = {}
        self.module_outputs: dict[str, Slot] = {}
        self._values: dict[int, Value] = {}
        self._names = {id(m): name for name, m in module.named_modules()} if module is not None else {}
        self._path: list[str] = []
        self._contexts: list[Any] = []

    # the block ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Trace:
        inference = torch.inference_mode()
        inference.__enter__()
        self._contexts.append(inference)
        if self._names and len(self._contexts) == 1:
            self._contexts.append(register_module_forward_pre_hook(self._enter_module))
            self._contexts.append(register_module_forward_hook(self._leave_module, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        while self._contexts:
            context = self._contexts.pop()
            if hasattr(context, "remove"):
                context.remove()
            else:
                context.__exit__(*exc)
                break
        if not self._contexts:
            self._path.clear()

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        self._path.append(self._names.get(id(module), self._path[-1] if self._path else ""))

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._path:
            name = self._path.pop()
            if isinstance(output, Tensor) and id(module) in self._names:
                self.module_outputs[name] = self.locate(output)

    # what a user of the trace asks ----------------------------------------------------------------------------------

    def watch(self, name: str, tensor: Tensor) -> Tensor:
        """Declares an input: what depends on it is recorded, and evidence may end in it."""
        slot = self.slot(tensor)
        slot.value.variable = True
        self.watched[name] = slot
        return tensor

    def slot(self, tensor: Tensor) -> Slot:
        """Where a tensor lies now; its contents can be read."""
        slot = self.locate(tensor)
        if slot.value.base is None:
            slot.value.base = tensor
        return slot

    def locate(self, tensor: Tensor) -> Slot:
        """Where a tensor lies now; its contents are held only if a rule reads them."""
        key = tensor.untyped_storage()._cdata
        value = self._values.get(key)
        if value is None:
            value = self._values[key] = Value(len(self._values), tensor, None, None, False)
        return Slot(value, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    # recording ------------------------------------------------------------------------------------------------------

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch.compile is not met in here, and keeping it out would cost as much as recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        facts = _facts(func)
        if facts.aliases:
            return self._record(func, facts, args, kwargs or {})
        # In here PyTorch leaves out the key under which a view of a parameter is known to require a gradient;
        # matmul asks for that to
        # choose its kernel, so that a linear layer on a non-contiguous sequence would differ in the last bit
        # from what runs unrecorded.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            return self._record(func, facts, args, kwargs or {})

    def _record(self, func: Any, facts: _Facts, args: Any, kwargs: Any) -> Any:
        rule = find(func)
        variable = self._any_variable(args) or (bool(kwargs) and self._any_variable(kwargs.values()))
        if rule is None and variable and is_composite(func):
            with self:  # an operation made of others, and nobody wrote a rule for the whole: record its parts
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        writes = list(_written(facts, args, kwargs)) if facts.writes else ()
        if not variable and not any(t.untyped_storage()._cdata in self._values for t in writes):
            return func(*args, **kwargs)

        slots: list[Slot] = []
        reads = True if rule is None or self.keep else rule.reads
        looked = range(len(args)) if reads is True else reads or ()
        operation = Operation(
            func,
            facts.name,
            tuple([self._to_slot(a, slots, i in looked) for i, a in enumerate(args)]),
            {k: self._to_slot(v, slots, bool(reads)) for k, v in kwargs.items()},
            self._path[-1] if self._path else "",
        )
        before: dict[int, Value] = {}
        for tensor in writes:
            value = self.locate(tensor).value
            before[tensor.untyped_storage()._cdata] = value
            if value.read_later:
                value.keep()
        result = func(*args, **kwargs)
        for value in before.values():
            if not value.read_later:
                value.base = None
        read = {slot.value for slot in slots}
        outputs: list[Slot | None] = []
        fresh: dict[int, Value] = {}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if not isinstance(tensor, Tensor):
                outputs.append(None)
                continue
            key = tensor.untyped_storage()._cdata
            known = self._values.get(key)
            if known in read and key not in before:  # a view: no new value
                if known.size != tensor.element_size():
                    raise UnsupportedOperation(
                        f"{operation} reads memory as another type, which the record cannot follow. Put the part "
                        "that needs it into an operation of your own (torch.library.custom_op) and register a rule for "
                        "that: @captionfix.unravel.register"
                    )
                outputs.append(None)
                continue
            if key not in fresh:
                of_before = before.get(key)
                fresh[key] = Value(
                    len(self._values) + len(fresh),
                    tensor,
                    operation,
                    of_before,
                    variable or (of_before is not None and of_before.variable),
                )
                self._values[key] = fresh[key]
                if self.keep:
                    fresh[key].base = tensor
            outputs.append(Slot(fresh[key], tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())))
        if any(outputs):
            operation.outputs = tuple(outputs)
            self.operations.append(operation)
        return result

    def _any_variable(self, arguments: Iterable[Any]) -> bool:
        for argument in arguments:
            if isinstance(argument, Tensor):
                value = self._values.get(argument.untyped_storage()._cdata)
                if value is not None and value.variable:
                    return True
            elif isinstance(argument, (list, tuple)) and self._any_variable(argument):
                return True
        return False

    def _to_slot(self, argument: Any, slots: list[Slot], read: bool) -> Any:
        """The argument with tensors replaced by their slots, which are added to `slots`; whether a rule will read
        their contents."""
        if isinstance(argument, Tensor):
            slot = self.locate(argument)
            slots.append(slot)
            if read:
                slot.value.read_later = True
                if slot.value.base is None:
                    slot.value.base = argument
            return slot
        if isinstance(argument, (list, tuple)):
            return [self._to_slot(item, slots, read) for item in argument]
        return argument


class _Facts(NamedTuple):
    """What an operation's schema says: its name, whether it returns what it was given, which arguments it writes."""

    name: str
    aliases: bool
    writes: tuple[tuple[int, str], ...]


@cache
def _facts(func: Any) -> _Facts:
    schema = func._schema
    writes = [(i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    return _Facts(op_name(func), any(r.alias_info is not None for r in schema.returns), tuple(writes))


def _tensors_in(arguments: Any) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors_in(argument)


def _slots_in(arguments: Any) -> Iterator[Slot]:
    for argument in arguments:
        if isinstance(argument, Slot):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _slots_in(argument)


def _written(facts: _Facts, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The arguments that the operation's schema declares as written to."""
    for position, name in facts.writes:
        yield from _tensors_in((args[position] if position < len(args) else kwargs.get(name),))
