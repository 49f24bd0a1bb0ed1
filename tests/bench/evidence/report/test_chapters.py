"""What is told of results: all of it, where it is from, and what is missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pages import HOSTILE, WILD, write_wild
from taylor_attention.bench.evidence.registry import TOPICS
from taylor_attention.bench.evidence.report.chapters import describe_origin, read_chapters
from taylor_attention.errors import MissingDependencyError, StorageError


def test_what_has_a_file_is_told_and_the_rest_is_missing(folder: Path) -> None:
    told, missing = read_chapters(folder)
    assert [each.topic.name for each in told] == ["sizes", "wild"]
    assert [each.name for each in missing] == ["absent"]


def test_cases_are_counted_against_the_full_plan(folder: Path) -> None:
    sizes, wild = read_chapters(folder)[0]
    assert (sizes.found, sizes.is_partial) == (sizes.planned, False)
    assert (wild.found, wild.planned, wild.is_partial) == (30, 40, True)


def test_the_origin_is_all_of_it(folder: Path) -> None:
    path = folder / "wild.json"
    fields = json.loads(path.read_text())
    machine = {"processor": "A 1", "cores": 3, "memory_bytes": 2**34, "load": 0.5, "torch": "9", "python": "8"}
    fields["findings"].append({"case": {"n": "unplanned"}, "values": {"y": 1}, "seconds": 1000})
    path.write_text(json.dumps(fields | {"machine": machine, "version": "1.2.3"}))
    assert describe_origin(read_chapters(folder)[0][1]) == [
        ("Command", f"a command {HOSTILE}"),
        ("Seed", "7"),
        ("Version", "1.2.3, PyTorch 9, Python 8"),
        ("Machine", "A 1, 3 cores, 16 GiB, load 0.5"),
        ("Measured", "30 of the full plan's 40 cases, 1 others"),
        ("Time", "1,007.5 s, the sum over cases"),
    ]


def test_a_machine_that_says_little_is_told_as_far_as_it_does(folder: Path) -> None:
    path = folder / "wild.json"
    machine = {"processor": "A", "cores": 1, "memory_bytes": None, "load": None, "torch": "9", "python": "8"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": machine}))
    assert ("Machine", "A, 1 cores") in describe_origin(read_chapters(folder)[0][1])


def test_results_of_another_experiment_are_refused(folder: Path) -> None:
    (folder / "absent.json").write_bytes((folder / "wild.json").read_bytes())
    with pytest.raises(StorageError, match=r"absent\.json: expected results of absent, got those of wild"):
        read_chapters(folder)


def test_findings_of_another_version_are_refused_by_one_line(folder: Path) -> None:
    write_wild(folder, values="z")
    expected = r"wild\.json: not results of this version's wild \(KeyError\('y'\)\); measure them again: taylor"
    with pytest.raises(StorageError, match=expected):
        read_chapters(folder)


def test_without_matplotlib_the_rest_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(findings: object) -> list[object]:
        raise MissingDependencyError("drawing needs something")

    monkeypatch.setitem(TOPICS, "wild", replace(WILD, pictures=lack))
    wild = read_chapters(folder)[0][1]
    assert (wild.pictures, wild.no_pictures) == ([], "drawing needs something")
    assert wild.tables
