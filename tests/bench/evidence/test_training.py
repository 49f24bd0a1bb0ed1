"""The experiments on training: their text, what is judged on it, their start, small runs, what is told of findings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from taylor_attention.bench.evidence import learning, length, noted_text, training
from taylor_attention.bench.evidence.experiment import Finding
from taylor_attention.bench.evidence.learning import judge, learn, prepare_recall, recall_losses, state_bytes
from taylor_attention.nn import LanguageModel, ModelConfig

WORDS = b"to be or not to be that is the question " * 40
SMALL: dict[str, Any] = {"d_model": 16, "num_layers": 1, "num_heads": 2, "rope": False, "decay": None, "conv": 4}


@pytest.fixture(autouse=True)
def own_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that needs no corpus, another one for validation."""
    texts = (WORDS, WORDS.replace(b"be", b"\xc3\xa9tre"))
    monkeypatch.setattr(noted_text, "load_split", lambda corpus: texts)


def notes_of(text: torch.Tensor) -> list[tuple[int, int]]:
    return [(mark, value) for mark, value in zip(text.tolist(), text[1:].tolist(), strict=False) if 128 <= mark < 224]


def test_a_mark_has_one_value_until_all_are_drawn_anew():
    made = noted_text.noted_text("training", 3, period=500)
    notes = notes_of(made)
    assert len(notes) > 5000
    assert all(224 <= value < 240 for _, value in notes)
    for start in (0, 500):
        assert len(set(notes[start : start + 500])) == len({mark for mark, _ in notes[start : start + 500]}) > 80
    assert len(set(notes[:1000])) > 100
    assert torch.equal(made, noted_text.noted_text("training", 3, period=500))
    assert notes_of(noted_text.noted_text("training", 4))[:50] != notes[:50]


def test_the_words_are_those_of_the_side():
    words = bytes(each for each in noted_text.noted_text("validation", 0).tolist() if each < 128)
    assert words.startswith(b"to tre or not to tre that")
    assert b"be" not in words
    assert bytes(noted_text.plain_text("training", 20).tolist()) == WORDS[:20] + b"\n" + WORDS[:20]


def test_distances_are_to_the_marks_last_place():
    rows = torch.tensor([[130, 230, 65, 130, 230, 131, 231], [65, 131, 225, 131, 225, 131, 225]])
    assert noted_text.recall_distances(rows).tolist() == [[0, -1, -1, 3, -1, 0, -1], [-1, 0, -1, 2, -1, 2, -1]]


def test_losses_are_parted_by_distance():
    losses, distances = torch.arange(6.0), torch.tensor([-1, 0, 32, 33, 512, 513])
    assert recall_losses(losses, distances) == {
        "rest": 0.0, "new": 1.0, "known": 3.5, "to 32": 2.0, "to 64": 3.0, "to 128": None, "to 256": None, "to 512": 4.0
    }  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1}, {"conv": 0, "qk_norm": False}, {"attention": "softmax"}])
def test_the_start_finds_what_came_after_a_token_like_this_one(options: dict[str, Any]):
    model = LanguageModel(ModelConfig(**SMALL | {"head_dim": 16} | options))
    prepare_recall(model)
    layer = model.blocks[0].attention
    x = torch.randn(1, 40, 16)
    x[:, 39] = x[:, 20]
    heads = layer._project(x, None, None)
    found = (heads.query[0, 0, 39] @ heads.key[0, 0].mT).argmax()
    assert found == (20 if options.get("conv") == 0 else 21)
    again = LanguageModel(ModelConfig(**SMALL | {"head_dim": 16} | options))
    prepare_recall(again)
    assert again.blocks[0].attention.key.weight.shape == layer.key.weight.shape


def test_the_start_makes_learned_far_scores_larger():
    config = ModelConfig(**SMALL | {"window": 4, "far_dim": 3})
    model, fresh = LanguageModel(config), LanguageModel(config).blocks[0].attention
    prepare_recall(model)
    layer = model.blocks[0].attention
    assert torch.equal(layer.far_query_map, 2 * fresh.far_query_map)
    assert torch.equal(layer.far_key_map, 2 * fresh.far_key_map)


