"""Softmax attention over SDPA against the formula written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from taylor_attention.nn.softmax import softmax_attention
from tolerances import TOLERANCE, relative_error

SCALE = 0.37


def write_out(
    query: Tensor, key: Tensor, value: Tensor, sums: Tensor | None, mask: Tensor | None, causal: bool
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * SCALE  # [B, Hq, n, S]
    n, s = scores.shape[-2:]
    if sums is not None:
        own = sums.repeat_interleave(groups, 1)
        scores = scores + own[:, :, s - n :, None] - own[:, :, None]
    seen = torch.ones(n, s, dtype=torch.bool).tril(s - n if causal else s)[None, None]
    seen = seen if mask is None else seen & mask[:, None, None]
    weights = scores.exp() * seen
    total = weights.sum(-1, keepdim=True)
    return weights @ value / torch.where(total == 0, 1, total)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("decayed", [False, True])
@pytest.mark.parametrize("widths", [(4, 4), (4, 7), (6, 3)])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (1, 9), (4, 9), (1, 1)])
def test_is_the_formula(queries: int, keys: int, widths: tuple[int, int], decayed: bool, masked: bool, causal: bool):
    query = torch.randn(2, 6, queries, widths[0], dtype=torch.float64)
    key = torch.randn(2, 3, keys, widths[0], dtype=torch.float64)
    value = torch.randn(2, 3, keys, widths[1], dtype=torch.float64)
    sums = -torch.rand(2, 3, keys, dtype=torch.float64).cumsum(-1) if decayed else None
    mask = torch.ones(2, keys, dtype=torch.bool) if masked else None
    if mask is not None:
        mask[0, : keys // 2 + 1] = False  # for (1, 1): no visible key at all
    y = softmax_attention(query, key, value, scale=SCALE, causal=causal, cumulative_decay=sums, key_padding_mask=mask)
    assert y.dtype == torch.float64
    assert relative_error(y, write_out(query, key, value, sums, mask, causal)) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("queries", [1, 5])
def test_a_long_past_does_not_blur_recent_weights(queries: int):
    """After sums of -1e6 the weights of recent keys are as exact as after none: float32 scores would be off by 0.06."""
    query, key, value = torch.randn(1, 2, queries, 4), torch.randn(1, 2, 20, 4), torch.randn(1, 2, 20, 4)
    sums = -torch.rand(1, 2, 20, dtype=torch.float64).cumsum(-1)
    near = softmax_attention(query, key, value, scale=SCALE, cumulative_decay=sums)
    far = softmax_attention(query, key, value, scale=SCALE, cumulative_decay=sums - 1e6)
    assert relative_error(far, near) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [1, 40])
def test_low_precision_only_rounds_the_ends(queries: int, dtype: torch.dtype):
    query, key, value = (torch.randn(1, 2, n, 4).to(dtype) for n in (queries, 40, 40))
    sums = -torch.rand(1, 2, 40, dtype=torch.float64).cumsum(-1)
    y = softmax_attention(query, key, value, scale=SCALE, cumulative_decay=sums)
    expected = write_out(query.double(), key.double(), value.double(), sums, None, causal=True)
    assert y.dtype == dtype
    assert relative_error(y, expected) < TOLERANCE[dtype]
