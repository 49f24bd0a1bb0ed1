"""Decoding by the compiled kernels, token by token through folds of the tail, beside PyTorch and the definition."""

from dataclasses import replace

import pytest
import torch

import taylor_attention as ta
from kernels import KERNELS
from problems import decode, differences, make, sum_up
from taylor_attention.core.state import tail_size
from taylor_attention.errors import ArgumentError, NormaliserWarning
from tolerances import TOLERANCE, relative_error

pytestmark = pytest.mark.parametrize("backend", KERNELS, indirect=True)

EXACT = TOLERANCE[torch.float64]
LENGTH = 2 * tail_size(4, 3, 2) + 5  # two folds and a tail that is neither empty nor full

KINDS = {
    "plain": {},
    "holes": {"mask": "holes"},
    "left padding": {"mask": "left"},
    "a hidden row": {"mask": "row 0 hidden"},
    "soft decay": {"decay": "soft"},
    "strong decay": {"decay": "strong"},
    "resets": {"decay": "resets"},
    "decay and holes": {"decay": "hard", "mask": "holes"},
    "groups": {"heads": 6, "kv_heads": 2},
    "one key/value head": {"heads": 5, "kv_heads": 1},
    "groups, decay, holes": {"heads": 6, "kv_heads": 2, "decay": "hard", "mask": "holes"},
    "odd degree": {"degree": 3},
    "odd degree, decay, groups": {"degree": 3, "decay": "hard", "heads": 4, "kv_heads": 2},
    "degree 0": {"degree": 0},
    "degree 1": {"degree": 1, "mask": "holes"},
    "series and scale": {"series": ta.series.GEOMETRIC, "scale": 0.3, "degree": 4, "radius": 0.9},
    "window": {"window": 5},
    "a window of one": {"window": 1},
    "a window over everything": {"window": LENGTH + 3},
    "sinks": {"sinks": 3},
    "window, sinks": {"window": 5, "sinks": 3},
    "window, sinks, holes": {"window": 5, "sinks": 3, "mask": "holes"},
    "window, sinks, left padding": {"window": 9, "sinks": 2, "mask": "left"},
    "window, sinks, a hidden row": {"window": 5, "sinks": 3, "mask": "row 0 hidden"},
    "window, sinks, soft decay": {"window": 5, "sinks": 3, "decay": "soft"},
    "window, sinks, strong decay": {"window": 5, "sinks": 3, "decay": "strong"},
    "window, sinks, resets": {"window": 5, "sinks": 3, "decay": "resets"},
    "window, sinks, decay, holes": {"window": 5, "sinks": 3, "decay": "hard", "mask": "holes"},
    "window, sinks, decay, groups": {"window": 5, "sinks": 3, "decay": "hard", "heads": 6, "kv_heads": 2},
    "sinks, decay, holes": {"sinks": 3, "decay": "hard", "mask": "holes"},
    "window, sinks, odd degree": {"window": 5, "sinks": 3, "degree": 3, "decay": "hard", "heads": 4, "kv_heads": 2},
    "window, sinks, degree 0": {"window": 5, "sinks": 3, "degree": 0},
    "window alone": {"window": 5, "degree": None},
    "sinks alone": {"sinks": 3, "degree": None, "mask": "holes"},
    "sinks alone, resets": {"sinks": 3, "degree": None, "decay": "resets"},
    "window, sinks alone": {"window": 5, "sinks": 3, "degree": None, "decay": "hard", "mask": "holes"},
    "window, sinks alone, groups": {"window": 5, "sinks": 3, "degree": None, "heads": 6, "kv_heads": 2},
}

SIZES = [  # of the exact part, around the widths of vectors: float64 and float32, 16 to 64 bytes
    (1, 0),
    (2, 1),
    (3, 2),
    (4, 3),
    (5, 4),
    (7, 5),
    (8, 7),
    (9, 8),
    (15, 9),
    (16, 15),
    (17, 16),
    (31, 17),
    (33, 33),
    (48, 0),
    (97, 2),
    (0, 20),
]


def assert_agree(problem, backend, tolerance, start=None):
    """Outputs, and every tensor of the state, tail and compensation included, are those of PyTorch's own products."""
    state, other = (problem.new_state() if start is None else start.clone() for _ in range(2))
    y, _ = decode(problem, state=state, backend=backend)
    expected, _ = decode(problem, state=other, backend="torch")
    assert relative_error(y, expected) < tolerance
    assert relative_error(state.sums + state.compensation, other.sums + other.compensation) < tolerance
    in_tail = other.tail_value[:, :, -1:] != 0
    assert torch.equal(state.tail_key.where(in_tail, 0), other.tail_key.where(in_tail, 0))
    assert relative_error(state.tail_value, other.tail_value) < tolerance
    assert relative_error(state.log_decay, other.log_decay) < EXACT
    assert relative_error(state.tail_log_decay, other.tail_log_decay) < EXACT
    assert torch.equal(state.tokens, other.tokens)
    assert state.metadata() == other.metadata()
    found, wanted = (of_near(x) for x in (state, other))
    assert [name for name in wanted if relative_error(found[name], wanted[name]) > EXACT] == []
    return y


