// How the sliding path (gaussian_sliding.cuh) cuts up an axis, and its table: the taps as a sum of cosines, what a
// state is carried over segments with, and the weights of the first states.
#pragma once
#include "gaussian_blur.cuh"

namespace fastdiff {
namespace cuda {
namespace {

constexpr double kSpread = 1.24;            // SPREAD of _gaussian_plan.py
constexpr int kCarried = 2 * kCosines - 1;  // F of six cosines, D of five: a constant needs none
constexpr int kWaves = kCosines - 1;        // cosines of a frequency
constexpr int kSlideColumns = 8, kSegments = kThreads / kSlideColumns;

// How an axis is cut up.
struct Slide {
  int n, r, window;  // samples of the axis; radius; 2 r + 2 samples that a start sums
  int period, flip;  // of the border, 0 where it has none; a position p >= n of a period is sample flip - p
  int rows, part;    // outputs of a segment, of a block
  int first, count;  // of the window: where the table of starting weights begins, and its length
};
FD_D Slide make_slide(const Axis& a, int32_t border) {
  Slide s;
  s.n = static_cast<int>(a.n), s.r = static_cast<int>(a.radius), s.window = 2 * s.r + 2;
  s.period = border == kReflect ? 2 * s.n - 2 : border == kSymmetric ? 2 * s.n : border == kCircular ? s.n : 0;
  s.flip = border == kSymmetric ? s.period - 1 : s.period;
  int part = static_cast<int>(kSlidePart);
  while (part < s.window - 1 && part < 4096) part *= 2;
  s.rows = ((part < s.n ? part : s.n) + kSegments - 1) / kSegments;
  s.part = s.rows * kSegments;
  s.first = s.period == 0 && s.r + 2 > s.n ? s.r + 2 - s.n : 0;
  const int most = s.period > 0 ? s.period : s.r + s.n + 1 - s.first;
  s.count = s.window - s.first < most ? s.window - s.first : most;
  return s;
}

// A table: A_0; per wave 4 sin^2(theta / 2), a, a + b [5 each]; at 16 + 20 (k - 1), k = 1 .. 4, per wave the matrix
// M^(k L) - 1 as {F from F, F from D, D from F, D from D}; then weights of the sample beyond either end [parts][2][12];
// then starting weights [count][12]: six for F, five for D.
FD_HD int ends_at() { return static_cast<int>(kSlideHead); }
FD_D int64_t weights_at(const Work& a) { return kSlideHead + 24 * slide_parts(a.H > a.W ? a.H : a.W); }

// Angles are in half turns: no reduction of large arguments, on a stack, is needed then.
FD_D double sin_turn(double half_turns) {
#ifdef __CUDA_ARCH__
  return sinpi(half_turns);
#else
  return sin(3.14159265358979323846 * half_turns);
#endif
}
FD_D double cos_turn(double half_turns) {
#ifdef __CUDA_ARCH__
  return cospi(half_turns);
#else
  return cos(3.14159265358979323846 * half_turns);
#endif
}
// c[m] = cos(m angle), s[m] = sin(m angle).
FD_D void multiples(double angle, double (&c)[kCosines], double (&s)[kCosines]) {
  c[0] = 1, s[0] = 0, c[1] = cos_turn(angle), s[1] = sin_turn(angle);
#pragma unroll
  for (int m = 2; m < kCosines; ++m) c[m] = 2 * c[1] * c[m - 1] - c[m - 2], s[m] = 2 * c[1] * s[m - 1] - s[m - 2];
}

// For this block's threads. `sums`: kThreads doubles; `system`: kCosines (kCosines + 1) of them, in shared memory.
FD_D void slide_table(const Axis& axis, const Slide& s, int64_t weights, float* table, double* sums, double* system) {
  const int thread = threadIdx.x;
  const double theta = 1 / (kSpread * (s.r + 0.5)), size = axis.sigma < 0 ? -axis.sigma : axis.sigma;
  const auto dirichlet = [&](int m) {  // the sum of cos(m theta k) over |k| <= r
    return m == 0 ? 2.0 * s.r + 1 : sin_turn(m / kSpread) / sin_turn(0.5 * m * theta);
  };
  double A[kCosines] = {}, c[kCosines], sine[kCosines];
  for (int k = thread; k <= s.r; k += kThreads) {
    const double u = k / size, w = exp(-0.5 * (u * u)) * (k == 0 ? 1 : 2);
    multiples(theta * k, c, sine);
#pragma unroll
    for (int m = 0; m < kCosines; ++m) A[m] += w * c[m];
  }
#pragma unroll
  for (int m = 0; m < kCosines; ++m) A[m] = block_sum_double<kThreads>(A[m], sums);
  // The normal equations, solved by elimination; they are positive definite.
  constexpr int kWide = kCosines + 1;
  const int i = thread / kWide, j = thread % kWide;
  const bool mine = i < kCosines;
  __syncthreads();
  if (mine) {
    double v = 0;
    if (j < kCosines) {
      v = 0.5 * (dirichlet(i < j ? j - i : i - j) + dirichlet(i + j));
    } else {
#pragma unroll
      for (int m = 0; m < kCosines; ++m)
        if (m == i) v = A[m];
    }
    system[thread] = v;
  }
  __syncthreads();
  for (int k = 0; k < kCosines; ++k) {
    double v = 0;
    if (mine) v = system[thread] - (i == k ? 0 : system[i * kWide + k] / system[k * kWide + k] * system[k * kWide + j]);
    FD_BARRIER(kSlideSystem);
    if (mine) system[thread] = v;
    __syncthreads();
  }
  double total = 0;
#pragma unroll
  for (int m = 0; m < kCosines; ++m) {
    A[m] = system[m * kWide + kCosines] / system[m * kWide + m];
    total += A[m] * dirichlet(m);
  }
#pragma unroll
  for (int m = 0; m < kCosines; ++m) A[m] /= total;

  if (thread == 0) table[0] = static_cast<float>(A[0]);
  if (thread < kWaves) {
    const double t = theta * (thread + 1), half = sin_turn(0.5 * t);
    double own = 0;
#pragma unroll
    for (int m = 1; m < kCosines; ++m)
      if (m == thread + 1) own = A[m];
    table[1 + thread] = static_cast<float>(4 * half * half);
    table[6 + thread] = static_cast<float>(own * cos_turn(t * s.r));
    table[11 + thread] = static_cast<float>(2 * own * half * sin_turn(t * (s.r + 0.5)));
  }
  if (thread < 4 * kWaves) {
    const int k = thread / kWaves + 1, m = thread % kWaves + 1;
    const double t = theta * m, L = static_cast<double>(k) * s.rows, half = sin_turn(0.5 * t);
    const double slope = sin_turn(L * t) / sin_turn(t), bend = -2 * sin_turn(0.5 * L * t) / cos_turn(0.5 * t);
    float* const to = table + 16 + 20 * (k - 1) + 4 * (m - 1);
    to[0] = static_cast<float>(bend * sin_turn(0.5 * (L + 1) * t)), to[1] = static_cast<float>(slope);
    to[2] = static_cast<float>(-4 * half * half * slope),
    to[3] = static_cast<float>(bend * sin_turn(0.5 * (L - 1) * t));
  }
  // Beyond the left end stand the taps k < -n0 of the first output n0, beyond the right one those from n - n0 on.
  for (int64_t at = thread; s.period == 0 && at / 2 * s.part < s.n; at += kThreads) {
    const bool right = at % 2 != 0;
    const int64_t n0 = at / 2 * s.part;
    const int64_t from = right ? s.n - n0 : n0 + 1;  // taps of that distance and more, which number:
    const double count = from <= s.r ? static_cast<double>(s.r - from + 1) : 0;
    float* const to = table + ends_at() + 12 * at;
    to[0] = static_cast<float>(A[0] * count), to[11] = 0;
#pragma unroll
    for (int m = 1; m < kCosines; ++m) {
      const double t = theta * m;
      const double f =
          (sin_turn(t * (s.r + 0.5)) - sin_turn(t * (static_cast<double>(from) - 0.5))) / (2 * sin_turn(0.5 * t));
      const double d = right ? (from <= s.r ? cos_turn(t * static_cast<double>(from)) : 0)
                             : (n0 <= s.r ? -cos_turn(t * static_cast<double>(n0)) : 0);
      to[m] = static_cast<float>(count > 0 ? A[m] * f : 0), to[5 + m] = static_cast<float>(A[m] * d);
    }
  }
  const double near_cos = cos_turn(0.5 * theta), near_sin = sin_turn(0.5 * theta);
  for (int at = thread; at < s.count; at += kThreads) {
    double F[kCosines] = {}, D[kCosines] = {};
    for (int e = s.first + at; e < s.window; e += s.period) {
      const int tap = e - s.r - 1;
      multiples(theta * tap, c, sine);
      if (tap == -s.r - 1 || tap == s.r) {  // only one of F[n] and F[n - 1] has it
        if (tap < 0) multiples(theta * s.r, c, sine);
#pragma unroll
        for (int m = 0; m < kCosines; ++m) {
          if (tap > 0) F[m] += A[m] * c[m];
          D[m] += tap > 0 ? A[m] * c[m] : -A[m] * c[m];
        }
      } else {
        // cos(t k) - cos(t (k + 1)) = 2 sin(t / 2) sin(t (k + 1/2))
        const double cos_half = c[1] * near_cos - sine[1] * near_sin, sin_half = sine[1] * near_cos + c[1] * near_sin;
        double before = 0, now = sin_half, own = near_sin, last = 0;  // sines of multiples of both angles
#pragma unroll
        for (int m = 0; m < kCosines; ++m) {
          F[m] += A[m] * c[m];
          if (m == 0) continue;
          D[m] += 2 * A[m] * own * now;
          const double next = 2 * cos_half * now - before, later = 2 * near_cos * own - last;
          before = now, now = next, last = own, own = later;
        }
      }
      if (s.period == 0 || FD_MUTATED(kSlideFold)) break;
    }
    float* const to = table + weights + 12 * at;
#pragma unroll
    for (int m = 0; m < kCosines; ++m) to[m] = static_cast<float>(F[m]);
#pragma unroll
    for (int m = 1; m < kCosines; ++m) to[5 + m] = static_cast<float>(D[m]);
    to[11] = 0;
  }
}

}  // namespace
}  // namespace cuda
}  // namespace fastdiff
