import math
import pickle
from dataclasses import FrozenInstanceError
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from taylor_attention.core import series as module
from taylor_attention.core.series import COSH, EXP, GEOMETRIC, Series, degree_for, error_bound, expected_error
from taylor_attention.errors import ArgumentError

ROUNDING = 1e-13  # float64 evaluation of well-scaled expressions: a few hundred units in the last place
SLACK = 2e-12  # bounds are rounded up by more than their logarithms' own errors, which are below 1e-12 here

RADII = st.floats(0.01, 12.0)
DEGREES = st.integers(0, 14)


def evaluate(coefficients, point):
    """p(point) by exact Horner, rounded once."""
    value, exact_point = Fraction(0), Fraction(point)
    for c in reversed(coefficients):
        value = value * exact_point + Fraction(c)
    return float(value)


def grid(low, high, size=201):
    return torch.linspace(low, high, size, dtype=torch.float64).tolist()


def worst_error(kernel, coefficients, radius, size=61):
    """Largest relative error on a grid that holds both ends."""
    return max(abs(evaluate(coefficients, s) / kernel(s) - 1) for s in grid(-radius, radius, size))


def gaussian_mean(function, mean, std):
    """E[function(s)], s ~ N(mean, std^2): the trapezoidal rule, exponentially accurate for a Gaussian weight."""
    x = torch.linspace(-14, 14, 4001, dtype=torch.float64)
    weight = torch.exp(-(x**2) / 2)
    return float((weight * function(mean + std * x)).sum() / weight.sum())


def as_function(series, degree):
    coefficients = series.coefficients(degree)
    return lambda s: sum(c * s**p for p, c in enumerate(coefficients))


# ---- coefficients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("series", "expected"),
    [
        (EXP, (1.0, 1.0, 1 / 2, 1 / 6, 1 / 24, 1 / 120)),
        (COSH, (1.0, 0.0, 1 / 2, 0.0, 1 / 24, 0.0)),
        (GEOMETRIC, (1.0, 1.0, 1.0, 1.0, 1.0, 1.0)),
        (module.polynomial([3, -1, 0.5, 0, 0, 2]), (3.0, -1.0, 0.5, 0.0, 0.0, 2.0)),
    ],
    ids=["exp", "cosh", "geometric", "polynomial"],
)
@pytest.mark.parametrize("degree", [0, 1, 4, 5])
def test_coefficients(series, expected, degree):
    coefficients = series.coefficients(degree)
    assert coefficients == expected[: degree + 1]
    assert all(type(c) is float for c in coefficients)


def test_coefficients_beyond_float64_vanish_quietly():
    assert EXP.coefficients(200)[-1] == 0.0


def test_a_new_kernel_takes_a_rule_and_a_name():
    def coefficient(p):
        return Fraction(1, 2**p)

    kernel = Series("1/(1-s/2)", coefficient)
    assert kernel.coefficients(3) == (1.0, 0.5, 0.25, 0.125)
    assert kernel.negative_intervals(1) == ((-math.inf, -2.0),)


def test_a_degree_of_another_type_is_refused_even_when_an_equal_one_is_cached():
    assert EXP.coefficients(1) == (1.0, 1.0)
    with pytest.raises(ArgumentError, match="degree: expected an int >= 0, got True"):
        EXP.coefficients(True)
    with pytest.raises(ArgumentError, match=r"degree: expected an int >= 0, got 1\.0"):
        EXP.is_positive(1.0)


def test_series_are_immutable_values():
    one, same, other = (module.polynomial(c) for c in [(1, 2), (1.0, 2.0), (1, 3)])
    assert one == same and hash(one) == hash(same) and one != other
    with pytest.raises(FrozenInstanceError):
        one.name = "other"


