"""How captioners are called and what they return: the forms that people write, found by trying them.

A captioner is fed B captions of T words and gives, somewhere in what it returns, B x T' x V numbers: batch first or
second, packed, as a list of steps, with or without the image's own step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from captionfix.errors import CaptionerError

Path = tuple[Any, ...]

_CAPTION = ("cap", "token", "word", "text", "target", "input_ids", "seq", "sentence", "trg", "tgt", "label")
_IMAGE = ("feat", "im", "enc", "pixel", "visual", "cnn", "memory", "src", "x", "ctx", "context")


@dataclass(frozen=True)
class Form:
    """One way of handing images (or an encoder's output) and captions over.

    Attributes:
        text: as a person would write it.
        function: what is called.
        lengths: how the captions' lengths go as third argument: "list", "vector" (B,), "column" (B, 1), or "": not.
        swapped: captions come first.
        time_first: captions are (T, B).
        spread: the encoder returns several things, each an argument of its own.
        extra: further keyword arguments.
    """

    text: str
    function: Callable[..., Any]
    lengths: str = ""
    swapped: bool = False
    time_first: bool = False
    spread: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, source: Any, captions: Tensor) -> Any:
        batch, fed = captions.shape
        sources = tuple(source) if self.spread else (source,)
        words = captions.t() if self.time_first else captions
        args = (words, *sources) if self.swapped else (*sources, words)
        if self.lengths == "list":
            args += ([fed] * batch,)
        elif self.lengths:
            lengths = torch.full((batch,), fed, device=captions.device)
            args += (lengths[:, None] if self.lengths == "column" else lengths,)
        return self.function(*args, **self.extra)


def forms(function: Callable[..., Any], name: str, source: Any, source_name: str) -> list[Form]:
    """The ways in which a decoder (or a whole captioner) may want to be called, the likeliest first.

    Args:
        function: a module or function.
        name: what to call it in messages.
        source: what it gets beside the captions: images, or what the encoder returned for some.
        source_name: what to call that in messages.
    """
    fewest, most, names, extra = _parameters(function)
    spread = isinstance(source, (tuple, list)) and len(source) > 1 and all(isinstance(s, Tensor) for s in source)
    swaps = [False, True]
    if len(names) > 1 and _like(names[0], _CAPTION) and (_like(names[1], _IMAGE) or not _like(names[1], _CAPTION)):
        swaps = [True, False]
    result = []
    for time_first in (False, True):
        for spreads in (True, False) if spread else (False,):
            sources = len(source) if spreads else 1
            third = names[sources + 1] if len(names) > sources + 1 else ""
            kinds = ["", *(("list", "column", "vector") if "len" in third.lower() or not names else ())]
            for lengths in kinds:
                if not fewest <= sources + 1 + bool(lengths) <= most:
                    continue
                for swapped in swaps:
                    shown = [", ".join([f"{source_name}[{i}]" for i in range(sources)]) if spreads else source_name]
                    shown.insert(0 if swapped else 1, "captions (T, B)" if time_first else "captions")
                    shown += [f"lengths as a {lengths}"] if lengths else []
                    shown += [f"{k}={v}" for k, v in extra.items()]
                    text = f"{name}({', '.join(shown)})"
                    result.append(Form(text, function, lengths, swapped, time_first, spreads, extra))
    return result


def _parameters(function: Callable[..., Any]) -> tuple[int, float, list[str], dict[str, Any]]:
    """Fewest and most positional arguments, their names, and what a decoder that may feed itself must be told."""
    forward = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        given = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return 0, float("inf"), [], {}
    positional = [p for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    extra = {p.name: 1.0 for p in given if "teacher_forc" in p.name and p.kind != p.POSITIONAL_ONLY}
    plain = [p for p in positional if p.name not in extra]
    most = float("inf") if any(p.kind == p.VAR_POSITIONAL for p in given) else len(plain)
    return sum(p.default is p.empty for p in plain), most, [p.name for p in plain], extra


def needed(function: Callable[..., Any]) -> str:
    """The function's own parameters, for messages."""
    forward = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        return str(inspect.signature(forward))
    except (TypeError, ValueError):
        return "(...)"


def _like(name: str, parts: Sequence[str]) -> bool:
    return any(name.lower().startswith(part) or (len(part) > 2 and part in name.lower()) for part in parts)


# what comes back -----------------------------------------------------------------------------------------------------

# layout -> how (B, T', V) is laid out, and how to bring it back
_LAYOUTS: dict[str, tuple[Callable[[int, int, int], tuple[int, ...]], tuple[int, int, int]]] = {
    "batch first": (lambda b, t, v: (b, t, v), (0, 1, 2)),
    "batch second": (lambda b, t, v: (t, b, v), (1, 0, 2)),
    "words in the middle": (lambda b, t, v: (b, v, t), (0, 2, 1)),
    "packed": (lambda b, t, v: (t, b, v), (1, 0, 2)),
    "flattened": (lambda b, t, v: (b, t, v), (0, 1, 2)),
}


@dataclass(frozen=True)
class Reading:
    """Where the logits are in what a captioner returns, and in which layout.

    Attributes:
        place: keys that lead to the tensor; a trailing None: to a list of steps.
        layout: one of the table's.
        more: steps that come out beyond the words that went in (may be negative).
        words: V.
        order: keys that lead to the permutation that sorted the batch, if any.
        probabilities: whether they are probabilities.
    """

    place: Path
    layout: str
    more: int
    words: int
    order: Path | None = None
    probabilities: bool = False

    def tensor(self, output: Any) -> Tensor:
        """The tensor as it was returned."""
        if self.place and self.place[-1] is None:
            return torch.stack(list(_at(output, self.place[:-1])), 1)
        found: Tensor = _at(output, self.place)
        return found

    def __call__(self, output: Any, batch: int, fed: int) -> Tensor:
        """(B, T', V) log-probabilities up to a constant.

        Raises:
            ValueError: it has another number of steps than was seen before.
        """
        shape, order = _LAYOUTS[self.layout]
        found = self.tensor(output)
        expected = shape(batch, fed + self.more, self.words)
        if found.numel() != expected[0] * expected[1] * expected[2]:
            raise ValueError(f"{fed} words for {batch} images gave a tensor {tuple(found.shape)}, not {expected}")
        result = found.reshape(expected).permute(order)  # a squeezed batch or step of 1 comes back so
        if self.order is not None:
            sorted_by = _at(output, self.order)
            if not torch.equal(sorted_by, torch.arange(batch, device=sorted_by.device)):
                result = result[sorted_by.argsort()]
        if self.probabilities:
            result = result.clamp_min(torch.finfo(result.dtype).tiny).log()
        return result

    def __str__(self) -> str:
        what = f"{'probabilities' if self.probabilities else 'outputs'} {self.layout}"
        return what + (f" in its place {_shown(self.place)}" if self.place else "")


def readings(output: Any, batch: int, fed: int, words: int) -> list[Reading]:
    """Every way in which something returned could hold the logits.

    Args:
        output: what was returned for B captions of `fed` words.
        batch: B.
        fed: words fed, T.
        words: V.

    Raises:
        CaptionerError: several tensors could be the logits and say different things, or the logits are for another
            number of words.
    """
    found: list[tuple[Reading, Tensor]] = []
    for path, tensor in _leaves(output, batch):
        if tensor.is_floating_point():
            for layout, steps in _layouts(tensor, batch, fed, words):
                found.append((Reading(path, layout, steps - fed, words), tensor))
    if not found:
        return []
    places = list(dict.fromkeys(reading.place for reading, _ in found))
    named = [place for place in places if place and place[-1] in ("logits", "predictions", "prediction", "scores")]
    place = (named or places)[0]
    mine = [(reading, tensor) for reading, tensor in found if reading.place == place]
    for other in () if named else places[1:]:
        theirs = next(tensor for reading, tensor in found if reading.place == other)
        if theirs.shape != mine[0][1].shape or not torch.equal(theirs.argmax(-1), mine[0][1].argmax(-1)):
            raise CaptionerError(
                f"it returns several tensors that could be the logits ({', '.join(map(_shown, places))}); "
                "say which one with logits=lambda images, tokens: ..."
            )
    order = next((path for path, tensor in _leaves(output, batch) if _is_permutation(tensor, batch)), None)
    result = []
    for reading, tensor in mine:
        axis = 1 if reading.layout == "words in the middle" else -1
        probabilities = bool((tensor >= 0).all()) and bool(((tensor.sum(axis) - 1).abs() < 1e-3).all())
        result.append(Reading(place, reading.layout, reading.more, words, order, probabilities))
    return result


def attention_weights(output: Any, logits: Reading, batch: int, fed: int, cells: int) -> Reading | None:
    """Where attention weights over the feature map's cells are in what was returned: tensors of one weight a cell for
    each output step, which sum to 1. None where there are none.
    """
    steps = fed + logits.more
    for path, tensor in _leaves(output, batch):
        if path == logits.place or not tensor.is_floating_point() or tensor.numel() != batch * steps * cells:
            continue
        for layout in ("batch first", "batch second"):
            expected = _LAYOUTS[layout][0](batch, steps, cells)
            if tuple(tensor.shape[:2]) == expected[:2] and tensor.dim() in (3, 4):
                table = tensor.reshape(expected)
                if bool((table >= 0).all()) and bool(((table.sum(-1) - 1).abs() < 1e-3).all()):
                    return Reading(path, layout, logits.more, cells, logits.order)
    return None


def shapes(output: Any) -> str:
    """What was returned, for messages."""
    seen = [str(tuple(tensor.shape)) for _, tensor in _leaves(output, 0)]
    return ", ".join(seen[:6]) if seen else type(output).__name__


def other_widths(output: Any, batch: int, fed: int) -> list[int]:
    """For how many words the outputs seem to be, where that is not what the vocabulary has."""
    found = []
    for _, tensor in _leaves(output, batch):
        if tensor.is_floating_point() and tensor.dim() in (2, 3) and tensor.shape[-1] > 1:
            width = tensor.shape[-1]
            if any(steps > 0 for _, steps in _layouts(tensor, batch, fed, width)):
                found.append(width)
    return found


def _layouts(tensor: Tensor, batch: int, fed: int, words: int) -> Iterator[tuple[str, int]]:
    shape = tuple(tensor.shape)
    for steps in (fed, fed + 1, fed - 1, fed + 2, fed - 2):
        for layout, (expected, _) in _LAYOUTS.items():
            wanted = expected(batch, steps, words)
            if layout in ("packed", "flattened"):
                wanted = (batch * steps, words)
            if shape == wanted:
                yield layout, steps


def _is_permutation(tensor: Tensor, batch: int) -> bool:
    return (
        tensor.dtype in (torch.int64, torch.int32)
        and tensor.shape == (batch,)
        and torch.equal(tensor.sort()[0].long(), torch.arange(batch, device=tensor.device))
    )


def _leaves(output: Any, batch: int, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """All tensors with the keys that lead to them; a list of (B, V) steps is one, its path ending in None."""
    if isinstance(output, Tensor):
        yield path, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _leaves(value, batch, (*path, key))
    elif isinstance(output, (list, tuple)):
        steps = [x for x in output if isinstance(x, Tensor)]
        same = len(steps) == len(output) > 2 and all(x.dim() == 2 and x.shape == steps[0].shape for x in steps)
        if same and len(steps[0]) == batch and not hasattr(output, "batch_sizes"):
            yield (*path, None), torch.stack(steps, 1)
            return
        for number, value in enumerate(output):
            yield from _leaves(value, batch, (*path, number))
    elif isinstance(getattr(output, "logits", None), Tensor):
        yield (*path, "logits"), output.logits


def _at(output: Any, path: Path) -> Any:
    for key in path:
        output = output[key] if isinstance(output, (list, tuple, Mapping)) else getattr(output, key)
    return output


def _shown(place: Path) -> str:
    return "".join(f"[{key!r}]" for key in place if key is not None) or "the output itself"
