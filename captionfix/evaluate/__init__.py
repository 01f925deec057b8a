"""Is the evidence in the right place, does the model really use it, and what does it cost: data with known regions,
metrics, and the methods that people use today.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..errors import PolicyError


def needed(package: str) -> Any:
    """Imports a package of the extra ``compare``.

    Raises:
        PolicyError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise PolicyError(f'this needs {package.partition(".")[0]}: pip install "captionfix[compare]"') from error
