"""The sums of a profile against the specification: dense, float64, query by query."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from taylor_attention.hf.profiling.scores import FAR_DEGREE, PURE_DEGREE, READINGS, Sample, measure
from taylor_attention.hf.profiling.statistics import Head
from taylor_attention.ops.reference import attention_reference, softmax_reference
from tolerances import TOLERANCE, relative_error

TOKENS, GROUP, D, DV = 40, 2, 5, 3
SINKS, WINDOWS = 2, [0, 4, 16]
CLOSE = TOLERANCE[torch.float64] * 1e3  # errors are differences, and of a fit whose powers are taken about zero


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    """Queries [G, T, d], keys [T, d] that share an offset, values [T, dv]; the same ones each time."""
    torch.manual_seed(1)
    return (
        torch.randn(GROUP, TOKENS, D).double(),
        torch.randn(TOKENS, D).double() + 0.4,
        torch.randn(TOKENS, DV).double(),
    )


def sample_of(tokens: tuple[Tensor, Tensor, Tensor], places: Tensor, causal: bool = True) -> Sample:
    age = places[:, None] - torch.arange(TOKENS)
    visible = age >= 0 if causal else torch.ones_like(age, dtype=torch.bool)
    query, key, value = tokens
    return Sample(query[:, places], key, value, D**-0.5, visible, age)


LATE = torch.tensor([0, 3, 21, 22, 30, 39])


def measured(tokens, causal: bool = True) -> Head:
    sums, _ = measure(sample_of(tokens, LATE, causal), sinks=SINKS, windows=WINDOWS, near=causal)
    return Head.from_sums({name: each.sum(0) for name, each in sums.items()}, WINDOWS)


@cache
def planted(causal: bool = True) -> Head:
    return measured(tensors(), causal)


def specified(tokens, reading: str, causal: bool = True, **near) -> float:
    """The relative error of what the specification gives."""
    query, key, value = tokens
    exact = softmax_reference(query[None], key[None, None], value[None, None], causal=causal)[:, :, LATE]
    if reading == "centred":
        key, reading = key - key.mean(0), "taylor"
    inputs = query[None], key[None, None], value[None, None]
    return relative_error(attention_reference(*inputs, reading=reading, causal=causal, **near)[:, :, LATE], exact)


@pytest.mark.parametrize("window", WINDOWS)
def test_errors_with_far_keys_dropped_are_the_specifications(window):
    tokens, found = tensors(), planted().errors.dropped[window]
    assert found == pytest.approx(specified(tokens, "taylor", degree=None, window=window, sinks=SINKS), rel=CLOSE)


@pytest.mark.parametrize("degree", range(0, FAR_DEGREE + 1, 2))
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("window", WINDOWS)
def test_errors_with_far_keys_read_are_the_specifications(window, reading, degree):
    tokens, found = tensors(), planted().errors.far[reading][window][degree]
    assert found == pytest.approx(specified(tokens, reading, degree=degree, window=window, sinks=SINKS), rel=CLOSE)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("degree", range(0, PURE_DEGREE + 1, 2))
@pytest.mark.parametrize("reading", READINGS)
def test_errors_of_pure_polynomials_are_the_specifications(reading, degree, causal):
    tokens, found = tensors(), planted(causal).errors.pure[reading][degree]
    assert found == pytest.approx(specified(tokens, reading, causal, degree=degree), rel=CLOSE)


def test_a_normaliser_that_is_not_safely_positive_shows_as_nan():
    query, key, value = tensors()
    errors = measured((torch.ones_like(query), -torch.ones_like(key), value)).errors  # all scores are -sqrt(5)
    assert torch.tensor(errors.pure["taylor"]).isnan().tolist() == [False, True] * 3 + [False] * 3
    assert errors.degree_for("taylor", 1e-6) == 0  # of equal scores the mean is right
    assert not torch.tensor(errors.pure["centred"]).isnan().any()


@pytest.mark.parametrize("causal", [True, False])
def test_weights_and_spreads_are_those_of_dense_rows(causal):
    tokens = tensors()
    head, sample = measured(tokens, causal), sample_of(tokens, LATE, causal)
    rows = []
    for query in sample.query.flatten(0, 1):
        rows.append(D**-0.5 * (tokens[1] @ query))
    first = far = top = square = std = mean = centred = 0.0
    for row, place in zip(rows, LATE.tolist() * GROUP, strict=True):
        seen = row[: place + 1] if causal else row
        weights = seen.softmax(0)
        near = [j for j in range(len(seen)) if j < SINKS or (0 <= place - j < 4)]
        others = sorted((weights[j].item() for j in range(len(seen)) if j not in near), reverse=True)
        first, far, top = first + weights[:SINKS].sum(), far + sum(others), top + sum(others[:16])
        square, std, mean = square + seen.square().mean(), std + seen.var(correction=0), mean + seen.mean().abs()
        centred += (seen.mean() - row.mean()).abs()
    count = len(rows)
    assert head.weight.sinks == pytest.approx(float(first) / count)
    assert head.weight.far[4] == pytest.approx(far / count)
    assert head.weight.window[4] == pytest.approx(1 - (float(first) + far) / count)
    assert head.weight.top[4][16] == pytest.approx(top / far)
    assert head.spread.square == pytest.approx(float(square / count) ** 0.5)
    assert head.spread.std == pytest.approx(float(std / count) ** 0.5)
    assert head.spread.mean == pytest.approx(float(mean) / count)
    assert head.spread.centred_mean == pytest.approx(float(centred) / count, abs=1e-12)


def test_sums_of_two_samples_are_those_of_both():
    tokens = tensors()
    parts = [measure(sample_of(tokens, some), sinks=SINKS, windows=WINDOWS, near=True)[0] for some in LATE.split(2)]
    both, _ = measure(sample_of(tokens, LATE), sinks=SINKS, windows=WINDOWS, near=True)
    for name, each in both.items():
        assert torch.allclose(sum(part[name] for part in parts), each, rtol=CLOSE, equal_nan=True), name
