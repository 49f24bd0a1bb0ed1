"""What is concluded from results, on results made up so that the conclusions are known."""

from __future__ import annotations

import pytest

import taylor_attention as ta
from taylor_attention.bench import facts
from taylor_attention.bench.cases import EARLY, FORWARD, OURS, PURE, SOFTMAX, Case, Outcome, Result
from taylor_attention.bench.machine import GEMM, READ


def result(kind: str, length: int, ours: float | None, degree: int = 2, **rivals: float) -> Result:
    times = {OURS: ours, **rivals}
    outcomes = {name: Outcome(time) if time else Outcome(skipped="too large: it is") for name, time in times.items()}
    return Result(Case(kind, 16, degree, length), outcomes, {READ: 1e9, GEMM: 1e9}, needed=500_000)


def test_decoding_is_compared_at_every_context():
    times = {1024: (2.0, 1.0), 4096: (2.5, 4.0), 16384: (2.0, 16.0)}
    [row] = facts.derive([result("decode", n, ours, sdpa=theirs, mine=8.0) for n, (ours, theirs) in times.items()])[
        "decode"
    ]
    assert (row["head_dim"], row["degree"]) == (16, 2)
    assert row["speedup"] == {"sdpa": {1024: 0.5, 4096: 1.6, 16384: 8.0}, "mine": {1024: 4.0, 4096: 3.2, 16384: 4.0}}
    assert row["flatness"] is None
    assert row["faster_from_context"] == facts.crossing([(n, *times[n]) for n in times])
    assert 1024 < row["faster_from_context"] < 4096
    assert not row["faster_at_the_shortest"]
    assert row["memory_break_even"] == ta.break_even_context(16, 2) == 82
    assert row["faster_over_memory_break_even"] == pytest.approx(row["faster_from_context"] / 82)


def early(length: int, ours: float, early: float) -> Result:
    return Result(Case("decode", 16, 2, length), {OURS: Outcome(ours), EARLY: Outcome(early)})


def test_flat_is_what_takes_as_long_after_long_contexts_as_after_short_ones():
    made = [result("decode", 1024, 9.0), early(4096, 2.1, 2.0), early(16384, 0.8, 1.0), early(65536, 3.0, 3.0)]
    [row] = facts.derive(made)["decode"]
    assert row["flatness"] == 1.25
    assert row["speedup"] == {}  # the same step after another context is no rival
    assert made[1].early_ratio == made[1].to_dict()["early_ratio"] == 2.1 / 2.0


def test_faster_means_at_all_longer_contexts_too():
    times = {1024: 1.0, 2048: 3.0, 4096: 1.0, 8192: 3.0}
    [row] = facts.derive([result("decode", n, 2.0, sdpa=theirs) for n, theirs in times.items()])["decode"]
    assert 4096 < row["faster_from_context"] < 8192
    [row] = facts.derive([result("decode", 1024, 2.0, sdpa=1.0)])["decode"]
    assert (row["faster_from_context"], row["faster_over_memory_break_even"]) == (None, None)


CROSSINGS = {
    "on straight lines in the logarithms": ([(1000, 2.0, 1.0), (4000, 1.0, 2.0)], 2000),
    "nearer to the nearer one": ([(1000, 2.0, 1.0), (8000, 1.0, 4.0)], 2000),
    "where they are equal": ([(1000, 1.0, 1.0), (2000, 1.0, 2.0)], 1000),
    "the last one": ([(10, 1.0, 2.0), (1000, 2.0, 1.0), (4000, 1.0, 2.0), (8000, 1.0, 2.0)], 2000),
    "always faster": ([(1000, 1.0, 2.0), (2000, 1.0, 3.0)], 1000),
    "never faster": ([(1000, 2.0, 1.0), (2000, 3.0, 2.0)], None),
    "slower again": ([(1000, 1.0, 2.0), (2000, 3.0, 2.0)], None),
    "not measured": ([], None),
}


@pytest.mark.parametrize(("pairs", "length"), CROSSINGS.values(), ids=CROSSINGS.keys())
def test_crossing(pairs: list[tuple[int, float, float]], length: int | None):
    assert facts.crossing(pairs) == length


