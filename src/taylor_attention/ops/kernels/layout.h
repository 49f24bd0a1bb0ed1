// The packed axis cut into what is formed and what is not, for one head size and degree; see Layout.
#pragma once
#include <memory>
#include <vector>

#include "problem.h"

namespace taylor {

constexpr Index kShortest = 48;  // shorter blocks of the highest degree are formed: too short for a product each

struct OwnedLayout {
  Layout view;
  std::vector<Block> formed, blocks, every;
  std::vector<Index> starts;
};

inline Index monomials(Index head_dim, Index degree) {  // C(head_dim + degree - 1, degree)
  Index count = 1;
  for (Index i = 1; i <= degree; ++i) count = count * (head_dim + i - 1) / i;
  return count;
}

inline std::unique_ptr<OwnedLayout> make_layout(Index head_dim, Index degree) {
  auto owned = std::make_unique<OwnedLayout>();
  Index end = degree > 0 ? 1 + head_dim : degree == 0;  // of the degree below; degree -1: no monomials
  Index lower = end, dropped = 0;             // rows of the highest degree that are not formed
  for (Index p = 0, start = 0; p <= degree + 1; start += monomials(head_dim, p++)) owned->starts.push_back(start);
  for (Index p = 2; p <= degree; ++p) {
    Index start = end;
    if (p == degree) lower = end;
    for (Index i = 0; i < head_dim; ++i) {
      const Index count = monomials(head_dim - i, p - 1), suffix = end - count;
      owned->every.push_back({i, start, suffix, count});
      if (p == degree && count >= kShortest) {
        owned->blocks.push_back({i, start, suffix, count});
        dropped += count;
      } else {
        owned->formed.push_back({i, start - dropped, suffix, count});
      }
      start += count;
    }
    end = start;
  }
  if (owned->blocks.empty()) lower = end;  // then one piece is all
  owned->view = {head_dim, degree, end, lower, end - lower - dropped,
                 owned->formed.data(), Index(owned->formed.size()), owned->blocks.data(), Index(owned->blocks.size()),
                 owned->every.data(), Index(owned->every.size()), owned->starts.data()};
  return owned;
}

}  // namespace taylor
