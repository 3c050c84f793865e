// out = softmax(scale q k^T) v in bfloat16 or float16 on Hopper (sm_90a): wgmma, the copy engine, warps with one job
// each.
//
// Floor on an H200 (790 TFLOP/s, 4.3 TB/s): 4 N M d flops a head against (2 N + 2 M) d 2 bytes; at d = 72, N = M = 256
// it is memory (35 us for B H = 1024), at N = M = 1024 the tensor cores (98 us).
//
// Exact head dims. For d = 72 the scores run over K = 80 (64 + 16, the copy engine filling columns 72 to 79 with zeros)
// and the outputs over 72 = 64 + 8 columns, so 95 % of the products count; padding to 96 would leave 75 %, and tiles of
// 192 x 144, as made for d = 128, 44 % at N = 256. The two parts lie in shared memory as two tiles with permutations of
// their own: 128 bytes for 64 columns, 32 for 16, none for the 8 columns of v.
//
// Mapping. A block of 3 warpgroups per multiprocessor goes through items (batch, head, 128 queries), the queries of a
// head side by side so that its keys come from L2. One thread of the first group feeds the copy engine: q of an item,
// and keys and values in tiles of 128, two of each in flight, running ahead across items. The other groups take 64
// queries each: scores of tile t + 1 are started before the products with the values of tile t, so that the tensor
// cores work while exponentials are taken; the groups drift apart by themselves and fill each other's gaps. Scores
// become the first operand of the second product in the registers they are in. Online softmax in base 2, every row's
// maximum and sum in the four lanes that hold it; what is exponentiated is rounded to the operands' type, the sum is
// not.
//
// Performance: not measured; used only where asked for (FASTDIFF_SM90=1).
#include <cmath>
#include <cstdlib>

#include "attention_sm90.cuh"
#include "hopper.cuh"
#include "mma.cuh"
#include "vec.cuh"

namespace fastdiff {
namespace cuda {
namespace {

constexpr int kTile = 128;   // queries of an item, keys of a tile
constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kThreads = 3 * kGroup;
constexpr int kConsumers = 8;  // warps that work on an item
constexpr int kStages = 2;     // tiles of k and of v in flight

struct Maps {
  TensorMap q, k, v;                 // boxes of 128 x 64
  TensorMap q_tail, k_tail, v_tail;  // of 128 x 16, 128 x 16, 128 x 8
};

// Byte offsets of everything in shared memory.
template <int kD>
struct Layout {
  static constexpr int kBlocks = kD / 64, kTail = kD % 64;  // columns in tiles of 64, and 8 or none
  static_assert(kTail == 0 || kTail == 8, "tails of 8 columns only");
  static constexpr int kBlock = kTile * 128, kTail16 = kTile * 32, kTail8 = kTile * 16;
  static constexpr int kRows = kBlocks * kBlock + (kTail ? kTail16 : 0);   // of q or k
  static constexpr int kValues = kBlocks * kBlock + (kTail ? kTail8 : 0);  // of v
  // Rows of results: 4 words more than a multiple of 32, so that a warp's words fall into 32 banks.
  static constexpr int kOutRow = 2 * kD + (kTail ? 0 : 16);
  static constexpr int kQ = 0, kK = kRows, kV = kK + kStages * kRows;
  // Tiles start where the permutation does.
  static constexpr int kValueStage = (kValues + 1023) / 1024 * 1024;
  static constexpr int kOut = kV + kStages * kValueStage;
  static constexpr int kBarriers = kOut + kTile * kOutRow;
  static constexpr int kBytes = kBarriers + 8 * (2 + 4 * kStages) + 1024;  // and room to align the start
};

struct Barriers {
  Barrier q_full, q_empty, k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

template <int kD>
FD_D void copy_rows(char* to, const TensorMap* map, const TensorMap* tail, bool values, Barrier* full, int row, int h,
                    int b) {
  using L = Layout<kD>;
  arrive_expecting(full, values ? L::kValues : L::kRows);
#pragma unroll
  for (int i = 0; i < L::kBlocks; ++i) copy_box(to + i * L::kBlock, map, full, 64 * i, row, h, b);
  if constexpr (L::kTail > 0) copy_box(to + L::kBlocks * L::kBlock, tail, full, 64 * L::kBlocks, row, h, b);
}

// s = q k^T of one group and one tile, started.
template <bool kBf16, int kD>
FD_D void start_scores(float (&s)[64], const char* q, const char* k, int group) {
  using L = Layout<kD>;
  pin(s);
  fence_products();
#pragma unroll
  for (int i = 0; i < L::kBlocks; ++i) {
    const Tile a = make_tile<128>(q + i * L::kBlock + group * 64 * 128, 1024);
    const Tile b = make_tile<128>(k + i * L::kBlock, 1024);
#pragma unroll
    for (int step = 0; step < 4; ++step)
      start_product<kBf16>(s, advance(a, 32 * step), advance(b, 32 * step), i + step > 0);
  }
  if constexpr (L::kTail > 0)
    start_product<kBf16>(s, make_tile<32>(q + L::kBlocks * L::kBlock + group * 64 * 32, 256),
                         make_tile<32>(k + L::kBlocks * L::kBlock, 256), 1);
  commit_products();
}

// A row of results: kBlocks tiles of 64 columns and a tail.
template <int kD>
struct Result {
  float block[Layout<kD>::kBlocks][32];
  float tail[4];

