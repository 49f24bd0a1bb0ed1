"""Far scores read by a fit to each query's own: its definition, the law, gradients, how good it is, where it ends."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import taylor_attention as ta
from kernels import EITHER, ROWS
from problems import carry, decode, differences, errors, gradients, make
from taylor_attention.core.series import fitted_gaussian
from taylor_attention.errors import ArgumentError, NormaliserError, NormaliserWarning
from taylor_attention.ops.reading import largest_variance
from taylor_attention.ops.reference import softmax_reference
from tolerances import TOLERANCE, relative_error

EXACT = TOLERANCE[torch.float64]
LENGTH = 29

KINDS = {
    "plain": {},
    "groups": {"heads": 6, "kv_heads": 2},
    "left padding": {"mask": "left"},
    "holes": {"mask": "holes"},
    "a hidden row": {"mask": "row 0 hidden"},
    "soft decay": {"decay": "soft"},
    "resets": {"decay": "resets"},
    "decay and holes": {"decay": "hard", "mask": "holes"},
    "decay, padding, groups": {"decay": "soft", "mask": "left", "heads": 4, "kv_heads": 2},
}

CASES = [  # kind; window, sinks, degree
    ("plain", (0, 0, 0)),
    ("plain", (0, 0, 1)),
    ("plain", (0, 0, 2)),
    ("plain", (0, 0, 3)),
    ("plain", (0, 0, 4)),
    ("plain", (LENGTH + 3, 0, 2)),
    ("groups", (0, 0, 2)),
    ("groups", (5, 3, 4)),
    ("left padding", (0, 0, 4)),
    ("holes", (0, 0, 2)),
    ("holes", (3, 1, 3)),
    ("a hidden row", (0, 0, 1)),
    ("a hidden row", (0, 2, 2)),
    ("soft decay", (0, 0, 4)),
    ("soft decay", (6, 0, 0)),
    ("resets", (0, 0, 2)),
    ("resets", (3, 0, 1)),
    ("decay and holes", (0, 0, 3)),
    ("decay and holes", (5, 2, 2)),
    ("decay, padding, groups", (0, 0, 0)),
    ("decay, padding, groups", (16, 4, 2)),
    ("decay, padding, groups", (4, 0, None)),
]


def name(x):
    return "W{} S{} D{}".format(*x) if isinstance(x, tuple) else str(x)


def paired(cases):
    return pytest.mark.parametrize(("kind", "reach"), cases, ids=name)


def problem_of(kind, reach, **sizes):
    """Even degrees with scores up to 4, where the spread of many queries is more than a fit counts."""
    window, sinks, degree = reach
    odd = degree is not None and degree % 2 == 1
    options = {"batch": 2, "length": LENGTH, "degree": degree, "window": window, "sinks": sinks, "reading": "fitted"}
    return make(**{**options, "radius": 0.8 if odd else 4.0, **KINDS[kind], **sizes})


def scored(scores, values=None, **options):
    """One head of size 1 whose scores are the keys: every query is 1, except where told."""
    key = torch.as_tensor(scores, dtype=torch.float64).view(1, 1, -1, 1)
    values = torch.eye(key.shape[2], dtype=torch.float64) if values is None else values
    options = {"scale": 1.0, "reading": "fitted", **options}
    return replace(make(**options), query=torch.ones_like(key), key=key, value=values.view(1, 1, key.shape[2], -1))


def one_call(problem):
    return problem.solve()


def decoded(problem):
    return decode(problem)[0]


BOTH = pytest.mark.parametrize("way", [one_call, decoded], ids=["one call", "decoding"])


# ---- the definition --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def solved(kind, reach):
    """A problem that float32 holds exactly, and its answer by the definition: computed once."""
    problem = problem_of(kind, reach, dtype=torch.float32)
    return problem, problem.oracle()


@pytest.mark.parametrize("degree", [2, 3, 4, 5])
def test_the_definition_is_the_gaussian_fit_of_each_query(degree):
    """The reference against `fitted_gaussian`, query by query; spreads too small to be clamped."""
    problem = problem_of("plain", (0, 0, degree), batch=1, heads=1, length=9, radius=1.2)
    scores = (problem.query @ problem.key.mT)[0, 0] * problem.query.shape[3] ** -0.5
    rows = []
    for i in range(problem.length):
        seen = scores[i, : i + 1]
        std = seen.std(correction=0).item()
        assert std**2 < largest_variance(degree)
        fit = fitted_gaussian(seen.mean().item(), std, degree).coefficients(degree)
        weights = sum(c * seen**p for p, c in enumerate(fit))
        rows.append(weights @ problem.value[0, 0, : i + 1] / weights.sum())
    assert relative_error(problem.oracle()[0, 0], torch.stack(rows)) < EXACT


@ROWS
@paired(CASES)
def test_one_call_is_the_definition(backend, kind, reach):
    problem, expected = solved(kind, reach)
    assert relative_error(problem.to(torch.float64).solve(backend=backend), expected) < EXACT


@EITHER
@paired(CASES[::2])
def test_one_call_in_single_precision(kind, reach):
    problem, expected = solved(kind, reach)
    assert relative_error(problem.solve(), expected) < TOLERANCE[torch.float32]


@EITHER
@paired(CASES[2::4])
def test_decoding_in_single_precision(kind, reach):
    problem, expected = solved(kind, reach)
    assert relative_error(decoded(problem), expected) < TOLERANCE[torch.float32]


@EITHER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@BOTH
def test_half_precision_rounds_only_the_output(way, dtype):
    problem = problem_of("groups", (5, 3, 2), dtype=dtype)
    y = way(problem)
    assert y.dtype == dtype
    assert relative_error(y, problem.oracle()) < TOLERANCE[dtype]


@EITHER
@pytest.mark.parametrize("length", [0, 1, 2])
@pytest.mark.parametrize("reach", [(0, 0, 2), (0, 0, 3), (1, 1, 2)], ids=name)
def test_few_tokens(reach, length):
    problem = problem_of("soft decay", reach, length=length)
    assert relative_error(problem.solve(), problem.oracle()) < EXACT


# ---- the law ---------------------------------------------------------------------------------------------------------

WAYS = {
    "chunks of 5": lambda p: p.solve(chunk_size=5),
    "from an empty state": lambda p: p.solve(state=p.new_state()),
    "split in two": lambda p: carry(p, [13])[0],
    "split in many, chunked": lambda p: carry(p, [0, 1, 2, 5, 22, 22, 28], chunk_size=4)[0],
    "token by token": decoded,
    "three tokens at a time": lambda p: decode(p, 3)[0],
    "prefill, then decode": lambda p: prefilled(p, 23),
}


def prefilled(problem, border):
    y, state = problem.part(0, border).solve(return_state=True)
    return torch.cat([y, decode(problem.part(border, problem.length), state=state)[0]], 2)


LAW = [  # each way with every fourth case
    (way, kind, reach) for i, way in enumerate(WAYS) for j, (kind, reach) in enumerate(CASES) if (i + j) % 4 == 0
]


@EITHER
@pytest.mark.parametrize(("way", "kind", "reach"), LAW, ids=name)
def test_the_law(way, kind, reach):
    problem, expected = solved(kind, reach)
    assert relative_error(WAYS[way](problem.to(torch.float64)), expected) < EXACT


@EITHER
@paired([("plain", (0, 0, 2)), ("decay and holes", (5, 2, 2))])
@pytest.mark.parametrize("way", [decode, lambda p: carry(p, [3, 20])], ids=["decoding", "pieces"])
def test_a_state_does_not_know_how_it_is_read(way, kind, reach):
    """Moments hold no coefficients: what one reading left, the other goes on from."""
    problem = problem_of(kind, reach, radius=2.0)
    other = replace(problem, options={**problem.options, "reading": "taylor"})
    (_, state), (_, expected) = way(other.part(0, 20)), way(problem.part(0, 20))
    assert relative_error(state.moments, expected.moments) < EXACT
    rest = problem.part(20, LENGTH)
    assert relative_error(decode(rest, state=state)[0], problem.oracle()[:, :, 20:]) < EXACT


LENGTHS = [5, 0, 14, 1, 9]
BORDERS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)


def one_by_one(problem):
    cuts = zip(BORDERS.tolist(), BORDERS.tolist()[1:], strict=False)
    return torch.cat([problem.part(*cut).oracle() for cut in cuts], 2)


PACKED = [("groups", (0, 0, 2)), ("holes", (3, 1, 3)), ("decay and holes", (0, 0, 4)), ("resets", (5, 2, 2))]


@EITHER
@paired(PACKED)
def test_packed_sequences_are_what_they_are_alone(kind, reach):
    problem = problem_of(kind, reach, batch=1)
    assert relative_error(problem.solve(cu_seqlens=BORDERS, chunk_size=4), one_by_one(problem)) < EXACT


@EITHER
@paired(PACKED)
def test_packed_sequences_are_decoded_on(kind, reach):
    problem, more = problem_of(kind, reach, batch=1), problem_of(kind, reach, batch=len(LENGTHS), length=5, seed=2)
    _, state = problem.solve(cu_seqlens=BORDERS, return_state=True)
    y, _ = decode(more, state=state)
    for row, (start, length) in enumerate(zip(BORDERS.tolist(), LENGTHS, strict=False)):
        first, second = problem.part(start, start + length), more.each(lambda x, row=row: x[row : row + 1])
        pairs = zip(first.arguments, second.arguments, strict=True)
        query, key, value = (torch.cat(pair, 2) for pair in pairs)
        along = {name: torch.cat([x, more.along[name][row : row + 1]], -1) for name, x in first.along.items()}
        whole = replace(first, query=query, key=key, value=value, along=along)
        assert relative_error(y[row : row + 1], whole.oracle()[:, :, length:]) < EXACT


def test_compiled_whole_it_is_the_same():
    """An odd degree, which also counts what makes a normaliser safe."""
    problem = problem_of("plain", (3, 1, 3), batch=1, heads=1, length=7)

    def answer(query, key, value):
        return ta.attention(query, key, value, degree=3, **problem.options)

    torch.compiler.reset()
    compiled = torch.compile(answer, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(*problem.arguments), problem.solve()) < EXACT


# ---- gradients -------------------------------------------------------------------------------------------------------


@EITHER
@paired(CASES)
def test_gradients_are_those_of_the_definition(kind, reach):
    problem = problem_of(kind, reach)
    expected = gradients(problem, lambda p: p.oracle())
    assert errors(gradients(problem, one_call), expected) < 10 * EXACT


@EITHER
@paired(CASES[1::3])
def test_gradients_go_through_carried_states(kind, reach):
    problem = problem_of(kind, reach)
    expected = gradients(problem, lambda p: p.oracle())
    assert errors(gradients(problem, lambda p: carry(p, [3, 20], chunk_size=4)[0]), expected) < 10 * EXACT


@EITHER
@paired([("groups", (0, 0, 2)), ("decay and holes", (5, 2, 3))])
def test_gradients_in_single_precision(kind, reach):
    problem = problem_of(kind, reach, radius=0.8, dtype=torch.float32)
    expected = gradients(problem.to(torch.float64), lambda p: p.oracle())
    assert errors(gradients(problem, one_call), expected) < TOLERANCE[torch.float32]


@EITHER
@paired([("holes", (0, 0, 2)), ("soft decay", (3, 1, 4))])
def test_gradients_of_packed_sequences_are_those_of_each_alone(kind, reach):
    problem = problem_of(kind, reach, batch=1)
    found = gradients(problem, lambda p: p.solve(cu_seqlens=BORDERS))
    assert errors(found, gradients(problem, one_by_one)) < 10 * EXACT


# ---- what it is for --------------------------------------------------------------------------------------------------


def moved(problem, size):
    """One constant vector per head added to its keys: to softmax it is nothing."""
    generator = torch.Generator().manual_seed(5)
    shift = torch.randn(1, problem.key.shape[1], 1, problem.key.shape[3], generator=generator, dtype=torch.float64)
    return replace(problem, key=problem.key + size * shift)


@EITHER
@pytest.mark.parametrize("reach", [(0, 0, 1), (0, 0, 2), (0, 0, 4), (5, 2, 2)], ids=name)
@BOTH
def test_a_vector_added_to_all_keys_changes_nothing(way, reach):
    problem = problem_of("groups", reach)
    assert relative_error(way(moved(problem, 3.0)), way(problem)) < 1e-9  # 1e-12, and what scores of 20^4 / 24 cancel


@pytest.mark.parametrize("reach", [(0, 0, 2), (0, 0, 4), (5, 2, 2)], ids=name)
def test_it_changes_taylors_reading_a_lot(reach):
    problem = problem_of("groups", reach, reading="taylor")
    assert relative_error(one_call(moved(problem, 3.0)), one_call(problem)) > 0.2


def weights_of_normal_scores(std, mean, degree, reading):
    """The weights of far scores on a grid, the scores, and how often each counts: as N(mean, std^2) has it.

    Decay makes the density: the scores come from the tails inwards. A sink of score 0, whose weight is exp(0) = 1 times
    its decay, says what the others are; the last query alone sees scores, the others see zeros.
    """
    z = torch.linspace(-9, 9 + 2 * std, 300, dtype=torch.float64)  # exp(2 s) times the density has its mean at 2 std
    z = z[z.abs().argsort(descending=True)]
    size = -z.square() / 2
    gates = torch.cat([torch.zeros(2), size[:-1] - size[1:]])
    problem = scored(torch.cat([torch.zeros(1), mean + std * z]), degree=degree, sinks=1, reading=reading)
    query = F.one_hot(torch.tensor(300), 301).double().view(1, 1, -1, 1)
    y = replace(problem, query=query, along={"log_decay": gates.view(1, 1, -1)}).solve()[0, 0, -1]
    return y[1:] / y[0] * (size[0] - size).exp(), mean + std * z, size.exp()


def measured_error(std, mean, degree, reading):
    weights, scores, often = weights_of_normal_scores(std, mean, degree, reading)
    off, all_of_it = often * (weights - scores.exp()).square(), often * (2 * scores).exp()
    return (off.sum() / all_of_it.sum()).sqrt().item()


@EITHER
@pytest.mark.parametrize(("std", "degree"), [(0.5, 2), (1.0, 2), (0.5, 3), (1.2, 3), (0.5, 4), (1.0, 4), (1.4, 4)])
@pytest.mark.parametrize("mean", [-2.0, 1.5])
def test_the_error_of_normal_scores_is_the_expected_one(std, degree, mean):
    """Up to the variance D/2 that a fit counts; whatever the mean."""
    expected = ta.expected_error(std, degree, mean=mean, fitted=True)
    assert measured_error(std, mean, degree, "fitted") == pytest.approx(expected, rel=1e-9)


@EITHER
@pytest.mark.parametrize(("std", "degree"), [(0.5, 2), (1.0, 2), (1.5, 2), (0.5, 4), (1.5, 4)])
@pytest.mark.parametrize("mean", [-2.0, 1.5])
def test_the_error_of_taylors_reading_is_the_expected_one(std, degree, mean):
    expected = ta.expected_error(std, degree, mean=mean)
    assert measured_error(std, mean, degree, "taylor") == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("std", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("mean", [-2.0, 0.0, 2.0])
def test_a_fit_is_better_than_taylors_series(std, mean, degree):
    """Also where it does not count all of the variance, as of a spread of 1.5 at degree 2."""
    assert measured_error(std, mean, degree, "fitted") < 0.95 * measured_error(std, mean, degree, "taylor")


@EITHER
@pytest.mark.parametrize("reach", [(LENGTH, 0, 2), (LENGTH, 0, 3), (0, LENGTH, 4), (LENGTH, 2, None)], ids=name)
@BOTH
def test_without_far_keys_it_is_softmax(way, reach):
    problem = problem_of("soft decay", reach, radius=4.0)
    assert relative_error(way(problem), softmax_reference(*problem.arguments, **problem.along)) < EXACT


# ---- where it ends ---------------------------------------------------------------------------------------------------


@EITHER
@pytest.mark.parametrize("degree", [2, 4, 8])
@given(scores=st.lists(st.floats(-6, 6), min_size=1, max_size=24))
@settings(max_examples=20, deadline=None)
def test_the_normaliser_of_an_even_degree_is_positive(degree, scores):
    """Of every query, one score more each: the sink of weight 1 has a share of 1 / (1 + Z)."""
    share = scored([0.0, *scores], degree=degree, sinks=1).solve()[0, 0, 1:, 0]
    assert bool((share > 0).all())
    assert bool((share < 1).all())


SKEWED = [0.0, 0.0, 0.0, -4.55]  # a variance of 3.9, which a degree of 8 counts


def test_a_fit_that_is_not_safe_counts_less_variance():
    """Else its normaliser would be negative here. No scores were found that do so to a degree of 2, 4 or 6."""
    scores = torch.tensor(SKEWED, dtype=torch.float64)
    mean, std = scores.mean().item(), scores.std(correction=0).item()
    assert largest_variance(8) < std**2 < 4
    counted = [fitted_gaussian(mean, spread, 8).coefficients(8) for spread in (std, largest_variance(8) ** 0.5)]
    unsafe, safe = (sum(c * (scores**p).sum().item() for p, c in enumerate(fit)) for fit in counted)
    assert unsafe < 0 < safe


@EITHER
@BOTH
def test_skewed_scores_are_the_definition(way):
    problem = scored(SKEWED, degree=8)
    assert relative_error(way(problem), problem.oracle()) < EXACT


ALONE = [*[0.0] * 20, -10.0]


@EITHER
@BOTH
def test_an_odd_degree_reports_a_normaliser_that_is_not_safe(way):
    problem = scored(ALONE, degree=3)
    with pytest.warns(NormaliserWarning, match="the normaliser of some queries"):
        y = way(problem)
    assert y[0, 0].isnan().all(-1).tolist() == [False] * 20 + [True]
    assert relative_error(y[:, :, :20], problem.oracle()[:, :, :20]) < EXACT


@EITHER
@BOTH
@pytest.mark.parametrize("offset", [-1000.0, 1000.0])
def test_a_normaliser_that_is_not_safe_is_never_silent(way, offset):
    """Nor where exp of the scores is nothing, or more than a number."""
    with pytest.warns(NormaliserWarning, match="the normaliser of some queries"):
        y = way(scored([offset + x for x in ALONE], degree=3))
    assert y[0, 0].isnan().all(-1).tolist() == [False] * 20 + [True]


@EITHER
@BOTH
@pytest.mark.parametrize("offset", [-1000.0, 1000.0])
@pytest.mark.parametrize("reach", [(0, 0, 2), (0, 0, 3), (5, 2, 2), (5, 2, 3)], ids=name)
def test_powers_that_cancel_are_reported_once(way, reach, offset):
    """Of 1000^2 / 2 single precision has no units left."""
    window, sinks, degree = reach
    scores = offset + torch.linspace(-0.5, 0.5, LENGTH)
    problem = scored(scores, torch.randn(LENGTH, 3), degree=degree, window=window, sinks=sinks).to(torch.float32)
    with pytest.warns(NormaliserWarning) as caught:
        y = way(problem)
    lost = LENGTH - window - sinks
    assert y[0, 0].isnan().all(-1).tolist() == [False] * (LENGTH - lost) + [True] * lost
    assert len(caught) == (1 if way is one_call else lost)
    with ta.watch_normalisers() as seen:
        way(problem)
    assert seen.unsafe == lost


@EITHER
@BOTH
@pytest.mark.parametrize("reach", [(0, 0, 2), (0, 0, 3), (5, 2, 2)], ids=name)
def test_hidden_queries_have_nothing_to_report(way, reach):
    """What they ask for is more than the powers could tell, and warnings are errors."""
    problem = problem_of("holes", reach, dtype=torch.float32)
    hidden = ~problem.along["key_padding_mask"][:, None, :, None]
    asking = replace(problem, query=problem.query.where(~hidden, 1e6))
    y = way(asking)
    assert torch.equal(y, way(problem))
    assert torch.equal(y, y.masked_fill(hidden, 0))


@EITHER
def test_in_training_it_is_an_error():
    with pytest.raises(NormaliserError, match="1 queries"):
        scored(ALONE, degree=3).recorded().solve()


@EITHER
@BOTH
@pytest.mark.parametrize("score", [12.0, 800.0])
def test_an_exact_key_makes_the_normaliser_safe(way, score):
    """One that exp of is too large for float64, too."""
    problem = scored([*ALONE, score], degree=3, window=1)
    last = replace(problem, query=F.one_hot(torch.tensor(21), 22).double().view(1, 1, -1, 1))
    assert relative_error(way(last), last.oracle()) < EXACT


@EITHER
@BOTH
@pytest.mark.parametrize("degree", [0, 1])
def test_below_degree_two_no_fit_is_unsafe(way, degree):
    """About their mean, the scores' first power adds up to nothing."""
    problem = scored(ALONE, degree=degree)
    assert relative_error(way(problem), problem.oracle()) < EXACT


