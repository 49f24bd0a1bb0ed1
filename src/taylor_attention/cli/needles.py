"""`taylor-attention needles`: what each way of attending makes of a few keys that stand out of a long background."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from ..bench import needles_figure
from ..bench.evidence.drawing import save_pictures
from ..bench.evidence.needles_shown import number, tabulate_sweeps
from ..bench.journal import Journal
from ..bench.needles import Bench, Result, check
from ..bench.needles_plan import (
    AT,
    DEGREES,
    FULL,
    PARAMETERS,
    QUICK,
    SINKS,
    WINDOW,
    Case,
    Settings,
    Sweep,
    default_heavy,
    in_order,
    make_methods,
    plan_sweeps,
    state_bytes,
)
from ..errors import MissingDependencyError, expect
from .console import (
    COUNT,
    DEGREE,
    MAX_COUNT,
    SEED,
    THREADS,
    Number,
    emit_json,
    err,
    json_option,
    make_folder,
    out_wide,
    progress_bar,
    show,
)


def _default(name: str) -> str:
    values = FULL[name] if isinstance(FULL[name], tuple) else (FULL[name],)
    return f"[{', '.join(f'{value:g}' if isinstance(value, float) else f'{value:,}' for value in values)}]"


@click.command(short_help="Measure the error beside softmax where a few keys stand out.")
@click.option("--margin", multiple=True, type=Number(), help=f"Of needles' scores; repeatable {_default('margin')}.")
@click.option("--ties", multiple=True, type=COUNT, help=f"How many needles; repeatable {_default('ties')}.")
@click.option("--age", multiple=True, type=COUNT, help=f"Tokens before the query; repeatable {_default('age')}.")
@click.option(
    "--at",
    nargs=3,
    type=(Number(), COUNT, COUNT),
    default=AT,
    show_default=True,
    metavar="MARGIN TIES AGE",
    help="What the two others are while one is varied.",
)
@click.option("--length", type=COUNT, help=f"Of the stream, in tokens {_default('length')}.")
@click.option(
    "--window", type=click.IntRange(2, MAX_COUNT), default=WINDOW, show_default=True, help="Of methods with one."
)
@click.option("--sinks", type=COUNT, default=SINKS, show_default=True, help="Of the method that has some.")
@click.option("--heavy", type=COUNT, help="Places of methods that have some, off their window [a quarter of it].")
@click.option("--degree", multiple=True, type=DEGREE, help=f"Of the series; repeatable {[*DEGREES]}.")
@click.option("--method", multiple=True, help="Measure this one only, by its name in the tables; repeatable [all].")
@click.option("--head-dim", type=COUNT, default=Settings.head_dim, show_default=True, help="Of keys and values.")
@click.option("--spread", type=Number(), default=Settings.spread, show_default=True, help="Of the background's scores.")
@click.option("--mean", type=Number(), default=Settings.mean, show_default=True, help="Of the background's scores.")
@click.option(
    "--asked",
    type=Number(0, 1),
    default=Settings.asked,
    show_default=True,
    help="Chance of each earlier query to ask for needles as the last one does.",
)
@click.option("--heads", type=COUNT, help=f"Of a sequence {_default('heads')}.")
@click.option("--seeds", type=COUNT, help=f"Sequences to measure on {_default('seeds')}.")
@click.option("--seed", type=SEED, default=Settings.seed, show_default=True, help="Of the first.")
@click.option("--threads", type=THREADS, help="Of PyTorch [as PyTorch chooses].")
@click.option("--backend", default=Settings.backend, show_default=True, help="As attention(backend=...) takes it.")
@click.option("--out", "folder", type=click.Path(file_okay=False), default="runs/needles", show_default=True)
@click.option("--resume", is_flag=True, help="Keep the results that OUT has of the same settings; measure the others.")
@click.option("--quick", is_flag=True, help="Shorter streams and fewer points, where no options say which.")
@json_option
def needles(folder: str, resume: bool, quick: bool, as_json: bool, **given: Any) -> None:
    """Measure how far outputs are from softmax where a few keys, the needles, stand out of random background.

    Three sweeps: the needles' margin over the background's mean score (at an age outside of the window and inside),
    their number, and their age. Ends with tables of medians, a line of JSON, and OUT/{results.jsonl, needles.png};
    about 3 minutes on one core, or --quick.
    """
    defaults = QUICK if quick else FULL
    given = {name: defaults.get(name, value) if value in (None, ()) else value for name, value in given.items()}
    window, sinks, heavy = (given.pop(name) for name in ("window", "sinks", "heavy"))
    heavy = heavy or default_heavy(window)
    expect(heavy < window, "--heavy", f"fewer than the window's {window}", heavy)
    margins, ties, ages = (given.pop(name) for name in PARAMETERS)
    sweeps = plan_sweeps(Case(*given.pop("at")), margins, ties, ages, window - heavy)
    degrees = sorted(set(given.pop("degree") or DEGREES))
    methods = make_methods(window, sinks, heavy, degrees, given["head_dim"])
    given["threads"] = given["threads"] or torch.get_num_threads()
    settings = Settings(_choose(methods, given.pop("method")), **given)
    cases = in_order(sweeps)
    check(cases, settings)
    target = make_folder(folder)
    journal = Journal(target / "results.jsonl", settings, Result.from_dict, resume=resume)
    try:
        results = _measure_all(cases, Bench(settings), journal)
    except KeyboardInterrupt:
        message = f"stopped; {folder} keeps what is measured: go on with --resume"
        err().print(message, markup=False, soft_wrap=True)
        sys.exit(130)
    summary = _summarise(settings, sweeps, results, target)
    if not as_json:
        _report(summary, settings, sweeps, results)
    emit_json(summary)


def _choose(methods: dict[str, dict[str, Any]], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    unknown = [name for name in names if name not in methods]
    expect(not unknown, "--method", f"one of {', '.join(methods)}", ", ".join(unknown))
    return {name: options for name, options in methods.items() if name in names or not names}


def _measure_all(cases: Sequence[Case], bench: Bench, journal: Journal[Result]) -> dict[Case, Result]:
    """The results of all cases, those of the journal as they are; a line for each where stderr is no terminal."""
    console, bar, results = err(), progress_bar(), {}
    task = bar.add_task("measuring", total=len(cases))
    with bar:
        for case in cases:
            bar.update(task, description=_describe(case))
            found = journal.find(case)
            if found is None:
                found = bench.measure(case)
                journal.append(found)
                if not console.is_terminal:
                    errors = ", ".join(f"{name} {number(found.quartiles(name)[1])}" for name in found.errors)
                    console.print(f"{_describe(case)}: {errors}", markup=False, soft_wrap=True)
            results[case] = found
            bar.advance(task)
    return results


def _describe(case: Case) -> str:
    return f"margin {case.margin:g}, ties {case.ties:,}, age {case.age:,}"


def _summarise(
    settings: Settings, sweeps: Sequence[Sweep], results: Mapping[Case, Result], folder: Path
) -> dict[str, Any]:
    """Everything that the run found, with its figure drawn."""
    try:
        [path] = save_pictures([needles_figure.draw(sweeps, results, settings)], folder)
        figure, missing = str(path), None
    except MissingDependencyError as error:
        figure, missing = None, str(error)
    return {
        "settings": asdict(settings),
        "bytes_per_head": {name: state_bytes(each, settings.head_dim) for name, each in settings.methods.items()},
        "sweeps": [asdict(sweep) for sweep in sweeps],
        "results": [_brief(result) for result in results.values()],
        "figure": figure,
        "no_figure": missing,
        "out": str(folder),
    }


def _brief(result: Result) -> dict[str, Any]:
    """A result without the errors of single streams, which are in results.jsonl."""
    return {name: value for name, value in result.to_dict().items() if name != "errors"}


def _report(
    summary: dict[str, Any], settings: Settings, sweeps: Sequence[Sweep], results: Mapping[Case, Result]
) -> None:
    """Print a table per sweep, what the numbers are, and where the files are."""
    console, figure = out_wide(), summary["figure"]
    for each in tabulate_sweeps(settings, sweeps, results):
        show(console, each)
    for line in (
        f"no figure: {summary['no_figure']}" if figure is None else f"figure: {figure}",
        f"results: {summary['out']}",
    ):
        console.print(line, markup=False, soft_wrap=True)
