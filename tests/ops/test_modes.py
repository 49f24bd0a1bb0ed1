"""The law: one-shot == chunked == token by token == any split with the state carried == merged halves."""

import pickle
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taylor_attention as ta
from kernels import EITHER
from problems import carry, decode, differences, make, mix, one_shot
from taylor_attention.core.state import tail_size
from tolerances import TOLERANCE, relative_error

pytestmark = EITHER

EXACT = TOLERANCE[torch.float64]
LENGTH = 41
WIDTH = tail_size(4, 3, 2)

KINDS = {
    "plain": {},
    "groups": {"heads": 6, "kv_heads": 2},
    "left padding": {"mask": "left"},
    "holes": {"mask": "holes"},
    "decay": {"decay": "hard"},
    "strong decay": {"decay": "strong"},
    "resets": {"decay": "resets"},
    "decay and holes": {"decay": "hard", "mask": "holes"},
    "resets, holes, groups": {"decay": "resets", "mask": "holes", "heads": 4, "kv_heads": 2},
    "scale and series": {"scale": 0.7, "series": ta.series.COSH},
    "odd degree": {"degree": 3},
    "degree 0": {"degree": 0},
    "degree 4, one head": {"degree": 4, "heads": 1, "head_dim": 2},
}


def problem_of(kind, **sizes):
    return make(**{"batch": 3, "length": LENGTH, **KINDS[kind], **sizes})


def assert_same(found, expected, tolerance=EXACT):
    """The same outputs, and states that say the same of the same tokens."""
    (y, state), (expected_y, expected_state) = found, expected
    assert relative_error(y, expected_y) < tolerance
    assert relative_error(state.moments, expected_state.moments) < tolerance
    assert relative_error(state.log_decay, expected_state.log_decay) < tolerance
    assert state.tokens.tolist() == expected_state.tokens.tolist()


def merged_halves(problem, border=17):
    """Both halves from nothing; the second's outputs need the first's state."""
    first, second = problem.part(0, border), problem.part(border, problem.length)
    y, state = first.solve(return_state=True)
    rest = second.solve(state=state)
    return torch.cat([y, rest], 2), state.merge(second.solve(return_state=True)[1])


def merged_then_continued(problem):
    """Three parts: the third goes on from the merged states of the others."""
    parts = [problem.part(a, b) for a, b in [(0, 11), (11, 23), (23, problem.length)]]
    states = [part.solve(return_state=True)[1] for part in parts[:2]]
    y, _ = carry(problem.part(0, 23), [11])
    rest, state = parts[2].solve(state=states[0].merge(states[1]), return_state=True)
    return torch.cat([y, rest], 2), state


def decoded_then_prefilled(problem):
    """The border falls inside the tail."""
    y, state = decode(problem.part(0, WIDTH + 3))
    rest, state = problem.part(WIDTH + 3, problem.length).solve(state=state, return_state=True)
    return torch.cat([y, rest], 2), state


def decoded_halves_merged(problem):
    """Both states have tokens in their tails."""
    border = WIDTH + 3
    _, first = decode(problem.part(0, border))
    _, second = decode(problem.part(border, problem.length))
    return one_shot(problem)[0], first.merge(second)


