"""Timing by turns: whatever else the machine does meets all contestants alike.

A contestant's turn is as many steps as fill a slice of time, so that a short step is repeated often and a long one is
not. The first turn warms up and is dropped. A contestant's time is the median over turns of its mean step.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SLICE = 0.05  # seconds of a turn, unless a single step takes longer
FEWEST = 3  # rounds, however long they take


@dataclass(frozen=True)
class Contestant:
    """Something to time.

    Attributes:
        together: steps that belong in one turn, where rare work comes once in so many steps.
        often: turns in a round of all contestants: more than one where times are compared closely.
    """

    name: str
    step: Callable[[], object]
    together: int = 1
    often: int = 1


@dataclass(frozen=True)
class Timing:
    """Seconds of one step: median, fastest and slowest over `turns` turns of `steps` steps each."""

    seconds: float
    fastest: float
    slowest: float
    turns: int
    steps: int


def time_by_turns(contestants: Sequence[Contestant], *, repeats: int, budget: float) -> dict[str, Timing]:
    """Time every contestant in up to `repeats` rounds, fewer (but `FEWEST`) where the budget in seconds is spent."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        steps = {each.name: _steps_of_a_turn(each) for each in contestants}
        found: dict[str, list[float]] = {each.name: [] for each in contestants}
        start = time.perf_counter()
        most = max((each.often for each in contestants), default=0)
        order = [each for turn in range(most) for each in contestants if turn < each.often]
        for done in range(max(repeats, 1)):
            if done >= FEWEST and time.perf_counter() - start > budget * done / (done + 1):
                break  # the next round would pass the budget
            for each in order:
                found[each.name].append(_seconds_of_a_step(each.step, steps[each.name]))
    finally:
        if collecting:
            gc.enable()
    return {
        name: Timing(statistics.median(own), min(own), max(own), len(own), steps[name]) for name, own in found.items()
    }


def _steps_of_a_turn(contestant: Contestant) -> int:
    """Warm up, and find how many steps fill a slice."""
    seconds = contestant.together * _seconds_of_a_step(contestant.step, contestant.together)
    if seconds < SLICE:  # warm by now, and still cheap to run again
        seconds = contestant.together * _seconds_of_a_step(contestant.step, contestant.together)
    return contestant.together * max(1, int(SLICE / seconds))


def _seconds_of_a_step(step: Callable[[], object], steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps
