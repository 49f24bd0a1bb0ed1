"""Running an experiment: case after case, or side by side where nothing is timed; an interrupted run goes on later."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ... import __version__
from ..journal import Journal
from .experiment import Case, Experiment, Finding
from .registry import EXPERIMENTS


@dataclass(frozen=True)
class Settings:
    """What must agree before findings are taken up again."""

    experiment: str
    seed: int = 0
    version: str = __version__


def run(
    experiment: Experiment,
    folder: Path,
    *,
    seed: int,
    quick: bool,
    processes: int,
    resume: bool,
    progress: Callable[[Finding, int, int], None],
) -> list[Finding]:
    """Measure all cases, each kept in `<name>.jsonl` as it is finished.

    Args:
        processes: that work side by side, where the experiment is not timed.
        resume: take up what the file has.
        progress: called with each finding, how many there are and how many there will be.

    Returns:
        The findings, in the order of the plan.
    """
    settings = Settings(experiment.name, seed)
    journal = Journal(folder / f"{experiment.name}.jsonl", settings, Finding.from_dict, resume=resume)
    cases = experiment.plan(quick)
    missing = [case for case in cases if journal.find(case) is None]
    done = len(cases) - len(missing)
    for finding in _measure(experiment, missing, seed, 1 if experiment.timed else processes):
        journal.append(finding)
        done += 1
        progress(finding, done, len(cases))
    found = (journal.find(case) for case in cases)
    return [finding for finding in found if finding is not None]


def _measure(experiment: Experiment, cases: Sequence[Case], seed: int, processes: int) -> Iterator[Finding]:
    """Findings as they come."""
    tasks = [(experiment.name, case, seed) for case in cases]
    if processes == 1 or len(tasks) <= 1:
        yield from map(measure, tasks)
        return
    # A fork would share the state of PyTorch's threads; a pool that is left is ended, whatever it is doing.
    with multiprocessing.get_context("spawn").Pool(min(processes, len(tasks)), _begin) as pool:
        yield from pool.imap_unordered(measure, tasks)


def _begin() -> None:
    """In a process beside others: one thread, and Ctrl-C is for the one who waits."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def measure(task: tuple[str, Case, int]) -> Finding:
    """Measure a case of an experiment by its name, case and seed."""
    name, case, seed = task
    start = time.perf_counter()
    values = EXPERIMENTS[name].measure(case, seed)
    return Finding(case, values, time.perf_counter() - start)
