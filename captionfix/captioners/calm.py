"""Running somebody's modules without leaving a trace on them: eval mode for the time of a call, attributes, random
numbers and forwards put back, whatever happens."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captionfix.errors import CaptionerError

# One at a time: what one call sets and puts back, another must not see half done.
LOCK = threading.RLock()


@contextmanager
def in_eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules act as in eval mode inside the block; each has its own flag again after it.

    The flags are set directly: a module's own ``train()`` may do other things.
    """
    with LOCK:
        training = [module for module in modules if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


class Attributes:
    """What modules' attributes are now, one level deep, to be put back: a forward may keep its last hidden state or
    attention weights in ``self``.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._saved = [(module, {k: (v, _copy(v)) for k, v in vars(module).items()}) for module in modules]

    def restore(self) -> list[nn.Module]:
        """Puts them back; returns the modules that had changed."""
        changed = []
        for module, saved in self._saved:
            own = vars(module)
            if not _same(own, saved):
                changed.append(module)
                for value, content in saved.values():
                    if isinstance(value, dict) and not _equal(value, content):
                        value.clear()
                        value.update(content)
                    elif isinstance(value, list) and not _equal(value, content):
                        value[:] = content
                own.clear()
                own.update({k: value for k, (value, _) in saved.items()})
        return changed


def _copy(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else list(value) if isinstance(value, list) else None


def _same(own: Mapping[str, Any], saved: Mapping[str, tuple[Any, Any]]) -> bool:
    return own.keys() == saved.keys() and all(
        own[k] is value and (content is None or _equal(value, content)) for k, (value, content) in saved.items()
    )


def _equal(value: Any, content: Any) -> bool:
    if isinstance(value, dict):
        return list(value) == list(content) and all(value[k] is content[k] for k in content)
    return len(value) == len(content) and all(a is b for a, b in zip(value, content, strict=True))


class Calm:
    """Runs functions that call modules, in eval mode, and puts the modules' attributes back."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._stateful = self._modules  # until it is known which of them keep something
        self._changed: set[nn.Module] = set()

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        with in_eval_mode(self._modules):
            attributes = Attributes(self._stateful)
            try:
                return function(*args)
            finally:
                self._changed.update(attributes.restore())

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, run so."""
        return lambda *args: self(function, *args)

    def learned(self) -> None:
        """From now on only those modules are looked after that have changed so far."""
        self._stateful = [module for module in self._modules if module in self._changed]


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Buffers hold after the block what they held before.

    Raises:
        CaptionerError: something was written into them, or into parameters.
    """
    buffers = [(name, b, b.detach().clone()) for name, b in module.named_buffers()]
    versions = [(name, p, p._version) for name, p in module.named_parameters() if not p.is_inference()]
    written: list[str] = []
    try:
        yield
    finally:
        written += [name for name, parameter, version in versions if parameter._version != version]
        for name, buffer, content in buffers:
            if not torch.equal(buffer.nan_to_num(), content.nan_to_num()):
                written.append(name)
                with torch.no_grad():
                    buffer.copy_(content)
    if written:
        raise CaptionerError(
            f"its forward writes into its own {', '.join(written[:4])}, even in eval mode; running it would change it. "
            "Wrap a captioner whose forward only computes"
        )


@contextmanager
def same_random_numbers(device: torch.device | None = None) -> Iterator[None]:
    """Whoever draws random numbers inside the block (torch, numpy, random), others draw after it as if nobody had."""
    python, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002  (the global one is what users draw from)
    cuda = [device] if device is not None and device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules run a stand-in inside the block: a function of the module's own forward and its arguments.

    Only the thread that asked for it meets the stand-ins; whoever else calls a module meanwhile gets its own forward.
    """
    with LOCK:
        mine = threading.get_ident()
        before = {module: vars(module).get("forward") for module in forwards}
        try:
            for module, function in forwards.items():
                vars(module)["forward"] = _stand_in(module.forward, function, mine)
            yield
        finally:
            for module, forward in before.items():
                if forward is None:
                    vars(module).pop("forward", None)
                else:
                    vars(module)["forward"] = forward


def _stand_in(original: Callable[..., Any], function: Callable[..., Any], owner: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != owner:
            return original(*args, **kwargs)
        return function(original, *args, **kwargs)

    return forward


def tensors_in(output: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_in(value)
