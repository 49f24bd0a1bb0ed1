"""Power series that stand for an attention kernel: coefficients, error bounds, positivity, fits.

A weight is f(s) = sum_p c_p s^p, where s is the scaled score. The stored moments hold no coefficients, so a series is
chosen when the state is read. A new kernel is its coefficients, by a rule or as a list:

    def coefficient(p):
        return Fraction(1, 2**p)
    HALF_GEOMETRIC = Series("1/(1-s/2)", coefficient)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

from ..errors import LARGEST_INT, expect, expect_bool, expect_int, is_number, shown
from .roots import real_roots, root_limit, sign_at, to_integers

DEGREE_LIMIT = 4096  # no larger degree is looked at: at head_dim 2 this is already 8 million monomials
EXP_LIMIT = 700.0  # exp of anything within +-700 is a normal float64

Interval = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A power series f(s) = sum_p c_p s^p, hashable and immutable.

    Args:
        name: what messages and plots call it.
        terms: a rule p -> c_p (int, float or Fraction) of an infinite series, or the tuple of all coefficients.
        bound: (series, radius, degree) -> rigorous bound on the relative error of a weight, if one is known.
        lowest_degree: fitted coefficients belong together, so a fit of degree D accepts no degree below D.

    Raises:
        ArgumentError: for terms that are neither a rule nor a non-empty tuple of finite floats, or another field that
            is not as above.
    """

    name: str
    terms: Callable[[int], float | Fraction] | tuple[float, ...]
    bound: Callable[[Series, float, int], float] | None = None
    lowest_degree: int = 0

    def __post_init__(self) -> None:
        listed = isinstance(self.terms, tuple) and len(self.terms) > 0 and all(map(is_number, self.terms))
        known = listed or callable(self.terms)
        expect(known, "terms", "a rule p -> c_p or a tuple of finite floats", "" if known else shown(self.terms))
        expect(isinstance(self.name, str), "name", "a string", shown(self.name))
        bounded = self.bound is None or callable(self.bound)
        expect(bounded, "bound", "(series, radius, degree) -> bound, or None", shown(self.bound))
        expect_int("lowest_degree", self.lowest_degree, 0)

    def coefficients(self, degree: int) -> tuple[float, ...]:
        """Return c_0 .. c_degree in float64.

        Raises:
            ArgumentError: for a degree that is no int >= 0, or that a listed series does not have.
        """
        try:
            return _coefficients(self, degree)  # cached, checks and all: this runs once per decoded token
        except TypeError:  # perhaps what came cannot be hashed
            _expect_degree(degree)
            raise

    def is_positive(self, degree: int) -> bool:
        """Tell whether the series cut at `degree` is > 0 on the whole real line (exact: Sturm's theorem)."""
        return not self.negative_intervals(degree)

    def negative_intervals(self, degree: int) -> tuple[Interval, ...]:
        """Return the closed intervals, ascending, outside which the series cut at `degree` is > 0 (exact coefficients).

        On them it is <= 0; finite ends are real roots, rounded outwards by a few units in the last place.
        """
        _expect_degree(degree)
        return _negative_intervals(self, degree)


def polynomial(
    coefficients: Sequence[float],
    *,
    name: str = "polynomial",
    bound: Callable[[Series, float, int], float] | None = None,
) -> Series:
    """Return the series with exactly these coefficients c_0, c_1, ...; `error_against_exp` can be its bound."""
    try:
        listed = list(coefficients)
    except TypeError:
        listed = []
    numeric = len(listed) > 0 and all(map(_is_coefficient, listed))
    expect(numeric, "coefficients", "a non-empty sequence of finite numbers", shown(coefficients))
    return Series(name, tuple(map(float, listed)), bound)


@lru_cache(maxsize=256, typed=True)  # typed: degree 2.0 or True is refused although it equals a cached int
def _coefficients(series: Series, degree: int) -> tuple[float, ...]:
    _expect_degree(degree)
    highest = math.inf if callable(series.terms) else len(series.terms) - 1
    offered = f"a degree from {series.lowest_degree} to {highest} (all that series {series.name!r} has)"
    expect(series.lowest_degree <= degree <= highest, "degree", offered, degree)
    if not callable(series.terms):
        return tuple(map(float, series.terms[: degree + 1]))
    values = tuple(series.terms(p) for p in range(degree + 1))
    finite = all(map(_is_coefficient, values))
    expect(finite, "series", f"finite coefficients up to degree {degree}", "" if finite else shown(values))
    return tuple(map(float, values))


# ---- error bounds ----------------------------------------------------------------------------------------------------


