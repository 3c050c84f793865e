// The dot product of bf16 pairs (AVX512_BF16), by the instruction or, where FASTDIFF_SOFT_DOT is defined, by a body
// that computes the same: so that a machine without the instruction can run the kernels that are made of it (tests
// only).
//
// Arithmetic, from the operation section of Intel's manual (SDM vol. 2, VDPBF16PS and VCVTNE2PS2BF16): for every 32-bit
// lane, first the upper elements and then the lower ones,
//     acc += a.high * b.high;   acc += a.low * b.low
// each a fused multiply-add to float32, rounded to nearest even whatever MXCSR says; subnormal a, b and acc count as
// zero and a subnormal result becomes zero, sign kept. The conversion rounds to nearest even, takes a subnormal for
// zero and leaves NaN a NaN. Not known from the manual, and no matter here: which of two NaN payloads survives, and
// whether a sum that rounding lifts to 2^-126 counts as subnormal (here it does not).
#pragma once
#include "attention.h"

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_ISA {
namespace {

// Two neighbouring bf16 elements in every lane.
FD_INLINE vu broadcast_pair(const uint16_t* p) {
  uint32_t word;
  memcpy(&word, p, sizeof word);
  return word - vu{};
}

#if !defined(FASTDIFF_SOFT_DOT)

// In place, by name: see accumulate().
FD_INLINE void dot(vf& acc, vu a, vu b) { __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }

// bf16 of even[l] in the lower half of lane l, of odd[l] in the upper one.
FD_INLINE vu rounded_pair(vf even, vf odd) {
  const __m512i x = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);  // all of even, then all of odd
  const __m512i lanes =
      _mm512_set_epi32(0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008, 0x170007,
                       0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
  return (vu)_mm512_permutexvar_epi16(lanes, x);
}

#else

FD_INLINE vf flushed(vf x) {
  const vu u = (vu)x, subnormal = (vu)((u & 0x7fffffffu) < 0x00800000u);
  return (vf)(u & (~subnormal | 0x80000000u));
}
FD_INLINE vf fused(vf a, vf b, vf c) {
#if defined(__FMA__)
  return madd(a, b, c);
#else
  for (int i = 0; i < kWidth; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);  // libm's: exact too, but slow
  return c;
#endif
}
FD_INLINE void dot(vf& acc, vu a, vu b) {
  const vf high = fused(flushed((vf)(a & 0xffff0000u)), flushed((vf)(b & 0xffff0000u)), flushed(acc));
  acc = flushed(fused(flushed((vf)(a << 16)), flushed((vf)(b << 16)), flushed(high)));
}
FD_INLINE vu bf16_bits(vf x) {
  const vu u = (vu)x, nan = (vu)(x != x), subnormal = (vu)((u & 0x7fffffffu) < 0x00800000u);
  const vu nearest = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16, quiet = (u >> 16) | 0x40u, zero = (u >> 16) & 0x8000u;
  return (nan & quiet) | (subnormal & zero) | (~nan & ~subnormal & nearest);
}
FD_INLINE vu rounded_pair(vf even, vf odd) { return bf16_bits(even) | bf16_bits(odd) << 16; }

#endif

// acc[r][v] += the dot product over t of pairs a(r, t) with pairs b[t * ldb + v]: multiply() of attention.h with two
// elements a step. a, its stride and t count bf16 elements and pairs of them, b counts 32-bit lanes.
template <int R, int V, bool kAlong>
FD_INLINE void multiply_pairs(int64_t depth, const uint16_t* a, int64_t stride, int64_t valid, const float* b,
                              int64_t ldb, vf (&acc)[R][V]) {
  const uint16_t* row[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) row[r] = kAlong ? a + (r < valid ? r : valid - 1) * stride : a + 2 * r;
#pragma GCC unroll 1
  for (int64_t t = 0; t < depth; ++t) {
    vu bv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) bv[v] = (vu)load(b + v * kWidth);
    b += ldb;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vu s = broadcast_pair(kAlong ? row[r] + 2 * t : a + 2 * r);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) dot(acc[r][v], s, bv[v]);
    }
    if (!kAlong) a += stride;
  }
}

// ------------------------------------------------------------------------------------------------------ rows in, pairs

// Rows [first, first + count) of a bf16 operand [B, H, tokens, d], `ld` elements apart and zero from d on. What a
// prologue makes of a row is float32 and is rounded to bf16; `row` [ld] is where.
inline void pairs_in(uint16_t* out, int64_t ld, const Strided& t, int64_t b, int64_t h, int64_t first, int64_t count,
                     int64_t d, const Prologue* p, float* row, float* scratch) {
  const int64_t step = t.s[3];
  for (int64_t n = 0; n < count; ++n, out += ld) {
    const auto* from =
        reinterpret_cast<const uint16_t*>(at(t.data, kBF16, b * t.s[0] + h * t.s[1] + (first + n) * t.s[2]));
    if (p) {
      widen(row, from, kBF16, d, step);
      prepare(row, first + n, d, *p, scratch);
      narrow(out, row, kBF16, d, 1);
    } else if (step == 1) {
      memcpy(out, from, static_cast<size_t>(d) * 2);
    } else {
      for (int64_t c = 0; c < d; ++c) out[c] = from[c * step];
    }
    memset(out + d, 0, static_cast<size_t>(ld - d) * 2);
  }
}

// out[(j / 2) * ld + c] = the pair (t[j, c], t[j + 1, c]) for even j < count, c < d; zeros beyond both.
inline void interleaved_in(uint16_t* out, int64_t ld, const Strided& t, int64_t b, int64_t h, int64_t first,
                           int64_t count, int64_t d) {
  const int64_t step = t.s[3];
  for (int64_t j = 0; j < count; j += 2, out += 2 * ld) {
    const auto* even =
        reinterpret_cast<const uint16_t*>(at(t.data, kBF16, b * t.s[0] + h * t.s[1] + (first + j) * t.s[2]));
    const bool both = j + 1 < count;
    const uint16_t* odd = both ? even + t.s[2] : even;
    const uint32_t keep = both ? 0xffff0000u : 0;
    int64_t c = 0;
    if (step == 1)
      for (; c + kWidth <= d; c += kWidth) {
        vh x, y;
        memcpy(&x, even + c, sizeof x), memcpy(&y, odd + c, sizeof y);
        const vu pair = __builtin_convertvector(x, vu) | (__builtin_convertvector(y, vu) << 16 & keep);
        memcpy(out + 2 * c, &pair, sizeof pair);
      }
    for (; c < d; ++c) out[2 * c] = even[c * step], out[2 * c + 1] = both ? odd[c * step] : uint16_t{0};
    memset(out + 2 * d, 0, static_cast<size_t>(ld - d) * 4);
  }
}

// out[c * kQueries + l] = pair c of row l, c < pairs (rounded up to 4, which ld leaves room for), l < lanes.
inline void pairs_to_lanes(float* out, const uint16_t* rows, int64_t ld, int64_t pairs, int64_t lanes) {
  const int64_t words = ld / 2;
  const float* from = reinterpret_cast<const float*>(rows);  // moved, never computed with
  for (int64_t l = 0; l < lanes; l += kWidth)
    for (int64_t c = 0; c < pairs; c += 4) {
      vf x[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) x[i] = gather4(from + (l + i) * words + c, words);
      transpose4(x);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) store(out + (c + j) * kQueries + l, x[j]);
    }
}

}  // namespace
}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
