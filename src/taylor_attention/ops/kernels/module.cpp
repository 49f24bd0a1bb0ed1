// The Python module: picks the instruction set, lends PyTorch's thread pool, hands plain numbers to the kernels.
//
// It knows nothing of PyTorch's C++ interface: tensors arrive as addresses and strides (ops/compiled.py checks them),
// so that one binary serves every version of PyTorch and, by the limited API, of Python.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <dlfcn.h>

#include <map>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "choose.h"
#include "layout.h"
#include "tensors.h"

namespace taylor {

namespace baseline { extern const Kernels kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
#endif

// A second pool of threads beside PyTorch's stalls both, so its own is used: GNU OpenMP's entry points, which PyTorch
// has loaded for everyone to see. Where there are none, kernels run on one thread.
using ParallelRegion = void (*)(void (*)(void*), void*, unsigned, unsigned);
using ThreadNumber = int (*)();
static const auto region = reinterpret_cast<ParallelRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
static const auto thread_number = reinterpret_cast<ThreadNumber>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));

void parallel(Index threads, void (*body)(void*, Index), void* data) {
  struct Region {
    void (*body)(void*, Index);
    void* data;
    static void enter(void* self) {
      auto* r = static_cast<Region*>(self);
      r->body(r->data, thread_number());
    }
  } all = {body, data};
  if (region && thread_number) region(all.enter, &all, static_cast<unsigned>(threads), 0);
  else body(data, 0);
}

namespace {

struct Target {
  const char* name;
  const Kernels* kernels;
};

std::vector<Target> available() {
  std::vector<Target> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2_here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2_here && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    found.push_back({"avx512", &avx512::kernels});
  if (avx2_here) found.push_back({"avx2", &avx2::kernels});
#endif
  found.push_back({"baseline", &baseline::kernels});
  return found;
}

const std::vector<Target> targets = available();
const Kernels* kernels = targets[0].kernels;

const Layout* layout_of(Index head_dim, Index degree) {  // under the interpreter's lock
  static std::map<std::pair<Index, Index>, std::unique_ptr<OwnedLayout>> known;
  auto& found = known[{head_dim, degree}];
  if (!found) found = make_layout(head_dim, degree);
  return &found->view;
}

// ---- arguments -------------------------------------------------------------------------------------------------------

// By which tensors are looked into, once Python has handed it over; null: they cannot be.
const DLPackExchange* exchange = nullptr;

PyObject* set_exchange(PyObject*, PyObject* capsule) {
  exchange = open_exchange(capsule);
  return PyBool_FromLong(exchange != nullptr);
}

// Takes one number after the other; the order is that of ops/compiled.py. A pointer is an address, or a tensor or None
// in its place.
class Numbers {
 public:
  Numbers(PyObject* const* items, Py_ssize_t count) : items_(items), count_(count) {}
  Index integer() {
    PyObject* item = take();
    return item ? PyLong_AsSsize_t(item) : 0;
  }
  double real() {
    PyObject* item = take();
    return item ? PyFloat_AsDouble(item) : 0;
  }
  template <class P> P* pointer() {
    PyObject* item = take();
    if (!item || item == Py_None) return nullptr;
    if (!exchange || PyLong_Check(item)) return static_cast<P*>(PyLong_AsVoidPtr(item));
    DLTensor x = {};
    return exchange->view(item, &x) == 0 ? static_cast<P*>(x.data) : nullptr;
  }
  Strided strided() {
    const void* data = pointer<const void>();
    const Index batch = integer(), head = integer(), token = integer();
    return {data, batch, head, token};
  }
  const Layout* layout() {
    const Index head_dim = integer(), degree = integer();
    return layout_of(head_dim, degree);
  }
  bool complete() {
    if (at_ != count_ && !PyErr_Occurred()) PyErr_Format(PyExc_TypeError, "expected %zd numbers, got %zd", at_, count_);
    return !PyErr_Occurred();
  }

