// Adaptive layer norm on CUDA, forward and backward (formulas: AdalnForward and AdalnBackward in fastdiff.h).
//
//   residual = x + gate * branch;  y = norm(residual) * weight + bias;  y = y * (1 + scale) + shift      x: [B, N, D]
//
// Floor, in tensors of B*N*D elements: adaln_modulate 1 read + 1 write; gate_residual 2 + 1; both at once 2 + 2
// (one after the other would be 3 + 2); backward 2 + 1 (r and grad_y in, dx out), with gate 4 + 2. Modulation per
// sample or shared is N times smaller and stays in cache.
//
// Forward mapping. A row lives in registers from its only load on, so the variance takes two exact passes at no cost in
// bytes. Up to D = 1280 one warp owns a row: its sums are shuffles, no thread ever waits for another warp, and at
// D = 1152 in 16 bits (DiT-XL) a lane holds five 16-byte vectors, 90 % of them in use, against 56 % when 128 threads
// hold two each. Four rows share a block, and with it the modulation in L1. Above that 128 or 512 threads own a row.
// Operands of other types than x are converted behind a branch that is the same for the whole grid (vec.cuh). Rows
// that are not aligned, not contiguous or odd take the same kernel one element at a time; D > 8192 takes a kernel that
// reads the row again for each pass (from L2).
//
// Backward mapping. A block owns a chunk of kChunk tokens of one sample and a thread owns 8 columns for all of them:
// dx and dbranch leave row by row, and the chunk's sums for dshift, dscale, dgate (and dweight, dbias) build up in
// registers. They are stored once per chunk (1/8 of a 16-bit tensor each, L2-sized) and added in order by a second
// kernel: no atomics, the same bits on every run and for every batch. The next row is requested while the current one
// is being reduced. Above D = 4096 the sums live in the workspace itself instead of in registers.
//
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

  template <int kVec>
  FD_D void apply(const Row& y, int64_t i, float mean, float rstd, const float (&r)[kVec]) const {
    const Raw<kVec> raw_scale = load<kVec, true>(scale, i), raw_shift = load<kVec, true>(shift, i);
    float v[kVec], t[kVec];
#pragma unroll
    for (int k = 0; k < kVec; ++k) v[k] = (r[k] - mean) * rstd;
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
#pragma unroll
    for (int k = 0; k < kVec; ++k) v[k] *= 1.0f + t[k];
    widen(raw_shift, shift.dtype, t);
#pragma unroll
    for (int k = 0; k < kVec; ++k) v[k] += t[k];
    write(y, i, v);
  }
};

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
template <int kVec, int kThreads>
constexpr int kMinBlocks = (kVec == 1   ? 1024
                            : kVec == 4 ? 512
                                        : 640) /
                           kBlockThreads<kThreads>;

// One row per kThreads threads, kPer vectors of kVec elements per thread. kType: the type of x, branch, residual and y
// when it is known at compile time, else -1.
template <int kVec, int kPer, int kThreads, int kType>
__global__ void __launch_bounds__(kBlockThreads<kThreads>, kMinBlocks<kVec, kThreads>)
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

  const int64_t rows = a.B * a.N, step = static_cast<int64_t>(gridDim.x) * kRows;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kThreads; row < rows; row += step) {
    int64_t b, n;
    split(row, a.N, &b, &n);
    Row x = typed(row_of(a.x, b, n));
    if (FD_MUTATED(kStride)) x.sd = 1;
    float r[kPer][kVec];
    {
      Raw<kVec> raw[kPer];
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        raw[j] = {};
        if (column(j) < D) raw[j] = load<kVec, false>(x, column(j));
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
        for (int k = 0; k < kVec; ++k) square += (r[j][k] - mean) * (r[j][k] - mean);
      }
    const float rstd = rstd_of(sum(square), D, a.eps);
    if (lane == 0 && a.mean != nullptr) a.mean[row] = mean, a.rstd[row] = rstd;

    const Modulation m(a, FD_MUTATED(kBatchIndex) ? (b + 1) % a.B : b, n);
    const Row y = typed(row_of(a.y, b, n));
#pragma unroll
    for (int j = 0; j < kPer; ++j)
      if (column(j) < D) m.apply<kVec>(y, column(j) + (FD_MUTATED(kStoreTail) ? 1 : 0), mean, rstd, r[j]);
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
      m.apply<kVec>(y, i, mean, rstd, v);
    }
  }
}

