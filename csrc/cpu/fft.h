// Fourier transforms of any length, sixteen at a time, one per lane.
//
// Data are complex numbers with their lanes split: element i of all sixteen transforms is 16 real parts and then 16
// imaginary parts, kStep = 32 floats (two cache lines) in all, on every instruction set; narrower ones take several
// turns. With one transform per lane there is no shuffle in a butterfly, and decimation in time works in place: the
// digit reversal it asks for is where the caller puts element i (`pos`), which costs nothing.
//
// Radices 8, 4, 2, 3, 5 and, by direct summation, every prime to 61 (the symmetric sums cost about p multiply-adds a
// point, less than Bluestein's two transforms of more than twice the length). Lengths with a larger prime: Bluestein.
// The inverse (unnormalised) transform is the forward one with real and imaginary parts exchanged: pass the pointers
// the other way round.
//
// Plans and tables come from Python (fastdiff/ops/spectrum.py: plan), twiddles rounded once from double.
#pragma once
#include "vec.h"

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_ISA {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kStep = 2 * kLanes;
constexpr int kMaxPrime = 61;  // largest radix by direct summation; fastdiff/ops/spectrum.py knows it too

struct Plan {
  int64_t n;             // length of the transform
  int64_t m;             // 0, or Bluestein's length
  int64_t count;         // of radices
  const int32_t* radix;  // [count], of length m ? m : n
  const int32_t* pos;    // [m ? m : n], where the passes want element i
  const float* table;    // twiddles, pass by pass
  const float* chirp;    // [n, 2] Bluestein: exp(-i pi k^2 / n)
  const float* filter;   // [m, 2] Bluestein: transform of the conjugate chirp, over m

  // Where the caller puts element i before `transform`.
  int64_t place(int64_t i) const { return m ? i : pos[i]; }
};

// index: n, m, count, number of floats of twiddles, radices, positions; see fastdiff/ops/spectrum.py.
inline Plan read_plan(const int32_t* index, const float* table) {
  Plan p;
  p.n = index[0], p.m = index[1], p.count = index[2];
  p.radix = index + 4;
  p.pos = p.radix + p.count;
  p.table = table;
  p.chirp = table + index[3];
  p.filter = p.chirp + 2 * p.n;
  return p;
}

struct Complex {
  vf re, im;
};
inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
inline Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
inline Complex operator*(Complex a, vf f) { return {a.re * f, a.im * f}; }
inline Complex times_minus_i(Complex a) { return {a.im, -a.re}; }
inline Complex multiply(Complex a, vf re, vf im) { return {madd(a.re, re, -(a.im * im)), madd(a.re, im, a.im * re)}; }
inline Complex axpy(Complex a, vf f, Complex b) { return {madd(a.re, f, b.re), madd(a.im, f, b.im)}; }  // a f + b

template <int R>
inline void butterfly(Complex* x);
template <>
inline void butterfly<2>(Complex* x) {
  const Complex a = x[0], b = x[1];
  x[0] = a + b, x[1] = a - b;
}
template <>
inline void butterfly<3>(Complex* x) {
  const Complex t = x[1] + x[2], d = times_minus_i(x[1] - x[2]) * splat(0.866025403784438647f);
  const Complex m = axpy(t, splat(-0.5f), x[0]);
  x[0] = x[0] + t, x[1] = m + d, x[2] = m - d;
}
template <>
inline void butterfly<4>(Complex* x) {
  const Complex a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = times_minus_i(x[1] - x[3]);
  x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
}
template <>
inline void butterfly<5>(Complex* x) {
  const vf c1 = splat(0.309016994374947424f), c2 = splat(-0.809016994374947424f);
  const vf s1 = splat(0.951056516295153572f), s2 = splat(0.587785252292473129f);
  const Complex p = x[1] + x[4], q = x[2] + x[3];
  const Complex u = times_minus_i(x[1] - x[4]), v = times_minus_i(x[2] - x[3]);
  const Complex a = axpy(q, c2, axpy(p, c1, x[0])), b = axpy(q, c1, axpy(p, c2, x[0]));
  const Complex c = axpy(v, s2, u * s1), d = axpy(v, -s1, u * s2);
  x[0] = x[0] + p + q, x[1] = a + c, x[4] = a - c, x[2] = b + d, x[3] = b - d;
}
template <>
inline void butterfly<8>(Complex* x) {
  const vf h = splat(0.707106781186547524f);
  Complex e[4] = {x[0], x[2], x[4], x[6]}, o[4] = {x[1], x[3], x[5], x[7]};
  butterfly<4>(e);
  butterfly<4>(o);
  o[1] = Complex{o[1].re + o[1].im, o[1].im - o[1].re} * h;
  o[2] = times_minus_i(o[2]);
  o[3] = Complex{o[3].im - o[3].re, -(o[3].re + o[3].im)} * h;
  for (int i = 0; i < 4; ++i) x[i] = e[i] + o[i], x[i + 4] = e[i] - o[i];
}

// Transforms of length L become transforms of length R L. In the first pass (L = 1) there are no twiddles.
template <int R, bool kFirst>
inline void pass(float* re, float* im, int64_t n, int64_t L, const float* table) {
  for (int64_t base = 0; base < n; base += R * L)
    for (int64_t j = 0; j < L; ++j) {
      float *pr = re + (base + j) * kStep, *pi = im + (base + j) * kStep;
      const float* w = table + j * (R - 1) * 2;
      Complex x[R];
      for (int q = 0; q < R; ++q) {
        x[q] = {load(pr + q * L * kStep), load(pi + q * L * kStep)};
        if (!kFirst && q > 0) x[q] = multiply(x[q], splat(w[2 * q - 2]), splat(w[2 * q - 1]));
      }
      butterfly<R>(x);
      for (int q = 0; q < R; ++q) store(pr + q * L * kStep, x[q].re), store(pi + q * L * kStep, x[q].im);
    }
}

// Any odd radix: with a_q = x_q + x_{p-q} and b_q = -i (x_q - x_{p-q}),
// X_k and X_{p-k} = x_0 + sum_q a_q cos(2 pi k q / p) +- sum_q b_q sin(2 pi k q / p).
inline void odd_pass(float* re, float* im, int64_t n, int64_t L, int p, const float* table) {
  const int half = (p - 1) / 2;
  const float* roots = table + (L > 1 ? L * (p - 1) * 2 : 0);  // [p, 2] cos and sin
  Complex a[kMaxPrime / 2 + 1], b[kMaxPrime / 2 + 1];
  for (int64_t base = 0; base < n; base += p * L)
    for (int64_t j = 0; j < L; ++j) {
      float *pr = re + (base + j) * kStep, *pi = im + (base + j) * kStep;
      const float* w = table + j * (p - 1) * 2;
      const auto element = [&](int q) {
        const Complex x = {load(pr + q * L * kStep), load(pi + q * L * kStep)};
        return L > 1 ? multiply(x, splat(w[2 * q - 2]), splat(w[2 * q - 1])) : x;
      };
      const Complex first = {load(pr), load(pi)};
      Complex total = first;
      for (int q = 1; q <= half; ++q) {
        const Complex x = element(q), y = element(p - q);
        a[q] = x + y, b[q] = times_minus_i(x - y);
        total = total + a[q];
      }
      store(pr, total.re), store(pi, total.im);
      for (int k = 1; k <= half; ++k) {
        Complex even = first, odd = {};
        for (int q = 1, root = k; q <= half; ++q, root = root + k >= p ? root + k - p : root + k) {
          even = axpy(a[q], splat(roots[2 * root]), even);
          odd = axpy(b[q], splat(roots[2 * root + 1]), odd);
        }
        const Complex x = even + odd, y = even - odd;
        store(pr + k * L * kStep, x.re), store(pi + k * L * kStep, x.im);
        store(pr + (p - k) * L * kStep, y.re), store(pi + (p - k) * L * kStep, y.im);
      }
    }
}

// kWidth lanes of elements that lie where `pos` says; the result is in natural order. One copy of this code, so that
// every caller rounds alike.
__attribute__((noinline)) void passes(const Plan& plan, float* re, float* im) {
  const int64_t n = plan.m ? plan.m : plan.n;
  const float* table = plan.table;
  int64_t L = 1;
  for (int64_t s = 0; s < plan.count; ++s) {
    const int r = plan.radix[s];
#define FD_PASS(R)                                                                     \
  case R:                                                                              \
    L == 1 ? pass<R, true>(re, im, n, L, table) : pass<R, false>(re, im, n, L, table); \
    break
    switch (r) {
      FD_PASS(2);
      FD_PASS(3);
      FD_PASS(4);
      FD_PASS(5);
      FD_PASS(8);
      default:
        odd_pass(re, im, n, L, r, table);
        table += 2 * r;
    }
#undef FD_PASS
    if (L > 1) table += L * (r - 1) * 2;
    L *= r;
  }
}

// Bluestein: n k = (n^2 + k^2 - (k - n)^2) / 2 makes the transform a convolution, done with transforms of length m.
__attribute__((noinline)) void bluestein(const Plan& plan, float* re, float* im, float* scratch) {
  float *a = scratch, *b = scratch + plan.m * kStep;
  for (int64_t i = 0; i < plan.m; ++i) {
    float* to = a + plan.pos[i] * kStep;
    Complex x = {};
    if (i < plan.n)
      x = multiply({load(re + i * kStep), load(im + i * kStep)}, splat(plan.chirp[2 * i]),
                   splat(plan.chirp[2 * i + 1]));
    store(to, x.re), store(to + kLanes, x.im);
  }
  passes(plan, a, a + kLanes);
  for (int64_t i = 0; i < plan.m; ++i) {
    const float* from = a + i * kStep;
    float* to = b + plan.pos[i] * kStep;
    const Complex x =
        multiply({load(from), load(from + kLanes)}, splat(plan.filter[2 * i]), splat(plan.filter[2 * i + 1]));
    store(to, x.re), store(to + kLanes, x.im);
  }
  passes(plan, b + kLanes, b);  // inverse
  for (int64_t i = 0; i < plan.n; ++i) {
    const float* from = b + i * kStep;
    const Complex x =
        multiply({load(from), load(from + kLanes)}, splat(plan.chirp[2 * i]), splat(plan.chirp[2 * i + 1]));
    store(re + i * kStep, x.re), store(im + i * kStep, x.im);
  }
}

// All sixteen lanes of data [n, 2, 16], element i put at plan.place(i), in place. scratch [2, m, 2, 16].
inline void transform(const Plan& plan, float* data, bool inverse, float* scratch) {
  float *re = data + (inverse ? kLanes : 0), *im = data + (inverse ? 0 : kLanes);
  for (int64_t lane = 0; lane < kLanes; lane += kWidth) {
    if (plan.m)
      bluestein(plan, re + lane, im + lane, scratch);
    else
      passes(plan, re + lane, im + lane);
  }
}

// Transposes kWidth vectors of kWidth: log2(kWidth) perfect shuffles.
inline void transpose(vf* r) {
#pragma GCC unroll 4
  for (int w = 1; w < kWidth; w *= 2) {
    vf t[kWidth];
#pragma GCC unroll 8
    for (int i = 0; i < kWidth / 2; ++i) {
      const vf a = r[i], b = r[i + kWidth / 2];
#if defined(__AVX512F__)
      const __m512i lo = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      const __m512i hi = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
      t[2 * i] = (vf)_mm512_permutex2var_ps((__m512)a, lo, (__m512)b);
      t[2 * i + 1] = (vf)_mm512_permutex2var_ps((__m512)a, hi, (__m512)b);
#elif defined(__AVX2__)
      const __m256 lo = _mm256_unpacklo_ps((__m256)a, (__m256)b), hi = _mm256_unpackhi_ps((__m256)a, (__m256)b);
      t[2 * i] = (vf)_mm256_permute2f128_ps(lo, hi, 0x20);
      t[2 * i + 1] = (vf)_mm256_permute2f128_ps(lo, hi, 0x31);
#elif defined(__x86_64__)
      t[2 * i] = (vf)_mm_unpacklo_ps((__m128)a, (__m128)b);
      t[2 * i + 1] = (vf)_mm_unpackhi_ps((__m128)a, (__m128)b);
#else
      for (int l = 0; l < kWidth / 2; ++l) {
        t[2 * i][2 * l] = a[l], t[2 * i][2 * l + 1] = b[l];
        t[2 * i + 1][2 * l] = a[l + kWidth / 2], t[2 * i + 1][2 * l + 1] = b[l + kWidth / 2];
      }
#endif
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) r[i] = t[i];
  }
}

}  // namespace
}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
