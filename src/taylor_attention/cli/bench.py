"""`taylor-attention bench`: what attention costs on this machine, beside softmax, the plain recurrence and rivals."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch

from ..bench import facts, plans
from ..bench.cases import KINDS, Case, Result, Settings
from ..bench.evidence.drawing import save_pictures
from ..bench.evidence.experiment import Finding
from ..bench.evidence.results import write_results
from ..bench.evidence.speed import TOPIC
from ..bench.evidence.speed_drawn import draw
from ..bench.journal import Journal
from ..bench.machine import COPY, GEMM, READ, Machine, describe
from ..bench.measure import Bench, check, measure
from ..bench.rivals import Factory, load_factory
from ..bench.turns import time_by_turns
from ..core.threads import thread_count
from ..errors import LARGEST_INT, MissingDependencyError, expect
from .bench_report import describe_case, describe_result, report
from .console import (
    COUNT,
    COUNT_OR_NONE,
    DEGREE,
    SECONDS,
    SEED,
    THREADS,
    emit_json,
    err,
    json_option,
    make_folder,
    progress_bar,
)

_RIVALS = """--against my.py:rival (or module:rival) names a function that makes a rival, as this makes one of the
paper's reference implementation; `attend` gets [1, heads, T, d] tensors and keeps its own state:

\b
  def rival(heads, head_dim, value_dim, degree, causal):
      model = SymmetryAwareTaylorApproximatedAttention(head_dim, value_dim, causal, degree + 1)
      def attend(query, key, value, continue_sequence):
          return model(query, key, value, continue_sequence)
      return attend

