// Exact attention to a window of the latest keys and to sinks, whole sequences (the Python twin: ops/near_torch.py).
//
// Queries and keys are counted on the axis of the keys: query t stands at position past + t and sees the positions
// (past + t - window, past + t]. Scores are computed for a panel of lanes against a block of rows, with a running maximum
// where a panel sees several blocks. Whatever is cut, is cut the same way for any number of threads.
#pragma once
#include "exponential.h"
#include "sweep.h"

namespace taylor {
namespace TARGET {

constexpr Index kNearRows = 320;   // most rows of one block of scores [kNearRows, panel]: stays in the first-level cache
constexpr Index kNearLanes = 256;  // lanes whose results are gathered together, all query heads of a group counted

template <class T> constexpr T kLargest = __FLT_MAX__;
template <> constexpr double kLargest<double> = __DBL_MAX__;

INLINE Index later_of(Index a, Index b) { return a > b ? a : b; }
INLINE Index earlier_of(Index a, Index b) { return a < b ? a : b; }

// Tokens as rows [tokens, entries], as columns, or both.
template <class T> struct Tokens {
  Tokens(Index entries, Index most) : entries(entries), rows(most * entries), columns(entries, most) {}

  // From rows of `given` entries; a 1 follows if that is one less. Hidden tokens are zeros.
  void load(const T* from, Index from_row, Index given, Index tokens, const std::uint8_t* visible, bool as_rows,
            bool as_columns) {
    if (as_rows) {
      copy_rows<T>(from, from_row, tokens, given, rows, entries);
      for (Index t = 0; given < entries && t < tokens; ++t) rows[t * entries + given] = 1;
      for (Index t = 0; visible && t < tokens; ++t)
        if (!visible[t]) fill(rows + t * entries, entries, T(0));
    }
    if (!as_columns) return;
    transpose<T>(from, from_row, tokens, given, columns.row(0), columns.stride);
    if (given < entries) fill(columns.row(given), tokens, T(1));
    for (Index t = 0; visible && t < tokens; ++t)
      for (Index e = 0; !visible[t] && e < entries; ++e) columns.row(e)[t] = 0;
    clear_padding(columns, entries, tokens);
  }

  const Index entries;
  Buffer<T> rows;
  Columns<T> columns;
};

// The running sum of the log decay over some positions, from the first of them; what follows the last is like it.
struct Fading {
  explicit Fading(Index most) : total(most) {}
  void load(const double* log_decay, Index from, Index to, Index panel) {
    first = from;
    double running = 0;
    for (Index i = from; i < to; ++i) total[i - from] = running += log_decay[i];
    fill(total + (to - from), panel, running);
  }
  double at(Index position) const { return total[position - first]; }

