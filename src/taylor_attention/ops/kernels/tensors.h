// What PyTorch's tensors are, without its C++ interface: by the table of functions that DLPack 1.2 has for this, which
// PyTorch hands out from 2.10 on (https://dmlc.github.io/dlpack). Of its structures, only what is read here is named.
#pragma once
#include <Python.h>

#include <cstdint>
#include <cstring>

namespace taylor {

struct DLTensor {
  void* data;
  std::int32_t device_type, device;
  std::int32_t axes;
  std::uint8_t kind, bits;
  std::uint16_t lanes;
  std::int64_t *shape, *strides;  // of the tensor itself, in elements
  std::uint64_t byte_offset;
};

struct DLPackExchange {
  std::uint32_t major, minor;
  DLPackExchange* older;
  void* others[3];
  int (*view)(void* object, DLTensor* view);  // owns nothing; -1: an error is set
  void* stream;
};

// The table in a capsule, or null: none, or one of another layout.
inline const DLPackExchange* open_exchange(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, "dlpack_exchange_api")) return nullptr;
  auto* exchange = static_cast<const DLPackExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  return exchange->major == 1 ? exchange : nullptr;
}

// Numbers that are the same for two rows of tensors (None among them) only if types, devices, shapes and strides are.
class Description {
 public:
  // data: where a tensor's lie, null for None.
  bool add(const DLPackExchange& exchange, PyObject* object, void** data = nullptr) {
    if (data) *data = nullptr;
    if (object == Py_None) return put(-1);
    DLTensor x;
    if (exchange.view(object, &x) != 0) return PyErr_Clear(), false;
    if (data) *data = x.data;
    bool fits = put(x.axes) && put(x.kind | x.bits << 8 | x.lanes << 16) && put(std::int64_t(x.device_type) << 32 | x.device);
    for (std::int32_t i = 0; i < x.axes; ++i) fits = fits && put(x.shape[i]) && put(x.strides[i]);
    return fits;
  }
  bool operator==(const Description& other) const {
    return count_ == other.count_ && memcmp(data_, other.data_, count_ * sizeof data_[0]) == 0;
  }
  PyObject* bytes() const { return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(data_), count_ * 8); }

 private:
  bool put(std::int64_t x) {
    if (count_ < kMost) data_[count_++] = x;
    return count_ < kMost;
  }
  static constexpr Py_ssize_t kMost = 512;
  std::int64_t data_[kMost];
  Py_ssize_t count_ = 0;
};

}  // namespace taylor
