// Whole sequences, one head at a time: the sweeps of ops/chunked.py in compiled form.
//
// A task is one row (batch x key/value head): forward some columns of [value, 1], since columns do not need each other;
// backward either the gradient of the queries or that of keys and values, since these two do not either.
#pragma once
#include "scores.h"
#include "tasks.h"

namespace taylor {
namespace TARGET {

template <class T> struct Sweep {
  // Tokens of one tile: products over tokens get long, and what a tile takes stays bounded.
  static Index tile_of(const Problem& p) {
    const Index longest = p.keys > p.queries ? p.keys : p.queries;
    const Index chunk = p.causal ? p.chunk : longest;
    const Index rows = p.layout->lower + p.layout->tail;
    Index most = (Index(3) << 21) / (rows * Index(sizeof(T)));  // 6 MiB of monomials
    most = most < 64 ? 64 : most > 512 ? 512 : most;
    return round_up(chunk < most ? (chunk < 1 ? 1 : chunk) : most, kPanel<T>);
  }

  Sweep(const Problem& p, Index row, Index begin, Index end)
      : p(p), layout(*p.layout), d(layout.head_dim), features(layout.features), begin(begin), end(end),
        columns(end - begin), row(row), batch(row / p.heads), head(row % p.heads), tile(tile_of(p)),
        moments_used(!p.direct || p.keep || p.started), keys(p, tile, begin, end), q(d, tile), y(columns, tile),
        by_token(layout, moments_used ? tile : 0), by_monomial(layout, moments_used ? tile : 0), packed(columns),
        scaled(columns * (tile + 16)), block(kScoreRows * kPanel<T>), decay(p.log_decay ? p.chunk : 0) {}

  Index length(Index first, Index stop, Index most) const { return stop - first < most ? stop - first : most; }

  // Body(first, tokens) for each tile of a range of tokens.
  template <class Body> void tiles(Index from, Index to, const Body& body) {
    for (Index first = from; first < to; first += tile) body(first, length(first, to, tile));
  }

  void load_decay(Index from, Index to) {
    if (!p.log_decay) return;
    const Index at = row * p.keys + from;
    decay.load(static_cast<const T*>(p.log_decay) + at, p.visible ? p.visible + at : nullptr, to - from);
  }
  const Decay<T>* decaying() const { return p.log_decay ? &decay : nullptr; }

  void fade(T* moments, T* compensation) {
    if (p.log_decay) TARGET::fade<T>(moments, compensation, columns * features, decay.whole);
  }

  const T* weights() const { return static_cast<const T*>(p.weights); }

  void load_queries(Index member, Index first, Index tokens) {
    const T* from = tokens_of<T>(p.query, batch, head * p.group + member, first);
    load_columns<T>(from, p.query.token, tokens, d, q);
  }

  // Add the keys of a range to the moments; what is before them has faded already.
  template <Index chain> void append(T* sums, T* compensation, Index from, Index to) {
    tiles(from, to, [&](Index first, Index tokens) {
      keys.load(row, first, tokens);
      form<T>(layout, keys.x, tokens, by_monomial);
      const T* scale = p.log_decay ? decay.to_end + (first - from) : nullptr;
      update<chain, T>(layout, by_monomial, keys.x.row(0), keys.x.stride, keys.u.row(0), keys.u.stride, scale, columns, tokens,
                scaled, nullptr, sums, compensation);
    });
  }

  // ---- forward -------------------------------------------------------------------------------------------------------

  void forward() {
    const Index offset = (row * p.columns + begin) * features;
    Buffer<T> own(p.sums || !moments_used ? 0 : columns * features);
    T* sums = p.sums ? static_cast<T*>(p.sums) + offset : own;
    T* compensation = p.compensation ? static_cast<T*>(p.compensation) + offset : nullptr;
    if (!p.sums && moments_used) fill(sums, columns * features, T(0));
    if (!p.causal) {
      if (!p.direct) append<kChain>(sums, compensation, 0, p.keys);
      answer(0, p.queries, 0, p.direct ? p.keys : 0, p.direct ? p.started : true, sums);
      if (p.direct && p.keep) append<kChain>(sums, compensation, 0, p.keys);
      return;
    }
    for (Index from = 0; from < p.keys; from += p.chunk) {
      const Index to = from + length(from, p.keys, p.chunk);
      load_decay(from, to);
      answer(from, to, from, to, from || p.started, sums);
      if (to < p.keys || p.keep) {
        fade(sums, compensation);
        append<kChain>(sums, compensation, from, to);
        if (to < p.keys && p.history) memcpy(before(to) + begin * features, sums, columns * features * sizeof(T));
      }
    }
  }

  // Where the moments before a chunk that begins at `from` are kept, [E, M].
  T* before(Index from) const {
    const Index chunks = (p.keys - 1) / p.chunk;  // that have one
    return static_cast<T*>(p.history) + (row * chunks + from / p.chunk - 1) * p.columns * features;
  }

  // Write the rows of the queries from..to, which see the moments (if past) and the keys first_key..last_key.
  void answer(Index from, Index to, Index first_key, Index last_key, bool past, const T* sums) {
    for (Index member = 0; member < p.group; ++member)
      tiles(from, to, [&](Index first, Index tokens) {
        load_queries(member, first, tokens);
        fill(y.row(0), columns * y.stride, T(0));
        if (past) {
          form<T>(layout, q, tokens, by_token);
          read<T>(layout, sums, columns, weights(), q, tokens, by_token, packed, y);
          if (p.log_decay) scale_columns(y, columns, tokens, decay.from_start + (first - from));
        }
        tiles(first_key, p.causal ? first + tokens : last_key, [&](Index key, Index count) {
          keys.load(row, key, count);
          attend<T>(p, q, tokens, keys, {first - from, key - from, p.causal && key == first, decaying()}, block, y);
        });
        T* out = static_cast<T*>(p.out) + ((batch * p.heads + head) * p.group + member) * p.queries * p.columns;
        transpose<T>(y.row(0), y.stride, columns, tokens, out + first * p.columns + begin, p.columns);
      });
  }

  // ---- backward ------------------------------------------------------------------------------------------------------

  // d f / d s: coefficients [degree].
  void fill_slope(T* slope) const {
    for (Index i = 1; i <= layout.degree; ++i) slope[i - 1] = T(i) * static_cast<const T*>(p.coefficients)[i];
  }

  // dq [group, queries, d] = what the moments pass to the queries that read them.
  void backward_queries(T* dq) {
    Buffer<T> own(p.sums ? 0 : columns * features);
    T* sums = p.sums ? static_cast<T*>(p.sums) + row * columns * features : own;
    if (!p.sums) fill(sums, columns * features, T(0));
    QueryTile<T> queries(p, tile);
    const Columns<T> slope(d, tile);
    const TokenPanels<T> slopes(layout, tile);
    auto differentiate = [&](Index from, Index to, const T* moments) {
      for (Index member = 0; member < p.group; ++member)
        tiles(from, to, [&](Index first, Index tokens) {
          queries.load(row, member, first, tokens);
          fill(slope.row(0), d * slope.stride, T(0));
          form<T>(layout, queries.q, tokens, by_token);
          if (p.log_decay) scale_columns(queries.g, columns, tokens, decay.from_start + (first - from));
          add_slope<T>(layout, moments, columns, weights(), queries.q, tokens, by_token, packed, queries.g, slopes, slope,
                       nullptr);
          transpose<T>(slope.row(0), slope.stride, d, tokens, dq + (member * p.queries + first) * d, d);
        });
    };
    if (!p.causal) {
      if (!p.direct) append<0>(sums, nullptr, 0, p.keys);
      return differentiate(0, p.queries, sums);
    }
    const Index start = p.started ? 0 : p.chunk < p.keys ? p.chunk : p.keys;  // of the first query that reads any
    for (Index member = 0; member < p.group; ++member) fill(dq + member * p.queries * d, start * d, T(0));
    for (Index from = 0; from < p.keys; from += p.chunk) {
      const Index to = from + length(from, p.keys, p.chunk);
      load_decay(from, to);
      if (from || p.started) differentiate(from, to, from && p.history ? before(from) : sums);
      if (to < p.keys && !p.history) {
        fade(sums, nullptr);
        append<0>(sums, nullptr, from, to);
      }
    }
  }

  // Gradients of keys and values, and what the scores inside chunks pass to the queries, added to dq. Of several `parts`
  // each takes its share of the tiles of keys; the first one finds the gradient of the moments at the start.
  void backward_keys(Index part, Index parts, T* dq) {
    const Index size = columns * features;
    const bool given = p.start_grad && part == 0;
    Buffer<T> own(given || !moments_used ? 0 : size), slope(layout.degree + 1), padded(tile * round_up(d, kPanel<T>));
    T* by_moments = given ? static_cast<T*>(p.start_grad) + row * size : own;
    if (moments_used || given) {
      if (p.end_grad) memcpy(by_moments, static_cast<const T*>(p.end_grad) + row * size, size * sizeof(T));
      else fill(by_moments, size, T(0));
    }
    fill_slope(slope);
    QueryTile<T> queries(p, tile);
    const Columns<T> faded(p.log_decay ? columns : 0, tile), dk(d, tile), du(columns, tile);
    const TokenPanels<T> slopes(layout, moments_used ? tile : 0);
    const ScoreBlocks<T> blocks;

    // What the queries from..to pass to the moments that they read.
    auto gather = [&](Index from, Index to) {
      for (Index member = 0; member < p.group; ++member)
        tiles(from, to, [&](Index first, Index tokens) {
          queries.load(row, member, first, tokens);
          form<T>(layout, queries.q, tokens, by_monomial);
          const T* scale = p.log_decay ? decay.from_start + (first - from) : nullptr;
          update<0, T>(layout, by_monomial, queries.q.row(0), queries.q.stride, queries.g.row(0), queries.g.stride, scale,
                       columns, tokens, scaled, weights(), by_moments, nullptr);
        });
    };
    // Gradients of the keys from..to, which are in the moments (if read_later) and seen by the queries of their chunk.
    auto differentiate = [&](Index from, Index to, Index first_query, Index last_query, bool read_later) {
      tiles(from, to, [&](Index first, Index tokens) {
        if (first / tile % parts != part) return;
        keys.load(row, first, tokens);
        fill(dk.row(0), d * dk.stride, T(0));
        fill(du.row(0), columns * du.stride, T(0));
        if (read_later) {
          const T* scale = p.log_decay ? decay.to_end + (first - from) : nullptr;
          form<T>(layout, keys.x, tokens, by_token);
          if (scale) {
            memcpy(faded.data, keys.u.data, columns * keys.u.stride * sizeof(T));
            scale_columns(faded, columns, tokens, scale);
          }
          add_slope<T>(layout, by_moments, columns, nullptr, keys.x, tokens, by_token, packed, scale ? faded : keys.u,
                       slopes, dk, &du);
          if (scale) scale_columns(du, columns, tokens, scale);
        }
        for (Index member = 0; member < p.group; ++member)
          tiles(p.causal ? first : first_query, last_query, [&](Index query, Index count) {
            T* rows = dq + (member * p.queries + query) * d;
            queries.load(row, member, query, count);
            pad_rows<T>(rows, count, d, padded);
            const Pairing<T> at = {first - from, query - from, p.causal && query == first, decaying()};
            attend_backward<T>(p, slope, queries, keys, at, blocks, dk, du, padded);
            copy_rows<T>(padded, round_up(d, kPanel<T>), count, d, rows, d);
          });
        const Index at = row * p.keys + first;
        transpose<T>(dk.row(0), dk.stride, d, tokens, static_cast<T*>(p.key_grad) + at * d, d);
        transpose<T>(du.row(0), du.stride, columns - 1, tokens, static_cast<T*>(p.value_grad) + at * (columns - 1), columns - 1);
        memcpy(static_cast<T*>(p.one_grad) + at, du.row(columns - 1), tokens * sizeof(T));
      });
    };

    if (!p.causal) {
      if (!p.direct) gather(0, p.queries);
      differentiate(0, p.keys, 0, p.direct ? p.queries : 0, p.direct ? p.keep : true);
      if (p.direct && p.started && part == 0) gather(0, p.queries);
      return;
    }
    for (Index from = (p.keys - 1) / p.chunk * p.chunk; from >= 0 && p.keys; from -= p.chunk) {
      const Index to = from + length(from, p.keys, p.chunk);
      load_decay(from, to);
      differentiate(from, to, from, to, to < p.keys || p.keep);
      if (moments_used) fade(by_moments, nullptr);
      if (from || (p.started && part == 0)) gather(from, to);
    }
  }

  const Problem& p;
  const Layout& layout;
  const Index d, features, begin, end, columns, row, batch, head, tile;
  const bool moments_used;
  KeyTile<T> keys;
  const Columns<T> q, y;
  const TokenPanels<T> by_token;
  const MonomialPanels<T> by_monomial;
  PackedMoments<T> packed;
  Buffer<T> scaled, block;
  Decay<T> decay;
};

template <class T> void forward_rows(const Problem& p) {
  const Index rows = p.batch * p.heads;
  Index slices = 1;
  while (rows * slices % p.threads && rows * slices < 4 * p.threads && slices < p.columns) ++slices;
  run_tasks(rows * slices, p.threads, [&](Index task) {
    const Index slice = task % slices, row = task / slices;
    Sweep<T>(p, row, p.columns * slice / slices, p.columns * (slice + 1) / slices).forward();
  });
}

// A row is one task where there are many rows, else two, whose gradients of the queries are summed afterwards; never more,
// since each takes memory, and whatever the number of threads, on which no result may depend. Where scores alone count,
// each takes every other tile of keys; else one takes what the queries read from the moments.
template <class T> void backward_rows(const Problem& p) {
  constexpr Index kManyRows = 32;
  const Index rows = p.batch * p.heads, size = p.group * p.queries * p.layout->head_dim;
  const Index parts = rows < kManyRows ? 2 : 1;
  T* query_grad = static_cast<T*>(p.query_grad);
  Buffer<T> others((parts - 1) * rows * size);
  run_tasks(parts * rows, p.threads, [&](Index task) {
    const Index row = task % rows, part = task / rows;
    T* dq = (part ? static_cast<T*>(others) : query_grad) + row * size;
    Sweep<T> sweep(p, row, 0, p.columns);
    const bool read = !p.direct || p.started;  // by queries, from moments
    if (read && part + 1 == parts) sweep.backward_queries(dq);
    else fill(dq, size, T(0));
    if (p.direct) sweep.backward_keys(part, parts, dq);
    else if (part == 0) sweep.backward_keys(0, 1, dq);
  });
  if (parts == 1) return;
  run_tasks(rows, p.threads, [&](Index row) {
    T *to = query_grad + row * size, *from = others + row * size;
    for (Index i = 0; i < size; ++i) to[i] += from[i];
  });
}

}  // namespace TARGET
}  // namespace taylor