template <int kVec, int kPer, int kThreads, int kType>
void launch_rows(const AdalnForward& a, void* stream) {
  constexpr int kRows = kRowsPerBlock<kThreads>;
  FD_LAUNCH((forward_rows<kVec, kPer, kThreads, kType>), grid_for((a.B * a.N + kRows - 1) / kRows),
            kBlockThreads<kThreads>, 0, stream, a);
}

template <int kVec>
void launch_long(const AdalnForward& a, void* stream) {
  FD_LAUNCH(forward_long<kVec>, grid_for(a.B * a.N), 512, 0, stream, a);
}

template <int kVec, int kType>
void forward_vectors(const AdalnForward& a, void* stream) {
  constexpr int f = 8 / kVec;  // vectors that hold 8 elements
  if (a.D <= 256) return launch_rows<kVec, f, 32, kType>(a, stream);
  if (a.D <= 768) return launch_rows<kVec, 3 * f, 32, kType>(a, stream);
  if (a.D <= 1280) return launch_rows<kVec, 5 * f, 32, kType>(a, stream);
  if (a.D <= 3072) return launch_rows<kVec, 3 * f, 128, kType>(a, stream);
  if (a.D <= 8192) return launch_rows<kVec, 2 * f, 512, kType>(a, stream);
  launch_long<kVec>(a, stream);
}

void forward_elements(const AdalnForward& a, void* stream) {
  if (a.D <= 256) return launch_rows<1, 8, 32, -1>(a, stream);
  if (a.D <= 2048) return launch_rows<1, 8, 256, -1>(a, stream);
  if (a.D <= 8192) return launch_rows<1, 8, 1024, -1>(a, stream);
  launch_long<1>(a, stream);
}

// --------------------------------------------------------------------------------------------------- backward

enum { kDshift, kDscale, kDgate, kDweight, kDbias, kGrads };

FD_D bool summed(const ParamGrad& g) { return g.reduce == kPerSample || g.reduce == kShared; }
FD_D Row token_row(const ParamGrad& g, int64_t token, int64_t D) { return row_of(g.data, g.dtype, token * D); }

// What one token's gradients are made of, at columns i .. i + kVec - 1; shared by both backward kernels.
template <int kVec>
struct NormGrad {
  float hat[kVec];       // (r - mean) * rstd
  float d[kVec];         // gradient of hat
  float d_affine[kVec];  // gradient of hat * weight + bias: what dbias adds, and times hat what dweight adds
  float shift[kVec], scale[kVec];

  FD_D void compute(const AdalnBackward& a, const Raw<kVec>& r, const Raw<kVec>& grad_y, const Row& scale_row,
                    int64_t i, float mean, float rstd) {
    const Raw<kVec> raw_scale = load<kVec, true>(scale_row, i);
    float t[kVec], affine[kVec];
    widen(r, a.r.dtype, hat);
    widen(grad_y, a.grad_y.dtype, shift);
    widen(raw_scale, scale_row.dtype, t);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      hat[k] = (hat[k] - mean) * rstd, affine[k] = hat[k];
      d_affine[k] = d[k] = shift[k] * (1.0f + t[k]);
    }
    if (a.weight.data != nullptr) {
      read<kVec, true>(row_of(a.weight, 0, 0), i, t);
#pragma unroll
      for (int k = 0; k < kVec; ++k) affine[k] *= t[k], d[k] *= t[k];
    }
    if (a.bias.data != nullptr) {
      read<kVec, true>(row_of(a.bias, 0, 0), i, t);
#pragma unroll
      for (int k = 0; k < kVec; ++k) affine[k] += t[k];
    }
#pragma unroll
    for (int k = 0; k < kVec; ++k) scale[k] = shift[k] * affine[k];
  }
};