  Buffer<double> total;
  Index first = 0;
};

// What the sweeps by queries and by keys share: one row (batch x key/value head), scores of a panel against a block.
template <class T> struct NearSweep {
  static constexpr Index N = kPanel<T>, L = kLanes<T>;

  NearSweep(const NearProblem& p, Index row, Index tile)
      : p(p), d(p.head_dim), columns(p.columns), row(row), batch(row / p.heads), head(row % p.heads),
        past(p.keys - p.queries), tile(tile), scores(kNearRows * N), ones(3 * N),
        fading(p.log_decay ? (p.window + tile < p.keys ? p.window + tile : p.keys) + N : 0) {
    for (Index i = 0; i < 3 * N; ++i) ones[i] = i >= N && i < 2 * N;
  }

  // Body(first, count) for nearly equal blocks of at most kNearRows.
  template <class Body> static INLINE void blocks(Index from, Index to, const Body& body) {
    if (from >= to) return;
    const Index count = (to - from + kNearRows - 1) / kNearRows, length = (to - from + count - 1) / count;
    for (Index first = from; first < to; first += length) body(first, to - first < length ? to - first : length);
  }

  void load_decay(Index from, Index to) {
    if (p.log_decay) fading.load(p.log_decay + row * p.keys, from, to, N);
  }

  void load_keys(Tokens<T>& k, Tokens<T>& u, Index first, Index count, bool forward) const {
    const std::uint8_t* visible = p.visible ? p.visible + row * p.keys + first : nullptr;
    k.load(tokens_of<T>(p.key, batch, head, first), p.key.token, d, count, visible, true, !forward);
    u.load(tokens_of<T>(p.value, batch, head, first), p.value.token, columns - 1, count, visible, !forward, true);
  }
  void load_sinks(Tokens<T>& k, Tokens<T>& u, Index first, Index count, bool forward) const {
    k.load(tokens_of<T>(p.sink_key, batch, head, first), p.sink_key.token, d, count, nullptr, true, !forward);
    u.load(tokens_of<T>(p.sink_value, batch, head, first), p.sink_value.token, columns - 1, count, nullptr, !forward, true);
  }

  // Where a token of a query head lies in a tensor of the queries' shape, [batch, heads x group, queries].
  Index place(Index member, Index query) const { return ((batch * p.heads + head) * p.group + member) * p.queries + query; }
  const T* query_of(Index member, Index first) const {
    return tokens_of<T>(p.query, batch, head * p.group + member, first);
  }
  const T* grad_of(Index member, Index first) const {
    return static_cast<const T*>(p.grad) + place(member, first) * columns;
  }

  // Add the decay to scores [count, panel] and put -inf where a query does not see a key. Rows and lanes are positions
  // from `first` and `lane` on; lanes_query: the lanes are queries and the rows keys (else the other way round).
  template <bool lanes_query> void restrict_band(Index first, Index count, Index lane) {
    if (p.log_decay) fade<lanes_query>(first, count, lane);
    if (lanes_query && p.visible)
      for (Index r = 0; r < count; ++r)
        if (!p.visible[row * p.keys + first + r]) fill(scores + r * N, N, -T(INFINITY));
    // Row r is seen by (or sees) the lanes from begin + r on, as many as the window is wide.
    const Index begin = first - lane - (lanes_query ? 0 : p.window - 1);
    const Index ending = N - p.window - begin, late = 1 - begin;  // rows that end, rows from which on they begin inside
    for (Index r = 0; r < count && r < ending; ++r) cut(begin + r, scores + r * N);
    for (Index r = later_of(later_of(ending, late), 0); r < count; ++r) cut(begin + r, scores + r * N);
  }
  // The lanes from `begin` on stay, as many as the window is wide.
  INLINE void cut(Index begin, T* to) const {
    const T *after = ones + N - clamp(begin), *before = ones + 2 * N - clamp(begin + p.window);
#pragma GCC unroll 2
    for (Index i = 0; i < N; i += L)
      store(to + i, load(after + i) * load(before + i) > Vector<T>{} ? load(to + i) : broadcast(-T(INFINITY)));
  }
  static INLINE Index clamp(Index lane) { return later_of(earlier_of(lane, N), 0); }

  // Rows on the far side of a mark, the lane next to them, get two numbers <= 0 added: from row to mark, from mark to
  // lane. The others, whose mark would lie outside, get one difference for each lane that sees them.
  template <bool lanes_query> void fade(Index first, Index count, Index lane) {
    const Index mark = lane + (lanes_query ? 0 : N - 1);
    const Index split = (lanes_query ? mark + 1 : mark) - first;  // rows before it | from it on
    const double at_mark = fading.at(mark), *along = fading.total + (lane - fading.first);
    T from_mark[N];
    for (Index i = 0; i < N; ++i) from_mark[i] = T(lanes_query ? along[i] - at_mark : at_mark - along[i]);
    const Vector<T> left = load(from_mark), right = load(from_mark + L);
    for (Index r = 0; r < count; ++r) {
      T* to = scores + r * N;
      const double own = fading.at(first + r);
      if (lanes_query ? r < split : r >= split) {
        const Vector<T> to_mark = broadcast(T(lanes_query ? at_mark - own : own - at_mark));
        store(to, load(to) + forget(to_mark + left));
        store(to + L, load(to + L) + forget(to_mark + right));
      } else {
        for (Index i = 0; i < N; ++i) to[i] += forget(T(lanes_query ? along[i] - own : own - along[i]));
      }
    }
  }

  // A log decay whose factor is nothing in either type is no weight at all, even where there is no other.
  static INLINE Vector<T> forget(Vector<T> x) {
    return x < broadcast(T(kForgotten)) ? broadcast(-T(INFINITY)) : x;
  }
  static INLINE T forget(T x) { return x < T(kForgotten) ? -T(INFINITY) : x; }

  // The same for sinks from `sink` on and queries from `query` on.
  template <bool lanes_query> void restrict_sinks(Index sink, Index query, Index count) {
    const std::int64_t* from = p.sink_from + row * p.sinks;
    const std::int64_t* until = p.sink_until ? p.sink_until + row * p.sinks : nullptr;
    const Index tokens = lanes_query ? p.queries - query : p.sinks - sink;
    for (Index r = 0; r < count; ++r)
      for (Index i = 0; i < N && i < tokens; ++i) {
        const Index x = sink + (lanes_query ? r : i), t = query + (lanes_query ? i : r);
        const T faded = p.total ? forget(T(p.sink_log_decay[row * p.sinks + x] + p.total[row * p.keys + past + t])) : T(0);
        const bool seen = from[x] <= t && !(until && until[x] <= t);
        scores[r * N + i] = seen ? scores[r * N + i] + faded : -T(INFINITY);
      }
  }

  // Scores become exp(score - top), with a top for each lane.
  INLINE void weigh(Index count, Vector<T> left, Vector<T> right) {
    T* to = scores;
    for (Index r = 0; r + 1 < count; r += 2, to += 2 * N) {
      Vector<T> x[4] = {load(to) - left, load(to + L) - right, load(to + N) - left, load(to + N + L) - right};
      exponentials<T>(x);
      store(to, x[0]), store(to + L, x[1]), store(to + N, x[2]), store(to + N + L, x[3]);
    }
    if (count % 2 == 0) return;
    store(to, exponential<T>(load(to) - left));
    store(to + L, exponential<T>(load(to + L) - right));
  }

  // Weights times the gradient by them, which is a product.
  INLINE void differentiate(Index count, const T* a, const T* b, Index b_row) {
    T* weights = scores;
    product<T>(count, a, columns, b, b_row, columns, [&](Index r, Vector<T> left, Vector<T> right) INLINE_LAMBDA {
      T* to = weights + r * N;
      store(to, load(to) * left);
      store(to + L, load(to + L) * right);
    });
  }

  const NearProblem& p;
  const Index d, columns, row, batch, head, past, tile;
  Buffer<T> scores, ones;  // ones: a panel of them between two of zeros
  Fading fading;
};

// Queries as lanes, the heads of a group side by side: the results, and the gradients of the queries.
template <class T> struct NearByQueries : NearSweep<T> {
  using Base = NearSweep<T>;
  using Base::N, Base::L, Base::p, Base::d, Base::columns, Base::batch, Base::head, Base::past, Base::tile, Base::scores,
      Base::place;

  static Index tile_of(const NearProblem& p) { return round_up(later_of(kNearLanes / p.group, 1), kPanel<T>); }

  NearByQueries(const NearProblem& p, Index row)
      : Base(p, row, tile_of(p)), k(d, kNearRows), u(columns, kNearRows), q(d, tile * p.group), y(columns, tile * p.group),
        far(p.far ? columns : 0, tile * p.group), dq(p.grad ? d : 0, tile * p.group), top(tile * p.group),
        count(p.count.data ? tile * p.group : 0) {}

  // Tokens in the lanes from `at` on, with zeros up to a whole panel.
  void load_lanes(const T* from, Index from_row, Index tokens, Index entries, const Columns<T>& to, Index at) const {
    transpose<T>(from, from_row, tokens, entries, to.row(0) + at, to.stride);
    for (Index e = 0; e < entries; ++e) fill(to.row(e) + at + tokens, round_up(tokens, N) - tokens, T(0));
  }

  // Body(query, at) for every panel of a tile: queries from `query` on in the lanes from `at` on.
  template <class Body> INLINE void panels(Index first, Index tokens, const Body& body) const {
    for (Index member = 0; member < p.group; ++member)
      for (Index t = 0; t < tokens; t += N) body(first + t, member * tile + t);
  }

  // Body(r, count, at, fresh, restrict_scores) for every block of keys, loaded here, and every panel of a tile that sees
  // some of it, from row r on; fresh: the panel saw nothing before.
  template <class Body> void pairs(Index first, Index tokens, bool forward, const Body& body) {
    const Index from = later_of(past + first - p.window + 1, 0), to = past + first + tokens;
    if (p.window) {
      this->load_decay(from, to);
      Base::blocks(from, to, [&](Index begin, Index length) {
        this->load_keys(k, u, begin, length, forward);
        look(length);
        panels(first, tokens, [&](Index query, Index at) {
          const Index lane = past + query, oldest = later_of(lane - p.window + 1, from);
          const Index a = later_of(begin, oldest), count = earlier_of(begin + length, lane + N) - a;
          if (count > 0)
            body(a - begin, count, at, a == oldest, [&] { this->template restrict_band<true>(a, count, lane); });
        });
      });
    }
    Base::blocks(0, p.sinks, [&](Index begin, Index count) {
      this->load_sinks(k, u, begin, count, forward);
      look(count);
      panels(first, tokens, [&](Index query, Index at) {
        body(0, count, at, false, [&] { this->template restrict_sinks<true>(begin, query, count); });
      });
    });
  }

  void forward(Index from, Index to) {
    for (Index first = from; first < to; first += tile) {
      const Index tokens = earlier_of(to - first, tile);
      for (Index member = 0; member < p.group; ++member) {
        load_lanes(this->query_of(member, first), p.query.token, tokens, d, q, member * tile);
        load_far(member, first, tokens);
        start(member, tokens);
      }
      fill(y.row(0), columns * y.stride, T(0));
      pairs(first, tokens, true, [&](Index r, Index count, Index at, bool fresh, const auto& restrict_scores) {
        store_product<T>(count, k.rows + r * d, d, q.row(0) + at, q.stride, d, scores);
        restrict_scores();
        raise(count, at, fresh);
        add_product<T>(columns, u.columns.row(0) + r, u.columns.stride, scores, count, y, at);
      });
      for (Index member = 0; member < p.group; ++member) finish(member, first, tokens);
    }
    if (p.unsafe) {
      __atomic_fetch_add(p.unsafe, unsafe, __ATOMIC_RELAXED);
      __atomic_fetch_add(p.broken, broken, __ATOMIC_RELAXED);
    }
  }

  // Count blocks of keys in which some number is not finite.
  void look(Index tokens) {
    if (!p.unsafe) return;
    const Index padded = round_up(tokens, N);
    bool whole = finite(k.rows, tokens * d);
    for (Index e = 0; e + 1 < columns; ++e) whole = finite(u.columns.row(e), padded) && whole;
    broken += !whole;
  }
  static bool finite(const T* from, Index count) {
    constexpr Index C = 4;
    Vector<T> nothing[C] = {};
    Index i = 0;
    for (; i + C * L <= count; i += C * L)
#pragma GCC unroll 4
      for (Index c = 0; c < C; ++c) nothing[c] += load(from + i + c * L) * T(0);
    T rest = 0;
    for (; i < count; ++i) rest += from[i] * T(0);
    return sum<T>((nothing[0] + nothing[1]) + (nothing[2] + nothing[3])) + rest == 0;
  }

  // The far parts of a tile's queries, zeros where they have none, and how many far keys each of them sees.
  void load_far(Index member, Index first, Index tokens) const {
    if (!p.far) return;
    const Index begin = p.queries - p.far_queries, none = earlier_of(later_of(begin - first, 0), tokens);
    const Index padded = round_up(tokens, N), at = member * tile, query_head = head * p.group + member;
    const Index from = (batch * p.heads * p.group + query_head) * p.far_queries + first + none - begin;
    for (Index e = 0; e < columns; ++e) fill(far.row(e) + at, padded, T(0));
    transpose<T>(static_cast<const T*>(p.far) + from * columns, columns, tokens - none, columns, far.row(0) + at + none,
                 far.stride);
    if (!p.count.data) return;
    fill(count + at, padded, T(0));
    memcpy(count + at + none, tokens_of<T>(p.count, batch, query_head, first + none - begin), (tokens - none) * sizeof(T));
  }

  // The maxima before any key: log Z of the far part, where that is positive.
  void start(Index member, Index tokens) const {
    T* to = top + member * tile;
    fill(to, round_up(tokens, N), -T(INFINITY));
    const Vector<T> least = broadcast(exp(Exponential<T>::lowest));  // its inverse is finite
    for (Index t = 0; p.far && t < tokens; t += L) {
      const Vector<T> z = load(far.row(columns - 1) + member * tile + t);
      store(to + t, z > 0 ? logarithm<T>(maximum<T>(z, least)) : load(to + t));
    }
  }

  // Raise the maxima to those of a block of scores, shrink what was summed so far, and turn the scores into weights.
  INLINE void raise(Index count, Index at, bool fresh) {
    const Vector<T> old_left = load(top + at), old_right = load(top + at + L);
    Vector<T> left = old_left, right = old_right;
    const T* from = scores;
#pragma GCC unroll 4
    for (Index r = 0; r < count; ++r, from += N) {
      left = maximum<T>(load(from), left);
      right = maximum<T>(load(from + L), right);
    }
    store(top + at, left);
    store(top + at + L, right);
    left = bounded(left), right = bounded(right);
    if (!fresh) {
      const Vector<T> shrink_left = exponential<T>(old_left - left), shrink_right = exponential<T>(old_right - right);
      for (Index e = 0; e < columns; ++e) {
        T* to = y.row(e) + at;
        store(to, load(to) * shrink_left);
        store(to + L, load(to + L) * shrink_right);
      }
    }
    this->weigh(count, left, right);
  }
  static INLINE Vector<T> bounded(Vector<T> x) {
    const T largest = kLargest<T>;
    return minimum<T>(maximum<T>(x, broadcast(-largest)), broadcast(largest));
  }

  // Write the rows of a tile, with the far part added. A query that is not finite makes NaN of its row.
  void finish(Index member, Index first, Index tokens) {
    const Index begin = member * tile, to = place(member, first);
    for (Index t = 0; t < tokens; t += L) {
      const Index at = begin + t;
      Vector<T> nothing = {};
      for (Index c = 0; c < d; ++c) nothing += load(q.row(c) + at) * T(0);
      if (!(sum<T>(nothing) == 0))
        for (Index e = 0; e < columns; ++e) store(y.row(e) + at, load(y.row(e) + at) + nothing);
      const Vector<T> own = load(top + at), weight = load(y.row(columns - 1) + at);
      const Vector<T> settled = own == broadcast(-T(INFINITY)) ? Vector<T>{} : bounded(own);
      const Vector<T> factor = exponential<T>(minimum<T>(-settled, broadcast(-Exponential<T>::lowest)));
      store(top + at, settled);
      for (Index e = 0; p.far && e < columns; ++e) store(y.row(e) + at, load(y.row(e) + at) + factor * load(far.row(e) + at));
      if (p.unsafe) divide(at, earlier_of(tokens - t, L), weight, factor);
    }
    if (p.unsafe) return transpose<T>(y.row(0) + begin, y.stride, columns - 1, tokens, static_cast<T*>(p.y) + to * (columns - 1), columns - 1);
    transpose<T>(y.row(0) + begin, y.stride, columns, tokens, static_cast<T*>(p.out) + to * columns, columns);
    memcpy(static_cast<T*>(p.top) + to, top + begin, tokens * sizeof(T));
  }

  // N / Z of some lanes: zeros where no key is seen, NaN where the normaliser is not as it must be.
  INLINE void divide(Index at, Index lanes, Vector<T> weight, Vector<T> factor) {
    const bool checked = p.safe >= 0;
    const T size = fabs(p.constant), least = T(p.safe * fabs(p.constant));
    const Vector<T> z = load(y.row(columns - 1) + at), limit = broadcast(T(INFINITY));
    Vector<T> seen = checked ? weight / (size > 0 ? size : T(1)) : z;
    if (checked && p.count.data) seen += factor * load(count + at);
    const auto none = seen == Vector<T>{}, good = (checked ? z > seen * least : z >= Vector<T>{}) & (z < limit);
    const Vector<T> by = none ? broadcast(T(1)) : good ? z : broadcast(T(NAN));
    for (Index e = 0; e + 1 < columns; ++e) store(y.row(e) + at, load(y.row(e) + at) / by);
    if (sum<T>(by * T(0)) == 0) return;
    for (Index i = 0; i < lanes; ++i) unsafe += by[i] != by[i];
  }

  void backward(Index from, Index to) {
    for (Index first = from; first < to; first += tile) {
      const Index tokens = earlier_of(to - first, tile);
      for (Index member = 0; member < p.group; ++member) {
        load_lanes(this->query_of(member, first), p.query.token, tokens, d, q, member * tile);
        load_lanes(this->grad_of(member, first), columns, tokens, columns, y, member * tile);
        fill(top + member * tile, round_up(tokens, N), T(0));
        memcpy(top + member * tile, static_cast<const T*>(p.top) + place(member, first), tokens * sizeof(T));
      }
      fill(dq.row(0), d * dq.stride, T(0));
      pairs(first, tokens, false, [&](Index r, Index count, Index at, bool, const auto& restrict_scores) {
        store_product<T>(count, k.rows + r * d, d, q.row(0) + at, q.stride, d, scores);
        restrict_scores();
        this->weigh(count, load(top + at), load(top + at + L));
        this->differentiate(count, u.rows + r * columns, y.row(0) + at, y.stride);
        add_product<T>(d, k.columns.row(0) + r, k.columns.stride, scores, count, dq, at);
      });
      for (Index member = 0; member < p.group; ++member)
        transpose<T>(dq.row(0) + member * tile, dq.stride, d, tokens,
                     static_cast<T*>(p.query_grad) + place(member, first) * d, d);
    }
  }

  Tokens<T> k, u;
  const Columns<T> q, y, far, dq;  // y: backward, the gradient by it
  Buffer<T> top, count;
  Index unsafe = 0, broken = 0;
};

// Keys as lanes: the gradients of keys and values, and those of the sinks.
template <class T> struct NearByKeys : NearSweep<T> {
  using Base = NearSweep<T>;
  using Base::N, Base::L, Base::p, Base::d, Base::columns, Base::row, Base::past, Base::tile, Base::scores, Base::place;

  NearByKeys(const NearProblem& p, Index row)
      : Base(p, row, kNearLanes), k(d, tile), u(columns, tile), q(d, kNearRows), g(columns, kNearRows), dk(d, tile),
        du(columns, tile), top(kNearRows) {}

  void keys(Index from, Index to) {
    for (Index first = from; first < to; first += tile) {
      const Index tokens = earlier_of(to - first, tile), last = earlier_of(first + tokens + p.window - 1, p.keys);
      clear();
      if (p.window) {
        this->load_keys(k, u, first, tokens, false);
        this->load_decay(first, last);
        gather(later_of(first, past), last, tokens, [&](Index position, Index count, Index t, const auto& add) {
          const Index lane = first + t, a = later_of(position, lane);
          const Index seen = earlier_of(position + count, lane + N - 1 + p.window) - a;
          if (seen > 0) add(a - position, seen, [&] { this->template restrict_band<false>(a, seen, lane); });
        });
      }
      write(tokens, p.key_grad, p.column_grad, row * p.keys + first);
    }
  }

  // The share of one part of the queries in the gradients of the sinks.
  void sinks(Index part) {
    const Index from = past + part * p.part, to = earlier_of(from + p.part, p.keys), parts = (p.queries + p.part - 1) / p.part;
    for (Index first = 0; first < p.sinks; first += tile) {
      const Index tokens = earlier_of(p.sinks - first, tile);
      clear();
      this->load_sinks(k, u, first, tokens, false);
      gather(from, to, tokens, [&](Index position, Index count, Index t, const auto& add) {
        add(0, count, [&] { this->template restrict_sinks<false>(first + t, position - past, count); });
      });
      write(tokens, p.sink_key_grad, p.sink_column_grad, (row * parts + part) * p.sinks + first);
    }
  }

  void clear() {
    fill(dk.row(0), d * dk.stride, T(0));
    fill(du.row(0), columns * du.stride, T(0));
  }

  // Add what the queries at the positions from..to pass to a tile of keys. pair(position, count, t, add) is asked for
  // every block of queries and panel of keys; it calls add(r, rows, restrict_scores) for the rows that count.
  template <class Pair> void gather(Index from, Index to, Index tokens, const Pair& pair) {
    for (Index member = 0; member < p.group; ++member)
      Base::blocks(from, to, [&](Index position, Index count) {
        const Index query = position - past;
        q.load(this->query_of(member, query), p.query.token, d, count, nullptr, true, true);
        g.load(this->grad_of(member, query), columns, columns, count, nullptr, true, true);
        memcpy(top, static_cast<const T*>(p.top) + place(member, query), count * sizeof(T));
        for (Index t = 0; t < tokens; t += N)
          pair(position, count, t, [&](Index r, Index rows, const auto& restrict_scores) { add(r, rows, t, restrict_scores); });
      });
  }

  template <class Restrict> void add(Index r, Index count, Index t, const Restrict& restrict_scores) {
    store_product<T>(count, q.rows + r * d, d, k.columns.row(0) + t, k.columns.stride, d, scores);
    restrict_scores();
    T* weights = scores;
    for (Index i = 0; i < count; ++i) {
      const Vector<T> own = broadcast(top[r + i]);
      store(weights + i * N, exponential<T>(load(weights + i * N) - own));
      store(weights + i * N + L, exponential<T>(load(weights + i * N + L) - own));
    }
    add_product<T>(columns, g.columns.row(0) + r, g.columns.stride, scores, count, du, t);
    this->differentiate(count, g.rows + r * columns, u.columns.row(0) + t, u.columns.stride);
    add_product<T>(d, q.columns.row(0) + r, q.columns.stride, scores, count, dk, t);
  }

  void write(Index tokens, void* by_key, void* by_column, Index at) const {
    transpose<T>(dk.row(0), dk.stride, d, tokens, static_cast<T*>(by_key) + at * d, d);
    transpose<T>(du.row(0), du.stride, columns, tokens, static_cast<T*>(by_column) + at * columns, columns);
  }

  Tokens<T> k, u, q, g;
  const Columns<T> dk, du;
  Buffer<T> top;
};

// Every row's tokens cut into tasks of whole tiles, a few for each thread.
struct NearTasks {
  NearTasks(Index rows, Index tokens, Index tile, Index threads) : tokens(tokens) {
    const Index tiles = (tokens + tile - 1) / tile, each = rows * tiles / (4 * threads);
    length = tile * later_of(earlier_of(each, tiles), 1);
    cuts = (tokens + length - 1) / length, count = rows * cuts;
  }
  Index row(Index task) const { return task / cuts; }
  Index from(Index task) const { return task % cuts * length; }
  Index to(Index task) const { return earlier_of(from(task) + length, tokens); }
  Index tokens, length, cuts, count;
};

template <class T> void near_forward_rows(const NearProblem& p) {
  const NearTasks tasks(p.batch * p.heads, p.queries, NearByQueries<T>::tile_of(p), p.threads);
  run_tasks(tasks.count, p.threads, [&](Index i) {
    NearByQueries<T>(p, tasks.row(i)).forward(tasks.from(i), tasks.to(i));
  });
}

template <class T> void near_backward_rows(const NearProblem& p) {
  const Index rows = p.batch * p.heads, parts = p.sinks ? (p.queries + p.part - 1) / p.part : 0;
  const NearTasks keys(rows, p.keys, kNearLanes, p.threads), queries(rows, p.queries, NearByQueries<T>::tile_of(p), p.threads);
  run_tasks(keys.count + queries.count + rows * parts, p.threads, [&](Index i) {
    if (i < keys.count) return NearByKeys<T>(p, keys.row(i)).keys(keys.from(i), keys.to(i));
    i -= keys.count;
    if (i < queries.count) return NearByQueries<T>(p, queries.row(i)).backward(queries.from(i), queries.to(i));
    i -= queries.count;
    NearByKeys<T>(p, i / parts).sinks(i % parts);
  });
}

}  // namespace TARGET
}  // namespace taylor
