"""Exact near, Taylor far: the definition, the law, gradients and states where the latest and first tokens are exact."""

from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import taylor_attention as ta
from kernels import EITHER, ROWS
from problems import FORKS, carry, decode, differences, errors, gradients, make, mix, one_shot
from taylor_attention.core.basis import expand
from taylor_attention.core.state import tail_size
from taylor_attention.errors import ArgumentError, NormaliserError, NormaliserWarning, StorageError
from tolerances import TOLERANCE, relative_error

EXACT = TOLERANCE[torch.float64]
LENGTH = 61
MORE = LENGTH + 9
SHORT = 37  # where each test takes many steps

KINDS = {
    "plain": {},
    "groups": {"heads": 6, "kv_heads": 2},
    "wide values": {"value_dim": 11},
    "left padding": {"mask": "left"},
    "right padding": {"mask": "right"},
    "holes": {"mask": "holes"},
    "a hidden row": {"mask": "row 0 hidden"},
    "soft decay": {"decay": "soft"},
    "strong decay": {"decay": "strong"},
    "resets": {"decay": "resets"},
    "resets and holes": {"decay": "resets", "mask": "holes"},
    "decay and holes": {"decay": "hard", "mask": "holes"},
    "decay, padding, groups": {"decay": "soft", "mask": "left", "heads": 4, "kv_heads": 2},
}

REACHES = [  # window, sinks, degree
    (1, 0, 2),
    (3, 0, 2),
    (16, 0, 2),
    (17, 0, 1),
    (50, 0, 3),
    (LENGTH, 0, 2),
    (MORE, 0, 0),
    (0, 1, 2),
    (0, 4, 3),
    (0, MORE, 2),
    (3, 4, 2),
    (16, 1, 3),
    (17, 4, 0),
    (50, 1, 1),
    (LENGTH, 4, 2),
    (MORE, MORE, 3),
    (1, 0, None),
    (3, 4, None),
    (16, 0, None),
    (17, 1, None),
    (0, 4, None),
    (50, 4, None),
    (LENGTH, 1, None),
]


CASES = [  # each kind with every third reach
    (kind, reach) for i, kind in enumerate(KINDS) for j, reach in enumerate(REACHES) if (i + j) % 3 == 0
]


def name(x):
    return "W{} S{} D{}".format(*x) if isinstance(x, tuple) else str(x)


def named(*reaches):
    return pytest.mark.parametrize("reach", reaches, ids=name)


def paired(cases):
    return pytest.mark.parametrize(("kind", "reach"), cases, ids=name)


def problem_of(kind, reach, **sizes):
    window, sinks, degree = reach
    options = {"batch": 2, "length": LENGTH, "window": window, "sinks": sinks, "degree": degree}
    return make(**{**options, **KINDS[kind], **sizes})


@lru_cache(maxsize=1024)
def solved(kind, reach):
    """A problem that float32 holds exactly, and its answer by the definition: computed once."""
    problem = problem_of(kind, reach, dtype=torch.float32)
    return problem, problem.oracle()


# ---- what a state holds ----------------------------------------------------------------------------------------------


def near_of(state):
    """Keys, [v, 1] and log decay since of the exact tokens, [B, Hkv, ..., W + S]: oldest first, then sinks."""
    near, window = state.near, state.window
    came = (state.tokens - state.sinks).clamp(min=0)[:, None]  # to the ring, the n-th in slot n % window
    order = (came + torch.arange(window)) % max(1, window)

    def line_up(ring, sinks):
        index = order.view(len(order), *[1] * (ring.ndim - 2), window).expand_as(ring)
        return torch.cat([ring.gather(-1, index), sinks], -1)

    key, value = line_up(near.key, near.sink_key), line_up(near.value, near.sink_value)
    there = value[..., -1, :]  # what empty slots hold says nothing
    since = state.log_decay[..., None] - line_up(near.log_decay, near.sink_log_decay)
    return key * there[..., None, :], value, since * there


