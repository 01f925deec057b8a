"""What lies in the files of a published captioner: whose weights, which words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from captionfix.captioners.published import tensorflow, words
from captionfix.captioners.published.safe_pickle import Held, plain_tensor, read, tensors
from captionfix.captioners.published.tensorflow import Variables
from captionfix.captioners.published.weights import Weights
from captionfix.errors import CaptionerError

_PICKLES = {".pkl", ".pickle", ".pth", ".pt", ".tar", ".ckpt", ".model", ".p"}
_BESIDE = re.compile(r"\.(data-\d+-of-\d+|meta|tmp)$")  # of TensorFlow, opened through another file
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")
_LARGEST_TEXT = 64 * 2**20


@dataclass(frozen=True)
class Words:
    """A vocabulary: words by their ids."""

    path: Path
    words: tuple[str, ...]


@dataclass(frozen=True)
class Infos:
    """What ImageCaptioning.pytorch keeps beside its weights: its options, and words from id 1 on."""

    path: Path
    options: dict[str, Any]
    words: tuple[str, ...]


Part = Weights | Words | Infos | Variables
Kind = TypeVar("Kind", Weights, Words, Infos, Variables)


def candidates(folder: Path) -> list[Path]:
    """The files of a folder that may be parts of a captioner."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and not _BESIDE.search(path.name)
        and (path.suffix.lower() in _PICKLES | {".json", ".txt", ".index"} or ".ckpt" in path.name)
    ]


def parts(path: Path) -> list[Part]:
    """What one file holds; nothing where it is something else.

    Raises:
        CaptionerError: it is damaged.
    """
    if path.suffix == ".json":
        return _json(path)
    if path.suffix == ".txt":
        counted = words.counted(path) if path.stat().st_size < _LARGEST_TEXT else None
        return [Words(path, counted)] if counted is not None else []
    try:
        if path.suffix == ".index" or tensorflow.is_table(path):
            return [tensorflow.open_checkpoint(path)]
    except OSError as error:
        raise CaptionerError(f"{path} can't be read: {error}") from error
    return list(_pickled(path, read(path)))


def _json(path: Path) -> list[Part]:
    try:
        value = json.loads(path.read_bytes()) if path.stat().st_size < _LARGEST_TEXT else None
    except (OSError, ValueError, RecursionError) as error:
        raise CaptionerError(f"{path} can't be read as JSON: {error}") from error
    found = words.in_order(value)
    return [Words(path, found)] if found is not None else []


def _pickled(path: Path, value: Any) -> Iterator[Part]:
    found = words.in_order(value)
    if found is not None:
        yield Words(path, found)
        return
    if isinstance(value, dict) and "vocab" in value and "opt" in value:
        yield _infos(path, value)
        return
    state = tensors(value)
    if state:
        yield Weights(path, state, _settings(value))
    elif isinstance(value, dict):
        for key, inner in dict.items(value):  # models beside each other, or one beside its optimizer
            if isinstance(key, str) and ("coder" in key or key in _WRAPPERS):
                state = tensors(inner)
                if state:
                    yield Weights(path, state, _settings(inner))
            elif words.in_order(inner) is not None:
                yield Words(path, words.in_order(inner) or ())


def _infos(path: Path, value: dict[str, Any]) -> Infos:
    options = value["opt"]
    options = {**options.attributes, **options.entries} if isinstance(options, Held) else options
    table = value["vocab"]
    if not isinstance(options, dict) or not isinstance(table, dict):
        raise CaptionerError(f"{path} looks like infos of ImageCaptioning.pytorch, but has no options or no words")
    by_id = {int(k): str(v) for k, v in dict.items(table) if str(k).isdecimal()}
    if sorted(by_id) != list(range(1, len(by_id) + 1)) or len(by_id) != len(table):
        raise CaptionerError(f"{path}: the ids of its {len(table)} words are not 1, 2, 3, ...")
    return Infos(path, options, tuple(by_id[i] for i in range(1, len(by_id) + 1)))


def _settings(module: Any) -> dict[str, int]:
    """Whole numbers that a pickled module carries, its submodules' too (``adaptive_pool.output_size``)."""
    if not isinstance(module, Held):
        return {}
    found: dict[str, int] = {}
    inner = module.attributes.get("_modules")
    for prefix, held in (("", module), *((f"{k}.", v) for k, v in (inner.items() if isinstance(inner, dict) else ()))):
        for name, value in held.attributes.items() if isinstance(held, Held) else ():
            value = value[0] if isinstance(value, (tuple, list)) and value else value
            if isinstance(value, int) and plain_tensor(value) is None:
                found[f"{prefix}{name}"] = value
    return found


def only(found: Iterable[Kind], what: str) -> Kind:
    """The one of several files of a kind that is called the best, or the only one.

    Raises:
        CaptionerError: which it should be is not said.
    """
    several = list(found)
    best = [part for part in several if "best" in part.path.name.lower()]
    chosen = best if len(best) == 1 else several
    if len(chosen) != 1:
        names = ", ".join(part.path.name for part in several)
        raise CaptionerError(
            f"several files may be {what}: {names}; leave one of them in the folder, or name the files"
        )
    return chosen[0]
