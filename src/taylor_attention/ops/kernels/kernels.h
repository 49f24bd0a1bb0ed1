// Everything for one instruction set; included once by each file that names one (TARGET, VECTOR_BYTES, TILE_ROWS).
#pragma once
#include "decode.h"
#include "fold.h"
#include "near.h"

namespace taylor {
namespace TARGET {

extern const Kernels kernels;
const Kernels kernels = {
    [](const Problem& p, bool is_double) { is_double ? forward_rows<double>(p) : forward_rows<float>(p); },
    [](const Problem& p, bool is_double) { is_double ? backward_rows<double>(p) : backward_rows<float>(p); },
    [](const Step& s, bool is_double) { return is_double ? decode_rows<double>(s) : decode_rows<float>(s); },
    [](const Fold& f, bool is_double) { is_double ? fold_rows<double>(f) : fold_rows<float>(f); },
    [](const NearProblem& p, bool is_double) { is_double ? near_forward_rows<double>(p) : near_forward_rows<float>(p); },
    [](const NearProblem& p, bool is_double) { is_double ? near_backward_rows<double>(p) : near_backward_rows<float>(p); },
};

}  // namespace TARGET
}  // namespace taylor
