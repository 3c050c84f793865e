// Fourier transforms of any length, many at a time, by one block.
//
// An array holds element i of all transforms side by side, so that the lanes of a warp read neighbours (8 bytes each:
// half a warp reads 128 bytes of shared memory, all banks once) whatever the radix. Decimation in time, in place: the
// digit reversal it asks for is where the caller puts element i. Radices 8, 4, 2, 3, 5, 7 in registers, other primes to
// 61 by direct sums into a second array; larger ones by Bluestein's method, which needs the second array too. Plans and
// tables are those of csrc/cpu/fft.h, and so is the arithmetic, product by product.
//
// The inverse (unnormalised) transform is the forward one with real and imaginary parts exchanged: the caller does it.
#pragma once
#include "launch.cuh"

namespace fastdiff {
namespace cuda {
namespace {

struct FftPlan {
  int32_t n, span, count;  // length; of what the passes transform (Bluestein's length, or n); number of radices
  int32_t bluestein;
  int32_t radix[24];
  const int32_t* pos;    // [span] where the passes want element i
  const float2* table;   // twiddles, pass by pass
  const float2* chirp;   // [n]
  const float2* filter;  // [span]
};

// index: on the host; pos, table: on the device. fastdiff/ops/spectrum.py: plan.
inline FftPlan fft_plan(const int32_t* index, const int32_t* pos, const float* table) {
  FftPlan p = {};
  p.n = index[0], p.bluestein = index[1] != 0, p.span = p.bluestein ? index[1] : p.n, p.count = index[2];
  for (int i = 0; i < p.count; ++i) p.radix[i] = index[4 + i];
  p.pos = pos, p.table = reinterpret_cast<const float2*>(table);
  p.chirp = p.table + index[3] / 2, p.filter = p.chirp + p.n;
  return p;
}

// Where the caller puts element i.
FD_D int32_t place(const FftPlan& p, int32_t i) { return p.bluestein ? i : __ldg(p.pos + i); }

// x / d for many x. The product with the rounded-up reciprocal is exact while x d < 2^32.
struct Divider {
  uint32_t d, magic;  // magic 0: divide
};
FD_D Divider divider(uint32_t d, uint32_t largest) {
  const bool exact = d > 1 && static_cast<uint64_t>(largest) * d < (1ull << 32);
  return {d, exact ? 0xffffffffu / d + 1 : 0};
}
FD_D uint32_t quotient(uint32_t x, Divider by) { return by.magic ? __umulhi(x, by.magic) : x / by.d; }

// An array of transforms: element i of transform t.
struct Lanes {
  float2* p;
  uint32_t lanes, pitch, pad;  // after 2^pad elements one number is left out
  FD_D float2& at(uint32_t i, uint32_t t) const { return p[i * pitch + (i >> pad) + t]; }
};

FD_D float2 operator+(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
FD_D float2 operator-(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }
FD_D float2 times_minus_i(float2 a) { return make_float2(a.y, -a.x); }
FD_D float2 exchanged(float2 a) { return make_float2(a.y, a.x); }
FD_D float2 multiply(float2 a, float2 w) {
  return make_float2(fmaf(a.x, w.x, -(a.y * w.y)), fmaf(a.x, w.y, a.y * w.x));
}
// a f + b, the one place where a product is added: no kernel rounds otherwise than another.
FD_D float2 axpy(float2 a, float f, float2 b) { return make_float2(fmaf(a.x, f, b.x), fmaf(a.y, f, b.y)); }

template <int R>
FD_D void butterfly(float2 (&x)[R]) {
  if constexpr (R == 2) {
    const float2 a = x[0], b = x[1];
    x[0] = a + b, x[1] = a - b;
  } else if constexpr (R == 3) {
    constexpr float s = 0.866025403784438647f;
    const float2 t = x[1] + x[2], d = times_minus_i(x[1] - x[2]), m = axpy(t, -0.5f, x[0]);
    x[0] = x[0] + t, x[1] = axpy(d, s, m), x[2] = axpy(d, -s, m);
  } else if constexpr (R == 4) {
    const float2 a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = times_minus_i(x[1] - x[3]);
    x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
  } else if constexpr (R == 8) {
    constexpr float h = 0.707106781186547524f;
    float2 e[4] = {x[0], x[2], x[4], x[6]}, o[4] = {x[1], x[3], x[5], x[7]};
    butterfly<4>(e);
    butterfly<4>(o);
    const float2 o1 = make_float2(o[1].x + o[1].y, o[1].y - o[1].x);
    const float2 o2 = times_minus_i(o[2]);
    const float2 o3 = make_float2(o[3].y - o[3].x, -(o[3].x + o[3].y));
    x[0] = e[0] + o[0], x[4] = e[0] - o[0];
    x[1] = axpy(o1, h, e[1]), x[5] = axpy(o1, -h, e[1]);
    x[2] = e[2] + o2, x[6] = e[2] - o2;
    x[3] = axpy(o3, h, e[3]), x[7] = axpy(o3, -h, e[3]);
  } else {  // 5 and 7: symmetric sums; cosines and sines of 2 pi k / R
    static_assert(R == 5 || R == 7, "radices in registers");
    constexpr int kHalf = R / 2;
    constexpr float c5[] = {1.0f, 0.309016994374947424f, -0.809016994374947424f};
    constexpr float s5[] = {0.0f, 0.951056516295153572f, 0.587785252292473129f};
    constexpr float c7[] = {1.0f, 0.623489801858733531f, -0.222520933956314404f, -0.900968867902419126f};
    constexpr float s7[] = {0.0f, 0.781831482468029809f, 0.974927912181823607f, 0.433883739117558120f};
    float2 a[kHalf + 1], b[kHalf + 1], total = x[0];
#pragma unroll
    for (int q = 1; q <= kHalf; ++q) {
      a[q] = x[q] + x[R - q], b[q] = times_minus_i(x[q] - x[R - q]);
      total = total + a[q];
    }
#pragma unroll
    for (int k = 1; k <= kHalf; ++k) {
      float2 even = x[0], odd = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int q = 1; q <= kHalf; ++q) {
        const int root = q * k % R, near = root <= kHalf ? root : R - root;
        const float c = R == 5 ? c5[near % 3] : c7[near], s = R == 5 ? s5[near % 3] : s7[near];
        even = axpy(a[q], c, even), odd = axpy(b[q], root <= kHalf ? s : -s, odd);
      }
      x[k] = even + odd, x[R - k] = even - odd;
    }
    x[0] = total;
  }
}

// Transforms of length L become transforms of length R L.
template <int R>
FD_D void pass(const Lanes& d, Divider by_lanes, uint32_t n, uint32_t L, const float2* table) {
  const Divider by_length = divider(L, n / R);
  for (uint32_t task = threadIdx.x; task < n / R * d.lanes; task += blockDim.x) {
    const uint32_t u = quotient(task, by_lanes), t = task - u * d.lanes;
    const uint32_t block = quotient(u, by_length), j = u - block * L, first = block * R * L + j;
    float2 x[R];
#pragma unroll
    for (int q = 0; q < R; ++q) x[q] = d.at(first + q * L, t);
    if (L > 1) {
#pragma unroll
      for (int q = 1; q < R; ++q) x[q] = multiply(x[q], __ldg(table + j * (R - 1) + q - 1));
    }
    butterfly<R>(x);
#pragma unroll
    for (int q = 0; q < R; ++q) d.at(first + q * L, t) = x[q];
  }
}

// Any odd radix, by direct sums from one array into another: with a_q = x_q + x_{p-q}, b_q = -i (x_q - x_{p-q}),
// X_k and X_{p-k} = x_0 + sum_q a_q cos(2 pi k q / p) +- sum_q b_q sin(2 pi k q / p). A thread does one k, or X_0.
FD_D void odd_pass(const Lanes& d, const Lanes& to, uint32_t n, uint32_t L, uint32_t p, const float2* table) {
  const uint32_t half = p / 2, each = half + 1;
  const float2* roots = table + (L > 1 ? L * (p - 1) : 0);  // [p] cos and sin
  if (L > 1) {
    for (uint32_t task = threadIdx.x; task < n * d.lanes; task += blockDim.x) {
      const uint32_t i = task / d.lanes, t = task % d.lanes, q = i / L % p;
      if (q > 0) d.at(i, t) = multiply(d.at(i, t), __ldg(table + i % L * (p - 1) + q - 1));
    }
    FD_BARRIER(kTwiddleBarrier);
  }
  for (uint32_t task = threadIdx.x; task < n / p * each * d.lanes; task += blockDim.x) {
    const uint32_t rest = task / d.lanes, t = task % d.lanes, k = rest % each, u = rest / each;
    const uint32_t first = u / L * p * L + u % L;
    const float2 zero = d.at(first, t);
    float2 even = zero, odd = make_float2(0.0f, 0.0f);
    for (uint32_t q = 1, root = k; q <= half; ++q, root = root + k >= p ? root + k - p : root + k) {
      const float2 x = d.at(first + q * L, t), y = d.at(first + (p - q) * L, t), w = __ldg(roots + root);
      even = axpy(x + y, w.x, even), odd = axpy(times_minus_i(x - y), w.y, odd);
    }
    to.at(first + k * L, t) = even + odd;
    if (k > 0) to.at(first + (p - k) * L, t) = even - odd;
  }
}

// Elements that lie where `pos` says become their transform, in natural order, in a; b is used where an odd radix needs
// it, and the two exchanged.
FD_D void passes(const FftPlan& plan, Lanes& a, Lanes& b, Divider by_lanes) {
  const uint32_t n = plan.span;
  const float2* table = plan.table;
  uint32_t L = 1;
  for (int s = 0; s < plan.count; ++s) {
    const uint32_t r = plan.radix[s];
    switch (r) {
      case 2:
        pass<2>(a, by_lanes, n, L, table);
        break;
      case 3:
        pass<3>(a, by_lanes, n, L, table);
        break;
      case 4:
        pass<4>(a, by_lanes, n, L, table);
        break;
      case 5:
        pass<5>(a, by_lanes, n, L, table);
        break;
      case 7:
        pass<7>(a, by_lanes, n, L, table);
        table += r;  // the roots that the CPU uses
        break;
      case 8:
        pass<8>(a, by_lanes, n, L, table);
        break;
      default:
        odd_pass(a, b, n, L, r, table);
        table += r;
        const Lanes other = a;
        a = b, b = other;
    }
    if (L > 1) table += L * (r - 1);
    L *= r;
    FD_BARRIER(kPassBarrier);
  }
}

// Transforms all lanes of `a`, which hold element i at place(i); begins and ends with a barrier. The result is in `a`,
// after the arrays may have been exchanged; b is there only if the plan needs it (SpectrumAxis::buffers).
FD_D void transform(const FftPlan& plan, Lanes& a, Lanes& b) {
  const Divider by_lanes = divider(a.lanes, static_cast<uint32_t>(plan.span) * a.lanes);
  FD_BARRIER(kLoadBarrier);
  if (!plan.bluestein) return passes(plan, a, b, by_lanes);
  // n k = (n^2 + k^2 - (k - n)^2) / 2 makes the transform a convolution, done with transforms of length m.
  const uint32_t n = plan.n, m = plan.span;
  for (uint32_t task = threadIdx.x; task < m * a.lanes; task += blockDim.x) {
    const uint32_t i = quotient(task, by_lanes), t = task - i * a.lanes;
    b.at(__ldg(plan.pos + i), t) = i < n ? multiply(a.at(i, t), __ldg(plan.chirp + i)) : make_float2(0.0f, 0.0f);
  }
  __syncthreads();
  passes(plan, b, a, by_lanes);
  for (uint32_t task = threadIdx.x; task < m * a.lanes; task += blockDim.x) {
    const uint32_t i = quotient(task, by_lanes), t = task - i * a.lanes;
    a.at(__ldg(plan.pos + i), t) = exchanged(multiply(b.at(i, t), __ldg(plan.filter + i)));
  }
  __syncthreads();
  passes(plan, a, b, by_lanes);
  for (uint32_t task = threadIdx.x; task < n * a.lanes; task += blockDim.x) {
    const uint32_t i = quotient(task, by_lanes), t = task - i * a.lanes;
    a.at(i, t) = multiply(exchanged(a.at(i, t)), __ldg(plan.chirp + i));
  }
  __syncthreads();
}

}  // namespace
}  // namespace cuda
}  // namespace fastdiff
