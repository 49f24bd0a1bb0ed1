"""A far part with queries and keys of its own: its definition, the law, gradients, states, files, and misuse."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import taylor_attention as ta
from kernels import EITHER, KERNELS
from problems import FORKS, carry, decode, differences, errors, gradients, make
from taylor_attention.core.state import needed_bytes
from taylor_attention.errors import ArgumentError, StorageError
from tolerances import TOLERANCE, relative_error

ROWS = pytest.mark.parametrize("backend", ["torch", *KERNELS], indirect=True)
READINGS = pytest.mark.parametrize("reading", ["taylor", "fitted"])

EXACT = TOLERANCE[torch.float64]
LENGTH = 29

KINDS = {
    "plain": {"kv_heads": 4},
    "groups": {},
    "one key/value head, one entry": {"kv_heads": 1, "far_dim": 1},
    "wide values, wider far keys": {"value_dim": 11, "far_dim": 6},
    "as wide as the keys": {"far_dim": 4},
    "left padding": {"mask": "left"},
    "a hidden row": {"mask": "row 0 hidden"},
    "soft decay": {"decay": "soft"},
    "resets and holes": {"decay": "resets", "mask": "holes"},
    "decay and holes": {"decay": "hard", "mask": "holes"},
}

REACHES = [(3, 0, 2), (0, 2, 2), (5, 2, 3), (17, 1, 0), (1, 0, 1), (LENGTH + 3, 0, 2)]  # window, sinks, degree

CASES = [  # each kind with every third reach
    (kind, reach) for i, kind in enumerate(KINDS) for j, reach in enumerate(REACHES) if (i + j) % 3 == 0
]


def name(x):
    return "W{} S{} D{}".format(*x) if isinstance(x, tuple) else str(x)


def paired(cases):
    return pytest.mark.parametrize(("kind", "reach"), cases, ids=name)


def problem_of(kind, reach, **sizes):
    window, sinks, degree = reach
    sizes = {"batch": 2, "heads": 4, "kv_heads": 2, "length": LENGTH, "far_dim": 2, **KINDS[kind], **sizes}
    return make(window=window, sinks=sinks, degree=degree, **sizes)


def there_and_back(problem):
    """Decoded, prefilled in pieces, decoded again."""
    outputs, state = [], problem.new_state()
    for start, stop, in_place in [(0, 7, True), (7, 9, False), (9, 10, True), (10, 20, False), (20, LENGTH, True)]:
        part = problem.part(start, stop)
        y, state = decode(part, state=state) if in_place else part.solve(state=state, return_state=True)
        outputs.append(y)
    return torch.cat(outputs, 2), state


WAYS = {
    "one call": lambda p: p.solve(return_state=True),
    "token by token": decode,
    "chunks of 5": lambda p: p.solve(chunk_size=5, return_state=True),
    "split in many, chunked": lambda p: carry(p, [0, 1, 2, 5, 22, 22, 23], chunk_size=4),
    "three tokens at a time": lambda p: decode(p, 3),
    "decode, prefill, decode": there_and_back,
}
ANY_WAY = pytest.mark.parametrize("way", WAYS)


# ---- the definition and the law --------------------------------------------------------------------------------------


@EITHER
@ANY_WAY
@paired(CASES[::2])
def test_far_scores_are_of_them_and_near_ones_are_not(way, kind, reach):
    problem = problem_of(kind, reach)
    assert relative_error(WAYS[way](problem)[0], problem.oracle()) < EXACT


@EITHER
@ANY_WAY
@paired(CASES[1::5])
def test_what_a_fit_reads(way, kind, reach):
    problem = problem_of(kind, reach, reading="fitted")
    assert relative_error(WAYS[way](problem)[0], problem.oracle()) < EXACT


@ROWS
@pytest.mark.parametrize("way", ["one call", "token by token"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@paired(CASES[::4])
def test_in_lower_precision(backend, dtype, way, kind, reach):
    problem = problem_of(kind, reach, dtype=dtype)
    assert relative_error(WAYS[way](problem)[0], problem.oracle()) < TOLERANCE[dtype]


@EITHER
@ANY_WAY
@pytest.mark.parametrize("kind", ["groups", "decay and holes"])
def test_with_a_gain_too(way, kind):
    problem = problem_of(kind, (3, 1, 2), far_gain=torch.tensor([-2.0, 0.75, 3.0, -0.25]))
    assert relative_error(WAYS[way](problem)[0], problem.oracle()) < EXACT


@EITHER
@READINGS
@ANY_WAY
@pytest.mark.parametrize("kind", ["plain", "groups", "decay and holes"])
def test_keys_that_are_the_scaled_keys_change_nothing(way, kind, reading):
    plain = problem_of(kind, (3, 1, 2), reading=reading, far_dim=None)
    scale = plain.query.shape[3] ** -0.5
    problem = replace(plain, along={**plain.along, "far_query": plain.query * scale, "far_key": plain.key})
    assert relative_error(WAYS[way](problem)[0], plain.oracle()) < EXACT


@EITHER
@ANY_WAY
@pytest.mark.parametrize("kind", ["plain", "groups", "decay and holes"])
def test_heavy_tokens_are_chosen_by_the_near_scores(way, kind):
    """With the keys themselves as far keys, behind two entries that say nothing: as without."""
    plain = problem_of(kind, (3, 1, 2), far_dim=None, heavy=3)
    scale, (batch, heads, tokens, _) = plain.query.shape[3] ** -0.5, plain.key.shape
    nothing = plain.key.new_zeros(batch, heads, tokens, 2)
    far_query = torch.cat([plain.query * scale, torch.ones_like(plain.query[..., :2])], -1)
    along = {**plain.along, "far_query": far_query, "far_key": torch.cat([plain.key, nothing], -1)}
    (y, state), (expected, other) = (WAYS[way](p) for p in (replace(plain, along=along), plain))
    assert relative_error(y, expected) < EXACT
    assert torch.equal(state.near.heavy_key[:, :, :4], other.near.heavy_key)
    assert torch.equal(state.near.heavy_key[:, :, 4:8], other.near.heavy_key)


BORDERS = torch.tensor([0, 5, 5, 20, 21, LENGTH], dtype=torch.int32)


@EITHER
@READINGS
@pytest.mark.parametrize("kind", ["groups", "decay and holes"])
def test_packed_sequences_are_what_they_are_alone(kind, reading):
    problem = problem_of(kind, (3, 1, 2), reading=reading, batch=1)
    expected = torch.cat([problem.part(*cut).oracle() for cut in pairwise(BORDERS.tolist())], 2)
    assert relative_error(problem.solve(cu_seqlens=BORDERS), expected) < EXACT


@EITHER
def test_two_halves_merged_are_the_whole():
    problem = problem_of("soft decay", (3, 0, 2))
    first, second = (problem.part(*cut).solve(return_state=True)[1] for cut in ((0, 11), (11, 20)))
    rest = problem.part(20, LENGTH).solve(state=first.merge(second))
    assert relative_error(rest, problem.oracle()[:, :, 20:]) < EXACT


@EITHER
@pytest.mark.parametrize("way", ["one call", "split in many, chunked"])
@paired(CASES[1::2])
def test_gradients_are_those_of_the_definition(way, kind, reach):
    problem = problem_of(kind, reach)
    expected = gradients(problem, lambda p: p.oracle())
    assert len(expected) >= 5
    assert errors(gradients(problem, lambda p: WAYS[way](p)[0]), expected) < 10 * EXACT


def test_compiled_attention_is_the_same():
    torch._dynamo.reset()
    problem = problem_of("groups", (3, 0, 2))
    compiled = torch.compile(lambda p: p.solve(), fullgraph=True, backend="aot_eager")
    assert errors(gradients(problem, compiled), gradients(problem, lambda p: p.solve())) < EXACT


# ---- the state -------------------------------------------------------------------------------------------------------


def test_a_state_says_its_sizes():
    state = ta.State.zeros(2, 3, 8, 5, 2, window=4, sinks=1, far_dim=2)
    assert (state.head_dim, state.far_dim, state.moment_dim, state.value_dim) == (8, 2, 2, 5)
    assert state.sums.shape == (2, 3, 6, 6)
    plain = ta.State.zeros(2, 3, 8, 5, 2, window=4, sinks=1)
    assert (plain.head_dim, plain.far_dim, plain.moment_dim) == (8, None, 8)


def test_its_bytes_are_those_that_are_counted_beforehand():
    """Those of the tail, the counts and the total decay are beside them."""
    state = ta.State.zeros(1, 1, 8, 5, 2, window=4, sinks=1, far_dim=2)
    besides = (state.tail_key, state.tail_value, state.tokens, state.log_decay, state.tail_log_decay)
    counted = state.nbytes - sum(x.nbytes for x in besides)
    assert needed_bytes(1, 8, 6, 2, (4, 1, 0), torch.float32, 2) == counted


@pytest.mark.parametrize("fork", FORKS)
def test_copies_and_files_keep_it(fork, tmp_path):
    problem = problem_of("groups", (3, 1, 2), dtype=torch.float32)
    _, state = decode(problem.part(0, 20))
    copy = FORKS[fork](state, tmp_path)
    assert (copy.head_dim, copy.far_dim) == (4, 2)
    assert differences(copy, state) == []
    assert relative_error(decode(problem.part(20, LENGTH), state=copy)[0], problem.oracle()[:, :, 20:]) < 1e-5


def test_a_file_whose_keys_are_narrower_than_the_moments_is_refused():
    state = ta.State.zeros(1, 1, 4, 3, 2, window=2, sinks=1, far_dim=2)
    tensors = {
        name: x[:, :, :1] if name.endswith("key") and "near" in name else x for name, x in state.tensors().items()
    }
    with pytest.raises(StorageError, match="near_key: expected"):
        ta.State.from_tensors(tensors, state.metadata())


# ---- misuse ----------------------------------------------------------------------------------------------------------

X = torch.randn(2, 4, 6, 4, generator=torch.Generator().manual_seed(0))
K = X[:, :2]
F, G = X[..., :3], K[..., :3]

MISUSE = {
    "no key": ((F, None), {}, r"far_key: expected a tensor \[B, H, T, f\], as both of far_query and far_key"),
    "no query": ((None, G), {}, r"far_query: expected a tensor \[B, H, T, f\], as both of far_query and far_key"),
    "other sizes": ((F, G[..., :2]), {}, "far_query: expected size 2 as far_key"),
    "no size": ((F[..., :0], G[..., :0]), {}, "far_key: expected a size >= 1"),
    "other heads": ((F, F), {}, r"far_key: expected shape \(2, 2, 6\) and its own size, got \(2, 4, 6, 3\)"),
    "other tokens": ((F[:, :, :5], G), {}, r"far_query: expected shape \(2, 4, 6\) and its own size"),
    "another dtype": ((F.double(), G), {}, "far_query: expected the query's dtype"),
    "integers": ((F, G.long()), {}, "far_key: expected a floating-point tensor"),
    "no near tokens": ((F, G), {"window": 0}, "far_key: expected None without a window or sinks"),
    "no far tokens": ((F, G), {"degree": None}, "far_key: expected None without a degree"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_refused(case):
    (far_query, far_key), options, message = MISUSE[case]
    with pytest.raises(ArgumentError, match=f"^{message}"):
        ta.attention(X, K, K, **{"degree": 2, "window": 2, **options}, far_query=far_query, far_key=far_key)


def test_a_state_of_another_far_size_is_refused():
    for far_dim in (None, 2):
        state = ta.State.zeros(2, 2, 4, 4, 2, window=2, far_dim=far_dim)
        with pytest.raises(ArgumentError, match=f"^state: expected far_dim 3, got {far_dim}"):
            ta.attention(X, K, K, degree=2, window=2, far_query=F, far_key=G, state=state)
        with pytest.raises(ArgumentError, match=f"^state: expected far_dim 3, got {far_dim}"):
            ta.decode_(X[:, :, :1], K[:, :, :1], K[:, :, :1], state, far_query=F[:, :, :1], far_key=G[:, :, :1])


def test_a_state_with_far_keys_wants_them():
    state = ta.State.zeros(2, 2, 4, 4, 2, window=2, far_dim=3)
    with pytest.raises(ArgumentError, match="^state: expected far_dim None, got 3"):
        ta.decode_(X[:, :, :1], K[:, :, :1], K[:, :, :1], state)


@pytest.mark.parametrize(("which", "bad"), [("far", float("nan")), ("far", 1e20), ("near", float("nan"))])
def test_keys_that_a_state_cannot_hold_are_refused_before_anything_changes(which, bad):
    state = ta.State.zeros(2, 2, 4, 4, 2, window=2, far_dim=3)
    before = state.clone()
    keys = {"near": K[:, :, :1].clone(), "far": G[:, :, :1].clone()}
    keys[which][1, 0, 0, 1] = bad
    with pytest.raises(ArgumentError, match=r"^key: expected .* in sequence 1, head 0, token 0"):
        ta.decode_(X[:, :, :1], keys["near"], K[:, :, :1], state, far_query=F[:, :, :1], far_key=keys["far"])
    assert differences(state, before) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"far_dim": 0, "window": 2}, "far_dim: expected"),
        ({"far_dim": 2}, "far_dim: expected None without a window or sinks"),
        ({"far_dim": 2, "window": 2, "degree": None}, "far_dim: expected None without a degree"),
    ],
)
def test_a_state_without_such_a_part_is_refused(options, message):
    with pytest.raises(ArgumentError, match=f"^{message}"):
        ta.State.zeros(1, 1, 4, 4, **{"degree": 2, **options})
