// Rows of operands whose storage type is known at run time, read and written kVec elements at a time. Loads come back
// raw, so that a kernel issues all of them before it converts the first: the branch on the type is the same for the
// whole grid and sits around a load as a predicate, not between two loads.
//
// kVec = 8 (16 bytes of a 16-bit type, 32 of float32) and 4 (16 bytes of float32, 8 of a 16-bit type) need sd = 1 and
// aligned rows; kVec = 1 takes any stride and alignment.
#pragma once
#include "../common/dtype.h"
#include "launch.cuh"

namespace fastdiff {
namespace cuda {
namespace {

// Conversions of pairs (low half first): one instruction on the device, the portable code on the host.
FD_D void widen_pair(uint32_t w, bool is_bf16, float* lo, float* hi) {
  if (is_bf16) {
    *lo = bits_float(w << 16), *hi = bits_float(w & 0xffff0000u);
  } else {
#ifdef __CUDA_ARCH__
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(*lo), "=f"(*hi)
        : "r"(w));
#else
    *lo = to_float(f16{static_cast<uint16_t>(w)}), *hi = to_float(f16{static_cast<uint16_t>(w >> 16)});
#endif
  }
}

FD_D uint32_t narrow_pair(float lo, float hi, bool is_bf16) {
#ifdef __CUDA_ARCH__
  uint32_t w;
  if (is_bf16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(hi), "f"(lo));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(hi), "f"(lo));
  return w;
#else
  return is_bf16 ? from_float<bf16>(lo).bits | static_cast<uint32_t>(from_float<bf16>(hi).bits) << 16
                 : from_float<f16>(lo).bits | static_cast<uint32_t>(from_float<f16>(hi).bits) << 16;
#endif
}

// kVec elements as they are stored: float32 fills all words, a 16-bit type the first half of them.
template <int kVec>
struct Raw {
  uint32_t w[kVec];
};

struct Row {
  char* p;
  int64_t sd;
  int32_t dtype;
};

FD_D Row row_of(const View& v, int64_t b, int64_t n) {
  return {static_cast<char*>(v.data) + (b * v.sb + n * v.sn) * dtype_size(v.dtype), v.sd, v.dtype};
}
FD_D Row row_of(void* data, int32_t dtype, int64_t offset) {
  return {static_cast<char*>(data) + offset * dtype_size(dtype), 1, dtype};
}
FD_D Row with_type(Row r, int32_t dtype) { return {r.p, r.sd, dtype}; }

// kConst: nothing in this grid writes the operand, so its loads may pass earlier stores.
template <bool kConst, typename V>
FD_D V fetch(const char* p) {
  if constexpr (kConst)
    return __ldg(reinterpret_cast<const V*>(p));
  else
    return *reinterpret_cast<const V*>(p);
}
template <bool kConst, int kWords>
FD_D void fetch_words(uint32_t* w, const char* p) {
  if constexpr (kWords == 8) {
    fetch_words<kConst, 4>(w, p), fetch_words<kConst, 4>(w + 4, p + 16);
  } else if constexpr (kWords == 4) {
    const uint4 v = fetch<kConst, uint4>(p);
    w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
  } else if constexpr (kWords == 2) {
    const uint2 v = fetch<kConst, uint2>(p);
    w[0] = v.x, w[1] = v.y;
  } else {
    w[0] = fetch<kConst, uint32_t>(p);
  }
}

// Elements i .. i + kVec - 1 of a row.
template <int kVec, bool kConst>
FD_D Raw<kVec> load(const Row& r, int64_t i) {
  Raw<kVec> raw = {};
  const int64_t at = kVec == 1 ? i * r.sd : i;
  if (r.dtype == kF32) {
    fetch_words<kConst, kVec>(raw.w, r.p + 4 * at);
  } else if constexpr (kVec == 1) {
    raw.w[0] = fetch<kConst, uint16_t>(r.p + 2 * at);
  } else {
    fetch_words<kConst, kVec / 2>(raw.w, r.p + 2 * at);
  }
  return raw;
}

template <int kVec>
FD_D void widen(const Raw<kVec>& raw, int32_t dtype, float (&v)[kVec]) {
  if (dtype == kF32) {
#pragma unroll
    for (int k = 0; k < kVec; ++k) v[k] = bits_float(raw.w[k]);
  } else if constexpr (kVec == 1) {
    float unused;
    widen_pair(raw.w[0], dtype == kBF16, &v[0], &unused);
  } else {
#pragma unroll
    for (int k = 0; k < kVec / 2; ++k) widen_pair(raw.w[k], dtype == kBF16, &v[2 * k], &v[2 * k + 1]);
  }
}

template <int kVec>
FD_D Raw<kVec> narrow(const float (&v)[kVec], int32_t dtype) {
  Raw<kVec> raw = {};
  if (dtype == kF32) {
#pragma unroll
    for (int k = 0; k < kVec; ++k) raw.w[k] = float_bits(v[k]);
  } else if constexpr (kVec == 1) {
    raw.w[0] = narrow_pair(v[0], 0.0f, dtype == kBF16);
  } else {
#pragma unroll
    for (int k = 0; k < kVec / 2; ++k) raw.w[k] = narrow_pair(v[2 * k], v[2 * k + 1], dtype == kBF16);
  }
  return raw;
}

template <int kWords>
FD_D void put_words(char* p, const uint32_t* w) {
  if constexpr (kWords == 8) {
    put_words<4>(p, w), put_words<4>(p + 16, w + 4);
  } else if constexpr (kWords == 4) {
    *reinterpret_cast<uint4*>(p) = make_uint4(w[0], w[1], w[2], w[3]);
  } else if constexpr (kWords == 2) {
    *reinterpret_cast<uint2*>(p) = make_uint2(w[0], w[1]);
  } else {
    *reinterpret_cast<uint32_t*>(p) = w[0];
  }
}

template <int kVec>
FD_D void store(const Row& r, int64_t i, const Raw<kVec>& raw) {
  const int64_t at = kVec == 1 ? i * r.sd : i;
  if (r.dtype == kF32) {
    put_words<kVec>(r.p + 4 * at, raw.w);
  } else if constexpr (kVec == 1) {
    *reinterpret_cast<uint16_t*>(r.p + 2 * at) = static_cast<uint16_t>(raw.w[0]);
  } else {
    put_words<kVec / 2>(r.p + 2 * at, raw.w);
  }
}

// Load and convert, convert and store, where nothing is gained by keeping the two apart.
template <int kVec, bool kConst>
FD_D void read(const Row& r, int64_t i, float (&v)[kVec]) {
  widen(load<kVec, kConst>(r, i), r.dtype, v);
}
template <int kVec>
FD_D void write(const Row& r, int64_t i, const float (&v)[kVec]) {
  store(r, i, narrow(v, r.dtype));
}

// Whether an operand [B, N, D] can be read kVec elements at a time. Strides count even along axes of length 1: a sample
// sliced from a batch must take the path that the batch takes, for the same bits.
inline bool vectorizes(const View& v, int64_t D, int vec) {
  if (v.data == nullptr) return true;
  const int64_t size = dtype_size(v.dtype), bytes = vec * size < 16 ? vec * size : 16;
  return D % vec == 0 && v.sd == 1 && reinterpret_cast<uintptr_t>(v.data) % bytes == 0 && v.sb * size % bytes == 0 &&
         v.sn * size % bytes == 0;
}

}  // namespace
}  // namespace cuda
}  // namespace fastdiff