def held(problem):
    """The same by the definition, after the moments of all other tokens."""
    key, value, length = problem.key.double(), problem.value.double(), problem.length
    window, sinks = problem.options["window"], problem.options["sinks"]
    shown = problem.along.get("key_padding_mask", torch.ones(len(key), length, dtype=torch.bool))
    gates = problem.along.get("log_decay", torch.zeros(key.shape[:3])).double().clamp(min=-1000)
    gates = gates.masked_fill(~shown[:, None], 0)
    since = F.pad(gates[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
    columns = torch.cat([value, torch.ones_like(value[..., :1])], -1)

    rank = shown.cumsum(-1)[..., None] - 1  # [B, T, 1]
    recent = (rank == shown.sum(-1)[:, None, None] - window + torch.arange(window)) & (rank >= sinks)  # [B, T, W]
    place = torch.cat([recent, rank == torch.arange(sinks)], -1) & shown[..., None]  # [B, T, W + S]
    far = (shown & ~place.any(-1))[:, None]
    place = place.double()[:, None]
    features = key[..., :0] if problem.degree is None else expand(key, problem.degree)
    moments = (columns * (since.exp() * far)[..., None]).mT @ features
    return moments, key.mT @ place, columns.mT @ place, (since[:, :, None] @ place)[:, :, 0]


def assert_same(found, expected, tolerance=EXACT):
    """The same outputs, and states that say the same of the same tokens."""
    (y, state), (expected_y, expected_state) = found, expected
    assert relative_error(y, expected_y) < tolerance
    assert relative_error(state.moments, expected_state.moments) < tolerance
    assert relative_error(state.log_decay, expected_state.log_decay) < tolerance
    assert errors(near_of(state), near_of(expected_state)) < tolerance
    assert state.tokens.tolist() == expected_state.tokens.tolist()


@EITHER
@named((16, 4, 2), (16, 4, None), (0, 4, 2), (16, 0, 2))
def test_a_state_has_the_same_size_after_any_number_of_tokens(reach):
    problem = problem_of("plain", reach, length=70)
    empty = problem.new_state().nbytes
    _, state = problem.part(0, 7).solve(return_state=True)
    sizes = [state.nbytes]
    for token in range(7, 70):
        problem.part(token, token + 1).decode_(state)
        sizes.append(state.nbytes)
    sizes.append(problem.solve(return_state=True)[1].nbytes)
    assert set(sizes) == {empty}


# ---- the definition --------------------------------------------------------------------------------------------------


@ROWS
@paired(CASES)
def test_one_call_and_its_state_are_the_definition(backend, kind, reach):
    problem, expected = solved(kind, reach)
    y, state = problem.to(torch.float64).solve(backend=backend, return_state=True)
    assert relative_error(y, expected) < EXACT
    assert errors((state.moments, *near_of(state)), held(problem)) < EXACT
    assert state.tokens.tolist() == problem.along.get("key_padding_mask", torch.ones(2, LENGTH)).sum(-1).tolist()
    assert (state.window, state.sinks, state.degree) == reach


SINGLE = [
    ("plain", (3, 0, 2)),
    ("groups", (17, 4, 0)),
    ("wide values", (16, 1, 3)),
    ("holes", (17, 1, None)),
    ("soft decay", (50, 1, 1)),
    ("strong decay", (3, 4, 2)),
    ("decay and holes", (0, 4, 2)),
    ("decay and holes", (MORE, 0, 0)),
    ("decay, padding, groups", (16, 4, 2)),
    ("decay, padding, groups", (16, 0, None)),
]


@EITHER
@paired(SINGLE)
@pytest.mark.parametrize("chunk", [None, 16])
def test_one_call_in_single_precision(kind, reach, chunk):
    problem, expected = solved(kind, reach)
    assert relative_error(problem.solve(chunk_size=chunk), expected) < TOLERANCE[torch.float32]


@ROWS
@paired([*SINGLE, ("resets", (17, 4, 2))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_decoding_is_the_definition(backend, kind, reach, dtype):
    problem, expected = solved(kind, reach)
    y, _ = decode(problem.to(dtype), backend=backend)
    assert relative_error(y, expected) < TOLERANCE[dtype]


@ROWS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("window", "decay"), [(1, "soft"), (17, None), (64, "soft"), (100, None), (257, "soft")])
@pytest.mark.parametrize("head_dim", [1, 9, 16])
def test_sizes_beyond_one_tile(backend, dtype, decay, window, head_dim):
    sizes = {"heads": 4, "kv_heads": 2, "length": 300, "head_dim": head_dim, "value_dim": 10}
    problem = make(**sizes, window=window, sinks=3, decay=decay, dtype=dtype)
    assert relative_error(problem.solve(backend=backend), problem.oracle()) < TOLERANCE[dtype]


@ROWS
@pytest.mark.parametrize("length", [0, 1, 2])
@named((1, 0, 2), (3, 4, 3), (0, 2, 2), (3, 0, None), (0, 1, None))
def test_few_tokens(backend, length, reach):
    problem = problem_of("soft decay", reach, length=length)
    y, state = problem.solve(backend=backend, return_state=True)
    assert relative_error(y, problem.oracle()) < EXACT
    assert state.tokens.tolist() == [length] * 2


@EITHER
@named((16, 4, 2), (16, 4, None), (MORE, 0, 2))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", [lambda p: p.solve(), lambda p: decode(p)[0]], ids=["one call", "decoding"])
def test_half_precision_rounds_only_the_output(reach, dtype, way):
    problem = problem_of("groups", reach, dtype=dtype)
    y = way(problem)
    assert y.dtype == dtype
    assert relative_error(y, problem.oracle()) < TOLERANCE[dtype]


LAYOUTS = {
    "transposed view": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # [B, T, H, d] in memory
    "tokens last": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
}


@ROWS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", [lambda p, **o: p.solve(**o), lambda p, **o: decode(p, **o)[0]], ids=["call", "decode"])
def test_any_strides(backend, layout, way):
    problem = problem_of("decay, padding, groups", (16, 4, 2))
    query, key, value = map(LAYOUTS[layout], problem.arguments)
    assert not query.is_contiguous()
    y = way(replace(problem, query=query, key=key, value=value), backend=backend)
    assert relative_error(y, problem.oracle()) < EXACT


@EITHER
@pytest.mark.parametrize("series", [ta.series.COSH, ta.series.polynomial([3, 1, 0.5, -0.25])], ids=["cosh", "user's"])
@pytest.mark.parametrize("way", [lambda p: p.solve(), lambda p: decode(p)[0]], ids=["one call", "decoding"])
def test_the_series_is_that_of_the_far_tokens_alone(series, way):
    problem = problem_of("soft decay", (5, 2, 3), series=series, scale=0.4, radius=0.9)
    assert relative_error(way(problem), problem.oracle()) < EXACT


# ---- what it is for --------------------------------------------------------------------------------------------------

NO_WORSE = 1e-6  # ten roundings of float32: the window is plain softmax attention, of scores up to 2


@EITHER
@pytest.mark.parametrize("sizes", [{}, {"heads": 6, "kv_heads": 2}], ids=["one each", "groups"])
@named((LENGTH, 0, 2), (MORE, 0, 2), (LENGTH, 4, 3), (0, LENGTH, 2), (MORE, 0, None), (17, MORE, None))
@pytest.mark.parametrize("way", [lambda p: p.solve(), lambda p: decode(p)[0]], ids=["one call", "decoding"])
def test_a_window_over_everything_is_softmax_attention(sizes, reach, way):
    problem = problem_of("plain", reach, **sizes, radius=2.0, dtype=torch.float32)
    expected = F.scaled_dot_product_attention(*problem.to(torch.float64).arguments, is_causal=True, enable_gqa=True)
    assert relative_error(way(problem), expected) < NO_WORSE


@EITHER
@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("options", [{}, {"decay": "hard", "mask": "holes"}, {"causal": False}], ids=str)
def test_without_window_and_sinks_nothing_changes_by_a_bit(degree, options):
    pure = make(batch=2, length=40, degree=degree, dtype=torch.float32, **options)
    expected, after = pure.solve(return_state=True)
    y, state = replace(pure, options={**pure.options, "window": 0, "sinks": 0}).solve(return_state=True)
    assert torch.equal(y, expected)
    assert differences(state, after) == []
    assert state.near is None


@EITHER
@pytest.mark.parametrize("step", [1, 3])
def test_without_window_and_sinks_decoding_does_not_change_by_a_bit(step):
    pure = make(batch=2, length=40, decay="soft", dtype=torch.float32)
    expected, after = decode(pure, step)
    y, state = decode(replace(pure, options={"window": 0, "sinks": 0}), step)
    assert torch.equal(y, expected)
    assert differences(state, after) == []


def haystack(place, **near):
    """One key of score 12 among 99 of score 0, which the last query looks for: its value is 1, the others' are 0."""
    query, key, value = (torch.zeros(1, 1, 100, size) for size in (2, 2, 1))
    query[..., -1, 0], key[:, :, place, 0], value[:, :, place] = 1, 12, 1
    return replace(make(scale=1.0, **near), query=query, key=key, value=value)


@EITHER
@pytest.mark.parametrize("place", [0, 3, 84, 99])
@pytest.mark.parametrize("degree", [None, 2])
@pytest.mark.parametrize("way", [lambda p: p.solve(), lambda p: decode(p)[0]], ids=["one call", "decoding"])
def test_a_needle_near_or_first_is_found(place, degree, way):
    found = way(haystack(place, window=16, sinks=4, degree=degree))[0, 0, -1].item()
    assert found == pytest.approx(1, abs=100 * 2.718281828**-12)


@EITHER
@pytest.mark.parametrize("place", [0, 84])
def test_the_series_alone_does_not_find_the_needle(place):
    """f(12) = 85 against 99 keys of f(0) = 1."""
    assert haystack(place, degree=2).solve()[0, 0, -1].item() == pytest.approx(85 / 184)


@EITHER
@named((5, 2, 2), (MORE, 0, 2), (0, 3, 2), (5, 2, None))
@pytest.mark.parametrize("highest", [150, -100])
@pytest.mark.parametrize("way", [lambda p: p.solve(), lambda p: decode(p)[0]], ids=["one call", "decoding"])
def test_large_scores_do_not_overflow(reach, highest, way):
    """Whole numbers from -150 on, which are scores without rounding; exp of 89 is too large for float32."""
    problem = problem_of("plain", reach, head_dim=1, scale=1.0)
    key = torch.randint(-150, highest + 1, problem.key.shape, generator=torch.Generator().manual_seed(1))
    problem = replace(problem, query=torch.ones_like(problem.query), key=key.double()).to(torch.float32)
    assert relative_error(way(problem), problem.oracle()) < TOLERANCE[torch.float32]


@EITHER
@named((5, 2, 2), (5, 2, None))
def test_gradients_of_large_scores_do_not_overflow(reach):
    """exp of 710 is too large for float64."""
    problem = problem_of("plain", reach, head_dim=1, scale=1.0)
    key = torch.randint(-1000, 1001, problem.key.shape, generator=torch.Generator().manual_seed(1))
    problem = replace(problem, query=torch.ones_like(problem.query), key=key.double())
    expected = gradients(problem, lambda p: p.oracle())
    assert errors(gradients(problem, lambda p: p.solve()), expected) < 10 * EXACT


@EITHER
@pytest.mark.parametrize("mask", ["left", "right", "holes"])
@named((16, 4, 2), (3, 1, 3), (16, 4, None), (0, 4, 2), (16, 0, 2))
@pytest.mark.parametrize("way", [one_shot, decode, lambda p: carry(p, [3, 20])], ids=["one call", "decode", "pieces"])
def test_hidden_tokens_count_nowhere(reach, mask, way):
    """Not even as places in the window: leaving them out gives the same."""
    problem = problem_of("soft decay", reach, mask=mask, batch=1)
    shown = problem.along["key_padding_mask"][0]
    y, state = way(problem)
    alone = problem.each(lambda x: x[:, :, shown])
    assert not y[:, :, ~shown].any()
    assert_same((y[:, :, shown], state), one_shot(replace(alone, along={"log_decay": alone.along["log_decay"]})))


# ---- the law ---------------------------------------------------------------------------------------------------------


def there_and_back(problem):
    """Decoded, prefilled in pieces, decoded again: borders inside the ring, inside the tail, and behind both."""
    return mix(problem, [19, 21, 22, 33], [True, False, True, False, True])


WAYS = {
    "chunks of 5": lambda p: p.solve(return_state=True, chunk_size=5),
    "the library's chunks": lambda p: p.solve(return_state=True),
    "from an empty state": lambda p: p.solve(return_state=True, state=p.new_state()),
    "split in two": lambda p: carry(p, [17]),
    "split in many, chunked": lambda p: carry(p, [0, 1, 2, 5, 22, 22, 23, 36], chunk_size=4),
    "pieces of 1": lambda p: carry(p, range(1, 20)),
    "token by token": decode,
    "three tokens at a time": lambda p: decode(p, 3),
    "all tokens at once, in place": lambda p: decode(p, SHORT),
    "prefill, then decode": lambda p: mix(p, [23], [False, True]),
    "decode, prefill, decode": there_and_back,
}

LAW = [
    ("plain", (17, 4, None)),
    ("groups", (3, 4, 2)),
    ("wide values", (16, 0, 1)),
    ("left padding", (16, 4, 2)),
    ("right padding", (17, 1, None)),
    ("holes", (3, 1, 3)),
    ("a hidden row", (1, 4, 2)),
    ("soft decay", (0, 4, None)),
    ("strong decay", (3, 0, 0)),
    ("resets and holes", (3, 2, 2)),
    ("decay and holes", (0, 1, 2)),
    ("decay, padding, groups", (30, 4, 3)),
    ("decay, padding, groups", (MORE, MORE, 2)),
]


@EITHER
@paired(LAW)
@pytest.mark.parametrize("way", WAYS)
def test_the_law(way, kind, reach):
    problem = problem_of(kind, reach, length=SHORT)
    assert_same(WAYS[way](problem), one_shot(problem))


@EITHER
@named((16, 4, 2), (3, 1, None))
@pytest.mark.parametrize("way", WAYS)
def test_the_law_in_single_precision(way, reach):
    problem = problem_of("decay and holes", reach, length=SHORT, dtype=torch.float32)
    assert_same(WAYS[way](problem), one_shot(problem), TOLERANCE[torch.float32])


@EITHER
@named((4, 3, 2), (4, 3, None))
@given(data=st.data())
@settings(max_examples=10)
def test_any_split_of_any_kind_of_step(reach, data):
    """Pieces of any length, each by attention or in place, give what one call gives."""
    length = 20
    problem = problem_of("decay and holes", reach, length=length)
    borders = sorted(data.draw(st.lists(st.integers(0, length), max_size=6), label="borders"))
    in_place = data.draw(
        st.lists(st.booleans(), min_size=len(borders) + 1, max_size=len(borders) + 1), label="in place"
    )
    assert_same(mix(problem, borders, in_place), one_shot(problem))


@EITHER
@named((16, 4, 2), (3, 2, None))
@pytest.mark.parametrize("length", [0, 1, 30])
def test_attention_never_changes_the_state_it_is_given(reach, length):
    problem = problem_of("decay and holes", reach)
    _, state = decode(problem.part(0, 19))
    before = state.clone()
    _, after = problem.part(19, 19 + length).solve(state=state, return_state=True)
    decode(problem.part(19, LENGTH), state=after)  # in place: what both shared would show
    assert differences(state, before) == []


# ---- merging ---------------------------------------------------------------------------------------------------------

MERGED = [
    ("plain", (3, 0, 2)),
    ("groups", (50, 0, 3)),
    ("holes", (16, 0, 2)),
    ("soft decay", (16, 0, None)),
    ("decay and holes", (17, 0, 2)),
    ("resets", (16, 0, 2)),
]


@EITHER
@paired(MERGED)
@pytest.mark.parametrize("border", [0, 2, 18, 35])
@pytest.mark.parametrize(
    "way", [lambda p: p.solve(return_state=True), lambda p: decode(p, 3)], ids=["attention", "rings"]
)
def test_merged_halves_are_the_whole(kind, reach, border, way):
    """Halves shorter and longer than the window, made in one call or with their rings turned."""
    problem = problem_of(kind, reach, length=SHORT)
    parts = problem.part(0, border), problem.part(border, SHORT)
    first, second = (way(part)[1] if part.length else part.new_state() for part in parts)
    y, expected = one_shot(problem)
    assert_same((y, first.merge(second)), (y, expected))


@EITHER
@named((16, 0, 2), (16, 0, None))
@pytest.mark.parametrize("borders", [(5, 9), (5, 30), (30, 33), (20, 45)], ids=str)
def test_merging_is_associative_and_goes_on(reach, borders):
    """The fourth part continues the merged states of three."""
    problem = problem_of("soft decay", reach)
    cuts = pairwise([0, *borders, 50])
    a, b, c = (problem.part(*cut).solve(return_state=True)[1] for cut in cuts)
    y, state = one_shot(problem)
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c))):
        rest, after = problem.part(50, LENGTH).solve(state=merged, return_state=True)
        assert_same((rest, after), (y[:, :, 50:], state))


