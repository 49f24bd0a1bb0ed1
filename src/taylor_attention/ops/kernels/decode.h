// One token: append it to the tails of the states, read the moments once, attend to the tail. And folding the tail.
#pragma once
#include "exact.h"
#include "sweep.h"

namespace taylor {
namespace TARGET {

// Query heads that are answered together: their monomials are formed side by side, since each degree reads what the
// one below has just written, and they read the moments of a shared key/value head block by block.
constexpr Index kTogether = 8;
constexpr Index kBlock = 512;  // columns of the moments that stay in the caches while several heads read them

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

inline bool is_visible(const Step& s, Index batch) { return !s.visible || s.visible[batch * s.visible_stride]; }

inline double gate_of(const Gates& gates, Index batch, Index head) {
  const Index at = batch * gates.batch + head * gates.head;
  const double gate = gates.is_double ? static_cast<const double*>(gates.data)[at] : static_cast<const float*>(gates.data)[at];
  return gate < gates.reset ? gates.reset : gate;
}

// The steps of some rows (batch x key/value heads), by one thread; near: some tokens are exact.
template <class T, bool near> struct Decoding {
  static constexpr Index L = kLanes<T>;

  explicit Decoding(const Step& s)
      : s(s), layout(*s.layout), far(!near || s.width > 0), d(layout.head_dim),
        stride(round_up(layout.features, 16) + L), together(whole_groups((Index(1) << 17) / (stride * Index(sizeof(T))), s.group)),
        q(together * d), features(together * stride), weights(s.width), totals(s.group * s.columns * L), exact(s) {}

  // Heads answered together: whole groups, or else parts of one, so that no result depends on how rows are shared out.
  static Index whole_groups(Index heads, Index group) {
    heads = heads < 1 ? 1 : heads > kTogether ? kTogether : heads;
    return heads < group ? heads : heads / group * group;
  }

  const T* sums(Index row) const { return static_cast<const T*>(s.sums) + row * s.columns * layout.features; }
  T* tail_keys(Index row) const { return static_cast<T*>(s.tail_key) + row * d * s.width; }
  T* tail_values(Index row) const { return static_cast<T*>(s.tail_value) + row * s.columns * s.width; }

  // Put the token into the tail of a row, or among the exact ones, of which the oldest then goes there.
  void append(Index row) const {
    const Index batch = row / s.heads, head = row % s.heads;
    const bool visible = is_visible(s, batch);
    T *keys = tail_keys(row) + s.position, *values = tail_values(row);
    Token<T> token = {tokens_of<T>(s.key, batch, head, 0), tokens_of<T>(s.value, batch, head, 0), 0};
    for (Index c = 0; c < d; ++c) token.broken += token.key[c] * 0;
    for (Index e = 0; e + 1 < s.columns; ++e) token.broken += token.value[e] * 0;
    if (s.gates.data && visible) {
      const double gate = gate_of(s.gates, batch, head);
      s.log_decay[row] += gate;
      s.tail_log_decay[row] += gate;
      const T factor = T(exp(gate));
      for (Index e = 0; e < s.columns; ++e)
        for (Index t = 0; t < s.position; ++t) values[e * s.width + t] *= factor;
    }
    const Slot<T> end = {keys, values + s.position, s.width};
    if constexpr (near) append_near(row, token, visible, end);
    else write(token, visible, d, s.columns, end);
  }

  // The n-th visible token (from 0) is a sink, or in slot (n - sinks) % window, from where another leaves for the tail.
  void append_near(Index row, const Token<T>& token, bool visible, const Slot<T>& end) const {
    const Index n = s.tokens[row / s.heads], at = n - s.near.sinks;
    const bool comes = visible && at >= 0;
    const double now = s.log_decay[row];
    if (visible && at < 0) {
      write(token, true, d, s.columns, exact.in_sinks(row, n));
      s.near.sink_log_decay[row * s.near.sinks + n] = now;
    }
    if (!comes || s.near.window == 0) {
      if (far) write(token, comes, d, s.columns, end);
      return;
    }
    const Slot<T> slot = exact.in_ring(row, at % s.near.window);
    double& then = s.near.log_decay[row * s.near.window + at % s.near.window];
    if (far) copy(slot, T(exp(now - then)), d, s.columns, end);
    write(token, true, d, s.columns, slot);
    then = now;
  }

  // Answer query heads first..last, counted over all rows; returns how many normalisers are unsafe.
  Index answer(Index first, Index last) {
    for (Index i = first; i < last; ++i) {
      const Index row = i / s.group;
      const T* query = tokens_of<T>(s.query, row / s.heads, row % s.heads * s.group + i % s.group, 0);
      for (Index c = 0; c < d; ++c) q[(i - first) * d + c] = query[c] * T(s.scale);
    }
    expand<T>(layout, q, last - first, static_cast<const T*>(s.weights), features, stride);
    Index unsafe = 0;
    for (Index i = first; i < last;) {
      const Index row = i / s.group, stop = (row + 1) * s.group < last ? (row + 1) * s.group : last;
      if (near && !is_visible(s, row / s.heads)) {  // the rows of hidden tokens are zeros
        fill(static_cast<T*>(s.out) + i * (s.columns - 1), (stop - i) * (s.columns - 1), T(0));
        i = stop;
        continue;
      }
      if (row + 1 < s.batch * s.heads) prefetch(row + 1);
      read(row, i - first, stop - i);
      if constexpr (near) exact.load_row(row, s.log_decay[row]);
      for (Index member = 0; i < stop; ++i, ++member) {
        T* total = totals + member * s.columns * L;
        unsafe += near ? finish_near(row, i, i - first, total) : finish(row, i, i - first, total);
      }
    }
    return unsafe;
  }

  // Small states are over before the hardware has seen where they lie: fetch the next row's while this one is read.
  void prefetch(Index row) const {
    constexpr Index kLine = 64 / sizeof(T), kSmall = 32768 / sizeof(T);
    const Index size = s.columns * layout.features;
    for (Index i = 0; size <= kSmall && i < size; i += kLine) __builtin_prefetch(sums(row) + i);
    for (Index i = 0; size <= kSmall && i < s.columns * s.width; i += kLine) __builtin_prefetch(tail_values(row) + i);
    for (Index i = 0; size <= kSmall && i < d * s.width; i += kLine) __builtin_prefetch(tail_keys(row) + i);
  }

  // totals[member, e] = what `count` heads of a row, from the one at `at`, read from its moments.
  void read(Index row, Index at, Index count) {
    fill(static_cast<T*>(totals), count * s.columns * L, T(0));
    const Index block = s.group > 1 ? kBlock : layout.features;
    for (Index r = 0; r < layout.features; r += block) {
      const Index width = layout.features - r < block ? layout.features - r : block;
      for (Index i = 0; i < count; ++i)
        add_dots<T>(sums(row) + r, layout.features, s.columns, features + (at + i) * stride + r, width,
                    totals + i * s.columns * L);
    }
  }

  INLINE void add_tail(Index row, Index at, T* total) {
    const Index length = s.position + 1;
    const T *keys = tail_keys(row), *values = tail_values(row), *x = q + at * d;
    const T* coefficients = static_cast<const T*>(s.coefficients);
    if (s.tail_log_decay[row] != 0) {
      const T faded = T(exp(s.tail_log_decay[row]));
      for (Index i = 0; i < s.columns * L; ++i) total[i] *= faded;
    }
    for (Index t = 0; t < length; t += L) {  // the width of a tail is a multiple of every vector's
      Vector<T> score = {};
      for (Index c = 0; c < d; ++c) score += x[c] * load(keys + c * s.width + t);
      Vector<T> weight = broadcast(coefficients[layout.degree]);
      for (Index p = layout.degree - 1; p >= 0; --p) weight = weight * score + coefficients[p];
      store(weights + t, weight);
    }
    add_dots<T>(values, s.width, s.columns, weights, length, total);
  }

  // Add the tail, divide, write; whether the normaliser is unsafe.
  bool finish(Index row, Index query_head, Index at, T* total) {
    add_tail(row, at, total);
    const T z = sum<T>(load(total + (s.columns - 1) * L));
    bool empty = z == 0, bad = false;
    if (s.safe >= 0) {
      const T seen = visible_weight(row);
      empty = seen == 0;
      bad = !(z > T(s.safe) * seen) && !empty;
    }
    write_out(query_head, total, z, empty, bad);
    return bad;
  }

  // The same with the exact tokens too.
  bool finish_near(Index row, Index query_head, Index at, T* total) {
    if (far) add_tail(row, at, total);
    T *last = total + (s.columns - 1) * L, top = exact.compare(row, q + at * d), factor = 1;
    const bool spoilt = top == -T(INFINITY) && exact.any();  // a query that is not finite makes NaN of its row
    if (fabs(top) < Exponential<T>::highest / 2) {
      top = 0;  // no weight will overflow, nor will all of them vanish
    } else {
      const T read = sum<T>(load(last)), log_read = read > 0 ? T(log(read)) : T(-INFINITY);
      top = log_read > top ? log_read : top > -INFINITY ? top : 0;
      factor = exponential<T>(broadcast(-top))[0];
      for (Index i = 0; i < s.columns * L; ++i) total[i] *= factor;
    }
    const T weight = exact.weigh(top);
    add_dots<T>(exact.ring_values(row), s.near.window, s.columns, exact.weights, s.near.window, total);
    add_dots<T>(exact.sink_values(row), s.near.sinks, s.columns, exact.weights + s.near.window, s.near.sinks, total);
    const T z = spoilt ? T(NAN) : sum<T>(load(last));
    bool empty = z == 0, bad = false;
    if (s.safe >= 0 && !spoilt) {
      const T seen = visible_weight(row);
      empty = seen == 0 && !exact.any();
      bad = !(z > T(s.safe) * seen * factor + T(s.near.safe) * weight) && !empty;
    }
    write_out(query_head, total, z, empty, bad);
    return bad;
  }

  INLINE void write_out(Index query_head, const T* total, T z, bool empty, bool bad) const {
    T* out = static_cast<T*>(s.out) + query_head * (s.columns - 1);
    for (Index e = 0; e + 1 < s.columns; ++e) {
      const T n = sum<T>(load(total + e * L));
      out[e] = bad ? T(NAN) : empty ? n : n / z;
    }
  }

  // What the visible keys of a row would give at score zero.
  T visible_weight(Index row) const {
    const T* ones = tail_values(row) + (s.columns - 1) * s.width;
    T seen = sums(row)[(s.columns - 1) * layout.features] * T(exp(s.tail_log_decay[row]));
    Vector<T> several = {};
    Index t = 0;
    for (; t + L <= s.position + 1; t += L) several += load(ones + t);
    for (; t <= s.position; ++t) seen += ones[t];
    return seen + sum<T>(several);
  }

  const Step& s;
  const Layout& layout;
  const bool far;  // whether there are moments with their tail
  const Index d, stride, together;
  Buffer<T> q, features, weights, totals;
  Exact<T> exact;
};

template <class T, bool near> Index decode_rows(const Step& s) {
  for (Index i = 0; s.gates.data && i < s.batch * s.heads; ++i)
    if (!(gate_of(s.gates, i / s.heads, i % s.heads) <= 0)) return -1;  // before anything is changed
  const Index rows = s.batch * s.heads, parts = s.threads > 1 && rows > s.threads ? 4 * s.threads : s.threads;
  Index unsafe = 0;
  run_tasks(parts, s.threads, [&](Index part) {
    Decoding<T, near> decoding(s);
    const Index begin = rows * part / parts, end = rows * (part + 1) / parts;
    for (Index row = begin; row < end; ++row) decoding.append(row);
    Index found = 0;
    for (Index i = begin * s.group, stop; i < end * s.group; i = stop) {
      const Index row_end = (i / s.group + 1) * s.group;  // where a group is larger than what is answered together
      const Index limit = decoding.together < s.group ? row_end : end * s.group;
      stop = i + decoding.together < limit ? i + decoding.together : limit;
      found += decoding.answer(i, stop);
    }
    __atomic_fetch_add(&unsafe, found, __ATOMIC_RELAXED);
  });
  for (Index b = 0; b < s.batch; ++b) s.tokens[b] += is_visible(s, b);
  return unsafe;
}

template <class T> Index decode_rows(const Step& s) {
  return s.near.window + s.near.sinks > 0 ? decode_rows<T, true>(s) : decode_rows<T, false>(s);
}

template <class T> void fold_rows(const Fold& f) {
  const Layout& layout = *f.layout;
  const Index d = layout.head_dim, features = layout.features;
  Index slices = 1;
  while (f.rows * slices % f.threads && f.rows * slices < 4 * f.threads && slices < f.columns) ++slices;
  run_tasks(f.rows * slices, f.threads, [&](Index task) {
    const Index row = task / slices, slice = task % slices;
    const Index begin = f.columns * slice / slices, columns = f.columns * (slice + 1) / slices - begin;
    const T* keys = static_cast<const T*>(f.tail_key) + row * d * f.width;
    const T* values = static_cast<const T*>(f.tail_value) + (row * f.columns + begin) * f.width;
    T* sums = static_cast<T*>(f.sums) + (row * f.columns + begin) * features;
    T* compensation = static_cast<T*>(f.compensation) + (row * f.columns + begin) * features;
    if (f.tail_log_decay[row] != 0) {
      const T factor = T(exp(f.tail_log_decay[row]));
      for (Index i = 0; i < columns * features; ++i) sums[i] *= factor, compensation[i] *= factor;
    }
    const Columns<T> x(d, f.length);
    for (Index c = 0; c < d; ++c) memcpy(x.row(c), keys + c * f.width, f.length * sizeof(T));
    clear_padding(x, d, f.length);
    Buffer<T> scaled(columns * (f.length + 16));
    const MonomialPanels<T> by_monomial(layout, round_up(f.length, kPanel<T>));
    form<T>(layout, x, f.length, by_monomial);
    update<kChain, T>(layout, by_monomial, x.row(0), x.stride, values, f.width, nullptr, columns, f.length, scaled,
                      nullptr, sums, compensation);
  });
}

}  // namespace TARGET
}  // namespace taylor