// Writes dx, dbranch and a per-token dgate; `gate` leaves as this token's dgate, if someone wants it (else the branch
// may be absent).
template <int kVec>
FD_D void finish_token(const AdalnBackward& a, int64_t b, int64_t n, int64_t i, const float (&dx)[kVec],
                       float (&gate)[kVec]) {
  if (a.dbranch.data != nullptr) {
    read<kVec, true>(row_of(a.gate, b, n), i, gate);
#pragma unroll
    for (int k = 0; k < kVec; ++k) gate[k] *= dx[k];
    write(row_of(a.dbranch, b, n), i, gate);
  }
  if (a.dgate.reduce != kAbsent) {
    read<kVec, false>(row_of(a.branch, b, n), i, gate);
#pragma unroll
    for (int k = 0; k < kVec; ++k) gate[k] *= dx[k];
    if (a.dgate.reduce == kPerToken) write(token_row(a.dgate, b * a.N + n, a.D), i, gate);
  }
  if (a.dx.data != nullptr) write(row_of(a.dx, b, n), i, dx);
}

// A thread owns kPer vectors of kVec columns of a chunk of tokens. kAffine: weight or bias want a gradient.
template <int kVec, int kPer, bool kAffine>
__global__ void __launch_bounds__(512) backward_chunks(const AdalnBackward a) {
  constexpr bool kLookAhead = kVec > 1 && !kAffine;  // five sums per column, or strides, leave no registers for it
  constexpr int kMaxWarps = 16;
  FD_SHARED(float, buffers, 2 * 2 * kMaxWarps);
  int turn = 0;
  const int threads = blockDim.x, warps = threads / 32, D = static_cast<int>(a.D);
  const auto column = [&](int j) { return (j * threads + static_cast<int>(threadIdx.x)) * kVec; };
  const bool normed = a.grad_y.data != nullptr;
  const float inv_d = 1.0f / static_cast<float>(D);
  const int64_t per_sample = (a.N + kChunk - 1) / kChunk;

  struct Token {
    Raw<kVec> r[kPer], grad_y[kPer];
    float mean, rstd;
  };
  for (int64_t chunk = blockIdx.x; chunk < a.B * per_sample; chunk += gridDim.x) {
    int64_t b, c;
    split(chunk, per_sample, &b, &c);
    const int64_t begin = c * kChunk;
    const int64_t end = begin + kChunk < a.N ? begin + kChunk + (FD_MUTATED(kChunkEnd) ? 1 : 0) : a.N;
    const auto fetch_token = [&](int64_t n) {
      Token t;
      t.mean = a.mean[b * a.N + n], t.rstd = a.rstd[b * a.N + n];
      const Row r = row_of(a.r, b, n), grad_y = row_of(a.grad_y, b, n);
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        t.r[j] = t.grad_y[j] = {};
        if (column(j) < D) t.r[j] = load<kVec, false>(r, column(j)), t.grad_y[j] = load<kVec, false>(grad_y, column(j));
      }
      return t;
    };
    float total[kAffine ? kGrads : kDgate + 1][kPer][kVec] = {};
    Token next = {};
    if (kLookAhead && normed) next = fetch_token(begin);
    for (int64_t n = begin; n < end; ++n) {
      float dx[kPer][kVec] = {}, hat[kPer][kVec];
      Raw<kVec> grad_residual[kPer];
      if (a.grad_residual.data != nullptr) {
        const Row row = row_of(a.grad_residual, b, n);
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          grad_residual[j] = {};
          if (column(j) < D) grad_residual[j] = load<kVec, false>(row, column(j));
        }
      }
      if (normed) {
        const Token t = kLookAhead ? next : fetch_token(n);
        if (kLookAhead && n + 1 < end) next = fetch_token(n + 1);
        const Row scale = row_of(a.scale, b, n);
        float s[2] = {0, 0};
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          if (column(j) >= D) continue;
          NormGrad<kVec> g;
          g.compute(a, t.r[j], t.grad_y[j], scale, column(j), t.mean, t.rstd);
          if (a.dshift.reduce == kPerToken) write(token_row(a.dshift, b * a.N + n, D), column(j), g.shift);
          if (a.dscale.reduce == kPerToken) write(token_row(a.dscale, b * a.N + n, D), column(j), g.scale);
#pragma unroll
          for (int k = 0; k < kVec; ++k) {
            total[kDshift][j][k] += g.shift[k], total[kDscale][j][k] += g.scale[k];
            if constexpr (kAffine)
              total[kDweight][j][k] += g.d_affine[k] * g.hat[k], total[kDbias][j][k] += g.d_affine[k];
            s[0] += g.d[k], s[1] += g.d[k] * g.hat[k];
            hat[j][k] = g.hat[k], dx[j][k] = g.d[k];
          }
        }
        block_sum(s, buffers, warps, &turn);
        const float m1 = a.rms ? 0.0f : s[0] * inv_d, m2 = s[1] * inv_d;
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          if (column(j) >= D) continue;
#pragma unroll
          for (int k = 0; k < kVec; ++k) dx[j][k] = (dx[j][k] - m1 - hat[j][k] * m2) * t.rstd;
        }
      }
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        if (column(j) >= D) continue;
        float t[kVec];
        if (a.grad_residual.data != nullptr) {
          widen(grad_residual[j], a.grad_residual.dtype, t);
#pragma unroll
          for (int k = 0; k < kVec; ++k) dx[j][k] += t[k];
        }
        finish_token<kVec>(a, b, n, column(j), dx[j], t);
        if (a.dgate.reduce != kAbsent) {
#pragma unroll
          for (int k = 0; k < kVec; ++k) total[kDgate][j][k] += t[k];
        }
      }
    }
    const ParamGrad* grads[kGrads] = {&a.dshift, &a.dscale, &a.dgate, &a.dweight, &a.dbias};