def test_learning_goes_down_and_repeats():
    text = noted_text.noted_text("training", 0)
    settings: dict[str, Any] = {"steps": 30, "batch": 2, "length": 48, "rate": 1e-2, "seed": 5, "recall": True}
    runs = [learn(ModelConfig(**SMALL), text, **settings) for _ in range(2)]
    assert runs[0].curve == runs[1].curve
    assert [step for step, _ in runs[0].curve] == list(range(2, 31, 2))
    assert runs[0].curve[-1][1] < runs[0].curve[0][1] - 0.5
    assert runs[0].stopped is None
    with torch.no_grad():
        inputs = text[:49].long()
        losses = torch.nn.functional.cross_entropy(runs[0].model(inputs[None, :-1])[0], inputs[1:])
    assert judge(runs[0].model, text[:49], length=48, windows=3)["loss"] == pytest.approx(float(losses), rel=1e-5)


def test_a_failing_normaliser_ends_a_run():
    learnt = learn(
        ModelConfig(**SMALL | {"degree": 1}),
        noted_text.noted_text("training", 0),
        steps=3, batch=2, length=48, rate=1e-2, seed=0, recall=True,
    )  # fmt: skip
    assert learnt.stopped == 1
    assert learnt.curve == []


def test_a_cache_is_measured_at_its_tokens():
    softmax = LanguageModel(ModelConfig(**SMALL | {"attention": "softmax", "conv": 0}))
    assert state_bytes(softmax, 512) == pytest.approx(512 * 2 * 16 * 4, rel=0.02)
    taylor = LanguageModel(ModelConfig(**SMALL))
    assert state_bytes(taylor, 512) == state_bytes(taylor, 1)


def test_plans_name_models_that_can_be_made():
    cases = training.plan(False)
    assert len({tuple(case.items()) for case in cases}) == len(cases)
    for case in (*cases, *training.plan(True)):
        ModelConfig(d_model=training.WIDTH, **(training.MAIN | training.SIDE)[case["model"]])
    assert {case["model"] for case in cases} == set(training.MAIN | training.SIDE)
    for case in (*length.plan(False), *length.plan(True)):
        ModelConfig(d_model=training.WIDTH, **length.MODELS[case["model"]])


def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WIDTH": 64, "LENGTH": 64, "LAYERS": 1, "WINDOWS": 2}.items():
        monkeypatch.setattr(training, name, value)
        monkeypatch.setattr(length, name, value, raising=False)


def test_small_cases_are_told(monkeypatch: pytest.MonkeyPatch):
    tiny(monkeypatch)
    cases = [replace_steps(case, 2) for case in training.plan(True)]
    cases.append({"data": "text", "model": "softmax, 4 x 16", "run": 0, "steps": 2})
    findings = [Finding(case, training.measure(case, 0), 1.0) for case in cases]
    tables = training.tables(findings)
    assert [len(table.rows) for table in tables] == [4, 1]
    assert {len(row) for table in tables for row in table.rows} == {len(tables[0].columns), len(tables[1].columns)}
    told = " ".join(training.conclusions(findings))
    assert "failed while training, which ended the run: degree 3, 8 x 8" in told
    assert [picture.name for picture in training.pictures(findings)] == ["training"]
    assert training.pictures([]) == training.conclusions([]) == training.tables([]) == []


def replace_steps(case: dict[str, Any], steps: int) -> dict[str, Any]:
    return {**case, "steps": steps}


def made(name: str, loss: float, size: int, run: int = 0) -> Finding:
    losses = dict.fromkeys(("loss", "rest", "new", "known", *(f"to {end}" for end in learning.DISTANCES)), loss)
    values = {"losses": losses, "stopped": None, "curve": [(1, loss)], "ms_per_step": 1.0, "state_bytes": size}
    return Finding({"data": "notes", "model": name, "run": run, "steps": 1}, {**values, "parameters": 1}, 1.0)


