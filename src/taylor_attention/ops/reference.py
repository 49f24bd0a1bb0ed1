"""The specification: quadratic, float64, one step per line. Slow on purpose; every other path is tested against it.

For query i and key j with scaled score s_ij = scale * q_i . k_j:

    w_ij = exp(sum of log decay over j < t <= i) * f(s_ij)   for visible keys, j <= i if causal
    y_i  = sum_j w_ij v_j / sum_j w_ij                        zeros where no key is visible

f is a truncated series (Taylor attention) or exp itself (softmax attention).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core.series import EXP, Series


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    degree: int,
    causal: bool = True,
    scale: float | None = None,
    series: Series | None = None,
    key_padding_mask: Tensor | None = None,
    log_decay: Tensor | None = None,
) -> Tensor:
    """Taylor attention by its definition: [B, Hq, Tq, d], [B, Hkv, Tk, d], [B, Hkv, Tk, dv] -> [B, Hq, Tq, dv]."""
    coefficients = (series or EXP).coefficients(degree)
    return _attend(
        query, key, value, lambda s, _: _truncated(s, coefficients), causal, scale, key_padding_mask, log_decay
    )


def softmax_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    log_decay: Tensor | None = None,
) -> Tensor:
    """Exact softmax attention with the same arguments, for comparison."""
    return _attend(query, key, value, _stable_exp, causal, scale, key_padding_mask, log_decay)


def _truncated(scores: Tensor, coefficients: Sequence[float]) -> Tensor:
    return sum((c * scores**p for p, c in enumerate(coefficients)), torch.zeros_like(scores))


def _stable_exp(scores: Tensor, shown: Tensor) -> Tensor:
    if scores.shape[-1] == 0:
        return scores
    top = torch.where(shown, scores, -torch.inf).amax(-1, keepdim=True)
    return torch.where(shown, scores - top, -torch.inf).exp()  # a factor per query, which the division removes


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    function: Callable[[Tensor, Tensor], Tensor],
    causal: bool,
    scale: float | None,
    visible: Tensor | None,
    log_decay: Tensor | None,
) -> Tensor:
    q, k, v = query.double(), key.double(), value.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)  # clarity, not speed
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shown = torch.ones(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if causal:
        shown = shown.tril()
    if visible is not None:
        shown = shown & visible[:, None, None, :]
    weights = function(scale * (q @ k.transpose(-1, -2)), shown)  # [B, Hq, Tq, Tk]
    if log_decay is not None:
        decay = log_decay.double().repeat_interleave(group, 1)
        decay = (
            decay if visible is None else decay.masked_fill(~visible[:, None], 0)
        )  # hidden tokens do not fade others
        later = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(-1)  # [t, j]: j < t
        weights = weights * torch.where(later, decay[..., :, None], 0).cumsum(-2).exp()  # exact for -inf too
    weights = torch.where(shown, weights, 0)
    normaliser = weights.sum(-1, keepdim=True)
    empty = ~shown.any(-1, keepdim=True)
    return (weights @ v) / torch.where(empty, 1, normaliser)
