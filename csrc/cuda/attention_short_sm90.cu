// out = softmax(scale q k^T) v on Hopper for up to 256 keys (128 at d = 128): all keys and values of a head in shared
// memory at once, all scores of a query in registers at once.
//
// Floor on an H200 (4.3 TB/s, 790 TFLOP/s): memory. At d = 72, N = M = 256 a head moves 147 KB, 7900 cycles of what a
// multiprocessor gets; B H = 1024 heads take 35 us.
//
// Mapping. A block per multiprocessor goes through items: a head and some of its tiles of 64 queries (all of them, or
// as many as give every block work; a query's bits do not depend on it). Three threads of the first warpgroup feed the
// copy engine, one each for keys, values and queries, so that none waits for another's room: there is room for two
// heads, and the next one's keys and values (76 KB) come while this one's queries are worked on. Two warpgroups take
// the tiles in turn, each with a buffer of its own for queries, and drift apart: one's exponentials run beside the
// other's products. A row of scores is 128 registers of a thread; its maximum is taken once (over the first half while
// the second is multiplied), its sum once, and nothing is ever rescaled. The first half meets its values while the
// second is exponentiated. 168 registers on average, 240 of a computing thread, 24 of a feeding one.
//
// Against tiles of 128 keys and an online softmax (attention_sm90.cu), thousands of cycles for such a head:
//                                                    here           online
//   memory                                           7.9            7.9
//   L2 to shared memory (25 bytes a cycle)           4.5 (111 KB)   7.5 (184 KB: keys and values for every 128 queries)
//   and results out                                  1.5            1.5
//   tensor cores (m64n8k16 taking 4 to 16)           4.9 to 5.6     the same
//   exponentials (16 a cycle)                        4.1            4.2
//   instructions of a quadrant (1618, 1856 a tile)   6.5            7.4: maxima, sums and factors twice
// The instructions are those in the machine code, masks for ragged rows included, so at most so many are issued.
// The online kernel asks more of L2 than memory gives; here everything fits beside memory. Nor has every item a
// pipeline to fill, of two tiles of keys one without products of values to run beside its exponentials. Predicted: 85 %
// of the floor, 41 us for B H = 1024 (missing: the first load of every block, and 1024 heads over 132 blocks are 7.76
// rounds, not 8); online 60 %.
//
// At d = 128 two heads of 256 keys do not fit (256 KB), and the scores leave no registers for 64 columns twice: ptxas
// serialises the products. 129 keys and more go to the online kernel there.
//
// Performance: not measured; used only where asked for (FASTDIFF_SM90=1).
#include "attention_hopper.cuh"
#include "attention_sm90.cuh"

namespace fastdiff {
namespace cuda {
namespace {

constexpr int kGroups = 2;  // that compute
constexpr int kThreads = (1 + kGroups) * kGroup;
constexpr int kGroupWarps = 4;
constexpr int kStages = 2;  // heads that there is room for

// Byte offsets of everything in shared memory. Tiles start where their permutation does.
template <int kD, int kKeys>
struct Layout {
  using C = Columns<kD>;
  static constexpr int kQuery = kGroupRows * C::kRowBytes;  // of a group
  static constexpr int kKey = kKeys * C::kRowBytes, kValue = kKeys * C::kValueBytes;
  static constexpr int kQ = 0, kK = kGroups * kQuery, kV = kK + kStages * kKey, kOut = kV + kStages * kValue;
  static constexpr int kBarriers = kOut + kGroups * kGroupRows * C::kOutRow;
  static constexpr int kBytes = kBarriers + 8 * (2 * kGroups + 4 * kStages) + 1024;  // and room to align the start
  static_assert(kQuery % 1024 == 0 && kKey % 1024 == 0 && kValue % 1024 == 0, "where permutations start");
  static_assert(kBytes <= 227 << 10, "what sm_90 gives a block");
};

struct Barriers {
  Barrier q_full[kGroups], q_empty[kGroups], k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

// How the queries of a head are cut: into `parts` items of `tiles` times 64 queries, the last one shorter.
struct Cut {
  int parts, tiles, of_head;
};

// An item: a head and `tiles` times 64 queries of it from tile `first` on.
struct Item {
  int b, h, first, tiles;
};
FD_D Item item_of(int number, const Cut& cut, int heads) {
  const int head = number / cut.parts, first = (number - head * cut.parts) * cut.tiles, b = head / heads;
  return {b, head - b * heads, first, cut.of_head - first < cut.tiles ? cut.of_head - first : cut.tiles};
}

// Of all tiles of a block the groups take every other one. `turn` counts tiles or, for keys and values, items.
FD_D int phase_of(int turn) {
  static_assert(kGroups == 2 && kStages == 2, "two turns to a phase");
  return turn / 2 & 1;
}

template <bool kBf16, int kD, int kKeys>
__global__ void __launch_bounds__(kThreads, 1)
    attention_short(const __grid_constant__ Maps maps, const __grid_constant__ AttentionForward a, int items,
                    const __grid_constant__ Cut cut) {
  if constexpr (!kHopper) return;
  using L = Layout<kD, kKeys>;
  constexpr int kParts = kKeys / kScoreKeys;  // of a row of scores
  FD_SHARED_DYNAMIC(char, raw);
  char* const shared = raw + (1024 - reinterpret_cast<uintptr_t>(raw) % 1024) % 1024;
  Barriers& bar = *reinterpret_cast<Barriers*>(shared + L::kBarriers);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kGroups; ++i) init_barrier(&bar.q_full[i], 1), init_barrier(&bar.q_empty[i], kGroupWarps);
    for (int s = 0; s < kStages; ++s) {
      init_barrier(&bar.k_full[s], 1), init_barrier(&bar.k_empty[s], kGroups * kGroupWarps);
      init_barrier(&bar.v_full[s], 1), init_barrier(&bar.v_empty[s], kGroups * kGroupWarps);
    }
    publish_barriers();
  }
  FD_BARRIER(kShortInit);
  const int heads = static_cast<int>(a.H);

