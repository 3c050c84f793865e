// Causal depthwise convolution along t, with SiLU, forward and backward.
//
//   pre[b, d, t] = bias[d] + sum_k weight[d, k] past[b, d, t + k]         past = (state, x), so past[t + K - 1] = x[t]
//   out = pre, or silu(pre) = pre / (1 + exp(-pre))
//   dpre = grad, or grad s (1 + pre (1 - s)), s = 1 / (1 + exp(-pre))
//   dpast[p] = sum_k weight[k] dpre[p - k]     dweight[k] = sum_bt dpre[t] past[t + k]     dbias = sum_bt dpre
//
// Floor: x read once, out written once; some 25 operations an element, most of them in exp, so that memory decides.
// Two mappings, by what is adjacent in memory: rows along t (one channel at a time, lanes = t), or strips of channels
// (lanes = d, t runs). Both bring a piece of the past into L1 as floats, whatever its type and strides, and do the same
// additions in the same order, so that a result does not depend on the layout: products in the order of the taps, sums
// over t in sixteen interleaved parts, 512 steps at a time, that are then added as a tree, and samples in order.
//
// Measured at (2, 1536, 1024), K = 4, float32, one thread of a Xeon with AVX-512: a SiLU of its own (reciprocal by a
// Newton step, no overflow to care for) 3.1 -> 2.7 ms by rows, 2.5 -> 2.2 ms by strips; without SiLU 1.5 ms, a copy
// 0.9.
#include "isa.h"
#include "math.h"
#include "parallel.h"

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_ISA {
namespace {

constexpr int64_t kParts = 16;       // interleaved sums over t
constexpr int64_t kStrip = 256;      // channels in a strip, forward
constexpr int64_t kThin = 64;        // and backward, where sums are kept besides
constexpr int64_t kSteps = 16;       // t in a block of a strip, a multiple of kParts
constexpr int64_t kStepsTask = 256;  // t in a task of the forward pass
constexpr int64_t kFold = 512;       // t after which a sum starts from zero again, and what it was goes to a total

inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

inline const char* in(const Strided& s, int64_t offset) { return at(s.data, s.dtype, offset); }

// taps[k][d], taps[K][d] = bias.
inline void gather_taps(const CausalConv1d& a) {
  const int64_t pitch = padded(a.D);
  for (int64_t k = 0; k <= a.K; ++k) {
    float* row = a.taps + k * pitch;
    for (int64_t d = a.D; d < pitch; ++d) row[d] = 0;
    if (k < a.K)
      for (int64_t d = 0; d < a.D; ++d)
        row[d] = load_as_float(a.weight.data, a.weight.dtype, d * a.weight.s[0] + k * a.weight.s[1]);
    else
      for (int64_t d = 0; d < a.D; ++d)
        row[d] = a.bias.data ? load_as_float(a.bias.data, a.bias.dtype, d * a.bias.s[0]) : 0.0f;
  }
}

// 1 / x for x in [1, 1e38], to an ulp. The division itself is slower than all else in SiLU together on AVX-512.
inline vf reciprocal(vf x) {
#if defined(__AVX512F__)
  const vf r = (vf)_mm512_rcp14_ps((__m512)x);
  return madd(r, madd(-x, r, splat(1.0f)), r);
#else
  return splat(1.0f) / x;
#endif
}
// 1 / (1 + exp(-v)) for |v| <= 87.
inline vf sigmoid_inside(vf v) { return reciprocal(splat(1.0f) + exp_inside<-1>(v)); }
template <bool kSilu>
inline vf activate(vf v) {
  if (!kSilu) return v;
  const vf low = splat(-87.0f) > v ? splat(-87.0f) : v;
  const vf y = low * sigmoid_inside(splat(87.0f) < low ? splat(87.0f) : low);
  // -inf is NaN, as -inf / (1 + inf) is.
  const float inf = std::numeric_limits<float>::infinity();
  return v == splat(-inf) ? splat(std::numeric_limits<float>::quiet_NaN()) : y;
}

// One vector of pre: past[0], past[step], ... times the taps' vectors. kTaps 0: as many as K.
template <int kTaps, typename Tap>
inline vf convolve(const float* past, int64_t step, int64_t K, vf bias, const Tap& tap) {
  vf v = bias;
  if (kTaps > 0) {
#pragma GCC unroll 4
    for (int k = 0; k < kTaps; ++k) v = madd(tap(k), load(past + k * step), v);
  } else {
    for (int64_t k = 0; k < K; ++k) v = madd(tap(k), load(past + k * step), v);
  }
  return v;
}

// Calls body.template operator()<taps>() would need C++20; this is its C++17 spelling.
template <int N>
struct Taps {
  static constexpr int value = N;
};
template <typename Body>
inline void by_taps(int64_t K, const Body& body) {
  switch (K) {
    case 2:
      return body(Taps<2>{});
    case 3:
      return body(Taps<3>{});
    case 4:
      return body(Taps<4>{});
    default:
      return body(Taps<0>{});
  }
}

// Floats to any type and stride; large outputs around the caches (vec.h).
inline void emit(const Strided& to, int64_t offset, const float* from, int64_t n, int64_t stride, bool stream) {
  char* p = at(to.data, to.dtype, offset);
  if (stream && to.dtype == kF32 && stride == 1 && can_stream(p)) {
    const Streamed s = {reinterpret_cast<float*>(p)};
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store(s, i, load(from + i));
    for (; i < n; ++i) s.p[i] = from[i];
  } else {
    narrow(p, from, to.dtype, n, stride);
  }
}

// ---------------------------------------------------------------------------------------------- rows, lanes along t

// past of row (b, d) as floats: K - 1 of the state, L of x, zeros up to a multiple of sixteen beyond.
inline void gather_row(const CausalConv1d& a, int64_t b, int64_t d, float* past) {
  const int64_t K1 = a.K - 1;
  if (a.state.data && K1 > 0)
    widen(past, in(a.state, b * a.state.s[0] + d * a.state.s[1]), a.state.dtype, K1, a.state.s[2]);
  else
    for (int64_t k = 0; k < K1; ++k) past[k] = 0;
  widen(past + K1, in(a.x, b * a.x.s[0] + d * a.x.s[1]), a.x.dtype, a.L, a.x.s[2]);
  for (int64_t i = K1 + a.L; i < K1 + padded(a.L); ++i) past[i] = 0;
}

template <int kTaps, bool kSilu>
inline void convolve_row(const CausalConv1d& a, const float* past, int64_t d, float* out) {
  const int64_t pitch = padded(a.D);
  const vf bias = splat(a.taps[a.K * pitch + d]);
  vf w[kTaps ? kTaps : 1];
  for (int k = 0; k < kTaps; ++k) w[k] = splat(a.taps[k * pitch + d]);
  for (int64_t t = 0; t < a.L; t += kWidth)
    store(out + t, activate<kSilu>(convolve<kTaps>(past + t, 1, a.K, bias, [&](int64_t k) {
            return kTaps ? w[kTaps ? k : 0] : splat(a.taps[k * pitch + d]);
          })));
}

inline void forward_rows(const CausalConv1d& a, bool stream) {
  on_threads(a.B * a.D, a.threads, a.B * a.D * a.L * 2, [&](int64_t id, int64_t begin, int64_t end) {
    float *past = a.scratch + id * a.scratch_size, *out = past + padded(a.K + padded(a.L));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / a.D, d = row % a.D;
      gather_row(a, b, d, past);
      by_taps(a.K, [&](auto taps) {
        a.silu ? convolve_row<taps.value, true>(a, past, d, out) : convolve_row<taps.value, false>(a, past, d, out);
      });
      emit(a.out, b * a.out.s[0] + d * a.out.s[1], out, a.L, a.out.s[2], stream);
    }
    if (stream) fence();
  });
}

// s (1 + v (1 - s)): clamped like the sigmoid, for beyond +-87 the product v (1 - s) of a large v and a rounded s is
// anything; there the slope is 1, or smaller than 2e-36. For v infinite it is NaN, as inf * 0 is.
inline vf silu_slope(vf v) {
  const float inf = std::numeric_limits<float>::infinity();
  const vf low = splat(-87.0f) > v ? splat(-87.0f) : v, x = splat(87.0f) < low ? splat(87.0f) : low;  // NaN passes
  const vf s = sigmoid_inside(x), slope = s * madd(x, splat(1.0f) - s, splat(1.0f));
  const vf finite = v < splat(-87.0f) ? vf{} : slope;
  return (v == splat(inf)) | (v == splat(-inf)) ? splat(std::numeric_limits<float>::quiet_NaN()) : finite;
}

inline void backward_rows(const CausalConv1dBackward& a) {
  const int64_t pitch = padded(a.D), K1 = a.K - 1, full = padded(a.L);
  on_threads(a.B * a.D, a.threads, a.B * a.D * a.L * 3, [&](int64_t id, int64_t begin, int64_t end) {
    float* past = a.scratch + id * a.scratch_size;       // [K - 1 + L, zeros]
    float* dpre = past + padded(a.K + full) + a.K;       // zeros before and after
    float* dpast = dpre - a.K + padded(2 * a.K + full);  // [K - 1 + L]
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / a.D, d = row % a.D;
      const auto tap = [&](int64_t k) { return splat(a.taps[k * pitch + d]); };
      gather_row(a, b, d, past);
      widen(dpre, in(a.grad, b * a.grad.s[0] + d * a.grad.s[1]), a.grad.dtype, a.L, a.grad.s[2]);
      for (int64_t i = 0; i < K1; ++i) dpre[i - K1] = 0;
      for (int64_t i = a.L; i < full + K1; ++i) dpre[i] = 0;
      if (a.silu) {
        const vf bias = tap(a.K);
        by_taps(a.K, [&](auto taps) {
          for (int64_t t = 0; t < a.L; t += kWidth) {
            const vf pre = convolve<taps.value>(past + t, 1, a.K, bias, tap);
            store(dpre + t, load(dpre + t) * silu_slope(pre));
          }
        });
        for (int64_t i = a.L; i < full; ++i) dpre[i] = 0;
      }
      if (a.dx.data || a.dstate.data) {
        for (int64_t p = 0; p < K1 + a.L; p += kWidth) {
          vf v = vf{};
          for (int64_t k = 0; k < a.K; ++k) v = madd(tap(k), load(dpre + p - k), v);
          store(dpast + p, v);
        }
        if (a.dstate.data && K1 > 0)
          narrow(at(a.dstate.data, a.dstate.dtype, b * a.dstate.s[0] + d * a.dstate.s[1]), dpast, a.dstate.dtype, K1,
                 a.dstate.s[2]);
        if (a.dx.data)
          narrow(at(a.dx.data, a.dx.dtype, b * a.dx.s[0] + d * a.dx.s[1]), dpast + K1, a.dx.dtype, a.L, a.dx.s[2]);
      }
      if (a.partial == nullptr) continue;
      for (int64_t k = 0; k <= a.K; ++k) {
        alignas(64) float sums[kParts];
        for (int64_t lane = 0; lane < kParts; lane += kWidth) {
          vf total = vf{};
          for (int64_t first = 0; first < full; first += kFold) {
            const int64_t last = first + kFold < full ? first + kFold : full;
            vf v = vf{};
            if (k < a.K)
              for (int64_t t = first + lane; t < last; t += kParts) v = madd(load(dpre + t), load(past + t + k), v);
            else
              for (int64_t t = first + lane; t < last; t += kParts) v = v + load(dpre + t);
            total = total + v;
          }
          store(sums + lane, total);
        }
        for (int64_t w = kParts / 2; w > 0; w /= 2)
          for (int64_t i = 0; i < w; ++i) sums[i] += sums[i + w];
        a.partial[(b * (a.K + 1) + k) * pitch + d] = sums[0];
      }
    }
  });
}

