"""A gain on the far part: its definition, the law, gradients, where it changes nothing, and what it is refused with."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import taylor_attention as ta
from kernels import EITHER, KERNELS
from problems import carry, decode, make
from taylor_attention.errors import ArgumentError, NormaliserWarning
from tolerances import TOLERANCE, relative_error

ROWS = pytest.mark.parametrize("backend", ["torch", *KERNELS], indirect=True)
READINGS = pytest.mark.parametrize("reading", ["taylor", "fitted"])

EXACT = TOLERANCE[torch.float64]
LENGTH = 29
GAIN = torch.tensor([-2.0, 0.75, 3.0, -0.25])  # numbers that all dtypes hold

KINDS = {
    "plain": {"kv_heads": 4},
    "groups": {},
    "one key/value head": {"kv_heads": 1},
    "wide values": {"value_dim": 11},
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
    sizes = {"batch": 2, "heads": 4, "kv_heads": 2, "length": LENGTH, "far_gain": GAIN, **KINDS[kind], **sizes}
    return make(window=window, sinks=sinks, degree=degree, **sizes)


def with_gain(problem, gain):
    return replace(problem, options={**problem.options, "far_gain": gain})


def one_call(problem, **options):
    return problem.solve(**options)


def decoded(problem, **options):
    return decode(problem, **options)[0]


BOTH = pytest.mark.parametrize("way", [one_call, decoded])


# ---- the definition --------------------------------------------------------------------------------------------------


@ROWS
@BOTH
@paired(CASES)
def test_it_multiplies_far_weights(backend, way, kind, reach):
    problem = problem_of(kind, reach)
    assert relative_error(way(problem, backend=backend), problem.oracle()) < EXACT


@EITHER
@BOTH
@paired(CASES[::2])
def test_it_multiplies_what_a_fit_reads(way, kind, reach):
    problem = problem_of(kind, reach, reading="fitted")
    assert relative_error(way(problem), problem.oracle()) < EXACT


@ROWS
@BOTH
@paired(CASES[::4])
def test_in_single_precision(backend, way, kind, reach):
    problem = problem_of(kind, reach, dtype=torch.float32)
    assert relative_error(way(problem, backend=backend), problem.oracle()) < TOLERANCE[torch.float32]


@ROWS
@READINGS
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_largest_that_are_meant(backend, dtype, way, reading):
    """Of factors from 1e-17 to 1e17, beside scores of 2."""
    gain = torch.tensor([-40.0, 40.0, 20.0, -10.0])
    problem = problem_of("groups", (3, 1, 2), far_gain=gain, reading=reading, dtype=dtype)
    assert relative_error(way(problem, backend=backend), problem.oracle()) < TOLERANCE[dtype]


@ROWS
@pytest.mark.parametrize("highest", [150, -100])
@BOTH
def test_beside_large_scores(backend, way, highest):
    """Whole numbers, which are scores without rounding; exp of 89 is too large for float32."""
    problem = problem_of("soft decay", (5, 2, 2), head_dim=1, scale=1.0)
    key = torch.randint(-150, highest + 1, problem.key.shape, generator=torch.Generator().manual_seed(1))
    problem = replace(problem, query=torch.ones_like(problem.query), key=key.double()).to(torch.float32)
    assert relative_error(way(problem, backend=backend), problem.oracle()) < TOLERANCE[torch.float32]


@EITHER
@READINGS
@BOTH
def test_minus_infinity_leaves_the_far_part_out(way, reading):
    problem = problem_of("decay and holes", (3, 1, 2), reading=reading)
    near = replace(with_gain(problem, None), degree=None)
    none = with_gain(problem, torch.full([4], -torch.inf))
    assert relative_error(way(none), near.oracle()) < EXACT


@EITHER
@READINGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@BOTH
def test_zero_changes_no_bit(way, dtype, reading):
    problem = problem_of("decay and holes", (3, 1, 2), reading=reading, dtype=dtype)
    assert torch.equal(way(with_gain(problem, torch.zeros(4))), way(with_gain(problem, None)))


FORMS = {
    "float64": GAIN.double(),
    "bfloat16": GAIN.bfloat16(),
    "every second": torch.stack([GAIN, torch.full_like(GAIN, torch.nan)], -1)[:, 0],
    "one for all": torch.tensor(0.75).expand(4),
}


@EITHER
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@BOTH
def test_any_form_of_it(way, dtype, form):
    problem = problem_of("groups", (3, 1, 2), far_gain=FORMS[form], dtype=dtype)
    assert relative_error(way(problem), problem.oracle()) < TOLERANCE[dtype]


@EITHER
@BOTH
def test_autocast_changes_no_bit(way):
    problem = problem_of("soft decay", (3, 1, 2), dtype=torch.float32)
    expected = way(problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = way(problem)
    assert torch.equal(found, expected)


@ROWS
def test_each_step_has_its_own(backend):
    """Whatever the one before had: a check that was passed once is not repeated."""
    problem = problem_of("groups", (3, 1, 2))
    gains = [GAIN.double(), None, GAIN.double().flip(0), *FORMS.values()]
    steps = [with_gain(problem, gains[i % len(gains)]) for i in range(LENGTH)]
    state = problem.new_state()
    y = torch.cat([step.part(i, i + 1).decode_(state, backend=backend) for i, step in enumerate(steps)], 2)
    expected = torch.cat([step.oracle()[:, :, i : i + 1] for i, step in enumerate(steps)], 2)
    assert relative_error(y, expected) < EXACT


# ---- the law ---------------------------------------------------------------------------------------------------------


def there_and_back(problem):
    """Decoded, prefilled in pieces, decoded again."""
    outputs, state = [], problem.new_state()
    for start, stop, in_place in [(0, 7, True), (7, 9, False), (9, 10, True), (10, 20, False), (20, LENGTH, True)]:
        part = problem.part(start, stop)
        y, state = decode(part, state=state) if in_place else part.solve(state=state, return_state=True)
        outputs.append(y)
    return torch.cat(outputs, 2)


WAYS = {
    "chunks of 5": lambda p: p.solve(chunk_size=5),
    "split in many, chunked": lambda p: carry(p, [0, 1, 2, 5, 22, 22, 23], chunk_size=4)[0],
    "pieces of 1": lambda p: carry(p, range(1, 9))[0],
    "three tokens at a time": lambda p: decode(p, 3)[0],
    "all tokens at once, in place": lambda p: decode(p, LENGTH)[0],
    "decode, prefill, decode": there_and_back,
}


@EITHER
@READINGS
@paired([("groups", (3, 1, 2)), ("decay and holes", (5, 2, 3))])
@pytest.mark.parametrize("way", WAYS)
def test_the_law(way, kind, reach, reading):
    problem = problem_of(kind, reach, reading=reading)
    assert relative_error(WAYS[way](problem), problem.oracle()) < EXACT


@EITHER
def test_the_state_knows_nothing_of_it():
    """It is a matter of reading."""
    problem = problem_of("decay and holes", (3, 1, 2))
    _, state = problem.solve(return_state=True)
    _, plain = with_gain(problem, None).solve(return_state=True)
    pairs = zip(state.tensors().values(), plain.tensors().values(), strict=True)
    assert [torch.equal(a, b) for a, b in pairs] == [True] * len(state.tensors())


BORDERS = torch.tensor([0, 5, 5, 20, 21, LENGTH], dtype=torch.int32)


@EITHER
@READINGS
@pytest.mark.parametrize("kind", ["groups", "decay and holes"])
def test_packed_sequences_are_what_they_are_alone(kind, reading):
    problem = problem_of(kind, (3, 1, 2), reading=reading, batch=1)
    expected = torch.cat([problem.part(*cut).oracle() for cut in pairwise(BORDERS.tolist())], 2)
    assert relative_error(problem.solve(cu_seqlens=BORDERS), expected) < EXACT


# ---- the normaliser --------------------------------------------------------------------------------------------------


def doubtful(share, gain):
    """1 + s is the share, for 20 keys far from the last query; the one that it sees exactly weighs next to nothing."""
    query, key = torch.zeros(1, 1, 21, 1, dtype=torch.float64), torch.full((1, 1, 21, 1), share - 1).double()
    query[..., -1, :], key[..., -1, :] = 1, -30
    value = torch.arange(21, dtype=torch.float64).view(1, 1, 21, 1)
    problem = make(degree=1, window=1, scale=1.0, far_gain=torch.tensor([gain], dtype=torch.float64))
    return replace(problem, query=query, key=key, value=value)


GAINS = pytest.mark.parametrize("gain", [-9.0, 0.0, 9.0])


@EITHER
@GAINS
@BOTH
def test_a_gain_makes_no_normaliser_unsafe(way, gain):
    problem = doubtful(2e-3, gain)
    assert relative_error(way(problem), problem.oracle()) < EXACT


@EITHER
@GAINS
@BOTH
def test_a_gain_makes_no_normaliser_safe(way, gain):
    with pytest.warns(NormaliserWarning, match="the normaliser of some queries"):
        y = way(doubtful(5e-4, gain))
    assert y.isnan().flatten().tolist() == [False] * 20 + [True]


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients(problem, answer):
    """Of the outputs, in a fixed direction, by every input and the gain."""
    leaves = problem.recorded()
    leaves = with_gain(leaves, problem.options["far_gain"].clone().requires_grad_())
    y = answer(leaves)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    return torch.autograd.grad((y * direction).sum(), (*leaves.inputs, leaves.options["far_gain"]))


def errors(found, expected):
    """The largest; NaN if any is."""
    return torch.tensor([relative_error(a, b) for a, b in zip(found, expected, strict=True)]).amax().item()


ANSWERS = {
    "one call": lambda p: p.solve(chunk_size=8),
    "pieces": lambda p: carry(p, [2, 11])[0],
}


@EITHER
@READINGS
@paired(CASES[::2])
@pytest.mark.parametrize("answer", ANSWERS)
def test_gradients_are_those_of_the_definition(answer, kind, reach, reading):
    problem = problem_of(kind, reach, reading=reading, far_gain=GAIN.double())
    expected = gradients(problem, lambda p: p.oracle())
    assert errors(gradients(problem, ANSWERS[answer]), expected) < 10 * EXACT


@EITHER
@READINGS
def test_gradients_in_single_precision(reading):
    problem = problem_of("soft decay", (3, 1, 2), reading=reading)
    expected = gradients(with_gain(problem, GAIN.double()), lambda p: p.oracle())
    assert errors(gradients(problem.to(torch.float32), ANSWERS["one call"]), expected) < TOLERANCE[torch.float32]


@EITHER
@READINGS
def test_where_nothing_is_far_the_gradient_is_zero(reading):
    """Not missing, which optimisers and parallel training would trip over."""
    problem = problem_of("groups", (LENGTH, 0, 2), reading=reading)
    assert torch.equal(gradients(problem, ANSWERS["one call"])[-1], torch.zeros(4))


@pytest.mark.parametrize("reading", ["taylor", pytest.param("fitted", marks=pytest.mark.slow)])
def test_compiled_attention_is_the_same_with_its_backward(reading):
    torch._dynamo.reset()
    problem = problem_of("groups", (3, 0, 2), reading=reading, far_gain=GAIN.double())
    compiled = torch.compile(lambda p: p.solve(), fullgraph=True, backend="aot_eager")
    assert errors(gradients(problem, compiled), gradients(problem, lambda p: p.solve())) < EXACT


# ---- misuse ----------------------------------------------------------------------------------------------------------

X = torch.randn(2, 4, 6, 4, generator=torch.Generator().manual_seed(0))
Y = X[:, :, :1]

MISUSE = {
    "no near tokens": ({"window": 0}, GAIN, "None without a window or sinks"),
    "no near tokens, fitted": ({"window": 0, "reading": "fitted"}, GAIN, "None without a window or sinks"),
    "no far tokens": ({"degree": None}, GAIN, "None without a degree"),
    "a number": ({}, 0.5, r"a tensor \[Hq\], got float"),
    "one for each key": ({}, GAIN.expand(2, 4), r"a tensor \[Hq\], got shape \(2, 4\)"),
    "of key/value heads": ({}, GAIN[:2], r"shape \(4,\), got \(2,\)"),
    "whole numbers": ({}, GAIN.long(), "a floating-point tensor of 16, 32 or 64 bits, got torch.int64"),
    "elsewhere": ({}, GAIN.to("meta"), "the query's device cpu, got meta"),
}


@pytest.mark.parametrize("misuse", MISUSE)
def test_misuse_is_named(misuse):
    options, gain, message = MISUSE[misuse]
    options = {"degree": 2, "window": 3, **options}
    with pytest.raises(ArgumentError, match=f"^far_gain: expected {message}"):
        ta.attention(X, X[:, :2], X[:, :2], far_gain=gain, **options)
    reading = options.pop("reading", "taylor")
    state = ta.State.zeros(2, 2, 4, 4, **options)
    with pytest.raises(ArgumentError, match=f"^far_gain: expected {message}"):
        ta.decode_(Y, Y[:, :2], Y[:, :2], state, far_gain=gain, reading=reading)
    assert state.tokens.tolist() == [0, 0]


def test_decoding_records_no_gradients():
    state = ta.State.zeros(2, 2, 4, 4, 2, window=3)
    with pytest.raises(ArgumentError, match="^state: expected no gradients"):
        ta.decode_(Y, Y[:, :2], Y[:, :2], state, far_gain=GAIN.clone().requires_grad_())
