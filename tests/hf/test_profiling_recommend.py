"""Heads whose nature is known get the statistics and the advice that go with it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from taylor_attention.core.series import expected_error
from taylor_attention.errors import ArgumentError
from taylor_attention.hf import HeadSettings, profiling
from taylor_attention.hf.profiling.observe import Observation
from taylor_attention.hf.profiling.profiler import SINKS, Profiler
from taylor_attention.hf.profiling.recommend import hull
from taylor_attention.hf.profiling.statistics import Choice, Profile

TOKENS, D, DV = 512, 8, 8
STD, WINDOWS = 0.6, (64, 128)
EVEN, SINK, LOCAL, NEEDLE = HEADS = range(4)
"""Heads: scores of equal spread; all weight on the sinks; on the latest tokens; later queries want one
early token, and earlier ones all others: e^8 is more than these together."""


def planted() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [4, T, d] of these heads; the scale is 1."""
    query, key = torch.zeros(2, 4, TOKENS, D).double().unbind(0)
    value = torch.randn(4, TOKENS, DV).double()
    place = torch.arange(TOKENS).double()
    query[EVEN] = STD * torch.nn.functional.normalize(torch.randn(TOKENS, D).double(), dim=-1)
    key[EVEN] = torch.randn(TOKENS, D).double()
    query[SINK, :, 0], key[SINK, :SINKS, 0] = 1, 14
    angle = math.pi / TOKENS * place  # score 3000 cos(angle between): a parabola as wide as 3 tokens
    for tensor in (query, key):
        tensor[LOCAL, :, 0], tensor[LOCAL, :, 1] = 3000**0.5 * angle.cos(), 3000**0.5 * angle.sin()
    query[NEEDLE, :, 0], key[NEEDLE, 100, 0] = torch.where(place < TOKENS // 2, -0.5, 1), 8
    return query, key, value


def profiled(queries: int = 64) -> Profile:
    torch.manual_seed(0)
    made = Profiler(WINDOWS, queries, None)
    made.see(Observation(0, *planted(), 1.0, True))
    return made.result(TOKENS, 1)


@pytest.fixture(scope="module")
def profile() -> Profile:
    return profiled()


def test_the_spread_of_scores_is_the_planted_one(profile):
    spread = profile.heads[0, EVEN].spread
    assert spread.std == pytest.approx(STD, rel=0.1)
    assert spread.centred_mean < spread.std / 10


@pytest.mark.parametrize("degree", range(4))
def test_a_fit_errs_as_the_spread_lets_expect(profile, degree):
    found = profile.heads[0, EVEN].errors.pure["fitted"][degree]
    assert found == pytest.approx(expected_error(STD, degree, fitted=True), rel=0.4)


def test_weight_is_where_it_was_planted(profile):
    weight = {head: profile.heads[0, head].weight for head in HEADS}
    assert weight[EVEN].far[128] == pytest.approx(1 - 132 / 384, abs=0.1)
    assert weight[SINK].sinks > 0.99
    assert weight[LOCAL].window[64] > 0.999
    assert weight[NEEDLE].far[128] > 0.9
    assert weight[NEEDLE].top[128][16] > 0.9
    assert weight[EVEN].top[128][16] < 0.3


def test_what_is_needed_is_told(profile):
    errors = {head: profile.heads[0, head].errors for head in HEADS}
    assert errors[SINK].window_for(0.01) == 0
    assert errors[LOCAL].window_for(0.01) == 64
    assert errors[NEEDLE].window_for(0.1) is None
    assert errors[EVEN].degree_for("fitted", 0.1) == 2
    assert errors[EVEN].degree_for("fitted", 0.01) > errors[EVEN].degree_for("fitted", 0.1)
    assert errors[NEEDLE].degree_for("taylor", 0.01) is None


def test_each_head_is_advised_by_its_nature(profile):
    advice = profiling.recommend(profile, error=0.1)
    kinds = {head: choice.kind for (_, head), choice in advice.choices.items()}
    assert kinds == {EVEN: "pure Taylor", SINK: "hybrid", LOCAL: "hybrid", NEEDLE: "softmax"}
    assert advice.choices[0, SINK].settings == HeadSettings(0, SINKS, 0, None)
    assert advice.choices[0, LOCAL].settings == HeadSettings(64, SINKS, 0, None)
    assert advice.count() == {"pure Taylor": 1, "hybrid": 2, "softmax": 1}


def test_advice_is_the_cheapest_of_the_good_enough(profile):
    for level in (0.3, 0.1, 0.01):
        for place, choice in profiling.recommend(profile, error=level).choices.items():
            good = [each for each in profile.choices(place) if each.error <= level]
            assert choice.nbytes == min(each.nbytes for each in good)


def test_bytes_are_those_of_states_and_caches(profile):
    cache = TOKENS * (D + DV) * 8
    assert profile.cache_bytes == cache
    advice = profiling.recommend(profile, error=0.1)
    total = advice.settings.nbytes(TOKENS, 1, 4, D, DV, torch.float64)
    assert advice.nbytes == total
    assert advice.cache_bytes == 4 * cache
    assert advice.choices[0, NEEDLE].nbytes == cache


@pytest.mark.parametrize("head", HEADS)
def test_all_choices_but_softmax_take_fewer_bytes_than_the_cache(profile, head):
    *others, last = profile.choices((0, head))
    assert (last.kind, last.nbytes, last.error) == ("softmax", profile.cache_bytes, 0)
    assert len(others) > 8
    assert max(each.nbytes for each in others) < profile.cache_bytes


def test_tokens_that_are_wanted_while_they_are_near_are_kept_as_heavy_ones():
    """As the needle, but 20 of them, and every query wants them from their place on, and more."""
    query, key, value = planted()
    query[NEEDLE, :, 0], key[NEEDLE, 100:120, 0] = 1, 14
    made = Profiler(WINDOWS, 64, None)
    made.see(Observation(0, query, key, value, 1.0, True))
    head = made.result(TOKENS, 1).heads[0, NEEDLE]
    assert head.errors.dropped[64] > 0.9
    assert head.errors.heavy[64][0] < 0.01


def test_queries_of_a_group_share_a_head():
    query, key, value = planted()
    made = Profiler(WINDOWS, 64, None)
    made.see(Observation(0, query[[SINK, LOCAL]], key[[SINK]], value[[SINK]], 1.0, True))
    both = made.result(TOKENS, 1)
    assert list(both.heads) == [(0, 0), (0, 1)]
    assert list(both.shared) == [(0, 0)]
    sinks = [both.heads[0, head].weight.sinks for head in range(2)]
    assert both.shared[0, 0].weight.sinks == pytest.approx(sum(sinks) / 2)
    assert sinks[0] > 0.99 > sinks[1]


def test_a_head_of_small_outputs_counts_as_much_in_its_group():
    """One wants the needle, whose value is large; one finds the others alike, whose values are too."""
    query, key, value = planted()
    query = torch.stack([query[NEEDLE], torch.full_like(query[NEEDLE], -0.5)])
    value = torch.where(torch.arange(TOKENS)[:, None] == 100, 100, 1 + value[NEEDLE] / 2)[None]
    made = Profiler(WINDOWS, 64, None)
    made.see(Observation(0, query, key[[NEEDLE]], value, 1.0, True))
    found = made.result(TOKENS, 1)
    needle, other = (found.heads[0, head].errors.dropped[64] for head in range(2))
    assert needle > 0.9 > 0.2 > other
    assert found.shared[0, 0].errors.dropped[64] == pytest.approx(math.hypot(needle, other) / math.sqrt(2))


def test_an_encoder_is_advised_pure_polynomials_or_softmax():
    made = Profiler(WINDOWS, 64, None)
    made.see(Observation(0, *planted(), 1.0, False))
    found = made.result(TOKENS, 1)
    kept = {choice.settings for place in found.shared for choice in found.choices(place)}
    assert {(each.window, each.sinks, each.reading) for each in kept} == {(0, 0, "taylor"), (None, 0, "taylor")}
    assert profiling.recommend(found).choices[0, EVEN].kind == "pure Taylor"


# ---- budgets ---------------------------------------------------------------------------------------------------------


def choices_of(*pairs: tuple[int, float]) -> list[Choice]:
    return [Choice(HeadSettings(window=nbytes), nbytes, error) for nbytes, error in pairs]


def test_the_hull_leaves_out_what_a_mixture_beats():
    given = choices_of((1, 1.0), (2, 0.98), (2, 0.9), (3, 0.5), (4, 0.6), (5, 0.0))
    assert [(each.nbytes, each.error) for each in hull(given)] == [(1, 1.0), (3, 0.5), (5, 0.0)]


def test_a_budget_is_spent_where_it_takes_off_most(profile):
    """On hulls alone, where every sum of bytes that steps reach is the best for its bytes."""
    paths = {place: hull(profile.choices(place)) for place in profile.shared}
    every = list(itertools.product(*paths.values()))
    for budget in (0.1, 0.3, 0.5, 0.8, 1.0):
        advice = profiling.recommend_within(profile, budget)
        assert advice.nbytes <= budget * advice.cache_bytes
        found = sum(choice.error**2 for choice in advice.choices.values())
        rivals = [each for each in every if sum(choice.nbytes for choice in each) <= advice.nbytes]
        assert found == pytest.approx(min(sum(choice.error**2 for choice in each) for each in rivals))


def test_the_whole_cache_is_softmax_where_nothing_else_is_exact(profile):
    advice = profiling.recommend_within(profile, 1.0)
    assert advice.choices[0, NEEDLE].kind == "softmax"
    assert advice.choices[0, NEEDLE].error == 0


WRONG = {
    "budget": [0, -1, 1.5, math.nan, "half", True],
    "error": [0, -1, math.inf, math.nan, "small"],
}


@pytest.mark.parametrize(("name", "wrong"), [(name, each) for name, some in WRONG.items() for each in some])
def test_wrong_arguments_are_named(profile, name, wrong):
    with pytest.raises(ArgumentError, match=f"^{name}: expected "):
        profiling.recommend_within(profile, wrong) if name == "budget" else profiling.recommend(profile, error=wrong)


def test_a_budget_below_the_cheapest_is_refused_with_the_least_one(profile):
    with pytest.raises(ArgumentError, match=r"^budget: expected at least 0\.\d+, the share that the cheapest"):
        profiling.recommend_within(profile, 1e-6)
