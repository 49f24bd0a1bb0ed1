// The tails of states folded into their moments.
#pragma once
#include "sweep.h"

namespace taylor {
namespace TARGET {

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
    if (f.tail_log_decay[row] != 0) fade<T>(sums, compensation, columns * features, exp(f.tail_log_decay[row]));
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