// ------------------------------------------------------------------------------------- strips, lanes along channels

// Rows t0 .. t0 + n - 1 of the past, channels d0 .. d0 + width - 1, as floats [n][width']; zeros beyond its end.
inline void gather_strip(const CausalConv1d& a, int64_t b, int64_t d0, int64_t width, int64_t t0, int64_t n,
                         int64_t row, float* to) {
  const int64_t K1 = a.K - 1;
  for (int64_t i = 0; i < n; ++i, to += row) {
    const int64_t p = t0 + i;
    if (p >= K1 && p < K1 + a.L) {
      const char* from = in(a.x, b * a.x.s[0] + d0 * a.x.s[1] + (p - K1) * a.x.s[2]);
      widen(to, from, a.x.dtype, width, a.x.s[1]);
    } else if (p < K1 && a.state.data) {
      widen(to, in(a.state, b * a.state.s[0] + d0 * a.state.s[1] + p * a.state.s[2]), a.state.dtype, width,
            a.state.s[1]);
    } else {
      memset(to, 0, static_cast<size_t>(width) * 4);
    }
  }
}

template <int kTaps, bool kSilu>
inline void convolve_strip(const CausalConv1d& a, const float* past, int64_t d0, int64_t width, int64_t row,
                           float* out) {
  const int64_t pitch = padded(a.D);
  for (int64_t d = 0; d < width; d += kWidth) {
    const float* taps = a.taps + d0 + d;
    store(out + d, activate<kSilu>(convolve<kTaps>(past + d, row, a.K, load(taps + a.K * pitch),
                                                   [&](int64_t k) { return load(taps + k * pitch); })));
  }
}

