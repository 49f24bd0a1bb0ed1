// Inside a chunk: the polynomial on the scores, its backward for queries and for keys (the Python twin: ops/tiles.py).
#pragma once
#include "tiles.h"

namespace taylor {
namespace TARGET {

constexpr Index kScoreRows = 128;  // rows of one block of scores [kScoreRows, panel]: stays in the first-level cache

// Where two tiles stand in their chunk: first tokens counted from the chunk's start; masked: the tiles are the same one.
template <class T> struct Pairing {
  Index lanes_first, rows_first;  // of the tile along the panel, of the tile along the rows
  bool masked;
  const Decay<T>* decay;
};

// Put the factors of causality and decay on one row of a block of weights [.., panel]. `lane`, `row` count within the
// tiles; lanes_query: the panel holds queries and the row is a key (else the other way round).
template <class T> INLINE void restrict_row(T* weights, const Pairing<T>& at, Index lane, Index row, bool lanes_query) {
  constexpr Index L = kLanes<T>, N = kPanel<T>;
  const bool same = at.masked && row / N == lane / N;  // lane is a multiple of the panel
  if (at.decay) {
    const Decay<T>& decay = *at.decay;
    const Index first = at.lanes_first + lane, other = at.rows_first + row;
    if (!same) {
      const Index group = other / N * N, last = first + N - 1;
      const T factor = lanes_query ? decay.to_last[other] * decay.between(first, group + N - 1)
                                   : decay.from_first[other] * decay.between(group, last);
      const T* along = (lanes_query ? decay.from_first : decay.to_last) + first;
      store(weights, load(weights) * (factor * load(along)));
      store(weights + L, load(weights + L) * (factor * load(along + L)));
    } else {
      for (Index i = 0; i < N; ++i) {
        const bool visible = lanes_query ? row <= lane + i : lane + i <= row;
        if (visible) weights[i] *= lanes_query ? decay.pair(first + i, other) : decay.pair(other, first + i);
      }
    }
  }
  if (!same) return;
  const Index edge = row - lane;
  if (lanes_query) fill(weights, edge, T(0));                        // queries before the key
  else if (edge + 1 < N) fill(weights + edge + 1, N - edge - 1, T(0));  // keys after the query
}

// Rows first..first + count of a block of weights [.., panel], as `restrict_row`.
template <class T>
INLINE void restrict_rows(T* weights, const Pairing<T>& at, Index lane, Index first, Index count, bool lanes_query) {
  if (!at.decay && !at.masked) return;
  for (Index r = 0; r < count; ++r)
    if (at.decay || (first + r) / kPanel<T> == lane / kPanel<T>)
      restrict_row(weights + r * kPanel<T>, at, lane, first + r, lanes_query);
}

// to[r, :] (a panel wide) = a product, or that added to what is there.
template <class T>
INLINE void store_product(Index rows, const T* a, Index a_row, const T* b, Index b_row, Index depth, T* to) {
  product<T>(rows, a, a_row, b, b_row, depth, [&](Index r, Vector<T> left, Vector<T> right) INLINE_LAMBDA {
    store(to + r * kPanel<T>, left);
    store(to + r * kPanel<T> + kLanes<T>, right);
  });
}

template <class T>
INLINE void add_product(Index rows, const T* a, Index a_row, const T* b, Index depth, const Columns<T>& to, Index t) {
  product<T>(rows, a, a_row, b, kPanel<T>, depth, [&](Index r, Vector<T> left, Vector<T> right) INLINE_LAMBDA {
    T* at = to.row(r) + t;
    store(at, load(at) + left);
    store(at + kLanes<T>, load(at + kLanes<T>) + right);
  });
}

// Blocks of scores and of what follows from them, [kScoreRows, panel] each.
template <class T> struct ScoreBlocks {
  ScoreBlocks() : scores(kScoreRows * kPanel<T>), weights(kScoreRows * kPanel<T>), slopes(kScoreRows * kPanel<T>) {}
  Buffer<T> scores, weights, slopes;
};

// y[e, t] += sum_j f(k_j . q_t) u[e, j] for a tile of queries (lanes) and a tile of keys (rows).
template <class T>
void attend(const Problem& p, const Columns<T>& q, Index queries, const KeyTile<T>& keys, const Pairing<T>& at,
            const ScoreBlocks<T>& blocks, const Columns<T>& y) {
  constexpr Index N = kPanel<T>;
  const Index d = p.layout->head_dim, degree = p.layout->degree;
  T* weights = blocks.weights;
  for (Index t = 0; t < queries; t += N) {
    const Index limit = at.masked && t + N < keys.count ? t + N : keys.count;
    for (Index first = 0; first < limit; first += kScoreRows) {
      const Index count = limit - first < kScoreRows ? limit - first : kScoreRows;
      store_product<T>(count, keys.rows + first * d, d, q.row(0) + t, q.stride, d, weights);
      evaluate<false, T>(static_cast<const T*>(p.coefficients), degree, weights, count * N, weights);
      restrict_rows(weights, at, t, first, count, true);
      add_product<T>(keys.end - keys.begin, keys.u.row(0) + first, keys.u.stride, weights, count, y, t);
    }
  }
}

// dq[c, t] += the gradient of `attend` by the queries, given g[e, t] = the gradient by y. u_rows: keys.u as [tokens, E].
template <class T>
void attend_by_queries(const Problem& p, const T* slope, const Columns<T>& q, const Columns<T>& g, Index queries,
                       const KeyTile<T>& keys, const T* u_rows, const Pairing<T>& at, const ScoreBlocks<T>& blocks,
                       const Columns<T>& dq) {
  constexpr Index N = kPanel<T>;
  const Index d = p.layout->head_dim, degree = p.layout->degree;
  if (degree == 0) return;
  T *scores = blocks.scores, *slopes = blocks.slopes;
  for (Index t = 0; t < queries; t += N) {
    const Index limit = at.masked && t + N < keys.count ? t + N : keys.count;
    for (Index first = 0; first < limit; first += kScoreRows) {
      const Index count = limit - first < kScoreRows ? limit - first : kScoreRows;
      store_product<T>(count, u_rows + first * p.columns, p.columns, g.row(0) + t, g.stride, p.columns, slopes);
      store_product<T>(count, keys.rows + first * d, d, q.row(0) + t, q.stride, d, scores);
      evaluate<true, T>(slope, degree - 1, scores, count * N, slopes);
      restrict_rows(slopes, at, t, first, count, true);
      add_product<T>(d, keys.x.row(0) + first, keys.x.stride, slopes, count, dq, t);
    }
  }
}

// dk[c, t] and du[e, t] += the gradients of `attend` by a tile of keys (lanes). q_rows [queries, d], g_rows [queries, E].
template <class T>
void attend_by_keys(const Problem& p, const T* slope, const T* q_rows, const T* g_rows, const Columns<T>& q,
                    const Columns<T>& g, Index queries, const KeyTile<T>& keys, const Pairing<T>& at,
                    const ScoreBlocks<T>& blocks, const Columns<T>& dk, const Columns<T>& du) {
  constexpr Index N = kPanel<T>;
  const Index d = p.layout->head_dim, degree = p.layout->degree, columns = p.columns;
  T *scores = blocks.scores, *weights = blocks.weights, *slopes = blocks.slopes;
  for (Index t = 0; t < keys.count; t += N) {
    for (Index first = at.masked ? t : 0; first < queries; first += kScoreRows) {
      const Index count = queries - first < kScoreRows ? queries - first : kScoreRows;
      store_product<T>(count, q_rows + first * d, d, keys.x.row(0) + t, keys.x.stride, d, scores);
      evaluate<false, T>(static_cast<const T*>(p.coefficients), degree, scores, count * N, weights);
      restrict_rows(weights, at, t, first, count, false);
      add_product<T>(columns, g.row(0) + first, g.stride, weights, count, du, t);
      if (degree == 0) continue;
      store_product<T>(count, g_rows + first * columns, columns, keys.u.row(0) + t, keys.u.stride, columns, slopes);
      evaluate<true, T>(slope, degree - 1, scores, count * N, slopes);
      restrict_rows(slopes, at, t, first, count, false);
      add_product<T>(d, q.row(0) + first, q.stride, slopes, count, dk, t);
    }
  }
}

}  // namespace TARGET
}  // namespace taylor
