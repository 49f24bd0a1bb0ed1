"""Training of the language model: AdamW, warmup and cosine, checkpoints that a killed run resumes from bit for bit.

A step is a function of (settings, data, step number, weights and optimiser state), nothing else: batches and learning
rates come from the step's number. So on one thread, a run that was stopped and resumed is the run that was not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.locks import locked
from ..core.storage import read_tensors, write_text
from ..core.threads import thread_count
from ..errors import StorageError, TaylorAttentionError, expect, expect_bool, shown
from ..nn.checkpoint import KIND as MODEL_KIND
from ..nn.checkpoint import save_checkpoint
from ..nn.transformer import LanguageModel
from .data import load_split, sample_batch, to_tensor
from .evaluation import Evaluation, evaluate, next_byte_loss
from .log import LOG, Log
from .resume import read_metadata, read_position, write_position
from .settings import TrainingConfig, learning_rate

__all__ = ["Evaluation", "Progress", "TrainingConfig", "TrainingDivergedError", "evaluate", "saved_config", "train"]

_FILE, _MODEL = "training.safetensors", "model.safetensors"

_MAY_CHANGE = {"out", "threads", "eval_interval", "eval_windows", "checkpoint_interval"}
"""Settings that a resumed run may change, as they do not change the weights."""


class TrainingDivergedError(TaylorAttentionError, ArithmeticError):
    """The loss or its gradient is no longer finite; the weights of the last checkpoint stand."""


@dataclass(frozen=True)
class Progress:
    """What a step reports: losses in nats per byte, bytes and seconds since the run began (over all resumptions)."""

    step: int
    steps: int
    train_loss: float
    validation_loss: float | None
    learning_rate: float
    tokens: int
    seconds: float
    saved: bool


def train(
    config: TrainingConfig, *, resume: bool = False, progress: Callable[[Progress], None] | None = None
) -> dict[str, Any]:
    """Train a model as configured, into the folder `config.out`.

    Args:
        config: the settings.
        resume: go on from the folder's last checkpoint, with the settings it began with.
        progress: called after every step. A KeyboardInterrupt that it raises saves a checkpoint before it goes on up.

    Returns:
        The summary that is also in summary.json: config, steps, tokens, parameters, losses, seconds.

    Raises:
        ArgumentError: the data, or the folder: it holds a run already, or none to resume, or one with other settings.
        StorageError: a file cannot be written, the checkpoint cannot be trusted, or another process trains there.
        TrainingDivergedError: the loss or its gradient is not finite; the last checkpoint stands.
    """
    expect(isinstance(config, TrainingConfig), "config", "a TrainingConfig", type(config))
    expect_bool("resume", resume)
    expect(progress is None or callable(progress), "progress", "a function of a Progress, or None", shown(progress))
    with thread_count(config.threads):
        run = _Run(config)
        run.find_folder(resume)
        with locked(run.folder / _FILE):
            run.resume() if resume else run.begin()
            with Log(run.folder / LOG, run.step) as log:
                while run.step < config.steps:
                    report = run.advance()
                    log.append(report.row)
                    if report.progress.saved:
                        log.sync()  # so that the log never lags behind the checkpoint
                        run.save(report.progress.validation_loss)
                    if progress is not None:
                        _tell(progress, report.progress, run, log)
            return run.summarise()


def saved_config(out: str | Path) -> TrainingConfig:
    """The settings that the run in a folder has, so that it can be resumed without repeating them.

    Raises:
        ArgumentError: the folder holds no run.
        StorageError: its file cannot be trusted.
    """
    expect(isinstance(out, str | Path), "out", "the name of a folder", shown(out))
    path = Path(out) / _FILE
    expect(os.path.exists(path), "resume", "a folder that holds a run", shown(str(out)))
    try:
        return TrainingConfig.from_dict(json.loads(read_metadata(path)["settings"]))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise StorageError(f"{path}: expected the settings of a run, got {error}") from error


@dataclass(frozen=True)
class _Report:
    progress: Progress
    gradient_norm: float

    @property
    def row(self) -> list[Any]:
        """The values of `log.COLUMNS`; floats are written so that they read back exactly."""
        at = self.progress
        validation = "" if at.validation_loss is None else at.validation_loss
        return [
            at.step, at.tokens, at.learning_rate, at.train_loss, self.gradient_norm, validation, round(at.seconds, 3)
        ]  # fmt: skip


class _Run:
    """A run in its folder: model, optimiser and position, moved on one step at a time."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.folder = Path(config.out)
        training, validation = load_split(config.data, validation_fraction=config.validation_fraction)
        self.data_digest = hashlib.sha256(training + b"\0" + validation).hexdigest()
        self.training, self.validation = to_tensor(training), to_tensor(validation)
        enough = f"more than sequence_length = {config.sequence_length} bytes to train on"
        expect(len(training) > config.sequence_length, "data", enough, len(training))
        expect(len(validation) >= 2, "data", "at least 2 bytes to validate on", len(validation))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = LanguageModel(config.model)
        self.optimizer = _optimizer(self.model, config)
        self.step = 0
        self.seconds = 0.0

    def find_folder(self, resume: bool) -> None:
        """Make the folder of a new run, or expect the run that is to be resumed."""
        if resume:
            expect(os.path.exists(self.folder / _FILE), "resume", "a folder that holds a run", str(self.folder))
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{self.folder}: cannot be made ({error.strerror})") from error

    def begin(self) -> None:
        """Expect that nothing here would be replaced but the log of a run that had no checkpoint yet."""
        for name in (_FILE, _MODEL):
            free = not (self.folder / name).exists()
            expect(free, "out", "a folder without a run, or resume", f"{self.folder}, which holds {name}")

    def resume(self) -> None:
        """Take up the weights, the optimiser's state and the position of the last checkpoint."""
        path = self.folder / _FILE
        metadata = read_metadata(path)
        self._check_settings(path, metadata)
        read_position(path, self.model, self.optimizer)
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
        if self._saved_model_step() != metadata["step"]:  # the run was killed between its two files
            self._save_model(metadata.get("validation_loss"))

    def advance(self) -> _Report:
        """Take one step."""
        started = time.perf_counter()
        config, step = self.config, self.step + 1
        rate = learning_rate(config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = sample_batch(
            self.training, config.batch_size, config.sequence_length, seed=config.seed, step=step
        )
        loss = next_byte_loss(self.model, inputs, targets, "mean")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_clip, foreach=True))
        train_loss = float(loss.detach())
        if not (math.isfinite(train_loss) and math.isfinite(norm)):
            raise TrainingDivergedError(
                f"step {step}: expected a finite loss and gradient, got loss {train_loss} and gradient norm {norm}; "
                f"{self.folder} keeps the last checkpoint"
            )
        self.optimizer.step()
        self.step = step
        validation_loss = self._validate().loss if self._due(config.eval_interval) else None
        self.seconds += time.perf_counter() - started
        saved = self._due(config.checkpoint_interval)
        tokens = step * config.batch_size * config.sequence_length
        report = Progress(step, config.steps, train_loss, validation_loss, rate, tokens, self.seconds, saved)
        return _Report(report, norm)

    def save(self, validation_loss: float | None) -> None:
        """Replace both files: the one to resume from, then the one to use."""
        settings = json.dumps(self.config.to_dict(), sort_keys=True)
        position = {"step": str(self.step), "seconds": repr(self.seconds)}
        measured = {} if validation_loss is None else {"validation_loss": repr(validation_loss)}
        metadata = {**position, **measured, "settings": settings, "data": self.data_digest}
        write_position(self.folder / _FILE, self.model, self.optimizer, metadata)
        self._save_model(measured.get("validation_loss"))

    def _save_model(self, validation_loss: str | None) -> None:
        measured = {} if validation_loss is None else {"validation_loss": validation_loss}
        shared = {name: value for name, value in self.config.to_dict().items() if name != "out"}  # of no use elsewhere
        described = {"step": str(self.step), "training": json.dumps(shared, sort_keys=True), **measured}
        save_checkpoint(self.folder / _MODEL, self.model, metadata=described)

    def _saved_model_step(self) -> str | None:
        try:
            return read_tensors(self.folder / _MODEL, kind=MODEL_KIND)[1].get("step")
        except StorageError:
            return None

    def summarise(self) -> dict[str, Any]:
        """Write and return the summary, with the loss on all of the validation text."""
        started = time.perf_counter()
        result = evaluate(self.model, self.validation, sequence_length=self.config.sequence_length)
        summary = {
            "config": self.config.to_dict(),
            "steps": self.step,
            "tokens": self.step * self.config.batch_size * self.config.sequence_length,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "validation": {
                "nats_per_byte": result.loss,
                "bits_per_byte": result.bits_per_byte,
                "bytes": result.tokens,
            },
            "training_seconds": round(self.seconds, 3),
            "validation_seconds": round(time.perf_counter() - started, 3),
        }
        write_text(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def _due(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.config.steps

    def _validate(self) -> Evaluation:
        length = self.config.sequence_length
        return evaluate(self.model, self.validation, sequence_length=length, windows=self.config.eval_windows)

    def _check_settings(self, path: Path, metadata: Mapping[str, str]) -> None:
        try:
            before = dict(json.loads(metadata["settings"]))
            if not (1 <= int(metadata["step"]) <= before["steps"] and 0 <= float(metadata["seconds"]) < math.inf):
                raise ValueError(f"step {metadata['step']} after {metadata['seconds']} seconds")
        except (KeyError, ValueError, TypeError) as error:
            raise StorageError(f"{path}: expected the settings and position of a run, got {error}") from error
        for name, now in self.config.to_dict().items():
            if name not in _MAY_CHANGE:
                expect(before.get(name) == now, name, f"{before.get(name)}, as the run to resume has it", now)
        same = metadata.get("data") == self.data_digest
        expect(same, "data", "the text that the run to resume began with", "another text")


def _optimizer(model: LanguageModel, config: TrainingConfig) -> torch.optim.AdamW:
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not name.endswith(("key_center", "conv.weight"))  # vectors side by side
        (matrices if is_matrix else others).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def _tell(progress: Callable[[Progress], None], news: Progress, run: _Run, log: Log) -> None:
    try:
        progress(news)
    except KeyboardInterrupt:
        log.sync()
        run.save(news.validation_loss)
        raise