WAYS = {
    "chunks of 1": lambda p: p.solve(return_state=True, chunk_size=1),
    "chunks of 2": lambda p: p.solve(return_state=True, chunk_size=2),
    "chunks of 16": lambda p: p.solve(return_state=True, chunk_size=16),
    "the library's chunks": lambda p: p.solve(return_state=True),
    "from an empty state": lambda p: p.solve(return_state=True, state=p.new_state()),
    "split in two": lambda p: carry(p, [17]),
    "split in many, chunked": lambda p: carry(p, [0, 1, 2, 20, 20, 40], chunk_size=4),
    "token by token": decode,
    "three tokens at a time": lambda p: decode(p, 3),
    "all tokens at once, in place": lambda p: decode(p, LENGTH),
    "prefill, then decode": lambda p: mix(p, [13], [False, True]),
    "decode, then prefill": decoded_then_prefilled,
    "merged halves": merged_halves,
    "merged, then continued": merged_then_continued,
    "merged tails": decoded_halves_merged,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_the_law(way, kind):
    problem = problem_of(kind)
    assert_same(WAYS[way](problem), one_shot(problem))


@pytest.mark.parametrize("kind", ["plain", "decay and holes", "odd degree"])
@pytest.mark.parametrize("way", WAYS)
def test_the_law_in_single_precision(way, kind):
    problem = problem_of(kind, dtype=torch.float32)
    assert_same(WAYS[way](problem), one_shot(problem), TOLERANCE[torch.float32])


@pytest.mark.parametrize("way", ["token by token", "split in two", "prefill, then decode"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_outputs_differ_by_rounding_alone(way, dtype):
    problem = problem_of("plain", dtype=dtype)
    assert_same(WAYS[way](problem), one_shot(problem), TOLERANCE[dtype])


def test_the_law_beyond_many_chunks():
    """More chunks than are summed before the sums are settled, with the heads computed in groups."""
    problem = make(batch=2, length=300, head_dim=16, degree=3, decay="soft")
    assert_same(problem.solve(return_state=True, chunk_size=8), one_shot(problem))


@pytest.mark.parametrize("kind", ["plain", "decay and holes"])
@given(data=st.data())
@settings(max_examples=20)
def test_any_split_of_any_kind_of_step(kind, data):
    """Pieces of any length, each by attention or in place, give what one call gives."""
    problem = problem_of(kind)
    borders = sorted(data.draw(st.lists(st.integers(0, LENGTH), max_size=6), label="borders"))
    in_place = data.draw(
        st.lists(st.booleans(), min_size=len(borders) + 1, max_size=len(borders) + 1), label="in place"
    )
    assert_same(mix(problem, borders, in_place), one_shot(problem))


@given(borders=st.lists(st.integers(0, LENGTH), min_size=1, max_size=5).map(sorted), data=st.data())
@settings(max_examples=15)
def test_merging_is_associative(borders, data):
    problem = problem_of("decay and holes")
    cuts = pairwise([0, *borders, LENGTH])
    states = [problem.part(a, b).solve(return_state=True)[1] for a, b in cuts]
    while len(states) > 1:
        place = data.draw(st.integers(0, len(states) - 2), label="place")
        states[place : place + 2] = [states[place].merge(states[place + 1])]
    _, expected = one_shot(problem)
    assert relative_error(states[0].moments, expected.moments) < EXACT
    assert relative_error(states[0].log_decay, expected.log_decay) < EXACT
    assert states[0].tokens.tolist() == expected.tokens.tolist()


# ---- not causal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "groups", "holes", "odd degree"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_keys_may_come_in_parts_where_every_query_sees_all(kind, chunk):
    problem = problem_of(kind, causal=False, queries=7)
    first, second = ({"key_padding_mask": m} if m is not None else {} for m in halves(problem))
    query, key, value = problem.arguments
    options = {"degree": problem.degree, "causal": False, "chunk_size": chunk, "return_state": True}
    _, state = ta.attention(query[:, :, :0], key[:, :, :17], value[:, :, :17], **options, **first)
    found = ta.attention(query, key[:, :, 17:], value[:, :, 17:], state=state, **options, **second)
    assert_same(found, problem.solve(return_state=True))
    assert relative_error(found[0], problem.oracle()) < EXACT


def halves(problem, border=17):
    mask = problem.along.get("key_padding_mask")
    return (None, None) if mask is None else (mask[:, :border], mask[:, border:])


@pytest.mark.parametrize("queries", [0, 1, 7, 100])
def test_the_state_after_is_that_of_the_keys_whatever_asked(queries):
    problem = problem_of("holes", causal=False, queries=queries)
    _, state = problem.solve(return_state=True)
    _, causal = problem_of("holes").solve(return_state=True)
    assert relative_error(state.moments, causal.moments) < EXACT
    assert state.tokens.tolist() == causal.tokens.tolist()


def test_a_prefix_is_seen_by_all_queries():
    """A state under attention that is not causal: queries of another length, no new key at all."""
    problem = problem_of("plain")
    query, key, value = problem.arguments
    _, state = problem.solve(return_state=True)
    nothing = key[:, :, :0], value[:, :, :0]
    found = ta.attention(query[:, :, :5], *nothing, degree=2, causal=False, state=state)
    expected = ta.attention(query[:, :, :5], key, value, degree=2, causal=False)
    assert relative_error(found, expected) < EXACT


# ---- what changes, and what does not ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "decay", "holes"])
@pytest.mark.parametrize("length", [0, 1, WIDTH, WIDTH + 3])
@pytest.mark.parametrize("return_state", [True, False])
def test_attention_never_changes_the_state_it_is_given(kind, length, return_state):
    problem = problem_of(kind)
    _, state = decode(problem.part(0, length)) if length else (None, problem.new_state())
    before = state.clone()
    problem.part(length, LENGTH).solve(state=state, return_state=return_state)
    assert differences(state, before) == []


@pytest.mark.parametrize("length", [0, 5])
@pytest.mark.parametrize("kind", ["plain", "decay"])
def test_the_new_state_shares_no_memory_with_the_old(kind, length):
    """Decoding on with the new state, with gates, leaves the old one as it is."""
    problem = problem_of(kind)
    state = problem.part(0, 10).solve(return_state=True)[1]
    before = state.clone()
    _, after = problem.part(10, 10 + length).solve(state=state, return_state=True)
    decode(problem_of("decay").part(0, WIDTH + 3), state=after)
    assert differences(state, before) == []


@pytest.mark.parametrize(
    "fork",
    [
        lambda state: state.clone(),
        lambda state: state.select(torch.arange(3)),
        lambda state: state.merge(ta.State.zeros(3, 2, 4, 3, 2, dtype=torch.float64)),
        lambda state: pickle.loads(pickle.dumps(state)),
    ],
    ids=["clone", "select", "merge", "pickle"],
)
@pytest.mark.parametrize("length", [WIDTH, WIDTH + 3])
def test_decoding_changes_one_state_and_no_fork(fork, length):
    problem = problem_of("decay")
    _, state = decode(problem.part(0, length))
    forked, before = fork(state), state.clone()
    decode(problem.part(length, LENGTH), state=forked)
    assert differences(state, before) == []
    assert forked.tokens.tolist() == [LENGTH] * 3


@pytest.mark.parametrize("step", [1, 2, WIDTH + 1])
def test_decoding_changes_the_state_in_place(step):
    problem = problem_of("plain")
    state = problem.new_state()
    y = problem.part(0, step).decode_(state)
    assert state.tokens.tolist() == [step] * 3
    assert relative_error(state.moments, one_shot(problem.part(0, step))[1].moments) < EXACT
    assert y.shape == (3, 2, step, 3)


@pytest.mark.parametrize("kind", ["plain", "decay and holes"])
@pytest.mark.parametrize("length", [0, WIDTH - 1, WIDTH, WIDTH + 3])
def test_a_selected_beam_goes_on_as_if_it_had_been_alone(kind, length):
    problem, rows = problem_of(kind), torch.tensor([2, 0])
    chosen = problem_of(kind).each(lambda x: x[rows])
    chosen = replace(chosen, along={name: x[rows] for name, x in problem.along.items()})
    state = problem.new_state()
    _, state = decode(problem.part(0, length), state=state) if length else (None, state)
    y, after = decode(chosen.part(length, LENGTH), state=state.select(rows))
    expected, whole = decode(problem)
    assert torch.equal(y, expected[rows][:, :, length:])
    assert differences(after, whole.select(rows)) == []


@pytest.mark.parametrize("length", [5, WIDTH, WIDTH + 3])
def test_a_loaded_state_goes_on_bit_for_bit(tmp_path, length):
    problem = problem_of("decay and holes", dtype=torch.float32)
    _, state = decode(problem.part(0, length))
    state.save(tmp_path / "state")
    y, after = decode(problem.part(length, LENGTH), state=ta.State.load(tmp_path / "state"))
    expected, whole = decode(problem)
    assert torch.equal(y, expected[:, :, length:])
    assert differences(after, whole) == []


def test_a_hidden_token_changes_no_sums_and_no_count():
    problem = problem_of("decay")
    _, state = decode(problem.part(0, 5))
    before, nothing = state.clone(), torch.zeros(3, 1, dtype=torch.bool)
    hidden = replace(problem.part(5, 6), along={**problem.part(5, 6).along, "key_padding_mask": nothing})
    y = hidden.decode_(state)
    assert torch.equal(state.moments, before.moments)
    assert torch.equal(state.log_decay, before.log_decay)
    assert state.tokens.tolist() == [5] * 3
    assert relative_error(y, read_alone(problem.part(5, 6), before)) < EXACT


def read_alone(problem, state):
    """What the queries get from a state without new keys."""
    query, key, value = problem.arguments
    return ta.attention(query, key[:, :, :0], value[:, :, :0], degree=problem.degree, causal=False, state=state)


def test_a_state_may_be_read_with_other_coefficients():
    """Moments hold no coefficients: what one series wrote, another reads."""
    problem = problem_of("plain", degree=4, series=ta.series.COSH)
    other = replace(problem, options={"series": ta.series.GEOMETRIC})
    _, state = problem.part(0, 20).solve(return_state=True)
    y = problem.part(20, LENGTH).solve(state=state)
    z = other.part(20, LENGTH).solve(state=state)
    assert relative_error(y, problem.oracle()[:, :, 20:]) < EXACT
    assert relative_error(z, other.oracle()[:, :, 20:]) < EXACT


# ---- packed sequences ------------------------------------------------------------------------------------------------

LENGTHS = [5, 0, 17, 3, 9, 1, 16, 0]
BORDERS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
TOTAL = int(BORDERS[-1])

PACKED = {
    "causal": {},
    "groups": {"heads": 4, "kv_heads": 2},
    "all": {"causal": False},
    "holes": {"mask": "holes"},
    "holes, all": {"mask": "holes", "causal": False},
    "decay": {"decay": "hard"},
    "resets and holes": {"decay": "resets", "mask": "holes"},
    "odd degree": {"degree": 3},
    "odd degree, decay": {"degree": 3, "decay": "hard"},
}


def packed(kind, **sizes):
    return make(**{"length": TOTAL, **PACKED[kind], **sizes})


def one_by_one(problem, states=None):
    """Each sequence alone; outputs side by side, states as one batch."""
    cuts = list(pairwise(BORDERS.tolist()))
    states = [None] * len(cuts) if states is None else [states.select(torch.tensor([i])) for i in range(len(cuts))]
    found = [problem.part(*cut).solve(return_state=True, state=s) for cut, s in zip(cuts, states, strict=True)]
    return torch.cat([y for y, _ in found], 2), [state for _, state in found]


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("chunk", [None, 4])
def test_packed_sequences_are_what_they_are_alone(kind, chunk):
    problem = packed(kind)
    y, state = problem.solve(cu_seqlens=BORDERS, return_state=True, chunk_size=chunk)
    expected, states = one_by_one(problem)
    assert relative_error(y, expected) < EXACT
    assert relative_error(state.moments, torch.cat([s.moments for s in states])) < EXACT
    assert state.tokens.tolist() == [count for s in states for count in s.tokens.tolist()]
    assert relative_error(state.log_decay, torch.cat([s.log_decay for s in states])) < EXACT


@pytest.mark.parametrize("kind", ["causal", "all", "decay"])
def test_packed_sequences_go_on_from_their_states(kind):
    problem, before = packed(kind), packed(kind, seed=1)
    _, start = before.solve(cu_seqlens=BORDERS, return_state=True)
    y, state = problem.solve(cu_seqlens=BORDERS, state=start, return_state=True)
    expected, states = one_by_one(problem, start)
    assert relative_error(y, expected) < EXACT
    assert relative_error(state.moments, torch.cat([s.moments for s in states])) < EXACT
    assert state.tokens.tolist() == [2 * length for length in LENGTHS]


@pytest.mark.parametrize("kind", ["causal", "all", "decay", "resets and holes"])
@pytest.mark.parametrize(
    "change", [lambda x: x + 1, lambda x: x * torch.nan, lambda x: x * 1e30], ids=["1", "nan", "1e30"]
)
def test_nothing_leaks_from_one_packed_sequence_to_another(kind, change):
    """Another content of one sequence leaves every bit of the others."""
    problem = packed(kind, dtype=torch.float32)
    inside = slice(*BORDERS[2:4].tolist())
    others = [i for i in range(TOTAL) if not inside.start <= i < inside.stop]
    sequences = [i for i in range(len(LENGTHS)) if i != 2]

    def altered(x):
        x = x.clone()
        x[:, :, inside] = change(x[:, :, inside])
        return x

    query, key, value = map(altered, problem.arguments)
    changed = replace(problem, query=query, key=key, value=value)
    y, z = (each.solve(cu_seqlens=BORDERS) for each in (problem, changed))
    assert torch.equal(y[:, :, others], z[:, :, others])
    assert not torch.equal(y[:, :, inside], z[:, :, inside])
    changed = replace(problem, query=query, key=key.nan_to_num(1).clamp(-9, 9), value=value.nan_to_num(1).clamp(-9, 9))
    (_, state), (_, other) = (each.solve(cu_seqlens=BORDERS, return_state=True) for each in (problem, changed))
    assert torch.equal(state.moments[sequences], other.moments[sequences])
    assert not torch.equal(state.moments[2], other.moments[2])


@pytest.mark.parametrize("borders", [[0, 0], [0, 0, 0], [0]], ids=str)
def test_packed_nothing(borders):
    empty = torch.empty(1, 2, 0, 4)
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    y, state = ta.attention(empty, empty, empty, degree=2, cu_seqlens=cu_seqlens, return_state=True)
    assert y.shape == (1, 2, 0, 4)
    assert (state.batch_size, state.tokens.tolist()) == (len(borders) - 1, [0] * (len(borders) - 1))


def test_a_packed_state_is_merged_and_decoded_like_any_other():
    problem = packed("resets and holes")
    _, state = problem.solve(cu_seqlens=BORDERS, return_state=True)
    twice = state.merge(state)
    assert twice.tokens.tolist() == [2 * count for count in state.tokens.tolist()]
    assert twice.moments.isfinite().all()
    assert not twice.log_decay.isnan().any()
