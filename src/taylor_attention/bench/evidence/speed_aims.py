"""What was aimed at, beside what was measured: the slowest measured figure that an aim speaks of is held against it.

Where contexts make no difference, it is their median, and the worst stands beside it: the worst of many would say how
noisy the machine was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Any

from ..cases import DECODE, OURS, OWN, PREFILL, RECURRENT, SOFTMAX, TRAIN, Result
from ..facts import WINDOW_RATIO, derive
from .experiment import Table

HEAD_DIMS = (8, 16, 32, 64)
DEGREE = 3
"""That aims are for, unless they say."""
_LENGTH = 8192
"""Of prefills and training steps."""


@dataclass(frozen=True)
class Aim:
    """One figure to reach.

    Attributes:
        what: it is of.
        asked: by head size.
        found: what was measured, by head size; nothing where it was not.
        is_least: whether more is better.
        is_one: whether what was found is one figure, measured several times.
        is_bound: of a head size: whether what was found only bounds the figure from above.
    """

    what: str
    asked: Mapping[int, float]
    found: Mapping[int, Sequence[float]]
    is_least: bool = False
    is_one: bool = False
    is_bound: Callable[[int], bool] = lambda head_dim: False

    def judge(self, head_dim: int) -> tuple[str, bool | None]:
        """A table's cell, and whether the aim is reached; None where that is not known."""
        own = self.found.get(head_dim, ())
        if head_dim not in self.asked or not own:
            return "-", None
        asked, worst = self.asked[head_dim], min(own) if self.is_least else max(own)
        stands = median(own) if self.is_one else worst
        reached = stands >= asked if self.is_least else stands <= asked
        if self.is_bound(head_dim):
            return f"{stands:.4g} or less ({asked:g})", True if reached else None
        beside = f", at worst {worst:.4g}" if stands != worst else ""
        return f"{stands:.4g}{beside} ({asked:g}{'' if reached else ', missed'})", reached


def count_reached(results: Sequence[Result]) -> tuple[int, int]:
    """How many aims are reached, of how many that were measured well enough to say."""
    judged = [aim.judge(head_dim)[1] for aim in _aims(results) for head_dim in HEAD_DIMS]
    return sum(each is True for each in judged), sum(each is not None for each in judged)


def tabulate_aims(results: Sequence[Result]) -> Table:
    """A row per aim, a column per head size."""
    rows = [(aim.what, *(aim.judge(head_dim)[0] for head_dim in HEAD_DIMS)) for aim in _aims(results)]
    told = tuple(row for row in rows if set(row[1:]) != {"-"})
    note = (
        f"Degree {DEGREE} unless said; prefills and training steps of {_LENGTH:,} tokens. In brackets: what was aimed "
        "at, at least for rates and speed-ups, at most for the others. Of several contexts, or degrees, the worst "
        "stands; of a rival's step, which takes as long after any context, their median, and the worst beside it. or "
        "less: faster at the shortest length already."
    )
    return Table("What was aimed at", ("aim", *(f"d = {head_dim}" for head_dim in HEAD_DIMS)), told, note)


def _aims(results: Sequence[Result]) -> list[Aim]:
    """All of them, with what these results say."""
    facts = derive(results)
    decode, prefill = (_plain(facts[kind]) for kind in (DECODE, PREFILL))
    long = [each for each in results if each.case.length == _LENGTH]
    return [
        Aim(
            "prefill: of the GEMM rate",
            {8: 0.3, 16: 0.4, 32: 0.6, 64: 0.75},
            _group((each.case.head_dim, each.fraction) for each in _of(long, PREFILL)),
            is_least=True,
        ),
        *(_prefill_aim(degree, prefill) for degree in (2, 3, 4)),
        *(_window_aim(degree, window, long) for degree in (2, 3) for window in (64, 256)),
        *(_training_aim(degree, long) for degree in (2, 3, 4)),
        *(_rival_aim(name, results) for name in _rivals(results)),
        Aim(
            "decoding: of the read bandwidth",
            {64: 0.8},
            _group((each.case.head_dim, each.fraction) for each in _of(results, DECODE)),
            is_least=True,
        ),
        _cache_aim(decode),
        Aim(
            "decoding: longest or shortest step over that at 1,024",
            dict.fromkeys(HEAD_DIMS, 1.1),
            _group((row["head_dim"], row["flatness"]) for row in decode if row["degree"] == DEGREE),
        ),
    ]


