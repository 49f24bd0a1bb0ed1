"""Tables and sentences of what `taylor-attention bench` measured."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..cases import DECODE, EARLY_CONTEXT, MODEL, OURS, OWN, PREFILL, SOFTMAX, START, TRAIN, Case, Result
from ..facts import WINDOW_RATIO, derive
from ..machine import GEMM, READ
from ..start import FIRST, IMPORT
from .experiment import Findings, Table
from .speed_aims import count_reached, tabulate_aims

TITLES = {
    START: "Starting, in fresh processes",
    PREFILL: "Prefill: causal, forward",
    TRAIN: "Training: causal, forward and backward",
    DECODE: "Decode: one token after a context",
    MODEL: "Model: generating one byte after a context, with the shipped weights",
}
PARTS = "/ (pure + window)"
_NOTE = "ms: median of a step. (x): times ours. "
_PARTS_NOTE = f" {PARTS}: time over that of the pure method and of the window's FLOPs at the GEMM rate together."
_NOTES = {
    START: "import: beyond PyTorch's own. ",
    PREFILL: "of limit: of the GEMM rate, counting the FLOPs that the method needs. memory: growth of resident memory.",
    TRAIN: "/ forward: of the forward pass alone. memory: growth of resident memory.",
    DECODE: "of limit: of the read bandwidth, counting the bytes that a step must move; above 1 the caches hold the "
    f"state. / at {EARLY_CONTEXT:,}: over the same step after so few tokens, by turns.",
    MODEL: "taylor and softmax are twins, trained with the same budget.",
}


def results_of(findings: Findings) -> list[Result]:
    """The benchmark's results, from findings as a file has them."""
    return [Result.from_dict({"case": each.case, "seconds": each.seconds, **each.values}) for each in findings]


def tables(findings: Findings) -> list[Table]:
    """What was aimed at, then a table of each kind, then what lengths and contexts say together."""
    return tabulate(results_of(findings))


def tabulate(results: Sequence[Result]) -> list[Table]:
    """The same, of results."""
    facts = derive(results)
    own = {kind: [result for result in results if result.case.kind == kind] for kind in TITLES}
    made = [
        tabulate_aims(results),
        _tabulate_start(own[START]),
        *(_tabulate(kind, _part(own[kind], near)) for near in (False, True) for kind in (PREFILL, TRAIN, DECODE)),
        _tabulate_model(own[MODEL]),
        _tabulate_decode_facts(facts[DECODE]),
        _tabulate_prefill_facts(facts[PREFILL]),
    ]
    return [each for each in made if each.rows]


def conclusions(findings: Findings) -> list[str]:
    """How much of what was aimed at is reached, on a machine of which rates, and what starting and a model take."""
    return conclude(results_of(findings))


def conclude(results: Sequence[Result]) -> list[str]:
    """The same, of results."""
    reached, asked = count_reached(results)
    lines = [f"Of {asked} figures that were aimed at, {reached} are reached."] if asked else []
    for name, what, unit in ((GEMM, "a large GEMM ran at", "GFLOP/s"), (READ, "memory was read at", "GB/s")):
        rates = [result.rates[name] / 1e9 for result in results if name in result.rates]
        if rates:
            lines.append(
                f"Between the turns {what} {statistics.median(rates):.3g} {unit} (median; {min(rates):.3g} to "
                f"{max(rates):.3g} from case to case)."
            )
    return lines + _tell_start(results) + _tell_model(results) + _tell_windows(results) + _tell_skipped(results)


def _tell_start(results: Sequence[Result]) -> list[str]:
    first = [
        (result.milliseconds(IMPORT) or 0.0, result.milliseconds(FIRST) or 0.0)
        for result in results
        if result.case.kind == START
    ]
    return [
        f"Importing the package takes {importing:.0f} ms beyond PyTorch's own import (aimed at: 300 at most), the "
        f"first call {calling:.0f} ms (2,000)."
        for importing, calling in first
    ]


def _tell_model(results: Sequence[Result]) -> list[str]:
    """What part of a generating step attention is, over contexts."""
    shares: dict[str, list[float]] = {}
    own = [result for result in results if result.case.kind == MODEL]
    for result in own:
        for name, share in result.attention_shares.items():
            if share is not None:
                shares.setdefault(name, []).append(share)
    if not shares:
        return []
    parts = ", ".join(f"{min(some):.0%} to {max(some):.0%} in {name}" for name, some in shares.items())
    lengths = [result.case.length for result in own]
    return [f"Of generating one byte after {min(lengths):,} to {max(lengths):,}, attention is {parts}."]


def _tell_skipped(results: Sequence[Result]) -> list[str]:
    """Who did not take part and why, with the number of cases."""
    reasons = Counter(
        f"{name} in {result.case.kind}: {outcome.skipped.split(':')[0]}"
        for result in results
        for name, outcome in result.outcomes.items()
        if outcome.skipped is not None
    )
    return [f"Left out: {reason} ({count} cases)." for reason, count in reasons.items()]


def _tabulate_start(results: Sequence[Result]) -> Table:
    names = list(results[0].outcomes) if results else []
    rows = [(_shape_of(result.case), *(_number(result.milliseconds(name)) for name in names)) for result in results]
    return Table(TITLES[START], ("d, degree", *(f"{name} ms" for name in names)), tuple(rows), _NOTES[START])


