// Which tokens sums can hold: the rule of core/ranges.py, to the last bit.
#pragma once
#include "simd.h"

namespace taylor {
namespace TARGET {

template <class T> struct Pattern;
template <> struct Pattern<float> { using Type = std::int32_t; };
template <> struct Pattern<double> { using Type = std::int64_t; };

// The largest |x|, or 1 if that is larger; NaN if there is one. Without their signs numbers are ordered as the integers
// of the same bits are, with infinity and then NaN above all others.
template <class T> INLINE T at_least_one(const T* x, Index count) {
  using Bits = typename Pattern<T>::Type;
  constexpr Bits kUnsigned = ~(Bits(1) << (8 * sizeof(T) - 1));
  const T one = 1;
  T largest;
  Bits most;
  memcpy(&most, &one, sizeof(T));
  for (Index i = 0; i < count; ++i) {
    Bits bits;
    memcpy(&bits, x + i, sizeof(T));
    bits &= kUnsigned;
    most = bits > most ? bits : most;
  }
  memcpy(&largest, &most, sizeof(T));
  return largest;
}

// Whether |key|^degree |value| of a token is within the limit.
template <class T> INLINE bool in_range(const T* key, Index d, const T* value, Index value_dim, Index degree, double limit) {
  T size = at_least_one(value, value_dim);
  const T factor = at_least_one(key, d);
  for (Index p = 0; p < degree || p < 1; ++p) size *= factor;
  return size <= T(limit);
}

}  // namespace TARGET
}  // namespace taylor
