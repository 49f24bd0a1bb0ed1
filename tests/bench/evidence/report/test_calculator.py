"""The page's calculator against core/cost and core/series: the script that a page holds, run by node if it is there."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from typing import Any

import pytest

import taylor_attention as ta
from pages import read_script
from taylor_attention.bench.evidence.report.golden import COUNTED
from taylor_attention.core.cost import plan
from taylor_attention.errors import ArgumentError

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed: the page's own script cannot be run here")

ASK = """
const text = (value) => typeof value === "bigint" ? String(value) : value;
const answer = (work) => { try { return work(); } catch (error) { return error.message; } };
const asked = JSON.parse(require("fs").readFileSync(0, "utf8"));
"""


def ask(page: str, work: str, asked: Any) -> Any:
    """What an expression gives with the page's functions; `asked` is what it is called in the expression too."""
    tell = f"console.log(JSON.stringify({work}, (name, value) => text(value)))"
    script = "\n".join([read_script(page, "arithmetic"), ASK, tell])
    assert NODE is not None
    result = subprocess.run([NODE, "-e", script], input=json.dumps(asked), capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def draw_plan(random: random.Random) -> dict[str, Any]:
    kv_heads, window, sinks = random.choice([1, 2, 8]), random.choice([0, 17, 4096]), random.choice([0, 4])
    return {
        "heads": kv_heads * random.choice([1, 3]),
        "kv_heads": kv_heads,
        "head_dim": random.choice([1, 2, 8, 64, 300]),
        "value_dim": random.choice([None, 1, 24]),
        "degree": random.choice([0, 1, 2, 3, 4, 9, *([None] if window or sinks else [])]),
        "layers": random.choice([1, 7]),
        "context": random.choice([0, 1, 12345, 10**14]),
        "window": window,
        "sinks": sinks,
        "heavy": random.choice([0, 5]) if window else 0,
        "dtype": random.choice(["float32", "float64", "bfloat16"]),
        "cache_dtype": random.choice([None, "float16"]),
    }


def test_costs_are_those_of_the_library_to_the_last_digit(page: str) -> None:
    source = random.Random(1)
    asked = [draw_plan(source) for _ in range(200)]
    plans = [plan(**each).to_dict() for each in asked]
    expected = [{name: str(made[name]) for name in COUNTED} for made in plans]
    assert ask(page, "asked.map(plan)", asked) == expected


def test_expected_errors_are_those_of_the_library(page: str) -> None:
    scores = [(std, degree, mean) for std in (0.01, 0.5, 2.0, 6.0) for degree in (1, 2, 4, 8) for mean in (0.0, 2.5)]
    found = ask(page, "asked.map(([s, d, m]) => [taylorError(s, d, m), fittedError(s, d)])", scores)
    for (std, degree, mean), (taylor, fitted) in zip(scores, found, strict=True):
        assert taylor == pytest.approx(ta.expected_error(std, degree, mean=mean), rel=1e-9, abs=1e-12)
        assert fitted == pytest.approx(ta.expected_error(std, degree, mean=mean, fitted=True), rel=1e-6, abs=1e-9)


GOOD = {"heads": 8, "kv_heads": 2, "head_dim": 4, "value_dim": 3, "degree": 2, "layers": 1, "context": 9}
GOOD |= {"window": 0, "sinks": 0, "heavy": 0, "dtype": "float32", "cache_dtype": None}
BAD: list[dict[str, Any]] = [{"heads": 0}, {"kv_heads": 3}, {"kv_heads": 0}, {"head_dim": 0}, {"value_dim": -1}]
BAD += [{"degree": -1}, {"layers": 0}, {"context": -1}, {"window": -2}, {"sinks": -1}, {"heavy": 3}, {"degree": None}]
BAD += [{"head_dim": 2.5}]


def test_what_the_library_refuses_is_refused_in_its_words(page: str) -> None:
    asked = [GOOD | change for change in BAD]
    messages = []
    for each in asked:
        with pytest.raises(ArgumentError) as error:
            plan(**each)
        messages.append(str(error.value))
    assert ask(page, "asked.map((each) => answer(() => plan(each)))", asked) == messages


def test_the_page_agrees_with_what_it_carries(page: str) -> None:
    assert ask(page, "findDifferences(asked)", json.loads(read_script(page, "golden"))) == []


DIFFERENCES = [*(("plans", name) for name in COUNTED), ("errors", "taylor"), ("errors", "fitted")]


@pytest.mark.parametrize(("kind", "name"), DIFFERENCES)
def test_every_difference_is_found(page: str, kind: str, name: str) -> None:
    golden = json.loads(read_script(page, "golden"))
    case = golden[kind][-1]
    place = case["found"] if kind == "plans" else case
    place[name] = str(int(place[name]) + 1) if kind == "plans" else place[name] * (1 + 1e-5)
    [difference] = ask(page, "findDifferences(asked)", golden)
    assert "in Python" in difference
