// Tensor-core products of a warp and the loads that feed them (mma.sync and ldmatrix, sm_80 and later).
//
// Fragments, for lane l with group g = l / 4 and t = l % 4; a register holds two neighbouring 16-bit elements (low half
// first) or one tf32:
//   16-bit  A [16, 16]: a0 (g, 2t), a1 (g + 8, 2t), a2 (g, 2t + 8), a3 (g + 8, 2t + 8)   row, first column
//           B [16, 8]:  b0 (2t, g), b1 (2t + 8, g)                                       first row, column
//   tf32    A [16, 8]:  a0 (g, t), a1 (g + 8, t), a2 (g, t + 4), a3 (g + 8, t + 4)
//           B [8, 8]:   b0 (t, g), b1 (t + 4, g)
//   D [16, 8]:          d0, d1 (g, 2t), (g, 2t + 1); d2, d3 (g + 8, 2t), (g + 8, 2t + 1)
#pragma once
#include "../common/dtype.h"
#include "launch.cuh"

namespace fastdiff {
namespace cuda {
namespace {

#ifndef __CUDACC__
// The host body: every lane brings its fragments of A and B and takes its elements of the product from everybody's.
// Products are exact in double; the sum is rounded once where the tensor core truncates along the way.
template <typename Element, int kDepth>  // Element: value of (register word, which half)
inline void mma_on_host(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Element element) {
  constexpr int kPerWord = kDepth / 8;  // elements of a register
  struct Fragments {
    uint32_t a[4], b[2];
  } mine;
  memcpy(mine.a, a, sizeof a), memcpy(mine.b, b, sizeof b);
  const unsigned char* all = emu::gather(0xffffffffu, &mine, sizeof mine, __FILE__, __LINE__);
  const auto of = [&](int lane) {
    Fragments f;
    memcpy(&f, all + lane * emu::kBlob, sizeof f);
    return f;
  };
  const int g = emu::lane() / 4, t = emu::lane() % 4;
  double sum[4] = {d[0], d[1], d[2], d[3]};
  for (int k = 0; k < kDepth; ++k) {
    const int high = k / (kDepth / 2), inner = k % (kDepth / 2);  // which register, where in it
    const Fragments rows = of(4 * g + inner / kPerWord);          // holds A's rows g and g + 8 at column k
    for (int i = 0; i < 4; ++i) {
      const Fragments columns = of(4 * (2 * t + i % 2) + inner / kPerWord);
      sum[i] += static_cast<double>(element(rows.a[2 * high + i / 2], inner % kPerWord)) *
                element(columns.b[high], inner % kPerWord);
    }
  }
  for (int i = 0; i < 4; ++i) d[i] = static_cast<float>(sum[i]);
}
#endif

// d += A B, A [16, 16] and B [16, 8] of bfloat16 or float16.
template <bool kBf16>
FD_D void mma_16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDA_ARCH__
  if constexpr (kBf16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif !defined(__CUDACC__)
  const auto element = [](uint32_t word, int half) {
    const uint16_t bits = static_cast<uint16_t>(word >> 16 * half);
    return kBf16 ? to_float(bf16{bits}) : to_float(f16{bits});
  };
  mma_on_host<decltype(element), 16>(d, a, b, element);
#endif
}

// d += A B, A [16, 8] and B [8, 8] of bfloat16 or float16: the first half of the fragments of mma_16.
template <bool kBf16>
FD_D void mma_8(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
#ifdef __CUDA_ARCH__
  if constexpr (kBf16)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b));
  else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b));
#elif !defined(__CUDACC__)
  const uint32_t wide_a[4] = {a[0], a[1], 0, 0}, wide_b[2] = {b, 0};
  mma_16<kBf16>(d, wide_a, wide_b);
#endif
}

// The float32 nearest to x that tf32 can hold: 10 bits behind the point, ties away from zero.
FD_D uint32_t to_tf32(float x) {
#ifdef __CUDA_ARCH__
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
#else
  const uint32_t u = float_bits(x);
  return (u & 0x7f800000u) == 0x7f800000u ? u : (u + 0x1000u) & 0xffffe000u;
#endif
}

// d += A B, A [16, 8] and B [8, 8] of tf32.
FD_D void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDA_ARCH__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif !defined(__CUDACC__)
  const auto element = [](uint32_t word, int) { return bits_float(word & 0xffffe000u); };  // what the hardware reads
  mma_on_host<decltype(element), 8>(d, a, b, element);
#endif
}

// kCount matrices [8, 8] of 16-bit elements from shared memory: lane l names row l % 8 of matrix l / 8 (16 aligned
// bytes; lanes from 8 kCount on are not looked at), and lane l gets elements (l / 4, 2 (l % 4)) and the next of each,
// or with kTransposed elements (2 (l % 4), l / 4) and the one below.
template <int kCount, bool kTransposed = false>
FD_D void load_matrices(uint32_t (&r)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "what ldmatrix can load");
#ifdef __CUDA_ARCH__
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kCount == 4 && kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  else if constexpr (kCount == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  else if constexpr (kCount == 2 && kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(from)
                 : "memory");
  else if constexpr (kCount == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(from)
                 : "memory");
  else if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(from) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(from) : "memory");
#elif !defined(__CUDACC__)
  const int lane = emu::lane();
  uint16_t mine[8] = {};
  if (lane < 8 * kCount) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emu::fault("ldmatrix: a row is not aligned to 16 bytes");
    memcpy(mine, row, sizeof mine);
  }
  const unsigned char* all = emu::gather(0xffffffffu, mine, sizeof mine, __FILE__, __LINE__);
  const auto element = [&](int matrix, int i, int j) {
    uint16_t bits;
    memcpy(&bits, all + (8 * matrix + i) * emu::kBlob + 2 * j, 2);
    return static_cast<uint32_t>(bits);
  };
  const int g = lane / 4, t = 2 * (lane % 4);
  for (int m = 0; m < kCount; ++m)
    r[m] = kTransposed ? element(m, t, g) | element(m, t + 1, g) << 16 : element(m, g, t) | element(m, g, t + 1) << 16;
#endif
}

// A score times log2(e) scale, rounded before a maximum is subtracted: with a fused multiply-add, a score of 1e15 would
// be some 2^25 off its own maximum.
FD_D float scaled(float score, float factor) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(score, factor);
#else
  return score * factor;
#endif
}

// 2^x, relative error below 2^-22; results below 2^-126 are 0.
FD_D float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
#endif
}

}  // namespace
}  // namespace cuda
}  // namespace fastdiff
