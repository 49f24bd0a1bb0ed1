"""What softmax does with some queries' scores, and how far from it each cheaper way comes: sums over the queries.

All sums of one query head can be added to those of another, or of another text. Polynomials are read as the library
reads them: through the powers of the far scores, P_p = sum_j s_j^p [v_j, 1] (see `ops.reading`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.series import EXP
from ...ops.normaliser import divide, divide_checked, watch_normalisers
from ...ops.reading import fit, join

READINGS = ("taylor", "centred", "fitted")
"""Ways to read far scores: by exp's series, by it after the mean key was taken off all keys, fitted to each query."""

PURE_DEGREE, FAR_DEGREE = 8, 4
"""Highest degrees that are tried: of all keys, and of the far ones beside a window."""

TOPS = (16, 64)
"""How many of the far keys of most weight are summed."""

WAYS = ("pure", "far", "heavy")
"""What is tried beside sinks and windows alone: polynomials of all keys, of the far ones, and heavy tokens."""

Sums = dict[str, Tensor]
"""Sums over queries by name, [G, ...] of G query heads."""

Polynomial = tuple[Tensor, Tensor]
"""[N | Z] but for a factor, [G, n, E], and the factor's logarithm, [G, n]."""


@dataclass(frozen=True)
class Sample:
    """Some queries of the G query heads that share a key/value head, and all keys.

    Attributes:
        query: [G, n, d]; key: [T, d]; value: [T, dv]; of one dtype, in which everything is computed.
        scale: factor on q . k.
        visible: bool [n, T], which keys a query sees.
        age: int [n, T], how many tokens ago each key came; negative: later.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    visible: Tensor
    age: Tensor

    @property
    def columns(self) -> Tensor:
        """Values and ones, [T, dv + 1]."""
        return torch.cat([self.value, torch.ones_like(self.value[:, :1])], 1)

    def sinks(self, count: int) -> Tensor:
        """The first keys, as far as a query sees them, bool [n, T]."""
        return self.visible & (torch.arange(len(self.key), device=self.key.device) < count)

    def parts(self, sinks: int, windows: Sequence[int]) -> list[Part]:
        """All keys but the sinks by age: those that each window lacks of the next one, and what the last one lacks.

        windows: rising, the first 0. Later keys, where a query sees them, are as those beyond the last window.
        """
        others, found = self.visible & ~self.sinks(sinks), []
        age = self.age.masked_fill(self.age < 0, len(self.key))
        for low, high in zip(windows, (*windows[1:], len(self.key) + 1), strict=True):
            mask = others & (age >= low) & (age < high)
            some = mask.any(0).nonzero()
            keys = slice(int(some[0]), int(some[-1]) + 1) if len(some) else slice(0)
            found.append(Part(keys, mask[:, keys]))
        return found


@dataclass(frozen=True)
class Part:
    """Some of the keys of a sample: a slice, and which of it each query has, bool [n, of the slice]."""

    keys: slice
    mask: Tensor

    def of(self, x: Tensor) -> Tensor:
        """Those of x [G, n, T], 0 elsewhere."""
        return x[..., self.keys] * self.mask


@torch.no_grad()
def measure(
    sample: Sample, *, sinks: int, windows: Sequence[int], near: bool, ways: Collection[str] = WAYS
) -> tuple[Sums, Tensor]:
    """The sums of a sample, and softmax's output [G, n, dv].

    Args:
        sinks: first tokens that are told apart, and attended to exactly.
        windows: how many latest ones are, each in turn.
        near: whether errors with sinks and windows are wanted, or of pure polynomials alone.
        ways: of `WAYS`, what else errors are wanted of.
    """
    scores = sample.scale * (sample.query @ sample.key.mT)  # [G, n, T]
    shift = sample.scale * (sample.query @ sample.key.mean(0))  # [G, n], what the mean key adds to a query's scores
    weights = scores.masked_fill(~sample.visible, -torch.inf).softmax(-1)
    output = weights @ sample.value
    parts = sample.parts(sinks, windows)
    found = _spreads(scores, shift, sample.visible) | _weights(weights, sample, sinks, parts)
    with watch_normalisers():  # queries without a safe normaliser are rows of NaN, and show as errors of NaN
        errors = [_pure(scores, shift, sample)] if "pure" in ways else []
        errors += [_near(scores, shift, weights, sample, sinks, parts, far="far" in ways)] if near else []
    for each in errors:
        found |= {name: error_sums(outputs, output) for name, outputs in each.items()}
    return found | {"output": _squared(output)}, output


def error_sums(outputs: Tensor, exact: Tensor) -> Tensor:
    """Squared distances of outputs [G, ..., n, dv] from the exact ones [G, n, dv], [G, ...]."""
    between = outputs.ndim - exact.ndim
    return _squared(outputs - exact.reshape(len(exact), *[1] * between, *exact.shape[1:]))


def _squared(x: Tensor) -> Tensor:
    return x.square().sum((-1, -2))


def _spreads(scores: Tensor, shift: Tensor, visible: Tensor) -> Sums:
    """Of the scores that a query sees: mean square, size of the mean, variance; and without the mean key."""
    count = visible.sum(-1)
    mean = scores.masked_fill(~visible, 0).sum(-1) / count
    variance = (scores - mean[..., None]).masked_fill(~visible, 0).square().sum(-1) / count
    centred = mean - shift
    return {
        "queries": torch.full_like(mean[:, 0], mean.shape[1]),
        "square": (mean.square() + variance).sum(-1),
        "mean": mean.abs().sum(-1),
        "variance": variance.sum(-1),
        "centred_square": (centred.square() + variance).sum(-1),
        "centred_mean": centred.abs().sum(-1),
    }


def _weights(weights: Tensor, sample: Sample, sinks: int, parts: Sequence[Part]) -> Sums:
    """Softmax's weight on sinks, and for each window on the keys beyond it, and on the top ones of these."""
    first = weights.masked_fill(~sample.sinks(sinks), 0).sum((-1, -2))
    far, tops = [], []
    total, largest = torch.zeros_like(first), weights.new_zeros(*weights.shape[:2], max(TOPS))
    for part in reversed(parts):
        own = part.of(weights)
        total = total + own.sum((-1, -2))
        largest = torch.cat([largest, own.topk(min(max(TOPS), own.shape[-1])).values], -1).topk(max(TOPS)).values
        far.append(total)
        tops.append(torch.stack([largest[..., :top].sum((-1, -2)) for top in TOPS], -1))
    return {"sinks": first, "far": torch.stack(far[::-1], -1), "tops": torch.stack(tops[::-1], -2)}


