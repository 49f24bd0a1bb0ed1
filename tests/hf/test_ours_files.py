"""Text as bytes, and checkpoints as models of transformers and back."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from our_models import OPTIONS, build, text
from taylor_attention import hf
from taylor_attention.cli.app import app
from taylor_attention.errors import ArgumentError, StorageError
from taylor_attention.hf.convert import convert
from taylor_attention.lm.checkpoint import fingerprint, load_checkpoint, save_checkpoint, shipped
from taylor_attention.nn import LanguageModel, ModelConfig

# ---- text

TOKENIZER = hf.byte_tokenizer()


@settings(max_examples=40)
@given(st.text())
def test_any_text_is_its_bytes_and_comes_back(written: str):
    tokens = TOKENIZER.encode(written)
    assert tokens == list(written.encode())
    assert TOKENIZER.decode(tokens) == TOKENIZER.decode(tokens, skip_special_tokens=True) == written


@pytest.mark.parametrize("written", ["", "\0 \x01\x7f", "  two  spaces , and . marks 's", "ÿĀġŃ", "\r\n\t", "�"])
def test_nothing_is_added_or_tidied_by_a_saved_tokenizer_either(written: str, tmp_path: Path):
    TOKENIZER.save_pretrained(tmp_path)
    back = AutoTokenizer.from_pretrained(tmp_path)
    assert type(back).__module__.startswith("transformers.")  # it needs none of our code
    assert back.encode(written) == list(written.encode())
    assert back.decode(back.encode(written)) == written
    assert (back.padding_side, len(back), back.vocab_size) == ("left", 256, 256)


def test_the_end_is_a_byte_of_no_text():
    assert TOKENIZER.bos_token_id == TOKENIZER.eos_token_id == TOKENIZER.pad_token_id == 255
    assert TOKENIZER.encode("a<|end|>") == [97, 255]
    assert TOKENIZER.decode([97, 255]) == "a<|end|>"
    assert TOKENIZER.decode([255, 255, 97, 255], skip_special_tokens=True) == "a"
    assert TOKENIZER.decode([0xC3]) == TOKENIZER.decode([0xFE]) == "�"  # no whole character
    batch = TOKENIZER(["é", "abc"], padding=True)
    assert batch["input_ids"] == [[255, 0xC3, 0xA9], [97, 98, 99]]
    assert batch["attention_mask"] == [[0, 1, 1], [1, 1, 1]]


# ---- checkpoints


@pytest.mark.parametrize("name", OPTIONS)
def test_there_and_back_is_the_same_model(name: str, tmp_path: Path):
    model = build(name, torch.float32).model
    save_checkpoint(tmp_path / "one", model)
    moved = convert(tmp_path / "one", tmp_path / "folder")
    read = hf.TaylorForCausalLM.from_pretrained(tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "other")
    back, _ = load_checkpoint(tmp_path / "other")
    assert fingerprint(moved.model) == fingerprint(read.model) == fingerprint(back) == fingerprint(model)
    tokens = text(2, 9)
    assert torch.equal(read(tokens).logits, model(tokens))
    assert torch.equal(back(tokens), model(tokens))
    assert (read.config.eos_token_id, read.generation_config.eos_token_id) == (255, 255)
    assert not read.training
    assert {path.name for path in tmp_path.iterdir()} == {"one", "folder", "other"}


@pytest.mark.parametrize("name", ["taylor", "softmax"])
def test_the_shipped_models_convert(name: str, tmp_path: Path):
    own, _ = load_checkpoint(shipped(name))
    convert(shipped(name), tmp_path / "folder")
    model = hf.TaylorForCausalLM.from_pretrained(tmp_path / "folder")
    tokens = torch.tensor([list(b"def main():\n    ")])
    assert torch.equal(model(tokens).logits, own(tokens))
    hf.to_checkpoint(model, tmp_path / "back")
    assert fingerprint(load_checkpoint(tmp_path / "back")[0]) == fingerprint(own)


def test_another_vocabulary_gets_no_tokens_of_bytes(tmp_path: Path):
    save_checkpoint(tmp_path / "one", build(dtype=torch.float32, vocab_size=300).model)
    assert convert(tmp_path / "one", tmp_path / "folder").config.eos_token_id is None
    assert "tokenizer.json" not in os.listdir(tmp_path / "folder")


def test_half_precision_is_kept_in_the_file(tmp_path: Path):
    build(dtype=torch.bfloat16).save_pretrained(tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "back")
    whole = build(dtype=torch.float32).model.state_dict()
    back = load_checkpoint(tmp_path / "back")[0].state_dict()
    assert all(torch.equal(back[name], weight.bfloat16().float()) for name, weight in whole.items())


def test_a_checkpoint_is_written_of_models_alone_and_of_numbers(tmp_path: Path):
    with pytest.raises(ArgumentError, match="^model: expected a TaylorForCausalLM"):
        hf.to_checkpoint(build().model, tmp_path / "x")
    model = build()
    model.model.embedding.weight.data[3, 1] = torch.nan
    with pytest.raises(StorageError, match="embedding.weight: expected finite numbers"):
        hf.to_checkpoint(model, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_left_or_replaced_by_the_file(tmp_path: Path):
    one, other = tmp_path / "one", tmp_path / "other"
    save_checkpoint(one, build("far", torch.float32).model)
    save_checkpoint(other, build("softmax", torch.float32).model)
    convert(one, tmp_path / "folder")
    (tmp_path / "folder" / "notes").write_text("mine")
    for source, out in [(other, tmp_path / "folder"), (tmp_path / "folder", other)]:
        with pytest.raises(ArgumentError, match="^out: expected a name that is free, or force, got .*, which exists"):
            convert(source, out)
    convert(other, tmp_path / "folder", force=True)
    assert hf.TaylorForCausalLM.from_pretrained(tmp_path / "folder").config.attention == "softmax"
    assert (tmp_path / "folder" / "notes").read_text() == "mine"
    convert(tmp_path / "folder", one, force=True)
    assert load_checkpoint(one)[0].config.attention == "softmax"
    assert sorted(os.listdir(tmp_path)) == ["folder", "one", "other"]


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_is_written_whole_or_not_at_all(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_checkpoint(tmp_path / "one", build("far", torch.float32).model)
    before = ["one"]
    if there:
        convert(tmp_path / "one", tmp_path / "folder")
        (tmp_path / "folder" / "config.json").write_text("{}")
        before = ["folder", "one"]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    with pytest.raises(StorageError, match=r"folder: cannot be written \(No space left on device\)"):
        convert(tmp_path / "one", tmp_path / "folder", force=True)
    assert sorted(os.listdir(tmp_path)) == before
    assert [path.read_text() for path in tmp_path.glob("folder/config.json")] == ["{}"] * there


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "a configuration that is none": (lambda folder: (folder / "config.json").write_text("{"), "valid JSON"),
    "of another kind": (change_config(model_type="gpt2"), "model_type: expected 'taylor_attention', got 'gpt2'"),
    "an unknown field": (change_config(hedas=3), "configuration: expected names among"),
    "a bad field": (change_config(window=-3), "window: expected"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "weights cut off": (cut_weights, "cannot be read as a model of ours"),
    "weights that lack": (change_config(conv=3), "weights: expected all of the configuration"),
    "weights of more layers": (change_config(num_layers=1), "weights: expected those of its configuration, got ["),
    "weights of another width": (change_config(d_model=32), "cannot be read as a model of ours"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_folder_that_is_no_model_is_refused_in_one_line(change: Callable[[Path], Any], message: str, tmp_path: Path):
    folder = tmp_path / "folder"
    build("far", torch.float32).save_pretrained(folder)
    change(folder)
    with pytest.raises(StorageError) as error:
        convert(folder, tmp_path / "out")
    said = str(error.value)
    assert said.startswith(f"{folder}: cannot be read as a model of ours: ")
    assert message in said
    assert "\n" not in said
    assert os.listdir(tmp_path) == ["folder"]


# ---- the command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_the_command_converts_both_ways(tmp_path: Path):
    model = LanguageModel(ModelConfig(d_model=8, num_layers=1, num_heads=2))
    save_checkpoint(tmp_path / "one", model)
    there = run(tmp_path / "one", tmp_path / "folder")
    assert (there.exit_code, there.stderr) == (0, "")
    count = sum(weight.numel() for weight in model.parameters())
    assert there.stdout == f"{tmp_path / 'folder'}: a folder for transformers, {count:,} parameters\n"
    back = run(tmp_path / "folder", tmp_path / "back")
    assert (back.exit_code, back.stderr) == (0, "")
    assert back.stdout == f"{tmp_path / 'back'}: a checkpoint, {count:,} parameters\n"
    assert fingerprint(load_checkpoint(tmp_path / "back")[0]) == fingerprint(model)
    assert run("softmax", tmp_path / "back", "--force").exit_code == 2  # a folder in place of a file
    assert run("softmax", tmp_path / "folder", "--force").exit_code == 0


def test_a_folder_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_checkpoint(tmp_path / "one", build("far", torch.float32).model)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("later")
    monkeypatch.chdir(tmp_path / "empty")
    for name in (".", tmp_path / "link", f"{tmp_path / 'with a slash'}/"):
        assert run(tmp_path / "one", name, "--force").exit_code == 0
        assert hf.TaylorForCausalLM.from_pretrained(name).config.degree == 2
    assert sorted(os.listdir(tmp_path)) == ["empty", "later", "link", "one", "with a slash"]


COMPLAINTS = {
    "nothing there": (["{folder}/none", "{folder}/out"], "IN: expected a checkpoint, one of taylor, softmax"),
    "no name": (["", "{folder}/out"], "IN: expected"),
    "noise": (["{folder}/noise", "{folder}/out"], "{folder}/noise: not a whole safetensors file"),
    "a folder of nothing": (["{folder}/empty", "{folder}/out"], "{folder}/empty: cannot be read as a model of ours"),
    "there already": (["taylor", "{folder}/noise"], "OUT: expected a name that is free, or --force"),
    "a place that is none": (["taylor", "{folder}/none/out"], "{folder}/none/out: cannot be written (No such file"),
    "a file in its place": (["taylor", "{folder}/noise", "--force"], "{folder}/noise: cannot be written (Not a direct"),
    "no place": (["taylor", ""], "path: expected the name of a file, got ''"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), COMPLAINTS.values(), ids=COMPLAINTS.keys())
def test_the_command_refuses_in_one_line(arguments: list[str], message: str, tmp_path: Path):
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    (tmp_path / "empty").mkdir()
    result = run(*(argument.format(folder=tmp_path) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert re.fullmatch(rf"error: {re.escape(message.format(folder=tmp_path))}[^\n]*\n", result.stderr), result.stderr
    assert sorted(os.listdir(tmp_path)) == ["empty", "noise"]
    assert (tmp_path / "noise").read_bytes() == bytes(range(256))
