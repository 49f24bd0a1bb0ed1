import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from taylor_attention.core import basis
from taylor_attention.core.series import EXP
from taylor_attention.errors import ArgumentError

SIZES = list(itertools.product([1, 2, 3, 5], range(6)))
BLOCKED = [(d, p) for d, p in SIZES if p >= 1]


def rows(head_dim, degree):
    return list(itertools.combinations_with_replacement(range(head_dim), degree))


def multinomial(row):
    """p! / prod(repeats!): in how many orders the indices of a row can stand."""
    return math.factorial(len(row)) // math.prod(math.factorial(row.count(i)) for i in set(row))


# ---- rows and multiplicities -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_dim", "degree"), SIZES)
def test_index_rows_are_the_multisets_in_lexicographic_order(head_dim, degree):
    found = basis.index_rows(head_dim, degree)
    assert found.dtype == torch.int64
    assert found.shape == (basis.monomial_count(head_dim, degree), degree)
    assert list(map(tuple, found.tolist())) == rows(head_dim, degree)


@pytest.mark.parametrize(("head_dim", "degree"), SIZES)
def test_multiplicities_count_orders(head_dim, degree):
    found = basis.multiplicities(head_dim, degree)
    assert found.dtype == torch.int64
    assert found.tolist() == [multinomial(row) for row in rows(head_dim, degree)]


@pytest.mark.parametrize(
    ("head_dim", "degree"),
    [(3, 39), (2, 62), (5, 26), (8, 16), (16, 5), (64, 3), pytest.param(64, 6, marks=pytest.mark.slow)],
)
def test_multiplicities_sum_to_all_sequences_of_indices(head_dim, degree):
    assert sum(basis.multiplicities(head_dim, degree).tolist()) == head_dim**degree


def test_multiplicities_are_exact_where_floats_round():
    found = basis.multiplicities(3, 39).tolist()
    assert found == [multinomial(row) for row in rows(3, 39)]
    assert sum(map(float, found)) != 3**39


@pytest.mark.parametrize("degree", [127, 128, 300])
def test_the_only_monomial_of_one_variable_has_multiplicity_one(degree):
    assert basis.multiplicities(1, degree).tolist() == [1]


def test_multiplicities_beyond_int64_are_refused():
    with pytest.raises(
        ArgumentError, match=r"^degree: expected head_dim \*\* degree below 2\^63 at head_dim 3, got 40"
    ):
        basis.multiplicities(3, 40)


# ---- the packed axis -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_dim", "degree"), SIZES)
def test_offsets_pack_the_degrees_one_after_the_other(head_dim, degree):
    sizes = [len(rows(head_dim, p)) for p in range(degree + 1)]
    assert basis.offsets(head_dim, degree) == (0, *itertools.accumulate(sizes))
    assert basis.feature_count(head_dim, degree) == sum(sizes)


def packed_rows(head_dim, degree):
    return [row for p in range(degree + 1) for row in rows(head_dim, p)]


@pytest.mark.parametrize(("head_dim", "degree"), BLOCKED)
def test_a_block_is_its_first_index_before_a_suffix_of_the_degree_below(head_dim, degree):
    packed = packed_rows(head_dim, degree)
    rebuilt = [
        (block.index, *row)
        for block in basis.blocks(head_dim, degree)
        for row in packed[block.suffix : block.suffix + block.stop - block.start]
    ]
    assert rebuilt == rows(head_dim, degree)


@pytest.mark.parametrize(("head_dim", "degree"), BLOCKED)
def test_blocks_follow_each_other_over_their_degree(head_dim, degree):
    blocks = basis.blocks(head_dim, degree)
    borders = [blocks[0].start, *(block.stop for block in blocks)]
    assert [block.index for block in blocks] == list(range(head_dim))
    assert [block.start for block in blocks] == borders[:-1]
    assert (borders[0], borders[-1]) == basis.offsets(head_dim, degree)[degree:]


