"""What the results say together: speed-ups, where one form overtakes the other, how flat decoding is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import exp, log
from typing import Any

from ..core.cost import break_even_context
from .cases import DECODE, MODEL, OURS, OWN, PREFILL, SOFTMAX, TRAIN, Result

WINDOW_RATIO = 1.3
"""Asked of a prefill with a window: to take at most so many times as long as its parts; see `Result.window_ratio`."""


def derive(results: Iterable[Result]) -> dict[str, list[dict[str, Any]]]:
    """The facts of each kind, one row per head size, degree and window."""
    found: dict[str, list[dict[str, Any]]] = {DECODE: [], PREFILL: [], TRAIN: [], MODEL: []}
    for (kind, head_dim, degree, window), own in _series(results).items():
        shape = {"head_dim": head_dim, "degree": degree, "window": window}
        rivals = {"speedup": {name: _speedups(own, name) for name in _rivals(own)}}
        if kind == DECODE:
            found[kind].append(shape | rivals | _decode_facts(own))
        elif kind == PREFILL:
            found[kind].append(shape | rivals | _prefill_facts(own))
        elif kind == TRAIN:
            found[kind].append(shape | rivals | {"forward_ratio": {r.case.length: r.forward_ratio for r in own}})
        elif kind == MODEL:
            found[kind].append(shape | rivals | {"attention_shares": {r.case.length: r.attention_shares for r in own}})
    return found


def _series(results: Iterable[Result]) -> dict[tuple[str, int, int, int], list[Result]]:
    """The measured results of each kind and shape, by length."""
    found = defaultdict(list)
    for result in sorted(results, key=lambda result: result.case.length):
        if result.milliseconds(OURS) is not None:
            case = result.case
            found[case.kind, case.head_dim, case.degree, case.window].append(result)
    return found


def _rivals(results: Sequence[Result]) -> list[str]:
    names = dict.fromkeys(name for result in results for name in result.outcomes)
    return [name for name in names if name not in OWN]


def _speedups(results: Sequence[Result], rival: str) -> dict[int, float]:
    """The rival's time over ours, by length, where it took part."""
    return {length: theirs / ours for length, ours, theirs in _pairs(results, rival)}


def _pairs(results: Sequence[Result], rival: str) -> list[tuple[int, float, float]]:
    """Length, our time and the rival's."""
    found = [(result.case.length, result.milliseconds(OURS), result.milliseconds(rival)) for result in results]
    return [(length, ours, theirs) for length, ours, theirs in found if ours is not None and theirs is not None]


def _decode_facts(results: Sequence[Result]) -> dict[str, Any]:
    """Flatness, and the context from which on a step is faster than one of softmax.

    Flatness is the largest factor between a step and the one after `EARLY_CONTEXT` tokens, timed by turns.
    """
    case, pairs = results[0].case, _pairs(results, SOFTMAX)
    ratios = [result.early_ratio for result in results if result.early_ratio is not None]
    memory = break_even_context(case.head_dim, case.degree, window=case.window, by="memory")
    faster = crossing(pairs)
    return {
        "flatness": max((max(ratio, 1 / ratio) for ratio in ratios), default=None),
        "faster_from_context": faster,
        "faster_at_the_shortest": _at_the_shortest(pairs, faster),
        "memory_break_even": memory,
        "faster_over_memory_break_even": None if faster is None else faster / memory,
    }


def _lasting(pairs: Sequence[tuple[int, float, float]]) -> list[tuple[int, float, float]]:
    """The pairs from which on ours is the faster one at every length."""
    slower = [i for i, (_, ours, theirs) in enumerate(pairs) if ours >= theirs]
    return list(pairs[slower[-1] + 1 if slower else 0 :])


def _prefill_facts(results: Sequence[Result]) -> dict[str, Any]:
    """From which length a prefill is faster than causal softmax, where their FLOPs are equal, and what a window costs.

    The tokens of a prefill see half its length on average, so its FLOPs break even at twice the context where those of
    one token do.
    """
    case = results[0].case
    flops = 2 * break_even_context(case.head_dim, case.degree, window=case.window, by="flops")
    pairs = _pairs(results, SOFTMAX)
    faster = crossing(pairs)
    return {
        "faster_from_length": faster,
        "faster_at_the_shortest": _at_the_shortest(pairs, faster),
        "flop_break_even": flops,
        "faster_over_flop_break_even": None if faster is None else faster / flops,
        "window_ratio": {r.case.length: r.window_ratio for r in results if r.window_ratio is not None},
    }


def _at_the_shortest(pairs: Sequence[tuple[int, float, float]], faster: int | None) -> bool:
    return bool(pairs) and faster == pairs[0][0]


def crossing(pairs: Sequence[tuple[int, float, float]]) -> int | None:
    """The length from which on ours takes less time, between two lengths on straight lines in the logarithms.

    The shortest length if ours is faster at all of them, None if it is slower at the longest.
    """
    lasting = _lasting(pairs)
    if not lasting:
        return None
    if len(lasting) == len(pairs):
        return lasting[0][0]
    (short, *before), (long, *after) = pairs[-len(lasting) - 1], lasting[0]
    lead, next_lead = log(before[0] / before[1]), log(after[0] / after[1])  # >= 0, then < 0
    return round(exp(log(short) + (log(long) - log(short)) * lead / (lead - next_lead)))
