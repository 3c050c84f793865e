// Wide Gaussians at a cost that does not depend on sigma: the taps, truncated and normalised as they are, written as
//   w[k] = sum_m A_m cos(theta_m k),  |k| <= r,  m < 6,  theta_0 = 0,
// fitted in double precision by fastdiff/ops/_gaussian_plan.py (sum of |errors| about 1e-6 per axis). With
// F_m[n] = A_m sum_k cos(theta_m k) x[n + k] and u = x[n + r + 1] + x[n - r - 1], v = x[n + r] + x[n - r],
//   F_m[n + 1] - 2 cos(theta_m) F_m[n] + F_m[n - 1] = A_m cos(theta_m r) u - A_m cos(theta_m (r + 1)) v.
// It is run as a difference, D[n] = D[n - 1] - 4 sin^2(theta / 2) F[n] + (a u + b v), F[n + 1] = F[n] + D[n]: the plain
// form magnifies rounding by 1 / theta, this one does not. a u + b v is taken as a (u - v) + (a + b) v, a + b rounded
// from double: a and b cancel but for a share of theta, and a rounding of theirs would come back 1 / theta times. The
// recurrences start afresh, from sums of taps, every restart rows or columns counted from the image's edge, so that
// rounding cannot pile up.
//
// A group of kWidth rows at a time. The vertical pass has a vector of columns per recurrence, keeps the state of every
// column between groups, and writes its result transposed, so that the horizontal pass has a vector of rows.
#pragma once
#include <utility>

#include "gaussian_rows.h"

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_ISA {
namespace {

constexpr int kStates = 2 * kCosines - 1;  // F of six cosines, D of five: a constant needs no difference
constexpr int kStart = 12;                 // starting weights per tap: six for F, five for D
constexpr int64_t kStartBlock = 64;        // taps summed at a time, so that the error of a start grows with K / 64

// coefficients: A_0; 4 sin^2(theta / 2) [5]; a [5]; a + b [5]
struct Recurrence {
  vf F[kCosines], D[kCosines - 1];
  vf recent = vf{};  // what F[0] has changed by since settle(): a sum of many equal terms would drift, rounded one way

  void load_state(const float* s) {
    for (int m = 0; m < kCosines; ++m) F[m] = load(s + m * kWidth);
    for (int m = 0; m < kCosines - 1; ++m) D[m] = load(s + (kCosines + m) * kWidth);
  }
  void store_state(float* s) const {
    for (int m = 0; m < kCosines; ++m) store(s + m * kWidth, F[m]);
    for (int m = 0; m < kCosines - 1; ++m) store(s + (kCosines + m) * kWidth, D[m]);
  }
  // at(j): samples n - r - 1 + j, j = 0 .. 2 r + 1
  template <typename At>
  void begin(const float* start, int64_t count, const At& at) {
    for (int m = 0; m < kCosines; ++m) F[m] = vf{};
    for (int m = 0; m < kCosines - 1; ++m) D[m] = vf{};
    for (int64_t j = 0; j < count;) {
      vf f[kCosines] = {}, d[kCosines - 1] = {};
      for (const int64_t end = least(count, j + kStartBlock); j < end; ++j, start += kStart) {
        const vf x = at(j);
#pragma GCC unroll 8
        for (int m = 0; m < kCosines; ++m) f[m] = madd(splat(start[m]), x, f[m]);
#pragma GCC unroll 8
        for (int m = 0; m < kCosines - 1; ++m) d[m] = madd(splat(start[kCosines + m]), x, d[m]);
      }
      for (int m = 0; m < kCosines; ++m) F[m] = F[m] + f[m];
      for (int m = 0; m < kCosines - 1; ++m) D[m] = D[m] + d[m];
    }
  }
  void settle() { F[0] = F[0] + recent, recent = vf{}; }
  vf value() const { return (((F[0] + recent) + F[1]) + (F[2] + F[3])) + (F[4] + F[5]); }
  // new_in = x[n + r + 1], new_out = x[n - r - 1], in = x[n + r], out = x[n - r]
  void advance(const float* c, vf new_in, vf new_out, vf in, vf out) {
    const vf change = (new_in - in) + (new_out - out), v = in + out;  // u - v, v
    recent = madd(splat(c[0]), new_in - out, recent);
#pragma GCC unroll 8
    for (int m = 0; m < kCosines - 1; ++m) {
      const vf d = madd(splat(c[6 + m]), change, madd(splat(c[11 + m]), v, D[m]));
      D[m] = madd(splat(-c[1 + m]), F[m + 1], d);
      F[m + 1] = F[m + 1] + D[m];
    }
  }
};

// Exchanges the off-diagonal halves of every square of 2 s lanes.
template <int s, size_t... l>
inline void transpose_step(vf* v, std::index_sequence<l...>) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i)
    if ((i & s) == 0) {
      const vf a = v[i], b = v[i + s];
      v[i] = shuffle<static_cast<int>((l & s) != 0 ? l - s + kWidth : l)...>(a, b);
      v[i + s] = shuffle<static_cast<int>((l & s) != 0 ? l + kWidth : l + s)...>(a, b);
    }
}
template <int s>
inline void transpose_step(vf* v) {
  transpose_step<s>(v, std::make_index_sequence<kWidth>());
}
inline void transpose(vf* v) {
  if (kWidth > 8) transpose_step<(kWidth > 8 ? 8 : 1)>(v);
  if (kWidth > 4) transpose_step<(kWidth > 4 ? 4 : 1)>(v);
  transpose_step<2>(v);
  transpose_step<1>(v);
}

