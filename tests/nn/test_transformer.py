"""The language model: its law over splits, its twins' sameness, its configuration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from taylor_attention.errors import ArgumentError
from taylor_attention.nn import LanguageModel, ModelConfig, layer
from tolerances import TOLERANCE, relative_error

SMALL: dict[str, Any] = {"d_model": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}


def build(attention: str, **options: Any) -> LanguageModel:
    torch.manual_seed(3)
    return LanguageModel(ModelConfig(attention=attention, **SMALL | options)).double()


def text(batch: int, length: int) -> Tensor:
    return torch.randint(256, (batch, length))


@pytest.fixture(params=["taylor", "softmax"])
def attention(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("cuts", [[], [1], [7, 8], list(range(1, 11))])
@pytest.mark.parametrize("decay", [None, "head", "token"])
def test_any_split_is_one_forward(attention: str, decay: str | None, cuts: list[int]):
    model, tokens = build(attention, decay=decay), text(2, 11)
    expected = model(tokens)
    states, parts = None, []
    for part in tokens.tensor_split(cuts, dim=1):
        logits, states = model(part, states=states, return_states=True)
        parts.append(logits)
    assert relative_error(torch.cat(parts, dim=1), expected) < TOLERANCE[torch.float64]

    states = model.new_states(2)
    decoded = torch.cat([model.decode_(part, states) for part in tokens.tensor_split(cuts, dim=1)], dim=1)
    assert not decoded.requires_grad
    assert relative_error(decoded, expected) < TOLERANCE[torch.float64]
    assert [state.tokens.tolist() for state in states] == [[11, 11]] * 2


@pytest.mark.parametrize(
    "options",
    [
        {"conv": 3},
        {"reading": "fitted"},
        {"reading": "fitted", "window": 3},
        {"center_keys": True},
        {"far_gain": True, "window": 3},
        {"far_gain": True, "sinks": 2, "reading": "fitted"},
        {"rope": "near", "window": 3},
        {"rope": "near", "far_dim": 2, "window": 3},
        {"rope": "near", "far_layers": 2, "window": 3, "sinks": 1},
    ],
    ids=str,
)
def test_how_scores_are_read_is_passed_to_all_layers(options: dict[str, Any]):
    model, tokens = build("taylor", **options), text(2, 11)
    for block in model.blocks:
        assert block.attention.reading == options.get("reading", "taylor")
        assert (block.attention.key_center is not None) == options.get("center_keys", False)
        assert (block.attention.conv is not None) == ("conv" in options)
        assert (block.attention.far_log_gain is not None) == options.get("far_gain", False)
        assert block.attention.rope == options.get("rope", True)
        assert (block.attention.far_key_map is not None) == ("far_dim" in options)
    for name, weight in model.named_parameters():
        if name.endswith(("far_log_gain", "conv.weight")):
            torch.nn.init.normal_(weight)
    states = model.new_states(2)
    decoded = torch.cat([model.decode_(part, states) for part in tokens.tensor_split([3, 4, 5], dim=1)], dim=1)
    assert relative_error(decoded, model(tokens)) < TOLERANCE[torch.float64]
    softmax = build("softmax", **options)  # keeps them unused, but for the convolution
    assert softmax.state_dict().keys() == build("softmax", conv=options.get("conv", 0)).state_dict().keys()


def test_only_so_many_first_layers_have_a_far_part():
    far = {"rope": "near", "reading": "fitted", "far_gain": True, "far_dim": 2}
    model, tokens = build("taylor", window=3, sinks=1, far_layers=1, **far), text(2, 11)
    first, second = (block.attention for block in model.blocks)
    assert (first.degree, first.rope, first.reading, first.far_dim) == (2, "near", "fitted", 2)
    assert (second.degree, second.rope, second.reading, second.far_dim) == (None, True, "taylor", None)
    assert (second.window, second.sinks) == (3, 1)
    near = build("taylor", window=3, sinks=1, degree=None)
    assert second.state_dict().keys() == near.blocks[1].attention.state_dict().keys()
    states = model.new_states(2)
    assert [state.degree for state in states] == [2, None]
    decoded = torch.cat([model.decode_(part, states) for part in tokens.tensor_split([3, 4, 5], dim=1)], dim=1)
    assert relative_error(decoded, model(tokens)) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("conv", [0, 3])
def test_left_padding_changes_nothing(attention: str, conv: int):
    model, tokens = build(attention, conv=conv), text(1, 6)
    padded = torch.cat([text(1, 3), tokens], dim=1)
    mask = torch.tensor([[False] * 3 + [True] * 6])
    logits, states = model(padded, return_states=True, key_padding_mask=mask)
    assert relative_error(logits[:, 3:], model(tokens)) < TOLERANCE[torch.float64]
    following = text(1, 1)
    expected = model(torch.cat([tokens, following], dim=1))[:, -1:]
    assert relative_error(model.decode_(following, states), expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize(
    "options", [{}, {"conv": 3}, {"rope": "near", "far_dim": 2, "far_layers": 1, "window": 3}], ids=str
)
def test_states_go_through_their_tensors(attention: str, options: dict[str, Any]):
    model, tokens = build(attention, **options), text(2, 9)
    states = model.new_states(2)
    model.decode_(tokens, states)
    stored = [
        ({name: tensor.clone() for name, tensor in state.tensors().items()}, state.metadata()) for state in states
    ]
    back = model.states_from_tensors(stored)
    following = text(2, 1)
    assert torch.equal(model.decode_(following, back), model.decode_(following, states))


def test_twins_differ_in_nothing_but_the_mixing():
    taylor, softmax = build("taylor"), build("softmax")
    ours, theirs = taylor.state_dict(), softmax.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name
    for model in (taylor, softmax):
        for block in model.blocks:
            block.attention.scale = 0.05
    long = build("taylor", degree=8)
    for block in long.blocks:
        block.attention.scale = 0.05
    tokens = text(2, 11)
    assert relative_error(long(tokens), softmax(tokens)) < 1e-10
    assert relative_error(taylor(tokens), softmax(tokens)) > 1e-7


def test_memory_is_flat_for_taylor_and_grows_for_softmax():
    sizes = {}
    for attention in ("taylor", "softmax"):
        model = build(attention)
        states = model.new_states(1)
        before = sum(state.nbytes for state in states)
        model.decode_(text(1, 300), states)
        sizes[attention] = before, sum(state.nbytes for state in states)
    assert sizes["taylor"][0] == sizes["taylor"][1]
    assert sizes["softmax"][1] > 4 * sizes["softmax"][0]


def test_every_parameter_gets_a_gradient(attention: str):
    model, tokens = build(attention, decay="token"), text(2, 12)
    functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


def test_starts_knowing_nothing(attention: str):
    """The first loss is that of a guess (log 256), within what random logits of unit variance add (1/2)."""
    torch.manual_seed(0)
    model, tokens = LanguageModel(ModelConfig(num_layers=2, attention=attention)), text(4, 65)
    loss = functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert math.log(256) - 0.1 < loss < math.log(256) + 0.7


@pytest.mark.parametrize("layers", [1, 8])
def test_the_residual_stream_starts_calm(attention: str, layers: int):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(num_layers=layers, attention=attention))
    model._read = lambda x: x  # the stream itself
    assert 0.9 < model(text(2, 64)).std().item() < 1.6  # unit variance, and at most about as much from all blocks


def test_compiles_whole(attention: str):
    model, tokens = build(attention), text(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(tokens), model(tokens)) < TOLERANCE[torch.float64]


def test_configuration_goes_through_a_dictionary():
    sizes = {"num_kv_heads": 4, "value_dim": 8, "conv": 4, "window": 3, "far_dim": 2, "far_layers": 1}
    config = ModelConfig(attention="softmax", decay=None, reading="fitted", rope="near", **sizes)
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": 3}, r"model configuration: expected names among .*, got \['depth'\]"),
        ({"num_layers": 0}, "num_layers: expected an int >= 1, got 0"),
        ({"attention": "linear"}, "attention: expected 'taylor' or 'softmax', got 'linear'"),
        ({"num_kv_heads": 5}, "num_kv_heads: expected a divisor of num_heads = 8, got 5"),
        ({"degree": -2}, "degree: expected an int >= 0, got -2"),
        ({"reading": "exp"}, r"reading: expected one of \('taylor', 'fitted'\), got 'exp'"),
        ({"center_keys": "yes"}, "center_keys: expected a bool, got 'yes'"),
        ({"far_gain": "yes"}, "far_gain: expected a bool, got 'yes'"),
        ({"far_gain": True}, "far_gain: expected False without a degree, or without a window or sinks, got True"),
        ({"rope": "far"}, "rope: expected True, False or 'near', got 'far'"),
        ({"rope": "near"}, "rope: expected True or False without a degree, or without a window or sinks, got 'near'"),
        ({"rope": "near", "window": 3, "center_keys": True}, "center_keys: expected False with rope='near'"),
        ({"far_dim": 2}, "far_dim: expected None without a window or sinks, where all keys are far, got 2"),
        ({"far_layers": 0, "window": 3}, "far_layers: expected an int >= 1, got 0"),
        ({"far_layers": 5, "window": 3}, "far_layers: expected an int"),
        ({"far_layers": 1}, "far_layers: expected None without a degree, or without a window or sinks, got 1"),
        ({"conv": 1.5}, "conv: expected 0 or an int >= 2, got 1.5"),
        ({"decay": "yes"}, "decay: expected None, 'head' or 'token', got 'yes'"),
        ({"mlp_ratio": 0}, "mlp_ratio: expected a number > 0, got 0"),
    ],
)
def test_a_bad_configuration_is_named(values: dict[str, Any], message: str):
    with pytest.raises(ArgumentError, match=message):
        ModelConfig.from_dict(values)


def test_misused_calls_are_named(attention: str):
    model = build(attention)
    with pytest.raises(ArgumentError, match=r"tokens: expected a tensor \[B, T\], got shape \(3,\)"):
        model(text(1, 3)[0])
    with pytest.raises(ArgumentError, match=r"tokens: expected dtype torch.int64, got torch.uint8"):
        model(text(1, 3).to(torch.uint8))
    with pytest.raises(ArgumentError, match="states: expected 2 of them, one per layer, got 1"):
        model.decode_(text(1, 3), model.new_states(1)[:1])


@pytest.mark.parametrize("rope", [True, False])
def test_the_rotation_is_computed_once_and_shared_by_all_layers(
    attention: str, rope: bool, monkeypatch: pytest.MonkeyPatch
):
    model, tokens = build(attention, rope=rope), text(2, 5)
    states = model.new_states(2)
    model.decode_(text(2, 3), states)
    before = [state.clone() for state in states]
    counted: list[int] = []
    rotation = layer.rotation
    monkeypatch.setattr(layer, "rotation", lambda *inputs: counted.append(1) or rotation(*inputs))
    got = model(tokens, states=states), model.decode_(tokens, states)
    assert len(counted) == (2 if rope else 0)
    x = model._embed(tokens)
    for block, state in zip(model.blocks, before, strict=True):  # each layer for itself
        x = block(x, state=state)[0]
    expected = model._read(x)
    assert torch.equal(got[0], expected)
    assert relative_error(got[1], expected) < TOLERANCE[torch.float64]


WRONG_STATES = {
    "none": (None, "got NoneType"),
    "a number": (3, "from new_state"),
    "another batch": (1, "sequences"),
}


@pytest.mark.parametrize("wrong", WRONG_STATES)
def test_a_wrong_first_state_is_refused(attention: str, wrong: str):
    model = build(attention)
    state, message = WRONG_STATES[wrong]
    state = model.new_states(1)[0] if wrong == "another batch" else state
    with pytest.raises(ArgumentError, match=rf"^state: expected .*{message}"):
        model.decode_(text(2, 1), [state, *model.new_states(2)[1:]])