@pytest.mark.parametrize("series", [EXP, COSH, GEOMETRIC, module.fitted_gaussian(0, 1, 2)], ids=lambda s: s.name)
def test_series_survive_pickling(series):
    assert pickle.loads(pickle.dumps(series)) == series


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EXP.coefficients(-1), "degree: expected an int >= 0, got -1"),
        (lambda: EXP.coefficients(2.0), "degree: expected an int >= 0, got 2.0"),
        (lambda: EXP.coefficients(True), "degree: expected an int >= 0, got True"),
        (lambda: module.polynomial((1, 2)).coefficients(2), "degree: expected a degree from 0 to 1 (all that"),
        (lambda: module.fitted_gaussian(0, 1, 2).coefficients(1), "degree: expected a degree from 2 to 2 (all that"),
        (lambda: module.fitted_chebyshev(-1, 1, 2).coefficients(3), "degree: expected a degree from 2 to 2 (all that"),
        (lambda: Series("none", ()), "terms: expected a rule p -> c_p or a tuple of finite floats, got ()"),
        (lambda: Series("list", [1.0]), "terms: expected a rule p -> c_p or a tuple of finite floats, got [1.0]"),
        (lambda: module.polynomial([]), "coefficients: expected a non-empty sequence of finite numbers, got []"),
        (lambda: module.polynomial(["1"]), "coefficients: expected a non-empty sequence of finite numbers, got ['1']"),
        (
            lambda: module.polynomial([1.0, math.nan]),
            "coefficients: expected a non-empty sequence of finite numbers",
        ),
        (lambda: Series("inf", lambda p: math.inf).coefficients(0), "series: expected finite coefficients"),
        (lambda: error_bound(-1.0, 2), "radius: expected a finite number >= 0, got -1.0"),
        (lambda: error_bound(math.nan, 2), "radius: expected a finite number >= 0, got nan"),
        (lambda: error_bound(1.0, 2.5), "degree: expected an int >= 0, got 2.5"),
        (lambda: error_bound(1.0, 1, module.polynomial((1, 2))), "series: expected a series with an error bound"),
        (lambda: error_bound(1.0, 2, GEOMETRIC), "radius: expected a number < 1, the radius of convergence"),
        (lambda: error_bound(800.0, 3, module.fitted_gaussian(0, 1, 2)), "degree: expected a degree from 2 to 2"),
        (lambda: degree_for(1.0, 0.0), "tolerance: expected a finite number > 0, got 0.0"),
        (lambda: degree_for(1e5, 1e-3), "tolerance: expected one that a degree <= 4096 of 'exp' reaches at radius"),
        (lambda: degree_for(9.0, 1e-3, module.fitted_gaussian(0, 1, 2)), "tolerance: expected one that a degree <= 2"),
        (lambda: module.fitted_gaussian(0, -1, 2), "std: expected a finite number >= 0, got -1"),
        (lambda: module.fitted_gaussian(math.inf, 1, 2), "mean: expected a finite number, got inf"),
        (lambda: module.fitted_gaussian(0, 40, 2), "mean, std: expected |mean| + std^2/2 <= 700"),
        (lambda: module.fitted_gaussian(0, 1, -2), "degree: expected an int >= 0, got -2"),
        (lambda: module.fitted_chebyshev(1, 1, 2), "low, high: expected -700 <= low < high <= 700, got (1, 1)"),
        (lambda: module.fitted_chebyshev(-1, 701, 2), "low, high: expected -700 <= low < high <= 700, got (-1, 701)"),
        (lambda: module.fitted_chebyshev(-1, 1, None), "degree: expected an int >= 0, got None"),
    ],
)
def test_misuse_names_the_argument(call, message):
    with pytest.raises(ArgumentError) as caught:
        call()
    assert str(caught.value).startswith(message)


# ---- error bounds ----------------------------------------------------------------------------------------------------


@given(RADII, DEGREES)
@settings(max_examples=30)
def test_exp_bound_holds_is_attained_and_beats_the_textbook_one(radius, degree):
    bound = error_bound(radius, degree)
    observed = worst_error(math.exp, EXP.coefficients(degree), radius)
    assert observed * (1 - ROUNDING) - ROUNDING <= bound <= observed * (1 + SLACK) + SLACK
    assert bound <= math.exp(radius) * radius ** (degree + 1) / math.factorial(degree + 1) * (1 + SLACK)


