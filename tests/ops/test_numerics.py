"""Numbers at the edge: not finite, not positive, too many, too large, too much memory."""

import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taylor_attention as ta
from kernels import EITHER
from problems import decode, differences, make
from taylor_attention.core.state import tail_size
from taylor_attention.errors import NormaliserError, NormaliserWarning
from taylor_attention.ops.reference import attention_reference
from tolerances import TOLERANCE, relative_error

pytestmark = EITHER

BAD = [float("nan"), float("inf"), float("-inf")]
PLACE = (1, 0, 9)  # sequence, key/value head, token


def spoil(problem, which, bad):
    """One number of one token replaced."""
    x = getattr(problem, which).clone()
    x[(*PLACE, 1)] = bad
    return replace(problem, **{which: x})


def reached(problem, which, causal):
    """The rows that see the spoiled token, [B, Hq, T]; query heads 0 and 1 share the key/value head 0."""
    rows = torch.zeros(problem.query.shape[:3], dtype=torch.bool)
    sequence, head, token = PLACE
    if which == "query":
        rows[PLACE] = True
    else:
        rows[sequence, 2 * head : 2 * head + 2, token if causal else 0 :] = True
    return rows


# ---- NaN and infinity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_what_is_not_finite_spoils_the_rows_that_see_it_and_no_other_bit(which, bad, causal, chunk):
    problem = make(batch=3, heads=4, kv_heads=2, length=20, causal=causal)
    clean = problem.solve(chunk_size=chunk)
    y = spoil(problem, which, bad).solve(chunk_size=chunk)
    rows = reached(problem, which, causal)
    assert torch.equal(y.isnan(), rows[..., None].expand_as(y))
    assert torch.equal(y[~rows], clean[~rows])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("mode", [{"mask": "left"}, {"decay": "hard"}, {"causal": False, "mask": "left"}], ids=str)
def test_what_is_not_finite_in_every_mode(which, bad, mode):
    problem = make(batch=3, heads=4, kv_heads=2, length=20, **mode)
    assert bool(problem.along.get("key_padding_mask", torch.ones(3, 20))[1, 9])
    clean, y = problem.solve(chunk_size=4), spoil(problem, which, bad).solve(chunk_size=4)
    rows = reached(problem, which, problem.options.get("causal", True))
    assert torch.equal(y.isnan(), rows[..., None].expand_as(y))
    assert torch.equal(y[~rows], clean[~rows])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("step", [1, 3])
def test_a_query_that_is_not_finite_spoils_its_row_and_no_bit_of_a_state(bad, step):
    """Keys and values that are not are refused where a state would hold them: tests/reliability/test_ranges.py."""
    problem = make(batch=3, heads=4, kv_heads=2, length=20)
    (y, state), (clean, after) = decode(spoil(problem, "query", bad), step), decode(problem, step)
    rows = reached(problem, "query", causal=True)
    assert torch.equal(y.isnan(), rows[..., None].expand_as(y))
    assert torch.equal(y[~rows], clean[~rows])
    assert differences(state, after) == []


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("causal", [True, False])
def test_what_hidden_tokens_hold_does_not_matter(bad, causal):
    problem = make(batch=2, length=20, mask="holes", causal=causal)
    hidden = ~problem.along["key_padding_mask"][:, None, :, None]
    filled = replace(problem, key=problem.key.masked_fill(hidden, bad), value=problem.value.masked_fill(hidden, bad))
    y, state = filled.solve(return_state=True, chunk_size=4)
    expected, clean = problem.solve(return_state=True, chunk_size=4)
    assert torch.equal(y, expected)
    assert differences(state, clean) == []


@pytest.mark.parametrize("bad", BAD)
def test_what_hidden_tokens_hold_does_not_matter_in_decoding(bad):
    problem = make(batch=2, length=20, mask="holes", decay="hard")
    hidden = ~problem.along["key_padding_mask"][:, None, :, None]
    filled = replace(problem, key=problem.key.masked_fill(hidden, bad), value=problem.value.masked_fill(hidden, bad))
    y, state = decode(filled)
    expected, clean = decode(problem)
    assert torch.equal(y, expected)
    assert differences(state, clean) == []


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk", [None, 4])
def test_a_query_that_sees_no_key_gives_zeros(degree, causal, chunk):
    problem = make(batch=2, length=20, degree=degree, mask="row 0 hidden", causal=causal)
    y, state = problem.solve(return_state=True, chunk_size=chunk)
    assert torch.equal(y[0], torch.zeros_like(y[0]))
    assert state.tokens.tolist() == [0, 13]


