"""The specification itself, against arithmetic on Python numbers and PyTorch's own softmax attention."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from problems import make
from taylor_attention import series
from taylor_attention.ops.reference import attention_reference, softmax_reference
from tolerances import TOLERANCE, relative_error

EXACT = TOLERANCE[torch.float64]


def by_hand(problem, weight):
    """One number at a time, by the definition; weight(score) is the kernel of the keys that are not exact."""
    query, key, value = (x.tolist() for x in problem.arguments)
    causal, scale = problem.options.get("causal", True), problem.options.get("scale", problem.query.shape[3] ** -0.5)
    shown = problem.along.get("key_padding_mask", torch.ones(len(key), problem.length, dtype=torch.bool)).tolist()
    decay = problem.along.get("log_decay", torch.zeros(problem.key.shape[:3])).tolist()
    group = problem.query.shape[1] // problem.key.shape[1]
    window, sinks = problem.options.get("window", 0), problem.options.get("sinks", 0)
    first = [[j for j, visible in enumerate(row) if visible][:sinks] for row in shown]

    def size(b, i, j, score):
        recent = j <= i and sum(shown[b][j + 1 : i + 1]) < window
        return math.exp(score) if recent or j in first[b] else weight(score)

    def fade(b, h, j, i):
        return math.prod(math.exp(decay[b][h][t]) for t in range(j + 1, i + 1) if shown[b][t])

    def row(b, h, i, q):
        keys = [j for j in range(problem.length) if shown[b][j] and (j <= i or not causal)]
        keys = [] if (window or sinks) and not shown[b][i] else keys
        scores = {j: scale * sum(x * y for x, y in zip(q, key[b][h][j], strict=True)) for j in keys}
        weights = {j: size(b, i, j, scores[j]) * (fade(b, h, j, i) if causal else 1) for j in keys}
        total = sum(weights.values()) or 1
        return [sum(weights[j] * value[b][h][j][e] for j in keys) / total for e in range(problem.value.shape[3])]

    return torch.tensor(
        [
            [[row(b, h // group, i, q) for i, q in enumerate(head)] for h, head in enumerate(sequence)]
            for b, sequence in enumerate(query)
        ],
        dtype=torch.float64,
    )


KINDS = {
    "plain": {},
    "one token": {"length": 1},
    "groups": {"heads": 4, "kv_heads": 2},
    "not causal": {"causal": False},
    "cross": {"causal": False, "queries": 4},
    "scale": {"scale": 0.2},
    "padding": {"mask": "left"},
    "a hidden row": {"mask": "row 0 hidden"},
    "decay": {"decay": "hard"},
    "resets": {"decay": "resets"},
    "decay and holes": {"decay": "hard", "mask": "holes"},
    "decay, groups": {"decay": "hard", "heads": 4, "kv_heads": 2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("degree", [0, 1, 4])
def test_a_truncated_exp_is_summed_term_by_term(kind, degree):
    problem = make(**{"batch": 2, "length": 7, "degree": degree, **KINDS[kind]})
    expected = by_hand(problem, lambda s: sum(s**p / math.factorial(p) for p in range(degree + 1)))
    found = problem.oracle()
    assert found.dtype == torch.float64
    assert relative_error(found, expected) < EXACT


@pytest.mark.parametrize("kind", KINDS)
def test_softmax_is_the_limit_of_high_degrees(kind):
    problem = make(**{"batch": 2, "length": 7, "degree": 30, **KINDS[kind]})
    softmax = softmax_reference(*problem.arguments, **problem.options, **problem.along)
    assert relative_error(softmax, by_hand(problem, math.exp)) < EXACT
    assert relative_error(problem.oracle(), softmax) < EXACT


NEAR = [(1, 0), (3, 0), (7, 0), (9, 0), (0, 1), (0, 2), (0, 9), (2, 1), (3, 2)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "causal" not in KINDS[kind]])
@pytest.mark.parametrize(("window", "sinks"), NEAR)
@pytest.mark.parametrize("degree", [None, 1, 2])
def test_the_latest_and_the_first_keys_are_weighed_exactly(kind, window, sinks, degree):
    problem = make(**{"batch": 2, "length": 7, "degree": degree, "window": window, "sinks": sinks, **KINDS[kind]})
    terms = () if degree is None else range(degree + 1)
    expected = by_hand(problem, lambda s: sum(s**p / math.factorial(p) for p in terms))
    assert relative_error(problem.oracle(), expected) < EXACT


@pytest.mark.parametrize("degree", [None, 2])
@pytest.mark.parametrize("near", [{"window": 12}, {"sinks": 12}, {"window": 30, "sinks": 3}], ids=str)
@pytest.mark.parametrize("kind", [{}, {"decay": "hard", "mask": "holes"}], ids=str)
def test_with_every_key_exact_it_is_softmax(kind, near, degree):
    problem = make(batch=2, length=12, degree=degree, **near, **kind)
    asked = problem.along.get("key_padding_mask", torch.ones(2, 12))[:, None, :, None]  # hidden queries give zeros
    assert relative_error(problem.oracle(), asked * softmax_reference(*problem.arguments, **problem.along)) < EXACT


@pytest.mark.parametrize("radius", [300.0, -300.0, 5000.0, -5000.0])
@pytest.mark.parametrize("degree", [None, 2])
def test_exact_weights_of_any_size_do_not_overflow(radius, degree):
    """One key under every query: scores are the radius, and each output is a mean of values."""
    problem = make(heads=1, length=9, head_dim=1, degree=degree, window=3, sinks=1)
    one = torch.ones_like(problem.key)
    found = attention_reference(one, radius * one, one, degree=degree, window=3, sinks=1)
    assert relative_error(found, one) < EXACT


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("kind", [{}, {"decay": "hard", "mask": "holes"}], ids=str)
@pytest.mark.parametrize("near", [{}, {"window": 3, "sinks": 1}, {"window": 3, "reading": "fitted"}], ids=str)
def test_causal_queries_are_the_last_tokens(near, kind, queries):
    problem = make(batch=2, heads=4, kv_heads=2, length=12, **near, **kind)
    last = replace(problem, query=problem.query[:, :, -queries:])
    assert relative_error(last.oracle(), problem.oracle()[:, :, -queries:]) < EXACT
    softmax, rows = (softmax_reference(*each.arguments, **each.along) for each in (problem, last))
    assert relative_error(rows, softmax[:, :, -queries:]) < EXACT


@pytest.mark.parametrize("causal", [True, False])
def test_softmax_agrees_with_pytorch(causal):
    problem = make(batch=2, heads=4, kv_heads=2, length=20, causal=causal, scale=3.0, radius=30.0)
    expected = F.scaled_dot_product_attention(*problem.arguments, is_causal=causal, scale=3.0, enable_gqa=True)
    assert relative_error(softmax_reference(*problem.arguments, causal=causal, scale=3.0), expected) < EXACT


def test_softmax_does_not_overflow():
    problem = make(length=9, radius=5000.0)
    assert softmax_reference(*problem.arguments).isfinite().all()


@pytest.mark.parametrize(
    ("kernel", "weight"),
    [
        (series.COSH, lambda s: 1 + s**2 / 2),
        (series.GEOMETRIC, lambda s: 1 + s + s**2 + s**3),
        (series.polynomial([2, 0.5, 1, 0.25]), lambda s: 2 + s / 2 + s**2 + s**3 / 4),
    ],
    ids=["cosh", "geometric", "polynomial"],
)
def test_other_series_are_summed_as_they_say(kernel, weight):
    problem = make(length=6, degree=3, series=kernel)
    assert relative_error(problem.oracle(), by_hand(problem, weight)) < EXACT


def test_a_query_without_keys_gives_zeros():
    problem = make(batch=2, length=6, mask="row 0 hidden")
    assert not problem.oracle()[0].any()
    assert not softmax_reference(*problem.arguments, **problem.along)[0].any()


def test_no_tokens_at_all():
    empty = torch.empty(2, 3, 0, 4)
    assert attention_reference(empty, empty, empty, degree=2).shape == (2, 3, 0, 4)
    query = torch.randn(2, 3, 5, 4)
    assert torch.equal(
        softmax_reference(query, empty, empty, causal=False), torch.zeros(2, 3, 5, 4, dtype=torch.float64)
    )
