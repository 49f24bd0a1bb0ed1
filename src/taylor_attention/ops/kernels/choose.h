// Who stays exact for its weight: tokens leave the window one after the other and compete for a few places
// (the Python twin, and what it means: ops/heavy.py).
#pragma once
#include "problem.h"

namespace taylor {

struct Contest {
  Index rows, count, places;
  const double* priority;       // [rows, count]
  const std::uint8_t* leaves;   // [rows, count]: whether anyone leaves then
  double* held;                 // [rows, places], changed in place; -inf: free
  std::int64_t *leaver, *until;  // [rows, count], [rows, places + count]
  std::int64_t* holder;         // [rows, places], changed in place; -1: nobody
};

inline void choose(const Contest& c, std::int64_t never) {
  for (Index row = 0; row < c.rows; ++row) {
    double* held = c.held + row * c.places;
    std::int64_t *holder = c.holder + row * c.places, *until = c.until + row * (c.places + c.count);
    for (Index n = 0; n < c.count; ++n) {
      std::int64_t& leaver = c.leaver[row * c.count + n];
      const std::int64_t own = c.places + n;
      const double priority = c.priority[row * c.count + n];
      leaver = -1, until[own] = 0;
      if (!c.leaves[row * c.count + n]) continue;
      Index lowest = 0;
      for (Index i = 1; i < c.places; ++i)
        if (held[i] < held[lowest]) lowest = i;
      leaver = own;
      if (!(priority > held[lowest])) continue;
      leaver = holder[lowest];
      if (leaver >= 0) until[leaver] = n;
      until[own] = never, held[lowest] = priority, holder[lowest] = own;
    }
  }
}

}  // namespace taylor
