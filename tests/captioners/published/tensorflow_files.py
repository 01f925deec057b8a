"""Writes TensorFlow checkpoints, of both formats, as TensorFlow does."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def number(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(tag: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return number(tag << 3) + number(value)
    return number(tag << 3 | 2) + number(len(value)) + value


def shape(sizes: tuple[int, ...]) -> bytes:
    return b"".join(field(2, field(1, size)) for size in sizes)


def table(entries: Mapping[bytes, bytes], block_size: int = 4096, restart: int = 16) -> bytes:
    """LevelDB's table: sorted keys in blocks, every key without what it shares with the one before."""
    out, index = b"", b""
    handles: list[tuple[bytes, int, int]] = []
    keys = sorted(entries)

    def write(block: bytes) -> tuple[int, int]:
        nonlocal out
        at = len(out)
        out += block + b"\0" + struct.pack("<I", 0)  # no compression, a checksum that nobody checks
        return at, len(block)

    def block(pairs: list[tuple[bytes, bytes]]) -> bytes:
        body, restarts, before = b"", [], b""
        for i, (key, value) in enumerate(pairs):
            shared = 0
            if i % restart == 0:
                restarts.append(len(body))
            else:
                while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                    shared += 1
            body += number(shared) + number(len(key) - shared) + number(len(value)) + key[shared:] + value
            before = key
        return body + b"".join(struct.pack("<I", r) for r in restarts or [0]) + struct.pack("<I", len(restarts or [0]))

    pending: list[tuple[bytes, bytes]] = []
    for key in keys:
        pending.append((key, entries[key]))
        if sum(len(k) + len(v) for k, v in pending) > block_size:
            handles.append((key, *write(block(pending))))
            pending = []
    if pending:
        handles.append((pending[-1][0], *write(block(pending))))
    meta = write(block([]))
    index = block([(key, number(at) + number(size)) for key, at, size in handles])
    where = write(index)
    footer = b"".join(number(n) for n in (*meta, *where)).ljust(40, b"\0")
    return out + footer + struct.pack("<Q", 0xDB4775248B80FB57)


def bundle(prefix: Path, variables: Mapping[str, np.ndarray]) -> None:
    """``prefix.index`` and ``prefix.data-00000-of-00001``."""
    data, entries = b"", {b"": field(1, 1) + field(3, field(1, 1))}
    for name in sorted(variables):
        value = np.asarray(variables[name])
        kind = {"float32": 1, "int64": 9}[str(value.dtype)]
        content = value.astype(value.dtype.newbyteorder("<")).tobytes()
        entry = field(1, kind) + field(2, shape(value.shape))
        entry += (field(4, len(data)) if data else b"") + field(5, len(content))
        entries[name.encode()] = entry + number(6 << 3 | 5) + struct.pack("<I", 123)
        data += content
    prefix.with_name(prefix.name + ".index").write_bytes(table(entries))
    prefix.with_name(prefix.name + ".data-00000-of-00001").write_bytes(data)


def single(path: Path, variables: Mapping[str, np.ndarray]) -> None:
    """The one file of the older format."""
    metas, entries = b"", {}
    for name in sorted(variables):
        value = np.asarray(variables[name], np.float32)
        whole = b"".join(field(1, b"") for _ in value.shape)
        metas += field(1, field(1, name.encode()) + field(2, shape(value.shape)) + field(3, 1) + field(4, whole))
        tensor = field(1, 1) + field(2, shape(value.shape)) + field(5, value.tobytes())
        entries[b"\0" + name.encode() + b"\0\1"] = field(
            2, field(1, name.encode()) + field(2, whole) + field(3, tensor)
        )
    path.write_bytes(table({b"": field(1, metas), **entries}))
