"""The cache of fixed size: the law of the state in whole models, generation, and what it refuses."""

from __future__ import annotations

import copy
import json
import tracemalloc
import warnings

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from taylor_attention import hf
from taylor_attention.core.storage import read_tensors, write_tensors
from taylor_attention.errors import ArgumentError, StorageError
from tiny_models import CAUSAL, LAYERS, MORE, causal_model, encoder, make, pad_left, plain_model, rotary, token_ids
from tolerances import TOLERANCE, relative_error

SOFTMAX = hf.HeadSettings(window=None)
SMALL = hf.HeadSettings(window=4, sinks=1, degree=2)
SETTINGS = {
    "near and far": hf.ModelSettings(SMALL),
    "heavy": hf.ModelSettings(hf.HeadSettings(window=4, sinks=1, heavy=3, degree=2)),
    "fitted": hf.ModelSettings(hf.HeadSettings(window=3, sinks=0, degree=4, reading="fitted")),
    "far alone": hf.ModelSettings(hf.HeadSettings(window=0, sinks=0, degree=2)),
    "near alone": hf.ModelSettings(hf.HeadSettings(window=5, sinks=2, degree=None)),
    "softmax": hf.ModelSettings(SOFTMAX),
    "by head": hf.ModelSettings(SMALL, {(0, 1): SOFTMAX, (1, 0): hf.HeadSettings(3, 0, heavy=1, degree=None)}),
}
FLOAT64 = TOLERANCE[torch.float64] * 100  # through two layers, their norms and the logits
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
each_architecture = pytest.mark.parametrize("name", CAUSAL)


def by_head(name: str = "llama", **options):
    return hf.use(causal_model(name, **options), SETTINGS["by head"])


def read(model, tokens: Tensor, cuts: list[int], cache: hf.TaylorCache, **options) -> Tensor:
    """The logits of tokens that come in pieces; a mask of all of them is cut too."""
    found, mask = [], options.pop("attention_mask", None)
    for start, end in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        masked = {} if mask is None else {"attention_mask": mask[:, :end]}
        found.append(model(tokens[:, start:end], past_key_values=cache, **masked, **options).logits)
    return torch.cat(found, 1)


CUTS = {"chunks": [5, 6, 11], "token by token": list(range(1, 16)), "prefill and steps": [9, *range(10, 16)]}


@torch.no_grad()
@each_setting
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_any_split_with_the_cache_is_one_call_without(settings, cuts):
    model, tokens = hf.use(causal_model(), settings), token_ids(2, 16)
    expected = model(tokens, use_cache=False).logits
    assert relative_error(read(model, tokens, cuts, hf.TaylorCache(model)), expected) < FLOAT64


@torch.no_grad()
@each_architecture
def test_in_every_architecture(name):
    model, tokens = by_head(name), token_ids(2, 16)
    expected = model(tokens, use_cache=False).logits
    assert relative_error(read(model, tokens, [7, 8, 9, 15], hf.TaylorCache(model)), expected) < FLOAT64


@pytest.mark.slow  # each imports a module of its own
@torch.no_grad()
@pytest.mark.parametrize("prefix", MORE)
def test_in_more_architectures(prefix):
    model, tokens = plain_model(prefix), token_ids(2, 12)
    softmax = model(tokens, use_cache=False).logits
    hf.use(model, hf.HeadSettings(window=64, sinks=2))
    assert relative_error(model(tokens, use_cache=False).logits, softmax) < 1e-6  # some compute scales in float32
    hf.use(model, SMALL)
    expected = model(tokens, use_cache=False).logits
    assert relative_error(expected, softmax) > 1e-3  # the far tokens matter here
    assert relative_error(read(model, tokens, [7, 8, 9], hf.TaylorCache(model)), expected) < 1e-6


