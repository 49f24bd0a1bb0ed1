// One token: append it to the tails of the states, read the moments once, attend to the tail. And folding the tail.
#pragma once
#include "sweep.h"

namespace taylor {
namespace TARGET {

// All monomials of x [d] times weights, [M]; the result must have room for one vector more.
template <class T> void expand(const Layout& layout, const T* x, const T* weights, T* to) {
  constexpr Index L = kLanes<T>;
  to[0] = 1;
  for (Index c = 0; layout.degree > 0 && c < layout.head_dim; ++c) to[1 + c] = x[c];
  for (Index i = 0; i < layout.every_count; ++i) {
    const Block& block = layout.every[i];
    const Vector<T> x_i = broadcast(x[block.index]);
    for (Index r = 0; r < block.count; r += L) store(to + block.start + r, x_i * load(to + block.suffix + r));
  }
  for (Index r = 0; r < layout.features; ++r) to[r] *= weights[r];
}

// out[e] = sum_r rows[e, r] x[r] for R rows at once.
template <int R, class T> INLINE void dot(const T* rows, Index stride, const T* x, Index count, T* out) {
  constexpr Index L = kLanes<T>;
  Vector<T> total[R][2];
#pragma GCC unroll 16
  for (int e = 0; e < R; ++e) total[e][0] = total[e][1] = Vector<T>{};
  Index r = 0;
  for (; r + 2 * L <= count; r += 2 * L) {
    const Vector<T> left = load(x + r), right = load(x + r + L);
#pragma GCC unroll 16
    for (int e = 0; e < R; ++e) {
      total[e][0] += left * load(rows + e * stride + r);
      total[e][1] += right * load(rows + e * stride + r + L);
    }
  }
#pragma GCC unroll 16
  for (int e = 0; e < R; ++e) {
    T rest = 0;
    for (Index i = r; i < count; ++i) rest += rows[e * stride + i] * x[i];
    out[e] = rest + sum<T>(total[e][0] + total[e][1]);
  }
}

template <class T> void dots(const T* rows, Index stride, Index columns, const T* x, Index count, T* out) {
  Index e = 0;
  for (; e + 4 <= columns; e += 4) dot<4, T>(rows + e * stride, stride, x, count, out + e);
  switch (columns - e) {
    case 3: dot<3, T>(rows + e * stride, stride, x, count, out + e); break;
    case 2: dot<2, T>(rows + e * stride, stride, x, count, out + e); break;
    case 1: dot<1, T>(rows + e * stride, stride, x, count, out + e); break;
  }
}

template <class T> struct Decoding {
  const Step& s;
  const Layout& layout;

  // Put the token into the tail of a row.
  void append(Index row) const {
    const Index batch = row / s.heads, head = row % s.heads, d = layout.head_dim;
    const bool visible = !s.visible || s.visible[batch];
    const T *key = tokens_of<T>(s.key, batch, head, 0), *value = tokens_of<T>(s.value, batch, head, 0);
    T* keys = static_cast<T*>(s.tail_key) + row * d * s.width + s.position;
    T* values = static_cast<T*>(s.tail_value) + row * s.columns * s.width;
    T broken = 0;  // NaN if anything is not finite: then the whole row of values is
    for (Index c = 0; c < d; ++c) broken += key[c] * 0;
    for (Index e = 0; e + 1 < s.columns; ++e) broken += value[e] * 0;
    if (s.gate && visible) {
      s.log_decay[row] += s.gate[row];
      s.tail_log_decay[row] += s.gate[row];
      const T factor = T(exp(s.gate[row]));
      for (Index e = 0; e < s.columns; ++e)
        for (Index t = 0; t < s.position; ++t) values[e * s.width + t] *= factor;
    }
    for (Index c = 0; c < d; ++c) keys[c * s.width] = visible ? key[c] : 0;
    for (Index e = 0; e < s.columns; ++e)
      values[e * s.width + s.position] = visible ? (e + 1 < s.columns ? value[e] : 1) + broken : 0;
  }

  // The answer of one query head, [N, Z]; returns what its visible keys would give at score zero.
  void attend(Index row, const T* q, T* features, T* near, T* out) const {
    const Index d = layout.head_dim, columns = s.columns, length = s.position + 1;
    const T* sums = static_cast<const T*>(s.sums) + row * columns * layout.features;
    const T* keys = static_cast<const T*>(s.tail_key) + row * d * s.width;
    const T* values = static_cast<const T*>(s.tail_value) + row * columns * s.width;
    expand<T>(layout, q, static_cast<const T*>(s.weights), features);
    dots<T>(sums, layout.features, columns, features, layout.features, out);
    const T faded = s.tail_log_decay[row] == 0 ? T(1) : T(exp(s.tail_log_decay[row]));
    for (Index t = 0; t < length; ++t) near[t] = 0;
    for (Index c = 0; c < d; ++c)
      for (Index t = 0; t < length; ++t) near[t] += q[c] * keys[c * s.width + t];
    const T* coefficients = static_cast<const T*>(s.coefficients);
    for (Index t = 0; t < length; ++t) {
      T value = coefficients[layout.degree];
      for (Index i = layout.degree - 1; i >= 0; --i) value = value * near[t] + coefficients[i];
      near[t] = value;
    }
    for (Index e = 0; e < columns; ++e) {
      T total;
      dot<1, T>(values + e * s.width, s.width, near, length, &total);
      out[e] = out[e] * faded + total;
    }
  }

  T visible_weight(Index row) const {
    const T* values = static_cast<const T*>(s.tail_value) + (row + 1) * s.columns * s.width - s.width;
    T seen = static_cast<const T*>(s.sums)[((row + 1) * s.columns - 1) * layout.features];
    seen *= T(exp(s.tail_log_decay[row]));
    for (Index t = 0; t <= s.position; ++t) seen += values[t];
    return seen;
  }

  // The whole step for one row; returns how many of its normalisers are unsafe.
  Index run(Index row) const {
    const Index batch = row / s.heads, head = row % s.heads, d = layout.head_dim, values = s.columns - 1;
    Buffer<T> q(d), features(layout.features + kLanes<T>), near(s.width), found(s.columns);
    append(row);
    Index unsafe = 0;
    for (Index member = 0; member < s.group; ++member) {
      const T* query = tokens_of<T>(s.query, batch, head * s.group + member, 0);
      for (Index c = 0; c < d; ++c) q[c] = query[c] * T(s.scale);
      attend(row, q, features, near, found);
      const T z = found[values];
      bool empty = z == 0, bad = false;
      if (s.safe >= 0) {
        const T seen = visible_weight(row);
        empty = seen == 0;
        bad = !(z > T(s.safe) * seen) && !empty;
        unsafe += bad;
      }
      T* out = static_cast<T*>(s.out) + (row * s.group + member) * values;
      for (Index e = 0; e < values; ++e) out[e] = bad ? T(NAN) : empty ? found[e] : found[e] / z;
    }
    return unsafe;
  }
};

template <class T> Index decode_rows(const Step& s) {
  const Decoding<T> decoding = {s, *s.layout};
  Index unsafe = 0;
  run_tasks(s.batch * s.heads, s.threads, [&](Index row) {
    __atomic_fetch_add(&unsafe, decoding.run(row), __ATOMIC_RELAXED);
  });
  for (Index b = 0; b < s.batch; ++b) s.tokens[b] += s.visible ? s.visible[b] : 1;
  return unsafe;
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
    Buffer<T> rows(f.length * d), scaled(columns * (f.length + 16));
    transpose<T>(keys, f.width, d, f.length, rows, d);
    const MonomialPanels<T> by_monomial(layout, f.length);
    form<T>(layout, rows, f.length, by_monomial);
    update<T>(layout, by_monomial, keys, f.width, values, f.width, nullptr, columns, f.length, scaled, nullptr, sums,
              compensation);
  });
}

}  // namespace TARGET
}  // namespace taylor
