"""Settings of a training run, checked when they are made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.threads import MAX_THREADS
from ..errors import ArgumentError, expect, expect_int, is_number, shown
from ..nn.transformer import ModelConfig


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a training run.

    Attributes:
        data: files, folders and named corpora, see `data.load_documents`.
        out: folder of the run: model.safetensors, training.safetensors, log.csv, summary.json.
        model: shape of the model.
        steps: optimiser steps.
        batch_size, sequence_length: a step sees batch_size windows of sequence_length bytes.
        learning_rate: its peak; it rises linearly for `warmup_steps` and falls as a cosine to
            `final_learning_rate_fraction` of the peak at the last step.
        weight_decay: of the matrices (gains, biases and decays have none).
        gradient_clip: largest norm of the gradient.
        seed: of the weights and of the batches.
        validation_fraction: of the documents, held out whole.
        eval_interval, eval_windows: every so many steps, the loss on so many fixed windows of the validation text.
        checkpoint_interval: every so many steps, and after the last one, the files are replaced.
        threads: of PyTorch while training; None leaves them as they are. 1 makes runs repeat bit for bit.
    """

    data: tuple[str, ...] = ("stdlib",)
    out: str = "runs/taylor"
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    steps: int = 2000
    batch_size: int = 16
    sequence_length: int = 512
    learning_rate: float = 2e-3
    final_learning_rate_fraction: float = 0.1
    warmup_steps: int = 100
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    seed: int = 0
    validation_fraction: float = 0.05
    eval_interval: int = 250
    eval_windows: int = 64
    checkpoint_interval: int = 250
    threads: int | None = None

    def __post_init__(self) -> None:
        good = isinstance(self.data, tuple) and all(isinstance(name, str) for name in self.data)
        expect(good, "data", "a tuple of names", shown(self.data))
        named = isinstance(self.out, str) and self.out != "" and "\0" not in self.out
        expect(named, "out", "the name of a folder", shown(self.out))
        expect(len(self.data) > 0, "data", "at least one file, folder or corpus", self.data)
        for name in ("steps", "batch_size", "sequence_length", "eval_interval", "eval_windows", "checkpoint_interval"):
            expect_int(name, getattr(self, name), 1)
        read = self.batch_size * self.sequence_length
        expect(read < 2**31, "batch_size", "batch_size * sequence_length below 2^31 bytes in a step", read)
        expect_int("warmup_steps", self.warmup_steps, 0)
        expect_int("seed", self.seed, 0)
        if self.threads is not None:
            expect_int("threads", self.threads, 1, MAX_THREADS)
        for name in ("learning_rate", "gradient_clip"):
            _expect_number(name, getattr(self, name), "a number > 0", lambda x: x > 0)
        _expect_number("weight_decay", self.weight_decay, "a number >= 0", lambda x: x >= 0)
        fraction = self.final_learning_rate_fraction
        _expect_number("final_learning_rate_fraction", fraction, "a number from 0 to 1", lambda x: 0 <= x <= 1)
        _expect_number("validation_fraction", self.validation_fraction, "a number between 0 and 1", lambda x: 0 < x < 1)
        expect(isinstance(self.model, ModelConfig), "model", "a ModelConfig", type(self.model))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "data": list(self.data)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TrainingConfig:
        """The settings that `to_dict` gave; raises ArgumentError for a name or value that is none of ours."""
        expect(isinstance(values, Mapping), "training configuration", "names and values", shown(values))
        known = {field.name for field in dataclasses.fields(TrainingConfig)}
        unknown = sorted(map(str, values.keys() - known))
        if unknown:
            raise ArgumentError(f"training configuration: expected names among {sorted(known)}, got {unknown}")
        rest = {name: value for name, value in values.items() if name not in ("model", "data")}
        model = ModelConfig.from_dict(values.get("model", {}))
        data = values.get("data", ("stdlib",))
        return TrainingConfig(model=model, data=tuple(data) if isinstance(data, list) else data, **rest)


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The rate of step 1..steps: a linear rise over the warmup, then a cosine down to its final fraction."""
    expect(isinstance(config, TrainingConfig), "config", "a TrainingConfig", type(config))
    expect_int("step", step, 1)
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    fraction = config.final_learning_rate_fraction
    return config.learning_rate * (fraction + (1 - fraction) * 0.5 * (1 + math.cos(math.pi * progress)))


def _expect_number(name: str, value: Any, expected: str, holds: Callable[[float], bool]) -> None:
    expect(is_number(value) and holds(value), name, expected, shown(value))
