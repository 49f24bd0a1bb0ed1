"""The layers' law: one forward == any split with the state carried == token by token, for both twins, every option."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from taylor_attention.errors import ArgumentError
from taylor_attention.nn import SoftmaxAttention, TaylorAttention
from taylor_attention.nn.layer import Attention
from tolerances import TOLERANCE, relative_error

B, T, D_MODEL = 2, 13, 12
TIGHT = TOLERANCE[torch.float64]

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "one key/value head": {"num_kv_heads": 1, "decay": "head"},
    "narrow values": {"head_dim": 6, "value_dim": 3, "decay": "head"},
    "wide values": {"head_dim": 4, "value_dim": 7, "decay": "token"},
    "decay per head": {"decay": "head"},
    "decay per token": {"decay": "token", "num_kv_heads": 2},
    "no rope, odd width": {"rope": False, "head_dim": 3},
    "no norm": {"qk_norm": False},
    "bias and scale": {"bias": True, "scale": 0.3},
    "convolution": {"conv": 3, "num_kv_heads": 2, "decay": "token"},
    "long convolution, window": {"conv": 6, "window": 2, "rope": False},
    # nothing to softmax
    "window and sinks": {"window": 4, "sinks": 2, "decay": "token", "num_kv_heads": 2},
    "fitted": {"reading": "fitted", "num_kv_heads": 2},
    "fitted, window": {"reading": "fitted", "window": 3, "decay": "head"},
    "centred keys": {"center_keys": True, "num_kv_heads": 2, "decay": "head"},
    "far gain": {"far_gain": True, "window": 4, "sinks": 2, "num_kv_heads": 2, "decay": "token"},
    "far gain, fitted": {"far_gain": True, "window": 3, "reading": "fitted"},
}
# whose far scores softmax has not
APART: dict[str, dict[str, Any]] = {
    "near rope": {"rope": "near", "window": 4, "sinks": 2, "decay": "token", "num_kv_heads": 2},
    "near rope, far keys": {"rope": "near", "far_dim": 3, "window": 3, "num_kv_heads": 2, "conv": 3, "far_gain": True},
    "far keys, fitted": {"far_dim": 2, "window": 4, "decay": "head", "reading": "fitted", "center_keys": True},
}
SPREAD = {"key_center": 0.3, "far_log_gain": 1.0, "conv.weight": 0.6, "far_query_map": 0.7, "far_key_map": 0.7}
TAYLORS = ("degree", "window", "sinks", "reading", "center_keys", "far_gain", "far_dim")


def build(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> Attention:
    own = {name: options.pop(name) for name in TAYLORS if name in options}
    torch.manual_seed(1)
    sizes = {"num_kv_heads": None, "head_dim": 4} | options
    if kind == "softmax":
        layer: Attention = SoftmaxAttention(D_MODEL, 4, **sizes).to(dtype)
    else:
        layer = TaylorAttention(D_MODEL, 4, **own, **sizes).to(dtype)
    for name, parameter in layer.named_parameters():  # zeros are nothing to test with
        if name in SPREAD:
            nn.init.normal_(parameter, std=SPREAD[name])
    return layer


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(params=["taylor", "softmax"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[*product(["taylor", "softmax"], OPTIONS), *product(["taylor"], APART)], ids="-".join)
def layer(request: pytest.FixtureRequest) -> Attention:
    kind, options = request.param
    return build(kind, **(OPTIONS | APART)[options])


@pytest.mark.parametrize("cuts", [[1], [12], [5, 6], list(range(1, T))])
def test_any_split_is_one_forward(layer: Attention, cuts: list[int]):
    x = random(B, T, D_MODEL)
    expected = layer(x)
    state, parts = None, []
    for part in x.tensor_split(cuts, dim=1):
        y, state = layer(part, state=state, return_state=True)
        parts.append(y)
    assert relative_error(torch.cat(parts, dim=1), expected) < TIGHT
    assert state.tokens.tolist() == [T, T]


@pytest.mark.parametrize("cuts", [[], [1], [5, 6], list(range(1, T))])
def test_decoding_is_one_forward(layer: Attention, cuts: list[int]):
    x = random(B, T, D_MODEL)
    state = layer.new_state(B)
    y = torch.cat([layer.decode_(part, state) for part in x.tensor_split(cuts, dim=1)], dim=1)
    assert not y.requires_grad
    assert relative_error(y, layer(x)) < TIGHT
    assert state.tokens.tolist() == [T, T]


def test_decoding_goes_on_from_a_prefill_and_forward_from_decoding(layer: Attention):
    x = random(B, T, D_MODEL)
    with torch.no_grad():
        first, state = layer(x[:, :6], return_state=True)
    second = layer.decode_(x[:, 6:7], state)
    third = layer(x[:, 7:], state=state)
    assert relative_error(torch.cat([first, second, third], dim=1), layer(x)) < TIGHT


def test_forward_leaves_the_given_state_as_it_was(layer: Attention):
    x = random(B, T, D_MODEL)
    state = layer.new_state(B)
    layer.decode_(x, state)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    layer(x, state=state, return_state=True)
    after = state.tensors()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(layer: Attention, side: str):
    """Sequences of 5 and 9 tokens, padded with NaN-free rubbish to 9, then continued together."""
    short, long, more = random(1, 5, D_MODEL), random(1, 9, D_MODEL), random(2, 3, D_MODEL)
    rubbish = 50 * random(1, 4, D_MODEL)
    padded = torch.cat([rubbish, short] if side == "left" else [short, rubbish], dim=1)
    mask = torch.ones(2, 9, dtype=torch.bool)
    real = slice(4, 9) if side == "left" else slice(0, 5)
    mask[0] = False
    mask[0, real] = True

    y, state = layer(torch.cat([padded, long]), return_state=True, key_padding_mask=mask)
    assert state.tokens.tolist() == [5, 9]
    after = layer(more, state=state)
    for row, alone, seen in ((0, short, y[:1, real]), (1, long, y[1:])):
        expected, own = layer(alone, return_state=True)
        assert relative_error(seen, expected) < TIGHT
        assert relative_error(after[row : row + 1], layer(more[row : row + 1], state=own)) < TIGHT


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_decode_changes_nothing(layer: Attention, side: str):
    x, more = random(B, 4, D_MODEL), random(B, 1, D_MODEL)
    mask = torch.tensor([[True] * 4, [False, True, True, True] if side == "left" else [True, True, True, False]])
    state = layer.new_state(B)
    layer.decode_(x, state, key_padding_mask=mask)
    y = layer.decode_(more, state)
    expected = layer(torch.cat([x[1:][:, mask[1]], more[1:]], dim=1))[:, -1:]
    assert relative_error(y[1:], expected) < TIGHT


def test_a_query_without_visible_keys_gets_zeros(kind: str):
    layer = build(kind, decay="head")
    mask = torch.tensor([[False, False, True, True]])
    y = layer(random(1, 4, D_MODEL), key_padding_mask=mask)
    assert torch.equal(y[:, :2], torch.zeros_like(y[:, :2]))
    assert bool((y[:, 2:] != 0).all())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_long_series_is_softmax(options: dict[str, Any]):
    """With the same weights the twins agree to the series' error: nothing else differs, decay and rope included."""
    x = random(B, T, D_MODEL)
    taylor, softmax = build("taylor", degree=10, **options), build("softmax", **options)
    weights = taylor.state_dict()
    weights.pop("key_center", None)  # to softmax it is nothing
    weights.pop("far_log_gain", torch.zeros(4)).zero_()  # and this is 0 at first
    softmax.load_state_dict(weights)
    for layer in (taylor, softmax):
        layer.scale = 0.2 * layer.head_dim**-0.5  # |s| <= 0.4 with the norm: 0.4^11 / 11! = 1e-12
    tolerance = 1e-11 if options.get("qk_norm", True) else 1e-6
    if options.get("reading") == "fitted":  # about their mean, scores are up to 0.8: 0.8^11 / 11! = 2e-9
        tolerance = 2e-9
    assert relative_error(taylor(x), softmax(x)) < tolerance
    coarse = build("taylor", degree=1, **options)
    coarse.scale = taylor.scale
    assert relative_error(coarse(x), softmax(x)) > 1e-5  # so the agreement above is no accident of tiny scores


