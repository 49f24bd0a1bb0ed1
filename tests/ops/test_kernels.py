"""What is particular to the compiled kernels: panels and tiles that are not full, threads, addresses, compensation."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import KERNELS, selected
from problems import decode, differences, make, sum_up
from taylor_attention import series
from taylor_attention.ops import compiled
from taylor_attention.ops.attention import FULL_RESET
from taylor_attention.ops.operator import attend
from taylor_attention.ops.tiling import Tiling
from tolerances import TOLERANCE, relative_error

pytestmark = pytest.mark.parametrize("backend", KERNELS, indirect=True)

EXACT = TOLERANCE[torch.float64]
SINGLE = TOLERANCE[torch.float32]


def sums_of(problem, backend, start=None, chunk=0, keep=True, recorded=True):
    """[N | Z] before the division, and the moments at the end, from the operator; `start` is a state."""
    out, end, dropped, _ = attend(*arguments_of(problem, start, chunk, keep), backend, recorded)
    return out, end + dropped


def arguments_of(problem, start, chunk, keep):
    """What the operator takes, up to the name of the backend."""
    query, key, value = problem.arguments
    scale = problem.options.get("scale", query.shape[3] ** -0.5)
    kernel = problem.options.get("series", series.EXP).coefficients(problem.degree)
    past = (None, None) if start is None else (start.sums, start.compensation)
    gates = problem.along.get("log_decay")
    gates = None if gates is None else gates.clamp(min=FULL_RESET)
    visible, causal = problem.along.get("key_padding_mask"), problem.options.get("causal", True)
    along = visible, gates, None
    return query * scale, key, value, *along, *past, kernel, causal, chunk, keep


def gradients_of(problem, compute, start=None):
    """By every input and the sums at the start, of outputs and moments weighed at random; compute(problem, sums)."""
    leaves = problem.recorded()
    sums = None if start is None else start.sums.double().clone().requires_grad_()
    found = compute(leaves, sums)
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in found]
    loss = sum((x.double() * w).sum() for x, w in zip(found, weights, strict=True))
    inputs = leaves.inputs if sums is None else (*leaves.inputs, sums)
    return torch.autograd.grad(loss, inputs, materialize_grads=True)


def assert_same(found, expected, tolerance=EXACT):
    errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(errors) < tolerance


def assert_right(problem, backend, start=None, chunk=0, recorded=True):
    """Outputs, moments and gradients are those of the definition, in float64."""
    assert_same(sums_of(problem, backend, start, chunk), sum_up(problem, None if start is None else start.sums))

    def compute(p, sums):
        state = None if start is None else replace(start, sums=sums)
        return sums_of(p, backend, state, chunk, recorded=recorded)

    assert_same(gradients_of(problem, compute, start), gradients_of(problem, sum_up, start), 100 * EXACT)


# ---- sizes around the widths of vectors, panels, tiles ---------------------------------------------------------------


@pytest.mark.parametrize("tokens", range(1, 41))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tokens_around_the_widths_of_panels(backend, tokens, dtype):
    sizes = {"value_dim": [0, 1, 5, 7, 8, 9][tokens % 6], "head_dim": 1 + 7 * tokens % 20, "degree": tokens * 5 % 6}
    problem = make(batch=2, length=tokens, decay="soft", dtype=dtype, **sizes)
    expected = sum_up(problem)
    for chunk in (0, 1 + tokens // 3, 1 + tokens // 2):
        assert_same(sums_of(problem, backend, chunk=chunk), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("head_dim", range(1, 21))
@pytest.mark.parametrize("degree", range(6))
def test_monomials_around_the_widths_of_panels(backend, head_dim, degree):
    """Suffixes of every length begin and end inside panels; blocks of the highest degree are formed or not."""
    value_dim = [9, 0, 7, 1, 8, 5][(head_dim + degree) % 6]
    problem = make(heads=1, length=33, head_dim=head_dim, value_dim=value_dim, degree=degree)
    start = make(heads=1, length=5, head_dim=head_dim, value_dim=value_dim, degree=degree, seed=1)
    _, state = start.solve(return_state=True)
    assert_right(problem, backend, state, 11)


@st.composite
def problems(draw):
    """Any mode, at small sizes, with the options that the operator takes: problem, state before, chunk."""
    causal = draw(st.booleans(), label="causal")
    degree = draw(st.integers(0, 5), label="degree")
    kv_heads = draw(st.integers(1, 2), label="key/value heads")
    options = {
        "batch": draw(st.integers(1, 2), label="batch"),
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.integers(1, 3), label="group"),
        "head_dim": draw(st.integers(1, 20 if degree < 4 else 8), label="head_dim"),
        "value_dim": draw(st.integers(0, 20), label="value_dim"),
        "degree": degree,
        "mask": draw(st.sampled_from([None, "left", "holes", "row 0 hidden"]), label="mask"),
        "decay": draw(st.sampled_from([None, "soft", "hard"]), label="decay") if causal else None,
        "causal": causal,
    }
    length = draw(st.integers(0, 70), label="length")
    queries = None if causal else draw(st.integers(0, 70), label="queries")
    problem = make(**options, length=length, queries=queries)
    start = None
    if draw(st.booleans(), label="started"):
        before = make(**{**options, "mask": None}, length=6, queries=6, seed=1)
        _, start = before.solve(return_state=True, backend="torch")
    return problem, start, draw(st.integers(0, 80), label="chunk"), draw(st.booleans(), label="recorded")


@given(drawn=problems())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])  # one backend for all examples
def test_any_problem(backend, drawn):
    problem, start, chunk, recorded = drawn
    assert_right(problem, backend, start, chunk, recorded)


@pytest.mark.parametrize("length", [257, 513, 640, 1100])
@pytest.mark.parametrize(
    "mode", [{}, {"decay": "hard", "mask": "holes"}, {"heads": 3, "kv_heads": 1}, {"causal": False, "mask": "left"}]
)
def test_chunks_longer_than_a_tile(backend, length, mode):
    """A chunk that is larger than the sequence, computed in several tiles, and chunks that end inside one."""
    problem = make(**{"heads": 1, "length": length, "head_dim": 3, "value_dim": 2, **mode})
    start = make(**{"heads": 1, "length": 9, "head_dim": 3, "value_dim": 2, **mode}, seed=1).solve(return_state=True)[1]
    for chunk in (2000, 600):
        assert_same(sums_of(problem, backend, start, chunk), sum_up(problem, start.sums))


@pytest.mark.parametrize("mode", [{}, {"decay": "hard", "mask": "holes"}, {"heads": 3, "kv_heads": 1}])
@pytest.mark.parametrize("length", [513, 700])
def test_gradients_of_chunks_longer_than_a_tile(backend, length, mode):
    problem = make(**{"heads": 1, "length": length, "head_dim": 3, "value_dim": 2, **mode})
    assert_right(problem, backend, chunk=1000)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1100), (3, 700), (700, 3), (1100, 1), (600, 600)])
@pytest.mark.parametrize("started", [True, False])
def test_runs_of_different_length_that_all_see_each_other(backend, queries, keys, started, direct, monkeypatch):
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 3, "value_dim": 2, "causal": False}
    problem = make(length=keys, queries=queries, mask="holes", **sizes)
    _, start = make(length=9, seed=1, **sizes).solve(return_state=True)
    monkeypatch.setattr(compiled, "choose", lambda *_, **__: Tiling(512, 256, 64, direct))
    assert_right(problem, backend, start if started else None)


def test_tiles_that_many_monomials_make_small(backend):
    """A tile is 64 tokens here: a chunk has several, and so has the next one."""
    problem = make(heads=1, length=170, head_dim=16, value_dim=1, degree=6, decay="soft")
    assert_same(sums_of(problem, backend, chunk=100), sum_up(problem))


MODES = {
    "plain": {},
    "decay and holes": {"decay": "hard", "mask": "holes"},
    "groups": {"heads": 4, "kv_heads": 2},
    "more rows than are cut": {"batch": 17},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("chunk", [0, 16, 23])
def test_gradients_with_moments_kept_and_rebuilt(backend, mode, started, chunk):
    """Rows of one task and of two, by scores alone and by moments, which a recorded pass keeps."""
    sizes = {"heads": 2, "head_dim": 3, "value_dim": 2, "degree": 2, **MODES[mode]}
    problem = make(length=70, **sizes)
    start = make(length=9, seed=1, **sizes).solve(return_state=True)[1] if started else None
    for recorded in (True, False):
        kept = attend(*arguments_of(problem, start, chunk, True), backend, recorded)[3]
        assert (kept.numel() > 0) == (recorded and chunk > 0)
        assert_right(problem, backend, start, chunk, recorded)


@pytest.mark.parametrize("sizes", [{"degree": 6}, {"causal": False}, {"length": 16}], ids=str)
def test_moments_are_not_kept_where_they_do_not_pay(backend, sizes):
    """More than twice the inputs; seen by all; of one chunk."""
    problem = make(**{"length": 70, "head_dim": 4, "value_dim": 3, **sizes})
    assert attend(*arguments_of(problem, None, 16, False), backend, True)[3].numel() == 0


# ---- hidden keys, gates, borders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 16, 17, 32, 33, 64])
@pytest.mark.parametrize("decay", ["soft", "hard", "strong", "resets"])
@pytest.mark.parametrize("mask", [None, "holes", "right"])
def test_gates_and_hidden_keys_across_borders_of_chunks(backend, chunk, decay, mask):
    problem = make(batch=2, heads=4, kv_heads=2, length=100, decay=decay, mask=mask)
    _, start = make(batch=2, heads=4, kv_heads=2, length=9, decay="soft", seed=1).solve(return_state=True)
    assert_same(sums_of(problem, backend, start, chunk), sum_up(problem, start.sums))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_gate_inside_a_panel_fades_exactly_what_is_before_it(backend, dtype):
    """Single gates at every place of a chunk of three panels of the widest vectors."""
    plain = make(heads=1, length=100, head_dim=2, value_dim=1, dtype=dtype)
    gates = torch.zeros(100, 1, 100, dtype=dtype)
    gates[torch.arange(100), 0, torch.arange(100)] = -3
    problem = plain.each(lambda x: x.expand(100, -1, -1, -1))
    problem = replace(problem, along={"log_decay": gates})
    assert_same(sums_of(problem, backend, chunk=128), sum_up(problem), TOLERANCE[dtype])


# ---- addresses -------------------------------------------------------------------------------------------------------


def shifted(x):
    """The same numbers, beginning at the second element of their memory."""
    memory = torch.cat([x.new_full((1,), torch.nan if x.is_floating_point() else 1), x.flatten()])
    return memory[1:].view(x.shape)


def every_second(x):
    """The same numbers with others in between."""
    return torch.stack([x, torch.full_like(x, torch.nan) if x.is_floating_point() else ~x], -1)[..., 0]


def tokens_outside(x):
    """The same numbers with the tokens as the slowest axis (tensors of 4 axes: tokens third; else last)."""
    axis = 2 if x.ndim == 4 else x.ndim - 1
    return x.movedim(axis, 0).contiguous().movedim(0, axis)


@pytest.mark.parametrize("layout", [shifted, every_second, tokens_outside])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", [{"decay": "hard", "mask": "holes"}, {"causal": False, "queries": 9, "mask": "holes"}])
def test_any_address_and_strides_of_everything(backend, layout, dtype, mode):
    """Inputs, masks, gates, states and gradients by the outputs; not a bit changes."""
    problem = make(**{"batch": 2, "heads": 4, "kv_heads": 2, "length": 45, "value_dim": 5, "dtype": dtype, **mode})
    _, start = make(batch=2, heads=4, kv_heads=2, length=9, value_dim=5, seed=1, dtype=dtype).solve(return_state=True)

    def compute(change, p, sums):
        """The leaves keep their layout; what the operator sees does not."""
        query, key, value = map(change, p.arguments)
        along = {name: change(x) for name, x in p.along.items()}
        state = replace(start, sums=change(sums.to(dtype)), compensation=change(start.compensation))
        p = replace(p, query=query, key=key, value=value, along=along)
        return [change(x) for x in sums_of(p, backend, state, 16)]

    def answer(change):
        return [
            *compute(change, problem, start.sums),
            *gradients_of(problem, lambda p, sums: compute(change, p, sums), start),
        ]

    same = [torch.equal(a, b) for a, b in zip(answer(layout), answer(lambda x: x), strict=True)]
    assert same == [True] * len(same)


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads(monkeypatch):
    """A way to compute with a number of threads, however small the problem."""
    before = torch.get_num_threads()
    monkeypatch.setattr(compiled, "count_threads", lambda *_: torch.get_num_threads())
    yield torch.set_num_threads
    torch.set_num_threads(before)


THREADED = {
    "one row, columns cut": {"heads": 1},
    "one row, fewer columns than threads": {"heads": 1, "value_dim": 0},
    "two rows": {"heads": 2, "mask": "holes"},
    "five rows": {"batch": 5, "heads": 1, "decay": "hard"},
    "more rows than are cut": {"batch": 16, "heads": 2},
    "groups": {"heads": 6, "kv_heads": 2, "decay": "hard", "mask": "holes"},
    "all": {"heads": 1, "causal": False, "queries": 9},
    "all, many queries": {"heads": 3, "causal": False, "queries": 200},
    "no row": {"batch": 0},
}


@pytest.mark.parametrize("kind", THREADED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_bit_depends_on_the_number_of_threads(backend, kind, dtype, threads):
    sizes = {"length": 70, "head_dim": 9, "value_dim": 10, "degree": 3, **THREADED[kind], "dtype": dtype}
    problem = make(**sizes)
    _, start = make(**{**sizes, "length": 9, "queries": 9, "seed": 1}).solve(return_state=True)

    def compute(p, sums):
        return sums_of(p, backend, replace(start, sums=sums.to(dtype)), 16)

    found = {}
    for count in (1, 2, 3, 7):
        threads(count)
        found[count] = [*compute(problem, start.sums), *gradients_of(problem, compute, start)]
    for count in (2, 3, 7):
        assert [torch.equal(a, b) for a, b in zip(found[count], found[1], strict=True)] == [True] * len(found[1])
    assert_same(found[1][:2], sum_up(problem, start.sums), TOLERANCE[dtype])


@pytest.mark.parametrize(
    "sizes", [{"heads": 1}, {"heads": 3, "batch": 2}, {"heads": 9, "kv_heads": 3, "batch": 2}], ids=str
)
@pytest.mark.parametrize("degree", [2, 3])
def test_no_bit_of_decoding_depends_on_the_number_of_threads(backend, sizes, degree, threads):
    """The tail is folded on the way; more monomials than are read at once."""
    sizes = {"length": 70, "head_dim": 16, "value_dim": 5, "degree": degree, "mask": "holes", "decay": "soft", **sizes}
    problem, found = make(**sizes, dtype=torch.float32), {}
    for count in (1, 2, 3, 7):
        threads(count)
        found[count] = decode(problem, backend=backend)
    for count in (2, 3, 7):
        assert torch.equal(found[count][0], found[1][0])
        assert differences(found[count][1], found[1][1]) == []


# ---- precision -------------------------------------------------------------------------------------------------------


def test_every_instruction_set_gives_the_same(backend):
    """To rounding: outputs, moments and gradients beside those of the set that every machine has."""
    sizes = {"batch": 2, "heads": 4, "kv_heads": 2, "length": 150, "head_dim": 9, "value_dim": 6, "degree": 3}
    problem = make(**sizes, decay="soft", mask="left")

    def answer(name):
        return [*sums_of(problem, name), *gradients_of(problem, lambda p, _: sums_of(p, name, chunk=32))]

    found = answer(backend)
    with selected("cpu, baseline") as baseline:
        assert_same(found, answer(baseline), 10 * EXACT)


def summed_tenths(backend, length, chunk, head_dim=1, degree=0, keep=True, causal=True):
    """Sums of equal numbers, whose rounding errors all have one sign, over the true sums: running, and at the end."""
    key = torch.ones(1, 1, length, head_dim)
    value = torch.full((1, 1, length, 1), 0.1)
    query = key if causal else key[:, :, :0]
    kernel = (1.0, *[0.0] * degree)
    out, end, dropped, _ = attend(query, key, value, *[None] * 5, kernel, causal, chunk, keep, backend)
    tenths = value[0, 0, 0, 0].double() * torch.arange(1, length + 1)
    return out[0, 0, :, 0].double() / tenths[: out.shape[2]], (end.double() + dropped.double()) / tenths[-1]


@pytest.mark.parametrize("keep", [True, False])
def test_running_sums_of_many_chunks_do_not_drift(backend, keep):
    running, _ = summed_tenths(backend, 60_000, 7, keep=keep)
    assert (running - 1).abs().max() < 3e-7


@pytest.mark.parametrize(("head_dim", "degree"), [(1, 0), (40, 1)], ids=["a part of a panel", "whole panels"])
def test_moments_of_many_chunks_do_not_drift(backend, head_dim, degree):
    _, end = summed_tenths(backend, 20_000, 7, head_dim, degree)
    assert (end[0, 0, 0] - 1).abs().max() < 2e-7


def sum_equal(backend, length, gate=None, causal=True):
    """The sum at the end of equal numbers, of 40 different ones, each over what it is in exact arithmetic."""
    key, value = torch.ones(1, 1, length, 1), torch.linspace(1, 2, 40).expand(1, 1, length, 40)
    gates = None if gate is None else torch.full((1, 1, length), gate)
    along = None, gates, None, None, None
    _, end, dropped, _ = attend(
        key[:, :, :0] if not causal else key, key, value, *along, (1.0,), causal, 0, True, backend
    )
    rate = 0.0 if gates is None else gates[0, 0, 0].item()
    weight = length if rate == 0 else math.expm1(length * rate) / math.expm1(rate)
    return (end.double() + dropped.double())[0, 0, :40, 0] / (weight * value[0, 0, 0].double())


@pytest.mark.parametrize("length", [512, 500, 65, 4096])
def test_long_tiles_are_summed_in_short_runs(backend, length):
    assert (sum_equal(backend, length, causal=False) - 1).abs().max() < 5e-7


@pytest.mark.parametrize("gate", [-1e-3, -1e-6, -3e-8, -1e-9])
def test_gates_near_one_fade_sums_by_what_they_are(backend, gate):
    """A thousand factors that float32 cannot hold: each would be wrong by up to 2^-25, always to the same side."""
    assert (sum_equal(backend, 64_000, gate) - 1).abs().max() < 5e-7


@pytest.mark.parametrize("chunk", [0, 16])
@pytest.mark.parametrize("causal", [True, False])
def test_what_rounding_dropped_before_is_kept_and_fades_with_the_sums(backend, causal, chunk):
    problem = make(length=70, value_dim=6, decay="soft" if causal else None, causal=causal)
    _, start = make(length=9, value_dim=6, seed=1).solve(return_state=True)
    start = replace(start, compensation=1e-3 * torch.randn_like(start.sums))
    _, found = sums_of(problem, backend, start, chunk)
    _, expected = sum_up(problem, start.sums + start.compensation)
    assert relative_error(found, expected) < EXACT