@named((16, 1, 2), (0, 4, None))
def test_states_with_sinks_are_not_merged(reach):
    """The first tokens of the second are not the first of the whole, and stand nowhere else."""
    state = problem_of("plain", reach).new_state()
    with pytest.raises(ArgumentError, match="^later: expected "):
        state.merge(state.clone())


@named((17, 0, 2), (0, 0, 2), (16, 0, None), (16, 0, 3))
def test_states_of_another_reach_are_not_merged(reach):
    state, other = (problem_of("plain", near).new_state() for near in [(16, 0, 2), reach])
    with pytest.raises(ArgumentError, match="^later: expected a state of "):
        state.merge(other)


# ---- copies and files ------------------------------------------------------------------------------------------------


@EITHER
@named((16, 4, 2), (3, 1, None))
@pytest.mark.parametrize("length", [3, 21])
@pytest.mark.parametrize("fork", FORKS)
def test_a_copy_goes_on_bit_for_bit_and_its_original_stays(fork, length, reach, tmp_path):
    problem = problem_of("decay and holes", reach, length=SHORT, dtype=torch.float32)
    _, state = decode(problem.part(0, length))
    copy, before = FORKS[fork](state, tmp_path), state.clone()
    y, after = decode(problem.part(length, SHORT), state=copy)
    expected, whole = decode(problem)
    assert torch.equal(y, expected[:, :, length:])
    assert differences(after, whole) == []
    assert differences(state, before) == []