 private:
  PyObject* take() {
    if (at_++ < count_) return items_[at_ - 1];
    return nullptr;
  }
  PyObject* const* items_;
  Py_ssize_t count_, at_ = 0;
};

// Runs without the interpreter's lock; memory that is not there becomes MemoryError.
template <class Work> bool run(const Work& work) {
  bool done = true;
  Py_BEGIN_ALLOW_THREADS
  try {
    work();
  } catch (const std::bad_alloc&) {
    done = false;
  }
  Py_END_ALLOW_THREADS
  if (!done) PyErr_NoMemory();
  return done;
}

Problem read_problem(Numbers& numbers) {
  Problem p = {};
  p.layout = numbers.layout();
  p.batch = numbers.integer(), p.heads = numbers.integer(), p.group = numbers.integer();
  p.queries = numbers.integer(), p.keys = numbers.integer(), p.columns = numbers.integer();
  p.chunk = numbers.integer(), p.causal = numbers.integer(), p.direct = numbers.integer();
  p.started = numbers.integer(), p.keep = numbers.integer(), p.threads = numbers.integer();
  p.query = numbers.strided(), p.key = numbers.strided(), p.value = numbers.strided();
  p.visible = numbers.pointer<const std::uint8_t>(), p.log_decay = numbers.pointer<const void>();
  p.coefficients = numbers.pointer<const void>(), p.weights = numbers.pointer<const void>();
  p.sums = numbers.pointer<void>(), p.compensation = numbers.pointer<void>(), p.history = numbers.pointer<void>();
  return p;
}

PyObject* forward(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Numbers numbers(items, count);
  const bool is_double = numbers.integer();
  Problem p = read_problem(numbers);
  p.out = numbers.pointer<void>();
  if (!numbers.complete() || !run([&] { kernels->forward(p, is_double); })) return nullptr;
  Py_RETURN_NONE;
}

PyObject* backward(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Numbers numbers(items, count);
  const bool is_double = numbers.integer();
  Problem p = read_problem(numbers);
  p.grad = numbers.pointer<const void>(), p.end_grad = numbers.pointer<const void>();
  p.query_grad = numbers.pointer<void>(), p.key_grad = numbers.pointer<void>();
  p.value_grad = numbers.pointer<void>(), p.one_grad = numbers.pointer<void>();
  p.start_grad = numbers.pointer<void>();
  if (!numbers.complete() || !run([&] { kernels->backward(p, is_double); })) return nullptr;
  Py_RETURN_NONE;
}

// The tensors of a decoding step, None among them; where tensors cannot be looked into, their addresses.
class Row {
 public:
  bool read(PyObject* tuple) {  // takes in more of them; false: they cannot be looked into
    const Py_ssize_t count = PyTuple_Size(tuple);
    if (count < 0) PyErr_Clear();
    bool good = count >= 0 && count_ + count <= kMost;
    for (Py_ssize_t i = 0; good && i < count; ++i, ++count_) {
      PyObject* item = PyTuple_GetItem(tuple, i);
      if (PyLong_Check(item)) data_[count_] = PyLong_AsVoidPtr(item);
      else good = exchange && like_.add(*exchange, item, &data_[count_]);
    }
    return good;
  }
  const Description& like() const { return like_; }  // empty for addresses
  Py_ssize_t count() const { return count_; }
  template <class P> P* next() { return static_cast<P*>(data_[at_++]); }