@EITHER
@pytest.mark.parametrize("offset", [-60.0, 60.0])
@pytest.mark.parametrize("reach", [(0, 0, 1), (0, 0, 2), (5, 0, 2), (0, 3, 2)], ids=name)
@BOTH
def test_large_offsets_do_not_overflow(way, reach, offset):
    """exp(60) times the tokens is near the end of float32, exp(120) beyond it; powers of 60 round to 1e-3 or so."""
    window, sinks, degree = reach
    scores = offset + torch.linspace(-0.5, 0.5, LENGTH)
    problem = scored(scores, torch.randn(LENGTH, 3), degree=degree, window=window, sinks=sinks).to(torch.float32)
    assert relative_error(way(problem), problem.oracle()) < 1e-3


@EITHER
@pytest.mark.parametrize(("which", "bad"), [("query", torch.inf), ("key", -torch.inf), ("value", torch.nan)])
@pytest.mark.parametrize("reach", [(0, 0, 2), (5, 2, 2)], ids=name)
@pytest.mark.parametrize("chunk", [None, 4])
def test_what_is_not_finite_spoils_the_rows_that_see_it_and_no_other_bit(chunk, reach, which, bad):
    problem = problem_of("groups", reach, length=15)
    tensor = getattr(problem, which).clone()
    tensor[1, 0, 8, 1] = bad
    rows = torch.zeros(problem.query.shape[:3], dtype=torch.bool)
    rows[1, slice(0, 1 if which == "query" else 3), slice(8, 9 if which == "query" else 15)] = True
    clean, y = (p.solve(chunk_size=chunk) for p in (problem, replace(problem, **{which: tensor})))
    assert torch.equal(y.isnan(), rows[..., None].expand_as(y))
    assert torch.equal(y[~rows], clean[~rows])


