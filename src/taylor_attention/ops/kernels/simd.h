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

// Memory that a thread keeps for small buffers, which come and go many times in a step: the last one taken is the first one
// given back, since buffers live in blocks of code.
class Stack {
 public:
  ~Stack() { free(base_); }
  void* take(Index size) {  // null: no room
#ifndef __SANITIZE_ADDRESS__
    if (!base_) base_ = static_cast<char*>(aligned_alloc(64, kRoom));
    if (base_ && used_ + size <= kRoom) return base_ + (used_ += size) - size;
#endif
    return nullptr;
  }
  bool give_back(void* data) {  // false: it is not from here
    const Index at = static_cast<char*>(data) - base_;
    if (at < 0 || at >= kRoom) return false;
    used_ = at;
    return true;
  }

 private:
  static constexpr Index kRoom = Index(1) << 18;
  char* base_ = nullptr;
  Index used_ = 0;
};
inline thread_local Stack stack;

// Memory of one kernel call, not cleared, aligned to cache lines.
template <class T> class Buffer {
 public:
  explicit Buffer(Index count) : data_(nullptr) {
    if (count <= 0) return;
    const Index size = round_up(count * sizeof(T), 64);
    void* data = stack.take(size);
    data_ = static_cast<T*>(data ? data : aligned_alloc(64, size));
    if (!data_) throw std::bad_alloc();
  }
  ~Buffer() {
    if (data_ && !stack.give_back(data_)) free(data_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

template <class T> INLINE void fill(T* p, Index count, T value) {
  for (Index i = 0; i < count; ++i) p[i] = value;
}

// The first or the second halves of two vectors, interleaved in pieces of `step` lanes, within parts of `part` lanes:
// zip<1, 4>(a, b) of eight lanes is a0 b0 a1 b1 | a4 b4 a5 b5, which is one instruction where a part is 16 bytes.
template <class T, int step, int part, bool second, int... lane>
INLINE Vector<T> zip(Vector<T> a, Vector<T> b, std::integer_sequence<int, lane...>) {
  constexpr int L = sizeof...(lane);
  return __builtin_shufflevector(
      a, b, (lane / part * part + (second ? part / 2 : 0) + lane % part / (2 * step) * step + lane % step +
             (lane / step % 2 ? L : 0))...);
}

// Rows a[i] become columns: zips of ever longer pieces within 16 bytes, then of whole such parts.
template <class T, int step, int part, class Lanes>
INLINE void turn_step(Vector<T> (&a)[kLanes<T>], Vector<T> (&b)[kLanes<T>]) {
  constexpr int L = kLanes<T>;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    const int low = i & ~step, high = i | step;
    b[i] = i & step ? zip<T, step, part, true>(a[low], a[high], Lanes{}) : zip<T, step, part, false>(a[low], a[high], Lanes{});
  }
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) a[i] = b[i];
}

template <class T> INLINE void turn(Vector<T> (&a)[kLanes<T>]) {
  constexpr int L = kLanes<T>, P = 16 / sizeof(T);
  using Lanes = std::make_integer_sequence<int, L>;
  Vector<T> b[L];
  turn_step<T, 1, P, Lanes>(a, b);
  if constexpr (P == 4) turn_step<T, 2, P, Lanes>(a, b);
  if constexpr (L > P) turn_step<T, P, 2 * P, Lanes>(a, b);
  if constexpr (L > 2 * P) turn_step<T, 2 * P, 4 * P, Lanes>(a, b);
  if constexpr (P == 4)  // two zips within a part leave its middle columns the wrong way round
#pragma GCC unroll 4
    for (int i = 0; i < L; i += 4) {
      const Vector<T> middle = a[i + 1];
      a[i + 1] = a[i + 2], a[i + 2] = middle;
    }
}

// The sum of all lanes of as many vectors as one has lanes: as `sum` of each, to the last bit.
template <class T> INLINE Vector<T> sum_each(const T* vectors) {
  constexpr Index L = kLanes<T>;
  Vector<T> a[L];
#pragma GCC unroll 16
  for (Index i = 0; i < L; ++i) a[i] = load(vectors + i * L);
  turn<T>(a);
#pragma GCC unroll 4
  for (Index width = L / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (Index i = 0; i < width; ++i) a[i] += a[i + width];
  return a[0];
}

// [rows, columns] with row strides -> [columns, rows]: blocks of lanes x lanes in registers, the rest one by one.
template <class T> void transpose(const T* from, Index from_row, Index rows, Index columns, T* to, Index to_row) {
  constexpr Index L = kLanes<T>;
  const Index whole_rows = rows / L * L, whole_columns = columns / L * L;
  for (Index r = 0; r < whole_rows; r += L)
    for (Index c = 0; c < whole_columns; c += L) {
      Vector<T> a[L];
#pragma GCC unroll 16
      for (Index i = 0; i < L; ++i) a[i] = load(from + (r + i) * from_row + c);
      turn<T>(a);
#pragma GCC unroll 16
      for (Index i = 0; i < L; ++i) store(to + (c + i) * to_row + r, a[i]);
    }
  for (Index r = 0; r < rows; ++r)
    for (Index c = r < whole_rows ? whole_columns : 0; c < columns; ++c) to[c * to_row + r] = from[r * from_row + c];
}

}  // namespace TARGET
}  // namespace taylor
