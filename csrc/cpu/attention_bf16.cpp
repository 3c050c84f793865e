// The forward pass of attention.cpp for bf16 operands on the dot product of bf16 pairs (bf16_dot.h): 64 flops an
// instruction where the float32 one does 32.
//
// What is rounded besides the result: q and k to bf16 after their norm and rotation, where there are any (as they are
// in a model that applies these in bf16 itself), and the weights 2^(s - max) to bf16 before the product with v. The
// sums that divide the result are sums of the rounded weights, so that equal values have themselves as their mean and a
// single key returns its value. Scores, sums and results accumulate in float32. Subnormal elements and products are
// zero.
//
// Mapping: that of attention.cpp. A pair is two neighbours along what a product sums over.
// Scores: two channels. q is transposed to lanes pair by pair; k lies that way in memory already and is read in place
// where rows are dense, near each other and of even length, else copied once per run of query tiles.
// Product with v: two keys. The weights are rounded two by two into the buffer of the scores, v is interleaved by pairs
// of keys once per run. The sum of the weights is the dot product with (1, 1).
// The scale is applied to the scores, since q must stay as it is.
//
// Calls that save maxima and sums for the backward pass go to the float32 kernel, as do f32 and f16: backward
// recomputes the scores in float32 and must find them equal to the last bit (attention_backward.cpp).
//
// Not measured: no machine with the instruction was at hand. Tested on a software body of it (tests/test_bf16_dot.py).
// Counted in the object code (GCC 12), both inner loops, a pair of channels or keys for 8 x 48 accumulators: 24 dot
// products in 38 instructions, 11 of them loads (3 vectors, 8 broadcasts straight from memory), no spill; so the dot
// products set the pace as long as no more than two of them issue in a cycle. A block of 64 keys and 48 queries at
// d = 72 takes 13.9 thousand dot products and about 3.5 thousand other vector instructions (2^x, rounding, scaling,
// merging), where the float32 kernel takes 27.6 thousand FMAs and 3 thousand others. What that gains depends on how
// often the dot product issues: 1.76 x in instructions where as often as an FMA (so it seems on AMD, where the bf16
// peak of oneDNN was 1.85 x the f32 peak), nothing where half as often.
#include "bf16_dot.h"

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_FALLBACK {
void attention_forward(const AttentionForward& a);
}
namespace FASTDIFF_ISA {
namespace {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kInfinity = __builtin_inff();

struct Tile {          // of queries
  float *q, *o;        // pairs [ld / 2, kQueries] and results [ld, kQueries], transposed
  float *top, *total;  // [kQueries]: the running maximum (times log2 e) and sum
};

struct Keys {
  const uint16_t* k;  // [keys, stride]
  int64_t stride;
  const uint16_t* v;  // [ceil(keys / 2), ld] pairs
  int64_t ld;
};

// All keys of one block, for V vectors of queries. factor = scale log2 e.
template <int V>
inline void attend(const Tile& t, const Keys& kv, int64_t keys, int64_t d, float factor, float* scores, bool fresh,
                   Ahead& ahead) {
  const vu ones = 0x3f803f80u - vu{};
  for (int64_t first = 0; first < keys; first += kKeys, fresh = false) {
    const int64_t n = least(kKeys, keys - first);
    vf top[V];
    for (int i = 0; i < V; ++i) top[i] = load(t.top + i * kWidth);
    for (int64_t j = 0; j < n; j += kRows) {
      ahead.step();
      vf s[kRows][V] = {};
      multiply_pairs<kRows, V, true>((d + 1) / 2, kv.k + (first + j) * kv.stride, kv.stride, n - j, t.q, kQueries, s);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
          const vf scaled = factor * s[r][i];
          store(scores + (j + r) * kQueries + i * kWidth, scaled);
          top[i] = larger(scaled, top[i]);  // a repeated key repeats its score
        }
    }
    vf alpha[V], base[V], total[V] = {};
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      base[i] = top[i] == -kInfinity ? vf{} : top[i];  // -inf - -inf is NaN, but 2^-inf is 0
      alpha[i] = exp2(load(t.top + i * kWidth) - base[i]);
      store(t.top + i * kWidth, top[i]);
    }
    // Weights of two keys take the place of the scores of an earlier one, or of the first of the two.
    for (int64_t j = 0; j < n; j += 2) {
      const float* row = scores + j * kQueries;
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) {
        const vf even = exp2(load(row + i * kWidth) - base[i]);
        const vf odd = j + 1 < n ? exp2(load(row + kQueries + i * kWidth) - base[i]) : vf{};
        const vu p = rounded_pair(even, odd);
        store(scores + j / 2 * kQueries + i * kWidth, (vf)p);
        dot(total[i], p, ones);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) store(t.total + i * kWidth, madd(load(t.total + i * kWidth), alpha[i], total[i]));
    for (int64_t c = 0; c < d; c += kRows) {
      vf o[kRows][V];
      float* out = t.o + c * kQueries;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) o[r][i] = vf{};
      ahead.step();
      multiply_pairs<kRows, V, false>((n + 1) / 2, kv.v + first * kv.ld + 2 * c, 2 * kv.ld, kRows, scores, kQueries, o);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
          float* to = out + r * kQueries + i * kWidth;
          store(to, fresh ? o[r][i] : madd(load(to), alpha[i], o[r][i]));
        }
    }
  }
}

