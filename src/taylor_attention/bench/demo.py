"""What a token costs as the context grows: a Taylor model beside its softmax twin, on the same text, in the same run.

Both models read one text. At contexts spaced evenly on a log scale reading pauses, and the text's next bytes are fed
one at a time, by turns to the models: each such step is one decode step of generation, and its wall time is the cost
of a token. Before a time counts, the steps' logits must agree with those of reading the same bytes in one block.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import threads
from ..core.storage import replacing
from ..errors import expect, require
from ..lm.generation import BLOCK
from ..nn import LanguageModel
from .agreement import DisagreementError, relative_difference
from .machine import resident_bytes

TOLERANCE = 1e-3
"""Largest relative L2 difference of decode and prefill logits: float32 sums in another order over a long context."""

TURN = 8  # steps that a model takes in a row: enough that most find its own data in the processor's caches

Notify = Callable[[str, int], None]


@dataclass(frozen=True)
class Measurement:
    """One model at one context.

    Attributes:
        model: its name.
        context: tokens before the first measured step.
        ms_per_token: median wall time of a decode step.
        mean_ms: mean wall time, in which rare work shows (folding a tail into the state, growing a cache).
        state_bytes: memory of the states (Taylor) or of the key/value cache (softmax).
        resident_bytes: memory of the whole process, with both models in it; None where the system does not say.
        bits_per_byte: loss over the text read since the previous context.
        difference: relative L2 difference between decode and prefill logits.
    """

    model: str
    context: int
    ms_per_token: float
    mean_ms: float
    state_bytes: int
    resident_bytes: int | None
    bits_per_byte: float
    difference: float


def contexts(tokens: int, steps: int, *, first: int = 128) -> list[int]:
    """Where to pause: powers of two from `first`, and last of all so that the final step ends at `tokens`.

    Raises:
        ArgumentError: too few tokens for one pause.
    """
    end = tokens - steps
    expect(end >= first, "tokens", f"an int >= {first + steps}", tokens)
    powers = [first << i for i in range((end // first).bit_length())]
    # A pause must leave room for its own steps, and one just before the end would say the same twice.
    return [context for context in powers if context <= 0.75 * end] + [end]


class Reader:
    """A model that reads a text: its states, its place, and what the text has cost it in nats."""

    def __init__(self, model: LanguageModel, text: Tensor) -> None:
        self.model, self.text = model, text  # text: int64 [1, N]
        self.states: list[Any] = model.new_states(1)
        self.position = 0
        self.nats, self.scored = 0.0, 0

    @torch.no_grad()
    def read(self, until: int, notify: Callable[[int], None]) -> None:
        """Read on in blocks, adding up the loss of each next byte; `notify` gets the position after each block."""
        while self.position < until:
            stop = min(self.position + BLOCK, until)
            logits = self.model.decode_(self.text[:, self.position : stop], self.states)
            targets = self.text[0, self.position + 1 : stop + 1]  # one fewer where the text ends
            loss = torch.nn.functional.cross_entropy(logits[0, : len(targets)], targets, reduction="sum")
            self.nats, self.scored, self.position = self.nats + float(loss), self.scored + len(targets), stop
            notify(self.position)

    def take_loss(self) -> float:
        """Bits per byte since this was last asked."""
        bits = self.nats / max(self.scored, 1) / math.log(2)
        self.nats, self.scored = 0.0, 0
        return bits

    @torch.no_grad()
    def ahead(self, steps: int) -> Tensor:
        """Logits [steps, V] of the next bytes read in one block; the states stay as they are."""
        block = self.text[:, self.position : self.position + steps]
        return self.model(block, states=self.states, return_states=True)[0][0]

    @torch.no_grad()
    def step(self) -> tuple[float, Tensor]:
        """One decode step on the text's next byte: its seconds, and its logits [V]."""
        token = self.text[:, self.position : self.position + 1]
        start = time.perf_counter()
        logits = self.model.decode_(token, self.states)
        seconds = time.perf_counter() - start
        self.position += 1
        return seconds, logits[0, 0]


