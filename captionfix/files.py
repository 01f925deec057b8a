"""Writing so that a reader never meets a half-written result: everything goes to a temporary name first and is then
renamed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from captionfix.errors import OutputError


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes a file in one step: readers see the old content or the new, never a part.

    Args:
        path: The file. Its folder is made if missing; an existing file is replaced.
        data: Bytes, or text that is written as UTF-8.

    Raises:
        OutputError: The file can't be written there.
    """
    target = Path(path)
    content = data.encode() if isinstance(data, str) else data
    temporary: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(temporary, target)
    except OSError as error:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
        raise OutputError(f"can't write {target}: {_reason(error)}; choose a place that can be written") from error


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Makes a folder in one step: yields a temporary sibling, renamed to ``path`` on success and removed on failure.

    Args:
        path: The folder to make. It may exist if it is empty.

    Yields:
        The temporary folder to write into.

    Raises:
        OutputError: ``path`` is a file or a folder that holds something, or can't be written.
    """
    target = Path(path)
    try:
        check_free(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise OutputError(
            f"can't make the folder {target}: {_reason(error)}; choose a place that can be written"
        ) from error
    try:
        yield temporary
        try:
            os.chmod(temporary, 0o777 & ~_umask())
            check_free(target)
            with suppress(FileNotFoundError):
                target.rmdir()  # empty, as just seen; a rename onto an existing folder is not portable
            os.rename(temporary, target)
        except OSError as error:
            raise OutputError(f"can't make the folder {target}: {_reason(error)}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_free(path: str | os.PathLike[str]) -> None:
    """Raises OutputError if ``path`` is a file, or a folder that holds something."""
    target = Path(path)
    try:
        if target.is_dir():
            if any(target.iterdir()):
                raise OutputError(f"the folder {target} exists and is not empty; choose another or remove it")
        elif os.path.lexists(target):
            raise OutputError(f"{target} exists and is not a folder; choose another name or remove it")
    except OSError as error:
        raise OutputError(f"can't look into {target}: {_reason(error)}") from error


def free_name(path: str | os.PathLike[str]) -> Path:
    """The first of ``path``, ``path-2``, ``path-3``, ... that does not exist."""
    first = Path(path)
    candidate, number = first, 1
    while os.path.lexists(candidate):
        number += 1
        candidate = first.with_name(f"{first.name}-{number}")
    return candidate


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _umask() -> int:
    mask = os.umask(0)  # the only portable way to read it is to set it
    os.umask(mask)
    return mask