@given(RADII, DEGREES)
@settings(max_examples=30)
def test_cosh_bound_holds_and_is_attained(radius, degree):
    observed = worst_error(math.cosh, COSH.coefficients(degree), radius)
    assert error_bound(radius, degree, COSH) == pytest.approx(observed, rel=SLACK, abs=SLACK)
    assert error_bound(radius, degree, COSH) >= observed - ROUNDING


@given(st.floats(0.01, 0.99), DEGREES)
@settings(max_examples=30)
def test_geometric_bound_holds_and_is_attained(radius, degree):
    observed = worst_error(lambda s: 1 / (1 - s), GEOMETRIC.coefficients(degree), radius)
    assert error_bound(radius, degree, GEOMETRIC) == pytest.approx(observed, rel=SLACK, abs=SLACK)
    assert error_bound(radius, degree, GEOMETRIC) >= observed - ROUNDING


@pytest.mark.parametrize(
    "series",
    [
        module.fitted_gaussian(0.5, 1.3, 3),
        module.fitted_gaussian(-1.0, 0.4, 4),
        module.fitted_chebyshev(-2.0, 1.0, 3),
        module.fitted_chebyshev(-4.0, 4.0, 6),
        module.polynomial((0.0, 0.0, 0.0), bound=module.error_against_exp),
        module.polynomial((1.0, 0.0, -2.0, 0.5), bound=module.error_against_exp),
    ],
    ids=lambda s: s.name,
)
@pytest.mark.parametrize("radius", [0.0, 0.3, 1.0, 2.5, 6.0])
def test_bound_against_exp_holds_and_is_attained(series, radius):
    degree = len(series.terms) - 1
    observed = worst_error(math.exp, series.coefficients(degree), radius, size=401)
    # the grid may miss an inner extremum by a second-order amount, (radius / 200)^2 at most here
    assert observed - ROUNDING <= error_bound(radius, degree, series) <= observed * 1.002 + ROUNDING


@pytest.mark.parametrize("degree", [0, 1, 2, 5, 10])
@pytest.mark.parametrize("radius", [0.1, 1.0, 4.0, 20.0, 650.0])
def test_the_two_bounds_of_a_truncated_exp_agree(radius, degree):
    listed = module.polynomial(EXP.coefficients(degree), bound=module.error_against_exp)
    assert error_bound(radius, degree, listed) == pytest.approx(error_bound(radius, degree), rel=1e-10, abs=ROUNDING)


@pytest.mark.parametrize("series", [EXP, COSH, GEOMETRIC], ids=lambda s: s.name)
def test_no_radius_no_error(series):
    assert error_bound(0.0, 0, series) == 0.0


@pytest.mark.parametrize(
    ("radius", "degree", "low", "high"),
    [
        (1e-300, 50, 0.0, 1e-300),  # underflows: still above the true error, which is not 0
        (0.5, 100_000, 0.0, 1e-300),
        (1000.0, 5000, 0.0, 1e-300),
        (699.9, 2600, 0.0, 1e-4),
        (700.1, 2600, 0.0, 1e-4),
        (700.0, 3, math.inf, math.inf),
        (1e300, 10**9, math.inf, math.inf),
    ],
)
def test_extreme_bounds_neither_overflow_nor_vanish(radius, degree, low, high):
    bound = error_bound(radius, degree)
    assert low <= bound <= high and bound > 0


@pytest.mark.parametrize("degree", [3, 2600])
def test_bound_grows_with_the_radius_where_its_formula_changes(degree):
    bounds = [error_bound(radius, degree) for radius in (1.0, 690.0, 700.0, 700.1, 710.0)]
    assert all(a < b or a == b == math.inf for a, b in pairwise(bounds))


def test_cosh_is_never_off_by_more_than_itself():
    assert error_bound(1e6, 2, COSH) == 1.0 == error_bound(650.0, 2, COSH)


