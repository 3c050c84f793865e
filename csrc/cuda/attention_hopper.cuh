// What the attention kernels for Hopper share: rows of a head in shared memory, the two products of a warpgroup, the
// softmax of its scores, and the way out of its results.
//
// 64 columns of q, k or v lie as a tile of rows of 128 bytes, permuted over these. The 8 columns that d = 72 has more
// lie behind, of q and k as 16 columns (the copy engine fills 72 to 79 with zeros) permuted over 32 bytes, of v as 8
// that are not permuted. So the scores run over K = 80 and the results over 64 + 8 columns: 95 % of the products count.
#pragma once
#include <cmath>

#include "hopper.cuh"
#include "mma.cuh"
#include "vec.cuh"

namespace fastdiff {
namespace cuda {
namespace {

constexpr int kGroup = 128;      // threads of a warpgroup
constexpr int kGroupRows = 64;   // queries that it takes at a time
constexpr int kScoreKeys = 128;  // keys that it multiplies them with at a time

template <int kD>
struct Columns {
  static constexpr int kBlocks = kD / 64, kTail = kD % 64;  // tiles of 64, and 8 or none
  static_assert(kTail == 0 || kTail == 8, "tails of 8 columns only");
  static constexpr int kRowBytes = 128 * kBlocks + (kTail ? 32 : 0);    // of q or k
  static constexpr int kValueBytes = 128 * kBlocks + (kTail ? 16 : 0);  // of v
  // Rows of results: 4 words more than a multiple of 32, so that a warp's words fall into 32 banks.
  static constexpr int kOutRow = 2 * kD + (kTail ? 0 : 16);
};

// Rows of q, k or v from one on, in a copy of kRows rows: tiles of 64 columns `step` bytes apart, and the tail.
struct Rows {
  const char *blocks, *tail;
  int step;
};
template <int kD, int kRows>
FD_D Rows rows_from(const char* at, int first, int tail_bytes) {
  constexpr int kStep = 128 * kRows;
  return {at + 128 * first, at + Columns<kD>::kBlocks * kStep + tail_bytes * first, kStep};
}
template <int kD, int kRows>
FD_D Rows keys_from(const char* at, int first) {  // or queries
  return rows_from<kD, kRows>(at, first, 32);
}
template <int kD, int kRows>
FD_D Rows values_from(const char* at, int first) {
  return rows_from<kD, kRows>(at, first, 16);
}

// q, k or v for the copy engine: 64 columns at a time and the tail. An axis that does not move has one place.
struct Operand {
  TensorMap block, tail;
  int of_head, of_batch;  // 0 or 1
};
struct Maps {
  Operand q, k, v;
};

// Asks for kRows rows of a head; `full` waits for them.
template <int kD, int kRows, bool kValues>
FD_D void copy_rows(char* to, const Operand& x, Barrier* full, int row, int h, int b) {
  using C = Columns<kD>;
  h *= x.of_head, b *= x.of_batch;
  arrive_expecting(full, kRows * (kValues ? C::kValueBytes : C::kRowBytes));
#pragma unroll
  for (int i = 0; i < C::kBlocks; ++i) copy_box(to + i * 128 * kRows, &x.block, full, 64 * i, row, h, b);
  if constexpr (C::kTail > 0) copy_box(to + C::kBlocks * 128 * kRows, &x.tail, full, 64 * C::kBlocks, row, h, b);
}

// False: the copy engine cannot read these operands.
template <bool kBf16, int kD>
inline bool make_maps(Maps* maps, const AttentionForward& a, int query_rows, int key_rows) {
  const auto make = [&](Operand* to, const Strided& x, int64_t tokens, int rows, bool values) {
    const int64_t size[4] = {a.B, a.H, tokens, kD}, stride[4] = {x.s[0], x.s[1], x.s[2], x.s[3]};
    to->of_head = x.s[1] != 0, to->of_batch = x.s[0] != 0;
    if (!make_map(&to->block, x.data, kBf16, size, stride, rows, 64, 128)) return false;
    if (Columns<kD>::kTail == 0) return true;
    return make_map(&to->tail, x.data, kBf16, size, stride, rows, values ? 8 : 16, values ? 0 : 32);
  };
  return make(&maps->q, a.q, a.N, query_rows, false) && make(&maps->k, a.k, a.M, key_rows, false) &&
         make(&maps->v, a.v, a.M, key_rows, true);
}

// s = q k^T of 64 queries and 128 keys, started.
template <bool kBf16, int kD>
FD_D void start_scores(float (&s)[64], const Rows& q, const Rows& k) {
  pin(s);
  fence_products();
#pragma unroll
  for (int i = 0; i < Columns<kD>::kBlocks; ++i) {
    const Tile a = make_tile<128>(q.blocks + i * q.step, 1024), b = make_tile<128>(k.blocks + i * k.step, 1024);
#pragma unroll
    for (int step = 0; step < 4; ++step)
      start_product<kBf16>(s, advance(a, 32 * step), advance(b, 32 * step), i + step > 0);
  }
  if constexpr (Columns<kD>::kTail > 0)
    start_product<kBf16>(s, make_tile<32>(q.tail, 256), make_tile<32>(k.tail, 256), 1);
  commit_products();
}

// 64 rows of results.
template <int kD>
struct Result {
  float block[Columns<kD>::kBlocks][32];
  float tail[4];

