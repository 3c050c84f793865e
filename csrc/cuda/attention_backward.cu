// Gradients of softmax(scale q k^T) v on CUDA, and of the normalisation and rotation in front of it (AttentionBackward
// in fastdiff.h).
//
// With P recomputed from the saved maxima and sums and delta = sum(grad out) per query (a kernel of its own):
//   dV = P^T grad,   dS = P (grad v^T - delta),   dQ = scale dS k,   dK = scale dS^T q
// Floor: 10 B H N M d flops (790 TFLOP/s of bf16 mma); at B = 64, H = 16, d = 72: N = 256 61 us, N = 1024 978 us.
//
// Mapping. No atomics: one launch over blocks of queries for dQ and one over blocks of keys for dK and dV, so that
// scores and dP are computed twice, 14 flops for every 10. Both are one kernel: a block owns 64 rows x (q and grad, or
// k and v) and goes through tiles of the other two, double-buffered; in the launch over keys the scores come
// transposed, so that P^T and dS^T are left operands as they are in registers. A score is the same sum in the same
// order in all launches and in the forward pass (on tensor cores as far as a product does not depend on which operand
// is left), rounded before the maximum is subtracted: P is the forward's weight however large the scores are. Above d =
// 80 dK and dV take a launch each, for their registers. -delta is where the sums of dP start. Norm and
// rotation are undone in float32 on the way out; what 16 rows add to the weights' gradients is stored and added in
// order by two more launches.
//
// float16: dS is rounded to float16 as it is, so that it is subnormal below 6e-5 and overflows above 65504.
//
// At d = 72: 55 KB and up to 244 registers, two blocks of 128 threads per SM; a fragment serves one product, so shared
// memory is as busy as the tensor core can be (sm_90). Predicted from that: 200 TFLOP/s of the 14, hence 0.34 ms at N =
// 256 and 5.4 ms at N = 1024 (B = 64, H = 16), 18 % of the floor.
//
// Performance: not measured.
#include "attention.cuh"