@torch.no_grad()
@each_setting
def test_padding_stays_hidden(settings):
    model = hf.use(causal_model(), settings)
    tokens, mask = pad_left(token_ids(3, 16), [0, 4, 9])
    cache, hidden = hf.TaylorCache(model), [0, 4, 9]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = []
    for start, end in [(0, 10), (10, 11), (11, 12), (12, 16)]:
        options = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        found.append(model(tokens[:, start:end], past_key_values=cache, **options).logits)
    logits = torch.cat(found, 1)
    for row, first in enumerate(hidden):
        alone = model(tokens[[row], first:], use_cache=False).logits
        assert relative_error(logits[[row], first:], alone) < FLOAT64


def test_gradients_flow_through_the_cache():
    model, tokens = by_head(), token_ids(2, 12)
    found = []
    for cuts in ([], [5, 6]):
        model.zero_grad()
        read(model, tokens, cuts, hf.TaylorCache(model)).square().sum().backward()
        found.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    errors = {name: relative_error(found[1][name], found[0][name]) for name in found[0]}
    assert max(errors.values()) < 1e-9, errors


GENERATION = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION.keys())
def test_generation_is_that_of_calls_without_a_cache(options):
    model = by_head()
    tokens, mask = pad_left(token_ids(2, 9), [0, 3])
    found = []
    for cache in ({"past_key_values": hf.TaylorCache(model)}, {"use_cache": False}):
        torch.manual_seed(1)
        more = {"max_new_tokens": 12, "do_sample": False} | options | cache
        found.append(model.generate(tokens, attention_mask=mask, **more))
    assert torch.equal(*found)


@each_architecture
def test_every_architecture_generates(name):
    model, tokens = by_head(name), token_ids(2, 7)
    expected = model.generate(tokens, max_new_tokens=12, do_sample=False, use_cache=False)
    found = model.generate(tokens, max_new_tokens=12, do_sample=False, past_key_values=hf.TaylorCache(model))
    assert torch.equal(found, expected)


def test_prefill_in_chunks():
    model, tokens = by_head(), token_ids(1, 23)
    expected = model.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=False)
    options = {"max_new_tokens": 6, "do_sample": False, "prefill_chunk_size": 5}
    assert torch.equal(model.generate(tokens, past_key_values=hf.TaylorCache(model), **options), expected)


def test_a_conversation_goes_on():
    model, tokens, more = by_head(), token_ids(1, 8), token_ids(1, 5)
    cache = hf.TaylorCache(model)
    first = model.generate(tokens, max_new_tokens=6, do_sample=False, past_key_values=cache)
    assert cache.get_seq_length() == first.shape[1] - 1  # the last one has not been read
    both = torch.cat([first, more], 1)
    found = model.generate(both, max_new_tokens=6, do_sample=False, past_key_values=cache)
    assert torch.equal(found, model.generate(both, max_new_tokens=6, do_sample=False, use_cache=False))


@torch.no_grad()
def test_a_fork_goes_its_own_way():
    model, tokens = by_head(), token_ids(2, 16)
    cache = hf.TaylorCache(model)
    model(tokens[:, :9], past_key_values=cache)
    fork = cache.clone()
    one = model(tokens[:, 9:10], past_key_values=cache).logits
    model(tokens[:, 10:], past_key_values=cache)
    assert torch.equal(model(tokens[:, 9:10], past_key_values=fork).logits, one)
    assert copy.deepcopy(fork).get_seq_length() == 10


@torch.no_grad()
def test_sequences_are_chosen_and_repeated():
    model, tokens = by_head(), token_ids(3, 12)
    order = torch.tensor([2, 0, 0, 1])
    expected = model(tokens[order], use_cache=False).logits[:, 8:]
    first = {"reorder_cache": [order], "batch_select_indices": [order]}
    for method, arguments in first.items():
        cache = hf.TaylorCache(model)
        model(tokens[:, :8], past_key_values=cache)
        getattr(cache, method)(*arguments)
        assert cache.batch_size == 4
        assert relative_error(model(tokens[order, 8:], past_key_values=cache).logits, expected) < FLOAT64
    cache = hf.TaylorCache(model)
    assert cache.batch_size == -1
    cache.batch_repeat_interleave(2)  # nothing yet
    model(tokens[:, :8], past_key_values=cache)
    cache.batch_select_indices(torch.tensor([True, False, True]))
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([0, 0, 2, 2])
    expected = model(tokens[rows], use_cache=False).logits[:, 8:]
    assert relative_error(model(tokens[rows, 8:], past_key_values=cache).logits, expected) < FLOAT64


