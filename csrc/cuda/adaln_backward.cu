// Adaptive layer norm on CUDA, backward (formulas: AdalnBackward in fastdiff.h; forward: adaln.cu).
//
// Floor, in tensors of B*N*D elements: 2 reads + 1 write (r and grad_y in, dx out), with gate 4 + 2.
//
// Mapping. A block owns a chunk of kChunk tokens of one sample and a thread owns 8 columns for all of them: dx and
// dbranch leave row by row, and the chunk's sums for dshift, dscale, dgate (and dweight, dbias) build up in registers.
// They are stored once per chunk (1/8 of a 16-bit tensor each, L2-sized) and added in order by a second kernel: no
// atomics, the same bits on every run and for every batch. Next rows are requested while the current one is being
// reduced. Above D = 4096 the sums live in the workspace itself instead of in registers.
//
// What bounds it, counted for one H200 (132 SMs, 4.3 TB/s of copy: 33 B/ns an SM, two thirds of them reads, so 15 KB of
// reads in flight at 700 ns of latency; 7 warp instructions/ns an SM) at D = 1152, where a block has five warps:
//   backward_plain  registers  blocks an SM  requested ahead  in flight  instructions a token  at the copy's rate
//   bf16                73          5         2 x 4.6 KB        46 KB       5 x 245         5.8 /ns, 82 %
//   f32                 79          5         1 x 9.2 KB        46 KB       5 x 260         3.1 /ns, 44 %
//   bf16, gated        128          3         1 x 9.2 KB        28 KB       5 x 340         4.0 /ns, 57 %
//   f32, gated         128          3         1 x 18 KB         55 KB       5 x 350         2.1 /ns, 30 %
// (backward_chunks, which serves mixed types, tables over tokens, weight and bias, held 14 KB in flight in bf16 and has
// about twice the instructions.) The workspace at [64, 256, 1152] is 9.4 MB, written and read again in L2: 8 % of the
// bytes of a bf16 call that must move, 4 % in f32; the second kernel's 4608 blocks take some 3 us beside 26 us.
// Predicted: 70-75 % of the copy in bf16, which instructions bound, 80 % in f32 and with gate.
//
// Performance: not measured.
#include "reduce.cuh"
#include "vec.cuh"

