// 2^x on the multiply-add pipes, for kernels that wait for the special function unit (16 results per clock and SM,
// where the pipes do 128 multiply-adds).
//
// x = n + r with |r| <= 1/2, 2^x = 2^n p(r); p(0) is exactly 1, so that a state without decay keeps every bit. Largest
// relative error against float64 over [-126, 126] (tests/test_emulated_scan.py measures it), in units of 2^-24, and
// instructions:
//
//   degree 3   1.01e-4   1700   12        ex2.approx   2.4e-7   4   1 (of the special function unit)
//   degree 4   2.9e-6      48   13
//   degree 5   1.6e-7     2.7   14
//
// What a recurrence can bear: the tolerance of the selective scan allows a decay an error of 2 + |t A| units, times
// 4 + sqrt(N) for the whole result, however the operands are stored; at N = 1 that is 10 units and more. Rounding the
// result to 16 bits hides nothing of it: errors of decays add up over the memory of the recurrence (a state with
// |t A| = 1e-3 remembers a thousand steps, and degree 3 would put 10 % into it, 26 times the rounding of bfloat16), and
// y is a sum of states that may cancel. So degree 5 may stand for ex2.approx, and degrees 3 and 4 may not, whatever the
// type.
#pragma once
#include "mma.cuh"

namespace fastdiff {
namespace cuda {
namespace {

template <int kDegree>
FD_D float exp2_poly(float x) {
  static_assert(kDegree >= 3 && kDegree <= 5, "degrees with coefficients");
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  const float inside = x < -126.0f ? -126.0f : x > 128.0f ? 128.0f : x;
  const float shifted = inside + kShift, r = inside - (shifted - kShift);
  float p;
  if constexpr (kDegree == 3) {
    p = fmaf(0.05500893294811249f, r, 0.24221095442771912f);
    p = fmaf(p, r, 0.6932829022407532f);
  } else if constexpr (kDegree == 4) {
    p = fmaf(0.009582852944731712f, r, 0.055906426161527634f);
    p = fmaf(p, r, 0.24024099111557007f);
    p = fmaf(p, r, 0.6931241750717163f);
  } else {
    p = fmaf(0.001326472731307149f, r, 0.009671512991189957f);
    p = fmaf(p, r, 0.05550733581185341f);
    p = fmaf(p, r, 0.24022242426872253f);
    p = fmaf(p, r, 0.6931470036506653f);
  }
  p = fmaf(p, r, 1.0f);
  const float y = bits_float(float_bits(p) + (float_bits(shifted) << 23));  // the low bits of `shifted` are n
  return x < -126.0f ? 0.0f : x == x ? y : x;
}

}  // namespace
}  // namespace cuda
}  // namespace fastdiff
