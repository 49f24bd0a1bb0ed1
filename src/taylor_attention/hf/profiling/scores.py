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

    def near(self, sinks: int, window: int) -> Tensor:
        """The first and the latest keys, bool [n, T]."""
        return self.sinks(sinks) | (self.visible & (self.age >= 0) & (self.age < window))


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
    found = _spreads(scores, shift, sample.visible) | _weights(weights, sample, sinks, windows)
    with watch_normalisers():  # queries without a safe normaliser are rows of NaN, and show as errors of NaN
        errors = [_pure(scores, shift, sample)] if "pure" in ways else []
        errors += [_near(scores, shift, sample, sinks, windows, far="far" in ways)] if near else []
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


def _weights(weights: Tensor, sample: Sample, sinks: int, windows: Sequence[int]) -> Sums:
    """Softmax's weight on sinks, and for each window on its other tokens, on the far ones, on the top ones of these."""
    first = weights.masked_fill(~sample.sinks(sinks), 0).sum((-1, -2))
    far, tops = [], []
    for window in windows:
        rest = weights.masked_fill(sample.near(sinks, window), 0)  # [G, n, T]
        largest = rest.topk(min(max(TOPS), rest.shape[-1])).values
        far.append(rest.sum((-1, -2)))
        tops.append(torch.stack([largest[..., :top].sum((-1, -2)) for top in TOPS], -1))
    return {"sinks": first, "far": torch.stack(far, -1), "tops": torch.stack(tops, -2)}


def _pure(scores: Tensor, shift: Tensor, sample: Sample) -> dict[str, Tensor]:
    """Outputs of polynomials of degree 0, 1, ... for all keys, [G, PURE_DEGREE + 1, n, dv], by reading."""
    count = sample.visible.sum(-1).to(scores.dtype).expand(scores.shape[:2])
    polynomials = _polynomials(scores, shift, sample.visible, sample.columns, PURE_DEGREE)
    return {
        f"pure_{name}": torch.stack([divide_checked(out, count, 1.0) for out, _ in each], 1)
        for name, each in polynomials.items()
    }


def _near(
    scores: Tensor, shift: Tensor, sample: Sample, sinks: int, windows: Sequence[int], *, far: bool
) -> dict[str, Tensor]:
    """Outputs with exact sinks and windows, far keys dropped [G, W, n, dv] or read [G, W, FAR_DEGREE + 1, n, dv]."""
    found: dict[str, list[Tensor]] = {}
    for window in windows:
        exact = sample.near(sinks, window)
        near, top = _exact(scores, exact, sample.columns)
        found.setdefault("dropped", []).append(divide(near, near[..., -1] == 0))
        rest = sample.visible & ~exact
        polynomials = _polynomials(scores, shift, rest, sample.columns, FAR_DEGREE) if far else {}
        for name, each in polynomials.items():
            own = top - shift if name == "centred" else top  # near and far scores are less by the same
            outs = [join(near, own, out, factor)[0] for out, factor in each]
            found.setdefault(f"far_{name}", []).append(torch.stack([divide(out, out[..., -1] == 0) for out in outs], 1))
    return {name: torch.stack(each, 1) for name, each in found.items()}


def _exact(scores: Tensor, exact: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """[N | Z] exp(-top) [G, n, E] of some keys' true weights, and top [G, n]."""
    shown = scores.masked_fill(~exact, -torch.inf)
    top = shown.amax(-1)
    top = torch.where(top == -torch.inf, 0, top)
    return (shown - top[..., None]).exp() @ columns, top


def _polynomials(
    scores: Tensor, shift: Tensor, far: Tensor, columns: Tensor, degree: int
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """[N | Z] but for a factor, and its logarithm, of degree 0, 1, ... for the far keys, by reading."""
    powers = _powers(scores, far, columns, degree)
    centred = _powers(scores - shift[..., None], far, columns, degree)
    return {
        "taylor": _taylor(powers),
        "centred": _taylor(centred),
        "fitted": [fit(powers[: highest + 1]) for highest in range(degree + 1)],
    }


def _powers(scores: Tensor, far: Tensor, columns: Tensor, degree: int) -> list[Tensor]:
    """P_0 .. P_D of the far keys, [G, n, E] each."""
    power = far.to(scores.dtype).expand_as(scores)
    found = [power @ columns]
    for _ in range(degree):
        power = power * scores
        found.append(power @ columns)
    return found


def _taylor(powers: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """exp's series cut at each degree."""
    total, found = torch.zeros_like(powers[0]), []
    for coefficient, power in zip(EXP.coefficients(len(powers) - 1), powers, strict=True):
        total = total + coefficient * power
        found.append((total, torch.zeros_like(total[..., 0])))
    return found
