"""Cases from beginning to end on a small machine: who takes part, who declines, and that nothing wrong is timed."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from taylor_attention.bench import decode, machine, sequence, start
from taylor_attention.bench.agreement import DisagreementError
from taylor_attention.bench.cases import Case, Settings, plan_cases
from taylor_attention.bench.machine import COPY, GEMM, READ, Machine
from taylor_attention.bench.measure import Bench, check, measure
from taylor_attention.bench.rivals import Recurrent
from taylor_attention.core.state import State
from taylor_attention.errors import ArgumentError, TaylorAttentionError
from taylor_attention.ops.reference import attention_reference, softmax_reference
from tolerances import TOLERANCE, relative_error

SETTINGS = Settings(width=16, repeats=1, budget=0.01)
KINDS = ["prefill", "train", "decode"]


def bench(settings: Settings = SETTINGS, **factories) -> Bench:
    return Bench(settings, factories, Machine(gemm_size=16, nbytes=4096))


def case(kind: str, length: int = 40, degree: int = 2, window: int = 0) -> Case:
    return Case(kind, 8, degree, length, window)


# ---- who takes part


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_everyone_is_checked_and_timed(kind: str, degree: int):
    found = measure(case(kind, degree=degree), bench(mine=Recurrent))
    forward = {"taylor forward"} if kind == "train" else set()
    assert found.outcomes.keys() == {"taylor", "sdpa", "recurrent", "mine"} | forward
    turns = {
        name: 3 if (kind, name) == ("decode", "taylor") else 1 for name in found.outcomes
    }  # it is looked at closely
    assert {name: outcome.turns for name, outcome in found.outcomes.items()} == turns
    assert all(outcome.milliseconds > 0 for outcome in found.outcomes.values())
    assert all(found.outcomes[name].error < 1e-5 for name in found.outcomes.keys() - forward)


@pytest.mark.parametrize("window", [5, 64])
@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_window_stands_beside_the_method_without_and_softmax(kind: str, degree: int, window: int):
    found = measure(case(kind, degree=degree, window=window), bench(mine=Recurrent))
    forward = {"taylor forward"} if kind == "train" else set()
    assert found.outcomes.keys() == {"taylor", "pure", "sdpa", "sliding"} | forward
    assert all(outcome.milliseconds > 0 for outcome in found.outcomes.values())
    assert all(found.outcomes[name].error < 1e-5 for name in found.outcomes.keys() - forward)


def test_a_windows_limit_is_that_of_its_parts():
    found = {kind: measure(case(kind, window=10), bench()) for kind in KINDS}
    prefill = found["prefill"]
    assert prefill.chunk == 30  # what is far: one chunk, without the last 10 tokens
    assert prefill.window_needed == 2 * (55 + 30 * 10) * 4 * 8  # two heads
    assert prefill.needed == 2 * (2 * (8 + 9) * 465) + prefill.window_needed
    assert prefill.window_ratio > 0
    pure = measure(case("decode"), bench())
    assert found["decode"].needed == pure.needed + 2 * 10 * (8 + 8) * 4
    assert found["decode"].outcomes["taylor"].nbytes == State.zeros(1, 2, 8, 8, 2, window=10).nbytes
    assert found["decode"].outcomes["pure"].nbytes == State.zeros(1, 2, 8, 8, 2).nbytes
    assert found["decode"].outcomes["sliding"].nbytes == 2 * 2 * 10 * 8 * 4
    assert found["decode"].window_ratio is None and found["train"].window_needed is None


def test_each_kind_has_its_limit():
    found = {kind: measure(case(kind, length=40), bench()) for kind in KINDS}
    assert {kind: set(result.rates) for kind, result in found.items()} == {
        "prefill": {GEMM},
        "train": {GEMM},
        "decode": {READ, COPY},
    }
    assert found["prefill"].chunk == 40
    assert found["prefill"].needed == 2 * (2 * (8 + 9) * 820)  # 40 tokens in one chunk, two heads
    assert found["decode"].outcomes["taylor"].nbytes == State.zeros(1, 2, 8, 8, 2).nbytes
    assert found["decode"].outcomes["sdpa"].nbytes == 2 * 4 * 2 * 8 * (40 + decode.FRESH)
    assert found["prefill"].fraction > 0 and found["decode"].fraction > 0
    assert found["train"].fraction is None and found["train"].forward_ratio > 0


def test_a_turn_of_decoding_holds_whole_periods_of_the_fold():
    period = State.zeros(1, 2, 8, 8, 2).tail_key.shape[-1]
    assert measure(case("decode"), bench()).outcomes["taylor"].steps % period == 0


def test_the_threads_and_gradients_are_put_back():
    before = torch.get_num_threads(), torch.is_grad_enabled()
    measure(case("decode"), bench(replace(SETTINGS, threads=before[0] + 1)))
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == before


# ---- nothing wrong is timed


def spoiled(factor: float, **shape):
    inner = Recurrent(**shape)
    return lambda *inputs: inner(*inputs) * factor


@pytest.mark.parametrize("kind", KINDS)
def test_a_rival_with_a_wrong_result_is_refused(kind: str):
    with pytest.raises(DisagreementError, match=r"^mine: expected a relative error of at most 1e-03 .*, got 1.0e-02"):
        measure(case(kind), bench(mine=partial(spoiled, 1.01)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rival_is_held_to_a_looser_bound_than_the_library(kind: str):
    assert 1e-4 < measure(case(kind), bench(mine=partial(spoiled, 1.0002))).outcomes["mine"].error < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_library_with_a_wrong_result_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch):
    module, name = (decode, "decode_") if kind == "decode" else (sequence, "attention")
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *inputs, **options: right(*inputs, **options) * 1.0001)
    with pytest.raises(DisagreementError, match=r"^taylor: expected a relative error of at most 2e-05"):
        measure(case(kind), bench())


@pytest.mark.parametrize("kind", ["prefill", "train"])
def test_the_pure_method_has_no_window(kind: str, monkeypatch: pytest.MonkeyPatch):
    windows: list[int] = []
    right = sequence.attention

    def spy(*inputs, window, **rest):
        windows.append(window)
        return right(*inputs, window=window, **rest)

    monkeypatch.setattr(sequence, "attention", spy)
    found = {name: admit() for name, admit in sequence.contestants(case(kind, window=6), SETTINGS, {}).items()}
    windows.clear()
    for name in ("taylor", "pure"):
        found[name].step()
    assert windows == [6, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_another_window_is_a_wrong_result(kind: str, monkeypatch: pytest.MonkeyPatch):
    module, name = (decode, "attention") if kind == "decode" else (sequence, "attention")
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *inputs, window, **rest: right(*inputs, window=max(0, window - 1), **rest))
    with pytest.raises(DisagreementError, match=r"^taylor: expected a relative error of at most 2e-05"):
        measure(case(kind, window=6), bench())


def test_a_rival_with_a_wrong_gradient_is_refused():
    def cut_off(**shape):
        inner = Recurrent(**shape)
        return lambda query, key, value, again: inner(query, key.detach() + 0 * key, value, again)

    with pytest.raises(DisagreementError, match=r"^mine: "):
        measure(case("train"), bench(mine=cut_off))


def test_a_rival_that_forgets_its_context_is_refused():
    def forgetful(**shape):
        inner = Recurrent(**shape)
        return lambda query, key, value, again: inner(query, key, value, again and query.shape[2] == 1)

    measure(case("decode", length=decode.BLOCK), bench(mine=forgetful))
    with pytest.raises(DisagreementError, match=r"^mine: "):
        measure(case("decode", length=2 * decode.BLOCK), bench(mine=forgetful))


# ---- who declines


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_over_the_limit_is_skipped_with_the_reason(kind: str):
    needed = 2 * 4 * 2 * 9 * 45  # sums and compensation, float32, two heads, E = 9, M = 45
    found = measure(case(kind), bench(replace(SETTINGS, max_state_bytes=needed - 1)))
    assert (
        found.outcomes["taylor"].skipped == f"larger than --max-state-bytes {needed - 1:,}: a state of {needed:,} bytes"
    )
    assert found.outcomes.keys() == {"taylor"}
    assert measure(case(kind), bench(replace(SETTINGS, max_state_bytes=needed))).outcomes["taylor"].milliseconds


def test_a_state_is_over_the_limit_with_its_window():
    needed = 2 * 4 * 2 * 9 * 45 + 2 * 3 * ((8 + 9) * 4 + 2 * 8)  # a key, [v, 1] and two float64 for each near token
    within, without = (
        measure(case("decode", window=3), bench(replace(SETTINGS, max_state_bytes=limit))).outcomes["taylor"]
        for limit in (needed, needed - 1)
    )
    assert within.milliseconds
    assert without.skipped == f"larger than --max-state-bytes {needed - 1:,}: a state of {needed:,} bytes"


def test_a_cache_that_does_not_fit_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode, "available_bytes", lambda: 1000)
    found = measure(case("decode"), bench())
    assert found.outcomes["sdpa"].skipped == "more memory than there is: a cache of 13,312 bytes, 1,000 are available"
    assert found.outcomes["taylor"].milliseconds


@pytest.mark.parametrize("kind", KINDS)
def test_a_slow_rival_is_skipped_before_it_takes_long(kind: str):
    def slow(**shape):
        inner = Recurrent(**shape)

        def attend(*inputs):
            time.sleep(1e-3 * inputs[0].shape[2])
            return inner(*inputs)

        return attend

    began = time.perf_counter()
    found = measure(case(kind, 10**4 if kind == "decode" else 4000), bench(replace(SETTINGS, patience=0.2), mine=slow))
    assert time.perf_counter() - began < 4
    assert found.outcomes["mine"].skipped.startswith(f"longer than {2 if kind == 'decode' else 0.2} s (--patience): ")
    assert found.outcomes["taylor"].milliseconds


@pytest.mark.parametrize("kind", KINDS)
def test_a_rival_that_needs_too_much_memory_is_skipped(kind: str):
    def greedy(**shape):
        return lambda query, key, value, again: torch.empty(2**50)

    assert measure(case(kind), bench(mine=greedy)).outcomes["mine"].skipped.startswith("more memory than there is: ")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_an_allocation_beyond_what_is_available_fails_and_later_ones_do_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "available_bytes", lambda: 2**25)
    with pytest.raises(MemoryError), machine.memory_guard():
        torch.empty(2**25)  # four bytes each
    assert torch.empty(2**25).numel() == 2**25


def test_other_failures_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="my own"), machine.memory_guard():
        raise RuntimeError("my own")


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is Linux's")
def test_working_memory_is_what_a_call_takes_at_most():
    result, nbytes = machine.working_memory(lambda: torch.ones(2**24).sum())
    assert result == 2**24
    assert nbytes == pytest.approx(2**26, rel=0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is Linux's")
def test_working_memory_shows_where_the_allocator_has_freed_memory_at_hand():
    def scatter() -> list[torch.Tensor]:
        return [torch.ones(2**12) for _ in range(2**11)]  # 16 KiB each, 32 MiB together

    last = scatter()[-1]  # holds the end of the heap in place
    assert machine.working_memory(scatter)[1] > 2**24
    assert last.sum() == 2**12


# ---- contexts


@pytest.mark.parametrize("length", [1, 100, 256, 257, 1000, 5000])
def test_a_context_has_the_tokens_asked_for_in_whole_blocks(length: int):
    context = decode.make_context(case("decode", length), SETTINGS, decode.Kept())
    assert length <= context.tokens < length + decode.BLOCK
    assert context.state.tokens.tolist() == [context.tokens]


@pytest.mark.parametrize("copies", [1, 2, 5])
@pytest.mark.parametrize("window", [0, 1, 3, 7, 8, 14, 100])
def test_what_is_expected_after_a_context_is_attention_to_every_copy(
    monkeypatch: pytest.MonkeyPatch, window: int, copies: int
):
    monkeypatch.setattr(decode, "BLOCK", 6)
    context = decode.make_context(case("decode", 6 * copies, window=window), SETTINGS, decode.Kept())
    fresh = [torch.cat(tokens, 2) for tokens in zip(*context.fresh[: decode.CHECKED], strict=True)]
    whole = [torch.cat([x.repeat(1, 1, copies, 1), y], 2) for x, y in zip(context.block, fresh, strict=True)]
    for reference in (partial(attention_reference, degree=2, window=window), softmax_reference):
        expected = reference(*whole)[:, :, -decode.CHECKED :]
        assert relative_error(context.expected(reference), expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("window", [3, 6, 100])
@pytest.mark.parametrize("length", [4, 6, 30])
def test_everyone_holds_the_window_of_any_context(monkeypatch: pytest.MonkeyPatch, length: int, window: int):
    monkeypatch.setattr(decode, "BLOCK", 6)
    found = measure(case("decode", length, window=window), bench())
    assert all(outcome.error < 1e-5 for outcome in found.outcomes.values())


def test_a_context_goes_on_from_a_shorter_one_of_the_same_block(monkeypatch: pytest.MonkeyPatch):
    kept, merges = decode.Kept(), []
    merge = State.merge
    monkeypatch.setattr(State, "merge", lambda a, b: merges.append(1) or merge(a, b))

    def moments(length: int, kept: decode.Kept) -> torch.Tensor:
        torch.manual_seed(0)
        return decode.make_context(case("decode", length), SETTINGS, kept).state.moments

    moments(2**10, kept)
    merges.clear()
    got = moments(2**13, kept)
    assert len(merges) == 3
    expected = moments(2**13, decode.Kept())
    assert relative_error(got, expected) < TOLERANCE[torch.float32]
    assert relative_error(moments(3 * 2**8, kept), expected * 3 / 32) < TOLERANCE[torch.float32]  # a shorter one


def test_contexts_of_one_shape_are_kept_for_each_window():
    kept = decode.Kept()
    context = decode.make_context(case("decode", 600, window=5), SETTINGS, kept)
    assert (context.state.window, replace(context, window=0).state.window) == (5, 0)
    assert {window: copies for window, (copies, _) in kept.states.items()} == {5: 3, 0: 3}
    assert decode.make_context(case("decode", 600, degree=1, window=5), SETTINGS, kept).state.degree == 1
    assert kept.states.keys() == {5}


# ---- plans


def test_cases_are_every_combination_from_short_to_long():
    found = plan_cases(["decode", "train"], [16, 8], [3, 2], contexts=[4096, 1024], lengths=[100])
    assert found[:2] == [Case("train", 8, 2, 100), Case("train", 8, 3, 100)]
    assert found[4:6] == [Case("decode", 8, 2, 1024), Case("decode", 8, 2, 4096)]
    assert len(found) == 4 + 8


def test_some_kinds_know_no_window():
    found = plan_cases(["start", "train", "decode", "model"], [16], [2], contexts=[1024], lengths=[100], window=8)
    assert {case.kind: case.window for case in found} == {"start": 0, "train": 8, "decode": 8, "model": 0}


def test_what_could_not_go_through_is_refused_at_once():
    with pytest.raises(ArgumentError, match=r"^--head-dim: expected a divisor of the width 16, got 5"):
        check([Case("prefill", 5, 2, 10)], SETTINGS)
    with pytest.raises(ArgumentError, match=r"^backend: expected one of"):
        check([case("prefill")], replace(SETTINGS, backend="none"))


# ---- starting


def test_starting_is_measured_in_a_fresh_process():
    found = measure(case("start", 16), bench())
    assert list(found.outcomes) == ["import", "first call", "second call"]
    assert all(0 < outcome.milliseconds < 60_000 for outcome in found.outcomes.values())


def test_a_process_that_fails_is_one_clear_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(start, "_CODE", "raise SystemExit('broken')")
    with pytest.raises(TaylorAttentionError, match=r"^start: .* got broken"):
        start.measure(case("start"), SETTINGS)
