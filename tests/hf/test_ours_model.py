"""Our language model in transformers: its forward, its cache, its configuration and what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from our_models import OPTIONS, build, pad_left, text
from taylor_attention import hf
from taylor_attention.core.storage import read_tensors, write_tensors
from taylor_attention.errors import ArgumentError, StorageError
from taylor_attention.nn import LanguageModel, ModelConfig
from tolerances import TOLERANCE, relative_error

FLOAT64 = TOLERANCE[torch.float64]
each_model = pytest.mark.parametrize("name", OPTIONS)


# ---- forward


@each_model
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("cuts", [[1], [4, 5], [2, 3, 4, 5, 6]])
def test_any_split_with_the_cache_is_one_forward(name: str, gradients: bool, cuts: list[int]):
    model = build(name)
    tokens, mask = pad_left([text(1, 9)[0], text(1, 6)[0]])
    expected = model(tokens, attention_mask=mask, use_cache=False)
    assert expected.past_key_values is None
    cache, parts, end = None, [], 0
    with torch.set_grad_enabled(gradients):
        for part in tokens.tensor_split(cuts, dim=1):
            end += part.shape[1]
            given = model(part, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache = given.past_key_values
            parts.append(given.logits)
    got = torch.cat(parts, dim=1)
    assert got.requires_grad == gradients
    assert (len(cache), cache.batch_size, cache.get_seq_length(), cache.get_mask_sizes(1, 0)) == (2, 2, 9, (10, 0))
    visible = mask.bool()
    assert relative_error(got[visible], expected.logits[visible]) < FLOAT64


@each_model
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_nowhere(name: str, side: str):
    model, whole = build(name), text(1, 9)
    tokens, mask = pad_left([whole[0], whole[0, :5]])
    if side == "right":
        tokens, mask = tokens.flip(1), mask.flip(1)
        whole = whole.flip(1)
    short = tokens[1][mask[1].bool()][None]
    got = model(tokens, attention_mask=mask).logits
    assert relative_error(got[0], model(whole).logits[0]) < FLOAT64
    assert relative_error(got[1][mask[1].bool()], model(short).logits[0]) < FLOAT64


@each_model
def test_the_loss_is_that_of_the_next_tokens_and_trains_every_weight(name: str):
    model = build(name).train()
    tokens = text(3, 8)
    labels = tokens.clone()
    labels[1, 5:] = -100
    output = model(tokens, labels=labels)
    assert output.past_key_values is None  # not in training
    logits = model.model(tokens)[:, :-1]
    expected = functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
    assert relative_error(output.loss, expected) < TOLERANCE[torch.float32]
    of_all = model(tokens, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    assert relative_error(of_all, expected * 18 / 100) < TOLERANCE[torch.float32]
    output.loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_logits_can_be_kept_in_part_and_come_as_a_tuple():
    model, tokens = build(), text(2, 7)
    whole = model(tokens).logits
    assert torch.equal(model(tokens, logits_to_keep=2).logits, whole[:, -2:])
    assert torch.equal(model(tokens, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]])
    logits, cache = model(tokens, return_dict=False)
    assert torch.equal(logits, whole)
    assert cache.length == 7


def test_the_dtype_of_weights_is_kept_and_states_are_wider():
    model, tokens = build(dtype=torch.bfloat16), text(1, 12)
    output = model(tokens)
    assert output.logits.dtype == torch.bfloat16
    assert {state.dtype for state in output.past_key_values.states} == {torch.float32}


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "no tokens": ("input_ids: expected at least one token", {"input_ids": torch.zeros(2, 0, dtype=torch.int64)}),
    "no ids": ("input_ids: expected", {"input_ids": None}),
    "ids of floats": ("tokens: expected dtype torch.int64", {"input_ids": torch.zeros(2, 5)}),
    "an id that is none": ("tokens: expected values in 0..255", {"input_ids": torch.full((2, 5), 256)}),
    "embeddings": ("inputs_embeds: expected None", {"inputs_embeds": torch.zeros(2, 5, 16)}),
    "positions": ("position_ids: expected None", {"position_ids": torch.arange(5)[None]}),
    "attentions": ("output_attentions: expected False", {"output_attentions": True}),
    "hidden states": ("output_hidden_states: expected False", {"output_hidden_states": True}),
    "what no model takes": ("hedas: expected no such argument, got 3", {"hedas": 3}),
    "a mask of four axes": ("attention_mask: expected", {"attention_mask": torch.ones(2, 1, 5, 5)}),
    "a mask too short": ("attention_mask: expected shape (2, 5)", {"attention_mask": torch.ones(2, 4)}),
    "a mask of documents": (
        "attention_mask: expected 0 and 1",
        {"attention_mask": torch.tensor([[1, 1, 2, 2, 2]] * 2)},
    ),
    "a cache of keys and values": (
        "past_key_values: expected a LanguageModelCache",
        {"past_key_values": DynamicCache()},
    ),
    "labels of another length": ("labels: expected shape (2, 5)", {"labels": torch.zeros(2, 4, dtype=torch.int64)}),
}


@pytest.mark.parametrize(("message", "given"), REFUSED.values(), ids=REFUSED.keys())
def test_what_it_does_not_take_is_refused_in_one_line(message: str, given: dict[str, Any]):
    with pytest.raises(ArgumentError) as error:
        build()(**{"input_ids": text(2, 5), **given})
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_arguments_that_ask_for_nothing_are_taken():
    model, tokens = build(), text(1, 3)
    output = model(tokens, position_ids=None, output_attentions=False, output_hidden_states=None)
    assert torch.equal(output.logits, model(tokens).logits)


@pytest.mark.parametrize("other", ["sdpa", "taylor", "flash_attention_2", {"": "sdpa"}])
def test_attention_is_chosen_by_the_configuration_alone(other: Any, tmp_path: Path):
    message = "^attn_implementation: expected None, as the configuration says"
    model = build(dtype=torch.float32)
    model.set_attn_implementation("eager")  # what transformers calls a model's own
    with pytest.raises(ArgumentError, match=message):
        model.set_attn_implementation(other)
    model.save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=message):
        hf.TaylorForCausalLM.from_pretrained(tmp_path, attn_implementation=other)


def test_activations_are_not_checkpointed_and_transformers_knows():
    assert not build().supports_gradient_checkpointing  # it refuses to


# ---- the cache


@each_model
def test_a_cache_follows_its_sequences(name: str):
    model, tokens, more = build(name), text(3, 6), text(4, 2)
    chosen = torch.tensor([2, 0, 0, 1], dtype=torch.int32)  # as beam search counts
    expected = model(torch.cat([tokens[chosen], more], dim=1)).logits[:, -2:]
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
        repeated = cache.clone()
        cache.reorder_cache(chosen)
        assert relative_error(model(more, past_key_values=cache).logits, expected) < FLOAT64
        repeated.batch_repeat_interleave(2)
        assert repeated.batch_size == 6
        repeated.batch_select_indices(torch.tensor([4, 0, 1, 3]))
        assert relative_error(model(more, past_key_values=repeated).logits, expected) < FLOAT64


def test_an_empty_cache_has_nothing_to_follow():
    cache = hf.LanguageModelCache()
    cache.reorder_cache(torch.tensor([0, 1]))
    cache.batch_repeat_interleave(3)
    cache.crop(0)
    assert (len(cache), cache.nbytes, cache.batch_size, cache.is_initialized) == (0, 0, -1, False)
    assert (cache.get_seq_length(), cache.get_max_length(), cache.is_croppable, cache.is_compileable) == (
        0,
        -1,
        False,
        False,
    )


def test_a_clone_and_a_copy_are_independent_and_a_reset_forgets():
    model, tokens = build(), text(2, 6)
    with torch.no_grad():
        cache = model(tokens).past_key_values
        expected = model(tokens[:, :2], past_key_values=cache.clone()).logits
        copied = copy.deepcopy(cache)
        model(tokens, past_key_values=cache)
        assert torch.equal(model(tokens[:, :2], past_key_values=copied).logits, expected)
        cache.reset()
        assert (cache.length, cache.nbytes) == (0, 0)
        assert torch.equal(model(tokens, past_key_values=cache).logits, model(tokens).logits)


def test_tokens_are_not_taken_back():
    cache = build()(text(1, 4)).past_key_values
    with pytest.raises(ArgumentError, match="^tokens_to_remove: expected 0"):
        cache.crop(-1)
    with pytest.raises(ArgumentError, match="^past_key_values: expected the cache of another architecture"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)


@each_model
def test_a_saved_cache_goes_on_bit_for_bit(name: str, tmp_path: Path):
    model = build(name, torch.float32)
    tokens, mask = pad_left([text(1, 9)[0], text(1, 6)[0]])
    more = text(2, 3)
    mask_after = torch.cat([mask, torch.ones_like(more)], dim=1)
    with torch.no_grad():
        cache = model(tokens, attention_mask=mask).past_key_values
        cache.save(tmp_path / "cache", model)
        back = hf.LanguageModelCache.load(tmp_path / "cache", model)
        assert (back.length, back.nbytes > 0) == (9, True)
        expected = model(more, attention_mask=mask_after, past_key_values=cache).logits
        assert torch.equal(model(more, attention_mask=mask_after, past_key_values=back).logits, expected)


def spoil(change: dict[str, str]) -> Any:
    def spoilt(path: Path) -> None:
        tensors, metadata = read_tensors(path, kind="model-states")
        kept = {name: value for name, value in {**metadata, **change}.items() if value}
        write_tensors(path, tensors, kind="model-states", metadata=kept)

    return spoilt


SPOILT = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "not a whole safetensors file"),
    "gone": (Path.unlink, "cannot be read"),
    "of another model": (spoil({"model": "another"}), "expected the one that made the states, got another"),
    "without a length": (spoil({"length": ""}), "it lacks 'length'"),
    "without a layer": (spoil({"1": ""}), "it lacks '1'"),
    "shorter than its states": (spoil({"length": "3"}), "length: expected at least the 6 tokens"),
    "of no number": (spoil({"length": "x"}), "no states to go on with"),
}


@pytest.mark.parametrize(("change", "message"), SPOILT.values(), ids=SPOILT.keys())
def test_a_file_that_is_no_cache_is_refused(change: Any, message: str, tmp_path: Path):
    model, path = build(), tmp_path / "cache"
    model(text(1, 6)).past_key_values.save(path, model)
    change(path)
    with pytest.raises(StorageError) as error:
        hf.LanguageModelCache.load(path, model)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path: Path):
    model = build("softmax")
    with pytest.raises(ArgumentError, match="^cache: expected states, after at least one token"):
        hf.LanguageModelCache().save(tmp_path / "cache", model)
    cache = model(text(1, 6)).past_key_values
    with pytest.raises(StorageError, match="no states to go on with: state: expected"):
        cache.save(tmp_path / "cache", build("far"))
    with pytest.raises(ArgumentError, match="^model: expected a TaylorForCausalLM, got LanguageModel"):
        cache.save(tmp_path / "cache", model.model)
    cache.states[1].attention.keys[0, 0, 3] = torch.nan
    with pytest.raises(StorageError, match="no states to go on with: .*keys"):
        cache.save(tmp_path / "cache", model)
    assert list(tmp_path.iterdir()) == []


# ---- configuration and files


def test_the_configuration_speaks_both_languages():
    config = hf.TaylorConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, window=9
    )
    assert config.shape == ModelConfig(d_model=32, num_layers=3, num_heads=4, num_kv_heads=2, window=9)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, 3, 256)


BAD = {
    "unknown": ("configuration: expected names among", {"degre": 2}),
    "a bad value": ("degree: expected", {"degree": 2.5}),
    "sizes that do not fit": ("num_kv_heads: expected a divisor", {"num_heads": 4, "num_kv_heads": 3}),
    "one field twice": ("options: expected one name for each", {"d_model": 8, "hidden_size": 8}),
}


@pytest.mark.parametrize(("message", "options"), BAD.values(), ids=BAD.keys())
def test_a_bad_configuration_is_refused(message: str, options: dict[str, Any]):
    with pytest.raises(ArgumentError) as error:
        hf.TaylorConfig(**options)
    assert str(error.value).startswith(message)


def test_what_is_set_later_is_checked_when_a_model_is_made():
    config = hf.TaylorConfig()
    config.window = -1
    with pytest.raises(ArgumentError, match="^window: expected"):
        hf.TaylorForCausalLM(config)
    with pytest.raises(ArgumentError, match="^config: expected a TaylorConfig"):
        hf.TaylorForCausalLM(ModelConfig())


@each_model
def test_a_saved_model_comes_back_by_its_folder_alone(name: str, tmp_path: Path):
    model, tokens = build(name, torch.float32, pad_token_id=255), text(2, 7)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored.items() >= model.config.shape.to_dict().items()  # all, so that defaults may change
    config = AutoConfig.from_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(back, hf.TaylorForCausalLM)
    assert config.shape == back.config.shape == back.model.config == model.config.shape
    assert config.pad_token_id == 255
    assert torch.equal(back(tokens).logits, model(tokens).logits)


def test_another_degree_can_be_read_into_the_same_weights(tmp_path: Path):
    model, tokens = build("far", torch.float32), text(1, 7)
    model.save_pretrained(tmp_path)
    back = hf.TaylorForCausalLM.from_pretrained(tmp_path, degree=4)
    expected = LanguageModel(ModelConfig(**{**model.config.shape.to_dict(), "degree": 4}))
    expected.load_state_dict(model.model.state_dict())
    assert torch.equal(back(tokens).logits, expected(tokens))


def test_a_file_that_lacks_weights_is_refused(tmp_path: Path):
    build("far", torch.float32).save_pretrained(tmp_path)
    with pytest.raises(StorageError, match="^weights: expected all of the configuration, got none for .*conv"):
        hf.TaylorForCausalLM.from_pretrained(tmp_path, conv=3)


def test_a_new_model_has_the_weights_of_a_language_model():
    model = build(dtype=torch.float32)
    torch.manual_seed(1)
    assert same(model.model, LanguageModel(model.config.shape))


def test_a_language_model_shares_its_weights():
    own = LanguageModel(ModelConfig(d_model=8, num_layers=1, num_heads=2)).eval()
    model = hf.TaylorForCausalLM.from_language_model(own, pad_token_id=3)
    assert model.model is own
    assert (model.config.pad_token_id, model.training, model.device.type) == (3, False, "cpu")
    with pytest.raises(ArgumentError, match="^model: expected a LanguageModel"):
        hf.TaylorForCausalLM.from_language_model(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("mean_resizing", [True, False])
def test_the_vocabulary_can_grow(mean_resizing: bool, tmp_path: Path):
    model, tokens = build(dtype=torch.float32), text(2, 7)
    before = model(tokens).logits
    model.resize_token_embeddings(259, mean_resizing=mean_resizing)
    assert relative_error(model(tokens).logits[..., :256], before) < TOLERANCE[torch.float32]
    model.save_pretrained(tmp_path)
    back = hf.TaylorForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(back(tokens + 5).logits, model(tokens + 5).logits)
    hf.to_checkpoint(model, tmp_path / "checkpoint")
    assert hf.from_checkpoint(tmp_path / "checkpoint").config.vocab_size == 259


def same(one: LanguageModel, other: LanguageModel) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_tensors_here_are_what_the_helpers_say():
    tokens, mask = pad_left([torch.tensor([1, 2, 3]), torch.tensor([4])])
    assert isinstance(tokens, Tensor)
    assert tokens.tolist() == [[1, 2, 3], [255, 255, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