def score(layer: Attention, x: Tensor, rope: bool) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, 4, T, d] of a layer of 4 heads, rotated or not."""
    found = []
    for project, norm in ((layer.query, layer.query_norm), (layer.key, layer.key_norm)):
        heads = norm(project(x).unflatten(-1, (-1, 4)).transpose(1, 2))
        angles = torch.arange(T, dtype=torch.float64)[:, None] * 10000.0 ** -torch.tensor([0, 0.5], dtype=torch.float64)
        pairs = torch.complex(heads[..., :2], heads[..., 2:]) * torch.polar(torch.ones_like(angles), angles * rope)
        found.append(torch.cat((pairs.real, pairs.imag), -1).repeat_interleave(4 // heads.shape[1], 1))
    return found[0], found[1]


@pytest.mark.parametrize("far_dim", [None, 1, 3, 4])
@pytest.mark.parametrize("rope", [True, False, "near"])
def test_near_and_far_scores_are_these(rope: bool | str, far_dim: int | None):
    layer, x = build("taylor", rope=rope, far_dim=far_dim, window=3, num_kv_heads=2, degree=2), random(B, T, D_MODEL)
    query, key = score(layer, x, bool(rope))
    near = layer.scale * query @ key.mT
    query, key = score(layer, x, rope is True)
    if far_dim is not None:
        query, key = query @ layer.far_query_map, key @ layer.far_key_map.repeat_interleave(2, 0)
    far = layer.scale * query @ key.mT
    ages = torch.arange(T)[:, None] - torch.arange(T)
    weights = torch.where(ages < 3, near.exp(), 1 + far + far**2 / 2).masked_fill(ages < 0, 0)
    value = layer.value(x).unflatten(-1, (2, 4)).transpose(1, 2).repeat_interleave(2, 1)
    mixed = weights / weights.sum(-1, keepdim=True) @ value
    assert relative_error(layer(x), layer.output(mixed.transpose(1, 2).flatten(2))) < TIGHT


def test_where_all_is_near_near_positions_are_softmaxs():
    x = random(B, T, D_MODEL)
    taylor, softmax = build("taylor", rope="near", window=T), build("softmax", rope="near")
    assert relative_error(taylor(x), softmax(x)) < TIGHT
    assert torch.equal(softmax(x), build("softmax", rope=True)(x))


def test_far_maps_start_as_the_first_entries():
    """With as many entries as the head has they change nothing; with fewer, scores are as large on average."""
    x, options = torch.randn(B, T, D_MODEL), {"head_dim": 4, "window": 3}
    whole, plain = TaylorAttention(D_MODEL, 4, 2, far_dim=4, **options), TaylorAttention(D_MODEL, 4, 2, **options)
    assert whole.state_dict().keys() - plain.state_dict().keys() == {"far_query_map", "far_key_map"}
    plain.load_state_dict({name: w for name, w in whole.state_dict().items() if "far_" not in name})
    assert relative_error(whole(x), plain(x)) < TOLERANCE[torch.float32]
    half = TaylorAttention(D_MODEL, 4, 2, far_dim=1, **options)
    product = half.far_query_map @ half.far_key_map.repeat_interleave(2, 0).mT
    assert relative_error(product, 2 * (torch.eye(4, 1) @ torch.eye(1, 4)).expand(4, 4, 4)) < TOLERANCE[torch.float32]


def test_far_keys_belong_to_the_state_and_to_taylor_layers():
    layer, plain = (build("taylor", rope=rope, window=3) for rope in ("near", True))
    assert (layer.new_state(B).far_dim, plain.new_state(B).far_dim) == (4, None)
    with pytest.raises(ArgumentError, match=r"state: expected \(degree, .*, far_dim, scale\) = \(2, 3, 0, 0, 4, 0.5\)"):
        layer(random(B, T, D_MODEL), state=plain.new_state(B))
    with pytest.raises(TypeError, match="far_dim"):
        SoftmaxAttention(D_MODEL, 2, 1, far_dim=3)


def test_bidirectional_layers_see_everything(kind: str):
    layer = build(kind, causal=False, num_kv_heads=2)
    x = random(B, T, D_MODEL)
    backwards = build(kind, causal=False, num_kv_heads=2, rope=False)
    assert relative_error(backwards(x.flip(1)), backwards(x).flip(1)) < TIGHT  # order does not matter without rope
    assert not torch.allclose(layer(x)[:, 0], layer(x[:, :1])[:, 0])
    with pytest.raises(ArgumentError, match="decode_: expected a causal layer"):
        layer.decode_(x, layer.new_state(B))


def test_every_parameter_gets_a_gradient(layer: Attention):
    y, state = layer(random(B, T, D_MODEL), return_state=True)
    (y.square().sum() + layer(random(B, 3, D_MODEL), state=state).square().sum()).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool((parameter.grad != 0).any()), name


def test_gradients_flow_through_the_state(layer: Attention):
    x = random(B, T, D_MODEL).requires_grad_()
    (expected,) = torch.autograd.grad(layer(x)[:, 6:].square().sum(), x)
    _, state = layer(x[:, :6], return_state=True)
    (got,) = torch.autograd.grad(layer(x[:, 6:], state=state).square().sum(), x)
    assert relative_error(got, expected) < 10 * TIGHT


def test_gradients_are_right(layer: Attention):
    x = random(1, 4, D_MODEL).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


def test_first_scores_are_modest(kind: str):
    """A truncated series is good where scores are of order 1: that is where both twins start."""
    torch.manual_seed(0)
    layer = TaylorAttention(128, 8) if kind == "taylor" else SoftmaxAttention(128, 8)
    heads = layer._project(torch.randn(1, 64, 128), None, None)
    scores = heads.query @ heads.key.mT * layer.scale
    assert 0.5 < scores.std().item() < 1.5
    assert scores.abs().max().item() <= 4.001  # sqrt(head_dim): a cosine at temperature 1


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *product(["taylor", "softmax"], [{}, {"decay": "head"}, {"decay": "token"}]),
        ("taylor", {"rope": "near", "far_dim": 3, "window": 4}),
    ],
    ids=str,
)
def test_compiles_whole_and_trains_the_same(kind: str, options: dict[str, Any]):
    layer = build(kind, torch.float32, num_kv_heads=2, **options)
    x = torch.randn(B, T, D_MODEL)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, got = [], []
    for function, gradients in ((layer, expected), (compiled, got)):
        layer.zero_grad()
        function(x).square().sum().backward()
        gradients += [parameter.grad.clone() for parameter in layer.parameters()]
    assert relative_error(compiled(x), layer(x)) < TOLERANCE[torch.float32]
    for mine, theirs in zip(got, expected, strict=True):
        assert relative_error(mine, theirs) < TOLERANCE[torch.float32]


def test_activation_checkpointing_changes_nothing(kind: str):
    layer = build(kind, decay="token")
    x = random(B, T, D_MODEL).requires_grad_()
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    (got,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    assert relative_error(got, expected) < TIGHT


def test_autocast_keeps_the_decay_exact(kind: str):
    """Half-lives of 16 over 600 tokens: a bias of -26 rounded to bfloat16 would be off by 0.06."""
    layer = build(kind, torch.float32, decay="head")
    with torch.no_grad():
        layer.decay.bias.fill_(layer.decay.bias.min())
    x = torch.randn(1, 600, D_MODEL)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, layer(x)) < 2 * TOLERANCE[torch.bfloat16]


def test_a_fitted_layer_reads_equal_scores_exactly():
    """Whatever they are: a fit is Taylor's series about their mean."""
    x = random(B, 1, D_MODEL).expand(B, T, D_MODEL)
    options = {"rope": False, "num_kv_heads": 2, "decay": "head"}
    softmax = build("softmax", **options)
    assert relative_error(build("taylor", reading="fitted", **options)(x), softmax(x)) < TIGHT
    other = random(B, T, D_MODEL)
    fitted, taylor = (build("taylor", reading=reading, **options)(other) for reading in ("fitted", "taylor"))
    assert relative_error(fitted, taylor) > 1e-3


