"""Locks on files: the second process is told, a crash leaves nothing that hinders, nobody else's file is touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from taylor_attention.core.locks import locked
from taylor_attention.errors import StorageError

fcntl = pytest.importorskip("fcntl", reason="this system has no such locks")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


@pytest.fixture
def side(path: Path) -> Path:
    """The file that the lock is on."""
    return path.with_name("file.lock")


def test_while_it_is_held_the_second_is_told_and_then_nothing_is_left(path: Path, side: Path):
    with locked(path):
        assert side.exists()
        for _ in range(2):  # being told changes nothing
            with pytest.raises(StorageError, match=f"^{path}: in use by another process$"), locked(path):
                pass
    assert list(path.parent.iterdir()) == []
    with locked(path), locked(path.with_name("other")):
        pass


def test_it_is_given_back_when_the_block_fails(path: Path):
    with pytest.raises(ZeroDivisionError), locked(path):
        raise ZeroDivisionError
    assert list(path.parent.iterdir()) == []


def test_what_a_killed_process_left_does_not_hinder_and_is_removed(path: Path, side: Path):
    side.touch()
    with locked(path):
        pass
    assert not side.exists()


def test_one_file_has_one_lock_whatever_links_lead_to_it(path: Path):
    (path.parent / "folder").mkdir()
    (path.parent / "folder" / "link").symlink_to("../file")
    with locked(path), pytest.raises(StorageError, match="in use by another process"):
        locked(path.parent / "folder" / "link").__enter__()


def test_a_file_of_that_name_with_content_is_left_alone(path: Path, side: Path):
    side.write_text("the lock file of another program, say")
    with pytest.raises(StorageError, match=f"^{path}: cannot be locked, as {side} is no lock of ours; move it away$"):
        locked(path).__enter__()
    assert side.read_text() == "the lock file of another program, say"


@pytest.mark.parametrize("kind", ["a link", "a pipe", "a folder"])
def test_what_is_no_file_of_that_name_is_left_alone(path: Path, side: Path, kind: str):
    precious = path.with_name("precious")
    precious.write_text("kept")
    {"a link": lambda: side.symlink_to(precious), "a pipe": lambda: os.mkfifo(side), "a folder": side.mkdir}[kind]()
    with pytest.raises(StorageError, match=f"^{path}: cannot be locked"):
        locked(path).__enter__()
    assert os.path.lexists(side)
    assert precious.read_text() == "kept"


def test_a_lock_that_someone_removed_is_not_removed_from_the_next_owner(path: Path, side: Path):
    first, second = locked(path), locked(path)
    first.__enter__()
    side.unlink()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(StorageError, match="in use by another process"):
        locked(path).__enter__()
    second.__exit__(None, None, None)
    assert not side.exists()


def test_a_lock_whose_file_went_while_it_was_taken_is_taken_anew(path: Path, monkeypatch: pytest.MonkeyPatch):
    """Between our opening and our locking, its owner may remove it: a lock on it would then keep nobody out."""
    flock, side = fcntl.flock, path.with_name("file.lock")

    def remove_first(descriptor: int, flags: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        side.unlink()
        flock(descriptor, flags)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with locked(path), pytest.raises(StorageError, match="in use by another process"):
        locked(path).__enter__()


def test_where_there_are_no_locks_nothing_is_locked_and_nothing_left(path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(path), locked(path):
        pass
    assert list(path.parent.iterdir()) == []


def test_in_a_folder_that_is_not_there_it_says_so(path: Path):
    with pytest.raises(StorageError, match="cannot be locked \\(No such file or directory\\)$"):
        locked(path / "below").__enter__()
