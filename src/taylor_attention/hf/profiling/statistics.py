"""What a profile says of a head: spreads of scores, where the weight is, errors of cheaper ways, bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.cost import cache_size, state_size
from ..settings import HeadSettings
from .scores import READINGS, TOPS, Sums

LEVELS = (0.1, 0.01)
"""Relative errors of an output for which the needed degree is told."""

KINDS = ("pure Taylor", "hybrid", "softmax")

_PURE = (("taylor", (0, 2, 4, 6, 8)), ("fitted", (1, 2, 4, 6, 8)))
_FAR = (("fitted", (1, 2)), ("taylor", (2,)))
"""Readings and degrees that are recommended, whose normaliser is positive whatever the scores are."""

HEAVY_FAR: tuple[tuple[int | None, str], ...] = ((None, "taylor"), (1, "fitted"))
"""Degrees and readings that are tried for far keys where there are heavy tokens."""


@dataclass(frozen=True)
class Spread:
    """How a query's scores lie, averaged over queries.

    Attributes:
        square: their root mean square about 0; std: standard deviation about the query's own mean; mean: its size.
        centred_square, centred_mean: the same after the head's mean key was taken off all keys; std does not change.
    """

    square: float
    std: float
    mean: float
    centred_square: float
    centred_mean: float


@dataclass(frozen=True)
class Weight:
    """Where softmax's weight is: shares of all, by window where they depend on it.

    Attributes:
        sinks: on the first tokens.
        window: on the latest that are no sinks; far: on all others.
        top: which share of the far weight is on the 16, and 64, far keys of most weight of each query.
    """

    sinks: float
    window: Mapping[int, float]
    far: Mapping[int, float]
    top: Mapping[int, Mapping[int, float]]


@dataclass(frozen=True)
class Errors:
    """Relative errors ||y - softmax|| / ||softmax|| over all queries; NaN: a normaliser was not safely positive.

    Of heads that share keys and values: the root mean square of the heads' errors.

    Attributes:
        pure: of polynomials of degree 0, 1, ... for all keys, by reading.
        dropped: of sinks and a window alone, by window.
        heavy: of sinks, a window and as many heavy tokens, by window: far keys dropped, and fitted to degree 1.
        far: of sinks, a window and polynomials of degree 0, 1, ... for the others, by reading and window.
    """

    pure: Mapping[str, Sequence[float]]
    dropped: Mapping[int, float]
    heavy: Mapping[int, Sequence[float]]
    far: Mapping[str, Mapping[int, Sequence[float]]]

    def degree_for(self, reading: str, level: float) -> int | None:
        """The smallest degree of a pure polynomial with at most such an error; None: none that was tried."""
        return next((degree for degree, error in enumerate(self.pure.get(reading, ())) if error <= level), None)

    def window_for(self, level: float) -> int | None:
        """The smallest window that has with sinks, and nothing else, at most such an error; None: none tried."""
        return next((window for window, error in sorted(self.dropped.items()) if error <= level), None)


@dataclass(frozen=True)
class Head:
    """The profile of a query head, or of a key/value head: of all query heads that share it."""

    spread: Spread
    weight: Weight
    errors: Errors

    @classmethod
    def of_group(cls, sums: Sums, windows: Sequence[int]) -> Head:
        """Make it of sums over queries of heads that share keys and values, [G, ...] each.

        Errors are root mean squares of the heads' own, so that a head of small outputs counts as much as its neighbour.
        """
        size = sums["output"]
        own = {name: each / size.view(-1, *[1] * (each.ndim - 1)) for name, each in sums.items() if _is_error(name)}
        return cls.from_sums({name: each.sum(0) for name, each in (sums | own).items()}, windows)

    @classmethod
    def from_sums(cls, sums: Sums, windows: Sequence[int]) -> Head:
        """Make it of sums over queries, [...] each."""
        queries = float(sums["queries"])
        roots = ("square", "variance", "centred_square")
        mean = {name: float(sums[name]) / queries for name in (*roots, "mean", "centred_mean", "sinks")}
        mean |= {name: math.sqrt(mean[name]) for name in roots}
        spread = Spread(mean["square"], mean["variance"], mean["mean"], mean["centred_square"], mean["centred_mean"])
        far = dict(zip(windows, (sums["far"] / queries).tolist(), strict=True))
        tops = (sums["tops"] / sums["far"][:, None].clamp(min=torch.finfo(torch.float64).tiny)).tolist()
        top = {window: dict(zip(TOPS, each, strict=True)) for window, each in zip(windows, tops, strict=True)}
        window = {each: 1 - mean["sinks"] - share for each, share in far.items()}
        return cls(spread, Weight(mean["sinks"], window, far, top), _errors(sums, windows))

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, with what is needed for 10% and for 1% (None: more than was tried)."""
        needed = {
            f"{level:.0%}": {
                "window": self.errors.window_for(level),
                "degree": {reading: self.errors.degree_for(reading, level) for reading in READINGS},
            }
            for level in LEVELS
        }
        return {**_rounded(asdict(self)), "needed": needed}


def _is_error(name: str) -> bool:
    """Whether a sum is of squared outputs, or of squared distances from them."""
    return name in ("output", "dropped", "heavy") or name.startswith(("pure_", "far_"))


