// One vector of floats, as wide as the instruction set this file is compiled for, and typed loads and stores.
// GCC/Clang vector extensions: arithmetic is written with operators and contracts to FMA (-ffp-contract=fast).
#pragma once
#include <cstdlib>

#include "../common/dtype.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float vf __attribute__((vector_size(kWidth * 4)));
typedef uint32_t vu __attribute__((vector_size(kWidth * 4)));
typedef int32_t vi __attribute__((vector_size(kWidth * 4)));
typedef uint16_t vh __attribute__((vector_size(kWidth * 2)));

// Elements I... of a and b side by side. GCC 11 does not know the builtin of GCC 12 and Clang.
template <int... I, typename V>
inline V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  typedef decltype(a < a) Mask;
  return __builtin_shuffle(a, b, Mask{I...});
#endif
}

inline vf splat(float f) { return vf{} + f; }

inline vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vf v) { memcpy(p, &v, sizeof v); }

// a * b + c in one rounding where the set has the instruction. Sums of products use it by name: left to the compiler,
// a vectorised loop and its scalar remainder may round differently from one copy of the code to the next.
#if defined(__AVX512F__)
inline vf madd(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__FMA__)
inline vf madd(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
inline vf madd(vf a, vf b, vf c) { return a * b + c; }
#endif
#if defined(__FMA__) || defined(__aarch64__)
inline float madd(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
inline float madd(float a, float b, float c) { return a * b + c; }
#endif

// A float row that is written around the caches: no line is read just to be overwritten, which saves a third of the
// traffic of a store. Needs vector-aligned memory and a fence() before anyone else may look.
struct Streamed {
  float* p;
};
#if defined(__AVX512F__)
inline void store(Streamed s, int64_t i, vf v) { _mm512_stream_ps(s.p + i, (__m512)v); }
#elif defined(__AVX2__)
inline void store(Streamed s, int64_t i, vf v) { _mm256_stream_ps(s.p + i, (__m256)v); }
#elif defined(__x86_64__)
inline void store(Streamed s, int64_t i, vf v) { _mm_stream_ps(s.p + i, (__m128)v); }
#else
inline void store(Streamed s, int64_t i, vf v) { store(s.p + i, v); }
#endif
// An output larger than this does not stay in L2 anyway. Measured on a chain of gate_residual_adaln and Linear at
// D = 1152, float32: +1 % end to end from 9 MB and nothing either way at 5 MB, while the op alone gains 10 to 20 %; at
// 2 MB and less the reader that follows pays more than the op gains.
// From 32 MB on glibc hands out fresh pages every time; the kernel has just cleared them in cache, and going around it
// costs 10 %.
inline bool worth_streaming(int64_t bytes) { return bytes >= (4 << 20) && bytes < (32 << 20); }
inline void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}
inline bool can_stream(const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(vf) == 0; }

inline vf load(const bf16* p) {
  vh h;
  memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}
inline void store(bf16* p, vf v) {
  const vu u = (vu)v;
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu quiet = (u >> 16) | 0x40u;
  const vu nan = (vu)(v != v);
  const vh h = __builtin_convertvector((nan & quiet) | (~nan & rounded), vh);
  memcpy(p, &h, sizeof h);
}

inline vf load(const f16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf v;
  for (int i = 0; i < kWidth; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
inline void store(f16* p, vf v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kWidth; ++i) p[i] = from_float<f16>(v[i]);
#endif
}

inline float sum(vf v) {
  float s = 0;
  for (int w = kWidth / 2; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) v[i] += v[i + w];
  s = v[0];
  return s;
}

// Loads one vector or one element, by the type of the last argument; lets a formula be written once.
template <typename T>
inline vf pick(const T* p, int64_t i, vf) {
  return load(p + i);
}
template <typename T>
inline float pick(const T* p, int64_t i, float) {
  return to_float(p[i]);
}
template <typename T>
inline void put(T* p, int64_t i, vf v) {
  store(p + i, v);
}
template <typename T>
inline void put(T* p, int64_t i, float v) {
  p[i] = from_float<T>(v);
}
inline void put(Streamed s, int64_t i, vf v) { store(s, i, v); }
inline void put(Streamed s, int64_t i, float v) { s.p[i] = v; }

template <typename T>
inline void widen(float* out, const T* in, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, load(in + i));
  for (; i < n; ++i) out[i] = to_float(in[i]);
}
template <typename T>
inline void narrow(T* out, const float* in, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, load(in + i));
  for (; i < n; ++i) out[i] = from_float<T>(in[i]);
}

// n elements of any storage type, `stride` apart, as contiguous floats.
inline void widen(float* out, const void* in, int32_t dtype, int64_t n, int64_t stride) {
  if (stride != 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = load_as_float(in, dtype, i * stride);
  } else if (dtype == kF32) {
    memcpy(out, in, static_cast<size_t>(n) * 4);
  } else if (dtype == kF16) {
    widen(out, static_cast<const f16*>(in), n);
  } else {
    widen(out, static_cast<const bf16*>(in), n);
  }
}
inline void narrow(void* out, const float* in, int32_t dtype, int64_t n, int64_t stride) {
  if (stride != 1) {
    for (int64_t i = 0; i < n; ++i) store_from_float(out, dtype, i * stride, in[i]);
  } else if (dtype == kF32) {
    memcpy(out, in, static_cast<size_t>(n) * 4);
  } else if (dtype == kF16) {
    narrow(static_cast<f16*>(out), in, n);
  } else {
    narrow(static_cast<bf16*>(out), in, n);
  }
}

inline char* at(void* data, int32_t dtype, int64_t offset) {
  return static_cast<char*>(data) + offset * dtype_size(dtype);
}

}  // namespace
}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
