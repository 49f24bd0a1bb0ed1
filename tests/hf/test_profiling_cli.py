"""`taylor-attention profile` from a saved model to tables, a picture, JSON, and settings that do what it promised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from taylor_attention import hf
from taylor_attention.cli.app import app
from taylor_attention.errors import ArgumentError, StorageError
from taylor_attention.hf.profiling import cut, embeddings, load_model, load_tokenizer, next_token_loss
from tiny_models import LAYERS, LETTERS, encoder, save_models, tokenizer_of

TOKENS = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, an encoder, and a text."""
    return save_models(tmp_path_factory.mktemp("profile"))


def run(folder: Path, model: str, *arguments: str) -> Result:
    call = ["profile", str(folder / model), "--text", str(folder / "text.txt"), "--tokens", str(TOKENS), *arguments]
    return CliRunner().invoke(app, [*call, "--queries", "16"])


@pytest.mark.parametrize("model", ["causal", "encoder"])
@pytest.mark.parametrize("heads", [[], ["--heads"]])
def test_tables_have_a_row_for_each_layer_or_head(model, heads, folder):
    result = run(folder, model, *heads)
    assert result.exit_code == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith("│")]
    assert len(rows) == LAYERS * (4 if heads else 1)
    assert "Recommended for" in result.stdout
    assert ("nats per token" in result.stdout) == (model == "causal")
    assert ("cosine with softmax's" in result.stdout) == (model == "encoder")
    assert result.stderr == ""


def test_json_holds_what_the_tables_tell_and_more(folder):
    found = json.loads(run(folder, "causal", "--json").stdout)
    assert found.keys() == {"model", "text", "profile", "recommendation", "effect"}
    profile = found["profile"]
    assert (profile["tokens"], profile["sequences"], profile["queries"], profile["causal"]) == (TOKENS, 1, 16, True)
    assert [(each["layer"], each["head"]) for each in profile["heads"]] == [(i, j) for i in range(2) for j in range(4)]
    assert [(each["layer"], each["head"]) for each in profile["shared"]] == [(i, j) for i in range(2) for j in range(2)]
    for each in profile["heads"]:
        assert each.keys() == {"layer", "head", "spread", "weight", "errors", "needed"}
        assert each["errors"]["dropped"].keys() == {"0", "64", "128"}
        assert each["needed"].keys() == {"10%", "1%"}
    advice = found["recommendation"]
    assert advice["cache_bytes"] == len(advice["choices"]) * profile["cache_bytes"]
    assert advice["nbytes"] == sum(each["nbytes"] for each in advice["choices"])
    assert found["effect"].keys() == {"measure", "softmax", "recommended", "uniform", "uniform_settings"}


def test_applied_settings_do_what_was_promised(folder, tmp_path):
    target = tmp_path / "settings.json"
    result = run(folder, "causal", "--apply", str(target), "--budget", "0.5", "--json")
    effect, advice = (json.loads(result.stdout)[name] for name in ("effect", "recommendation"))
    assert advice["nbytes"] <= advice["cache_bytes"] / 2
    settings = hf.ModelSettings.load(target)
    model, tokenizer = load_model(str(folder / "causal")), load_tokenizer(str(folder / "causal"))
    _, held_out = cut(tokenizer, (folder / "text.txt").read_text(), TOKENS, 4096)
    assert next_token_loss(model, held_out, settings) == pytest.approx(effect["recommended"], rel=1e-6)
    assert next_token_loss(model, held_out, None) == pytest.approx(effect["softmax"], rel=1e-6)
    hf.use(model, target)
    cache = hf.TaylorCache(model)
    with torch.no_grad():
        model(held_out[0][None], past_key_values=cache)
    assert cache.nbytes == advice["nbytes"]