  if (threadIdx.x < kGroup) {  // the group that feeds
    give_registers<24>();
    if (threadIdx.x == 0) {  // keys, a head ahead
      int turn = 0;
      for (int number = blockIdx.x; number < items; number += gridDim.x, ++turn) {
        const Item item = item_of(number, cut, heads);
        const int stage = turn % kStages;
        if (!FD_MUTATED(kShortKeysEmpty)) wait_phase(&bar.k_empty[stage], phase_of(turn) ^ 1);
        copy_rows<kD, kKeys, false>(shared + L::kK + stage * L::kKey, maps.k, &bar.k_full[stage], 0, item.h, item.b);
      }
    } else if (threadIdx.x == 32) {  // values
      int turn = 0;
      for (int number = blockIdx.x; number < items; number += gridDim.x, ++turn) {
        const Item item = item_of(number, cut, heads);
        const int stage = turn % kStages;
        if (!FD_MUTATED(kShortValuesEmpty)) wait_phase(&bar.v_empty[stage], phase_of(turn) ^ 1);
        copy_rows<kD, kKeys, true>(shared + L::kV + stage * L::kValue, maps.v, &bar.v_full[stage], 0, item.h, item.b);
      }
    } else if (threadIdx.x == 64) {  // queries
      int turn = 0;
      for (int number = blockIdx.x; number < items; number += gridDim.x) {
        const Item item = item_of(number, cut, heads);
#pragma unroll 1  // there are 24 registers
        for (int i = 0; i < item.tiles; ++i, ++turn) {
          const int group = turn % kGroups;
          if (!FD_MUTATED(kShortQueriesEmpty)) wait_phase(&bar.q_empty[group], phase_of(turn) ^ 1);
          copy_rows<kD, kGroupRows, false>(shared + L::kQ + group * L::kQuery, maps.q, &bar.q_full[group],
                                           (item.first + i) * kGroupRows, item.h, item.b);
        }
      }
    }
  } else {  // the groups that compute
    take_registers<240>();
    const int group = threadIdx.x / kGroup - 1, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kGroupWarps;
    const int keys = static_cast<int>(a.M);
    const float c = a.scale * 1.4426950408889634f;
    const auto release = [&](Barrier* b) {
      __syncwarp();
      if (lane == 0) arrive(b);
    };
    const Rows q = keys_from<kD, kGroupRows>(shared + L::kQ + group * L::kQuery, 0);
    char* const rows = shared + L::kOut + (group * kGroupRows + 16 * warp) * L::C::kOutRow;
    int turn = 0, head_turn = 0;  // tiles and items before this item
    for (int number = blockIdx.x; number < items; number += gridDim.x, ++head_turn) {
      const Item item = item_of(number, cut, heads);
      const int stage = head_turn % kStages, full = phase_of(head_turn);
      const char* const k = shared + L::kK + stage * L::kKey;
      const char* const v = shared + L::kV + stage * L::kValue;
      const int own = (turn + group) % kGroups;  // the group's first tile of the item
      for (int i = own; i < item.tiles; i += kGroups) {
        const bool last = i + kGroups >= item.tiles;
        wait_phase(&bar.q_full[group], phase_of(turn + i));
        if (!FD_MUTATED(kShortKeysFull)) wait_phase(&bar.k_full[stage], full);
        float s[kParts][64];
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          start_scores<kBf16, kD>(s[part], q, keys_from<kD, kKeys>(k, kScoreKeys * part));
        // The largest of the first half is found while the second is computed.
        float top[2] = {-INFINITY, -INFINITY}, from[2], sum[2] = {};
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          if (part + 1 < kParts)
            wait_products<1>();
          else if (!FD_MUTATED(kShortWait))
            wait_products<0>();
          pin(s[part]);
          if (part + 1 == kParts) {
            release(&bar.q_empty[group]);
            if (last) release(&bar.k_empty[stage]);
            if (!FD_MUTATED(kShortRagged)) drop_keys(s[part], keys - kScoreKeys * part);
          }
#pragma unroll
          for (int row = 0; row < 2; ++row) top[row] = fmaxf(top[row], largest(s[part], row));
        }
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          top[row] = scaled(quad_max(top[row]), c);
          from[row] = top[row] == -INFINITY ? 0.0f : top[row];  // -inf - -inf is NaN, but 2^-inf is 0
        }
        // The first half meets its values while the second becomes weights. With both products in flight ptxas runs out
        // of registers and serialises them all.
        Result<kD> o;
        uint32_t p[kParts][8][4];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          pin(s[part]);
#pragma unroll
          for (int row = 0; row < 2; ++row) sum[row] += raise<kBf16>(s[part], row, c, from[row]);
          if (part == 0 && !FD_MUTATED(kShortValuesFull)) wait_phase(&bar.v_full[stage], full);
          if (part > 0) wait_products<0>(), pin(o);
          pack<kBf16>(s[part], p[part]);
          start_values<kBf16, kD>(o, p[part], values_from<kD, kKeys>(v, kScoreKeys * part), part > 0);
        }
        wait_products<0>();
        pin(o);
        if (last) release(&bar.v_empty[stage]);
        put_result<kBf16>(o, top, sum, rows, a, item.b, item.h,
                          static_cast<int64_t>(item.first + i) * kGroupRows + 16 * warp);
      }
      if (own >= item.tiles) {  // its only tile is the other group's
        wait_phase(&bar.k_full[stage], full), wait_phase(&bar.v_full[stage], full);
        release(&bar.k_empty[stage]), release(&bar.v_empty[stage]);
      }
      turn += item.tiles;
    }
  }
}

