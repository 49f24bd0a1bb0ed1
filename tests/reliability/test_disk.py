"""Full disks, and everything that a path may lead to: nothing is lost, nothing is left, one clear line says why."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kills import Nursery, state_number, training_config
from taylor_attention.core.locks import locked
from taylor_attention.core.state import State
from taylor_attention.core.storage import read_tensors, write_tensors, write_text
from taylor_attention.errors import StorageError
from taylor_attention.lm.checkpoint import load_checkpoint, save_checkpoint
from taylor_attention.lm.session import Session
from taylor_attention.lm.training import Progress, train
from taylor_attention.nn import LanguageModel, ModelConfig

pytestmark = pytest.mark.skipif(os.name != "posix", reason="limits, links and permissions are those of POSIX")

TEXT = b"the quick brown fox jumps over the lazy dog, again and again. " * 40


def a_model(seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(ModelConfig(d_model=8, num_layers=1, num_heads=1)).eval()


def a_session(seed: int) -> Session:
    session = Session(a_model(), seed=seed)
    session.read(b"What has been read ")
    return session


# ---- full disks ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_beyond(nbytes: int) -> Iterator[None]:
    """No file of this process can grow beyond so many bytes: writing on is an error, as on a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS: dict[str, Callable[[Path, int], object]] = {
    "state": lambda path, number: state_number(number).save(path),
    "session": lambda path, number: a_session(number).save(path),
    "model": lambda path, number: save_checkpoint(path, a_model(number)),
    "text": lambda path, number: write_text(path, f"{number}" * 2000),
}


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path, write: Any, share: float):
    path = tmp_path / "file"
    write(path, 1)
    before = path.read_bytes()
    with full_beyond(int(share * len(before))):
        with pytest.raises(StorageError, match=f"^{path}: cannot be written \\(File too large\\)$"):
            write(path, 2)
        assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == before
    write(path, 2)
    assert len(path.read_bytes()) >= len(before) and path.read_bytes() != before


def test_after_a_full_disk_a_session_goes_on_and_can_be_saved_elsewhere(tmp_path: Path):
    session, other = a_session(1), a_session(1)
    session.save(tmp_path / "old")
    with full_beyond(1000), pytest.raises(StorageError, match="File too large"):
        session.save(tmp_path / "new")
    first = bytes(session.stream(20))
    session.save(tmp_path / "elsewhere")
    second = bytes(Session.load(tmp_path / "elsewhere", session.model).stream(20))
    assert first + second == bytes(other.stream(40))
    assert first == bytes(Session.load(tmp_path / "old", session.model).stream(20))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    return path


def trained(folder: Path) -> object:
    tensors, metadata = read_tensors(folder / "training.safetensors", kind="training")
    rows = [line.rpartition(",")[0] for line in (folder / "log.csv").read_text().splitlines()]  # without seconds
    return {name: x.numpy().tobytes() for name, x in tensors.items()}, metadata["step"], rows


@pytest.mark.parametrize(
    ("room", "file"), [(1000, "training.safetensors"), (30, "log.csv")], ids=["at a checkpoint", "in a row of the log"]
)
def test_training_that_met_a_full_disk_goes_on_as_if_never_stopped(tmp_path: Path, text: Path, room: int, file: str):
    whole, parted = (training_config(str(text), str(tmp_path / name), 0) for name in ("whole", "parted"))
    train(whole)
    with contextlib.ExitStack() as disk:

        def fill(at: Progress) -> None:
            if at.step == 4:
                disk.enter_context(full_beyond((tmp_path / "parted" / "log.csv").stat().st_size + room))

        with pytest.raises(StorageError, match=f"{file}: cannot be written \\(File too large\\)$"):
            train(parted, progress=fill)
    train(parted, resume=True)
    assert trained(tmp_path / "parted") == trained(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "parted")) == sorted(os.listdir(tmp_path / "whole"))


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_on_a_file_system_that_is_full(nursery: Nursery, tmp_path: Path, text: Path, training: bool):
    """A real one, of 512 kB, that only a worker sees."""
    save_checkpoint(tmp_path / "model", a_model())
    (tmp_path / "disk").mkdir()
    nursery.run("on_a_small_disk", tmp_path, training)
    found = json.loads((tmp_path / "report").read_text())
    if "refused" in found:
        pytest.skip(f"no file system can be mounted here: {found['refused']}")
    reason = "cannot be written (No space left on device)"
    of_training = {
        "training": f"{tmp_path}/disk/run/training.safetensors: {reason}",
        "resumed as if never stopped": True,
    }
    assert found == {
        "state": f"{tmp_path}/disk/state: {reason}",
        "number kept": 1,
        "beside": ["filler", "state"],
        "number elsewhere": 2,
        "number when there is room again": 2,
        "generate": [2, f"error: {tmp_path}/disk/session: {reason}\n"],
        "session is the same": True,
        **(of_training if training else {}),
    }