#pragma unroll
    for (int g = 0; g < (kAffine ? kGrads : kDgate + 1); ++g) {
      if (!summed(*grads[g])) continue;
      const Row row = row_of(grads[g]->partial, kF32, chunk * D);
#pragma unroll
      for (int j = 0; j < kPer; ++j)
        if (column(j) < D) write(row, column(j), total[g][j]);
    }
  }
}

// Any D: the chunk's sums live in the workspace, where each thread adds only to its own columns.
template <int kVec>
__global__ void __launch_bounds__(512, 1) backward_long(const AdalnBackward a) {
  FD_SHARED(float, buffers, 2 * 2 * 16);
  int turn = 0;
  const bool normed = a.grad_y.data != nullptr;
  const int64_t per_sample = (a.N + kChunk - 1) / kChunk, D = a.D;
  const float inv_d = 1.0f / static_cast<float>(D);
  const int64_t start = static_cast<int64_t>(threadIdx.x) * kVec, step = 512 * kVec;
  for (int64_t chunk = blockIdx.x; chunk < a.B * per_sample; chunk += gridDim.x) {
    int64_t b, c;
    split(chunk, per_sample, &b, &c);
    const int64_t begin = c * kChunk, end = begin + kChunk < a.N ? begin + kChunk : a.N;
    for (int64_t n = begin; n < end; ++n) {
      const auto add = [&](const ParamGrad& g, int64_t i, const float (&v)[kVec]) {
        if (!summed(g)) return;
        const Row row = row_of(g.partial, kF32, chunk * D);
        float t[kVec] = {};
        if (n > begin) read<kVec, false>(row, i, t);
#pragma unroll
        for (int k = 0; k < kVec; ++k) t[k] += v[k];
        write(row, i, t);
      };
      float m1 = 0, m2 = 0, mean = 0, rstd = 0, t[kVec];
      const Row r = row_of(a.r, b, n), grad_y = row_of(a.grad_y, b, n), scale = row_of(a.scale, b, n);
      NormGrad<kVec> g;
      if (normed) {
        mean = a.mean[b * a.N + n], rstd = a.rstd[b * a.N + n];
        float s[2] = {0, 0};
        for (int64_t i = start; i < D; i += step) {
          g.compute(a, load<kVec, false>(r, i), load<kVec, false>(grad_y, i), scale, i, mean, rstd);
          if (a.dshift.reduce == kPerToken) write(token_row(a.dshift, b * a.N + n, D), i, g.shift);
          if (a.dscale.reduce == kPerToken) write(token_row(a.dscale, b * a.N + n, D), i, g.scale);
          add(a.dshift, i, g.shift), add(a.dscale, i, g.scale), add(a.dbias, i, g.d_affine);
#pragma unroll
          for (int k = 0; k < kVec; ++k) {
            t[k] = g.d_affine[k] * g.hat[k];
            s[0] += g.d[k], s[1] += g.d[k] * g.hat[k];
          }
          add(a.dweight, i, t);
        }
        block_sum(s, buffers, 16, &turn);
        m1 = a.rms ? 0.0f : s[0] * inv_d, m2 = s[1] * inv_d;
      }
      for (int64_t i = start; i < D; i += step) {
        float dx[kVec] = {};
        if (normed) {
          g.compute(a, load<kVec, false>(r, i), load<kVec, false>(grad_y, i), scale, i, mean, rstd);
#pragma unroll
          for (int k = 0; k < kVec; ++k) dx[k] = (g.d[k] - m1 - g.hat[k] * m2) * rstd;
        }
        if (a.grad_residual.data != nullptr) {
          read<kVec, false>(row_of(a.grad_residual, b, n), i, t);
#pragma unroll
          for (int k = 0; k < kVec; ++k) dx[k] += t[k];
        }
        finish_token<kVec>(a, b, n, i, dx, t);
        add(a.dgate, i, t);
      }
    }
  }
}