def error_against_exp(series: Series, radius: float, degree: int) -> float:
    """Bound |p(s) - e^s| / e^s over |s| <= radius for any polynomial p: the bound of every fit of exp.

    The error p(s) e^-s - 1 is extreme at the ends or where p' = p, and those points are found exactly.
    """
    _expect_series(series)
    expect(is_number(radius) and radius >= 0, "radius", "a finite number >= 0", shown(radius))
    coefficients = series.coefficients(degree)  # before the early return: a bad degree is refused at any radius
    if radius > EXP_LIMIT:
        return math.inf
    exact = [Fraction(c) for c in coefficients]
    slope = [p * c - below for p, (c, below) in enumerate(zip([*exact, Fraction(0)][1:], exact, strict=True), 1)]
    points = [Fraction(-radius), Fraction(radius)]
    points += [high for low, high in real_roots(to_integers(slope)) if low <= radius and high >= -radius]
    return max(_error_against_exp_at(exact, point) for point in points)


def _error_against_exp_at(coefficients: Sequence[Fraction], point: Fraction) -> float:
    value = sum((c * point**p for p, c in enumerate(coefficients)), Fraction(0))
    ratio = _to_float(value) * math.exp(-float(point))
    # The slack covers the rounding of point, exp and product; near a root of p' - p the error is flat.
    return abs(ratio - 1) + 2.0**-50 * (2 + abs(float(point))) * (1 + abs(ratio))


def _exp_bound(series: Series, radius: float, degree: int) -> float:
    # (p_D(s) e^-s)' = -e^-s s^D / D!, so the worst s is -R and the error there is, exactly,
    # int_0^R e^t t^D / D! dt = R^(D+1)/(D+1)! * sum_j R^j (D+1) / (j! (D+1+j)) <= e^R R^(D+1)/(D+1)!
    if radius == 0:
        return 0.0
    first = degree + 1
    if radius > EXP_LIMIT:
        log_rest = radius
    else:
        log_rest = math.log(_sum_products(lambda j: radius * (first + j) / ((j + 1) * (first + j + 1))))
    return _exp_upwards(first * math.log(radius), -math.lgamma(first + 1), log_rest)


def _cosh_bound(series: Series, radius: float, degree: int) -> float:
    # tail / cosh grows with |s| (the ratio of their coefficients is 0, .., 0, 1, 1, ..), so the worst s is R.
    if radius == 0:
        return 0.0
    if radius > EXP_LIMIT:
        return 1.0  # 0 <= p <= cosh always
    first = degree + 2 - degree % 2
    rest = _sum_products(lambda j: radius**2 / ((first + 2 * j + 1) * (first + 2 * j + 2)))
    log_cosh = radius + math.log1p(math.exp(-2 * radius)) - math.log(2)
    return min(1.0, _exp_upwards(first * math.log(radius), -math.lgamma(first + 1), math.log(rest), -log_cosh))


def _geometric_bound(series: Series, radius: float, degree: int) -> float:
    expect(radius < 1, "radius", "a number < 1, the radius of convergence of 1/(1-s)", radius)
    return math.nextafter(radius ** (degree + 1), math.inf) if radius > 0 else 0.0  # the error is |s|^(D+1) exactly


def _sum_products(ratio: Callable[[int], float]) -> float:
    """Sum 1 + r_0 + r_0 r_1 + ... for ratios that fall towards 0, to the last bits."""
    total = term = 1.0
    index = 0
    while (factor := ratio(index)) > 0.5 or term > 2.0**-60 * total:
        term *= factor
        total += term
        index += 1
    return total


def _exp_upwards(*logarithms: float) -> float:
    """Return exp of a sum, rounded up by more than the logarithms' own rounding; inf where it overflows."""
    exponent = math.fsum(logarithms) + 2.0**-48 * (1 + sum(map(abs, logarithms)))
    return max(math.exp(exponent), math.nextafter(0.0, 1.0)) if exponent < 709 else math.inf


def _exp_term(p: int) -> Fraction:
    return Fraction(1, math.factorial(p))


def _cosh_term(p: int) -> Fraction:
    return Fraction(1 - p % 2, math.factorial(p))


def _geometric_term(p: int) -> Fraction:
    return Fraction(1)


EXP = Series("exp", _exp_term, _exp_bound)  # named rules, not lambdas: a series can be pickled
COSH = Series("cosh", _cosh_term, _cosh_bound)
GEOMETRIC = Series("1/(1-s)", _geometric_term, _geometric_bound)