@pytest.mark.parametrize("reading", ["taylor", "fitted"])
def test_moving_all_keys_moves_taylors_reading_alone(reading: str):
    """To a fit, as to softmax, a vector that all keys have in common is nothing."""
    layer, x = build("taylor", center_keys=True, reading=reading, rope=False), random(B, T, D_MODEL)
    before = layer(x)
    with torch.no_grad():
        layer.key_center += 1
    assert (relative_error(layer(x), before) < TIGHT) == (reading == "fitted")
    assert relative_error(layer.decode_(x, layer.new_state(B)), layer(x)) < TIGHT


def test_a_center_starts_at_zero_and_belongs_to_taylor_layers_that_ask_for_it():
    layer = TaylorAttention(D_MODEL, 2, 1, center_keys=True)
    assert torch.equal(layer.key_center, torch.zeros(1, 6))
    plain = TaylorAttention(D_MODEL, 2, 1)
    assert layer.state_dict().keys() - plain.state_dict().keys() == {"key_center"}
    plain.load_state_dict({name: x for name, x in layer.state_dict().items() if name != "key_center"})
    x = torch.randn(B, T, D_MODEL)
    assert torch.equal(layer(x), plain(x))
    with pytest.raises(TypeError, match="center_keys"):
        SoftmaxAttention(D_MODEL, 2, 1, center_keys=True)


