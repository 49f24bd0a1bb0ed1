// One token: append it to the tails of the states, read the moments once, attend to the tail.
#pragma once
#include "dots.h"
#include "exact.h"
#include "fit.h"
#include "range.h"
#include "sweep.h"

namespace taylor {
namespace TARGET {

// Query heads that are answered together: their monomials are formed side by side, since each degree reads what the
// one below has just written, and they read the moments of a shared key/value head block by block.
constexpr Index kTogether = 8;
constexpr Index kBlock = 512;  // columns of the moments that stay in the caches while several heads read them

inline bool is_visible(const Step& s, Index batch) { return !s.visible || s.visible[batch * s.visible_stride]; }

inline double gate_of(const Gates& gates, Index batch, Index head) {
  const Index at = batch * gates.batch + head * gates.head;
  const double gate = gates.is_double ? static_cast<const double*>(gates.data)[at] : static_cast<const float*>(gates.data)[at];
  return gate < gates.reset ? gates.reset : gate;
}

// How a query reads its far tokens: by which series, and the logarithm of what that lacks. `lost`: not at all, since
// rounding is all that is left of its normaliser.
template <class T> struct Reading {
  const T* coefficients;
  T log_factor;
  bool lost;
};
// What a gate does to a tail that has faded by `before` (logs). As a quotient, so that the product over a tail is right:
// factors near 1, each rounded for itself, would all be wrong to the same side.
template <class T> T fading(double before, double gate) {
  const T faded = T(exp(before));
  return faded > T(1e-30) ? T(exp(before + gate)) / faded : T(exp(gate));
}

// The steps of some rows (batch x key/value heads), by one thread; near: some tokens are exact.
template <class T, bool near> struct Decoding {
  static constexpr Index L = kLanes<T>;

  explicit Decoding(const Step& s)
      : s(s), layout(*s.layout), far(!near || s.width > 0), fitted(s.fitting.largest_variance >= 0), d(layout.head_dim),
        degree(layout.degree), stride(round_up(layout.features, 16) + L),
        together(whole_groups((Index(1) << 17) / (stride * Index(sizeof(T))), s.group)), q(together * d),
        features(together * stride), weights(s.width), totals(s.group * s.columns * L), exact(s),
        fit(s.fitting, fitted ? degree : -1), scores(fitted ? s.width : 0),
        own(fitted ? s.group * (degree + 1) : 0), readings(s.group) {
    for (Index i = 0; i < s.group; ++i) readings[i] = {static_cast<const T*>(s.coefficients), 0, false};
  }

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
    const Token<T> token = {tokens_of<T>(s.key, batch, head, 0), tokens_of<T>(s.value, batch, head, 0)};
    if (s.gates.data && visible) {
      const double gate = gate_of(s.gates, batch, head);
      const T factor = fading<T>(s.tail_log_decay[row], gate);
      s.log_decay[row] += gate;
      s.tail_log_decay[row] += gate;
      for (Index e = 0; e < s.columns; ++e)
        for (Index t = 0; t < s.position; ++t) values[e * s.width + t] *= factor;
    }
    const Slot<T> end = {keys, values + s.position, s.width};
    if constexpr (near) append_near(row, token, visible, end);
    else write(token, visible, d, s.columns, end);
  }

  // The n-th visible token (from 0) is a sink, or in slot (n - sinks) % window, from where another leaves for the tail.
  void append_near(Index row, const Token<T>& token, bool visible, const Slot<T>& end) const {
    const NearSlots& slots = s.near;
    const Index n = s.tokens[row / s.heads], at = n - slots.sinks.width, window = slots.ring.width;
    const bool comes = visible && at >= 0;
    const double now = s.log_decay[row];
    if (visible && at < 0) exact.put(token, slots.sinks, row, n, now);
    if (!comes || window == 0) {
      if (far) write(token, comes, d, s.columns, end);
      return;
    }
    const Index place = at % window;
    if (slots.heavy.width) exact.compete(row, place);
    const double then = slots.ring.log_decay[row * window + place];
    if (far) copy(exact.in(slots.ring, row, place), T(exp(now - then)), d, s.columns, end);
    exact.put(token, slots.ring, row, place, now);
  }