namespace fastdiff {
namespace cuda {
namespace {

template <int kType, int kD>
struct BackwardShape {
  static constexpr bool kTensor = kType != kF32;  // on tensor cores
  static constexpr int kWarps = kTensor || kD <= 80 ? 4 : kD <= 128 ? 2 : 1;
  static constexpr int kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kColumns = kTensor ? (kD <= 80 ? 8 : kD <= 128 ? 4 : 2) : kD <= 128 ? 4 : 2;
  static constexpr int kOthers = 8 * kColumns;  // rows of a tile that passes by
  static constexpr int kStages = kTensor && kD <= 128 ? 2 : 1;
  static constexpr bool kHold = kTensor && kD <= 128;
  static constexpr bool kTogether = kD <= 80;                        // dk and dv at once, else one after the other
  static constexpr int kScratch = kTensor ? 0 : 16 * (kOthers + 4);  // floats of a warp
  static constexpr int kTile = kOthers * kStride<kD>;                // elements
  static constexpr size_t kBytes = sizeof(Element<kType>) * (2 * kRows * kStride<kD> + 2 * kStages * kTile) +
                                   sizeof(float) * (3 * kStages * kOthers + kScratch * kWarps);
  static constexpr int kMinBlocks = kTensor && kD <= 128 ? 2 : 1;
  static_assert(kBytes <= 99 << 10, "what sm_86 and sm_89 give a block");
};

// One bit per operand whose rows are read or written in 16-byte vectors.
constexpr uint32_t kQ = 1, kK = 2, kV = 4, kOut = 8, kGrad = 16, kDq = 32, kDk = 64, kDv = 128;

// delta[row] = sum(grad * out), row = (b, h, n). Eight lanes take a row, eight neighbouring elements each at a time, in
// the same order whether they are read at once or not.
template <int kType>
__global__ void __launch_bounds__(256) row_products(const AttentionBackward a, const uint32_t aligned, float* delta) {
  const int64_t rows = a.B * a.H * a.N, step = static_cast<int64_t>(gridDim.x) * 32;
  const int lane = threadIdx.x % 8, d = static_cast<int>(a.d);
  const bool vectors = (aligned & kOut) && (aligned & kGrad) && d % 8 == 0;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * 32; base < rows; base += step) {
    const int64_t row = base + threadIdx.x / 8;
    float total = 0;
    if (row < rows) {
      int64_t head, n, b, h;
      split(row, a.N, &head, &n);
      split(head, a.H, &b, &h);
      const Row out{static_cast<char*>(a.out.data) + offset(a.out, b, h, n) * dtype_size(kType), a.out.s[3], kType};
      const Row grad{static_cast<char*>(a.grad.data) + offset(a.grad, b, h, n) * dtype_size(kType), a.grad.s[3], kType};
      for (int c = 8 * lane; c < d; c += 64) {
        float u[8] = {}, v[8] = {};
        if (vectors) {
          const Raw<8> x = load<8, true>(out, c), y = load<8, true>(grad, c);
          widen(x, kType, u), widen(y, kType, v);
        } else {
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            if (c + k >= d) break;
            float one[1];
            read<1, true>(out, c + k, one), u[k] = one[0];
            read<1, true>(grad, c + k, one), v[k] = one[0];
          }
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) total = fmaf(u[k], v[k], total);
      }
    }
    total = sum_of_8(total);
    if (lane == 0 && row < rows) delta[row] = total;
  }
}

// g (16 rows of a warp in shared memory), the gradient of prepared rows, becomes that of the rows x themselves; what
// the rows add to the weight's gradient goes to part [d].
template <int kType, int kD>
FD_D void prepare_backward(float* rows, const Strided& from, int64_t b, int64_t h, int64_t first, int64_t N, int d,
                           const Prologue& p, float* part) {
  using E = Element<kType>;
  constexpr int kPairs = (kD / 2 + 7) / 8;  // of a lane
  const Pairs pairs(p, d);
  const int lane = threadIdx.x % 8;
  float dw[kPairs][2] = {};
  for (int row = threadIdx.x % 32 / 8; row < 16; row += 4) {
    const int64_t n = first + row;
    const bool real = n < N || FD_MUTATED(kAttentionPartTail);
    float* const g = rows + row * kStride<kD>;
    const E* const x = static_cast<const E*>(from.data) + offset(from, b, h, n < N ? n : N - 1);
    const auto raw = [&](int c) { return c < d ? widened<kType>(x[c * from.s[3]]) : 0.0f; };
    float square = 0, product = 0, rstd = 1.0f;
    if (p.weight != nullptr) {
      for (int i = lane; i < pairs.half; i += 8) {
        const float u = raw(pairs.first(i)), v = raw(pairs.second(i));
        square = fmaf(u, u, fmaf(v, v, square));
      }
      rstd = 1.0f / sqrtf(sum_of_8(square) / static_cast<float>(d) + p.eps);
    }
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      const int i = lane + 8 * k;
      if (i >= pairs.half || !real) continue;
      const int m = pairs.first(i), o = pairs.second(i);
      float u = g[m], v = o < d ? g[o] : 0.0f;
      if (p.cos != nullptr) {
        const float *const cosine = p.cos + (n < N ? n : N - 1) * d, *const sine = p.sin + (n < N ? n : N - 1) * d;
        const float turned = fmaf(u, cosine[m], v * sine[o]);
        v = fmaf(v, cosine[o], -u * sine[m]), u = turned;
      }
      if (p.weight != nullptr) {
        const float hat_u = raw(m) * rstd, hat_v = raw(o) * rstd;
        dw[k][0] = fmaf(u, hat_u, dw[k][0]), dw[k][1] = fmaf(v, hat_v, dw[k][1]);
        u *= p.weight[m], v = o < d ? v * p.weight[o] : 0.0f;
        product = fmaf(u, hat_u, fmaf(v, hat_v, product));
      }
      g[m] = u;
      if (o < d) g[o] = v;
    }
    if (p.weight != nullptr) {
      const float mean = sum_of_8(product) / static_cast<float>(d);
      for (int i = lane; i < pairs.half; i += 8) {
        const int m = pairs.first(i), o = pairs.second(i);
        g[m] = rstd * (g[m] - raw(m) * rstd * mean);
        if (o < d) g[o] = rstd * (g[o] - raw(o) * rstd * mean);
      }
    }
  }
  if (p.weight == nullptr) return;
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      dw[k][e] += __shfl_xor_sync(kFullWarp, dw[k][e], 8);
      dw[k][e] += __shfl_xor_sync(kFullWarp, dw[k][e], 16);
    }
    const int i = lane + 8 * k;
    if (threadIdx.x % 32 < 8 && i < pairs.half) {
      part[pairs.first(i)] = dw[k][0];
      if (pairs.second(i) < d) part[pairs.second(i)] = dw[k][1];
    }
  }
}

