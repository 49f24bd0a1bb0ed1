"""The specification: quadratic, float64, one step per line. Slow on purpose; every other path is tested against it.

For query i and key j with scaled score s_ij = scale * q_i . k_j:

    e_ij = exp(s_ij)   if j is one of the last `window` visible keys up to i, or of the first `sinks` of all
           f(s_ij)     else: a truncated series, or nothing at all
    w_ij = e_ij * exp(sum of log decay over j < t <= i)       for visible keys, j <= i if causal
    y_i  = sum_j w_ij v_j / sum_j w_ij                        zeros where no key has weight

Without window and sinks this is Taylor attention; with a window over all keys, softmax attention. A hidden token has no
place in a window, and with a window or sinks none as a query either: its row is zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.series import EXP, Series
from .problem import FULL_RESET


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    degree: int | None,
    causal: bool = True,
    scale: float | None = None,
    series: Series | None = None,
    window: int = 0,
    sinks: int = 0,
    key_padding_mask: Tensor | None = None,
    log_decay: Tensor | None = None,
) -> Tensor:
    """Attention by its definition: [B, Hq, Tq, d], [B, Hkv, Tk, d], [B, Hkv, Tk, dv] -> [B, Hq, Tq, dv].

    With degree None only the keys that are weighed exactly count.
    """
    visible, shown = _shown(query, key, causal, key_padding_mask)
    count = visible.cumsum(-1)
    exact = (visible & (count <= sinks))[:, None, None].expand_as(shown)
    if window:
        exact = exact | (count[..., None] - count[:, None] < window)[:, None]
    if window or sinks:
        shown = shown & visible[:, None, :, None]
    coefficients: Sequence[float] = ()
    if degree is None:
        shown = shown & exact
    else:
        coefficients = (series or EXP).coefficients(degree)
    return _attend(query, key, value, coefficients, scale, visible, shown, exact, log_decay)


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
    visible, shown = _shown(query, key, causal, key_padding_mask)
    return _attend(query, key, value, (), scale, visible, shown, torch.ones_like(shown), log_decay)


def _shown(query: Tensor, key: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which keys are visible [B, Tk], and to which queries [B, 1, Tq, Tk]."""
    visible = torch.ones_like(key[:, 0, :, 0], dtype=torch.bool) if mask is None else mask
    shown = visible[:, None, None].expand(-1, 1, query.shape[2], -1)
    return visible, shown.tril() if causal else shown


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: Sequence[float],
    scale: float | None,
    visible: Tensor,
    shown: Tensor,
    exact: Tensor,
    log_decay: Tensor | None,
) -> Tensor:
    q, k, v = query.double(), key.double(), value.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)  # clarity, not speed
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * (q @ k.transpose(-1, -2))  # [B, Hq, Tq, Tk]
    size = torch.where(exact, scores, 0)  # log of a weight, but for the factor f(s) of the keys that are not exact
    if log_decay is not None:
        size = size + _fading(log_decay.double(), visible).repeat_interleave(group, 1)
    size = torch.where(shown, size, -torch.inf)
    top = size.logsumexp(-1, keepdim=True).detach()  # a factor per query, which the division removes
    empty = top == -torch.inf
    weights = torch.where(exact, 1, _truncated(scores, coefficients)) * (size - top.masked_fill(empty, 0)).exp()
    return (weights @ v) / torch.where(empty, 1, weights.sum(-1, keepdim=True))


def _truncated(scores: Tensor, coefficients: Sequence[float]) -> Tensor:
    return sum((c * scores**p for p, c in enumerate(coefficients)), torch.zeros_like(scores))


def _fading(log_decay: Tensor, visible: Tensor) -> Tensor:
    """Log decay from key j to query i, [B, Hkv, T, T]; summed anew for each key, which is exact for -inf too."""
    gates = log_decay.masked_fill(~visible[:, None], 0)  # hidden tokens do not fade others
    later = torch.ones(gates.shape[-1], gates.shape[-1], dtype=torch.bool, device=gates.device).tril(-1)  # [t, j]
    fading = torch.where(later, gates[..., :, None], 0).cumsum(-2)
    return fading.masked_fill(fading <= FULL_RESET, -torch.inf)  # forgotten, even where no other key is left
