"""A generate step of the shipped models: checked, timed, and with what part of it is attention."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from taylor_attention.bench import facts, model
from taylor_attention.bench.agreement import DisagreementError
from taylor_attention.bench.cases import MODEL_SHAPE, Case, Outcome, Result, Settings, plan_cases
from taylor_attention.bench.evidence import speed_shown
from taylor_attention.bench.machine import Machine
from taylor_attention.bench.measure import Bench, check, measure
from taylor_attention.core.state import State
from taylor_attention.errors import ArgumentError
from taylor_attention.lm.checkpoint import load_checkpoint, shipped
from taylor_attention.nn import LanguageModel, ModelConfig, TaylorAttention

SETTINGS = Settings(repeats=1, budget=0.01)
CASE = Case("model", *MODEL_SHAPE, 40)
MADE = Result(CASE, {"taylor": Outcome(4.0, nbytes=10**6, attention=1.0), "sdpa": Outcome(8.0, attention=6.0)})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are quick to run in place of the shipped ones."""

    def load(name: str) -> tuple[LanguageModel, dict[str, str]]:
        torch.manual_seed(0)
        return LanguageModel(ModelConfig(d_model=16, num_layers=2, num_heads=2, attention=name)).eval(), {}

    monkeypatch.setattr(model, "shipped", lambda name: name)
    monkeypatch.setattr(model, "load_checkpoint", load)


@pytest.mark.usefixtures("small")
def test_both_twins_are_checked_and_timed_with_their_attention():
    found = measure(CASE, Bench(SETTINGS, {}, Machine(gemm_size=16, nbytes=4096)))
    assert found.outcomes.keys() == {"taylor", "sdpa"}
    for outcome in found.outcomes.values():
        assert 0 < outcome.attention < outcome.milliseconds
        assert 0 < outcome.error < 1e-5
        assert outcome.nbytes > 0 and outcome.turns == 1
    period = State.zeros(1, 2, 8, 8, 2).tail_key.shape[-1]  # of folding the tail
    assert found.outcomes["taylor"].steps % period == 0
    assert Result.from_dict(found.to_dict()) == found


def test_the_shape_is_that_of_the_shipped_model():
    config = load_checkpoint(shipped("taylor"))[0].config
    assert (config.d_model // config.num_heads, config.degree) == MODEL_SHAPE


@pytest.mark.usefixtures("small")
def test_the_share_is_of_attention_alone(monkeypatch: pytest.MonkeyPatch):
    mix = TaylorAttention._mix_

    def slow_mix(self, heads, state):
        time.sleep(0.01)
        return mix(self, heads, state)

    before = model.measure(CASE, SETTINGS).attention_shares
    monkeypatch.setattr(TaylorAttention, "_mix_", slow_mix)
    slowed = model.measure(CASE, SETTINGS)
    assert slowed.attention_shares["taylor"] > max(0.75, before["taylor"])
    assert slowed.outcomes["taylor"].attention > 15  # two layers of 10 ms and more each
    assert slowed.attention_shares["sdpa"] < 0.75


@pytest.mark.usefixtures("small")
def test_a_step_that_disagrees_with_reading_is_refused(monkeypatch: pytest.MonkeyPatch):
    mix = TaylorAttention._mix_
    monkeypatch.setattr(TaylorAttention, "_mix_", lambda *inputs: 1.1 * mix(*inputs))
    with pytest.raises(DisagreementError, match=r"^taylor: expected a relative error of at most 1e-03"):
        model.measure(CASE, SETTINGS)


def test_an_installation_without_weights_says_so(monkeypatch: pytest.MonkeyPatch):
    def refuse(name: str) -> None:
        raise ArgumentError("name: expected shipped weights")

    monkeypatch.setattr(model, "shipped", refuse)
    found = model.measure(CASE, SETTINGS)
    assert found.outcomes["taylor"].skipped == "name: expected shipped weights"
    assert facts.derive([found])["model"] == []


@pytest.mark.parametrize(
    ("contexts", "lengths"), [((65536, 1024, 16384), [1024, 16384]), ((65536, 10**6), [65536]), ((1,), [1])]
)
def test_the_model_has_its_own_shape_and_short_contexts(contexts: tuple[int, ...], lengths: list[int]):
    cases = plan_cases(["model"], [8, 64], [3], contexts=contexts, lengths=[])
    assert cases == [Case("model", *MODEL_SHAPE, length) for length in lengths]
    check(cases, replace(SETTINGS, width=3))  # the width is that of other kinds


def test_the_share_is_in_the_facts_the_results_and_the_table():
    shares = {"taylor": 0.25, "sdpa": 0.75}
    [row] = facts.derive([MADE])["model"]
    assert row == {
        "head_dim": 16,
        "degree": 2,
        "window": 0,
        "speedup": {"sdpa": {40: 2.0}},
        "attention_shares": {40: shares},
    }
    assert MADE.to_dict()["attention_shares"] == shares
    [table] = speed_shown.tabulate([MADE])
    assert table.rows == (("40", "4", "1 (25%)", "1 MB", "8", "6 (75%)", "-"),)