def _tabulate_model(results: Sequence[Result]) -> Table:
    """One row per context; for each twin its step and what of that is attention."""
    names = list(dict.fromkeys(name for result in results for name in result.outcomes))
    columns = (what for name in names for what in (f"{name} ms", "attention ms", "bytes"))
    rows = [
        (f"{result.case.length:,}", *(cell for name in names for cell in _model_cells(result, name)))
        for result in results
    ]
    return Table(TITLES[MODEL], ("context", *columns), tuple(rows), _NOTES[MODEL])


def _model_cells(result: Result, name: str) -> tuple[str, str, str]:
    own = result.outcomes[name]
    share = "" if own.attention_share is None else f" ({own.attention_share:.0%})"
    return _number(own.milliseconds), f"{_number(own.attention)}{share}", _bytes(own.nbytes)


def _tabulate(kind: str, results: Sequence[Result]) -> Table:
    """One row per case: ours with its limit and memory, then each rival's time and how many times ours that is."""
    columns = _columns(kind, results)
    rows = [
        (f"{_shape_of(result.case)}: {result.case.length:,}", *(show(result) for show in columns.values()))
        for result in results
        if result.milliseconds(OURS) is not None
    ]
    title = TITLES[kind] + ", with a window" * any(result.case.window for result in results)
    note = _NOTE + _NOTES[kind] + _PARTS_NOTE * (PARTS in columns)
    return Table(title, ("d, degree: tokens", *columns), tuple(rows), note)


def _part(results: Sequence[Result], near: bool) -> list[Result]:
    """Those with a window, or those without."""
    return [result for result in results if bool(result.case.window) == near]


def _columns(kind: str, results: Sequence[Result]) -> dict[str, Callable[[Result], str]]:
    """What a kind's table shows of each result, by heading."""
    columns: dict[str, Callable[[Result], str]] = {f"{OURS} ms": lambda result: _number(result.milliseconds(OURS))}
    if kind == TRAIN:
        columns["/ forward"] = lambda result: _number(result.forward_ratio)
    else:
        columns["of limit"] = lambda result: _number(result.fraction)
    if any(result.early_ratio is not None for result in results):
        columns[f"/ at {EARLY_CONTEXT:,}"] = lambda result: _number(result.early_ratio)
    if any(result.window_ratio is not None for result in results):
        columns[PARTS] = lambda result: _number(result.window_ratio)
    columns["state" if kind == DECODE else "memory"] = lambda result: _bytes(result.outcomes[OURS].nbytes)
    names = dict.fromkeys(name for result in results for name in result.outcomes if name not in OWN)
    return columns | {f"{name} ms": partial(_beside, name) for name in names}


def _shape_of(case: Case) -> str:
    return _shape(case.head_dim, case.degree, case.window)


def _shape(head_dim: int, degree: int, window: int) -> str:
    return f"{head_dim}, {degree}" + (f", window {window}" if window else "")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(nbytes: int | None) -> str:
    """Powers of 1000, three digits."""
    return "-" if nbytes is None else f"{nbytes / 1e6:,.3g} MB" if nbytes < 1e9 else f"{nbytes / 1e9:,.3g} GB"


def _beside(rival: str, result: Result) -> str:
    theirs, ours = result.milliseconds(rival), result.milliseconds(OURS)
    return "-" if theirs is None or ours is None else f"{_number(theirs)} ({_number(theirs / ours)}x)"


def _tabulate_decode_facts(rows: Sequence[dict[str, Any]]) -> Table:
    columns = ("d, degree", "farthest from 1", "faster than softmax from", "memory break-even", "ratio")
    note = (
        f"farthest from 1: the largest factor, up or down, between steps after a context and after {EARLY_CONTEXT:,} "
        "tokens. faster from: between two measured contexts on straight lines in the logarithms. memory break-even: "
        "the tokens whose cache is as large as the state."
    )
    told = tuple(
        (
            _shape(row["head_dim"], row["degree"], row["window"]),
            _number(row["flatness"]),
            _place(row, "faster_from_context"),
            f"{row['memory_break_even']:,}",
            _number(row["faster_over_memory_break_even"]),
        )
        for row in rows
    )
    return Table("Decoding over contexts", columns, told, note)


def _tabulate_prefill_facts(rows: Sequence[dict[str, Any]]) -> Table:
    columns = ("d, degree", "faster than causal softmax from", "FLOP break-even", "ratio")
    told = tuple(
        (
            _shape(row["head_dim"], row["degree"], row["window"]),
            _place(row, "faster_from_length"),
            f"{row['flop_break_even']:,}",
            _number(row["faster_over_flop_break_even"]),
        )
        for row in rows
    )
    return Table("Prefill over lengths", columns, told, "FLOP break-even: the tokens at which both need as many.")


def _place(row: dict[str, Any], name: str) -> str:
    """From which length or context on it is faster than softmax."""
    if SOFTMAX not in row["speedup"] or not row["speedup"][SOFTMAX]:
        return "-"
    start = row[name]
    return "beyond those measured" if start is None else f"{start:,}" + " or less" * row["faster_at_the_shortest"]


def _tell_windows(results: Sequence[Result]) -> list[str]:
    """How many prefills with a window take no longer than is asked of them."""
    ratios = [result.window_ratio for result in results if result.window_ratio is not None]
    within = sum(ratio <= WINDOW_RATIO for ratio in ratios)
    told = f"Of {len(ratios)} prefills with a window, {within} take {WINDOW_RATIO} times their parts at most."
    return [told] if ratios else []
