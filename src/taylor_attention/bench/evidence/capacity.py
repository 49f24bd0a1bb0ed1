"""How many key/value pairs one head can hold: the operator alone, without training, and the law of it."""

from __future__ import annotations

import math
from itertools import pairwise
from math import comb
from typing import Any

import torch
from torch import Tensor

from ...core.series import EXP
from .capacity_law import EXACT, LEVELS, conclusions, pictures, tables
from .experiment import Case, Experiment

HEAD_DIMS = (4, 8, 16, 32)
DEGREES = (1, 2, 3, 4, 6)
VALUE_DIM = 64
MOST = 2**15
"""Pairs that are tried, at most."""

_LARGEST = 10**5  # monomials
_QUERIES = 256
_DRAWS = 2


def plan(quick: bool) -> list[Case]:
    """Head sizes, degrees, and the score of a key with itself: that of normalised heads, sqrt(d), and others."""
    dims = HEAD_DIMS[1:3] if quick else HEAD_DIMS
    degrees = (*(DEGREES[1:4:2] if quick else DEGREES), EXACT)
    return [
        {"head_dim": head_dim, "degree": degree, "peak": peak}
        for head_dim in dims
        for degree in degrees
        if degree is EXACT or monomials(head_dim, degree) <= _LARGEST
        for peak in dict.fromkeys((round(math.sqrt(head_dim), 3), 4.0, 8.0, 16.0))
    ]


def monomials(head_dim: int, degree: int) -> int:
    """M = C(d + D, D), the numbers in the state per entry of a value."""
    return comb(head_dim + degree, degree)


def measure(case: Case, seed: int) -> dict[str, Any]:
    """Accuracy for ever more pairs, and how many there are where it falls below each level (None: at none tried)."""
    generator = torch.Generator().manual_seed(seed)
    count, counts, accuracies = 2.0, list[int](), list[float]()
    while count <= MOST and (not accuracies or accuracies[-1] > min(LEVELS) - 0.1):
        counts.append(round(count))
        drawn = [recall(generator, counts[-1], **case) for _ in range(_DRAWS)]
        accuracies.append(sum(drawn) / _DRAWS)
        count *= math.sqrt(2)
    return {
        "monomials": None if case["degree"] is EXACT else monomials(case["head_dim"], case["degree"]),
        "pairs": counts,
        "accuracy": accuracies,
        "capacity": {f"{level:g}": crossing(counts, accuracies, level) for level in LEVELS},
        "contrast": contrast(**case),
    }


def recall(generator: torch.Generator, pairs: int, *, head_dim: int, degree: int | None, peak: float) -> float:
    """The part of stored keys whose output is nearer to their own value than to any other, of `pairs`.

    Keys are random directions, values random directions of 64 entries, and the score of two keys is `peak` times their
    cosine. The weights are the series of the scores: what the moments of the pairs give, without making them. A query
    whose normaliser is not positive is not answered.
    """
    keys, values = (_directions(generator, pairs, size) for size in (head_dim, VALUE_DIM))
    asked = torch.randint(pairs, (_QUERIES,), generator=generator)
    weights = kernel(peak * (keys[asked] @ keys.T), degree, peak)  # [queries, pairs]
    nearest = (weights @ values @ values.T).argmax(-1)
    return ((nearest == asked) & (weights.sum(-1) > 0)).double().mean().item()


def kernel(scores: Tensor, degree: int | None, peak: float) -> Tensor:
    """The weights of scores: exp over its value at `peak`, or its Taylor polynomial."""
    if degree is EXACT:
        return (scores - peak).exp()
    weights = torch.zeros_like(scores)
    for coefficient in reversed(EXP.coefficients(degree)):
        weights = weights * scores + coefficient
    return weights


def contrast(head_dim: int, degree: int | None, peak: float) -> float:
    """R = f(peak)^2 / E[f(peak c)^2], c the cosine of two random directions: own weight over others', in mean squares.

    The noise of n pairs is n / R of the signal, so that capacity should follow R. Over all polynomials f of a degree
    R is at most how many of them there are on the sphere, no more than M.
    """
    angles = (torch.arange(2000, dtype=torch.float64) + 0.5) * math.pi / 2000
    density = angles.sin().pow(head_dim - 2)
    weights = kernel(peak * angles.cos(), degree, peak)
    own = kernel(torch.tensor(peak, dtype=torch.float64), degree, peak)
    return float(own.square() * density.sum() / (weights.square() * density).sum())


def crossing(counts: list[int], accuracies: list[float], level: float) -> float | None:
    """Where accuracy falls below a level for the first time, between two counts by a line over log n."""
    for (low, above), (high, below) in pairwise(zip(counts, accuracies, strict=True)):
        if below < level <= above:
            return float(low * (high / low) ** ((above - level) / (above - below)))
    return float(counts[0]) if accuracies[0] < level else None


def _directions(generator: torch.Generator, count: int, size: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, size, generator=generator), dim=-1)


EXPERIMENT = Experiment(
    "capacity",
    "How many pairs a head holds",
    "How does the number of keys whose values a head can tell apart grow with degree and head size?",
    plan,
    tables,
    pictures,
    conclusions,
    measure=measure,
)