@EITHER
@named((16, 4, 2), (3, 1, None))
@pytest.mark.parametrize("length", [2, 21])
def test_a_selected_beam_goes_on_as_if_it_had_been_alone(reach, length):
    problem, rows = problem_of("decay and holes", reach, batch=3, length=SHORT), torch.tensor([2, 0, 2])
    chosen = problem.each(lambda x: x[rows])
    chosen = replace(chosen, along={name: x[rows] for name, x in problem.along.items()})
    _, state = decode(problem.part(0, length))
    y, after = decode(chosen.part(length, SHORT), state=state.select(rows))
    expected, whole = decode(problem)
    assert torch.equal(y, expected[rows][:, :, length:])
    assert differences(after, whole.select(rows)) == []


@EITHER
def test_a_state_changes_its_precision():
    problem = problem_of("soft decay", (16, 4, 2), dtype=torch.float32)
    _, state = decode(problem.part(0, 30))
    wide = state.to(dtype=torch.float64)
    assert {x.dtype for x in wide.tensors().values()} == {torch.float64, torch.int64}
    assert differences(wide.to(dtype=torch.float32), state) == []
    y, _ = decode(problem.to(torch.float64).part(30, LENGTH), state=wide)
    assert relative_error(y, problem.oracle()[:, :, 30:]) < TOLERANCE[torch.float32]


def test_a_detached_state_has_no_history():
    _, state = problem_of("soft decay", (16, 4, 2)).recorded().solve(return_state=True)
    assert state.near.key.requires_grad
    assert state.near.sink_value.requires_grad
    assert not any(x.requires_grad for x in state.detach().tensors().values())


@pytest.mark.parametrize(
    "change", [lambda x: None, lambda x: x[..., 1:], lambda x: x.half()], ids=["gone", "cut", "half"]
)
@pytest.mark.parametrize("tensor", ["key", "value", "log_decay", "sink_key", "sink_value", "sink_log_decay"])
def test_a_damaged_near_part_is_refused(tensor, change):
    _, state = problem_of("plain", (16, 4, 2)).solve(return_state=True)
    original = getattr(state.near, tensor)
    (key,) = (key for key, x in state.tensors().items() if x is original)
    tensors = {**state.tensors(), key: change(original)}
    with pytest.raises(StorageError, match="^state: expected the tensors and metadata of a State"):
        ta.State.from_tensors({key: x for key, x in tensors.items() if x is not None}, state.metadata())


