// What the forward and the backward kernel of attention share: tiles of rows in shared memory, the two products of a
// warp, the norm and rotation of q and k, rows out, and which head dims are compiled.
//
// A tile holds rows of q, k, v or a gradient as they are stored, kStride elements apart: an odd number of 16-byte
// columns, so that the eight rows of an ldmatrix fall on different banks. A warp owns 16 rows of the result (or twice
// 16) and keeps its part of a product in the accumulator layout of mma.cuh: lane 4 g + t has rows g and g + 8, columns
// 8 j + 2 t and the next. float32 goes through the same layout with plain multiplications and additions, reading its
// operands from shared memory: tf32 would need three products and still lose two bits of what the bound allows.
#pragma once
#include <type_traits>

#include "async.cuh"
#include "mma.cuh"
#include "reduce.cuh"
#include "vec.cuh"

// Head dims that are multiplied exactly; another takes the next larger one and multiplies zeros.
#if defined(FD_ATTENTION_DIMS)  // given to the compiler
#elif defined(FASTDIFF_ALL_HEAD_DIMS)
// Not 232, 240 and 248, at which the gradient of q in 16 bits would spill some registers (sm_90a).
// clang-format off
#define FD_ATTENTION_DIMS(X) \
  X(8) X(16) X(24) X(32) X(40) X(48) X(56) X(64) X(72) X(80) X(88) X(96) X(104) X(112) X(120) X(128) \
  X(136) X(144) X(152) X(160) X(168) X(176) X(184) X(192) X(200) X(208) X(216) X(224) X(256)
// clang-format on
#else
#if defined(FASTDIFF_FEW_HEAD_DIMS)  // a quick look (continuous integration)
#define FD_ATTENTION_DIMS(X) X(72) X(128)
#elif defined(FASTDIFF_EMU) && !defined(FASTDIFF_DEFAULT_HEAD_DIMS)
// Every kind of kernel once: narrow, with half a step at the end, wide, widest.
#define FD_ATTENTION_DIMS(X) X(32) X(72) X(128) X(256)
#else
#define FD_ATTENTION_DIMS(X) X(64) X(72) X(128) X(256)
#endif
#endif

