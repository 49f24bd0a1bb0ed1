"""Training and judging one small model in memory: the steps of `train`, without its files."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import NormaliserError
from ...lm.data import sample_batch
from ...lm.evaluation import next_byte_loss
from ...lm.settings import TrainingConfig, learning_rate
from ...nn import LanguageModel, ModelConfig
from .noted_text import recall_distances

WARMUP = 30
SHARPNESS, FAR_SHARPNESS = 2.0, 2.0
DISTANCES = (32, 64, 128, 256, 512)
"""Upper ends of the ranges over which recall is averaged."""


@dataclass(frozen=True)
class Learnt:
    """A trained model, its curve, and where it stopped.

    Attributes:
        curve: (step, mean training loss since the point before).
        stopped: the step at which a normaliser failed, which ends a run; None if none did.
        milliseconds: of processor time per step.
    """

    model: LanguageModel
    curve: list[tuple[int, float]]
    stopped: int | None
    milliseconds: float


@torch.no_grad()
def prepare_recall(model: LanguageModel) -> None:
    """Begin where heads look for what came after a token like this one.

    Keys are made of the token before (where there is a convolution) by the projection of the queries, so that equal
    tokens have the largest scores. From a random start, models of all kinds need longer to find this out than these
    runs last; from here, the runs compare how well each kind remembers. Learned far keys and queries are made longer: a
    polynomial singles out what is alike only where scores are large.
    """
    for block in model.blocks:
        layer: Any = block.attention
        rows = layer.key.weight.shape[0]
        layer.key.weight.copy_(layer.query.weight[:rows])
        if layer.conv is not None:
            layer.conv.weight[1] = layer.conv.weight[1].roll(-1, dims=-1)
        if hasattr(layer.query_norm, "weight"):
            layer.query_norm.weight.fill_(SHARPNESS)
        if getattr(layer, "far_dim", None) is not None and layer.far_query_map is not None:
            layer.far_query_map.mul_(FAR_SHARPNESS)
            layer.far_key_map.mul_(FAR_SHARPNESS)


def learn(
    config: ModelConfig, text: Tensor, *, steps: int, batch: int, length: int, rate: float, seed: int, recall: bool
) -> Learnt:
    """Train a new model on random windows of the text; with `recall`, from `prepare_recall`'s start."""
    torch.manual_seed(seed)
    model = LanguageModel(config)
    if recall:
        prepare_recall(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = TrainingConfig(steps=steps, learning_rate=rate, warmup_steps=min(WARMUP, steps // 5))
    losses: list[float] = []
    started, stopped = time.process_time(), None
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step)
        inputs, targets = sample_batch(text, batch, length, seed=seed, step=step)
        try:
            loss = next_byte_loss(model, inputs, targets, "mean")
        except NormaliserError:
            stopped = step
            break
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    milliseconds = 1e3 * (time.process_time() - started) / max(1, len(losses))
    return Learnt(model, _curve(losses), stopped, milliseconds)


def _curve(losses: list[float], points: int = 15) -> list[tuple[int, float]]:
    width = max(1, len(losses) // points)
    ends = range(width, len(losses) + 1, width)
    return [(end, sum(losses[end - width : end]) / width) for end in ends]


@torch.no_grad()
def judge(model: LanguageModel, text: Tensor, *, length: int, windows: int) -> dict[str, Any]:
    """Losses in nats per byte over fixed windows: all, words, new values, and known ones by how far back they stand."""
    count = min(windows, (len(text) - 1) // length)
    starts = torch.arange(count) * ((len(text) - 1) // count)
    rows = text[starts[:, None] + torch.arange(length + 1)].long()
    inputs, targets = rows[:, :-1], rows[:, 1:]
    losses = torch.cat(
        [
            functional.cross_entropy(model(part).mT, wanted, reduction="none")
            for part, wanted in zip(inputs.split(8), targets.split(8), strict=True)
        ]
    )
    return {"loss": float(losses.mean())} | recall_losses(losses, recall_distances(inputs))


def recall_losses(losses: Tensor, distances: Tensor) -> dict[str, Any]:
    """Mean losses of what is no value, of new values, of known ones, and of these by distance; None where none are."""
    parts = {"rest": distances < 0, "new": distances == 0, "known": distances > 0}
    below = 0
    for end in DISTANCES:
        parts[f"to {end}"] = (distances > below) & (distances <= end)
        below = end
    return {name: float(losses[where].mean()) if bool(where.any()) else None for name, where in parts.items()}


def state_bytes(model: LanguageModel, tokens: int) -> int:
    """Bytes of the states of all layers after so many tokens of one sequence."""
    states = model.new_states(1)
    if model.config.attention == "softmax":  # others do not grow
        model.decode_(torch.zeros(1, tokens, dtype=torch.int64), states)
    return int(sum(state.nbytes for state in states))