@pytest.mark.parametrize("degree", [2, 3])
def test_a_query_that_sees_no_key_gives_zeros_in_decoding(degree):
    problem = make(batch=2, length=20, degree=degree, mask="left")
    y, state = decode(problem)
    shown = problem.along["key_padding_mask"]
    assert torch.equal((y != 0).all(-1), shown[:, None].expand(2, 2, 20))
    assert state.tokens.tolist() == shown.sum(-1).tolist()


# ---- the normaliser --------------------------------------------------------------------------------------------------

UNSAFE = {
    "causal": {},
    "groups": {"heads": 4, "kv_heads": 2},
    "all": {"causal": False},
    "holes": {"mask": "holes"},
    "decay": {"decay": "hard"},
    "degree 1": {"degree": 1, "radius": 6.0},
    "degree 5": {"degree": 5, "radius": 12.0},
    "a fit": {"degree": 4, "series": ta.series.polynomial([1, 1, 0, 0, -0.01])},
}


def unsafe_problem(kind, **sizes):
    """Scores far outside where the series is positive, so that some normalisers are not."""
    return make(**{"batch": 2, "length": 24, "degree": 3, "radius": 8.0, **UNSAFE[kind], **sizes})


def unsafe_rows(problem):
    """Normalisers below a thousandth of what their keys give at score zero, straight from the definition."""
    kernel = problem.options.get("series", ta.series.EXP).coefficients(problem.degree)
    group = problem.query.shape[1] // problem.key.shape[1]
    key = problem.key.repeat_interleave(group, 1)
    scores = problem.query @ key.transpose(-1, -2) * problem.options.get("scale", problem.query.shape[3] ** -0.5)
    shown = torch.ones_like(scores)
    if problem.options.get("causal", True):
        shown = shown.tril()
    if "key_padding_mask" in problem.along:
        shown = shown * problem.along["key_padding_mask"][:, None, None]
    if "log_decay" in problem.along:
        total = problem.along["log_decay"].cumsum(-1).repeat_interleave(group, 1)
        shown = shown * (total[..., :, None] - total[..., None, :]).clamp(max=0).exp()
    weights = sum(c * scores**p for p, c in enumerate(kernel)) * shown
    return (weights.sum(-1) <= 1e-3 * abs(kernel[0]) * shown.sum(-1)) & (shown.sum(-1) > 0)


@pytest.mark.parametrize("kind", UNSAFE)
@pytest.mark.parametrize("chunk", [None, 4])
def test_an_unsafe_normaliser_gives_nan_and_a_warning(kind, chunk):
    problem = unsafe_problem(kind)
    rows = unsafe_rows(problem)
    assert 0 < int(rows.sum()) < rows.numel()
    with pytest.warns(NormaliserWarning, match="^the truncated series .* normaliser of some queries .* rows are NaN"):
        y = problem.solve(chunk_size=chunk)
    assert torch.equal(y.isnan(), rows[..., None].expand_as(y))
    assert relative_error(y[~rows], problem.oracle()[~rows]) < 1e-9  # a small normaliser divides what rounding left


@pytest.mark.parametrize("kind", ["causal", "groups", "holes", "decay", "degree 1", "a fit"])
@pytest.mark.parametrize("step", [1, 5])
def test_decoding_agrees_on_which_normalisers_are_unsafe(kind, step):
    problem = unsafe_problem(kind)
    with pytest.warns(NormaliserWarning, match="^the truncated series .* rows are NaN"):
        y, _ = decode(problem, step)
    rows = unsafe_rows(problem)
    assert torch.equal(y.isnan(), rows[..., None].expand_as(y))


@pytest.mark.parametrize("kind", ["causal", "decay"])
def test_an_unsafe_normaliser_spoils_no_state(kind):
    problem = unsafe_problem(kind)
    with pytest.warns(NormaliserWarning):
        _, state = problem.solve(return_state=True)
    _, safe = replace(problem, query=problem.query * 0).solve(return_state=True)
    assert differences(state, safe) == []


