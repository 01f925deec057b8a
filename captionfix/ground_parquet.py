"""The rows of a folder as Parquet, for those who have more of them than JSON lines are good for."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

from captionfix.errors import OutputError
from captionfix.ground_rows import WORDS, Row, lines

PARQUET = "words.parquet"
_PAIRS = ("language", "alternatives")
_AT_ONCE = 10_000  # rows


def write_parquet(folder: Path) -> Path:
    """``words.parquet`` out of ``words.jsonl``: the same columns (`captionfix.ground_rows.rows`), with the pairs of
    ``language`` and ``alternatives`` as structs of ``word`` and ``share``.

    Raises:
        OutputError: pyarrow is not installed, or the file can't be written.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetWriter
    except ImportError as error:
        raise OutputError("Parquet needs pyarrow (pip install pyarrow); words.jsonl has the same rows") from error
    text, real, whole = pyarrow.string(), pyarrow.float64(), pyarrow.int64()
    reals = pyarrow.list_(real)
    pairs = pyarrow.list_(pyarrow.struct([("word", text), ("share", real)]))
    columns: dict[str, Any] = {
        "image": text, "file": text, "folder": text, "size": pyarrow.list_(whole), "window": reals, "caption": text,
        "place": whole, "word": text, "probability": real, "image_share": real, "image_effect": real, "other": real,
        "language": pairs, "alternatives": pairs, "contrast": text, "box": reals, "point": reals,
        "fixations": pyarrow.list_(reals), "feature_map": pyarrow.list_(reals),
    }  # fmt: skip
    schema = pyarrow.schema(columns)
    target, temporary = folder / PARQUET, folder / f".{PARQUET}.new"
    try:
        with ParquetWriter(temporary, schema) as writer:
            found = map(_columns, lines(folder / WORDS))
            while part := list(itertools.islice(found, _AT_ONCE)):
                writer.write_table(pyarrow.Table.from_pylist(part, schema=schema))
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(f"can't write {target}: {error.strerror or error}") from error
    return target


def _columns(row: Row) -> Row:
    return {**row, **{name: [{"word": text, "share": share} for text, share in row[name]] for name in _PAIRS}}