def test_prefill_stands_beside_the_flops_of_half_its_length():
    [row] = facts.derive([result("prefill", 1000, 2.0, sdpa=1.0), result("prefill", 4000, 1.0, sdpa=2.0)])["prefill"]
    assert row["faster_from_length"] == 2000
    assert not row["faster_at_the_shortest"]
    tokens = row["flop_break_even"]
    ours, theirs = ta.flops_per_token(16, 2), 2 * 16 + 2 * 16 + 3
    assert (tokens - 2) * theirs / 2 < ours <= tokens * theirs / 2
    assert row["faster_over_flop_break_even"] == pytest.approx(2000 / tokens)


def near(kind: str, window: int, ours: float, pure: float, length: int = 1024) -> Result:
    """With 500 million FLOPs or bytes of the window: half a second at the machine's rates."""
    case, outcomes = Case(kind, 16, 2, length, window), {OURS: Outcome(ours), PURE: Outcome(pure)}
    return Result(case, outcomes, {READ: 1e9, GEMM: 1e9}, needed=600_000_000, window_needed=500_000_000)


def test_a_window_is_compared_with_its_parts():
    made = near("prefill", 64, ours=900.0, pure=250.0)
    assert made.window_ratio == pytest.approx(900 / (250 + 500))
    assert made.to_dict()["window_ratio"] == made.window_ratio
    assert Result(made.case, made.outcomes, {READ: 1e9}, window_needed=1).window_ratio is None
    assert Result(made.case, made.outcomes, made.rates).window_ratio is None
    assert Result(made.case, {OURS: Outcome(1.0)}, made.rates, window_needed=1).window_ratio is None


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_windows_have_facts_of_their_own(kind: str):
    made = [near(kind, 64, 900.0, 250.0), near(kind, 256, 600.0, 250.0), result(kind, 1024, 2.0, sdpa=1.0)]
    rows = {row["window"]: row for row in facts.derive(made)[kind]}
    assert rows.keys() == {0, 64, 256}
    assert (rows[0]["speedup"], rows[64]["speedup"]) == ({"sdpa": {1024: 0.5}}, {"pure": {1024: 250 / 900}})
    name, by = ("memory_break_even", "memory") if kind == "decode" else ("flop_break_even", "flops")
    even = {window: ta.break_even_context(16, 2, window=window, by=by) for window in rows}
    assert {window: row[name] for window, row in rows.items()} == {
        window: tokens * (2 if kind == "prefill" else 1) for window, tokens in even.items()
    }


def test_a_prefills_facts_have_what_its_window_costs():
    made = [near("prefill", 64, 900.0, 250.0), near("prefill", 64, 600.0, 250.0, 2048), result("prefill", 1024, 2.0)]
    rows = facts.derive(made)["prefill"]
    assert {row["window"]: row["window_ratio"] for row in rows} == {64: {1024: 1.2, 2048: 0.8}, 0: {}}


def test_training_is_compared_with_its_forward_pass():
    trained = Result(Case("train", 16, 2, 100), {OURS: Outcome(6.0), FORWARD: Outcome(2.0), SOFTMAX: Outcome(3.0)})
    [row] = facts.derive([trained])["train"]
    assert row["forward_ratio"] == {100: 3.0}
    assert row["speedup"] == {"sdpa": {100: 0.5}}


def test_a_fraction_is_of_the_kinds_own_limit():
    made = result("decode", 1, 2.0)
    assert made.fraction == pytest.approx(500_000 / 2e-3 / 1e9)
    assert Result(made.case, made.outcomes, {GEMM: 1e9}, 500_000).fraction is None
    assert result("prefill", 1, 0.5).fraction == pytest.approx(1.0)
    assert result("prefill", 1, None).fraction is None


def test_what_was_skipped_makes_no_facts():
    found = facts.derive([result("decode", 1024, None), result("decode", 1024, 1.0, degree=3, sdpa=0)])
    [row] = found["decode"]
    assert (row["degree"], row["speedup"]) == (3, {"sdpa": {}})
