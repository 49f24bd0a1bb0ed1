"""Numbers of any size: what sums can hold is right, all else is refused before a state changes, or NaN that shows."""

import math
from dataclasses import replace

import pytest
import torch

import taylor_attention as ta
from kernels import KERNELS
from problems import Problem, carry, decode, differences, make
from taylor_attention.core.ranges import moment_limit, token_limit
from taylor_attention.core.state import tail_size
from taylor_attention.errors import ArgumentError
from taylor_attention.ops.reference import attention_reference
from tolerances import TOLERANCE, relative_error

BACKENDS = pytest.mark.parametrize("backend", ["torch", KERNELS[0]], indirect=True)
ALL = pytest.mark.parametrize("backend", ["torch", *KERNELS], indirect=True)

NAN, INF = math.nan, math.inf
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)

REACHES = {
    "far": {},
    "window": {"window": 3},
    "sinks": {"sinks": 2},
    "both": {"window": 3, "sinks": 1},
    "heavy": {"window": 3, "heavy": 2},
    "near alone": {"window": 3, "sinks": 1, "degree": None},
}
EVERY_REACH = pytest.mark.parametrize("reach", REACHES)


def finite(state):
    """Whether no number of a state is NaN or infinite, free places of heavy tokens apart."""
    tensors = state.tensors()
    tensors.pop("near_heavy_priority", None)
    return all(bool(x.isfinite().all()) for x in tensors.values())


def put(problem, which, number, token=-1):
    """One number of the last token, or another, replaced: of sequence 1, key/value head 1."""
    x = getattr(problem, which).clone()
    x[1, 1, token, 2] = number
    return replace(problem, **{which: x})


# ---- what is refused -------------------------------------------------------------------------------------------------


WAYS = {
    "one token": lambda p, state, backend: p.part(10, 11).decode_(state, backend=backend),
    "two tokens": lambda p, state, backend: p.part(9, 11).decode_(state, backend=backend),
    "a piece": lambda p, state, backend: p.part(9, 11).solve(state=state, return_state=True, backend=backend),
}


@BACKENDS
@EVERY_REACH
@pytest.mark.parametrize(("which", "number"), [("key", NAN), ("key", -INF), ("value", NAN), ("value", INF)])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_finite_is_refused_and_changes_nothing(backend, reach, which, number, way):
    problem = make(batch=2, length=11, heads=4, kv_heads=2, **REACHES[reach])
    _, state = problem.part(0, 9).solve(return_state=True, backend=backend)
    problem.part(9, 10).decode_(state, backend=backend)
    before = state.clone()
    with pytest.raises(ArgumentError, match=rf"^{which}: expected finite numbers, got \[.*\] in sequence 1, head 1"):
        WAYS[way](put(problem, which, number), state, backend)
    assert differences(state, before) == []
    assert finite(state)


@BACKENDS
@EVERY_REACH
@pytest.mark.parametrize("decay", [None, "soft"])
def test_a_refused_token_leaves_a_full_tail_and_decoding_goes_on(backend, reach, decay):
    """The step after a full tail folds it: not before the token has been judged."""
    problem = make(batch=2, heads=2, length=18, decay=decay, **REACHES[reach])
    full = tail_size(4, 3, 2)
    expected, after = decode(problem, backend=backend)
    state, outputs = problem.new_state(), []
    for token in range(problem.length):
        before = state.clone()
        for wrong in (put(problem.part(token, token + 1), *bad) for bad in (("key", NAN), ("value", 1e300))):
            with pytest.raises(ArgumentError, match="^(key|value): expected"):
                wrong.decode_(state, backend=backend)
        assert differences(state, before) == []
        outputs.append(problem.part(token, token + 1).decode_(state, backend=backend))
    assert full < problem.length - 1
    assert torch.equal(torch.cat(outputs, 2), expected)
    assert differences(state, after) == []


def one_token(degree, key, value, dtype, **reach):
    """A token of a single large number in key and value, and a state to append it to."""
    x = torch.zeros(1, 1, 1, 3, dtype=dtype)
    keys, values = x.clone(), x.clone()
    keys[..., 1], values[..., 2] = key, value
    state = ta.State.zeros(1, 1, 3, 3, degree, dtype=dtype, **{"window": 0, **reach})
    return x, keys, values, state


def up(x, dtype):
    """The next larger number."""
    x = torch.tensor(x, dtype=dtype)
    return torch.nextafter(x, torch.full_like(x, INF)).item()