def error_bound(radius: float, degree: int, series: Series = EXP) -> float:
    """Bound the relative error |p(s) - f(s)| / f(s) of a weight for every |s| <= radius, rigorously.

    For EXP, COSH and GEOMETRIC it is the largest error itself, rounded up; for EXP that is at most
    e^R R^(D+1) / (D+1)!. Fits are measured against exp. Arithmetic is taken as exact.

    Args:
        radius: the largest |scaled score|, >= 0.
        degree: where the series is cut.
        series: the kernel.

    Returns:
        The bound, or inf where it exceeds the range of float64.

    Raises:
        ArgumentError: for a series without a bound, or a radius outside its circle of convergence.
    """
    _expect_degree(degree, LARGEST_INT)
    expect(is_number(radius) and radius >= 0, "radius", "a finite number >= 0", shown(radius))
    _expect_series(series)
    expect(series.bound is not None, "series", "a series with an error bound (see Series.bound)", series.name)
    assert series.bound is not None
    return series.bound(series, float(radius), degree)


def degree_for(radius: float, tolerance: float, series: Series = EXP) -> int:
    """Return the smallest degree whose `error_bound` at this radius is at most `tolerance`.

    Raises:
        ArgumentError: where no degree up to 4,096, or none that a listed series has, is enough.
    """
    expect(is_number(tolerance) and tolerance > 0, "tolerance", "a finite number > 0", shown(tolerance))
    _expect_series(series)
    highest = DEGREE_LIMIT if callable(series.terms) else len(series.terms) - 1
    for degree in range(series.lowest_degree, highest + 1):
        if error_bound(radius, degree, series) <= tolerance:
            return degree
    reach = f"one that a degree <= {highest} of {series.name!r} reaches at radius {radius}"
    expect(False, "tolerance", reach, tolerance)
    raise AssertionError("unreachable")


def expected_error(std: float, degree: int, *, mean: float = 0.0, series: Series = EXP, fitted: bool = False) -> float:
    """Return the relative error of the weights of scores s ~ N(mean, std^2): sqrt(E[(e^s - p(s))^2] / E[e^(2 s)]).

    That is about the relative error of an attention output whose values have nothing to do with the scores. Unlike
    `error_bound` it is no bound: a single score may be off by more.

    Args:
        std: standard deviation of a query's scaled scores, >= 0.
        degree: where the series is cut.
        mean: of the scores. It costs Taylor's series dearly, a fit nothing.
        series: the kernel, read as it is.
        fitted: read by `fitted_gaussian` of this mean and spread instead, as reading="fitted" does: then the error is
            sqrt(Pr[Poisson(std^2) > degree]).

    Raises:
        ArgumentError: an argument is not as above, or |mean| + std^2/2 is beyond 700, where exp is no float any more.
    """
    _expect_normal(mean, std)
    expect_bool("fitted", fitted)
    _expect_series(series)
    read = fitted_gaussian(mean, std, degree) if fitted else series
    coefficients = read.coefficients(degree)
    # Under N(mean + 2 std^2, std^2), whose density is the first one's times e^(2 s), the ratio is E[(1 - p(s) e^-s)^2].
    # The integrand is entire and falls like a normal density, also about `mean`, so equal steps converge at once.
    steps, low, high = 4000, -12.0 - 2 * std, 12.0
    width, total = (high - low) / steps, 0.0
    for i in range(steps + 1):
        z = low + i * width
        s = mean + 2 * std**2 + std * z
        value = 0.0
        for coefficient in reversed(coefficients):
            value = value * s + coefficient
        off = math.exp(-z * z / 4) - value * math.exp(-s - z * z / 4)
        total += off * off
    return math.sqrt(total * width / math.sqrt(2 * math.pi))


# ---- fits of exp -----------------------------------------------------------------------------------------------------


