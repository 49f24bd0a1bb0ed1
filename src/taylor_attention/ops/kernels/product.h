// The one inner loop: a tile of R rows x one panel (two vectors) of a product, kept in registers.
#pragma once
#include "simd.h"

namespace taylor {
namespace TARGET {

// c[r][:] += a[r] b[:]; a has row stride a_row.
template <int R, class T> INLINE void add_product(Vector<T> (&c)[R][2], const T* a, Index a_row, const T* b) {
  const Vector<T> left = load(b), right = load(b + kLanes<T>);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const T x = a[r * a_row];
    c[r][0] += x * left;
    c[r][1] += x * right;
  }
}

template <int R, class T> INLINE void clear(Vector<T> (&c)[R][2]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) c[r][0] = c[r][1] = Vector<T>{};
}

// c[r][:] = sum_k a[r, k] b[k, :]; b (a panel) has row stride b_row.
template <int R, class T>
INLINE void multiply(Vector<T> (&c)[R][2], const T* a, Index a_row, const T* b, Index b_row, Index depth) {
  clear<R, T>(c);
  for (Index k = 0; k < depth; ++k) add_product<R, T>(c, a + k, a_row, b + k * b_row);
}

// The same in runs of `chain` terms, whose sums are then added: many equal terms, one after the other, would all be
// rounded to the same side. A run is short and of known length, so that the processor foresees its end.
template <int R, Index chain, class T>
INLINE void multiply_in_runs(Vector<T> (&total)[R][2], const T* a, Index a_row, const T* b, Index b_row, Index depth) {
  Vector<T> c[R][2];
  multiply<R, T>(total, a, a_row, b, b_row, depth % chain);
  for (Index first = depth % chain; first < depth; first += chain) {
    clear<R, T>(c);
#pragma GCC unroll 4
    for (Index k = first; k < first + chain; ++k) add_product<R, T>(c, a + k, a_row, b + k * b_row);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) total[r][0] += c[r][0], total[r][1] += c[r][1];
  }
}

template <int R> struct Rows {
  static constexpr int value = R;
};

// Cut `rows` into tiles of nearly equal height <= TILE_ROWS: body(Rows<R>, first row).
template <class Body> INLINE void for_tiles(Index rows, const Body& body) {
  const unsigned tiles = (unsigned(rows) + TILE_ROWS - 1) / TILE_ROWS;
  if (!tiles) return;
  const unsigned height_of_last = unsigned(rows) / tiles, higher = unsigned(rows) - height_of_last * tiles;
  Index first = 0;
  for (unsigned i = 0; i < tiles; ++i) {
    const unsigned height = height_of_last + (i < higher);
    switch (height) {
      case 1: body(Rows<1>{}, first); break;
      case 2: body(Rows<2>{}, first); break;
      case 3: body(Rows<3>{}, first); break;
      case 4: body(Rows<4>{}, first); break;
      case 5: body(Rows<5>{}, first); break;
      case 6: body(Rows<6>{}, first); break;
#if TILE_ROWS == 8
      case 7: body(Rows<7>{}, first); break;
      case 8: body(Rows<8>{}, first); break;
#endif
    }
    first += height;
  }
}

// A product of `rows` rows with one panel, in runs of `chain` terms if that is given; each finished row goes to
// emit(row, left, right).
template <class T, Index chain = 0, class Emit>
INLINE void product(Index rows, const T* a, Index a_row, const T* b, Index b_row, Index depth, const Emit& emit) {
  for_tiles(rows, [&](auto height, Index first) INLINE_LAMBDA {
    constexpr int R = decltype(height)::value;
    Vector<T> c[R][2];
    if constexpr (chain == 0) multiply<R, T>(c, a + first * a_row, a_row, b, b_row, depth);
    else multiply_in_runs<R, chain, T>(c, a + first * a_row, a_row, b, b_row, depth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) emit(first + r, c[r][0], c[r][1]);
  });
}

}  // namespace TARGET
}  // namespace taylor
