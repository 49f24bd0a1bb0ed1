import math

import pytest
import torch

from taylor_attention.core import moments
from taylor_attention.core.basis import expand, feature_count
from taylor_attention.core.moments import RunningMoments, accumulate_, add_compensated, fade, read, read_slope
from tolerances import TOLERANCE, relative_error

EXACT = TOLERANCE[torch.float64]
SIZES = [(1, 0), (1, 3), (3, 0), (3, 1), (5, 2), (6, 3), (4, 5), (7, 4)]


@pytest.fixture(params=[1, 10, 10**6], ids=lambda limit: f"forming {limit}")
def formed(request, monkeypatch):
    """How many monomials of the highest degree are formed at most: each way to cut the work is tried at small sizes."""
    monkeypatch.setattr(moments, "_TAIL", request.param)
    moments._split.cache_clear()
    yield request.param
    moments._split.cache_clear()


def draw(head_dim, degree, tokens=11):
    """x [n, d, C], u [n, E, C], moments [n, E, M], and the dense features [n, M, C] that define the products."""
    x = torch.randn(2, head_dim, tokens, dtype=torch.float64)
    u = torch.randn(2, 4, tokens, dtype=torch.float64)
    table = torch.randn(2, 4, feature_count(head_dim, degree), dtype=torch.float64)
    return x, u, table, expand(x.transpose(1, 2), degree).transpose(1, 2)


# ---- the three products ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_dim", "degree"), SIZES)
def test_accumulate_adds_outer_products(head_dim, degree, formed):
    x, u, table, features = draw(head_dim, degree)
    found = table.clone()
    accumulate_(found, x, u, degree)
    assert relative_error(found, table + u @ features.transpose(1, 2)) < EXACT


@pytest.mark.parametrize(("head_dim", "degree"), SIZES)
def test_read_is_the_product_with_the_features(head_dim, degree, formed):
    x, _, table, features = draw(head_dim, degree)
    assert relative_error(read(x, table, degree), table @ features) < EXACT


@pytest.mark.parametrize(("head_dim", "degree"), SIZES)
def test_read_slope_reads_and_differentiates(head_dim, degree, formed):
    x, u, table, features = draw(head_dim, degree)
    leaf = x.clone().requires_grad_()
    dense = table @ expand(leaf.transpose(1, 2), degree).transpose(1, 2) + 0 * leaf.sum()
    (slope,) = torch.autograd.grad((dense * u).sum(), leaf)
    found, found_slope = read_slope(x, table, u, degree)
    assert relative_error(found, table @ features) < EXACT
    assert relative_error(found_slope, slope) < EXACT


@pytest.mark.parametrize(("head_dim", "degree"), [(16, 3), (40, 2)])
def test_the_library_s_own_cut_reads_what_it_accumulates(head_dim, degree):
    x, u, table, features = draw(head_dim, degree)
    found = torch.zeros_like(table)
    accumulate_(found, x, u, degree)
    assert moments.formed_count(head_dim, degree) < feature_count(head_dim, degree)
    assert relative_error(found, u @ features.transpose(1, 2)) < EXACT
    assert relative_error(read(x, found, degree), found @ features) < EXACT


def test_everything_is_formed_where_the_blocks_are_small():
    assert moments.formed_count(8, 3) == feature_count(8, 3)


@pytest.mark.parametrize("degree", [0, 2, 4])
def test_no_tokens_add_nothing(degree):
    x, u, table, _ = draw(5, degree, tokens=0)
    before = table.clone()
    accumulate_(table, x, u, degree)
    assert torch.equal(table, before)
    assert read(x, table, degree).shape == (2, 4, 0)


# ---- compensated sums ------------------------------------------------------------------------------------------------


def add_many(start, increment, times):
    """The float32 sum start + increment + increment + ..., compensated and plain."""
    sums, compensation = torch.tensor([start]), torch.zeros(1)
    step, plain = torch.tensor([increment]), torch.tensor([start])
    for _ in range(times):
        sums, compensation = add_compensated(sums, compensation, step)
        plain = plain + step
    return sums, compensation, plain


@pytest.mark.parametrize(("start", "increment"), [(1e6, 0.1), (2.0**24, 1.0), (-3e5, 0.013)])
def test_compensated_sums_do_not_drift_where_plain_ones_do(start, increment):
    sums, compensation, plain = add_many(start, increment, 3000)
    exact = torch.tensor([start]).double() + 3000 * torch.tensor([increment]).double()
    assert relative_error(sums, exact) <= 2**-24  # one rounding of the result
    assert relative_error(sums.double() + compensation.double(), exact) < 1e-10
    assert relative_error(plain, exact) > 1e-5


def test_two_sum_loses_nothing_at_all():
    sums, increment = 10 ** (8 * torch.rand(2, 1000) - 4) * torch.randn(2, 1000)
    total, dropped = add_compensated(sums, torch.zeros(1000), increment)
    assert torch.equal(total.double() + dropped.double(), sums.double() + increment.double())
    assert torch.equal(total, sums + increment)


def test_a_compensated_sum_passes_gradients_to_both():
    sums, increment = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    total, dropped = add_compensated(sums, torch.zeros(5, dtype=torch.float64), increment)
    assert not dropped.requires_grad
    grads = torch.autograd.grad((2 * total).sum(), (sums, increment))
    assert [grad.tolist() for grad in grads] == [[2.0] * 5, [2.0] * 5]


