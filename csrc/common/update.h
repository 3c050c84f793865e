// Coefficients of one sampler update, resolved per sample in float64. Host and device: on a GPU the per-sample
// inputs are read where they live, so no value ever travels to the host.
#pragma once
#include <cmath>

#include "philox.h"

namespace fastdiff {
namespace {

// out = sum_i c[i] t_i + k * clamp(sum_i a[i] t_i, -clip, clip) + noise * z; `clamped` false: k and a are folded into
// c. z is drawn from `stream`, where Update::draws.
struct Terms {
  float c[kMaxTerms];
  float a[kMaxTerms];
  float k;
  float clip;
  bool clamped;
  float noise;
  Stream stream;
};

// The row of every table in this step. A counter beyond the table means its last row, never memory outside.
FD_HD int64_t table_row(const Update& u) {
  if (u.row == nullptr) return 0;
  const int64_t row = *u.row;
  return row < 0 ? 0 : (row < u.rows ? row : u.rows - 1);
}

FD_HD double coefficient(const Coefficient& c, int64_t row, int64_t b) {
  if (c.data == nullptr) return c.value;
  const int64_t i = row * c.row_stride + b * c.sample_stride;
  return c.dtype == kF64 ? static_cast<const double*>(c.data)[i]
                         : static_cast<double>(static_cast<const float*>(c.data)[i]);
}

FD_HD Stream stream_of(const Seed& s, int64_t b) {
  const int64_t* pair = s.data == nullptr ? &s.value : s.data + (s.per_sample ? 2 * b : 0);
  const uint64_t seed = static_cast<uint64_t>(pair[0]), offset = s.has_offset ? static_cast<uint64_t>(pair[1]) : 0;
  Stream r;
  r.key[0] = static_cast<uint32_t>(seed), r.key[1] = static_cast<uint32_t>(seed >> 32);
  r.sample = s.per_sample ? 0 : static_cast<uint32_t>(b);
  r.offset[0] = static_cast<uint32_t>(offset), r.offset[1] = static_cast<uint32_t>(offset >> 32);
  return r;
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
FD_HD void ddim_terms(const Update& u, int64_t b, double c[kMaxTerms], double a[kMaxTerms], double* k, double* noise) {
  const int64_t row = table_row(u);
  const double ab = coefficient(u.alpha_bar, row, b), ab2 = coefficient(u.alpha_bar_next, row, b);
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
  // g = weight pred + (1 - weight) uncond. No index is known at run time alone, or a GPU would spill the arrays.
  const double weight = u.has_uncond ? u.guidance : 1.0;
  c[0] = direction * nx, a[0] = dx;
  c[1] = direction * ng * weight, a[1] = dg * weight;
  if (u.has_uncond) c[2] = direction * ng * (1 - weight), a[2] = dg * (1 - weight);
  if (u.has_noise) c[2] = u.has_uncond ? c[2] : sigma, c[3] = u.has_uncond ? sigma : 0;
  *noise = u.draws ? sigma : 0;
}

FD_HD Terms resolve(const Update& u, int64_t b) {
  Terms t;
  t.k = 0, t.clip = 0, t.clamped = false;
  t.stream = stream_of(u.seed, b);
  double c[kMaxTerms] = {}, a[kMaxTerms] = {}, k = 0, noise = 0;
  if (u.kind == kLinear) {
    const int64_t row = table_row(u);
    for (int i = 0; i < kMaxTerms; ++i)
      if (i < u.count) c[i] = coefficient(u.c[i], row, b);
    if (u.draws) noise = coefficient(u.noise_scale, row, b);
  } else {
    ddim_terms(u, b, c, a, &k, &noise);
    t.clamped = u.clip >= 0;
    t.k = static_cast<float>(k), t.clip = static_cast<float>(u.clip);
    if (!t.clamped)
      for (int i = 0; i < kMaxTerms; ++i) c[i] += k * a[i];
  }
  t.noise = static_cast<float>(noise);
  for (int i = 0; i < kMaxTerms; ++i) t.c[i] = static_cast<float>(c[i]), t.a[i] = static_cast<float>(a[i]);
  return t;
}

FD_HD float clamp(float v, float bound) { return v < -bound ? -bound : (v > bound ? bound : v); }  // NaN passes

}  // namespace
}  // namespace fastdiff