namespace fastdiff {
namespace cuda {
namespace {

constexpr float kLog2e = 1.44269504088896341f;

template <int kType>
using Element = std::conditional_t<kType == kF32, float, uint16_t>;

template <int kType>
FD_D float widened(Element<kType> e) {
  if constexpr (kType == kF32) {
    return e;
  } else {
    float low, high;
    widen_pair(e, kType == kBF16, &low, &high);
    return low;
  }
}
template <int kType>
FD_D Element<kType> narrowed(float v) {
  if constexpr (kType == kF32)
    return v;
  else
    return static_cast<uint16_t>(narrow_pair(v, 0.0f, kType == kBF16));
}

// Elements from one row of a tile to the next.
template <int kD>
constexpr int kStride = kD / 8 % 2 != 0 ? kD : kD + 8;

// Weights are at most 1. As float16 they are kept times 2^15, so that those down to 2^-29 have all their bits.
template <int kType>
constexpr float kShift = kType == kF16 ? 15.0f : 0.0f;
template <int kType>
constexpr float kUnshift = kType == kF16 ? 1.0f / 32768 : 1.0f;

// 2^x for the weights. In 16 bits the special function unit (relative error 2^-22); for float32 a polynomial of the
// fraction (1.5e-7, the one of csrc/cpu/attention.h), below 2^-125 zero: there the multiplications are what takes time.
template <int kType>
FD_D float weight_of(float x) {
  if constexpr (kType == kF16) {
    return exp2_fast(x + kShift<kType>);  // x is 0 at the maximum, exactly, so that 2^15 is never exceeded
  } else if constexpr (kType == kBF16) {
    return exp2_fast(x);
  } else {
    const float n = floorf(x), r = x - n;
    float p = 0.0018671402940526605f;
    p = fmaf(p, r, 0.009017007425427437f);
    p = fmaf(p, r, 0.0557999312877655f);
    p = fmaf(p, r, 0.24016444385051727f);
    p = fmaf(p, r, 0.6931512951850891f);
    p = fmaf(p, r, 1.0f);
    const int exponent = static_cast<int>(n < -125.0f ? -125.0f : n > 125.0f ? 125.0f : n == n ? n : 0.0f);
    const float y = bits_float(float_bits(p) + (static_cast<uint32_t>(exponent) << 23));
    return x == x ? (x < -125.0f ? 0.0f : y) : x;
  }
}

// ------------------------------------------------------------------------------------------------------------- tiles

FD_D int64_t offset(const Strided& t, int64_t b, int64_t h, int64_t n) { return b * t.s[0] + h * t.s[1] + n * t.s[2]; }

// Ask for rows first .. first + kRows - 1 of a head, of which `count` exist; the others, and columns from d on, are 0.
template <int kType, int kD, int kRows, int kThreads>
FD_D void load_tile(Element<kType>* to, const Strided& t, bool aligned, int64_t b, int64_t h, int64_t first,
                    int64_t count, int d) {
  using E = Element<kType>;
  const E* const from = static_cast<const E*>(t.data) + offset(t, b, h, first);
  if (aligned) {
    constexpr int kChunk = 16 / sizeof(E), kChunks = kD / kChunk;
#pragma unroll 4
    for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
      const int row = i / kChunks, c = i % kChunks * kChunk;
      const int left = row < count ? d - c : 0, valid = left < 0 ? 0 : left < kChunk ? left : kChunk;
      copy_async<16>(to + row * kStride<kD> + c, valid > 0 ? from + row * t.s[2] + c : static_cast<const E*>(t.data),
                     valid * static_cast<int>(sizeof(E)));
    }
  } else {
#pragma unroll 4
    for (int i = threadIdx.x; i < kRows * kD; i += kThreads) {
      const int row = i / kD, c = i % kD;
      E v = 0;
      if (row < count && c < d) v = from[row * t.s[2] + c * t.s[3]];
      to[row * kStride<kD> + c] = v;
    }
  }
}

// What q or k goes through on the way in: RMS norm with a weight, then a rotation.
struct Prologue {
  const float* weight;     // [d] or null
  const float *cos, *sin;  // [tokens, d] or null
  bool interleaved;
  float eps;

  FD_D bool any() const { return weight != nullptr || cos != nullptr; }
};

// The elements of pair i of a row, and how many pairs there are.
struct Pairs {
  int d, half;
  bool apart;  // (i, i + d / 2), else (2 i, 2 i + 1)

