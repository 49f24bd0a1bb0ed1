"""Rotary positions: scores depend on distances only, however far the positions have grown."""

from __future__ import annotations

import math

import pytest
import torch

from taylor_attention.nn.rotary import positions, rotate, rotation


@pytest.mark.parametrize("start", [0, 1_000, 10**9])
def test_scores_depend_on_distances_only(start: int):
    query, key = torch.randn(2, 3, 1, 8).double(), torch.randn(2, 3, 5, 8).double()

    def score(shift: int) -> torch.Tensor:
        at_query = rotation(torch.tensor([[shift + 7]]), 8, 10000.0, torch.float64)
        at_key = rotation(
            torch.tensor([[shift, shift + 1, shift + 2, shift + 5, shift + 7]]), 8, 10000.0, torch.float64
        )
        return rotate(query, *at_query) @ rotate(key, *at_key).mT

    torch.testing.assert_close(score(start), score(0), rtol=0, atol=1e-14 * max(1, start))
    torch.testing.assert_close(
        score(start)[..., 4], (query * key[:, :, 4:]).sum(-1), rtol=0, atol=1e-14 * max(1, start)
    )


def test_angles_are_exact_at_a_billion_tokens():
    cosines, sines = rotation(torch.tensor([[10**9]]), 4, 100.0, torch.float32)
    for index, frequency in enumerate((1.0, 0.1)):
        angle = math.fmod(10**9 * frequency, 2 * math.pi)
        assert cosines[0, 0, 0, index].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert sines[0, 0, 0, 2 + index].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_norms_are_kept_and_the_base_sets_the_wavelengths():
    x = torch.randn(1, 1, 6, 8).double()
    turned = rotate(x, *rotation(torch.arange(6)[None], 8, 50.0, torch.float64))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    last = torch.stack([x[0, 0, 5, 3], x[0, 0, 5, 7]])  # the slowest pair of position 5: angle 5 * 50^(-6/8)
    angle = 5 * 50.0**-0.75
    expected = last[0] * math.cos(angle) - last[1] * math.sin(angle)
    torch.testing.assert_close(turned[0, 0, 5, 3], expected)


def test_padding_takes_no_position():
    mask = torch.tensor([[False, False, True, True], [True, True, True, False]])
    tokens = torch.tensor([10, 20])
    at = positions(4, tokens, mask, tokens.device)
    assert at[mask].tolist() == [10, 11, 20, 21, 22]
    assert positions(3, None, None, tokens.device).tolist() == [[0, 1, 2]]
    assert positions(2, tokens, None, tokens.device).tolist() == [[10, 11], [20, 21]]
