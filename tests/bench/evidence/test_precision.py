"""Terms, 16 bits and counting, against what is known of each."""

from __future__ import annotations

from itertools import combinations
from math import factorial, prod

import pytest
import torch

import taylor_attention as ta
from taylor_attention.bench.evidence import precision
from taylor_attention.bench.evidence.experiment import Finding
from taylor_attention.ops.reference import attention_reference


def test_a_term_is_as_large_as_normal_queries_and_keys_make_it() -> None:
    """E (q . k)^2p = (2p - 1)!! d (d + 2) ... (d + 2p - 2)."""
    found = precision.measure({"what": precision.TERMS, "head_dim": 64}, 0)
    assert found["alpha"][4] == pytest.approx(1 / (24 * 64**2))
    for p in range(5):  # higher powers hang on few pairs
        square = prod(range(1, 2 * p, 2)) * prod((64 + 2 * i) / 64 for i in range(p))
        assert found["term"][p] == pytest.approx(square**0.5 / factorial(p), rel=0.05)


def state_of(key: torch.Tensor, value: torch.Tensor) -> ta.State:
    with ta.watch_normalisers():
        return ta.attention(key, key, value, degree=precision.DEGREE, return_state=True)[1]


def test_sums_are_read_as_the_definition_has_them() -> None:
    query, key, value = torch.randn(3, 1, 2, 40, 5)
    sums = precision.read_sums(query, state_of(key, value))
    expected = attention_reference(query, key, value, degree=precision.DEGREE, causal=False)
    torch.testing.assert_close((sums[..., :-1] / sums[..., -1:]).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "lost"), [(None, False), (torch.float16, True), (torch.bfloat16, False)], ids=["float32", "half", "bf16"]
)
def test_only_float16_overflows(dtype: torch.dtype | None, lost: bool) -> None:
    """70,000 keys of score sqrt(2): the term of power 2 is 70,000, and float16 ends at 65,504."""
    key = torch.ones(1, 1, 70_000, 2)
    sums = precision.read_sums(key[:, :, :1], state_of(key, key), dtype)
    assert bool(sums.isinf().any()) is lost


def test_sixteen_bits_round_and_the_library_does_not_lose_rows() -> None:
    reads = precision.measure({"what": precision.HALVES, "head_dim": 16, "tokens": 2000}, 0)["reads"]
    assert [read["tokens"] for read in reads] == [1000, 2000]
    for read in reads:
        assert 1e-5 < read["float16"]["error"] < 1e-3 < read["bfloat16"]["error"] < 1e-2
        assert read["float16"]["lost"] == read["float16"]["library_lost"] == 0


@pytest.mark.slow
def test_a_float32_counter_stops_and_the_library_counts_on() -> None:
    found = precision.measure({"what": precision.COUNTING}, 0)
    assert found["recurrence"] == 2**24
    assert found["library"] == found["tokens"] == 2**24 + precision.BEYOND
    assert found["twice"] == found["twice_count"] == 2**25
    assert found["twice_mean"] == pytest.approx(0.5, abs=1e-6)


def fabricated() -> list[Finding]:
    read = {"lost": 0.25, "error": None, "library_lost": 0.0}
    reads = [{"tokens": 10**5, "float16": read, "bfloat16": read | {"lost": 0.0, "error": 0.002}}]
    counted = {"tokens": 9, "recurrence": 8, "library": 9, "twice": 16, "twice_count": 16, "twice_mean": 0.5}
    return [
        Finding({"what": precision.TERMS, "head_dim": 8}, precision.measure({"what": "terms", "head_dim": 8}, 0), 0.0),
        Finding({"what": precision.HALVES, "head_dim": 8, "tokens": 10**5}, {"reads": reads}, 0.0),
        Finding({"what": precision.COUNTING}, counted, 0.0),
    ]


def test_findings_are_told_as_they_are() -> None:
    told = precision.conclusions(fabricated())
    assert "0.00065 at d = 8" in told[0]
    assert "some rows are lost at 100,000 tokens; of the library's rows 0%" in told[1]
    assert "counts 8, the library 9" in told[2]
    assert precision.tables(fabricated())[1].rows == (("8, 100,000", "25.0%", "-", "0.0%", "0.20%", "0.0%"),)


@pytest.mark.parametrize("some", [some for n in range(4) for some in combinations(range(3), n)], ids=str)
def test_partial_findings_are_shown(some: tuple[int, ...]) -> None:
    own = [fabricated()[i] for i in some]
    assert len(precision.tables(own)) == len(precision.conclusions(own)) == len(own)
    assert len(precision.pictures(own)) == (0 in some)
