// What the forward and the backward kernel of attention share: the register tile, 2^x, and rows in and out.
//
// Queries live in the lanes of a vector. A tile of kQueries = 3 vectors of queries stands against all keys, so that the
// maximum, the sum and the rescaling of the online softmax are per lane and need no reduction across a vector, K and V
// are read as they lie (their elements are broadcast, nothing is transposed or padded: a head dim of 72 costs 72), and
// a query's arithmetic does not depend on its neighbours.
#pragma once
#include "isa.h"
#include "parallel.h"
#include "vec.h"

#define FD_INLINE inline __attribute__((always_inline))

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 8;  // 8 x 3 accumulators of 32 registers
#else
constexpr int kRows = 4;  // 4 x 3 accumulators of 16 registers
#endif
constexpr int kVectors = 3;
constexpr int kQueries = kVectors * kWidth;
constexpr int kKeys = 64;  // keys of one step of the online softmax: 64 x kQueries scores stay in L1

inline int64_t rounded(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Every lane *p.
#if defined(__AVX512F__)
FD_INLINE vf broadcast(const float* p) { return (vf)_mm512_set1_ps(*p); }
#elif defined(__AVX2__)
FD_INLINE vf broadcast(const float* p) { return (vf)_mm256_broadcast_ss(p); }
#else
FD_INLINE vf broadcast(const float* p) { return *p - vf{}; }
#endif

FD_INLINE vf larger(vf a, vf b) { return a > b ? a : b; }

// 2^x for x <= 0 (also a little above), relative error <= 1.5e-7; 2^0 is exactly 1, NaN stays NaN, and what would be
// below 2^-125 is 0: subnormal factors would make every product with them take a microcode assist.
// x = n + r with 0 <= r < 1, a degree-5 minimax polynomial of r that is exact at 0, and n added to the exponent.
FD_INLINE vf exp2(vf x) {
  const vf tiny = vf{} - 125.0f;
#if defined(__AVX512F__)
  const vf r = (vf)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x), no exceptions
#else
  const vf magic = vf{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const vf bounded = x > tiny ? x : tiny;
  const vf shifted = (bounded - 0.5f) + magic;
  const vf r = bounded - (shifted - magic);
#endif
  vf p = vf{} + 0.0018671402940526605f;
  p = madd(p, r, vf{} + 0.009017007425427437f);
  p = madd(p, r, vf{} + 0.0557999312877655f);
  p = madd(p, r, vf{} + 0.24016444385051727f);
  p = madd(p, r, vf{} + 0.6931512951850891f);
  p = madd(p, r, vf{} + 1.0f);
#if defined(__AVX512F__)
  const __mmask16 keep = _mm512_cmp_ps_mask((__m512)x, (__m512)tiny, _CMP_NLT_UQ);  // NaN too
  return (vf)_mm512_maskz_scalef_ps(keep, (__m512)p, (__m512)x);
#else
  const vf y = (vf)((vi)p + (((vi)shifted - (vi)magic) << 23));
  const vf z = x >= tiny ? y : vf{};
  return x == x ? z : x;
#endif
}

// acc += a * b, in place: left to itself, GCC 12 copies half of a tile's accumulators in every step of the inner loop.
FD_INLINE void accumulate(vf& acc, vf a, vf b) {
#if defined(__FMA__)
  __asm__("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
#else
  acc = madd(a, b, acc);
#endif
}

// acc[r][v] += sum_t a(r, t) * b[t * ldb + v], the tile everything here is made of.
// kAlong: a(r, t) = a[r * stride + t], rows beyond `valid` repeat the last valid one (results to be ignored).
// else:   a(r, t) = a[t * stride + r].
template <int R, int V, bool kAlong>
FD_INLINE void multiply(int64_t depth, const float* a, int64_t stride, int64_t valid, const float* b, int64_t ldb,
                        vf (&acc)[R][V]) {
  const float* row[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) row[r] = kAlong ? a + (r < valid ? r : valid - 1) * stride : a + r;
#pragma GCC unroll 1
  for (int64_t t = 0; t < depth; ++t) {
    vf bv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) bv[v] = load(b + v * kWidth);
    b += ldb;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf s = kAlong ? broadcast(row[r] + t) : broadcast(a + r);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) accumulate(acc[r][v], s, bv[v]);
    }
    if (!kAlong) a += stride;
  }
}

// ------------------------------------------------------------------------------------------------------ rows in, out