@pytest.mark.parametrize("reading", ["taylor", "fitted"])
def test_a_gain_starts_where_it_changes_no_bit_and_is_learnt(reading: str):
    options: dict[str, Any] = {"head_dim": 4, "window": 3, "sinks": 1, "reading": reading}
    layer, plain = TaylorAttention(D_MODEL, 4, 2, far_gain=True, **options), TaylorAttention(D_MODEL, 4, 2, **options)
    assert torch.equal(layer.far_log_gain, torch.zeros(4))
    assert layer.state_dict().keys() - plain.state_dict().keys() == {"far_log_gain"}
    plain.load_state_dict({name: x for name, x in layer.state_dict().items() if name != "far_log_gain"})
    x = torch.randn(B, T, D_MODEL)
    y = layer(x)
    assert torch.equal(y, plain(x))
    assert torch.equal(layer.decode_(x[:, :1], layer.new_state(B)), plain.decode_(x[:, :1], plain.new_state(B)))
    y.square().sum().backward()
    assert bool((layer.far_log_gain.grad != 0).all())
    with torch.no_grad():
        layer.far_log_gain.copy_(torch.tensor([0.0, 0.0, 2.0, 0.0]))
    layer.output, plain.output = nn.Identity(), nn.Identity()
    changed = (layer(x) != plain(x)).unflatten(-1, (4, 4)).any(-1)  # [B, T, Hq]
    first = torch.arange(T) >= 4  # where a query sees a far token
    assert torch.equal(changed, first[:, None] & torch.tensor([False, False, True, False]).expand(B, T, 4))


