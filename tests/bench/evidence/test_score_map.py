"""The map: streams are what they say, errors what is known of them, borders where they are crossed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import taylor_attention as ta
from taylor_attention.bench.evidence import score_map, score_map_shown
from taylor_attention.bench.evidence.experiment import Finding

TOKENS = 256


def measure(**case: Any) -> Finding:
    case = {"tokens": TOKENS} | case
    return Finding(case, score_map.measure(case, 0), 0.0)


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    torch.manual_seed(0)
    return [
        *(measure(what="spread", spread=spread) for spread in (0.2, 0.8, 3.0)),
        *(measure(what="offset", spread=0.5, offset=offset) for offset in (0.0, 3.0)),
        *(measure(what="length", spread=0.5, tokens=tokens) for tokens in (100, 300)),
        *(measure(what="needle", spread=0.5, margin=margin, ties=2) for margin in (0.0, 4.0)),
    ]


@pytest.mark.parametrize(("spread", "offset"), [(0.3, 0.0), (2.0, 1.5)])
def test_scores_have_their_spread_and_mean(spread: float, offset: float) -> None:
    case = {"spread": spread, "offset": offset, "tokens": 2000}
    query, key, _ = score_map.draw(case, torch.Generator().manual_seed(0))
    scores = query[:, :, -8:] @ key.mT * 8**-0.5
    torch.testing.assert_close(scores.std(-1).mean(), torch.tensor(spread), rtol=0.02, atol=0)
    torch.testing.assert_close(scores.mean(), torch.tensor(offset), rtol=0, atol=0.03 * spread)


def test_needles_stand_out_by_their_margin_for_every_query() -> None:
    case = {"spread": 0.5, "offset": 1.0, "margin": 5.0, "ties": 3, "tokens": 100}
    query, key, _ = score_map.draw(case, torch.Generator().manual_seed(0))
    scores = query @ key.mT * 8**-0.5
    assert (scores[:, :, :, :50] - 6).abs().lt(1e-4).all(2).sum(-1).eq(3).all()


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_small_errors_are_those_expected(findings: list[Finding], degree: int) -> None:
    for reading in ("taylor", "fitted"):
        expected = findings[0].values[reading][str(degree)]["expected"]
        assert expected == ta.expected_error(0.2, degree, fitted=reading == "fitted")
        assert 0.5 < score_map_shown.median_error(findings[0], reading, degree) / expected < 1.2


def test_centring_and_fitting_take_a_mean_off(findings: list[Finding]) -> None:
    none, much = findings[3:5]
    assert "centred" not in none.values
    without = score_map_shown.median_error(none, "taylor", 2)
    assert score_map_shown.median_error(much, "centred", 2) == pytest.approx(without, rel=0.1)
    assert score_map_shown.median_error(much, "fitted", 2) < 1.05 * score_map_shown.median_error(none, "fitted", 2)
    assert score_map_shown.median_error(much, "taylor", 2) > 2 * without


def spread_of(spread: float, error: float | None, expected: float) -> Finding:
    one = {"2": {"error": [error] * 3, "unsafe": 0.0, "expected": expected}}
    return Finding({"what": "spread", "spread": spread}, {"taylor": one, "fitted": one}, 0.0)


def test_borders_lie_where_the_error_passes_a_level() -> None:
    """Errors of spread^2 are straight on logarithmic axes, so that the crossing is exact."""
    found = [spread_of(spread, spread**2, spread) for spread in (0.4, 0.1, 0.2, 0.8)]
    reach = score_map_shown.reach
    assert reach(found, "taylor", 2, 0.09) == pytest.approx(0.3)
    assert reach(found, "taylor", 2, 0.3, expected=True) == pytest.approx(0.3)
    assert reach(found, "taylor", 2, 0.001) == 0.1
    assert reach(found, "taylor", 2, 0.9) is None
    assert reach([*found[:3], spread_of(0.8, None, 0.8)], "taylor", 2, 0.3) == 0.4
    assert reach([], "taylor", 2, 0.3) is None


def test_nan_counts_as_the_largest_error() -> None:
    x = torch.tensor([0.1, math.nan, 0.2, math.nan, math.nan])
    assert score_map.quartiles(x) == [pytest.approx(0.2), None, None]


def test_scores_of_a_model_are_measured_query_by_query() -> None:
    layer = ta.TaylorAttention(16, 4, num_kv_heads=2, rope=False, qk_norm=True, causal=True)
    x = torch.randn(2, 80, 16)
    with torch.no_grad():
        found = score_map.measure_layer(layer, x)
        heads = layer._project(x, None, None)
    spreads = []
    for head in range(4):
        own = [
            (heads.query[b, head, t] @ heads.key[b, head // 2, : t + 1].T * layer.scale).std(correction=0)
            for b in range(2)
            for t in range(64, 80)
        ]
        spreads.append(torch.stack(own).median())
    assert found["lowest"] == pytest.approx(float(min(spreads)))
    assert found["highest"] == pytest.approx(float(max(spreads)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["taylor", "untrained"])
def test_shipped_shapes_are_measured_on_text(name: str) -> None:
    layers = score_map.measure({"what": "model", "name": name}, 0)["layers"]
    assert len(layers) == 4
    assert all(0 < each["lowest"] <= each["middle"] <= each["highest"] < 10 for each in layers)


MODEL = Finding(
    {"what": "model", "name": "taylor"},
    {"layers": [{"lowest": 0.5, "middle": 0.75, "highest": 1.25, "mean": 0.1}]},
    0.0,
)


def test_everything_is_shown_and_told(findings: list[Finding]) -> None:
    every = [*findings, MODEL]
    assert [len(table.rows) for table in score_map.tables(every)] == [12, 2, 2, 2, 1]
    assert [each.name for each in score_map.pictures(every)] == ["map", "map-curves", "map-others"]
    told = score_map.conclusions(every)
    assert len(told) == 7
    assert told[-1] == "Over heads, the spread of scores is 0.50 to 1.25: shipped Taylor model."


@pytest.mark.parametrize("part", [slice(0), slice(1), slice(3), slice(3, 5), slice(5, 7), slice(7, 9)], ids=str)
def test_partial_findings_are_shown(findings: list[Finding], part: slice) -> None:
    some = findings[part]
    assert len(score_map.tables(some)) == (len(some) > 0)
    assert len(score_map.pictures(some)) == {0: 0, 1: 0, 3: 2}.get(len(some), 1)
    assert bool(score_map.conclusions(some)) is (len(some) > 0)
