"""Capacity of a head: the kernel is the operator's, the contrast what is known, the law what made the points."""

from __future__ import annotations

import math
from math import comb
from typing import Any

import pytest
import torch

import taylor_attention as ta
from taylor_attention.bench.evidence import capacity
from taylor_attention.bench.evidence.capacity import EXPERIMENT, contrast, crossing, kernel, measure, plan, recall
from taylor_attention.bench.evidence.capacity_law import best, fit
from taylor_attention.bench.evidence.experiment import Finding
from taylor_attention.bench.evidence.run import measure as run_case


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_weights_are_those_of_the_operator(degree: int) -> None:
    query, key = torch.nn.functional.normalize(torch.randn(2, 1, 1, 20, 4, dtype=torch.float64), dim=-1)
    value = torch.randn(1, 1, 20, 3, dtype=torch.float64)
    weights = kernel(0.9 * query @ key.mT, degree, 0.9)
    y = weights @ value / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(ta.attention(query, key, value, degree=degree, causal=False, scale=0.9), y)


def test_softmax_is_exp_up_to_a_factor() -> None:
    scores = torch.randn(3, 7, dtype=torch.float64)
    weights = kernel(scores, None, 2.0)
    torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), scores.softmax(-1))


@pytest.mark.parametrize("head_dim", [2, 4, 16])
@pytest.mark.parametrize("peak", [0.5, 8.0])
def test_contrast_by_moments_of_the_cosine(head_dim: int, peak: float) -> None:
    """E[c^2] = 1/d and E[c^4] = 3/(d (d + 2)) on the sphere."""
    second, fourth = 1 / head_dim, 3 / (head_dim * (head_dim + 2))
    assert contrast(head_dim, 0, peak) == pytest.approx(1)
    assert contrast(head_dim, 1, peak) == pytest.approx((1 + peak) ** 2 / (1 + peak**2 * second))
    squares = 1 + 2 * peak**2 * second + peak**4 * fourth / 4
    assert contrast(head_dim, 2, peak) == pytest.approx((1 + peak + peak**2 / 2) ** 2 / squares)


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("peak", [1.0, 4.0, 16.0])
def test_no_contrast_is_above_the_number_of_polynomials_on_the_sphere(degree: int, peak: float) -> None:
    polynomials = comb(8 + degree - 1, degree) + comb(8 + degree - 2, degree - 1)
    assert 1 < contrast(8, degree, peak) <= polynomials * (1 + 1e-9)
    assert polynomials <= comb(8 + degree, degree)


def test_one_pair_is_always_found_and_too_many_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    assert recall(generator, 1, head_dim=4, degree=2, peak=2.0) == 1
    assert recall(generator, 2000, head_dim=4, degree=2, peak=2.0) < 0.2
    assert recall(generator, 2000, head_dim=16, degree=None, peak=16.0) > 0.9


def test_where_the_normaliser_is_not_positive_nothing_is_recalled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "kernel", lambda scores, degree, peak: -torch.ones_like(scores))
    assert recall(torch.Generator().manual_seed(0), 1, head_dim=4, degree=1, peak=2.0) == 0


def test_capacity_grows_with_degree_and_head_size() -> None:
    found = [
        measure({"head_dim": head_dim, "degree": degree, "peak": 8.0}, 0)
        for head_dim, degree in ((4, 2), (8, 2), (8, 4))
    ]
    capacities = [each["capacity"]["0.5"] for each in found]
    assert capacities == sorted(capacities)
    assert capacities[2] > 2 * capacities[1] > 4 * capacities[0] / 2
    assert [each["monomials"] for each in found] == [15, 45, 495]
    assert all(each["capacity"]["0.95"] < each["capacity"]["0.5"] for each in found)


@pytest.mark.parametrize(
    ("accuracies", "level", "expected"),
    [
        ([1.0, 0.9, 0.1], 0.5, math.sqrt(8 * 4)),  # halfway between 4 and 8
        ([1.0, 0.9, 0.1], 0.9, 4.0),
        ([1.0, 0.9, 0.8], 0.5, None),
        ([0.4, 0.3, 0.2], 0.5, 2.0),
    ],
)
def test_crossing(accuracies: list[float], level: float, expected: float | None) -> None:
    found = crossing([2, 4, 8], accuracies, level)
    assert found == (expected if expected is None else pytest.approx(expected))


def test_a_power_law_is_found_again() -> None:
    law = fit([(x, 3 * x**0.7) for x in (1.0, 10.0, 50.0)])
    assert law == (pytest.approx(3), pytest.approx(0.7), pytest.approx(1))
    assert fit([(1.0, 2.0), (1.0, 3.0), (2.0, 3.0)]) is None


def make(head_dim: int, degree: int | None, peak: float, capacity: float | None, size: int | None) -> Finding:
    values: dict[str, Any] = {"monomials": size, "capacity": {"0.95": capacity, "0.5": capacity}, "contrast": peak}
    return Finding({"head_dim": head_dim, "degree": degree, "peak": peak}, values, 0.1)


LAW = [make(d, 2, peak, 2 * comb(d + 2, 2) / peak, comb(d + 2, 2)) for d in (4, 8, 16) for peak in (1.0, 4.0)]


def test_the_best_scale_counts() -> None:
    assert [each.case["peak"] for each in best(LAW, 0.5)] == [1.0, 1.0, 1.0]
    more = [*LAW, make(4, 2, 9.0, None, 15)]  # more than were tried
    assert best(more, 0.5)[0].case["peak"] == 9.0


def test_the_law_is_told() -> None:
    told = EXPERIMENT.conclusions([*LAW, make(8, None, 16.0, None, None)])
    assert "n = 2 M^1.00 (M monomials; R² 1.000 over 3 sizes and degrees)" in told[0]
    assert told[-1] == "Softmax, with a cache of all pairs, tells apart more than were tried at d = 8."


@pytest.mark.parametrize("findings", [[], LAW[:1], LAW, [make(8, None, 16.0, None, None)]])
def test_partial_findings_are_told_and_drawn(findings: list[Finding]) -> None:
    capacities, _ = EXPERIMENT.tables(findings)
    assert len(capacities.rows) == len(best(findings, 0.5))
    assert [each.name for each in EXPERIMENT.pictures(findings)] == ["capacity"]
    assert len(EXPERIMENT.conclusions(findings)) <= 4


def test_the_plan_is_run_by_its_name() -> None:
    case = plan(True)[0]
    assert run_case(("capacity", case, 0)).values == run_case(("capacity", case, 0)).values
    assert all(
        comb(each["head_dim"] + each["degree"], each["degree"]) <= 10**5 for each in plan(False) if each["degree"]
    )
