"""Planted needles: how far each way of attending is from softmax where a few keys stand out of a long background.

A stream of random tokens, and a query at its end that scores them all alike (normal, of a mean and a spread), but for a
few keys at one age, the needles, that are higher than that mean by a margin and have values of their own.

All keys have the same norm, and the queries before the last one score needles as they score the background: nothing
gives a needle away before it is asked for. Half of the background's variance of values is a vector that all tokens
of a head share, without which softmax itself would give next to nothing where no token stands out, and every
error would be large beside it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..core.state import State
from ..errors import NormaliserWarning, expect
from ..lm.threads import thread_count
from ..ops.attention import attention
from ..ops.decode import decode_

REACH = 16.0
"""The score of a key that points where the query does; the query's norm, since keys have that of sqrt(head_dim)."""

MAX_TIES = 1024
PIECE = 8192
"""Tokens that are read at a time."""

COMMON = 0.5
"""Part of the variance of background values that all tokens of a head share."""

AT_READING = ("reading", "series")
"""Options of a method that its state does not depend on."""

Options = Mapping[str, Any]


def make_methods(window: int, sinks: int, degrees: Sequence[int], head_dim: int) -> dict[str, dict[str, Any]]:
    """What is compared: names, and the options of `attention` that they stand for. A row here is all that one takes."""
    methods: dict[str, dict[str, Any]] = {}
    for degree in degrees:
        methods[f"taylor {degree}"] = {"degree": degree}
        methods[f"fitted {degree}"] = {"degree": degree, "reading": "fitted"}
    methods["window"] = {"degree": None, "window": window}
    methods["window + sinks"] = {"degree": None, "window": window, "sinks": sinks}
    methods["window + mean"] = {"degree": 0, "window": window}  # of all far values: the least far field there is
    for degree in degrees:
        methods[f"window + taylor {degree}"] = {"degree": degree, "window": window}
        methods[f"window + fitted {degree}"] = {"degree": degree, "window": window, "reading": "fitted"}
        wide = window_of_bytes(state_bytes(methods[f"window + taylor {degree}"], head_dim), head_dim)
        methods[f"wide window {degree}"] = {"degree": None, "window": wide}  # the same bytes, spent on a window alone
    return methods


def state_options(options: Options) -> dict[str, Any]:
    """Those of a method's options that its state depends on."""
    return {name: value for name, value in options.items() if name not in AT_READING}


def state_bytes(options: Options, head_dim: int) -> int:
    """Bytes of the state of one sequence and head."""
    return State.zeros(1, 1, head_dim, head_dim, **state_options(options), device="meta").nbytes


def window_of_bytes(nbytes: int, head_dim: int) -> int:
    """The longest window whose state, without anything else, takes no more bytes than these."""
    one, two = (state_bytes({"degree": None, "window": window}, head_dim) for window in (1, 2))
    return max(1, 1 + (nbytes - one) // (two - one))


@dataclass(frozen=True)
class Settings:
    """What holds for a whole run, and must agree before its results are taken up again.

    Attributes:
        methods: by name, the options of `attention` (see `make_methods`).
        length: tokens, the query's own included. head_dim: of keys and values.
        heads, seeds: streams that an error is measured on, heads of a sequence times sequences. seed: of the first.
        spread, mean: of the background's scores.
        threads: of PyTorch. backend: as `attention` takes it. version: of this package.
    """

    methods: dict[str, dict[str, Any]]
    length: int = 102_400
    head_dim: int = 16
    heads: int = 4
    seeds: int = 4
    seed: int = 0
    spread: float = 0.5
    mean: float = 0.0
    threads: int = 1
    backend: str = "auto"
    version: str = __version__


@dataclass(frozen=True)
class Case:
    """One planting.

    Attributes:
        margin: of the needles' scores over the background's mean.
        ties: needles.
        age: tokens that the newest needle stands before the query; the others stand right before it.
    """

    margin: float
    ties: int
    age: int


@dataclass(frozen=True)
class Result:
    """A finished case.

    Attributes:
        weight: that softmax gives to the needles, median over streams.
        errors: ||y - softmax|| / ||softmax|| by method, one per stream, those of a sequence's heads together.
    """

    case: Case
    weight: float
    errors: dict[str, list[float]]

    def quartiles(self, method: str) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile over streams; NaN if any output was."""
        low, median, high = _quartiles(torch.tensor(self.errors[method], dtype=torch.float64))
        return low, median, high

    def mean(self, method: str) -> float:
        """The mean over streams."""
        return math.fsum(self.errors[method]) / len(self.errors[method])

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; what is derived stands there too, for readers."""
        return asdict(self) | {"quartiles": {name: self.quartiles(name) for name in self.errors}}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Result:
        """The result that gave this dict; KeyError, TypeError or AttributeError if none did."""
        errors = {name: [float(x) for x in errors] for name, errors in fields["errors"].items()}
        return cls(Case(**fields["case"]), float(fields["weight"]), errors)


def _quartiles(x: Tensor) -> list[float]:
    return x.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=x.dtype)).tolist()


MARGIN, TIES, AGE = PARAMETERS = ("margin", "ties", "age")


