// The one inner loop: a tile of R rows x one panel (two vectors) of a product, kept in registers.
#pragma once
#include "simd.h"

namespace taylor {
namespace TARGET {

// c[r][:] = sum_k a[r, k] b[k, :]; a has row stride a_row, b (a panel) has row stride b_row.
template <int R, class T>
INLINE void multiply(Vector<T> (&c)[R][2], const T* a, Index a_row, const T* b, Index b_row, Index depth) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) c[r][0] = c[r][1] = Vector<T>{};
  for (Index k = 0; k < depth; ++k, b += b_row) {
    const Vector<T> left = load(b), right = load(b + kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const T x = a[r * a_row + k];
      c[r][0] += x * left;
      c[r][1] += x * right;
    }
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

// A product of `rows` rows with one panel; each finished row goes to emit(row, left, right). With `chain`, no more than
// so many terms are summed in a row: many equal ones, one after the other, would all be rounded to the same side.
template <class T, Index chain = 0, class Emit>
INLINE void product(Index rows, const T* a, Index a_row, const T* b, Index b_row, Index depth, const Emit& emit) {
  for_tiles(rows, [&](auto height, Index first) INLINE_LAMBDA {
    constexpr int R = decltype(height)::value;
    Vector<T> c[R][2];
    multiply<R, T>(c, a + first * a_row, a_row, b, b_row, chain && chain < depth ? chain : depth);
    if constexpr (chain > 0) {
      if (chain < depth) {
        Vector<T> total[R][2];
        for (int r = 0; r < R; ++r) total[r][0] = c[r][0], total[r][1] = c[r][1];
        for (Index k = chain; k < depth; k += chain) {
          multiply<R, T>(c, a + first * a_row + k, a_row, b + k * b_row, b_row, depth - k < chain ? depth - k : chain);
          for (int r = 0; r < R; ++r) total[r][0] += c[r][0], total[r][1] += c[r][1];
        }
        for (int r = 0; r < R; ++r) c[r][0] = total[r][0], c[r][1] = total[r][1];
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) emit(first + r, c[r][0], c[r][1]);
  });
}

}  // namespace TARGET
}  // namespace taylor
