"""A nursery: a process without threads that forks workers and kills them, to see what a crash leaves behind.

Forking costs milliseconds where starting Python with PyTorch costs seconds, so that many kills fit into a test. Only a
process that has never had a second thread may fork and go on computing: hence not the one that runs the tests.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch

from taylor_attention.cli.app import app
from taylor_attention.core.state import State
from taylor_attention.core.storage import read_tensors
from taylor_attention.errors import StorageError
from taylor_attention.lm.training import TrainingConfig, train
from taylor_attention.nn import ModelConfig

SAVING = ("core/storage.py", "core/locks.py")
TRAINING = (*SAVING, "lm/training.py", "lm/log.py", "lm/resume.py", "nn/checkpoint.py")


NEEDED = {"train_on": "torch._dynamo"}
"""What a job would import anew in every worker: to train, PyTorch imports its compiler, for seconds."""


@dataclasses.dataclass(frozen=True)
class Fate:
    """What became of a worker: killed, or else ended by itself; what work it had finished, and how long it lived."""

    killed: bool
    done: int
    seconds: float


class Nursery:
    """Runs jobs, the functions below, in forked workers; a context manager."""

    def __enter__(self) -> Nursery:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # the end of its input ends it

    def run(self, job: str, *arguments: Any, after: float | None = None, line: int | None = None, at: Any = ()) -> Fate:
        """Run a job; kill it so many seconds after it began, or at the so-manieth line in the files `at`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        order = {"job": job, "arguments": arguments, "after": after, "line": line, "at": at}
        self.process.stdin.write(json.dumps(order, default=str) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert answer["code"] in (0, -signal.SIGKILL), "a worker failed; its traceback is above"
        return Fate(answer["code"] != 0, answer["done"], answer["seconds"])


# ---- jobs: each calls `done` after every piece of work ---------------------------------------------------------------


def state_number(number: int, heads: int = 1) -> State:
    """A state that tells which one it is by every value that it holds."""
    state = State.zeros(1, heads, 4, 4, 2)
    state.sums.normal_(generator=torch.Generator().manual_seed(number))
    state.tokens.fill_(number)
    return state


def save_states(done: Callable[[], None], path: str, first: int, how_many: int | None, heads: int) -> None:
    """Save states of rising numbers over one another."""
    for number in count(first) if how_many is None else range(first, first + how_many):
        state_number(number, heads).save(path)
        done()


def generate(done: Callable[[], None], model: str, path: str, how_many: int | None) -> None:
    """Go on with a session again and again, by the command."""
    for _ in count() if how_many is None else range(how_many):
        prompt = () if os.path.exists(path) else ("It was",)
        options = ("--model", model, "--session", path, "--tokens", "7", "--seed", "3", "--json")
        try:
            app.main(["generate", *prompt, *options])
        except SystemExit as end:
            assert end.code == 0
        done()


def training_config(text: str, out: str, seed: int) -> TrainingConfig:
    return TrainingConfig(
        data=(text,),
        out=out,
        model=ModelConfig(d_model=8, num_layers=1, num_heads=1),
        steps=12,
        batch_size=2,
        sequence_length=16,
        warmup_steps=3,
        eval_interval=4,
        eval_windows=2,
        checkpoint_interval=2,
        seed=seed,
        threads=1,
    )


def train_on(done: Callable[[], None], text: str, out: str, seed: int) -> None:
    """Train from the last checkpoint, if there is one, to the end."""
    resume = Path(out, "training.safetensors").exists()
    train(training_config(text, out, seed), resume=resume, progress=lambda at: done() if at.saved else None)


def generate_into(done: Callable[[], None], model: str, path: str, out: str, report: str) -> None:
    """Go on with a session, the text going into a file; report the exit code and the complaints."""
    os.dup2(os.open(out, os.O_WRONLY), 1)
    found = _generate("hi", "--tokens", "50", "--model", model, "--session", path)
    sys.stdout.flush()  # as Python does at exit: it must not complain once more
    Path(report).write_text(json.dumps(found))
    done()


def _generate(*arguments: str) -> list[object]:
    with contextlib.redirect_stderr(io.StringIO()) as complaints:
        try:
            app.main(["generate", *arguments])
        except SystemExit as end:
            return [end.code, complaints.getvalue()]


def on_a_small_disk(done: Callable[[], None], folder: str, training: bool) -> None:
    """Fill a real file system that only this worker sees, at several moments, and report what came of it."""
    found: dict[str, object] = {}
    root, disk = Path(folder), Path(folder, "disk")
    try:
        _mount_small_disk(disk)
    except OSError as error:
        found["refused"] = error.strerror
    else:
        _save_on(disk, root, found)
        _generate_on(disk, root, found)
        if training:
            _train_on(disk, root, found)
    Path(folder, "report").write_text(json.dumps(found))
    done()


def _mount_small_disk(disk: Path) -> None:
    """512 kB in this process's own view of the file systems, which ends with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user, private = 0x00020000, 0x10000000, 0x44000
    user, group = os.getuid(), os.getgid()
    if user == 0:
        _call(libc.unshare, new_mounts)
    else:
        _call(libc.unshare, new_user | new_mounts)
        for name, content in {"setgroups": "deny", "uid_map": f"0 {user} 1", "gid_map": f"0 {group} 1"}.items():
            Path("/proc/self", name).write_text(content)
    _call(libc.mount, b"none", b"/", None, private, None)
    _call(libc.mount, b"none", os.fsencode(disk), b"tmpfs", 0, b"size=512k")


def _call(function: Any, *arguments: Any) -> None:
    if function(*arguments):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _fill(disk: Path, room: int) -> None:
    """Write until the disk is full, then leave so many bytes free."""
    with open(disk / "filler", "wb", buffering=0) as filler:
        with contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))
        filler.truncate(filler.tell() - room)


def _told(action: Callable[[], object]) -> str:
    try:
        action()
    except StorageError as error:
        return str(error)
    return "nothing"


def _save_on(disk: Path, root: Path, found: dict[str, object]) -> None:
    path, heads = disk / "state", 100  # 120 kB
    state_number(1, heads).save(path)
    _fill(disk, 40_000)
    state = state_number(2, heads)
    found["state"] = _told(lambda: state.save(path))
    found["number kept"], found["beside"] = int(State.load(path).tokens), sorted(os.listdir(disk))
    state.save(root / "elsewhere")
    found["number elsewhere"] = int(State.load(root / "elsewhere").tokens)
    (disk / "filler").unlink()
    state.save(path)
    found["number when there is room again"] = int(State.load(path).tokens)
    path.unlink()


def _generate_on(disk: Path, root: Path, found: dict[str, object]) -> None:
    arguments = ("hi", "-n", "3", "--model", f"{root}/model", "--session", f"{disk}/session")
    _generate(*arguments)
    before = (disk / "session").read_bytes()
    _fill(disk, 4096)
    found["generate"] = _generate(*arguments)
    found["session is the same"] = (disk / "session").read_bytes() == before and not (disk / "session.lock").exists()
    (disk / "filler").unlink()


def _train_on(disk: Path, root: Path, found: dict[str, object]) -> None:
    whole, parted = (training_config(str(root / "text"), str(out), 0) for out in (root / "whole", disk / "run"))
    train(whole)
    fill = lambda at: _fill(disk, 4096) if at.step == 5 else None  # noqa: E731
    found["training"] = _told(lambda: train(parted, progress=fill))
    (disk / "filler").unlink()
    train(parted, resume=True)
    files = (out / "training.safetensors" for out in (root / "whole", disk / "run"))
    one, other = (read_tensors(file, kind="training")[0] for file in files)
    found["resumed as if never stopped"] = all(torch.equal(one[name], other[name]) for name in one | other)


# ---- the process that forks ------------------------------------------------------------------------------------------


def _fork(job: str, arguments: list[Any], after: float | None, line: int | None, at: list[str]) -> dict[str, float]:
    importlib.import_module(NEEDED.get(job, "safetensors.torch"))
    reader, writer = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(reader)
        _work(writer, job, arguments, line, tuple(at))
    os.close(writer)
    os.read(reader, 1)  # it has begun
    begun = time.perf_counter()
    if after is not None:
        time.sleep(after)
        os.kill(worker, signal.SIGKILL)
    with os.fdopen(reader, "rb") as pipe:
        done = len(pipe.read())
    code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    return {"code": code, "done": done, "seconds": time.perf_counter() - begun}


def _work(writer: int, job: str, arguments: list[Any], line: int | None, at: tuple[str, ...]) -> None:
    code = 1
    try:
        signal.alarm(120)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.write(writer, b".")
        if line is not None:
            _die_at(line, at)
        globals()[job](lambda: os.write(writer, b"."), *arguments)
        code = 0
    finally:  # whatever happened: it must not go on as a second nursery
        if code:
            traceback.print_exc()
        os._exit(code)


def _die_at(line: int, at: tuple[str, ...]) -> None:
    """Have this process killed before it executes a line, counted from the first writing on in the files `at`."""
    executed, writing = count(1), False

    def watch(frame: Any, event: str, _: object) -> Any:
        if event == "line" and next(executed) == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return watch

    def enter(frame: Any, event: str, _: object) -> Any:
        nonlocal writing
        writing = writing or frame.f_code.co_name == "replacing"
        return watch if writing and frame.f_code.co_filename.endswith(at) else None

    sys.settrace(enter)


if __name__ == "__main__":
    for given in sys.stdin:
        sys.stdout.write(json.dumps(_fork(**json.loads(given))) + "\n")
        sys.stdout.flush()
    os._exit(0)  # without taking PyTorch apart, which takes seconds
