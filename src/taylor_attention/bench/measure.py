"""One case from beginning to end: inputs, checks, timing by turns beside the machine's own rates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from ..core.basis import check_degree
from ..core.threads import thread_count
from ..ops.attention import attention
from . import decode, model, sequence, start
from .cases import (
    DECODE,
    MODEL,
    OURS,
    PREFILL,
    START,
    TRAIN,
    Case,
    DeclinedError,
    Outcome,
    Ready,
    Result,
    Settings,
    count_heads,
    refuse_large_state,
)
from .limits import chosen_chunk, decode_bytes, prefill_flops, window_flops
from .machine import COPY, GEMM, READ, Machine, available_bytes, memory_guard, peak_memory
from .rivals import Factory
from .sequence import Admit
from .turns import Contestant, Timing, time_by_turns


@dataclass(frozen=True)
class Bench:
    """What the cases of a run share: settings, rivals by name, the machine, what one decode case leaves the next."""

    settings: Settings
    factories: Mapping[str, Factory]
    machine: Machine
    kept: decode.Kept = field(default_factory=decode.Kept)


def measure(case: Case, bench: Bench) -> Result:
    """Check and time every contestant of a case.

    Raises:
        DisagreementError: a contestant's result is wrong.
    """
    settings = bench.settings
    if case.kind == START:
        return start.measure(case, settings)
    if case.kind == MODEL:
        return model.measure(case, settings)
    try:
        refuse_large_state(case, settings)
    except DeclinedError as error:
        return Result(case, {OURS: Outcome(skipped=str(error))})
    torch.manual_seed(settings.seed)
    with thread_count(settings.threads), torch.set_grad_enabled(case.kind == TRAIN):
        ready, skipped = _admit_all(_contestants(case, bench))
        own = [Contestant(name, each.step, each.together, each.often) for name, each in ready.items()]
        beside = bench.machine.contestants(*((READ, COPY) if case.kind == DECODE else (GEMM,)))
        run = partial(time_by_turns, [*own, *beside], repeats=settings.repeats, budget=settings.budget)
        timings, peak = peak_memory(run)
    outcomes = {name: _outcome(timings[name], each) for name, each in ready.items()}
    return Result(case, outcomes | skipped, bench.machine.rates(timings), **_needed(case, settings), peak_bytes=peak)


def _contestants(case: Case, bench: Bench) -> dict[str, Admit]:
    if case.kind == DECODE:
        return decode.contestants(case, bench.settings, bench.factories, bench.kept)
    return sequence.contestants(case, bench.settings, bench.factories)


def _admit_all(contestants: Mapping[str, Admit]) -> tuple[dict[str, Ready], dict[str, Outcome]]:
    """Those who take part, and why the others do not."""
    ready, skipped = {}, {}
    for name, admit in contestants.items():
        available = available_bytes() or 0
        try:
            with memory_guard():
                ready[name] = admit()
        except DeclinedError as error:
            skipped[name] = Outcome(skipped=str(error))
        except MemoryError:
            skipped[name] = Outcome(skipped=f"more memory than there is: {available:,} bytes were available")
    return ready, skipped


def _outcome(timing: Timing, ready: Ready) -> Outcome:
    median, fastest, slowest = (1e3 * seconds for seconds in (timing.seconds, timing.fastest, timing.slowest))
    return Outcome(median, fastest, slowest, timing.turns, timing.steps, ready.error, ready.nbytes)


def _needed(case: Case, settings: Settings) -> dict[str, int]:
    """What the limit counts, bytes of a decode step or FLOPs of a prefill, and the prefill's chunk.

    The far part of a prefill is a window shorter: as many tokens never leave the window.
    """
    heads, head_dim, degree = count_heads(case, settings), case.head_dim, case.degree
    if case.kind == DECODE:
        return {"needed": decode_bytes(heads, head_dim, degree, case.window)}
    if case.kind != PREFILL:
        return {}
    far, near = max(0, case.length - case.window), window_flops(case.length, heads, head_dim, case.window)
    chunk = chosen_chunk(far, heads, head_dim, degree, settings.backend, settings.chunk)
    return {"needed": prefill_flops(far, heads, head_dim, degree, chunk) + near, "window_needed": near, "chunk": chunk}


def check(cases: Iterable[Case], settings: Settings) -> None:
    """Refuse a run that could not go through, before anything is measured.

    Raises:
        ArgumentError: a head size does not divide the width or cannot have a degree, or there is no such backend.
    """
    for case in cases:
        check_degree(case.head_dim, case.degree)
        if case.kind != MODEL:
            count_heads(case, settings)
    nothing = torch.zeros(1, 1, 1, 1)
    attention(nothing, nothing, nothing, degree=0, backend=settings.backend)
