"""Decay: never positive, starting at a spread of half-lives, silent at padding."""

from __future__ import annotations

import math

import pytest
import torch

from taylor_attention.nn.decay import LONGEST_HALF_LIFE, SHORTEST_HALF_LIFE, Decay


def test_half_lives_are_spread_over_the_heads():
    log_decay = Decay(4, 9, per_token=False).double()(torch.zeros(1, 1, 4).double())[0, :, 0]
    half_lives = math.log(0.5) / log_decay
    assert half_lives[0].item() == pytest.approx(LONGEST_HALF_LIFE, rel=1e-5)
    assert half_lives[-1].item() == pytest.approx(SHORTEST_HALF_LIFE, rel=1e-5)
    torch.testing.assert_close(half_lives[1:] / half_lives[:-1], torch.full((8,), 0.5).double(), rtol=1e-5, atol=0)


def test_a_lone_head_forgets_slowest():
    log_decay = Decay(4, 1, per_token=False)(torch.zeros(1, 1, 4))
    assert (math.log(0.5) / log_decay).item() == pytest.approx(LONGEST_HALF_LIFE, rel=1e-4)


@pytest.mark.parametrize("per_token", [False, True])
def test_never_positive_and_zero_at_padding(per_token: bool):
    decay = Decay(4, 3, per_token=per_token)
    with torch.no_grad():
        decay.bias.copy_(torch.tensor([-200.0, 0.0, 200.0]))
    mask = torch.tensor([[True, False, True]])
    log_decay = decay(torch.randn(1, 3, 4), mask)
    assert log_decay.shape == (1, 3, 3)
    assert bool((log_decay <= 0).all())
    assert bool((log_decay[:, :2, 0] < 0).all())
    assert torch.equal(log_decay[:, :, 1], torch.zeros(1, 3))


def test_only_the_gate_looks_at_the_input():
    x = torch.randn(1, 5, 4)
    constant, gated = Decay(4, 2, per_token=False)(x), Decay(4, 2, per_token=True)(x)
    assert torch.equal(constant, constant[:, :, :1].expand(-1, -1, 5))
    assert not torch.allclose(gated, gated[:, :, :1].expand(-1, -1, 5))