  // Answer query heads first..last, counted over all rows; returns how many normalisers are unsafe.
  Index answer(Index first, Index last) {
    const Index heads = s.heads * s.group;
    for (Index i = first; i < last; ++i) {
      const T* query = tokens_of<T>(s.query, i / heads, i % heads, 0);
      for (Index c = 0; c < d; ++c) q[(i - first) * d + c] = query[c] * T(s.scale);
    }
    expand<T>(layout, q, last - first, static_cast<const T*>(s.weights), features, stride);
    Index unsafe = 0;
    for (Index i = first; i < last;) {
      const Index row = i / s.group, stop = (row + 1) * s.group < last ? (row + 1) * s.group : last;
      if ((near || fitted) && !is_visible(s, row / s.heads)) {  // the rows of hidden tokens are zeros
        fill(static_cast<T*>(s.out) + i * (s.columns - 1), (stop - i) * (s.columns - 1), T(0));
        i = stop;
        continue;
      }
      if (row + 1 < s.batch * s.heads) prefetch(row + 1);
      for (Index member = 0; fitted && member < stop - i; ++member) fit_to(row, i - first + member, member);
      read(row, i - first, stop - i);
      if constexpr (near) exact.load_row(row, s.log_decay[row]);
      for (Index member = 0; i < stop; ++i, ++member) {
        T* total = totals + member * s.columns * L;
        unsafe += near ? finish_near(row, i, i - first, readings[member], total)
                       : finish(row, i, i - first, readings[member], total);
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

  // The scores of a vector of the tail's tokens; its width is a multiple of every vector's.
  INLINE Vector<T> score_tail(const T* x, const T* keys) const {
    Vector<T> score = {};
    for (Index c = 0; c < d; ++c) score += x[c] * load(keys + c * s.width);
    return score;
  }

  INLINE void add_tail(Index row, Index at, const T* coefficients, T* total) {
    const Index length = s.position + 1;
    const T* keys = tail_keys(row);
    if (s.tail_log_decay[row] != 0) {
      const T faded = T(exp(s.tail_log_decay[row]));
      for (Index i = 0; i < s.columns * L; ++i) total[i] *= faded;
    }
    for (Index t = 0; t < length; t += L) {
      const Vector<T> score = score_tail(q + at * d, keys + t);
      Vector<T> weight = broadcast(coefficients[degree]);
      for (Index p = degree - 1; p >= 0; --p) weight = weight * score + coefficients[p];
      store(weights + t, weight);
    }
    add_dots<T>(tail_values(row), s.width, s.columns, weights, length, total);
  }

  // Fit exp to a query's own scores, by the sums of their powers: the coefficients go into its monomials.
  void fit_to(Index row, Index at, Index member) {
    T *x = features + at * stride, *coefficients = own + member * (degree + 1);
    add_up_powers(row, at, x);
    const bool lost = fit.solve(kEpsilon<T>);
    for (Index p = 0; p <= degree; ++p) {
      coefficients[p] = T(fit.coefficients[p]);
      for (Index r = layout.starts[p]; r < layout.starts[p + 1]; ++r) x[r] *= coefficients[p];
    }
    readings[member] = {coefficients, T(fit.log_factor), lost};
  }

  // The sums of the powers of a query's far scores: what the columns of ones say of them, degree by degree.
  void add_up_powers(Index row, Index at, const T* x) {
    const Index length = s.position + 1, *starts = layout.starts;
    const T *ones = sums(row) + (s.columns - 1) * layout.features, *keys = tail_keys(row);
    const T *tail_ones = tail_values(row) + (s.columns - 1) * s.width, faded = T(exp(s.tail_log_decay[row]));
    for (Index t = 0; t < length; t += L) {
      store(scores + t, score_tail(q + at * d, keys + t));
      store(weights + t, broadcast(T(1)));
    }
    for (Index p = 0; p <= degree; ++p) {
      const T moments = dot(ones + starts[p], x + starts[p], starts[p + 1] - starts[p]);
      fit.powers[p] = moments * faded + dot<T>(tail_ones, weights, length);
      for (Index t = 0; t < length; t += L) store(weights + t, load(weights + t) * load(scores + t));
    }
  }

  // Add the tail, divide, write; whether the normaliser is unsafe.
  bool finish(Index row, Index query_head, Index at, const Reading<T>& reading, T* total) {
    add_tail(row, at, reading.coefficients, total);
    const T z = sum<T>(load(total + (s.columns - 1) * L));
    bool empty = z == 0, bad = reading.lost;
    if (s.safe >= 0) {
      const T seen = visible_weight(row);
      empty = seen == 0;
      bad |= !(z > T(s.safe) * seen && z < T(INFINITY)) && !empty;
    }
    write_out(query_head, total, z, empty, bad);
    return bad;
  }

  // The same with the exact tokens too.
  bool finish_near(Index row, Index query_head, Index at, const Reading<T>& reading, T* total) {
    constexpr T harmless = Exponential<T>::highest / 2;
    if (far) add_tail(row, at, reading.coefficients, total);
    const T gain = far_gain(query_head);
    for (Index i = 0; gain != 1 && i < s.columns * L; ++i) total[i] *= gain;
    T *last = total + (s.columns - 1) * L, top = exact.compare(row, q + at * d), factor = 1;
    const bool spoilt = top == -T(INFINITY) && exact.any();  // a query that is not finite makes NaN of its row
    if (fabs(top) < harmless && fabs(reading.log_factor) < harmless) {
      top = 0;  // no weight will overflow, nor will all of them vanish
    } else {
      const T read = sum<T>(load(last)), log_read = read > 0 ? reading.log_factor + T(log(read)) : T(-INFINITY);
      top = log_read > top ? log_read : top > -INFINITY ? top : 0;
    }
    if (reading.log_factor != top) {
      factor = exponential<T>(broadcast(reading.log_factor - top))[0];
      for (Index i = 0; i < s.columns * L; ++i) total[i] *= factor;
    }
    const T weight = exact.weigh(top);
    exact.add_to(total, row);
    const T z = spoilt ? T(NAN) : sum<T>(load(last));
    bool empty = z == 0, bad = reading.lost;
    if (s.safe >= 0) {
      const T seen = visible_weight(row);
      empty = seen == 0 && !exact.any();
      bad |= !(z > T(s.safe) * seen * gain * factor + T(s.near.safe) * weight && z < T(INFINITY)) && !empty;
    }
    write_out(query_head, total, z, empty, bad);
    if (s.near.heavy.width) exact.note(row, top);
    return bad;
  }

  // By what far weights are multiplied.
  T far_gain(Index query_head) const {
    return s.far_gain ? T(exp(static_cast<const T*>(s.far_gain)[query_head % (s.heads * s.group)])) : T(1);
  }

  INLINE void write_out(Index query_head, const T* total, T z, bool empty, bool bad) const {
    T* out = static_cast<T*>(s.out) + query_head * (s.columns - 1);
    const T by = empty ? T(1) : z > 0 && z < T(INFINITY) && !bad ? z : T(NAN);
    Index e = 0;
    for (; e + L < s.columns; e += L) store(out + e, sum_each<T>(total + e * L) / by);
    for (; e + 1 < s.columns; ++e) out[e] = sum<T>(load(total + e * L)) / by;
  }

  // What the visible keys of a row would give at score zero.
  T visible_weight(Index row) const {
    const T moments = sums(row)[(s.columns - 1) * layout.features] * T(exp(s.tail_log_decay[row]));
    return moments + add_up<T>(tail_values(row) + (s.columns - 1) * s.width, s.position + 1);
  }

  const Step& s;
  const Layout& layout;
  const bool far;     // whether there are moments with their tail
  const bool fitted;  // whether each query reads them by a fit to its own scores
  const Index d, degree, stride, together;
  Buffer<T> q, features, weights, totals;
  Exact<T> exact;
  Fit fit;
  Buffer<T> scores, own;  // own: coefficients of the fits [group, degree + 1]
  Buffer<Reading<T>> readings;
};

// Whether a gate or a token is not to be appended.
template <class T> bool refuses(const Step& s) {
  const Index d = s.layout->head_dim, value_dim = s.columns - 1, degree = s.layout->degree, rows = s.batch * s.heads;
  const bool together = s.key.head == d && s.value.head == value_dim &&
                        (s.batch == 1 || (s.key.batch == s.heads * d && s.value.batch == s.heads * value_dim));
  const bool all = together && in_range(tokens_of<T>(s.key, 0, 0, 0), rows * d, tokens_of<T>(s.value, 0, 0, 0),
                                        rows * value_dim, degree, s.limit);  // the largest of all: one look is enough
  for (Index b = 0; b < s.batch; ++b)
    for (Index h = 0; h < s.heads && (s.gates.data || !all); ++h) {
      if (s.gates.data && !(gate_of(s.gates, b, h) <= 0)) return true;
      const T *key = tokens_of<T>(s.key, b, h, 0), *value = tokens_of<T>(s.value, b, h, 0);
      if (!all && is_visible(s, b) && !in_range(key, d, value, value_dim, degree, s.limit)) return true;
    }
  return false;
}

template <class T, bool near> Index decode_rows(const Step& s) {
  if (refuses<T>(s)) return -1;                       // before anything is changed
  if (s.width > 0 && s.position == s.width) return 0;  // nor has a full tail been folded yet
  const Index rows = s.batch * s.heads, parts = s.threads > 1 && rows > s.threads ? 2 * s.threads : s.threads;
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
  return s.near.ring.width + s.near.sinks.width > 0 ? decode_rows<T, true>(s) : decode_rows<T, false>(s);
}

}  // namespace TARGET
}  // namespace taylor