@torch.no_grad()
@pytest.mark.parametrize("forget", [hf.TaylorCache.reset, lambda cache: cache.crop(-7)], ids=["reset", "crop"])
def test_an_emptied_cache_is_a_new_one(forget):
    model, tokens = by_head(), token_ids(2, 7)
    cache = hf.TaylorCache(model)
    expected = model(tokens, past_key_values=cache).logits
    cache.crop(0)
    assert cache.get_seq_length() == 7
    forget(cache)
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    assert torch.equal(model(tokens, past_key_values=cache).logits, expected)


@torch.no_grad()
def test_bytes_are_those_of_the_settings_and_do_not_grow():
    head = hf.HeadSettings(window=8, sinks=2, heavy=2, degree=2)
    model, tokens = hf.use(causal_model(dtype=torch.float32), head), token_ids(1, 40)
    cache, sizes = hf.TaylorCache(model), set()
    for start in range(40):
        model(tokens[:, start : start + 1], past_key_values=cache)
        sizes.add(cache.nbytes)
    assert sizes == {hf.settings_of(model).nbytes(40, LAYERS, 2, 8)}


@torch.no_grad()
def test_memory_is_constant_over_2000_tokens():
    model = hf.use(causal_model("gpt2", torch.float32, n_layer=1, n_positions=2000), SMALL)
    cache, token = hf.TaylorCache(model), token_ids(1, 1)
    sizes = set()
    for count in range(2000):
        if count == 1000:
            tracemalloc.start()
            start = tracemalloc.get_traced_memory()[0]
        token = model(token, past_key_values=cache).logits.argmax(-1)
        sizes.add(cache.nbytes)
    grown = tracemalloc.get_traced_memory()[0] - start
    tracemalloc.stop()
    assert cache.get_seq_length() == 2000
    assert len(sizes) == 1
    assert grown < 1000 * 32  # Python's bytes: a number kept per token would be more


@torch.no_grad()
def test_half_precision_keeps_states_in_float32():
    model = by_head(dtype=torch.bfloat16)
    cache, tokens = hf.TaylorCache(model), token_ids(1, 12)
    found = read(model, tokens, [8, 9], cache)
    kinds = {memory.layout["dtype"] for layer in cache.layers for memory in layer.memories}
    assert kinds == {torch.float32, torch.bfloat16}  # states, and keys and values
    assert relative_error(found, model(tokens, use_cache=False).logits) < 0.03


