"""A profile is of all heads of a model, of the texts and queries that were asked for, and of nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from taylor_attention.errors import ArgumentError
from taylor_attention.hf.profiling import profile
from taylor_attention.hf.profiling.observe import Observation, observing
from taylor_attention.hf.profiling.profiler import Profiler
from taylor_attention.hf.profiling.scores import Sample, measure
from tiny_models import LAYERS, causal_model, encoder, token_ids


def pieces_of(count: int, tokens: int) -> list[Tensor]:
    return list(token_ids(count, tokens))


def test_every_head_of_every_layer_is_in_it():
    found = profile(causal_model(), pieces_of(1, 200), queries=8)
    assert list(found.heads) == [(layer, head) for layer in range(LAYERS) for head in range(4)]
    assert list(found.shared) == [(layer, head) for layer in range(LAYERS) for head in range(2)]
    assert (found.tokens, found.sequences, found.queries, found.causal, found.kv_heads) == (200, 1, 8, True, 2)
    assert (found.head_dim, found.value_dim, found.dtype) == (8, 8, torch.float64)
    some = found.heads[0, 0]
    assert list(some.weight.far) == list(some.errors.dropped) == [0, 64, 128]
    assert list(some.errors.heavy) == [64]  # 128 + 128 tokens are more than there are


@pytest.mark.parametrize(("made", "first"), [(causal_model, 100), (encoder, 0)])
def test_queries_are_of_the_later_half_or_of_all_of_an_encoder(made, first):
    """With as many queries as there are, the sums are those of all of them."""
    model, piece, seen = made(max_position_embeddings=200), pieces_of(1, 200)[0], []
    found = profile(model, [piece], queries=200, windows=[8])
    assert found.queries == 200 - first
    with torch.no_grad(), observing(model, seen.append):
        model.base_model(piece[None])
    layer, places = seen[1], torch.arange(first, 200)
    age = places[:, None] - torch.arange(200)
    visible = age >= 0 if first else torch.ones_like(age, dtype=torch.bool)
    sample = Sample(layer.query[:1, places], layer.key[0], layer.value[0], layer.scale, visible, age)
    sums, _ = measure(sample, sinks=4, windows=[0, 8] if first else [0], near=False)
    assert found.heads[1, 0].weight.sinks == pytest.approx(float(sums["sinks"][0]) / len(places))


@pytest.mark.parametrize("ways", [(), ("pure",), ("far",), ("heavy",)])
def test_what_is_not_asked_for_is_left_out(ways):
    model, pieces = causal_model(), pieces_of(1, 200)
    whole, some = (profile(model, pieces, queries=8, **asked).shared[1, 1] for asked in ({}, {"ways": ways}))
    kept = {name: getattr(whole.errors, name) if name in ways else {} for name in ("pure", "far", "heavy")}
    assert some == replace(whole, errors=replace(whole.errors, **kept))
    assert json.dumps(some.to_dict())


def test_texts_are_added_up():
    model, pieces = causal_model(num_hidden_layers=1), pieces_of(2, 80)
    both = profile(model, pieces, queries=80, windows=[8])
    each = [profile(model, [piece], queries=40, windows=[8]) for piece in pieces]
    assert (both.sequences, both.queries) == (2, 80)
    sinks = [one.heads[0, 3].weight.sinks for one in each]
    assert both.heads[0, 3].weight.sinks == pytest.approx(sum(sinks) / 2)
    assert torch.allclose(both.centres[0], (each[0].centres[0] + each[1].centres[0]) / 2)


def test_the_choice_of_queries_is_the_seeds():
    model, pieces = causal_model(num_hidden_layers=1), pieces_of(1, 80)
    one, same, other = (json.dumps(profile(model, pieces, queries=8, seed=seed).to_dict()) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_centres_are_mean_keys():
    query, key, value = torch.randn(3, 2, 40, 8).double().unbind(0)
    made = Profiler([8], 8, None)
    made.see(Observation(0, query, key, value, 1.0, True))
    assert torch.allclose(made.result(40, 1).centres[0], key.mean(1))


def test_a_model_in_training_stays_so():
    model = causal_model().train()
    profile(model, pieces_of(1, 40), queries=4, windows=[8])
    assert model.training


WRONG = {
    "none": ({"pieces": []}, "pieces"),
    "numbers": ({"pieces": [torch.ones(8)]}, "pieces"),
    "of two lengths": ({"pieces": [torch.ones(8).long(), torch.ones(9).long()]}, "pieces"),
    "a batch": ({"pieces": [torch.ones(1, 8).long()]}, "pieces"),
    "one token": ({"pieces": [torch.ones(1).long()]}, "pieces"),
    "no queries": ({"queries": 0}, "queries"),
    "half a query": ({"queries": 0.5}, "queries"),
    "no window": ({"windows": [0]}, "windows"),
    "a word": ({"windows": ["8"]}, "windows"),
    "an unknown way": ({"ways": ["near"]}, "ways"),
    "a way by itself": ({"ways": "far"}, "ways"),
}


@pytest.mark.parametrize(("arguments", "name"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_named(arguments, name):
    with pytest.raises(ArgumentError, match=f"^{name}: expected "):
        profile(causal_model(), **{"pieces": pieces_of(1, 8), **arguments})


def test_a_model_whose_attention_is_never_called_is_refused():
    with pytest.raises(ArgumentError, match="^model: expected attention through the interface of transformers, got no"):
        Profiler([8], 8, None).result(40, 1)
