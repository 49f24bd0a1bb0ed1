"""What is told of a topic: its results, what its module makes of them, and where they are from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ....errors import MissingDependencyError, StorageError
from ..experiment import Case, Picture, Table, Topic
from ..registry import TOPICS
from ..results import Results, read_results

LONG_TABLE = 16
"""Rows from which on a table is folded away until it is asked for."""


@dataclass(frozen=True)
class Chapter:
    """A topic that was measured.

    Attributes:
        planned: how many cases the full plan has. found: how many of them were measured.
        no_pictures: why there are none; None if there are.
    """

    topic: Topic
    results: Results
    planned: int
    found: int
    conclusions: Sequence[str]
    tables: Sequence[Table]
    pictures: Sequence[Picture]
    no_pictures: str | None

    @property
    def is_partial(self) -> bool:
        """Whether the full plan has more, or other, cases than these."""
        return self.found < self.planned


def read_chapters(folder: Path) -> tuple[list[Chapter], list[Topic]]:
    """The topics that have a file of results in a folder, and those that have none.

    Raises:
        StorageError: a file holds something else.
    """
    paths = {name: folder / f"{name}.json" for name in TOPICS}
    told = [_tell(TOPICS[name], path) for name, path in paths.items() if path.exists()]
    return told, [TOPICS[name] for name, path in paths.items() if not path.exists()]


def how_to_measure(topic: Topic) -> str:
    """The command that makes the results that are missing."""
    return topic.command or f"taylor-attention reproduce --only {topic.name}"


def describe_cases(chapter: Chapter) -> str:
    """How many there are, beside the full plan: a quick look, or an older version, has others."""
    others = len(chapter.results.findings) - chapter.found
    return f"{chapter.found} of the full plan's {chapter.planned} cases" + (f", {others} others" if others else "")


def describe_origin(chapter: Chapter) -> list[tuple[str, str]]:
    """Where the results are from, as names and texts."""
    results, machine = chapter.results, chapter.results.machine
    memory = machine.get("memory_bytes")
    known = (
        machine.get("processor"),
        f"{machine.get('cores')} cores",
        f"{machine['threads']} threads" if "threads" in machine else None,
        f"{memory / 2**30:.0f} GiB" if memory else None,
        f"load {machine['load']}" if machine.get("load") is not None else None,
    )
    return [
        ("Command", results.command),
        ("Seed", str(results.seed)),
        ("Version", f"{results.version}, PyTorch {machine.get('torch')}, Python {machine.get('python')}"),
        ("Machine", ", ".join(text for text in known if text)),
        ("Measured", describe_cases(chapter)),
        ("Time", f"{results.seconds:,.1f} s, the sum over cases"),
    ]


def _tell(topic: Topic, path: Path) -> Chapter:
    results = read_results(path)
    if results.experiment != topic.name:
        raise StorageError(f"{path}: expected results of {topic.name}, got those of {results.experiment}")
    findings, plan = results.findings, {_key(case) for case in topic.plan(False)}
    try:
        try:
            pictures, no_pictures = topic.pictures(findings), None
        except MissingDependencyError as error:
            pictures, no_pictures = [], str(error)
        return Chapter(
            topic,
            results,
            planned=len(plan),
            found=len(plan & {_key(finding.case) for finding in findings}),
            conclusions=topic.conclusions(findings),
            tables=topic.tables(findings),
            pictures=pictures,
            no_pictures=no_pictures,
        )
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        again = f"measure them again: {how_to_measure(topic)}"
        raise StorageError(f"{path}: not results of this version's {topic.name} ({error!r}); {again}") from error


def _key(case: Case) -> str:
    """The same for a case as it is planned and as a file gave it back."""
    return json.dumps(case, sort_keys=True)