// 4 x 4 blocks transposed: lane 4 g + i of out[j] is lane 4 g + j of x[i].
FD_INLINE void transpose4(vf (&x)[4]) {
#if defined(__AVX512F__)
  const __m512 a = _mm512_unpacklo_ps((__m512)x[0], (__m512)x[1]), b = _mm512_unpackhi_ps((__m512)x[0], (__m512)x[1]);
  const __m512 c = _mm512_unpacklo_ps((__m512)x[2], (__m512)x[3]), d = _mm512_unpackhi_ps((__m512)x[2], (__m512)x[3]);
  x[0] = (vf)_mm512_shuffle_ps(a, c, 0x44), x[1] = (vf)_mm512_shuffle_ps(a, c, 0xee);
  x[2] = (vf)_mm512_shuffle_ps(b, d, 0x44), x[3] = (vf)_mm512_shuffle_ps(b, d, 0xee);
#elif defined(__AVX2__)
  const __m256 a = _mm256_unpacklo_ps((__m256)x[0], (__m256)x[1]), b = _mm256_unpackhi_ps((__m256)x[0], (__m256)x[1]);
  const __m256 c = _mm256_unpacklo_ps((__m256)x[2], (__m256)x[3]), d = _mm256_unpackhi_ps((__m256)x[2], (__m256)x[3]);
  x[0] = (vf)_mm256_shuffle_ps(a, c, 0x44), x[1] = (vf)_mm256_shuffle_ps(a, c, 0xee);
  x[2] = (vf)_mm256_shuffle_ps(b, d, 0x44), x[3] = (vf)_mm256_shuffle_ps(b, d, 0xee);
#else
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < i; ++j) {
      const float swap = x[i][j];
      x[i][j] = x[j][i], x[j][i] = swap;
    }
#endif
}

// Four neighbours of each of kWidth / 4 rows, one 128-bit part of a vector each; the rows are 4 * ld apart.
FD_INLINE vf gather4(const float* p, int64_t ld) {
#if defined(__AVX512F__)
  const __m512 low = _mm512_insertf32x4(_mm512_castps128_ps512(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * ld), 1);
  return (vf)_mm512_insertf32x4(_mm512_insertf32x4(low, _mm_loadu_ps(p + 8 * ld), 2), _mm_loadu_ps(p + 12 * ld), 3);
#elif defined(__AVX2__)
  return (vf)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * ld), 1);
#else
  (void)ld;
  return load(p);
#endif
}
FD_INLINE void scatter4(float* p, int64_t ld, vf v) {
#if defined(__AVX512F__)
  _mm_storeu_ps(p, _mm512_castps512_ps128((__m512)v));
  _mm_storeu_ps(p + 4 * ld, _mm512_extractf32x4_ps((__m512)v, 1));
  _mm_storeu_ps(p + 8 * ld, _mm512_extractf32x4_ps((__m512)v, 2));
  _mm_storeu_ps(p + 12 * ld, _mm512_extractf32x4_ps((__m512)v, 3));
#elif defined(__AVX2__)
  _mm_storeu_ps(p, _mm256_castps256_ps128((__m256)v));
  _mm_storeu_ps(p + 4 * ld, _mm256_extractf128_ps((__m256)v, 1));
#else
  (void)ld;
  store(p, v);
#endif
}

// out[c * kQueries + l] = factor * rows[l * ld + c], c < columns (rounded up to 4, which ld leaves room for), l < lanes
// (a multiple of kWidth).
inline void to_lanes(float* out, const float* rows, int64_t ld, int64_t columns, int64_t lanes, float factor) {
  for (int64_t l = 0; l < lanes; l += kWidth)
    for (int64_t c = 0; c < columns; c += 4) {
      vf x[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) x[i] = gather4(rows + (l + i) * ld + c, ld);
      transpose4(x);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) store(out + (c + j) * kQueries + l, factor * x[j]);
    }
}

// rows[l * ld + c] = in[c * kQueries + l] * factor[l], the way back.
inline void from_lanes(float* rows, int64_t ld, const float* in, int64_t columns, int64_t lanes, const float* factor) {
  for (int64_t l = 0; l < lanes; l += kWidth) {
    const vf f = load(factor + l);
    for (int64_t c = 0; c < columns; c += 4) {
      vf x[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) x[j] = load(in + (c + j) * kQueries + l) * f;
      transpose4(x);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) scatter4(rows + (l + i) * ld + c, ld, x[i]);
    }
  }
}

// What a row of q or k goes through on the way in: RMS norm with a weight, then a rotation.
struct Prologue {
  const float* weight;     // [d] or null
  const float *cos, *sin;  // [tokens, d] or null
  bool interleaved;        // pairs (2 i, 2 i + 1), else (i, i + d / 2)
  float eps;
};

// Every second element and its neighbour, exchanged.
FD_INLINE vf exchanged(vf v) {
#if defined(__AVX512F__)
  return (vf)_mm512_permute_ps((__m512)v, 0xb1);
#elif defined(__AVX2__)
  return (vf)_mm256_permute_ps((__m256)v, 0xb1);
#else
  vf w;
  for (int i = 0; i < kWidth; ++i) w[i] = v[i ^ 1];
  return w;
#endif
}

