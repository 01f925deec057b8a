"""Classes by name and by id."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from captionfix.errors import CaptionError

Classes = str | int | Sequence[str | int] | None


def labelled(cnn: nn.Module, labels: Sequence[str] | Mapping[int, str] | None, count: int) -> Callable[[int], str]:
    """The name of each class by its id."""
    names: Any = labels
    if names is None:
        names = getattr(getattr(cnn, "config", None), "id2label", None)
    if names is None and count == 1000:
        from torchvision.models import _meta

        names = _meta._IMAGENET_CATEGORIES
    if names is None:
        names = {}
    if isinstance(names, str) or not isinstance(names, (Mapping, Sequence)):
        raise CaptionError(f"labels are a sequence of names or a mapping of ids to names, not a {type(names).__name__}")
    if not isinstance(names, Mapping):
        if len(names) != count:
            raise CaptionError(f"{len(names)} labels for {count} classes: they are not of one training")
        names = dict(enumerate(names))
    texts = {int(number): str(text) for number, text in names.items()}
    return lambda number: texts.get(number, f"class {number}")


def wanted(classes: Classes, known: Callable[[int], str], count: int) -> list[int] | None:
    """Ids of the classes asked for; None where the likeliest are."""
    if classes is None:
        return None
    asked = [classes] if isinstance(classes, (str, int, np.integer)) else list(classes)
    if not asked:
        raise CaptionError("classes is empty: name some, or give None for the likeliest")
    ids = [_id(each, known, count) for each in asked]
    if len(set(ids)) < len(ids):
        raise CaptionError(f"classes names the same class twice: {', '.join(map(str, asked))}")
    return ids


def _id(asked: str | int, known: Callable[[int], str], count: int) -> int:
    if isinstance(asked, (int, np.integer)) and not isinstance(asked, bool):
        if not 0 <= asked < count:
            raise CaptionError(f"there is no class {asked}: ids go from 0 to {count - 1}")
        return int(asked)
    text = str(asked).strip().lower()
    names = [known(number).lower() for number in range(count)]
    found = [number for number, each in enumerate(names) if each == text]
    # ImageNet's long names are lists: "tabby, tabby cat"
    found = found or [n for n, each in enumerate(names) if text in (part.strip() for part in each.split(","))]
    if len(found) == 1:
        return found[0]
    if found:
        raise CaptionError(
            f"{len(found)} classes are named {asked!r}: give one of the ids {', '.join(map(str, found))}"
        )
    near = difflib.get_close_matches(text, names, n=4)
    raise CaptionError(
        f"no class is named {asked!r}{': perhaps ' + ', '.join(near) if near else ''}; give a name or an id"
    )