def of_near(state):
    """The tensors of the exact part by name, if there is one."""
    return {} if state.near is None else state.near.tensors()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_decoding_through_folds(backend, kind, dtype):
    problem = make(**{"batch": 3, "length": LENGTH, **KINDS[kind], "dtype": dtype})
    y = assert_agree(problem, backend, TOLERANCE[dtype])
    assert relative_error(y, problem.oracle()) < TOLERANCE[dtype]


@pytest.mark.parametrize("head_dim", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 20])
@pytest.mark.parametrize("value_dim", [1, 2, 5, 7, 8, 9, 14, 16, 17])
def test_decoding_at_sizes_around_the_widths_of_vectors(backend, head_dim, value_dim):
    """Every remainder of columns and of monomials, at every place of the tail."""
    degree = (head_dim + value_dim) % 5
    sizes = {"heads": 3, "kv_heads": 1, "head_dim": head_dim, "value_dim": value_dim, "degree": degree}
    problem = make(length=tail_size(head_dim, value_dim, degree) + 3, decay="soft", **sizes)
    y = assert_agree(problem, backend, EXACT)
    assert relative_error(y, problem.oracle()) < EXACT


@pytest.mark.parametrize(("window", "sinks"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exact_parts_at_sizes_around_the_widths_of_vectors(backend, window, sinks, dtype):
    """Every remainder of slots, through turns of the ring."""
    sizes = {"heads": 3, "kv_heads": 1, "head_dim": 5, "value_dim": 6}
    problem = make(length=2 * window + sinks + 5, window=window, sinks=sinks, decay="soft", dtype=dtype, **sizes)
    y = assert_agree(problem, backend, TOLERANCE[dtype])
    assert relative_error(y, problem.oracle()) < TOLERANCE[dtype]


@pytest.mark.parametrize("head_dim", [1, 8, 17])
@pytest.mark.parametrize("value_dim", [1, 7, 16])
@pytest.mark.parametrize("degree", [None, 1, 2])
def test_exact_parts_at_other_sizes_of_heads(backend, head_dim, value_dim, degree):
    sizes = {"heads": 2, "kv_heads": 1, "head_dim": head_dim, "value_dim": value_dim, "degree": degree}
    problem = make(length=45, window=10, sinks=3, decay="soft", mask="holes", **sizes)
    y = assert_agree(problem, backend, EXACT)
    assert relative_error(y, problem.oracle()) < EXACT


@pytest.mark.parametrize("degree", [None, 3])
@pytest.mark.parametrize("heads", [6, 20], ids=["whole groups", "parts of groups"])
def test_groups_share_an_exact_part(backend, degree, heads):
    """Ten query heads of a key/value head are more than are answered together."""
    problem = make(batch=2, heads=heads, kv_heads=2, head_dim=9, degree=degree, length=40, window=11, sinks=3)
    y = assert_agree(problem, backend, EXACT)
    assert relative_error(y, problem.oracle()) < EXACT


@pytest.mark.parametrize("sizes", [{"heads": 6, "kv_heads": 2}, {"heads": 20, "kv_heads": 2}, {"heads": 9}], ids=str)
@pytest.mark.parametrize(("head_dim", "degree"), [(16, 3), (9, 5), (32, 2)])
def test_decoding_reads_more_monomials_than_fit_at_once(backend, sizes, head_dim, degree):
    """Several query heads read the moments of a shared head block by block; their rows end inside such groups."""
    problem = make(batch=2, length=70, head_dim=head_dim, value_dim=5, degree=degree, **sizes)
    _, start = problem.part(0, 60).solve(return_state=True, backend="torch")
    y = assert_agree(problem.part(60, 70), backend, EXACT, start)
    assert relative_error(y, problem.oracle()[:, :, 60:]) < EXACT


@pytest.mark.parametrize(
    "sizes",
    [{}, {"heads": 9, "kv_heads": 3}, {"heads": 9, "kv_heads": 3, "window": 9, "sinks": 3}],
    ids=["one each", "groups", "exact part"],
)
def test_a_sequence_is_decoded_alone_as_in_a_batch(backend, sizes):
    """To the last bit: what stands beside it changes nothing."""
    problem = make(
        batch=3, length=tail_size(16, 3, 3) + 6, head_dim=16, degree=3, decay="soft", dtype=torch.float32, **sizes
    )
    y, state = decode(problem, backend=backend)
    for row in range(3):
        alone = problem.each(lambda x, row=row: x[row : row + 1])
        z, other = decode(alone, backend=backend)
        assert torch.equal(z, y[row : row + 1])
        assert differences(other, state.select(torch.tensor([row]))) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("near", [{}, {"window": 9, "sinks": 3}], ids=["far", "near"])
def test_half_precision_is_computed_in_single(backend, dtype, near):
    problem = make(length=40, heads=4, kv_heads=2, decay="soft", dtype=dtype, **near)
    y, state = decode(problem, backend=backend)
    expected, other = decode(problem.to(torch.float32), backend=backend)
    assert torch.equal(y, expected.to(dtype))
    assert differences(state, other) == []


@pytest.mark.parametrize("kind", ["causal", "decay", "groups", "window", "sinks", "all"])
def test_decoding_counts_unsafe_normalisers_like_pytorch(backend, kind):
    """An odd degree and scores far outside of where it is positive, through a fold."""
    options = {
        "causal": {},
        "decay": {"decay": "soft"},
        "groups": {"heads": 4, "kv_heads": 2},
        "window": {"window": 3},
        "sinks": {"sinks": 2},
        "all": {"window": 1, "sinks": 1, "decay": "soft", "heads": 4, "kv_heads": 2, "mask": "holes"},
    }[kind]
    problem = make(batch=2, length=40, degree=3, radius=8.0, **options)
    said, found = {}, {}
    for name in (backend, "torch"):
        with pytest.warns(NormaliserWarning, match="rows are NaN") as caught:
            found[name], _ = decode(problem, backend=name)
        said[name] = len(caught)
    assert said[backend] == said["torch"] == found[backend].isnan().any(-1).any(0).any(0).sum()
    assert found[backend].isnan().any()
    assert torch.equal(found[backend].isnan(), found["torch"].isnan())
    assert relative_error(found[backend].nan_to_num(0), found["torch"].nan_to_num(0)) < 1e-9


def test_values_without_size(backend):
    """Nothing to attend to, but a state that counts."""
    problem = make(length=40, value_dim=0)
    _, state = problem.part(0, 3).solve(return_state=True, backend=backend)
    for token in range(3, 40):
        assert problem.part(token, token + 1).decode_(state, backend=backend).shape == (1, 2, 1, 0)
    _, expected = problem.solve(return_state=True)
    assert relative_error(state.moments, expected.moments) < EXACT


# ---- the exact part --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("degree", [None, 2])
@pytest.mark.parametrize("sign", [-1, 1])
def test_exact_scores_of_any_size(backend, dtype, degree, sign):
    """Around +-200, whole numbers so that the scores have no error: exp itself has no value there in float32."""
    problem = make(length=30, head_dim=2, degree=degree, window=7, sinks=2, scale=1.0)
    query, key = torch.full_like(problem.query, 10 * sign), 9 + (problem.key > 0).double()
    problem = replace(problem, query=query, key=key).to(dtype)
    y, _ = decode(problem, backend=backend)
    assert relative_error(y, problem.oracle()) < TOLERANCE[dtype]


def test_a_query_that_is_not_finite_reaches_its_own_row(backend):
    problem = make(length=25, window=4, sinks=2)
    problem.query[0, 1, 9, 0] = torch.nan
    y, _ = decode(problem, backend=backend)
    expected = torch.zeros(1, 2, 25, dtype=torch.bool)
    expected[0, 1, 9] = True
    assert torch.equal(y.isnan().all(-1), expected)
    assert torch.equal(y.isnan().any(-1), expected)


def test_a_gate_that_is_refused_changes_nothing(backend):
    problem = make(length=25, window=4, sinks=2, decay="soft")
    _, state = decode(problem.part(0, 20), backend=backend)
    before, wrong = state.clone(), problem.part(20, 21)
    wrong.along["log_decay"][:] = 0.5
    with pytest.raises(ArgumentError, match="^log_decay"):
        wrong.decode_(state, backend=backend)
    assert differences(state, before) == []


def test_threads_share_an_exact_part(backend):
    """One by one or side by side, to the last bit."""
    problem = make(batch=4, heads=16, kv_heads=8, length=3, head_dim=16, value_dim=16, degree=None, window=300, sinks=4)
    alone, beside = decode_with(1, problem, backend), decode_with(2, problem, backend)
    assert torch.equal(alone[0], beside[0])
    assert differences(alone[1], beside[1]) == []


def decode_with(threads, problem, backend):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return decode(problem, backend=backend)
    finally:
        torch.set_num_threads(before)


# ---- precision -------------------------------------------------------------------------------------------------------


def test_a_tail_is_added_with_what_rounding_drops(backend):
    """Sums of 2^24 and more take no single ones any more; folding hands on what they drop."""
    sums = torch.full((1, 1, 2, 3), 2.0**24)
    state = ta.State.from_sums(sums, torch.zeros_like(sums), torch.tensor([2**24]), None, 2, 1, 1.0)
    one = torch.ones(1, 1, 1, 2)
    for _ in range(16 * 50 + 1):  # the last one folds the fiftieth full tail
        ta.decode_(one, one, one[..., :1], state, scale=1.0, backend=backend)
    assert (state.sums.double() + state.compensation.double()).flatten().tolist() == [2.0**24 + 800] * 6


@pytest.mark.parametrize("sizes", [{}, {"head_dim": 9, "degree": 3}], ids=["few monomials", "many"])
def test_long_decoding_stays_at_one_rounding(backend, sizes):
    """3,000 tokens in single precision: the moments and what they dropped are those of float64 to a few 2^-28."""
    problem = make(heads=1, length=3000, dtype=torch.float32, **sizes)
    problem = replace(problem, key=problem.key.abs(), value=problem.value.abs())
    _, state = problem.part(0, 0).solve(return_state=True)
    _, state = decode(problem, state=state, backend=backend)
    _, exact = problem.to(torch.float64).solve(return_state=True, backend="torch")
    found = state.folded()
    error = relative_error(found.sums.double() + found.compensation.double(), exact.moments)
    assert error < 1.5e-8


def test_what_rounding_dropped_before_is_kept_and_fades_with_the_sums(backend):
    problem = make(length=LENGTH, value_dim=6, decay="soft")
    _, start = make(length=9, value_dim=6, seed=1).solve(return_state=True)
    start = replace(start, compensation=1e-3 * torch.randn_like(start.sums))
    _, expected = sum_up(problem, start.sums + start.compensation)
    _, state = decode(problem, state=start, backend=backend)
    found = state.folded()
    assert relative_error(found.sums + found.compensation, expected) < EXACT


# ---- memory ----------------------------------------------------------------------------------------------------------


def spread(x):
    """The same numbers, not contiguous: the last two axes swapped in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("name", ["sums", "compensation", "tail_key", "tail_value", "log_decay", "tail_log_decay"])
def test_a_state_that_is_not_contiguous_is_refused(backend, name):
    """It is changed in place, by its address."""
    problem = make(batch=3, length=40, decay="soft", value_dim=4)
    _, state = decode(problem.part(0, 20), backend="torch")
    strided = replace(state, **{name: spread(getattr(state, name))})
    assert not getattr(strided, name).is_contiguous()
    with pytest.raises(ArgumentError, match="^state: expected .*contiguous"):
        problem.part(20, 21).decode_(strided, backend=backend)


@pytest.mark.parametrize("name", ["key", "value", "log_decay", "sink_key", "sink_value", "sink_log_decay"])
def test_an_exact_part_that_is_not_contiguous_is_refused(backend, name):
    problem = make(batch=3, length=40, decay="soft", value_dim=4, window=7, sinks=3)
    _, state = decode(problem.part(0, 20), backend="torch")
    strided = replace(state, near=replace(state.near, **{name: spread(getattr(state.near, name))}))
    assert not strided.is_contiguous
    with pytest.raises(ArgumentError, match="^state: expected .*contiguous"):
        problem.part(20, 21).decode_(strided, backend=backend)


def test_changes_in_place_are_told_to_autograd(backend):
    problem = make(length=3, window=2, sinks=1)
    _, state = decode(problem.part(0, 2), backend=backend)
    versions = {name: tensor._version for name, tensor in of_near(state).items()}
    problem.part(2, 3).decode_(state, backend=backend)
    same = [name for name, tensor in of_near(state).items() if tensor._version == versions[name]]
    assert same == ["near_received", *(name for name in versions if "heavy" in name)]  # of use to heavy tokens only


def test_a_graph_that_needs_the_state_as_it_was_says_so(backend):
    """As PyTorch's own operations in place do: a backward pass that would use changed sums is an error."""
    problem = make(length=60)
    _, state = problem.part(0, 20).solve(return_state=True, backend=backend)
    later = problem.part(20, 30).recorded()
    y = later.solve(state=state, backend=backend)
    with torch.no_grad():
        decode(problem.part(30, 60), state=state, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), later.query)