// Rows that a block owns (x) and rows that pass by (y). For dq: x are q and grad, y are k and v; for dk and dv: x are k
// and v, y are q and grad. kParts: 1 the gradient of the first x, 2 of the second, 3 both.
template <int kType, int kD, bool kOfKeys, int kParts>
__global__ void __launch_bounds__(BackwardShape<kType, kD>::kThreads, BackwardShape<kType, kD>::kMinBlocks)
    backward(const AttentionBackward a, const uint32_t aligned, const float* delta) {
  using S = BackwardShape<kType, kD>;
  using E = Element<kType>;
  constexpr int kColumns = S::kColumns;
  FD_SHARED_DYNAMIC(char, memory);
  E* const x_tile = reinterpret_cast<E*>(memory);
  E* const stages = x_tile + 2 * S::kRows * kStride<kD>;
  float* const columns = reinterpret_cast<float*>(stages + 2 * S::kStages * S::kTile);  // [stages, 3, kOthers]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, d = static_cast<int>(a.d);
  float* const scratch = columns + 3 * S::kStages * S::kOthers + warp * S::kScratch;
  const Prologue of_q{a.q_weight, a.cos, a.sin, a.interleaved != 0, a.eps};
  const Prologue of_k{a.k_weight, a.cos, a.sin, a.interleaved != 0, a.eps};
  const Prologue &of_x = kOfKeys ? of_k : of_q, &of_y = kOfKeys ? of_q : of_k;
  const Strided &x1 = kOfKeys ? a.k : a.q, &x2 = kOfKeys ? a.v : a.grad;
  const Strided &y1 = kOfKeys ? a.q : a.k, &y2 = kOfKeys ? a.grad : a.v;
  const uint32_t x1_in = kOfKeys ? kK : kQ, x2_in = kOfKeys ? kV : kGrad;
  const uint32_t y1_in = kOfKeys ? kQ : kK, y2_in = kOfKeys ? kGrad : kV;
  const int64_t owned = kOfKeys ? a.M : a.N, others = kOfKeys ? a.N : a.M;
  const float c = a.scale * kLog2e;

  const int64_t per_head = (owned + S::kRows - 1) / S::kRows, tasks = a.B * a.H * per_head;
  const int tiles = static_cast<int>((others + S::kOthers - 1) / S::kOthers);
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    int64_t head, block, b, h;
    split(task, per_head, &head, &block);
    split(head, a.H, &b, &h);
    const int64_t first = block * S::kRows;
    const float* const stats = a.stats + 2 * head * a.N;
    const float* const deltas = delta + head * a.N;
    const auto ask = [&](int tile) {
      const int stage = S::kStages == 2 ? tile % 2 : 0;
      E* const to = stages + stage * 2 * S::kTile;
      const int64_t from = static_cast<int64_t>(tile) * S::kOthers;
      load_tile<kType, kD, S::kOthers, S::kThreads>(to, y1, aligned & y1_in, b, h, from, others - from, d);
      load_tile<kType, kD, S::kOthers, S::kThreads>(to + S::kTile, y2, aligned & y2_in, b, h, from, others - from, d);
      commit_copies();
      if constexpr (kOfKeys) {
        float* const column = columns + stage * 3 * S::kOthers;
        for (int i = threadIdx.x; i < S::kOthers; i += S::kThreads) {
          const bool real = from + i < others;
          column[i] = real ? stats[2 * (from + i)] : 0.0f;
          column[S::kOthers + i] = real ? 1.0f / stats[2 * (from + i) + 1] : 0.0f;
          column[2 * S::kOthers + i] = real ? deltas[from + i] : 0.0f;
        }
      }
    };
    load_tile<kType, kD, S::kRows, S::kThreads>(x_tile, x1, aligned & x1_in, b, h, first, owned - first, d);
    load_tile<kType, kD, S::kRows, S::kThreads>(x_tile + S::kRows * kStride<kD>, x2, aligned & x2_in, b, h, first,
                                                owned - first, d);
    ask(0);
    wait_copies<0>();
    __syncthreads();
    if (of_x.any()) {
      prepare_tile<kType, kD, S::kRows, S::kThreads>(x_tile, of_x, first, owned - first, d);
      __syncthreads();
    }
    const int own = warp * 16;  // the warp's first row
    const bool active = first + own < owned;
    Left<kType, kD, 1, S::kHold> left1, left2;
    left1.load(x_tile + own * kStride<kD>), left2.load(x_tile + (S::kRows + own) * kStride<kD>);
    float top[2] = {}, inverse[2] = {}, minus_delta[2] = {};  // of the rows g and g + 8, where these are queries
    if constexpr (!kOfKeys) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t row = first + own + g + 8 * r;
        if (row < owned) top[r] = stats[2 * row], inverse[r] = 1.0f / stats[2 * row + 1], minus_delta[r] = -deltas[row];
      }
    }
    float sum1[1][kParts & 1 ? kD / 8 : 1][4] = {}, sum2[1][kParts & 2 ? kD / 8 : 1][4] = {};

    for (int tile = 0; tile < tiles; ++tile) {
      wait_copies<0>();
      FD_BARRIER(kAttentionBackTile);  // the tile is there, and everybody is through with the one before
      if (S::kStages == 2 && tile + 1 < tiles) ask(tile + 1);
      const int stage = S::kStages == 2 ? tile % 2 : 0;
      E* const y = stages + stage * 2 * S::kTile;
      const float* const column = columns + stage * 3 * S::kOthers;
      const int64_t from = static_cast<int64_t>(tile) * S::kOthers;
      if (of_y.any()) {
        prepare_tile<kType, kD, S::kOthers, S::kThreads>(y, of_y, from, others - from, d);
        __syncthreads();
      }
      if (active) {
        float p[1][kColumns][4] = {}, ds[1][kColumns][4];
        multiply<kType, kD, 1, kColumns, S::kHold>(p, left1, y, d);
        const int count = others - from < S::kOthers ? static_cast<int>(others - from) : S::kOthers;
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int i = 8 * j + 2 * t + e % 2;
            const float base = kOfKeys ? column[i] : top[e / 2];
            const float factor = kOfKeys ? column[S::kOthers + i] : inverse[e / 2];
            const float weight = weight_of<kType>(scaled(p[0][j][e], c) - base) * factor;
            p[0][j][e] = i < count || FD_MUTATED(kAttentionRagged) ? weight : 0.0f;
            ds[0][j][e] = kOfKeys ? -column[2 * S::kOthers + i] : minus_delta[e / 2];
            if (FD_MUTATED(kAttentionDelta)) ds[0][j][e] = 0;
          }
        if constexpr ((kParts & 1) != 0) {
          multiply<kType, kD, 1, kColumns, S::kHold>(ds, left2, y + S::kTile, d);
#pragma unroll
          for (int j = 0; j < kColumns; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)  // beyond the last row p is 0, ds need not be finite
              ds[0][j][e] = 8 * j + 2 * t + e % 2 < count ? p[0][j][e] * kUnshift<kType> * ds[0][j][e] : 0.0f;
        }
        float unused[4];
        if constexpr ((kParts & 2) != 0) {
#pragma unroll
          for (int j = 0; j < kColumns; ++j) pack<kType>(p[0][j], unused);
          accumulate<kType, kD, 1, kColumns>(sum2, p, y + S::kTile, scratch);
        }
        if constexpr ((kParts & 1) != 0) {
#pragma unroll
          for (int j = 0; j < kColumns; ++j) pack<kType>(ds[0][j], unused);
          accumulate<kType, kD, 1, kColumns>(sum1, ds, y, scratch);
        }
      }
      if (S::kStages == 1 && tile + 1 < tiles) {
        FD_BARRIER(kAttentionSingleStage);
        ask(tile + 1);
      }
    }

    FD_BARRIER(kAttentionBackResult);  // the results take the place of the operands
    float* const rows = reinterpret_cast<float*>(memory) + own * kStride<kD>;
    if constexpr ((kParts & 2) != 0) {
      const float factor[1][2] = {{kUnshift<kType>, kUnshift<kType>}};
      put_rows<kD, 1>(rows, sum2, factor);
      __syncwarp();
      if (a.dv.data != nullptr) store_rows<kType, kD, 16>(a.dv, aligned & kDv, b, h, first + own, owned, rows, d);
      __syncwarp();
    }
    if constexpr ((kParts & 1) != 0) {
      const float factor[1][2] = {{a.scale, a.scale}};
      put_rows<kD, 1>(rows, sum1, factor);
      __syncwarp();
      if (of_x.any() && active) {
        const int64_t parts = (owned + 15) / 16;  // attention_parts
        float* const part = a.partial == nullptr
                                ? nullptr
                                : a.partial + (((kOfKeys ? a.B * a.H : 0) + head) * parts + (first + own) / 16) * d;
        prepare_backward<kType, kD>(rows, x1, b, h, first + own, owned, d, of_x, part);
        __syncwarp();
      }
      const Strided& to = kOfKeys ? a.dk : a.dq;
      if (to.data != nullptr)
        store_rows<kType, kD, 16>(to, aligned & (kOfKeys ? kDk : kDq), b, h, first + own, owned, rows, d);
    }
    __syncthreads();
  }
}

