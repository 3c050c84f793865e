// Operands of a scan that come ahead: while a tile of steps is computed, the next one's are on their way to a stage of
// shared memory (cp.async), as they are stored, whatever positions their steps have.
#pragma once
#include "async.cuh"
#include "vec.cuh"

namespace fastdiff {
namespace cuda {
namespace {

constexpr int64_t kStageLimit = 99 << 10;  // shared memory of a block that every device from sm_80 on has

// Where an operand's [kSteps, width] elements stand in the stage, and in pieces of how many bytes they come: 16, 8 or
// 4; 0 where neighbouring columns are not neighbours in memory or not aligned, and the operand is read when it is due.
struct Ahead {
  int32_t bytes, offset;
  int32_t across;  // pieces of a row; as a power of two if it is one, or -1 - pieces
};

// Row and column of number e in rows of 2^across, or of -1 - across.
FD_D void row_and_column(int e, int across, int* row, int* column) {
  if (across >= 0)
    *row = e >> across, *column = e & ((1 << across) - 1);
  else
    *row = e / (-1 - across), *column = e % (-1 - across);
}
inline int32_t across_of(int64_t pieces) {
  for (int32_t power = 0; power < 31; ++power)
    if (int64_t{1} << power == pieces) return power;
  return static_cast<int32_t>(-1 - pieces);
}

// `start`: a group's first column is a multiple of it.
inline int piece_of(const Strided& v, int64_t sc, int64_t start, int64_t width) {
  if (v.data == nullptr || sc != 1) return 0;
  const int64_t size = dtype_size(v.dtype);
  for (int bytes = 16; bytes >= 4; bytes /= 2) {
    bool fits =
        reinterpret_cast<uintptr_t>(v.data) % bytes == 0 && start * size % bytes == 0 && width * size % bytes == 0;
    int ones = 0;  // more than one: another axis moves by single elements too
    for (const int64_t s : v.s) ones += s == 1, fits = fits && (s == 1 || s * size % bytes == 0);
    if (fits && ones == 1) return bytes;
  }
  return 0;
}

// Room in the stage, while it lasts: `used` bytes of shared memory are taken already.
inline Ahead reserve(const Strided& v, int bytes, int64_t width, int64_t used, int32_t* stage) {
  const int64_t size = kScanSteps * width * dtype_size(v.dtype);
  if (bytes == 0 || used + *stage + size > kStageLimit) return {0, 0, 0};
  const Ahead ahead = {bytes, *stage, across_of(size / kScanSteps / bytes)};
  *stage += static_cast<int32_t>(size);
  return ahead;
}

// Ask for `cols` columns of the steps at position[0 .. count - 1]; further columns, and steps up to a multiple of four,
// are zeros. Element (i, c) is at base + position[i] sl + c.
FD_D void ask(char* stage, const Ahead& ahead, const Strided& m, int64_t base, int64_t sl, const int64_t* position,
              int count, int cols, int width) {
  if (ahead.bytes == 0) return;
  const int half = m.dtype == kF32 ? 2 : 1, size = 1 << half, per = ahead.bytes >> half;
  const int all = ((count + 3) & ~3) * width << half, step = static_cast<int>(blockDim.x) * ahead.bytes;
  const char* const data = static_cast<const char*>(m.data);
  char* const to = stage + ahead.offset;
  for (int e = static_cast<int>(threadIdx.x), at = e * ahead.bytes; at < all;
       e += static_cast<int>(blockDim.x), at += step) {
    int i, c;
    row_and_column(e, ahead.across, &i, &c);
    c *= per;
    const int left = cols - c, there = i < count ? (left < per ? left < 0 ? 0 : left : per) : 0;
    const char* const from = there > 0 ? data + (base + position[i] * sl + c) * size : data;
    if (ahead.bytes == 16)
      copy_async<16>(to + at, from, there * size);
    else if (ahead.bytes == 8)
      copy_async<8>(to + at, from, there * size);
    else
      copy_async<4>(to + at, from, there * size);
  }
}

// An element of the stage.
FD_D float staged(const char* stage, const Ahead& ahead, int32_t dtype, int at) {
  const char* const from = stage + ahead.offset;
  if (dtype == kF32) return reinterpret_cast<const float*>(from)[at];
  float v, unused;
  widen_pair(reinterpret_cast<const uint16_t*>(from)[at], dtype == kBF16, &v, &unused);
  return v;
}

// [count, 4 fours] elements of the stage as float32, rows `pitch` floats apart, a multiple of four. `across`: fours as
// row_and_column takes them.
FD_D void unpack(const char* stage, const Ahead& ahead, int32_t dtype, int count, int fours, int across, float* to,
                 int pitch) {
  const int threads = static_cast<int>(blockDim.x);
  for (int e = static_cast<int>(threadIdx.x); e < count * fours; e += threads) {
    int i, c;
    row_and_column(e, across, &i, &c);
    float v[4];
    if (dtype == kF32) {
      const float4 w = reinterpret_cast<const float4*>(stage + ahead.offset)[e];
      v[0] = w.x, v[1] = w.y, v[2] = w.z, v[3] = w.w;
    } else {
      const uint2 w = reinterpret_cast<const uint2*>(stage + ahead.offset)[e];
      widen_pair(w.x, dtype == kBF16, &v[0], &v[1]), widen_pair(w.y, dtype == kBF16, &v[2], &v[3]);
    }
    *reinterpret_cast<float4*>(to + i * pitch + c * 4) = make_float4(v[0], v[1], v[2], v[3]);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace fastdiff