def test_a_gain_belongs_to_taylor_layers():
    with pytest.raises(TypeError, match="far_gain"):
        SoftmaxAttention(D_MODEL, 2, 1, far_gain=True)


def test_autocast_keeps_the_keys_dtype():
    layer, x = build("taylor", torch.float32, center_keys=True), torch.randn(1, 9, D_MODEL)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, layer(x)) < 4 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 0}, "d_model: expected an int >= 1, got 0"),
        ({"num_heads": 2.5}, "num_heads: expected an int >= 1, got 2.5"),
        ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of num_heads = 4, got 3"),
        ({"head_dim": 3}, "head_dim: expected an even size, as rope rotates pairs, got 3"),
        ({"d_model": 10}, "head_dim: expected a size, as num_heads = 4 does not divide d_model = 10, got None"),
        ({"value_dim": -1}, "value_dim: expected an int >= 1, got -1"),
        ({"decay": "heads"}, "decay: expected None, 'head' or 'token', got 'heads'"),
        ({"scale": -1.0}, "scale: expected a number > 0, got -1.0"),
        ({"conv": 1}, "conv: expected 0 or an int >= 2, got 1"),
        ({"conv": True}, "conv: expected 0 or an int >= 2, got True"),
        ({"conv": 4, "causal": False}, "conv: expected 0 in a layer that is not causal, got 4"),
        ({"degree": 1.5}, "degree: expected an int >= 0, got 1.5"),
        ({"reading": "exact"}, "reading: expected one of ('taylor', 'fitted'), got 'exact'"),
        ({"reading": "fitted", "causal": False}, "causal: expected True with reading='fitted', got False"),
        ({"center_keys": 1}, "center_keys: expected a bool, got 1"),
        ({"rope": "far"}, "rope: expected True, False or 'near', got 'far'"),
        ({"rope": 1}, "rope: expected True, False or 'near', got 1"),
        ({"rope": "near"}, "rope: expected True or False without a degree, or without a window or sinks, got 'near'"),
        (
            {"rope": "near", "window": 3, "degree": None},
            "rope: expected True or False without a degree, or without a window or sinks, got 'near'",
        ),
        ({"rope": "near", "window": 3, "head_dim": 3}, "head_dim: expected an even size, as rope rotates pairs, got 3"),
        (
            {"rope": "near", "window": 3, "center_keys": True},
            "center_keys: expected False with rope='near', where it would move far scores alone, got True",
        ),
        ({"far_dim": 0, "window": 3}, "far_dim: expected an int >= 1, got 0"),
        ({"far_dim": 2}, "far_dim: expected None without a window or sinks, where all keys are far, got 2"),
        (
            {"far_dim": 2, "window": 3, "degree": None},
            "far_dim: expected None without a degree, where nothing is far, got 2",
        ),
        ({"far_gain": 0.5, "window": 3}, "far_gain: expected a bool, got 0.5"),
        ({"far_gain": True}, "far_gain: expected False without a degree, or without a window or sinks, got True"),
        (
            {"far_gain": True, "window": 3, "degree": None},
            "far_gain: expected False without a degree, or without a window or sinks, got True",
        ),
    ],
)
def test_misuse_is_named(change: dict[str, Any], message: str):
    arguments: dict[str, Any] = {"d_model": 16, "num_heads": 4} | change
    with pytest.raises(ArgumentError) as caught:
        TaylorAttention(**arguments)
    assert str(caught.value) == message


def test_misused_calls_are_named(kind: str):
    layer = build(kind)
    other = build("softmax" if kind == "taylor" else "taylor")
    x = random(B, T, D_MODEL)
    with pytest.raises(ArgumentError, match=r"x: expected a tensor \[B, T, 12\], got shape \(2, 13\)"):
        layer(x[..., 0])
    with pytest.raises(ArgumentError, match="state: expected a .* from new_state, got"):
        layer(x, state=other.new_state(B))
    with pytest.raises(ArgumentError, match="state: expected a state"):
        layer.decode_(x, None)
    with pytest.raises(ArgumentError, match=r"= \(2, 4, 4, 4\), got \(3, 4, 4, 4\)"):
        layer(x, state=layer.new_state(3))
    with pytest.raises(ArgumentError, match=r"key_padding_mask: expected torch.bool \[2, 13\], as x"):
        layer(x, key_padding_mask=torch.ones(B, T))
    with pytest.raises(ArgumentError, match="state: expected a ConvolvedState from new_state, got"):
        build(kind, conv=3)(x, state=layer.new_state(B))
    with pytest.raises(ArgumentError, match="state: expected a .* from new_state, got ConvolvedState"):
        layer(x, state=build(kind, conv=3).new_state(B))
