"""The minimal symmetric basis: every distinct monomial of d variables up to a degree, once.

All monomials of degree 0..D of a vector x with d entries are packed in one axis of M = C(d + D, D) features, degree by
degree, and within degree p in lexicographic order of the index rows i_1 <= ... <= i_p (the paper's M_p). In that order
the degree-p monomials whose first index is i stand in one contiguous block, and that block is x_i times the SUFFIX of
the degree-(p-1) monomials whose first index is >= i. Everything below follows from this one fact: one multiplication
per monomial, multiplicities without factorials, and GEMMs that never materialise the highest degree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from math import comb
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ..errors import expect, expect_int, shown

MAX_DEGREE = 62
"""Higher ones are refused, whatever the head size: 2^63 is beyond an int64, and exp's coefficient there is 3e-86."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _cached_tensors(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Cache the tensors that a function makes: ordinary ones, whatever mode and default device the first call finds."""

    @lru_cache(maxsize=64)
    @wraps(function)
    def make(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            return function(*args, **kwargs)

    return make  # type: ignore[return-value]


@dataclass(frozen=True)
class Block:
    """The degree-p monomials with first index `index`: rows `start:stop` of the packed axis.

    They are x[index] times rows `suffix:suffix + (stop - start)`, which have degree p - 1 and first index >= `index`.
    """

    index: int
    start: int
    stop: int
    suffix: int


def monomial_count(head_dim: int, degree: int) -> int:
    """Number of distinct monomials of exactly this degree: C(d + p - 1, p)."""
    return comb(head_dim + degree - 1, degree)


def feature_count(head_dim: int, degree: int) -> int:
    """Number M of packed features, all degrees 0..degree together: C(d + degree, degree) (eq. 13)."""
    return comb(head_dim + degree, degree)


@lru_cache(maxsize=256)
def offsets(head_dim: int, degree: int) -> tuple[int, ...]:
    """Where each degree starts in the packed axis, and its end: degree p is `offsets[p]:offsets[p + 1]`."""
    _check(head_dim, degree)
    return (0, *(feature_count(head_dim, p) for p in range(degree + 1)))


@lru_cache(maxsize=256)
def blocks(head_dim: int, degree: int) -> tuple[Block, ...]:
    """The contiguous blocks of exactly this degree (>= 1), in order of their first index."""
    _check(head_dim, degree)
    expect(degree >= 1, "degree", "an int >= 1 (degree 0 is the constant 1 and has no blocks)", degree)
    start, below_stop = feature_count(head_dim, degree - 1), feature_count(head_dim, degree - 1)
    found = []
    for index in range(head_dim):
        # Monomials of degree p - 1 in the variables index..d-1 are the last ones of their degree.
        size = monomial_count(head_dim - index, degree - 1)
        found.append(Block(index, start, start + size, below_stop - size))
        start += size
    return tuple(found)


@_cached_tensors
def index_rows(head_dim: int, degree: int) -> Tensor:
    """Index rows M_p of exactly this degree, int64 [m_p, p], lexicographic, each row non-decreasing. Do not modify."""
    _check(head_dim, degree)
    if degree == 0:
        return torch.empty(1, 0, dtype=torch.int64)
    below = index_rows(head_dim, degree - 1)
    base = offsets(head_dim, degree)[degree - 1]
    rows = torch.empty(monomial_count(head_dim, degree), degree, dtype=torch.int64)
    for block, part in _parts(head_dim, degree):
        rows[part, 0] = block.index
        rows[part, 1:] = below[block.suffix - base :]
    return rows


@_cached_tensors
def multiplicities(head_dim: int, degree: int) -> Tensor:
    """Multiplicities C_p of exactly this degree, int64 [m_p]: p! / prod(repeats!), summing to d^p. Do not modify.

    A monomial x_i^a * rest of degree p has p/a times the multiplicity of x_i^(a-1) * rest, so no factorial is formed.
    """
    expect(head_dim**degree < 2**63, "degree", f"head_dim ** degree below 2^63 at head_dim {head_dim}", degree)
    return _multiplicities_and_runs(head_dim, degree)[0]


def _multiplicities_and_runs(head_dim: int, degree: int) -> tuple[Tensor, Tensor]:
    """Multiplicities of one degree, and for each row how often its first index repeats."""
    _check(head_dim, degree)
    counts, runs = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int16)
    for p in range(1, degree + 1):
        base = offsets(head_dim, p)[p - 1]
        new_counts = torch.empty(monomial_count(head_dim, p), dtype=torch.int64)
        new_runs = torch.ones(len(new_counts), dtype=torch.int16)
        for block, part in _parts(head_dim, p):
            if p > 1:  # the suffix begins with the rows whose first index is block.index again
                repeats = monomial_count(head_dim - block.index, p - 2)
                tail = runs[block.suffix - base :][:repeats]
                new_runs[part][:repeats] = tail + 1
            # counts * p / run, dividing first: the product alone could pass 2^63. run / shared divides the count.
            run = new_runs[part].long()
            shared = run.gcd(torch.tensor(p))
            new_counts[part] = counts[block.suffix - base :] // (run // shared) * (p // shared)
        counts, runs = new_counts, new_runs
    return counts, runs