 private:
  static constexpr Py_ssize_t kMost = 32;
  void* data_[kMost];
  Py_ssize_t count_ = 0, at_ = 0;
  Description like_;
};

// A decoding step without its tensors, and what these are like.
struct Plan {
  static constexpr const char* kName = "taylor_attention.plan";
  static void free(PyObject* capsule) { delete static_cast<Plan*>(PyCapsule_GetPointer(capsule, kName)); }
  bool is_double;
  Step step;
  Description like;
  Py_ssize_t count;
};

PyObject* plan(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Row row;
  if (count < 2) return PyErr_Format(PyExc_TypeError, "expected 2 tuples and numbers, got %zd", count);
  if (!row.read(items[0]) || !row.read(items[1])) return PyErr_Format(PyExc_TypeError, "expected tensors of plain memory");
  Numbers numbers(items + 2, count - 2);
  const bool is_double = numbers.integer();
  Step s = {};
  s.layout = numbers.layout();
  s.batch = numbers.integer(), s.heads = numbers.integer(), s.group = numbers.integer();
  s.columns = numbers.integer(), s.width = numbers.integer(), s.threads = numbers.integer();
  s.scale = numbers.real(), s.safe = numbers.real(), s.limit = numbers.real();
  s.coefficients = numbers.pointer<const void>(), s.weights = numbers.pointer<const void>();
  s.fitting.largest_variance = numbers.real(), s.fitting.safe = numbers.real(), s.fitting.rounding = numbers.real();
  for (Strided* x : {&s.query, &s.key, &s.value}) x->batch = numbers.integer(), x->head = numbers.integer();
  s.visible_stride = numbers.integer();
  s.gates.is_double = numbers.integer(), s.gates.batch = numbers.integer(), s.gates.head = numbers.integer();
  s.gates.reset = numbers.real();
  for (Slots* part : {&s.near.ring, &s.near.sinks, &s.near.heavy}) part->width = numbers.integer();
  s.near.safe = numbers.real();
  if (!numbers.complete()) return nullptr;
  return PyCapsule_New(new Plan{is_double, s, row.like(), row.count()}, Plan::kName, Plan::free);
}

void take_tensors(Row& row, Step& s) {
  for (Strided* x : {&s.query, &s.key, &s.value}) x->data = row.next<const void>();
  s.visible = row.next<const std::uint8_t>(), s.gates.data = row.next<const void>();
  s.far_gain = row.next<const void>(), s.sums = row.next<const void>();
  row.next<void>();  // the compensation: only folding changes it
  s.tokens = row.next<std::int64_t>(), s.log_decay = row.next<double>();
  s.tail_key = row.next<void>(), s.tail_value = row.next<void>(), s.tail_log_decay = row.next<double>();
  if (s.near.ring.width + s.near.sinks.width == 0) return;
  const auto take = [&](Slots& part) {
    part.key = row.next<void>(), part.value = row.next<void>(), part.log_decay = row.next<double>();
  };
  take(s.near.ring);
  s.near.received = row.next<double>();
  take(s.near.sinks), take(s.near.heavy);
  s.near.priority = row.next<double>();
}

// By a plan: the inputs and the state's tensors, the tail's slot for the token, the output. None, and nothing is done, if
// the plan is for tensors that are not like these.
PyObject* decode(PyObject*, PyObject* const* items, Py_ssize_t count) {
  if (count != 5) return PyErr_Format(PyExc_TypeError, "expected 5 numbers, got %zd", count);
  const auto* planned = static_cast<const Plan*>(PyCapsule_GetPointer(items[0], Plan::kName));
  Row row;
  if (!planned) return nullptr;
  if (!row.read(items[1]) || !row.read(items[2])) Py_RETURN_NONE;
  if (row.count() != planned->count || !(row.like() == planned->like)) Py_RETURN_NONE;
  Numbers numbers(items + 3, count - 3);
  Step s = planned->step;
  s.position = numbers.integer(), s.out = numbers.pointer<void>();
  take_tensors(row, s);
  Index unsafe = 0;
  if (!numbers.complete() || !run([&] { unsafe = kernels->decode(s, planned->is_double); })) return nullptr;
  return PyLong_FromSsize_t(unsafe);
}

PyObject* fold(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Numbers numbers(items, count);
  const bool is_double = numbers.integer();
  Fold f = {};
  f.layout = numbers.layout();
  f.rows = numbers.integer(), f.columns = numbers.integer(), f.width = numbers.integer();
  f.length = numbers.integer(), f.threads = numbers.integer();
  f.sums = numbers.pointer<void>(), f.compensation = numbers.pointer<void>();
  f.tail_key = numbers.pointer<const void>(), f.tail_value = numbers.pointer<const void>();
  f.tail_log_decay = numbers.pointer<const double>();
  if (!numbers.complete() || !run([&] { kernels->fold(f, is_double); })) return nullptr;
  Py_RETURN_NONE;
}

NearProblem read_near(Numbers& numbers) {
  NearProblem p = {};
  for (Index* x : {&p.batch, &p.heads, &p.group, &p.queries, &p.keys, &p.sinks, &p.head_dim, &p.columns, &p.window,
                   &p.part, &p.threads})
    *x = numbers.integer();
  for (Strided* x : {&p.query, &p.key, &p.value, &p.sink_key, &p.sink_value}) *x = numbers.strided();
  p.visible = numbers.pointer<const std::uint8_t>(), p.log_decay = numbers.pointer<const double>();
  p.sink_from = numbers.pointer<const std::int64_t>(), p.sink_until = numbers.pointer<const std::int64_t>();
  p.sink_log_decay = numbers.pointer<const double>();
  p.total = numbers.pointer<const double>();
  return p;
}

PyObject* near_forward(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Numbers numbers(items, count);
  const bool is_double = numbers.integer();
  NearProblem p = read_near(numbers);
  p.far_queries = numbers.integer(), p.far = numbers.pointer<const void>();
  p.out = numbers.pointer<void>(), p.top = numbers.pointer<void>();
  if (!numbers.complete() || !run([&] { kernels->near_forward(p, is_double); })) return nullptr;
  Py_RETURN_NONE;
}

PyObject* near_divide(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Numbers numbers(items, count);
  const bool is_double = numbers.integer();
  NearProblem p = read_near(numbers);
  p.far_queries = numbers.integer(), p.far = numbers.pointer<const void>();
  p.y = numbers.pointer<void>();
  p.constant = numbers.real(), p.safe = numbers.real();
  p.count = numbers.strided();
  std::int64_t unsafe = 0, broken = 0;
  p.unsafe = &unsafe, p.broken = &broken;
  if (!numbers.complete() || !run([&] { kernels->near_forward(p, is_double); })) return nullptr;
  return Py_BuildValue("LL", static_cast<long long>(unsafe), static_cast<long long>(broken));
}

PyObject* near_backward(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Numbers numbers(items, count);
  const bool is_double = numbers.integer();
  NearProblem p = read_near(numbers);
  p.top = numbers.pointer<void>(), p.grad = numbers.pointer<const void>(), p.query_grad = numbers.pointer<void>();
  p.key_grad = numbers.pointer<void>(), p.column_grad = numbers.pointer<void>();
  p.sink_key_grad = numbers.pointer<void>(), p.sink_column_grad = numbers.pointer<void>();
  if (!numbers.complete() || !run([&] { kernels->near_backward(p, is_double); })) return nullptr;
  Py_RETURN_NONE;
}

PyObject* choose_holders(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Numbers numbers(items, count);
  Contest c = {};
  c.rows = numbers.integer(), c.count = numbers.integer(), c.places = numbers.integer();
  const std::int64_t never = numbers.integer();
  c.priority = numbers.pointer<const double>(), c.leaves = numbers.pointer<const std::uint8_t>();
  c.held = numbers.pointer<double>();
  c.leaver = numbers.pointer<std::int64_t>(), c.until = numbers.pointer<std::int64_t>();
  c.holder = numbers.pointer<std::int64_t>();
  if (!numbers.complete() || !run([&] { choose(c, never); })) return nullptr;
  Py_RETURN_NONE;
}

PyObject* describe(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Description found;
  bool good = exchange != nullptr;
  for (Py_ssize_t i = 0; good && i < count; ++i) good = found.add(*exchange, items[i]);
  if (good) return found.bytes();
  Py_RETURN_NONE;
}

PyObject* list_targets(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const Target& target : targets) {
    PyObject* name = PyUnicode_FromString(target.name);
    if (!names || !name || PyList_Append(names, name)) return nullptr;
    Py_DECREF(name);
  }
  return names;
}

