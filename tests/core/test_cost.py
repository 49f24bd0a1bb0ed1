import json
from fractions import Fraction
from math import comb, inf, isclose

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taylor_attention.core import cost
from taylor_attention.core.basis import index_rows
from taylor_attention.core.series import COSH, error_bound
from taylor_attention.errors import ArgumentError

DIMS = st.integers(1, 64)
DEGREES = st.integers(0, 8)


def equation_15(head_dim, degree, value_dim):
    terms = degree + 1
    per_monomial = 4 * value_dim + 2 * Fraction(terms * head_dim + 1, head_dim + 1) + 2
    return per_monomial * comb(head_dim + terms - 1, terms - 1)


@pytest.mark.parametrize(
    ("head_dim", "elements", "context"),
    [(8, 1_485, 93), (16, 16_473, 515), (32, 215_985, 3_375), (64, 3_113_825, 24_327)],
)
def test_papers_table_of_four_terms(head_dim, elements, context):
    assert cost.state_size(head_dim, 3) == elements
    assert cost.break_even_context(head_dim, 3) == context


@given(DIMS, DEGREES, DIMS)
def test_flops_are_equation_15_exactly(head_dim, degree, value_dim):
    assert cost.flops_per_token(head_dim, degree, value_dim=value_dim) == equation_15(head_dim, degree, value_dim)


@pytest.mark.parametrize(("head_dim", "degree"), [(1, 0), (1, 4), (5, 1), (4, 3), (3, 5)])
def test_update_counts_the_monomials_of_the_basis(head_dim, degree):
    rows = [len(index_rows(head_dim, p)) for p in range(degree + 1)]
    assert cost.state_size(head_dim, degree, value_dim=6) == 7 * sum(rows)
    expected = 13 * sum(rows) + sum((p + 1) * count for p, count in enumerate(rows))
    assert cost.update_flops(head_dim, degree, value_dim=6) == expected


@given(DIMS, DEGREES, DIMS, st.integers(1, 8), st.integers(1, 8))
def test_grouped_heads_update_once_per_kv_head_and_read_once_per_query_head(
    head_dim, degree, value_dim, kv_heads, group
):
    update = cost.update_flops(head_dim, degree, value_dim=value_dim)
    read = cost.read_flops(head_dim, degree, value_dim=value_dim)
    total = cost.flops_per_token(head_dim, degree, value_dim=value_dim, heads=kv_heads * group, kv_heads=kv_heads)
    assert update + read == equation_15(head_dim, degree, value_dim)
    assert total == kv_heads * update + kv_heads * group * read


NEAR = {"window": 60, "sinks": 4, "heavy": 40}


def test_near_tokens_cost_what_cached_ones_do():
    shape = {"value_dim": 6, "kv_heads": 2}
    near = cost.cache_size(104, 8, **shape)
    assert cost.state_size(8, 2, **shape, **NEAR) == cost.state_size(8, 2, **shape) + near
    assert cost.state_size(8, None, **shape, **NEAR) == near
    shape = {"value_dim": 6, "heads": 4}
    near = cost.cache_flops_per_token(104, 8, **shape)
    assert cost.flops_per_token(8, 2, **shape, **NEAR) == cost.flops_per_token(8, 2, **shape) + near
    assert cost.flops_per_token(8, None, **shape, **NEAR) == near
    assert cost.break_even_context(8, None, **NEAR) == 104
    assert cost.break_even_context(8, None, **NEAR, by="flops") == 104
    assert cost.break_even_context(8, 2, **NEAR) == cost.break_even_context(8, 2) + 104  # 25.3 in whole tokens


def test_a_plan_counts_near_tokens():
    shape = {"heads": 4, "head_dim": 8, "context": 1000, "layers": 3}
    made, plain = cost.plan(degree=2, **shape, **NEAR), cost.plan(degree=2, **shape)
    assert (made.window, made.sinks, made.heavy) == (60, 4, 40)
    assert made.state_elements - plain.state_elements == 3 * 4 * 104 * 16
    assert made.flops_per_token - plain.flops_per_token == plain.cache_flops_per_token * 104 // 1000
    assert cost.plan(degree=None, radius=1.0, **shape, **NEAR).error_bound is None