def test_fits_promise_nothing_where_exp_leaves_float64():
    assert error_bound(701.0, 2, module.fitted_gaussian(0, 1, 2)) == math.inf


@given(st.floats(0.01, 30.0), st.floats(1e-12, 10.0), st.sampled_from([EXP, COSH]))
@example(radius=5.0, tolerance=1e-3, series=EXP)
def test_degree_for_is_the_smallest_that_suffices(radius, tolerance, series):
    degree = degree_for(radius, tolerance, series)
    assert error_bound(radius, degree, series) <= tolerance
    assert all(error_bound(radius, lower, series) > tolerance for lower in range(degree))


@pytest.mark.parametrize(
    ("radius", "tolerance", "series", "degree"),
    [
        (1.0, 0.36, EXP, 2),
        (1.0, 0.35, EXP, 3),
        (0.0, 1e-9, EXP, 0),
        (0.5, 0.25, GEOMETRIC, 2),
        (0.5, 0.2500001, GEOMETRIC, 1),
    ],
)
def test_degree_for_known_cases(radius, tolerance, series, degree):
    assert degree_for(radius, tolerance, series) == degree


def test_degree_for_accepts_a_bound_equal_to_the_tolerance():
    assert degree_for(1.0, error_bound(1.0, 2)) == 2


def test_degree_for_a_fit_is_its_own_degree():
    assert degree_for(0.5, 0.1, module.fitted_chebyshev(-1, 1, 3)) == 3


# ---- positivity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [0, 2, 4, 6, 20, 90])
def test_exp_of_even_degree_is_positive_everywhere(degree):
    assert EXP.is_positive(degree) is True
    assert EXP.negative_intervals(degree) == ()


@pytest.mark.parametrize(("degree", "root"), [(1, -1.0), (3, -1.5960716379833215), (5, -2.1806071240351255)])
def test_exp_of_odd_degree_is_negative_below_its_root(degree, root):
    assert EXP.is_positive(degree) is False
    assert EXP.negative_intervals(degree) == ((-math.inf, pytest.approx(root, rel=1e-15)),)


@pytest.mark.parametrize(
    ("coefficients", "intervals"),
    [
        ((2.0,), ()),
        ((-2.0,), ((-math.inf, math.inf),)),
        ((0.0, 0.0), ((-math.inf, math.inf),)),
        ((1, 2, 1), ((-1.0, -1.0),)),  # touches 0
        ((1, 0, -1), ((-math.inf, -1.0), (1.0, math.inf))),
        ((-1, 0, 1), ((-1.0, 1.0),)),
        ((0, 0, 1, -2, 1), ((0.0, 0.0), (1.0, 1.0))),  # s^2 (s - 1)^2
        ((0, 0, -1), ((-math.inf, math.inf),)),  # touches 0 from below: one interval, not two
        ((0, 1, 0, 0), ((-math.inf, 0.0),)),  # leading zeros
        ((1, 1e-309), ((-math.inf, -1.7976931348623157e308),)),  # the root is no float
    ],
)
def test_negative_intervals_known_cases(coefficients, intervals):
    assert module.polynomial(coefficients).negative_intervals(len(coefficients) - 1) == intervals


