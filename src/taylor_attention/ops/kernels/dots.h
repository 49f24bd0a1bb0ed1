// Matrices by single vectors: the monomials of a few of them, and sums over columns that these weigh.
#pragma once
#include "product.h"

namespace taylor {
namespace TARGET {

// All monomials of `count` vectors x [count, d], times weights: to [count, stride], stride >= M + one vector.
template <class T>
void expand(const Layout& layout, const T* x, Index count, const T* weights, T* to, Index stride) {
  constexpr Index L = kLanes<T>;
  const Index d = layout.head_dim, features = layout.features;
  for (Index i = 0; i < count; ++i) {
    to[i * stride] = 1;
    for (Index c = 0; layout.degree > 0 && c < d; ++c) to[i * stride + 1 + c] = x[i * d + c];
  }
  for (Index b = 0; b < layout.every_count; ++b) {
    const Block& block = layout.every[b];
    for (Index i = 0; i < count; ++i) {
      const Vector<T> factor = broadcast(x[i * d + block.index]);
      const T* from = to + i * stride + block.suffix;
      T* start = to + i * stride + block.start;
      for (Index r = 0; r < block.count; r += L) store(start + r, factor * load(from + r));  // beyond: written next
    }
  }
  for (Index i = 0; i < count; ++i) {
    T* row = to + i * stride;
    Index r = 0;
    for (; r + L <= features; r += L) store(row + r, load(row + r) * load(weights + r));
    for (; r < features; ++r) row[r] *= weights[r];
  }
}

// totals[e] (one vector each) += rows[e, r] x[r] for R rows and `count` columns, not reduced. A last part shorter than a
// vector is read together with what stands before it, which counts as zero (`last`: x there, zeros before).
template <int R, class T>
INLINE void dots(const T* rows, Index stride, const T* x, Index count, const T* last, T* totals) {
  constexpr Index L = kLanes<T>;
  Vector<T> total[R][2];
#pragma GCC unroll 16
  for (int e = 0; e < R; ++e) total[e][0] = load(totals + e * L), total[e][1] = Vector<T>{};
  Index r = 0;
  for (; r + 2 * L <= count; r += 2 * L) {
    const Vector<T> left = load(x + r), right = load(x + r + L);
#pragma GCC unroll 16
    for (int e = 0; e < R; ++e) {
      total[e][0] += left * load(rows + e * stride + r);
      total[e][1] += right * load(rows + e * stride + r + L);
    }
  }
  if (r + L <= count) {
    const Vector<T> left = load(x + r);
#pragma GCC unroll 16
    for (int e = 0; e < R; ++e) total[e][0] += left * load(rows + e * stride + r);
    r += L;
  }
  if (r < count) {
    const Vector<T> rest = load(last);
#pragma GCC unroll 16
    for (int e = 0; e < R; ++e) total[e][1] += rest * load(rows + e * stride + count - L);
  }
#pragma GCC unroll 16
  for (int e = 0; e < R; ++e) store(totals + e * L, total[e][0] + total[e][1]);
}

// totals[e, :] += rows[e, :count] * x[:count] for all columns e of [value, 1].
template <class T> void add_dots(const T* rows, Index stride, Index columns, const T* x, Index count, T* totals) {
  constexpr Index L = kLanes<T>;
  if (count < L) {  // too short for a vector of any kind
    for (Index e = 0; e < columns; ++e)
      for (Index r = 0; r < count; ++r) totals[e * L] += rows[e * stride + r] * x[r];
    return;
  }
  T last[L] = {};
  for (Index i = count % L; i > 0; --i) last[L - i] = x[count - i];
  for_tiles(columns, [&](auto height, Index first) INLINE_LAMBDA {
    constexpr int R = decltype(height)::value;
    dots<R, T>(rows + first * stride, stride, x, count, last, totals + first * L);
  });
}

template <class T> INLINE T dot(const T* a, const T* b, Index count) {
  constexpr Index L = kLanes<T>;
  Vector<T> left = {}, right = {};
  Index i = 0;
  for (; i + 2 * L <= count; i += 2 * L) {
    left += load(a + i) * load(b + i);
    right += load(a + i + L) * load(b + i + L);
  }
  for (; i + L <= count; i += L) left += load(a + i) * load(b + i);
  T total = sum<T>(left + right);
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

template <class T> INLINE T add_up(const T* x, Index count) {
  constexpr Index L = kLanes<T>;
  Vector<T> several = {};
  Index i = 0;
  for (; i + L <= count; i += L) several += load(x + i);
  T total = sum<T>(several);
  for (; i < count; ++i) total += x[i];
  return total;
}

}  // namespace TARGET
}  // namespace taylor