@dataclass(frozen=True)
class Sweep:
    """Cases that differ in one parameter alone, `name`; inside: their needles stand in the window."""

    name: str
    inside: bool
    cases: tuple[Case, ...]


def plan_sweeps(
    at: Case, margins: Iterable[float], ties: Sequence[int], ages: Iterable[int], window: int
) -> list[Sweep]:
    """A sweep of each parameter through `at`, and those of margin and ties once more in the middle of the window.

    Not in the window where it does not hold the most needles.
    """
    inside = (window - max(at.ties, *ties)) // 2
    values: dict[str, list[Any]] = {MARGIN: sorted(set(margins)), TIES: sorted(set(ties)), AGE: sorted(set(ages))}
    starts = [(MARGIN, at.age), (MARGIN, inside), (TIES, at.age), (TIES, inside), (AGE, at.age)]
    return [
        Sweep(name, name != AGE and age == inside, _vary(replace(at, age=age), name, values[name]))
        for name, age in starts
        if age >= 1
    ]


def _vary(at: Case, name: str, values: Iterable[Any]) -> tuple[Case, ...]:
    return tuple(replace(at, **{name: value}) for value in values)


def in_order(sweeps: Iterable[Sweep]) -> list[Case]:
    """Every case once, those with the oldest needles first: what stands before them is read once for all."""
    cases = {case for sweep in sweeps for case in sweep.cases}
    return sorted(cases, key=lambda case: (-case.age - case.ties, case.ties, case.margin))


def check(cases: Iterable[Case], settings: Settings) -> None:
    """Refuse a run that could not go through, before anything is measured.

    Raises:
        ArgumentError: a needle has no place in the stream, a score is out of reach, or a method has no such state.
    """
    expect(settings.head_dim >= 2, "--head-dim", "an int >= 2", settings.head_dim)
    good = settings.spread >= 0 and abs(settings.mean) + 8 * settings.spread <= REACH
    expect(good, "--spread", f"|mean| + 8 spread <= {REACH:g}", f"{settings.mean:g} and {settings.spread:g}")
    for case in cases:
        score = settings.mean + case.margin
        expect(abs(score) <= REACH, "--margin", f"scores within {REACH:g} of 0", f"{score:g}")
        expect(1 <= case.ties <= MAX_TIES, "--ties", f"1 to {MAX_TIES:,}", case.ties)
        place = f"a needle within the {settings.length:,} tokens: age + ties < length"
        expect(1 <= case.age < settings.length - case.ties, "--age", place, f"{case.age:,} + {case.ties}")
    nothing = torch.zeros(1, 1, 1, settings.head_dim)
    for options in settings.methods.values():
        attention(nothing, nothing, nothing, backend=settings.backend, return_state=True, **options)


@dataclass(frozen=True)
class Stream:
    """The background of all streams, [seeds, heads, length, d] each, and needles to plant, without their scores.

    Attributes:
        direction: [seeds, heads, 1, d], of unit length; the last query is `REACH` times it.
        side, worth: [seeds, heads, MAX_TIES, d], the needles' parts across the direction, of unit length, and values.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    direction: Tensor
    side: Tensor
    worth: Tensor

    @classmethod
    def draw(cls, settings: Settings) -> Stream:
        """The streams of these settings; each sequence depends on its own seed alone."""
        seeds = range(settings.seed, settings.seed + settings.seeds)
        parts = zip(*(_draw(settings, torch.Generator().manual_seed(seed)) for seed in seeds), strict=True)
        return cls(*(torch.stack(part) for part in parts))

    @property
    def length(self) -> int:
        """Tokens, the last query's own included."""
        return self.key.shape[2]

    def plant(self, case: Case, mean: float) -> tuple[Tensor, Tensor]:
        """Keys and values [seeds, heads, ties, d] of the needles."""
        score = torch.tensor(mean + case.margin)
        key = _with_score(score, self.direction, self.side[:, :, : case.ties])
        return key, self.worth[:, :, : case.ties]

    @cached_property
    def scores(self) -> Tensor:
        """Of the background with the last query, float64 [seeds, heads, length]."""
        return torch.stack(
            [scores_of(*pair) for pair in zip(self.query[:, :, -1:], self.key, strict=True)]
        )  # one sequence at a time, since these are long


def scores_of(query: Tensor, key: Tensor) -> Tensor:
    """Scaled scores in float64: [heads, 1, d], [heads, T, d] -> [heads, T]."""
    return (key.double() @ query.double().mT)[..., 0] * key.shape[-1] ** -0.5


def _draw(settings: Settings, generator: torch.Generator) -> tuple[Tensor, ...]:
    heads, length, d = settings.heads, settings.length, settings.head_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(heads, *shape, generator=generator)

    direction = torch.nn.functional.normalize(normal(1, d), dim=-1)
    side, worth = _across(normal(MAX_TIES, d), direction), normal(MAX_TIES, d)
    query = settings.spread * normal(length, d)
    query[:, -1:] = REACH * direction
    score = settings.mean + settings.spread * normal(length, 1)
    key = _with_score(score, direction, _across(normal(length, d), direction))
    value = COMMON**0.5 * normal(1, d) + (1 - COMMON) ** 0.5 * normal(length, d)
    return query, key, value, direction, side, worth