@pytest.mark.parametrize("kind", UNSAFE)
@pytest.mark.parametrize("wanted", ["query", "key", "value"])
def test_an_unsafe_normaliser_stops_training(kind, wanted):
    problem = unsafe_problem(kind)
    problem = replace(problem, **{wanted: getattr(problem, wanted).clone().requires_grad_()})
    count = int(unsafe_rows(problem).sum())
    with pytest.raises(
        NormaliserError, match=f"normaliser of {count} queries is not safely positive: use an even degree"
    ):
        problem.solve()


def test_without_gradients_nothing_is_raised():
    problem = unsafe_problem("causal").recorded()
    with torch.no_grad(), pytest.warns(NormaliserWarning):
        y = problem.solve()
    assert y.isnan().any()


def attend(query, key, value, **options):
    return ta.attention(query.expand_as(key), key, value, degree=1, **options)[:, :, -1:]


def append(query, key, value, **options):
    """The last token is appended to a state of those before, half of them in its tail."""
    half, last = key.shape[2] // 2, key.shape[2] - 1
    before = query[:, :, :0], key[:, :, :half], value[:, :, :half]
    _, state = ta.attention(*before, degree=1, causal=False, scale=options["scale"], return_state=True)
    for token in range(half, last):
        ta.decode_(0 * query, key[:, :, token, None], value[:, :, token, None], state, **options)
    return ta.decode_(query, key[:, :, last:], value[:, :, last:], state, **options)


@pytest.mark.parametrize("call", [attend, append])
@pytest.mark.parametrize("constant", [0.01, 1, 100])
@pytest.mark.parametrize("keys", [1, 60])
@pytest.mark.parametrize(("share", "safe"), [(2e-3, True), (0.5e-3, False), (0.0, False), (-2e-3, False)])
def test_safe_is_a_thousandth_of_what_the_keys_give_at_score_zero(call, constant, keys, share, safe):
    """Equal keys of score share - 1, under c (1 + s)."""
    query, one = torch.ones(1, 1, 1, 1), torch.ones(1, 1, keys, 1)
    options = {"series": ta.series.polynomial([constant, constant]), "scale": 1.0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = call(query, (share - 1) * one, one, **options)
    assert [warning.category for warning in caught] == ([] if safe else [NormaliserWarning])
    assert bool(y.isfinite()) == safe


@pytest.mark.parametrize("step", [attend, ta.decode_])
def test_what_is_forgotten_asks_nothing_of_the_normaliser(step):
    """One token after 3,000 that its gate erases: its own weight is enough."""
    key = torch.zeros(1, 1, 3000, 1)
    _, state = ta.attention(key, key, key, degree=1, return_state=True)
    one = torch.ones(1, 1, 1, 1)
    y = step(one, -0.5 * one, one, state=state, log_decay=-50 * one[..., 0])
    assert y.item() == pytest.approx(1)


@pytest.mark.parametrize("degree", [0, 2, 4, 6])
@pytest.mark.parametrize("training", [True, False])
def test_even_degrees_are_safe_for_scores_of_any_size(degree, training):
    problem = make(batch=2, length=24, degree=degree, radius=40.0)
    found = (problem.recorded() if training else problem).solve()
    assert relative_error(found, problem.oracle()) < TOLERANCE[torch.float64]


numbers = st.lists(st.floats(-2, 2, width=32), min_size=36, max_size=36)


@given(query=numbers, key=numbers, value=numbers, degree=st.sampled_from([0, 2, 4]), chunk=st.sampled_from([None, 2]))
@settings(max_examples=60)
def test_with_an_even_degree_every_output_is_a_mean_of_values(query, key, value, degree, chunk):
    query, key, value = (torch.tensor(x).view(1, 2, 6, 3) for x in (query, key, value))
    y = ta.attention(query, key, value, degree=degree, chunk_size=chunk)
    room = 1e-4 * value.abs().max()
    assert (y <= value.cummax(2).values + room).all()
    assert (y >= value.cummin(2).values - room).all()


finite = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=24, max_size=24)


