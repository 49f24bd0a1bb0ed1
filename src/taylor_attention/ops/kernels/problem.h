// What the kernels are asked for: plain data, filled by module.cpp, the same for every instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

namespace taylor {

using Index = std::ptrdiff_t;

// Monomials with first index `index`: `count` rows from `start`, which are x[index] times the rows from `suffix`.
struct Block {
  Index index, start, suffix, count;
};

// How the packed axis of M monomials is computed (the Python twin is `_split` in core/moments.py). Formed are all
// degrees below the highest ("lower") and the last blocks of the highest ("tail"), which are too short for a product
// each; the other blocks of the highest degree exist only inside products. Without such, all rows count as lower ones.
struct Layout {
  Index head_dim, degree, features;
  Index lower, tail;          // formed rows: lower + tail
  const Block* formed;        // blocks that are formed, lowest degree first; rows counted within the formed ones
  Index formed_count;
  const Block* blocks;        // blocks that are not; start counts packed rows, suffix formed ones
  Index block_count;
  const Block* every;         // every block of degree 2 and above, lowest degree first; rows of the packed axis
  Index every_count;
  const Index* starts;        // where each degree begins on the packed axis, and its end [degree + 2]
};

// A tensor [batch, heads, tokens, entries] with contiguous entries; strides in elements.
struct Strided {
  const void* data;
  Index batch, head, token;
};

// One call of attention, forward or backward. Rows are batch x key/value heads; E = value_dim + 1.
struct Problem {
  const Layout* layout;
  Index batch, heads, group, queries, keys, columns;
  Index chunk;                // tokens between two reads of the moments
  bool causal;
  bool direct;                // scores alone: nothing is read but the moments at the start
  bool started;               // there are moments at the start
  bool keep;                  // the moments at the end are wanted
  Index threads;
  Strided query, key, value;  // value without the column of ones
  const std::uint8_t* visible;  // [rows, keys] or null; hidden keys count nowhere
  const void* log_decay;        // [rows, keys] or null
  const void* coefficients;     // [degree + 1]
  const void* weights;          // reading weights c_p C_p [M]
  void* sums;                   // [rows, E, M], changed in place; null: none before, none wanted
  void* compensation;           // the same, or null: plain sums
  void* history;                // moments before every chunk but the first, [rows, chunks - 1, E, M]: forward written,
                                // backward read; or null
  void* out;                    // [batch, heads x group, queries, E]
  // Backward only:
  const void* grad;             // like out
  const void* end_grad;         // [rows, E, M] or null
  void* query_grad;             // [batch, heads x group, queries, d]
  void* key_grad;               // [batch, heads, keys, d]
  void* value_grad;             // [batch, heads, keys, E - 1]
  void* one_grad;               // [batch, heads, keys]: of the 1 beside the value
  void* start_grad;             // [rows, E, M] or null
};

// Log decay [batch, heads] of one token, or null; below `reset` it forgets everything.
struct Gates {
  const void* data;
  bool is_double;
  Index batch, head;  // strides
  double reset;
};

// Tokens that states keep exact, tokens last.
struct Slots {
  Index width;
  void *key, *value;  // [rows, d, width], [rows, E, width]
  double* log_decay;  // [rows, width]: since the start, when the token had come
};

// All of them; of no width: nothing.
struct NearSlots {
  Slots ring, sinks, heavy;
  double safe;       // as Step::safe, of the weights of these tokens
  double* received;  // [rows, ring]: the attention that its tokens have got; where heavy ones are
  double* priority;  // [rows, heavy]: by which these hold their places
};

// How exp is fitted to each query's own far scores (ops/reading.py); largest_variance < 0: the series is read as it is.
struct Fitting {
  double largest_variance;  // up to which the fit is positive everywhere
  double safe;              // normalisers below this share of the count of keys are not safe with more variance
  double rounding;          // largest share of rounding in a normaliser
};

// One token appended to states and attended from them.
struct Step {
  const Layout* layout;
  // Tail: capacity (0: no moments either), slot of the new token; where there is none, the token is judged and no more.
  Index batch, heads, group, columns, width, position;
  Index threads;
  double scale, safe;                  // safe: normalisers below safe x visible keys give NaN; negative: no check
  double limit;                        // of what is appended, see range.h
  Strided query, key, value;           // one token each
  const std::uint8_t* visible;         // [batch] or null
  Index visible_stride;
  Gates gates;
  const void* far_gain;                       // [heads x group], logarithms, or null; only with near tokens
  const void *coefficients, *weights, *sums;  // coefficients: ones where a fit has its own
  Fitting fitting;
  void *tail_key, *tail_value;         // [rows, d, width], [rows, E, width]
  double *log_decay, *tail_log_decay;  // [rows]
  std::int64_t* tokens;                // [batch]
  NearSlots near;
  void* out;                           // [batch, heads x group, value_dim]
};

// The tail of states added to their moments.
struct Fold {
  const Layout* layout;
  Index rows, columns, width, length, threads;
  void *sums, *compensation;
  const void *tail_key, *tail_value;
  const double* tail_log_decay;
};

// Exact attention of whole sequences to a window of the latest keys and to sinks, forward or backward.
struct NearProblem {
  Index batch, heads, group, queries, keys, sinks, head_dim, columns;
  Index window;                   // <= keys
  Index part;                     // queries whose shares of the sinks' gradients are summed together
  Index threads;
  Strided query, key, value, sink_key, sink_value;
  const std::uint8_t* visible;    // [rows, keys] or null
  const double* log_decay;        // [rows, keys] or null; 0 for hidden keys
  const std::int64_t *sink_from, *sink_until;  // [rows, sinks]: the first query that sees it, the first that does not any more (null: none)
  const double* sink_log_decay;   // [rows, sinks]: up to before the first key
  const double* total;            // [rows, keys]: running sum of log_decay; null without decay or sinks
  Index far_queries;              // the last so many have a far part
  const void* far;                // [batch, heads x group, far_queries, E] or null
  void *out, *top;                // [batch, heads x group, queries, E]; [batch, heads x group, queries]
  // Forward, instead of out and top:
  void* y;                        // where `unsafe` is given: N / Z, [batch, heads x group, queries, E - 1], null if empty
  double constant, safe;          // normalisers below safe x |constant| x keys seen make NaN; negative: no check
  Strided count;                  // how many far keys each query with a far part sees; data null: none
  std::int64_t *unsafe, *broken;  // null, or to divide, counted up: such normalisers; blocks of keys and values that are not finite
  // Backward only:
  const void* grad;                          // like out
  void *query_grad, *key_grad, *column_grad;  // contiguous; column: of [value, 1]
  void *sink_key_grad, *sink_column_grad;    // [rows, parts, sinks, d], [rows, parts, sinks, E]
};

// What one instruction set offers.
struct Kernels {
  void (*forward)(const Problem&, bool is_double);
  void (*backward)(const Problem&, bool is_double);
  Index (*decode)(const Step&, bool is_double);  // number of unsafe normalisers; -1: the token or a gate is refused
  void (*fold)(const Fold&, bool is_double);
  void (*near_forward)(const NearProblem&, bool is_double);
  void (*near_backward)(const NearProblem&, bool is_double);
};

// Runs body(data, thread) on several threads of PyTorch's own pool, numbered from 0 (module.cpp).
void parallel(Index threads, void (*body)(void*, Index), void* data);

}  // namespace taylor