PyObject* use_target(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (!bytes) return nullptr;
  const std::string wanted = PyBytes_AsString(bytes);
  Py_DECREF(bytes);
  for (const Target& target : targets)
    if (wanted == target.name) {
      kernels = target.kernels;
      Py_RETURN_NONE;
    }
  PyErr_Format(PyExc_ValueError, "no such target on this machine: %U", name);
  return nullptr;
}

template <class F> PyCFunction as_method(F function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"forward", as_method(forward), METH_FASTCALL, "Attention of whole sequences."},
    {"backward", as_method(backward), METH_FASTCALL, "Gradients of `forward`."},
    {"plan", as_method(plan), METH_FASTCALL, "A decoding step for inputs and tensors of states like these, tuples."},
    {"decode", as_method(decode), METH_FASTCALL, "Append one token and attend; the number of unsafe normalisers."},
    {"fold", as_method(fold), METH_FASTCALL, "Add the tails of states to their moments."},
    {"near_forward", as_method(near_forward), METH_FASTCALL, "Exact attention to a window and to sinks."},
    {"near_divide", as_method(near_divide), METH_FASTCALL, "The same, divided; how many normalisers are unsafe, and inputs broken."},
    {"near_backward", as_method(near_backward), METH_FASTCALL, "Gradients of `near_forward`."},
    {"choose", as_method(choose_holders), METH_FASTCALL, "Who holds a few places, as tokens leave the window."},
    {"exchange", set_exchange, METH_O, "Read tensors by a capsule of DLPack's functions; None: not at all."},
    {"describe", as_method(describe), METH_FASTCALL, "What tensors have in common with equal ones; None: they cannot be read."},
    {"targets", list_targets, METH_NOARGS, "Instruction sets that this machine has, best first."},
    {"use", use_target, METH_O, "Use the kernels for one of `targets()`; the best one is used without this."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernels", "Compiled CPU kernels.", -1, methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace taylor

PyMODINIT_FUNC PyInit__kernels() { return PyModule_Create(&taylor::definition); }
