// The tanh form of GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415) and its derivative, on the CPU.
//
//     s(x)   = 1 / (1 + exp(-2 u)),  u = sqrt(2 / pi) (x + 0.044715 x^3)      since (1 + tanh u) / 2 = s
//     out    = x s
//     d out  = s + x s (1 - s) 2 u'
//
// Floor: bytes, each tensor once (8 a float32 element forward, 12 backward), as long as one exp and one division an
// element keep up, which they do on two threads. One pass; the fused form of torch needs a tanh of 20 instructions
// more.
#include "isa.h"
#include "math.h"
#include "parallel.h"

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_ISA {
namespace {

constexpr float kTwoRoot = 1.5957691216057308f;  // 2 sqrt(2 / pi)
constexpr float kCubic = 0.044715f;

inline vf sigmoid_of(vf x) {  // s(x)
  const vf inner = madd(x * x * splat(kCubic), x, x);
  return splat(1.0f) / (splat(1.0f) + exp(inner * splat(-kTwoRoot)));
}

struct Forward {
  static vf apply(vf x, vf) {
    // x / (1 + e) instead of x * (1 / (1 + e)): for -inf both the reference and this give NaN.
    const vf inner = madd(x * x * splat(kCubic), x, x);
    return x / (splat(1.0f) + exp(inner * splat(-kTwoRoot)));
  }
};

struct Backward {
  static vf apply(vf x, vf grad) {
    const vf s = sigmoid_of(x);
    const vf slope = madd(x * x, splat(3 * kCubic * kTwoRoot), splat(kTwoRoot));
    const vf curve = x * (s * (splat(1.0f) - s)) * slope;
    // Far out s (1 - s) is 0 and the slope may be infinite: 0 * inf is no derivative of a straight line.
    return grad * (s + (x * x < splat(1e4f) ? curve : x - x));
  }
};

template <typename T, typename Formula, bool kGrad>
void run(const Gelu& a) {
  const T *x = static_cast<const T*>(a.x), *grad = static_cast<const T*>(a.grad);
  T* out = static_cast<T*>(a.out);
  parallel_ranges((a.M + kWidth - 1) / kWidth, 4 * a.M, [&](int64_t begin, int64_t end) {
    const int64_t last = end * kWidth < a.M ? end * kWidth : a.M;
    int64_t i = begin * kWidth;
    for (; i + kWidth <= last; i += kWidth) store(out + i, Formula::apply(load(x + i), kGrad ? load(grad + i) : vf{}));
    if (i < last) {  // a whole vector of the rest, so that every element takes the same instructions
      T rest_x[kWidth] = {}, rest_grad[kWidth] = {};
      for (int64_t j = i; j < last; ++j) rest_x[j - i] = x[j], rest_grad[j - i] = kGrad ? grad[j] : T{};
      store(rest_x, Formula::apply(load(rest_x), load(rest_grad)));
      for (int64_t j = i; j < last; ++j) out[j] = rest_x[j - i];
    }
  });
}

template <typename Formula, bool kGrad>
void of_type(const Gelu& a) {
  if (a.dtype == kF32) return run<float, Formula, kGrad>(a);
  if (a.dtype == kF16) return run<f16, Formula, kGrad>(a);
  return run<bf16, Formula, kGrad>(a);
}

}  // namespace

void gelu_forward(const Gelu& a) { of_type<Forward, false>(a); }
void gelu_backward(const Gelu& a) { of_type<Backward, true>(a); }

}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
