"""How far scores are read: by the series as it is, or by exp fitted to each query's own scores.

The moments hold no coefficients, so each power of the scores can be read alone: P_p = sum_j s_j^p [v_j, 1]. The ones
columns of the first three tell how many far keys there are and the mean and variance of their scores, and for scores
that are roughly normal the polynomial of degree D nearest to exp is known (see `core.series.fitted_gaussian`):

    p(s) = e^(mu + var/2) sum_{j <= D} a_j (s - mu)^j / j!,    a_j = sum_{2m <= D - j} (-var/2)^m / m!
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..core.series import fitted_gaussian
from .normaliser import SAFE_SHARE, report_unsafe

READINGS = ("taylor", "fitted")

_LARGEST_SHARE_OF_ROUNDING = 1e-2
"""Of a normaliser: beyond that it is not known well enough."""


def power(degree: int) -> tuple[float, ...]:
    """The coefficients of s^degree."""
    return (*[0.0] * degree, 1.0)


def largest_variance(degree: int) -> float:
    """The variance up to which the fit of an even degree is positive everywhere, whatever the scores.

    An odd degree has that of the even one below.
    """
    return _largest_variance(degree - degree % 2)


largest_variance._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in `normaliser`


def fit_limits(degree: int) -> tuple[float, float, float]:
    """`largest_variance`, and which normalisers are not safe with more, or lost to rounding: for the kernels."""
    return largest_variance(degree), SAFE_SHARE, _LARGEST_SHARE_OF_ROUNDING


@lru_cache(maxsize=64)
def _largest_variance(degree: int) -> float:
    low, high = 0.0, float(degree)
    while degree and high - low > 1e-6:
        middle = (low + high) / 2
        fits = fitted_gaussian(0, math.sqrt(middle), degree).is_positive(degree)
        low, high = (middle, high) if fits else (low, middle)
    return low


def fit(powers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """[N | Z] of the fit to each query's far scores but for a factor, and the factor's logarithm.

    The variance counts up to half the degree, where the fit is right to about a quarter; where the normaliser is not
    safely positive even so, up to `largest_variance`.

    Args:
        powers: P_0 .. P_D, [..., E] each.

    Returns:
        [..., E] and [...]; zeros where a query sees no far key; NaN where the powers, which are taken about zero,
        cancel so far that rounding is left, and (of an even degree) a warning.

    Raises:
        NormaliserError: there are such rows, of an even degree, while gradients are being recorded.
    """
    degree = len(powers) - 1
    count = powers[0][..., -1]
    some, none = torch.where(count > 0, count, 1), torch.zeros_like(count)
    mean = powers[1][..., -1] / some if degree >= 1 else none
    variance = none
    if degree >= 2:
        variance = (powers[2][..., -1] / some - mean.square()).clamp(0, degree / 2)
        with torch.no_grad():
            found = _combine([each[..., -1:] for each in powers], _coefficients(mean, variance, degree))[..., 0]
            bad = ~(found > SAFE_SHARE * count)
        variance = torch.where(bad, variance.clamp(max=largest_variance(degree)), variance)
    coefficients = _coefficients(mean, variance, degree)
    out = _combine(powers, coefficients)
    with torch.no_grad():
        sizes = sum((c.abs() * each[..., -1].abs() for each, c in zip(powers, coefficients, strict=True)), none)
        lost = torch.finfo(out.dtype).eps * sizes > _LARGEST_SHARE_OF_ROUNDING * out[..., -1].abs()
    if degree % 2 == 0:  # an odd degree's normaliser is checked by who divides, and NaN is not safe
        report_unsafe(lost, out)
    return torch.where(lost[..., None], torch.nan, out), mean + variance / 2


def _coefficients(mean: Tensor, variance: Tensor, degree: int) -> list[Tensor]:
    """c_0 .. c_D of p(s), but for the factor e^(mean + variance / 2)."""
    none = torch.zeros_like(mean)
    a = [
        sum(((-variance / 2) ** m / math.factorial(m) for m in range((degree - j) // 2 + 1)), none)
        for j in range(degree + 1)
    ]
    return [
        sum((a[j] * (-mean) ** (j - p) / math.factorial(j - p) for j in range(p, degree + 1)), none) / math.factorial(p)
        for p in range(degree + 1)
    ]


def _combine(powers: Sequence[Tensor], coefficients: Sequence[Tensor]) -> Tensor:
    pairs = zip(powers, coefficients, strict=True)
    return sum((c[..., None] * each for each, c in pairs), torch.zeros_like(powers[0]))


def join(near: Tensor, top: Tensor, far: Tensor, log_factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Near and far [N | Z] under one maximum.

    Args:
        near: [..., E], to be multiplied by exp(top [...]). far: [..., E], to be multiplied by exp(log_factor [...]).

    Returns:
        The sum [..., E], and the logarithms' factors in it [...]: of near, of far.
    """
    with torch.no_grad():
        lowest = torch.full_like(top, -torch.inf)
        own = torch.where(near[..., -1] > 0, top + near[..., -1].log(), lowest)
        other = torch.where(far[..., -1] > 0, log_factor + far[..., -1].log(), lowest)
        largest = torch.maximum(own, other)
        largest = torch.where(largest == torch.inf, 0, largest)  # a far Z beyond the range, which shows
        largest = torch.where(largest == -torch.inf, log_factor, largest)  # nothing at all
        by_near = (torch.where(near[..., -1] > 0, top, lowest) - largest).exp()
    by_far = (log_factor - largest).clamp(max=80).exp()  # beyond: a normaliser that is not positive, which is reported
    by_far = torch.where(far[..., -1] == 0, 0, by_far)
    return by_near[..., None] * near + by_far[..., None] * far, by_near, by_far
