"""Reconstruction: rows by the definition are those of the specification, and the library's are the same."""

from __future__ import annotations

import pytest
import torch

import taylor_attention as ta
from taylor_attention.bench.evidence import reconstruction
from taylor_attention.bench.evidence.experiment import Finding
from taylor_attention.bench.evidence.reconstruction_rows import attend_rows
from taylor_attention.ops.reference import attention_reference, softmax_reference

CASES = [{"head_dim": head_dim, "degree": degree, "tokens": 400} for head_dim in (8, 16) for degree in (2, 3)]
ROWS = torch.tensor([0, 1, 5, 17, 40, 63])


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    torch.manual_seed(0)
    return [Finding(case, reconstruction.measure(case, 0), 0.0) for case in CASES]


@pytest.mark.parametrize("degree", [2, 3])
def test_rows_are_those_of_the_specification(degree: int) -> None:
    query, key, value = torch.randn(3, 2, 64, 8, dtype=torch.float64)
    found = attend_rows(query, key, value, ROWS, degree)
    inputs = (query[None], key[None], value[None])
    fit = {"series": ta.series.fitted_gaussian(0.0, 1.0, degree)}
    expected = {
        "taylor": attention_reference(*inputs, degree=degree),
        "fitted": attention_reference(*inputs, degree=degree, reading="fitted"),
        "gaussian": attention_reference(*inputs, degree=degree, **fit),
    }
    torch.testing.assert_close(found.softmax, softmax_reference(*inputs)[0, :, ROWS])
    for name, y in expected.items():
        torch.testing.assert_close(found.outputs[name], y[0, :, ROWS])


def test_cosh_is_compared_with_cosh() -> None:
    """Of degree 40 the series is the function."""
    query, key, value = torch.randn(3, 1, 64, 8, dtype=torch.float64)
    series = attention_reference(query[None], key[None], value[None], degree=40, series=ta.series.COSH)
    found = attend_rows(query, key, value, ROWS, 2)
    torch.testing.assert_close(found.cosh, series[0, :, ROWS])
    assert found.exact_of("cosh") is found.cosh
    assert found.exact_of("fitted") is found.softmax


def test_a_case_is_what_it_says(findings: list[Finding]) -> None:
    for each in findings:
        own = each.values
        assert sum(own["histogram"]) == 160 * 64  # rows that are evenly spaced, of heads x d elements
        assert own["library"]["rounding"][1] < 2e-5
        assert own["library"]["tokens"] == 400
        contexts = [one["context"] for one in own["positions"]]
        assert contexts == sorted(contexts)
        assert contexts[0] == 1
        assert own["errors"]["fitted"]["relative"][1] < own["errors"]["taylor"]["relative"][1]
    by_degree = [each.values["errors"]["taylor"]["absolute"] for each in findings]
    assert by_degree[1] < by_degree[0] and by_degree[3] < by_degree[2]


def test_the_same_seed_gives_the_same_and_another_does_not(findings: list[Finding]) -> None:
    again, other = (reconstruction.measure(CASES[0], seed)["histogram"] for seed in (0, 1))
    assert again == findings[0].values["histogram"] != other


@pytest.mark.parametrize(
    ("head_dim", "degree", "share"),
    [(8, 5, (8, 102_400)), (32, 5, (1, 29_100)), (64, 3, (1, 102_400)), (64, 4, (0, 0)), (64, 5, (0, 0))],
    ids=str,
)
def test_work_is_bounded(head_dim: int, degree: int, share: tuple[int, int]) -> None:
    heads, tokens = reconstruction._share(64 // head_dim, reconstruction.TOKENS, head_dim, degree)
    assert (heads, tokens) == (share[0], pytest.approx(share[1], rel=0.03))


def test_conclusions_carry_the_numbers(findings: list[Finding]) -> None:
    told = reconstruction.conclusions(findings)
    assert "(paper: about -2.75) at P = 3" in told[0]
    assert "-3.00) at P = 4" in told[0]
    relative = [each.values["errors"]["taylor"]["relative"][1] for each in findings if each.case["degree"] == 3]
    assert f"{min(relative):.0%}" in told[1] and f"{max(relative):.0%}" in told[1]


def test_what_other_readings_gain_is_told(findings: list[Finding]) -> None:
    errors = {"taylor": 0.6, "fitted": 0.2, "gaussian": 0.3, "chebyshev": 0.9, "cosh": 0.1}
    own = findings[0].values | {
        "errors": {name: {"absolute": 0.1, "relative": [0.0, error, 1.0]} for name, error in errors.items()}
    }
    made = [Finding(findings[0].case, own, 0.0)]
    told = reconstruction.conclusions(made)[1]
    assert "err 3 to 3 times less than" in told
    assert "one fit to N(0, 1) for all 2 to 2 times less" in told
    assert reconstruction.tables(made)[1].rows == (("8, 2", "60.0%", "30.0%", "90.0%", "20.0%", "10.0%"),)


def test_what_did_not_run_is_said(findings: list[Finding]) -> None:
    own = dict(findings[0].values)
    own["library"] = {"state_bytes": 12_345_678, "elements": 1, "heads": 0, "tokens": 0}
    left = [Finding(findings[0].case, own, 0.0)]
    assert "was not run through a state: that has 12,345,678 bytes" in reconstruction.conclusions(left)[-1]
    assert reconstruction.tables(left)[2].rows[0][2:] == ("-",) * 5


@pytest.mark.parametrize("count", [0, 1, 3])
def test_partial_findings_are_shown(findings: list[Finding], count: int) -> None:
    some = findings[:count]
    assert [len(table.rows) for table in reconstruction.tables(some)] == [count] * 3
    assert len(reconstruction.pictures(some)) == (3 if count else 0)
    assert bool(reconstruction.conclusions(some)) is (count > 0)