@given(st.lists(st.integers(-6, 6), min_size=1, max_size=6), st.sampled_from([1, -1]))
@example(roots=[0, 0, 0], sign=-1)
@example(roots=[-1, -1, 2, 2, 2], sign=1)
def test_negative_intervals_of_a_polynomial_with_given_roots(roots, sign):
    coefficients = [Fraction(sign)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [a - root * b for a, b in zip(shifted, [*coefficients, 0], strict=True)]
    intervals = module.polynomial(coefficients).negative_intervals(len(roots))
    ends = {end for interval in intervals for end in interval if math.isfinite(end)}
    assert ends <= set(roots)  # whole roots are found exactly
    points = [Fraction(n, 2) for n in range(-16, 17)]
    inside = [any(low <= s <= high for low, high in intervals) for s in points]
    assert inside == [sign * math.prod(s - root for root in roots) <= 0 for s in points]


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=7))
@settings(max_examples=50)
def test_interval_ends_are_roots_to_the_last_places(coefficients):
    series = module.polynomial(coefficients)
    intervals = series.negative_intervals(len(coefficients) - 1)
    exact = [Fraction(c) for c in coefficients]

    def is_positive_at(point):
        return sum(c * Fraction(point) ** p for p, c in enumerate(exact)) > 0

    outwards = [(end, way) for low, high in intervals for end, way in ((low, -math.inf), (high, math.inf))]
    just_outside = [math.nextafter(end, way) for end, way in outwards if abs(end) < 1e308]
    assert all(is_positive_at(point) or in_any(point, intervals) for point in just_outside)
    assert all(is_positive_at(s) != in_any(s, intervals) for s in grid(-3, 3, 31) if not near_end(s, intervals))


def in_any(point, intervals):
    return any(low <= point <= high for low, high in intervals)


def near_end(point, intervals):
    return any(abs(point - end) <= 1e-15 * abs(end) for interval in intervals for end in interval)


def test_neighbouring_roots_are_told_apart():
    near = 1 + 2.0**-40
    series = module.polynomial((near, -(1 + near), 1))
    (interval,) = series.negative_intervals(2)
    assert interval == (1.0, near)


def test_roots_closer_than_floats_are_told_apart():
    close = 1 + Fraction(1, 2**60)
    series = Series("-(s - 1)(s - close)", lambda p: (-close, 1 + close, Fraction(-1))[p])
    assert series.negative_intervals(2) == ((-math.inf, 1.0), (1.0, math.inf))  # rounded, yet not one interval


# ---- fits ------------------------------------------------------------------------------------------------------------

FITS = pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.5), (-1.5, 1.5)])


@FITS
@pytest.mark.parametrize("degree", [0, 1, 2, 3, 6])
def test_gaussian_fit_satisfies_the_orthogonality_conditions(mean, std, degree):
    fitted = as_function(module.fitted_gaussian(mean, std, degree), degree)
    scale = math.exp(mean + std**2)
    for power in range(degree + 1):
        residual = gaussian_mean(lambda s, k=power: (torch.exp(s) - fitted(s)) * ((s - mean) / std) ** k, mean, std)
        assert residual == pytest.approx(0.0, abs=1e-12 * scale * math.factorial(power))


@FITS
@pytest.mark.parametrize("degree", [0, 1, 2, 3, 6])
def test_gaussian_fit_error_is_the_poisson_tail_and_beats_taylor(mean, std, degree):
    def squared_error(series):
        return gaussian_mean(lambda s: (torch.exp(s) - as_function(series, degree)(s)) ** 2, mean, std)

    error = squared_error(module.fitted_gaussian(mean, std, degree))
    terms = [math.exp(-(std**2)) * std ** (2 * n) / math.factorial(n) for n in range(degree + 1, 60)]
    assert error / math.exp(2 * mean + 2 * std**2) == pytest.approx(math.fsum(terms), rel=1e-7)
    assert error < squared_error(EXP)


def test_gaussian_fit_without_spread_is_taylor_about_the_mean():
    assert module.fitted_gaussian(0, 0, 6).coefficients(6) == EXP.coefficients(6)
    about_two = as_function(module.fitted_gaussian(2, 0, 3), 3)
    expected = math.exp(2) * (1 + 0.5 + 0.125 + 0.125 / 6)
    assert about_two(2.5) == pytest.approx(expected, rel=ROUNDING)


def test_gaussian_fit_stays_exact_where_float_hermite_sums_cancel():
    degree, std = 30, 3.0
    fitted = module.fitted_gaussian(0, std, degree).coefficients(degree)
    hermite = [[Fraction(1)], [Fraction(0), Fraction(1)]]
    for n in range(1, degree):
        lower = [n * c for c in hermite[-2]] + [Fraction(0)] * 2
        hermite.append([a - b for a, b in zip([Fraction(0), *hermite[-1]], lower, strict=True)])
    factor = Fraction(math.exp(4.5))
    for power in (0, 1, 7, 30):
        parts = (Fraction(3) ** (n - power) / math.factorial(n) * hermite[n][power] for n in range(power, degree + 1))
        assert fitted[power] == pytest.approx(float(factor * sum(parts)), rel=1e-15)


