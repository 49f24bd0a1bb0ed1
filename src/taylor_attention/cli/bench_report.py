"""How `taylor-attention bench` shows what it found: a line per case as it finishes, tables and sentences at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..bench.cases import Case, Result
from ..bench.evidence import speed_shown
from ..bench.machine import COPY, GEMM, READ
from .console import out_wide, show, size

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
    """Print the machine's rates, the tables, what they say together, and where the files are."""
    console, machine = out_wide(), summary["machine"]
    console.print(
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}: GEMM "
        f"{machine[GEMM] / 1e9:,.0f} GFLOP/s, reading {machine[READ] / 1e9:.1f} GB/s, copying "
        f"{machine[COPY] / 1e9:.1f} GB/s",
        markup=False,
        soft_wrap=True,
    )
    if machine["load"] is not None and machine["load"] > BUSY:
        console.print(f"The machine was busy when this began (load {machine['load']}), so times are noisy.")
    for each in speed_shown.tabulate(results):
        show(console, each)
    for line in (*speed_shown.conclude(results), *_files(summary)):
        console.print(line, markup=False, soft_wrap=True)


def _files(summary: dict[str, Any]) -> list[str]:
    """What was measured, and where it is."""
    peak = "?" if summary["peak_bytes"] is None else size(summary["peak_bytes"])
    drawn = [f"figure: {path}" for path in summary["figures"]]
    missing = [f"no figures: {summary['no_figures']}"] if summary["no_figures"] else []
    return [
        f"most resident memory of the process, all contestants in it: {peak}",
        *drawn,
        *missing,
        f"results: {summary['out']}",
    ]