inline void forward_strips(const CausalConv1d& a, bool stream) {
  const int64_t strips = (a.D + kStrip - 1) / kStrip, pieces = (a.L + kStepsTask - 1) / kStepsTask, K1 = a.K - 1;
  on_threads(a.B * pieces * strips, a.threads, a.B * a.D * a.L * 2, [&](int64_t id, int64_t begin, int64_t end) {
    float *past = a.scratch + id * a.scratch_size, *out = past + (K1 + kSteps) * kStrip;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / (pieces * strips), piece = task / strips % pieces, d0 = task % strips * kStrip;
      const int64_t width = a.D - d0 < kStrip ? a.D - d0 : kStrip;
      const int64_t last = (piece + 1) * kStepsTask < a.L ? (piece + 1) * kStepsTask : a.L;
      for (int64_t t0 = piece * kStepsTask; t0 < last; t0 += kSteps) {
        const int64_t n = last - t0 < kSteps ? last - t0 : kSteps;
        if (t0 == piece * kStepsTask) {
          gather_strip(a, b, d0, width, t0, K1 + n, kStrip, past);
        } else {  // the end of the last block is the beginning of this one
          memmove(past, past + kSteps * kStrip, static_cast<size_t>(K1) * kStrip * 4);
          gather_strip(a, b, d0, width, t0 + K1, n, kStrip, past + K1 * kStrip);
        }
        by_taps(a.K, [&](auto taps) {
          for (int64_t t = 0; t < n; ++t) {
            const float* from = past + t * kStrip;
            a.silu ? convolve_strip<taps.value, true>(a, from, d0, width, kStrip, out)
                   : convolve_strip<taps.value, false>(a, from, d0, width, kStrip, out);
            emit(a.out, b * a.out.s[0] + d0 * a.out.s[1] + (t0 + t) * a.out.s[2], out, width, a.out.s[1], stream);
          }
        });
      }
    }
    if (stream) fence();
  });
}

