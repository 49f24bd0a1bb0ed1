"""`taylor-attention distill`: what it writes and tells, going on with interrupted work, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

from taylor_attention import hf
from taylor_attention.cli.app import app
from tiny_models import LAYERS, save_models

SMALL = ["--window", "6", "--sinks", "1", "--far-dim", "3", "--length", "60", "--tokens", "240", "--steps", "2"]
SMALL += ["--together", "336"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, its tokenizer and a text."""
    return save_models(tmp_path_factory.mktemp("distill"))


def run(folder: Path, out: Path, *arguments: str) -> Result:
    call = ["distill", str(folder / "causal"), "--text", str(folder / "text.txt"), "--out", str(out), *SMALL]
    return CliRunner().invoke(app, [*call, "--queries", "8", *arguments])


def test_what_it_writes_is_used_as_it_says(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["pieces"], len(told["errors"]), len(told["divergences"])) == (4, 4, 5)
    assert set(told["effect"]) == {"softmax", "learned", "windows", "divergence", "bytes", "window"}
    learned = hf.Distilled.load(tmp_path)
    assert len(learned.maps) == LAYERS
    assert told["heads"] == sum(head.far_dim == 3 for head in learned.settings.heads.values())
    model = learned.use(AutoModelForCausalLM.from_pretrained(folder / "causal"))
    with torch.no_grad():
        assert bool(model(torch.arange(1, 41)[None] % 20).logits.isfinite().all())


def test_it_tells_what_it_found(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path)
    assert result.exit_code == 0, result.stderr
    told = " ".join(result.stdout.split())
    assert "learned from 4 pieces of 60 tokens" in told
    assert "divergence from softmax" in told
    assert "windows alone" in told


def test_finished_work_is_not_done_again(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path, "--no-effect").exit_code == 0
    again = run(folder, tmp_path, "--no-effect", "--resume", "--json")
    assert again.exit_code == 0
    assert [json.loads(again.stdout)[name] for name in ("errors", "divergences")] == [[], []]
    other = run(folder, tmp_path, "--no-effect", "--resume", "--seed", "1")
    assert other.exit_code == 2
    assert "expected the work on these texts with these settings" in other.stderr


def test_layers_need_not_learn_together(folder: Path, tmp_path: Path) -> None:
    """What each has learned alone is then what is left."""
    results = [run(folder, tmp_path / name, "--json", "--no-effect", "--together", name) for name in ("0", "60")]
    assert [len(json.loads(result.stdout)["divergences"]) for result in results] == [0, 1]
    alone, together = (hf.Distilled.load(tmp_path / name) for name in ("0", "60"))
    assert alone.settings == together.settings
    assert not torch.equal(alone.maps[0].gain, together.maps[0].gain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "600"], "--text: expected at least three pieces"),
        (["--window", "0", "--sinks", "0"], "far_dim: expected None without a window or sinks"),
    ],
)
def test_misuse_is_refused_in_one_line(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run(folder, tmp_path, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
