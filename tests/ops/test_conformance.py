"""Every backend computes what the specification says. A new backend adds one row to BACKENDS."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from kernels import KERNELS
from problems import decode, make
from taylor_attention import series
from taylor_attention.ops import chunked, compiled
from taylor_attention.ops.tiling import Tiling
from tolerances import TOLERANCE, relative_error

BACKENDS = ["torch", *KERNELS]
EXACT = [torch.float32, torch.float64]
ROUNDED = [torch.bfloat16, torch.float16]

pytestmark = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


def error(problem, **options):
    """Of the output, against the float64 oracle of the same inputs."""
    return relative_error(problem.solve(**options), problem.oracle())


@lru_cache(maxsize=8)
def solved(**sizes):
    """A problem that float32 holds exactly, in both precisions, and its answer: computed once."""
    problem = make(**sizes, dtype=torch.float32)
    return {torch.float32: problem, torch.float64: problem.to(torch.float64)}, problem.oracle()


# ---- sizes -----------------------------------------------------------------------------------------------------------

SIZES = [  # head_dim, degree, length, value_dim: every degree, head sizes up to 64, where the state is small enough
    (1, 0, 50, 1),
    (1, 6, 900, 3),
    (2, 5, 333, 2),
    (3, 4, 4096, 5),
    (4, 1, 257, 4),
    (5, 6, 301, 7),
    (8, 3, 800, 8),
    (8, 6, 300, 1),
    (16, 2, 1000, 16),
    (16, 5, 129, 3),
    (24, 4, 200, 8),
    (32, 3, 200, 32),
    (32, 4, 130, 2),
    (48, 2, 300, 16),
    (64, 0, 90, 64),
    (64, 1, 300, 64),
    (64, 2, 4096, 4),
    (64, 3, 140, 4),
    (64, 4, 70, 1),
]


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize(("head_dim", "degree", "length", "value_dim"), SIZES)
def test_sizes(backend, dtype, head_dim, degree, length, value_dim, chunk):
    sizes = {"length": length, "head_dim": head_dim, "value_dim": value_dim, "degree": degree}
    problems, expected = solved(heads=1 if length > 1000 else 2, kv_heads=1, **sizes)
    found = problems[dtype].solve(backend=backend, chunk_size=chunk)
    assert relative_error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("degree", range(7))
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_degrees(backend, degree, causal, dtype):
    problem = make(batch=2, heads=4, kv_heads=2, length=75, degree=degree, causal=causal, dtype=dtype)
    assert error(problem, backend=backend, chunk_size=16) < TOLERANCE[dtype]


# ---- modes -----------------------------------------------------------------------------------------------------------

MODES = {
    "causal": {},
    "one token": {"length": 1},
    "two tokens": {"length": 2},
    "all": {"causal": False},
    "cross, few queries": {"causal": False, "queries": 5},
    "cross, one query": {"causal": False, "queries": 1},
    "cross, many queries": {"causal": False, "queries": 200, "length": 9},
    "cross, one key": {"causal": False, "queries": 9, "length": 1},
    "groups of 3": {"heads": 6, "kv_heads": 2},
    "one key/value head": {"heads": 4, "kv_heads": 1},
    "groups, all": {"heads": 6, "kv_heads": 2, "causal": False, "queries": 21},
    "scale": {"scale": 0.05},
    "negative scale": {"scale": -0.3, "radius": -2.0},
    "value_dim 1": {"value_dim": 1},
    "value_dim large": {"value_dim": 40},
    "padding left": {"mask": "left"},
    "padding right": {"mask": "right"},
    "holes": {"mask": "holes"},
    "holes, all": {"mask": "holes", "causal": False, "queries": 7},
    "a hidden row": {"mask": "row 0 hidden"},
    "a hidden row, all": {"mask": "row 0 hidden", "causal": False},
    "soft decay": {"decay": "soft"},
    "hard decay": {"decay": "hard"},
    "strong decay": {"decay": "strong"},
    "resets": {"decay": "resets"},
    "decay, groups": {"decay": "hard", "heads": 6, "kv_heads": 2},
    "decay and holes": {"decay": "hard", "mask": "holes"},
    "resets and padding": {"decay": "resets", "mask": "left"},
}


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("mode", MODES)
def test_modes(backend, mode, chunk, dtype):
    problem = make(**{"batch": 3, "length": 61, "dtype": dtype, **MODES[mode]})
    assert error(problem, backend=backend, chunk_size=chunk) < TOLERANCE[dtype]


CUTS = {
    "one tile": Tiling(chunk=64, rows=64, together=64, direct=False),
    "small tiles": Tiling(chunk=16, rows=5, together=64, direct=False),
    "chunks of one": Tiling(chunk=1, rows=32, together=64, direct=False),
    "row by row": Tiling(chunk=16, rows=16, together=1, direct=False),
    "rows in twos and threes": Tiling(chunk=7, rows=3, together=4, direct=False),
}
SCORES_ALONE = {
    "scores alone": Tiling(chunk=64, rows=64, together=64, direct=True),
    "scores alone, small tiles": Tiling(chunk=64, rows=5, together=4, direct=True),
}


@pytest.mark.parametrize("mode", ["causal", "all", "cross, few queries", "groups, all", "decay, groups", "holes, all"])
@pytest.mark.parametrize("cut", [*CUTS, *SCORES_ALONE])
def test_however_the_work_is_cut(backend, mode, cut, monkeypatch):
    """Each way through the loops at a size where the library would choose only one of them."""
    problem = make(**{"batch": 3, "heads": 2, "length": 61, **MODES[mode]})
    monkeypatch.setattr(chunked, "choose", lambda *_, **__: {**CUTS, **SCORES_ALONE}[cut])
    monkeypatch.setattr(compiled, "choose", lambda *_, **__: {**CUTS, **SCORES_ALONE}[cut])
    assert error(problem, backend=backend) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("length", [1000, 2049])
def test_strong_gates_keep_their_accuracy_over_long_sequences(backend, length):
    """A sum of log decay of -20,000 inside which differences of 10 matter."""
    problem = make(heads=1, length=length, decay="strong", dtype=torch.float32)
    assert error(problem, backend=backend, chunk_size=1000) < TOLERANCE[torch.float32]


# ---- series ----------------------------------------------------------------------------------------------------------

SERIES = {
    "cosh": series.COSH,
    "geometric": series.GEOMETRIC,
    "fitted to a Gaussian": series.fitted_gaussian(0.2, 0.5, 4),
    "fitted on an interval": series.fitted_chebyshev(-1, 1, 4),
    "user's": series.polynomial([3, 1, 0.5, -0.25, 2]),
    "user's, not positive": series.polynomial([1, 0.5, 0, 0, -0.1]),
    "user's, without constant": series.polynomial([0, 0, 1, 0, 0.5]),
}


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("mode", ["causal", "all", "decay and holes", "groups of 3"])
@pytest.mark.parametrize("kernel", SERIES)
def test_series(backend, kernel, mode, dtype):
    options = {"batch": 2, "length": 50, "degree": 4, "radius": 0.9, "series": SERIES[kernel], "dtype": dtype}
    problem = make(**{**options, **MODES[mode]})
    assert error(problem, backend=backend, chunk_size=16) < TOLERANCE[dtype]


@pytest.mark.parametrize("degree", [1, 3, 5])
@pytest.mark.parametrize("mode", MODES)
def test_odd_degrees(backend, mode, degree):
    """The normaliser is checked on the way, in every mode."""
    problem = make(**{"batch": 2, "length": 40, "degree": degree, **MODES[mode], "radius": 0.9, "scale": 0.5})
    assert error(problem, backend=backend, chunk_size=8) < TOLERANCE[torch.float64]


# ---- layouts, dtypes, nothing at all ---------------------------------------------------------------------------------


LAYOUTS = {
    "transposed view": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # [B, T, H, d] in memory
    "tokens last": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every second": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
    "slice of tokens": lambda x: torch.cat([x, torch.full_like(x, torch.nan)], 2)[:, :, : x.shape[2]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["causal", "all", "decay and holes", "groups of 3"])
def test_any_strides(backend, layout, mode):
    problem = make(**{"batch": 3, "length": 45, **MODES[mode]})
    query, key, value = map(LAYOUTS[layout], problem.arguments)
    assert not query.is_contiguous()
    strided = replace(problem, query=query, key=key, value=value)
    found = strided.solve(backend=backend, chunk_size=16)
    assert relative_error(found, problem.oracle()) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("step", [1, 4])
def test_any_strides_in_decoding(backend, layout, step):
    problem = make(batch=3, heads=6, kv_heads=2, length=12, mask="holes", decay="hard")
    query, key, value = map(LAYOUTS[layout], problem.arguments)
    found, _ = decode(replace(problem, query=query, key=key, value=value), step, backend=backend)
    assert relative_error(found, problem.oracle()) < TOLERANCE[torch.float64]


def test_expanded_inputs(backend):
    """One key/value head shared by expansion, of stride zero."""
    problem = make(batch=2, heads=3, kv_heads=1, length=30)
    _, key, value = problem.arguments
    shared = replace(problem, key=key.expand(2, 3, 30, 4), value=value.expand(2, 3, 30, 3))
    assert relative_error(shared.solve(backend=backend), problem.oracle()) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("mode", ["causal", "groups of 3", "decay and holes", "all"])
@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("length", [40, 500])
def test_half_precision_costs_no_more_than_rounding_the_inputs(backend, dtype, mode, length):
    exact = make(**{"length": length, "head_dim": 8, "value_dim": 8, **MODES[mode]})
    rounded = exact.to(dtype)
    found = rounded.solve(backend=backend)
    assert found.dtype == dtype
    assert relative_error(found, exact.oracle()) <= 2 * relative_error(rounded.oracle(), exact.oracle())


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_half_precision_rounds_only_the_output(backend, dtype):
    problem = make(length=500, head_dim=8, dtype=dtype)
    assert error(problem, backend=backend, chunk_size=64) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [*EXACT, *ROUNDED], ids=str)
def test_the_output_has_the_dtype_of_the_inputs_and_the_state_that_of_the_sums(backend, dtype):
    y, state = make(length=20, dtype=dtype).solve(backend=backend, return_state=True)
    assert (y.dtype, state.dtype) == (dtype, torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize(
    "sizes",
    [{"length": 0}, {"batch": 0}, {"causal": False, "queries": 0}, {"causal": False, "length": 0, "queries": 4}],
    ids=["no tokens", "no sequences", "no queries", "no keys"],
)
def test_nothing_gives_nothing(backend, sizes, degree):
    problem = make(**{"batch": 2, "length": 5, "degree": degree, **sizes})
    y, state = problem.solve(backend=backend, return_state=True)
    assert torch.equal(y, torch.zeros(*problem.query.shape[:3], 3, dtype=torch.float64))
    assert state.tokens.tolist() == [problem.length] * problem.query.shape[0]
    assert bool(state.moments.any()) == (problem.key.numel() > 0)