@torch.no_grad()
@each_setting
def test_a_saved_cache_goes_on(settings, tmp_path):
    model, tokens = hf.use(causal_model(), settings), token_ids(2, 16)
    cache = hf.TaylorCache(model)
    read(model, tokens[:, :11], [9, 10], cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = hf.TaylorCache.load(tmp_path / "cache.safetensors", model)
    assert loaded.get_seq_length() == 11
    assert torch.equal(read(model, tokens[:, 11:], [1], loaded), read(model, tokens[:, 11:], [1], cache))


def test_an_empty_cache_is_saved_too(tmp_path):
    model = by_head()
    hf.TaylorCache(model).save(tmp_path / "cache.safetensors")
    assert hf.TaylorCache.load(tmp_path / "cache.safetensors", model).get_seq_length() == 0


OTHER_MODELS = {
    "settings": (lambda: hf.use(causal_model(), SMALL), "settings: expected those of this model, got others"),
    "layers": (lambda: by_head(num_hidden_layers=3), "layers: expected 3, got 2"),
    "heads": (lambda: by_head("qwen2", num_key_value_heads=4), "got '0.2'|kv_heads: expected"),
    "width": (lambda: by_head(head_dim=4), "head_dim: expected 4, got 8"),
}


@torch.no_grad()
@pytest.mark.parametrize(("other", "message"), OTHER_MODELS.values(), ids=OTHER_MODELS.keys())
def test_another_model_s_cache_is_refused(other, message, tmp_path):
    model, path = by_head(), tmp_path / "cache.safetensors"
    cache = hf.TaylorCache(model)
    model(token_ids(1, 5), past_key_values=cache)
    cache.save(path)
    with pytest.raises(StorageError, match=r"cache\.safetensors: expected the cache of such a model, got .*" + message):
        hf.TaylorCache.load(path, other())


def test_a_file_of_something_else_is_refused(tmp_path):
    model, path = by_head(), tmp_path / "cache.safetensors"
    with pytest.raises(StorageError, match="cannot be read"):
        hf.TaylorCache.load(path, model)
    path.write_bytes(b"{}")
    with pytest.raises(StorageError, match="not a whole safetensors file"):
        hf.TaylorCache.load(path, model)


@torch.no_grad()
@pytest.mark.parametrize("saved", [False, True])
def test_the_past_stays_as_it_was(saved, tmp_path):
    model, (tokens, mask) = by_head(), pad_left(token_ids(2, 6), [0, 2])
    cache = hf.TaylorCache(model)
    model(tokens[:, :5], attention_mask=mask[:, :5], past_key_values=cache)
    if saved:
        cache.save(tmp_path / "cache.safetensors")
        cache = hf.TaylorCache.load(tmp_path / "cache.safetensors", model)
    fork, told = cache.clone(), r"attention_mask: expected \[5, 3\] visible tokens in the past, which stays as it was"
    with pytest.raises(ArgumentError, match=told + r", got \[5, 5\]"):
        model(tokens[:, 5:], past_key_values=cache)
    with pytest.raises(ArgumentError, match=told + r", got \[4, 3\]"):
        model(tokens[:, 5:], attention_mask=mask * (torch.arange(6) != 1), past_key_values=cache)
    found = model(tokens[:, 5:], attention_mask=mask, past_key_values=cache).logits
    cache.batch_select_indices(torch.tensor([0]))
    model(tokens[:1, 5:], past_key_values=cache)  # nothing of this one is hidden
    assert torch.equal(found, model(tokens[:, 5:], attention_mask=mask, past_key_values=fork).logits)


def one_more(about, tensors):
    about["seen"][1] += 1


def all_more(about, tensors):
    about["seen"] = [6, 6]


def fewer(about, tensors):
    about["seen"] = [3, 3]
    for place, text in about["memories"].items():  # softmax heads alone know how many there were
        if text == {"type": "key-value-cache"}:
            for name in ("keys", "values"):
                tensors[f"{place}.{name}"] = tensors[f"{place}.{name}"][:, :, :3].contiguous()
            tensors[f"{place}.attended"] = tensors[f"{place}.attended"][:, :3].contiguous()
            tensors[f"{place}.tokens"] -= 2


def no_count(about, tensors):
    about["seen"] = ["5", "5"]


def a_sequence_less(about, tensors):
    for name in [name for name in tensors if name.startswith("1.")]:
        tensors[name] = tensors[name][:1].contiguous()


def nothing_of_a_layer(about, tensors):
    del about["memories"]["1.0"]


def no_settings(about, tensors):
    about["settings"] = []


DAMAGES = {
    one_more: r"seen: expected the same number of tokens in all layers, got \[5, 6\]",
    all_more: r"seen: expected as many as the keys of softmax heads, \[5\], got \[6\]",
    fewer: r"seen: expected at least the 5 tokens of the states, got \[3\]",
    no_count: "seen: expected an int >= 0, got '5'",
    a_sequence_less: r"memories: expected as many sequences in all layers, got \[1, 2\]",
    nothing_of_a_layer: "'1.0'",
    no_settings: "settings: expected a mapping with 'default' and 'heads'",
}


@torch.no_grad()
@pytest.mark.parametrize(("damage", "message"), DAMAGES.items(), ids=[damage.__name__ for damage in DAMAGES])
def test_a_file_that_contradicts_itself_is_refused(damage, message, tmp_path):
    model, path = by_head(), tmp_path / "cache.safetensors"
    cache = hf.TaylorCache(model)
    model(token_ids(2, 5), past_key_values=cache)
    cache.save(path)
    tensors, metadata = read_tensors(path, kind="transformers-cache")
    about = {name: json.loads(text) for name, text in metadata.items()}
    damage(about, tensors)
    write_tensors(path, tensors, kind="transformers-cache", metadata={k: json.dumps(v) for k, v in about.items()})
    with pytest.raises(StorageError, match="expected the cache of such a model, got .*" + message):
        hf.TaylorCache.load(path, model)


@torch.no_grad()
def test_a_part_is_not_forgotten():
    model = by_head()
    cache = hf.TaylorCache(model)
    model(token_ids(1, 5), past_key_values=cache)
    assert not cache.is_croppable
    with pytest.raises(ArgumentError, match="crop: expected 0 or -5: states cannot forget a part, got -2"):
        cache.crop(-2)
    with pytest.raises(ArgumentError, match="crop: expected 0 or -5: states cannot forget a part, got 5"):
        cache.crop(5)


def test_assisted_decoding_is_refused():
    model, helper = by_head(), causal_model()
    with pytest.raises(
        ArgumentError, match="past_key_values: expected a cache that can take back tokens, for assisted"
    ):
        model.generate(token_ids(1, 5), max_new_tokens=3, assistant_model=helper, past_key_values=hf.TaylorCache(model))


@torch.no_grad()
def test_assisted_decoding_goes_with_a_cache_of_all_keys():
    model, helper = hf.use(causal_model(), SMALL), causal_model()
    tokens = token_ids(1, 8)
    expected = model.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=False)
    with warnings.catch_warnings(action="ignore"):
        found = model.generate(tokens, max_new_tokens=6, do_sample=False, assistant_model=helper)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_a_model_that_attends_otherwise_is_refused():
    model, tokens = by_head(), token_ids(1, 5)
    cache = hf.TaylorCache(model)
    model(tokens, past_key_values=cache)
    fork = copy.deepcopy(cache)
    model.set_attn_implementation("sdpa")
    for each in (cache, fork):
        with pytest.raises(
            ArgumentError, match='past_key_values: expected None in a model with attn_implementation="sd'
        ):
            model(tokens[:, :1], past_key_values=each)


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_that_changes_its_keys_is_found_out(layers, monkeypatch):
    model, tokens = hf.use(causal_model(num_hidden_layers=layers), SMALL), token_ids(1, 5)
    cache, update = hf.TaylorCache(model), hf.TaylorCache.update
    monkeypatch.setattr(cache, "update", lambda *given: tuple(x.clone() for x in update(cache, *given)))
    expected = model(tokens, use_cache=False).logits
    assert torch.equal(model(tokens, past_key_values=cache).logits, expected)  # right so far: there is no past
    with pytest.raises(
        ArgumentError, match="past_key_values: expected a model that passes the keys of its cache on as"
    ):
        model(tokens[:, :1], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"output_attentions": True}, {"softcap": 3.0}], ids=["weights", "soft cap"])
