"""What the needles benchmark measures: methods to compare, what holds for a run, cases, and sweeps of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import __version__
from ..core.state import State

AT_READING = ("reading", "series")
"""Options of a method that its state does not depend on."""

Options = Mapping[str, Any]


def make_methods(
    window: int, sinks: int, heavy: int, degrees: Sequence[int], head_dim: int
) -> dict[str, dict[str, Any]]:
    """What is compared: names, and the options of `attention` that they stand for. A row here is all that one takes.

    Where there are heavy tokens the window is shorter by as many: the same number of exact tokens, and the same bytes.
    """
    some = {"window": window - heavy, "heavy": heavy}
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
    methods["window + heavy"] = {"degree": None, **some}
    methods["window + heavy + mean"] = {"degree": 0, **some}
    for degree in degrees:
        methods[f"window + heavy + taylor {degree}"] = {"degree": degree, **some}
        methods[f"window + heavy + fitted {degree}"] = {"degree": degree, **some, "reading": "fitted"}
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
        asked: the chance of each earlier query to be the last one; only what becomes of heavy tokens depends on it.
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
    asked: float = 0.02
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


FULL: dict[str, Any] = {
    "margin": (0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0),
    "ties": (1, 4, 16, 64),
    "age": (10, 100, 1000, 10_000, 100_000),
    "length": Settings.length,
    "heads": Settings.heads,
    "seeds": Settings.seeds,
}
QUICK: dict[str, Any] = {
    "margin": (0.0, 4.0, 8.0, 12.0),
    "ties": (1, 16),
    "age": (10, 100, 1000),
    "length": 4096,
    "heads": 2,
    "seeds": 2,
}
"""Where nothing is asked for: at length, and for a quick look."""

AT = (10.0, 4, 1000)
DEGREES = (2, 4)
WINDOW, SINKS = 256, 4


def default_heavy(window: int) -> int:
    """Places of methods that have some: a quarter of the window's."""
    return max(1, window // 4)
