"""What is observed is what the layers attend with, and being observed changes nothing."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

from taylor_attention.errors import ArgumentError
from taylor_attention.hf.profiling.observe import NAME, Observation, observing
from taylor_attention.ops.reference import softmax_reference
from tiny_models import CAUSAL, LAYERS, causal_model, encoder, make, pad_left, rotary, token_ids
from tolerances import TOLERANCE, relative_error

MODELS = {name: (lambda name=name: causal_model(name)) for name in CAUSAL} | {"bert": encoder}
each_model = pytest.mark.parametrize("name", MODELS)


def seen_by(model, tokens: Tensor, **options) -> tuple[list[Observation], Tensor]:
    """What is observed of a forward pass, and its last hidden states."""
    found: list[Observation] = []
    with torch.no_grad(), observing(model, found.append):
        return found, model.base_model(tokens, **options).last_hidden_state


@each_model
def test_a_model_that_is_observed_computes_what_it_did(name):
    model, tokens = MODELS[name](), token_ids(1, 20)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        before = model.base_model(tokens).last_hidden_state
    found, hidden = seen_by(model, tokens)
    assert torch.equal(hidden, before)
    assert [each.layer for each in found] == list(range(LAYERS))
    assert [each.causal for each in found] == [name != "bert"] * LAYERS
    assert model.config._attn_implementation == "sdpa"


OUTPUT = {"llama": "o_proj", "gpt2": "c_proj", "bert": "output.dense"}


@pytest.mark.parametrize("name", OUTPUT)
def test_softmax_of_what_is_observed_is_what_the_layer_goes_on_with(name):
    model, given = MODELS[name](), []
    ends = [module for place, module in model.named_modules() if place.endswith(f"attn.{OUTPUT[name]}")]
    ends += [module for place, module in model.named_modules() if place.endswith(f"attention.{OUTPUT[name]}")]
    for module in ends:
        module.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    found, _ = seen_by(model, token_ids(1, 20))
    assert len(given) == len(found) == LAYERS
    for each, expected in zip(found, given, strict=True):
        y = softmax_reference(each.query[None], each.key[None], each.value[None], causal=each.causal, scale=each.scale)
        assert relative_error(y.transpose(1, 2).flatten(2), expected) < TOLERANCE[torch.float64] * 10


def test_layers_without_a_number_are_numbered_as_they_come():
    model = causal_model()
    for layer in model.model.layers:
        del layer.self_attn.layer_idx
    found, _ = seen_by(model, token_ids(1, 8), use_cache=False)
    assert [each.layer for each in found] == list(range(LAYERS))


def test_afterwards_the_model_is_as_before_even_after_an_error():
    model = causal_model()
    model.set_attn_implementation("eager")
    with pytest.raises(ZeroDivisionError), observing(model, lambda _: 1 // 0):
        model(token_ids(1, 8))
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation(NAME)
    with pytest.raises(ArgumentError, match="model: expected attention inside `observing`, got LlamaAttention"):
        model(token_ids(1, 8))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_mask_that_hides_nothing_more_is_none(name):
    model, tokens = MODELS[name](), token_ids(1, 8)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    found, hidden = seen_by(model, tokens, attention_mask=mask.tril() if name == "llama" else mask)
    assert torch.allclose(hidden, seen_by(model, tokens)[1])
    assert len(found) == LAYERS


SLIDING = {"sliding_window": 4}
REFUSED = {
    "a sliding window": (lambda: make("Mistral", "ForCausalLM", **rotary(**SLIDING)), 1, {}, "without sliding_window"),
    "two sequences": (causal_model, 2, {}, "one sequence at a time, got a batch of 2"),
    "later queries": (lambda: after(causal_model()), 1, {}, "whole sequences, got 8 queries of 12 keys"),
    "padding": (causal_model, 1, {"attention_mask": pad_left(token_ids(1, 8), [3])[1]}, "plain causal attention"),
    "padding of an encoder": (encoder, 1, {"attention_mask": pad_left(token_ids(1, 8), [3])[1]}, "to all keys"),
    "a mask of numbers": (causal_model, 1, {"attention_mask": torch.zeros(1, 1, 8, 8).double()}, "a mask of bools"),
}


def after(model):
    """A model whose calls go on after some tokens."""
    cache = transformers.DynamicCache()
    model(token_ids(1, 4), past_key_values=cache)
    before = model.model.forward
    model.model.forward = lambda *inputs, **options: before(*inputs, past_key_values=cache, **options)
    return model


@pytest.mark.parametrize(("made", "batch", "options", "complaint"), REFUSED.values(), ids=REFUSED.keys())
def test_other_attention_is_refused(made, batch, options, complaint):
    with pytest.raises(ArgumentError, match=f"^model: expected .*{complaint}"):
        seen_by(made(), token_ids(batch, 8), **options)


def test_a_model_without_a_choice_of_attention_functions_is_refused():
    model = make("Bloom", "Model", vocab_size=61, hidden_size=16, n_layer=1, n_head=2)
    with pytest.raises(ArgumentError, match="^model: expected attention through the interface of transformers, got Bl"):
        seen_by(model, token_ids(1, 8))
