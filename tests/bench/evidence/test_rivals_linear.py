"""Linear rivals: the forms over all tokens against their recurrences, token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import elu

from taylor_attention.bench.evidence.rivals_linear import attend_delta, attend_elu


def draw(length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key [2, 3, T, 4], value [2, 3, T, 5], rate [2, 3, T] in float64."""
    query, key = torch.randn(2, 2, 3, length, 4, dtype=torch.float64)
    value = torch.randn(2, 3, length, 5, dtype=torch.float64)
    return query, key, value, torch.rand(2, 3, length, dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 2, 17])
def test_elu_is_its_recurrence(length: int) -> None:
    query, key, value, _ = draw(length)
    state, normaliser = torch.zeros(2, 3, 4, 5, dtype=torch.float64), torch.zeros(2, 3, 4, dtype=torch.float64)
    expected = torch.empty_like(value)
    for t in range(length):
        k, q = elu(key[:, :, t]) + 1, elu(query[:, :, t]) + 1
        state = state + k[..., None] * value[:, :, t, None]
        normaliser = normaliser + k
        expected[:, :, t] = (q[:, :, None] @ state)[:, :, 0] / (q * normaliser).sum(-1, keepdim=True)
    torch.testing.assert_close(attend_elu(query, key, value), expected)


@pytest.mark.parametrize("length", [1, 2, 17])
def test_the_delta_rule_is_its_recurrence(length: int) -> None:
    query, key, value, rate = draw(length)
    state = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    expected = torch.empty_like(value)
    for t in range(length):
        k, q = (x[:, :, t] / x[:, :, t].norm(dim=-1, keepdim=True) for x in (key, query))
        held = (k[:, :, None] @ state)[:, :, 0]  # what the state says of this key
        state = state + rate[:, :, t, None, None] * k[..., None] * (value[:, :, t] - held)[:, :, None]
        expected[:, :, t] = (q[:, :, None] @ state)[:, :, 0]
    torch.testing.assert_close(attend_delta(query, key, value, rate), expected)


def test_the_delta_rule_replaces_what_a_key_had() -> None:
    key = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])[None, None]
    value = torch.arange(8.0).view(1, 1, 4, 2)
    query = key.roll(1, 2)  # the third query asks for the second key, the fourth for the first one, which is new
    y = attend_delta(query, key, value, torch.ones(1, 1, 4))
    torch.testing.assert_close(y[0, 0, 2:], torch.stack([value[0, 0, 1], value[0, 0, 2]]))
