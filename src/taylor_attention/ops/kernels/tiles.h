// Tokens of one head as the kernels want them, read from and written to the caller's tensors; decay of a chunk.
#pragma once
#include "moments.h"

namespace taylor {
namespace TARGET {

template <class T> INLINE const T* tokens_of(const Strided& x, Index batch, Index head, Index first) {
  return static_cast<const T*>(x.data) + batch * x.batch + head * x.head + first * x.token;
}

template <class T> INLINE void clear_padding(const Columns<T>& x, Index rows, Index tokens) {
  for (Index r = 0; r < rows; ++r) fill(x.row(r) + tokens, round_up(tokens, kPanel<T>) - tokens, T(0));
}

// Rows [tokens, entries] (row stride `from_row`) -> columns, padded with zeros.
template <class T>
void load_columns(const T* from, Index from_row, Index tokens, Index entries, const Columns<T>& to) {
  transpose<T>(from, from_row, tokens, entries, to.row(0), to.stride);
  clear_padding(to, entries, tokens);
}

// Rows [tokens, entries], with row strides; rows are short, and calls of memcpy take longer than they.
template <class T>
INLINE void copy_rows(const T* from, Index from_row, Index tokens, Index entries, T* to, Index to_row) {
  constexpr Index L = kLanes<T>;
  if (from_row == entries && to_row == entries) {
    memcpy(to, from, tokens * entries * sizeof(T));
    return;
  }
  for (Index t = 0; t < tokens; ++t, from += from_row, to += to_row) {
    Index e = 0;
    for (; e + L <= entries; e += L) store(to + e, load(from + e));
    for (; e < entries; ++e) to[e] = from[e];
  }
}

// The same, from contiguous rows, with zeros up to whole panels.
template <class T> void pad_rows(const T* from, Index tokens, Index entries, T* to) {
  const Index width = round_up(entries, kPanel<T>);
  copy_rows(from, entries, tokens, entries, to, width);
  if (width == entries) return;
  for (Index t = 0; t < tokens; ++t)
    for (Index e = entries; e < width; ++e) to[t * width + e] = 0;
}

// Keys and columns u = [value, 1] of a tile; `begin..end` are the columns of u wanted. Hidden keys are all zeros.
template <class T> struct KeyTile {
  KeyTile(const Problem& p, Index tile, Index begin, Index end)
      : p(p), begin(begin), end(end), rows(tile * p.layout->head_dim),
        padded(p.grad ? tile * round_up(p.layout->head_dim, kPanel<T>) : 0), x(p.layout->head_dim, tile),
        u(end - begin, tile) {}

  void load(Index row, Index first, Index tokens) {
    if (row == loaded_row && first == loaded) return;
    loaded_row = row, loaded = first, count = tokens;
    const Index d = p.layout->head_dim, batch = row / p.heads, head = row % p.heads;
    const T *key = tokens_of<T>(p.key, batch, head, first), *value = tokens_of<T>(p.value, batch, head, first);
    copy_rows<T>(key, p.key.token, tokens, d, rows, d);
    const Index values = (end < p.columns ? end : p.columns - 1) - begin;
    transpose<T>(value + begin, p.value.token, tokens, values, u.row(0), u.stride);
    if (end == p.columns) fill(u.row(values), tokens, T(1));
    if (p.visible)
      for (Index t = 0; t < tokens; ++t) {
        if (p.visible[row * p.keys + first + t]) continue;
        fill(rows + t * d, d, T(0));
        for (Index e = 0; e < end - begin; ++e) u.row(e)[t] = 0;
      }
    clear_padding(u, end - begin, tokens);
    load_columns<T>(rows, d, tokens, d, x);
    if (p.grad) pad_rows<T>(rows, tokens, d, padded);
  }

  const Problem& p;
  const Index begin, end;
  Index loaded_row = -1, loaded = -1, count = 0;
  Buffer<T> rows, padded;  // [tokens, d], and, for gradients, with zeros up to whole panels
  Columns<T> x, u;
};

// Queries of a tile and the gradients by their results, as rows and as columns.
template <class T> struct QueryTile {
  QueryTile(const Problem& p, Index tile)
      : p(p), q_rows(tile * p.layout->head_dim), q(p.layout->head_dim, tile), g(p.columns, tile) {}

  void load(Index row, Index member, Index first, Index tokens) {
    if (member == loaded_member && first == loaded) return;
    loaded_member = member, loaded = first, count = tokens;
    const Index d = p.layout->head_dim, batch = row / p.heads, head = row % p.heads * p.group + member;
    copy_rows<T>(tokens_of<T>(p.query, batch, head, first), p.query.token, tokens, d, q_rows, d);
    load_columns<T>(q_rows, d, tokens, d, q);
    g_rows = static_cast<const T*>(p.grad) + ((row * p.group + member) * p.queries + first) * p.columns;
    load_columns<T>(g_rows, p.columns, tokens, p.columns, g);
  }

  const Problem& p;
  Index loaded_member = -1, loaded = -1, count = 0;  // of one row
  Buffer<T> q_rows;  // [tokens, d]
  const T* g_rows;   // [tokens, E]
  Columns<T> q, g;
};

// The decay within a chunk. Groups of one panel of tokens each have marks, so that the factor of a pair of tokens in
// different groups is a product of three numbers <= 1: from the query's group's first token to the query, from the
// key to its group's last token, and between these two.
template <class T> struct Decay {
  explicit Decay(Index chunk) : Decay(chunk, chunk ? chunk + kPanel<T> : 0) {}

  void load(const T* log_decay, const std::uint8_t* visible, Index tokens) {
    constexpr Index N = kPanel<T>;
    double running = 0;
    for (Index t = 0; t < tokens; ++t) total[t] = running += visible && !visible[t] ? 0.0 : double(log_decay[t]);
    for (Index t = 0; t < tokens; ++t) {
      const Index first = t / N * N, last = first + N < tokens ? first + N - 1 : tokens - 1;
      from_start[t] = T(exp(total[t]));
      to_end[t] = T(exp(running - total[t]));
      from_first[t] = T(exp(total[t] - total[first]));
      to_last[t] = T(exp(total[last] - total[t]));
    }
    whole = exp(running);
  }
  T between(Index first, Index last) const { return T(exp(total[first] - total[last])); }
  T pair(Index query, Index key) const { return T(exp(total[query] - total[key])); }

  Buffer<double> total;  // running sum from the start of the chunk
  Buffer<T> from_start, to_end, from_first, to_last;
  double whole = 1;  // not rounded: it multiplies sums again and again

 private:
  Decay(Index, Index padded)
      : total(padded), from_start(padded), to_end(padded), from_first(padded), to_last(padded) {
    for (Index t = 0; t < padded; ++t) total[t] = 0, from_first[t] = to_last[t] = 1;
  }
};

template <class T> INLINE void scale_columns(const Columns<T>& x, Index rows, Index tokens, const T* factor) {
  for (Index r = 0; r < rows; ++r)
    for (Index t = 0; t < tokens; ++t) x.row(r)[t] *= factor[t];
}

// f(s) for `count` scores (whole panels), by Horner's rule with coefficients [degree + 1], in several independent chains.
template <class T> void evaluate(const T* coefficients, Index degree, T* scores, Index count) {
  constexpr Index L = kLanes<T>, kChains = 6;
  for (Index i = 0; i < count; i += kChains * L) {
    const Index chains = (count - i) / L < kChains ? (count - i) / L : kChains;
    Vector<T> value[kChains];
    if (chains == kChains) {
#pragma GCC unroll 8
      for (Index c = 0; c < kChains; ++c) value[c] = broadcast(coefficients[degree]);
      for (Index p = degree - 1; p >= 0; --p) {
        const Vector<T> coefficient = broadcast(coefficients[p]);
#pragma GCC unroll 8
        for (Index c = 0; c < kChains; ++c) value[c] = value[c] * load(scores + i + c * L) + coefficient;
      }
#pragma GCC unroll 8
      for (Index c = 0; c < kChains; ++c) store(scores + i + c * L, value[c]);
      continue;
    }
    for (Index c = 0; c < chains; ++c) {
      Vector<T> one = broadcast(coefficients[degree]);
      for (Index p = degree - 1; p >= 0; --p) one = one * load(scores + i + c * L) + coefficients[p];
      store(scores + i + c * L, one);
    }
  }
}

// The same for degrees above 0, and slopes[i] *= f'(s[i]), with its coefficients [degree].
template <class T>
void evaluate_both(const T* coefficients, const T* slope, Index degree, T* scores, Index count, T* slopes) {
  constexpr Index L = kLanes<T>, kChains = kPanel<T> / L;
  for (Index i = 0; i < count; i += kChains * L) {
    Vector<T> score[kChains], value[kChains], steep[kChains];
#pragma GCC unroll 8
    for (Index c = 0; c < kChains; ++c) {
      score[c] = load(scores + i + c * L);
      value[c] = score[c] * coefficients[degree] + coefficients[degree - 1];
      steep[c] = broadcast(slope[degree - 1]);
    }
    for (Index p = degree - 2; p >= 0; --p) {
#pragma GCC unroll 8
      for (Index c = 0; c < kChains; ++c) {
        value[c] = value[c] * score[c] + coefficients[p];
        steep[c] = steep[c] * score[c] + slope[p];
      }
    }
#pragma GCC unroll 8
    for (Index c = 0; c < kChains; ++c) {
      store(scores + i + c * L, value[c]);
      store(slopes + i + c * L, load(slopes + i + c * L) * steep[c]);
    }
  }
}

}  // namespace TARGET
}  // namespace taylor