// out = x cos + partner(x) sin, the partner of (x1, x2) being (-x2, x1); or its transpose, x cos - partner(x sin).
inline void rotate(float* out, const float* x, const float* cosine, const float* sine, int64_t d, bool interleaved,
                   bool transpose) {
  const int64_t half = d / 2;
  int64_t c = 0;
  if (interleaved) {
    vf sign;
    for (int i = 0; i < kWidth; ++i) sign[i] = (i % 2 != 0) != transpose ? 1.0f : -1.0f;
    for (; c + kWidth <= d; c += kWidth) {
      const vf v = load(x + c), s = load(sine + c);
      store(out + c, madd(transpose ? exchanged(v * s) : exchanged(v) * s, sign, v * load(cosine + c)));
    }
  } else {
    const float sign = transpose ? 1.0f : -1.0f;
    for (; c + kWidth <= half; c += kWidth) {
      const vf low = load(x + c), high = load(x + half + c);
      const vf s_low = load(sine + c), s_high = load(sine + half + c);
      store(out + c, madd(sign * high, transpose ? s_high : s_low, low * load(cosine + c)));
      store(out + half + c, madd(-sign * low, transpose ? s_low : s_high, high * load(cosine + half + c)));
    }
  }
  const auto one = [&](int64_t i) {
    const int64_t other = interleaved ? i ^ 1 : i < half ? i + half : i - half;
    const float sign = ((interleaved ? i % 2 != 0 : i >= half) != transpose) ? 1.0f : -1.0f;
    out[i] = madd(sign * x[other], transpose ? sine[other] : sine[i], x[i] * cosine[i]);
  };
  const int64_t end = interleaved ? d : half;
  for (; c < end; ++c) {
    one(c);
    if (!interleaved) one(c + half);
  }
}

inline float root_mean_square(const float* x, int64_t d, float eps) {  // its reciprocal
  vf total{};
  int64_t c = 0;
  for (; c + kWidth <= d; c += kWidth) total = madd(load(x + c), load(x + c), total);
  float t = sum(total);
  for (; c < d; ++c) t = madd(x[c], x[c], t);
  return 1.0f / __builtin_sqrtf(t / static_cast<float>(d) + eps);
}

// A row of a few hundred bytes, without the call into libc, which took a tenth of the backward pass.
FD_INLINE void copy_row(float* out, const float* in, int64_t d) {
  int64_t c = 0;
  for (; c + kWidth <= d; c += kWidth) store(out + c, load(in + c));
  for (; c + 4 <= d; c += 4) memcpy(out + c, in + c, 16);
  for (; c < d; ++c) out[c] = in[c];
}

inline void prepare(float* x, int64_t token, int64_t d, const Prologue& p, float* scratch) {
  float* to = p.cos ? scratch : x;
  if (p.weight) {
    const float rstd = root_mean_square(x, d, p.eps);
    int64_t c = 0;
    for (; c + kWidth <= d; c += kWidth) store(to + c, load(x + c) * rstd * load(p.weight + c));
    for (; c < d; ++c) to[c] = x[c] * rstd * p.weight[c];
  } else if (p.cos) {
    copy_row(scratch, x, d);
  }
  if (p.cos) rotate(x, scratch, p.cos + token * d, p.sin + token * d, d, p.interleaved, false);
}

// Rows [first, first + count) of head (b, h) of an operand [B, H, tokens, d] as floats, zeros from d to ld.
inline void rows_in(float* out, int64_t ld, const Strided& t, int64_t b, int64_t h, int64_t first, int64_t count,
                    int64_t d, const Prologue* p = nullptr, float* scratch = nullptr) {
  for (int64_t n = 0; n < count; ++n) {
    float* row = out + n * ld;
    const char* from = at(t.data, t.dtype, b * t.s[0] + h * t.s[1] + (first + n) * t.s[2]);
    if (t.dtype == kF32 && t.s[3] == 1)
      copy_row(row, reinterpret_cast<const float*>(from), d);
    else
      widen(row, from, t.dtype, d, t.s[3]);
    if (p) prepare(row, first + n, d, *p, scratch);
    for (int64_t c = d; c < ld; ++c) row[c] = 0;
  }
}
inline void rows_out(const Strided& t, int64_t b, int64_t h, int64_t first, int64_t count, int64_t d, const float* rows,
                     int64_t ld) {
  for (int64_t n = 0; n < count; ++n) {
    char* to = at(t.data, t.dtype, b * t.s[0] + h * t.s[1] + (first + n) * t.s[2]);
    if (t.dtype == kF32 && t.s[3] == 1)
      copy_row(reinterpret_cast<float*>(to), rows + n * ld, d);
    else
      narrow(to, rows + n * ld, t.dtype, d, t.s[3]);
  }
}