// As few rounds of items as possible, each costing its tiles and, once more, the keys and values.
Cut cut_for(int64_t heads, int64_t tiles, int64_t keys, int64_t blocks) {
  Cut best = {};
  int64_t least = int64_t{1} << 62;
  for (int64_t parts = 1; parts <= (tiles + 1) / 2 && parts <= 64; ++parts) {
    const int64_t each = (tiles + parts - 1) / parts, items = heads * ((tiles + each - 1) / each);
    const int64_t cost = (items + blocks - 1) / blocks * (each + (keys + kScoreKeys - 1) / kScoreKeys);
    if (cost >= least) continue;
    least = cost;
    best = {static_cast<int>((tiles + each - 1) / each), static_cast<int>(each), static_cast<int>(tiles)};
  }
  return best;
}

template <bool kBf16, int kD, int kKeys>
bool run(const AttentionForward& a, int device, void* stream) {
  Maps maps = {};
  if (!make_maps<kBf16, kD>(&maps, a, kGroupRows, kKeys)) return false;
  const int64_t blocks = multiprocessors(device), heads = a.B * a.H;
  const Cut cut = cut_for(heads, (a.N + kGroupRows - 1) / kGroupRows, a.M, blocks);
  const int64_t items = heads * cut.parts;
  if (items >= int64_t{1} << 31) return false;  // as many rows of q: more than a device holds
  FD_LAUNCH_SM90((attention_short<kBf16, kD, kKeys>), grid_for(items < blocks ? items : blocks), kThreads,
                 (Layout<kD, kKeys>::kBytes), stream, maps, a, static_cast<int>(items), cut);
  return true;
}

template <int kD>
bool run(const AttentionForward& a, int device, void* stream) {
  const bool is_bf16 = a.q.dtype == kBF16;
  if (a.M <= 128) return is_bf16 ? run<true, kD, 128>(a, device, stream) : run<false, kD, 128>(a, device, stream);
  if constexpr (kD > 80)
    return false;
  else
    return is_bf16 ? run<true, kD, 256>(a, device, stream) : run<false, kD, 256>(a, device, stream);
}

}  // namespace

bool attention_short_sm90(const AttentionForward& a, int device, void* stream) {
  if (a.d == 64) return run<64>(a, device, stream);
  if (a.d == 72) return run<72>(a, device, stream);
  return run<128>(a, device, stream);
}

}  // namespace cuda
}  // namespace fastdiff
