// Adaptive layer norm on CUDA, forward (formulas: AdalnForward in fastdiff.h; backward: adaln_backward.cu).
//
//   residual = x + gate * branch;  y = norm(residual) * weight + bias;  y = y * (1 + scale) + shift      x: [B, N, D]
//
// Floor, in tensors of B*N*D elements: adaln_modulate 1 read + 1 write; gate_residual 2 + 1; both at once 2 + 2
// (one after the other would be 3 + 2). Modulation per sample or shared is N times smaller and stays in cache.
//
// Mapping. A row lives in registers from its only load on, so the variance takes two exact passes at no cost in bytes.
// Up to D = 1280 one warp owns a row: its sums are shuffles, no thread ever waits for another warp, and at D = 1152 in
// 16 bits (DiT-XL) a lane holds five 16-byte vectors, 90 % of them in use, against 56 % when 128 threads hold two each.
// Four rows share a block, and with it the modulation in L1. Above that 128 or 512 threads own a row. Rows that are not
// aligned, not contiguous or odd take the same kernel one element at a time; D > 8192 takes a kernel that reads the row
// again for each pass (from L2).
//
// What bounds it, counted on one H200 (132 SMs, 4.3 TB/s of copy: 33 B/ns an SM, half of them reads; 700 ns of latency;
// 7 warp instructions/ns an SM), D = 1152. Reads in flight must cover 16 B/ns * 700 ns = 11 KB an SM:
//   type   registers  warps an SM  bytes of x a warp  in flight  instructions a row  issued at the copy's rate
//   bf16        92         20             2304          46 KB         about 520 (branches: 710)    3.7 /ns, 53 %
//   f16        110         16             2304          37 KB         about 520                    3.7 /ns, 53 %
//   f32        128         16             4608          74 KB         about 480                    1.7 /ns, 24 %
// So memory is covered three times over, and in 16 bits it is the issue of instructions that could run short.
// Hence the case that transformers have, modulation of the type of x without weight and bias, is a straight line (no
// branch on a type per vector), and the deviation from the mean is subtracted once. Operands of other types are
// converted behind a branch that is the same for the whole grid (vec.cuh).
// A call of few rows ([2, 256, 1152]: one block an SM) waits for memory twice, for x and then for the modulation,
// unless it asks for both at once: that is what `kEarly` does where registers are no object, for the same bits.
//
// Predicted from that: 85-90 % of the copy at [64, 256, 1152] in both types (4096 blocks over 660 or 528 that fit at
// once: the last wave is part empty); at [2, 256, 1152] one latency of memory and some 0.6 us of arithmetic, 1.4 us,
// where two latencies made 2.1.
// Performance: not measured.
#include "reduce.cuh"
#include "vec.cuh"

namespace fastdiff {
namespace cuda {
namespace {

// ---------------------------------------------------------------------------------------------------- forward

// residual = x + gate * branch, as it is stored. The norm sees the rounded value: what gate_residual followed by
// adaln_modulate computes, and what the backward pass reads.
template <int kVec>
FD_D void gate_and_store(const Row& gate, const Row& residual, int64_t i, const float (&branch)[kVec],
                         float (&v)[kVec]) {
  float g[kVec];
  read<kVec, true>(gate, i, g);
#pragma unroll
  for (int k = 0; k < kVec; ++k) v[k] += g[k] * branch[k];
  const Raw<kVec> rounded = narrow(v, residual.dtype);
  store(residual, i, rounded);
  if (!FD_MUTATED(kUnroundedResidual)) widen(rounded, residual.dtype, v);
}

// Rows of the small operands that turn the normalised row into y.
struct Modulation {
  Row shift, scale, weight, bias;
  bool has_weight, has_bias;

  FD_D Modulation(const AdalnForward& a, int64_t b, int64_t n)
      : shift(row_of(a.shift, b, n)),
        scale(row_of(a.scale, b, n)),
        weight(row_of(a.weight, 0, 0)),
        bias(row_of(a.bias, 0, 0)),
        has_weight(a.weight.data != nullptr),
        has_bias(a.bias.data != nullptr) {}

