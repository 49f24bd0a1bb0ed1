"""Moments of keys and values, and how queries read them: the three products that the method consists of.

With Phi the packed monomials (see `basis`) and rows u_t = [v_t, 1] of E = value_dim + 1 entries:

    accumulate_   T[e, r] += sum_t u[e, t] Phi_r(x_t)          raw moments: no series coefficient in them
    read          y[e, t]  = sum_r T[e, r] Phi_r(x_t)          T times the reading weights c_p C_p gives [N, Z]
    read_slope    the same, and d/dx_t of sum_e u[e, t] y[e, t]

`read` and `accumulate_` are adjoint, so these three are also all that the backward pass needs. Layout: tokens last,
x [n, d, C], u [n, E, C], moments [n, E, M]: the value axis as rows is the fast orientation of these GEMMs, and a
monomial is one contiguous run over tokens. Batched GEMMs write contiguous results that are added where they belong:
into a slice PyTorch would compute them one by one. Most monomials of the highest degree are never formed: their block
with first index i is x_i times a suffix of the degree below, so the GEMM runs on the suffix and x_i scales its small
side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .basis import Block, blocks, feature_count

_TAIL = 512
"""Monomials of the highest degree that are formed all the same: their blocks are too small for a GEMM each."""


@dataclass(frozen=True)
class _Split:
    """How the packed axis is computed: rows that are formed, and blocks of the highest degree that are not."""

    spans: tuple[tuple[slice, slice], ...]  # (rows of the packed axis, the same rows in the formed features)
    blocks: tuple[Block, ...]
    formed_blocks: tuple[tuple[Block, slice], ...]  # those that are formed, lowest degree first, and their rows there
    rows: int


@lru_cache(maxsize=256)
def _split(head_dim: int, degree: int) -> _Split:
    count = feature_count(head_dim, degree)
    if degree <= 1:
        return _Split(((slice(0, count), slice(0, count)),), (), (), count)
    top = blocks(head_dim, degree)
    first = next(i for i, block in enumerate(top) if count - block.start <= _TAIL)
    lower, tail = feature_count(head_dim, degree - 1), count - top[first].start
    spans = [(slice(0, lower), slice(0, lower)), (slice(count - tail, count), slice(lower, lower + tail))]
    if first == 0:
        spans = [(slice(0, count), slice(0, count))]
    below = [(b, slice(b.start, b.stop)) for p in range(2, degree) for b in blocks(head_dim, p)]
    shift = lower + tail - count
    last = [(b, slice(b.start + shift, b.stop + shift)) for b in top[first:]]
    return _Split(tuple(spans), top[:first], (*below, *last), lower + tail)


def formed_count(head_dim: int, degree: int) -> int:
    """Number of monomials that are formed per token; the rest of the M exist only inside GEMMs."""
    return _split(head_dim, degree).rows


def _suffix(block: Block) -> slice:
    return slice(block.suffix, block.suffix + block.stop - block.start)


def _form(x: Tensor, degree: int) -> Tensor:
    """The formed monomials with tokens last: [n, d, C] -> [n, rows, C]."""
    n, head_dim, length = x.shape
    features = x.new_empty(n, _split(head_dim, degree).rows, length)
    features[:, :1] = 1
    if degree >= 1:
        features[:, 1 : 1 + head_dim] = x
    for b, rows in _split(head_dim, degree).formed_blocks:
        torch.mul(features[:, _suffix(b)], x[:, b.index : b.index + 1], out=features[:, rows])
    return features


def accumulate_(moments: Tensor, x: Tensor, u: Tensor, degree: int) -> None:
    """Add sum_t u[:, t] Phi(x_t) to moments [n, E, M] in place, for x [n, d, C] and u [n, E, C]."""
    split, features = _split(x.shape[1], degree), _form(x, degree)
    for packed, formed in split.spans:
        moments[:, :, packed] += torch.bmm(u, features[:, formed].transpose(1, 2))
    for b in split.blocks:
        scaled = u * x[:, b.index : b.index + 1]
        moments[:, :, b.start : b.stop] += torch.bmm(scaled, features[:, _suffix(b)].transpose(1, 2))


def read(x: Tensor, moments: Tensor, degree: int) -> Tensor:
    """sum_r moments[:, r] Phi_r(x_t): x [n, d, C], moments [n, E, M] -> [n, E, C]."""
    split, features = _split(x.shape[1], degree), _form(x, degree)
    out = _read_formed(moments, features, split)
    for b in split.blocks:
        part = torch.bmm(moments[:, :, b.start : b.stop], features[:, _suffix(b)])
        out.addcmul_(part, x[:, b.index : b.index + 1])
    return out


def _read_formed(moments: Tensor, features: Tensor, split: _Split) -> Tensor:
    out = torch.bmm(moments[:, :, split.spans[0][0]], features[:, split.spans[0][1]])
    for packed, formed in split.spans[1:]:
        out.baddbmm_(moments[:, :, packed], features[:, formed])
    return out


def read_slope(x: Tensor, moments: Tensor, u: Tensor, degree: int) -> tuple[Tensor, Tensor]:
    """`read(x, moments)` [n, E, C], and the gradient of its product with u [n, E, C] by x, [n, d, C]."""
    split, features = _split(x.shape[1], degree), _form(x, degree)
    out = _read_formed(moments, features, split)
    slopes = torch.empty_like(features)  # by each formed monomial
    for packed, formed in split.spans:
        slopes[:, formed] = torch.bmm(moments[:, :, packed].transpose(1, 2), u)
    slope = torch.zeros_like(x)
    for b in split.blocks:
        block, x_i = moments[:, :, b.start : b.stop], x[:, b.index : b.index + 1]
        part = torch.bmm(block, features[:, _suffix(b)])
        out.addcmul_(part, x_i)
        slope[:, b.index] += (part * u).sum(1)
        slopes[:, _suffix(b)] += torch.bmm(block.transpose(1, 2), u * x_i)
    for b, rows in reversed(split.formed_blocks):
        slope[:, b.index] += (slopes[:, rows] * features[:, _suffix(b)]).sum(1)
        slopes[:, _suffix(b)].addcmul_(slopes[:, rows], x[:, b.index : b.index + 1])
    if degree >= 1:
        slope += slopes[:, 1 : 1 + x.shape[1]]
    return out, slope


def add_compensated(sums: Tensor, compensation: Tensor, increment: Tensor) -> tuple[Tensor, Tensor]:
    """sums + compensation + increment, as new sums and new compensation, which keeps what rounding drops (two-sum).

    The error of a sum of any number of increments stays near one rounding of the result instead of growing with it,
    so that counters do not stick and slow drifts do not build up. Differentiable through the sums.
    """
    total = sums + increment
    with torch.no_grad():
        virtual = total - sums
        dropped = (sums - (total - virtual)) + (increment - virtual) + compensation
    carried = total + dropped  # what has gathered in the compensation may have grown large enough to count
    with torch.no_grad():
        dropped = dropped - (carried - total)
    return carried, dropped


def add_compensated_(sums: Tensor, compensation: Tensor, increment: Tensor) -> None:
    """`add_compensated` in place, on contiguous tensors; in blocks, so that its passes stay in the caches."""
    for total, dropped, part in zip(
        *(tensor.view(-1).split(_BLOCK) for tensor in (sums, compensation, increment)), strict=True
    ):
        new_total, new_dropped = add_compensated(total, dropped, part)
        total.copy_(new_total)
        dropped.copy_(new_dropped)


def fade(sums: Tensor, compensation: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """sums and compensation [..., E, M] times factor [..., 1, 1], as new ones that keep what rounding drops.

    The factor is float64 where the device has it. In float32 one that is near 1 would be wrong by a part of what fades,
    chunk after chunk to the same side. Differentiable through the sums and the factor.
    """
    exact = sums.to(factor.dtype) * factor
    faded = exact.to(sums.dtype)
    with torch.no_grad():
        dropped = (exact - faded.to(factor.dtype)) + compensation.to(factor.dtype) * factor
    return faded, dropped.to(sums.dtype)


_BLOCK = 2**16
"""Elements of a block: a few of them fit in a core's own cache."""