def measure(
    models: Mapping[str, LanguageModel],
    text: bytes,
    *,
    pauses: Sequence[int],
    steps: int,
    notify: Notify,
    thread_count: int | None = 1,
) -> Iterable[list[Measurement]]:
    """Read the text with every model and yield, at each pause, what a token costs each of them.

    Args:
        models: name -> model over bytes.
        text: at least as long as the last pause plus the steps.
        pauses: contexts, increasing, at least `steps` apart.
        steps: decode steps measured at each pause.
        notify: called with a model's name and position as it reads.
        thread_count: PyTorch's threads during the decode steps; reading uses all.

    Raises:
        DisagreementError: a model's decode steps and its prefill do not give the same logits.
    """
    needed = pauses[-1] + steps
    expect(len(text) >= needed, "text", f"at least {needed:,} bytes", f"{len(text):,}")
    tokens = torch.frombuffer(bytearray(text[:needed]), dtype=torch.uint8).long()[None]
    readers = {name: Reader(model, tokens) for name, model in models.items()}
    for pause in pauses:
        for name, reader in readers.items():
            reader.read(pause, lambda position, name=name: notify(name, position))  # type: ignore[misc]
        yield _pause(readers, pause, steps, thread_count)


def _pause(readers: Mapping[str, Reader], context: int, steps: int, thread_count: int | None) -> list[Measurement]:
    """Measure the models by turns, so that whatever else the machine does meets them alike."""
    losses = {name: reader.take_loss() for name, reader in readers.items()}
    expected = {name: reader.ahead(steps) for name, reader in readers.items()}
    done: dict[str, list[tuple[float, Tensor]]] = {name: [] for name in readers}
    with threads.thread_count(thread_count):
        for turn in range(0, steps, TURN):
            for name, reader in readers.items():
                done[name] += [reader.step() for _ in range(min(TURN, steps - turn))]
    found = []
    for name, reader in readers.items():
        difference = relative_difference(torch.stack([logits for _, logits in done[name]]), expected[name])
        if not difference <= TOLERANCE:  # so that a NaN is caught as well
            raise DisagreementError(
                f"{name}: decode and prefill logits differ by {difference:.1e} at context {context:,}, "
                f"more than {TOLERANCE:.0e}; no cost is reported"
            )
        times = [1000 * seconds for seconds, _ in done[name]]
        found.append(
            Measurement(
                model=name,
                context=context,
                ms_per_token=statistics.median(times),
                mean_ms=statistics.fmean(times),
                state_bytes=sum(state.nbytes for state in reader.states),
                resident_bytes=resident_bytes(),
                bits_per_byte=losses[name],
                difference=difference,
            )
        )
    return found


def growth(rows: Sequence[Measurement], model: str) -> float:
    """How many times more a token costs this model at the longest context than at short ones.

    Short is the median of the three shortest contexts: the first one alone also pays for warming up.
    """
    own = [row.ms_per_token for row in rows if row.model == model]
    return own[-1] / statistics.median(own[:3])


def write_rows(path: Path, rows: Sequence[Measurement]) -> None:
    """The measurements as CSV, one row per model and context, replaced atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(rows[0])))
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def draw(path: Path, rows: Sequence[Measurement]) -> None:
    """Draw cost and memory per token against context, as PNG, replaced atomically.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figures = require("matplotlib.figure", "bench", "drawing the figure")
    figure = figures.Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == name]
        x = [row.context for row in own]
        left.plot(x, [row.ms_per_token for row in own], marker="o", label=name)
        right.plot(x, [row.state_bytes / 1e6 for row in own], marker="o", label=name)
    left.set(title="Time of one token", ylabel="milliseconds", ylim=(0, None))
    right.set(title="Memory of the context", ylabel="megabytes", yscale="log")
    for axes in (left, right):
        axes.set(xlabel="context (bytes of text)", xscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)