inline void attend(int64_t queries, const Tile& t, const Keys& kv, int64_t keys, int64_t d, float factor, float* scores,
                   bool fresh, Ahead& ahead) {
  if (queries > 2 * kWidth) return attend<3>(t, kv, keys, d, factor, scores, fresh, ahead);
  if (queries > kWidth) return attend<2>(t, kv, keys, d, factor, scores, fresh, ahead);
  attend<1>(t, kv, keys, d, factor, scores, fresh, ahead);
}

struct Workspace {  // of one thread: attention_workspace (fastdiff.h), of which pairs need half where floats were
  float *q, *o, *top, *total, *rows, *scores, *scratch;
  uint16_t *k, *v;
};

// `count` tiles of one head, from tile `tile` on; then comes `next_tile` of `next_head`, if that is not negative.
inline void run(const AttentionForward& a, int64_t head, int64_t tile, int64_t count, const Workspace& w,
                int64_t next_head, int64_t next_tile) {
  const int64_t b = head / a.H, h = head % a.H, d = a.d, ld = rounded(d, 16);
  const Prologue of_q{a.q_weight, a.cos, a.sin, a.interleaved != 0, a.eps};
  const Prologue of_k{a.k_weight, a.cos, a.sin, a.interleaved != 0, a.eps};
  const bool rotated = a.cos != nullptr;
  const Tiles tiles(a.N);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = tiles.size(tile + i), lanes = rounded(n, kWidth);
    auto* rows = reinterpret_cast<uint16_t*>(w.rows);  // [kQueries, ld] pairs take half of w.rows, a row is in the rest
    pairs_in(rows, ld, a.q, b, h, tiles.first(tile + i), n, d, a.q_weight || rotated ? &of_q : nullptr,
             w.rows + kQueries * ld / 2, w.scratch);
    memset(rows + n * ld, 0, static_cast<size_t>((lanes - n) * ld) * 2);
    pairs_to_lanes(w.q + i * ld * kQueries, rows, ld, (d + 1) / 2, lanes);
    for (int64_t l = 0; l < kQueries; ++l) w.top[i * kQueries + l] = -kInfinity, w.total[i * kQueries + l] = 0;
  }
  const bool prepared = a.k_weight || rotated;
  const bool in_place = !prepared && a.k.s[3] == 1 && d % 2 == 0 && a.k.s[2] <= 2 * d;
  for (int64_t first = 0; first < a.M; first += kAttentionChunk) {
    const int64_t keys = least(kAttentionChunk, a.M - first);
    Keys kv{w.k, ld, w.v, ld};
    if (in_place) {
      kv.k = static_cast<const uint16_t*>(a.k.data) + b * a.k.s[0] + h * a.k.s[1] + first * a.k.s[2];
      kv.stride = a.k.s[2];
    } else {
      pairs_in(w.k, ld, a.k, b, h, first, keys, d, prepared ? &of_k : nullptr, w.rows, w.scratch);
    }
    interleaved_in(w.v, ld, a.v, b, h, first, keys, d);
    Ahead ahead;
    if (first + keys < a.M) {
      const int64_t more = least(kAttentionChunk, a.M - first - keys);
      ahead.add(a.k, b, h, first + keys, more, d);
      ahead.add(a.v, b, h, first + keys, more, d);
    } else {
      ahead.add(a.out, b, h, tiles.first(tile), tiles.first(tile + count) - tiles.first(tile), d);
      if (next_head >= 0) {
        const int64_t nb = next_head / a.H, nh = next_head % a.H, start = tiles.first(next_tile);
        ahead.add(a.q, nb, nh, start, least(kAttentionRun, a.N - start), d);
        if (next_head != head || a.M > kAttentionChunk) {
          ahead.add(a.k, nb, nh, 0, least(kAttentionChunk, a.M), d);
          ahead.add(a.v, nb, nh, 0, least(kAttentionChunk, a.M), d);
        }
      }
    }
    ahead.over(count * ((keys + kRows - 1) / kRows + (keys + kKeys - 1) / kKeys * ((d + kRows - 1) / kRows)));
    for (int64_t i = 0; i < count; ++i) {
      const Tile t{w.q + i * ld * kQueries, w.o + i * ld * kQueries, w.top + i * kQueries, w.total + i * kQueries};
      attend(tiles.size(tile + i), t, kv, keys, d, a.scale * kLog2e, w.scores, first == 0, ahead);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    float* total = w.total + i * kQueries;
    for (int64_t l = 0; l < kQueries; ++l) total[l] = 1.0f / total[l];
    tile_out(a.out, b, h, tiles.first(tile + i), tiles.size(tile + i), d, w.o + i * ld * kQueries, total, w.rows, ld);
  }
}

}  // namespace