  FD_D Pairs(const Prologue& p, int d_) : d(d_), half((d_ + 1) / 2), apart(p.cos != nullptr && !p.interleaved) {}
  FD_D int first(int i) const { return apart ? i : 2 * i; }
  FD_D int second(int i) const { return apart ? i + half : 2 * i + 1; }  // may be d where d is odd
};

FD_D float sum_of_8(float v) {
#pragma unroll
  for (int o = 4; o > 0; o /= 2) v += __shfl_xor_sync(kFullWarp, v, o);
  return v;
}

// Norm and rotation of a tile in place, in float32, rounded once to the type of the tile. Eight lanes take a row.
template <int kType, int kD, int kRows, int kThreads>
FD_D void prepare_tile(Element<kType>* tile, const Prologue& p, int64_t first, int64_t count, int d) {
  const Pairs pairs(p, d);
  const int lane = threadIdx.x % 8;
  for (int row = threadIdx.x / 8; row < kRows; row += kThreads / 8) {
    Element<kType>* const x = tile + row * kStride<kD>;
    float rstd = 1.0f;
    if (p.weight != nullptr) {
      float square = 0;
      for (int i = lane; i < pairs.half; i += 8) {
        const float u = widened<kType>(x[pairs.first(i)]);
        const float v = pairs.second(i) < d ? widened<kType>(x[pairs.second(i)]) : 0.0f;
        square = fmaf(u, u, fmaf(v, v, square));
      }
      rstd = 1.0f / sqrtf(sum_of_8(square) / static_cast<float>(d) + p.eps);
    }
    if (row >= count) continue;  // stays zero
    for (int i = lane; i < pairs.half; i += 8) {
      const int m = pairs.first(i), n = pairs.second(i);
      float u = widened<kType>(x[m]), v = n < d ? widened<kType>(x[n]) : 0.0f;
      if (p.weight != nullptr) u *= rstd * p.weight[m], v = n < d ? v * (rstd * p.weight[n]) : 0.0f;
      if (p.cos != nullptr) {
        const float *const cosine = p.cos + (first + row) * d, *const sine = p.sin + (first + row) * d;
        const float turned = fmaf(u, cosine[m], -v * sine[m]);
        v = fmaf(v, cosine[n], u * sine[n]), u = turned;
      }
      x[m] = narrowed<kType>(u);
      if (n < d) x[n] = narrowed<kType>(v);
    }
  }
}

// A warp's kRows rows of float32 in shared memory, to rows first .. of a result of N rows.
template <int kType, int kD, int kRows>
FD_D void store_rows(const Strided& to, bool aligned, int64_t b, int64_t h, int64_t first, int64_t N, const float* rows,
                     int d) {
  using E = Element<kType>;
  constexpr int kChunk = 16 / sizeof(E), kChunks = kD / kChunk;
  E* const out = static_cast<E*>(to.data) + offset(to, b, h, first);
  for (int i = threadIdx.x % 32; i < kRows * kChunks; i += 32) {
    const int row = i / kChunks, c = i % kChunks * kChunk;
    if (first + row >= N || c >= d) continue;
    const float* const from = rows + row * kStride<kD> + c;
    if (aligned && c + kChunk <= d) {
      uint32_t w[4];
#pragma unroll
      for (int k = 0; k < 4; ++k)
        w[k] = kType == kF32 ? float_bits(from[k])
                             : narrow_pair(from[2 * k % kChunk], from[(2 * k + 1) % kChunk], kType == kBF16);
      put_words<4>(reinterpret_cast<char*>(out + row * to.s[2] + c), w);
    } else {
      for (int k = 0; k < kChunk && c + k < d; ++k) out[row * to.s[2] + (c + k) * to.s[3]] = narrowed<kType>(from[k]);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------- products

// The rows of a warp as left operand of the tensor core: kept in registers for all tiles they meet, or read each time.
template <int kType, int kD, int kTiles, bool kHold>
struct Left {
  static constexpr int kSteps = kD / 16;
  static constexpr bool kTail = kD % 16 != 0;
  const Element<kType>* rows = nullptr;  // the warp's first
  uint32_t held[kHold ? kTiles : 1][kHold ? kSteps : 1][4];
  uint32_t tail[kHold ? kTiles : 1][2];

  FD_D void load(const Element<kType>* first) {
    rows = first;
    if constexpr (kHold) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) read(held[i][s], i, s);
        if constexpr (kTail) read_tail(tail[i], i);
      }
    }
  }
  FD_D void read(uint32_t (&a)[4], int tile, int step) const {
    const int lane = threadIdx.x % 32;
    load_matrices<4>(a, rows + (16 * tile + lane % 16) * kStride<kD> + 16 * step + lane / 16 * 8);
  }
  FD_D void read_tail(uint32_t (&a)[2], int tile) const {
    load_matrices<2>(a, rows + (16 * tile + threadIdx.x % 16) * kStride<kD> + kD - 8);
  }
};

// c[i][j] += rows of the warp times rows 8 j .. of the tile y, along the head dim.
template <int kType, int kD, int kTiles, int kColumns, bool kHold>
FD_D void multiply(float (&c)[kTiles][kColumns][4], const Left<kType, kD, kTiles, kHold>& x, const Element<kType>* y,
                   int d) {
  const int lane = threadIdx.x % 32;
  if constexpr (kType != kF32) {
    (void)d;
    constexpr bool kBf16 = kType == kBF16;
#pragma unroll(!kHold || kD < 16 ? 4 : kD / 16)
    for (int s = 0; s < kD / 16; ++s) {
      uint32_t a[kTiles][4];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if constexpr (kHold) {
#pragma unroll
          for (int k = 0; k < 4; ++k) a[i][k] = x.held[i][s][k];
        } else {
          x.read(a[i], i, s);
        }
      }
      const Element<kType>* const at = y + (lane / 16 * 8 + lane % 8) * kStride<kD> + 16 * s + lane / 8 % 2 * 8;
#pragma unroll
      for (int j = 0; j < kColumns; j += 2) {
        uint32_t b[4];
        load_matrices<4>(b, at + 8 * j * kStride<kD>);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int i = 0; i < kTiles; ++i) mma_16<kBf16>(c[i][j], a[i], low), mma_16<kBf16>(c[i][j + 1], a[i], high);
      }
    }
    if constexpr (kD % 16 != 0) {
      uint32_t a[kTiles][2];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if constexpr (kHold)
          a[i][0] = x.tail[i][0], a[i][1] = x.tail[i][1];
        else
          x.read_tail(a[i], i);
      }
#pragma unroll
      for (int j = 0; j < kColumns; j += 2) {
        uint32_t b[2];
        load_matrices<2>(b, y + (8 * j + lane % 16) * kStride<kD> + kD - 8);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) mma_8<kBf16>(c[i][j], a[i], b[0]), mma_8<kBf16>(c[i][j + 1], a[i], b[1]);
      }
    }
  } else {
    static_assert(kTiles == 1, "float32 takes 16 rows at a time");
    const float* const low = x.rows + lane / 4 * kStride<kD>;
    const float* const at = y + 2 * (lane % 4) * kStride<kD>;
#pragma unroll 1
    for (int k = 0; k < d; k += 4) {  // zeros from d on
      const float4 u = *reinterpret_cast<const float4*>(low + k);
      const float4 v = *reinterpret_cast<const float4*>(low + 8 * kStride<kD> + k);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float4 p = *reinterpret_cast<const float4*>(at + 8 * j * kStride<kD> + k);
        const float4 q = *reinterpret_cast<const float4*>(at + (8 * j + 1) * kStride<kD> + k);
        const auto add = [](float& sum, const float4& m, const float4& n) {
          sum = fmaf(m.x, n.x, sum), sum = fmaf(m.y, n.y, sum), sum = fmaf(m.z, n.z, sum), sum = fmaf(m.w, n.w, sum);
        };
        add(c[0][j][0], u, p), add(c[0][j][1], u, q), add(c[0][j][2], v, p), add(c[0][j][3], v, q);
      }
    }
  }
}

