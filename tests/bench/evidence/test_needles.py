"""Needles as an experiment: what cases stand for, and that tables and sentences say what was measured."""

from __future__ import annotations

from typing import Any

import pytest

from taylor_attention.bench.evidence import needles
from taylor_attention.bench.evidence.experiment import Finding
from taylor_attention.bench.evidence.needles_cases import ASKED, MOVED, SWEEPS, WITHOUT, plan, settle
from taylor_attention.bench.evidence.needles_shown import number
from taylor_attention.bench.needles_plan import FULL

SIZES = {"length": 1100, "heads": 1, "seeds": 2}
AT: dict[str, Any] = {"ties": [4], "age": [1000]}
TINY = [
    {"what": SWEEPS, **SIZES, "margin": [0.0, 10.0], "ties": [1, 4], "age": [100, 1000]},
    {"what": WITHOUT, "asked": 0.0, **SIZES, **AT, "margin": [10.0]},
    {"what": MOVED, "mean": 2.0, **SIZES, **AT, "margin": [6.0]},
    {"what": ASKED, "asked": 0.1, **SIZES, **AT, "margin": [10.0]},
]


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return [Finding(case, needles.measure(case, 0), 1.0) for case in TINY]


def test_the_full_plan_has_every_sweep_and_every_kind_of_stream():
    cases = plan(False)
    assert [case["what"] for case in cases] == [SWEEPS, WITHOUT, MOVED, MOVED, *[ASKED] * 5]
    assert all(cases[0][name] == list(FULL[name]) for name in ("margin", "ties", "age"))
    assert {case["length"] for case in cases} == {FULL["length"]}
    assert max(case["length"] for case in plan(True)) < FULL["length"]


@pytest.mark.parametrize("case", plan(False), ids=lambda case: f"{case['what']}-{case.get('asked', '')}")
def test_a_case_settles_what_it_says(case: dict[str, Any]):
    settings, sweeps = settle(case, 7)
    assert (settings.seed, settings.length) == (7, case["length"])
    assert settings.asked == case.get("asked", 0.02)
    assert (settings.mean, settings.spread) == (case.get("mean", 0.0), case.get("spread", 0.5))
    assert {each.margin for sweep in sweeps for each in sweep.cases if sweep.name == "margin"} == set(case["margin"])
    assert ("window" in settings.methods) == (case["what"] == SWEEPS)


def test_tables_have_the_medians_that_were_measured(findings: list[Finding]):
    told = {table.title: table for table in needles.EXPERIMENT.tables(findings)}
    table = told["Error by margin (needles: 4, age 1,000)"]
    assert table.columns == ("method", "kB", "margin 0", "margin 10")
    rows = {row[0]: row[1:] for row in table.rows}
    of_ten = next(r for r in findings[0].values["results"] if r["case"] == {"margin": 10.0, "ties": 4, "age": 1000})
    assert rows["window"][2] == number(sum(of_ten["errors"]["window"]) / 2)  # the median of two streams is their mean
    assert rows["softmax's weight of the needles"][2] == number(of_ten["weight"])
    moved = told["Needles in the window of other backgrounds"]
    assert moved.columns == ("method", "2 +- 0.5, margin 6")
    assert [row[0] for row in moved.rows] == [
        f"window + {kind} {degree}" for degree in (2, 4) for kind in ("taylor", "fitted")
    ]
    chances = told["By the chance to be asked for (margin 10, 4 needles, age 1,000)"]
    assert chances.columns[1:] == ("chance 0", "chance 0.02", "chance 0.1")
    assert [row[0] for row in chances.rows] == ["lower quartile", "median", "upper quartile"]


def test_sentences_tell_the_margin_where_needles_matter_in_and_beyond_the_window(findings: list[Finding]):
    inside, beyond = sorted(needles.EXPERIMENT.conclusions(findings), key=lambda line: "beyond" in line)
    assert inside.startswith("Needles in the window (age 94) at margin 10")
    assert beyond.startswith("Needles beyond the window (age 1,000) at margin 10")


def test_the_picture_is_of_the_sweeps(findings: list[Finding]):
    [picture] = needles.EXPERIMENT.pictures(findings)
    assert picture.name == "needles"
    assert [axes.get_xlabel().split()[0] for axes in picture.figure.axes] == ["margin", "needles", "age"]


NUMBERS = {0.0: "0", 0.00017: "0.00017", 0.0000393: "0.000039", 0.77: "0.77", 1.53: "1.5", 12.0: "12"}


@pytest.mark.parametrize(("value", "text"), NUMBERS.items())
def test_small_numbers_are_no_powers_of_ten(value: float, text: str):
    assert number(value) == text
