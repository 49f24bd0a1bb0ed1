"""Timing by turns, on a clock that only the steps move."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest

from taylor_attention.bench import turns
from taylor_attention.bench.turns import FEWEST, SLICE, Contestant, Timing, time_by_turns


class Clock:
    """A clock, and steps that take a time of their own on it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def contestant(self, name: str, *seconds: float, together: int = 1) -> Contestant:
        left = list(seconds)

        def step() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]
            self.order.append(name)

        return Contestant(name, step, together)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(turns.time, "perf_counter", lambda: made.now)
    return made


def test_the_first_turn_is_dropped_and_the_median_taken(clock: Clock):
    contestant = clock.contestant("a", 100.0, 3.0, 1.0, 2.0)
    assert time_by_turns([contestant], repeats=3, budget=1e6) == {"a": Timing(2.0, 1.0, 3.0, 3, 1)}


def test_contestants_take_turns(clock: Clock):
    time_by_turns([clock.contestant("a", 1.0), clock.contestant("b", 1.0)], repeats=4, budget=1e6)
    assert clock.order[2:] == ["a", "b"] * 4


def test_a_close_look_takes_more_turns_of_a_round(clock: Clock):
    close = [replace(clock.contestant(name, 1.0), often=3) for name in "ab"]
    found = time_by_turns([*close, clock.contestant("c", 1.0)], repeats=2, budget=1e6)
    assert clock.order[3:] == list("abcabab") * 2
    assert (found["a"].turns, found["c"].turns) == (6, 2)


def test_short_steps_are_repeated_until_they_fill_a_slice(clock: Clock):
    found = time_by_turns([clock.contestant("a", SLICE / 64), clock.contestant("b", SLICE)], repeats=3, budget=1e6)
    assert (found["a"].steps, found["b"].steps) == (64, 1)
    assert found["a"].seconds == pytest.approx(SLICE / 64)


@pytest.mark.parametrize(("seconds", "steps"), [(SLICE / 64, 60), (1.0, 20)])
def test_steps_that_belong_together_stay_together(clock: Clock, seconds: float, steps: int):
    assert time_by_turns([clock.contestant("a", seconds, together=20)], repeats=1, budget=1.0)["a"].steps == steps


@pytest.mark.parametrize(("budget", "expected"), [(0.1, FEWEST), (8.5, 8), (1e6, 10)])
def test_the_budget_bounds_the_turns_but_three_are_taken(clock: Clock, budget: float, expected: int):
    assert time_by_turns([clock.contestant("a", 1.0)], repeats=10, budget=budget)["a"].turns == expected


def test_garbage_is_collected_again_afterwards(clock: Clock):
    seen = []
    time_by_turns(
        [Contestant("a", lambda: seen.append(gc.isenabled()) or setattr(clock, "now", clock.now + 1))],
        repeats=1,
        budget=1,
    )
    assert seen and not any(seen)
    assert gc.isenabled()