@pytest.mark.parametrize("loss", [1e-3, 1e-6, 1e-9])
def test_fading_by_a_factor_near_one_is_exact_however_often(loss):
    sums, compensation, factor = (
        torch.rand(1, 2, 3),
        torch.zeros(1, 2, 3),
        torch.full((1, 1, 1), 1 - loss, dtype=torch.float64),
    )
    exact = sums.double()
    for _ in range(3000):
        sums, compensation = fade(sums, compensation, factor)
    assert relative_error(sums.double() + compensation.double(), exact * factor**3000) < 1e-10


def test_fading_passes_gradients_to_sums_and_factor():
    sums = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    factor = torch.rand(2, 1, 1, dtype=torch.float64, requires_grad=True)
    faded, dropped = fade(sums, torch.randn(2, 3, 4).double(), factor)
    assert not dropped.requires_grad
    grads = torch.autograd.grad(faded.sum(), (sums, factor))
    assert torch.equal(grads[0], factor.expand_as(sums))
    torch.testing.assert_close(grads[1], sums.sum((1, 2), keepdim=True))


# ---- running moments -------------------------------------------------------------------------------------------------


def run(chunks, factor=None, start=None):
    """Append chunks one by one, each after a decay by factor; the running moments and the exact sums."""
    exact = torch.zeros(2, 4, 10, dtype=torch.float64) if start is None else start.clone()
    running = RunningMoments(exact.float(), torch.zeros(2, 4, 10), degree=2)
    for x, u in chunks:
        if factor is not None:
            running.decay_(factor)
            exact *= factor.double()
        running.accumulate_(x, u)
        exact += u.double() @ expand(x.double().transpose(1, 2), 2)
    return running, exact


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 40])
@pytest.mark.parametrize("factor", [None, torch.tensor([0.5, 0.9])[:, None, None]], ids=["plain", "decay"])
def test_running_moments_are_the_sums_so_far(count, factor):
    chunks = [(torch.randn(2, 3, 6), torch.randn(2, 4, 6)) for _ in range(count)]
    running, exact = run(chunks, factor, start=torch.randn(2, 4, 10).double())
    weights = torch.rand(10)
    assert relative_error(running.weighted(weights), exact * weights) < TOLERANCE[torch.float32]
    running.settle_()
    assert relative_error(running.sums, exact) < TOLERANCE[torch.float32]
    assert relative_error(running.weighted(weights), exact * weights) < TOLERANCE[torch.float32]


def test_running_moments_change_the_sums_given():
    sums, compensation = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
    running = RunningMoments(sums, compensation, degree=1)
    running.accumulate_(torch.ones(1, 2, 5), torch.ones(1, 2, 5))
    assert torch.equal(sums, torch.zeros(1, 2, 3))
    running.settle_()
    assert torch.equal(sums, torch.full((1, 2, 3), 5.0))


def test_running_moments_keep_what_rounding_drops():
    sums, compensation = torch.full((1, 1, 1), 2.0**24), torch.zeros(1, 1, 1)
    running = RunningMoments(sums, compensation, degree=0)
    running.accumulate_(torch.ones(1, 1, 3), torch.ones(1, 1, 3))  # 2^24 + 3 lies between two float32 numbers
    running.settle_()
    assert sums.item() + compensation.item() == 2**24 + 3


def test_decay_fades_what_rounding_dropped_too():
    sums, compensation = torch.full((1, 1, 1), 2.0**24), torch.full((1, 1, 1), 1.0)
    running = RunningMoments(sums, compensation, degree=0)
    running.accumulate_(torch.ones(1, 1, 4), torch.ones(1, 1, 4))
    running.decay_(torch.full((1, 1, 1), 0.5))
    running.settle_()
    assert sums.item() + compensation.item() == (2**24 + 1 + 4) / 2


@pytest.mark.parametrize("loss", [1e-3, 1e-6, 1e-9])
def test_running_moments_fade_by_what_the_factor_is(loss):
    factor = torch.full((1, 1, 1), 1 - loss, dtype=torch.float64)
    running = RunningMoments(torch.ones(1, 1, 1), torch.zeros(1, 1, 1), degree=0)
    for _ in range(2000):
        running.decay_(factor)
        running.accumulate_(torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    exact = factor.item() ** 2000 + (1 - factor.item() ** 2000) / (1 - factor.item())
    assert running.weighted(torch.ones(1)).item() == pytest.approx(exact, rel=2e-7)
    running.settle_()
    assert running.sums.item() == pytest.approx(exact, rel=2e-7)


@pytest.mark.parametrize("count", [32, 1000])
def test_a_value_is_added_exactly_however_it_is_cut(count):
    """The error of long sums is that of one rounding: a constant that float32 cannot hold, in 16,000 pieces."""
    u = torch.full((1, 1, 16000 // count), 0.1)
    running = RunningMoments(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), degree=0)
    for _ in range(count):
        running.accumulate_(torch.ones(1, 1, u.shape[2]), u)
    running.settle_()
    exact = math.fsum(u.flatten().tolist() * count)
    assert running.sums.item() == pytest.approx(exact, rel=1e-6)
