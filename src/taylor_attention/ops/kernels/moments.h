// The three products across chunks (the Python twin is core/moments.py): update, read, and the slope of a read.
//
// With Phi the packed monomials and u = [value, 1]:
//   update   T[e, r] += sum_t u[e, t] Phi_r(x_t)            monomials as lanes, one row per token
//   read     y[e, t] += sum_r w_r T[e, r] Phi_r(x_t)        tokens as lanes, one row per monomial
//   slope    dx[:, t] += d/dx_t sum_{e, r} g[e, t] w_r T[e, r] Phi_r(x_t)
// The highest degree is formed only where its blocks are short: block i of it is x_i times a suffix of the degree below.
#pragma once
#include "product.h"

namespace taylor {
namespace TARGET {

constexpr Index kChain = 16;   // tokens of a lasting state summed in a row before they join the sum of a tile
constexpr Index kDepth = 256;  // monomials of one packed piece of T: [E, kDepth] stays in the second-level cache

// Some tokens of one head, tokens last, padded with zeros to whole panels: x [d, stride].
template <class T> struct Columns {
  Columns(Index rows, Index tile) : stride(round_up(tile, kPanel<T>) + 16), data(rows * stride) {}
  T* row(Index r) const { return data + r * stride; }
  const Index stride;  // not a power of two: rows fall into different cache sets
  Buffer<T> data;
};

// A span or block of packed rows: T columns `start...`, formed rows `formed...`; factor: the x it is multiplied by.
struct Piece {
  Index start, formed, count, factor;
};

template <class Body> INLINE void for_pieces(const Layout& layout, const Body& body) {
  body(Piece{0, 0, layout.lower, -1});
  for (Index i = 0; i < layout.block_count; ++i) {
    const Block& block = layout.blocks[i];
    body(Piece{block.start, block.suffix, block.count, block.index});
  }
  if (layout.tail) body(Piece{layout.features - layout.tail, layout.lower, layout.tail, -1});
}

// ---- read ------------------------------------------------------------------------------------------------------------

// Formed monomials of a tile of tokens: per panel of tokens [rows, panel], rows contiguous.
template <class T> struct TokenPanels {
  TokenPanels(const Layout& layout, Index tile)
      : rows(layout.lower + layout.tail), data(round_up(tile, kPanel<T>) * rows) {}
  T* panel(Index first_token) const { return data + first_token * rows; }
  const Index rows;
  Buffer<T> data;
};

// The monomials of one panel of tokens, from token t on: to [rows, panel].
template <class T> void form_panel(const Layout& layout, const Columns<T>& x, Index t, T* to) {
  constexpr Index L = kLanes<T>, N = kPanel<T>;
  fill(to, N, T(1));
  for (Index c = 0; layout.degree > 0 && c < layout.head_dim; ++c) {
    store(to + (1 + c) * N, load(x.row(c) + t));
    store(to + (1 + c) * N + L, load(x.row(c) + t + L));
  }
  for (Index i = 0; i < layout.formed_count; ++i) {
    const Block& block = layout.formed[i];
    const Vector<T> left = load(x.row(block.index) + t), right = load(x.row(block.index) + t + L);
    const T* from = to + block.suffix * N;
    T* start = to + block.start * N;
    for (Index r = 0; r < block.count; ++r, from += N, start += N) {
      store(start, left * load(from));
      store(start + L, right * load(from + L));
    }
  }
}

template <class T> void form(const Layout& layout, const Columns<T>& x, Index tokens, const TokenPanels<T>& features) {
  for (Index t = 0; t < tokens; t += kPanel<T>) form_panel<T>(layout, x, t, features.panel(t));
}

// T[e, columns] times weights, packed as [E, kDepth + 16].
template <class T> struct PackedMoments {
  static constexpr Index kStride = kDepth + 16;
  explicit PackedMoments(Index columns) : data(columns * kStride) {}
  void fill_from(const T* moments, Index features, Index columns, const T* weights, Index start, Index count) {
    for (Index e = 0; e < columns; ++e) {
      const T* from = moments + e * features + start;
      T* to = data + e * kStride;
      if (weights)
        for (Index r = 0; r < count; ++r) to[r] = from[r] * weights[start + r];
      else
        for (Index r = 0; r < count; ++r) to[r] = from[r];
    }
  }
  Buffer<T> data;
};

// While token panel `t` of `tokens` is computed, fetch its share of the piece that comes next: columns from `start`.
template <class T>
INLINE void prefetch_piece(const T* moments, Index features, Index columns, Index start, Index t, Index tokens) {
  constexpr Index N = kPanel<T>, kLine = 64 / sizeof(T);
  const Index stop = start + kDepth < features ? start + kDepth : features;
  const Index panels = (tokens + N - 1) / N, panel = t / N;
  for (Index e = columns * panel / panels; e < columns * (panel + 1) / panels; ++e)
    for (Index r = start; r < stop; r += kLine) __builtin_prefetch(moments + e * features + r);
}

// y[e, t] += x_factor times what one panel of tokens reads from one packed piece; phi [depth, panel].
template <class T>
INLINE void read_piece(const PackedMoments<T>& packed, Index columns, const Columns<T>& x, Index factor, Index t,
                       const T* phi, Index depth, const Columns<T>& y) {
  constexpr Index L = kLanes<T>;
  const Vector<T> one = broadcast(T(1));
  const Vector<T> left = factor < 0 ? one : load(x.row(factor) + t);
  const Vector<T> right = factor < 0 ? one : load(x.row(factor) + t + L);
  product<T>(columns, static_cast<T*>(packed.data), packed.kStride, phi, kPanel<T>, depth,
             [&](Index e, Vector<T> a, Vector<T> b) INLINE_LAMBDA {
               T* to = y.row(e) + t;
               store(to, load(to) + left * a);
               store(to + L, load(to + L) + right * b);
             });
}

// y[e, t] += what the tokens read; moments [E, M].
template <class T>
void read(const Layout& layout, const T* moments, Index columns, const T* weights, const Columns<T>& x, Index tokens,
          const TokenPanels<T>& features, PackedMoments<T>& packed, const Columns<T>& y) {
  constexpr Index N = kPanel<T>;
  for_pieces(layout, [&](const Piece& piece) {
    for (Index done = 0; done < piece.count; done += kDepth) {
      const Index depth = piece.count - done < kDepth ? piece.count - done : kDepth;
      packed.fill_from(moments, layout.features, columns, weights, piece.start + done, depth);
      for (Index t = 0; t < tokens; t += N) {
        prefetch_piece(moments, layout.features, columns, piece.start + done + depth, t, tokens);
        read_piece(packed, columns, x, piece.factor, t, features.panel(t) + (piece.formed + done) * N, depth, y);
      }
    }
  });
}

// ---- slope -----------------------------------------------------------------------------------------------------------

// dx[c, t] += the gradient by x of sum g[e, t] (read of x)[e, t]; features as formed from x. If y is given, the read
// itself is added to it, as by `read`: both need the same pieces of the moments.
template <class T>
void add_slope(const Layout& layout, const T* moments, Index columns, const T* weights, const Columns<T>& x,
               Index tokens, const TokenPanels<T>& features, PackedMoments<T>& packed, const Columns<T>& g,
               const TokenPanels<T>& slopes, const Columns<T>& dx, const Columns<T>* y) {
  constexpr Index L = kLanes<T>, N = kPanel<T>;
  if (layout.degree == 0) {
    if (y) read<T>(layout, moments, columns, weights, x, tokens, features, packed, *y);
    return;
  }
  const Index by_row = columns + 1;
  Buffer<T> turned(kDepth * by_row);  // [kDepth, E]
  for_pieces(layout, [&](const Piece& piece) {
    for (Index done = 0; done < piece.count; done += kDepth) {
      const Index depth = piece.count - done < kDepth ? piece.count - done : kDepth;
      packed.fill_from(moments, layout.features, columns, weights, piece.start + done, depth);
      transpose<T>(packed.data, packed.kStride, columns, depth, turned, by_row);
      for (Index t = 0; t < tokens; t += N) {
        prefetch_piece(moments, layout.features, columns, piece.start + done + depth, t, tokens);
        const T* phi = features.panel(t) + (piece.formed + done) * N;
        if (y) read_piece(packed, columns, x, piece.factor, t, phi, depth, *y);
        T* by_phi = slopes.panel(t) + (piece.formed + done) * N;
        if (piece.factor < 0) {
          product<T>(depth, turned, by_row, g.row(0) + t, g.stride, columns,
                     [&](Index r, Vector<T> a, Vector<T> b) INLINE_LAMBDA {
                       store(by_phi + r * N, a);
                       store(by_phi + r * N + L, b);
                     });
          continue;
        }
        T *x_i = x.row(piece.factor) + t, *by_x = dx.row(piece.factor) + t;
        const Vector<T> left = load(x_i), right = load(x_i + L);
        Vector<T> by_left = load(by_x), by_right = load(by_x + L);
        product<T>(depth, turned, by_row, g.row(0) + t, g.stride, columns,
                   [&](Index r, Vector<T> a, Vector<T> b) INLINE_LAMBDA {
                     by_left += a * load(phi + r * N);
                     by_right += b * load(phi + r * N + L);
                     store(by_phi + r * N, load(by_phi + r * N) + left * a);
                     store(by_phi + r * N + L, load(by_phi + r * N + L) + right * b);
                   });
        store(by_x, by_left);
        store(by_x + L, by_right);
      }
    }
  });
  for (Index t = 0; t < tokens; t += N) {  // back through the blocks that were formed
    T* by_phi = slopes.panel(t);
    const T* phi = features.panel(t);
    for (Index i = layout.formed_count - 1; i >= 0; --i) {
      const Block& block = layout.formed[i];
      T *x_i = x.row(block.index) + t, *by_x = dx.row(block.index) + t;
      const Vector<T> left = load(x_i), right = load(x_i + L);
      Vector<T> by_left = load(by_x), by_right = load(by_x + L);
      for (Index r = 0; r < block.count; ++r) {
        const T *by = by_phi + (block.start + r) * N, *from = phi + (block.suffix + r) * N;
        T* to = by_phi + (block.suffix + r) * N;
        by_left += load(by) * load(from);
        by_right += load(by + L) * load(from + L);
        store(to, load(to) + left * load(by));
        store(to + L, load(to + L) + right * load(by + L));
      }
      store(by_x, by_left);
      store(by_x + L, by_right);
    }
    for (Index c = 0; c < layout.head_dim; ++c) {
      T* to = dx.row(c) + t;
      store(to, load(to) + load(by_phi + (1 + c) * N));
      store(to + L, load(to + L) + load(by_phi + (1 + c) * N + L));
    }
  }
}

// ---- update ----------------------------------------------------------------------------------------------------------

// Formed monomials of a tile of tokens, one row per token: [zeros, lower | tail, zeros], both parts in whole panels, so
// that every suffix of the lower rows ends where a panel ends. Large ones are stored panel by panel.
template <class T> struct MonomialPanels {
  MonomialPanels(const Layout& layout, Index tile)
      : lead(round_up(layout.lower, kPanel<T>) - layout.lower),
        width(lead + layout.lower + round_up(layout.tail, kPanel<T>)),
        apart(width * tile * Index(sizeof(T)) > (Index(1) << 18)),
        row(apart ? kPanel<T> : width + (width / 16 % 2 ? 32 : 16)),
        step(apart ? tile * kPanel<T> : kPanel<T>),
        data(apart ? width * tile : row * tile) {}
  T* panel(Index first_column) const { return data + first_column / kPanel<T> * step; }
  const Index lead, width;
  const bool apart;
  const Index row, step;  // from token to token, from panel to panel
  Buffer<T> data;
};

// As for reading, then turned: whole panels of tokens, so a tile must have room for the last one.
template <class T>
void form(const Layout& layout, const Columns<T>& x, Index tokens, const MonomialPanels<T>& features) {
  constexpr Index L = kLanes<T>, N = kPanel<T>;
  const Index lead = features.lead, rows = layout.lower + layout.tail;
  Buffer<T> some(features.width * N);
  fill(static_cast<T*>(some), lead * N, T(0));
  fill(some + (lead + rows) * N, (features.width - lead - rows) * N, T(0));
  for (Index t = 0; t < tokens; t += N) {
    form_panel<T>(layout, x, t, some + lead * N);
    for (Index column = 0; column < features.width; column += L) {
      T* to = features.panel(column) + t * features.row + column % N;
      for (Index half = 0; half < N; half += L) {
        Vector<T> a[L];
#pragma GCC unroll 16
        for (Index i = 0; i < L; ++i) a[i] = load(some + (column + i) * N + half);
        turn<T>(a);
#pragma GCC unroll 16
        for (Index i = 0; i < L; ++i) store(to + (half + i) * features.row, a[i]);
      }
    }
  }
}

// sum + compensation of a sum with more added, by two-sum; see add_compensated in core/moments.py.
template <class V> INLINE void add_compensated(V& sum, V& compensation, V increment) {
  const V total = sum + increment, other = total - sum;
  const V dropped = (sum - (total - other)) + (increment - other) + compensation;
  sum = total + dropped;
  compensation = dropped - (sum - total);
}

// sums + compensation (which may be null) times factor. Rounded to single precision, a factor near 1 would be wrong by a
// part of what fades, in every chunk to the same side; so in double, and what rounding the sums drops is kept.
template <class T> void fade(T* sums, T* compensation, Index count, double factor) {
  if (!compensation) {
    for (Index i = 0; i < count; ++i) sums[i] = T(sums[i] * factor);
  } else if (sizeof(T) == sizeof(double)) {
    for (Index i = 0; i < count; ++i) sums[i] *= factor, compensation[i] *= factor;
  } else {
    for (Index i = 0; i < count; ++i) {
      const double exact = (double(sums[i]) + double(compensation[i])) * factor;
      sums[i] = T(exact);
      compensation[i] = T(exact - double(sums[i]));
    }
  }
}

template <class T> INLINE void add(T* sums, T* compensation, Vector<T> increment) {
  Vector<T> sum = load(sums);
  if (!compensation) return store(sums, sum + increment);
  Vector<T> dropped = load(compensation);
  add_compensated(sum, dropped, increment);
  store(sums, sum);
  store(compensation, dropped);
}

// One panel of increments with zeros on both sides [E, 3 panels] is added to sums, which stand `stride` apart, for `count`
// monomials from `at` on; where there are too few for a panel, one by one. lane: of the increment of the first of them.
template <class T>
void settle(const T* increments, Index lane, Index columns, const T* weights, Index at, Index count, Index stride, T* sums,
            T* compensation) {
  constexpr Index L = kLanes<T>, N = kPanel<T>;
  for (Index e = 0; e < columns; ++e) {
    const T* from = increments + e * 3 * N + lane;
    T *to = sums + e * stride + at, *dropped = compensation ? compensation + e * stride + at : nullptr;
    for (Index i = 0; count >= N && i < N; i += L)
      add<T>(to + i, dropped ? dropped + i : nullptr, weights ? load(from + i) * load(weights + at + i) : load(from + i));
    for (Index i = 0; count < N && i < count; ++i) {
      T none = 0;
      add_compensated(to[i], dropped ? dropped[i] : none, weights ? from[i] * weights[at + i] : from[i]);
    }
  }
}

// moments[e, r] += weights[r] sum_t u[e, t] scale[t] Phi_r(x_t), with x [d, x_row] the same tokens as the features;
// scale, weights and compensation may be null. scaled: room for [E, tokens + 16].
template <Index chain, class T>
void update(const Layout& layout, const MonomialPanels<T>& features, const T* x, Index x_row, const T* u, Index u_row,
            const T* scale, Index columns, Index tokens, T* scaled, const T* weights, T* moments, T* compensation) {
  constexpr Index L = kLanes<T>, N = kPanel<T>;
  Buffer<T> increments(columns * 3 * N);
  fill(static_cast<T*>(increments), columns * 3 * N, T(0));
  for_pieces(layout, [&](const Piece& piece) {
    const T *a = u, *factor = piece.factor < 0 ? scale : x + piece.factor * x_row;
    Index a_row = u_row;
    if (factor) {
      a = scaled, a_row = tokens + 16;
      for (Index e = 0; e < columns; ++e) {
        const T* from = u + e * u_row;
        T* to = scaled + e * a_row;
        if (scale && piece.factor >= 0)
          for (Index t = 0; t < tokens; ++t) to[t] = from[t] * factor[t] * scale[t];
        else
          for (Index t = 0; t < tokens; ++t) to[t] = from[t] * factor[t];
      }
    }
    const Index begin = features.lead + piece.formed, end = begin + piece.count;
    for (Index column = begin / N * N; column < end; column += N) {
      // A panel that is not wholly of this piece: the window moves to where it is, zeros join beside.
      const Index skip = column < begin ? begin - column : 0, stop = end - column < N ? end - column : N;
      const Index move = skip || piece.count < N ? skip : stop - N, at = piece.start + column - begin + move;
      for (Index e = 0; e < columns; ++e) {  // needed after the product, and too many streams for the hardware to follow
        __builtin_prefetch(moments + e * layout.features + at + N - 1, 1);
        if (compensation) __builtin_prefetch(compensation + e * layout.features + at + N - 1, 1);
      }
      product<T, chain>(columns, a, a_row, features.panel(column), features.row, tokens,
                        [&](Index e, Vector<T> left, Vector<T> right) INLINE_LAMBDA {
                          store(increments + e * 3 * N + N, left);
                          store(increments + e * 3 * N + N + L, right);
                        });
      settle<T>(increments, N + move, columns, weights, at, piece.count < N ? stop - skip : N, layout.features, moments,
                compensation);
    }
  });
}

}  // namespace TARGET
}  // namespace taylor
