"""Nothing of a pickle is run, whatever it asks for; what is harmless comes out as it went in."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import random
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from samples import buffer, foreign
from torch import nn

from captionfix.captioners.published.safe_pickle import Held, read, tensors
from captionfix.errors import CaptionerError


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *args, state=None) -> None:
        self.made = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.made


class Harmless:
    pass


def touch(canary: Path) -> str:
    return f"touch {canary}"


def text(module: str, name: str, argument: str) -> bytes:
    """A pickle as text, with the name of a function."""
    return f"c{module}\n{name}\n(S{argument!r}\ntR.".encode()


ATTACKS = {
    "os.system": lambda c: Calls(os.system, touch(c)),
    "eval": lambda c: Calls(eval, f"open({str(c)!r}, 'w')"),
    "exec": lambda c: Calls(exec, f"open({str(c)!r}, 'w')"),
    "open": lambda c: Calls(open, str(c), "w"),
    "an import": lambda c: Calls(__import__, "os"),
    "inside arguments": lambda c: Calls(list, [Calls(os.system, touch(c))]),
    "an attribute": lambda c: Calls(getattr, str, "join"),
    "in a state": lambda c: Calls(Harmless, state={"x": Calls(os.system, touch(c))}),
    "as a state": lambda c: Calls(Harmless, state=Calls(os.system, touch(c))),
    "inside a dict": lambda c: {"encoder": Calls(os.system, touch(c)), "word2idx": {"<start>": Calls(exec, "1")}},
    "subprocess": lambda c: Calls(__import__("subprocess").call, ["touch", str(c)]),
    "partial": lambda c: Calls(__import__("functools").partial, os.system, touch(c)),
    "torch's own loading": lambda c: Calls(torch.storage._load_from_bytes, pickle.dumps(Calls(os.system, touch(c)))),
}
RAW = {
    "posix": lambda c: text("posix", "system", touch(c)),
    "builtins of Python 2": lambda c: text("__builtin__", "eval", f"open({str(c)!r}, 'w')"),
    "an instance": lambda c: f"(S{touch(c)!r}\nios\nsystem\n.".encode(),
    "copy_reg": lambda c: f"ccopy_reg\n_reconstructor\n(cos\nsystem\nS{touch(c)!r}\nNtR.".encode(),
    "a dotted name": lambda c: b"\x80\x04\x8c\x08builtins\x8c\x0aeval.__call__\x93\x8c\x011\x85R.",
    "attributes of a known function": lambda c: b"ccollections\nOrderedDict\n(dS'x'\nS'y'\nsb.",
    "attributes of a rebuilding": lambda c: b"ctorch._utils\n_rebuild_tensor_v2\n(N(dS'_function'\nS'y'\nstb.",
    "a persistent id": lambda c: f"(S'storage'\ncos\nsystem\nS{touch(c)!r}\nS'cpu'\nI4\ntQ.".encode(),
}


def attempt(path: Path) -> None:
    try:
        found = read(path)
    except CaptionerError:
        return
    tensors(found)


@pytest.mark.parametrize("container", ["pickle", "zip", "older"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_calls_are_not_made(tmp_path, attack, container):
    canary, path = tmp_path / "canary", tmp_path / "file.pkl"
    value = ATTACKS[attack](canary)
    if container == "pickle":
        path.write_bytes(pickle.dumps(value, 2))
    else:
        path.write_bytes(buffer(value, _use_new_zipfile_serialization=container == "zip"))
    attempt(path)
    assert not canary.exists()
    path.write_bytes(buffer({"x": torch.ones(2)}))  # and the reader is as it was
    assert torch.equal(tensors(read(path))["x"], torch.ones(2))


@pytest.mark.parametrize("attack", RAW)
def test_names_are_not_followed(tmp_path, attack):
    canary, path = tmp_path / "canary", tmp_path / "file.pkl"
    path.write_bytes(RAW[attack](canary))
    attempt(path)
    assert not canary.exists()


def test_the_attacks_are_attacks(tmp_path):
    """Read as pickles usually are, they do what they want."""
    for name in ("os.system", "inside arguments", "in a state"):
        canary = tmp_path / "canary"
        pickle.loads(pickle.dumps(ATTACKS[name](canary), 2))
        assert canary.exists()
        canary.unlink()
    pickle.loads(RAW["posix"](canary))
    assert canary.exists()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.scale = nn.Parameter(torch.randn(2))
        self.width = 7


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_of_state_dicts_and_of_whole_modules(tmp_path, legacy):
    net = Net()
    expected = net.state_dict()
    path = tmp_path / "net.pth"
    for whole in (False, True):
        with foreign("somebody", Net):
            torch.save(net if whole else expected, path, _use_new_zipfile_serialization=not legacy)
        found = tensors(read(path))
        assert list(found) == list(expected) or set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    held = read(path)
    assert isinstance(held, Held)
    assert held.origin == ("somebody", "Net")
    assert held.attributes["width"] == 7


@pytest.mark.parametrize("legacy", [False, True])
def test_views_types_and_empty_tensors(tmp_path, legacy):
    base = torch.arange(24.0).view(4, 6)

    class Module:  # makes the file one that torch's own safe loading refuses
        pass

    values = {
        "base": base,
        "turned": base.t(),
        "part": base[1:3, ::2],
        "half": base.half(),
        "bfloat": base.bfloat16(),
        "double": base.double(),
        "long": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
    }
    with foreign("somebody", Module):
        (tmp_path / "f").write_bytes(buffer({**values, "other": Module()}, _use_new_zipfile_serialization=not legacy))
    found = read(tmp_path / "f")
    for name, value in values.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_parameters_as_they_were_pickled_before_1_0(tmp_path):
    """`Parameter` made by its class, its state set behind."""

    class Parameter:
        def __new__(cls, data=None):
            return super().__new__(cls)

        def __reduce__(self):
            return Parameter, (torch.ones(3),), (True, False, collections.OrderedDict())

    Parameter.__module__ = "torch.nn.parameter"
    original = torch.nn.parameter.Parameter
    torch.nn.parameter.Parameter, Parameter.__qualname__ = Parameter, "Parameter"
    try:
        content = buffer({"w": Parameter()}, _use_new_zipfile_serialization=False)
    finally:
        torch.nn.parameter.Parameter = original
    (tmp_path / "f").write_bytes(content)
    assert torch.equal(tensors(read(tmp_path / "f"))["w"], torch.ones(3))


def test_data_parallel_names(tmp_path):
    (tmp_path / "f").write_bytes(buffer({"module.a": torch.ones(1), "module.b": torch.ones(1)}))
    assert set(tensors(read(tmp_path / "f"))) == {"a", "b"}


def test_pickles_of_python_2(tmp_path):
    """An object of a class, as `pickle.dump` wrote it by default."""
    (tmp_path / "f").write_bytes(
        b"ccopy_reg\n_reconstructor\np0\n(c__main__\nVocabulary\np1\nc__builtin__\nobject\np2\nNtp3\nRp4\n"
        b"(dp5\nS'idx'\np6\nI2\nsS'word2idx'\np7\n(dp8\nS'caf\\xc3\\xa9'\np9\nI0\nsVend\np10\nI1\nssb."
    )
    found = read(tmp_path / "f")
    assert found.origin == ("__main__", "Vocabulary")
    assert found.attributes["idx"] == 2
    assert sorted(found.attributes["word2idx"].values()) == [0, 1]


def test_a_namespace_is_held(tmp_path):
    (tmp_path / "f").write_bytes(pickle.dumps({"opt": argparse.Namespace(rnn_size=512)}, 2))
    assert read(tmp_path / "f")["opt"].attributes == {"rnn_size": 512}


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_files_are_clear_errors(tmp_path, legacy):
    """Cut off anywhere or with bytes changed: read, or refused as such, and nothing else."""
    with foreign("somebody", Net):
        whole = buffer(Net(), _use_new_zipfile_serialization=not legacy)
    path, generator = tmp_path / "f", random.Random(0)
    messages = []
    for i in range(60):
        content = bytearray(whole)
        if i % 2:
            content = content[: generator.randrange(len(content))]
        else:
            for _ in range(8):
                content[generator.randrange(len(content))] = generator.randrange(256)
        path.write_bytes(content)
        try:
            tensors(read(path))
        except CaptionerError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all(str(path) in message for message in messages)


def test_tensors_beyond_their_storage_are_refused(tmp_path):
    """Sizes are the file's claims."""

    class Rebuilt:
        def __init__(self, storage, size, stride) -> None:
            self.made = torch._utils._rebuild_tensor_v2, (storage, 0, size, stride, False, collections.OrderedDict())

        def __reduce__(self):
            return self.made

    storage = torch.zeros(4)._typed_storage()
    for size, stride in (((5,), (1,)), ((2, 3), (2, 1)), ((10**12,), (0,)), ((2,), (-1,))):
        (tmp_path / "f").write_bytes(
            buffer([Rebuilt(storage, size, stride), Harmless], _use_new_zipfile_serialization=False)
        )
        with pytest.raises(CaptionerError):
            read(tmp_path / "f")


def test_a_tensor_that_would_not_fit_into_memory(tmp_path):
    """A few bytes in the file that stand for a thousand thousand millions."""
    (tmp_path / "f").write_bytes(buffer({"w": torch.zeros(1).expand(10**12)}))
    with pytest.raises(CaptionerError, match="repeats"):
        tensors(read(tmp_path / "f"))


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CaptionerError, match="no file"):
        read(tmp_path / "nowhere")
    (tmp_path / "f").write_bytes(b"")
    with pytest.raises(CaptionerError, match="is a file that is neither"):
        read(tmp_path / "f")
    with tarfile.open(tmp_path / "t.pth.tar", "w") as archive:
        archive.add(tmp_path / "f", "BEST_checkpoint.pth")
    with pytest.raises(CaptionerError, match="is a tar archive"):
        read(tmp_path / "t.pth.tar")
    with zipfile.ZipFile(tmp_path / "z", "w") as archive:
        archive.writestr("encoder.pkl", b"x")
    with pytest.raises(CaptionerError, match="unpack it first"):
        read(tmp_path / "z")
