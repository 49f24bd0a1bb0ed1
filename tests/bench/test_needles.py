"""Planted needles are where and what was asked, errors are what an independent computation finds, and the command."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterable
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from click.testing import Result as Finished
from torch import Tensor

import taylor_attention as ta
from taylor_attention.bench.needles import Bench, Result
from taylor_attention.bench.needles_plan import (
    Case,
    Settings,
    in_order,
    make_methods,
    plan_sweeps,
    state_bytes,
    state_options,
    window_of_bytes,
)
from taylor_attention.bench.needles_stream import REACH, Stream
from taylor_attention.cli import needles as command
from taylor_attention.cli.app import app
from taylor_attention.core.series import fitted_gaussian
from taylor_attention.ops.reference import softmax_reference

METHODS = make_methods(window=8, sinks=3, heavy=2, degrees=(2, 4), head_dim=4)
TINY = Settings(METHODS, length=60, head_dim=4, heads=3, seeds=2, mean=0.2, asked=0.1)
CASE = Case(margin=3.0, ties=3, age=20)


def planted(stream: Stream, case: Case, mean: float) -> tuple[Tensor, Tensor, Tensor]:
    """All queries, keys and values with the needles among them, in float64."""
    key, value = stream.key.double(), stream.value.double()
    needle = stream.plant(case, mean)
    last = stream.length - 1
    for tie in range(case.ties):
        key[:, :, last - case.age - tie] = needle[0][:, :, case.ties - 1 - tie].double()
        value[:, :, last - case.age - tie] = needle[1][:, :, case.ties - 1 - tie].double()
    return stream.query.double(), key, value


def score(query: Tensor, key: Tensor) -> Tensor:
    return (query * key).sum(-1) / math.sqrt(key.shape[-1])


# ---- the stream


def test_needles_have_the_scores_that_were_asked_for():
    stream = Stream.draw(TINY)
    found = score(stream.query[:, :, -1:], stream.plant(CASE, TINY.mean)[0])
    assert found.shape == (2, 3, 3)
    torch.testing.assert_close(found, torch.full_like(found, 3.2), rtol=1e-5, atol=1e-5)


def test_background_scores_are_normal_with_the_mean_and_spread_asked_for():
    stream = Stream.draw(replace(TINY, length=20_000, mean=-1.0, spread=0.7, head_dim=16))
    normal = (score(stream.query[:, :, -1:], stream.key) + 1) / 0.7
    moments = [float((normal**power).mean()) for power in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.06)  # 120,000 scores: 5 deviations of the fourth


def test_the_last_query_reaches_as_far_as_said():
    stream = Stream.draw(TINY)
    norm = stream.query[:, :, -1].norm(dim=-1)
    torch.testing.assert_close(norm, torch.full_like(norm, REACH))


def test_nothing_gives_a_needle_away_before_it_is_asked_for():
    stream = Stream.draw(replace(TINY, length=2000, head_dim=16, mean=0.0, asked=0.0))
    needle = stream.plant(Case(12.0, 50, 100), 0.0)[0]
    norms = torch.cat([stream.key, needle], 2).norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, 4.0))
    earlier = stream.query[:, :, :-1] @ needle.mT / 4
    assert float(earlier.std()) == pytest.approx(TINY.spread, rel=0.05)


def test_some_earlier_queries_are_the_last_one_and_nothing_else_changes():
    settings = replace(TINY, length=5000, asked=0.0)
    quiet, some, every = (Stream.draw(replace(settings, asked=asked)) for asked in (0.0, 0.1, 1.0))
    asks = (some.query == some.query[:, :, -1:]).all(-1)
    assert float(asks.double().mean()) == pytest.approx(0.1, abs=0.01)  # 30,000 queries: 6 deviations
    assert torch.equal(some.query[~asks], quiet.query[~asks])
    assert torch.equal(every.query, every.query[:, :, -1:].expand_as(every.query))
    for name in {field.name for field in fields(Stream)} - {"query"}:
        assert torch.equal(getattr(some, name), getattr(quiet, name))


def test_a_sequence_depends_on_its_own_seed_alone():
    both, second = Stream.draw(TINY), Stream.draw(replace(TINY, seed=1, seeds=1))
    assert torch.equal(both.key[1:], second.key)
    assert torch.equal(both.worth[1:], second.worth)


def test_half_of_the_variance_of_background_values_is_common_to_a_head():
    value = Stream.draw(replace(TINY, length=4000, head_dim=16, heads=40)).value
    assert float(value.square().mean()) == pytest.approx(1, rel=0.05)
    assert float(value.mean(2).square().mean()) == pytest.approx(0.5, rel=0.1)


# ---- methods


@pytest.mark.parametrize("name", METHODS)
def test_bytes_are_those_of_a_state(name: str):
    state = ta.State.zeros(1, 1, 4, 4, **state_options(METHODS[name]))
    assert state_bytes(METHODS[name], 4) == state.nbytes


def test_heavy_tokens_come_out_of_the_window_at_the_same_bytes():
    heavy = {name: options for name, options in METHODS.items() if "heavy" in options}
    assert len(heavy) == 6
    assert {(options["window"], options["heavy"]) for options in heavy.values()} == {(6, 2)}
    same = {name: state_bytes(METHODS[name.replace(" + heavy", "")], 4) for name in heavy}
    assert {name: state_bytes(options, 4) for name, options in heavy.items()} == same


@pytest.mark.parametrize("window", [1, 2, 100])
def test_a_window_is_as_long_as_its_bytes_allow(window: int):
    nbytes = state_bytes({"degree": None, "window": window}, 4)
    assert [window_of_bytes(nbytes + more, 4) for more in (-1, 0, 1)] == [max(1, window - 1), window, window]


def test_what_is_left_out_for_the_state_is_known_to_decoding():
    assert {name for options in METHODS.values() for name in options} >= {"reading"}
    assert [state_options(METHODS[f"{kind} 2"]) for kind in ("taylor", "fitted")] == [{"degree": 2}] * 2


# ---- errors


def most_asked(query: Tensor, key: Tensor, window: int, heavy: int) -> Tensor:
    """Which keys are heavy at the end: of those out of the window, who got most attention in it, bool [..., T]."""
    place = torch.arange(key.shape[2])
    behind = place[:, None] - place
    s = query @ key.mT / math.sqrt(key.shape[-1])
    received = s.masked_fill((behind < 0) | (behind >= window), -math.inf).softmax(-1).sum(-2)
    best = received[..., : len(place) - window].topk(heavy).indices
    return torch.zeros_like(received, dtype=torch.bool).scatter(-1, best, value=True)


def outputs(name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A method's output for the last query by its definition: weights one by one, in float64."""
    options = METHODS[name]
    degree, window, sinks = options["degree"], options.get("window", 0), options.get("sinks", 0)
    s = score(query[:, :, -1:], key)
    place = torch.arange(s.shape[-1])
    near = (place >= len(place) - window) | (place < sinks) | most_asked(query, key, window, options.get("heavy", 0))
    weight = torch.where(near, s.exp(), 0)
    if degree is not None:
        for at in [(seed, head) for seed in range(s.shape[0]) for head in range(s.shape[1])]:
            far = s[at][~near[at]]
            coefficients = [1 / math.factorial(p) for p in range(degree + 1)]
            if options.get("reading") == "fitted":
                variance = min(float(far.var(correction=0)), degree / 2)
                coefficients = fitted_gaussian(float(far.mean()), math.sqrt(variance), degree).coefficients(degree)
            weight[at][~near[at]] = sum(float(c) * far**p for p, c in enumerate(coefficients))
    return (weight[:, :, None] @ value) / weight.sum(-1)[..., None, None]


