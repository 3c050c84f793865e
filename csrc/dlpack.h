// Reads torch tensors without torch headers: DLPack's C exchange table (data-apis "C exchange API", DLPack 1.2+), which
// torch >= 2.10 hangs on torch.Tensor. Filling in a description costs ~20 ns against ~0.5 us for the same attributes
// through Python. Only the part of the ABI that is used here is declared; where the table is missing, callers take the
// ordinary route.
#pragma once
#include <cstdint>

#include "fastdiff.h"

namespace fastdiff {
namespace dlpack {

struct Device {
  int32_t type, id;  // type 1: CPU, 2: CUDA
};
struct DataType {
  uint8_t code, bits;  // code 2: IEEE float, 4: bfloat
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;

  bool contiguous() const {
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  bool same_shape(const Tensor& o) const {
    if (ndim != o.ndim) return false;
    for (int i = 0; i < ndim; ++i)
      if (shape[i] != o.shape[i]) return false;
    return true;
  }
  bool same_device(const Tensor& o) const { return device.type == o.device.type && device.id == o.device.id; }
  void* pointer() const { return static_cast<char*>(data) + byte_offset; }
  // The address range of the elements.
  void span(const char** begin, const char** end) const {
    int64_t last = 0;
    for (int i = 0; i < ndim; ++i) last += (shape[i] - 1) * strides[i];
    *begin = static_cast<const char*>(pointer());
    *end = *begin + (last + 1) * (dtype.bits / 8);
  }
  bool overlaps(const Tensor& o) const {
    const char *a, *b, *c, *d;
    span(&a, &b), o.span(&c, &d);
    return a < d && c < b;
  }
  // The same elements in the same places; both contiguous, of one shape.
  bool same_memory(const Tensor& o) const {
    return pointer() == o.pointer() && dtype.bits == o.dtype.bits && dtype.code == o.dtype.code && contiguous() &&
           o.contiguous() && same_shape(o);
  }
  // The kernels' code for the element type, or -1.
  int32_t code() const {
    if (dtype.lanes != 1) return -1;
    if (dtype.code == 2) return dtype.bits == 32 ? kF32 : dtype.bits == 16 ? kF16 : -1;
    return dtype.code == 4 && dtype.bits == 16 ? kBF16 : -1;
  }
};

struct ExchangeTable {
  uint32_t major, minor;
  void* previous;
  void* allocate;
  void* from_object;
  void* to_object;
  int (*describe)(void* object, Tensor* out);  // 0 on success; else a Python error is set
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace dlpack
}  // namespace fastdiff
