"""Misuse: one clear error that names the argument, and nothing has changed."""

import math
import re
from dataclasses import replace

import pytest
import torch

import taylor_attention as ta
from problems import decode, differences, make
from taylor_attention.errors import ArgumentError, TaylorAttentionError
from taylor_attention.ops import decode as decode_module
from tolerances import TOLERANCE, relative_error

X = torch.randn(2, 2, 6, 4, generator=torch.Generator().manual_seed(0))
ONE = X[:, :, :1]
PACKED = X[:1]
MASK = torch.ones(2, 6, dtype=torch.bool)
GATES = torch.zeros(2, 2, 6)


def borders(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def call(query=X, key=X, value=X, degree=2, **options):
    return lambda: ta.attention(query, key, value, degree=degree, **options)


def state_of(**changes):
    sizes = {"batch_size": 2, "kv_heads": 2, "head_dim": 4, "value_dim": 4, "degree": 2}
    return ta.State.zeros(**{**sizes, **changes})


MISUSE = {
    # tensors
    "query: a tensor": call(query=[[1.0]]),
    "query: a tensor [B, H, T, d], got shape": call(query=X[0]),
    "query: a floating-point tensor of 16, 32 or 64 bits, got torch.int64": call(query=X.long()),
    "query: a floating-point tensor of 16, 32 or 64 bits, got torch.complex64": call(query=X.to(torch.complex64)),
    "query: head size 4 as the key, got 3": call(query=X[..., :3]),
    "query: a multiple of the 2 key/value heads, got 3": call(query=X[:, :1].expand(2, 3, 6, 4)),
    "query: a multiple of the 2 key/value heads, got 0": call(query=X[:, :0]),
    "query: 6 tokens as the key (causal or packed), got 5": call(query=X[:, :, :5]),
    "query: 6 tokens as the key (causal or packed), got 2": call(
        query=PACKED[:, :, :2], key=PACKED, value=PACKED, causal=False, cu_seqlens=borders(0, 6)
    ),
    "key: a tensor [B, H, T, d], got": call(key=None),
    "key: a tensor [B, H, T, d], got shape (2, 2, 6, 4, 1)": call(key=X[..., None]),
    "key: the query's dtype torch.float32, got torch.float64": call(key=X.double()),
    "key: the query's device cpu, got meta": call(key=X.to("meta")),
    "key: batch 2 as the query, got 1": call(key=X[:1]),
    "key: a head size >= 1, got 0": call(query=X[..., :0], key=X[..., :0]),
    "value: a tensor [B, H, T, d], got shape": call(value=X[0, 0]),
    "value: the query's dtype torch.float32, got torch.bfloat16": call(value=X.bfloat16()),
    "value: batch 2 as the query, got 0": call(value=X[:0]),
    "value: 2 heads as the key, got 1": call(value=X[:, :1]),
    "value: 6 tokens as the key, got 5": call(value=X[:, :, :5]),
    # choices
    "degree: an int >= 0, got -1": call(degree=-1),
    "degree: an int >= 0, got 2.5": call(degree=2.5),
    "degree: an int >= 0, got True": call(degree=True),
    "degree: an int >= 0 (None: only with a window or sinks), got None": call(degree=None),
    "degree: a degree from 0 to 1 (all that series 'short' has), got 2": call(
        series=ta.series.polynomial([1, 1], name="short")
    ),
    "degree: a degree from 3 to 3": call(series=ta.series.fitted_gaussian(0, 1, 3)),
    "causal: a bool, got 1": call(causal=1),
    "scale: a finite number or None, got nan": call(scale=math.nan),
    "scale: a finite number or None, got inf": call(scale=math.inf),
    "scale: a finite number or None, got True": call(scale=True),
    "scale: a finite number or None, got '1/8'": call(scale="1/8"),
    "series: a Series or None, got 'exp'": call(series="exp"),
    "series: a Series or None, got (1.0, 1.0, 0.5)": call(series=(1.0, 1.0, 0.5)),
    "backend: one of ('auto', 'cpu', 'torch'), got 'cuda'": call(backend="cuda"),
    "backend: one of ('auto', 'cpu', 'torch'), got None": call(backend=None),
    "chunk_size: an int >= 1 or None, got 0": call(chunk_size=0),
    "chunk_size: an int >= 1 or None, got 64.0": call(chunk_size=64.0),
    # masks, gates, borders
    "key_padding_mask: a tensor [B, Tk], got": call(key_padding_mask=[True]),
    "key_padding_mask: a tensor [B, Tk], got shape (2, 1, 6)": call(key_padding_mask=MASK[:, None]),
    "key_padding_mask: dtype torch.bool, got torch.float32": call(key_padding_mask=MASK.float()),
    "key_padding_mask: shape (2, 6), got (2, 5)": call(key_padding_mask=MASK[:, :5]),
    "key_padding_mask: the query's device cpu, got meta": call(key_padding_mask=MASK.to("meta")),
    "log_decay: a tensor [B, Hkv, T], got shape (2, 6)": call(log_decay=GATES[:, 0]),
    "log_decay: a floating-point tensor of 16, 32 or 64 bits, got torch.int64": call(log_decay=GATES.long()),
    "log_decay: shape (2, 2, 6), got (2, 1, 6)": call(log_decay=GATES[:, :1]),
    "log_decay: values <= 0": call(log_decay=GATES + 0.1),
    "log_decay: values <= 0 (": call(log_decay=GATES * torch.nan),
    "log_decay: causal attention, got causal=False": call(log_decay=GATES, causal=False),
    "cu_seqlens: a tensor [N + 1], got": call(PACKED, PACKED, PACKED, cu_seqlens=[0, 6]),
    "cu_seqlens: dtype torch.int32, got torch.int64": call(
        PACKED, PACKED, PACKED, cu_seqlens=borders(0, 6, dtype=torch.int64)
    ),
    "cu_seqlens: batch 1 with packed sequences, got 2": call(cu_seqlens=borders(0, 6)),
    "cu_seqlens: at least one border, got 0": call(PACKED, PACKED, PACKED, cu_seqlens=borders()),
    "cu_seqlens: non-decreasing borders from 0 to 6, got [0, 5]": call(
        PACKED, PACKED, PACKED, cu_seqlens=borders(0, 5)
    ),
    "cu_seqlens: non-decreasing borders from 0 to 6, got [1, 6]": call(
        PACKED, PACKED, PACKED, cu_seqlens=borders(1, 6)
    ),
    "cu_seqlens: non-decreasing borders from 0 to 6, got [0, 4, 3, 6]": call(
        PACKED, PACKED, PACKED, cu_seqlens=borders(0, 4, 3, 6)
    ),
    # states
    "state: a State, got": call(state=torch.zeros(1)),
    "state: batch_size 2, got 3": call(state=state_of(batch_size=3)),
    "state: batch_size 3, got 1": call(
        PACKED, PACKED, PACKED, cu_seqlens=borders(0, 2, 4, 6), state=state_of(batch_size=1)
    ),
    "state: kv_heads 2, got 1": call(state=state_of(kv_heads=1)),
    "state: head_dim 4, got 5": call(state=state_of(head_dim=5)),
    "state: value_dim 4, got 5": call(state=state_of(value_dim=5)),
    "state: degree 2, got 3": call(state=state_of(degree=3)),
    "state: scale 0.5, got 0.1": call(state=state_of(scale=0.1)),
    "state: dtype torch.float32, got torch.float64": call(state=state_of(dtype=torch.float64)),
    "state: device cpu, got meta": call(state=state_of().to("meta")),
}


@pytest.mark.parametrize("message", MISUSE)
def test_misuse_names_the_argument_what_was_expected_and_what_came(message):
    argument, expected = message.split(": ", 1)
    with pytest.raises(ArgumentError, match=f"^{argument}: expected {re.escape(expected)}"):
        MISUSE[message]()


def test_an_argument_error_is_a_value_error_of_the_package():
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(ArgumentError, TaylorAttentionError)


# ---- decoding --------------------------------------------------------------------------------------------------------


def step(state, query=ONE, key=ONE, value=ONE, **options):
    return lambda: ta.decode_(query, key, value, state, **options)


@pytest.fixture
def state():
    """A state with tokens in its moments and in its tail, as `ONE` continues it."""
    return decode(make(batch=2, length=13, value_dim=4, dtype=torch.float32))[1]


DECODING = {
    "query: a tensor": {"query": None},
    "query: 1 tokens as the key (causal or packed), got 2": {"query": X[:, :, :2]},
    "query: head size 3 as the key, got 4": {"key": ONE[..., :3]},
    "value: 1 tokens as the key, got 2": {"value": X[:, :, :2]},
    "state: value_dim 3, got 4": {"value": ONE[..., :3]},
    "state: batch_size 1, got 2": {"query": ONE[:1], "key": ONE[:1], "value": ONE[:1]},
    "state: dtype torch.float64, got torch.float32": {
        "query": ONE.double(),
        "key": ONE.double(),
        "value": ONE.double(),
    },
    "state: scale 2.0, got 0.5": {"scale": 2},
    "state: no gradients where it is changed in place, got": {"key": ONE.clone().requires_grad_()},
    "scale: a finite number or None, got nan": {"scale": math.nan},
    "series: a Series or None, got 'exp'": {"series": "exp"},
    "degree: a degree from 0 to 1": {"series": ta.series.polynomial([1, 1])},
    "backend: one of ('auto', 'cpu', 'torch'), got 'cuda'": {"backend": "cuda"},
    "key_padding_mask: shape (2, 1), got (2, 6)": {"key_padding_mask": MASK},
    "log_decay: values <= 0": {"log_decay": torch.full((2, 2, 1), 0.5)},
    "log_decay: shape (2, 2, 1), got (2, 2, 6)": {"log_decay": GATES},
}


@pytest.mark.parametrize("message", DECODING)
@pytest.mark.parametrize("used", [0, 1], ids=["at once", "after a good call"])
def test_misuse_of_decoding_leaves_the_state_as_it_was(message, used, state):
    for _ in range(used):  # what was checked once is remembered
        step(state)()
    before = state.clone()
    argument, expected = message.split(": ", 1)
    with pytest.raises(ArgumentError, match=f"^{argument}: expected {re.escape(expected)}"):
        step(state, **DECODING[message])()
    assert differences(state, before) == []


@pytest.mark.parametrize("name", ["tokens", "log_decay", "tail_value", "tail_log_decay", "compensation"])
def test_what_is_put_into_a_state_after_a_good_call_is_looked_at(name, state):
    step(state)()
    setattr(state, name, getattr(state, name).new_zeros(7))
    with pytest.raises(ArgumentError, match=f"^{name}: expected .*, got \\(7,\\)"):
        step(state)()


def test_decoding_wants_a_state():
    with pytest.raises(ArgumentError, match="^state: expected a State, got "):
        step(None)()


def test_good_calls_are_remembered_and_not_for_ever(monkeypatch):
    monkeypatch.setattr(decode_module, "_known", {})
    monkeypatch.setattr(decode_module, "_KNOWN_LIMIT", 3)
    problems = [make(head_dim=size, length=2) for size in (1, 2, 3, 4, 1)]
    assert [relative_error(decode(p)[0], p.oracle()) < TOLERANCE[torch.float64] for p in problems] == [True] * 5
    assert len(decode_module._known) == 2


def test_decoding_does_not_cut_the_history_of_a_state(state):
    step(state)()
    recorded = replace(state, sums=state.sums.clone().requires_grad_())
    with pytest.raises(ArgumentError, match="^state: expected no gradients where it is changed in place"):
        step(recorded)()


def test_decoding_beside_training_is_fine(state):
    with torch.no_grad():
        y = step(state, key=ONE.clone().requires_grad_())()
    assert not y.requires_grad
    assert state.tokens.tolist() == [14, 14]


# ---- absurd states ---------------------------------------------------------------------------------------------------


def test_an_absurd_state_is_refused_with_its_bytes_before_anything_is_computed():
    x = torch.zeros(1, 8, 4, 128)
    needed = 2 * 8 * 129 * math.comb(132, 4) * 4
    with pytest.raises(
        ArgumentError, match=rf"^degree: .* got 4, which needs {needed:,} bytes \(raise max_state_bytes"
    ):
        ta.attention(x, x, x, degree=4, return_state=True)


def test_without_a_state_to_return_nothing_is_refused():
    x = torch.ones(1, 8, 4, 128)
    assert torch.equal(ta.attention(x, x, x, degree=4, max_state_bytes=0), x)


def test_the_refusal_can_be_overridden():
    needed = 2 * 2 * 2 * 5 * math.comb(6, 2) * 4
    with pytest.raises(
        ArgumentError, match=f"^degree: .*max_state_bytes={needed - 1:,} bytes, got 2, .* {needed:,} bytes"
    ):
        call(return_state=True, max_state_bytes=needed - 1)()
    _, state = call(return_state=True, max_state_bytes=needed)()
    assert state.tokens.tolist() == [6, 6]
