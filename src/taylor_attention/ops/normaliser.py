"""Numerator over normaliser, what happens where that is not safely positive, and who wants to know."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.series import Series
from ..errors import NormaliserError, NormaliserWarning, expect_bool
from . import division

SAFE_SHARE = 1e-3
"""A normaliser below this share of what its keys would give at score zero counts as not safely positive."""

_ADVICE = (
    "the truncated series is negative for some scores, and the normaliser of {which} queries is not safely positive: "
    "use an even degree of exp (positive everywhere), or make the scores smaller (scale, QK-norm, a constant taken off "
    "all keys)"
)
_WARNING = _ADVICE.format(which="some") + "; their rows are NaN, and watch_normalisers() counts them"

_LIBRARIES = (__name__.partition(".")[0], "torch")  # whose lines tell a caller nothing


def resolve(series: Series, degree: int | None) -> tuple[tuple[float, ...], bool]:
    """The coefficients of a series up to a degree (None: there are none), and whether it is positive everywhere."""
    if degree is None:
        return (), True
    return series.coefficients(degree), series.is_positive(degree)


# Exact arithmetic on Python integers is nothing for a tracer. This is all that torch.compiler.assume_constant_result
# does, without the second that importing the compiler takes.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def divide(out: Tensor, empty: Tensor) -> Tensor:
    """N / Z from [N | Z]: zeros where no key was visible, NaN where Z is negative or infinite, as no true one is."""
    y: Tensor = division.divide(out, empty)[0]
    return y


def divide_checked(out: Tensor, seen: Tensor, constant: float) -> Tensor:
    """As `divide`; NaN rows where Z is not safely positive, and an error if gradients are recorded."""
    unsafe = find_unsafe(out, seen, constant)
    y = divide(out, seen == 0)
    return y.masked_fill(unsafe.unsqueeze(-1), torch.nan) if report_unsafe(unsafe, out) else y


def find_unsafe(out: Tensor, seen: Tensor, constant: float) -> Tensor:
    """Where Z of [N | Z] is not safely positive although keys are visible, bool."""
    z = out[..., -1]
    return ~((z > SAFE_SHARE * abs(constant) * seen) & (z < torch.inf)) & (seen != 0)


def report_unsafe(unsafe: Tensor, out: Tensor) -> bool:
    """Say that rows are unsafe: an error if gradients of `out` are recorded; whether there may be any."""
    if torch.compiler.is_compiling() or out.is_meta:  # nobody can look
        return True
    count = int(unsafe.sum())
    if count and out.requires_grad:
        raise NormaliserError(_ADVICE.format(which=f"{count:,}"))
    if count:
        warn_unsafe()
    return count > 0


def warn_unsafe() -> None:
    """Say that some rows are NaN because their normaliser is not safely positive, unless someone counts them.

    The text is always the same and the place is the user's line, so that Python shows it once for each.
    """
    if _watching.get():
        return
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(_WARNING, NormaliserWarning, stacklevel=level)


# ---- counting --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class NormaliserStatus:
    """What became of the queries of the calls that were watched.

    A query is unsafe if its row of the output is not finite although it is itself: its normaliser is not safely
    positive, or beyond the range of the sums, or it sees a key or value that is not finite.

    Attributes:
        calls: of `attention` and `decode_`, by layers and models too.
        queries: in all of them, one for each sequence, query head and token.
        unsafe: how many of them are.
        masks: for each call which ones, bool [B, Hq, T]; None unless they were asked for.
    """

    calls: int = 0
    queries: int = 0
    unsafe: int = 0
    masks: list[Tensor] | None = None


_watching: ContextVar[tuple[NormaliserStatus, ...]] = ContextVar("watching", default=())


@contextmanager
def watch_normalisers(*, keep_masks: bool = False) -> Iterator[NormaliserStatus]:
    """Count unsafe queries of every `attention` and `decode_` inside the block, in this thread, instead of warning.

    In training they are an error all the same. What runs inside torch.compile is not seen.

    Args:
        keep_masks: keep a mask for each call, too, which takes a byte for each query.
    """
    expect_bool("keep_masks", keep_masks)
    status = NormaliserStatus(masks=[] if keep_masks else None)
    before = _watching.set((*_watching.get(), status))
    try:
        yield status
    finally:
        _watching.reset(before)


def note(y: Tensor, query: Tensor) -> None:
    """Tell who watches about the outputs [B, Hq, T, dv] of queries [B, Hq, T, d]; not to be traced."""
    for status in _watching.get():
        unsafe = query.isfinite().all(-1) & ~y.isfinite().all(-1)
        status.calls += 1
        status.queries += unsafe.numel()
        status.unsafe += int(unsafe.sum())
        if status.masks is not None:
            status.masks.append(unsafe)