A rival whose memory grows with T should cut long inputs in blocks."""


def _default(name: str, defaults: Mapping[str, Any] = plans.FULL) -> str:
    values = defaults[name] if isinstance(defaults[name], tuple) else (defaults[name],)
    return f"[{', '.join(str(value) for value in values)}]"


_NEAR = ", ".join(f"--{name} {_default(name, plans.FULL_NEAR)}" for name in ("only", "degree", "context", "length"))


@click.command(short_help="Measure decode, prefill, training and a model beside softmax.", epilog=_RIVALS)
@click.option("--only", multiple=True, type=click.Choice(KINDS), help="Measure this kind; repeatable [all].")
@click.option("--head-dim", multiple=True, type=COUNT, help=f"Head size; repeatable {_default('head_dim')}.")
@click.option("--degree", multiple=True, type=DEGREE, help=f"Of the series; repeatable {_default('degree')}.")
@click.option(
    "--window",
    multiple=True,
    type=COUNT_OR_NONE,
    help=f"Latest tokens, weighed exactly; repeatable {_default('window')}. Above 0 the others default to {_NEAR}.",
)
@click.option("--width", type=COUNT, default=Settings.width, show_default=True, help="Heads times head size.")
@click.option("--context", multiple=True, type=COUNT, help="Of a decode step; repeatable [16, 64, ..., 1M, 10M].")
@click.option("--length", multiple=True, type=COUNT, help=f"Of a prefill; repeatable {_default('length')}.")
@click.option("--against", multiple=True, metavar="PLACE:FUNCTION", help="A rival's factory, see below; repeatable.")
@click.option("--threads", type=THREADS, help="Of PyTorch [as PyTorch chooses].")
@click.option("--repeats", type=COUNT, help=f"Turns of a case at most {_default('repeats')}.")
@click.option("--budget", type=SECONDS, help=f"Seconds to time a case, three turns however {_default('budget')}.")
@click.option(
    "--patience",
    type=SECONDS,
    default=Settings.patience,
    show_default=True,
    help="Seconds that a rival's call may take, ten times as many its reading of a context; slower ones are skipped.",
)
@click.option("--seed", type=SEED, default=Settings.seed, show_default=True, help="Of the inputs.")
@click.option("--backend", default=Settings.backend, show_default=True, help="As attention(backend=...) takes it.")
@click.option("--chunk", type=COUNT, help="As attention(chunk_size=...) takes it [the library's choice].")
@click.option(
    "--max-state-bytes",
    type=click.IntRange(1, LARGEST_INT),
    default=Settings.max_state_bytes,
    show_default=True,
    help="Skip problems of larger states.",
)
@click.option("--out", "folder", type=click.Path(file_okay=False), default="runs/bench", show_default=True)
@click.option("--resume", is_flag=True, help="Keep the results that OUT has of the same settings; measure the others.")
@click.option("--quick", is_flag=True, help="Fewer and smaller problems, where no options say which.")
@json_option
def bench(folder: str, resume: bool, quick: bool, as_json: bool, **asked: Any) -> None:
    """Measure decode, prefill and training steps, by turns with softmax, the plain recurrence and rivals.

    With a window, by turns with the method without it, softmax, and softmax over the window alone. Then a generate step
    of the shipped model and of its softmax twin, and what part of it is attention. Every result is checked before it is
    timed, those of attention against float64. Ends with tables, a line of JSON, and OUT/{results.jsonl,
    speed.json, *.png}; about half an hour on two cores, or --quick. `taylor-attention report` tells it from speed.json.
    """
    defaults = plans.QUICK if quick else plans.FULL
    cases = plans.plan({name: asked.pop(name) for name in ("window", *plans.SHAPE)}, quick)
    asked = {name: defaults.get(name) if value is None else value for name, value in asked.items()}
    factories = _load_rivals(asked.pop("against"))
    asked["threads"] = asked["threads"] or torch.get_num_threads()
    settings = Settings(**asked, against=tuple(factories))
    check(cases, settings)
    target = make_folder(folder)
    journal = Journal(target / "results.jsonl", settings, Result.from_dict, resume=resume)
    shared = Bench(settings, factories, Machine())
    machine = describe() | {"threads": settings.threads} | _rates(shared)
    try:
        results = _measure_all(cases, shared, journal)
    except KeyboardInterrupt:
        message = f"stopped; {folder} keeps what is measured: go on with --resume"
        err().print(message, markup=False, soft_wrap=True)
        sys.exit(130)
    _write(target, settings, machine, results)
    summary = _summarise(settings, machine, results, target)
    if not as_json:
        report(summary, results)
    emit_json(summary)


def _load_rivals(places: Sequence[str]) -> dict[str, Factory]:
    found = dict(load_factory(place) for place in places)
    expect(len(found) == len(places), "--against", "rivals of different names", ", ".join(places))
    return found


def _rates(shared: Bench) -> dict[str, float]:
    """FLOP/s of a large GEMM and bytes/s of reading and copying, by turns, before everything else."""
    machine, settings = shared.machine, shared.settings
    with thread_count(settings.threads):
        contestants = machine.contestants(GEMM, READ, COPY)
        return machine.rates(time_by_turns(contestants, repeats=settings.repeats, budget=settings.budget))


def _measure_all(cases: Sequence[Case], shared: Bench, journal: Journal[Result]) -> list[Result]:
    """The results of all cases, those of the journal as they are; a line for each where stderr is no terminal."""
    console, bar, results = err(), progress_bar(), []
    task = bar.add_task("measuring", total=len(cases))
    with bar:
        for case in cases:
            bar.update(task, description=describe_case(case))
            found = journal.find(case)
            if found is None:
                start = time.perf_counter()
                found = replace(measure(case, shared), seconds=time.perf_counter() - start)
                journal.append(found)
                if not console.is_terminal:
                    console.print(describe_result(found), markup=False, soft_wrap=True)
            results.append(found)
            bar.advance(task)
    return results


def _write(folder: Path, settings: Settings, machine: Mapping[str, Any], results: Sequence[Result]) -> None:
    """The file that `taylor-attention report` reads."""
    findings = []
    for result in results:
        values = result.to_dict()
        findings.append(Finding(values.pop("case"), values, values.pop("seconds")))
    write_results(folder / f"{TOPIC.name}.json", TOPIC.name, _command(), settings.seed, findings, machine)


def _command() -> str:
    """What was asked for, as a line to type; rivals by their names, without the places of their files."""
    context = click.get_current_context()
    words = []
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") is click.core.ParameterSource.COMMANDLINE
        if not given or option.name in ("folder", "resume", "as_json"):
            continue
        value = context.params[option.name or ""]
        for each in value if isinstance(value, tuple) else (value,):
            text = Path(each).name if option.name == "against" else str(each)
            words += [option.opts[0]] if each is True else [option.opts[0], text]
    return shlex.join(["taylor-attention", "bench", *words])


def _summarise(
    settings: Settings, machine: Mapping[str, Any], results: Sequence[Result], folder: Path
) -> dict[str, Any]:
    """Everything that the run found, with its plots drawn."""
    try:
        drawn, missing = [str(path) for path in save_pictures(draw(results), folder)], None
    except MissingDependencyError as error:
        drawn, missing = [], str(error)
    peaks = [result.peak_bytes for result in results if result.peak_bytes is not None]
    return {
        "settings": asdict(settings),
        "machine": machine,
        "results": [result.to_dict() for result in results],
        "facts": facts.derive(results),
        "peak_bytes": max(peaks, default=None),
        "figures": drawn,
        "no_figures": missing,
        "out": str(folder),
    }