@pytest.mark.parametrize(("loss", "verdict"), [(2.01, "at least as good (within 1%)"), (2.03, "not as good")])
def test_the_recipe_is_the_best_below_the_cache(loss: float, verdict: str):
    findings = [made("softmax, 2 x 32", 2.0, 1000), made("degree 2, 1 x 64", 1.0, 1001), made("degree 2", loss, 999)]
    told = training.conclusions([*findings, made("window 32 alone", 3.0, 10)])
    assert told[0] == "With notes, softmax, 2 x 32 reaches 2.000 nats per byte; window 32 alone: 3.000 (50.0% more)."
    assert "degree 2 is best" in told[1]
    assert told[1].endswith(f"{verdict}.")


def test_the_recipe_stands_beside_the_softmax_row_with_the_same_positions():
    findings = [made("softmax, 2 x 32", 2.0, 1000), made("softmax: with RoPE", 1.9, 1000), made("degree 2", 2.02, 999)]
    assert training.conclusions(findings)[-1] == (
        "Beside softmax, 2 x 32, which like it has no RoPE, that is 1.0% more."
    )
    assert not any("like it" in told for told in training.conclusions(findings[::2]))


def test_the_recipe_is_a_row_with_all_seeds_and_stands_beside_the_window_of_its_bytes():
    seeds = range(2)
    findings = [made("softmax", 2.0, 1000, run) for run in seeds] + [made("degree 2", 2.1, 900, run) for run in seeds]
    findings += [made("degree 4", 1.9, 900), made("window 5 alone", 2.05, 899), made("window 6 alone", 1.0, 901)]
    told = training.conclusions(findings)
    assert "degree 2 is best" in told[2]
    assert told[3].startswith("A window of no more bytes, window 5 alone with 1 KiB, reaches 2.050 on these 512 tokens")
    assert "tokens: 2.4% less." in told[3]
    assert len(told) == 4


def test_spread_is_that_of_the_seeds():
    findings = [made("softmax", loss, 1, run) for run, loss in enumerate((2.0, 2.5, 2.1))]
    assert training.tables(findings)[0].rows[0][:4] == ("softmax", "3", "2.200", "0.500")


def test_reading_on_is_one_forward(monkeypatch: pytest.MonkeyPatch):
    tiny(monkeypatch)
    monkeypatch.setattr(length, "BLOCK", 64)
    case = {"model": "degree 2, decay", "steps": 2, "tokens": 250}
    values = length.measure(case, 0)
    places = values["changing"]["ranges"]
    assert [(place["from"], place["to"]) for place in places] == [(0, 64), (64, 128), (128, 250)]
    learnt = learn(
        ModelConfig(d_model=64, num_layers=1, rope=False, conv=4, **length.MODELS["degree 2, decay"]),
        noted_text.noted_text("training", 0),
        steps=2, batch=training.BATCH["notes"], length=64, rate=training.RATE, seed=0, recall=True,
    )  # fmt: skip
    text = noted_text.noted_text("validation", 0)[:251].long()
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(learnt.model(text[None, :-1])[0], text[1:], reduction="none")
    assert places[2]["loss"] == pytest.approx(float(losses[128:].mean()), rel=1e-4)
    findings = [Finding(case, values, 1.0), Finding({**case, "model": "softmax"}, {"stopped": 1}, 1.0)]
    assert [len(table.rows) for table in length.tables(findings)] == [2, 2]
    assert length.tables(findings)[0].rows[1][-2] == "stopped at 1"
    assert "to 250" in length.tables(findings)[0].columns
    assert len(length.pictures(findings)) == 1
    assert all("degree 2, decay" in line for line in length.conclusions(findings))
    assert math.isfinite(values["constant"]["seconds"])