inline void backward_strips(const CausalConv1dBackward& a) {
  const int64_t strips = (a.D + kThin - 1) / kThin, pitch = padded(a.D), K1 = a.K - 1;
  on_threads(a.B * strips, a.threads, a.B * a.D * a.L * 3, [&](int64_t id, int64_t begin, int64_t end) {
    float* past = a.scratch + id * a.scratch_size;      // [K - 1 + kSteps + K - 1][kThin]
    float* dpre = past + (2 * K1 + kSteps) * kThin;     // [K - 1 + kSteps][kThin], t0 - (K - 1) first
    float* sums = dpre + (K1 + kSteps) * kThin;         // [kParts][K + 1][kThin]
    float* totals = sums + kParts * (a.K + 1) * kThin;  // likewise
    float* line = totals + kParts * (a.K + 1) * kThin;  // [kThin]
    const auto fold = [&] {
      for (int64_t i = 0; i < kParts * (a.K + 1) * kThin; i += kWidth)
        store(totals + i, load(totals + i) + load(sums + i)), store(sums + i, vf{});
    };
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / strips, d0 = task % strips * kThin;
      const int64_t width = a.D - d0 < kThin ? a.D - d0 : kThin;
      const float* taps = a.taps + d0;
      if (a.partial) memset(sums, 0, static_cast<size_t>(2 * kParts * (a.K + 1) * kThin) * 4);
      memset(dpre, 0, static_cast<size_t>((K1 + kSteps) * kThin) * 4);
      // Block by block; the last one reaches K - 1 steps beyond the end, where dpre is zero.
      for (int64_t t0 = 0; t0 < a.L + K1; t0 += kSteps) {
        const int64_t n = a.L - t0 < kSteps ? (a.L - t0 < 0 ? 0 : a.L - t0) : kSteps;
        if (a.partial && t0 > 0 && t0 % kFold == 0) fold();
        if (t0 > 0) memmove(dpre, dpre + kSteps * kThin, static_cast<size_t>(K1 * kThin) * 4);
        gather_strip(a, b, d0, width, t0, K1 + n, kThin, past);
        for (int64_t t = 0; t < kSteps; ++t) {
          float* to = dpre + (K1 + t) * kThin;
          if (t >= n) {
            memset(to, 0, kThin * 4);
            continue;
          }
          widen(to, in(a.grad, b * a.grad.s[0] + d0 * a.grad.s[1] + (t0 + t) * a.grad.s[2]), a.grad.dtype, width,
                a.grad.s[1]);
          for (int64_t d = 0; d < width; d += kWidth) {
            vf g = load(to + d);
            const float* from = past + t * kThin + d;
            if (a.silu) {
              const auto tap = [&](int64_t k) { return load(taps + k * pitch + d); };
              by_taps(a.K,
                      [&](auto count) { g = g * silu_slope(convolve<count.value>(from, kThin, a.K, tap(a.K), tap)); });
              store(to + d, g);
            }
            if (a.partial == nullptr) continue;
            float* sum = sums + t % kParts * (a.K + 1) * kThin + d;
            for (int64_t k = 0; k < a.K; ++k)
              store(sum + k * kThin, madd(g, load(from + k * kThin), load(sum + k * kThin)));
            store(sum + a.K * kThin, load(sum + a.K * kThin) + g);
          }
        }
        // dpast of positions t0 .. t0 + kSteps - 1, the first K - 1 of which are the state's.
        if (!a.dx.data && !a.dstate.data) continue;
        for (int64_t t = 0; t < kSteps && t0 + t < a.L + K1; ++t) {
          const int64_t p = t0 + t;
          const Strided& to = p < K1 ? a.dstate : a.dx;
          if (to.data == nullptr) continue;
          for (int64_t d = 0; d < width; d += kWidth) {
            vf v = vf{};
            for (int64_t k = 0; k < a.K; ++k)
              v = madd(load(taps + k * pitch + d), load(dpre + (K1 + t - k) * kThin + d), v);
            store(line + d, v);
          }
          const int64_t i = p < K1 ? p : p - K1;
          narrow(at(to.data, to.dtype, b * to.s[0] + d0 * to.s[1] + i * to.s[2]), line, to.dtype, width, to.s[1]);
        }
      }
      if (a.partial == nullptr) continue;
      fold();
      const int64_t part = (a.K + 1) * kThin;
      for (int64_t w = kParts / 2; w > 0; w /= 2)
        for (int64_t i = 0; i < w * part; i += kWidth)
          store(totals + i, load(totals + i) + load(totals + w * part + i));
      for (int64_t k = 0; k <= a.K; ++k)
        memcpy(a.partial + (b * (a.K + 1) + k) * pitch + d0, totals + k * kThin, static_cast<size_t>(width) * 4);
    }
  });
}