def _pure(scores: Tensor, shift: Tensor, sample: Sample) -> dict[str, Tensor]:
    """Outputs of polynomials of degree 0, 1, ... for all keys, [G, PURE_DEGREE + 1, n, dv], by reading."""
    count = sample.visible.sum(-1).to(scores.dtype).expand(scores.shape[:2])
    given = sample.visible, sample.columns, PURE_DEGREE
    polynomials = _polynomials(_powers(scores, *given), _powers(scores - shift[..., None], *given))
    return {
        f"pure_{name}": torch.stack([divide_checked(out, count, 1.0) for out, _ in each], 1)
        for name, each in polynomials.items()
    }


def _near(
    scores: Tensor, shift: Tensor, weights: Tensor, sample: Sample, sinks: int, parts: Sequence[Part], *, far: bool
) -> dict[str, Tensor]:
    """Outputs with exact sinks and windows, far keys dropped [G, W, n, dv] or read [G, W, FAR_DEGREE + 1, n, dv]."""
    columns, found = sample.columns, []
    near = weights[..., :sinks] * sample.visible[:, :sinks] @ columns[:sinks]
    for part in parts:  # the window is all parts before this one
        found.append(near)
        near = near + part.of(weights) @ columns[part.keys]
    outputs = {"dropped": torch.stack([divide(near, near[..., -1] == 0) for near in found], 1)}
    if not far:
        return outputs
    top = scores.masked_fill(~sample.visible, -torch.inf).logsumexp(-1)  # of which weights are exp(score - top)
    for name, polynomials in _far(scores, shift, columns, parts).items():
        own = top - shift if name == "centred" else top  # near and far scores are less by the same
        read = [
            torch.stack([divide(out, out[..., -1] == 0) for out in (join(near, own, *each)[0] for each in window)], 1)
            for near, window in zip(found, polynomials, strict=True)
        ]
        outputs[f"far_{name}"] = torch.stack(read, 1)
    return outputs


def _far(scores: Tensor, shift: Tensor, columns: Tensor, parts: Sequence[Part]) -> dict[str, list[list[Polynomial]]]:
    """What polynomials of degree 0, 1, ... make of the keys beyond each window, by reading."""
    plain, centred = _none(scores, columns), _none(scores, columns)
    found: dict[str, list[list[Polynomial]]] = {name: [] for name in READINGS}
    for part in reversed(parts):
        own = scores[..., part.keys]
        plain = _add(plain, _powers(own, part.mask, columns[part.keys], FAR_DEGREE))
        centred = _add(centred, _powers(own - shift[..., None], part.mask, columns[part.keys], FAR_DEGREE))
        for name, each in _polynomials(plain, centred).items():
            found[name].insert(0, each)
    return found


def _none(scores: Tensor, columns: Tensor) -> list[Tensor]:
    return [scores.new_zeros(*scores.shape[:2], columns.shape[1])] * (FAR_DEGREE + 1)


def _add(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(one, other, strict=True)]


def _polynomials(powers: Sequence[Tensor], centred: Sequence[Tensor]) -> dict[str, list[Polynomial]]:
    """What polynomials of degree 0, 1, ... make of powers, and of those about the mean key's score, by reading."""
    return {
        "taylor": _taylor(powers),
        "centred": _taylor(centred),
        "fitted": [fit(powers[: highest + 1]) for highest in range(len(powers))],
    }


def _powers(scores: Tensor, some: Tensor, columns: Tensor, degree: int) -> list[Tensor]:
    """P_0 .. P_D of some keys, bool [n, T], [G, n, E] each."""
    power = some.to(scores.dtype).expand_as(scores)
    found = [power @ columns]
    for _ in range(degree):
        power = power * scores
        found.append(power @ columns)
    return found


def _taylor(powers: Sequence[Tensor]) -> list[Polynomial]:
    """exp's series cut at each degree."""
    total, found = torch.zeros_like(powers[0]), []
    for coefficient, power in zip(EXP.coefficients(len(powers) - 1), powers, strict=True):
        total = total + coefficient * power
        found.append((total, torch.zeros_like(total[..., 0])))
    return found
