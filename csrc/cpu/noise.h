// Normal noise by counter (common/philox.h) a vector at a time: the bits of `normals`.
//
// Bound by shuffles and loads on AVX-512, about 100 operations for 16 normals. Three passes over a few hundred words
// that stay in L1, so that each pass has independent vectors to work on while another waits:
// 1. Philox with one word in each 64-bit lane, which is where the machine multiplies 32 by 32 bits; what is left above
//    a word is never looked at. The lanes hold blocks in such an order that two unpacks give words in theirs.
// 2. Words become a row of the table and t.
// 3. A row is the four coefficients of one word: whole rows are loaded and transposed, 4 x 4.
// 16384 normals on one thread of a Zen 4: 72 us with loops left to the compiler and a gather for each coefficient, 17
// like this.
#pragma once
#include <utility>

#include "../common/philox.h"
#include "vec.h"

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_ISA {
namespace {

constexpr int kPairs = kWidth / 2;
typedef uint64_t vl __attribute__((vector_size(kWidth * 4)));

// Products of the lower words of 64-bit lanes.
inline vl product(vl a, vl b) {
#if defined(__AVX512F__)
  return (vl)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vl)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (vl)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The upper words of signed products.
inline vi product_high(vi a, vi b) {
#if defined(__AVX512F__)
  const __m512i even = _mm512_mul_epi32((__m512i)a, (__m512i)b);
  const __m512i odd = _mm512_mul_epi32(_mm512_srli_epi64((__m512i)a, 32), _mm512_srli_epi64((__m512i)b, 32));
  return (vi)_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
#elif defined(__AVX2__)
  const __m256i even = _mm256_mul_epi32((__m256i)a, (__m256i)b);
  const __m256i odd = _mm256_mul_epi32(_mm256_srli_epi64((__m256i)a, 32), _mm256_srli_epi64((__m256i)b, 32));
  return (vi)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#elif defined(__x86_64__)
  // Unsigned products; a negative factor counts 2^32 too much in them.
  const vl even = product((vl)a, (vl)b), odd = product((vl)a >> 32, (vl)b >> 32);
  return (vi)(even >> 32 | (odd & ~0xffffffffull)) - ((a >> 31) & b) - ((b >> 31) & a);
#else
  vi r;
  for (int i = 0; i < kWidth; ++i) r[i] = static_cast<int32_t>(static_cast<int64_t>(a[i]) * b[i] >> 32);
  return r;
#endif
}

// Within every 128 bits, elements of a and b in turn: the first half of each (kHigh false) or the second.
template <bool kHigh, int... I>
inline vi unpack(vi a, vi b, std::integer_sequence<int, I...>) {
  return shuffle<((I & ~3) + (I & 3) / 2 + 2 * kHigh + (I & 1) * kWidth)...>(a, b);
}
template <bool kHigh>
inline vi unpack(vi a, vi b) {
  return unpack<kHigh>(a, b, std::make_integer_sequence<int, kWidth>());
}
template <bool kHigh, int... I>
inline vl unpack(vl a, vl b, std::integer_sequence<int, I...>) {
  return shuffle<((I & ~1) + kHigh + (I & 1) * kPairs)...>(a, b);
}
template <bool kHigh>
inline vl unpack(vl a, vl b) {
  return unpack<kHigh>(a, b, std::make_integer_sequence<int, kPairs>());
}

// Rows index[0], index[4], ... of the table, side by side.
inline vi rows(const int32_t* index) {
  const auto row = [index](int i) { return reinterpret_cast<const void*>(&kNormalTable[index[i]]); };
#if defined(__AVX512F__)
  const auto part = [&row](int i) { return _mm_load_si128(static_cast<const __m128i*>(row(i))); };
  const __m512i low = _mm512_inserti32x4(_mm512_castsi128_si512(part(0)), part(4), 1);
  return (vi)_mm512_inserti32x4(_mm512_inserti32x4(low, part(8), 2), part(12), 3);
#elif defined(__AVX2__)
  const auto part = [&row](int i) { return _mm_load_si128(static_cast<const __m128i*>(row(i))); };
  return (vi)_mm256_inserti128_si256(_mm256_castsi128_si256(part(0)), part(4), 1);
#else
  vi v;
  memcpy(&v, row(0), sizeof v);
  return v;
#endif
}

// Row of the table and argument of its cubic for n words; n is a multiple of kWidth.
inline void split(const uint32_t* word, int32_t* row, int32_t* t, int n) {
#if defined(__AVX512F__)
  for (int i = 0; i < n; i += kWidth) {
    const __m512i v = _mm512_or_si512(_mm512_slli_epi32(_mm512_load_si512(word + i), 1), _mm512_set1_epi32(1));
    // As a float that was not rounded up, v is its octave's exponent and, as upper bits, its segment.
    const __m512i f = _mm512_castps_si512(_mm512_cvt_roundepu32_ps(v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC));
    const __m512i up = _mm512_sub_epi32(_mm512_srli_epi32(f, 19), _mm512_set1_epi32(127 * 16));
    const __m512i shift = _mm512_sub_epi32(_mm512_set1_epi32(163), _mm512_srli_epi32(f, 23));
    _mm512_store_si512(row + i, _mm512_xor_si512(up, _mm512_set1_epi32(31 * 16)));
    _mm512_store_si512(t + i, _mm512_xor_si512(_mm512_sllv_epi32(v, shift), _mm512_set1_epi32(INT32_MIN)));
  }
#elif defined(__AVX2__)
  for (int i = 0; i < n; i += kWidth) {
    const __m256i* const p = reinterpret_cast<const __m256i*>(word + i);
    const __m256i v = _mm256_or_si256(_mm256_slli_epi32(_mm256_load_si256(p), 1), _mm256_set1_epi32(1));
    // Leading zeros from the exponent of a float; without the bit below its leading one, v is not rounded up.
    const __m256i half = _mm256_srli_epi32(_mm256_andnot_si256(_mm256_srli_epi32(v, 1), v), 1);
    const __m256i exponent = _mm256_srli_epi32(_mm256_castps_si256(_mm256_cvtepi32_ps(half)), 23);
    const __m256i zeros = _mm256_sub_epi32(_mm256_set1_epi32(157), exponent);
    const __m256i octave = _mm256_min_epi32(zeros, _mm256_set1_epi32(31));
    const __m256i m = _mm256_sllv_epi32(v, _mm256_add_epi32(octave, _mm256_set1_epi32(1)));
    _mm256_store_si256(reinterpret_cast<__m256i*>(row + i),
                       _mm256_or_si256(_mm256_slli_epi32(octave, 4), _mm256_srli_epi32(m, 28)));
    _mm256_store_si256(reinterpret_cast<__m256i*>(t + i),
                       _mm256_xor_si256(_mm256_slli_epi32(m, 4), _mm256_set1_epi32(INT32_MIN)));
  }
#else
  for (int i = 0; i < n; ++i) {
    const uint32_t v = word[i] << 1 | 1u;
    const int octave = __builtin_clz(v);
    const uint32_t m = v << octave << 1;
    row[i] = octave * 16 + static_cast<int32_t>(m >> 28);
    t[i] = static_cast<int32_t>(m << 4 ^ 0x80000000u);
  }
#endif
}

// z[4 j + i] = word i of block first + j as a normal, for kDrawn blocks.
constexpr int kGroups = 4, kDrawn = kGroups * kPairs;
inline void draw_blocks(float* z, const Stream& s, uint32_t first) {
  vl c[4][kGroups];
  for (int g = 0; g < kGroups; ++g) {
    for (int i = 0; i < kPairs; ++i)  // lanes 0, 2, ... hold the first half of the group's blocks, in order
      c[0][g][i] = first + static_cast<uint32_t>(g * kPairs + i % 2 * (kPairs / 2) + i / 2);
    c[1][g] = vl{} + s.sample, c[2][g] = vl{} + s.offset[0], c[3][g] = vl{} + s.offset[1];
  }
  uint32_t k0 = s.key[0], k1 = s.key[1];
  for (int round = 0; round < 10; ++round) {
    for (int g = 0; g < kGroups; ++g) {
      const vl a = product(c[0][g], vl{} + 0xD2511F53u), b = product(c[2][g], vl{} + 0xCD9E8D57u);
      c[0][g] = b >> 32 ^ c[1][g] ^ (vl{} + k0), c[1][g] = b;
      c[2][g] = a >> 32 ^ c[3][g] ^ (vl{} + k1), c[3][g] = a;
    }
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  alignas(64) uint32_t word[4 * kDrawn];
  alignas(64) int32_t row[4 * kDrawn], t[4 * kDrawn];
  for (int g = 0; g < kGroups; ++g) {
    const vl p = (c[0][g] & 0xffffffffu) | c[1][g] << 32, q = (c[2][g] & 0xffffffffu) | c[3][g] << 32;
    const vl low = unpack<false>(p, q), high = unpack<true>(p, q);
    memcpy(word + g * 2 * kWidth, &low, sizeof low);
    memcpy(word + g * 2 * kWidth + kWidth, &high, sizeof high);
  }
  split(word, row, t, 4 * kDrawn);
  for (int i = 0; i < 4 * kDrawn; i += kWidth) {
    vi w, x;
    memcpy(&w, word + i, sizeof w), memcpy(&x, t + i, sizeof x);
    const vi r0 = rows(row + i), r1 = rows(row + i + 1), r2 = rows(row + i + 2), r3 = rows(row + i + 3);
    const vl a = (vl)unpack<false>(r0, r1), b = (vl)unpack<false>(r2, r3);  // coefficients 0 and 1 of all words
    const vl d = (vl)unpack<true>(r0, r1), e = (vl)unpack<true>(r2, r3);    // 2 and 3
    vi q = (vi)unpack<true>(d, e);
    q = (vi)unpack<false>(d, e) + product_high(x, q);
    q = (vi)unpack<true>(a, b) + product_high(x, q);
    q = (vi)unpack<false>(a, b) + product_high(x, q);
    const vi sign = w >> 31;
    store(z + i, __builtin_convertvector((q ^ sign) - sign, vf) * (1.0f / (1 << 28)));
  }
}

}  // namespace
}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