def test_a_call_that_is_refused_leaves_the_cache_as_it_was(options):
    model, tokens = by_head(), token_ids(1, 9)
    cache = hf.TaylorCache(model)
    model(tokens[:, :5], past_key_values=cache)
    with pytest.raises(ArgumentError):
        model(tokens[:, 5:], past_key_values=cache, **options)
    expected = model(tokens, use_cache=False).logits[:, 5:]
    assert relative_error(model(tokens[:, 5:], past_key_values=cache).logits, expected) < FLOAT64


@torch.no_grad()
def test_a_layer_that_failed_halfway_is_found_out(monkeypatch):
    model, tokens = hf.use(causal_model(num_hidden_layers=1), SMALL), token_ids(1, 5)
    cache = hf.TaylorCache(model)
    model(tokens, past_key_values=cache)
    monkeypatch.setattr(cache.layers[0].plan, "_join", lambda parts: 1 / 0)  # when all heads have kept the token
    with pytest.raises(ZeroDivisionError):
        model(tokens[:, :1], past_key_values=cache)
    monkeypatch.undo()
    with pytest.raises(ArgumentError, match="got layers that attended to 5 tokens"):
        model(tokens[:, :1], past_key_values=cache)


@torch.no_grad()
def test_an_interrupted_call_is_found_out():
    model, tokens = by_head(), token_ids(1, 5)
    cache = hf.TaylorCache(model)
    model(tokens, past_key_values=cache)

    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens[:, :1], past_key_values=cache)
    hook.remove()
    with pytest.raises(
        ArgumentError, match=r"last call ended well \(reset\(\) starts anew\), got layers that attended"
    ):
        model(tokens[:, :1], past_key_values=cache)
    with pytest.raises(ArgumentError, match="past_key_values: expected"):
        cache.save("nowhere")
    cache.reset()
    model(tokens, past_key_values=cache)