// In 16 bits: the four elements that a lane has of a 16 x 8 block, rounded, as two words in place of the first two.
// What they were rounded to comes back in `v`.
template <int kType>
FD_D void pack(float (&c)[4], float (&v)[4]) {
  if constexpr (kType != kF32) {
    const uint32_t low = narrow_pair(c[0], c[1], kType == kBF16), high = narrow_pair(c[2], c[3], kType == kBF16);
    widen_pair(low, kType == kBF16, &v[0], &v[1]), widen_pair(high, kType == kBF16, &v[2], &v[3]);
    c[0] = bits_float(low), c[1] = bits_float(high);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = c[k];
  }
}

// sum[i][j] += p (packed) times the tile y, whose rows are what the columns of p stand for.
// float32: p goes through `scratch` [16, 8 kColumns + 4] of this warp, and the tile's part is summed from zero, so that
// rounding grows with the tile's rows plus the number of tiles and not with their product.
template <int kType, int kD, int kTiles, int kColumns>
FD_D void accumulate(float (&sum)[kTiles][kD / 8][4], const float (&p)[kTiles][kColumns][4], const Element<kType>* y,
                     float* scratch) {
  const int lane = threadIdx.x % 32;
  if constexpr (kType != kF32) {
    (void)scratch;
    constexpr bool kBf16 = kType == kBF16;
#pragma unroll
    for (int s = 0; s < kColumns / 2; ++s) {
      uint32_t a[kTiles][4];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        a[i][0] = float_bits(p[i][2 * s][0]), a[i][1] = float_bits(p[i][2 * s][1]);
        a[i][2] = float_bits(p[i][2 * s + 1][0]), a[i][3] = float_bits(p[i][2 * s + 1][1]);
      }
      const Element<kType>* const at = y + (16 * s + lane % 16) * kStride<kD>;
#pragma unroll
      for (int j = 0; j + 1 < kD / 8; j += 2) {
        uint32_t b[4];
        load_matrices<4, true>(b, at + 8 * j + lane / 16 * 8);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int i = 0; i < kTiles; ++i) mma_16<kBf16>(sum[i][j], a[i], low), mma_16<kBf16>(sum[i][j + 1], a[i], high);
      }
      if constexpr (kD % 16 != 0) {
        uint32_t b[2];
        load_matrices<2, true>(b, at + kD - 8);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) mma_16<kBf16>(sum[i][kD / 8 - 1], a[i], b);
      }
    }
  } else {
    constexpr int kWidth = 8 * kColumns + 4;
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      *reinterpret_cast<float2*>(scratch + g * kWidth + 8 * j + 2 * t) = make_float2(p[0][j][0], p[0][j][1]);
      *reinterpret_cast<float2*>(scratch + (g + 8) * kWidth + 8 * j + 2 * t) = make_float2(p[0][j][2], p[0][j][3]);
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kD / 8; j += 4) {
      float part[4][4] = {};
#pragma unroll 1
      for (int k = 0; k < 8 * kColumns; k += 4) {
        const float4 u = *reinterpret_cast<const float4*>(scratch + g * kWidth + k);
        const float4 v = *reinterpret_cast<const float4*>(scratch + (g + 8) * kWidth + k);
        const float us[4] = {u.x, u.y, u.z, u.w}, vs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (j + i >= kD / 8) break;
            const float2 w = *reinterpret_cast<const float2*>(y + (k + m) * kStride<kD> + 8 * (j + i) + 2 * t);
            part[i][0] = fmaf(us[m], w.x, part[i][0]), part[i][1] = fmaf(us[m], w.y, part[i][1]);
            part[i][2] = fmaf(vs[m], w.x, part[i][2]), part[i][3] = fmaf(vs[m], w.y, part[i][3]);
          }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (j + i >= kD / 8) break;
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[0][j + i][k] += part[i][k];
      }
    }
    __syncwarp();  // before p is written again
  }
}

