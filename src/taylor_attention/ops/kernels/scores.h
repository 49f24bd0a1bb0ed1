// Inside a chunk: the polynomial on the scores, its backward for queries and for keys (the Python twin: ops/tiles.py).
#pragma once
#include "tiles.h"

namespace taylor {
namespace TARGET {

constexpr Index kScoreRows = 128;  // rows of one block of scores [kScoreRows, panel]: stays in the first-level cache
constexpr Index kSlopePanels = 4;  // panels of keys whose slopes wait for one product, which one alone would make short

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

// Blocks of what follows from scores: weights of one panel [kScoreRows, panel], slopes of several.
template <class T> struct ScoreBlocks {
  ScoreBlocks() : weights(kScoreRows * kPanel<T>), slopes(kSlopePanels * kScoreRows * kPanel<T>) {}
  Buffer<T> weights, slopes;
};

// y[e, t] += sum_j f(k_j . q_t) u[e, j] for a tile of queries (lanes) and a tile of keys (rows). weights: [kScoreRows, panel].
template <class T>
void attend(const Problem& p, const Columns<T>& q, Index queries, const KeyTile<T>& keys, const Pairing<T>& at,
            T* weights, const Columns<T>& y) {
  constexpr Index N = kPanel<T>;
  const Index d = p.layout->head_dim, degree = p.layout->degree;
  for (Index t = 0; t < queries; t += N) {
    const Index limit = at.masked && t + N < keys.count ? t + N : keys.count;
    for (Index first = 0; first < limit; first += kScoreRows) {
      const Index count = limit - first < kScoreRows ? limit - first : kScoreRows;
      store_product<T>(count, keys.rows + first * d, d, q.row(0) + t, q.stride, d, weights);
      evaluate<T>(static_cast<const T*>(p.coefficients), degree, weights, count * N);
      restrict_rows(weights, at, t, first, count, true);
      add_product<T>(keys.end - keys.begin, keys.u.row(0) + first, keys.u.stride, weights, count, y, t);
    }
  }
}

// to[r, :] += sum_t slopes[r, t] rows[t, :] for `keys` keys, whose slopes lie in panels [kScoreRows, panel]; `width`
// entries of a row, whole panels.
template <class T>
INLINE void add_by_rows(Index count, const T* slopes, Index keys, const T* rows, Index width, T* to) {
  constexpr Index L = kLanes<T>, N = kPanel<T>;
  for (Index c = 0; c < width; c += N)
    for_tiles(count, [&](auto height, Index first) INLINE_LAMBDA {
      constexpr int R = decltype(height)::value;
      Vector<T> sums[R][2];
      clear<R, T>(sums);
      for (Index t = 0; t < keys; t += N) {
        const T *a = slopes + t * kScoreRows + first * N, *b = rows + t * width + c;
        const Index depth = keys - t < N ? keys - t : N;
        for (Index k = 0; k < depth; ++k) add_product<R, T>(sums, a + k, N, b + k * width);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        T* at = to + (first + r) * width + c;
        store(at, load(at) + sums[r][0]);
        store(at + L, load(at + L) + sums[r][1]);
      }
    });
}

// The gradients of `attend`, given those by y, for a tile of queries (rows) and a tile of keys (lanes): added to
// dk[c, t] and du[e, t], and to the queries' dq [tokens, width].
template <class T>
void attend_backward(const Problem& p, const T* slope, const QueryTile<T>& queries, const KeyTile<T>& keys,
                     const Pairing<T>& at, const ScoreBlocks<T>& blocks, const Columns<T>& dk, const Columns<T>& du, T* dq) {
  constexpr Index N = kPanel<T>, kWide = kSlopePanels * N;
  const Index d = p.layout->head_dim, degree = p.layout->degree, columns = p.columns, width = round_up(d, N);
  const T* coefficients = static_cast<const T*>(p.coefficients);
  T* weights = blocks.weights;
  for (Index first = 0; first < queries.count; first += kScoreRows) {
    const Index end = queries.count - first < kScoreRows ? queries.count : first + kScoreRows;
    const Index seen = at.masked && end < keys.count ? end : keys.count;
    for (Index from = 0; from < seen; from += kWide) {
      const Index to = seen - from < kWide ? seen : from + kWide;
      for (Index t = from; t < to; t += N) {
        const Index begin = at.masked && first < t ? t : first, count = end - begin;  // earlier queries do not see the keys
        T* slopes = blocks.slopes + (t - from) * kScoreRows + (begin - first) * N;
        store_product<T>(count, queries.q_rows + begin * d, d, keys.x.row(0) + t, keys.x.stride, d, weights);
        if (degree > 0) {
          store_product<T>(count, queries.g_rows + begin * columns, columns, keys.u.row(0) + t, keys.u.stride, columns, slopes);
          evaluate_both<T>(coefficients, slope, degree, weights, count * N, slopes);
          restrict_rows(slopes, at, t, begin, count, false);
          add_product<T>(d, queries.q.row(0) + begin, queries.q.stride, slopes, count, dk, t);
        } else {
          evaluate<T>(coefficients, degree, weights, count * N);
        }
        restrict_rows(weights, at, t, begin, count, false);
        add_product<T>(columns, queries.g.row(0) + begin, queries.g.stride, weights, count, du, t);
      }
      if (degree == 0) continue;
      Index begin = at.masked && first < from ? from : first;
      while (begin < end) {  // a panel of queries sees the panels of keys up to its own
        const bool edge = at.masked && begin < to;
        const Index count = edge && begin + N < end ? N : end - begin, last = edge && begin + N < to ? begin + N : to;
        add_by_rows<T>(count, blocks.slopes + (begin - first) * N, last - from, keys.padded + from * width, width, dq + begin * width);
        begin += count;
      }
    }
  }
}

}  // namespace TARGET
}  // namespace taylor
