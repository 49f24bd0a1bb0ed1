"""What is timed has been compared with the specification, in rows that stand for the whole."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from taylor_attention.bench.agreement import (
    DisagreementError,
    reference_rows,
    relative_difference,
    require_agreement,
    sample_rows,
)
from taylor_attention.ops.reference import attention_reference, softmax_reference

REFERENCES = {
    "taylor": partial(attention_reference, degree=2),
    "window": partial(attention_reference, degree=2, window=7),
    "softmax": softmax_reference,
}


@pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES.keys())
def test_rows_are_those_of_the_whole_result(reference):
    inputs = torch.randn(3, 1, 2, 40, 4).unbind(0)
    rows = sample_rows(40)
    whole = reference(*inputs, causal=True)
    torch.testing.assert_close(reference_rows(*inputs, rows, reference), whole[:, :, rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("length", "rows"), [(1, [0]), (3, [0, 1, 2]), (8, list(range(8))), (80, list(range(9, 80, 10)))]
)
def test_rows_are_spread_and_end_with_the_last(length: int, rows: list[int]):
    assert sample_rows(length) == rows


def test_the_largest_difference_counts():
    ones = torch.ones(4, dtype=torch.float64)
    assert relative_difference(ones * 1.25, ones) == 0.25
    assert require_agreement("a", [ones, ones * 1.25], [ones, ones], 0.5) == 0.25


@pytest.mark.parametrize("got", [torch.ones(4) * 1.01, torch.full((4,), torch.nan), torch.ones(3)])
def test_what_is_wrong_is_refused_by_name(got: torch.Tensor):
    with pytest.raises(DisagreementError, match=r"^mine: expected a re"):
        require_agreement("mine", [got], [torch.ones(4, dtype=torch.float64)], 1e-3)