# ---- misuse ----------------------------------------------------------------------------------------------------------

MISUSE = {
    "unknown": ({"reading": "exp"}, r"^reading: expected one of \('taylor', 'fitted'\), got 'exp'"),
    "none": ({"reading": None}, r"^reading: expected one of .*, got None"),
    "another series": ({"series": ta.series.COSH}, r"^series: expected exp with reading='fitted', got Series"),
}


@pytest.mark.parametrize("case", MISUSE)
@pytest.mark.parametrize("length", [1, 3])
def test_misuse_is_named(case, length):
    change, message = MISUSE[case]
    problem = problem_of("plain", (0, 0, 2), length=length)
    wrong = replace(problem, options={**problem.options, **change})
    with pytest.raises(ArgumentError, match=message):
        wrong.solve()
    state = problem.new_state()
    before = state.clone()
    with pytest.raises(ArgumentError, match=message):
        wrong.decode_(state)
    assert differences(state, before) == []


def test_a_fit_is_causal():
    with pytest.raises(ArgumentError, match=r"^causal: expected True with reading='fitted', got False"):
        problem_of("plain", (0, 0, 2), causal=False).solve()


def test_exp_may_be_named():
    problem = problem_of("plain", (0, 0, 2))
    assert torch.equal(problem.solve(series=ta.series.EXP), problem.solve())
