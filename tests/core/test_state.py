import copy
import io
import math
import pickle
from dataclasses import replace

import pytest
import torch

from problems import differences
from taylor_attention.core.basis import expand, feature_count
from taylor_attention.core.state import State, tail_size
from taylor_attention.errors import ArgumentError, StorageError
from taylor_attention.ops.attention import attention
from tolerances import TOLERANCE, relative_error

BATCH, HEADS, HEAD_DIM, VALUE_DIM, DEGREE = 3, 2, 4, 5, 2
COLUMNS = VALUE_DIM + 1
WIDTH = tail_size(HEAD_DIM, VALUE_DIM, DEGREE)
LENGTHS = [0, 1, WIDTH - 1, WIDTH, WIDTH + 1, 2 * WIDTH + 3]  # an empty tail, a full one, both sides of every border


def empty(**changes):
    sizes = {"batch_size": BATCH, "kv_heads": HEADS, "head_dim": HEAD_DIM, "value_dim": VALUE_DIM, "degree": DEGREE}
    return State.zeros(**{**sizes, "dtype": torch.float64, **changes})


def draw(length, *, seed=1, dtype=torch.float64):
    """Keys, their [v, 1], gates and visibility of a sequence, the tokens first."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(length, BATCH, HEADS, HEAD_DIM, generator=generator, dtype=dtype)
    values = torch.randn(length, BATCH, HEADS, COLUMNS, generator=generator, dtype=dtype)
    values[..., -1] = 1
    gates = -torch.rand(length, BATCH, HEADS, generator=generator, dtype=torch.float64)
    return keys, values, gates, torch.rand(length, BATCH, generator=generator) > 0.3


def append(state, tokens, *, gated=False, masked=False):
    for key, value, gate, shown in zip(*tokens, strict=True):
        state.append_(key, value, gate if gated else None, shown if masked else None)
    return state


def grown(length=WIDTH + 3, **kinds):
    """A state with tokens in its moments and in its tail."""
    return append(empty(), draw(length), **kinds)


def define(tokens, *, gated=False, masked=False):
    """The moments by their definition: sum_t exp(decay after t) Phi(k_t) u_t."""
    keys, values, gates, shown = tokens
    shown = shown[..., None].double() if masked else torch.ones(gates.shape[0], BATCH, 1, dtype=torch.float64)
    gates = gates * shown if gated else torch.zeros_like(gates)
    after = gates.sum(0) - gates.cumsum(0)
    weighted = values * (after.exp() * shown)[..., None]
    return torch.einsum("tbhe,tbhm->bhem", weighted, expand(keys, DEGREE))


def counted(count, rest=0):
    """A float32 state of count + rest tokens, the rest in its compensation."""
    sums, compensation = torch.full((1, 1, 2, 1), float(count)), torch.full((1, 1, 2, 1), float(rest))
    return State.from_sums(sums, compensation, torch.tensor([count + rest]), None, 1, 0, 1.0)


def count_of(state):
    return (state.sums.double() + state.compensation.double()).flatten().tolist()


# ---- an empty state --------------------------------------------------------------------------------------------------


def test_a_new_state_holds_nothing():
    state = empty(dtype=torch.float32)
    assert state.moments.shape == (BATCH, HEADS, COLUMNS, feature_count(HEAD_DIM, DEGREE))
    assert not state.moments.any()
    assert state.tokens.tolist() == [0] * BATCH
    assert (state.tokens.dtype, state.dtype) == (torch.int64, torch.float32)
    assert (state.batch_size, state.kv_heads, state.head_dim, state.value_dim) == (BATCH, HEADS, HEAD_DIM, VALUE_DIM)
    assert (state.degree, state.scale, state.device) == (DEGREE, HEAD_DIM**-0.5, torch.device("cpu"))


@pytest.mark.parametrize("scale", [1, 0.3, -2.0])
def test_a_state_keeps_its_scale(scale):
    assert empty(scale=scale).scale == scale


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.float64, 8)])
def test_nbytes_is_what_is_allocated_however_many_tokens(dtype, size):
    state = empty(dtype=dtype)
    moments = 2 * BATCH * HEADS * COLUMNS * feature_count(HEAD_DIM, DEGREE)
    tail = BATCH * HEADS * WIDTH * (HEAD_DIM + COLUMNS)
    counts = 8 * BATCH + 2 * 8 * BATCH * HEADS  # tokens, and the two sums of log decay
    assert state.nbytes == size * (moments + tail) + counts
    assert append(state, draw(WIDTH + 3, dtype=dtype)).nbytes == state.nbytes


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"kv_heads": 0}, "kv_heads"),
        ({"head_dim": -1}, "head_dim"),
        ({"head_dim": 2.5}, "head_dim"),
        ({"value_dim": 0}, "value_dim"),
        ({"batch_size": -1}, "batch_size"),
        ({"degree": -1}, "degree"),
        ({"degree": "2"}, "degree"),
        ({"dtype": torch.bfloat16}, "dtype"),
        ({"scale": math.nan}, "scale"),
        ({"scale": "large"}, "scale"),
    ],
)
def test_impossible_states_are_refused(changes, argument):
    with pytest.raises(ArgumentError, match=f"^{argument}: expected "):
        empty(**changes)


def test_an_absurd_state_is_refused_with_its_bytes():
    needed = 2 * 8 * 129 * math.comb(132, 4) * 4
    with pytest.raises(
        ArgumentError, match=rf"^degree: .* got 4, which needs {needed:,} bytes \(raise max_state_bytes"
    ):
        State.zeros(1, 8, 128, 128, 4)


def test_the_refusal_can_be_overridden():
    needed = 2 * BATCH * HEADS * COLUMNS * feature_count(HEAD_DIM, DEGREE) * 8
    with pytest.raises(ArgumentError, match=f"^degree: .*max_state_bytes={needed - 1:,} "):
        empty(max_state_bytes=needed - 1)
    assert empty(max_state_bytes=needed).degree == DEGREE


# ---- appending -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [{}, {"gated": True}, {"masked": True}, {"gated": True, "masked": True}], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_moments_are_their_definition_on_both_sides_of_the_tail_border(length, kinds):
    state, tokens = grown(length, **kinds), draw(length)
    shown = tokens[3].sum(0) if kinds.get("masked") else torch.full((BATCH,), length)
    assert relative_error(state.moments, define(tokens, **kinds)) < TOLERANCE[torch.float64]
    assert state.tokens.tolist() == shown.tolist()
    assert 0 <= state.tail_length <= WIDTH


def test_the_log_decay_of_visible_tokens_adds_up():
    _, _, gates, shown = draw(WIDTH + 3)
    state = grown(gated=True, masked=True)
    torch.testing.assert_close(state.log_decay, (gates * shown[..., None]).sum(0))


def test_reading_the_moments_changes_nothing():
    state = grown(gated=True)
    before = state.clone()
    assert state.moments.any()
    assert differences(state, before) == []


def test_the_tail_keeps_the_sums_untouched():
    state = grown(WIDTH)
    assert state.tail_length == WIDTH
    assert not state.sums.any()


def test_folding_empties_the_tail():
    state = grown(gated=True)
    folded = state.folded()
    assert (state.tail_length, folded.tail_length) == (3, 0)
    assert torch.equal(folded.sums, state.moments)
    assert [folded.tail_key.any(), folded.tail_value.any(), folded.tail_log_decay.any()] == [False] * 3
    assert folded.folded() is folded


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "degree"), [(1, 1, 0), (4, 4, 2), (8, 8, 3), (16, 16, 2), (32, 32, 3), (64, 64, 3)]
)
def test_the_tail_is_short_and_small_beside_the_moments(head_dim, value_dim, degree):
    width = tail_size(head_dim, value_dim, degree)
    assert width in (16, 32, 64, 128)  # whole vectors for every instruction set
    elements = feature_count(head_dim, degree) * (value_dim + 1)
    assert width == 16 or width * (head_dim + value_dim + 1) <= elements / 2


# ---- counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2**24, 2**28])
def test_a_count_goes_on_where_float32_sticks(count):
    """1,000 tokens appended to `count` others; plain float32 sums would lose every one of them at 2^28."""
    state = counted(count)
    for _ in range(1000):
        state.append_(torch.ones(1, 1, 1), torch.ones(1, 1, 2), None, None)
    assert state.tokens.tolist() == [count + 1000]
    assert state.moments.double().flatten().tolist() == pytest.approx([count + 1000] * 2, rel=1e-7)
    assert count_of(state.folded()) == [count + 1000] * 2


def test_a_long_sum_of_tenths_does_not_drift():
    start = torch.tensor([0.1, 1]).view(1, 1, 2, 1) * 1e7
    state = State.from_sums(start, torch.zeros_like(start), torch.tensor([10**7]), None, 1, 0, 1.0)
    plain, tenth = start[0, 0, 0, 0].clone(), torch.tensor(0.1)
    exact = plain.item() + 4000 * tenth.item()
    for _ in range(4000):
        state.append_(torch.ones(1, 1, 1), torch.tensor([[[0.1, 1]]]), None, None)
        plain += tenth
    assert state.moments[0, 0, 0, 0].item() == pytest.approx(exact, rel=1e-7)
    assert plain.item() != pytest.approx(exact, rel=1e-5)


def fold(state):
    state.fold_()
    return state


@pytest.mark.parametrize("fold", [State.folded, fold], ids=["new", "in place"])
def test_gates_in_the_tail_fade_what_rounding_dropped_too(fold):
    state = counted(2**24, 2)
    state.append_(torch.ones(1, 1, 1), torch.ones(1, 1, 2), torch.tensor([[0.5]]).double().log(), None)
    assert count_of(fold(state)) == [(2**24 + 2) / 2 + 1] * 2


# ---- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [{}, {"gated": True}, {"masked": True}], ids=str)
@pytest.mark.parametrize("border", [0, 5, WIDTH, WIDTH + 3])
def test_merged_halves_are_the_whole(border, kinds):
    tokens = draw(WIDTH + 3)
    first, second = ([x[part] for x in tokens] for part in (slice(0, border), slice(border, None)))
    merged = append(empty(), first, **kinds).merge(append(empty(), second, **kinds))
    whole = grown(**kinds)
    assert relative_error(merged.moments, whole.moments) < TOLERANCE[torch.float64]
    assert merged.tokens.tolist() == whole.tokens.tolist()
    torch.testing.assert_close(merged.log_decay, whole.log_decay)


def test_merging_changes_neither_side():
    first, second = grown(gated=True), grown(5, gated=True)
    before = first.clone(), second.clone()
    append(first.merge(second), draw(2), gated=True)
    assert (differences(first, before[0]), differences(second, before[1])) == ([], [])


def test_merging_keeps_what_rounding_dropped():
    assert count_of(counted(2**25, 1).merge(counted(2**24, 1))) == [2**25 + 2**24 + 2] * 2


@pytest.mark.parametrize(
    "grow", [lambda state, one: state.merge(one), lambda state, one: one.merge(state)], ids=["end", "start"]
)
def test_merging_one_token_at_a_time_goes_on_where_float32_sticks(grow):
    state, one = counted(2**24), counted(1)
    for _ in range(500):
        state = grow(state, one)
    assert state.tokens.tolist() == [2**24 + 500]
    assert count_of(state) == [2**24 + 500] * 2


MISMATCHES = {
    "batch_size": {"batch_size": 2},
    "kv_heads": {"kv_heads": 1},
    "head_dim": {"head_dim": 3},
    "value_dim": {"value_dim": 2},
    "degree": {"degree": 3},
    "scale": {"scale": 0.7},
    "dtype": {"dtype": torch.float32},
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_merging_states_of_different_problems_is_refused(name):
    with pytest.raises(ArgumentError, match=f"^later: expected a state of {name} "):
        empty().merge(empty(**MISMATCHES[name]))


def test_merging_with_something_else_is_refused():
    with pytest.raises(ArgumentError, match="^later: expected a State, got Tensor"):
        empty().merge(torch.zeros(1))


# ---- copies, batches, moves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copy",
    [
        State.clone,
        lambda state: state.select(torch.arange(BATCH)),
        lambda state: State.from_tensors({k: v.clone() for k, v in state.tensors().items()}, state.metadata()),
    ],
    ids=["clone", "select", "tensors"],
)
@pytest.mark.parametrize("length", [0, 3, WIDTH, WIDTH + 3])
def test_a_copy_has_the_same_bits_and_lives_alone(copy, length):
    state = grown(length, gated=True, masked=True)
    before, copied = state.clone(), copy(state)
    assert differences(copied, state) == []
    append(copied, draw(WIDTH, seed=2), gated=True)
    assert differences(state, before) == []
    assert set(differences(copied, before)) > {"tokens", "log_decay"}


def test_select_takes_rows_repeats_and_nothing():
    state = grown(gated=True, masked=True)
    chosen = state.select(torch.tensor([2, 0, 0]))
    assert differences(chosen.select(torch.tensor([1, 0])), state.select(torch.tensor([0, 2]))) == []
    assert torch.equal(chosen.moments, state.moments[[2, 0, 0]])
    assert chosen.tokens.tolist() == state.tokens[[2, 0, 0]].tolist()
    assert state.select(torch.empty(0, dtype=torch.int64)).batch_size == 0


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0], "an int64 tensor"),
        (torch.tensor(0), "an int64 tensor"),
        (torch.tensor([0], dtype=torch.int32), "an int64 tensor"),
        (torch.tensor([True, False, True]), "an int64 tensor"),
        (torch.tensor([BATCH]), "values in 0..2, got "),
        (torch.tensor([-1]), "values in 0..2, got "),
    ],
)
def test_selecting_what_is_not_there_is_refused(indices, message):
    with pytest.raises(ArgumentError, match=f"^indices: expected {message}"):
        empty().select(indices)


def test_a_wider_state_holds_the_same_numbers():
    state = append(empty(dtype=torch.float32), draw(WIDTH + 3, dtype=torch.float32), gated=True)
    wide = state.to(dtype=torch.float64)
    assert wide.dtype == wide.tail_key.dtype == wide.compensation.dtype == torch.float64
    assert relative_error(state.moments, wide.moments) < TOLERANCE[torch.float32]
    assert differences(wide.to(dtype=torch.float32), state) == []


def test_a_state_moves_to_another_device():
    moved = grown().to("meta")
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}
    assert moved.device == torch.device("meta")


def test_a_state_moves_to_no_other_type():
    with pytest.raises(ArgumentError, match="^dtype: expected torch.float32 or torch.float64, got torch.float16"):
        empty().to(dtype=torch.float16)


def test_detach_drops_the_history_and_nothing_else():
    state = grown()
    recorded = replace(state, sums=state.sums.clone().requires_grad_())
    assert recorded.moments.requires_grad
    assert not recorded.detach().moments.requires_grad
    assert differences(recorded.detach(), state) == []


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", [0, 3, WIDTH, WIDTH + 3])
def test_a_saved_state_comes_back_bit_for_bit(tmp_path, length, dtype):
    state = append(empty(dtype=dtype, scale=0.1), draw(length, dtype=dtype), gated=True, masked=True)
    state.save(tmp_path / "state")
    loaded = State.load(tmp_path / "state", device="cpu")
    assert differences(loaded, state) == []
    more = draw(WIDTH, seed=2, dtype=dtype)
    assert differences(append(loaded, more, gated=True), append(state, more, gated=True)) == []


def test_a_state_that_forgot_everything_can_be_saved(tmp_path):
    state = replace(grown(), log_decay=torch.full((BATCH, HEADS), -math.inf, dtype=torch.float64))
    state.save(str(tmp_path / "state"))
    assert differences(State.load(str(tmp_path / "state")), state) == []


def test_a_state_of_values_of_size_0_can_be_saved(tmp_path):
    query, key, value = torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 0)
    _, state = attention(query, key, value, degree=2, return_state=True)
    state.save(tmp_path / "state")
    assert differences(State.load(tmp_path / "state"), state) == []


def test_log_decay_of_a_device_without_float64_is_saved_as_it_is_loaded(tmp_path):
    state = append(empty(), draw(WIDTH + 3), gated=True)
    narrow = replace(state, log_decay=state.log_decay.float(), tail_log_decay=state.tail_log_decay.float())
    narrow.save(tmp_path / "state")
    assert differences(State.load(tmp_path / "state"), narrow.to(dtype=state.dtype)) == []


# ---- copies ----------------------------------------------------------------------------------------------------------

COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "in a list": lambda state: copy.deepcopy([state, {}])[0],
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "torch.save": lambda state: torch.load(io.BytesIO(saved(state)), weights_only=False),
}


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("reach", [{}, {"window": 4, "sinks": 2, "heavy": 3}], ids=["far", "near"])
@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "with a history"])
def test_a_copy_is_exact_and_independent(make, reach, recorded):
    state = append(empty(**reach), draw(WIDTH + 3), gated=True)
    original = state.clone()
    if recorded:
        state = replace(state, sums=state.sums.clone().requires_grad_() * 1)
    copied = make(state).detach()
    assert differences(copied, original) == []
    more = draw(WIDTH, seed=2)
    assert differences(append(copied, more, gated=True), append(original.clone(), more, gated=True)) == []
    assert differences(state.detach(), original) == []


def test_a_pickle_of_what_is_no_state_is_refused():
    state = grown()
    state.sums[0, 0, 0, 0] = math.nan
    with pytest.raises(StorageError, match="sums: expected finite numbers, got NaN or infinity in sequences"):
        pickle.loads(pickle.dumps(state))


def test_a_pickle_is_not_loaded_as_weights():
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(io.BytesIO(saved(grown())), weights_only=True)


# ---- tensors that do not fit together --------------------------------------------------------------------------------


def altered_tensors(name, function):
    return lambda tensors, metadata: ({**tensors, name: function(tensors[name])}, metadata)


def altered_metadata(**changes):
    return lambda tensors, metadata: (tensors, {**metadata, **changes})


ALTERATIONS = {
    "sums of another degree": altered_tensors("sums", lambda x: x[..., :-1]),
    "sums flat": altered_tensors("sums", lambda x: x.flatten()),
    "sums half": altered_tensors("sums", lambda x: x.half()),
    "compensation of one head": altered_tensors("compensation", lambda x: x[:, :1]),
    "compensation single": altered_tensors("compensation", lambda x: x.float()),
    "tokens of one row": altered_tensors("tokens", lambda x: x[:1]),
    "tokens as floats": altered_tensors("tokens", lambda x: x.double()),
    "tokens negative": altered_tensors("tokens", lambda x: x - 10**6),
    "log_decay single": altered_tensors("log_decay", lambda x: x.float()),
    "log_decay of one row": altered_tensors("log_decay", lambda x: x[:1]),
    "tail_key short": altered_tensors("tail_key", lambda x: x[..., :-1]),
    "tail_key flat": altered_tensors("tail_key", lambda x: x.flatten()),
    "tail_key of another size": altered_tensors("tail_key", lambda x: x[:, :, 1:]),
    "tail_value without ones": altered_tensors("tail_value", lambda x: x[:, :, 1:]),
    "tail_log_decay of one head": altered_tensors("tail_log_decay", lambda x: x[:, :1]),
    "no tail_key": lambda tensors, metadata: ({k: v for k, v in tensors.items() if k != "tail_key"}, metadata),
    "degree higher": altered_metadata(degree="3"),
    "degree negative": altered_metadata(degree="-1"),
    "degree a word": altered_metadata(degree="two"),
    "tail_length too long": altered_metadata(tail_length=str(WIDTH + 1)),
    "tail_length negative": altered_metadata(tail_length="-1"),
    "scale not a number": altered_metadata(scale="nan"),
    "scale a word": altered_metadata(scale="large"),
    "no metadata": lambda tensors, metadata: (tensors, {}),
}


@pytest.mark.parametrize("alteration", ALTERATIONS.values(), ids=ALTERATIONS.keys())
def test_tensors_that_do_not_fit_together_make_no_state(alteration):
    state = grown()
    with pytest.raises(StorageError, match="^state: expected the tensors and metadata of a State, got "):
        State.from_tensors(*alteration(state.tensors(), state.metadata()))