# ---- packed sequences ------------------------------------------------------------------------------------------------

LENGTHS = [5, 0, 17, 3, 9, 1, 24, 0]
BORDERS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
CUTS = list(pairwise(BORDERS.tolist()))
PACKED = [
    ("plain", (3, 0, 2)),
    ("groups", (16, 4, 2)),
    ("holes", (4, 1, 3)),
    ("soft decay", (3, 1, None)),
    ("soft decay", (16, 0, 2)),
    ("resets", (4, 0, None)),
    ("resets", (3, 2, 2)),
    ("decay and holes", (0, 2, 2)),
    ("decay and holes", (16, 4, None)),
]


def packed(kind, reach, **sizes):
    return problem_of(kind, reach, batch=1, length=int(BORDERS[-1]), **sizes)


def one_by_one(problem, states=None):
    """Each sequence alone; outputs side by side, states as a list."""
    states = [None] * len(CUTS) if states is None else [states.select(torch.tensor([i])) for i in range(len(CUTS))]
    found = [problem.part(*cut).solve(return_state=True, state=s) for cut, s in zip(CUTS, states, strict=True)]
    return torch.cat([y for y, _ in found], 2), [state for _, state in found]


def assert_same_as_each(state, states):
    assert relative_error(state.moments, torch.cat([s.moments for s in states])) < EXACT
    assert errors(near_of(state), [torch.cat(x) for x in zip(*map(near_of, states), strict=True)]) < EXACT
    assert relative_error(state.log_decay, torch.cat([s.log_decay for s in states])) < EXACT
    assert state.tokens.tolist() == [count for s in states for count in s.tokens.tolist()]


@EITHER
@paired(PACKED)
@pytest.mark.parametrize("chunk", [None, 4])
def test_packed_sequences_are_what_they_are_alone(kind, reach, chunk):
    problem = packed(kind, reach)
    y, state = problem.solve(cu_seqlens=BORDERS, return_state=True, chunk_size=chunk)
    expected, states = one_by_one(problem)
    assert relative_error(y, expected) < EXACT
    assert_same_as_each(state, states)


@EITHER
@paired(PACKED)
def test_packed_sequences_go_on_from_their_states(kind, reach):
    problem, before = packed(kind, reach), packed(kind, reach, seed=1)
    _, start = before.solve(cu_seqlens=BORDERS, return_state=True)
    y, state = problem.solve(cu_seqlens=BORDERS, state=start, return_state=True)
    expected, states = one_by_one(problem, start)
    assert relative_error(y, expected) < EXACT
    assert_same_as_each(state, states)


@EITHER
@paired(PACKED)
def test_packed_sequences_are_decoded_on_together(kind, reach):
    """Nine tokens more of each: what the rings held goes to the moments."""
    _, start = packed(kind, reach).solve(cu_seqlens=BORDERS, return_state=True)
    _, each = one_by_one(packed(kind, reach))
    more = problem_of(kind, reach, batch=len(CUTS), length=9, seed=2)
    y, state = decode(more, state=start)
    rows = [replace(more.each(lambda x, i=i: x[i : i + 1]), along=row(more, i)) for i in range(len(CUTS))]
    alone = [decode(part, state=s) for part, s in zip(rows, each, strict=True)]
    assert relative_error(y, torch.cat([y for y, _ in alone])) < EXACT
    assert_same_as_each(state, [s for _, s in alone])


def row(problem, index):
    return {name: x[index : index + 1] for name, x in problem.along.items()}


@EITHER
@pytest.mark.parametrize("kind", ["plain", "soft decay"])
@named((3, 0, 2), (16, 0, None))
def test_packed_states_are_merged_like_each_alone(kind, reach):
    """Sequences of other lengths in one batch: each has its own number of tokens in the window."""
    first, second = packed(kind, reach), packed(kind, reach, seed=1)
    _, a = first.solve(cu_seqlens=BORDERS, return_state=True)
    _, b = second.solve(cu_seqlens=BORDERS, return_state=True)
    merged = [x.merge(y) for x, y in zip(one_by_one(first)[1], one_by_one(second)[1], strict=True)]
    assert_same_as_each(a.merge(b), merged)


@EITHER
@named((3, 1, 2), (16, 0, 2), (16, 4, None))
@pytest.mark.parametrize(
    "change", [lambda x: x + 1, lambda x: x * torch.nan, lambda x: x * 1e30], ids=["1", "nan", "big"]
)
def test_nothing_leaks_from_one_packed_sequence_to_another(reach, change):
    problem = packed("soft decay", reach, dtype=torch.float32)
    inside = slice(*CUTS[2])
    others = [i for i in range(problem.length) if not inside.start <= i < inside.stop]

    def altered(x):
        x = x.clone()
        x[:, :, inside] = change(x[:, :, inside])
        return x

    query, key, value = map(altered, problem.arguments)
    changed = replace(problem, query=query, key=key, value=value)
    y, z = (p.solve(cu_seqlens=BORDERS) for p in (problem, changed))
    assert torch.equal(y[:, :, others], z[:, :, others])
    assert not torch.equal(y[:, :, inside], z[:, :, inside])


@EITHER
@named((3, 1, 2), (16, 0, 2), (16, 4, None))
@pytest.mark.parametrize("change", [lambda x: x + 1, lambda x: x * 1e8], ids=["1", "big"])
def test_nothing_leaks_from_one_packed_sequence_to_the_state_of_another(reach, change):
    problem = packed("soft decay", reach, dtype=torch.float32)
    sequences = torch.tensor([i for i in range(len(CUTS)) if i != 2])
    key, value = problem.key.clone(), problem.value.clone()
    for x in (key, value):
        x[:, :, slice(*CUTS[2])] = change(x[:, :, slice(*CUTS[2])])
    _, state = problem.solve(cu_seqlens=BORDERS, return_state=True)
    _, other = replace(problem, key=key, value=value).solve(cu_seqlens=BORDERS, return_state=True)
    assert differences(state.select(sequences), other.select(sequences)) == []
    assert differences(state, other) != []


# ---- gradients -------------------------------------------------------------------------------------------------------