@pytest.mark.parametrize(
    ("degree", "near", "message"),
    [
        (None, {}, r"degree: expected an int >= 0 \(None: only with a window or sinks\), got None"),
        (2, {"window": -1}, "window: expected an int >= 0, got -1"),
        (2, {"sinks": 1.5}, "sinks: expected an int >= 0, got 1.5"),
        (2, {"window": True}, "window: expected an int >= 0, got True"),
        (2, {"heavy": 3}, "heavy: expected 0 without a window, in which a token shows its weight, got 3"),
    ],
)
def test_what_is_no_choice_of_near_tokens_is_refused(degree, near, message):
    with pytest.raises(ArgumentError, match=message):
        cost.state_size(8, degree, **near)
    with pytest.raises(ArgumentError, match=message):
        cost.flops_per_token(8, degree, **near)


def test_cache_costs_are_the_documented_formulas():
    assert cost.cache_size(100, 8, value_dim=5, kv_heads=2) == 100 * 2 * (8 + 5)
    assert cost.cache_flops_per_token(100, 8, value_dim=5, heads=4) == 100 * 4 * (2 * 8 + 2 * 5 + 3)


@given(DIMS, DEGREES, DIMS, st.integers(1, 4), st.integers(1, 4))
def test_break_even_is_the_smallest_such_context(head_dim, degree, value_dim, kv_heads, group):
    heads = kv_heads * group
    shape = {"value_dim": value_dim, "heads": heads, "kv_heads": kv_heads}
    by_memory = cost.break_even_context(head_dim, degree, **shape)
    by_flops = cost.break_even_context(head_dim, degree, **shape, by="flops")
    state = cost.state_size(head_dim, degree, value_dim=value_dim, kv_heads=kv_heads)
    flops = cost.flops_per_token(head_dim, degree, **shape)

    def cached(context):
        return cost.cache_size(context, head_dim, value_dim=value_dim, kv_heads=kv_heads)

    def spent(context):
        return cost.cache_flops_per_token(context, head_dim, value_dim=value_dim, heads=heads)

    assert cached(by_memory - 1) < state <= cached(by_memory)
    assert spent(by_flops - 1) < flops <= spent(by_flops)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "context"),
    [
        ("float32", None, 93),
        ("float32", "bfloat16", 186),
        (torch.float64, torch.float32, 186),
        ("bfloat16", "half", 93),
    ],
)
def test_break_even_compares_bytes(dtype, cache_dtype, context):
    assert cost.break_even_context(8, 3, dtype=dtype, cache_dtype=cache_dtype) == context


def test_grouping_leaves_the_memory_break_even_and_lowers_the_flops_one():
    grouped = {"heads": 8, "kv_heads": 2}
    assert cost.break_even_context(16, 3, **grouped) == cost.break_even_context(16, 3, heads=8)
    assert cost.break_even_context(16, 3, **grouped, by="flops") < cost.break_even_context(16, 3, heads=8, by="flops")