// Second stage: out[o, :] = sum of the workspace rows of o, in an order that depends on their number alone. 32 columns
// per block; kParts groups of threads take every kParts-th row, and their sums are added in order.
struct ChunkSums {
  ParamGrad grad[kGrads];
  int64_t outputs[kGrads], rows[kGrads];  // rows of the workspace per output
  int64_t D;
};
constexpr int kParts = 16;

__global__ void __launch_bounds__(32 * kParts) sum_chunks(const ChunkSums a) {
  FD_SHARED(float, parts, 32 * kParts);
  const ParamGrad& g = a.grad[blockIdx.y];
  const int64_t rows = a.rows[blockIdx.y], tiles = (a.D + 31) / 32;
  const int x = threadIdx.x % 32, part = threadIdx.x / 32;
  for (int64_t task = blockIdx.x; task < a.outputs[blockIdx.y] * tiles; task += gridDim.x) {
    const int64_t output = task / tiles, column = task % tiles * 32 + x;
    float s = 0;
    if (column < a.D) {
      const float* p = g.partial + output * rows * a.D + column;
#pragma unroll 4
      for (int64_t row = part; row < rows; row += kParts) s += p[row * a.D];
    }
    parts[part * 32 + x] = s;
    __syncthreads();
    if (part == 0 && column < a.D) {
      for (int i = 1; i < kParts; ++i) s += parts[i * 32 + x];
      const float v[1] = {s};
      write(row_of(g.data, g.dtype, output * a.D), column, v);
    }
    FD_BARRIER(kPartBarrier);  // `parts` is written again
  }
}

