// out = softmax(scale q k^T) v, per head; q and k optionally normalised (RMS, weighted) and rotated on the way in.
//
// q [B, H, N, d], k, v [B, H, M, d], any strides, so a packed [B, N, 3, H, d] is read as it lies; f32, f16, bf16, f32
// arithmetic. Floor: 4 B H N M d flops (two products) and one 2^x per score.
//
// Mapping. One task is a tile of kQueries queries, which sit in vector lanes (attention.h). Its scores against kKeys
// keys, S^T [keys, queries], are computed kRows x 3 vectors at a time in registers and stay in L1; then their running
// maximum, 2^(s - max) (log2(e) is folded into q) and O^T [d, queries] = O^T * alpha + V^T P^T, again kRows x 3 vectors
// at a time. The sum and the product with V of kKeys keys start from zero and are added to what the keys before gave,
// so that rounding grows with kKeys + M / kKeys and not with M. Tiles of one head that a thread owns go through the
// keys together, kAttentionChunk keys at a time, so that these are widened (16-bit types, odd strides) or normalised
// once per run of tiles and stay in L2. A query's arithmetic depends on M and d alone: not on the batch, the threads,
// or the other queries of its tile.
//
// Measured, AVX-512, one thread, GFLOP/s of a peak of 189, at [8,16,256,72] / [2,16,1024,72] / [1,8,4096,64]:
//   first version                                               122 / 155 / 163
//   rows asked for ahead (next head's q, k, v, and out)         145 / 164 / 167
//   no single-vector tile, accumulators in place, finer asking  155 / 164 / 167
// Two threads: 303 / 324 / 336 of 377. Of the time at N = 1024, both products take 80 % at about the speed of the
// multipliers, 2^x and the sum 6 %, the maximum and the stores of the scores 2 %; at N = 256 transposing q and out
// takes 3 % and waiting for memory the rest.
#include "attention.h"

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_ISA {
namespace {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kInfinity = __builtin_inff();

struct Tile {          // of queries
  float *q, *o;        // [ld, kQueries] each, transposed
  float *top, *total;  // [kQueries]: the running maximum (times log2 e) and sum
};

// All keys of one block, for V vectors of queries.
template <int V>
inline void attend(const Tile& t, const Rows& k, const Rows& v, int64_t keys, int64_t d, float* scores, bool fresh,
                   Ahead& ahead) {
  for (int64_t first = 0; first < keys; first += kKeys, fresh = false) {
    const int64_t n = least(kKeys, keys - first);
    vf top[V];
    for (int i = 0; i < V; ++i) top[i] = load(t.top + i * kWidth);
    for (int64_t j = 0; j < n; j += kRows) {
      ahead.step();
      vf s[kRows][V] = {};
      multiply<kRows, V, true>(d, k.p + (first + j) * k.stride, k.stride, n - j, t.q, kQueries, s);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
          store(scores + (j + r) * kQueries + i * kWidth, s[r][i]);
          top[i] = larger(s[r][i], top[i]);  // a repeated key repeats its score
        }
    }
    vf alpha[V], base[V], total[V] = {};
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      base[i] = top[i] == -kInfinity ? vf{} : top[i];  // -inf - -inf is NaN, but 2^-inf is 0
      alpha[i] = exp2(load(t.top + i * kWidth) - base[i]);
      store(t.top + i * kWidth, top[i]);
    }
    for (int64_t j = 0; j < n; ++j) {
      float* row = scores + j * kQueries;
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) {
        const vf p = exp2(load(row + i * kWidth) - base[i]);
        store(row + i * kWidth, p);
        total[i] += p;
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
      multiply<kRows, V, false>(n, v.p + first * v.stride + c, v.stride, kRows, scores, kQueries, o);
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

inline void attend(int64_t queries, const Tile& t, const Rows& k, const Rows& v, int64_t keys, int64_t d, float* scores,
                   bool fresh, Ahead& ahead) {
  if (queries > 2 * kWidth) return attend<3>(t, k, v, keys, d, scores, fresh, ahead);
  if (queries > kWidth) return attend<2>(t, k, v, keys, d, scores, fresh, ahead);
  attend<1>(t, k, v, keys, d, scores, fresh, ahead);
}

struct Workspace {  // of one thread; sizes as in attention_workspace (fastdiff.h)
  float *q, *o, *top, *total, *rows, *scores, *k, *v, *scratch;
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
    tile_in(w.q + i * ld * kQueries, a.q, b, h, tiles.first(tile + i), tiles.size(tile + i), d, a.scale * kLog2e,
            w.rows, ld, a.q_weight || rotated ? &of_q : nullptr, w.scratch);
    for (int64_t l = 0; l < kQueries; ++l) w.top[i * kQueries + l] = -kInfinity, w.total[i * kQueries + l] = 0;
  }
  for (int64_t first = 0; first < a.M; first += kAttentionChunk) {
    const int64_t keys = least(kAttentionChunk, a.M - first);
    const Rows k = rows_of(a.k, b, h, first, keys, d, w.k, ld, a.k_weight || rotated ? &of_k : nullptr, w.scratch);
    const Rows v = rows_of(a.v, b, h, first, keys, d, w.v, ld, nullptr, w.scratch);
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
      attend(tiles.size(tile + i), t, k, v, keys, d, w.scores, first == 0, ahead);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = tiles.first(tile + i), n = tiles.size(tile + i);
    float *top = w.top + i * kQueries, *total = w.total + i * kQueries;
    if (a.stats)
      for (int64_t l = 0; l < n; ++l) {
        float* to = a.stats + 2 * (head * a.N + first + l);
        to[0] = top[l], to[1] = total[l];
      }
    for (int64_t l = 0; l < kQueries; ++l) total[l] = 1.0f / total[l];
    tile_out(a.out, b, h, first, n, d, w.o + i * ld * kQueries, total, w.rows, ld);
  }
}

}  // namespace

void attention_forward(const AttentionForward& a) {
  const int64_t tiles = Tiles(a.N).count, ld = rounded(a.d, 16);
  const int64_t most = kAttentionRun / kQueries, held = least(tiles, most) * kQueries;
  const double flops = 4.0 * static_cast<double>(a.B * a.H * a.N) * static_cast<double>(a.M * a.d);
  on_threads(a.B * a.H * tiles, a.slots, static_cast<int64_t>(flops / 16),
             [&](int64_t slot, int64_t begin, int64_t end) {
               Workspace w;
               w.q = a.workspace + slot * a.per_slot;
               w.o = w.q + held * ld;
               w.top = w.o + held * ld;
               w.total = w.top + held;
               w.rows = w.total + held;
               w.scores = w.rows + kQueries * ld;
               w.k = w.scores + kKeys * kQueries;
               w.v = w.k + least(a.M, kAttentionChunk) * ld;
               w.scratch = w.v + least(a.M, kAttentionChunk) * ld;
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