def _errors(sums: Sums, windows: Sequence[int]) -> Errors:
    def relative(name: str) -> Any:
        return (sums[name] / sums["output"]).sqrt().tolist()

    def by_window(name: str, windows: Sequence[int] = windows) -> dict[int, Any]:
        return dict(zip(windows, relative(name), strict=False)) if name in sums else {}

    pure = {reading: relative(f"pure_{reading}") for reading in READINGS if f"pure_{reading}" in sums}
    far = {reading: by_window(f"far_{reading}") for reading in READINGS if f"far_{reading}" in sums}
    return Errors(pure, by_window("dropped"), by_window("heavy", [each for each in windows if each]), far)


@dataclass(frozen=True)
class Choice:
    """One way for a key/value head: what it keeps, the bytes of that for one sequence, its relative error."""

    settings: HeadSettings
    nbytes: int
    error: float

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        if self.settings.is_softmax:
            return KINDS[2]
        return KINDS[1 if self.settings.window or self.settings.sinks else 0]


@dataclass(frozen=True)
class Profile:
    """The profile of a model on a text.

    Attributes:
        tokens: of one sequence; sequences: how many; queries: of each head in all.
        causal: whether a query sees no later key.
        kv_heads: of a layer. head_dim, value_dim: entries of a key, of a value.
        dtype: of keys and values.
        sinks: first tokens that were attended to exactly beside windows.
        heads: by (layer, query head). shared: by (layer, key/value head), over its query heads.
        centres: the mean key of each key/value head, [kv_heads, head_dim] for each layer.
    """

    tokens: int
    sequences: int
    queries: int
    causal: bool
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    sinks: int
    heads: Mapping[tuple[int, int], Head]
    shared: Mapping[tuple[int, int], Head]
    centres: Sequence[Tensor]

    @property
    def layers(self) -> list[int]:
        """The layers by number."""
        return sorted({layer for layer, _ in self.shared})

    @property
    def middle_window(self) -> int:
        """The window that tables and figures tell of: the longest up to an eighth of the text, if one is so short."""
        windows = sorted(next(iter(self.shared.values())).weight.far)
        return max([window for window in windows if 8 * window <= self.tokens], default=0)

    @property
    def cache_bytes(self) -> int:
        """Of one key/value head's keys and values of one sequence."""
        return cache_size(self.tokens, self.head_dim, value_dim=self.value_dim) * self.dtype.itemsize

    def choices(self, place: tuple[int, int], *, centred: bool = False) -> list[Choice]:
        """What a key/value head could keep in fewer bytes than all keys and values, and these; fewest bytes first.

        centred: the mean key is taken off all keys.
        """
        errors = self.shared[place].errors
        # Only a causal state can read its scores by a fit.
        pure = _PURE if self.causal else _PURE[:1]
        found = [(HeadSettings(0, 0, 0, *each), error) for each, error in _read(errors.pure, pure, centred)]
        for window, error in errors.dropped.items():
            if window or self.sinks:
                found.append((HeadSettings(window, self.sinks, 0, None), error))
            own = {reading: each[window] for reading, each in errors.far.items()}
            found += [(HeadSettings(window, self.sinks, 0, *each), error) for each, error in _read(own, _FAR, centred)]
        for window, each in errors.heavy.items():
            pairs = zip(HEAVY_FAR, each, strict=True)
            found += [(HeadSettings(window, self.sinks, window, *far), error) for far, error in pairs]
        cheaper = [self._choice(settings, error) for settings, error in found if self._could_be_cheaper(settings)]
        cheaper = [each for each in cheaper if each.nbytes < self.cache_bytes and not math.isnan(each.error)]
        return sorted(
            [*cheaper, self._choice(HeadSettings(window=None), 0.0)], key=lambda each: (each.nbytes, each.error)
        )

    def _choice(self, settings: HeadSettings, error: float) -> Choice:
        return Choice(settings, settings.nbytes(self.tokens, self.head_dim, self.value_dim, self.dtype), error)

    def _could_be_cheaper(self, settings: HeadSettings) -> bool:
        """Without making a state, which is refused where it is huge: it holds float32 numbers at least."""
        least = state_size(self.head_dim, value_dim=self.value_dim, **settings.layout) * torch.float32.itemsize
        return least < self.cache_bytes

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; heads are in lists with their places."""
        facts = ("tokens", "sequences", "queries", "causal", "kv_heads", "head_dim", "value_dim", "sinks")
        found: dict[str, Any] = {name: getattr(self, name) for name in facts}
        found["dtype"] = str(self.dtype).removeprefix("torch.")
        found["cache_bytes"] = self.cache_bytes
        for name in ("heads", "shared"):
            rows = getattr(self, name).items()
            found[name] = [{"layer": layer, "head": head, **each.to_dict()} for (layer, head), each in rows]
        return found


def _read(
    errors: Mapping[str, Sequence[float]], degrees: Sequence[tuple[str, Sequence[int]]], centred: bool
) -> list[tuple[tuple[int, str], float]]:
    """((degree, reading), error) of some degrees of some readings. A fit is the same with centred keys."""
    if not errors:
        return []
    by = {reading: errors["centred" if centred and reading == "taylor" else reading] for reading, _ in degrees}
    return [((degree, reading), by[reading][degree]) for reading, some in degrees for degree in some]


def _rounded(value: Any) -> Any:
    """Numbers to four digits: a profile has tens of thousands."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
