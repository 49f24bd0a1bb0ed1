"""Models of transformers with our attention: against softmax, against the specification, and what is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from torch import Tensor

from taylor_attention import hf
from taylor_attention.errors import ArgumentError, BackendWarning
from taylor_attention.hf.interface import visible_keys
from taylor_attention.ops.reference import attention_reference, softmax_reference
from tiny_models import CAUSAL, VOCABULARY, causal_model, encoder, make, pad_left, rotary, token_ids
from tolerances import TOLERANCE, relative_error

ALL = hf.HeadSettings(window=64, sinks=2)  # more than any test has tokens
NEAR_AND_FAR = hf.HeadSettings(window=4, sinks=1, degree=2)
SOFTMAX = hf.HeadSettings(window=None)
SETTINGS = {
    "near and far": hf.ModelSettings(NEAR_AND_FAR),
    "far alone": hf.ModelSettings(hf.HeadSettings(window=0, sinks=0, degree=2)),
    "near alone": hf.ModelSettings(hf.HeadSettings(window=5, sinks=2, degree=None)),
    "by head": hf.ModelSettings(
        NEAR_AND_FAR, {(0, 1): SOFTMAX, (1, 0): hf.HeadSettings(window=3, sinks=0, degree=2, reading="fitted")}
    ),
}
FLOAT64 = TOLERANCE[torch.float64] * 100  # through two layers, their norms and the logits
each_architecture = pytest.mark.parametrize("name", CAUSAL)
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


def specified(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options
) -> tuple[Tensor, None]:
    """The attention function as the specification has it, head by head."""
    per_head = query.shape[1] // key.shape[1]
    heads = hf.settings_of(module.config).layer(module.layer_idx, key.shape[1])
    parts = []
    for index, settings in enumerate(heads):
        inputs = query[:, index * per_head : (index + 1) * per_head], key[:, [index]], value[:, [index]]
        common = {"scale": options["scaling"], "causal": module.is_causal, "key_padding_mask": attention_mask}
        if settings.window is None:
            parts.append(softmax_reference(*inputs, **common))
        else:
            near = {"window": settings.window, "sinks": settings.sinks, "reading": settings.reading}
            parts.append(attention_reference(*inputs, degree=settings.degree, **near, **common))
    return torch.cat(parts, 1).transpose(1, 2), None


transformers.AttentionInterface.register("specified", specified)
transformers.AttentionMaskInterface.register("specified", visible_keys)


def logits_of(model, attention: str, tokens: Tensor, **options) -> Tensor:
    model.set_attn_implementation(attention)
    return model(tokens, use_cache=False, **options).logits


@each_architecture
@torch.no_grad()
def test_a_window_over_all_tokens_is_softmax(name):
    model, tokens = causal_model(name), token_ids(2, 20)
    expected = logits_of(model, "sdpa", tokens)
    hf.use(model, ALL)
    assert relative_error(logits_of(model, "taylor", tokens), expected) < FLOAT64
    hf.use(model, SOFTMAX)
    assert relative_error(logits_of(model, "taylor", tokens), expected) < FLOAT64
    hf.use(model, NEAR_AND_FAR)
    assert relative_error(logits_of(model, "taylor", tokens), expected) > 1e-4  # the far tokens matter here


@torch.no_grad()
def test_the_model_s_own_scale_is_taken():
    model, tokens = causal_model("gpt2", scale_attn_by_inverse_layer_idx=True), token_ids(2, 20)
    expected, cache = logits_of(model, "sdpa", tokens), hf.TaylorCache(hf.use(model, ALL))
    found = [model(tokens[:, :9], past_key_values=cache).logits, model(tokens[:, 9:], past_key_values=cache).logits]
    assert relative_error(torch.cat(found, 1), expected) < FLOAT64


@each_architecture
@torch.no_grad()
def test_padding_on_the_left_counts_nowhere(name):
    model = hf.use(causal_model(name), SETTINGS["by head"])
    tokens, mask = pad_left(token_ids(3, 16), [0, 5, 9])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = logits_of(model, "taylor", tokens, attention_mask=mask, position_ids=positions)
    for row, hidden in enumerate([0, 5, 9]):
        alone = logits_of(model, "taylor", tokens[[row], hidden:])
        assert relative_error(found[[row], hidden:], alone) < FLOAT64


@each_architecture
@each_setting
def test_outputs_and_gradients_are_the_specification_s(name, settings):
    model = hf.use(causal_model(name), settings)
    tokens, mask = pad_left(token_ids(2, 14), [0, 3])
    found, expected = {}, {}
    for attention, into in {"taylor": found, "specified": expected}.items():
        model.zero_grad()
        logits = logits_of(model, attention, tokens, attention_mask=mask)[mask.bool()]
        (logits * torch.linspace(-1, 1, VOCABULARY, dtype=logits.dtype)).sum().backward()
        into.update({name: weight.grad.clone() for name, weight in model.named_parameters()}, logits=logits)
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < 1e-9, errors


@pytest.mark.parametrize("settings", [hf.HeadSettings(window=0, sinks=0, degree=4), SOFTMAX], ids=["far", "softmax"])
def test_an_encoder_is_the_specification_s(settings):
    model, (tokens, mask) = encoder(), pad_left(token_ids(3, 12), [0, 2, 7])
    shown = mask.bool()
    states = {}
    hf.use(model, settings)
    for attention in ("taylor", "specified", "sdpa"):
        model.set_attn_implementation(attention)
        states[attention] = model(tokens, attention_mask=mask).last_hidden_state[shown]
    assert relative_error(states["taylor"], states["specified"]) < FLOAT64
    assert (relative_error(states["taylor"], states["sdpa"]) < FLOAT64) == settings.is_softmax


def test_an_encoder_s_heads_may_differ():
    far = hf.HeadSettings(window=0, sinks=0, degree=2)
    model = hf.use(encoder(), hf.ModelSettings(far, {(1, 2): SOFTMAX}))
    tokens = token_ids(2, 9)
    found = model(tokens).last_hidden_state
    model.set_attn_implementation("specified")
    assert relative_error(found, model(tokens).last_hidden_state) < FLOAT64


@torch.no_grad()
def test_the_name_alone_gives_the_default_settings():
    model, tokens = causal_model(), token_ids(1, 12)
    expected = logits_of(model, "sdpa", tokens)
    assert hf.settings_of(model) == hf.ModelSettings()
    assert relative_error(logits_of(model, "taylor", tokens), expected) < FLOAT64  # the default window is longer


@torch.no_grad()
def test_new_settings_hold_at_the_next_call():
    model, tokens = causal_model(), token_ids(1, 30)
    found = [logits_of(hf.use(model, hf.HeadSettings(window)), "taylor", tokens) for window in (2, 8, 2)]
    assert relative_error(found[0], found[1]) > 1e-4
    assert torch.equal(found[0], found[2])


def test_settings_travel_with_the_model(tmp_path):
    model = hf.use(causal_model(), SETTINGS["by head"])
    model.save_pretrained(tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="taylor")
    assert hf.settings_of(again) == SETTINGS["by head"]
    SETTINGS["by head"].save(tmp_path / "settings.json")
    assert hf.settings_of(hf.use(causal_model(), tmp_path / "settings.json")) == SETTINGS["by head"]


def test_checkpointed_gradients_are_the_same():
    model, tokens = hf.use(causal_model(), NEAR_AND_FAR), token_ids(2, 10)
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        model.train()
        if checkpointed:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # later releases have another name
                model.gradient_checkpointing_enable()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert relative_error(gradients[1], gradients[0]) < FLOAT64


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_half_precision(name):
    model, tokens = hf.use(causal_model(name, torch.float32), SETTINGS["by head"]), token_ids(2, 16)
    expected = model(tokens).logits
    with torch.autocast("cpu", torch.bfloat16):  # which leaves queries and keys in float32, beside values in bfloat16
        mixed = model(tokens, use_cache=False).logits
        mixed.float().sum().backward()
        cached = model(tokens, past_key_values=hf.TaylorCache(model)).logits
    assert relative_error(mixed, expected) < 0.05
    assert relative_error(cached, expected) < 0.05
    half = model.to(torch.bfloat16)(tokens, use_cache=False).logits
    assert half.dtype == torch.bfloat16
    assert relative_error(half, expected) < 0.05


@pytest.mark.slow  # the compiler takes its time to start
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")  # a remark of its
@torch.no_grad()
def test_a_compiled_model_computes_the_same():
    model, tokens = hf.use(causal_model(num_hidden_layers=1), NEAR_AND_FAR), token_ids(2, 12)
    compiled, mask = torch.compile(model, backend="eager"), torch.ones_like(tokens)
    expected = model(tokens, use_cache=False).logits
    assert relative_error(compiled(tokens, attention_mask=mask, use_cache=False).logits, expected) < FLOAT64


@torch.no_grad()
@each_setting
def test_another_cache_gives_the_same_and_says_that_it_grows(settings):
    model, tokens = hf.use(causal_model(), settings), token_ids(2, 15)
    expected = logits_of(model, "taylor", tokens)
    first = model(tokens[:, :9], use_cache=True)
    with pytest.warns(BackendWarning, match="pass past_key_values=taylor_attention.hf.TaylorCache"):
        second = model(tokens[:, 9:], past_key_values=first.past_key_values)
    assert relative_error(torch.cat([first.logits, second.logits], 1), expected) < FLOAT64


@torch.no_grad()
def test_packed_sequences_are_refused():
    model, tokens = hf.use(causal_model(), NEAR_AND_FAR), token_ids(1, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with pytest.raises(ArgumentError, match="mask: expected plain causal or bidirectional attention, no packed"):
        model(tokens, position_ids=positions, use_cache=False)
    with pytest.raises(ArgumentError, match="cu_seq_lens_q: expected None, as this attention has no such thing"):
        borders = torch.tensor([0, 3, 8], dtype=torch.int32)
        model(tokens, use_cache=False, cu_seq_lens_q=borders)


REFUSED = {
    "4D mask": ({"attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool)}, "attention_mask: expected a mask [B, T]"),
    "additive mask": ({"attention_mask": torch.zeros(1, 1, 8, 8)}, "attention_mask: expected a mask [B, T]"),
    "short mask": (
        {"attention_mask": torch.ones(1, 5, dtype=torch.long)},
        "past_key_values: expected keys up to the newest",
    ),
    "attentions": ({"output_attentions": True}, "output_attentions: expected None"),
    "soft cap": ({"softcap": 50.0}, "softcap: expected None, as this attention has no such thing, got 50.0"),
    "sink weights": ({"s_aux": torch.zeros(4)}, "s_aux: expected None"),
    "window of the model's": ({"sliding_window": 4}, "sliding_window: expected None"),
    "unknown": ({"relative_bias": torch.zeros(1)}, "relative_bias: expected None"),
}


@torch.no_grad()
@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_would_be_ignored_is_refused(options, message):
    model = hf.use(causal_model(), NEAR_AND_FAR)
    with pytest.raises(ArgumentError) as caught:
        model(token_ids(1, 8), use_cache=False, **options)
    assert str(caught.value).startswith(message)


@torch.no_grad()
def test_a_mask_that_forgets_the_past_is_refused():
    model, tokens = hf.use(causal_model(), NEAR_AND_FAR), token_ids(2, 8)
    cache = hf.TaylorCache(model)
    model(tokens, past_key_values=cache)
    with pytest.raises(
        ArgumentError, match=r"attention_mask: expected shape \(2, 9\), all tokens so far, got \(2, 1\)"
    ):
        model(tokens[:, :1], attention_mask=torch.ones(2, 1, dtype=torch.long), past_key_values=cache)


OTHERS = {
    "sliding windows": (
        "Mistral",
        rotary(sliding_window=4),
        "model: expected full attention in all layers, got a slid",
    ),
    "some sliding": ("Gemma2", rotary(sliding_window=4), "model: expected full attention in all layers, got a slid"),
}


@torch.no_grad()
@pytest.mark.parametrize(("prefix", "arguments", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_other_attention_is_refused(prefix, arguments, message):
    model = hf.use(make(prefix, "ForCausalLM", **arguments), NEAR_AND_FAR)
    with pytest.raises(ArgumentError) as caught:
        model(token_ids(1, 8), use_cache=False)
    assert str(caught.value).startswith(message)


@torch.no_grad()
def test_a_static_cache_is_refused():
    model = hf.use(causal_model(), NEAR_AND_FAR)
    with pytest.raises(ArgumentError, match="past_key_values: expected keys up to the newest query"):
        model.generate(token_ids(1, 4), max_new_tokens=2, cache_implementation="static", disable_compile=True)


@pytest.mark.parametrize(("name", "option"), [("llama", "attention_dropout"), ("gpt2", "attn_pdrop")])
def test_attention_dropout_is_refused_in_training(name, option):
    model, tokens = hf.use(causal_model(name, **{option: 0.1}), NEAR_AND_FAR), token_ids(1, 6)
    model(tokens)
    with pytest.raises(ArgumentError, match=r"attention dropout: expected 0, as weights .*, got 0\.1"):
        model.train()(tokens)


@pytest.mark.parametrize("settings", [ALL, hf.HeadSettings(0, 0, reading="fitted")], ids=["near", "fitted"])
def test_an_encoder_without_an_order_has_no_latest_tokens(settings):
    model = hf.use(encoder(), settings)
    with pytest.raises(
        ArgumentError, match="settings: expected window=0, sinks=0 and reading='taylor', or window=None"
    ):
        model(token_ids(1, 6))


def test_heavy_tokens_need_their_own_cache():
    model, tokens = hf.use(causal_model(), hf.HeadSettings(4, 1, heavy=2)), token_ids(1, 9)
    past = model(tokens, use_cache=True).past_key_values
    with (
        warnings.catch_warnings(),
        pytest.raises(ArgumentError, match="past_key_values: expected a TaylorCache: heavy"),
    ):
        warnings.simplefilter("ignore")
        model(tokens[:, :1], past_key_values=past)


MISUSED = {
    "no model": (lambda: hf.use(torch.nn.Linear(2, 2)), "model: expected a model of transformers, got Linear"),
    "no settings": (
        lambda: hf.use(causal_model(), 5),
        "settings: expected ModelSettings, HeadSettings or a file, got 5",
    ),
    "settings of no model": (lambda: hf.settings_of(3), "model: expected a model of transformers or its configuration"),
    "a head too many": (
        lambda: hf.use(causal_model(), hf.ModelSettings(ALL, {(2, 0): ALL})),
        "heads: expected places in 2 layers of 2 key/value heads, got [(2, 0)]",
    ),
    "degree": (lambda: hf.use(causal_model(), hf.HeadSettings(degree=10**6)), "degree: expected"),
    "encoder and decoder": (
        lambda: hf.use(make("T5", "Model", vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
        "model: expected one stack of attention layers, no encoder with a decoder and no images, got T5Model",
    ),
    "no choice": (
        lambda: hf.use(make("Bloom", "Model", vocab_size=8, hidden_size=8, n_layer=1, n_head=2)),
        "model: expected a model whose attention function can be set, got BloomModel",
    ),
}


@pytest.mark.parametrize(("call", "message"), MISUSED.values(), ids=MISUSED.keys())
def test_misuse_is_one_clear_line(call, message):
    with pytest.raises(ArgumentError) as caught:
        call()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_settings_that_are_refused_change_nothing():
    model = causal_model()
    with pytest.raises(ArgumentError, match="heads: expected places"):
        hf.use(model, hf.ModelSettings(ALL, {(0, 2): ALL}))
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model.config, "taylor_attention")


def test_spoiled_settings_are_named():
    model = hf.use(causal_model(), ALL)
    model.config.taylor_attention = {"window": 3}
    with pytest.raises(ArgumentError, match="settings: expected a mapping with 'default' and 'heads', got"):
        model(token_ids(1, 4))
    model.config.taylor_attention = hf.ModelSettings(ALL, {(7, 0): SOFTMAX}).to_dict()
    with pytest.raises(ArgumentError, match=r"heads: expected places in 2 layers of 2 key/value heads, got \[\(7, 0\)"):
        model(token_ids(1, 4))