def test_text_that_cannot_be_shown_waits_in_the_session(nursery: Nursery, tmp_path: Path):
    save_checkpoint(tmp_path / "model", a_model())
    model, path = load_checkpoint(tmp_path / "model")[0], tmp_path / "session"
    nursery.run("generate_into", tmp_path / "model", path, "/dev/full", tmp_path / "report")
    reason = "the text cannot be written (No space left on device)"
    assert json.loads((tmp_path / "report").read_text()) == [2, f"error: {reason}; saved in {path}\n"]
    saved, whole = Session.load(path, model), Session(model)
    whole.read(b"hi")
    drawn = bytes(whole.stream(saved.tokens - 2, temperature=0.8))
    assert saved.unshown == drawn != b""

    (tmp_path / "text").touch()
    nursery.run("generate_into", tmp_path / "model", path, tmp_path / "text", tmp_path / "report")
    whole.read(b"hi")
    drawn += bytes(whole.stream(50, temperature=0.8))
    shown = drawn.removesuffix(Session.load(path, model).unshown).decode("utf-8", "replace")
    assert (tmp_path / "text").read_text() == shown


# ---- where a path leads ----------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    state_number(1).save(path)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o644])
def test_the_mode_of_a_file_is_kept(path: Path, mode: int):
    path.chmod(mode)
    state_number(2).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert int(State.load(path).tokens) == 2


def test_a_new_file_gets_the_usual_mode(tmp_path: Path):
    before = os.umask(0o027)
    try:
        state_number(1).save(tmp_path / "file")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_the_owner_of_a_file_is_kept(path: Path):
    os.chown(path, 12345, 54321)
    state_number(2).save(path)
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 54321)


@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to nothing yet"])
def test_a_link_stays_a_link_and_what_it_leads_to_is_replaced(path: Path, there: bool):
    (path.parent / "far").mkdir()
    link, target = path.parent / "link", path.parent / "far" / "target"
    link.symlink_to("far/target")
    if there:
        path.rename(target)
    state_number(2).save(link)
    assert link.is_symlink()
    assert int(State.load(target).tokens) == int(State.load(link).tokens) == 2
    assert os.listdir(target.parent) == ["target"]


