"""Sizes against the arithmetic of the paper, done here by hand."""

from __future__ import annotations

import pytest

from taylor_attention.bench.evidence import sizes
from taylor_attention.bench.evidence.experiment import Finding


def findings(quick: bool = True) -> list[Finding]:
    return [Finding(case, sizes.measure(case, 0), 0.0) for case in sizes.plan(quick)]


def test_one_head_is_as_counted_by_hand() -> None:
    found = sizes.measure({"head_dim": 16, "degree": 3}, 0)
    assert (found["monomials"], found["unpacked"]) == (969, 1 + 16 + 256 + 4096)
    assert (found["term"], found["term_unpacked"]) == (816, 4096)
    assert (found["elements"], found["even_memory"]) == (969 * 17, 515)
    assert found["flops"] == 969 * (4 * 16 + 2) + 2 * (1 * 1 + 2 * 16 + 3 * 136 + 4 * 816)  # p + 1 for each monomial
    assert found["even_flops"] == -(-71_364 // (4 * 16 + 3))
    assert found["even_flops_paper"] == -(-71_364 // (6 * 16))


def test_a_layer_has_as_many_heads_as_fit() -> None:
    found = sizes.measure({"head_dim": 24, "degree": 2}, 0)
    assert found["layer_elements"]["1024"] == 42 * 325 * 25
    assert found["layer_flops"]["1024"] == 42 * found["flops"]


def test_the_whole_plan_is_shown() -> None:
    whole = findings(quick=False)
    assert len(whole) == 64
    assert [len(table.rows) for table in sizes.tables(whole)] == [12, 12]
    assert [each.name for each in sizes.pictures(whole)] == ["sizes", "sizes-packing", "sizes-layers"]
    told = sizes.conclusions(whole)
    assert told == sizes.conclusions(findings())
    assert "93 tokens at d = 8, 515 tokens at d = 16, 3,375 tokens at d = 32, 24,327 tokens at d = 64" in told[0]
    assert "262 times less state" in told[3]  # (65 * 47,905 / 64) / (9 * 165 / 8)


@pytest.mark.parametrize("some", [[], findings()[:1], findings()[-1:]], ids=["none", "first", "last"])
def test_partial_findings_are_shown(some: list[Finding]) -> None:
    assert [len(table.rows) for table in sizes.tables(some)] == [len(some)] * 2
    assert 2 <= len(sizes.pictures(some)) <= 3
    assert isinstance(sizes.conclusions(some), list)