  // `r`: the row's deviation from its mean.
  template <int kVec>
  FD_D void apply(const Row& y, int64_t i, float rstd, const float (&r)[kVec]) const {
    const Raw<kVec> raw_scale = load<kVec, true>(scale, i), raw_shift = load<kVec, true>(shift, i);
    float v[kVec], t[kVec], u[kVec];
#pragma unroll
    for (int k = 0; k < kVec; ++k) v[k] = r[k] * rstd;
    if (has_weight) {
      read<kVec, true>(weight, i, t);
#pragma unroll
      for (int k = 0; k < kVec; ++k) v[k] *= t[k];
    }
    if (has_bias) {
      read<kVec, true>(bias, i, t);
#pragma unroll
      for (int k = 0; k < kVec; ++k) v[k] += t[k];
    }
    widen(raw_scale, scale.dtype, t);
    widen(raw_shift, shift.dtype, u);
#pragma unroll
    for (int k = 0; k < kVec; ++k) v[k] = fmaf(v[k], 1.0f + t[k], u[k]);
    write(y, i, v);
  }
};

// The same for modulation of the type of y, without weight and bias.
template <int kVec>
FD_D void apply_plain(const Row& y, int64_t i, float rstd, const float (&r)[kVec], const Raw<kVec>& scale,
                      const Raw<kVec>& shift) {
  float v[kVec], t[kVec];
  widen(scale, y.dtype, t);
  widen(shift, y.dtype, v);
#pragma unroll
  for (int k = 0; k < kVec; ++k) v[k] = fmaf(r[k] * rstd, 1.0f + t[k], v[k]);
  write(y, i, v);
}
bool is_plain(const AdalnForward& a) {
  return a.scale.data != nullptr && a.weight.data == nullptr && a.bias.data == nullptr && a.scale.dtype == a.x.dtype &&
         a.shift.dtype == a.x.dtype;
}

FD_D float rstd_of(float square, int64_t D, float eps) {
  return 1.0f / sqrtf(square * (1.0f / static_cast<float>(D - (FD_MUTATED(kUnbiased) ? 1 : 0))) + eps);
}

constexpr int kWarpRows = 4;  // rows of a block when a warp owns a row
template <int kThreads>
constexpr int kRowsPerBlock = kThreads == 32 ? kWarpRows : 1;
template <int kThreads>
constexpr int kBlockThreads = kThreads * kRowsPerBlock<kThreads>;
// Threads that an SM must be able to hold, hence a bound on registers: enough 16-byte loads in flight, and no spills
// (benchmarks/ptxas_report.py).
template <int kVec, int kThreads, int kType, bool kEarly>
constexpr int kMinBlocks = (kEarly                       ? 256
                            : kVec == 1                  ? 1024
                            : kVec == 4 || kType == kF16 ? 512
                                                         : 640) /
                           kBlockThreads<kThreads>;

// One row per kThreads threads, kPer vectors of kVec elements per thread. kType: the type of x, branch, residual and y
// when it is known at compile time, else -1. kEarly: is_plain, and the modulation is requested along with x.
template <int kVec, int kPer, int kThreads, int kType, bool kEarly>
__global__ void __launch_bounds__(kBlockThreads<kThreads>, kMinBlocks<kVec, kThreads, kType, kEarly>)
    forward_rows(const AdalnForward a) {
  constexpr int kWarps = kThreads / 32, kRows = kRowsPerBlock<kThreads>;
  FD_SHARED(float, buffers, 2 * kWarps);
  int turn = 0;
  const auto sum = [&](float v) {
    float s[1] = {v};
    if constexpr (kThreads == 32)
      warp_sum(s);
    else
      block_sum(s, buffers, kWarps, &turn);
    return s[0];
  };
  (void)buffers, (void)turn;
  const auto typed = [](Row r) { return kType >= 0 ? with_type(r, kType) : r; };
  const int lane = threadIdx.x % kThreads, D = static_cast<int>(a.D);
  const auto column = [&](int j) { return (j * kThreads + lane) * kVec; };
  const bool gated = a.gate.data != nullptr, normed = a.scale.data != nullptr;
  const bool plain = (kType >= 0 && a.scale.dtype == kType && a.shift.dtype == kType && a.weight.data == nullptr &&
                      a.bias.data == nullptr);

  const int64_t rows = a.B * a.N, step = static_cast<int64_t>(gridDim.x) * kRows;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kThreads; row < rows; row += step) {
    int64_t b, n;
    split(row, a.N, &b, &n);
    Row x = typed(row_of(a.x, b, n));
    if (FD_MUTATED(kStride)) x.sd = 1;
    const int64_t whose = FD_MUTATED(kBatchIndex) ? (b + 1) % a.B : b;
    Raw<kVec> early_scale[kEarly ? kPer : 1], early_shift[kEarly ? kPer : 1];
    (void)early_scale, (void)early_shift;
    float r[kPer][kVec];
    {
      Raw<kVec> raw[kPer];
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        raw[j] = {};
        if (column(j) < D) raw[j] = load<kVec, false>(x, column(j));
      }
      if constexpr (kEarly) {
        const Row scale = typed(row_of(a.scale, whose, n)), shift = typed(row_of(a.shift, whose, n));
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          const int i = column(FD_MUTATED(kEarlyVector) ? 0 : j);
          early_scale[j] = early_shift[j] = {};
          if (i < D) early_scale[j] = load<kVec, true>(scale, i), early_shift[j] = load<kVec, true>(shift, i);
        }
      }
      if (gated) {
        const Row branch = typed(row_of(a.branch, b, n)), gate = row_of(a.gate, b, n);
        const Row residual = typed(row_of(a.residual, b, n));
        Raw<kVec> raw_branch[kPer];
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          raw_branch[j] = {};
          if (column(j) < D) raw_branch[j] = load<kVec, false>(branch, column(j));
        }
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          widen(raw[j], x.dtype, r[j]);
          float v[kVec];
          widen(raw_branch[j], branch.dtype, v);
          if (column(j) < D) gate_and_store<kVec>(gate, residual, column(j), v, r[j]);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kPer; ++j) widen(raw[j], x.dtype, r[j]);
      }
    }
    if (!normed) continue;

    float mean = 0, square = 0;
    if (!a.rms) {
      float s = 0;
#pragma unroll
      for (int j = 0; j < kPer; ++j)
#pragma unroll
        for (int k = 0; k < kVec; ++k) s += r[j][k];  // zeros beyond D
      mean = sum(s) * (1.0f / static_cast<float>(D));
    }
