"""Pretrained models: what is measured agrees with the model, on small models in their place; what is told of it."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from statistics import correlation
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from taylor_attention.bench.evidence import pretrained, pretrained_models
from taylor_attention.bench.evidence.experiment import Finding
from taylor_attention.bench.evidence.pretrained import EXPERIMENT, measure, plan
from taylor_attention.bench.evidence.pretrained_shown import BY_HEAD, FAR, LEARNED, SOFTMAX, WINDOW
from taylor_attention.cli.app import app

pytest.importorskip("transformers")
from tiny_models import VOCABULARY, causal_model, encoder  # it needs transformers

TOKENS = 192
TEXT = " ".join(str(number) for number in range(200))


class Letters:
    """A tokenizer of letters: one token for each."""

    def __call__(self, text: str, **options: Any) -> Any:
        found = [1 + ord(letter) % (VOCABULARY - 1) for letter in text][: options["max_length"]]
        return type("Encoding", (), {"input_ids": found})


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which all that is needed is there, and small models behind its names."""
    for name in pretrained_models.NEEDED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "lee" / "lee.cor").write_text("\n".join(TEXT[number : number + 40] for number in range(50)))
    row = [" ".join(str(abs(i - j) / 50) for j in range(50)) for i in range(50)]
    (tmp_path / "lee" / "similarities0-1.txt").write_text("\n".join(row))
    monkeypatch.setenv("TAYLOR_MODELS", str(tmp_path))
    torch.manual_seed(0)
    small = {"smollm2": (causal_model(dtype=torch.float32), Letters()), "minilm": (encoder(torch.float32), Letters())}
    monkeypatch.setattr(pretrained_models, "_load", lambda path: small[path.name])
    names = (*pretrained_models.SPEECHES, *pretrained_models.CALIBRATION)
    speeches = {name: TEXT[shift:] for shift, name in enumerate(names)}
    monkeypatch.setattr(pretrained_models, "_speeches", lambda: speeches)
    monkeypatch.setattr(pretrained_models, "MOST", 48)
    for kept in (pretrained_models._profiled, pretrained_models._key_centres):
        kept.cache_clear()
    return tmp_path


def language(method: str, budget: float | str = 0.5, speech: str = pretrained_models.SPEECHES[0]) -> dict[str, Any]:
    return {"model": "smollm2", "method": method, "budget": budget, "speech": speech, "tokens": TOKENS}


def test_the_plan_has_every_method_at_every_budget_that_it_fits(models: Path) -> None:
    cases = plan(False)
    names = {case["method"] for case in cases if case["model"] == "smollm2"}
    assert names == {SOFTMAX, WINDOW, BY_HEAD, *FAR} - {"window + degree 2, centred"}  # with its 2,145 monomials
    assert len(cases) == len({json.dumps(case) for case in cases})
    assert not set(pretrained_models.SPEECHES) & set(pretrained_models.CALIBRATION)
    for name in ("distilled-8", "distilled-64"):
        (models / name).mkdir()
    learned = [(case["budget"], case["method"]) for case in plan(False) if isinstance(case.get("budget"), str)]
    names = [(name, method) for name in ("distilled-64", "distilled-8") for method in (WINDOW, BY_HEAD, LEARNED)]
    assert learned == names * len(pretrained_models.SPEECHES)
    assert [case["tokens"] for case in plan(True)] == [1024] * 3


def test_softmax_has_the_loss_of_the_model(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "RANGES", ((0, 64), (64, 256)))
    model, tokenizer = pretrained_models.load("smollm2")
    text = pretrained_models.speech(tokenizer, pretrained_models.SPEECHES[0], TOKENS)
    with torch.no_grad():
        logits = model(input_ids=text[None]).logits[0]
    wanted = torch.nn.functional.cross_entropy(logits[:-1], text[1:], reduction="none")
    found = measure(language(SOFTMAX, 1.0), 0)
    assert [(place["from"], place["to"]) for place in found["ranges"]] == [(0, 64), (64, TOKENS - 1)]
    means = [float(wanted[:64].mean()), float(wanted[64:].mean())]
    assert [place["loss"] for place in found["ranges"]] == pytest.approx(means, rel=1e-4)
    assert found["bytes"] == TOKENS * 2 * 2 * 16 * 4  # 2 layers, 2 heads, keys and values of 8 float32


