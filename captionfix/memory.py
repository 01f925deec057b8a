"""Memory that the C library keeps between two tensors."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
_LARGE = 1 << 30
_STEP = 200 << 20


def keep_freed() -> bool:
    """Tells glibc to keep freed memory for the next tensor.

    By default it gives a large block back to the system at once and asks for new, zeroed pages at the next operation's
    result: a third of what the command line's time went to. The process holds on to its peak from then on.

    Returns:
        whether the C library took it: glibc on Linux does, others have no such setting.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = {_MMAP_THRESHOLD: _LARGE, _TRIM_THRESHOLD: 2 * _LARGE - 1, _TOP_PAD: _STEP}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
