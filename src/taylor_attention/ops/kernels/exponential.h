// The exponential function and the logarithm of a vector, without a call.
#pragma once
#include "simd.h"

namespace taylor {
namespace TARGET {

// A log decay below this is no weight at all, even where there is no other: exp of it is 0 in float64.
constexpr double kForgotten = -745;

// exp(x) = 2^n exp(r) with n = round(x / log 2), |r| <= log(2) / 2 and the Taylor series of the degree that one rounding
// needs. Adding `shift` to n leaves n + the exponent's bias in the last bits of the sum, one move away from 2^n. log 2
// comes in two parts, the first so short that n times it is exact. From `lowest` to `highest` exp(x) is a normal number.
template <class T> struct Exponential;
template <> struct Exponential<float> {
  typedef std::uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
  typedef std::int32_t Signed __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int mantissa = 23, degree = 7, odd = 4;
  static constexpr std::uint32_t root_half = 0x3f3504f3;
  static constexpr float shift = 12582912.0f + 127.0f, log2 = 0.693359375f, log2_rest = -2.12194440e-4f;
  static constexpr float lowest = -87.33f, highest = 88.0f;
};
template <> struct Exponential<double> {
  typedef std::uint64_t Bits __attribute__((vector_size(VECTOR_BYTES)));
  typedef std::int64_t Signed __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int mantissa = 52, degree = 13, odd = 10;
  static constexpr std::uint64_t root_half = 0x3fe6a09e667f3bcd;
  static constexpr double shift = 6755399441055744.0 + 1023.0, log2 = 6.93145751953125e-1, log2_rest = 1.42860682030941723e-6;
  static constexpr double lowest = -708.39, highest = 709.0;
};

constexpr double kInverseFactorials[] = {1.0,           1.0,            1.0 / 2,         1.0 / 6,         1.0 / 24,
                                         1.0 / 120,     1.0 / 720,      1.0 / 5040,      1.0 / 40320,     1.0 / 362880,
                                         1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};

template <class T> INLINE Vector<T> maximum(Vector<T> a, Vector<T> b) { return a > b ? a : b; }  // b where a is NaN
template <class T> INLINE Vector<T> minimum(Vector<T> a, Vector<T> b) { return a < b ? a : b; }
#if defined(__x86_64__)  // one instruction, where compilers make two
#if VECTOR_BYTES == 64
#define X86(name) _mm512_##name
#elif VECTOR_BYTES == 32
#define X86(name) _mm256_##name
#else
#define X86(name) _mm_##name
#endif
template <> INLINE Vector<float> maximum<float>(Vector<float> a, Vector<float> b) { return X86(max_ps)(a, b); }
template <> INLINE Vector<float> minimum<float>(Vector<float> a, Vector<float> b) { return X86(min_ps)(a, b); }
template <> INLINE Vector<double> maximum<double>(Vector<double> a, Vector<double> b) { return X86(max_pd)(a, b); }
template <> INLINE Vector<double> minimum<double>(Vector<double> a, Vector<double> b) { return X86(min_pd)(a, b); }
#undef X86
#endif

// To about one unit in the last place. 0 below `lowest`; above `highest` as there, so that nothing times it is still
// nothing. NaN stays NaN.
//
// Several vectors go side by side, since one alone is a chain of operations that each wait for the one before, longer than
// what a processor looks ahead.
template <class T, int C> INLINE void exponentials(Vector<T> (&x)[C]) {
  using Of = Exponential<T>;
  using Bits = typename Of::Bits;
  Vector<T> r[C], power[C], y[C];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
    const Vector<T> bounded = maximum<T>(broadcast(Of::lowest), minimum<T>(broadcast(Of::highest), x[c]));
    const Vector<T> shifted = bounded * T(1.4426950408889634074) + Of::shift, n = shifted - Of::shift;
    r[c] = (bounded - n * Of::log2) - n * Of::log2_rest;
    power[c] = x[c] < Of::lowest ? Vector<T>{} : reinterpret_cast<Vector<T>>(reinterpret_cast<Bits>(shifted) << Of::mantissa);
    y[c] = broadcast(T(kInverseFactorials[Of::degree]));
  }
#pragma GCC unroll 16
  for (int p = Of::degree - 1; p >= 0; --p)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) y[c] = y[c] * r[c] + T(kInverseFactorials[p]);
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) x[c] = y[c] * power[c];
}
template <class T> INLINE Vector<T> exponential(Vector<T> x) {
  Vector<T> one[1] = {x};
  exponentials<T>(one);
  return one[0];
}

// The logarithm of a positive normal number, to about one unit in the last place; infinity is like 2^(highest + 1). With
// x = 2^n m, m around 1 and s = (m - 1) / (m + 1): n log 2 + 2 (s + s^3 / 3 + s^5 / 5 + ...).
template <class T> INLINE Vector<T> logarithm(Vector<T> x) {
  using Of = Exponential<T>;
  using Bits = typename Of::Bits;
  using Signed = typename Of::Signed;
  const Bits bits = reinterpret_cast<Bits>(x);
  const Signed n = reinterpret_cast<Signed>(bits - Of::root_half) >> Of::mantissa;
  const Vector<T> m = reinterpret_cast<Vector<T>>(bits - (reinterpret_cast<Bits>(n) << Of::mantissa));
  const Vector<T> s = (m - T(1)) / (m + T(1)), square = s * s;
  Vector<T> y = broadcast(T(1) / (2 * Of::odd + 1));
#pragma GCC unroll 16
  for (int p = Of::odd - 1; p >= 0; --p) y = y * square + T(1) / (2 * p + 1);
  const Vector<T> power = __builtin_convertvector(n, Vector<T>);
  return power * Of::log2 + (power * Of::log2_rest + 2 * s * y);
}

}  // namespace TARGET
}  // namespace taylor