// A warp's accumulators times a factor for each of its rows, to rows in shared memory.
template <int kD, int kTiles>
FD_D void put_rows(float* rows, const float (&sum)[kTiles][kD / 8][4], const float (&factor)[kTiles][2]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int j = 0; j < kD / 8; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        *reinterpret_cast<float2*>(rows + (16 * i + g + 8 * r) * kStride<kD> + 8 * j + 2 * t) =
            make_float2(sum[i][j][2 * r] * factor[i][r], sum[i][j][2 * r + 1] * factor[i][r]);
}

// -------------------------------------------------------------------------------------------------------------- host

// Whether rows of d elements can be read and written 16 bytes at a time.
inline bool in_vectors(const Strided& t, int64_t d) {
  const int64_t size = dtype_size(t.dtype);
  bool fits = t.s[3] == 1 || d == 1;
  for (int i = 0; i < 3; ++i) fits = fits && t.s[i] * size % 16 == 0;
  return fits && reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
}

// call(head dim that is compiled), the smallest that holds d.
template <typename Call>
inline void with_dim(int64_t d, Call call) {
#define FD_X(n) \
  if (d <= n) return call(std::integral_constant<int, n>());
  FD_ATTENTION_DIMS(FD_X)
#undef FD_X
  throw std::runtime_error("attention: head dims above 256 have no CUDA kernel");
}
template <typename Call>
inline void with_type(int32_t dtype, Call call) {
  if (dtype == kF32) return call(std::integral_constant<int, kF32>());
  if (dtype == kF16) return call(std::integral_constant<int, kF16>());
  call(std::integral_constant<int, kBF16>());
}

}  // namespace
}  // namespace cuda
}  // namespace fastdiff
