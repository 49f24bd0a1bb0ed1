"""Numerator over normaliser, and what happens where a truncated series makes the normaliser unsafe."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..core.series import Series
from ..errors import NormaliserError, NormaliserWarning

SAFE_SHARE = 1e-3
"""A normaliser below this share of what its keys would give at score zero counts as not safely positive."""

_ADVICE = (
    "the truncated series is negative for some scores, and the normaliser of {count:,} queries is not safely positive: "
    "use an even degree of exp (positive everywhere), or make the scores smaller (scale, QK-norm, a constant taken off "
    "all keys)"
)


def resolve(series: Series, degree: int | None) -> tuple[tuple[float, ...], bool]:
    """The coefficients of a series up to a degree (None: there are none), and whether it is positive everywhere."""
    if degree is None:
        return (), True
    return series.coefficients(degree), series.is_positive(degree)


# Exact arithmetic on Python integers is nothing for a tracer. This is all that torch.compiler.assume_constant_result
# does, without the second that importing the compiler takes.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def divide(out: Tensor, empty: Tensor) -> Tensor:
    """N / Z from [N | Z], zeros where no key was visible."""
    return out[..., :-1] / torch.where(empty, 1, out[..., -1]).unsqueeze(-1)


def divide_checked(out: Tensor, seen: Tensor, constant: float) -> Tensor:
    """As `divide`; NaN rows where Z is not safely positive, and an error if gradients are recorded."""
    unsafe = ~(out[..., -1] > SAFE_SHARE * abs(constant) * seen) & (seen != 0)
    report_unsafe(unsafe, out)
    return divide(out, seen == 0).masked_fill(unsafe.unsqueeze(-1), torch.nan)


def report_unsafe(unsafe: Tensor, out: Tensor) -> None:
    """Say how many rows are unsafe: an error if gradients of `out` are recorded; nothing while a tracer looks."""
    if torch.compiler.is_compiling():
        return
    count = int(unsafe.sum())
    if count and out.requires_grad:
        raise NormaliserError(_ADVICE.format(count=count))
    if count:
        warn_unsafe(count)


def warn_unsafe(count: int) -> None:
    """Say that so many rows are NaN because their normaliser is not safely positive."""
    warnings.warn(_ADVICE.format(count=count) + "; their rows are NaN", NormaliserWarning, stacklevel=4)