// Rows y0 .. y0 + kWidth - 1 of the vertical pass into `lines`, transposed: sample (x, row) at lines[x kWidth + row].
// afresh: the recurrences start here. b.rows is filled with pointers to virtual rows y0 - ry - 1 .. as needed.
inline void sliding_vertical(const Blur& b, int64_t y0, bool afresh, float* lines) {
  const int64_t r = b.ry, count = b.Ky + 1;
  const float** tail = b.rows;              // virtual rows y0 - r - 1 ..; all that a start needs
  const float** head = b.rows + count - 1;  // virtual rows y0 + r ..
  const int64_t needed = afresh ? count + kWidth : 0;
  const float* near_tail[kWidth + 1];
  const float* near_head[kWidth + 1];
  for (int64_t j = 0; j < needed; ++j) tail[j] = b.in.row(y0 - r - 1 + j);
  for (int i = 0; i <= kWidth; ++i) {
    near_tail[i] = afresh ? tail[i] : b.in.row(y0 - r - 1 + i);
    near_head[i] = afresh ? head[i] : b.in.row(y0 + r + i);
  }
  Recurrence q;
  float* state = b.state;
  for (int64_t i = 0; i < b.in.W; i += kWidth, state += kStates * kWidth) {
    const int64_t x = b.in.direct && i + kWidth > b.in.W ? b.in.W - kWidth : i;
    if (afresh)
      q.begin(b.start_y, count, [&](int64_t j) { return load(tail[j] + x); });
    else
      q.load_state(state);
    vf out[kWidth];
    vf was_in = load(near_head[0] + x), new_out = load(near_tail[0] + x);
    for (int n = 0; n < kWidth; ++n) {
      const vf new_in = load(near_head[n + 1] + x), was_out = load(near_tail[n + 1] + x);
      out[n] = q.value();
      q.advance(b.cosines_y, new_in, new_out, was_in, was_out);
      was_in = new_in, new_out = was_out;
    }
    q.settle();
    q.store_state(state);
    transpose(out);
#pragma GCC unroll 16
    for (int n = 0; n < kWidth; ++n) store(lines + (x + n) * kWidth, out[n]);
  }
}

// The horizontal pass over the same rows, halo filled; emit(x, block) takes kWidth columns from x as kWidth rows.
// Returns a vector of zeros, with NaN where anything was not finite.
template <typename Emit>
inline vf sliding_horizontal(const Blur& b, const float* lines, const Emit& emit) {
  const int64_t r = b.rx, W = b.in.W;
  vf check = vf{};
  Recurrence q;
  for (int64_t x0 = 0; x0 < W; x0 += kWidth) {
    if (x0 % b.restart_x == 0)
      q.begin(b.start_x, b.Kx + 1, [&](int64_t j) { return load(lines + (x0 - r - 1 + j) * kWidth); });
    const float* head = lines + (x0 + r) * kWidth;
    const float* tail = lines + (x0 - r - 1) * kWidth;
    vf out[kWidth];
    vf was_in = load(head), new_out = load(tail);
    for (int n = 0; n < kWidth; ++n) {
      if (x0 + n == W) {  // the rest of this block is not stored
        for (; n < kWidth; ++n) out[n] = vf{};
        break;
      }
      const vf new_in = load(head + (n + 1) * kWidth), was_out = load(tail + (n + 1) * kWidth);
      out[n] = q.value();
      check = madd(out[n], vf{}, check);
      q.advance(b.cosines_x, new_in, new_out, was_in, was_out);
      was_in = new_in, new_out = was_out;
    }
    q.settle();
    transpose(out);
    emit(x0, out);
  }
  return check;
}

}  // namespace
}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
