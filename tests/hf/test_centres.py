"""Vectors subtracted from keys: nothing to softmax, much to a series, and the same for as long as a cache lives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from taylor_attention import hf
from taylor_attention.core.storage import write_tensors
from taylor_attention.errors import ArgumentError, StorageError
from tiny_models import LAYERS, causal_model, encoder, token_ids
from tolerances import TOLERANCE, relative_error

FLOAT64 = TOLERANCE[torch.float64] * 100  # through two layers, their norms and the logits
NEAR_AND_FAR = hf.HeadSettings(window=3, sinks=1, degree=2)


def centres(heads: int = 2, size: float = 1.0) -> list[Tensor]:
    return [size * torch.randn(heads, 8, dtype=torch.float64) for _ in range(LAYERS)]


def offset_model():
    """A GPT-2 whose keys share a large offset, and what to subtract."""
    model, found = causal_model("gpt2"), centres(4)
    for block, centre in zip(model.transformer.h, found, strict=True):
        block.attn.c_attn.bias.data[32:64] = centre.flatten()
    return model, found


@torch.no_grad()
@pytest.mark.parametrize("settings", [hf.HeadSettings(window=64, sinks=2), hf.HeadSettings(window=None)])
def test_softmax_does_not_see_them(settings):
    model, tokens = causal_model(), token_ids(2, 12)
    expected = model(tokens).logits
    hf.set_key_centres(hf.use(model, settings), centres())
    assert relative_error(model(tokens).logits, expected) < FLOAT64


@torch.no_grad()
def test_a_series_is_nearer_to_softmax_with_them():
    model, found = offset_model()
    tokens = token_ids(2, 24)
    softmax = model(tokens).logits
    hf.use(model, hf.HeadSettings(window=0, sinks=0, degree=4))
    before = relative_error(model(tokens).logits, softmax)
    hf.set_key_centres(model, found)
    assert relative_error(model(tokens).logits, softmax) < before / 2
    hf.set_key_centres(model, None)
    assert relative_error(model(tokens).logits, softmax) == before


@torch.no_grad()
def test_an_encoder_has_them_too():
    model, tokens = hf.use(encoder(), hf.HeadSettings(window=0, sinks=0)), token_ids(2, 8)
    before = model(tokens).last_hidden_state
    hf.set_key_centres(model, centres(4))
    assert relative_error(model(tokens).last_hidden_state, before) > 1e-3


@torch.no_grad()
def test_any_split_with_the_cache_is_one_call_without(tmp_path):
    model, tokens = hf.use(causal_model(), NEAR_AND_FAR), token_ids(2, 14)
    without = model(tokens).logits
    hf.set_key_centres(model, centres())
    expected, cache = model(tokens).logits, hf.TaylorCache(model)
    assert relative_error(expected, without) > 1e-4
    found = [model(tokens[:, :9], past_key_values=cache).logits]
    cache.save(tmp_path / "cache.safetensors")
    cache = hf.TaylorCache.load(tmp_path / "cache.safetensors", model)
    found += [model(tokens[:, [i]], past_key_values=cache).logits for i in range(9, 14)]
    assert relative_error(torch.cat(found, 1), expected) < FLOAT64


@torch.no_grad()
@pytest.mark.parametrize("others", [None, "different"])
@pytest.mark.parametrize("saved", [False, True])
def test_a_cache_does_not_go_on_with_others(others, saved, tmp_path):
    model, tokens = hf.use(causal_model(), NEAR_AND_FAR), token_ids(2, 6)
    first = centres()
    hf.set_key_centres(model, first)
    cache = hf.TaylorCache(model)
    model(tokens, past_key_values=cache)
    if saved:
        cache.save(tmp_path / "cache.safetensors")
        cache = hf.TaylorCache.load(tmp_path / "cache.safetensors", model)
    hf.set_key_centres(model, first)
    model(tokens, past_key_values=cache)  # equal ones
    hf.set_key_centres(model, others and centres())
    with pytest.raises(ArgumentError, match="past_key_values: expected a cache begun with the model's key centres"):
        model(tokens, past_key_values=cache)


def test_they_live_in_a_file(tmp_path):
    model, found, path = hf.use(causal_model(), NEAR_AND_FAR), centres(), tmp_path / "centres.safetensors"
    hf.save_key_centres(path, found)
    assert all(torch.equal(one, other) for one, other in zip(hf.load_key_centres(path), found, strict=True))
    tokens = token_ids(1, 9)
    hf.set_key_centres(model, found)
    expected = model(tokens).logits
    hf.set_key_centres(model, None)
    hf.set_key_centres(model, path)
    assert torch.equal(model(tokens).logits, expected)
    assert not [name for name in model.state_dict() if "centre" in name]


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "centres.safetensors"
    write_tensors(path, {"7": torch.zeros(2, 8)}, kind="key-centres", metadata={})
    with pytest.raises(StorageError, match=r"expected key_centre of each layer, got \['7'\]"):
        hf.load_key_centres(path)
    with pytest.raises(StorageError, match="cannot be read"):
        hf.set_key_centres(causal_model(), tmp_path / "none")


MISUSED = {
    "one": (lambda model: hf.set_key_centres(model, torch.zeros(2, 8)), "centres: expected a tensor for each of 2"),
    "too few": (lambda model: hf.set_key_centres(model, centres()[:1]), "centres: expected a tensor for each of 2"),
    "shape": (
        lambda model: hf.set_key_centres(model, centres(3)),
        "centres[0]: expected a floating-point tensor [2, 8]",
    ),
    "integers": (
        lambda model: hf.set_key_centres(model, [torch.zeros(2, 8, dtype=torch.int64)] * 2),
        "centres[0]: expected a floating-point tensor [2, 8], got Tensor of shape (2, 8), torch.int64",
    ),
    "NaN": (
        lambda model: hf.set_key_centres(model, [torch.zeros(2, 8), torch.full((2, 8), torch.nan)]),
        "centres[1]: expected finite numbers, got NaN or infinity",
    ),
    "no model": (lambda _: hf.set_key_centres(3, None), "model: expected a model of transformers or its configuration"),
    "a configuration": (
        lambda model: hf.set_key_centres(model.config, None),
        "model: expected a model of transformers",
    ),
    "nothing to save": (lambda _: hf.save_key_centres("x", []), "centres: expected a tensor for each layer, got []"),
    "unequal": (
        lambda _: hf.save_key_centres("x", [torch.zeros(2, 8), torch.zeros(3, 8)]),
        "centres[1]: expected a floating-point tensor [2, 8]",
    ),
    "flat": (lambda _: hf.save_key_centres("x", [torch.zeros(8)]), "centres[0]: expected a floating-point tensor [8]"),
}


@pytest.mark.parametrize(("call", "message"), MISUSED.values(), ids=MISUSED.keys())
def test_misuse_is_one_clear_line(call, message):
    with pytest.raises(ArgumentError) as caught:
        call(causal_model())
    assert str(caught.value).startswith(message)
