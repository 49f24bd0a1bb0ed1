// The tokens that states keep exact: the last ones in a ring, the first ones as sinks, some for their weight. Their slots,
// their scores, and who keeps a place for the attention that it got (its meaning: ops/heavy.py).
#pragma once
#include "dots.h"
#include "exponential.h"

namespace taylor {
namespace TARGET {

// One token among others, tokens last: its entries are `width` apart.
template <class T> struct Slot {
  T *key, *value;
  Index width;
};

// A token as it comes.
template <class T> struct Token {
  const T *key, *value;
};

template <class T> INLINE void write(const Token<T>& token, bool visible, Index d, Index columns, const Slot<T>& to) {
  for (Index c = 0; c < d; ++c) to.key[c * to.width] = visible ? token.key[c] : 0;
  for (Index e = 0; e < columns; ++e)
    to.value[e * to.width] = visible ? (e + 1 < columns ? token.value[e] : 1) : 0;
}

template <class T> void copy(const Slot<T>& from, T faded, Index d, Index columns, const Slot<T>& to) {
  for (Index c = 0; c < d; ++c) to.key[c * to.width] = from.key[c * from.width];
  for (Index e = 0; e < columns; ++e) to.value[e * to.width] = from.value[e * from.width] * faded;
}

template <class T> void swap(const Slot<T>& a, const Slot<T>& b, Index d, Index columns) {
  for (Index c = 0; c < d; ++c) std::swap(a.key[c * a.width], b.key[c * b.width]);
  for (Index e = 0; e < columns; ++e) std::swap(a.value[e * a.width], b.value[e * b.width]);
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

// The greatest number, NaN left out; -inf if there is none.
template <class T> INLINE T greatest(const T* x, Index count) {
  constexpr Index L = kLanes<T>;
  Vector<T> top = broadcast(T(-INFINITY));
  Index t = 0;
  for (; t + L <= count; t += L) {
    const Vector<T> several = load(x + t);
    top = maximum<T>(several, top);
  }
  T lanes[L], found = -INFINITY;
  store(lanes, top);
  for (Index i = 0; i < L; ++i) found = lanes[i] > found ? lanes[i] : found;
  for (; t < count; ++t) found = x[t] > found ? x[t] : found;
  return found;
}

// The exact tokens of one row after the other, as its queries see them: the ring's slots, the sinks', the heavy ones'.
template <class T> struct Exact {
  static constexpr Index L = kLanes<T>;

  explicit Exact(const Step& s)
      : near(s.near), d(s.layout->head_dim), columns(s.columns),
        padded(round_up(near.ring.width + near.sinks.width + near.heavy.width, L)), bias(padded), scores(padded),
        weights(padded) {
    fill(static_cast<T*>(scores), padded, T(-INFINITY));  // for good beyond the slots
    fill(static_cast<T*>(bias), padded, T(-INFINITY));
  }

  T* keys(const Slots& part, Index row) const { return static_cast<T*>(part.key) + row * d * part.width; }
  T* values(const Slots& part, Index row) const { return static_cast<T*>(part.value) + row * columns * part.width; }
  const T* ones(const Slots& part, Index row) const { return values(part, row) + (columns - 1) * part.width; }
  Slot<T> in(const Slots& part, Index row, Index at) const {
    return {keys(part, row) + at, values(part, row) + at, part.width};
  }

  // Body(part, where its slots stand among all).
  template <class Body> INLINE void parts(const Body& body) const {
    body(near.ring, 0);
    body(near.sinks, near.ring.width);
    if (near.heavy.width) body(near.heavy, near.ring.width + near.sinks.width);
  }

  // ---- who comes and goes --------------------------------------------------------------------------------------------

  void put(const Token<T>& token, const Slots& part, Index row, Index at, double now) const {
    write(token, true, d, columns, in(part, row, at));
    part.log_decay[row * part.width + at] = now;
  }

  // The token in a slot of the ring is about to leave. It changes places with the heavy one of lowest priority (of equals
  // the first), if its own is higher: then that one leaves. The same as one step of choose.h.
  void compete(Index row, Index at) const {
    const Slots &ring = near.ring, &heavy = near.heavy;
    double &then = ring.log_decay[row * ring.width + at], &got = near.received[row * ring.width + at];
    double *since = heavy.log_decay + row * heavy.width, *held = near.priority + row * heavy.width;
    Index lowest = 0;
    for (Index i = 1; i < heavy.width; ++i)
      if (held[i] < held[lowest]) lowest = i;
    const double priority = log(got) - then;
    got = 0;  // for the one that comes
    if (!(priority > held[lowest]) || ones(ring, row)[at] == 0) return;
    swap(in(ring, row, at), in(heavy, row, lowest), d, columns);
    std::swap(then, since[lowest]);
    held[lowest] = priority;
  }

  // Add to what the ring's tokens have got: a query's weights among them, of which `weights` are multiples. Nothing where
  // that is not finite. Weights are taken once more where their greatest may be too small.
  void note(Index row, T top) {
    const Index window = near.ring.width;
    const T own = greatest<T>(scores, window);
    if (own < top) weigh(own);
    const T total = add_up<T>(weights, window);
    if (spoilt || !(total > 0 && total < T(INFINITY))) return;
    const T* shares = weights;
    double* received = near.received + row * window;
    for (Index t = 0; t < window; ++t) received[t] += shares[t] / total;
  }

  // ---- what queries see ----------------------------------------------------------------------------------------------

  // What stands beside the score of each slot: its log decay since the token came; -inf where there is none, and for
  // what is forgotten, which a maximum would bring back.
  void load_row(Index row, double now) {
    parts([&](const Slots& part, Index first) {
      load_bias(ones(part, row), part.log_decay + row * part.width, part.width, now, bias + first);
    });
    spoilt = near.heavy.width && is_spoilt(row);
  }

  void load_bias(const T* ones, const double* then, Index width, double now, T* to) const {
    if (now == 0)  // nothing has ever faded
      for (Index t = 0; t < width; ++t) to[t] = ones[t] != 0 ? T(0) : T(-INFINITY);
    else
      for (Index t = 0; t < width; ++t) to[t] = ones[t] != 0 && now - then[t] >= kForgotten ? T(now - then[t]) : T(-INFINITY);
  }

  // Whether a key in the ring is not finite: queries that see it tell nothing of the others.
  bool is_spoilt(Index row) const {
    const T *key = keys(near.ring, row), *one = ones(near.ring, row);  // NaN where a key or a value is not finite
    const Index window = near.ring.width;
    if (!isnan(add_up<T>(one, window))) return false;
    for (Index t = 0; t < window; ++t)
      for (Index c = 0; c < d; ++c)
        if (isnan(one[t]) && !isfinite(key[c * window + t])) return true;
    return false;
  }

  bool any() const {
    bool found = false;
    for (Index t = 0; t < padded; ++t) found |= bias[t] != T(-INFINITY);
    return found;
  }

  // The scores of a query, decay included; returns the greatest, -inf if there is no token.
  T compare(Index row, const T* x) {
    parts([&](const Slots& part, Index first) {
      score<T>(x, d, keys(part, row), part.width, bias + first, scores + first);
    });
    return greatest<T>(scores, padded);
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

  // totals += what the weights make of the values.
  void add_to(T* totals, Index row) const {
    parts([&](const Slots& part, Index first) {
      add_dots<T>(values(part, row), part.width, columns, weights + first, part.width, totals);
    });
  }

  const NearSlots& near;
  const Index d, columns, padded;
  Buffer<T> bias, scores, weights;
  bool spoilt = false;
};

}  // namespace TARGET
}  // namespace taylor
