"""Long runs, each in a process of its own: resident memory is then the run's alone. For tests of ops and lm."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import taylor_attention as ta
from taylor_attention.lm.generation import prefill, stream
from taylor_attention.nn import LanguageModel, ModelConfig
from tolerances import relative_error

STATUS = Path("/proc/self/status")
measurable = pytest.mark.skipif(not STATUS.exists(), reason="resident memory is read from /proc")

HEADS, SIZE, BLOCK = 2, 4, 5000

FLAT = 2**21
"""Bytes that memory may grow by after the first two blocks: two for each of a million tokens. Measured: under 1 MB."""


@dataclass
class Course:
    """What was found at the end of each block of `BLOCK` tokens.

    Attributes:
        tokens: that the state has counted. nbytes: of states. resident: bytes of the process in memory.
        finite: whether the outputs of the block's tokens were.
        error: of the last token's output, relative to softmax of the exact keys and the series of all others.
    """

    tokens: list[int] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    finite: list[bool] = field(default_factory=list)
    error: list[float] = field(default_factory=list)

    def note(self, states: list[ta.State], outputs: Tensor) -> None:
        """After a block."""
        (count,) = {tuple(state.tokens.tolist()) for state in states}
        self.tokens.extend(count)
        self.nbytes.append(sum(state.nbytes for state in states))
        self.finite.append(bool(outputs.isfinite().all()))
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS:"))
        self.resident.append(1024 * int(line.split()[1]))

    @property
    def growth(self) -> int:
        """Of resident memory, in bytes, since the first two blocks."""
        return max(self.resident[2:]) - self.resident[1]


def alone(run: Callable[..., Course], *arguments: Any) -> Course:
    """The course of a run in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(run, *arguments).result()


def decode_long(blocks: int, near: dict[str, int]) -> Course:
    """Decode token by token at degree 2; every block ends with the same query, whose sums over all keys are kept."""
    torch.set_num_threads(1)
    generator, course = torch.Generator().manual_seed(0), Course()
    state = ta.State.zeros(1, HEADS, SIZE, SIZE, 2, **near)
    last, total = torch.randn(1, HEADS, 1, SIZE, generator=generator), torch.zeros(())
    first: list[Tensor] = []
    for _ in range(blocks):
        query, key, value = torch.randn(3, 1, HEADS, BLOCK, SIZE, generator=generator)
        query[:, :, -1:] = last
        pair = [key / 2, torch.cat([value + 1, torch.ones_like(value[..., :1])], -1)]  # keys, [v, 1]
        steps = zip(*(x.split(1, dim=2) for x in (query, pair[0], pair[1][..., :-1])), strict=True)
        outputs = torch.cat([ta.decode_(*step, state) for step in steps], 2)
        first = first or [x[:, :, : near["sinks"]] for x in pair]
        latest = [x[:, :, -near["window"] :] for x in pair]
        heavy = [state.near.heavy_key.mT, state.near.heavy_value.mT]
        total = total + _sum(_taylor, last, *pair)
        exact = total + sum(_sum(_beyond, last, *each) for each in (first, latest, heavy))
        course.note([state], outputs)
        course.error.append(relative_error(outputs[:, :, -1], exact[..., :-1] / exact[..., -1:]))
    return course


def _taylor(score: Tensor) -> Tensor:
    return 1 + score + score**2 / 2


def _beyond(score: Tensor) -> Tensor:
    """What exp is more than its series: where a key is exact."""
    return score.exp() - _taylor(score)


def _sum(weight: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, columns: Tensor) -> Tensor:
    """[N | Z] in float64: [1, H, 1, d], [1, H, n, d], [1, H, n, E] -> [1, H, E]."""
    scores = key.double() @ query.double().mT * SIZE**-0.5
    return (weight(scores) * columns.double()).sum(2)


def generate_long(blocks: int, near: dict[str, int]) -> Course:
    """Write bytes after a short prompt."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, course = LanguageModel(ModelConfig(d_model=8, num_layers=2, num_heads=2, **near)).eval(), Course()
    states = model.new_states(1)
    logits = prefill(model, states, torch.zeros(1, BLOCK, dtype=torch.long))
    course.note(states, logits)
    text = stream(model, states, logits, generator=torch.Generator().manual_seed(0))
    for _ in range(blocks - 1):
        course.note(states, torch.cat([next(text) for _ in range(BLOCK)]))
    return course
