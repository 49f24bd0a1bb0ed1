"""`taylor-attention soak`: a very long sequence beside a float64 twin; whether error, time and memory stay the same."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import click
import torch
from rich.progress import Progress

from ..bench.journal import Journal
from ..bench.soak import Settings, Soak, Stretch, Verdict, judge
from ..bench.streams import STREAMS
from ..core.threads import thread_count
from .console import (
    COUNT,
    DEGREE,
    MAX_COUNT,
    THREADS,
    emit_json,
    err,
    json_option,
    make_folder,
    out,
    progress_bar,
    size,
    table,
)

SAVE_EVERY = 60.0  # seconds
FAILED, INTERRUPTED = 1, 130


class _Count(click.ParamType):  # type: ignore[type-arg]  # generic in some versions only
    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            found = Decimal(value)
        except InvalidOperation:
            found = Decimal("NaN")
        if not (found.is_finite() and 1 <= found <= MAX_COUNT and found == found.to_integral_value()):
            self.fail(f"expected a whole number from 1 to 2^40, such as 1e8, got {value}", param, ctx)
        return int(found)


@click.command(short_help="Measure drift, time and memory over 1e8 and more tokens.")
@click.option("--tokens", type=_Count(), default="1e8", show_default=True, help="At least so many, in whole blocks.")
@click.option(
    "--stream", type=click.Choice(list(STREAMS)), default=Settings.stream, show_default=True, help="Of which tokens."
)
@click.option("--head-dim", type=COUNT, default=Settings.head_dim, show_default=True, help="Of keys and values.")
@click.option("--heads", type=COUNT, default=Settings.heads, show_default=True, help="Of the sequence.")
@click.option("--degree", type=DEGREE, default=Settings.degree, show_default=True, help="Of the series.")
@click.option("--block", type=COUNT, default=Settings.block, show_default=True, help="Tokens per call.")
@click.option(
    "--seed", type=click.IntRange(0, 2**31 - 1), default=Settings.seed, show_default=True, help="Of the tokens."
)
@click.option("--threads", type=THREADS, help="Of PyTorch [as PyTorch chooses].")
@click.option("--backend", default=Settings.backend, show_default=True, help="As attention(backend=...) takes it.")
@click.option("--out", "folder", type=click.Path(file_okay=False), default="runs/soak", show_default=True)
@click.option(
    "--resume", is_flag=True, help="Go on from where the run in OUT stopped; --tokens may be more than before."
)
@json_option
def soak(tokens: int, folder: str, resume: bool, as_json: bool, **asked: Any) -> None:
    """Feed one sequence to attention, call after call, and to a float64 twin of the same tokens.

    A line at each power of two tokens: how wrong the worst moment and the worst output were since the last line, time
    per token, bytes of the state, resident memory. Ends with tables, a line of JSON and OUT/{results.jsonl,
    position.safetensors}. Exit code 1 if a moment was wrong by more than 1e-6 (4e-6 without the compiled kernels), an
    output by more than 1e-5, or memory grew. 1e8 tokens take about 3 minutes on one core.
    """
    asked["threads"] = asked["threads"] or torch.get_num_threads()
    settings = Settings(**asked)
    with thread_count(settings.threads):
        run = Soak(settings)
        target = make_folder(folder)
        journal = Journal(target / "results.jsonl", settings, Stretch.from_dict, resume=resume)
        position = target / "position.safetensors"
        if resume and position.exists():
            run.restore(position)
        before = len(journal.results)
        try:
            _feed(run, tokens, journal, position)
        except KeyboardInterrupt:
            run.save(position)
            message = f"stopped after {run.tokens:,} tokens; {folder} keeps them: go on with --resume"
            err().print(message, markup=False, soft_wrap=True)
            sys.exit(INTERRUPTED)
    found = sorted(journal.results, key=lambda stretch: stretch.tokens)
    verdicts = judge(found, len(found) - before, run.bound)
    if not as_json:
        _report(found, verdicts, target)
    emit_json(_summary(settings, found, verdicts, target))
    sys.exit(0 if all(verdict.holds for verdict in verdicts) else FAILED)


def _feed(run: Soak, tokens: int, journal: Journal[Stretch], position: Path) -> None:
    """Go on until there are so many tokens; a line and a place to go on from at each power of two, and at the end."""
    bar, saved = progress_bar("{task.fields[found]}"), time.monotonic()
    task = bar.add_task("tokens", total=max(tokens, run.tokens), completed=run.tokens, found="")
    with bar:
        while run.tokens < tokens:
            target = min(_next_power(run.tokens), tokens)
            run.advance()
            bar.update(task, completed=run.tokens, found=_describe(run.position.stretch))
            if run.tokens >= target:
                _note(run.finish_stretch(), journal, bar)
            if run.tokens >= target or time.monotonic() - saved > SAVE_EVERY:
                run.save(position)
                saved = time.monotonic()


def _next_power(tokens: int) -> int:
    """The smallest power of two above."""
    return 1 << tokens.bit_length()


def _note(stretch: Stretch, journal: Journal[Stretch], bar: Progress) -> None:
    """Keep a finished stretch, unless a run that was killed right afterwards has kept it, and say so on stderr."""
    if journal.find(stretch.tokens) is None:
        journal.append(stretch)
    bar.console.print(f"{stretch.tokens:>15,} tokens  {_describe(stretch)}", markup=False, soft_wrap=True)


def _describe(stretch: Stretch) -> str:
    return f"moments {stretch.moments:.1e}  outputs {stretch.outputs:.1e}  {stretch.nanoseconds:,.0f} ns/token"


def _report(stretches: Sequence[Stretch], verdicts: Sequence[Verdict], folder: Path) -> None:
    """Print what was found, stretch by stretch, and the verdicts."""
    console = out()
    shown = table("Drift and cost by tokens", "tokens", "moments", "outputs", "ns per token", "state", "resident")
    for each in stretches:
        resident = "" if each.resident_bytes is None else size(each.resident_bytes)
        numbers = (f"{each.moments:.1e}", f"{each.outputs:.1e}", f"{each.nanoseconds:,.0f}", size(each.state_bytes))
        shown.add_row(f"{each.tokens:,}", *numbers, resident)
    console.print(shown)
    judged = table("Verdict", "", "worst", "bound", "")
    for verdict in verdicts:
        found = "not measured" if verdict.found is None else f"{verdict.found:.2g}"
        judged.add_row(
            verdict.name.replace("_", " "), found, f"{verdict.bound:.2g}", "ok" if verdict.holds else "FAILED"
        )
    console.print(judged)
    console.print(f"results: {folder}", markup=False, soft_wrap=True)


def _summary(
    settings: Settings, stretches: Sequence[Stretch], verdicts: Sequence[Verdict], folder: Path
) -> dict[str, Any]:
    return {
        "settings": asdict(settings),
        "tokens": max((each.tokens for each in stretches), default=0),
        "stretches": [each.to_dict() | {"ns_per_token": each.nanoseconds} for each in stretches],
        "verdicts": {each.name: asdict(each) | {"holds": each.holds} for each in verdicts},
        "holds": all(each.holds for each in verdicts),
        "out": str(folder),
    }