def test_plan_of_a_model_adds_up():
    plan = cost.plan(
        layers=4,
        heads=8,
        kv_heads=2,
        head_dim=16,
        value_dim=12,
        degree=2,
        context=1000,
        cache_dtype=torch.bfloat16,
        radius=1.5,
    )
    monomials = comb(18, 2)
    flops = 10 * cost.update_flops(16, 2, value_dim=12)  # 2 updates and 8 reads, which cost the same
    assert plan == cost.Plan(
        layers=4,
        heads=8,
        kv_heads=2,
        head_dim=16,
        value_dim=12,
        degree=2,
        window=0,
        sinks=0,
        heavy=0,
        context=1000,
        dtype="float32",
        cache_dtype="bfloat16",
        radius=1.5,
        state_elements_per_layer=2 * 13 * monomials,
        state_elements=4 * 2 * 13 * monomials,
        state_bytes_per_layer=4 * 2 * 13 * monomials,
        state_bytes=4 * 4 * 2 * 13 * monomials,
        cache_bytes_per_layer=2 * 1000 * 2 * 28,
        cache_bytes=4 * 2 * 1000 * 2 * 28,
        flops_per_token=4 * flops,
        cache_flops_per_token=4 * 8 * 1000 * 59,
        break_even_memory=143,  # 4 * 13 * 153 / (2 * 28), rounded up
        break_even_flops=-(-flops // (8 * 59)),
        error_bound=error_bound(1.5, 2),
    )


def test_plan_defaults_to_one_ungrouped_layer_without_an_error_bound():
    plan = cost.plan(heads=3, head_dim=8, degree=3, context=93)
    assert (plan.layers, plan.kv_heads, plan.value_dim, plan.cache_dtype) == (1, 3, 8, "float32")
    assert (plan.radius, plan.error_bound) == (None, None)
    assert plan.cache_bytes == 93 * 3 * 16 * 4


def test_plan_uses_the_series_that_it_is_given():
    plan = cost.plan(heads=1, head_dim=8, degree=2, context=1, radius=1.0, series=COSH)
    assert plan.error_bound == error_bound(1.0, 2, COSH) < error_bound(1.0, 2)


def test_plan_becomes_strict_json():
    plan = cost.plan(heads=2, head_dim=8, degree=3, context=10, radius=1.0)
    loaded = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert cost.Plan(**loaded) == plan


def test_unbounded_error_is_null_in_json():
    plan = cost.plan(heads=2, head_dim=8, degree=3, context=10, radius=1e6)
    assert plan.error_bound == inf
    assert plan.to_dict()["error_bound"] is None
    assert plan.to_dict()["radius"] == 1e6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cost.state_size(0, 3), "head_dim: expected an int >= 1, got 0"),
        (lambda: cost.state_size(8, 2.5), "degree: expected an int >= 0, got 2.5"),
        (lambda: cost.state_size(8, True), "degree: expected an int >= 0, got True"),
        (lambda: cost.state_size(8, 3, value_dim=0), "value_dim: expected an int >= 1, got 0"),
        (lambda: cost.state_size(8, 3, kv_heads=-1), "kv_heads: expected an int >= 1, got -1"),
        (lambda: cost.update_flops(8, -1), "degree: expected an int >= 0, got -1"),
        (lambda: cost.flops_per_token(8, 3, heads=0), "heads: expected an int >= 1, got 0"),
        (lambda: cost.flops_per_token(8, 3, heads=6, kv_heads=4), "kv_heads: expected a divisor of heads = 6, got 4"),
        (lambda: cost.cache_size(-1, 8), "context: expected an int >= 0, got -1"),
        (lambda: cost.cache_size(1, "8"), "head_dim: expected an int >= 1, got '8'"),
        (lambda: cost.cache_flops_per_token(1, 8, heads=0), "heads: expected an int >= 1, got 0"),
        (lambda: cost.break_even_context(8, 3, by="time"), "by: expected 'memory' or 'flops', got 'time'"),
        (lambda: cost.break_even_context(8, 3, dtype="flaot32"), "dtype: expected a floating-point dtype"),
        (lambda: cost.break_even_context(8, 3, dtype=torch.int64), "dtype: expected a floating-point dtype"),
        (lambda: cost.plan(heads=1, head_dim=8, degree=3, context=1, layers=0), "layers: expected an int >= 1, got 0"),
        (
            lambda: cost.plan(heads=1, head_dim=8, degree=3, context=1, radius=-1),
            "radius: expected a finite number >= 0",
        ),
    ],
)
def test_misuse_names_the_argument(call, message):
    with pytest.raises(ArgumentError) as caught:
        call()
    assert str(caught.value).startswith(message)


@given(st.integers(1, 32), st.integers(0, 5))
def test_one_more_degree_costs_more(head_dim, degree):
    assert cost.state_size(head_dim, degree) < cost.state_size(head_dim, degree + 1)
    assert cost.flops_per_token(head_dim, degree) < cost.flops_per_token(head_dim, degree + 1)


def test_sizes_stay_exact_where_floats_do_not():
    size = cost.state_size(512, 12)
    assert size == 513 * comb(524, 12) > 2**53
    assert isclose(size, float(size)) and int(float(size)) != size
