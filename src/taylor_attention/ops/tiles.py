"""Inside a chunk: the polynomial on the scores, tile by tile, and its backward.

Layout: batch and key/value heads together, tokens last: q [n, d, g, T], k [n, d, T], u = [v, 1] [n, E, T], where the g
query heads of a group stand side by side and share everything else. A tile has keys as rows and queries as columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.basis import feature_count, reading_weights
from ..core.state import wide_dtype
from .tiling import Tiling


class Decay:
    """Cumulative log decay L of one run of tokens, kept as high + low part: differences are exact to rounding."""

    def __init__(self, log_decay: Tensor) -> None:
        total = log_decay.to(wide_dtype(log_decay.device)).cumsum(-1)  # [n, T]
        self.high = total.to(log_decay.dtype)
        self.low = (total - self.high).to(log_decay.dtype)
        self.from_start = total.exp().to(log_decay.dtype)[:, None]  # [n, 1, T]
        self.to_end = (total[:, -1:] - total).exp().to(log_decay.dtype)[:, None]  # [n, 1, T]
        self.whole = total[:, -1:, None].exp()  # [n, 1, 1], wide: it multiplies sums again and again

    def between(self, keys: slice, queries: slice) -> Tensor:
        """exp(L_i - L_j) for keys j (rows) and queries i (columns), [n, keys, queries]; 1 where j > i, hidden later."""
        high = self.high[:, None, queries] - self.high[:, keys, None]
        low = self.low[:, None, queries] - self.low[:, keys, None]
        return (high + low).clamp_(max=0).exp_()


@dataclass(frozen=True)
class Run:
    """Some rows (batch x key/value heads) of one problem, in the inside layout."""

    q: Tensor  # [n, d, g, Tq]
    k: Tensor  # [n, d, Tk]
    u: Tensor  # [n, E, Tk]
    log_decay: Tensor | None  # [n, T]
    coefficients: tuple[float, ...]
    tiling: Tiling
    started: bool  # there are moments at the start
    keep: bool  # the moments at the end are wanted

    @property
    def degree(self) -> int:
        """Highest power of the scores."""
        return len(self.coefficients) - 1

    @property
    def group(self) -> int:
        """Query heads per key/value head, g."""
        return self.q.shape[2]

    @property
    def weights(self) -> Tensor:
        """Reading weights c_p C_p, [M]."""
        return reading_weights(self.k.shape[1], self.coefficients, self.k.dtype, self.k.device)

    def chunks(self, length: int) -> list[slice]:
        """The chunks of a run of tokens."""
        return [slice(a, min(a + self.tiling.chunk, length)) for a in range(0, length, self.tiling.chunk)]

    def decay(self, part: slice) -> Decay | None:
        """The decay within a part, counted from its start."""
        return None if self.log_decay is None else Decay(self.log_decay[:, part])

    def zeros(self) -> Tensor:
        """Empty moments, [n, E, M]."""
        return self.k.new_zeros(self.k.shape[0], self.u.shape[1], feature_count(self.k.shape[1], self.degree))

    def queries(self, part: slice, source: Tensor | None = None) -> Tensor:
        """Queries (or what has their shape) of a part, heads of a group side by side: [n, d, g * C]."""
        return (self.q if source is None else source)[..., part].flatten(2)


def polynomial(scores: Tensor, coefficients: Sequence[float]) -> Tensor:
    """f(s) by Horner's rule."""
    if len(coefficients) == 1:
        return torch.full_like(scores, coefficients[0])
    value = scores * coefficients[-1]
    for coefficient in reversed(coefficients[1:-1]):
        value.add_(coefficient).mul_(scores)
    return value.add_(coefficients[0])


def _tiles(run: Run, part: slice, causal: bool) -> Iterator[tuple[slice, slice, Tensor | None, Tensor | None]]:
    """Tiles of the score matrix of a chunk: (keys, queries, hidden [.., tq, tq] for the last keys, decay factors)."""
    length = part.stop - part.start
    decay = run.decay(part) if causal else None
    for a in range(0, length, run.tiling.rows):
        b = min(a + run.tiling.rows, length)
        keys = slice(0, b) if causal else slice(0, run.k.shape[2])
        factors = None if decay is None else decay.between(keys, slice(a, b)).unsqueeze(2)  # [n, keys, 1, tq]
        hidden = torch.ones(b - a, b - a, dtype=torch.bool, device=run.k.device).tril(-1) if causal else None
        yield _shift(keys, part.start if causal else 0), slice(a + part.start, b + part.start), hidden, factors


def _shift(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def _scores(run: Run, keys: slice, queries: slice) -> Tensor:
    """q . k for a tile: [n, keys, g * tq]."""
    return torch.bmm(run.k[:, :, keys].transpose(1, 2), run.queries(queries))


def _mask_(values: Tensor, group: int, hidden: Tensor | None, factors: Tensor | None) -> Tensor:
    """Apply decay factors and put zeros where a key comes after the query; values [n, keys, g * tq], in place."""
    tile = values.unflatten(2, (group, -1))
    if factors is not None:
        tile.mul_(factors)
    if hidden is not None:
        tile[:, -hidden.shape[0] :].masked_fill_(hidden[:, None, :], 0)
    return values


def attend_within(run: Run, part: slice, causal: bool, out: Tensor) -> None:
    """Add to out [n, E, g, Tq] what the queries of a part get from the keys of the same chunk (or all, not causal)."""
    for keys, queries, hidden, factors in _tiles(run, part, causal):
        weights = _mask_(polynomial(_scores(run, keys, queries), run.coefficients), run.group, hidden, factors)
        out[..., queries] += torch.bmm(run.u[:, :, keys], weights).unflatten(2, (run.group, -1))


def attend_within_backward(
    run: Run, part: slice, causal: bool, grad: Tensor, grads: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Add the gradients of `attend_within` to those of q, k, u; grad has out's shape."""
    dq, dk, du = grads
    slope = tuple(p * c for p, c in enumerate(run.coefficients))[1:] or (0.0,)
    for keys, queries, hidden, factors in _tiles(run, part, causal):
        scores, by_out = _scores(run, keys, queries), run.queries(queries, grad)
        weights = _mask_(polynomial(scores, run.coefficients), run.group, hidden, factors)
        du[:, :, keys] += torch.bmm(by_out, weights.transpose(1, 2))
        by_score = _mask_(polynomial(scores, slope), run.group, hidden, factors)
        by_score *= torch.bmm(run.u[:, :, keys].transpose(1, 2), by_out)
        dq[..., queries] += torch.bmm(run.k[:, :, keys], by_score).unflatten(2, (run.group, -1))
        dk[:, :, keys] += torch.bmm(run.queries(queries), by_score.transpose(1, 2))