template <int kVec>
void backward_first_stage(const AdalnBackward& a, void* stream) {
  constexpr int kPer = 8 / kVec;
  const unsigned int grid = grid_for(a.B * chunks(a.N));
  if (a.D > 512 * 8) {
    FD_LAUNCH(backward_long<kVec>, grid, 512, 0, stream, a);
    return;
  }
  const int threads = static_cast<int>((a.D + 255) / 256 * 32);  // 8 columns each, whole warps
  if (a.dweight.reduce != kAbsent || a.dbias.reduce != kAbsent)
    FD_LAUNCH((backward_chunks<kVec, kPer, true>), grid, threads, 0, stream, a);
  else
    FD_LAUNCH((backward_chunks<kVec, kPer, false>), grid, threads, 0, stream, a);
}

}  // namespace

void adaln_forward(const AdalnForward& a, int device, void* stream) {
  if (a.B * a.N * a.D == 0) return;
  const DeviceGuard guard(device);
  const int vec = a.x.dtype == kF32 ? 4 : 8;
  bool whole = true;  // every operand can be read `vec` elements at a time
  for (const View* v : {&a.x, &a.branch, &a.gate, &a.shift, &a.scale, &a.weight, &a.bias, &a.residual, &a.y})
    whole = whole && vectorizes(*v, a.D, vec);
  if (!whole || (a.gate.data != nullptr && a.branch.dtype != a.x.dtype)) return forward_elements(a, stream);
  if (a.x.dtype == kF32) return forward_vectors<4, kF32>(a, stream);
  if (a.x.dtype == kF16) return forward_vectors<8, kF16>(a, stream);
  forward_vectors<8, kBF16>(a, stream);
}

void adaln_backward(const AdalnBackward& a, int device, void* stream) {
  if (a.B * a.D == 0) return;
  const DeviceGuard guard(device);
  const ParamGrad* grads[kGrads] = {&a.dshift, &a.dscale, &a.dgate, &a.dweight, &a.dbias};
  if (a.N > 0) {
    const View& main = a.grad_y.data != nullptr ? a.r : a.grad_residual;
    const int vec = main.dtype == kF32 ? 4 : 8;
    bool whole = true;
    for (const View* v :
         {&a.r, &a.branch, &a.gate, &a.scale, &a.weight, &a.bias, &a.grad_y, &a.grad_residual, &a.dx, &a.dbranch})
      whole = whole && vectorizes(*v, a.D, vec);
    for (const ParamGrad* g : grads) {
      const View token{g->data, a.N * a.D, a.D, 1, g->dtype}, part{g->partial, a.N * a.D, a.D, 1, kF32};
      if (g->reduce == kPerToken) whole = whole && vectorizes(token, a.D, vec);
      if (g->reduce == kPerSample || g->reduce == kShared) whole = whole && vectorizes(part, a.D, vec);
    }
    if (!whole)
      backward_first_stage<1>(a, stream);
    else if (vec == 4)
      backward_first_stage<4>(a, stream);
    else
      backward_first_stage<8>(a, stream);
  }
  ChunkSums sums;
  sums.D = a.D;
  int count = 0;
  int64_t most = 0;
  for (const ParamGrad* g : grads) {
    if (g->reduce != kPerSample && g->reduce != kShared) continue;
    const bool shared = g->reduce == kShared;
    sums.grad[count] = *g;
    sums.outputs[count] = shared ? 1 : a.B;
    sums.rows[count] = (shared ? a.B : 1) * chunks(a.N);
    most = sums.outputs[count] > most ? sums.outputs[count] : most;
    ++count;
  }
  if (count > 0) FD_LAUNCH(sum_chunks, dim3(grid_for(most * ((a.D + 31) / 32)), count), 32 * kParts, 0, stream, sums);
}

}  // namespace cuda
}  // namespace fastdiff