def test_centres_are_those_that_the_effect_was_measured_with(folder, tmp_path):
    """At keys with a large offset, which a series about zero fails for."""
    model = encoder(torch.float32, max_position_embeddings=TOKENS)
    for layer in model.encoder.layer:
        layer.attention.self.key.bias.data.fill_(1)
    model.save_pretrained(tmp_path / "model")
    tokenizer_of(special=True).save_pretrained(tmp_path / "model")
    call = ["profile", str(tmp_path / "model"), "--text", str(folder / "text.txt"), "--tokens", str(TOKENS), "--json"]
    without = json.loads(CliRunner().invoke(app, [*call, "--error", "0.3"]).stdout)
    files = ["--centres", str(tmp_path / "centres"), "--apply", str(tmp_path / "settings.json")]
    found = json.loads(CliRunner().invoke(app, [*call, "--error", "0.3", *files]).stdout)
    more, fewer = (each["recommendation"]["heads"]["pure Taylor"] for each in (found, without))
    assert more > fewer
    model, tokenizer = load_model(str(tmp_path / "model")), load_tokenizer(str(tmp_path / "model"))
    _, held_out = cut(tokenizer, (folder / "text.txt").read_text(), TOKENS, TOKENS)
    exact = embeddings(model, held_out, None)
    cosines = []
    for centres in (tmp_path / "centres", None):
        hf.set_key_centres(model, centres)
        own = embeddings(model, held_out, hf.ModelSettings.load(tmp_path / "settings.json"))
        cosines.append(float(torch.cosine_similarity(exact, own).mean()))
    assert cosines[0] == pytest.approx(found["effect"]["recommended"], abs=1e-6)
    assert cosines[1] < cosines[0] - 1e-4


def test_a_picture_is_drawn(folder, tmp_path):
    pytest.importorskip("matplotlib")
    target = tmp_path / "heads.png"
    result = run(folder, "causal", "--figure", str(target), "--no-effect")
    assert result.exit_code == 0, result.stderr
    assert target.read_bytes().startswith(b"\x89PNG")
    assert "Held-out" not in result.stdout


# ---- texts -----------------------------------------------------------------------------------------------------------


def cut_lengths(text: str, tokens: int, most: int, *, special: bool = False) -> tuple[list[int], list[int]]:
    parts = cut(tokenizer_of(special=special), text, tokens, most)
    return tuple([len(piece) for piece in part] for part in parts)


@pytest.mark.parametrize(
    ("letters", "tokens", "most", "lengths"),
    [
        (500, 100, 4096, [100]),
        (500, 100, 50, [50, 50]),
        (150, 100, 4096, [75]),
        (130, 100, 50, [50]),
        (200, 100, 100, [100]),
    ],
)
def test_texts_are_cut_into_pieces_of_one_length(letters, tokens, most, lengths):
    assert cut_lengths("a" * letters, tokens, most) == (lengths, lengths)


@pytest.mark.parametrize("letters", [130, 131, 500])
def test_special_tokens_are_in_each_piece(letters):
    profiled, held_out = cut(tokenizer_of(special=True), "a" * letters, 100, 64)
    assert len(profiled) == len(held_out) >= 1
    for piece in (*profiled, *held_out):
        assert (int(piece[0]), int(piece[-1])) == (2, 3)
        assert 32 <= len(piece) <= 64


def test_held_out_tokens_follow_the_profiled_ones():
    text = "".join(LETTERS[i % 26] for i in range(100))
    profiled, held_out = cut(tokenizer_of(special=False), text, 40, 4096)
    assert (profiled[0] - 4).tolist() == [i % 26 for i in range(40)]
    assert (held_out[0] - 4).tolist() == [i % 26 for i in range(40, 80)]


def test_a_short_text_is_refused():
    with pytest.raises(ArgumentError, match="^text: expected at least 64 tokens, got 63"):
        cut_lengths("a" * 63, 100, 4096)


@pytest.mark.parametrize("name", ["nothing", "", "a/b/c"])
def test_a_model_that_is_not_there_is_named_in_one_line(name, folder):
    with pytest.raises(StorageError, match=f"^model '{name}': cannot be loaded "):
        load_model(name)
    with pytest.raises(StorageError, match=f"^model '{name}': its tokenizer cannot be loaded "):
        load_tokenizer(name)


BAD = {
    "both rules": (["--error", "0.1", "--budget", "0.5"], "--budget: expected no --error beside it, got 0.1"),
    "a file of GGUF": (["--gguf-file", "none.gguf"], "--gguf-file: expected a file in "),
    "a folder that is not there": (["--apply", "{folder}/none/file"], "--apply: expected a file in a folder that is "),
    "another": (["--figure", "{folder}/none/file"], "--figure: expected a file in a folder that is there"),
    "a device": (["--device", "quantum"], "device: expected a device that PyTorch has here, got 'quantum'"),
    "too small a budget": (["--budget", "0.000001"], "budget: expected at least 0."),
}


@pytest.mark.parametrize(("arguments", "complaint"), BAD.values(), ids=BAD.keys())
def test_bad_options_end_with_one_line(arguments, complaint, folder):
    result = run(folder, "causal", *(each.replace("{folder}", str(folder)) for each in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {complaint}")
    assert result.stderr.count("\n") == 1
