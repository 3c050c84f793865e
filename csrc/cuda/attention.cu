// out = softmax(scale q k^T) v per head on CUDA (AttentionForward in fastdiff.h).
//
// Floor: 4 B H N M d flops (790 TFLOP/s of bf16 mma) and B H N M exponentials (3.6 T/s); in 16 bits 2 (2 N + 2 M) d B H
// bytes (4.3 TB/s). At B = 64, H = 16, d = 72, bf16: N = 256 19.3 GFLOP, 24 us; 151 MB, 35 us; exponentials 19 us.
// N = 1024 309 GFLOP, 391 us; 604 MB, 140 us; exponentials 298 us.
//
// Mapping. A block owns 128 queries of a head (64 above d = 80 and in float32) and its four warps go through the keys
// together, 64 at a time, double-buffered by cp.async: one barrier per tile, behind which the next tile is asked for.
// Scores, weights and result stay in registers; the weights of one product are the left operand of the next as they
// are. A row's maximum is shared by its quad at every tile, its sum only at the end. d = 72 costs 72: four steps of 16
// and one of 8 for the scores, nine columns of 8 for the result. A warp owns 32 queries up to d = 80, so that a
// fragment of k or v serves two products. Norm and rotation happen to tiles in shared memory, once per tile and block,
// in float32. No split over keys: a query's bits depend on M and d.
//
// Whole rows of scores (M <= 256, keys and values of a head staged once) were tried at d = 72 in bfloat16, a warp with
// 16 queries and their 128 registers of scores: 212 registers (sm_90a; 222 on sm_80), no spills. For 16 queries and 256
// keys, counted in the machine code (sm_90a) from the first operand read to the last product, here (twice a tile), so:
//   instructions 1628, 1612    mma.sync 304, 304    ldmatrix 100, 165    FMUL 272, 130    MUFU 136, 128    SHFL 16, 8
// One percent fewer instructions (10 on sm_80), but a fragment of k or v serves one product, not two: of the 2300
// cycles that the tensor cores take for four warps, shared memory is busy for 2380 instead of 1440. So not done; with
// wgmma, which reads its operands from shared memory, it is (attention_short_sm90.cu).
//
// At d = 72 a warp's tile takes the time of 144 products m16n8k16, 1152 cycles of a quadrant's tensor core (sm_90), and
// 180 cycles of shared memory (queries are read again for every tile: no register is left to hold them), 720 for the
// four warps. Up to 255 registers, of the 256 that two blocks of 128 threads per SM have, and 55 KB a block. The
// softmax takes some 7 instructions per score, 450 of the 1152 cycles, beside the products of the other block.
// Predicted from mma.sync at about 62 % of 790 TFLOP/s and two blocks that overlap imperfectly: 300 TFLOP/s at N = 1024
// (1.0 ms, 38 % of the floor), 230 at N = 256 (84 us, 42 %). wgmma would be needed for more. float32: 60 TFLOP/s of
// multiplications, shared memory 90 % busy; predicted half of that.
//
// Performance: not measured.
#include "attention.cuh"
#include "attention_sm90.cuh"

