"""Reads pickles and torch checkpoints of strangers without running anything that they ask for.

A pickle is a program: whatever callable it names is called. Here a name stands for one of a few harmless things
(`_KNOWN`), or for nothing at all: every other class or function becomes an inert `Held` that keeps what the pickle gave
it. So a whole pickled module comes back as its tensors and numbers, without its code, and a file that wants to call
`os.system` gets a `Held` instead.
"""

from __future__ import annotations

import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from captionfix.errors import CaptionerError

_LEGACY = 0x1950A86A20F9469CFC6C  # what torch.save wrote first until version 1.6
_DEPTH = 64  # modules inside modules

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Held:
    """Stands for an object of a class that is not run: it keeps what the pickle filled it with, and does nothing.

    Attributes:
        origin: module and name of the class.
        args: what it was to be made with.
        state: what `__setstate__` was to get: its attributes, mostly.
        entries: items set on it as on a dict.
        items: items appended to it as to a list.
    """

    origin: tuple[str, str] = ("", "")
    args: tuple[Any, ...]
    state: Any
    entries: dict[Any, Any]
    items: list[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Held:
        self = super().__new__(cls)
        self.args, self.state, self.entries, self.items = args, None, {}, []
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def __call__(self, *args: Any) -> Held:
        return Held(self, *args)

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Any) -> None:
        self.items.extend(items)

    @property
    def attributes(self) -> dict[str, Any]:
        """The object's attributes, as far as the pickle gave any."""
        state = self.state[0] if isinstance(self.state, tuple) and self.state else self.state
        return {k: v for k, v in state.items() if isinstance(k, str)} if isinstance(state, dict) else {}


class _Known:
    """A harmless callable. Each reader has its own, without attributes, so that a pickle can change nothing by it."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)


class _Storage:
    """The memory of tensors; `data` is filled when its bytes are met (after the pickle in the older container)."""

    __slots__ = ("data", "dtype")

    def __init__(self, data: Tensor, dtype: torch.dtype) -> None:
        self.data, self.dtype = data, dtype  # data: uint8

    def part(self, offset: int, count: int) -> _Storage:
        width = self.dtype.itemsize
        return _Storage(self.data[offset * width : (offset + count) * width], self.dtype)


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    flat = storage.data.view(storage.dtype)
    shape, step = tuple(int(n) for n in size), tuple(int(n) for n in stride)
    last = int(offset) + sum((n - 1) * s for n, s in zip(shape, step, strict=True))
    count = torch.Size(shape).numel()  # more elements than there are would be few numbers, repeated: no weights
    if min((*shape, *step, int(offset)), default=0) < 0 or (count and max(last + 1, count) > len(flat)):
        raise pickle.UnpicklingError("a tensor outside of its storage")
    return flat.as_strided(shape, step, int(offset))


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _reconstructed(kind: Any, *_: Any) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, Held)):
        raise pickle.UnpicklingError("an object of a class that is not held")
    return kind()


class _Dict(dict[Any, Any]):
    """An ordered dict without attributes (a state dict has one, its version numbers)."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch", "Size"): tuple,
    **{
        (module, name): kind
        for module in ("builtins", "__builtin__")
        for name, kind in {"set": set, "frozenset": frozenset, "list": list, "dict": dict, "tuple": tuple}.items()
    },
    **{(module, "_reconstructor"): _reconstructed for module in ("copyreg", "copy_reg")},
}


class _Parameter(Held):
    """PyTorch before 1.0 makes parameters by `Parameter.__new__(Parameter, tensor)`."""


class Reader(pickle.Unpickler):
    """An unpickler that runs nothing.

    Args:
        file: where the pickle is.
        storage: gives the storage of a persistent id: (dtype, key, number of elements) -> storage.
    """

    def __init__(self, file: IO[bytes], storage: Callable[[torch.dtype, str, int], _Storage] | None = None) -> None:
        super().__init__(file, encoding="latin-1")
        self._storage = storage
        self._classes: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        key = module, name
        if key not in self._classes:
            if module in ("torch", "torch.cuda", "torch.storage") and name in _DTYPES:
                self._classes[key] = _DTYPES[name]
            elif name in ("Parameter", "Variable") and module.startswith("torch"):
                self._classes[key] = type(name, (_Parameter,), {"origin": key, "__slots__": ()})
            elif key in _KNOWN:
                self._classes[key] = _Known(_KNOWN[key])
            else:
                self._classes[key] = type("Held", (Held,), {"origin": key})
        return self._classes[key]

    def persistent_load(self, pid: Any) -> Any:
        kind, *data = pid if isinstance(pid, tuple) else (None,)
        if kind in ("module", b"module"):  # a class with its source beside it
            return data[0]
        if kind in ("storage", b"storage") and self._storage is not None and isinstance(data[0], torch.dtype):
            dtype, key, _, count, *view = data
            whole = self._storage(dtype, str(key), int(count))
            return whole.part(int(view[0][1]), int(view[0][2])) if view and view[0] is not None else whole
        raise pickle.UnpicklingError("a reference that is no storage")