class RunningMoments:
    """The moments of a sequence while it is processed chunk by chunk: compensated sums and a recent part.

    Chunks add to the recent part by GEMM alone; every `_SPAN` chunks it is settled into the compensated sums.
    """

    _SPAN = 16

    def __init__(self, sums: Tensor, compensation: Tensor, degree: int) -> None:
        """Continue from sums and compensation [n, E, M], contiguous, which are changed in place."""
        self.sums, self.compensation, self.degree = sums, compensation, degree
        self._recent = torch.zeros_like(sums)
        self._weighted = torch.empty_like(sums)
        self._pending = 0
        self._faded: Tensor | None = None  # by which the compensated sums are still to be multiplied

    def decay_(self, factor: Tensor) -> None:
        """Multiply everything by factor [n, 1, 1], as for `fade`."""
        self._recent.mul_(factor.to(self._recent.dtype))
        self._faded = factor if self._faded is None else self._faded * factor

    def accumulate_(self, x: Tensor, u: Tensor) -> None:
        """Add the tokens x [n, d, C] with u [n, E, C]."""
        accumulate_(self._recent, x, u, self.degree)
        self._pending += 1
        if self._pending == self._SPAN:
            self.settle_()

    def weighted(self, weights: Tensor) -> Tensor:
        """The moments so far times weights [M], as [n, E, M]; good until the next call."""
        if self._faded is None:
            total = torch.add(self.sums, self._recent, out=self._weighted)
        else:
            total = torch.addcmul(self._recent, self.sums, self._faded.to(self.sums.dtype), out=self._weighted)
        return total.mul_(weights)

    def settle_(self) -> None:
        """Move the recent part into the compensated sums."""
        if self._faded is not None:
            faded, dropped = fade(self.sums, self.compensation, self._faded)
            self.sums.copy_(faded)
            self.compensation.copy_(dropped)
            self._faded = None
        if self._pending:
            add_compensated_(self.sums, self.compensation, self._recent)
            self._recent.zero_()
            self._pending = 0