namespace fastdiff {
namespace cuda {
namespace {

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

// block_sum of two values with half its instructions: the halves of a warp take a value each after the first exchange,
// and warps' sums are read back two at a time. `sums`: 2 * kPairs float4, made ready by `prepare_pairs`; they take
// turns as in block_sum.
constexpr int kPairs = 8;  // of 16 warps
FD_D void prepare_pairs(float4* sums, int warps) {
  float* flat = reinterpret_cast<float*>(sums);
  const int i = threadIdx.x;  // the pair of a warp that there is not
  if (i < 4 * kPairs && i >= 2 * warps) flat[i] = flat[4 * kPairs + i] = 0.0f;
}
FD_D void pair_sum(float (&v)[2], float4* sums, int warps, int* turn) {
  const bool upper = threadIdx.x % 32 >= 16;
  float mine = (upper ? v[1] : v[0]) + __shfl_xor_sync(kFullWarp, upper ? v[0] : v[1], 16);
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) mine += __shfl_xor_sync(kFullWarp, mine, offset);
  float4* const buffer = sums + (FD_MUTATED(kPairTurn) ? 0 : *turn) * kPairs;
  *turn ^= 1;
  if (threadIdx.x % 16 == 0) reinterpret_cast<float*>(buffer)[threadIdx.x / 16] = mine;
  FD_BARRIER(kPairBarrier);
  v[0] = v[1] = 0.0f;
#pragma unroll 1
  for (int w = 0; w < warps; w += 2) {
    const float4 s = buffer[w / 2];
    v[0] += s.x, v[1] += s.y, v[0] += s.z, v[1] += s.w;
  }
}

// The backward pass of a transformer's norm site: tensors of one type, known here, modulation per sample or shared, and
// no weight or bias. 1 + scale and gate stay in registers for the whole chunk. kGated: with gate * branch.
template <int kVec, int kPer, int kType, bool kGated>
__global__ void __launch_bounds__(kGated ? 512 : 640) backward_plain(const AdalnBackward a) {  // at most 512 threads
  constexpr int kAhead = kType == kF32 || kGated ? 1 : 2;  // tokens requested before they are needed
  FD_SHARED(float4, sums, 2 * kPairs);
  int turn = 0;
  const int threads = blockDim.x, warps = threads / 32, D = static_cast<int>(a.D);
  const auto column = [&](int j) { return (j * threads + static_cast<int>(threadIdx.x)) * kVec; };
  prepare_pairs(sums, warps);
  const float inv_d = 1.0f / static_cast<float>(D);
  const int64_t per_sample = (a.N + kChunk - 1) / kChunk;
  const bool has_residual = a.grad_residual.data != nullptr, has_branch = kGated && a.dgate.reduce != kAbsent;

  // Where this thread's first vector of a row is; the next row is a stride away.
  struct Cursor {
    Row at;
    int64_t step;

    FD_D Cursor(const View& v, int64_t b, int64_t n, int64_t column)
        : at(with_type(row_of(v, b, n), kType)), step(v.sn * dtype_size(kType)) {
      if (v.data != nullptr) at.p += column * dtype_size(kType);
    }
    FD_D void advance() { at.p += step; }
  };
  struct Token {
    Raw<kVec> r[kPer], grad_y[kPer], grad_residual[kPer], branch[kPer];
    float mean, rstd;
  };
  for (int64_t chunk = blockIdx.x; chunk < a.B * per_sample; chunk += gridDim.x) {
    int64_t b, c;
    split(chunk, per_sample, &b, &c);
    const int64_t begin = c * kChunk;
    const int64_t end = begin + kChunk < a.N ? begin + kChunk + (FD_MUTATED(kChunkEnd) ? 1 : 0) : a.N;
    Cursor r(a.r, b, begin, column(0)), grad_y(a.grad_y, b, begin, column(0)), dx_out(a.dx, b, begin, column(0));
    Cursor residual(a.grad_residual, b, begin, column(0)), branch(a.branch, b, begin, column(0));
    Cursor dbranch(a.dbranch, b, begin, column(0));
    const float *mean = a.mean + b * a.N + begin, *rstd = a.rstd + b * a.N + begin;
    const auto fetch_token = [&] {  // the next one
      Token t;
      t.mean = *mean++, t.rstd = *rstd++;
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const int i = j * threads * kVec;
        t.r[j] = t.grad_y[j] = t.grad_residual[j] = t.branch[j] = {};
        if (column(j) >= D) continue;
        t.r[j] = load<kVec, false>(r.at, i), t.grad_y[j] = load<kVec, false>(grad_y.at, i);
        if (kGated && has_residual) t.grad_residual[j] = load<kVec, false>(residual.at, i);
        if (has_branch) t.branch[j] = load<kVec, false>(branch.at, i);
      }
      r.advance(), grad_y.advance();
      if (kGated) residual.advance(), branch.advance();
      return t;
    };
    Token ahead[kAhead] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (begin + i < end) ahead[i] = fetch_token();
    float up[kPer][kVec] = {}, gate[kPer][kVec] = {}, total[kDgate + 1][kPer][kVec] = {};
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      if (column(j) >= D) continue;
      read<kVec, true>(row_of(a.scale, b, 0), column(j), up[j]);
#pragma unroll
      for (int k = 0; k < kVec; ++k) up[j][k] += 1.0f;
      if (kGated) read<kVec, true>(row_of(a.gate, b, 0), column(j), gate[j]);
    }
    for (int64_t n = begin; n < end; ++n) {
      const Token t = ahead[FD_MUTATED(kAheadTurn) ? kAhead - 1 : 0];
#pragma unroll
      for (int i = 1; i < kAhead; ++i) ahead[i - 1] = ahead[i];
      if (n + kAhead < end) ahead[kAhead - 1] = fetch_token();
      float hat[kPer][kVec], dx[kPer][kVec], s[2] = {0, 0};
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        float g[kVec];  // zeros beyond D
        widen(t.r[j], kType, hat[j]);
        widen(t.grad_y[j], kType, g);
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
          hat[j][k] = (hat[j][k] - t.mean) * t.rstd, dx[j][k] = g[k] * up[j][k];
          total[kDshift][j][k] += g[k], total[kDscale][j][k] += g[k] * hat[j][k];
          s[0] += dx[j][k], s[1] += dx[j][k] * hat[j][k];
        }
      }
      pair_sum(s, sums, warps, &turn);
      const float m1 = a.rms ? 0.0f : s[0] * inv_d, m2 = s[1] * inv_d;
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const int i = j * threads * kVec;
        if (column(j) >= D) continue;
        float v[kVec];
        widen(t.grad_residual[j], kType, v);
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
          const float d = (dx[j][k] - m1 - hat[j][k] * m2) * t.rstd;
          dx[j][k] = kGated ? d + v[k] : d;
        }
        write(dx_out.at, i, dx[j]);
        if constexpr (kGated) {
          widen(t.branch[j], kType, v);
#pragma unroll
          for (int k = 0; k < kVec; ++k) total[kDgate][j][k] += v[k] * dx[j][k], v[k] = gate[j][k] * dx[j][k];
          if (a.dbranch.data != nullptr) write(dbranch.at, i, v);
        }
      }
      dx_out.advance();
      if (kGated) dbranch.advance();
    }
    const ParamGrad* grads[] = {&a.dshift, &a.dscale, &a.dgate};
