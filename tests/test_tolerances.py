"""The measure of error and the fixtures that other tests lean on."""

import math

import pytest
import torch

from tolerances import TOLERANCE, relative_error


def test_relative_error_is_relative_to_the_expected_value():
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected, expected) == 0
    assert relative_error(expected * 1.01, expected) == pytest.approx(0.01, rel=1e-5)
    assert relative_error(torch.ones(2), torch.zeros(2)) == pytest.approx(math.sqrt(2))


def test_relative_error_passes_no_nan():
    actual = torch.tensor([1.0, math.nan])
    assert not relative_error(actual, torch.ones(2)) <= 1e30


def test_relative_error_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"expected the shape \(2, 2\), got \(2,\)"):
        relative_error(torch.ones(2), torch.ones(2, 2))


def test_tolerances_loosen_with_the_dtype():
    order = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    assert sorted(TOLERANCE, key=lambda dtype: TOLERANCE[dtype]) == order


def test_fresh_buffers_are_poisoned():
    assert torch.empty(3).isnan().all()
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def test_tests_draw_the_same_numbers():
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=generator))
