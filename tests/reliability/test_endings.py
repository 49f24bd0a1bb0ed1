"""How runs end and go on: asked to stop, killed between two files, begun twice, in folders that hold other things."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from kills import training_config
from taylor_attention.cli import app as cli
from taylor_attention.cli.app import app
from taylor_attention.core.locks import locked
from taylor_attention.core.storage import read_tensors
from taylor_attention.errors import ArgumentError, StorageError
from taylor_attention.lm import training
from taylor_attention.lm.checkpoint import load_checkpoint, save_checkpoint
from taylor_attention.lm.session import Session
from taylor_attention.lm.training import TrainingConfig, train
from taylor_attention.nn import LanguageModel, ModelConfig

TEXT = b"the quick brown fox jumps over the lazy dog, again and again. " * 40


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# ---- asked to stop ---------------------------------------------------------------------------------------------------


@pytest.fixture
def as_in_a_terminal() -> Iterator[None]:
    """Signals as a shell in the foreground hands them on, whatever nohup or a shell in the background did to ours."""
    wanted = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_generate_asked_to_stop_saves_its_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "model", LanguageModel(ModelConfig(d_model=8, num_layers=1, num_heads=1)))
    step, handler = Session.step, signal.getsignal(getattr(signal, name))

    def stop_in_the_fifth(session: Session, **sampling: Any) -> int:
        if session.tokens == 2 + 4:
            os.kill(os.getpid(), getattr(signal, name))
        return step(session, **sampling)

    monkeypatch.setattr(Session, "step", stop_in_the_fifth)
    result = run("generate", "hi", "-n", 100, "--model", tmp_path / "model", "--session", tmp_path / "session")
    assert (result.exit_code, result.stderr.partition(",")[0]) == (0, "stopped after 5 bytes")
    assert Session.load(tmp_path / "session", load_checkpoint(tmp_path / "model")[0]).tokens == 2 + 5
    assert signal.getsignal(getattr(signal, name)) is handler


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_training_asked_to_stop_saves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    (tmp_path / "text").write_bytes(TEXT)
    loss, calls = training.next_byte_loss, []

    def stop_in_the_third(*arguments: Any) -> torch.Tensor:
        calls.append(os.kill(os.getpid(), getattr(signal, name)) if len(calls) == 2 else None)
        return loss(*arguments)

    monkeypatch.setattr(training, "next_byte_loss", stop_in_the_third)
    small = ["--layers", 1, "--width", 8, "--heads", 1, "--batch", 2, "--length", 16, "--steps", 50]
    result = run("train", tmp_path / "text", "--out", tmp_path / "run", *small)
    assert result.exit_code == 130
    assert result.stderr.startswith("stopped; ")
    assert read_tensors(tmp_path / "run" / "training.safetensors", kind="training")[1]["step"] == "3"


@pytest.mark.parametrize(
    ("interrupt", "terminate"),
    [(signal.SIG_IGN, signal.SIG_DFL), (signal.default_int_handler, signal.SIG_IGN)],
    ids=["Ctrl-C is ignored", "it is itself ignored"],
)
def test_a_signal_that_was_dealt_with_otherwise_stays_so(interrupt: Any, terminate: Any):
    """Begun with Ctrl-C ignored, as shells do in the background, SIGTERM has to end it by itself; nohup is kept."""
    before = signal.signal(signal.SIGINT, interrupt), signal.signal(signal.SIGHUP, terminate)
    try:
        with cli.ended_like_ctrl_c():
            found = signal.getsignal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGHUP, before[1])
    assert found is terminate


# ---- training: two at once, killed between two files, folders of others ----------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    (tmp_path / "text").write_bytes(TEXT)
    return training_config(str(tmp_path / "text"), str(tmp_path / "run"), 0)


def model_of(folder: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    model, metadata = load_checkpoint(Path(folder) / "model.safetensors")
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}, metadata


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_in_the_folder_is_told(config: TrainingConfig, resume: bool):
    Path(config.out).mkdir()
    if resume:
        train(config)
    before = sorted(os.listdir(config.out))
    told = pytest.raises(StorageError, match="training.safetensors: in use by another process$")
    with locked(Path(config.out) / "training.safetensors"), told:
        train(config, resume=resume)
    assert sorted(os.listdir(config.out)) == before
    train(config, resume=resume)
    assert "training.safetensors.lock" not in os.listdir(config.out)


@pytest.mark.parametrize("left", ["of an earlier step", "damaged", "missing"])
def test_a_run_that_died_between_its_files_gets_its_model_on_resuming(
    config: TrainingConfig, monkeypatch: pytest.MonkeyPatch, left: str
):
    """Even if there is no step left to take: the model to use is then written, with what is known of it."""
    train(config)
    whole, path = model_of(config.out), Path(config.out) / "model.safetensors"
    if left == "of an earlier step":
        save_checkpoint(path, LanguageModel(config.model), metadata={**whole[1], "step": "4"})
    elif left == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    train(config, resume=True)
    assert model_of(config.out) == whole


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors"])
def test_no_model_is_replaced_that_the_run_did_not_make(config: TrainingConfig, name: str):
    Path(config.out).mkdir()
    (Path(config.out) / name).write_bytes(b"precious")
    with pytest.raises(ArgumentError, match=f"out: expected a folder without a run, or resume, got .* holds {name}"):
        train(config)
    assert (Path(config.out) / name).read_bytes() == b"precious"
    assert os.listdir(config.out) == [name]


HEADER = "step,tokens,learning_rate,train_loss,gradient_norm,validation_loss,seconds\n"


@pytest.mark.parametrize("content", [b"my own notes\n", HEADER.encode()[:-5] + b"\n", b"\xff\xfe\x00"])
def test_a_log_of_something_else_is_left_alone(config: TrainingConfig, content: bytes):
    Path(config.out).mkdir()
    (Path(config.out) / "log.csv").write_bytes(content)
    with pytest.raises(StorageError, match=r"log.csv: (expected the log of a run, got another file|cannot be read)"):
        train(config)
    assert (Path(config.out) / "log.csv").read_bytes() == content


ROW = "{},32,0.1,5.5,1.0,,0.5\n"


@pytest.mark.parametrize("rest", ["", "1", "13", "12,3", "x,1,1,1,1,1,1\n", ROW.format(0), ROW.format(13)])
def test_rows_that_are_not_of_the_steps_taken_are_dropped(config: TrainingConfig, rest: str):
    """A row that was not written whole, "1" of "13,...", is not taken for one of a step before."""
    train(config)
    log = Path(config.out) / "log.csv"
    before = log.read_text()
    log.write_text(before + rest)
    train(config, resume=True)
    assert log.read_text() == before


@pytest.mark.parametrize("content", ["", HEADER], ids=["nothing", "no rows"])
def test_a_log_that_was_lost_does_not_hinder(config: TrainingConfig, content: str):
    train(config)
    log = Path(config.out) / "log.csv"
    log.write_text(content)
    train(config, resume=True)
    assert log.read_text() == HEADER


def test_a_run_without_a_checkpoint_yet_is_begun_anew(config: TrainingConfig):
    Path(config.out).mkdir()
    (Path(config.out) / "log.csv").write_text(HEADER + ROW.format(1))
    train(config)
    assert [row.partition(",")[0] for row in (Path(config.out) / "log.csv").read_text().splitlines()[1:]] == [
        str(step) for step in range(1, 13)
    ]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the name of an open file is Linux's to tell")
def test_rows_are_on_the_disk_before_the_checkpoint_they_belong_to(
    config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
):
    """kill -9 cannot show it: what a process wrote survives the process, but not the power."""
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        order.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_replace(source: str, target: str) -> None:
        order.append(f"-> {os.path.basename(target)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    train(config)
    named = [".part" if name.endswith(".part") else name for name in order]
    checkpoint = ["log.csv", ".part", "-> training.safetensors", "run", ".part", "-> model.safetensors", "run"]
    assert named == [".part", "-> log.csv", "run", *checkpoint * 6, ".part", "-> summary.json", "run"]