@pytest.mark.parametrize("method", [WINDOW, BY_HEAD, "window + degree 1, fitted", "window + degree 2, centred"])
def test_no_method_takes_more_than_its_budget(models: Path, method: str) -> None:
    whole = measure(language(SOFTMAX, 1.0), 0)
    budget = 0.9
    found = measure(language(method, budget), 0)
    assert 0.5 * budget * whole["bytes"] < found["bytes"] <= budget * whole["bytes"]
    assert found["failed"] is None
    assert sum(head["count"] for head in found["heads"]) == 4
    assert found["ranges"][0]["loss"] == pytest.approx(whole["ranges"][0]["loss"], rel=0.2)
    assert found["ranges"][0]["loss"] != whole["ranges"][0]["loss"]


def test_an_unsafe_normaliser_is_a_finding(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(model: Any, text: Any, settings: Any, *, notify: Any) -> None:
        notify()
        raise pretrained.NormaliserWarning

    monkeypatch.setattr("taylor_attention.hf.profiling.token_losses", stop)
    found = measure(language("window + degree 1, centred"), 0)
    assert (found["ranges"], found["failed"]) == ([], 512)


def test_the_learned_part_is_read_and_has_a_rival_of_its_bytes(models: Path) -> None:
    from taylor_attention import hf
    from taylor_attention.hf.centres import key_centre
    from taylor_attention.hf.distillation import distill
    from taylor_attention.hf.distilled import with_far_maps
    from taylor_attention.hf.far_maps import far_map
    from taylor_attention.hf.models import attention_layers

    model, tokenizer = pretrained_models.load("smollm2")
    text = pretrained_models.speech(tokenizer, pretrained_models.CALIBRATION[0], TOKENS)
    settings = with_far_maps(hf.ModelSettings(hf.HeadSettings(32, 4, 0, None)), 2, 3)
    distill(model, [text], settings, steps=2, queries=8).save(models / "distilled-32")
    plain, by_head, learned = (measure(language(each, "distilled-32"), 0) for each in (WINDOW, BY_HEAD, LEARNED))
    assert plain["heads"][0]["window"] > 32
    assert by_head["bytes"] <= learned["bytes"]
    assert 0.9 * learned["bytes"] < plain["bytes"] <= learned["bytes"]
    assert learned["heads"][0]["far_dim"] == 3
    assert all(place["divergence"] > 0 for each in (plain, learned) for place in each["ranges"])
    assert all("divergence" not in place for place in by_head["ranges"])
    assert all(far_map(each) is None and key_centre(each) is None for each in attention_layers(model))


@pytest.mark.parametrize("centred", [False, True])
def test_the_encoder_comes_near_softmax_with_the_degree(models: Path, centred: bool) -> None:
    exact, low, high = (
        measure({"model": "minilm", "degree": degree, "centred": centred}, 0) for degree in (None, 0, 6)
    )
    assert exact["cosine"] == pytest.approx(1, abs=1e-5)
    assert low["lowest"] <= low["cosine"] < high["cosine"]
    assert high["pearson"] == pytest.approx(exact["pearson"], abs=abs(low["pearson"] - exact["pearson"]))
    assert exact["bytes"] == 48 * 2 * 4 * 16 * 4  # 48 tokens, 2 layers, 4 heads, keys and values of 8 float32


def test_correlation_is_that_of_the_ratings(models: Path) -> None:
    """Of embeddings whose cosines fall with the distance of the documents, while the ratings rise; each pair once."""
    angle = torch.arange(50, dtype=torch.float64) / 50
    pairs = list(combinations(range(50), 2))
    wanted = correlation([math.cos((j - i) / 50) for i, j in pairs], [(j - i) / 50 for i, j in pairs])
    assert pretrained._pearson(3 * torch.stack([angle.cos(), angle.sin()], 1)) == pytest.approx(wanted)


def told(method: str, budget: float | str, loss: float | None) -> Finding:
    ranges = [] if loss is None else [{"from": 0, "to": 1024, "loss": 1.0}, {"from": 1024, "to": 2048, "loss": loss}]
    heads = [{"count": 90, "window": 60, "heavy": 0, "degree": None, "reading": "taylor", "far_dim": None}]
    values = {
        "ranges": ranges,
        "bytes": int(4e6 * (0.1 if isinstance(budget, str) else budget)),
        "heads": heads,
        "failed": None,
    }
    return Finding(language(method, budget), values, 1.0)


LOSSES = [told(SOFTMAX, 1.0, 2.0), told(WINDOW, 0.25, 2.4), told(BY_HEAD, 0.25, 2.1)]


def test_the_share_of_the_gap_is_told() -> None:
    assert EXPERIMENT.tables(LOSSES)[0].rows[2] == (BY_HEAD, "25%", "1", "1.0000", "2.1000", "75%")
    assert "windows by head close 75% of the gap" in EXPERIMENT.conclusions(LOSSES)[0]
    worse = EXPERIMENT.conclusions([*LOSSES[:2], told(BY_HEAD, 0.25, 2.5)])[0]
    assert "windows by head add 25% to the gap" in worse


@pytest.mark.parametrize(
    ("far", "rival", "sentence"),
    [
        (told("window + degree 1, fitted", 0.25, 2.5), LOSSES[1], "does not earn its bytes: its loss less that of"),
        (told("window + degree 1, fitted", 0.25, 2.3), LOSSES[1], "earns its bytes: its loss less that of"),
        (told("window + degree 1, centred", 0.25, None), LOSSES[1], "at 25% of the bytes, a normaliser was not"),
        (
            told(LEARNED, "learned", 2.3),
            told(WINDOW, "learned", 2.25),
            "alone of the same bytes is learned, at 10% +0.0500",
        ),
    ],
)
def test_a_far_part_is_compared_at_its_bytes(far: Finding, rival: Finding, sentence: str) -> None:
    (line,) = EXPERIMENT.conclusions([LOSSES[0], rival, far])
    assert sentence in line


def apart(method: str, *divergences: float) -> Finding:
    finding = told(method, "learned", 2.3)
    places = [place | {"divergence": value} for place, value in zip(finding.values["ranges"], divergences, strict=True)]
    return Finding(finding.case, finding.values | {"ranges": places}, 1.0)


def test_divergences_are_told_where_they_were_measured() -> None:
    findings = [LOSSES[0], apart(WINDOW, 0.1, 0.2), apart(LEARNED, 0.11, 0.15)]
    table = EXPERIMENT.tables(findings)[2]
    assert table.rows == ((WINDOW, "10%", "0.1000", "0.2000"), (f"{LEARNED}: learned", "10%", "0.1100", "0.1500"))
    line = EXPERIMENT.conclusions(findings)[-1]
    assert "nearer than a window alone of the same bytes at 1 of 2 ranges" in line
    assert "0.1500 beside 0.2000" in line
    assert all("how far" not in each.title for each in EXPERIMENT.tables(LOSSES))


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_partial_findings_are_told_and_drawn(count: int) -> None:
    assert len(EXPERIMENT.tables(LOSSES[:count])[0].rows) == count
    assert [each.name for each in EXPERIMENT.pictures(LOSSES[:count])] == ["pretrained"]


def test_without_the_models_it_is_refused_by_name_and_left_out_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAYLOR_MODELS", str(tmp_path / "none"))
    monkeypatch.setattr("taylor_attention.bench.evidence.pretrained_models.find_spec", lambda package: package)
    refused = CliRunner().invoke(app, ["reproduce", "--only", "pretrained", "--out", str(tmp_path)])
    assert refused.exit_code == 2
    assert "--only pretrained: it needs pretrained models" in " ".join(refused.stderr.split())
    monkeypatch.setattr(
        "taylor_attention.cli.reproduce.EXPERIMENTS",
        {name: pretrained_experiment(name) for name in ("sizes", "pretrained")},
    )
    rest = CliRunner().invoke(app, ["reproduce", "--quick", "--out", str(tmp_path)])
    assert rest.exit_code == 0, rest.output
    assert "pretrained is left out: it needs pretrained models" in rest.stderr
    assert list(json.loads(rest.stdout.splitlines()[-1])["experiments"]) == ["sizes"]


def pretrained_experiment(name: str) -> Any:
    from taylor_attention.bench.evidence.registry import EXPERIMENTS

    return EXPERIMENTS[name]
