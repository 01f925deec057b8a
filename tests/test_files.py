from __future__ import annotations

import os
from pathlib import Path

import pytest

from captionfix.errors import OutputError
from captionfix.files import atomic_folder, atomic_write, check_free, free_name

as_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions don't bind this user")


def test_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"
    atomic_write(target, "first")
    atomic_write(target, "zweité".encode())
    assert target.read_text(encoding="utf-8") == "zweité"
    assert [*target.parent.iterdir()] == [target]


def test_write_where_a_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(OutputError, match="can't write"):
        atomic_write(tmp_path / "file" / "below", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="can't write"):
        atomic_write(tmp_path / "folder", b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@as_root
def test_write_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="can't write"):
        atomic_write(tmp_path / "file", b"")
    with pytest.raises(OutputError, match="can't make the folder"), atomic_folder(tmp_path / "folder"):
        pass
    tmp_path.chmod(0o700)


def test_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "result"
    with atomic_folder(target) as place:
        (place / "one").write_text("1")
        assert not target.exists()
    assert (target / "one").read_text() == "1"
    assert [*target.parent.iterdir()] == [target]


def test_folder_may_exist_empty(tmp_path: Path) -> None:
    with atomic_folder(tmp_path) as place:
        (place / "one").write_text("1")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "result") as place:
            (place / "one").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [*tmp_path.iterdir()] == []


def test_folder_that_holds_something_is_kept(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("mine")
    with pytest.raises(OutputError, match="not empty; choose another"), atomic_folder(tmp_path) as place:
        (place / "one").write_text("other")
    with pytest.raises(OutputError, match="not a folder"):
        check_free(tmp_path / "one")
    assert (tmp_path / "one").read_text() == "mine"


def test_free_name_counts_up(tmp_path: Path) -> None:
    assert free_name(tmp_path / "out") == tmp_path / "out"
    (tmp_path / "out").mkdir()
    (tmp_path / "out-2").mkdir()
    assert free_name(tmp_path / "out") == tmp_path / "out-3"
