// The tanh form of GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415) and its derivative, on CUDA.
//
//     s(x)   = 1 / (1 + exp(-2 u)),  u = sqrt(2 / pi) (x + 0.044715 x^3)      since (1 + tanh u) / 2 = s
//     out    = x s
//     d out  = s + x s (1 - s) 2 u'
//
// Floor: bytes, each tensor once (4 a bfloat16 element forward, 6 backward). At the copy speed of an H200, 4.3 TB/s,
// that is 4.8 elements per clock and SM forward (3.2 backward); an element costs two instructions of the special
// function unit (ex2 and rcp, 16 a clock) and some 14 others (128 a clock): both keep up.
//
// Mapping. A thread owns vectors of 16 bytes and asks for four of them (backward: two of either tensor) before it
// uses the first; the elements after the last vector are done one by one, with the same instructions. Each element of
// `out` depends on the same element of the inputs, so `out` may be one of them. ex2 and rcp are the approximate ones:
// their error of 2^-22 and 2^-23 is a unit or two in the last place, twice the polynomial's of the CPU.
//
// Predicted: 88 % of copy at [8, 256, 4608] and larger, forward and backward. Performance: not measured.
#include "mma.cuh"
#include "vec.cuh"

namespace fastdiff {
namespace cuda {
namespace {

constexpr float kTwoRoot = 1.5957691216057308f;  // 2 sqrt(2 / pi)
constexpr float kCubic = 0.044715f;
constexpr float kExponent = -2.302208198206f;  // -2 sqrt(2 / pi) log2(e)
constexpr int kThreads = 256;

// a / b; 0 for a divisor from 2^126 on.
FD_D float divide_fast(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

FD_D float denominator(float x) { return 1.0f + exp2_fast(fmaf(x * x * kCubic, x, x) * kExponent); }

struct Forward {
  static constexpr bool kGrad = false;
  // x / (1 + e) instead of x * (1 / (1 + e)): for -inf both the reference and this give NaN.
  static FD_D float apply(float x, float) { return divide_fast(x, denominator(x)); }
};

struct Backward {
  static constexpr bool kGrad = true;
  static FD_D float apply(float x, float grad) {
    const float s = divide_fast(1.0f, denominator(x));
    const float slope = fmaf(x * x, 3 * kCubic * kTwoRoot, kTwoRoot);
    // Far out s (1 - s) is 0 and the slope may be infinite: 0 * inf is no derivative of a straight line.
    const float curve = x * x < 1e4f ? x * (s * (1.0f - s)) : x - x;
    return grad * fmaf(curve, x * x < 1e4f ? slope : 1.0f, s);
  }
};

template <typename Formula, int kVec>
__global__ void __launch_bounds__(kThreads, 4) elementwise(const Gelu a) {
  constexpr int kUnroll = Formula::kGrad ? 2 : 4;
  // Eight elements are 16 bytes: no float32, for which no registers need be kept.
  const int32_t dtype = kVec < 8 ? a.dtype : a.dtype == kBF16 ? kBF16 : kF16;
  const Row x = row_of(const_cast<void*>(a.x), dtype, 0), grad = row_of(const_cast<void*>(a.grad), dtype, 0);
  const Row out = row_of(a.out, dtype, 0);
  const int64_t step = static_cast<int64_t>(kThreads) * kVec, block = step * kUnroll;
  for (int64_t first = blockIdx.x * block; first < a.M; first += gridDim.x * block) {
    const int64_t begin = first + threadIdx.x * kVec;
    Raw<kVec> rx[kUnroll], rg[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = begin + u * step;
      rx[u] = rg[u] = {};
      if (i + kVec > a.M) continue;
      rx[u] = load<kVec, false>(x, i);
      if constexpr (Formula::kGrad) rg[u] = load<kVec, false>(grad, i);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = begin + u * step;
      if (i + kVec <= a.M) {
        float vx[kVec], vg[kVec] = {};
        widen(rx[u], dtype, vx);
        if constexpr (Formula::kGrad) widen(rg[u], dtype, vg);
#pragma unroll
        for (int k = 0; k < kVec; ++k) vx[k] = Formula::apply(vx[k], vg[k]);
        write(out, FD_MUTATED(kGeluStep) ? begin : i, vx);
      } else if (!FD_MUTATED(kGeluTail)) {
        for (int64_t e = i; e < a.M; ++e) {
          float vx[1], vg[1] = {};
          read<1, false>(x, e, vx);
          if constexpr (Formula::kGrad) read<1, false>(grad, e, vg);
          vx[0] = Formula::apply(vx[0], vg[0]);
          write(out, e, vx);
        }
      }
    }
  }
}

template <typename Formula>
void run(const Gelu& a, int device, void* stream) {
  if (a.M == 0) return;
  const DeviceGuard guard(device);
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool vectors = aligned(a.x) && aligned(a.grad) && aligned(a.out);
  const int vec = !vectors ? 1 : a.dtype == kF32 ? 4 : 8;
  const int64_t block = static_cast<int64_t>(kThreads) * vec * (Formula::kGrad ? 2 : 4);
  const unsigned int grid = grid_for((a.M + block - 1) / block);
  if (vec == 8)
    FD_LAUNCH((elementwise<Formula, 8>), grid, kThreads, 0, stream, a);
  else if (vec == 4)
    FD_LAUNCH((elementwise<Formula, 4>), grid, kThreads, 0, stream, a);
  else
    FD_LAUNCH((elementwise<Formula, 1>), grid, kThreads, 0, stream, a);
}

}  // namespace

void gelu_forward(const Gelu& a, int device, void* stream) { run<Forward>(a, device, stream); }
void gelu_backward(const Gelu& a, int device, void* stream) { run<Backward>(a, device, stream); }

}  // namespace cuda
}  // namespace fastdiff
