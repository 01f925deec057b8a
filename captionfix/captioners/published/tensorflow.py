"""TensorFlow checkpoints without TensorFlow: both the single file of 2015-16 and the later bundle.

Both keep their keys in a table of LevelDB's format (github.com/google/leveldb, doc/table_format.md). The bundle
(tensorflow/core/util/tensor_bundle) has in it where each tensor lies in its data file (``tensor_bundle.proto``); the
older file has the tensors themselves (``saved_tensor_slice.proto``).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captionfix.errors import CaptionerError

_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48
_FLOAT, _DOUBLE, _HALF = 1, 2, 19  # DataType of types.proto
_DTYPES: dict[int, Any] = {_FLOAT: "<f4", _DOUBLE: "<f8", _HALF: "<f2"}
_DAMAGED = (struct.error, IndexError, ValueError, KeyError, TypeError, UnicodeDecodeError, OverflowError)


@dataclass(frozen=True)
class Variables:
    """The variables of a checkpoint.

    Attributes:
        path: the file that was opened.
        shapes: of every variable.
        read: a variable's values by its name, as float32.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def is_table(path: Path) -> bool:
    """Whether the file ends as LevelDB's tables do."""
    with path.open("rb") as file:
        file.seek(0, 2)
        if file.tell() < _FOOTER:
            return False
        file.seek(-8, 2)
        return file.read(8) == struct.pack("<Q", _MAGIC)


def open_checkpoint(path: Path) -> Variables:
    """A checkpoint by its ``.index`` file, or by the single file of the older format.

    Raises:
        CaptionerError: the file is damaged, compressed, or its data file is missing or cut off.
    """
    try:
        data = path.read_bytes()
        entries = _table(data)
        first = next(entries)
        if first[0] != b"":
            raise ValueError("no header")
        header = _message(first[1])
        bundle = isinstance(header.get(1, [1])[0], int)  # a number of shards; the older format has a message there
        return _bundle(path, header, entries) if bundle else _slices(path, header, entries)
    except (OSError, StopIteration, *_DAMAGED) as error:
        raise CaptionerError(
            f"{path} can't be read as a TensorFlow checkpoint ({str(error) or type(error).__name__}); "
            "is it downloaded completely?"
        ) from error


# the bundle


def _bundle(path: Path, header: dict[int, list[Any]], entries: Iterator[tuple[bytes, bytes]]) -> Variables:
    shards = header.get(1, [1])[0]
    if header.get(2, [0])[0]:
        raise ValueError("written on a big-endian machine")
    prefix = path.name.removesuffix(".index")
    where: dict[str, tuple[Path, int, int, int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for key, value in entries:
        entry = _message(value)
        dtype = entry.get(1, [0])[0]
        if dtype not in _DTYPES or 7 in entry:  # counters and texts; variables in slices
            continue
        name = key.decode()
        data = path.with_name(f"{prefix}.data-{entry.get(3, [0])[0]:05d}-of-{shards:05d}")
        where[name] = data, entry.get(4, [0])[0], entry.get(5, [0])[0], dtype
        shapes[name] = _shape(entry)

    def read(name: str) -> Tensor:
        data, offset, size, dtype = where[name]
        if not data.is_file():
            raise CaptionerError(
                f"{path} needs its data beside it: {data.name} is missing (a download under another name must be "
                "renamed to this)"
            )
        with data.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        kind = np.dtype(_DTYPES[dtype])
        if len(content) != size or size != kind.itemsize * math.prod(shapes[name]):
            raise CaptionerError(f"{data} is cut off, or not of {path.name}: {name} is not where it should be")
        return torch.from_numpy(np.frombuffer(content, kind).astype(np.float32).reshape(shapes[name]))

    return Variables(path, shapes, read)


# the single file


def _slices(path: Path, header: dict[int, list[Any]], entries: Iterator[tuple[bytes, bytes]]) -> Variables:
    shapes: dict[str, tuple[int, ...]] = {}
    for meta in _message(header[1][0]).get(1, []):
        fields = _message(meta)
        if fields.get(3, [0])[0] in (_FLOAT, _DOUBLE):
            shapes[fields[1][0].decode()] = _shape(fields)
    values: dict[str, np.ndarray] = {}
    for _, value in entries:
        saved = _message(_message(value)[2][0])
        name = saved[1][0].decode()
        if name in shapes:
            tensor = _message(saved[3][0])
            packed = {4: "<f4" if tensor.get(1, [_FLOAT])[0] == _FLOAT else "<f8", 5: "<f4", 6: "<f8"}
            field = next(field for field in packed if field in tensor)
            values[name] = np.frombuffer(b"".join(tensor[field]), packed[field]).astype(np.float32)

    def read(name: str) -> Tensor:
        if name not in values or values[name].size != math.prod(shapes[name]):
            raise CaptionerError(f"{path}: {name} is incomplete (variables that were saved in slices are not read)")
        return torch.from_numpy(values[name].reshape(shapes[name]))

    return Variables(path, shapes, read)


# LevelDB's table


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(data) < _FOOTER or struct.unpack("<Q", data[-8:])[0] != _MAGIC:
        raise ValueError("it does not end as a table does")
    at = len(data) - _FOOTER
    for _ in range(2):  # the block of metadata, which is empty
        _, at = _number(data, at)
    for _, handle in _block(data, *_handle(data, at)):
        yield from _block(data, *_handle(handle, 0))


def _handle(data: bytes, at: int) -> tuple[int, int]:
    offset, at = _number(data, at)
    size, _ = _number(data, at)
    return offset, size


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    if offset + size + 5 > len(data):
        raise ValueError("it is cut off")
    if data[offset + size]:
        raise ValueError("its table is compressed, as TensorFlow never writes it")
    block = data[offset : offset + size]
    (restarts,) = struct.unpack("<I", block[-4:])
    end, at, key = size - 4 - 4 * restarts, 0, b""
    while at < end:  # a key leaves out what it shares with the one before
        shared, at = _number(block, at)
        own, at = _number(block, at)
        length, at = _number(block, at)
        key = key[:shared] + block[at : at + own]
        at += own + length
        yield key, block[at - length : at]


# protocol buffers


def _number(data: bytes, at: int) -> tuple[int, int]:
    result, shift = 0, 0
    while True:
        byte = data[at]
        at += 1
        result |= (byte & 127) << shift
        if byte < 128:
            return result, at
        shift += 7


def _message(data: bytes) -> dict[int, list[Any]]:
    """The fields of a message by their numbers: numbers, and bytes for everything else."""
    fields: dict[int, list[Any]] = {}
    at = 0
    while at < len(data):
        tag, at = _number(data, at)
        kind = tag & 7
        value: int | bytes
        if kind == 0:
            value, at = _number(data, at)
        else:
            length, at = _number(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value = data[at : at + length]
            at += length
            if at > len(data):
                raise ValueError("it is cut off")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _shape(fields: dict[int, list[Any]]) -> tuple[int, ...]:
    dims = _message(fields[2][0]).get(2, []) if 2 in fields else []
    return tuple(int(_message(dim).get(1, [0])[0]) for dim in dims)