def in_float64(stream: Stream) -> Stream:
    return Stream(*(getattr(stream, field.name).double() for field in fields(stream)))


# A polynomial of degree 4 is a sum of terms up to (|q| |k| / sqrt(d))^4 / 24 = REACH^4 / 24 = 2,700, which cancel:
# float32 rounds these to 2e-4 each, here in a sum of 60.
ERROR_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("age", [1, 4, 20, 55])
@pytest.mark.parametrize("dtype", ERROR_TOLERANCE, ids=str)
def test_errors_are_those_of_an_independent_computation(name: str, age: int, dtype: torch.dtype):
    case = replace(CASE, age=age)
    bench = Bench(replace(TINY, methods={name: METHODS[name]}))
    if dtype == torch.float64:
        bench.stream = in_float64(bench.stream)
    query, key, value = planted(bench.stream, case, TINY.mean)
    exact = softmax_reference(query[:, :, -1:], key, value, causal=False)
    found = outputs(name, query, key, value)
    expected = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
    result = bench.measure(case)
    assert result.errors[name] == pytest.approx(expected.flatten().tolist(), rel=0, abs=ERROR_TOLERANCE[dtype])


def test_the_weight_of_the_needles_is_that_of_softmax():
    bench = Bench(TINY)
    query, key, _ = planted(bench.stream, CASE, TINY.mean)
    weight = score(query[:, :, -1:], key).softmax(-1)[..., -1 - CASE.age - CASE.ties + 1 : -CASE.age]
    assert bench.measure(CASE).weight == pytest.approx(float(weight.sum(-1).quantile(0.5)), rel=1e-6)


