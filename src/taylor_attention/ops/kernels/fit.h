// exp fitted to the far scores of one query, from the sums of their powers (what it means: ops/reading.py, the twin).
#pragma once
#include "simd.h"

namespace taylor {
namespace TARGET {

template <class T> constexpr double kEpsilon = __FLT_EPSILON__;
template <> constexpr double kEpsilon<double> = __DBL_EPSILON__;

struct Fit {
  Fit(const Fitting& limits, Index degree)
      : limits(limits), degree(degree), powers(degree + 1), centred(degree + 1), coefficients(degree + 1) {}

  // Find the coefficients of the fit, but for the factor exp(log_factor), from `powers`. Whether the normaliser is lost:
  // the powers, which are taken about zero, cancel so far that rounding (of `epsilon`) is left.
  bool solve(double epsilon) {
    const double count = powers[0], some = count > 0 ? count : 1, mean = degree >= 1 ? powers[1] / some : 0;
    double variance = 0;
    if (degree >= 2) {
      const double most = double(degree) / 2;
      variance = powers[2] / some - mean * mean;
      variance = variance < 0 ? 0 : variance > most ? most : variance;
    }
    expand_about(mean, variance);
    if (variance > limits.largest_variance && !(normaliser() > limits.safe * count))
      expand_about(mean, variance = limits.largest_variance);
    log_factor = mean + variance / 2;
    double sizes = 0;
    for (Index p = 0; p <= degree; ++p) sizes += fabs(coefficients[p] * powers[p]);
    return epsilon * sizes > limits.rounding * fabs(normaliser());
  }

  double normaliser() const {
    double z = 0;
    for (Index p = 0; p <= degree; ++p) z += coefficients[p] * powers[p];
    return z;
  }

  // sum_j a_j (s - mean)^j / j! by powers of s, with a_j = sum_{2m <= degree - j} (-variance / 2)^m / m!.
  void expand_about(double mean, double variance) const {
    for (Index j = 0; j <= degree; ++j) {
      double term = centred[j] = 1;
      for (Index m = 1; 2 * m <= degree - j; ++m) centred[j] += term *= -variance / 2 / double(m);
    }
    double inverse_factorial = 1;
    for (Index p = 0; p <= degree; inverse_factorial /= double(++p)) {
      double term = 1, total = 0;
      for (Index j = p; j <= degree; term *= -mean / double(++j - p)) total += centred[j] * term;
      coefficients[p] = inverse_factorial * total;
    }
  }

  const Fitting& limits;
  const Index degree;
  Buffer<double> powers, centred, coefficients;  // [degree + 1] each
  double log_factor = 0;
};

}  // namespace TARGET
}  // namespace taylor