def _across(x: Tensor, direction: Tensor) -> Tensor:
    """The part of x across a direction, made of unit length."""
    return torch.nn.functional.normalize(x - (x * direction).sum(-1, keepdim=True) * direction, dim=-1)


def _with_score(score: Tensor, direction: Tensor, side: Tensor) -> Tensor:
    """Keys of norm sqrt(d) whose scores with the last query are these, [..., 1] or one for all."""
    cosine = (score / REACH).clamp(-1, 1)
    return side.shape[-1] ** 0.5 * (cosine * direction + (1 - cosine**2).sqrt() * side)


class Bench:
    """The streams of a run, and every method's state of what stands before the needles of the case at hand."""

    def __init__(self, settings: Settings) -> None:
        """Draw nothing yet: a run that is taken up again may have nothing to measure."""
        self.settings, self.position = settings, 0
        kinds = [state_options(options) for options in settings.methods.values()]
        self._kinds = {_name(kind): kind for kind in kinds}
        self._before: dict[str, State | None] = dict.fromkeys(self._kinds)

    @cached_property
    def stream(self) -> Stream:
        """The background."""
        return Stream.draw(self.settings)

    @torch.no_grad()
    def measure(self, case: Case) -> Result:
        """Read the stream with a case's needles in it, and compare what the last query gets with softmax.

        Cases of older needles come first (see `in_order`): an older one than before means to begin anew.
        """
        with thread_count(self.settings.threads), warnings.catch_warnings():
            warnings.simplefilter("ignore", NormaliserWarning)  # a NaN is an error of NaN, which shows
            y, weight = softmax(self.stream, case, self.settings.mean)
            outputs = self._attend(case)
        errors = {name: relative_errors(out, y) for name, out in outputs.items()}
        return Result(case, _quartiles(weight.flatten())[1], errors)

    def _attend(self, case: Case) -> dict[str, Tensor]:
        """The last token's outputs [seeds, heads, 1, d] by method."""
        stream, place = self.stream, self.stream.length - case.age - case.ties
        self._advance(place)
        key, value = (x[:, :, place:-1].clone() for x in (stream.key, stream.value))
        key[:, :, : case.ties], value[:, :, : case.ties] = stream.plant(case, self.settings.mean)
        query = stream.query[:, :, place:-1]
        states = {name: self._read(name, query, key, value, self._before[name]) for name in self._kinds}
        last = [x[:, :, -1:].contiguous() for x in (stream.query, stream.key, stream.value)]
        outputs = {}
        for name, options in self.settings.methods.items():
            reading = {option: value for option, value in options.items() if option in AT_READING}
            state = states[_name(state_options(options))].clone()
            outputs[name] = decode_(last[0], last[1], last[2], state, backend=self.settings.backend, **reading)
        return outputs

    def _advance(self, place: int) -> None:
        """Read the background up to a place."""
        if place < self.position:
            self.position, self._before = 0, dict.fromkeys(self._kinds)
        new = [x[:, :, self.position : place] for x in (self.stream.query, self.stream.key, self.stream.value)]
        if place > self.position:
            for name, before in self._before.items():
                self._before[name] = self._read(name, new[0], new[1], new[2], before)
        self.position = place

    def _read(self, kind: str, query: Tensor, key: Tensor, value: Tensor, state: State | None) -> State:
        """The state after more tokens, at least one, piece by piece; the one before stays as it is."""
        pieces = zip(*(x.split(PIECE, dim=2) for x in (query, key, value)), strict=True)
        for q, k, v in pieces:
            options: dict[str, Any] = {**self._kinds[kind], "backend": self.settings.backend}
            _, state = attention(q, k, v, state=state, return_state=True, **options)
        assert state is not None
        return state


def _name(options: Options) -> str:
    return repr(sorted(options.items()))


def softmax(stream: Stream, case: Case, mean: float) -> tuple[Tensor, Tensor]:
    """What softmax gives the last query [seeds, heads, 1, d], and the needles' weight [seeds, heads], in float64."""
    outputs, weights = [], []
    needles, worth = stream.plant(case, mean)
    end = stream.length - case.age
    for seed, scores in enumerate(stream.scores.clone()):
        value = stream.value[seed].double()
        value[:, end - case.ties : end] = worth[seed].double()
        scores[:, end - case.ties : end] = scores_of(stream.query[seed, :, -1:], needles[seed])
        weight = scores.softmax(-1)  # [heads, length]
        outputs.append(weight[:, None] @ value)
        weights.append(weight[:, end - case.ties : end].sum(-1))
    return torch.stack(outputs), torch.stack(weights)


def relative_errors(y: Tensor, expected: Tensor) -> list[float]:
    """||y - expected|| / ||expected|| over the last axis, in float64, one after the other."""
    distance = torch.linalg.vector_norm(y.double() - expected.double(), dim=-1)
    return (distance / torch.linalg.vector_norm(expected.double(), dim=-1)).flatten().tolist()