def test_cases_do_not_depend_on_those_before_them():
    cases = [Case(3.0, 3, 40), CASE, Case(5.0, 1, 2), Case(3.0, 3, 50)]  # the last one is older: it begins anew
    stream = in_float64(Stream.draw(TINY))
    shared, each = Bench(TINY), [Bench(TINY) for _ in cases]
    for bench in (shared, *each):
        bench.stream = stream
    for case, alone in zip(cases, each, strict=True):
        one, other = shared.measure(case), alone.measure(case)
        assert one.weight == other.weight
        assert one.errors == {name: pytest.approx(errors, abs=1e-9) for name, errors in other.errors.items()}


def test_methods_that_share_a_state_do_not_change_it_for_each_other():
    stream = in_float64(Stream.draw(TINY))
    together = Bench(TINY)
    together.stream = stream
    errors = together.measure(CASE).errors
    for name, options in METHODS.items():
        alone = Bench(replace(TINY, methods={name: options}))
        alone.stream = stream
        assert alone.measure(CASE).errors == {name: pytest.approx(errors[name], abs=1e-9)}


def mean_errors(methods: dict[str, dict[str, Any]], case: Case, **settings: Any) -> list[float]:
    result = Bench(Settings(methods, **{"length": 300, "head_dim": 8} | settings)).measure(case)
    return [result.mean(name) for name in methods]


def test_a_window_over_everything_is_softmax():
    assert max(mean_errors({"all": {"degree": None, "window": 300}}, Case(8.0, 4, 150))) < 1e-5


FAR = {"alone": {"degree": None}, "taylor": {"degree": 2}, "fitted": {"degree": 2, "reading": "fitted"}}


@pytest.mark.parametrize("far", FAR.values(), ids=FAR.keys())
def test_more_window_is_no_worse_for_a_needle_inside(far: dict[str, Any]):
    methods = {str(window): {**far, "window": window} for window in (16, 32, 64, 128, 256, 300)}
    errors = mean_errors(methods, Case(6.0, 2, 10), seeds=16)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5 < errors[0]


@pytest.mark.parametrize("degree", [2, 4])
def test_a_larger_margin_is_worse_for_taylor_alone(degree: int):
    methods = {"taylor": {"degree": degree}}
    errors = [mean_errors(methods, Case(margin, 2, 100), length=3000) for margin in (0.0, 2.0, 4.0, 6.0, 8.0)]
    assert errors == sorted(errors)
    assert errors[-1][0] > 10 * errors[0][0]


# What is averaged is the relative error of the last query, over 12 random places of one needle of margin 5 among 64
# tokens and over 32 streams (8 seeds x 4 heads): 384 plantings, the same for every size, so that sizes are compared
# on equal terms. Places are drawn by their distance, from the query for windows and from the beginning for sinks, four
# between each two sizes: so that every larger size reaches some needle. (Where it reaches none the mean error may rise,
# as the test after this one has it.)
SIZES = (1, 4, 16, 64)
LENGTH = SIZES[-1]
DRAW = random.Random(0)
DISTANCES = [min(DRAW.randrange(size, 4 * size), LENGTH - 2) for size in SIZES[:-1] for _ in range(4)]


