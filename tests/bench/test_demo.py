"""The demonstration measures what it says, and refuses to report on a wrong result."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from taylor_attention.bench import demo
from taylor_attention.bench.demo import Measurement
from taylor_attention.cli.app import app
from taylor_attention.errors import ArgumentError, MissingDependencyError
from taylor_attention.lm.checkpoint import save_checkpoint
from taylor_attention.nn import LanguageModel, ModelConfig

TEXT = bytes(torch.randint(0, 256, (1400,), generator=torch.Generator().manual_seed(0)).tolist())
STEPS = 6


@pytest.fixture(scope="module")
def twins() -> dict[str, LanguageModel]:
    made = {}
    for attention in ("taylor", "softmax"):
        torch.manual_seed(0)
        config = ModelConfig(d_model=16, num_layers=1, num_heads=2, attention=attention)
        made[attention] = LanguageModel(config).eval()
    return made


def row(model: str, context: int, cost: float) -> Measurement:
    return Measurement(model, context, cost, cost, 1, None, 1.0, 0.0)


def measure(models: dict[str, LanguageModel], tokens: int = 1300) -> list[Measurement]:
    pauses = demo.contexts(tokens, STEPS)
    found = demo.measure(models, TEXT, pauses=pauses, steps=STEPS, notify=lambda name, at: None)
    return [each for rows in found for each in rows]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(134, [128]), (256, [128, 250]), (1000, [128, 256, 512, 994]), (2054, [128, 256, 512, 1024, 2048])],
)
def test_contexts_are_spaced_by_doubling_and_end_with_the_text(tokens: int, expected: list[int]):
    assert demo.contexts(tokens, STEPS) == expected


def test_contexts_of_too_short_a_text_are_refused():
    with pytest.raises(ArgumentError, match=r"^tokens: expected"):
        demo.contexts(133, STEPS)


def test_every_model_is_measured_at_every_context(twins: dict[str, LanguageModel]):
    rows = measure(twins)
    assert [(each.model, each.context) for each in rows] == [
        (name, context) for context in demo.contexts(1300, STEPS) for name in twins
    ]
    assert all(each.ms_per_token > 0 for each in rows)
    assert all(each.difference <= demo.TOLERANCE for each in rows)


def test_memory_is_constant_for_taylor_and_grows_for_softmax(twins: dict[str, LanguageModel]):
    rows = measure(twins)
    taylor = {each.state_bytes for each in rows if each.model == "taylor"}
    softmax = [each.state_bytes for each in rows if each.model == "softmax"]
    assert len(taylor) == 1
    assert taylor == {sum(state.nbytes for state in twins["taylor"].new_states(1))}
    assert softmax == sorted(softmax)
    assert softmax[-1] >= 1294 * 2 * 16 * 4  # a key and a value of 16 float32 for each token


def test_the_loss_is_that_of_the_text_read_since_the_row_above(twins: dict[str, LanguageModel]):
    rows = [each for each in measure(twins) if each.model == "taylor"]
    tokens = torch.tensor(list(TEXT))
    with torch.no_grad():
        logits = twins["taylor"](tokens[None, :-1])[0]
    losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
    start = 0
    for each in rows:
        expected = losses[start : each.context].mean() / math.log(2)
        assert each.bits_per_byte == pytest.approx(float(expected), rel=1e-4)
        start = each.context + STEPS


def test_decode_that_disagrees_with_prefill_is_not_reported(twins: dict[str, LanguageModel], monkeypatch):
    model, inner = twins["taylor"], twins["taylor"].decode_

    def drifting(tokens, states):
        logits = inner(tokens, states)
        return logits * 1.01 if tokens.shape[1] == 1 else logits

    monkeypatch.setattr(model, "decode_", drifting, raising=False)
    with pytest.raises(demo.DisagreementError, match=r"^taylor: .* differ by 1\.0e-02 at context 128"):
        measure(twins)


def test_a_nan_is_a_disagreement(twins: dict[str, LanguageModel], monkeypatch):
    nan = torch.full((STEPS, 256), float("nan"))
    monkeypatch.setattr(demo.Reader, "ahead", lambda reader, steps: nan)
    with pytest.raises(demo.DisagreementError, match="nan"):
        measure(twins)


def test_too_short_a_text_is_refused(twins: dict[str, LanguageModel]):
    with pytest.raises(ArgumentError, match=r"^text: expected at least 2,006 bytes"):
        list(demo.measure(twins, TEXT, pauses=[2000], steps=STEPS, notify=lambda name, at: None))


def test_growth_compares_the_end_with_the_median_of_the_beginning():
    costs = {"a": [9.0, 2.0, 2.5, 7.0, 5.0], "b": [1.0]}
    rows = [row(name, context, cost) for name, own in costs.items() for context, cost in enumerate(own)]
    assert (demo.growth(rows, "a"), demo.growth(rows, "b")) == (2.0, 1.0)


def test_the_figure_is_a_png(tmp_path: Path):
    rows = [row(name, 2**i, i + 1.0) for i in range(3) for name in ("taylor", "softmax")]
    demo.draw(tmp_path / "figure.png", rows)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_without_matplotlib_drawing_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'taylor-attention\[bench\]'"):
        demo.draw(tmp_path / "figure.png", [])


@pytest.fixture(scope="module")
def arguments(twins: dict[str, LanguageModel], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("demo")
    for name, model in twins.items():
        save_checkpoint(folder / name, model)
    (folder / "text").write_text("A line of text to read.\n" * 100)
    models = ["--taylor", str(folder / "taylor"), "--softmax", str(folder / "softmax")]
    return ["demo", "--tokens", "700", "--steps", "5", "--continuation", "30", "--text", str(folder / "text"), *models]


def test_the_command_writes_its_files_and_one_json_line(arguments: list[str], tmp_path: Path):
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "new" / "out"), "--json"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    found = json.loads(result.stdout)
    with open(tmp_path / "new" / "out" / "measurements.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(each["ms_per_token"]) for each in rows] == [each["ms_per_token"] for each in found["measurements"]]
    assert found["continuation"] == (tmp_path / "new" / "out" / "continuation.txt").read_text()
    names = sorted(path.name for path in (tmp_path / "new" / "out").iterdir())
    assert names == ["continuation.txt", "cost_per_token.png", "measurements.csv"]


def test_the_command_ends_with_a_table_and_the_continuation(arguments: list[str], tmp_path: Path):
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    assert "softmax ms" in result.stdout
    assert "695" in result.stdout  # the last context
    assert "times as long as" in result.stdout
    assert result.stderr.count("context") >= 3  # progress, a line per context


def test_without_matplotlib_everything_else_works(arguments: list[str], tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    assert "no figure: drawing the figure needs matplotlib: pip install 'taylor-attention[bench]'" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["continuation.txt", "measurements.csv"]
