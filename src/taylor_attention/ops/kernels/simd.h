// Vectors of the target's width, by the compiler's own vector types: the same source for every instruction set.
// The including file defines VECTOR_BYTES and TILE_ROWS.
#pragma once
#include "problem.h"

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace taylor {
namespace TARGET {

template <class T> struct Simd;
template <> struct Simd<float> {
  typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
};
template <> struct Simd<double> {
  typedef double Vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
};

template <class T> using Vector = typename Simd<T>::Vector;
template <class T> constexpr Index kLanes = VECTOR_BYTES / sizeof(T);
template <class T> constexpr Index kPanel = 2 * kLanes<T>;  // columns of a product: two vectors

template <class T> INLINE Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}
template <class T> INLINE void store(T* p, Vector<T> x) { *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = x; }
template <class T> INLINE Vector<T> broadcast(T x) { return x - Vector<T>{}; }

// The sum of all lanes, by halves.
template <class T> INLINE T sum(Vector<T> x) {
  T lanes[kLanes<T>];
  store(lanes, x);
#pragma GCC unroll 4
  for (Index width = kLanes<T> / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (Index i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

INLINE Index round_up(Index n, Index to) { return (n + to - 1) / to * to; }

// Memory of one kernel call, aligned to cache lines, not cleared.
template <class T> class Buffer {
 public:
  explicit Buffer(Index count) : data_(nullptr) {
    if (count > 0) data_ = static_cast<T*>(aligned_alloc(64, round_up(count * sizeof(T), 64)));
    if (count > 0 && !data_) throw std::bad_alloc();
  }
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

template <class T> INLINE void fill(T* p, Index count, T value) {
  for (Index i = 0; i < count; ++i) p[i] = value;
}

// [rows, columns] with row strides -> [columns, rows]: blocks of lanes x lanes by zips, the rest one by one.
template <class T> struct Zip;
template <> struct Zip<float> {
  using V = Vector<float>;
#if VECTOR_BYTES == 16
  static INLINE V low(V a, V b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
  static INLINE V high(V a, V b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#elif VECTOR_BYTES == 32
  static INLINE V low(V a, V b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
  static INLINE V high(V a, V b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
  static INLINE V low(V a, V b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  }
  static INLINE V high(V a, V b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
#endif
};
template <> struct Zip<double> {
  using V = Vector<double>;
#if VECTOR_BYTES == 16
  static INLINE V low(V a, V b) { return __builtin_shufflevector(a, b, 0, 2); }
  static INLINE V high(V a, V b) { return __builtin_shufflevector(a, b, 1, 3); }
#elif VECTOR_BYTES == 32
  static INLINE V low(V a, V b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
  static INLINE V high(V a, V b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#else
  static INLINE V low(V a, V b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
  static INLINE V high(V a, V b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#endif
};

template <class T> void transpose(const T* from, Index from_row, Index rows, Index columns, T* to, Index to_row) {
  constexpr Index L = kLanes<T>;
  const Index whole_rows = rows / L * L, whole_columns = columns / L * L;
  for (Index r = 0; r < whole_rows; r += L)
    for (Index c = 0; c < whole_columns; c += L) {
      Vector<T> a[L], b[L];
#pragma GCC unroll 16
      for (Index i = 0; i < L; ++i) a[i] = load(from + (r + i) * from_row + c);
#pragma GCC unroll 4
      for (Index width = 1; width < L; width *= 2) {
#pragma GCC unroll 16
        for (Index i = 0; i < L / 2; ++i) {
          b[2 * i] = Zip<T>::low(a[i], a[i + L / 2]);
          b[2 * i + 1] = Zip<T>::high(a[i], a[i + L / 2]);
        }
#pragma GCC unroll 16
        for (Index i = 0; i < L; ++i) a[i] = b[i];
      }
#pragma GCC unroll 16
      for (Index i = 0; i < L; ++i) store(to + (c + i) * to_row + r, a[i]);
    }
  for (Index r = 0; r < rows; ++r)
    for (Index c = r < whole_rows ? whole_columns : 0; c < columns; ++c) to[c * to_row + r] = from[r * from_row + c];
}

}  // namespace TARGET
}  // namespace taylor