# ---- expansion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_dim", "degree"), SIZES)
def test_expand_gives_every_monomial(head_dim, degree):
    x = torch.randn(2, 3, head_dim, dtype=torch.float64)
    expected = torch.stack([x[..., list(row)].prod(-1) for row in packed_rows(head_dim, degree)], -1)
    torch.testing.assert_close(basis.expand(x, degree), expected, rtol=1e-14, atol=0)


class CountProducts(TorchDispatchMode):
    """Counts the numbers that multiplications make."""

    made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "mul" in str(function):
            self.made += result.numel()
        return result


@pytest.mark.parametrize(("head_dim", "degree"), [(4, 0), (4, 1), (4, 2), (5, 4), (2, 6)])
def test_expand_multiplies_once_per_monomial(head_dim, degree):
    with CountProducts() as count:
        basis.expand(torch.randn(7, head_dim), degree)
    free = 1 if degree == 0 else 1 + head_dim  # the constant and the entries themselves
    assert count.made == 7 * (basis.feature_count(head_dim, degree) - free)


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_expand_is_differentiable(degree):
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: basis.expand(x, degree) + 0 * x.sum(), x)


@pytest.mark.parametrize(("head_dim", "degree"), SIZES)
def test_the_weighted_product_of_expansions_is_the_power_of_the_product(head_dim, degree):
    q, k = torch.randn(2, 9, head_dim, dtype=torch.float64)
    weights = basis.reading_weights(head_dim, (0.0,) * degree + (1.0,), torch.float64)
    found = (basis.expand(q, degree) * basis.expand(k, degree) * weights).sum(-1)
    size = (q.abs() * k.abs()).sum(-1) ** degree  # of the terms, which may cancel
    assert ((found - (q * k).sum(-1) ** degree).abs() <= 1e-14 * size).all()


def test_reading_weights_carry_the_coefficient_of_each_degree():
    found = basis.reading_weights(2, EXP.coefficients(3), torch.float64).tolist()
    expected = [multinomial(row) / math.factorial(len(row)) for row in packed_rows(2, 3)]
    assert found == pytest.approx(expected, rel=1e-15)


def test_reading_weights_are_rounded_once():
    exact = basis.reading_weights(5, EXP.coefficients(6), torch.float64)
    rounded = basis.reading_weights(5, EXP.coefficients(6), torch.float32)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, exact.float())


# ---- caching and refusals --------------------------------------------------------------------------------------------


def test_structure_is_computed_once():
    assert basis.index_rows(6, 3) is basis.index_rows(6, 3)
    assert basis.multiplicities(6, 3) is basis.multiplicities(6, 3)
    assert basis.blocks(6, 3) is basis.blocks(6, 3)


def test_what_inference_mode_cached_serves_training():
    with torch.inference_mode():
        basis.expand(torch.randn(1, 13), 2)  # a size that no other test uses: cached here for the first time
        weights = basis.reading_weights(13, (1.0, 0.5, 0.25), torch.float64)
    x = torch.randn(2, 13, dtype=torch.float64, requires_grad=True)
    (basis.expand(x, 2) * weights).sum().backward()
    expected = 0.5 + 0.5 * x.detach().sum(-1, keepdim=True).expand(2, 13)  # of 1 + s/2 + s^2/4, s = sum of x
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: basis.index_rows(0, 2), "head_dim"),
        (lambda: basis.index_rows(2.5, 2), "head_dim"),
        (lambda: basis.multiplicities(-3, 1), "head_dim"),
        (lambda: basis.offsets(3, -1), "degree"),
        (lambda: basis.blocks(3, 0), "degree"),
        (lambda: basis.expand(torch.zeros(2, 0), 1), "head_dim"),
        (lambda: basis.expand(torch.zeros(2, 3), -1), "degree"),
        (lambda: basis.expand(torch.zeros(2, 3), 1.5), "degree"),
    ],
)
def test_impossible_sizes_are_refused(call, argument):
    with pytest.raises(ArgumentError, match=f"^{argument}: expected "):
        call()
