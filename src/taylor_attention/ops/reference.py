"""The specification: quadratic, float64, one step per line. Slow on purpose; every other path is tested against it.

For query i and key j with scaled score s_ij = scale * q_i . k_j:

    e_ij = exp(s_ij)   if j is one of the last `window` visible keys up to i, or of the first `sinks` of all
           f(s_ij)     else: a truncated series, or nothing at all; times e^g with a gain g of query i's head;
                       where the far part has queries and keys of its own, s_ij is their product here
    w_ij = e_ij * exp(sum of log decay over j < t <= i)       for visible keys, j <= i if causal
    y_i  = sum_j w_ij v_j / sum_j w_ij                        zeros where no key has weight

Without window and sinks this is Taylor attention; with a window over all keys, softmax attention. A hidden token has no
place in a window, and with a window or sinks none as a query either: its row is zeros.

Fitted, f is a polynomial of each query's own: with mean m and variance v of its far scores, weighted by their decay,

    f_i(s) = e^(m + v/2) sum_{j <= D} a_j (s - m)^j / j!,    a_j = sum_{2n <= D - j} (-v/2)^n / n!

where a degree of 0 sees no mean, one below 2 no variance, and v counts up to D/2, or less where f would not be safe.

Causal queries are the last ones of the sequence: any number of them, up to one for each key.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import factorial

import torch
from torch import Tensor

from ..core.series import EXP, Series
from .normaliser import SAFE_SHARE
from .problem import FULL_RESET
from .reading import largest_variance


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
    reading: str = "taylor",
    key_padding_mask: Tensor | None = None,
    log_decay: Tensor | None = None,
    far_gain: Tensor | None = None,
    far_query: Tensor | None = None,
    far_key: Tensor | None = None,
) -> Tensor:
    """Attention by its definition: [B, Hq, Tq, d], [B, Hkv, Tk, d], [B, Hkv, Tk, dv] -> [B, Hq, Tq, dv].

    With degree None only the keys that are weighed exactly count. Rows that `attention` refuses, their normaliser not
    being safely positive, are what the formula gives.
    """
    visible, shown = _shown(query, key, causal, key_padding_mask)
    count = visible.cumsum(-1)
    exact = (visible & (count <= sinks))[:, None, None].expand_as(shown)
    if window:
        exact = exact | (_of_queries(count, query)[..., None] - count[:, None] < window)[:, None]
    if window or sinks or reading == "fitted":
        shown = shown & _of_queries(visible, query)[:, None, :, None]
    coefficients: Sequence[float] = ()
    if degree is None:
        shown = shown & exact
    else:
        coefficients = (series or EXP).coefficients(degree)
    fitted = reading == "fitted" and degree is not None
    far = None if far_query is None or far_key is None else _scores(far_query, far_key, 1.0)
    return _attend(query, key, value, coefficients, fitted, scale, visible, shown, exact, log_decay, far_gain, far)


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
    return _attend(query, key, value, (), False, scale, visible, shown, torch.ones_like(shown), log_decay)


def _shown(query: Tensor, key: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which keys are visible [B, Tk], and to which queries [B, 1, Tq, Tk]."""
    visible = torch.ones_like(key[:, 0, :, 0], dtype=torch.bool) if mask is None else mask
    shown = visible[:, None, None].expand(-1, 1, query.shape[2], -1)
    return visible, shown.tril(key.shape[2] - query.shape[2]) if causal else shown


def _of_queries(x: Tensor, query: Tensor) -> Tensor:
    """The last entries of [..., Tk], one for each query: [..., Tq]."""
    return x[..., x.shape[-1] - query.shape[2] :]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: Sequence[float],
    fitted: bool,
    scale: float | None,
    visible: Tensor,
    shown: Tensor,
    exact: Tensor,
    log_decay: Tensor | None,
    far_gain: Tensor | None = None,
    far_scores: Tensor | None = None,
) -> Tensor:
    group = query.shape[1] // key.shape[1]
    v = value.double().repeat_interleave(group, 1)  # clarity, not speed
    scores = _scores(query, key, query.shape[-1] ** -0.5 if scale is None else scale)
    if far_scores is not None:
        scores = torch.where(exact, scores, far_scores)
    faded = torch.zeros_like(scores)
    if log_decay is not None:
        fading = _fading(log_decay.double(), visible)
        faded = faded + _of_queries(fading.mT, query).mT.repeat_interleave(group, 1)
    if fitted:
        far, size = _fit(scores, torch.where(shown & ~exact, faded, -torch.inf).exp(), len(coefficients) - 1)
    else:
        far, size = _truncated(scores, coefficients), torch.zeros_like(scores[..., :1])
    if far_gain is not None:
        size = size + far_gain.double()[:, None, None]
    size = torch.where(exact, scores, size) + faded  # log of a weight, but for the factor `far` of keys that are not
    size = torch.where(shown, size, -torch.inf)
    top = size.logsumexp(-1, keepdim=True).detach()  # a factor per query, which the division removes
    empty = top == -torch.inf
    weights = torch.where(exact, 1, far) * (size - top.masked_fill(empty, 0)).exp()
    return (weights @ v) / torch.where(empty, 1, weights.sum(-1, keepdim=True))


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Of every query and key, [B, Hq, Tq, Tk]."""
    return scale * (query.double() @ key.double().repeat_interleave(query.shape[1] // key.shape[1], 1).mT)


def _fit(scores: Tensor, left: Tensor, degree: int) -> tuple[Tensor, Tensor]:
    """What each query's fit gives but for a factor [B, Hq, Tq, Tk], and the factor's logarithm [B, Hq, Tq, 1].

    left: what decay has left of a far key [B, Hq, Tq, Tk], 0 for all others.
    """
    count = left.sum(-1, keepdim=True)
    share = left / torch.where(count > 0, count, 1)
    mean = (share * scores).sum(-1, keepdim=True) * (degree >= 1)
    variance = (share * (scores - mean).square()).sum(-1, keepdim=True).clamp(max=degree / 2) * (degree >= 2)
    unsafe = (left * _centred(scores - mean, variance, degree)).sum(-1, keepdim=True) <= SAFE_SHARE * count
    variance = torch.where(unsafe, variance.clamp(max=largest_variance(degree)), variance)
    return _centred(scores - mean, variance, degree), mean + variance / 2


def _centred(scores: Tensor, variance: Tensor, degree: int) -> Tensor:
    """sum_j a_j s^j / j! for scores less their mean."""
    a = [sum((-variance / 2) ** n / factorial(n) for n in range((degree - j) // 2 + 1)) for j in range(degree + 1)]
    return _truncated(scores, [each / factorial(j) for j, each in enumerate(a)])


def _truncated(scores: Tensor, coefficients: Sequence[float | Tensor]) -> Tensor:
    return sum((c * scores**p for p, c in enumerate(coefficients)), torch.zeros_like(scores))


def _fading(log_decay: Tensor, visible: Tensor) -> Tensor:
    """Log decay from key j to query i, [B, Hkv, T, T]; summed anew for each key, which is exact for -inf too."""
    gates = log_decay.masked_fill(~visible[:, None], 0)  # hidden tokens do not fade others
    later = torch.ones(gates.shape[-1], gates.shape[-1], dtype=torch.bool, device=gates.device).tril(-1)  # [t, j]
    fading = torch.where(later, gates[..., :, None], 0).cumsum(-2)
    return fading.masked_fill(fading <= FULL_RESET, -torch.inf)  # forgotten, even where no other key is left