# For heavy tokens, 6 places before a window of 8: 192 plantings.
RECENT = 8
AGES = DRAW.sample(range(RECENT, LENGTH - 2), 6)


def property_errors(methods: Iterable[dict[str, Any]], ages: Iterable[int], asked: float = 0.0) -> list[float]:
    named = {str(i): options for i, options in enumerate(methods)}
    bench = Bench(Settings(named, length=LENGTH, head_dim=4, heads=4, seeds=8, asked=asked))
    results = [bench.measure(Case(5.0, 1, age)) for age in sorted(ages, reverse=True)]
    return [math.fsum(result.mean(name) for result in results) / len(results) for name in named]


@pytest.mark.parametrize("far", FAR.values(), ids=FAR.keys())
@pytest.mark.parametrize("grown", ["window", "sinks"])
@pytest.mark.parametrize("beside", [0, 6])
def test_more_window_or_sinks_never_makes_the_mean_error_worse(far: dict[str, Any], grown: str, beside: int):
    other = "sinks" if grown == "window" else "window"
    ages = DISTANCES if grown == "window" else [LENGTH - 1 - distance for distance in DISTANCES]
    errors = property_errors(({**far, grown: size, other: beside} for size in SIZES), ages)
    assert all(after <= before for before, after in pairwise(errors)), errors
    assert errors[-1] < 1e-5 < errors[0] / 1000


def test_a_needle_that_the_larger_window_misses_too_may_be_read_worse_by_a_little():
    # The background's far weights are too small by 1% on average. Exact, they add up to more beside the needle's, which
    # is too small by far.
    errors = property_errors(({**FAR["taylor"], "window": size} for size in SIZES), [LENGTH - 2])
    assert 0 < errors[-2] / errors[0] - 1 < 2e-3


def heavy_errors(far: dict[str, Any], sinks: int, sizes: Iterable[int], asked: float) -> list[float]:
    near = {**far, "window": RECENT, "sinks": sinks}
    return property_errors(({**near, "heavy": size} for size in sizes), AGES, asked)


@pytest.mark.parametrize("far", FAR.values(), ids=FAR.keys())
@pytest.mark.parametrize("sinks", [0, 6])
def test_more_places_for_heavy_tokens_never_make_the_mean_error_worse(far: dict[str, Any], sinks: int):
    errors = heavy_errors(far, sinks, (0, *SIZES), asked=0.25)  # twice while a needle is in the window, on average
    assert all(after <= before for before, after in pairwise(errors)), errors
    assert errors[-1] < 1e-5 < errors[0] / 1000
    assert errors[2] < errors[0] / 2  # four places go to what was asked for


@pytest.mark.parametrize("far", FAR.values(), ids=FAR.keys())
@pytest.mark.parametrize("sinks", [0, 6])
def test_few_places_for_heavy_tokens_are_of_little_use_to_a_needle_that_nobody_asked_for(
    far: dict[str, Any], sinks: int
):
    none, few = heavy_errors(far, sinks, (0, 4), asked=0.0)
    assert 0.75 < few / none < 1.01


# ---- sweeps


def test_sweeps_vary_one_parameter_and_stand_outside_and_inside_of_the_window():
    sweeps = plan_sweeps(Case(5.0, 2, 100), [4, 0], [1, 8], [7, 300], window=32)
    assert [(sweep.name, sweep.inside) for sweep in sweeps] == [
        ("margin", False),
        ("margin", True),
        ("ties", False),
        ("ties", True),
        ("age", False),
    ]
    assert sweeps[0].cases == (Case(0, 2, 100), Case(4, 2, 100))
    assert sweeps[3].cases == (Case(5.0, 1, 12), Case(5.0, 8, 12))
    assert sweeps[4].cases == (Case(5.0, 2, 7), Case(5.0, 2, 300))