def fitted_gaussian(mean: float, std: float, degree: int) -> Series:
    """Return the polynomial p of this degree that minimises E[(e^s - p(s))^2] for s ~ N(mean, std^2).

    It is the Hermite expansion e^(mean + std^2/2) sum_n std^n/n! He_n((s - mean)/std), whose relative error
    sqrt(E[(e^s - p)^2] / E[e^2s]) is sqrt(Pr[Poisson(std^2) > degree]). std = 0 gives Taylor's series about the mean.
    """
    _expect_degree(degree)
    _expect_normal(mean, std)
    # Collecting powers of (s - mean), the variance enters only through truncated exponentials of -std^2/2.
    half_variance = Fraction(std) ** 2 / 2
    factor = Fraction(math.exp(mean + std**2 / 2))
    centred = []
    for j in range(degree + 1):
        terms = [(-half_variance) ** m / math.factorial(m) for m in range((degree - j) // 2 + 1)]
        centred.append(factor * sum(terms, Fraction(0)) / math.factorial(j))
    return _fit(f"exp fitted to N({mean:g}, {std:g}^2)", centred, Fraction(mean), Fraction(1))


def fitted_chebyshev(low: float, high: float, degree: int) -> Series:
    """Return exp's Chebyshev expansion on [low, high] cut at this degree.

    Its largest absolute error there is at most 5 times the minimax one (Lebesgue's constant, up to degree 400), and
    close to it once the first dropped term dominates, that is for a degree beyond half the width of the interval.
    exp(m + h x) = e^m (I_0(h) + 2 sum_n I_n(h) T_n(x)), with I_n the modified Bessel functions.
    """
    _expect_degree(degree)
    inside = is_number(low) and is_number(high) and -EXP_LIMIT <= low < high <= EXP_LIMIT
    expect(inside, "low, high", f"-{EXP_LIMIT:g} <= low < high <= {EXP_LIMIT:g}", shown((low, high)))
    centre, half = (Fraction(high) + Fraction(low)) / 2, (Fraction(high) - Fraction(low)) / 2
    total, here, after = [Fraction(0)] * (degree + 1), [Fraction(1)], [Fraction(0), Fraction(1)]
    for n in range(degree + 1):
        weight = Fraction(math.exp(float(centre)) * _bessel_i(n, float(half)) * (1 if n == 0 else 2))
        total[: n + 1] = [t + weight * c for t, c in zip(total, here, strict=False)]
        # T_(n+2) = 2 x T_(n+1) - T_n
        here, after = after, [2 * a - b for a, b in zip([Fraction(0), *after], here + [Fraction(0)] * 2, strict=True)]
    return _fit(f"exp fitted on [{low:g}, {high:g}]", total, centre, half)


def _bessel_i(order: int, x: float) -> float:
    first = math.prod(x / 2 / i for i in range(1, order + 1))
    return first * _sum_products(lambda k: (x / 2) ** 2 / ((k + 1) * (k + 1 + order)))


def _fit(name: str, shifted: Sequence[Fraction], centre: Fraction, half: Fraction) -> Series:
    """Make a series of a polynomial in (s - centre) / half, exactly until the last rounding to floats."""
    poly = [Fraction(0)] * len(shifted)
    for top in reversed(shifted):  # Horner: poly * (s - centre) / half + top
        poly = [(a - centre * b) / half for a, b in zip([Fraction(0), *poly[:-1]], poly, strict=True)]
        poly[0] += top
    return Series(name, tuple(map(_to_float, poly)), error_against_exp, len(shifted) - 1)


# ---- where a truncated series is positive ----------------------------------------------------------------------------


@lru_cache(maxsize=256, typed=True)
def _negative_intervals(series: Series, degree: int) -> tuple[Interval, ...]:
    poly = to_integers(_exact_terms(series, degree))
    if not poly:
        return ((-math.inf, math.inf),)
    roots, limit = real_roots(poly), root_limit(poly)
    edges = [(-limit, -limit), *roots, (limit, limit)]
    positive = [sign_at(poly, (left[1] + right[0]) / 2) > 0 for left, right in pairwise(edges)]
    start = None if positive[0] else -math.inf
    intervals = []
    for (low, high), positive_after in zip(roots, positive[1:], strict=True):
        start = _round(low, -math.inf) if start is None else start
        if positive_after:
            intervals.append((start, _round(high, math.inf)))
            start = None
    return tuple(intervals) if start is None else (*intervals, (start, math.inf))


def _exact_terms(series: Series, degree: int) -> list[Fraction]:
    # Before rounding to floats: rounding alone makes even the exp of degree 90 negative somewhere.
    floats, rule = series.coefficients(degree), series.terms
    return [Fraction(rule(p)) for p in range(degree + 1)] if callable(rule) else [Fraction(c) for c in floats]


# ---- numbers and arguments -------------------------------------------------------------------------------------------


def _round(value: Fraction, towards: float) -> float:
    nearest = _to_float(value)
    reached = nearest == value or (nearest > value) == (towards > value)  # float against Fraction compares exactly
    return nearest if reached else math.nextafter(nearest, towards)


def _to_float(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _is_coefficient(value: object) -> bool:
    largest = sys.float_info.max
    return is_number(value) or (isinstance(value, Fraction) and -largest <= value <= largest)


def _expect_degree(degree: int, most: int = DEGREE_LIMIT) -> None:
    expect_int("degree", degree, 0, most)


def _expect_series(series: Series) -> None:
    good = isinstance(series, Series)
    expect(good, "series", "a Series", "" if good else shown(series))


def _expect_normal(mean: float, std: float) -> None:
    """Refuse what is no normal distribution of scores, or one whose scores' exponentials are out of range."""
    expect(is_number(mean), "mean", "a finite number", shown(mean))
    expect(is_number(std) and std >= 0, "std", "a finite number >= 0", shown(std))
    exponent = abs(mean) + std * (std / 2)
    expect(exponent <= EXP_LIMIT, "mean, std", f"|mean| + std^2/2 <= {EXP_LIMIT:g}, where exp is a float", exponent)