@torch.no_grad()
def test_keys_are_attended_to_once():
    model = by_head()
    cache = hf.TaylorCache(model)
    key = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    tagged, _ = cache.update(key, key, 0)
    options = {"scaling": 1.0, "attention_mask": None}
    query = torch.randn(1, 4, 3, 8, dtype=torch.float64)
    attend = hf.interface.attend
    attend(model.model.layers[0].self_attn, query, tagged, key, **options)
    with pytest.raises(ArgumentError, match="key: expected keys that are attended to once, got those of layer 0 again"):
        attend(model.model.layers[0].self_attn, query, tagged, key, **options)
    cache.layers[0].update(key, key)
    with pytest.raises(ArgumentError, match="update: expected tokens to be attended to before others come"):
        cache.layers[0].update(key, key)


MISUSED = {
    "no model": (lambda: hf.TaylorCache(3), "model: expected a model of transformers or its configuration, got int"),
    "softmax": (lambda: hf.TaylorCache(causal_model()), 'model: expected attn_implementation="taylor" (see taylor_'),
    "sliding": (
        lambda: hf.TaylorCache(hf.use(make("Mistral", "ForCausalLM", **rotary(sliding_window=4)), SMALL)),
        "model: expected full attention in all layers, got layers that need DynamicSlidingWindowLayer",
    ),
    "offloading": (
        lambda: hf.TaylorCache(by_head()).layers[0].offload(),
        "offloading: expected False with a TaylorCache, got True",
    ),
    "no path": (lambda: hf.TaylorCache(by_head()).save(7), "path: expected the name of a file, got 7"),
    "loading for no model": (lambda: hf.TaylorCache.load("x", 7), "model: expected a model of transformers or its"),
}


@pytest.mark.parametrize(("call", "message"), MISUSED.values(), ids=MISUSED.keys())
def test_misuse_is_one_clear_line(call, message):
    with pytest.raises(ArgumentError) as caught:
        call()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_an_encoder_keeps_nothing():
    model = hf.use(encoder(), hf.HeadSettings(window=0, sinks=0))
    layer = model.encoder.layer[0].attention.self
    key = torch.randn(1, 4, 3, 8, dtype=torch.float64)
    tagged, _ = hf.TaylorCache(model).update(key, key, 0)
    with pytest.raises(ArgumentError, match="past_key_values: expected None in a layer that is not causal"):
        hf.interface.attend(layer, key, tagged, key, None)


@torch.no_grad()
def test_what_transformers_makes_itself_is_no_cache_of_ours():
    model = by_head()
    assert isinstance(model(token_ids(1, 3), use_cache=True).past_key_values, DynamicCache)