def chebyshev_error(low, high, degree, points):
    coefficients = module.fitted_chebyshev(low, high, degree).coefficients(degree)
    return [evaluate(coefficients, s) - math.exp(s) for s in points]


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-3.0, 0.5), (1.0, 1.5), (-6.0, 6.0)])
@pytest.mark.parametrize("degree", [1, 2, 3, 6])
def test_chebyshev_fit_beats_taylor_on_its_interval(low, high, degree):
    points = grid(low, high)
    taylor = max(abs(evaluate(EXP.coefficients(degree), s) - math.exp(s)) for s in points)
    assert max(map(abs, chebyshev_error(low, high, degree, points))) < taylor


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-3.0, 0.5), (1.0, 1.5), (-6.0, 6.0)])
@pytest.mark.parametrize("degree", [0, 1, 2, 3, 6])
def test_chebyshev_fit_is_near_minimax(low, high, degree):
    largest = max(map(abs, chebyshev_error(low, high, degree, grid(low, high))))
    centre, half = (low + high) / 2, (high - low) / 2
    turns = [centre + half * math.cos(math.pi * k / (degree + 1)) for k in range(degree + 2)]
    errors = chebyshev_error(low, high, degree, turns)
    # de la Vallée-Poussin: no polynomial errs by less than the least of degree + 2 alternating errors
    assert all(a * b < 0 for a, b in pairwise(errors))
    # half / (degree + 2) is about the second dropped term beside the first: what spoils the balance
    assert largest <= min(map(abs, errors)) * (1 + 2 * half / (degree + 2)) ** 2


def test_chebyshev_fit_converges_to_exp():
    series = module.fitted_chebyshev(-2, 3, 24)
    coefficients = series.coefficients(24)
    assert max(abs(evaluate(coefficients, s) / math.exp(s) - 1) for s in grid(-2, 3)) < 10 * ROUNDING


# ---- expected errors -------------------------------------------------------------------------------------------------


def poisson_tail(variance, degree):
    return sum(math.exp(-variance) * variance**n / math.factorial(n) for n in range(degree + 1, 120))


@pytest.mark.parametrize("degree", [0, 1, 2, 4, 7])
@pytest.mark.parametrize("std", [0.1, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("mean", [0.0, -3.0, 2.0])
def test_expected_error_of_a_fit_is_the_poisson_tail(degree, std, mean):
    expected = math.sqrt(poisson_tail(std**2, degree))
    assert expected_error(std, degree, mean=mean, fitted=True) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("std", "degree", "mean"), [(0.5, 2, 0.0), (1.0, 2, 0.0), (1.0, 3, 0.5), (0.3, 4, -1.0)])
def test_expected_error_is_what_random_scores_show(std, degree, mean):
    scores = mean + std * torch.randn(4_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = sum(c * scores**p for p, c in enumerate(EXP.coefficients(degree)))
    exact = scores.exp()
    shown = float(((weights - exact).square().mean() / exact.square().mean()).sqrt())
    assert expected_error(std, degree, mean=mean) == pytest.approx(shown, rel=0.05)


def test_expected_error_of_equal_scores_is_the_error_there():
    found = expected_error(0.0, 2, mean=-1.0)
    assert found == pytest.approx(0.5 * math.e - 1, rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"std": -1.0, "degree": 2}, "std: expected a finite number >= 0, got -1.0"),
        ({"std": 1.0, "degree": 2, "mean": math.nan}, "mean: expected a finite number, got nan"),
        ({"std": 1.0, "degree": -2}, "degree: expected an int >= 0, got -2"),
    ],
)
def test_expected_error_refuses_what_is_no_distribution(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        expected_error(**arguments)
