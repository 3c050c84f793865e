// One plane of an image as float rows, addressed by virtual row: rows -r .. H - 1 + r exist, those outside the image
// standing for whatever the border rule says. Rows of float32 with unit stride are read where they are; anything else
// is widened once into a ring of rows. The workspace of a thread is a few rows, whatever the height of the image.
#pragma once
#include "isa.h"
#include "parallel.h"
#include "vec.h"

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_ISA {
namespace {

constexpr int kRows = 8;                             // output rows per step of the direct path
constexpr int kColumns = kWidth == 16 ? 2 : 1;       // vectors side by side in its vertical pass
constexpr int64_t kDirectWidth = kColumns * kWidth;  // narrower images go through the ring
constexpr int64_t kRingSlack = 18;                   // rows in the ring beyond the support: kWidth + 2

inline int64_t round16(int64_t n) { return (n + 15) / 16 * 16; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The sample that stands at position v of an axis of n; -1: a zero. Any v: the maps are periodic.
inline int64_t border_index(int64_t v, int64_t n, int32_t border) {
  if (v >= 0 && v < n) return v;
  if (border == kConstant) return -1;
  if (border == kReplicate) return v < 0 ? 0 : n - 1;
  const int64_t period = border == kCircular ? n : border == kSymmetric ? 2 * n : n > 1 ? 2 * n - 2 : 1;
  int64_t m = v % period;
  if (m < 0) m += period;
  if (m < n) return m;
  return border == kSymmetric ? period - 1 - m : period - m;
}

inline float load_any(const void* p, int32_t dtype, int64_t i) {
  return dtype == kU8 ? static_cast<float>(static_cast<const uint8_t*>(p)[i]) : load_as_float(p, dtype, i);
}
inline char* element(void* p, int32_t dtype, int64_t i) {
  return static_cast<char*>(p) + i * (dtype == kU8 ? 1 : dtype_size(dtype));
}
inline void widen_any(float* out, const void* in, int32_t dtype, int64_t n, int64_t stride) {
  if (dtype == kU8) {
    const auto* p = static_cast<const uint8_t*>(in);
    if (stride == 1)
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(p[i]);
    else
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(p[i * stride]);
  } else {
    widen(out, in, dtype, n, stride);
  }
}
// Rounds halves to even and clamps.
inline void narrow_any(void* out, const float* in, int32_t dtype, int64_t n) {
  if (dtype != kU8) return narrow(out, in, dtype, n, 1);
  auto* p = static_cast<uint8_t*>(out);
  for (int64_t i = 0; i < n; ++i) {
    const float v = in[i] > 0.0f ? in[i] < 255.0f ? in[i] : 255.0f : 0.0f;
    p[i] = static_cast<uint8_t>(static_cast<int32_t>(v + 12582912.0f - 12582912.0f));  // 1.5 * 2^23: to an integer
  }
}

struct Rows {
  const char* data = nullptr;
  int32_t dtype = kF32, border = kReflect;
  bool direct = false;
  bool doubled = false;  // first and last row count twice (the adjoint of the reflect border)
  int64_t H = 0, W = 0, sh = 0, sw = 0;
  int64_t pitch = 0, capacity = 0, lo = 0, hi = 0;  // the ring holds virtual rows [lo, hi)
  float *ring = nullptr, *zero = nullptr, *edge = nullptr;

  const float* source(int64_t m) const {
    return reinterpret_cast<const float*>(element(const_cast<char*>(data), dtype, m * sh));
  }
  bool whole() const { return H <= capacity; }  // every row of the image fits: slots go by real rows

  void start(const char* plane) {
    data = plane;
    lo = hi = 0;
    if (direct && doubled)
      for (int e = 0; e < 2; ++e) {
        const float* p = source(e == 0 ? 0 : H - 1);
        for (int64_t i = 0; i < W; ++i) edge[e * pitch + i] = 2.0f * p[i];
      }
    if (!direct && whole())
      for (int64_t m = 0; m < H; ++m) stage(m, ring + m * pitch);
  }

  void stage(int64_t m, float* to) const {
    if (m < 0) {
      memset(to, 0, static_cast<size_t>(pitch) * sizeof(float));
      return;
    }
    widen_any(to, source(m), dtype, W, sw);
    for (int64_t i = W; i < pitch; ++i) to[i] = 0;
    if (doubled && (m == 0 || m == H - 1))
      for (int64_t i = 0; i < W; ++i) to[i] *= 2.0f;
  }

  // Virtual rows [from, to) are about to be read; to - from <= capacity.
  void prepare(int64_t from, int64_t to) {
    if (direct || whole()) return;
    if (from < lo || from > hi || hi == lo) hi = from;
    lo = from;
    for (; hi < to; ++hi) stage(border_index(hi, H, border), slot(hi));
  }
  float* slot(int64_t v) const {
    const int64_t m = v % capacity;
    return ring + (m < 0 ? m + capacity : m) * pitch;
  }

  const float* row(int64_t v) const {
    if (!direct && !whole()) return slot(v);
    const int64_t m = border_index(v, H, border);
    if (m < 0) return zero;
    if (!direct) return ring + m * pitch;
    if (doubled && (m == 0 || m == H - 1)) return edge + (m == 0 ? 0 : pitch);
    return source(m);
  }
};

// kRows output rows of kColumns vectors at x: out[o] = sum_t taps[t] row[o + t], t in order. rows holds K + kRows - 1
// pointers. A row is loaded once for the eight outputs that it enters.
template <int kTaps>
inline void vertical_few(const float* const* rows, const float* taps, int64_t x, float* out, int64_t pitch) {
  vf acc[kRows][kColumns] = {};
#pragma GCC unroll 16
  for (int j = 0; j < kTaps + kRows - 1; ++j) {
    vf v[kColumns];
    for (int c = 0; c < kColumns; ++c) v[c] = load(rows[j] + x + c * kWidth);
#pragma GCC unroll 8
    for (int o = 0; o < kRows; ++o)
      if (j - o >= 0 && j - o < kTaps)
        for (int c = 0; c < kColumns; ++c) acc[o][c] = madd(splat(taps[j - o]), v[c], acc[o][c]);
  }
#pragma GCC unroll 8
  for (int o = 0; o < kRows; ++o)
    for (int c = 0; c < kColumns; ++c) store(out + o * pitch + c * kWidth, acc[o][c]);
}

inline void vertical_many(const float* const* rows, const float* taps, int64_t K, int64_t x, float* out,
                          int64_t pitch) {
  vf acc[kRows][kColumns] = {};
#pragma GCC unroll 8
  for (int j = 0; j < kRows - 1; ++j) {
    vf v[kColumns];
    for (int c = 0; c < kColumns; ++c) v[c] = load(rows[j] + x + c * kWidth);
#pragma GCC unroll 8
    for (int o = 0; o <= j; ++o)
      for (int c = 0; c < kColumns; ++c) acc[o][c] = madd(splat(taps[j - o]), v[c], acc[o][c]);
  }
  for (int64_t j = kRows - 1; j < K; ++j) {
    vf v[kColumns];
    for (int c = 0; c < kColumns; ++c) v[c] = load(rows[j] + x + c * kWidth);
    const float* w = taps + j;
#pragma GCC unroll 8
    for (int o = 0; o < kRows; ++o)
      for (int c = 0; c < kColumns; ++c) acc[o][c] = madd(splat(w[-o]), v[c], acc[o][c]);
  }
#pragma GCC unroll 8
  for (int e = 0; e < kRows - 1; ++e) {
    vf v[kColumns];
    for (int c = 0; c < kColumns; ++c) v[c] = load(rows[K + e] + x + c * kWidth);
    const float* w = taps + K + e;
#pragma GCC unroll 8
    for (int o = e + 1; o < kRows; ++o)
      for (int c = 0; c < kColumns; ++c) acc[o][c] = madd(splat(w[-o]), v[c], acc[o][c]);
  }
#pragma GCC unroll 8
  for (int o = 0; o < kRows; ++o)
    for (int c = 0; c < kColumns; ++c) store(out + o * pitch + c * kWidth, acc[o][c]);
}

// The vertical pass of kRows rows: W columns into out, whose rows are `pitch` apart. Where the rows end at W, the last
// vectors overlap their neighbours and compute the same numbers again.
inline void vertical(const float* const* rows, const float* taps, int64_t K, int64_t W, bool exact_width, float* out,
                     int64_t pitch) {
  for (int64_t i = 0; i < W; i += kDirectWidth) {
    const int64_t x = exact_width && i + kDirectWidth > W ? W - kDirectWidth : i;
    if (K == 1)
      vertical_few<1>(rows, taps, x, out + x, pitch);
    else if (K == 3)
      vertical_few<3>(rows, taps, x, out + x, pitch);
    else if (K == 5)
      vertical_few<5>(rows, taps, x, out + x, pitch);
    else
      vertical_many(rows, taps, K, x, out + x, pitch);
  }
}

// out[x] = sum_t taps[t] in[x + t] for `blocks` blocks of kBlockVectors vectors; `last` is where the last block starts.
constexpr int kBlockVectors = 4;
constexpr int64_t kBlockWidth = kBlockVectors * kWidth;
inline void horizontal(const float* in, const float* taps, int64_t K, int64_t W, bool exact_width, float* out) {
  for (int64_t i = 0; i < W; i += kBlockWidth) {
    const int64_t x = exact_width && i + kBlockWidth > W ? W - kBlockWidth : i;
    vf acc[kBlockVectors] = {};
    for (int64_t t = 0; t < K; ++t) {
      const vf w = splat(taps[t]);
#pragma GCC unroll 4
      for (int c = 0; c < kBlockVectors; ++c) acc[c] = madd(w, load(in + x + t + c * kWidth), acc[c]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < kBlockVectors; ++c) store(out + x + c * kWidth, acc[c]);
  }
}

// Fills the r columns on either side of line[0 .. W).
inline void extend(float* line, int64_t W, int64_t r, int32_t border) {
  for (int64_t i = 1; i <= r; ++i) {
    const int64_t left = border_index(-i, W, border), right = border_index(W - 1 + i, W, border);
    line[-i] = left < 0 ? 0.0f : line[left];
    line[W - 1 + i] = right < 0 ? 0.0f : line[right];
  }
}

// What one thread works with on one sample: its part of the workspace, cut up, and where the sample's tables lie.
struct Blur {
  int64_t ry, rx, Ky, Kx, pad, pitch;  // pad: columns before the first of a line; pitch: of a line with its halo
  bool sliding;
  int64_t restart_y, restart_x;
  const float *wy, *wx, *dwy, *dwx, *ty, *tx;
  const float *cosines_y, *start_y, *cosines_x, *start_x;
  float *line, *scratch, *state;  // [16, pitch]; [pitch]; [12, row pitch]
  const float** rows;
  Rows in;

  Blur(const GaussianBlur& a, int64_t b, float* workspace) {
    const int64_t* plan = a.plan + b * a.plan_stride;
    ry = plan[0], rx = plan[1], sliding = plan[2] != 0, restart_y = plan[3], restart_x = plan[4];
    Ky = 2 * ry + 1, Kx = 2 * rx + 1;
    wy = a.table + b * a.table_stride;
    wx = wy + Ky, dwy = wx + Kx, dwx = dwy + Ky, ty = dwx + Kx, tx = ty + ry + 1;
    cosines_y = tx + rx + 1, start_y = cosines_y + 16;
    cosines_x = start_y + 12 * (Ky + 1), start_x = cosines_x + 16;
    pad = round16(rx + 1);
    pitch = 2 * pad + round16(a.W) + 64;
    in.pitch = round16(a.W) + 64;
    in.capacity = Ky + kRingSlack;
    in.H = a.H, in.W = a.W, in.border = a.border, in.dtype = a.x.dtype, in.sh = a.x.s[2], in.sw = a.x.s[3];
    in.direct = a.x.dtype == kF32 && (a.x.s[3] == 1 || a.W == 1) && a.W >= kDirectWidth;
    float* p = workspace;
    in.zero = p, p += in.pitch;
    in.edge = p, p += 2 * in.pitch;
    line = p, p += 16 * pitch;
    scratch = p, p += pitch;
    state = p, p += 12 * in.pitch;
    rows = reinterpret_cast<const float**>(p), p += 2 * round16(Ky + 64);
    in.ring = p;
    for (int64_t i = 0; i < in.pitch; ++i) in.zero[i] = 0;
  }
};

}  // namespace
}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
