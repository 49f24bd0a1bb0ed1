"""The command: results on stdout with JSON as the last line, files in its folder, and resuming."""

from __future__ import annotations

import json
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from taylor_attention.bench.cases import Case, Outcome
from taylor_attention.bench.cases import Result as Measured
from taylor_attention.bench.evidence.results import read_results
from taylor_attention.bench.machine import Machine
from taylor_attention.cli import bench as command
from taylor_attention.cli.app import app

FAST = ["--quick", "--width", "16", "--head-dim", "8", "--repeats", "1", "--budget", "0.01", "--threads", "1"]
SMALL = [*FAST, "--window", "0", "--length", "40", "--context", "64", "--context", "600"]
SMALL += ["--only", "prefill", "--only", "train", "--only", "decode"]
RIVAL = "from taylor_attention.bench.rivals import Recurrent\ndef rival(**shape):\n    return Recurrent(**shape)\n"


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "Machine", partial(Machine, gemm_size=16, nbytes=4096))


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def ok(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def test_a_quick_run_ends_with_tables_files_and_a_line_of_json(tmp_path: Path):
    (tmp_path / "mine.py").write_text(RIVAL)
    result = ok(*SMALL, "--against", tmp_path / "mine.py:rival", "--out", tmp_path / "new" / "out")
    *shown, last = result.stdout.splitlines()
    found = json.loads(last)
    assert [each["case"]["kind"] for each in found["results"]] == ["prefill", "train", "decode", "decode"]
    assert found["facts"]["decode"][0]["speedup"].keys() == {"sdpa", "recurrent", "mine.py:rival"}
    assert found["settings"]["against"] == ["mine.py:rival"]
    assert found["machine"]["gemm_flops_per_s"] > 0
    text = "\n".join(shown)
    assert all(title in text for title in ("Prefill: causal", "Training: causal", "Decode: one token"))
    assert "mine.py:rival ms" in text
    names = sorted(path.name for path in (tmp_path / "new" / "out").iterdir())
    assert names == [
        "results.jsonl",
        "speed-decode-fraction.png",
        "speed-decode.png",
        "speed-prefill-fraction.png",
        "speed-prefill.png",
        "speed.json",
    ]
    lines = (tmp_path / "new" / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["outcomes"] for line in lines] == [each["outcomes"] for each in found["results"]]
    assert result.stderr.count("head size 8, degree 2") == 4  # progress, a line per case
    kept = read_results(tmp_path / "new" / "out" / "speed.json")
    assert sorted(shlex.split(kept.command)) == sorted(
        ["taylor-attention", "bench", *SMALL, "--against", "mine.py:rival"]
    )
    assert [each.case for each in kept.findings] == [each["case"] for each in found["results"]]
    assert all(each.seconds > 0 for each in kept.findings)
    assert kept.machine["threads"] == 1


def test_windows_stand_beside_the_method_without_them(tmp_path: Path):
    sizes = ["--length", "40", "--context", "600"]
    result = ok(*FAST, *sizes, "--only", "prefill", "--only", "decode", "--window", 8, "--window", 0, "--out", tmp_path)
    *shown, last = result.stdout.splitlines()
    found = json.loads(last)
    assert [each["case"]["window"] for each in found["results"]] == [0, 0, 8, 8]
    [_, near] = found["facts"]["prefill"]
    assert near["window"] == 8
    assert near["speedup"].keys() == {"pure", "sdpa", "sliding"}
    assert near["window_ratio"] == {"40": found["results"][2]["window_ratio"]}
    text = "\n".join(shown)
    assert "8, 2, window 8" in text
    assert "/ (pure + window): " in text
    assert "Of 1 prefills with a window, " in text
    assert {path.name for path in tmp_path.iterdir()} >= {"speed-decode.png", "speed-windows.png"}
    assert "decode, head size 8, degree 2, window 8, 600 tokens: taylor" in result.stderr


@pytest.mark.usefixtures("without_matplotlib")
def test_a_run_without_windows_says_nothing_of_them(tmp_path: Path):
    shown = "\n".join(ok(*SMALL, "--out", tmp_path).stdout.splitlines()[:-1])
    assert ", window" not in shown
    assert "(pure" not in shown


PLANS = {
    "all": ([], {0, 64, 256}, {"prefill", "decode"}, {2, 3}, {8192, 1024, 65536}),
    "one window": (["--window", "100"], {100}, {"prefill", "decode"}, {2, 3}, {8192, 1024, 65536}),
    "as asked": (
        ["--window", "8", "--only", "train", "--degree", "4", "--length", "512"],
        {8},
        {"train"},
        {4},
        {512},
    ),
    "kinds without windows": (["--only", "start", "--window", "8", "--window", "9"], {0}, set(), set(), set()),
}


@pytest.mark.usefixtures("without_matplotlib")
@pytest.mark.parametrize(("asked", "windows", "kinds", "degrees", "lengths"), PLANS.values(), ids=PLANS.keys())
def test_windows_are_measured_as_asked_or_at_fewer_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked, windows, kinds, degrees, lengths
):
    cases: list[Case] = []
    skip = {"taylor": Outcome(skipped="not now"), "import": Outcome(skipped="not now")}
    monkeypatch.setattr(command, "measure", lambda case, shared: cases.append(case) or Measured(case, skip))
    result = ok("--repeats", 1, "--budget", 0.01, "--json", "--out", tmp_path, *asked)
    near = [case for case in cases if case.window]
    assert {case.window for case in cases} == windows
    assert {case.kind for case in near} == kinds
    assert {case.degree for case in near} == degrees
    assert {case.length for case in near} == lengths
    assert len(set(cases)) == len(json.loads(result.stdout)["results"])


