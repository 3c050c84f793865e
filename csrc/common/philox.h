// Normal noise by counter: the same bits on every CPU, every instruction set and every GPU.
//
// Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3") maps a counter and a
// key to four random words. Each word becomes a standard normal by inversion: its top bit is the sign, the others say
// p = (2 k + 1) 2^-33 in (0, 1/2), and z with P(Z > z) = p is a cubic in what remains of p below its leading bit and
// the next four, in units of 2^-28. All of it is integer arithmetic, so neither a libm nor a fused multiply-add can
// show; the last step, an integer to float32, is rounded alike everywhere. Error below 2e-8, |z| <= 6.34.
//
// Element i of sample b draws word i % 4 of counter (i / 4, b, offset), key = seed.
#pragma once
#include "dtype.h"

namespace fastdiff {
namespace {

#if defined(__CUDACC__)
#define FD_TABLE __device__ const
#define FD_TABLE_HD __device__ __forceinline__
#else
#define FD_TABLE constexpr
#define FD_TABLE_HD inline
#endif

struct alignas(16) Cubic {
  int32_t c[4];
};
FD_TABLE Cubic kNormalTable[512] = {
#include "normal_table.h"
};

// All that one sample's noise depends on.
struct Stream {
  uint32_t key[2];
  uint32_t sample;
  uint32_t offset[2];
};

FD_HD void philox(uint32_t (&c)[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c[0], b = static_cast<uint64_t>(0xCD9E8D57u) * c[2];
    const uint32_t c0 = static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, c2 = static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1;
    c[0] = c0, c[1] = static_cast<uint32_t>(b), c[2] = c2, c[3] = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
}

FD_TABLE_HD float normal(uint32_t word) {
  const uint32_t v = word << 1 | 1u;  // p = v 2^-33
#ifdef __CUDA_ARCH__
  const int octave = __clz(static_cast<int>(v));
#else
  const int octave = __builtin_clz(v);
#endif
  const uint32_t m = v << octave << 1;  // what follows the leading bit: 4 bits of segment, then t + 1/2
  const Cubic row = kNormalTable[octave * 16 + static_cast<int>(m >> 28)];
  const int64_t t = static_cast<int32_t>(m << 4 ^ 0x80000000u);
  int32_t z = row.c[3];
  for (int i = 2; i >= 0; --i) z = row.c[i] + static_cast<int32_t>(t * z >> 32);
  return static_cast<float>(word >> 31 ? -z : z) * (1.0f / (1 << 28));
}

// Elements 4 * block .. 4 * block + 3 of a sample.
FD_TABLE_HD void normals(const Stream& s, uint32_t block, float (&z)[4]) {
  uint32_t c[4] = {block, s.sample, s.offset[0], s.offset[1]};
  philox(c, s.key[0], s.key[1]);
  for (int i = 0; i < 4; ++i) z[i] = normal(c[i]);
}

}  // namespace
}  // namespace fastdiff