void attention_forward(const AttentionForward& a) {
  if (a.q.dtype != kBF16 || a.k.dtype != kBF16 || a.v.dtype != kBF16 || a.stats)
    return FASTDIFF_FALLBACK::attention_forward(a);
  const int64_t tiles = Tiles(a.N).count, ld = rounded(a.d, 16);
  const int64_t most = kAttentionRun / kQueries, held = least(tiles, most) * kQueries;
  const double flops = 4.0 * static_cast<double>(a.B * a.H * a.N) * static_cast<double>(a.M * a.d);
  on_threads(a.B * a.H * tiles, a.slots, static_cast<int64_t>(flops / 16),
             [&](int64_t slot, int64_t begin, int64_t end) {
               Workspace w;
               const int64_t chunk = least(a.M, kAttentionChunk) * ld;
               w.q = a.workspace + slot * a.per_slot;
               w.o = w.q + held * ld;
               w.top = w.o + held * ld;
               w.total = w.top + held;
               w.rows = w.total + held;
               w.scores = w.rows + kQueries * ld;
               w.k = reinterpret_cast<uint16_t*>(w.scores + kKeys * kQueries);
               w.v = reinterpret_cast<uint16_t*>(w.scores + kKeys * kQueries + chunk);
               w.scratch = w.scores + kKeys * kQueries + 2 * chunk;
               for (int64_t i = begin; i < end;) {
                 const int64_t tile = i % tiles, count = least(least(most, tiles - tile), end - i);
                 const int64_t next = i + count;
                 run(a, i / tiles, tile, count, w, next < end ? next / tiles : -1, next % tiles);
                 i = next;
               }
             });
}

}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
