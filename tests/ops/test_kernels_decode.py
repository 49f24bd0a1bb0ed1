"""Decoding by the compiled kernels, token by token through folds of the tail, beside PyTorch and the definition."""

from dataclasses import fields, replace

import pytest
import torch

import taylor_attention as ta
from kernels import KERNELS
from problems import decode, differences, make, sum_up
from taylor_attention.core.near import Near
from taylor_attention.core.state import tail_size
from taylor_attention.errors import ArgumentError, NormaliserWarning
from taylor_attention.ops import compiled
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
    "fitted": {"reading": "fitted"},
    "fitted, holes": {"reading": "fitted", "mask": "holes"},
    "fitted, a hidden row, groups": {"reading": "fitted", "mask": "row 0 hidden", "heads": 6, "kv_heads": 2},
    "fitted, resets": {"reading": "fitted", "decay": "resets"},
    "fitted, decay, holes, groups": {"reading": "fitted", "decay": "hard", "mask": "holes", "heads": 6, "kv_heads": 2},
    "fitted, odd degree": {"reading": "fitted", "degree": 3, "decay": "soft"},
    "fitted, degree 0": {"reading": "fitted", "degree": 0},
    "fitted, degree 1": {"reading": "fitted", "degree": 1, "mask": "holes"},
    "fitted, spread widely": {"reading": "fitted", "degree": 4, "radius": 6.0},
    "fitted, window, sinks": {"reading": "fitted", "window": 5, "sinks": 3},
    "fitted, window, decay, holes": {"reading": "fitted", "window": 5, "decay": "hard", "mask": "holes"},
    "fitted, sinks, groups": {"reading": "fitted", "sinks": 3, "degree": 3, "heads": 5, "kv_heads": 1},
    "fitted, nothing far": {"reading": "fitted", "window": 5, "degree": None},
}

