"""captionfix: where each word of an image caption comes from.

The public names below are resolved when first used, so that ``import captionfix`` and ``captionfix --help`` load no
heavy library.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from captionfix.captioners.captioner import Captioner as Captioner
    from captionfix.captioners.loading import load as load
    from captionfix.captioners.wrap import wrap as wrap
    from captionfix.classify import explain_classes as explain_classes
    from captionfix.errors import CaptionerError as CaptionerError
    from captionfix.errors import CaptionError as CaptionError
    from captionfix.errors import CaptionfixError as CaptionfixError
    from captionfix.errors import DataError as DataError
    from captionfix.errors import ImageError as ImageError
    from captionfix.errors import OutputError as OutputError
    from captionfix.errors import PolicyError as PolicyError
    from captionfix.errors import UnsupportedOperation as UnsupportedOperation
    from captionfix.explain import explain as explain
    from captionfix.explanation import Explanation as Explanation
    from captionfix.explanation import Explanations as Explanations
    from captionfix.explanation import Word as Word
    from captionfix.saved import read as read
    from captionfix.unravel import Policy as Policy

_PUBLIC = {
    "load": "captionfix.captioners.loading",
    "wrap": "captionfix.captioners.wrap",
    "explain": "captionfix.explain",
    "explain_classes": "captionfix.classify",
    "Captioner": "captionfix.captioners.captioner",
    "Policy": "captionfix.unravel",
    "Explanation": "captionfix.explanation",
    "Explanations": "captionfix.explanation",
    "Word": "captionfix.explanation",
    "read": "captionfix.saved",
    "CaptionfixError": "captionfix.errors",
    "ImageError": "captionfix.errors",
    "CaptionError": "captionfix.errors",
    "CaptionerError": "captionfix.errors",
    "OutputError": "captionfix.errors",
    "DataError": "captionfix.errors",
    "UnsupportedOperation": "captionfix.errors",
    "PolicyError": "captionfix.errors",
}
__all__ = ["__version__", *_PUBLIC]


class _Package(ModuleType):
    """Keeps ``captionfix.explain`` the function: importing the submodule of that name would put the module in its
    place.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