def read(path: Path) -> Any:
    """Whatever a pickle or a torch checkpoint (of the zip or of the older container) holds.

    Tensors lie on the CPU; objects of classes that are not run are `Held`.

    Raises:
        CaptionerError: the file is missing, damaged, or no pickle.
    """
    try:
        if zipfile.is_zipfile(path):
            return _plain_or(path, _zip)
        with path.open("rb") as file:
            first = Reader(file).load()
            if first == _LEGACY:
                return _plain_or(path, _legacy)
            return first
    except FileNotFoundError as error:
        raise CaptionerError(f"there is no file {path}") from error
    except RecursionError as error:
        raise CaptionerError(f"{path} can't be read: it is nested too deeply") from error
    except (OSError, EOFError, MemoryError, pickle.UnpicklingError, zipfile.BadZipFile, struct.error) as error:
        raise CaptionerError(_unreadable(path, error)) from error
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise CaptionerError(_unreadable(path, error)) from error  # what a damaged pickle may raise


def _unreadable(path: Path, error: Exception) -> str:
    try:
        if tarfile.is_tarfile(path):
            return f"{path} is a tar archive, not a checkpoint; give the file that lies inside"
    except OSError:
        pass
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{path} is a file that is neither a pickle nor a torch checkpoint, or is cut off ({reason})"


def _plain_or(path: Path, own: Callable[[Path], Any]) -> Any:
    """torch's own safe loading where it can, which is for plain tensors; else ours."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, AttributeError, EOFError, AssertionError):
        return own(path)


def _zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        place = next((name for name in names if name == "data.pkl" or name.endswith("/data.pkl")), None)
        if place is None:
            raise pickle.UnpicklingError("a zip archive, but not one that torch.save wrote; unpack it first")
        folder = place.removesuffix("data.pkl")
        if folder + "byteorder" in names and archive.read(folder + "byteorder") != b"little":
            raise pickle.UnpicklingError("written on a big-endian machine")
        storages: dict[str, _Storage] = {}

        def storage(dtype: torch.dtype, key: str, count: int) -> _Storage:
            if key not in storages:
                info = archive.getinfo(f"{folder}data/{key}")
                if info.compress_type != zipfile.ZIP_STORED:
                    raise pickle.UnpicklingError("compressed again after it was written")
                data = archive.read(info)
                if len(data) < count * dtype.itemsize:
                    raise pickle.UnpicklingError("a storage is cut off")
                storages[key] = _Storage(_bytes(data), dtype)
            return storages[key]

        with archive.open(place) as file:
            return Reader(file, storage).load()


def _legacy(path: Path) -> Any:
    size = path.stat().st_size
    with path.open("rb") as file:
        for _ in range(2):  # the magic number, the protocol's version
            Reader(file).load()
        machine = Reader(file).load()
        if isinstance(machine, dict) and machine.get("little_endian") is False:
            raise pickle.UnpicklingError("written on a big-endian machine")
        storages: dict[str, _Storage] = {}

        def storage(dtype: torch.dtype, key: str, count: int) -> _Storage:
            if key not in storages:
                if not 0 <= count * dtype.itemsize <= size:
                    raise pickle.UnpicklingError("a storage is larger than the file")
                storages[key] = _Storage(torch.zeros(count * dtype.itemsize, dtype=torch.uint8), dtype)
            return storages[key]

        result = Reader(file, storage).load()
        for key in Reader(file).load():
            (count,) = struct.unpack("<q", file.read(8))
            whole = storages[str(key)]
            data = file.read(count * whole.dtype.itemsize)
            if len(data) != len(whole.data):
                raise pickle.UnpicklingError("the file is cut off")
            whole.data.copy_(_bytes(data))
        return result


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def tensors(value: Any) -> dict[str, Tensor]:
    """The tensors of a state dict, or of a whole module that was pickled, by their names in `state_dict()`.

    Args:
        value: what `read` gave, or a part of it. DataParallel's ``module.`` is left out of the names.
    """
    found = dict(_of_module(value, "", 0)) if isinstance(value, Held) else _of_dict(value)
    if found and all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    return found


def _of_dict(value: Any) -> dict[str, Tensor]:
    if not isinstance(value, dict):
        return {}
    plain = {name: plain_tensor(item) for name, item in dict.items(value) if isinstance(name, str)}
    return {name: tensor for name, tensor in plain.items() if tensor is not None}


def _of_module(module: Held, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if depth > _DEPTH:
        raise CaptionerError("a pickled module is nested too deeply")
    state = module.attributes
    for group in ("_parameters", "_buffers"):
        for name, tensor in _of_dict(state.get(group)).items():
            yield prefix + name, tensor
    inner = state.get("_modules")
    for name, child in inner.items() if isinstance(inner, dict) else ():
        if isinstance(child, Held) and isinstance(name, str):
            yield from _of_module(child, f"{prefix}{name}.", depth + 1)


def plain_tensor(value: Any) -> Tensor | None:
    """A tensor or what stands for a parameter, as a tensor; None for anything else."""
    if isinstance(value, _Parameter):
        value = value.args[0] if value.args else value.state
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CaptionerError(f"a tensor of shape {tuple(value.shape)} only repeats few numbers: these are no weights")
    return value.detach()