#pragma unroll
    for (int j = 0; j < kPer; ++j)
      if (column(j) < D || FD_MUTATED(kVarianceTail)) {
#pragma unroll
        for (int k = 0; k < kVec; ++k) r[j][k] -= mean, square += r[j][k] * r[j][k];
      }
    const float rstd = rstd_of(sum(square), D, a.eps);
    if (lane == 0 && a.mean != nullptr) a.mean[row] = mean, a.rstd[row] = rstd;

    const Row y = typed(row_of(a.y, b, n));
    if constexpr (kEarly) {
#pragma unroll
      for (int j = 0; j < kPer; ++j)
        if (column(j) < D) apply_plain(y, column(j), rstd, r[j], early_scale[j], early_shift[j]);
    } else if (plain) {
      const Row scale = typed(row_of(a.scale, whose, n)), shift = typed(row_of(a.shift, whose, n));
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const int i = column(j);
        if (i < D) apply_plain(y, i, rstd, r[j], load<kVec, true>(scale, i), load<kVec, true>(shift, i));
      }
    } else {
      const Modulation m(a, whose, n);
#pragma unroll
      for (int j = 0; j < kPer; ++j)
        if (column(j) < D) m.apply<kVec>(y, column(j) + (FD_MUTATED(kStoreTail) ? 1 : 0), rstd, r[j]);
    }
  }
}

