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
#include <cstdlib>

#include "attention_hopper.cuh"
#include "attention_sm90.cuh"

namespace fastdiff {
namespace cuda {
namespace {

constexpr int kTile = kScoreKeys;  // queries of an item, keys of a tile
constexpr int kThreads = 3 * kGroup;
constexpr int kConsumers = 8;  // warps that work on an item
constexpr int kStages = 2;     // tiles of k and of v in flight

// Byte offsets of everything in shared memory. Tiles start where their permutation does.
template <int kD>
struct Layout {
  static constexpr int kRows = kTile * Columns<kD>::kRowBytes, kValues = kTile * Columns<kD>::kValueBytes;
  static constexpr int kQ = 0, kK = kRows, kV = kK + kStages * kRows;
  static constexpr int kOut = kV + kStages * kValues;
  static constexpr int kBarriers = kOut + kTile * Columns<kD>::kOutRow;
  static constexpr int kBytes = kBarriers + 8 * (2 + 4 * kStages) + 1024;  // and room to align the start
  static_assert(kRows % 1024 == 0 && kValues % 1024 == 0, "where permutations start");
};

struct Barriers {
  Barrier q_full, q_empty, k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

// One step of the online softmax: s becomes 2^(c s - m); m and the sums move on, and factor[i] is what everything
// summed so far shrinks by. `keys`: how many columns there are; the others do not count.
template <bool kBf16>
FD_D void soften(float (&s)[64], float c, int keys, float (&m)[2], float (&sum)[2], float (&factor)[2]) {
  drop_keys(s, keys);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float next = fmaxf(m[row], scaled(quad_max(largest(s, row)), c));
    // As long as every score is -inf there is nothing to subtract, and nothing to shrink.
    const float from = next == -INFINITY ? 0.0f : next;
    factor[row] = exp2_fast(m[row] - from);
    m[row] = next;
    sum[row] = sum[row] * factor[row] + raise<kBf16>(s, row, c, from);  // of this lane's columns
  }
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
        copy_rows<kD, kTile, false>(shared + L::kQ, maps.q, &bar.q_full, static_cast<int>(row), h, b);
        for (int t = 0; t < tiles; ++t, ++turn) {
          const int s = turn % kStages, phase = turn / kStages & 1;
          if (!FD_MUTATED(kHopperEmpty)) wait_phase(&bar.k_empty[s], phase ^ 1);
          copy_rows<kD, kTile, false>(shared + L::kK + s * L::kRows, maps.k, &bar.k_full[s], t * kTile, h, b);
          wait_phase(&bar.v_empty[s], phase ^ 1);
          copy_rows<kD, kTile, true>(shared + L::kV + s * L::kValues, maps.v, &bar.v_full[s], t * kTile, h, b);
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
      const Rows q = keys_from<kD, kTile>(shared + L::kQ, kGroupRows * group);
      const auto k_at = [&](int i) { return keys_from<kD, kTile>(shared + L::kK + i % kStages * L::kRows, 0); };
      const auto v_at = [&](int i) { return values_from<kD, kTile>(shared + L::kV + i % kStages * L::kValues, 0); };
      const auto phase_of = [](int i) { return i / kStages & 1; };

      wait_phase(&bar.q_full, q_turn & 1);
      wait_phase(&bar.k_full[turn % kStages], phase_of(turn));
      start_scores<kBf16, kD>(s, q, k_at(turn));
      wait_products<0>();
      pin(s);
      release(&bar.k_empty[turn % kStages]);
      soften<kBf16>(s, c, static_cast<int>(a.M < kTile ? a.M : kTile), m, sum, factor);
      pack<kBf16>(s, p);
      for (int t = 1; t < tiles; ++t, ++turn) {
        const int next = turn + 1;
        wait_phase(&bar.k_full[next % kStages], phase_of(next));
        start_scores<kBf16, kD>(s, q, k_at(next));
        if (!FD_MUTATED(kHopperFull)) wait_phase(&bar.v_full[turn % kStages], phase_of(turn));
        start_values<kBf16, kD>(o, p, v_at(turn), 1);
        wait_products<1>();
        pin(s);
        release(&bar.k_empty[next % kStages]);
        const int64_t left = a.M - static_cast<int64_t>(t) * kTile;
        soften<kBf16>(s, c, static_cast<int>(left < kTile ? left : kTile), m, sum, factor);
        if (!FD_MUTATED(kHopperWait)) wait_products<0>();
        pin(o);
        release(&bar.v_empty[turn % kStages]);
        if (!FD_MUTATED(kHopperShrink)) o.each([&](float& x, int row) { x *= factor[row]; });
        pack<kBf16>(s, p);
      }
      release(&bar.q_empty);
      wait_phase(&bar.v_full[turn % kStages], phase_of(turn));
      start_values<kBf16, kD>(o, p, v_at(turn), 1);
      wait_products<0>();
      pin(o);
      release(&bar.v_empty[turn % kStages]);
      ++turn;

      const int own = kGroupRows * group + 16 * warp;  // the warp's first row
      put_result<kBf16>(o, m, sum, shared + L::kOut + own * Columns<kD>::kOutRow, a, b, h, first + own);
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
  if (!make_maps<kBf16, kD>(&maps, a, kTile, kTile)) return false;
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
  if ((a.d == 64 || a.d == 72 || a.d == 128) && a.M <= (a.d == 128 ? 128 : 256))
    return attention_short_sm90(a, device, stream);
  if (a.d == 64) return a.q.dtype == kBF16 ? run<true, 64>(a, device, stream) : run<false, 64>(a, device, stream);
  if (a.d == 72) return a.q.dtype == kBF16 ? run<true, 72>(a, device, stream) : run<false, 72>(a, device, stream);
  if (a.d == 128) return a.q.dtype == kBF16 ? run<true, 128>(a, device, stream) : run<false, 128>(a, device, stream);
  return false;
}

}  // namespace cuda
}  // namespace fastdiff