def test_needles_that_the_window_does_not_hold_have_no_sweep_inside():
    sweeps = plan_sweeps(Case(5.0, 2, 100), [0], [32], [7], window=32)
    assert [sweep.inside for sweep in sweeps] == [False] * 3


def test_every_case_is_measured_once_and_the_oldest_needles_come_first():
    at = Case(5.0, 2, 100)
    cases = in_order(plan_sweeps(at, [5.0, 0], [1, 2], [7, 100, 300], window=32))
    assert len(cases) == len(set(cases)) == 8
    oldest = [case.age + case.ties for case in cases]
    assert oldest == sorted(oldest, reverse=True)
    assert cases.count(at) == 1


def test_results_survive_json():
    result = Bench(TINY).measure(CASE)
    assert Result.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_an_output_of_nan_is_an_error_of_nan():
    result = Result(CASE, 0.5, {"a": [1.0, math.nan, 2.0], "b": [1.0, 2.0, 4.0]})
    assert all(map(math.isnan, result.quartiles("a")))
    assert result.quartiles("b") == (1.5, 2.0, 3.0)


# ---- the command

SMALL = ["--length", 200, "--heads", 2, "--seeds", 2, "--head-dim", 4, "--window", 16, "--at", 6, 2, 50]
SMALL += ["--margin", 0, "--margin", 8, "--ties", 1, "--age", 5, "--age", 150, "--degree", 2, "--threads", 1]


def run(*arguments: object) -> Finished:
    return CliRunner().invoke(app, ["needles", *map(str, arguments)])


def ok(*arguments: object) -> Finished:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def test_a_run_ends_with_tables_files_and_a_line_of_json(tmp_path: Path):
    result = ok(*SMALL, "--out", tmp_path / "new" / "out")
    *shown, last = result.stdout.splitlines()
    found = json.loads(last)
    text = "\n".join(shown)
    assert all(f"Error by {name} (" in text for name in ("margin", "ties", "age"))
    assert text.count("window + fitted 2") == text.count("window + heavy + fitted 2") == 5
    names = sorted(path.name for path in (tmp_path / "new" / "out").iterdir())
    assert names == ["needles.png", "results.jsonl"]
    assert (tmp_path / "new" / "out" / "needles.png").read_bytes().startswith(b"\x89PNG\r\n")
    lines = (tmp_path / "new" / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["quartiles"] for line in lines] == [each["quartiles"] for each in found["results"]]
    assert result.stderr.count("margin 8, ties 2, age 50") == 1  # progress, a line per case
    assert found["bytes_per_head"]["window"] == state_bytes({"degree": None, "window": 16}, 4)