// Rows of any length: every pass reads the row again.
template <int kVec>
__global__ void __launch_bounds__(512) forward_long(const AdalnForward a) {
  FD_SHARED(float, buffers, 2 * 16);
  int turn = 0;
  const auto sum = [&](float v) {
    float s[1] = {v};
    block_sum(s, buffers, 16, &turn);
    return s[0];
  };
  const bool gated = a.gate.data != nullptr, normed = a.scale.data != nullptr;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kVec, step = 512 * kVec;
  for (int64_t row = blockIdx.x; row < a.B * a.N; row += gridDim.x) {
    int64_t b, n;
    split(row, a.N, &b, &n);
    Row r = row_of(a.x, b, n);
    float v[kVec], s = 0, square = 0, mean = 0;
    if (gated) {
      const Row branch = row_of(a.branch, b, n), gate = row_of(a.gate, b, n), residual = row_of(a.residual, b, n);
      for (int64_t i = first; i < a.D; i += step) {
        float w[kVec];
        read<kVec, false>(r, i, v);
        read<kVec, false>(branch, i, w);
        gate_and_store<kVec>(gate, residual, i, w, v);
      }
      r = residual;  // a thread reads back only what it wrote itself
    }
    if (!normed) continue;
    if (!a.rms) {
      for (int64_t i = first; i < a.D; i += step) {
        read<kVec, false>(r, i, v);
#pragma unroll
        for (int k = 0; k < kVec; ++k) s += v[k];
      }
      mean = sum(s) * (1.0f / static_cast<float>(a.D));
    }
    for (int64_t i = first; i < a.D; i += step) {
      read<kVec, false>(r, i, v);
#pragma unroll
      for (int k = 0; k < kVec; ++k) square += (v[k] - mean) * (v[k] - mean);
    }
    const float rstd = rstd_of(sum(square), a.D, a.eps);
    if (threadIdx.x == 0 && a.mean != nullptr) a.mean[row] = mean, a.rstd[row] = rstd;
    const Modulation m(a, b, n);
    const Row y = row_of(a.y, b, n);
    for (int64_t i = first; i < a.D; i += step) {
      read<kVec, false>(r, i, v);
#pragma unroll
      for (int k = 0; k < kVec; ++k) v[k] -= mean;
      m.apply<kVec>(y, i, rstd, v);
    }
  }
}

template <int kVec, int kPer, int kThreads, int kType>
void launch_rows(const AdalnForward& a, int device, void* stream) {
  constexpr int kRows = kRowsPerBlock<kThreads>;
  const int64_t blocks = (a.B * a.N + kRows - 1) / kRows;
  if constexpr (kThreads == 32 && kType >= 0) {
    if (is_plain(a) && blocks <= 2 * multiprocessors(device))
      return FD_LAUNCH((forward_rows<kVec, kPer, kThreads, kType, true>), grid_for(blocks), kBlockThreads<kThreads>, 0,
                       stream, a);
  }
  FD_LAUNCH((forward_rows<kVec, kPer, kThreads, kType, false>), grid_for(blocks), kBlockThreads<kThreads>, 0, stream,
            a);
}

template <int kVec>
void launch_long(const AdalnForward& a, void* stream) {
  FD_LAUNCH(forward_long<kVec>, grid_for(a.B * a.N), 512, 0, stream, a);
}

template <int kVec, int kType>
void forward_vectors(const AdalnForward& a, int device, void* stream) {
  constexpr int f = 8 / kVec;  // vectors that hold 8 elements
  if (a.D <= 256) return launch_rows<kVec, f, 32, kType>(a, device, stream);
  if (a.D <= 768) return launch_rows<kVec, 3 * f, 32, kType>(a, device, stream);
  if (a.D <= 1280) return launch_rows<kVec, 5 * f, 32, kType>(a, device, stream);
  if (a.D <= 3072) return launch_rows<kVec, 3 * f, 128, kType>(a, device, stream);
  if (a.D <= 8192) return launch_rows<kVec, 2 * f, 512, kType>(a, device, stream);
  launch_long<kVec>(a, stream);
}

void forward_elements(const AdalnForward& a, int device, void* stream) {
  if (a.D <= 256) return launch_rows<1, 8, 32, -1>(a, device, stream);
  if (a.D <= 2048) return launch_rows<1, 8, 256, -1>(a, device, stream);
  if (a.D <= 8192) return launch_rows<1, 8, 1024, -1>(a, device, stream);
  launch_long<1>(a, stream);
}

}  // namespace

void adaln_forward(const AdalnForward& a, int device, void* stream) {
  if (a.B * a.N * a.D == 0) return;
  const DeviceGuard guard(device);
  const int vec = a.x.dtype == kF32 ? 4 : 8;
  bool whole = true;  // every operand can be read `vec` elements at a time
  for (const View* v : {&a.x, &a.branch, &a.gate, &a.shift, &a.scale, &a.weight, &a.bias, &a.residual, &a.y})
    whole = whole && vectorizes(*v, a.D, vec);
  if (!whole || (a.gate.data != nullptr && a.branch.dtype != a.x.dtype)) return forward_elements(a, device, stream);
  if (a.x.dtype == kF32) return forward_vectors<4, kF32>(a, device, stream);
  if (a.x.dtype == kF16) return forward_vectors<8, kF16>(a, device, stream);
  forward_vectors<8, kBF16>(a, device, stream);
}

}  // namespace cuda
}  // namespace fastdiff
