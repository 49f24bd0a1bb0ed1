"""Runtime: streams are really processed, steps are checked before they are timed, patience ends a stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import taylor_attention as ta
from taylor_attention.bench.agreement import DisagreementError
from taylor_attention.bench.evidence import runtime
from taylor_attention.bench.evidence.experiment import Finding

TINY = {"heads": 8, "head_dim": 8, "longest": 1000, "patience": 10.0}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "BUDGET", 0.05)
    monkeypatch.setattr(runtime, "POOL", 2000)
    monkeypatch.setattr(runtime, "BLOCK", 300)


def test_a_stream_takes_in_every_token_in_order() -> None:
    pool = torch.randn(3, 1, 2, 500, 4)
    stream = runtime.Stream(pool)
    with ta.watch_normalisers():
        for end in (1, 450, 1200):
            assert stream.advance(end) > 0
        whole = torch.cat([pool, pool, pool], dim=3)[:, :, :, :1200]
        _, expected = ta.attention(*whole, degree=runtime.DEGREE, return_state=True)
    assert stream.state is not None
    assert stream.state.tokens.tolist() == [1200]
    torch.testing.assert_close(stream.state.moments, expected.moments, rtol=1e-5, atol=1e-3)


def test_a_tiny_case_is_measured_and_told() -> None:
    finding = Finding(TINY, runtime.measure(TINY, 0), 0.0)
    (own,) = finding.values["contexts"]
    assert own["context"] == 1000
    assert all(0 < fastest <= median <= slowest for median, fastest, slowest in (own["taylor"], own["softmax"]))
    assert own["state_bytes"] == ta.State.zeros(1, 8, 8, 8, runtime.DEGREE).nbytes
    assert own["cache_bytes"] == 1000 * 64 * 2 * 4
    assert "8 x 8: 1,000 tokens were processed" in runtime.conclusions([finding])[0]
    assert [len(table.rows) for table in runtime.tables([finding])] == [1]
    assert [each.name for each in runtime.pictures([finding])] == ["runtime"]


def test_patience_ends_a_stream_and_memory_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "available_bytes", lambda: 600_000)
    contexts = runtime.measure(TINY | {"longest": 10_000, "patience": 0.0}, 0)["contexts"]
    assert [("taylor" in own, "softmax" in own) for own in contexts] == [(True, True), (False, False)]


@pytest.mark.parametrize("name", ["decode_", "KeyValueCache.decode"])
def test_a_wrong_step_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    place: Any = runtime if name == "decode_" else runtime.KeyValueCache
    attribute = name.rpartition(".")[2]
    right = getattr(place, attribute)
    monkeypatch.setattr(place, attribute, lambda *arguments: 1.01 * right(*arguments))
    with pytest.raises(DisagreementError, match="a step"):
        runtime.measure(TINY, 0)


def fabricated(*contexts: dict[str, Any]) -> list[Finding]:
    return [Finding({"heads": 8, "head_dim": 8}, {"contexts": list(contexts), "threads": 1}, 0.0)]


OWN = {"taylor": [0.1, 0.1, 0.1], "state_bytes": 100, "stream_us": 1.0}
SOFTMAX = {"softmax": [0.05, 0.05, 0.05], "cache_bytes": 1000}


def test_who_is_slower_is_told_as_it_is() -> None:
    first, second = {"context": 1000} | OWN | SOFTMAX, {"context": 10_000} | OWN | SOFTMAX
    assert runtime.conclusions(fabricated(first))[1].endswith("up to 1,000 tokens softmax's step is the faster one.")
    told = runtime.conclusions(fabricated(first, second | {"softmax": [0.5, 0.5, 0.5]}))[1]
    assert "from 10,000 tokens on; at 10,000 it takes 5.0 times as long and its cache 10.0 times the bytes" in told


@pytest.mark.parametrize("own", [{}, OWN, SOFTMAX, OWN | SOFTMAX], ids=["none", "own", "softmax", "both"])
def test_partial_findings_are_shown(own: dict[str, Any]) -> None:
    findings = fabricated({"context": 1000} | own)
    assert [len(table.rows) for table in runtime.tables(findings)] == [bool(own)]
    assert len(runtime.pictures(findings)) == 1
    assert len(runtime.conclusions(findings)) == ("taylor" in own) + ("taylor" in own and "softmax" in own)
