"""Real roots of polynomials in exact arithmetic (Sturm's theorem): where a truncated series changes its sign."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

Polynomial = list[int]  # up to a positive factor, ascending powers, no zero at the end; [] is the zero polynomial


def real_roots(poly: Polynomial) -> list[tuple[Fraction, Fraction]]:
    """Enclose each distinct real root, ascending, to float64's precision, by Sturm's theorem."""
    if len(poly) < 2:
        return []
    chain, limit = _sturm_chain(poly), root_limit(poly)
    pending, roots = [(-limit, limit)], []
    while pending:
        low, high = pending.pop()
        count = _sign_changes(chain, low) - _sign_changes(chain, high)  # roots in (low, high]
        middle = (low + high) / 2
        if count == 1:
            roots.append(_bisect(chain[0], low, high))
        elif count > 1:
            pending += [(low, middle), (middle, high)]
    return sorted(roots)


def _bisect(poly: Polynomial, low: Fraction, high: Fraction) -> tuple[Fraction, Fraction]:
    """Narrow (low, high], which holds exactly one root, a simple one."""
    above = sign_at(poly, high)
    if above == 0:
        return high, high
    # low may itself be the neighbouring root: go on until it is not, so that enclosures never touch a root
    while high - low > Fraction(1, 2**54) * max(abs(low), abs(high)) or sign_at(poly, low) == 0:
        middle = (low + high) / 2
        sign = sign_at(poly, middle)
        if sign == 0:
            return middle, middle
        low, high = (low, middle) if (sign > 0) == (above > 0) else (middle, high)
    return low, high


def _sturm_chain(poly: Polynomial) -> list[Polynomial]:
    """Return Sturm's chain of poly / gcd(poly, poly'), which has the same roots, all simple."""
    chain = [poly, _differentiate(poly)]
    while remainder := _divide(chain[-2], chain[-1])[1]:
        chain.append(_primitive([-c for c in remainder]))
    return chain if len(chain[-1]) == 1 else _sturm_chain(_primitive(_divide(poly, chain[-1])[0]))


def _divide(numerator: Polynomial, divisor: Polynomial) -> tuple[Polynomial, Polynomial]:
    """Divide a positive multiple of the numerator, so that quotient and remainder stay whole."""
    rest, quotient = list(numerator), [0] * (len(numerator) - len(divisor) + 1)
    size, sign = abs(divisor[-1]), 1 if divisor[-1] > 0 else -1
    for shift in reversed(range(len(quotient))):
        top = rest.pop() * sign
        quotient, rest = [size * c for c in quotient], [size * c for c in rest]
        quotient[shift] = top
        for i, c in enumerate(divisor[:-1]):
            rest[shift + i] -= top * c
    return quotient, _trim(rest)


def _sign_changes(chain: list[Polynomial], point: Fraction) -> int:
    signs = [sign for link in chain if (sign := sign_at(link, point)) != 0]
    return sum((a > 0) != (b > 0) for a, b in pairwise(signs))


def sign_at(poly: Polynomial, point: Fraction) -> int:
    """Return an integer with the sign of poly(point): Horner's rule times a power of the denominator."""
    value, power = 0, 1
    for c in reversed(poly):
        value = value * point.numerator + c * power
        power *= point.denominator
    return value


def root_limit(poly: Polynomial) -> Fraction:
    """Return a power of two beyond every root (Cauchy's bound); a power of two keeps bisection dyadic."""
    return Fraction(1 << (1 + max(map(abs, poly)) // abs(poly[-1])).bit_length())


def to_integers(coefficients: Sequence[Fraction]) -> Polynomial:
    """Return the primitive integer polynomial that is a positive multiple of this one."""
    scale = math.lcm(*(c.denominator for c in coefficients))
    return _primitive([int(c * scale) for c in coefficients])


def _primitive(poly: Polynomial) -> Polynomial:
    content = math.gcd(*poly)
    return _trim([c // content for c in poly]) if content else []


def _differentiate(poly: Polynomial) -> Polynomial:
    return [p * c for p, c in enumerate(poly)][1:]


def _trim(poly: Polynomial) -> Polynomial:
    while poly and poly[-1] == 0:
        poly.pop()
    return poly