// Rows that can be used where they lie: float32 and dense, with whole groups of `unit` columns.
struct Rows {
  float* p;
  int64_t stride;
};
inline bool in_place(const Strided& t, int64_t d, int unit) { return t.dtype == kF32 && t.s[3] == 1 && d % unit == 0; }
inline Rows rows_at(const Strided& t, int64_t b, int64_t h, int64_t first) {
  return {static_cast<float*>(t.data) + b * t.s[0] + h * t.s[1] + first * t.s[2], t.s[2]};
}
// A block of rows of k or v: where they lie if a register tile can read them there, else copied. Rows far apart are
// copied too: at [2, 1024, 3, 16, 72] every row is on a page of its own, and reading it there cost 10 %.
inline Rows rows_of(const Strided& t, int64_t b, int64_t h, int64_t first, int64_t count, int64_t d, float* buffer,
                    int64_t ld, const Prologue* p, float* scratch) {
  if (!p && in_place(t, d, 8) && t.s[2] <= 2 * d) return rows_at(t, b, h, first);
  rows_in(buffer, ld, t, b, h, first, count, d, p, scratch);
  return {buffer, ld};
}

// A tile of `count` rows, transposed: lanes up to a whole vector, zeros beyond `count`.
inline void tile_in(float* out, const Strided& t, int64_t b, int64_t h, int64_t first, int64_t count, int64_t d,
                    float factor, float* buffer, int64_t ld, const Prologue* p, float* scratch) {
  const int64_t lanes = rounded(count, kWidth);
  if (!p && count == lanes && in_place(t, d, 4)) {
    const Rows r = rows_at(t, b, h, first);
    return to_lanes(out, r.p, r.stride, d, lanes, factor);
  }
  rows_in(buffer, ld, t, b, h, first, count, d, p, scratch);
  memset(buffer + count * ld, 0, static_cast<size_t>((lanes - count) * ld) * 4);
  to_lanes(out, buffer, ld, d, lanes, factor);
}
inline void tile_out(const Strided& t, int64_t b, int64_t h, int64_t first, int64_t count, int64_t d, const float* in,
                     const float* factor, float* buffer, int64_t ld) {
  const int64_t lanes = rounded(count, kWidth);
  if (count == lanes && in_place(t, d, 4)) {
    const Rows r = rows_at(t, b, h, first);
    return from_lanes(r.p, r.stride, in, d, lanes, factor);
  }
  from_lanes(buffer, ld, in, d, lanes, factor);
  rows_out(t, b, h, first, count, d, buffer, ld);
}

// Rows to be asked for ahead of their use, a few at every step() of a computation that takes `steps` of them. A head of
// 256 tokens is done in 100 us, of which waiting for the next one's first touch of q, k and v would be a tenth.
struct Ahead {
  struct Range {
    const char* p;
    int64_t stride, rows, lines;
  };
  Range range[8];
  int count = 0, current = 0;
  int64_t row = 0, line = 0, total = 0, per_step = 0;

  void add(const Strided& t, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t d) {
    if (rows <= 0 || t.s[3] != 1) return;
    const int64_t size = dtype_size(t.dtype), offset = b * t.s[0] + h * t.s[1] + first * t.s[2];
    const int64_t lines = (d * size + 63) / 64 + 1;  // one more: a row need not begin with a line
    range[count++] = {static_cast<const char*>(t.data) + offset * size, t.s[2] * size, rows, lines};
    total += rows * lines;
  }
  void over(int64_t steps) { per_step = (total + steps - 1) / (steps > 0 ? steps : 1); }
  void step() {
    for (int64_t n = per_step; n > 0 && current < count; --n) {
      const Range& r = range[current];
      __builtin_prefetch(r.p + row * r.stride + line * 64, 0, 2);
      if (++line < r.lines) continue;
      line = 0;
      if (++row == r.rows) ++current, row = 0;
    }
  }
};

// Queries cut into tiles of up to kVectors vectors. A last tile of a single vector would keep the multipliers waiting
// for each other, so it takes one from the tile before. The cuts depend on N alone.
struct Tiles {
  int64_t N, count, vectors;
  explicit Tiles(int64_t n) : N(n), count((n + kQueries - 1) / kQueries), vectors((n + kWidth - 1) / kWidth) {}
  int64_t first(int64_t i) const {
    if (i >= count) return N;
    return i * kQueries - (i > 0 && i == count - 1 && vectors % kVectors == 1 ? kWidth : 0);
  }
  int64_t size(int64_t i) const { return first(i + 1) - first(i); }
};

}  // namespace
}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