HEAVY = {  # beside a window of 5, sinks and places as the name says
    "3 places": {"heavy": 3},
    "a place, a window of one": {"heavy": 1, "window": 1},
    "places for all": {"heavy": LENGTH},
    "sinks": {"heavy": 3, "sinks": 2},
    "holes": {"heavy": 3, "mask": "holes"},
    "left padding": {"heavy": 3, "mask": "left"},
    "a hidden row": {"heavy": 3, "mask": "row 0 hidden"},
    "soft decay": {"heavy": 3, "decay": "soft"},
    "strong decay": {"heavy": 3, "decay": "strong"},
    "resets": {"heavy": 3, "decay": "resets"},
    "groups": {"heavy": 3, "heads": 6, "kv_heads": 2},
    "sinks, decay, holes, groups": {
        "heavy": 3,
        "sinks": 2,
        "decay": "hard",
        "mask": "holes",
        "heads": 6,
        "kv_heads": 2,
    },
    "odd degree, decay": {"heavy": 3, "degree": 3, "decay": "hard"},
    "degree 0": {"heavy": 3, "degree": 0},
    "nothing far": {"heavy": 3, "degree": None, "decay": "soft"},
    "nothing far, holes, groups": {"heavy": 3, "degree": None, "mask": "holes", "heads": 5, "kv_heads": 1},
    "fitted": {"heavy": 3, "reading": "fitted"},
    "fitted, decay, holes, groups": {
        "heavy": 3,
        "reading": "fitted",
        "degree": 3,
        "decay": "soft",
        "mask": "holes",
        "heads": 4,
        "kv_heads": 2,
    },
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
    bounds = {name: tolerance if name in WEIGHED else EXACT for name in wanted}
    assert [name for name in wanted if not relative_error(found[name], wanted[name]) < bounds[name]] == []
    return y


WEIGHED = ("near_received", "near_heavy_priority")  # what comes of weights, and with their rounding


def of_near(state):
    """The tensors of the exact part by name, if there is one; the priorities of free places are 0."""
    tensors = {} if state.near is None else state.near.tensors()
    return {name: x.masked_fill(x == -torch.inf, 0) for name, x in tensors.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_decoding_through_folds(backend, kind, dtype):
    problem = make(**{"batch": 3, "length": LENGTH, **KINDS[kind], "dtype": dtype})
    y = assert_agree(problem, backend, TOLERANCE[dtype])
    assert relative_error(y, problem.oracle()) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", HEAVY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_heavy_tokens_through_folds(backend, kind, dtype):
    """The same tokens are chosen as by PyTorch's own products, and as in one call (`test_heavy` has the definition)."""
    problem = make(**{"batch": 3, "length": LENGTH, "window": 5, **HEAVY[kind], "dtype": dtype})
    y = assert_agree(problem, backend, TOLERANCE[dtype])
    assert relative_error(y, problem.solve(backend=backend)) < TOLERANCE[dtype]


@pytest.mark.parametrize(("dtype", "reading"), [(torch.float32, "taylor"), (torch.float64, "fitted")], ids=str)
def test_heavy_tokens_come_and_go(backend, dtype, reading):
    """Through many windows, most of which replace someone."""
    near = {"window": 12, "sinks": 3, "heavy": 9, "reading": reading}
    sizes = {"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 9, "value_dim": 6, "length": 120}
    problem = make(decay="soft", mask="holes", radius=8.0, dtype=dtype, **near, **sizes)
    y = assert_agree(problem, backend, TOLERANCE[dtype])
    assert relative_error(y, problem.solve(backend=backend)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("head_dim", "degree"), [(1, 4), (2, 3), (3, 4), (4, 3), (7, 2), (8, 1), (9, 3), (15, 2), (16, 1), (17, 2)]
)
def test_fits_at_sizes_around_the_widths_of_vectors(backend, head_dim, degree):
    """Every remainder of the monomials of one degree, at every place of the tail."""
    sizes = {"heads": 3, "kv_heads": 1, "head_dim": head_dim, "value_dim": 5, "degree": degree}
    problem = make(length=tail_size(head_dim, 5, degree) + 3, decay="soft", reading="fitted", **sizes)
    y = assert_agree(problem, backend, EXACT)
    assert relative_error(y, problem.oracle()) < EXACT


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


@pytest.mark.parametrize(
    ("window", "heavy"), [(2, 1), (3, 4), (4, 7), (7, 8), (8, 9), (9, 15), (15, 16), (16, 17), (17, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_heavy_tokens_at_sizes_around_the_widths_of_vectors(backend, window, heavy, dtype):
    """Every remainder of slots, through replacements."""
    sizes = {"heads": 3, "kv_heads": 1, "head_dim": 5, "value_dim": 6, "sinks": 2}
    length = 2 * window + heavy + 9
    problem = make(length=length, window=window, heavy=heavy, decay="soft", dtype=dtype, radius=6.0, **sizes)
    assert_agree(problem, backend, TOLERANCE[dtype])


@pytest.mark.parametrize("head_dim", [1, 8, 17])
@pytest.mark.parametrize("value_dim", [1, 7, 16])
@pytest.mark.parametrize("degree", [None, 1, 2])
def test_exact_parts_at_other_sizes_of_heads(backend, head_dim, value_dim, degree):
    sizes = {"heads": 2, "kv_heads": 1, "head_dim": head_dim, "value_dim": value_dim, "degree": degree}
    problem = make(length=45, window=10, sinks=3, decay="soft", mask="holes", **sizes)
    y = assert_agree(problem, backend, EXACT)
    assert relative_error(y, problem.oracle()) < EXACT


@pytest.mark.parametrize("options", [{}, {"heavy": 4}, {"reading": "fitted"}], ids=["near", "heavy", "fitted"])
@pytest.mark.parametrize("degree", [None, 3])
@pytest.mark.parametrize("heads", [6, 20], ids=["whole groups", "parts of groups"])
def test_groups_share_an_exact_part(backend, degree, heads, options):
    """Ten query heads of a key/value head are more than are answered together."""
    sizes = {"batch": 2, "heads": heads, "kv_heads": 2, "head_dim": 9, "length": 40}
    problem = make(degree=degree, window=11, sinks=3, **sizes, **options)
    y = assert_agree(problem, backend, EXACT)
    assert relative_error(y, problem.solve(backend="torch")) < EXACT


@pytest.mark.parametrize("sizes", [{"heads": 6, "kv_heads": 2}, {"heads": 20, "kv_heads": 2}, {"heads": 9}], ids=str)
@pytest.mark.parametrize(("head_dim", "degree"), [(16, 3), (9, 5), (32, 2)])
@pytest.mark.parametrize("reading", ["taylor", "fitted"])
def test_decoding_reads_more_monomials_than_fit_at_once(backend, sizes, head_dim, degree, reading):
    """Several query heads read the moments of a shared head block by block; their rows end inside such groups."""
    problem = make(batch=2, length=70, head_dim=head_dim, value_dim=5, degree=degree, reading=reading, **sizes)
    _, start = problem.part(0, 60).solve(return_state=True, backend="torch")
    y = assert_agree(problem.part(60, 70), backend, EXACT, start)
    assert relative_error(y, problem.oracle()[:, :, 60:]) < EXACT


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"heads": 9, "kv_heads": 3},
        {"heads": 9, "kv_heads": 3, "window": 9, "sinks": 3},
        {"heads": 9, "kv_heads": 3, "window": 9, "heavy": 3},
        {"heads": 9, "kv_heads": 3, "reading": "fitted"},
    ],
    ids=["one each", "groups", "exact part", "heavy", "fitted"],
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
@pytest.mark.parametrize(
    "near",
    [{}, {"window": 9, "sinks": 3}, {"window": 9, "heavy": 3}, {"reading": "fitted"}],
    ids=["far", "near", "heavy", "fitted"],
)
def test_half_precision_is_computed_in_single(backend, dtype, near):
    problem = make(length=40, heads=4, kv_heads=2, decay="soft", dtype=dtype, **near)
    y, state = decode(problem, backend=backend)
    expected, other = decode(problem.to(torch.float32), backend=backend)
    assert torch.equal(y, expected.to(dtype))
    assert differences(state, other) == []


EVERY = {"decay": "soft", "heads": 4, "kv_heads": 2, "mask": "holes"}


@pytest.mark.parametrize(
    "kind", ["causal", "decay", "groups", "window", "sinks", "heavy", "fitted", "all", "all, fitted"]
)
def test_decoding_counts_unsafe_normalisers_like_pytorch(backend, kind):
    """An odd degree and scores far outside of where it is positive, through a fold."""
    options = {
        "causal": {},
        "decay": {"decay": "soft"},
        "groups": {"heads": 4, "kv_heads": 2},
        "window": {"window": 3},
        "sinks": {"sinks": 2},
        "heavy": {"window": 2, "heavy": 1},
        "fitted": {"reading": "fitted"},
        "all": {"window": 1, "sinks": 1, "heavy": 1, **EVERY},
        "all, fitted": {"window": 1, "sinks": 1, "heavy": 1, "reading": "fitted", **EVERY},
    }[kind]
    problem = make(batch=2, length=40, degree=3, radius=8.0, **options)
    problem.query[1, 1, 20] = torch.nan  # what is not finite counts too
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


@pytest.mark.parametrize("options", [{"degree": None, "window": 300, "sinks": 4}, {"window": 2, "heavy": 300}], ids=str)
def test_threads_share_an_exact_part(backend, options):
    """One by one or side by side, to the last bit."""
    problem = make(batch=4, heads=16, kv_heads=8, length=5, head_dim=16, value_dim=16, **options)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [-300, 300])
def test_attention_in_the_window_is_weighed_there(backend, dtype, offset):
    """Beside it are sinks whose scores are so much higher, or lower, that in float32 one of them is nothing."""
    problem = make(heads=1, length=40, head_dim=1, degree=None, window=6, sinks=2, heavy=3, scale=1.0)
    key = 3 * problem.key
    key[:, :, 2:] += offset
    problem = replace(problem, query=torch.ones_like(problem.query), key=key).to(dtype)  # scores without rounding
    assert_agree(problem, backend, TOLERANCE[dtype])


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


@pytest.mark.parametrize("gate", [-1e-3, -1e-6, -3e-8, -1e-9])
def test_gates_near_one_fade_moments_by_what_they_are(backend, gate):
    """Positive sums, which show a factor that is always wrong to one side, in the tail or where it is folded."""
    problem = make(heads=1, length=4000, head_dim=9, degree=3, dtype=torch.float32)
    gates = torch.full((1, 1, problem.length), gate)
    problem = replace(problem, key=problem.key.abs(), value=problem.value.abs(), along={"log_decay": gates})
    _, state = decode(problem, state=problem.new_state(), backend=backend)
    _, exact = problem.to(torch.float64).solve(return_state=True, backend="torch")
    found = state.folded()
    assert relative_error(found.sums.double() + found.compensation.double(), exact.moments) < 2.5e-7


def test_what_rounding_dropped_before_is_kept_and_fades_with_the_sums(backend):
    problem = make(length=LENGTH, value_dim=6, decay="soft")
    _, start = make(length=9, value_dim=6, seed=1).solve(return_state=True)
    start = replace(start, compensation=1e-3 * torch.randn_like(start.sums))
    _, expected = sum_up(problem, start.sums + start.compensation)
    _, state = decode(problem, state=start, backend=backend)
    found = state.folded()
    assert relative_error(found.sums + found.compensation, expected) < EXACT


# ---- how tensors are handed over -------------------------------------------------------------------------------------


@pytest.fixture
def older_pytorch(monkeypatch):
    """One before 2.10, whose tensors the kernels cannot look into."""
    monkeypatch.setattr(compiled, "sees_tensors", lambda: False)
    compiled.kernels().exchange(None)
    yield
    compiled.kernels().exchange(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))


@pytest.mark.parametrize("kind", [{}, {"window": 5, "sinks": 3, "heavy": 2}, {"reading": "fitted"}], ids=str)
def test_tensors_and_addresses_are_the_same(backend, kind, request):
    problem = make(batch=3, length=20, decay="soft", mask="holes", heads=6, kv_heads=2, **kind)
    y, state = decode(problem, backend=backend)
    request.getfixturevalue("older_pytorch")
    z, other = decode(problem, backend=backend)
    assert torch.equal(y, z)
    assert differences(state, other) == []


X = torch.zeros(2, 3, 4)
OTHERS = {
    "shape": X[:1],
    "strides": X.mT.contiguous().mT,
    "type": X.int(),
    "width": X.double(),
    "kind of half": X.half(),
    "axes": X[0],
    "none": None,
    "meta": X.to("meta"),
}


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_descriptions_are_equal_for_equal_tensors_only(backend, name, older, request):
    if older:
        request.getfixturevalue("older_pytorch")
    known = [compiled.describe((X, x)) for x in (X, *OTHERS.values(), X.bfloat16())]
    found = compiled.describe((X.clone(), None if OTHERS[name] is None else OTHERS[name].clone()))
    assert known.count(found) == 1
    assert compiled.describe((X, X)) == compiled.describe((X + 1, X.clone()))


STEPS = {
    "the same": {},
    "strides": {"query": lambda x: x.mT.contiguous().mT, "key": lambda x: x.repeat_interleave(2, 3)[..., ::2]},
    "type": {"query": lambda x: x.float(), "value": lambda x: x.half()},
    "fewer sequences": {name: lambda x: x[:1] for name in ("query", "key", "value")},
    "two tokens": {name: lambda x: x.repeat(1, 1, 2, 1) for name in ("query", "key", "value")},
    "head size": {name: lambda x: x[..., :-1] for name in ("query", "key")},
    "a list": {"query": lambda x: x.tolist()},
    "gradients": {"key": lambda x: x.clone().requires_grad_()},
    "scale": {"scale": lambda _: 0.7},
    "series": {"series": lambda _: ta.series.GEOMETRIC},
    "reading": {"reading": lambda _: "fitted"},
    "hidden": {"key_padding_mask": lambda _: torch.zeros(3, 1, dtype=torch.bool)},
    "faded": {"log_decay": lambda _: torch.full((3, 2, 1), -0.5)},
    "broken": {"value": lambda x: x * torch.nan},
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_unlike_the_one_before_is_checked_and_computed_as_if_it_were_the_first(backend, name):
    problem = make(batch=3, length=20, heads=4, kv_heads=2)
    _, begun = decode(problem.part(0, 18), backend=backend)
    token = problem.part(18, 19)
    given = {"query": token.query, "key": token.key, "value": token.value}
    ta.decode_(**given, state=begun, backend=backend)
    changed = given | {name: change(given.get(name)) for name, change in STEPS[name].items()}
    results = []
    for state in (begun.clone(), begun):  # of the second one the last step is remembered
        try:
            results.append([ta.decode_(**changed, state=state, backend=backend), *state.tensors().values()])
        except (ArgumentError, TypeError) as error:
            results.append([str(error), *state.tensors().values()])
    for one, other in zip(*results, strict=True):
        assert one == other if isinstance(one, str) else torch.equal(one, other)


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


@pytest.mark.parametrize("name", [field.name for field in fields(Near)])
def test_an_exact_part_that_is_not_contiguous_is_refused(backend, name):
    problem = make(batch=3, length=40, decay="soft", value_dim=4, window=7, sinks=3, heavy=2)
    _, state = decode(problem.part(0, 20), backend="torch")
    strided = replace(state, near=replace(state.near, **{name: spread(getattr(state.near, name))}))
    assert not strided.is_contiguous
    with pytest.raises(ArgumentError, match="^state: expected .*contiguous"):
        problem.part(20, 21).decode_(strided, backend=backend)


@pytest.mark.parametrize("heavy", [0, 2])
def test_changes_in_place_are_told_to_autograd(backend, heavy):
    problem = make(length=3, window=2, sinks=1, heavy=heavy)
    _, state = decode(problem.part(0, 2), backend=backend)
    tensors = state.near.tensors()
    versions = {name: tensor._version for name, tensor in tensors.items()}
    problem.part(2, 3).decode_(state, backend=backend)
    same = [name for name, tensor in tensors.items() if tensor._version == versions[name]]
    of_use = ["near_received", *(name for name in versions if "heavy" in name)]  # to heavy tokens only
    assert same == ([] if heavy else of_use)


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
