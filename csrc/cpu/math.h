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

// exp(x), or exp(-x) for kSign = -1, is the result times 2^k for |x| <= 104. Cody-Waite: x = k ln 2 + r with
// |r| <= ln 2 / 2, a degree-7 polynomial of r. (The sign costs nothing inside, but an operation outside.)
template <int kSign>
inline vf exp_parts(vf x, vi* k) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = madd(x, splat(kSign * 1.44269504088896341f), magic);
  const vf n = shifted - magic;
  vf r = madd(n, splat(-0.693145751953125f), kSign < 0 ? -x : x);
  r = madd(n, splat(-1.42860682030941723e-6f), r);
  vf p = splat(1.9875691500e-4f);
  p = madd(p, r, splat(1.3981999507e-3f));
  p = madd(p, r, splat(8.3334519073e-3f));
  p = madd(p, r, splat(4.1665795894e-2f));
  p = madd(p, r, splat(1.6666665459e-1f));
  p = madd(p, r, splat(5.0000001201e-1f));
  *k = (vi)shifted - (vi)magic;
  return madd(p, r * r, r) + splat(1.0f);
}

// exp(x). 2^k is applied in two halves so that subnormal results are right (one extra multiplication;
// -fno-trapping-math leaves rounding as it is). Error <= 1.1 ulp over the whole range.
inline vf exp(vf x) {
  vi k;
  const vf p = exp_parts<1>(vmin(splat(89.0f), vmax(splat(-104.0f), x)), &k);  // beyond: inf and 0 anyway
  const vi half = k >> 1;
  const vf lo = (vf)((half + 127) << 23), hi = (vf)((k - half + 127) << 23);
  const vf y = p * lo * hi;
  return x == x ? y : x;
}

// exp(x), or exp(-x), for |x| <= 87, where nothing can overflow or be subnormal. Error <= 1.1 ulp.
template <int kSign = 1>
inline vf exp_inside(vf x) {
  vi k;
  const vf p = exp_parts<kSign>(x, &k);
  return p * (vf)((k + 127) << 23);
}

// log(1 + x) for 0 <= x, and for kBounded x < 2^126: w = 1 + x rounded is 2^k (1 + f), |f| < 0.42, and what rounding
// lost is put back into f, so that there is no division; a degree-8 polynomial of f (Cephes' logf). Error <= 1.5 ulp:
// the last two sums round, and cancel a little, near x = 0.4.
template <bool kBounded>
inline vf log1p_of(vf x) {
  const vf w = splat(1.0f) + x;
  const vf lost = x - (w - splat(1.0f));
  const vi k = ((vi)w - 0x3f3504f3) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
  vi up = k;
  if (!kBounded) up = k < 126 ? k : (vi{} + 126);  // nothing is lost up there, and 2^-128 has no exponent
  const vf m = (vf)((vi)w - (k << 23)), scale = (vf)((127 - up) << 23);
  const vf f = madd(lost, scale, m - splat(1.0f));
  vf p = splat(7.0376836292e-2f);
  p = madd(p, f, splat(-1.1514610310e-1f));
  p = madd(p, f, splat(1.1676998740e-1f));
  p = madd(p, f, splat(-1.2420140846e-1f));
  p = madd(p, f, splat(1.4249322787e-1f));
  p = madd(p, f, splat(-1.6668057665e-1f));
  p = madd(p, f, splat(2.0000714765e-1f));
  p = madd(p, f, splat(-2.4999993993e-1f));
  p = madd(p, f, splat(3.3333331174e-1f));
  const vf n = __builtin_convertvector(k, vf), ff = f * f;
  const vf tail = madd(n, splat(-2.12194440e-4f), p * ff * f);
  const vf y = madd(n, splat(0.693359375f), f + madd(splat(-0.5f), ff, tail));
  if (kBounded) return y;
  return w < splat(std::numeric_limits<float>::infinity()) ? y : x;  // NaN too
}
inline vf log1p(vf x) { return log1p_of<false>(x); }
inline vf log1p_inside(vf x) { return log1p_of<true>(x); }

}  // namespace
}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