def _parts(head_dim: int, degree: int) -> list[tuple[Block, slice]]:
    """Each block with the rows it takes when its degree stands alone."""
    start = offsets(head_dim, degree)[degree]
    return [(block, slice(block.start - start, block.stop - start)) for block in blocks(head_dim, degree)]


@_cached_tensors
def _packed_multiplicities(head_dim: int, degree: int) -> Tensor:
    return torch.cat([multiplicities(head_dim, p).double() for p in range(degree + 1)])


@_cached_tensors
def _reading_weights(
    head_dim: int, coefficients: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    weights = _packed_multiplicities(head_dim, len(coefficients) - 1).clone()
    starts = offsets(head_dim, len(coefficients) - 1)
    for p, coefficient in enumerate(coefficients):
        weights[starts[p] : starts[p + 1]] *= coefficient
    return weights.to(dtype).to(device)


def reading_weights(
    head_dim: int, coefficients: tuple[float, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """The weight c_p * C_p of every packed monomial, [M]: what turns raw moments into sums of c_p (q.k)^p v.

    Rounded once, from float64. Do not modify.
    """
    return _reading_weights(head_dim, tuple(coefficients), dtype, torch.device(device))


@_cached_tensors
def _gather_indices(head_dim: int, degree: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For exactly this degree: the suffix row (within degree - 1) and the first index of every monomial."""
    base = offsets(head_dim, degree)[degree - 1]
    suffixes, firsts = [], []
    for block in blocks(head_dim, degree):
        size = block.stop - block.start
        suffixes.append(torch.arange(block.suffix - base, block.suffix - base + size))
        firsts.append(torch.full((size,), block.index))
    return torch.cat(suffixes).to(device), torch.cat(firsts).to(device)


def expand(x: Tensor, degree: int) -> Tensor:
    """All monomials of degree 0..degree of the last axis, packed: [..., d] -> [..., M], one multiplication each.

    Differentiable. For long runs of tokens, where the layout matters, see `moments`.
    """
    head_dim = x.shape[-1]
    _check(head_dim, degree)
    parts = [torch.ones_like(x[..., :1])]
    if degree >= 1:
        parts.append(x)
    for p in range(2, degree + 1):
        suffixes, firsts = _gather_indices(head_dim, p, x.device)
        parts.append(parts[-1].index_select(-1, suffixes) * x.index_select(-1, firsts))
    return torch.cat(parts, dim=-1)


def check_degree(head_dim: int, degree: int) -> None:
    """Refuse a degree that no attention is computed with: multiplicities, which sum to d^p, must fit into an int64.

    What that is for d = 2 counts for d = 1 too.
    """
    _check(head_dim, degree)
    base = max(2, head_dim)
    if degree > MAX_DEGREE or base**degree >= 2**63:
        highest = max(p for p in range(MAX_DEGREE + 1) if base**p < 2**63)
        expect(False, "degree", f"an int <= {highest} at a head size of {head_dim}", shown(degree))


def _check(head_dim: int, degree: int) -> None:
    expect_int("head_dim", head_dim, 1)
    expect_int("degree", degree, 0)