LEARNT = [
    ("plain", (1, 0, 2)),
    ("plain", (30, 4, 1)),
    ("groups", (3, 4, 2)),
    ("wide values", (7, 1, 3)),
    ("holes", (0, 2, 2)),
    ("holes", (7, 0, None)),
    ("a hidden row", (3, 4, 2)),
    ("resets", (7, 1, None)),
    ("resets and holes", (3, 1, 2)),
    ("decay and holes", (7, 1, 3)),
    ("decay and holes", (0, 2, None)),
    ("decay, padding, groups", (3, 4, 2)),
    ("decay, padding, groups", (30, 0, 2)),
]


@EITHER
@paired(LEARNT)
@pytest.mark.parametrize("chunk", [None, 8])
def test_gradients_are_those_of_the_definition(kind, reach, chunk):
    problem = problem_of(kind, reach, length=23)
    expected = gradients(problem, lambda p: p.oracle())
    assert errors(gradients(problem, lambda p: p.solve(chunk_size=chunk)), expected) < 10 * EXACT


@EITHER
@paired(LEARNT)
@pytest.mark.parametrize("borders", [[11], [2, 4, 9]], ids=str)
@pytest.mark.parametrize("alone", [False, True], ids=["all pieces", "the last piece alone"])
def test_gradients_go_through_carried_states(kind, reach, borders, alone):
    """Through the moments, the window and the sinks to pieces whose own outputs may not count at all."""
    problem, since = problem_of(kind, reach, length=23), borders[-1] if alone else 0
    expected = gradients(problem, lambda p: p.oracle(), since)
    assert errors(gradients(problem, lambda p: carry(p, borders)[0], since), expected) < 10 * EXACT


@EITHER
@pytest.mark.parametrize("kind", ["plain", "decay and holes"])
@named((7, 0, 2), (7, 0, None), (16, 0, 2))
def test_gradients_go_through_merged_states(kind, reach):
    problem = problem_of(kind, reach, length=30)

    def merged(p):
        first, second = (p.part(*cut).solve(return_state=True)[1] for cut in [(0, 10), (10, 22)])
        y = p.part(22, 30).solve(state=first.merge(second))
        return torch.cat([y.new_zeros(*y.shape[:2], 22, y.shape[3]), y], 2)

    expected = gradients(problem, lambda p: p.oracle(), 22)
    assert errors(gradients(problem, merged, 22), expected) < 10 * EXACT


@EITHER
@pytest.mark.parametrize("kind", ["plain", "decay, padding, groups"])
@named((3, 4, 2), (7, 1, 3), (7, 2, None))
def test_gradients_in_single_precision(kind, reach):
    problem = problem_of(kind, reach, length=40, dtype=torch.float32)
    expected = gradients(problem.to(torch.float64), lambda p: p.oracle())
    assert errors(gradients(problem, lambda p: carry(p, [20])[0]), expected) < TOLERANCE[torch.float32]


@EITHER
@pytest.mark.parametrize("kind", ["plain", "decay and holes"])
@named((3, 2, 2), (16, 0, 2), (3, 1, None))
def test_gradients_of_packed_sequences_are_those_of_each_alone(kind, reach):
    problem = packed(kind, reach)
    expected = gradients(problem, lambda p: one_by_one(p)[0])
    found = gradients(problem, lambda p: p.solve(cu_seqlens=BORDERS, chunk_size=4))
    assert errors(found, expected) < 10 * EXACT


@EITHER
@named((3, 2, 2), (2, 1, 3))
@pytest.mark.parametrize("decay", [None, "soft"])
def test_gradcheck_of_the_state(reach, decay):
    """By each tensor of the state before, of the outputs and each tensor of the state after."""
    sizes = {"batch": 1, "head_dim": 2, "value_dim": 2, "decay": decay}
    problem = problem_of("plain", reach, length=4, **sizes).recorded()
    _, start = problem_of("plain", reach, length=7, seed=1, **sizes).solve(return_state=True)
    near = start.near
    given = (start.sums, near.key, near.value[:, :, :-1], near.sink_key, near.sink_value[:, :, :-1])
    leaves = [x.detach().clone().requires_grad_() for x in given]

    def answer(sums, key, value, sink_key, sink_value, query, *inputs):
        (new_key, new_value), gates = inputs[:2], dict(zip(problem.along, inputs[2:], strict=True))
        columns = [torch.cat([x, y[:, :, -1:]], 2) for x, y in ((value, near.value), (sink_value, near.sink_value))]
        before = replace(near, key=key, value=columns[0], sink_key=sink_key, sink_value=columns[1])
        now = replace(problem, query=query, key=new_key, value=new_value, along=gates)
        y, after = now.solve(state=replace(start, sums=sums, near=before), return_state=True, chunk_size=3)
        return y, after.moments, *near_of(after)

    assert torch.autograd.gradcheck(answer, (*leaves, *problem.inputs), fast_mode=True)


@EITHER
@pytest.mark.parametrize("wanted", range(4))
def test_gradients_of_one_input_alone(wanted):
    problem = problem_of("soft decay", (5, 2, 2), length=23)
    expected = gradients(problem, lambda p: p.solve())

    def only(p):
        inputs = [x if i == wanted else x.detach() for i, x in enumerate(p.inputs)]
        return replace(p, query=inputs[0], key=inputs[1], value=inputs[2], along={"log_decay": inputs[3]}).solve()

    pairs = zip(gradients(problem, only), expected, strict=True)
    assert [torch.equal(f, e * (i == wanted)) for i, (f, e) in enumerate(pairs)] == [True] * 4


def saved_bytes(length, window):
    """Bytes that one call keeps for its backward, each memory counted once."""
    sizes = {"heads": 2, "head_dim": 16, "value_dim": 16, "dtype": torch.float32}
    problem = make(length=length, window=window, sinks=4, **sizes).recorded()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        problem.solve(return_state=True)
    return sum(kept.values())


@EITHER
def test_activations_do_not_grow_with_the_window():
    """Nothing of size tokens x window waits for the backward pass: rows of numbers per token and head only."""
    per_token = (saved_bytes(768, 256) - saved_bytes(512, 256)) / 256 / 2 / 4
    assert per_token < 12 * (16 + 16)
    assert saved_bytes(768, 256) < 1.5 * saved_bytes(768, 8)


# ---- numbers at the edge ---------------------------------------------------------------------------------------------

