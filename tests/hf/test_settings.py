"""What each head keeps: defaults and exceptions, groups, bytes, and files."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

import taylor_attention as ta
from taylor_attention.errors import ArgumentError, StorageError
from taylor_attention.hf.settings import HeadSettings, ModelSettings

SOFTMAX = HeadSettings(window=None)
SMALL = HeadSettings(window=8, sinks=0, degree=None)
MIXED = ModelSettings(HeadSettings(), {(1, 2): SOFTMAX, (0, 0): SMALL, (1, 0): SOFTMAX})


def test_exceptions_stand_where_they_are_named():
    assert MIXED.layer(0, 3) == [SMALL, HeadSettings(), HeadSettings()]
    assert MIXED.layer(1, 3) == [SOFTMAX, HeadSettings(), SOFTMAX]
    assert MIXED.layer(2, 1) == [HeadSettings()]


def test_equal_heads_are_one_group():
    assert MIXED.groups(1, 3) == [(SOFTMAX, (0, 2)), (HeadSettings(), (1,))]
    assert MIXED.groups(2, 3) == [(HeadSettings(), (0, 1, 2))]


def test_softmax_is_one_setting_whatever_else_is_said():
    assert HeadSettings(window=None, sinks=9, heavy=3, degree=4, reading="fitted") == SOFTMAX
    assert SOFTMAX.is_softmax
    assert not SMALL.is_softmax


@pytest.mark.parametrize("head", [HeadSettings(), SMALL, HeadSettings(window=3, sinks=1, heavy=2, degree=3)])
@pytest.mark.parametrize("tokens", [1, 40])
def test_bytes_of_a_state_are_those_it_has(head, tokens):
    q, k, v = torch.randn(1, 1, tokens, 6), torch.randn(1, 1, tokens, 6), torch.randn(1, 1, tokens, 5)
    _, state = ta.attention(q, k, v, **head.layout, return_state=True)
    assert head.nbytes(tokens, 6, 5) == state.nbytes


def test_bytes_of_a_model_are_the_sum_of_its_heads():
    one = HeadSettings().nbytes(7, 4, 4, torch.bfloat16)
    two = HeadSettings().nbytes(7, 4, 4, torch.bfloat16, kv_heads=2)
    assert two == 2 * one - 8  # heads of one state have one count of tokens
    found = MIXED.nbytes(7, layers=2, kv_heads=3, head_dim=4, dtype=torch.bfloat16)
    assert found == SMALL.nbytes(7, 4, 4) + two + one + 2 * 7 * (4 + 4) * 2
    assert one == HeadSettings().nbytes(10**9, 4, 4)  # a state is float32 whatever the model is
    assert HeadSettings().nbytes(7, 4, 4, torch.float64) > one


def test_settings_survive_a_file(tmp_path):
    path = tmp_path / "settings.json"
    MIXED.save(path)
    assert ModelSettings.load(path) == MIXED
    assert ModelSettings.load(str(path)).to_dict() == json.loads(path.read_text())
    assert copy.deepcopy(MIXED) == MIXED


def test_what_is_left_out_has_its_default():
    found = ModelSettings.from_dict({"heads": {"3.1": {"window": 16}}})
    assert found == ModelSettings(HeadSettings(), {(3, 1): HeadSettings(window=16)})
    assert ModelSettings.from_dict({}) == ModelSettings()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": -1}, "window: expected an int >= 0, got -1"),
        ({"window": 2.5}, "window: expected an int >= 0, got 2.5"),
        ({"sinks": True}, "sinks: expected an int >= 0, got True"),
        ({"degree": "2"}, "degree: expected an int >= 0, got '2'"),
        ({"window": 0, "sinks": 0, "degree": None}, "degree: expected an int >= 0 (None: only with a window"),
        ({"window": 0, "heavy": 1}, "heavy: expected 0 without a window"),
        ({"reading": "best"}, "reading: expected one of ('taylor', 'fitted'), got 'best'"),
    ],
)
def test_a_head_that_cannot_be_is_refused(options, message):
    with pytest.raises(ArgumentError) as caught:
        HeadSettings(**options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"window": 1},), "default: expected HeadSettings, got {'window': 1}"),
        ((SMALL, [SMALL]), "heads: expected a mapping of (layer, kv head), got [HeadSettings("),
        ((SMALL, {3: SMALL}), "heads: expected keys (layer, kv head), got 3"),
        ((SMALL, {(0, -1): SMALL}), "heads: kv head: expected an int >= 0, got -1"),
        ((SMALL, {("0", 1): SMALL}), "heads: layer: expected an int >= 0, got '0'"),
        ((SMALL, {(0, 1): None}), "heads[(0, 1)]: expected HeadSettings, got None"),
    ],
)
def test_settings_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ArgumentError) as caught:
        ModelSettings(*arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "settings: expected a mapping with 'default' and 'heads', got []"),
        ({"head": {}}, "settings: expected a mapping with 'default' and 'heads', got {'head': {}}"),
        ({"heads": []}, "heads: expected a mapping of 'layer.head', got []"),
        ({"heads": {"1": {}}}, "heads: expected keys 'layer.head', got '1'"),
        ({"heads": {"-1.0": {}}}, "heads: expected keys 'layer.head', got '-1.0'"),
        ({"default": {"windows": 3}}, "settings of a head: expected a mapping with names of ['window',"),
        ({"default": 3}, "settings of a head: expected a mapping with names of ['window',"),
        ({"default": {"window": "wide"}}, "window: expected an int >= 0, got 'wide'"),
    ],
)
def test_a_mapping_that_says_something_else_is_refused(source, message, tmp_path):
    with pytest.raises(ArgumentError) as caught:
        ModelSettings.from_dict(source)
    assert str(caught.value).startswith(message)
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(source))
    with pytest.raises(StorageError, match="expected settings of a model as JSON, got") as caught:
        ModelSettings.load(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000])
def test_a_file_that_is_no_json_is_refused(content, tmp_path):
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"settings\.json: expected settings of a model as JSON, got "):
        ModelSettings.load(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(StorageError, match="cannot be read"):
        ModelSettings.load(tmp_path / "none.json")
    with pytest.raises(StorageError, match="cannot be written"):
        MIXED.save(tmp_path / "none" / "settings.json")


def test_exceptions_outside_a_model_are_refused():
    MIXED.check_sizes(2, 3)
    with pytest.raises(ArgumentError, match=r"heads: expected places in 1 layers of 3 key/value heads, got \[\(1, 0\)"):
        MIXED.check_sizes(1, 3)
    with pytest.raises(ArgumentError, match=r"heads: expected places in 2 layers of 2 key/value heads, got \[\(1, 2\)"):
        MIXED.nbytes(1, layers=2, kv_heads=2, head_dim=4)
    with pytest.raises(ArgumentError, match="tokens: expected an int >= 0, got -1"):
        MIXED.nbytes(-1, layers=2, kv_heads=3, head_dim=4)


@pytest.mark.parametrize(("degree", "tokens"), [(1, 82), (2, 2243)])
def test_moments_take_the_bytes_of_so_many_cached_tokens(degree: int, tokens: int):
    """As docs/pretrained.md and docs/transformers.md say: d = 64, float32."""
    alone = HeadSettings(window=1, sinks=0, heavy=0, degree=None)
    moments = replace(alone, degree=degree).nbytes(8192, 64, 64) - alone.nbytes(8192, 64, 64)
    assert round(moments / (2 * 64 * 4)) == tokens