namespace fastdiff {
namespace cuda {
namespace {

template <int kType, int kD>
struct ForwardShape {
  static constexpr bool kTensor = kType != kF32;  // on tensor cores
  static constexpr int kWarps = kTensor || kD <= 128 ? 4 : 2;
  static constexpr int kTiles = kTensor && kD <= 80 ? 2 : 1;  // of 16 queries that a warp owns
  static constexpr int kThreads = 32 * kWarps, kRows = 16 * kTiles * kWarps;
  static constexpr int kColumns = (kTensor ? 8 : 4) / (kD <= 128 ? 1 : 2);  // times 8 keys
  static constexpr int kKeys = 8 * kColumns;
  static constexpr int kStages = kTensor || kD <= 80 ? 2 : 1;
  static constexpr bool kHold = kTensor && kTiles == 1 && kD <= 128;  // registers for the queries
  static constexpr int kScratch = kTensor ? 0 : 16 * (kKeys + 4);     // floats of a warp
  static constexpr int kTile = kKeys * kStride<kD>;                   // elements
  static constexpr size_t kBytes =
      sizeof(Element<kType>) * (kRows * kStride<kD> + 2 * kStages * kTile) + sizeof(float) * kScratch * kWarps;
  static constexpr int kMinBlocks = kTensor && kD <= 128 ? 2 : 1;
  static_assert(kBytes <= 99 << 10, "what sm_86 and sm_89 give a block");
  static_assert(kBytes >= sizeof(float) * kRows * kStride<kD>, "the result leaves through the same memory");
};

// One bit per operand whose rows are read or written in 16-byte vectors.
constexpr uint32_t kQ = 1, kK = 2, kV = 4, kOut = 8;

template <int kType, int kD>
__global__ void __launch_bounds__(ForwardShape<kType, kD>::kThreads, ForwardShape<kType, kD>::kMinBlocks)
    forward(const AttentionForward a, const uint32_t aligned) {
  using S = ForwardShape<kType, kD>;
  using E = Element<kType>;
  constexpr int kTiles = S::kTiles, kColumns = S::kColumns;
  FD_SHARED_DYNAMIC(char, memory);
  E* const queries = reinterpret_cast<E*>(memory);
  E* const stages = queries + S::kRows * kStride<kD>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % 4, d = static_cast<int>(a.d);
  float* const scratch = reinterpret_cast<float*>(stages + 2 * S::kStages * S::kTile) + warp * S::kScratch;
  const Prologue of_q{a.q_weight, a.cos, a.sin, a.interleaved != 0, a.eps};
  const Prologue of_k{a.k_weight, a.cos, a.sin, a.interleaved != 0, a.eps};
  const float c = a.scale * kLog2e, infinity = bits_float(0x7f800000u);

  const int64_t per_head = (a.N + S::kRows - 1) / S::kRows, tasks = a.B * a.H * per_head;
  const int tiles = static_cast<int>((a.M + S::kKeys - 1) / S::kKeys);
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    int64_t head, part, b, h;
    split(task, per_head, &head, &part);
    split(head, a.H, &b, &h);
    const int64_t first = part * S::kRows;
    const auto ask = [&](int tile) {
      E* const to = stages + (S::kStages == 2 ? (FD_MUTATED(kAttentionStage) ? 0 : tile % 2) : 0) * 2 * S::kTile;
      const int64_t key = static_cast<int64_t>(tile) * S::kKeys;
      load_tile<kType, kD, S::kKeys, S::kThreads>(to, a.k, aligned & kK, b, h, key, a.M - key, d);
      load_tile<kType, kD, S::kKeys, S::kThreads>(to + S::kTile, a.v, aligned & kV, b, h, key, a.M - key, d);
      commit_copies();
    };
    load_tile<kType, kD, S::kRows, S::kThreads>(queries, a.q, aligned & kQ, b, h, first, a.N - first, d);
    ask(0);
    wait_copies<0>();
    FD_BARRIER(kAttentionQueryBarrier);
    if (of_q.any()) {
      prepare_tile<kType, kD, S::kRows, S::kThreads>(queries, of_q, first, a.N - first, d);
      FD_BARRIER(kAttentionPrepared);
    }
    const int own = warp * 16 * kTiles;  // the warp's first row
    const bool active = first + own < a.N;
    Left<kType, kD, kTiles, S::kHold> left;
    left.load(queries + own * kStride<kD>);
    float sum[kTiles][kD / 8][4] = {}, top[kTiles][2], total[kTiles][2];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) top[i][0] = top[i][1] = -infinity, total[i][0] = total[i][1] = 0;