@pytest.mark.usefixtures("without_matplotlib")
def test_with_json_there_is_nothing_else_on_stdout(tmp_path: Path):
    result = ok(*SMALL, "--json", "--out", tmp_path)
    assert result.stdout.count("\n") == 1
    found = json.loads(result.stdout)
    assert found["out"] == str(tmp_path)
    cases = {tuple(case.values()) for sweep in found["sweeps"] for case in sweep["cases"]}
    assert cases == {tuple(each["case"].values()) for each in found["results"]}
    inside = {case["age"] for sweep in found["sweeps"] if sweep["inside"] for case in sweep["cases"]}
    assert inside == {(12 - 2) // 2}  # in the middle of what heavy tokens leave of the window


@pytest.mark.usefixtures("without_matplotlib")
def test_resume_measures_only_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[Case] = []
    measure = Bench.measure
    monkeypatch.setattr(Bench, "measure", lambda bench, case: asked.append(case) or measure(bench, case))
    first = json.loads(ok(*SMALL, "--json", "--out", tmp_path).stdout)
    path = tmp_path / "results.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]) + '{"settings":')
    every = list(asked)
    asked.clear()
    again = json.loads(ok(*SMALL, "--json", "--resume", "--out", tmp_path).stdout)
    assert asked == every[3:]
    assert again["results"][:3] == first["results"][:3]
    assert [each["case"] for each in again["results"]] == [each["case"] for each in first["results"]]
    asked.clear()
    ok(*SMALL, "--json", "--resume", "--seed", 1, "--out", tmp_path)
    assert asked == every


@pytest.mark.usefixtures("without_matplotlib")
def test_a_finished_run_is_resumed_without_drawing_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = ok(*SMALL, "--json", "--out", tmp_path).stdout
    monkeypatch.setattr(Stream, "draw", None)
    assert ok(*SMALL, "--json", "--resume", "--out", tmp_path).stdout == first


@pytest.mark.usefixtures("without_matplotlib")
def test_one_method_can_be_asked_for(tmp_path: Path):
    found = json.loads(ok(*SMALL, "--method", "window + mean", "--json", "--out", tmp_path).stdout)
    assert {name for each in found["results"] for name in each["quartiles"]} == {"window + mean"}


@pytest.mark.usefixtures("without_matplotlib")
def test_earlier_questions_are_of_use_to_heavy_tokens_alone(tmp_path: Path):
    def medians(asked: float) -> dict[str, float]:
        chosen = [part for name in ("window + fitted 2", "window + heavy + fitted 2") for part in ("--method", name)]
        options = [*SMALL, "--margin", 8, "--at", 8, 1, 50, "--heavy", 4, *chosen]
        found = json.loads(ok(*options, "--asked", asked, "--json", "--out", tmp_path).stdout)
        assert found["settings"]["methods"]["window + heavy + fitted 2"]["window"] == 12
        (result,) = [x for x in found["results"] if x["case"] == {"margin": 8, "ties": 1, "age": 50}]
        return {name: quartiles[1] for name, quartiles in result["quartiles"].items()}

    never, often = medians(0.0), medians(0.3)
    assert often["window + fitted 2"] == never["window + fitted 2"]
    assert often["window + heavy + fitted 2"] < 0.01 < 0.5 < never["window + heavy + fitted 2"]


@pytest.mark.usefixtures("without_matplotlib")
def test_without_matplotlib_everything_else_works(tmp_path: Path):
    shown = ok(*SMALL, "--out", tmp_path).stdout
    assert "no figure: drawing the figures needs matplotlib: pip install 'taylor-attention[bench]'" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(bench, case):
        raise KeyboardInterrupt

    monkeypatch.setattr(command.Bench, "measure", interrupt)
    result = run(*SMALL, "--out", tmp_path)
    assert (result.exit_code, result.stdout) == (130, "")
    assert "go on with --resume" in result.stderr


MISUSE = {
    "too old": ("--age: expected a needle within the 200 tokens: age + ties < length, got 199 + 2", "--age", 199),
    "too high": ("--margin: expected scores within 16 of 0, got 17", "--margin", 17),
    "too many": ("--ties: expected 1 to 1,024", "--ties", 2000),
    "no window left": ("--heavy: expected fewer than the window's 16, got 16", "--heavy", 16),
    "no chance": ("--asked", "--asked", 1.5),
    "too wide": ("--spread: expected |mean| + 8 spread <= 16", "--spread", 3),
    "no such method": ("--method: expected one of taylor 2, fitted 2, window,", "--method", "magic"),
    "no such backend": ("backend: expected one of", "--backend", "none"),
    "a state too large": ("degree: expected a degree whose state fits", "--degree", 15, "--head-dim", 16),
    "a degree too high": ("degree: expected an int <= 15 at a head size of 16", "--degree", 60, "--head-dim", 16),
    "no window": ("--window", "--window", 0),
    "no age": ("--age", "--age", 0),
    "not three": ("--at", "--at", "x", 1, 1),
    "heads of one entry": ("--head-dim: expected an int >= 2, got 1", "--head-dim", 1),
}


@pytest.mark.parametrize("case", MISUSE.values(), ids=MISUSE.keys())
def test_misuse_is_one_clear_line_and_exit_code_2(case: tuple[Any, ...], tmp_path: Path):
    expected, *arguments = case
    result = run(*SMALL, *arguments, "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("error: ")
    assert expected in result.stderr
    assert not (tmp_path / "out").exists()