def _prefill_aim(degree: int, rows: Sequence[dict[str, Any]]) -> Aim:
    name = "faster_over_flop_break_even"
    return _softmax_aim(
        f"prefill, degree {degree}: faster than softmax from, over the FLOP break-even", 2.0, name, degree, rows
    )


def _cache_aim(rows: Sequence[dict[str, Any]]) -> Aim:
    name = "faster_over_memory_break_even"
    return _softmax_aim("decoding: faster than softmax from, over the memory break-even", 1.5, name, DEGREE, rows)


def _softmax_aim(what: str, asked: float, name: str, degree: int, rows: Sequence[dict[str, Any]]) -> Aim:
    own = {row["head_dim"]: row for row in rows if row["degree"] == degree}
    found = _group((head_dim, _place(row, name)) for head_dim, row in own.items())
    bounds = {head_dim for head_dim, row in own.items() if row["faster_at_the_shortest"]}
    return Aim(what, dict.fromkeys(HEAD_DIMS, asked), found, is_bound=bounds.__contains__)


def _place(row: dict[str, Any], name: str) -> float | None:
    """Infinity where ours is slower at the longest that was measured; None where nothing was."""
    return inf if row[name] is None and row["speedup"].get(SOFTMAX) else row[name]


def _window_aim(degree: int, window: int, results: Sequence[Result]) -> Aim:
    own = _of(results, PREFILL, degree, window)
    found = _group((each.case.head_dim, each.window_ratio) for each in own)
    what = f"prefill, degree {degree}, window {window}: over the pure method and the window's FLOPs"
    return Aim(what, dict.fromkeys(HEAD_DIMS, WINDOW_RATIO), found)


def _training_aim(degree: int, results: Sequence[Result]) -> Aim:
    found = _group((each.case.head_dim, each.forward_ratio) for each in _of(results, TRAIN, degree))
    return Aim(f"training step, degree {degree}: over its forward pass", dict.fromkeys(HEAD_DIMS, 3.5), found)


def _rival_aim(name: str, results: Sequence[Result]) -> Aim:
    """The speed-ups that are aimed at are over the paper's own code."""
    pairs = ((each, each.milliseconds(name)) for each in _of(results, DECODE))
    ours = ((each, theirs, each.milliseconds(OURS)) for each, theirs in pairs)
    found = _group((each.case.head_dim, theirs / own) for each, theirs, own in ours if theirs and own)
    return Aim(f"decoding: times as fast as {name}", {8: 40, 16: 40, 32: 20, 64: 10}, found, True, True)


def _rivals(results: Sequence[Result]) -> list[str]:
    """Those that the user has named."""
    names = dict.fromkeys(name for each in _of(results, DECODE) for name in each.outcomes)
    return [name for name in names if name not in (*OWN, SOFTMAX, RECURRENT)]


def _plain(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if not row["window"]]


def _of(results: Sequence[Result], kind: str, degree: int = DEGREE, window: int = 0) -> list[Result]:
    wanted = (kind, degree, window)
    return [each for each in results if (each.case.kind, each.case.degree, each.case.window) == wanted]


def _group(found: Iterable[tuple[int, float | None]]) -> dict[int, list[float]]:
    """What there is for each head size."""
    groups: dict[int, list[float]] = {}
    for head_dim, value in found:
        if value is not None:
            groups.setdefault(head_dim, []).append(value)
    return groups
