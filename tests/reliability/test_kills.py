"""kill -9, at random instants and at every line of the code that saves: the old file or the new one stands, whole."""

from __future__ import annotations

import csv
import os
import random
from pathlib import Path

import pytest
import torch

from kills import SAVING, TRAINING, Nursery, state_number
from taylor_attention.core.state import State
from taylor_attention.core.storage import read_tensors
from taylor_attention.lm.checkpoint import save_checkpoint
from taylor_attention.nn import LanguageModel, ModelConfig

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked")

slow = pytest.mark.slow
KILLS = [5, pytest.param(120, marks=slow)]
TEXT = b"the quick brown fox jumps over the lazy dog, again and again. " * 40


@pytest.fixture
def instants() -> random.Random:
    return random.Random(0)


def left_beside(path: Path) -> list[str]:
    """What a killed process left in the folder of a file."""
    return sorted(name for name in os.listdir(path.parent) if name != path.name)


# ---- states ----------------------------------------------------------------------------------------------------------


def assert_is_state(path: Path, numbers: tuple[int, int], heads: int) -> int:
    """The file holds, to the last bit, one of two states; which of them."""
    found = State.load(path)
    number = int(found.tokens)
    assert number in numbers
    for name, tensor in state_number(number, heads).tensors().items():
        assert torch.equal(found.tensors()[name], tensor), name
    return number


@pytest.mark.parametrize("kills", KILLS)
def test_kill_while_states_are_saved(nursery: Nursery, instants: random.Random, tmp_path: Path, kills: int):
    path, number, heads = tmp_path / "state", 0, 5000  # 6 MB, so that many come in the middle of writing
    usual = nursery.run("save_states", path, 0, 4, heads).seconds
    number = 3
    for _ in range(kills):
        fate = nursery.run("save_states", path, number + 1, None, heads, after=instants.uniform(0, usual))
        assert fate.killed
        number = assert_is_state(path, (number + fate.done, number + fate.done + 1), heads)
        assert len(left_beside(path)) <= 1  # the next writer has removed the part that the one before left
    state_number(0, heads).save(path)
    assert left_beside(path) == []


@pytest.mark.parametrize("existing", [True, pytest.param(False, marks=slow)], ids=["over another", "the first"])
def test_kill_at_every_line_of_saving_a_state(nursery: Nursery, tmp_path: Path, existing: bool):
    path, lines, seen, parts = tmp_path / "state", 0, set(), 0
    while True:  # until no line is left
        path.unlink(missing_ok=True)
        if existing:
            state_number(1).save(path)
        lines += 1
        fate = nursery.run("save_states", path, 2, 1, 1, line=lines, at=SAVING)
        seen.add(assert_is_state(path, (1, 2), 1) if path.exists() else None)
        assert len(left_beside(path)) <= 1
        if not fate.killed:
            break
        parts += len(left_beside(path))
    assert lines > 30 and parts > 5
    assert seen == {1 if existing else None, 2}
    assert left_beside(path) == []


# ---- sessions --------------------------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    """What a session's file holds: every tensor and all text."""
    tensors, metadata = read_tensors(path, kind="session")
    return repr((sorted(metadata.items()), [(name, tensors[name].numpy().tobytes()) for name in sorted(tensors)]))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    options = {"window": 8, "sinks": 2, "heavy": 2}
    path = tmp_path / "model"
    save_checkpoint(path, LanguageModel(ModelConfig(d_model=8, num_layers=2, num_heads=2, **options)))  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("kills", KILLS)
def test_kill_while_sessions_go_on(nursery: Nursery, instants: random.Random, tmp_path: Path, model: Path, kills: int):
    (tmp_path / "killed").mkdir()
    path, whole, calls = tmp_path / "killed" / "session", tmp_path / "whole", 0
    usual = nursery.run("generate", model, whole, 1).seconds
    expected = ["nothing", digest(whole)]  # what so many calls make, undisturbed
    for _ in range(kills):
        fate = nursery.run("generate", model, path, None, after=instants.uniform(0, 2 * usual))
        assert fate.killed
        while len(expected) < calls + fate.done + 3:
            nursery.run("generate", model, whole, 1)
            expected.append(digest(whole))
        now = expected.index(digest(path) if path.exists() else "nothing")
        assert now in (calls + fate.done, calls + fate.done + 1)
        calls = now
        assert len(left_beside(path)) <= 2  # a part and the lock: the next call minds neither
    nursery.run("generate", model, path, 1)
    assert digest(path) == expected[calls + 1]
    assert left_beside(path) == []


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    return path


def result(folder: Path) -> object:
    """Everything that a run leaves, to the last bit, but how long it took."""
    position, notes = read_tensors(folder / "training.safetensors", kind="training")
    weights, described = read_tensors(folder / "model.safetensors", kind="model")
    with open(folder / "log.csv", newline="") as log:
        rows = [{name: row[name] for name in row if name != "seconds"} for row in csv.DictReader(log)]
    numbers = {name: tensor.numpy().tobytes() for name, tensor in (position | weights).items()}
    return numbers, {**notes, "seconds": "", "settings": ""}, described, rows


def assert_finished_as(folder: Path, whole: Path) -> None:
    assert result(folder) == result(whole)
    assert sorted(os.listdir(folder)) == ["log.csv", "model.safetensors", "summary.json", "training.safetensors"]


@pytest.mark.parametrize("kills", KILLS)
def test_kill_while_training(nursery: Nursery, instants: random.Random, tmp_path: Path, text: Path, kills: int):
    """As many runs as it takes: each is killed again and again until it has come to its end."""
    killed = 0
    for seed in range(kills):
        whole, folder = tmp_path / f"whole {seed}", tmp_path / f"killed {seed}"
        usual = nursery.run("train_on", text, whole, seed).seconds
        while nursery.run("train_on", text, folder, seed, after=instants.uniform(0, usual)).killed:
            killed += 1
        assert_finished_as(folder, whole)
        if killed >= kills:
            return
    pytest.fail(f"{killed} kills")


@slow
def test_kill_at_every_line_of_training(nursery: Nursery, tmp_path: Path, text: Path):
    nursery.run("train_on", text, tmp_path / "whole", 0)
    line, folder = 0, tmp_path / "killed"
    for line in range(1, 10_000):  # each run that dies goes on a little further than the one before
        fate = nursery.run("train_on", text, folder, 0, line=line, at=TRAINING)
        if not fate.killed:
            break
    assert line > 100
    assert_finished_as(folder, tmp_path / "whole")
