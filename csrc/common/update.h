// Coefficients of one sampler update, resolved per sample in float64. Host and device: on a GPU the per-sample
// inputs are read where they live, so no value ever travels to the host.
#pragma once
#include <cmath>

#include "dtype.h"

namespace fastdiff {
namespace {

// out = sum_i c[i] t_i + k * clamp(sum_i a[i] t_i, -clip, clip); `clamped` false: k and a are folded into c.
struct Terms {
  float c[kMaxTerms];
  float a[kMaxTerms];
  float k;
  float clip;
  bool clamped;
};

FD_HD double coefficient(const Coefficient& c, int64_t b) {
  if (c.data == nullptr) return c.value;
  return c.dtype == kF64 ? static_cast<const double*>(c.data)[b]
                         : static_cast<double>(static_cast<const float*>(c.data)[b]);
}

FD_HD double at_least_zero(double v) { return v < 0 ? 0.0 : v; }  // NaN stays NaN

// DDIM (Song, Meng & Ermon 2021, eq. 12 and 16) for every prediction type, with a = sqrt(alpha_bar),
// s = sqrt(1 - alpha_bar), x = a * data + s * noise. Data and noise are each linear in (x, guided prediction g):
//   epsilon: data = (x - s g) / a          noise = g
//   v:       data = a x - s g              noise = s x + a g                  (v = a noise - s data)
//   sample:  data = g                      noise = (x - a g) / s
//   flow:    data = (x + s g) / (a + s)    noise = (x - a g) / (a + s)        (g = data - noise)
// out = a' data + sqrt(1 - alpha_bar' - sigma^2) noise + sigma * fresh noise,
// sigma^2 = eta^2 (1 - alpha_bar') / (1 - alpha_bar) (1 - alpha_bar / alpha_bar').
FD_HD void ddim_terms(const Update& u, int64_t b, double c[kMaxTerms], double a[kMaxTerms], double* k) {
  const double ab = coefficient(u.alpha_bar, b), ab2 = coefficient(u.alpha_bar_next, b);
  const double ra = sqrt(ab), rs = sqrt(at_least_zero(1 - ab));
  double dx, dg, nx, ng;  // data = dx x + dg g, noise = nx x + ng g
  switch (u.prediction) {
    case kEpsilon:
      dx = 1 / ra, dg = -rs / ra, nx = 0, ng = 1;
      break;
    case kV:
      dx = ra, dg = -rs, nx = rs, ng = ra;
      break;
    case kSample:
      dx = 0, dg = 1, nx = 1 / rs, ng = -ra / rs;
      break;
    default:
      dx = 1 / (ra + rs), dg = rs / (ra + rs), nx = 1 / (ra + rs), ng = -ra / (ra + rs);
  }
  double sigma = 0;
  if (u.eta > 0) sigma = u.eta * sqrt(at_least_zero((1 - ab2) / (1 - ab) * (1 - ab / ab2)));
  const double direction = sqrt(at_least_zero(1 - ab2 - sigma * sigma));
  *k = sqrt(ab2);
  const double weight[2] = {u.has_uncond ? u.guidance : 1.0, 1 - u.guidance};  // of pred and uncond in g
  c[0] = direction * nx, a[0] = dx;
  int i = 1;
  for (int j = 0; j <= u.has_uncond; ++j, ++i) c[i] = direction * ng * weight[j], a[i] = dg * weight[j];
  if (u.has_noise) c[i] = sigma, a[i] = 0;
}

FD_HD Terms resolve(const Update& u, int64_t b) {
  Terms t;
  t.k = 0, t.clip = 0, t.clamped = false;
  double c[kMaxTerms] = {}, a[kMaxTerms] = {}, k = 0;
  if (u.kind == kLinear) {
    for (int i = 0; i < u.count; ++i) c[i] = coefficient(u.c[i], b);
  } else {
    ddim_terms(u, b, c, a, &k);
    t.clamped = u.clip >= 0;
    t.k = static_cast<float>(k), t.clip = static_cast<float>(u.clip);
    if (!t.clamped)
      for (int i = 0; i < u.count; ++i) c[i] += k * a[i];
  }
  for (int i = 0; i < kMaxTerms; ++i) t.c[i] = static_cast<float>(c[i]), t.a[i] = static_cast<float>(a[i]);
  return t;
}

FD_HD float clamp(float v, float bound) { return v < -bound ? -bound : (v > bound ? bound : v); }  // NaN passes

}  // namespace
}  // namespace fastdiff