#pragma unroll
    for (int g = 0; g < (kGated ? kDgate : kDscale) + 1; ++g) {
      if (!summed(*grads[g])) continue;
      const Row part = row_of(grads[g]->partial, kF32, chunk * D);
#pragma unroll
      for (int j = 0; j < kPer; ++j)
        if (column(j) < D) write(part, column(j), total[g][j]);
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

// What backward_plain takes, its tensors being of this type. One row of a table stands for all tokens where its stride
// says so, whatever N is: the choice must not depend on the batch.
bool is_plain(const AdalnBackward& a, int32_t type) {
  for (const View* v : {&a.r, &a.grad_y, &a.dx})
    if (v->data == nullptr || v->dtype != type) return false;
  for (const View* v : {&a.grad_residual, &a.branch, &a.dbranch})
    if (v->data != nullptr && v->dtype != type) return false;
  for (const ParamGrad* g : {&a.dshift, &a.dscale, &a.dgate})
    if (g->reduce == kPerToken) return false;
  const bool gated = a.gate.data != nullptr;
  if (!gated && (a.grad_residual.data != nullptr || a.dbranch.data != nullptr || a.dgate.reduce != kAbsent))
    return false;
  return a.scale.sn == 0 && (!gated || a.gate.sn == 0) && a.weight.data == nullptr && a.bias.data == nullptr;
}

template <int kVec, int kPer, int kType>
void launch_plain(const AdalnBackward& a, unsigned int grid, int threads, void* stream) {
  if (a.gate.data != nullptr)
    FD_LAUNCH((backward_plain<kVec, kPer, kType, true>), grid, threads, 0, stream, a);
  else
    FD_LAUNCH((backward_plain<kVec, kPer, kType, false>), grid, threads, 0, stream, a);
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
  if constexpr (kVec == 4) {
    if (is_plain(a, kF32)) return launch_plain<kVec, kPer, kF32>(a, grid, threads, stream);
  } else if constexpr (kVec == 8) {
    if (is_plain(a, kF16)) return launch_plain<kVec, kPer, kF16>(a, grid, threads, stream);
    if (is_plain(a, kBF16)) return launch_plain<kVec, kPer, kBF16>(a, grid, threads, stream);
  }
  if (a.dweight.reduce != kAbsent || a.dbias.reduce != kAbsent)
    FD_LAUNCH((backward_chunks<kVec, kPer, true>), grid, threads, 0, stream, a);
  else
    FD_LAUNCH((backward_chunks<kVec, kPer, false>), grid, threads, 0, stream, a);
}

}  // namespace

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
