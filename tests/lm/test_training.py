"""Training: it learns, it repeats, a resumed run is the run that never stopped, failures leave the last checkpoint."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from taylor_attention.core.storage import read_tensors, write_tensors
from taylor_attention.errors import ArgumentError, StorageError
from taylor_attention.lm.checkpoint import load_checkpoint
from taylor_attention.lm.settings import learning_rate
from taylor_attention.lm.training import Progress, TrainingConfig, TrainingDivergedError, evaluate, saved_config, train
from taylor_attention.nn import LanguageModel, ModelConfig

TEXT = b"the quick brown fox jumps over the lazy dog, again and again. " * 40
TINY = ModelConfig(d_model=16, num_layers=1, num_heads=2)


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return TrainingConfig(
        data=(str(path),),
        out=str(tmp_path / "run"),
        model=TINY,
        steps=12,
        batch_size=4,
        sequence_length=32,
        learning_rate=1e-2,
        warmup_steps=3,
        eval_interval=4,
        eval_windows=2,
        checkpoint_interval=5,
        threads=1,
    )


class Stop(Exception):
    """Stands for a killed process."""


def stop_after(step: int) -> Any:
    def look(progress: Progress) -> None:
        if progress.step == step:
            raise Stop

    return look


def change(config: TrainingConfig, **values: Any) -> TrainingConfig:
    return dataclasses.replace(config, **values)


def rows(folder: str | Path) -> list[dict[str, str]]:
    with open(Path(folder) / "log.csv", newline="") as log:
        return [{name: row[name] for name in row if name != "seconds"} for row in csv.DictReader(log)]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return read_tensors(Path(folder) / "training.safetensors", kind="training")[0]


def test_learns_and_reports(config: TrainingConfig):
    seen: list[Progress] = []
    summary = train(change(config, steps=60, eval_interval=30), progress=seen.append)
    assert [progress.step for progress in seen] == list(range(1, 61))
    assert seen[0].train_loss > 5
    assert summary["validation"]["nats_per_byte"] < 2.5
    assert summary["validation"]["bits_per_byte"] == pytest.approx(summary["validation"]["nats_per_byte"] / math.log(2))
    assert summary["tokens"] == seen[-1].tokens == 60 * 4 * 32
    assert [progress.step for progress in seen if progress.validation_loss is not None] == [30, 60]
    assert [progress.step for progress in seen if progress.saved] == list(range(5, 61, 5))

    folder = Path(config.out)
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert TrainingConfig.from_dict(summary["config"]) == change(config, steps=60, eval_interval=30)
    log = rows(folder)
    assert [float(row["train_loss"]) for row in log] == [progress.train_loss for progress in seen]
    model, metadata = load_checkpoint(folder / "model.safetensors")
    assert metadata["step"] == "60"
    again = evaluate(model, TEXT[-int(len(TEXT) * 0.05) :], sequence_length=32)
    assert again.loss == pytest.approx(summary["validation"]["nats_per_byte"], rel=1e-6)


@pytest.mark.parametrize("attention", ["taylor", "softmax"])
@pytest.mark.parametrize("stop", [5, 7, 11])
def test_a_resumed_run_is_the_run_that_never_stopped(config: TrainingConfig, tmp_path: Path, stop: int, attention: str):
    config = change(config, model=dataclasses.replace(TINY, attention=attention, decay="token"))
    whole = change(config, out=str(tmp_path / "whole"))
    train(whole)
    with pytest.raises(Stop):
        train(config, progress=stop_after(stop))
    assert len(rows(config.out)) == stop
    torch.manual_seed(999)  # a new process has other global random numbers
    summary = train(config, resume=True)

    expected, got = weights(whole.out), weights(config.out)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    assert rows(config.out) == rows(whole.out)
    assert [row["step"] for row in rows(config.out)] == [str(step) for step in range(1, 13)]
    finished = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["validation"] == finished["validation"]


def test_a_run_whose_texts_are_all_near_can_be_resumed(config: TrainingConfig):
    """No token is ever far, so that a gain has nothing to learn from; AdamW remembers it all the same."""
    config = change(config, model=dataclasses.replace(TINY, window=32, far_gain=True), steps=2)
    with pytest.raises(Stop):
        train(change(config, checkpoint_interval=1), progress=stop_after(1))
    train(config, resume=True)
    assert not weights(config.out)["model/blocks.0.attention.far_log_gain"].any()


def test_an_interrupted_run_is_saved_at_that_step(config: TrainingConfig, tmp_path: Path):
    def interrupt(progress: Progress) -> None:
        if progress.step == 7:
            raise KeyboardInterrupt

    train(change(config, out=str(tmp_path / "whole")))
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=interrupt)
    seen: list[int] = []
    train(saved_config(config.out), resume=True, progress=lambda progress: seen.append(progress.step))
    assert seen == [8, 9, 10, 11, 12]
    assert rows(config.out) == rows(tmp_path / "whole")


def test_the_settings_of_a_run_can_be_read_back(config: TrainingConfig):
    with pytest.raises(ArgumentError, match="resume: expected a folder that holds a run"):
        saved_config(config.out)
    train(change(config, steps=1))
    assert saved_config(config.out) == change(config, steps=1)


def test_resuming_a_finished_run_changes_nothing(config: TrainingConfig):
    first = train(config)
    before = weights(config.out)
    again = train(config, resume=True)
    assert again["validation"] == first["validation"]
    assert len(rows(config.out)) == config.steps
    for name, tensor in weights(config.out).items():
        assert torch.equal(before[name], tensor), name


def test_the_seed_decides(config: TrainingConfig, tmp_path: Path):
    train(config)
    torch.manual_seed(999)  # the global generator does not
    train(change(config, out=str(tmp_path / "same")))
    train(change(config, out=str(tmp_path / "other"), seed=1))
    assert rows(config.out) == rows(tmp_path / "same")
    assert rows(config.out) != rows(tmp_path / "other")


def test_every_step_sees_another_batch(config: TrainingConfig):
    train(change(config, steps=5, learning_rate=1e-12))  # so only the batches differ
    assert len({row["train_loss"] for row in rows(config.out)}) == 5


def test_training_leaves_the_process_as_it_was(config: TrainingConfig):
    generator, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train(change(config, steps=1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_loss_that_is_not_finite_stops_the_run(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(Stop):
        train(config, progress=stop_after(5))
    before = (Path(config.out) / "model.safetensors").read_bytes()

    forward = LanguageModel.forward
    monkeypatch.setattr(LanguageModel, "forward", lambda self, *a, **o: forward(self, *a, **o) * torch.nan)
    with pytest.raises(TrainingDivergedError, match="step 6: expected a finite loss and gradient, got loss nan"):
        train(config, resume=True)
    assert (Path(config.out) / "model.safetensors").read_bytes() == before
    assert len(rows(config.out)) == 5


def test_a_gradient_that_is_not_finite_stops_the_run(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch):
    forward = LanguageModel.forward

    def steep(self: LanguageModel, *arguments: Any, **options: Any) -> torch.Tensor:
        logits = forward(self, *arguments, **options)
        return logits + (self.norm.weight[0] - 1).abs().sqrt()  # finite, but the root's slope at 0 is infinite

    monkeypatch.setattr(LanguageModel, "forward", steep)
    with pytest.raises(TrainingDivergedError, match="step 1: .* gradient norm (nan|inf)"):
        train(config)


def test_folders_are_neither_overwritten_nor_invented(config: TrainingConfig):
    with pytest.raises(ArgumentError, match="resume: expected a folder that holds a run"):
        train(config, resume=True)
    train(change(config, steps=1))
    with pytest.raises(ArgumentError, match="out: expected a folder without a run, or resume"):
        train(config)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"steps": 99}, "steps"),
        ({"seed": 5}, "seed"),
        ({"learning_rate": 1.0}, "learning_rate"),
        ({"model": dataclasses.replace(TINY, degree=4)}, "model"),
    ],
)
def test_other_settings_are_refused_on_resume(config: TrainingConfig, values: dict[str, Any], name: str):
    train(change(config, steps=1))
    with pytest.raises(ArgumentError, match=f"^{name}: expected .*, as the run to resume has it, got"):
        train(change(config, **{"steps": 1, **values}), resume=True)


def test_other_text_is_refused_on_resume(config: TrainingConfig):
    train(change(config, steps=1))
    Path(config.data[0]).write_bytes(TEXT + b"!")
    with pytest.raises(ArgumentError, match="data: expected the text that the run to resume began with"):
        train(change(config, steps=1), resume=True)


def test_what_does_not_change_the_weights_may_change(config: TrainingConfig):
    with pytest.raises(Stop):
        train(config, progress=stop_after(5))
    train(change(config, eval_interval=100, checkpoint_interval=1), resume=True)
    assert len(rows(config.out)) == config.steps


def drop_a_moment(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors.pop("exp_avg/norm.weight")


def drop_the_step(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    metadata.pop("step")


@pytest.mark.parametrize("damage", [drop_a_moment, drop_the_step])
def test_an_incomplete_file_is_refused(config: TrainingConfig, damage: Any):
    train(change(config, steps=1))
    path = Path(config.out) / "training.safetensors"
    tensors, metadata = read_tensors(path, kind="training")
    damage(tensors, metadata)
    write_tensors(path, tensors, kind="training", metadata=metadata)
    with pytest.raises(StorageError, match=r"training.safetensors: expected"):
        train(change(config, steps=1), resume=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps: expected an int >= 1, got 0"),
        ({"batch_size": 1.5}, "batch_size: expected an int >= 1, got 1.5"),
        ({"learning_rate": math.nan}, "learning_rate: expected a number > 0, got nan"),
        ({"validation_fraction": 0.0}, "validation_fraction: expected a number between 0 and 1, got 0.0"),
        ({"final_learning_rate_fraction": 2}, "final_learning_rate_fraction: expected a number from 0 to 1, got 2"),
        ({"threads": 0}, "threads: expected an int >= 1, got 0"),
        ({"model": {}}, "model: expected a ModelConfig, got dict"),
        ({"data": ()}, "data: expected at least one file, folder or corpus, got ()"),
        ({"data": "stdlib"}, "data: expected a tuple of names, got 'stdlib'"),
    ],
)
def test_bad_settings_are_named(values: dict[str, Any], message: str):
    with pytest.raises(ArgumentError) as caught:
        TrainingConfig(**values)
    assert str(caught.value) == message


def test_unknown_settings_are_named():
    with pytest.raises(ArgumentError, match=r"training configuration: expected names among .*, got \['epochs'\]"):
        TrainingConfig.from_dict({"epochs": 3})


def test_too_little_text_is_named(config: TrainingConfig):
    with pytest.raises(ArgumentError, match="data: expected more than sequence_length = 4096 bytes to train on"):
        train(change(config, sequence_length=4096))


def test_the_rate_rises_then_falls():
    config = TrainingConfig(steps=100, warmup_steps=10, learning_rate=1.0, final_learning_rate_fraction=0.1)
    assert learning_rate(config, 1) == pytest.approx(0.1)
    assert learning_rate(config, 10) == pytest.approx(1.0)
    assert learning_rate(config, 55) == pytest.approx(0.55)
    assert learning_rate(config, 100) == pytest.approx(0.1)
    assert learning_rate(dataclasses.replace(config, warmup_steps=0), 1) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("length", "windows"), [(32, None), (32, 3), (10**6, None)])
def test_evaluation_is_the_mean_over_its_windows(length: int, windows: int | None):
    torch.manual_seed(0)
    model, text = LanguageModel(TINY), TEXT[:201]
    expected, used = [], min(length, 200)
    starts = {None: range(0, 200 - used + 1, used), 3: (0, 64, 128)}[windows]
    for start in starts:
        row = torch.tensor(list(text[start : start + used + 1]))
        logits = model(row[None, :-1])[0]
        expected.append(functional.cross_entropy(logits, row[1:]).item())
    result = evaluate(model, text, sequence_length=length, windows=windows, batch_size=2)
    assert result.tokens == used * len(expected)
    assert result.loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2))


def test_evaluation_needs_text():
    with pytest.raises(ArgumentError, match="data: expected at least two bytes, got 1"):
        evaluate(LanguageModel(TINY), b"x")
