// Storage types and their conversion to float32, the type all arithmetic is done in. Host and device.
#pragma once
#include <cstdint>
#include <cstring>

#include "../fastdiff.h"

#if defined(__CUDACC__)
#define FD_HD __host__ __device__ __forceinline__
#else
#define FD_HD inline  // everything here sits in an anonymous namespace: no weak symbols
#endif

namespace fastdiff {
namespace {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

FD_HD uint32_t float_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
FD_HD float bits_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

FD_HD float to_float(float v) { return v; }
FD_HD float to_float(bf16 v) { return bits_float(static_cast<uint32_t>(v.bits) << 16); }
FD_HD float to_float(f16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t rest = v.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // inf, nan
  // Subnormals too: 2^112 moves the exponent bias from 15 to 127, exactly.
  return bits_float(sign | float_bits(bits_float(rest << 13) * 5.192296858534828e33f));
}

// Round to nearest, ties to even; NaN stays NaN, overflow goes to infinity.
template <typename T>
FD_HD T from_float(float f);
template <>
FD_HD float from_float<float>(float f) {
  return f;
}
template <>
FD_HD bf16 from_float<bf16>(float f) {
  const uint32_t u = float_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((u >> 16) | 0x40u)};
  return bf16{static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <>
FD_HD f16 from_float<f16>(float f) {
  const uint32_t u = float_bits(f);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return f16{static_cast<uint16_t>(sign | 0x7e00u)};
  if (a >= 0x477ff000u) return f16{static_cast<uint16_t>(sign | 0x7c00u)};  // >= 65520 rounds to infinity
  if (a < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, in the low mantissa
    const uint32_t low = float_bits(bits_float(a) + 0.5f) - 0x3f000000u;
    return f16{static_cast<uint16_t>(sign | low)};
  }
  return f16{static_cast<uint16_t>(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13))};
}

FD_HD float load_as_float(const void* p, int32_t dtype, int64_t i) {
  switch (dtype) {
    case kF32:
      return static_cast<const float*>(p)[i];
    case kF16:
      return to_float(static_cast<const f16*>(p)[i]);
    default:
      return to_float(static_cast<const bf16*>(p)[i]);
  }
}

FD_HD void store_from_float(void* p, int32_t dtype, int64_t i, float v) {
  switch (dtype) {
    case kF32:
      static_cast<float*>(p)[i] = v;
      break;
    case kF16:
      static_cast<f16*>(p)[i] = from_float<f16>(v);
      break;
    default:
      static_cast<bf16*>(p)[i] = from_float<bf16>(v);
  }
}

FD_HD constexpr int64_t dtype_size(int32_t dtype) { return dtype == kF64 ? 8 : dtype == kF32 ? 4 : 2; }

}  // namespace
}  // namespace fastdiff
