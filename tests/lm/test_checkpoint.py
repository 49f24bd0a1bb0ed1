"""Model files: what was saved comes back, what cannot be trusted is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from taylor_attention.core.storage import read_tensors, write_tensors
from taylor_attention.errors import ArgumentError, StorageError
from taylor_attention.lm import checkpoint
from taylor_attention.lm.checkpoint import fingerprint, load_checkpoint, save_checkpoint, shipped
from taylor_attention.nn import LanguageModel, ModelConfig


def build(seed: int = 0, **options: object) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(ModelConfig(d_model=16, num_layers=1, num_heads=2, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("attention", ["taylor", "softmax"])
def test_comes_back_as_it_was(tmp_path: Path, attention: str):
    model = build(attention=attention, num_kv_heads=1, decay="token")
    save_checkpoint(tmp_path / "m.safetensors", model, metadata={"note": "two words"})
    back, metadata = load_checkpoint(tmp_path / "m.safetensors")
    assert metadata == {"note": "two words"}
    assert back.config == model.config
    assert not back.training
    assert fingerprint(back) == fingerprint(model)
    tokens = torch.randint(256, (1, 9))
    assert torch.equal(back(tokens), model(tokens))


def test_a_file_from_before_an_option_is_read_without_it(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, build())

    def forget(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
        config = json.loads(metadata["config"])
        assert not config.pop("far_gain")
        assert config.pop("far_dim") is config.pop("far_layers") is None
        assert not config.pop("conv")
        metadata["config"] = json.dumps(config)

    rewrite(forget)(path)
    assert load_checkpoint(path)[0].config == build().config


def test_half_precision_halves_the_file(tmp_path: Path):
    model = build()
    save_checkpoint(tmp_path / "whole", model)
    save_checkpoint(tmp_path / "half", model, dtype=torch.float16)
    back, _ = load_checkpoint(tmp_path / "half")
    assert (tmp_path / "half").stat().st_size < 0.65 * (tmp_path / "whole").stat().st_size
    for name, weight in model.state_dict().items():
        loaded = back.state_dict()[name]
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded, weight.half().float()), name


def test_the_fingerprint_sees_every_weight_and_the_configuration():
    marks = {fingerprint(build()), fingerprint(build(seed=1)), fingerprint(build(degree=4))}
    for name in build().state_dict():
        changed = build()
        with torch.no_grad():
            changed.state_dict()[name].view(-1)[-1] += 1
        marks.add(fingerprint(changed))
    assert len(marks) == 3 + len(build().state_dict())
    assert fingerprint(build()) in marks


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-10] ^= 4
    path.write_bytes(bytes(content))


def rewrite(
    change: Callable[[dict[str, Tensor], dict[str, str]], object], kind: str = "model"
) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors, metadata = read_tensors(path, kind="model")
        change(tensors, metadata)
        write_tensors(path, tensors, kind=kind, metadata=metadata)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "not a whole safetensors file"),
        (flip_a_bit, "does not match its digest"),
        (Path.unlink, "cannot be read"),
        (lambda path: path.write_bytes(b"hello"), "not a whole safetensors file"),
        (rewrite(lambda tensors, _: None, kind="session"), "expected kind 'model', got 'session'"),
        (rewrite(lambda tensors, _: tensors.pop("norm.weight")), "got a difference in \\['norm.weight'\\]"),
        (rewrite(lambda tensors, _: tensors["norm.weight"].fill_(torch.nan)), "norm.weight: expected finite numbers"),
        (
            rewrite(lambda tensors, _: tensors.update({"norm.weight": torch.ones(15)})),
            "norm.weight: expected shape \\(16,\\), got \\(15,\\)",
        ),
        (rewrite(lambda _, metadata: metadata.pop("config")), "expected a model configuration, got 'config'"),
        (rewrite(lambda _, metadata: metadata.update(config="{")), "expected a model configuration"),
        (rewrite(lambda _, metadata: metadata.update(config="[1]")), "expected a model configuration"),
        (rewrite(lambda _, metadata: metadata.update(config='{"num_heads": "2"}')), "num_heads: expected an int >= 1"),
        (rewrite(lambda _, metadata: metadata.update(config='{"vocab": 3}')), "got \\['vocab'\\]"),
    ],
)
def test_what_cannot_be_trusted_is_refused(tmp_path: Path, damage: Callable[[Path], object], message: str):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, build())
    damage(path)
    with pytest.raises(StorageError, match=message) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_name_of_the_configuration_is_taken(tmp_path: Path):
    with pytest.raises(ArgumentError, match="metadata: expected names other than 'config'"):
        save_checkpoint(tmp_path / "m", build(), metadata={"config": "mine"})
    assert not list(tmp_path.iterdir())


def test_shipped_weights_are_found_or_named_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ArgumentError, match="name: expected 'taylor' or 'softmax', got 'linear'"):
        shipped("linear")
    monkeypatch.setattr(checkpoint.resources, "files", lambda package: tmp_path)
    with pytest.raises(ArgumentError, match="expected shipped weights, got 'taylor', which this installation"):
        shipped("taylor")
    (tmp_path / "weights").mkdir()
    save_checkpoint(tmp_path / "weights" / "taylor.safetensors", build())
    assert shipped("taylor") == tmp_path / "weights" / "taylor.safetensors"
