"""What the benchmark's results are told as: aims judged by the worst figure, tables, pictures, sentences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from taylor_attention.bench.cases import EARLY, FORWARD, OURS, Case, Outcome, Result
from taylor_attention.bench.evidence import speed_drawn, speed_shown
from taylor_attention.bench.evidence.drawing import save_pictures
from taylor_attention.bench.evidence.experiment import Finding, Table
from taylor_attention.bench.evidence.report.chapters import read_chapters
from taylor_attention.bench.evidence.results import write_results
from taylor_attention.bench.evidence.speed import TOPIC
from taylor_attention.bench.evidence.speed_aims import count_reached, tabulate_aims
from taylor_attention.bench.machine import GEMM, READ

RATES = {GEMM: 2e9, READ: 1e9}


def made(kind: str, length: int, head_dim: int = 8, degree: int = 3, window: int = 0, **times: float | None) -> Result:
    """A case whose contestants took these milliseconds; `ours` and the like stand for names with spaces."""
    names = {"ours": OURS, "forward": FORWARD, "early": EARLY}
    outcomes = {
        names.get(name, name): Outcome(skipped="too long: it is") if time is None else Outcome(time, nbytes=5_000_000)
        for name, time in times.items()
    }
    case = Case(kind, head_dim, degree, length, window)
    return Result(case, outcomes, RATES, needed=1_000_000, window_needed=2_000_000 if window else None, seconds=0.5)


RESULTS = [
    made("start", 256, **{"import": 90.0, "first call": 15.0, "second call": 5.0}),
    made("prefill", 1024, ours=1.0, sdpa=2.0),
    made("prefill", 8192, ours=2.0, sdpa=90.0),  # a quarter of the GEMM rate
    made("prefill", 8192, 64, ours=0.5, sdpa=90.0),  # all of it
    made("train", 8192, ours=7.0, forward=2.0, sdpa=9.0),  # 3.5 times
    made("train", 8192, 64, ours=7.2, forward=2.0, sdpa=9.0),
    made("decode", 1024, ours=1.0, sdpa=3.0, recurrent=8.0, **{"rival.py:theirs": 50.0}),
    made("decode", 4096, ours=1.05, early=1.0, sdpa=12.0, recurrent=8.0, **{"rival.py:theirs": 30.0}),
    made("decode", 4096, 64, ours=2.0, early=1.0, sdpa=1.0, recurrent=None),
    made("prefill", 8192, window=64, ours=3.9, sdpa=90.0, pure=2.0, sliding=4.0),  # 1.3 times 2 + 1 ms
    made("prefill", 8192, 64, window=64, ours=4.0, sdpa=90.0, pure=2.0, sliding=4.0),
]
FINDINGS = [
    Finding(asdict(each.case), {k: v for k, v in each.to_dict().items() if k not in ("case", "seconds")}, each.seconds)
    for each in RESULTS
]


def cells(table: Table) -> dict[str, tuple[str, ...]]:
    return {row[0]: row[1:] for row in table.rows}


def test_an_aim_is_held_against_the_worst_figure_or_the_median_where_contexts_make_no_difference():
    told = cells(tabulate_aims(RESULTS))
    assert told["prefill: of the GEMM rate"] == ("0.25 (0.3, missed)", "-", "-", "1 (0.75)")
    assert told["decoding: times as fast as rival.py:theirs"] == ("39.29, at worst 28.57 (40, missed)", "-", "-", "-")
    assert told["decoding: of the read bandwidth"] == ("-", "-", "-", "0.5 (0.8, missed)")
    assert told["decoding: longest or shortest step over that at 1,024"] == ("1.05 (1.1)", "-", "-", "2 (1.1, missed)")
    assert told["training step, degree 3: over its forward pass"] == ("3.5 (3.5)", "-", "-", "3.6 (3.5, missed)")
    what = "prefill, degree 3, window 64: over the pure method and the window's FLOPs"
    assert told[what] == ("1.3 (1.3)", "-", "-", "1.333 (1.3, missed)")
    assert not any("degree 2" in what for what in told)  # nothing of it was measured


def test_faster_at_the_shortest_length_bounds_where_softmax_is_overtaken():
    told = cells(tabulate_aims(RESULTS))
    what = "decoding: faster than softmax from, over the memory break-even"
    assert told[what] == ("11.01 or less (1.5)", "-", "-", "inf (1.5, missed)")
    what = "prefill, degree 3: faster than softmax from, over the FLOP break-even"
    assert told[what][0] == "2.626 or less (2)"  # 1,024 of 390 tokens: not known
    assert told[what][3] == "0.08328 or less (2)"


def test_only_what_is_known_is_counted():
    assert count_reached(RESULTS) == (5, 12)
    assert count_reached(RESULTS[:1]) == (0, 0)


def test_tables_have_what_was_measured_and_windows_their_own():
    told = {table.title: table for table in speed_shown.tabulate(RESULTS)}
    decode = told["Decode: one token after a context"]
    assert decode.columns[1:5] == ("taylor ms", "of limit", "/ at 1,024", "state")
    assert cells(decode)["8, 3: 4,096"] == ("1.05", "0.952", "1.05", "5 MB", "12 (11.4x)", "8 (7.62x)", "30 (28.6x)")
    assert cells(decode)["64, 3: 4,096"][4:] == ("1 (0.5x)", "-", "-")
    near = told["Prefill: causal, forward, with a window"]
    assert cells(near)["8, 3, window 64: 8,192"][2] == "1.3"
    assert cells(told["Training: causal, forward and backward"])["8, 3: 8,192"][:2] == ("7", "3.5")
    assert cells(told["Starting, in fresh processes"]) == {"8, 3": ("90", "15", "5")}
    assert cells(told["Decoding over contexts"])["8, 3"] == ("1.05", "1,024 or less", "93", "11")
    assert cells(told["Decoding over contexts"])["64, 3"][1] == "beyond those measured"
    assert "Training: causal, forward and backward, with a window" not in told


def test_sentences_say_how_much_is_reached_and_what_was_left_out():
    lines = speed_shown.conclude(RESULTS)
    assert lines[0] == "Of 12 figures that were aimed at, 5 are reached."
    assert any("a large GEMM ran at 2 GFLOP/s" in line for line in lines)
    assert any("Importing the package takes 90 ms" in line for line in lines)
    assert "Of 2 prefills with a window, 1 take 1.3 times their parts at most." in lines
    assert lines[-1] == "Left out: recurrent in decode: too long (1 cases)."


def test_a_model_is_told_by_its_attentions_share():
    made = [
        Result(
            Case("model", 16, 2, n), {"taylor": Outcome(4.0, attention=1.0), "softmax": Outcome(8.0, attention=took)}
        )
        for n, took in ((64, 2.0), (4096, 4.0))
    ]
    [line] = speed_shown.conclude(made)
    assert line == "Of generating one byte after 64 to 4,096, attention is 25% to 25% in taylor, 25% to 50% in softmax."
    [table] = speed_shown.tabulate(made)
    assert table.rows[1] == ("4,096", "4", "1 (25%)", "-", "8", "4 (50%)", "-")


def test_a_file_tells_the_same_as_the_run(tmp_path: Path):
    write_results(tmp_path / "speed.json", "speed", "taylor-attention bench", 0, FINDINGS, {"threads": 2, "cores": 2})
    [chapter], _ = read_chapters(tmp_path)
    assert chapter.tables == speed_shown.tabulate(RESULTS)
    assert chapter.conclusions == speed_shown.conclude(RESULTS)
    assert [each.name for each in chapter.pictures] == [each.name for each in speed_drawn.draw(RESULTS)]
    assert (chapter.topic, chapter.planned) == (TOPIC, len(TOPIC.plan(False)))
    assert json.loads((tmp_path / "speed.json").read_text())["machine"] == {"threads": 2, "cores": 2}


def test_there_is_a_picture_of_everything_that_was_measured(tmp_path: Path):
    unmeasured = [made("prefill", 64, ours=None), made("train", 1, ours=1.0)]
    decoded = [each for each in RESULTS if each.case.kind == "decode"]
    drawn = save_pictures(speed_drawn.draw([*decoded, *unmeasured]), tmp_path)
    assert [path.name for path in drawn] == ["speed-decode.png", "speed-decode-fraction.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n") for path in drawn)


def drawn_lines(results: Sequence[Result], picture: str) -> list[tuple[str, list[float]]]:
    [found] = [each for each in speed_drawn.draw(results) if each.name == picture]
    return [(str(line.get_label()), list(line.get_ydata())) for axes in found.figure.axes for line in axes.lines]


def test_a_picture_has_ours_and_rivals_and_not_the_same_step_elsewhere():
    names = [label for label, _ in drawn_lines(RESULTS[6:8], "speed-decode")]
    assert names == ["taylor, degree 3", "recurrent, degree 3", "rival.py:theirs, degree 3", "sdpa"]


@pytest.mark.parametrize("lengths", [(512, 1024), (1024, 512)])
def test_the_picture_of_windows_is_of_the_longest_length(lengths: tuple[int, int]):
    near = [
        made("prefill", n, window=window, ours=ours, pure=2.0 if n == 1024 else 1.0)
        for n in lengths
        for window, ours in ((256, 5.0), (64, 3.0))
    ]
    assert drawn_lines(near, "speed-windows") == [("head size 8, degree 3", [1.0, 1.5, 2.5])]


def test_a_result_comes_back_from_what_it_wrote():
    assert [Result.from_dict(json.loads(json.dumps(each.to_dict()))) for each in RESULTS] == RESULTS
