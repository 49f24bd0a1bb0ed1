"""Running experiments: every case once, findings kept as they come, the same files again from the same findings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from taylor_attention.bench.evidence import run as running
from taylor_attention.bench.evidence.experiment import Experiment, Finding, number, select
from taylor_attention.bench.evidence.registry import EXPERIMENTS
from taylor_attention.bench.evidence.results import Results, read_results, write_results
from taylor_attention.cli.app import app
from taylor_attention.errors import StorageError


def double(case: dict[str, Any], seed: int) -> dict[str, Any]:
    return {"twice": 2 * case["n"], "seed": seed}


TOY = Experiment(
    "toy",
    "A toy",
    "What is twice n?",
    plan=lambda quick: [{"n": n} for n in range(2 if quick else 5)],
    measure=double,
    tables=lambda findings: [],
    pictures=lambda findings: [],
    conclusions=lambda findings: [],
)


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Finding]]:
    monkeypatch.setitem(EXPERIMENTS, "toy", TOY)

    def go(experiment: Experiment = TOY, **options: Any) -> list[Finding]:
        options = {"seed": 0, "quick": False, "processes": 1, "resume": False, "progress": lambda *_: None} | options
        return running.run(experiment, tmp_path, **options)

    return go


def test_every_case_is_measured_with_the_seed_in_the_order_of_the_plan(go: Callable[..., list[Finding]]) -> None:
    assert [(each.case["n"], each.values) for each in go(seed=7)] == [
        (n, {"twice": 2 * n, "seed": 7}) for n in range(5)
    ]


def test_an_interrupted_run_goes_on(go: Callable[..., list[Finding]]) -> None:
    told: list[int] = []

    def stop(finding: Finding, done: int, total: int) -> None:
        told.append(finding.case["n"])
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(progress=stop)
    assert len(go(resume=True, progress=lambda finding, *_: told.append(finding.case["n"]))) == 5
    assert told == [0, 1, 2, 3, 4]


def test_another_seed_is_measured_anew(go: Callable[..., list[Finding]]) -> None:
    go(seed=1)
    assert {each.values["seed"] for each in go(seed=2, resume=True)} == {2}


def test_cases_run_side_by_side_unless_they_are_timed(
    go: Callable[..., list[Finding]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def measure(experiment: Experiment, cases: Any, seed: int, processes: int) -> list[Finding]:
        asked.append(processes)
        return [Finding(case, {}, 0.0) for case in cases]

    monkeypatch.setattr(running, "_measure", measure)
    go(processes=4)
    go(replace(TOY, timed=True), processes=4)
    assert asked == [4, 1]


def test_processes_find_what_one_does(tmp_path: Path) -> None:
    """In real processes, which know an experiment by its name."""
    findings = [
        running.run(
            EXPERIMENTS["sizes"],
            tmp_path,
            seed=0,
            quick=True,
            processes=processes,
            resume=False,
            progress=lambda *_: None,
        )
        for processes in (1, 2)
    ]
    assert [(each.case, each.values) for each in findings[0]] == [(each.case, each.values) for each in findings[1]]


def test_a_file_of_results_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "toy.json"
    written = write_results(path, "toy", "a command", 3, [Finding({"n": 1}, {"x": [1 / 3, None, "a"]}, 0.25)])
    assert read_results(path) == written
    assert written.findings[0].values == {"x": [0.333333, None, "a"]}
    assert (written.command, written.seed, written.seconds) == ("a command", 3, 0.25)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"findings": [{}]}', '{"findings": []}', "\0"])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "toy.json").write_text(text)
    with pytest.raises(StorageError, match=r"toy\.json: not a file of results"):
        read_results(tmp_path / "toy.json")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.123456, "0.123"), (12.345, "12.3"), (1234.5, "1,234"), (1.5e7, "1.50e+07"), (1e-5, "1.00e-05")],
)
def test_numbers_as_tables_show_them(value: float, text: str) -> None:
    assert number(value) == text


def test_select_takes_the_cases_asked_for() -> None:
    findings = [Finding({"n": n, "m": n % 2}, {}, 0.0) for n in range(4)]
    assert [each.case["n"] for each in select(findings, m=1)] == [1, 3]


def test_the_command_leaves_files_and_a_line_of_json(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["reproduce", "--only", "sizes", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    assert "515 tokens at d = 16" in summary["experiments"]["sizes"]["conclusions"][0]  # DESIGN: d=16: 515
    results: Results = read_results(tmp_path / "sizes.json")
    assert results.command == "taylor-attention reproduce --only sizes --seed 0 --quick"
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")
