// What the Gaussian kernels share: radii, borders, and the taps, which are made on the device, so that a sigma in
// device memory is never read by the host and a captured graph may be replayed with another.
//
// Folding. The borders are periodic maps, so taps farther than the image reaches can be added to those within:
//   reflect, symmetric, circular: all taps k of equal k mod P, P the period, act on the same samples. The folded taps
//     are even again, with radius P / 2; for an even P the one at P / 2 stands on both ends and counts half on each.
//   replicate: every tap k >= n acts on the last sample, as tap n does.
//   constant: taps k >= n act on nothing (and count in the normalisation).
// Hence a radius of at most n, tables no longer than the image, and a position is never more than n outside of it: its
// sample is found without a division.
#pragma once
#include "reduce.cuh"
#include "vec.cuh"

namespace fastdiff {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct Axis {
  int64_t n = 0, radius = 0, reach = 0;  // samples; radius of the taps as defined, and folded
  double sigma = 0;
  bool bad = false;  // sigma is not finite, or its support exceeds what the CPU serves: all taps are NaN

  FD_HD int64_t entries(int32_t border) const {  // of the folded taps, with the dropped ones of the constant border
    return border == kConstant && radius > reach ? reach + 2 : reach + 1;
  }
};

FD_HD Axis make_axis(double sigma, int64_t size, int64_t n, int32_t border) {
  Axis a;
  a.n = n, a.sigma = sigma;
  const double six = 6.0 * (sigma < 0 ? -sigma : sigma);
  a.bad = !(sigma - sigma == 0) || (size == 0 && six >= static_cast<double>(kMaxSupport + 1));
  if (!a.bad && (n > 1 || border == kConstant)) a.radius = size > 0 ? size / 2 : (static_cast<int64_t>(six) | 1) / 2;
  a.reach = fold_reach(a.radius, n, border);
  return a;
}

FD_D double sigma_of(const Sigma& s, int64_t b) {
  const int64_t i = b * s.sigma_stride;
  return s.sigma_dtype == kF64 ? static_cast<const double*>(s.sigma)[i]
                               : static_cast<double>(load_as_float(s.sigma, s.sigma_dtype, i));
}
FD_D Axis axis_of(const Sigma& s, int64_t b, bool along_x, int64_t n, int32_t border) {
  const double sigma = s.sigma != nullptr ? sigma_of(s, b) : along_x ? s.sigma_x : s.sigma_y;
  return make_axis(sigma, along_x ? s.size_x : s.size_y, n, border);
}

// The sample that stands at position v, at most n outside an axis of n; -1: a zero.
FD_D int64_t border_index(int64_t v, int64_t n, int32_t border) {
  if (v >= 0 && v < n) return v;
  switch (border) {
    case kConstant:
      return -1;
    case kReplicate:
      return v < 0 ? 0 : n - 1;
    case kCircular:
      return v < 0 ? v + n : v - n;
    case kSymmetric:
      return v < 0 ? -1 - v : 2 * n - 1 - v;
    default:
      return v < 0 ? -v : 2 * n - 2 - v;
  }
}

FD_D double warp_sum_double(double v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(kFullWarp, v, offset);
  return v;
}

// e[j] = sum of exp(-u^2 / 2) over the taps k that fold onto j, and q[j] that of exp(-u^2 / 2) u^2, u = k / sigma. By
// `threads` threads, whole warps; where many taps fold onto one, a warp takes them together.
FD_D void fold(const Axis& a, int32_t border, double* e, double* q, int thread, int threads) {
  const int64_t entries = a.entries(border);
  const int64_t period = border == kReflect     ? 2 * a.n - 2
                         : border == kSymmetric ? 2 * a.n
                         : border == kCircular  ? a.n
                                                : 0;
  const bool together = a.radius > 8 * entries;
  const int64_t first = together ? thread / 32 : thread, step = together ? threads / 32 : threads;
  const double size = a.sigma < 0 ? -a.sigma : a.sigma, s = size > 1e-30 ? size : 1e-30;
  for (int64_t j = first; j < entries; j += step) {
    double sum = 0, spread = 0;
    for (int64_t t = together ? thread % 32 : 0;; t += together ? 32 : 1) {
      const int64_t k = period == 0 ? j + t : (t & 1) != 0 ? (t + 1) / 2 * period - j : t / 2 * period + j;
      if (k > a.radius || (period == 0 && t > 0 && j < a.n)) break;
      const double u = static_cast<double>(k) / s, w = exp(-0.5 * (u * u));
      sum += w;
      if (w > 0) spread += w * (u * u);
    }
    if (together) sum = warp_sum_double(sum), spread = warp_sum_double(spread);
    if (2 * j == period && j > 0 && !FD_MUTATED(kFoldHalf)) sum *= 0.5, spread *= 0.5;
    if (a.bad) sum = spread = bits_float(0x7fc00000u);
    if (!together || thread % 32 == 0) e[j] = sum, q[j] = spread;
  }
}

// Tap j and its derivative by sigma from e[j], q[j] and their sums over all taps.
FD_D double tap(double e, double sum) { return e / sum; }
FD_D double tap_slope(const Axis& a, double e, double q, double sum, double spread) {
  const double size = a.sigma < 0 ? -a.sigma : a.sigma, s = size > 1e-30 ? size : 1e-30;
  const double slope = (q - e * (spread / sum)) / (sum * s);
  return a.sigma < 0 ? -slope : slope;
}

// Sum over a block of kBlock threads, in every thread. `buffer`: kBlock / 32 doubles.
template <int kBlock>
FD_D double block_sum_double(double v, double* buffer) {
  v = warp_sum_double(v);
  __syncthreads();  // the buffer's previous content has been read
  if (threadIdx.x % 32 == 0) buffer[threadIdx.x / 32] = v;
  FD_BARRIER(kDoubleSumBarrier);
  double sum = 0;
  for (int i = 0; i < kBlock / 32; ++i) sum += buffer[i];
  return sum;
}

// v[i] <- sum of v[k], k >= i, for `count` values of this block's; `totals`: kBlock doubles of shared memory.
template <int kBlock>
FD_D void suffix_sums(double* v, int64_t count, double* totals) {
  const int64_t chunk = (count + kBlock - 1) / kBlock, first = threadIdx.x * chunk;
  const int64_t end = first + chunk < count ? first + chunk : count;
  double sum = 0;
  for (int64_t i = end - 1; i >= first; --i) sum += v[i], v[i] = sum;
  __syncthreads();
  totals[threadIdx.x] = sum;
  __syncthreads();
  double later = 0;
  for (int64_t c = (count - 1) / chunk; c > threadIdx.x; --c) later += totals[c];
  for (int64_t i = first; i < end; ++i) v[i] += later;
  __syncthreads();
}

// One element of an image as it is stored, and its value.
FD_D uint32_t fetch_any(const char* p, int32_t dtype) {
  if (dtype == kF32) return *reinterpret_cast<const uint32_t*>(p);
  if (dtype == kU8) return *reinterpret_cast<const uint8_t*>(p);
  return *reinterpret_cast<const uint16_t*>(p);
}
FD_D float widen_any(uint32_t raw, int32_t dtype) {
  if (dtype == kF32) return bits_float(raw);
  if (dtype == kU8) return static_cast<float>(raw);
  float v, unused;
  widen_pair(raw, dtype == kBF16, &v, &unused);
  return v;
}
FD_HD int64_t size_any(int32_t dtype) { return dtype == kU8 ? 1 : dtype_size(dtype); }

// To an integer of 0 .. 255, halves to even.
FD_D uint32_t round_u8(float f) {
  const float v = f > 0.0f ? f < 255.0f ? f : 255.0f : 0.0f;
  return float_bits(v + 12582912.0f) & 255u;  // 1.5 * 2^23: the integer is left in the low bits
}

// Two neighbours of a contiguous row; `pair`: p is aligned to both; `count`: how many of them are there.
FD_D void put_two(char* p, int32_t dtype, float a, float b, bool pair, int count) {
  if (dtype == kF32) {
    auto* to = reinterpret_cast<float*>(p);
    if (pair && count == 2) {
      *reinterpret_cast<float2*>(to) = make_float2(a, b);
    } else {
      to[0] = a;
      if (count == 2) to[1] = b;
    }
  } else if (dtype == kU8) {
    auto* to = reinterpret_cast<uint8_t*>(p);
    const uint32_t x = round_u8(a), y = round_u8(b);
    if (pair && count == 2) {
      *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(x | y << 8);
    } else {
      to[0] = static_cast<uint8_t>(x);
      if (count == 2) to[1] = static_cast<uint8_t>(y);
    }
  } else {
    auto* to = reinterpret_cast<uint16_t*>(p);
    const uint32_t w = narrow_pair(a, b, dtype == kBF16);
    if (pair && count == 2) {
      *reinterpret_cast<uint32_t*>(to) = w;
    } else {
      to[0] = static_cast<uint16_t>(w);
      if (count == 2) to[1] = static_cast<uint16_t>(w >> 16);
    }
  }
}

// dsigma[b] = sum of the parts of a sample, in an order that depends on their number alone.
__global__ void __launch_bounds__(kThreads)
    sum_in_order(const double* partial, double* dsigma, int64_t B, int64_t count) {
  FD_SHARED(double, sums, kWarps);
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
    double s = 0;
    for (int64_t i = threadIdx.x; i < count; i += kThreads) s += partial[b * count + i];
    s = block_sum_double<kThreads>(s, sums);
    if (threadIdx.x == 0) dsigma[b] = s;
  }
}
inline void sum_parts(const double* partial, double* dsigma, int64_t B, int64_t count, void* stream) {
  if (B > 0) FD_LAUNCH(sum_in_order, grid_for(B), kThreads, 0, stream, partial, dsigma, B, count);
}

}  // namespace
}  // namespace cuda
}  // namespace fastdiff