  template <typename F>
  FD_D void each(F f) {  // f(value, whether it is of the lower row)
#pragma unroll
    for (int i = 0; i < Layout<kD>::kBlocks; ++i)
#pragma unroll
      for (int j = 0; j < 32; ++j) f(block[i][j], j % 4 / 2);
    if constexpr (Layout<kD>::kTail > 0) {
#pragma unroll
      for (int j = 0; j < 4; ++j) f(tail[j], j / 2);
    }
  }
};

// o += p v of one tile, started.
template <bool kBf16, int kD>
FD_D void start_values(Result<kD>& o, uint32_t (&p)[8][4], const char* v) {
  using L = Layout<kD>;
#pragma unroll
  for (int i = 0; i < L::kBlocks; ++i) pin(o.block[i]);
  if constexpr (L::kTail > 0) pin(o.tail);
  fence_products();
#pragma unroll
  for (int step = 0; step < 8; ++step) {
#pragma unroll
    for (int i = 0; i < L::kBlocks; ++i)
      start_product<kBf16>(o.block[i], p[step], make_tile<128>(v + i * L::kBlock + step * 16 * 128, 1024));
    if constexpr (L::kTail > 0)
      start_product<kBf16>(o.tail, p[step], make_tile<16>(v + L::kBlocks * L::kBlock + step * 16 * 16, 128));
  }
  commit_products();
}

template <int kD>
FD_D void finish(Result<kD>& o) {
#pragma unroll
  for (int i = 0; i < Layout<kD>::kBlocks; ++i) pin(o.block[i]);
  if constexpr (Layout<kD>::kTail > 0) pin(o.tail);
}

FD_D float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
FD_D float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// One step of the online softmax: s becomes 2^(c s - m); m and the sums move on, and factor[i] is what everything
// summed so far shrinks by. `keys`: how many columns there are; the others do not count.
FD_D void soften(float (&s)[64], float c, int keys, float (&m)[2], float (&sum)[2], float (&factor)[2]) {
  const int column = 2 * (threadIdx.x % 4);
  if (keys < kTile) {
#pragma unroll
    for (int i = 0; i < 64; ++i)
      if (i / 4 * 8 + column + i % 2 >= keys) s[i] = -INFINITY;
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float top = -INFINITY;
#pragma unroll
    for (int j = 0; j < 16; ++j) top = fmaxf(top, fmaxf(s[4 * j + 2 * row], s[4 * j + 2 * row + 1]));
    top = quad_max(top);
    const float next = fmaxf(m[row], top * c);
    // As long as every score is -inf there is nothing to subtract, and nothing to shrink.
    const float from = next == -INFINITY ? 0.0f : next;
    factor[row] = exp2_fast(m[row] - from);
    m[row] = next;
    float total = 0;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[4 * j + 2 * row + i];
        x = exp2_fast(x * c - from);
        total += x;
      }
    }
    sum[row] = sum[row] * factor[row] + total;  // of this lane's columns
  }
}

template <bool kBf16>
FD_D void pack(const float (&s)[64], uint32_t (&p)[8][4]) {
#pragma unroll
  for (int step = 0; step < 8; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) p[step][i] = narrow_pair(s[8 * step + 2 * i], s[8 * step + 2 * i + 1], kBf16);
}

template <bool kBf16, int kD>
__global__ void __launch_bounds__(kThreads, 1)
    attention_sm90(const __grid_constant__ Maps maps, const __grid_constant__ AttentionForward a, int64_t items,
                   int64_t q_tiles) {
  if constexpr (!kHopper) return;
  using L = Layout<kD>;
  FD_SHARED_DYNAMIC(char, raw);
  char* const shared = raw + (1024 - reinterpret_cast<uintptr_t>(raw) % 1024) % 1024;
  Barriers& bar = *reinterpret_cast<Barriers*>(shared + L::kBarriers);
  if (threadIdx.x == 0) {
    init_barrier(&bar.q_full, 1), init_barrier(&bar.q_empty, kConsumers);
    for (int s = 0; s < kStages; ++s) {
      init_barrier(&bar.k_full[s], 1), init_barrier(&bar.k_empty[s], kConsumers);
      init_barrier(&bar.v_full[s], 1), init_barrier(&bar.v_empty[s], kConsumers);
    }
    publish_barriers();
  }
  FD_BARRIER(kHopperInit);
  const int tiles = static_cast<int>((a.M + kTile - 1) / kTile);
  const auto place = [&](int64_t item, int64_t* row, int* h, int* b) {
    int64_t head, tile;
    split(item, q_tiles, &head, &tile);
    *row = tile * kTile, *h = static_cast<int>(head % a.H), *b = static_cast<int>(head / a.H);
  };

  if (threadIdx.x < kGroup) {  // the group that feeds
    give_registers<24>();
    if (threadIdx.x == 0) {
      int turn = 0, q_turn = 0;
      for (int64_t item = blockIdx.x; item < items; item += gridDim.x, ++q_turn) {
        int64_t row;
        int h, b;
        place(item, &row, &h, &b);
        wait_phase(&bar.q_empty, (q_turn & 1) ^ 1);
        copy_rows<kD>(shared + L::kQ, &maps.q, &maps.q_tail, false, &bar.q_full, static_cast<int>(row), h, b);
        for (int t = 0; t < tiles; ++t, ++turn) {
          const int s = turn % kStages, phase = turn / kStages & 1;
          if (!FD_MUTATED(kHopperEmpty)) wait_phase(&bar.k_empty[s], phase ^ 1);
          copy_rows<kD>(shared + L::kK + s * L::kRows, &maps.k, &maps.k_tail, false, &bar.k_full[s], t * kTile, h, b);
          wait_phase(&bar.v_empty[s], phase ^ 1);
          copy_rows<kD>(shared + L::kV + s * L::kValueStage, &maps.v, &maps.v_tail, true, &bar.v_full[s], t * kTile, h,
                        b);
        }
      }
    }
  } else {  // the groups that compute
    take_registers<240>();
    const int group = threadIdx.x / kGroup - 1, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const float c = a.scale * 1.4426950408889634f;
    int turn = 0, q_turn = 0;
    const auto release = [&](Barrier* b) {
      __syncwarp();
      if (lane == 0) arrive(b);
    };
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x, ++q_turn) {
      int64_t first;
      int h, b;
      place(item, &first, &h, &b);
      float s[64], m[2] = {-INFINITY, -INFINITY}, sum[2] = {}, factor[2];
      Result<kD> o;
      o.each([](float& x, int) { x = 0; });
      uint32_t p[8][4];
      const auto k_at = [&](int i) { return shared + L::kK + i % kStages * L::kRows; };
      const auto v_at = [&](int i) { return shared + L::kV + i % kStages * L::kValueStage; };
      const auto phase_of = [](int i) { return i / kStages & 1; };

      wait_phase(&bar.q_full, q_turn & 1);
      wait_phase(&bar.k_full[turn % kStages], phase_of(turn));
      start_scores<kBf16, kD>(s, shared + L::kQ, k_at(turn), group);
      wait_products<0>();
      pin(s);
      release(&bar.k_empty[turn % kStages]);
      soften(s, c, static_cast<int>(a.M < kTile ? a.M : kTile), m, sum, factor);
      pack<kBf16>(s, p);
      for (int t = 1; t < tiles; ++t, ++turn) {
        const int next = turn + 1;
        wait_phase(&bar.k_full[next % kStages], phase_of(next));
        start_scores<kBf16, kD>(s, shared + L::kQ, k_at(next), group);
        if (!FD_MUTATED(kHopperFull)) wait_phase(&bar.v_full[turn % kStages], phase_of(turn));
        start_values<kBf16, kD>(o, p, v_at(turn));
        wait_products<1>();
        pin(s);
        release(&bar.k_empty[next % kStages]);
        const int64_t left = a.M - static_cast<int64_t>(t) * kTile;
        soften(s, c, static_cast<int>(left < kTile ? left : kTile), m, sum, factor);
        if (!FD_MUTATED(kHopperWait)) wait_products<0>();
        finish(o);
        release(&bar.v_empty[turn % kStages]);
        if (!FD_MUTATED(kHopperShrink)) o.each([&](float& x, int row) { x *= factor[row]; });
        pack<kBf16>(s, p);
      }
      release(&bar.q_empty);
      wait_phase(&bar.v_full[turn % kStages], phase_of(turn));
      start_values<kBf16, kD>(o, p, v_at(turn));
      wait_products<0>();
      finish(o);
      release(&bar.v_empty[turn % kStages]);
      ++turn;

      // Results to shared memory, 16 rows of each warp's own, and out in whole lines.
      char* const rows = shared + L::kOut + (group * 64 + warp * 16) * L::kOutRow;
      const int g = lane / 4, column = 2 * (lane % 4);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float total = quad_sum(sum[i]), inverse = 1.0f / total;
        const int64_t row = first + group * 64 + warp * 16 + g + 8 * i;
        if (a.stats != nullptr && lane % 4 == 0 && row < a.N) {
          float* const at = a.stats + 2 * ((b * a.H + h) * a.N + row);
          at[0] = m[i], at[1] = total;
        }
        char* const to = rows + (g + 8 * i) * L::kOutRow + 2 * column;
#pragma unroll
        for (int n = 0; n < L::kBlocks; ++n)
#pragma unroll
          for (int j = 0; j < 8; ++j)
            *reinterpret_cast<uint32_t*>(to + 2 * (64 * n + 8 * j)) =
                narrow_pair(o.block[n][4 * j + 2 * i] * inverse, o.block[n][4 * j + 2 * i + 1] * inverse, kBf16);
        if constexpr (L::kTail > 0)
          *reinterpret_cast<uint32_t*>(to + 2 * 64 * L::kBlocks) =
              narrow_pair(o.tail[2 * i] * inverse, o.tail[2 * i + 1] * inverse, kBf16);
      }
      __syncwarp();
      char* const out = static_cast<char*>(a.out.data) + 2 * (b * a.out.s[0] + h * a.out.s[1]);
      for (int i = lane; i < 16 * (kD / 8); i += 32) {
        const int row = i / (kD / 8), chunk = i % (kD / 8);
        const int64_t n = first + group * 64 + warp * 16 + row;
        if (n < a.N)
          *reinterpret_cast<uint4*>(out + 2 * n * a.out.s[2] + 16 * chunk) =
              *reinterpret_cast<const uint4*>(rows + row * L::kOutRow + 16 * chunk);
      }
      __syncwarp();  // before the next item's results take their place
    }
  }
}

