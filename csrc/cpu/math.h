// Elementary functions of one vector of floats, to about one unit in the last place, with IEEE results at the edges:
// NaN stays NaN, exp(-inf) = 0, exp(large) = inf. Pure functions, the same on every lane, whatever its neighbours.
#pragma once
#include <cmath>
#include <limits>

#include "vec.h"

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_ISA {
namespace {

inline vf vmax(vf a, vf b) { return a > b ? a : b; }  // b where either is NaN
inline vf vmin(vf a, vf b) { return a < b ? a : b; }

// exp(x). Cody-Waite: x = n ln 2 + r with |r| <= ln 2 / 2, a degree-7 polynomial of r, and 2^n applied in two halves so
// that subnormal results are right (one extra multiplication; -fno-trapping-math leaves rounding as it is).
// Error <= 1.1 ulp over the whole range.
inline vf exp(vf x) {
  const vf clamped = vmin(splat(89.0f), vmax(splat(-104.0f), x));  // beyond: inf and 0 anyway
  const vf magic = splat(12582912.0f);                             // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = madd(clamped, splat(1.44269504088896341f), magic);
  const vf n = shifted - magic;
  vf r = madd(n, splat(-0.693145751953125f), clamped);
  r = madd(n, splat(-1.42860682030941723e-6f), r);
  vf p = splat(1.9875691500e-4f);
  p = madd(p, r, splat(1.3981999507e-3f));
  p = madd(p, r, splat(8.3334519073e-3f));
  p = madd(p, r, splat(4.1665795894e-2f));
  p = madd(p, r, splat(1.6666665459e-1f));
  p = madd(p, r, splat(5.0000001201e-1f));
  p = madd(p, r * r, r) + splat(1.0f);
  const vi k = (vi)shifted - (vi)magic;
  const vi half = k >> 1;
  const vf lo = (vf)((half + 127) << 23), hi = (vf)((k - half + 127) << 23);
  const vf y = p * lo * hi;
  return x == x ? y : x;
}

}  // namespace
}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
