"""What every figure rests on: a result is compared with float64 before its time counts, and refused if it is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import TaylorAttentionError

EXACT = 2e-5
"""Largest relative L2 error of this package in float32, the bound that its tests hold it to."""

LOOSE = 1e-3
"""Largest relative L2 error of a rival: plain float32 sums, in whatever order."""

Reference = Callable[..., Tensor]
"""`ops.reference.softmax_reference`, or `attention_reference` with its degree: (query, key, value, *, causal, ...)."""


class DisagreementError(TaylorAttentionError):
    """Two ways of computing the same numbers differ, so no time is reported."""


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||, in the dtype of the operands; NaN anywhere gives NaN."""
    return float((got - expected).norm() / expected.norm())


def require_agreement(name: str, got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> float:
    """The largest relative L2 difference of the pairs.

    Raises:
        DisagreementError: it is above the tolerance, or a shape is another.
    """
    for mine, wanted in zip(got, expected, strict=True):
        if mine.shape != wanted.shape:
            raise DisagreementError(f"{name}: expected a result {tuple(wanted.shape)}, got {tuple(mine.shape)}")
        error = relative_difference(mine.detach().double(), wanted)
        if not error <= tolerance:  # so that a NaN is caught as well
            raise DisagreementError(
                f"{name}: expected a relative error of at most {tolerance:.0e} against float64, got {error:.1e}; "
                "the time of a wrong result is not reported"
            )
    return max(relative_difference(mine.detach().double(), wanted) for mine, wanted in zip(got, expected, strict=True))


def sample_rows(length: int, count: int = 8) -> list[int]:
    """Queries to compare, spread over a sequence with its last one among them."""
    return sorted({length * (i + 1) // count - 1 for i in range(count)} - {-1})


def reference_rows(query: Tensor, key: Tensor, value: Tensor, rows: Sequence[int], reference: Reference) -> Tensor:
    """Causal attention of some queries by its definition, all heads: [1, H, T, d] each -> float64 [1, H, rows, dv].

    One query against the keys before it at a time, so that the cost is linear in the length; differentiable.
    """
    found = [
        reference(query[:, :, row : row + 1], key[:, :, : row + 1], value[:, :, : row + 1], causal=True) for row in rows
    ]
    return torch.cat(found, dim=2)