@given(query=finite, key=finite, value=finite, degree=st.sampled_from([2, 4]), chunk=st.sampled_from([None, 3]))
@settings(max_examples=60)
def test_no_finite_input_warns_with_an_even_degree(query, key, value, degree, chunk):
    """Warnings are errors here. What overflows is not finite any more, which the output shows."""
    query, key, value = (torch.tensor(x).view(1, 1, 8, 3) for x in (query, key, value))
    y = ta.attention(query, key, value, degree=degree, chunk_size=chunk)
    assert y.shape == (1, 1, 8, 3)


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [2, 3])
def test_autocast_changes_no_bit(degree):
    problem = make(batch=2, length=40, degree=degree, dtype=torch.float32, decay="soft")
    expected, after = problem.solve(return_state=True, chunk_size=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = problem.solve(return_state=True, chunk_size=8)
    assert torch.equal(y, expected)
    assert differences(state, after) == []


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("step", [1, 7])
def test_autocast_changes_no_bit_of_decoding(degree, step):
    problem = make(batch=2, length=40, degree=degree, dtype=torch.float32, decay="soft")
    expected, after = decode(problem, step)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = decode(problem, step)
    assert torch.equal(y, expected)
    assert differences(state, after) == []


def test_autocast_changes_no_bit_of_a_state():
    _, state = decode(make(length=tail_size(4, 3, 2) + 3, dtype=torch.float32, decay="soft"))
    moments, merged = state.moments, state.merge(state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = state.moments, state.merge(state)
    assert torch.equal(found[0], moments)
    assert differences(found[1], merged) == []


def test_autocast_changes_no_gradient():
    def gradients():
        leaves = make(length=40, dtype=torch.float32).recorded()
        return torch.autograd.grad(leaves.solve(chunk_size=8).square().sum(), leaves.inputs)

    expected = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients()
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * 3


def test_float16_does_not_overflow_on_long_sequences():
    """The sum of 100,000 values of 1,000 is 1e8; float16 ends at 65,504."""
    problem = make(heads=1, length=100_000, head_dim=2, value_dim=1, dtype=torch.float16)
    large = replace(problem, value=problem.value.abs() * 100 + 1000)
    y, state = large.solve(return_state=True)
    last = attention_reference(large.query[:, :, -50:], large.key, large.value, degree=2, causal=False)
    assert state.tokens.tolist() == [100_000]
    assert y.isfinite().all()
    assert relative_error(y[:, :, -50:], last) < 2 * TOLERANCE[torch.float16]  # `last` sees up to 49 keys more


# ---- counts and memory -----------------------------------------------------------------------------------------------


def test_a_state_of_2_to_the_24_tokens_and_more_counts_them():
    """Fed in blocks without queries, then token by token: the count is exact, sums are right to 1e-6."""
    query, key, tenth = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 0.1)
    state, blocks, size = ta.State.zeros(1, 1, 1, 1, 1), 8, 2**21
    for _ in range(blocks):
        inputs = query[:, :, :0], key.expand(1, 1, size, 1), tenth.expand(1, 1, size, 1)
        _, state = ta.attention(*inputs, degree=1, causal=False, state=state, return_state=True)
    for _ in range(1000):
        y = ta.decode_(query, key, tenth, state)
    assert state.tokens.tolist() == [2**24 + 1000]
    count = 2**24 + 1000
    assert state.moments[0, 0, :, 0].tolist() == pytest.approx([count * tenth.item(), count], rel=1e-6)
    assert y.item() == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_single_tokens_count_beyond_what_float32_adds(causal):
    """At 2^24 a float32 sum takes no single 1 any more; what rounding drops is handed from state to state."""
    sums = torch.full((1, 1, 2, 1), 2.0**24)
    state = ta.State.from_sums(sums, torch.zeros_like(sums), torch.tensor([2**24]), None, 1, 0, 1.0)
    one = torch.ones(1, 1, 1, 1)
    for _ in range(50):
        _, state = ta.attention(one, one, one, degree=0, causal=causal, state=state, return_state=True)
    assert (state.sums.double() + state.compensation.double()).flatten().tolist() == [2**24 + 50] * 2


PREFILL = """
import resource, torch, taylor_attention as ta
torch.set_num_threads(1)
query, key, value = torch.randn(3, 1, 8, 16384, 32)
y, state = ta.attention(query, key / 6, value, degree=3, return_state=True, backend="{backend}")
assert y.isfinite().all() and state.tokens.tolist() == [16384]
try:  # the peak that getrusage tells on Linux may be the parent's, of before this program was started
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:")).split()[1]
except FileNotFoundError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(int(peak) * {unit})
"""


def test_a_long_prefill_stays_within_its_memory(auto):
    """16,384 tokens at head size 32, degree 3, 8 heads: under 1.5 GB, PyTorch itself included."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    code = PREFILL.format(unit=unit, backend=auto)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert 1e8 < int(found.stdout) < 1.5e9
