"""Time and memory per token against softmax's, by context (paper: its benchmarks of the proof of concept).

The authors' script times one step of a state that has seen a handful of tokens, and draws it at every context. Here a
state takes that many tokens in, in calls of a few thousand, and steps are timed where it stands.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...core.state import State
from ...ops.attention import attention
from ...ops.decode import decode_
from ...ops.normaliser import watch_normalisers
from ...ops.reference import attention_reference, softmax_reference
from ..agreement import EXACT, LOOSE, Reference, require_agreement
from ..machine import available_bytes, settled_bytes
from ..rivals import KeyValueCache, Memory
from ..turns import Contestant, Timing, time_by_turns
from .experiment import Case, Experiment
from .runtime_shown import conclusions, pictures, tables

HEAD_DIMS = (8, 16, 32, 64)
WIDTH = 64
"""Heads x head size."""
DEGREE = 3
"""The paper's P = 4."""
POOL = 2**17
"""Tokens that are drawn; longer streams go through them again, which costs what others would."""
BLOCK = 2**14
"""Tokens per call."""
ROOM = 64
"""Tokens that a cache has room for beyond the context, so that it stays as long while it is timed."""
PATIENCE = 60.0
"""Seconds that a stream may take from one power of ten of tokens to the next."""
BUDGET = 4.0
"""Seconds of timing at each context."""
REPEATED = 1000
"""Tokens that a cache holds over and over."""
CHECKED = 10**5
"""Contexts up to which a step's result is compared with float64 before its time counts."""


def plan(quick: bool) -> list[Case]:
    """Layers of 64 numbers by head size, and two small heads for the longest stream."""
    if quick:
        return [_case(8, 8, 10**5, 10.0)]
    return [_case(2, 8, 10**8, 2 * PATIENCE), *(_case(WIDTH // d, d, 10**7, PATIENCE) for d in HEAD_DIMS)]


def _case(heads: int, head_dim: int, longest: int, patience: float) -> Case:
    return {"heads": heads, "head_dim": head_dim, "longest": longest, "patience": patience}


@dataclass
class Stream:
    """Tokens one after the other, and the state of those that have passed."""

    pool: Tensor  # [3, 1, H, POOL, d]
    state: State | None = None
    passed: int = 0

    def advance(self, end: int) -> float:
        """Take in tokens up to a place; seconds that attention took for each."""
        began, seconds = self.passed, 0.0
        while self.passed < end:
            place = self.passed % self.pool.shape[3]
            size = min(BLOCK, end - self.passed, self.pool.shape[3] - place)
            block = self.pool[:, :, :, place : place + size].contiguous()
            start = time.perf_counter()
            _, self.state = attention(*block, degree=DEGREE, state=self.state, return_state=True)
            seconds += time.perf_counter() - start
            self.passed += size
        return seconds / (end - began)


@torch.no_grad()
def measure(case: Case, seed: int) -> dict[str, Any]:
    """Stream to each power of ten from 1,000 on, as far as patience goes, and time a step of both there."""
    generator, before = torch.Generator().manual_seed(seed), settled_bytes()
    drawn = torch.randn(3, 1, case["heads"], POOL, case["head_dim"], generator=generator)
    stream, memory, found = Stream(drawn), Memory(), []
    pool = stream.pool.nbytes
    context, per_token = REPEATED, 0.0
    while context <= case["longest"]:
        own: dict[str, Any] = {"context": context}
        if per_token * (context - stream.passed) <= case["patience"]:
            with watch_normalisers():  # the first few rows of an odd degree may be none
                per_token = stream.advance(context)
            held = settled_bytes()
            own["stream_us"] = 1e6 * per_token
            own["resident_bytes"] = None if before is None or held is None else held - before - pool - memory.nbytes
        own |= _time(stream, context, memory, generator)
        found.append(own)
        context *= 10
    return {"contexts": found, "threads": torch.get_num_threads()}


def _time(stream: Stream, context: int, memory: Memory, generator: torch.Generator) -> dict[str, Any]:
    """A step of each that is there: its time in milliseconds, median, fastest and slowest, and bytes held."""
    heads, head_dim = stream.pool.shape[2], stream.pool.shape[4]
    token, contestants, found = torch.randn(3, 1, heads, 1, head_dim, generator=generator), [], {}
    if stream.passed == context and stream.state is not None:
        state = stream.state.clone()
        step = partial(decode_, token[0], token[1], token[2], state)
        _check(step(), stream.pool[:, :, :, :context], context, token, partial(attention_reference, degree=DEGREE))
        contestants.append(Contestant("taylor", step, state.tail_key.shape[-1]))  # it is folded in once in so many
        found["state_bytes"] = state.nbytes
    if KeyValueCache.size(context + ROOM, heads, head_dim) <= (available_bytes() or 0) + memory.nbytes:
        first = stream.pool[:, :, :, :REPEATED]
        cache = KeyValueCache(first[1], first[2], context // REPEATED, ROOM, memory)
        repeated = first[:, :, :, torch.arange(min(context, CHECKED)) % REPEATED]
        _check(cache.decode(*token), repeated, context, token, softmax_reference, LOOSE)
        contestants.append(Contestant("softmax", partial(cache.decode, *token)))
        found["cache_bytes"] = KeyValueCache.size(context, heads, head_dim)
    timings = time_by_turns(contestants, repeats=7, budget=BUDGET)
    return found | {name: _milliseconds(timing) for name, timing in timings.items()}


def _check(
    y: Tensor, before: Tensor, context: int, token: Tensor, reference: Reference, tolerance: float = EXACT
) -> None:
    """Refuse a wrong step, where the context is short enough to tell; a longer one is the same arithmetic.

    Raises:
        DisagreementError: the step's result is wrong.
    """
    if context > CHECKED:
        return
    _, key, value = torch.cat([before, token], dim=3)
    require_agreement("a step", [y], [reference(token[0], key, value)], tolerance)


def _milliseconds(timing: Timing) -> list[float]:
    return [1e3 * seconds for seconds in (timing.seconds, timing.fastest, timing.slowest)]


EXPERIMENT = Experiment(
    "runtime",
    "Time and memory per token",
    "What does a token cost after so many others, in time and memory, beside softmax with its cache?",
    plan,
    tables,
    pictures,
    conclusions,
    measure=measure,
    timed=True,
)