@ALL
@DTYPES
@pytest.mark.parametrize(
    ("degree", "reach", "power"),
    [
        (0, {}, 1),
        (1, {}, 1),
        (2, {}, 2),
        (3, {"window": 2}, 3),
        (4, {"sinks": 1}, 4),
        (6, {"window": 1, "heavy": 1}, 6),
        (None, {"window": 2}, 1),
    ],
)
@pytest.mark.parametrize("by", ["key", "value", "both"])
def test_the_border_is_where_it_is_said_to_be(backend, dtype, degree, reach, power, by):
    limit = {torch.float32: 96, torch.float64: 960}[dtype]  # powers of two that all the roots are powers of two of
    root = {"key": 2.0 ** (limit // power), "value": 0.5, "both": 2.0 ** (limit // power // 2)}[by]
    size = {"key": 0.25, "value": 2.0**limit, "both": 2.0 ** (limit // 2)}[by]
    accepted = one_token(degree, -root, size, dtype, **reach)
    for _ in range(2):
        ta.decode_(*accepted, backend=backend)
    assert accepted[3].tokens.tolist() == [2]
    assert finite(accepted[3])
    beyond = (up(root, dtype), size) if by == "key" else (root, up(size, dtype))
    refused = one_token(degree, beyond[0], -beyond[1], dtype, **reach)
    before = refused[3].clone()
    name = {"key": "key", "value": "value", "both": "(key|value)"}[by]
    message = rf"^{name}: expected \|key\|\^{power} \|value\| <= 2\^{limit} for moments in {dtype}, got"
    with pytest.raises(ArgumentError, match=message):
        ta.decode_(*refused, backend=backend)
    assert differences(refused[3], before) == []


@ALL
@DTYPES
@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_kernels_and_pytorch_draw_the_same_border_to_the_last_bit(backend, dtype, degree):
    """Products of a few numbers that round, around the limit."""
    limit, eps = token_limit(dtype), torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(degree)
    key = (1 + torch.rand(60, generator=generator, dtype=dtype)) * 2**10
    value = limit / key**degree * (1 + eps * torch.randint(-3, 4, (60,), generator=generator).to(dtype))
    verdicts = []
    for k, v in zip(key.tolist(), value.tolist(), strict=True):
        found = []
        for name in (backend, "torch"):
            try:
                ta.decode_(*one_token(degree, k, v, dtype), backend=name)
                found.append(True)
            except ArgumentError:
                found.append(False)
        verdicts.append(found)
    assert [mine for mine, _ in verdicts] == [other for _, other in verdicts]
    assert 5 < sum(mine for mine, _ in verdicts) < 55


@BACKENDS
@EVERY_REACH
@pytest.mark.parametrize("number", [NAN, INF, 3e38])
@pytest.mark.parametrize("way", [lambda p, **o: decode(p, **o), lambda p, **o: carry(p, [4], **o)])
def test_hidden_tokens_may_hold_anything(backend, reach, number, way):
    problem = make(batch=2, length=14, mask="holes", dtype=torch.float32, **REACHES[reach])
    hidden = ~problem.along["key_padding_mask"][:, None, :, None]
    key, value = (x.masked_fill(hidden, number) for x in (problem.key, problem.value))
    (y, state), (expected, clean) = (way(p, backend=backend) for p in (replace(problem, key=key, value=value), problem))
    assert torch.equal(y, expected)
    assert differences(state, clean) == []


@BACKENDS
@pytest.mark.parametrize("reach", ["window", "sinks", "heavy"])
def test_a_whole_sequence_leaves_no_exact_token_that_would_overflow_when_it_joins_the_moments(backend, reach):
    """10^20 to the third power is beyond float32; as an exact key alone it would do."""
    problem = put(make(batch=2, length=3, degree=3, dtype=torch.float32, **REACHES[reach]), "key", 1e20, token=1)
    with pytest.raises(
        ArgumentError, match=r"^key: expected \|key\|\^3 .* got \|key\| up to 1e\+20 .* head 1, token 1"
    ):
        problem.solve(return_state=True, backend=backend)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_sum_that_is_too_large_is_refused_though_each_token_is_not(backend, dtype):
    """A state at its own border, and as many tokens at theirs as change a bit of it."""
    most, one = moment_limit(dtype), torch.ones(1, 1, 1024, 1, dtype=dtype)
    state, border = of_moments(most, dtype), token_limit(dtype) * one
    before, options = state.clone(), {"degree": 0, "scale": 1.0, "backend": backend}
    assert ta.attention(one, one, -border, state=state, **options).isfinite().all()  # no new state, no harm
    with pytest.raises(
        ArgumentError, match="^state: expected these tokens to leave one to go on from, got moments up "
    ):
        ta.attention(one, one, -border, state=state, return_state=True, **options)
    assert differences(state, before) == []
    _, less = ta.attention(one, one, border, state=state, return_state=True, **options)
    assert finite(less)
    assert less.sums.min() > -most


@BACKENDS
def test_a_state_that_is_not_finite_is_not_carried_on(backend):
    sums = torch.full((1, 1, 2, 6), NAN)
    state = ta.State.from_sums(sums, torch.zeros_like(sums), torch.tensor([1]), None, 2, 2, 1.0)
    x = torch.ones(1, 1, 1, 2)
    with pytest.raises(ArgumentError, match="^state: expected these tokens to leave one to go on from, got .* nan"):
        ta.attention(x, x, x[..., :1], degree=2, scale=1.0, state=state, return_state=True, backend=backend)


def of_moments(largest, dtype):
    """A state of degree 0 of which one sum is -largest."""
    sums = torch.tensor([-largest, 1.0], dtype=dtype).view(1, 1, 2, 1)
    return ta.State.from_sums(sums, torch.zeros_like(sums), torch.tensor([1]), None, 1, 0, 1.0)


@DTYPES
def test_a_merge_that_would_overflow_is_refused(dtype):
    most = moment_limit(dtype)
    state, before = of_moments(0.6 * most, dtype), of_moments(0.6 * most, dtype)
    with pytest.raises(
        ArgumentError, match="^later: expected a state whose moments can be added to this one's, got mo"
    ):
        state.merge(before)
    assert differences(state, before) == []
    assert finite(state.merge(of_moments(0.3 * most, dtype)))


def test_a_merge_judges_what_its_windows_put_into_the_moments():
    """10^13 to the third power has room in a window and in one state's moments, not in so many tokens'."""
    problem = make(length=3, degree=2, dtype=torch.float32, window=3)
    large, ordinary = (decode(replace(problem, key=problem.key * size))[1] for size in (2e13, 1.0))
    assert finite(large.merge(ordinary))
    assert large.merge(ordinary).sums.abs().max() > 1e26
    ordinary.sums[..., 0] = 0.9 * moment_limit(torch.float32)
    large.near.value.fill_(0.5 * moment_limit(torch.float32))
    with pytest.raises(ArgumentError, match="^later: expected a state whose moments can be added"):
        large.merge(ordinary)


@pytest.mark.parametrize("reach", [{}, {"window": 3}])
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_state_is_not_converted_to_what_cannot_hold_it(reach, tokens):
    """In its tail, in its window, in its moments."""
    problem = make(length=tokens, degree=2, **reach)
    large = replace(problem, key=problem.key * 1e25)
    state = decode(large)[1]
    with pytest.raises(ArgumentError, match="^dtype: expected one that holds the state, got "):
        state.to(dtype=torch.float32)
    assert finite(state)
    assert finite(decode(problem)[1].to(dtype=torch.float32))


# ---- what is right ---------------------------------------------------------------------------------------------------


def sized(size, **options):
    """Keys of a size, with queries as much smaller: scores of order 1."""
    problem = make(**{"batch": 2, "length": 24, **options})
    return replace(problem, query=problem.query / size, key=problem.key * size).to(torch.float32)


@BACKENDS
@pytest.mark.parametrize("reach", ["far", "both", "near alone"])
@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("power", [3, 8, 13, 18, 28, 38, -10, -20, -30])
@pytest.mark.parametrize("way", [decode, lambda p, **o: carry(p, [17], **o)], ids=["decoding", "pieces"])
def test_keys_of_any_size_are_right_or_refused(backend, reach, degree, power, way):
    problem = sized(10.0**power, **{"degree": degree, **REACHES[reach]})
    top = max(1, problem.degree or 1)
    largest = [x.abs().max().double().item() for x in problem.arguments]
    taken = max(1, largest[1]) ** top * max(1, largest[2]) <= 2.0**96
    overflowing = problem.degree is not None and (largest[0] / 2) ** top > torch.finfo(torch.float32).max  # scale 1/2
    with ta.watch_normalisers(keep_masks=True) as seen:
        try:
            y, state = way(problem, backend=backend)
        except ArgumentError as error:
            assert not taken, error
            return
    assert taken or way is not decode
    assert finite(state)
    unsafe = torch.cat(seen.masks, 2)
    assert overflowing or not unsafe.any()
    assert torch.equal(y.isfinite().all(-1), ~unsafe)
    assert relative_error(y[~unsafe], problem.oracle()[~unsafe]) < TOLERANCE[torch.float32]


@BACKENDS
@pytest.mark.parametrize("power", [19, 38])
def test_without_a_state_nothing_is_refused_and_what_overflows_is_nan(backend, power):
    """Never a number that is finite and wrong: 1e19 to the second power has room, to the fourth it has not."""
    problem = sized(10.0**power, degree=4, causal=False)
    y, expected = problem.solve(backend=backend), problem.oracle()
    right = y.isfinite().all(-1)
    assert torch.equal(y[~right].isnan(), torch.ones_like(y[~right], dtype=torch.bool))
    assert relative_error(y[right], expected[right]) < TOLERANCE[torch.float32]


def with_outlier(size, **options):
    """Token 5 has a key and a value of this size, and every query is along it."""
    problem = make(**{"length": 40, "degree": 2, **options})
    query, key, value = (x.clone() for x in problem.arguments)
    query[..., 1] = query[..., 1].abs() + 0.1
    key[:, :, 5], value[:, :, 5] = 0, 3.0
    key[:, :, 5, 1] = size
    return replace(problem, query=query, key=key, value=value).to(torch.float32)


@BACKENDS
@pytest.mark.parametrize("reach", [{}, {"window": 3, "sinks": 1}])
@pytest.mark.parametrize("way", [decode, lambda p, **o: carry(p, [17], **o)], ids=["decoding", "pieces"])
def test_one_outlier_among_ordinary_tokens(backend, reach, way):
    """All look at it, and each finds its value."""
    problem = with_outlier(1e13, **reach)
    y, _ = way(problem, backend=backend)
    assert relative_error(y, problem.oracle()) < TOLERANCE[torch.float32]


@BACKENDS
@pytest.mark.parametrize("way", [decode, lambda p, **o: carry(p, [17], **o)], ids=["decoding", "pieces"])
@pytest.mark.parametrize("reach", [{}, {"window": 3}, {"window": 3, "degree": None}])
def test_nothing_is_left_of_an_outlier_that_is_forgotten(backend, way, reach):
    """By a gate that forgets everything, or a window without a far part."""
    problem = with_outlier(1e13, **reach)
    if problem.degree is not None:
        problem.along["log_decay"] = torch.zeros(1, 2, 40)
        problem.along["log_decay"][..., 12] = -INF
    y, state = way(problem, backend=backend)
    assert relative_error(y[:, :, 12:], problem.oracle()[:, :, 12:]) < TOLERANCE[torch.float32]
    assert state.moments.numel() == 0 or state.moments.abs().max() < 1e3


SMALLEST = 2.0**-149  # of float32: the step of its denormal numbers


@BACKENDS
@pytest.mark.parametrize("reach", ["far", "both"])
@pytest.mark.parametrize("which", ["key", "value", "query"])
@pytest.mark.parametrize("size", [1e-20, 1e-41, 1e-44])
@pytest.mark.parametrize("way", [decode, lambda p, **o: carry(p, [17], **o)], ids=["decoding", "pieces"])
def test_tiny_and_denormal_numbers(backend, reach, which, size, way):
    """Of keys and queries nothing is lost that a weight would show, of values two of the smallest steps."""
    problem = make(batch=2, length=24, degree=3, **REACHES[reach])
    problem = replace(problem, **{which: getattr(problem, which) * size}).to(torch.float32)
    y, _ = way(problem, backend=backend)
    room = TOLERANCE[torch.float32] * problem.value.abs().max().item() + 2 * SMALLEST
    assert (y.double() - problem.oracle()).abs().max() <= room


@BACKENDS
@pytest.mark.parametrize("reach", ["far", "both"])
@pytest.mark.parametrize("way", [decode, lambda p, **o: carry(p, [37], **o)], ids=["decoding", "pieces"])
def test_values_that_cancel_leave_an_error_of_their_own_size_and_not_more(backend, reach, way):
    """Equal keys with values of 10^6 of either sign, and 1 beside them."""
    problem = make(batch=1, length=80, degree=2, **REACHES[reach])
    sign = 1 - 2 * (torch.arange(80) % 2)[:, None]
    problem = replace(problem, key=problem.key * 0, value=1e6 * sign + problem.value).to(torch.float32)
    y, _ = way(problem, backend=backend)
    assert (y.double() - problem.oracle()).abs().max() < 1e6 * TOLERANCE[torch.float32]
    even = y[:, :, 1::2]
    assert (even.double() - problem.oracle()[:, :, 1::2]).abs().max() < 1.0  # 10^6 times what float32 rounds away


# ---- half precision --------------------------------------------------------------------------------------------------


def long_problem(length, dtype):
    """Values that do not average out, which float16 could not add up: their sum is beyond 65,504 after 40 tokens."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, length, 4, generator=generator) for heads in (2, 1))
    value = 1000 + 1000 * torch.rand(1, 1, length, 2, generator=generator)
    return Problem(query.to(dtype), key.to(dtype), value.to(dtype), 2)


def check_half_precision(problem, borders, steps, backend):
    """Pieces, then single tokens: the last rows and the moments against float64 with the same rounded inputs."""
    dtype, length = problem.key.dtype, problem.length
    y, state = carry(problem.part(0, length - steps), borders, backend=backend)
    more, state = decode(problem.part(length - steps, length), state=state, backend=backend)
    assert state.tokens.tolist() == [length]
    assert finite(state)
    y = torch.cat([y[:, :, -1:], more], 2)
    rows = range(length - steps - 1, length)
    expected = [
        attention_reference(
            problem.query[:, :, t : t + 1],
            problem.key[:, :, : t + 1],
            problem.value[:, :, : t + 1],
            degree=2,
            causal=False,
        )
        for t in rows
    ]
    assert relative_error(y, torch.cat(expected, 2)) < TOLERANCE[dtype]
    _, twin = problem.to(torch.float64).solve(return_state=True, backend=backend)
    assert relative_error(state.moments, twin.moments) < 1e-6


HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@BACKENDS
@HALF
def test_half_precision(backend, dtype):
    check_half_precision(long_problem(2**13, dtype), [1000, 4000], 20, backend)


@pytest.mark.slow
@BACKENDS
@HALF
def test_half_precision_at_a_million_tokens(backend, dtype):
    check_half_precision(long_problem(10**6, dtype), range(2**17, 10**6 - 2**17, 2**17), 20, backend)


# ---- nothing, and one ------------------------------------------------------------------------------------------------

EDGES = {
    "no tokens": {"length": 0},
    "no sequences": {"batch": 0, "length": 5},
    "neither": {"batch": 0, "length": 0},
    "one token": {"length": 1},
    "one head of size 1": {"heads": 1, "head_dim": 1, "length": 20},
    "values of size 0": {"value_dim": 0, "length": 20},
    "values of size 0 that fade": {"value_dim": 0, "length": 20, "decay": "soft"},
    "values of size 1": {"value_dim": 1, "heads": 3, "kv_heads": 1, "length": 20},
    "no sequences of size 0": {"batch": 0, "value_dim": 0, "length": 5},
}


@BACKENDS
@pytest.mark.parametrize("reach", [*REACHES, "fitted"])
@pytest.mark.parametrize("edge", EDGES)
def test_nothing_and_one(backend, reach, edge):
    """In one call, in pieces, and step by step: right, and states that agree, watched as well."""
    options = {**EDGES[edge], **REACHES.get(reach, {"window": 3, "reading": "fitted"})}
    problem = make(**options)
    whole, state = problem.solve(return_state=True, backend=backend)
    with ta.watch_normalisers() as seen:
        pieces, carried = carry(problem, [0, problem.length // 2], backend=backend)
    assert (seen.calls, seen.queries, seen.unsafe) == (3, whole[..., :1].numel() or seen.queries, 0)
    assert relative_error(pieces, whole) < TOLERANCE[torch.float64]
    assert state.tokens.tolist() == carried.tokens.tolist() == [problem.length] * len(problem.key)
    assert finite(state)
    fresh = state.clone()
    nothing = problem.part(0, 0).decode_(state, backend=backend)
    assert nothing.shape == whole[:, :, :0].shape
    assert differences(state, fresh) == []
    more = make(**{**options, "length": 3, "seed": 1})
    steps, after = decode(more, state=state, backend=backend)
    assert relative_error(steps, more.solve(state=fresh, backend=backend)) < TOLERANCE[torch.float64]
    assert after.tokens.tolist() == [problem.length + 3] * len(problem.key)
    merging = problem.options.get("sinks", 0) + problem.options.get("heavy", 0) == 0
    assert not merging or finite(after.merge(fresh))