def test_links_in_a_circle_are_refused(tmp_path: Path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for call in (state_number(1).save, State.load):
        with pytest.raises(StorageError, match=r"a: cannot be (read|written) \(Too many levels of symbolic links\)$"):
            call(tmp_path / "a")


@contextlib.contextmanager
def anyone() -> Iterator[Path]:
    """A folder of a user without privileges, whom this process plays meanwhile if it is root."""
    outside, root = Path(tempfile.mkdtemp()), os.geteuid() == 0
    outside.chmod(0o777)
    if root:
        os.seteuid(65534)
    try:
        (outside / "own").mkdir()
        yield outside / "own"
    finally:
        if root:
            os.seteuid(0)
        shutil.rmtree(outside)


def test_a_write_protected_file_is_not_replaced(path: Path):
    read_tensors(path, kind="state")  # imports what it needs while that can be read
    with anyone() as folder:
        state_number(1).save(folder / "file")
        (folder / "file").chmod(0o444)
        with pytest.raises(StorageError, match=r"file: cannot be written \(Permission denied\)$"):
            state_number(2).save(folder / "file")
        assert int(State.load(folder / "file").tokens) == 1
        (folder / "file").chmod(0)
        with pytest.raises(StorageError, match=r"file: cannot be read \(Permission denied\)$"):
            State.load(folder / "file")
        assert os.listdir(folder) == ["file"]


def test_in_a_read_only_folder_files_are_read_and_neither_written_nor_locked(path: Path):
    read_tensors(path, kind="state")
    with anyone() as folder:
        state_number(1).save(folder / "file")
        folder.chmod(0o555)
        assert int(State.load(folder / "file").tokens) == 1
        with pytest.raises(StorageError, match=r"file: cannot be written \(Permission denied\)$"):
            state_number(2).save(folder / "file")
        with (
            pytest.raises(StorageError, match=r"file: cannot be locked \(Permission denied\)$"),
            locked(folder / "file"),
        ):
            pass
        folder.chmod(0o777)
        assert int(State.load(folder / "file").tokens) == 1


@pytest.mark.parametrize("reader", [False, True], ids=["no one reads it", "someone reads it"])
def test_a_pipe_is_neither_read_nor_replaced_nor_waited_for(tmp_path: Path, reader: bool):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    descriptors = [os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)] if reader else []
    for call in (state_number(1).save, State.load):
        with pytest.raises(StorageError, match=r"pipe: cannot be (read|written) \(Not a regular file\)$"):
            call(pipe)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero", "/dev/full"])
def test_a_device_is_neither_read_nor_replaced(device: str):
    for call in (state_number(1).save, State.load):
        with pytest.raises(StorageError, match=rf"^{device}: cannot be (read|written) \(Not a regular file\)$"):
            call(device)
    assert stat.S_ISCHR(os.stat(device).st_mode)


# ---- two writers, and what killed ones left --------------------------------------------------------------------------


def test_two_writers_do_not_disturb_each_other(nursery: Nursery, tmp_path: Path):
    """Without a lock the last one wins; at any moment the file is whole, and each one's own part is left to it."""
    path, fates, number = tmp_path / "file", [], 0
    state_number(0).save(path)
    writer = threading.Thread(target=lambda: fates.append(nursery.run("save_states", path, 10**6, 50, 1)))
    writer.start()
    from_other = set()
    while writer.is_alive():
        number += 1
        state_number(number).save(path)
        from_other.add(int(State.load(path).tokens) >= 10**6)
    writer.join()
    assert [fate.done for fate in fates] == [50]
    assert from_other == {True, False}
    assert os.listdir(tmp_path) == ["file"]


NOT_OURS = [".file.part", ".file.0123456789abcdef.part~", ".file.0123456789ABCDEF.part", ".other.0123456789abcdef.part"]


def test_only_parts_of_the_same_file_whose_writer_is_gone_are_removed(tmp_path: Path):
    path = tmp_path / "file"
    for name in NOT_OURS:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / ".file.0123456789abcdef.part").write_bytes(b"left by a killed writer")
    (tmp_path / ".file.1123456789abcdef.part").symlink_to(path)
    (tmp_path / ".file.2123456789abcdef.part").mkdir()
    state_number(1).save(path)
    kept = [".file.1123456789abcdef.part", ".file.2123456789abcdef.part"]
    assert sorted(os.listdir(tmp_path)) == sorted(["file", *NOT_OURS, *kept])
    assert int(State.load(path).tokens) == 1


def test_where_there_are_no_locks_files_are_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    part = tmp_path / ".file.0123456789abcdef.part"
    part.write_bytes(b"perhaps of a writer that is at work")
    with locked(tmp_path / "file"):
        write_tensors(tmp_path / "file", {}, kind="test", metadata={})
    assert sorted(os.listdir(tmp_path)) == [part.name, "file"]
