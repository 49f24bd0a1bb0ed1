"""Attention of some queries of a long sequence by its definition, in float64: softmax, and every reading of powers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.series import COSH, EXP, fitted_chebyshev, fitted_gaussian
from ...ops.reading import fit

BLOCK = 16
"""Queries at a time."""


@dataclass(frozen=True)
class Rows:
    """Outputs [H, R, dv] of R queries of each head.

    Attributes:
        softmax, cosh: of the kernels themselves.
        outputs: of the readings, by name; "cosh" is to be compared with that kernel, the others with softmax.
    """

    softmax: Tensor
    cosh: Tensor
    outputs: dict[str, Tensor]

    def exact_of(self, name: str) -> Tensor:
        """What a reading is to be compared with."""
        return self.cosh if name == "cosh" else self.softmax


def attend_rows(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, degree: int) -> Rows:
    """Causal attention of these queries, [H, T, d] three times: exact, and by powers of the scores up to a degree.

    "taylor" is exp's own series; "fitted" is each query's own fit, as `reading="fitted"` does it; "gaussian" and
    "chebyshev" are one fit for all queries, to N(0, 1) and to [-3, 3]; "cosh" is the series of cosh.
    """
    found = [_attend(query[:, block], key, value, block, degree) for block in rows.split(BLOCK)]
    softmax, cosh = (torch.cat(each, dim=1) for each in ([one[0] for one in found], [one[1] for one in found]))
    powers = [torch.cat([one[2][p] for one in found], dim=1) for p in range(degree + 1)]
    series = {
        "taylor": EXP,
        "gaussian": fitted_gaussian(0.0, 1.0, degree),
        "chebyshev": fitted_chebyshev(-3.0, 3.0, degree),
        "cosh": COSH,
    }
    outputs = {name: _divide(_combine(powers, each.coefficients(degree))) for name, each in series.items()}
    return Rows(softmax, cosh, outputs | {"fitted": _divide(fit(powers)[0])})


def _attend(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, degree: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Of a block of queries [H, B, d]: softmax and cosh attention [H, B, dv], and powers P_p [H, B, dv + 1]."""
    end = int(rows.max()) + 1
    columns = torch.cat([value[:, :end], torch.ones_like(value[:, :end, :1])], dim=-1)
    visible = (torch.arange(end) <= rows[:, None]).to(query.dtype)  # [B, end]
    scores = query @ key[:, :end].mT * (key.shape[-1] ** -0.5 * visible)  # [H, B, end]
    weights = scores.exp() * visible
    softmax = _divide(weights @ columns)
    cosh = _divide((weights + (-scores).exp() * visible) @ columns)
    product, powers = visible.expand_as(scores), []
    for p in range(degree + 1):
        product = product if p == 0 else product * scores
        powers.append(product @ columns)
    return softmax, cosh, powers


def _combine(powers: list[Tensor], coefficients: tuple[float, ...]) -> Tensor:
    return torch.stack([c * each for c, each in zip(coefficients, powers, strict=True)]).sum(0)


def _divide(sums: Tensor) -> Tensor:
    return sums[..., :-1] / sums[..., -1:]
