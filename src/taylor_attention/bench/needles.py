"""Planted needles: how far each way of attending is from softmax where a few keys stand out of a long background."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..core.state import State
from ..core.threads import thread_count
from ..errors import NormaliserWarning, expect
from ..ops.attention import attention
from ..ops.decode import decode_
from .needles_plan import AT_READING, Case, Options, Settings, state_options
from .needles_stream import MAX_TIES, REACH, Stream, scores_of

PIECE = 8192
"""Tokens that are read at a time."""


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
