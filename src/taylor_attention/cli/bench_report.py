"""How `taylor-attention bench` shows what it found: a line per case as it finishes, tables and facts at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rich.table import Table

from ..bench.cases import DECODE, FORWARD, MODEL, OURS, PREFILL, START, TRAIN, Case, Result
from ..bench.facts import WINDOW_RATIO
from ..bench.machine import COPY, GEMM, READ
from .console import out, size, table

TITLES = {
    START: "Starting, in fresh processes",
    DECODE: "Decode: one token after a context",
    PREFILL: "Prefill: causal, forward",
    TRAIN: "Training: causal, forward and backward",
    MODEL: "Model: generating one byte after a context, with the shipped weights",
}
PARTS = "/ (pure + window)"
WIDE = 140  # columns where stdout is no terminal: a file is as wide as its tables
BUSY = 0.5
"""A load from which on times are noisy: on few cores every other process shows."""


def describe_case(case: Case) -> str:
    """A case in a few words."""
    window = f", window {case.window}" if case.window else ""
    return f"{case.kind}, head size {case.head_dim}, degree {case.degree}{window}, {case.length:,} tokens"


def describe_result(result: Result) -> str:
    """A result in one line."""
    parts = [
        f"{name} skipped ({outcome.skipped})"
        if outcome.milliseconds is None
        else f"{name} {outcome.milliseconds:.3g} ms"
        for name, outcome in result.outcomes.items()
    ]
    limit = "" if result.fraction is None else f"; {result.fraction:.2g} of the limit"
    return f"{describe_case(result.case)}: {', '.join(parts)}{limit}"


def report(summary: dict[str, Any], results: Sequence[Result]) -> None:
    """Print a table per kind, the facts, what was skipped, and where the files are."""
    console = out()
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    machine = summary["machine"]
    console.print(
        f"{machine['processor']}, {summary['settings']['threads']} threads, torch {machine['torch']}: GEMM "
        f"{machine[GEMM] / 1e9:,.0f} GFLOP/s, reading {machine[READ] / 1e9:.1f} GB/s, copying "
        f"{machine[COPY] / 1e9:.1f} GB/s",
        markup=False,
        soft_wrap=True,
    )
    if machine["load"] is not None and machine["load"] > BUSY:
        console.print(f"The machine was busy when this began (load {machine['load']}), so times are noisy.")
    for kind in TITLES:
        own = [result for result in results if result.case.kind == kind]
        if own:
            console.print(_TABLES.get(kind, partial(_table, kind))(own))
    for made in (_decode_facts(summary["facts"][DECODE]), _prefill_facts(summary["facts"][PREFILL])):
        if made.row_count:
            console.print(made)
    for line in (*_windows(summary["facts"][PREFILL]), *_skipped(results), *_files(summary)):
        console.print(line, markup=False, soft_wrap=True)


def _start_table(results: Sequence[Result]) -> Table:
    names = list(results[0].outcomes)
    shown = table(TITLES[START], "d, degree", *(f"{name} ms" for name in names))
    for result in results:
        shown.add_row(_shape_of(result.case), *(_number(result.milliseconds(name)) for name in names))
    return shown


def _model_table(results: Sequence[Result]) -> Table:
    """One row per context; for each twin its step and what of that is attention."""
    names = list(dict.fromkeys(name for result in results for name in result.outcomes))
    columns = (what for name in names for what in (f"{name} ms", "attention ms", "memory"))
    shown = table(TITLES[MODEL], "d, degree", "tokens", *columns)
    for result in results:
        row = []
        for name in names:
            own = result.outcomes[name]
            share = "" if own.attention_share is None else f" ({own.attention_share:.0%})"
            memory = "-" if own.nbytes is None else size(own.nbytes)
            row += [_number(own.milliseconds), f"{_number(own.attention)}{share}", memory]
        shown.add_row(_shape_of(result.case), f"{result.case.length:,}", *row)
    return shown


_TABLES = {START: _start_table, MODEL: _model_table}


def _table(kind: str, results: Sequence[Result]) -> Table:
    """One row per case: ours with its limit and memory, then each rival's time and how many times ours that is."""
    columns = _columns(kind, results)
    shown = table(TITLES[kind], "d, degree", "tokens", *columns)
    for result in results:
        if result.milliseconds(OURS) is not None:
            numbers = (show(result) for show in columns.values())
            shown.add_row(_shape_of(result.case), f"{result.case.length:,}", *numbers)
    return shown


