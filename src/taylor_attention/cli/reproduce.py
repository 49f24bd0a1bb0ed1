"""`taylor-attention reproduce`: the paper's results and our own, measured again."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from ..bench.evidence import drawing
from ..bench.evidence.experiment import Experiment, Finding
from ..bench.evidence.registry import EXPERIMENTS
from ..bench.evidence.results import write_results
from ..bench.evidence.run import run
from ..errors import MissingDependencyError
from .console import THREADS, emit_json, err, json_option, make_folder, out_wide, progress_bar, show

_LIST = "\n".join(f"  {each.name:14} {each.question}" for each in EXPERIMENTS.values())


@click.command(short_help="Measure the paper's results and our own again.", epilog=f"\b\nExperiments:\n{_LIST}")
@click.option("--only", multiple=True, type=click.Choice(list(EXPERIMENTS)), help="This experiment; repeatable [all].")
@click.option("--quick", is_flag=True, help="Fewer and smaller cases, for a first look.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Of everything random.")
@click.option("--processes", type=THREADS, help="Side by side, where nothing is timed [the cores].")
@click.option("--out", "folder", type=click.Path(file_okay=False), default="runs/reproduce", show_default=True)
@click.option("--resume", is_flag=True, help="Keep the findings that OUT has; measure the others.")
@json_option
def reproduce(
    only: tuple[str, ...], quick: bool, seed: int, processes: int | None, folder: str, resume: bool, as_json: bool
) -> None:
    """Run experiments: for each a file of findings, OUT/NAME.json, its pictures, and its tables here.

    What was measured is kept as it comes (OUT/NAME.jsonl); `taylor-attention report` makes one page of all.
    """
    chosen = _chosen(only)
    target = make_folder(folder)
    summary: dict[str, Any] = {}
    for experiment in chosen:
        try:
            findings = _run(experiment, target, seed, quick, processes or os.cpu_count() or 1, resume)
        except KeyboardInterrupt:
            message = f"stopped; {folder} keeps what is measured: go on with --resume"
            err().print(message, markup=False, soft_wrap=True)
            sys.exit(130)
        command = f"taylor-attention reproduce --only {experiment.name} --seed {seed}" + " --quick" * quick
        results = write_results(target / f"{experiment.name}.json", experiment.name, command, seed, findings)
        summary[experiment.name] = _finish(experiment, results.findings, target, as_json)
    emit_json({"seed": seed, "quick": quick, "out": folder, "experiments": summary})


def _chosen(only: tuple[str, ...]) -> list[Experiment]:
    """Those asked for, UsageError if one cannot be run; or all that can be."""
    able = []
    for name, experiment in EXPERIMENTS.items():
        missing = experiment.missing() if not only or name in only else None
        if missing is not None and name in only:
            raise click.UsageError(f"--only {name}: {missing}")
        if missing is not None:
            err().print(f"{name} is left out: {missing}", markup=False, soft_wrap=True)
        elif not only or name in only:
            able.append(experiment)
    return able


def _run(experiment: Experiment, folder: Path, seed: int, quick: bool, processes: int, resume: bool) -> list[Finding]:
    """Measure, with a bar, or a line for each case where stderr is no terminal."""
    console = err()
    with progress_bar() as bar:
        task = bar.add_task(experiment.name, total=len(experiment.plan(quick)))

        def progress(finding: Finding, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if not console.is_terminal:
                case = ", ".join(f"{name} {value}" for name, value in finding.case.items())
                line = f"{experiment.name} {done}/{total}: {case}: {finding.seconds:.1f} s"
                console.print(line, markup=False, soft_wrap=True)

        return run(experiment, folder, seed=seed, quick=quick, processes=processes, resume=resume, progress=progress)


def _finish(experiment: Experiment, findings: list[Finding], folder: Path, quiet: bool) -> dict[str, Any]:
    """Draw and print; what the line of JSON says of it."""
    try:
        files, missing = [str(path) for path in drawing.save_pictures(experiment.pictures(findings), folder)], None
    except MissingDependencyError as error:
        files, missing = [], str(error)
    conclusions = experiment.conclusions(findings)
    if not quiet:
        console = out_wide()
        for each in experiment.tables(findings):
            show(console, each)
        for line in (*conclusions, *([missing] if missing else [])):
            console.print(line, markup=False, soft_wrap=True)
    return {"cases": len(findings), "conclusions": conclusions, "figures": files, "no_figures": missing}