@pytest.mark.usefixtures("without_matplotlib")
def test_with_json_there_is_nothing_else_on_stdout(tmp_path: Path):
    result = ok(*SMALL, "--json", "--out", tmp_path)
    assert result.stdout.count("\n") == 1
    assert json.loads(result.stdout)["out"] == str(tmp_path)


@pytest.mark.usefixtures("without_matplotlib")
def test_resume_measures_only_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    measure = command.measure
    monkeypatch.setattr(command, "measure", lambda case, shared: asked.append(case.kind) or measure(case, shared))
    first = json.loads(ok(*SMALL, "--json", "--out", tmp_path).stdout)
    path = tmp_path / "results.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]) + '{"settings":')
    asked.clear()
    again = json.loads(ok(*SMALL, "--json", "--resume", "--out", tmp_path).stdout)
    assert asked == ["decode"]
    assert again["results"][:3] == first["results"][:3]
    ok(*SMALL, "--json", "--resume", "--seed", 1, "--out", tmp_path)
    assert asked == ["decode", "prefill", "train", "decode", "decode"]


def test_a_wrong_rival_ends_the_run_and_what_was_measured_stays(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "from taylor_attention.bench.rivals import Recurrent\n"
        "import torch\n"
        "def rival(**shape):\n"
        "    inner = Recurrent(**shape)\n"
        "    return lambda *inputs: inner(*inputs) * (1.01 if torch.is_grad_enabled() else 1)\n"
    )
    result = run(*SMALL, "--against", tmp_path / "mine.py:rival", "--out", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith("error: mine.py:rival: expected a relative error")
    [line] = (tmp_path / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["case"]["kind"] == "prefill"


def test_what_is_skipped_is_said(tmp_path: Path):
    shown = ok(*SMALL, "--max-state-bytes", 1000, "--out", tmp_path).stdout
    assert "Left out: taylor in decode: larger than --max-state-bytes 1,000 (2 cases)" in shown


@pytest.mark.usefixtures("without_matplotlib")
def test_without_matplotlib_everything_else_works(tmp_path: Path):
    shown = ok(*SMALL, "--out", tmp_path).stdout
    assert "no figures: drawing the figures needs matplotlib: pip install 'taylor-attention[bench]'" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.jsonl", "speed.json"]


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(case, shared):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure", interrupt)
    result = run(*SMALL, "--out", tmp_path)
    assert (result.exit_code, result.stdout) == (130, "")
    assert "go on with --resume" in result.stderr