def _columns(kind: str, results: Sequence[Result]) -> dict[str, Callable[[Result], str]]:
    """What a kind's table shows of each result, by heading."""
    columns: dict[str, Callable[[Result], str]] = {f"{OURS} ms": lambda result: _number(result.milliseconds(OURS))}
    if kind == TRAIN:
        columns["/ forward"] = lambda result: _number(result.forward_ratio)
    else:
        columns["of limit"] = lambda result: _number(result.fraction)
    if any(result.window_ratio is not None for result in results):
        columns[PARTS] = lambda result: _number(result.window_ratio)
    columns["state" if kind == DECODE else "memory"] = _memory
    names = dict.fromkeys(name for result in results for name in result.outcomes if name not in (OURS, FORWARD))
    return columns | {f"{name} ms": partial(_beside, name) for name in names}


def _shape_of(case: Case) -> str:
    return _shape(case.head_dim, case.degree, case.window)


def _shape(head_dim: int, degree: int, window: int) -> str:
    return f"{head_dim}, {degree}" + (f", window {window}" if window else "")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _memory(result: Result) -> str:
    nbytes = result.outcomes[OURS].nbytes
    return "?" if nbytes is None else size(nbytes)


def _beside(rival: str, result: Result) -> str:
    theirs, ours = result.milliseconds(rival), result.milliseconds(OURS)
    return "-" if theirs is None or ours is None else f"{_number(theirs)} ({_number(theirs / ours)}x)"


def _decode_facts(rows: Sequence[dict[str, Any]]) -> Table:
    columns = "slowest / fastest context", "faster than sdpa from", "memory break-even", "ratio"
    shown = table("Decode over contexts", "d, degree", *columns)
    for row in rows:
        start, even = row["faster_from_context"], row["memory_break_even"]
        place = "not within measured contexts" if start is None else f"{start:,}"
        ratio = _number(row["faster_over_memory_break_even"])
        shape = _shape(row["head_dim"], row["degree"], row["window"])
        shown.add_row(shape, f"{row['flatness']:.2f}", place, f"{even:,}", ratio)
    return shown


def _prefill_facts(rows: Sequence[dict[str, Any]]) -> Table:
    shown = table("Prefill over lengths", "d, degree", "faster than causal sdpa from", "FLOP break-even", "ratio")
    for row in rows:
        start, even = row["faster_from_length"], row["flop_break_even"]
        place = "not within measured lengths" if start is None else f"{start:,}"
        place = f"{place} or less" if row["faster_at_the_shortest"] else place
        ratio = _number(row["faster_over_flop_break_even"])
        shown.add_row(_shape(row["head_dim"], row["degree"], row["window"]), place, f"{even:,}", ratio)
    return shown


def _windows(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How many prefills with a window take as long as is asked of them."""
    ratios = [ratio for row in rows for ratio in row["window_ratio"].values()]
    within = sum(ratio <= WINDOW_RATIO for ratio in ratios)
    what = "of the time of the pure method and of the window's FLOPs at the GEMM rate together"
    return [f"{PARTS}: {what}; {within} of {len(ratios)} within {WINDOW_RATIO}"] if ratios else []


def _skipped(results: Sequence[Result]) -> list[str]:
    """Who did not take part and why, with the number of cases."""
    reasons = Counter(
        f"{name} in {result.case.kind}: {outcome.skipped.split(':')[0]}"
        for result in results
        for name, outcome in result.outcomes.items()
        if outcome.skipped is not None
    )
    return [
        f"skipped: {reason} ({count} cases, each with its numbers in results.jsonl)"
        for reason, count in reasons.items()
    ]


def _files(summary: dict[str, Any]) -> list[str]:
    """What was measured, and where it is."""
    peak = "?" if summary["peak_bytes"] is None else size(summary["peak_bytes"])
    drawn = [f"figure: {path}" for path in summary["figures"]]
    missing = [f"no figures: {summary['no_figures']}"] if summary["no_figures"] else []
    return [
        "ms: median of a step. (x): times ours. of limit: of the GEMM rate (prefill), of the read bandwidth (decode; "
        "above 1 where the caches hold the state). memory: growth of resident memory in a call.",
        f"most resident memory of the process, all contestants in it: {peak}",
        *drawn,
        *missing,
        f"results: {summary['out']}",
    ]