BAD = [float("nan"), float("inf"), float("-inf")]
SINK, LATER = (1, 0, 1), (1, 0, 12)  # sequence, key/value head, token
SPOILED = [
    ((5, 2, 2), LATER),
    ((5, 2, 2), SINK),
    ((5, 2, None), LATER),
    ((50, 0, 2), LATER),
    ((0, 2, None), SINK),
]


def spoil(problem, which, place, bad):
    """One number of one token replaced."""
    x = getattr(problem, which).clone()
    x[(*place, 1)] = bad
    return replace(problem, **{which: x})


def reached(problem, which, place):
    """The rows that see the spoiled token, [B, Hq, T]; query heads 0 and 1 share the key/value head 0."""
    rows = torch.zeros(problem.query.shape[:3], dtype=torch.bool)
    sequence, head, token = place
    forgotten = problem.degree is None and token >= problem.options["sinks"]
    stop = token + problem.options["window"] if forgotten else problem.length
    if which == "query":
        rows[place] = True
    else:
        rows[sequence, 2 * head : 2 * head + 2, token:stop] = True
    return rows


@EITHER
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize(("reach", "place"), SPOILED, ids=name)
@pytest.mark.parametrize("chunk", [None, 4])
def test_what_is_not_finite_spoils_the_rows_that_see_it_and_no_other_bit(which, bad, place, reach, chunk):
    problem = problem_of("plain", reach, batch=3, heads=4, kv_heads=2, length=24)
    clean, y = (p.solve(chunk_size=chunk) for p in (problem, spoil(problem, which, place, bad)))
    rows = reached(problem, which, place)
    assert torch.equal(y.isnan(), rows[..., None].expand_as(y))
    assert torch.equal(y[~rows], clean[~rows])


@EITHER
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("reach", "place"), SPOILED, ids=name)
@pytest.mark.parametrize("way", [decode, lambda p: carry(p, [3, 14], chunk_size=4)], ids=["decoding", "pieces"])
def test_a_query_that_is_not_finite_spoils_its_row_and_no_bit_of_a_state(bad, place, reach, way):
    """Keys and values that are not are refused where a state would hold them: tests/reliability/test_ranges.py."""
    problem = problem_of("plain", reach, batch=3, heads=4, kv_heads=2, length=24)
    (y, state), (clean, after) = way(spoil(problem, "query", place, bad)), way(problem)
    rows = reached(problem, "query", place)
    assert torch.equal(y.isnan(), rows[..., None].expand_as(y))
    assert torch.equal(y[~rows], clean[~rows])
    assert differences(state, after) == []


@EITHER
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", ["key", "value"])
def test_what_left_the_window_and_is_not_summed_is_forgotten(which, bad):
    problem = problem_of("soft decay", (5, 2, None), batch=3, heads=4, kv_heads=2, length=24)
    spoiled, clean = (carry(p, [4, 21])[1] for p in (spoil(problem, which, LATER, bad), problem))
    assert differences(spoiled, clean) == []


@EITHER
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@named((5, 2, 2), (5, 2, None), (0, 2, 2))
@pytest.mark.parametrize("way", [decode, lambda p: carry(p, [3, 22])], ids=["decoding", "pieces"])
def test_what_hidden_tokens_hold_does_not_matter(bad, reach, way):
    problem = problem_of("decay and holes", reach, length=40)
    hidden = ~problem.along["key_padding_mask"][:, None, :, None]
    filled = replace(problem, key=problem.key.masked_fill(hidden, bad), value=problem.value.masked_fill(hidden, bad))
    (y, state), (expected, clean) = way(filled), way(problem)
    assert torch.equal(y, expected)
    assert differences(state, clean) == []


@EITHER
@pytest.mark.parametrize("bad", BAD)
def test_hidden_keys_get_no_gradient_whatever_they_hold(bad):
    problem = problem_of("decay and holes", (5, 2, 2), length=23)
    hidden = ~problem.along["key_padding_mask"][:, None, :, None]
    filled = replace(problem, key=problem.key.masked_fill(hidden, bad), value=problem.value.masked_fill(hidden, bad))
    found, expected = (gradients(p, lambda p: carry(p, [11])[0]) for p in (filled, problem))
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * 4
    assert [bool(x.masked_select(hidden).any()) for x in found[1:3]] == [False] * 2


@EITHER
@pytest.mark.parametrize("which", ["key", "value"])
def test_a_bad_token_spoils_no_gradient_of_another_head(which):
    problem = problem_of("plain", (5, 2, 2), batch=3, heads=4, kv_heads=2, length=24)
    clean = gradients(problem, lambda p: p.solve())
    found = gradients(spoil(problem, which, LATER, torch.nan), lambda p: p.solve())
    others = [torch.ones(x.shape[:2], dtype=torch.bool) for x in clean]
    for rows, heads in zip(others, (2, 1, 1), strict=True):
        rows[1, :heads] = False
    assert [torch.equal(f[o], c[o]) for f, c, o in zip(found, clean, others, strict=True)] == [True] * 3


@EITHER
@named((3, 1, 2), (3, 1, 3), (3, 1, None), (0, 2, 3))
@pytest.mark.parametrize("way", [lambda p: p.solve(), lambda p: decode(p)[0]], ids=["one call", "decoding"])
def test_a_query_that_sees_no_key_gives_zeros(reach, way):
    y = way(problem_of("a hidden row", reach))
    assert not y[0].any()
    assert y[1].any()


@EITHER
@pytest.mark.parametrize("way", [lambda p: p.solve(), lambda p: decode(p)[0]], ids=["one call", "decoding"])
def test_sinks_that_a_gate_erased_are_not_seen(way):
    """Without a series nothing else is left: such queries see no key of weight."""
    problem = problem_of("plain", (0, 2, None), length=8, decay="soft")
    problem.along["log_decay"][:, :, 4] = -torch.inf
    y = way(problem)
    assert relative_error(y, problem.oracle()) < EXACT
    assert not y[:, :, 4:].any()


def doubtful(recent):
    """20 keys of score -5 far from the last query, and one that it sees exactly."""
    query, key = torch.zeros(1, 1, 21, 1, dtype=torch.float64), torch.full((1, 1, 21, 1), -5.0, dtype=torch.float64)
    query[..., -1, :], key[..., -1, :] = 1, recent
    value = torch.arange(21, dtype=torch.float64).view(1, 1, 21, 1)
    return replace(make(degree=1, window=1, scale=1.0), query=query, key=key, value=value)


