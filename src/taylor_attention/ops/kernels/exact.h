// The tokens that states keep exact: the last ones in a ring, the first ones as sinks. Their slots and their scores.
#pragma once
#include "exponential.h"
#include "product.h"

namespace taylor {
namespace TARGET {

// One token among others, tokens last: its entries are `width` apart.
template <class T> struct Slot {
  T *key, *value;
  Index width;
};

// A token as it comes; `broken` is NaN if anything in it is not finite, else 0.
template <class T> struct Token {
  const T *key, *value;
  T broken;
};

template <class T> INLINE void write(const Token<T>& token, bool visible, Index d, Index columns, const Slot<T>& to) {
  for (Index c = 0; c < d; ++c) to.key[c * to.width] = visible ? token.key[c] : 0;
  for (Index e = 0; e < columns; ++e)
    to.value[e * to.width] = visible ? (e + 1 < columns ? token.value[e] : 1) + token.broken : 0;
}

template <class T> void copy(const Slot<T>& from, T faded, Index d, Index columns, const Slot<T>& to) {
  for (Index c = 0; c < d; ++c) to.key[c * to.width] = from.key[c * from.width];
  for (Index e = 0; e < columns; ++e) to.value[e * to.width] = from.value[e * from.width] * faded;
}

// to[t] = x . keys[:, t] + bias[t] for R vectors of slots.
template <int R, class T>
INLINE void score_tile(const T* x, Index d, const T* keys, Index width, const T* bias, T* to) {
  constexpr Index L = kLanes<T>;
  Vector<T> score[R] = {};
  for (Index c = 0; c < d; ++c)
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) score[i] += x[c] * load(keys + c * width + i * L);
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) store(to + i * L, score[i] + load(bias + i * L));
}

// The same for any number of slots. A last part shorter than a vector is computed with what stands before it.
template <class T> void score(const T* x, Index d, const T* keys, Index width, const T* bias, T* to) {
  constexpr Index L = kLanes<T>;
  const Index vectors = width / L;
  for_tiles(vectors, [&](auto height, Index first) INLINE_LAMBDA {
    constexpr int R = decltype(height)::value;
    score_tile<R, T>(x, d, keys + first * L, width, bias + first * L, to + first * L);
  });
  if (vectors && width % L) score_tile<1, T>(x, d, keys + width - L, width, bias + width - L, to + width - L);
  for (Index t = 0; !vectors && t < width; ++t) {
    T total = 0;
    for (Index c = 0; c < d; ++c) total += x[c] * keys[c * width + t];
    to[t] = total + bias[t];
  }
}

// The exact tokens of one row after the other, as its queries see them: the ring's slots, then the sinks'.
template <class T> struct Exact {
  static constexpr Index L = kLanes<T>;

  explicit Exact(const Step& s)
      : near(s.near), d(s.layout->head_dim), columns(s.columns), padded(round_up(near.window + near.sinks, L)),
        bias(padded), scores(padded), weights(padded) {
    fill(static_cast<T*>(scores), padded, T(-INFINITY));  // for good beyond the slots
    fill(static_cast<T*>(bias), padded, T(-INFINITY));
  }

  T* ring_keys(Index row) const { return static_cast<T*>(near.key) + row * d * near.window; }
  T* ring_values(Index row) const { return static_cast<T*>(near.value) + row * columns * near.window; }
  T* sink_keys(Index row) const { return static_cast<T*>(near.sink_key) + row * d * near.sinks; }
  T* sink_values(Index row) const { return static_cast<T*>(near.sink_value) + row * columns * near.sinks; }

  Slot<T> in_ring(Index row, Index at) const { return {ring_keys(row) + at, ring_values(row) + at, near.window}; }
  Slot<T> in_sinks(Index row, Index at) const { return {sink_keys(row) + at, sink_values(row) + at, near.sinks}; }

  // What stands beside the score of each slot: its log decay since the token came; -inf where there is none, and for
  // what is forgotten, which a maximum would bring back.
  void load_row(Index row, double now) {
    load_bias(ring_values(row), near.log_decay + row * near.window, near.window, now, bias);
    load_bias(sink_values(row), near.sink_log_decay + row * near.sinks, near.sinks, now, bias + near.window);
  }

  void load_bias(const T* values, const double* then, Index width, double now, T* to) const {
    const T* ones = values + (columns - 1) * width;
    if (now == 0)  // nothing has ever faded
      for (Index t = 0; t < width; ++t) to[t] = ones[t] != 0 ? T(0) : T(-INFINITY);
    else
      for (Index t = 0; t < width; ++t) to[t] = ones[t] != 0 && now - then[t] >= kForgotten ? T(now - then[t]) : T(-INFINITY);
  }

  bool any() const {
    bool found = false;
    for (Index t = 0; t < padded; ++t) found |= bias[t] != T(-INFINITY);
    return found;
  }

  // The scores of a query, decay included; returns the greatest, -inf if there is no token.
  T compare(Index row, const T* x) {
    score<T>(x, d, ring_keys(row), near.window, bias, scores);
    score<T>(x, d, sink_keys(row), near.sinks, bias + near.window, scores + near.window);
    Vector<T> top = broadcast(T(-INFINITY));
    for (Index t = 0; t < padded; t += L) {
      const Vector<T> several = load(scores + t);
      top = maximum<T>(several, top);
    }
    T lanes[L], greatest = -INFINITY;
    store(lanes, top);
    for (Index i = 0; i < L; ++i) greatest = lanes[i] > greatest ? lanes[i] : greatest;
    return greatest;
  }

  // weights = exp(scores - top); returns their sum.
  T weigh(T top) {
    Vector<T> total = {};
    for (Index t = 0; t < padded; t += L) {
      const Vector<T> weight = exponential<T>(load(scores + t) - top);
      store(weights + t, weight);
      total += weight;
    }
    return sum<T>(total);
  }

  const NearSlots& near;
  const Index d, columns, padded;
  Buffer<T> bias, scores, weights;
};

}  // namespace TARGET
}  // namespace taylor