    for (int tile = 0; tile < tiles; ++tile) {
      wait_copies<0>();
      FD_BARRIER(kAttentionTileBarrier);  // the tile is there, and everybody is through with the one before
      if (S::kStages == 2 && tile + 1 < tiles) ask(tile + 1);
      E* const k = stages + (S::kStages == 2 ? tile % 2 : 0) * 2 * S::kTile;
      const int64_t key = static_cast<int64_t>(tile) * S::kKeys;
      if (of_k.any()) {
        prepare_tile<kType, kD, S::kKeys, S::kThreads>(k, of_k, key, a.M - key, d);
        __syncthreads();
      }
      if (active) {
        float p[kTiles][kColumns][4] = {};
        multiply<kType, kD, kTiles, kColumns, S::kHold>(p, left, k, d);
        const int count = a.M - key < S::kKeys ? static_cast<int>(a.M - key) : S::kKeys;
        const bool ragged = count < S::kKeys && !FD_MUTATED(kAttentionRagged);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          float most[2] = {top[i][0], top[i][1]}, base[2], part_of[2] = {};
#pragma unroll
          for (int j = 0; j < kColumns; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              p[i][j][e] = scaled(p[i][j][e], c);
              if (ragged && 8 * j + 2 * t + e % 2 >= count) p[i][j][e] = -infinity;
              most[e / 2] = fmaxf(most[e / 2], p[i][j][e]);  // passes over NaN
            }
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            most[r] = fmaxf(most[r], __shfl_xor_sync(kFullWarp, most[r], 1));
            most[r] = fmaxf(most[r], __shfl_xor_sync(kFullWarp, most[r], 2));
            base[r] = most[r] == -infinity ? 0.0f : most[r];  // -inf - -inf is NaN, but 2^-inf is 0
            float alpha = weight_of<kType>(top[i][r] - base[r]) * kUnshift<kType>;
            if (FD_MUTATED(kAttentionRescale)) alpha = tile == 0 ? 0.0f : 1.0f;
            top[i][r] = most[r], total[i][r] *= alpha;
#pragma unroll
            for (int j = 0; j < kD / 8; ++j) sum[i][j][2 * r] *= alpha, sum[i][j][2 * r + 1] *= alpha;
          }
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            float v[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) p[i][j][e] = weight_of<kType>(p[i][j][e] - base[e / 2]);
            pack<kType>(p[i][j], v);  // the weights are divided by the sum of what they were rounded to
            part_of[0] += v[0] + v[1], part_of[1] += v[2] + v[3];
          }
          total[i][0] += part_of[0], total[i][1] += part_of[1];
        }
        accumulate<kType, kD, kTiles, kColumns>(sum, p, k + S::kTile, scratch);
      }
      if (S::kStages == 1 && tile + 1 < tiles) {
        FD_BARRIER(kAttentionSingleStage);
        ask(tile + 1);
      }
    }

    FD_BARRIER(kAttentionResultBarrier);  // the result takes the place of the operands
    float* const rows = reinterpret_cast<float*>(memory) + own * kStride<kD>;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& all = total[i][r];
        all += __shfl_xor_sync(kFullWarp, all, 1);
        all += __shfl_xor_sync(kFullWarp, all, 2);
        const int64_t row = first + own + 16 * i + lane / 4 + 8 * r;
        if (a.stats != nullptr && t == 0 && row < a.N) {
          float* const to = a.stats + 2 * (head * a.N + row);
          to[0] = top[i][r], to[1] = all * kUnshift<kType>;
        }
        all = 1.0f / all;
      }
    put_rows<kD, kTiles>(rows, sum, total);
    __syncwarp();
    store_rows<kType, kD, 16 * kTiles>(a.out, aligned & kOut, b, h, first + own, a.N, rows, d);
    __syncthreads();
  }
}

}  // namespace

void attention_forward(const AttentionForward& a, int device, void* stream) {
  if (attention_forward_sm90(a, device, stream)) return;
  const DeviceGuard guard(device);
  const auto bit = [&](const Strided& t, uint32_t which) { return in_vectors(t, a.d) ? which : 0u; };
  const uint32_t aligned = bit(a.q, kQ) | bit(a.k, kK) | bit(a.v, kV) | bit(a.out, kOut);
  with_type(a.q.dtype, [&](auto type) {
    with_dim(a.d, [&](auto dim) {
      constexpr int kType = decltype(type)::value, kD = decltype(dim)::value;
      using S = ForwardShape<kType, kD>;
      FD_LAUNCH((forward<kType, kD>), grid_for(a.B * a.H * ((a.N + S::kRows - 1) / S::kRows)), S::kThreads, S::kBytes,
                stream, a, aligned);
    });
  });
}

}  // namespace cuda
}  // namespace fastdiff