// out[group, c] = sum over r of in[group, r, c], c < d, in one order for all groups: 32 threads per column.
__global__ void __launch_bounds__(1024) sum_rows(const float* in, float* out, int64_t groups, int64_t rows, int d) {
  FD_SHARED(float, part, 32 * 32);
  const int column = threadIdx.x % 32, way = threadIdx.x / 32, blocks = (d + 31) / 32;
  for (int64_t task = blockIdx.x; task < groups * blocks; task += gridDim.x) {
    const int64_t group = task / blocks;
    const int c = static_cast<int>(task % blocks) * 32 + column;
    float total = 0;
    if (c < d) {
#pragma unroll 4
      for (int64_t r = way; r < rows; r += 32) total += in[(group * rows + r) * d + c];
    }
    part[way * 32 + column] = total;
    __syncthreads();
    if (way == 0 && c < d) {
      for (int w = 1; w < 32; ++w) total += part[w * 32 + column];
      out[group * d + c] = total;
    }
    __syncthreads();
  }
}

}  // namespace

void attention_backward(const AttentionBackward& a, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto bit = [&](const Strided& t, uint32_t which) { return in_vectors(t, a.d) ? which : 0u; };
  const uint32_t aligned = bit(a.q, kQ) | bit(a.k, kK) | bit(a.v, kV) | bit(a.out, kOut) | bit(a.grad, kGrad) |
                           bit(a.dq, kDq) | bit(a.dk, kDk) | bit(a.dv, kDv);
  const int64_t heads = a.B * a.H;
  const int d = static_cast<int>(a.d);
  float* const delta = a.workspace;
  with_type(a.q.dtype, [&](auto type) {
    constexpr int kType = decltype(type)::value;
    FD_LAUNCH((row_products<kType>), grid_for((heads * a.N + 31) / 32), 256, 0, stream, a, aligned, delta);
    with_dim(a.d, [&](auto dim) {
      constexpr int kD = decltype(dim)::value;
      using S = BackwardShape<kType, kD>;
      const unsigned int of_queries = grid_for(heads * ((a.N + S::kRows - 1) / S::kRows));
      const unsigned int of_keys = grid_for(heads * ((a.M + S::kRows - 1) / S::kRows));
      FD_LAUNCH((backward<kType, kD, false, 1>), of_queries, S::kThreads, S::kBytes, stream, a, aligned, delta);
      if constexpr (S::kTogether) {
        FD_LAUNCH((backward<kType, kD, true, 3>), of_keys, S::kThreads, S::kBytes, stream, a, aligned, delta);
      } else {
        FD_LAUNCH((backward<kType, kD, true, 1>), of_keys, S::kThreads, S::kBytes, stream, a, aligned, delta);
        FD_LAUNCH((backward<kType, kD, true, 2>), of_keys, S::kThreads, S::kBytes, stream, a, aligned, delta);
      }
    });
  });
  // The weights' gradients: the parts of a head in order, then the heads in order.
  float* const results[2] = {a.dq_weight, a.dk_weight};
  const int64_t parts = attention_parts(a.N), blocks = (a.d + 31) / 32;
  for (int i = 0; a.partial != nullptr && i < 2; ++i) {
    if (results[i] == nullptr) continue;
    float* const per_head = a.partial + 2 * heads * parts * d + i * heads * d;
    FD_LAUNCH(sum_rows, grid_for(heads * blocks), 1024, 0, stream, a.partial + i * heads * parts * d, per_head, heads,
              parts, d);
    FD_LAUNCH(sum_rows, grid_for(blocks), 1024, 0, stream, per_head, results[i], int64_t{1}, heads, d);
  }
}

}  // namespace cuda
}  // namespace fastdiff