  template <typename F>
  FD_D void each(F f) {  // f(value, whether it is of the lower row)
#pragma unroll
    for (int i = 0; i < Columns<kD>::kBlocks; ++i)
#pragma unroll
      for (int j = 0; j < 32; ++j) f(block[i][j], j % 4 / 2);
    if constexpr (Columns<kD>::kTail > 0) {
#pragma unroll
      for (int j = 0; j < 4; ++j) f(tail[j], j / 2);
    }
  }
};

template <int kD>
FD_D void pin(Result<kD>& o) {
#pragma unroll
  for (int i = 0; i < Columns<kD>::kBlocks; ++i) pin(o.block[i]);
  if constexpr (Columns<kD>::kTail > 0) pin(o.tail);
}

// o = p v (+ o where `add`) of 128 keys, started.
template <bool kBf16, int kD>
FD_D void start_values(Result<kD>& o, const uint32_t (&p)[8][4], const Rows& v, int add) {
  using C = Columns<kD>;
  pin(o);
  fence_products();
  Tile block[C::kBlocks];
#pragma unroll
  for (int i = 0; i < C::kBlocks; ++i) block[i] = make_tile<128>(v.blocks + i * v.step, 1024);
  const Tile tail = make_tile<16>(v.tail, 128);
#pragma unroll
  for (int step = 0; step < 8; ++step) {
#pragma unroll
    for (int i = 0; i < C::kBlocks; ++i)
      start_product<kBf16>(o.block[i], p[step], advance(block[i], step * 16 * 128), step > 0 || add);
    if constexpr (C::kTail > 0) start_product<kBf16>(o.tail, p[step], advance(tail, step * 16 * 16), step > 0 || add);
  }
  commit_products();
}

FD_D float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
FD_D float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Keys from `keys` on do not count.
FD_D void drop_keys(float (&s)[64], int keys) {
  if (keys >= kScoreKeys) return;
  const int column = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < 64; ++i)
    if (i / 4 * 8 + column + i % 2 >= keys) s[i] = -INFINITY;
}

// The largest score that this lane has of its upper (0) or lower (1) row.
FD_D float largest(const float (&s)[64], int row) {
  float top = -INFINITY;
#pragma unroll
  for (int j = 0; j < 16; ++j) top = fmaxf(top, fmaxf(s[4 * j + 2 * row], s[4 * j + 2 * row + 1]));
  return top;
}

// Weights are at most 1. As float16 they are kept times 2^15, as in attention.cuh, so that those down to 2^-29 have all
// their bits.
template <bool kBf16>
constexpr float kShift = kBf16 ? 0.0f : 15.0f;
template <bool kBf16>
constexpr float kUnshift = kBf16 ? 1.0f : 1.0f / 32768;

// s becomes 2^(c s - from), times 2^kShift, in that row; returns the sum of this lane's.
template <bool kBf16>
FD_D float raise(float (&s)[64], int row, float c, float from) {
  float total = 0;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float& x = s[4 * j + 2 * row + i];
      x = exp2_fast((scaled(x, c) - from) + kShift<kBf16>);
      total += x;
    }
  }
  return total;
}

// As left operand of the second product.
template <bool kBf16>
FD_D void pack(const float (&s)[64], uint32_t (&p)[8][4]) {
#pragma unroll
  for (int step = 0; step < 8; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) p[step][i] = narrow_pair(s[8 * step + 2 * i], s[8 * step + 2 * i + 1], kBf16);
}

// Results of a warp, rows first .. first + 15 of a head: divided by the sums, through shared memory (`rows`, the warp's
// own) and out in whole lines; and the maxima and sums. `sum` is of this lane's columns.
template <bool kBf16, int kD>
FD_D void put_result(const Result<kD>& o, const float (&m)[2], const float (&sum)[2], char* rows,
                     const AttentionForward& a, int b, int h, int64_t first) {
  using C = Columns<kD>;
  const int lane = threadIdx.x % 32, g = lane / 4, column = 2 * (lane % 4);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float total = quad_sum(sum[i]), inverse = 1.0f / total;
    const int64_t row = first + g + 8 * i;
    if (a.stats != nullptr && lane % 4 == 0 && row < a.N) {
      float* const at = a.stats + 2 * ((b * a.H + h) * a.N + row);
      at[0] = m[i], at[1] = total * kUnshift<kBf16>;
    }
    char* const to = rows + (g + 8 * i) * C::kOutRow + 2 * column;
#pragma unroll
    for (int n = 0; n < C::kBlocks; ++n)
#pragma unroll
      for (int j = 0; j < 8; ++j)
        *reinterpret_cast<uint32_t*>(to + 2 * (64 * n + 8 * j)) =
            narrow_pair(o.block[n][4 * j + 2 * i] * inverse, o.block[n][4 * j + 2 * i + 1] * inverse, kBf16);
    if constexpr (C::kTail > 0)
      *reinterpret_cast<uint32_t*>(to + 2 * 64 * C::kBlocks) =
          narrow_pair(o.tail[2 * i] * inverse, o.tail[2 * i + 1] * inverse, kBf16);
  }
  __syncwarp();
  char* const out = static_cast<char*>(a.out.data) + 2 * (b * a.out.s[0] + h * a.out.s[1]);
  for (int i = lane; i < 16 * (kD / 8); i += 32) {
    const int row = i / (kD / 8), chunk = i % (kD / 8);
    const int64_t n = first + row;
    if (n < a.N)
      *reinterpret_cast<uint4*>(out + 2 * n * a.out.s[2] + 16 * chunk) =
          *reinterpret_cast<const uint4*>(rows + row * C::kOutRow + 16 * chunk);
  }
  __syncwarp();  // before the next results take their place
}

}  // namespace
}  // namespace cuda
}  // namespace fastdiff
