"""Sums do not drift: real tokens in float32 beside float64, by the million here and by 2^25 where marked slow.

How wrong a moment or an output is, and how wrong it may be, is said in `taylor_attention.bench.soak`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import taylor_attention as ta
from kernels import built
from taylor_attention.bench.soak import MOMENTS, OUTPUTS, Settings, Soak, moment_error, output_error, with_squares
from taylor_attention.bench.streams import RATES, STREAMS, Tokens, draw
from taylor_attention.core.basis import expand
from taylor_attention.errors import ArgumentError

HEADS = {"decay": 2}  # one that remembers a thousand tokens, one that remembers a million
DEGREES = {"constant": 3, "alternating": 3}  # else 2
BACKENDS = pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=built)])


def settings(stream: str, **changed) -> Settings:
    return Settings(stream, heads=HEADS.get(stream, 1), degree=DEGREES.get(stream, 2), **changed)


def feed(chosen: Settings, tokens: int, change=lambda state: state) -> Soak:
    """A run of so many tokens; `change` is made to the float32 state after each call."""
    run = Soak(chosen)
    while run.tokens < tokens:
        run.advance()
        run.position = replace(run.position, state=change(run.position.state))
    return run


def without_compensation(state: ta.State) -> ta.State:
    return replace(state, compensation=torch.zeros_like(state.compensation))


def assert_right(run: Soak, tokens: int) -> None:
    assert run.position.state.tokens.tolist() == [tokens]
    assert run.position.stretch.moments < run.bound
    assert run.position.stretch.outputs < OUTPUTS


# ---- calls of attention


@built
@pytest.mark.parametrize("stream", STREAMS)
def test_long_sums_do_not_drift(stream):
    assert_right(feed(settings(stream), 2**17), 2**17)


@built
@pytest.mark.slow
@pytest.mark.parametrize("stream", STREAMS)
def test_2_to_the_25_tokens_do_not_drift(stream):
    assert_right(feed(settings(stream), 2**25), 2**25)


@pytest.mark.parametrize("stream", ["constant", "decay"])
def test_long_sums_do_not_drift_without_the_kernels(stream):
    assert_right(feed(settings(stream, backend="torch", block=2**12), 2**13), 2**13)


# ---- exact in another way: equal tokens have a closed form


def fed_equal(count: int, gate: float | None, block: int) -> tuple[ta.State, Tensor]:
    """The state after `count` equal tokens, and its moments in exact arithmetic, [1, 1, E, M] in float64."""
    one = draw("constant", 3, 0, 1, 1, 8)
    key, value = (x.expand(1, 1, block, 8) for x in (one.key, one.value))
    gates = None if gate is None else torch.full((1, 1, block), gate)
    state = None
    for _ in range(count // block):
        _, state = ta.attention(key, key, value, degree=3, log_decay=gates, state=state, return_state=True)
    assert state is not None
    return state, weigh(count, 0.0 if gates is None else gates[0, 0, 0].item()) * terms(one)


def terms(tokens: Tokens) -> Tensor:
    """What each token adds to the moments, [1, H, E, M] for one token."""
    columns = torch.cat([tokens.value, torch.ones_like(tokens.value[..., :1])], -1).double()
    return columns.mT @ expand(tokens.key.double(), 3)


def weigh(count: int, gate: float) -> float:
    """1 + exp(gate) + exp(2 gate) + ..., so many terms."""
    return count if gate == 0 else math.expm1(count * gate) / math.expm1(gate)


def worst(moments: Tensor, exact: Tensor) -> float:
    return float(((moments.double() - exact) / exact).abs().max())


@built
@pytest.mark.parametrize("gate", [None, *(-rate for rate in RATES)])
@pytest.mark.parametrize(("count", "block"), [(2**15, 2**8), (2**20, 2**16)])
def test_equal_tokens_have_the_moments_of_the_closed_form(gate, count, block):
    state, exact = fed_equal(count, gate, block)
    assert state.tokens.tolist() == [count]
    assert worst(state.moments, exact) < MOMENTS


@built
@pytest.mark.slow
@pytest.mark.parametrize("gate", [None, *(-rate for rate in RATES)])
def test_2_to_the_27_equal_tokens_have_the_moments_of_the_closed_form(gate):
    state, exact = fed_equal(2**27, gate, 2**20)
    assert state.tokens.tolist() == [2**27]
    assert worst(state.moments, exact) < MOMENTS


# ---- token by token


def decoded(chosen: Settings, tokens: int) -> tuple[ta.State, float, float]:
    """The state after so many steps of `decode_`, and how wrong moments and outputs were at worst, block by block."""
    sizes = (chosen.heads, chosen.head_dim, chosen.head_dim, chosen.degree)
    state, twin, errors = ta.State.zeros(1, *sizes), ta.State.zeros(2, *sizes, dtype=torch.float64), []
    for block in range(tokens // chosen.block):
        drawn = draw(chosen.stream, chosen.seed, block, chosen.block, chosen.heads, chosen.head_dim)
        outputs = [ta.decode_(state=state, **one.arguments()) for one in one_by_one(drawn)]
        options = {"degree": chosen.degree, "state": twin, "return_state": True}
        expected, twin = ta.attention(**with_squares(drawn).arguments(), **options)
        errors.append((moment_error(state, twin), output_error(torch.cat(outputs, 2), expected[:1])))
    moments, outputs_error = torch.tensor(errors, dtype=torch.float64).amax(0).tolist()
    return state, moments, outputs_error


def one_by_one(tokens: Tokens):
    query, key, value = (x.split(1, 2) for x in (tokens.query, tokens.key, tokens.value))
    gates = [None] * len(query) if tokens.log_decay is None else tokens.log_decay.split(1, 2)
    return map(Tokens, query, key, value, gates)


def check_decoding(stream: str, tokens: int) -> None:
    state, moments, outputs = decoded(settings(stream), tokens)
    assert state.tokens.tolist() == [tokens]
    assert moments < MOMENTS
    assert outputs < OUTPUTS


@built
@pytest.mark.parametrize("stream", ["constant", "decay"])
def test_long_decoding_does_not_drift(stream):
    check_decoding(stream, 2**14)


@built
@pytest.mark.slow
@pytest.mark.parametrize("stream", STREAMS)
def test_2_to_the_20_steps_of_decoding_do_not_drift(stream):
    check_decoding(stream, 2**20)


# ---- what these tests would say of other sums


@built
def test_sums_without_what_rounding_dropped_are_found_out():
    """Plain float32 sums from call to call: the same tokens, the same measure."""
    run = feed(settings("constant", block=2**7), 2**16, without_compensation)
    assert run.position.stretch.moments > MOMENTS


def test_a_counter_in_single_precision_sticks_and_one_in_half_precision_overflows():
    """As sums that take one token after the other would; a state counts on."""
    ones = np.ones(2**24 + 1000, np.float32)
    assert np.add.accumulate(ones)[-1] == 2**24
    with np.errstate(over="ignore"):
        assert np.add.accumulate(np.full(1024, 64, np.float16))[-1] == np.inf
    ones = torch.ones(1, 1, 2**17, 1, dtype=torch.float16)
    _, state = ta.attention(ones[:, :, :1], ones, ones, degree=1, causal=False, return_state=True)
    assert state.tokens.tolist() == [2**17]
    assert state.moments.flatten().tolist() == [2**17] * 4


# ---- merging: a billion tokens and more from the states of a few


def copies(state: ta.State, count: int) -> ta.State:
    """The state of `count` times the same tokens, by merging as one writes `count` in binary."""
    found = None
    while count:
        if count % 2:
            found = state if found is None else found.merge(state)
        count //= 2
        state = state.merge(state) if count else state
    assert found is not None
    return found


@BACKENDS
@pytest.mark.parametrize("count", [10**9 + 7, 2**31 - 1, 2**40, 3**25])
def test_merged_copies_are_so_many_times_the_moments(backend, count):
    tokens = draw("alternating", 5, 0, 100, 2, 4)
    _, state = ta.attention(**tokens.arguments(), degree=3, return_state=True, backend=backend)
    many, each = copies(state, count), state.sums.double() + state.compensation.double()
    assert many.tokens.tolist() == [100 * count]
    assert worst(many.sums.double() + many.compensation.double(), count * each) < 1e-12
    assert worst(many.moments, count * each) <= 2**-24


@BACKENDS
@pytest.mark.parametrize("count", [10**9, 2**40])
@pytest.mark.parametrize("gate", [-1e-3, -1e-7, -1e-13])
def test_merged_copies_fade_as_one_sequence_does(backend, gate, count):
    one = draw("constant", 5, 0, 1, 1, 4)
    key, value, gates = one.key.expand(1, 1, 64, 4), one.value.expand(1, 1, 64, 4), torch.full((1, 1, 64), gate)
    _, state = ta.attention(key, key, value, degree=3, log_decay=gates, return_state=True, backend=backend)
    many = copies(state, count)
    assert many.tokens.tolist() == [64 * count]
    assert worst(many.moments, weigh(64 * count, gates[0, 0, 0].item()) * terms(one)) < MOMENTS


@BACKENDS
def test_after_2_to_the_40_tokens_each_one_counts(backend):
    one = torch.ones(1, 1, 1, 1)
    _, state = ta.attention(one, one, one, degree=1, return_state=True, backend=backend)
    many = copies(state, 2**40)
    for _ in range(100):
        ta.decode_(one, one, one, many, backend=backend)
    many = many.folded()
    assert many.tokens.tolist() == [2**40 + 100]
    assert (many.sums.double() + many.compensation.double()).flatten().tolist() == [2**40 + 100] * 4


def test_more_tokens_than_are_counted_are_refused():
    state = ta.State.zeros(2, 1, 2, 2, 2)
    state.tokens += torch.tensor([5, 2**62])
    with pytest.raises(ArgumentError, match="^later: expected at most 9,223,372,036,854,775,807 tokens together"):
        state.merge(state)
    assert state.tokens.tolist() == [5, 2**62]