@EITHER
@pytest.mark.parametrize("way", [lambda p: p.solve(), lambda p: decode(p)[0]], ids=["one call", "decoding"])
@pytest.mark.parametrize("recent", [0.0, 4.0])
def test_a_normaliser_that_is_not_positive_gives_nan_and_a_warning(way, recent):
    """1 + s is -4 for the far keys, -80 together: more than exp(recent)."""
    with pytest.warns(NormaliserWarning, match="the normaliser of some queries"):
        y = way(doubtful(recent))
    assert y.isnan().flatten().tolist() == [False] * 20 + [True]


@EITHER
@pytest.mark.parametrize("way", [lambda p: p.solve(), lambda p: decode(p)[0]], ids=["one call", "decoding"])
@pytest.mark.parametrize("recent", [5.0, 10.0, 200.0])
def test_an_exact_key_makes_the_normaliser_safe(way, recent):
    problem = doubtful(recent)
    assert relative_error(way(problem), problem.oracle()) < EXACT


@EITHER
def test_in_training_an_unsafe_normaliser_is_an_error():
    with pytest.raises(NormaliserError, match="1 queries"):
        doubtful(0.0).recorded().solve()


@EITHER
@named((16, 4, 2), (3, 1, None))
@pytest.mark.parametrize("way", [one_shot, decode, lambda p: decode(p, 7)], ids=["one call", "decode", "steps of 7"])
def test_autocast_changes_no_bit(reach, way):
    problem = problem_of("soft decay", reach, dtype=torch.float32)
    expected, after = way(problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = way(problem)
    assert torch.equal(y, expected)
    assert differences(state, after) == []


@EITHER
@named((4, 2, 2), (4, 2, None))
def test_decoding_long_after_stays_exact(reach):
    """Many turns of the ring, many folds of the tail."""
    length = 4 * tail_size(4, 3, 2) + 7
    problem = problem_of("decay and holes", reach, length=length)
    y, state = decode(problem)
    assert relative_error(y, problem.oracle()) < EXACT
    assert errors((state.moments, *near_of(state)), held(problem)) < EXACT


# ---- misuse ----------------------------------------------------------------------------------------------------------

X = torch.randn(2, 2, 6, 4, generator=torch.Generator().manual_seed(0))


def call(degree=2, **options):
    return lambda: ta.attention(X, X, X, degree=degree, **options)


def state_of(degree=2, **options):
    return ta.State.zeros(2, 2, 4, 4, degree, **options)


MISUSE = {
    "window: an int >= 0 -1": call(window=-1),
    "window: an int >= 0 2.5": call(window=2.5),
    "window: an int >= 0 True": call(window=True),
    "window: an int >= 0 None": call(window=None),
    "sinks: an int >= 0 -1": call(sinks=-1),
    "sinks: an int >= 0 1.0": call(sinks=1.0),
    "sinks: an int >= 0 False": call(window=1, sinks=False),
    "causal: with a window": call(window=3, causal=False),
    "causal: with sinks": call(sinks=3, causal=False),
    "causal: without a series": call(degree=None, window=3, causal=False),
    "degree: without window and sinks": call(degree=None),
    "degree: without window and sinks, not causal": call(degree=None, causal=False),
    "degree: -1": call(degree=-1, window=3),
    "degree: 2.5": call(degree=2.5, window=3),
    "degree: True": call(degree=True, window=3),
    "state: window 3": call(window=3, state=state_of()),
    "state: window 0": call(state=state_of(window=3)),
    "state: sinks 1": call(window=3, sinks=1, state=state_of(window=3)),
    "state: sinks 0": call(window=3, state=state_of(window=3, sinks=1)),
    "state: degree None": call(degree=None, window=3, state=state_of(window=3)),
    "state: degree 2": call(window=3, state=state_of(None, window=3)),
    "window: zeros, -1": lambda: state_of(window=-1),
    "window: zeros, 1.5": lambda: state_of(window=1.5),
    "sinks: zeros, True": lambda: state_of(sinks=True),
    "degree: zeros": lambda: state_of(None),
}


@pytest.mark.parametrize("misuse", MISUSE)
def test_misuse_names_the_argument(misuse):
    argument, _ = misuse.split(": ", 1)
    with pytest.raises(ArgumentError, match=f"^{argument}: expected "):
        MISUSE[misuse]()


@pytest.mark.parametrize("near", [{"window": 2**40}, {"sinks": 2**40}], ids=str)
def test_an_absurd_state_is_refused_before_anything_is_computed(near):
    with pytest.raises(ArgumentError, match="max_state_bytes"):
        state_of(**near)
    with pytest.raises(ArgumentError, match="max_state_bytes"):
        call(**near, return_state=True)()


@EITHER
@pytest.mark.parametrize("near", [{"window": 2**40}, {"sinks": 2**40}], ids=str)
def test_a_window_beyond_every_sequence_is_fine_where_no_state_is_kept(near):
    assert relative_error(call(**near)(), call(window=6)()) < TOLERANCE[torch.float32]


@EITHER
@named((3, 1, 2), (3, 1, None))
def test_misuse_of_decoding_leaves_the_state_as_it_was(reach):
    problem = problem_of("plain", reach)
    _, state = decode(problem.part(0, 9))
    before = state.clone()
    with pytest.raises(ArgumentError, match="^query: expected head size 2 as the key, got 4"):
        ta.decode_(problem.query[:, :, :1], problem.key[:, :, :1, :2], problem.value[:, :, :1], state)
    with pytest.raises(ArgumentError, match="^state: expected no gradients"):
        problem.part(9, 10).recorded().decode_(state)
    assert differences(state, before) == []


# ---- with and without gradients to come ------------------------------------------------------------------------------


@ROWS
@pytest.mark.parametrize("options", [{}, {"degree": None}, {"sinks": 2, "decay": "soft"}, {"window": 90}], ids=str)
def test_no_bit_depends_on_whether_gradients_are_recorded(backend, options):
    problem = make(**{"batch": 2, "heads": 4, "kv_heads": 2, "length": 70, "degree": 2, "window": 9, **options})
    recorded = replace(problem, query=problem.query.clone().requires_grad_())
    assert torch.equal(problem.solve(backend=backend), recorded.solve(backend=backend).detach())
