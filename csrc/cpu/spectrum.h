// What the forward and backward passes of `spectrum` share: where things lie, and modulus and phase of a number.
#pragma once
#include "fft.h"
#include "isa.h"
#include "math.h"
#include "parallel.h"

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_ISA {
namespace {

constexpr float kRed = 0.299f, kGreen = 0.587f, kBlue = 0.114f;

// The half spectrum of an image: columns 0 .. K-1 in blocks of sixteen lanes, and the Nyquist column of an even W
// apart.
struct Geometry {
  int64_t H, W, K, blocks, nyquist_pitch;
  bool even;

  Geometry(int64_t H, int64_t W)
      : H(H),
        W(W),
        K((W + 1) / 2),
        blocks((K + kLanes - 1) / kLanes),
        nyquist_pitch((H + 15) / 16 * 16),
        even(W % 2 == 0) {}
  int64_t block_size() const { return H * kStep; }
  int64_t pitch() const { return blocks * kLanes + kLanes; }  // of a row of magnitudes, Nyquist at K
  int64_t groups() const { return (H + kStep - 1) / kStep; }  // of rows, two per lane
  int64_t pairs() const { return H / 2 + 1; }                 // of rows ky and H - ky
  template <typename F>
  F* nyquist(F* half) const {
    return half + blocks * block_size();
  }
};

// One thread's part of `scratch`: a group of rows (or four sums per ring), Bluestein's two buffers, four rows of
// floats.
struct Scratch {
  float *rows, *bluestein, *line[4];

  Scratch(float* p, const Geometry& g, int64_t R, const Plan& w, const Plan& h) {
    const int64_t m = w.m > h.m ? w.m : h.m;
    rows = p;
    bluestein = rows + (g.W * kStep > 4 * R ? g.W * kStep : (4 * R + 15) / 16 * 16);
    for (int i = 0; i < 4; ++i) line[i] = bluestein + 2 * m * kStep + i * ((g.W + 15) / 16 * 16 + 2 * kLanes);
  }
};

// image(b, slot, inner) for every image: whole images on each thread, and the rest one after the other, `inner` being
// the threads that may share one.
template <typename Image>
inline void over_images(int64_t B, int64_t threads, int64_t elements, const Image& image) {
#ifdef _OPENMP
  if (threads > omp_get_max_threads()) threads = omp_get_max_threads();
#else
  threads = 1;
#endif
  const int64_t whole = B * elements >= kGrain ? B / threads * threads : B;
  on_threads(whole, threads, B * elements, [&](int64_t id, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) image(b, id, 1);
  });
  for (int64_t b = whole; b < B; ++b) image(b, 0, threads);
}

inline vf vabs(vf x) { return (vf)((vu)x & 0x7fffffffu); }
inline vf vsqrt(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (vf)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kWidth; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}
inline bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_ps((__m128)mask) != 0;
#else
  int32_t all = 0;
  for (int i = 0; i < kWidth; ++i) all |= mask[i];
  return all != 0;
#endif
}

// Squares in [1e-30, 1e30] neither overflow nor lose bits; outside (zero, huge, NaN) the slower way is taken, lane by
// lane, so that a lane's result does not depend on its neighbours.
inline vi out_of_range(vf square) { return ~((square >= splat(1e-30f)) & (square <= splat(1e30f))); }

// re and im over the larger of the two, and that one. 0/0 for zero.
inline vf scaled(vf* re, vf* im) {
  const vf a = vabs(*re), b = vabs(*im);
  const vf larger = a > b ? a : b;
  *re = *re / larger, *im = *im / larger;
  return larger;
}

// |re + i im|; infinity where either part is infinite, even beside NaN, as hypot.
inline vf modulus(vf re, vf im) {
  const vf square = madd(re, re, im * im);
  const vi bad = out_of_range(square);
  vf m = vsqrt(square);
  if (any(bad)) {
    const vf a = vabs(re), b = vabs(im);
    const vf safe = scaled(&re, &im) * vsqrt(madd(re, re, im * im));
    const vf infinity = splat(std::numeric_limits<float>::infinity());
    const vi infinite = (a == infinity) | (b == infinity);  // infinity over infinity is NaN
    m = bad ? ((square == splat(0.0f)) & (safe != safe) ? splat(0.0f) : infinite ? infinity : safe) : m;
  }
  return m;
}

// (re + i im) / |re + i im|, 0 for 0; returns the modulus.
inline vf phase(vf* re, vf* im) {
  const vf square = madd(*re, *re, *im * *im);
  const vi bad = out_of_range(square);
  vf m = vsqrt(square);
  const vf inverse = splat(1.0f) / m;
  vf r = *re * inverse, i = *im * inverse;
  if (any(bad)) {
    vf sr = *re, si = *im;
    const vf larger = scaled(&sr, &si), h = vsqrt(madd(sr, sr, si * si));
    const vi zero = (*re == splat(0.0f)) & (*im == splat(0.0f));
    m = bad ? (zero ? splat(0.0f) : larger * h) : m;
    r = bad ? (zero ? splat(0.0f) : sr / h) : r;
    i = bad ? (zero ? splat(0.0f) : si / h) : i;
  }
  *re = r, *im = i;
  return m;
}

}  // namespace
}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