// Whether this device runs code for sm_90a, and it was asked for.
bool wanted(int device) {
  static const bool asked = [] {
    const char* text = std::getenv("FASTDIFF_SM90");
    return text != nullptr && text[0] == '1';
  }();
#ifdef __CUDACC__
  if (!asked) return false;
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  cudaFuncAttributes found;
  // A build without sm_90a holds this kernel for another target, and without a body.
  return major == 9 && minor == 0 && cudaFuncGetAttributes(&found, attention_sm90<true, 64>) == cudaSuccess &&
         found.numRegs > 100;
#else
  (void)device;
  return asked || emu::hopper;
#endif
}

template <bool kBf16, int kD>
bool run(const AttentionForward& a, int device, void* stream) {
  using L = Layout<kD>;
  Maps maps = {};
  const auto make = [&](TensorMap* map, TensorMap* tail, const Strided& x, int64_t tokens, bool values) {
    const int64_t size[4] = {a.B, a.H, tokens, kD}, stride[4] = {x.s[0], x.s[1], x.s[2], x.s[3]};
    if (!make_map(map, x.data, kBf16, size, stride, kTile, 64, 128)) return false;
    if (L::kTail == 0) return true;
    return values ? make_map(tail, x.data, kBf16, size, stride, kTile, 8, 0)
                  : make_map(tail, x.data, kBf16, size, stride, kTile, 16, 32);
  };
  if (!make(&maps.q, &maps.q_tail, a.q, a.N, false) || !make(&maps.k, &maps.k_tail, a.k, a.M, false) ||
      !make(&maps.v, &maps.v_tail, a.v, a.M, true))
    return false;
  const int64_t q_tiles = (a.N + kTile - 1) / kTile, items = q_tiles * a.H * a.B;
  const int64_t blocks = multiprocessors(device);
  FD_LAUNCH_SM90((attention_sm90<kBf16, kD>), grid_for(items < blocks ? items : blocks), kThreads, L::kBytes, stream,
                 maps, a, items, q_tiles);
  return true;
}

// 16-byte stores of whole rows.
bool aligned(const Strided& x) {
  return x.s[3] == 1 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.s[0] % 8 == 0 && x.s[1] % 8 == 0 &&
         x.s[2] % 8 == 0;
}

}  // namespace

bool attention_forward_sm90(const AttentionForward& a, int device, void* stream) {
  const DeviceGuard guard(device);
  if (!wanted(device) || a.q.dtype == kF32 || a.q_weight || a.k_weight || a.cos || !(a.scale > 0) || !aligned(a.out) ||
      a.N >= int64_t{1} << 31 || a.M >= int64_t{1} << 31)
    return false;
  if (a.d == 64) return a.q.dtype == kBF16 ? run<true, 64>(a, device, stream) : run<false, 64>(a, device, stream);
  if (a.d == 72) return a.q.dtype == kBF16 ? run<true, 72>(a, device, stream) : run<false, 72>(a, device, stream);
  if (a.d == 128) return a.q.dtype == kBF16 ? run<true, 128>(a, device, stream) : run<false, 128>(a, device, stream);
  return false;
}

}  // namespace cuda
}  // namespace fastdiff