// Channels are adjacent in memory, and time is not.
inline bool by_strips(const Strided& x, const Strided& y) { return x.s[1] == 1 && y.s[1] == 1 && x.s[2] != 1; }

}  // namespace

void causal_conv1d(const CausalConv1d& a) {
  gather_taps(a);
  const bool stream = a.out.dtype == kF32 && worth_streaming(a.B * a.D * a.L * 4);
  by_strips(a.x, a.out) ? forward_strips(a, stream) : forward_rows(a, stream);
}

void causal_conv1d_backward(const CausalConv1dBackward& a) {
  gather_taps(a);
  by_strips(a.x, a.grad) ? backward_strips(a) : backward_rows(a);
  if (a.partial == nullptr) return;
  const int64_t pitch = padded(a.D);
  for (int64_t k = 0; k <= a.K; ++k) {
    const Strided& to = k < a.K ? a.dweight : a.dbias;
    if (to.data == nullptr) continue;
    for (int64_t d = 0; d < a.D; ++d) {
      float total = 0;
      for (int64_t b = 0; b < a.B; ++b) total += a.partial[(b * (a.K + 1) + k) * pitch + d];
      store_from_float(to.data, to.dtype, d * to.s[0] + (k < a.K ? k * to.s[1] : 0), total);
    }
  }
}

}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
