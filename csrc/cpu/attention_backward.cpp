// Gradients of softmax(scale q k^T) v, and of the normalisation and rotation in front of it.
//
// With P recomputed from the saved maxima and sums, dP = dO v^T and delta = sum(dO out) per query:
//   dV = P^T dO,   dS = P (dP - delta),   dQ = scale dS k,   dK = scale dS^T q
// P = 2^(s - max) / sum, where the scores s are those of the forward pass to the last bit (each starts from zero and
// adds its d products in order), so that P is the forward's weight however large the scores are. A saved log-sum-exp
// would not do: its rounding, 2^-24 of the maximum, would be an error of the exponent.
// Floor: 10 B H N M d flops (five products, each score once) and one 2^x per score.
//
// Mapping. One task is a head, so that every gradient has one owner: no atomics, one order of summation, whatever the
// threads and the batch. Outer loop over kAttentionBackChunk keys, whose dK and dV stay in L2; inner loop over query
// tiles as in the forward pass: P^T and dS^T [keys, queries] of kKeys keys are made in L1 with queries in lanes
// (-delta is where the sums of dP start, which subtracts it for nothing), dQ^T takes queries in lanes again, dV and dK
// take channels in lanes and read P^T and dS^T element by element. Nothing is transposed but q, dO and dQ.
//
// Measured, AVX-512, one thread: 134 GFLOP/s at [8,16,256,72], 153 at [2,16,1024,72], of a peak of 189. Channels in
// lanes cost 80 / 72 at d = 72 in two products of five. Asking for the next head's rows ahead and copying rows without
// a call into libc gained a tenth at N = 256. Heads are the only parallelism: with fewer heads than threads (B H <
// threads), threads idle.
#include "attention.h"

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_ISA {
namespace {

constexpr float kLog2e = 1.44269504088896341f;

// Of one thread; sizes as in attention_backward_workspace (fastdiff.h). lanes: maxima, 1 / sums, -delta of a tile.
struct Workspace {
  float *dq, *delta, *q, *grad, *q_rows, *grad_rows, *p, *ds, *k, *v, *dk, *dv, *lanes, *scratch;
};

// dst[r, :] += sum_t a[r, t] rows[t, :] for `valid` (<= kRows) rows r and V vectors of channels.
template <int V>
FD_INLINE void add_channels(float* dst, int64_t ld, int64_t valid, const float* a, int64_t depth, const float* rows) {
  vf acc[kRows][V] = {};
  multiply<kRows, V, true>(depth, a, kQueries, valid, rows, ld, acc);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    if (r >= valid) break;
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      float* to = dst + r * ld + i * kWidth;
      store(to, load(to) + acc[r][i]);
    }
  }
}

inline void add_outer(float* dst, int64_t ld, int64_t keys, const float* a, int64_t queries, const float* rows) {
  for (int64_t j = 0; j < keys; j += kRows) {
    int64_t c = 0;
    const int64_t vectors = ld / kWidth;
    for (int64_t left = vectors; left > 0;) {
      const int64_t take = left == 4 ? 2 : least(left, 3);
      if (take == 3)
        add_channels<3>(dst + j * ld + c, ld, keys - j, a + j * kQueries, queries, rows + c);
      else if (take == 2)
        add_channels<2>(dst + j * ld + c, ld, keys - j, a + j * kQueries, queries, rows + c);
      else
        add_channels<1>(dst + j * ld + c, ld, keys - j, a + j * kQueries, queries, rows + c);
      left -= take, c += take * kWidth;
    }
  }
}

// One tile of queries against one block of keys; `n` queries are real.
template <int V>
inline void tile(const Workspace& w, float* dq, const Rows& k, const Rows& v, int64_t keys, int64_t n, int64_t d,
                 bool fresh, Ahead& ahead) {
  const int64_t ld = rounded(d, 16);
  for (int64_t first = 0; first < keys; first += kKeys, fresh = false) {
    const int64_t m = least(kKeys, keys - first);
    for (int64_t j = 0; j < m; j += kRows) {
      vf s[kRows][V];
      float *p = w.p + j * kQueries, *ds = w.ds + j * kQueries;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) s[r][i] = vf{};
      ahead.step();
      multiply<kRows, V, true>(d, k.p + (first + j) * k.stride, k.stride, m - j, w.q, kQueries, s);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
          const vf x = s[r][i] - load(w.lanes + i * kWidth);
          const vf weight = exp2(x > 0.0f ? vf{} : x);  // above 0 only where another instruction set ran forward
          store(p + r * kQueries + i * kWidth, weight * load(w.lanes + kQueries + i * kWidth));
        }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) s[r][i] = load(w.lanes + 2 * kQueries + i * kWidth);
      ahead.step();
      multiply<kRows, V, true>(d, v.p + (first + j) * v.stride, v.stride, m - j, w.grad, kQueries, s);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i)
          store(ds + r * kQueries + i * kWidth, load(p + r * kQueries + i * kWidth) * s[r][i]);
    }
    add_outer(w.dv + first * ld, ld, m, w.p, n, w.grad_rows);
    add_outer(w.dk + first * ld, ld, m, w.ds, n, w.q_rows);
    for (int64_t c = 0; c < d; c += kRows) {
      vf acc[kRows][V] = {};
      float* out = dq + c * kQueries;
      multiply<kRows, V, false>(m, k.p + first * k.stride + c, k.stride, kRows, w.ds, kQueries, acc);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
          float* to = out + r * kQueries + i * kWidth;
          store(to, fresh ? acc[r][i] : load(to) + acc[r][i]);
        }
    }
  }
}

// g, the gradient of a prepared row, becomes that of the row x itself; the weight's gradient is added to dw.
inline void prepare_backward(float* g, const float* x, int64_t token, int64_t d, const Prologue& p, float* dw,
                             float* scratch) {
  if (p.cos) {
    memcpy(scratch, g, static_cast<size_t>(d) * 4);
    rotate(g, scratch, p.cos + token * d, p.sin + token * d, d, p.interleaved, true);
  }
  if (p.weight) {
    const float rstd = root_mean_square(x, d, p.eps);
    vf total{};
    float rest = 0;
    int64_t c = 0;
    for (; c + kWidth <= d; c += kWidth) {
      const vf hat = load(x + c) * rstd, grad = load(g + c), inner = grad * load(p.weight + c);
      store(dw + c, madd(grad, hat, load(dw + c)));
      store(g + c, inner);
      total = madd(inner, hat, total);
    }
    for (; c < d; ++c) {
      const float hat = x[c] * rstd;
      dw[c] = madd(g[c], hat, dw[c]);
      g[c] *= p.weight[c];
      rest = madd(g[c], hat, rest);
    }
    const float mean = (sum(total) + rest) / static_cast<float>(d);
    for (c = 0; c + kWidth <= d; c += kWidth) store(g + c, rstd * (load(g + c) - load(x + c) * rstd * mean));
    for (; c < d; ++c) g[c] = rstd * (g[c] - x[c] * rstd * mean);
  }
}

// Gradient rows of q or k, times scale, through the prologue, into `to`.
inline void finish(float* rows, int64_t ld, const Strided& from, const Strided& to, int64_t b, int64_t h, int64_t first,
                   int64_t count, int64_t d, float scale, const Prologue* p, float* dw, float* scratch) {
  for (int64_t n = 0; n < count; ++n) {
    float* g = rows + n * ld;
    for (int64_t c = 0; c < ld; c += kWidth) store(g + c, load(g + c) * scale);
    if (p) {
      rows_in(scratch + ld, ld, from, b, h, first + n, 1, d);
      prepare_backward(g, scratch + ld, first + n, d, *p, dw, scratch);
    }
  }
  if (to.data) rows_out(to, b, h, first, count, d, rows, ld);
}

inline void head_backward(const AttentionBackward& a, int64_t head, int64_t next, const Workspace& w) {
  const AttentionForward& f = a;
  const int64_t b = head / f.H, h = head % f.H, d = f.d, ld = rounded(d, 16);
  const Prologue q_prologue{f.q_weight, f.cos, f.sin, f.interleaved != 0, f.eps};
  const Prologue k_prologue{f.k_weight, f.cos, f.sin, f.interleaved != 0, f.eps};
  const Prologue* of_q = f.q_weight || f.cos ? &q_prologue : nullptr;
  const Prologue* of_k = f.k_weight || f.cos ? &k_prologue : nullptr;
  const Tiles tiles(f.N);
  float* dq_weight = a.partial ? a.partial + head * d : nullptr;
  float* dk_weight = a.partial ? a.partial + (f.B * f.H + head) * d : nullptr;
  if (a.partial) {
    memset(dq_weight, 0, static_cast<size_t>(d) * 4);
    memset(dk_weight, 0, static_cast<size_t>(d) * 4);
  }
  for (int64_t first = 0; first < f.N; first += kQueries) {
    const int64_t n = least(kQueries, f.N - first);
    rows_in(w.q_rows, ld, f.out, b, h, first, n, d);
    rows_in(w.grad_rows, ld, a.grad, b, h, first, n, d);
    for (int64_t i = 0; i < n; ++i) {
      vf total{};
      for (int64_t c = 0; c < ld; c += kWidth)
        total = madd(load(w.q_rows + i * ld + c), load(w.grad_rows + i * ld + c), total);
      w.delta[first + i] = sum(total);
    }
  }
  for (int64_t key = 0; key < f.M; key += kAttentionBackChunk) {
    const int64_t keys = least(kAttentionBackChunk, f.M - key);
    const Rows k = rows_of(f.k, b, h, key, keys, d, w.k, ld, of_k, w.scratch);
    const Rows v = rows_of(f.v, b, h, key, keys, d, w.v, ld, nullptr, w.scratch);
    memset(w.dk, 0, static_cast<size_t>(keys * ld) * 4);
    memset(w.dv, 0, static_cast<size_t>(keys * ld) * 4);
    Ahead ahead;
    if (key + keys < f.M) {
      const int64_t more = least(kAttentionBackChunk, f.M - key - keys);
      ahead.add(f.k, b, h, key + keys, more, d);
      ahead.add(f.v, b, h, key + keys, more, d);
    } else if (next >= 0) {
      const int64_t nb = next / f.H, nh = next % f.H, few = least(f.N, kAttentionRun);
      ahead.add(f.out, nb, nh, 0, few, d);
      ahead.add(a.grad, nb, nh, 0, few, d);
      ahead.add(f.q, nb, nh, 0, few, d);
      ahead.add(f.k, nb, nh, 0, least(f.M, kAttentionBackChunk), d);
      ahead.add(f.v, nb, nh, 0, least(f.M, kAttentionBackChunk), d);
    }
    if (a.dk.data) ahead.add(a.dk, b, h, key, keys, d);
    if (a.dv.data) ahead.add(a.dv, b, h, key, keys, d);
    ahead.over(tiles.count * 2 * ((keys + kRows - 1) / kRows));
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t start = tiles.first(i), n = tiles.size(i);
      rows_in(w.q_rows, ld, f.q, b, h, start, n, d, of_q, w.scratch);
      rows_in(w.grad_rows, ld, a.grad, b, h, start, n, d);
      const int64_t lanes = rounded(n, kWidth);
      memset(w.q_rows + n * ld, 0, static_cast<size_t>((lanes - n) * ld) * 4);
      memset(w.grad_rows + n * ld, 0, static_cast<size_t>((lanes - n) * ld) * 4);
      to_lanes(w.q, w.q_rows, ld, d, lanes, f.scale * kLog2e);
      to_lanes(w.grad, w.grad_rows, ld, d, lanes, 1.0f);
      for (int64_t l = 0; l < kQueries; ++l) {
        const float* stats = f.stats + 2 * (head * f.N + start + (l < n ? l : 0));
        w.lanes[l] = stats[0];
        w.lanes[kQueries + l] = 1.0f / stats[1];
        w.lanes[2 * kQueries + l] = l < n ? -w.delta[start + l] : 0.0f;
      }
      float* dq = w.dq + i * kQueries * ld;
      if (lanes > 2 * kWidth)
        tile<3>(w, dq, k, v, keys, n, d, key == 0, ahead);
      else if (lanes > kWidth)
        tile<2>(w, dq, k, v, keys, n, d, key == 0, ahead);
      else
        tile<1>(w, dq, k, v, keys, n, d, key == 0, ahead);
    }
    finish(w.dk, ld, f.k, a.dk, b, h, key, keys, d, f.scale, of_k, dk_weight, w.scratch);
    if (a.dv.data) rows_out(a.dv, b, h, key, keys, d, w.dv, ld);
  }
  for (int64_t i = 0; i < kQueries; ++i) w.lanes[i] = 1.0f;
  for (int64_t i = 0; i < tiles.count; ++i) {
    const int64_t n = tiles.size(i);
    from_lanes(w.q_rows, ld, w.dq + i * kQueries * ld, d, rounded(n, kWidth), w.lanes);
    finish(w.q_rows, ld, f.q, a.dq, b, h, tiles.first(i), n, d, f.scale, of_q, dq_weight, w.scratch);
  }
}

}  // namespace

void attention_backward(const AttentionBackward& a) {
  const AttentionForward& f = a;
  const int64_t ld = rounded(f.d, 16), keys = least(f.M, kAttentionBackChunk), heads = f.B * f.H;
  const double flops = 10.0 * static_cast<double>(heads * f.N) * static_cast<double>(f.M * f.d);
  on_threads(heads, f.slots, static_cast<int64_t>(flops / 16), [&](int64_t slot, int64_t begin, int64_t end) {
    Workspace w;
    float* next = f.workspace + slot * f.per_slot;
    const auto take = [&](int64_t floats) {
      float* p = next;
      next += rounded(floats, 16);
      return p;
    };
    w.dq = take(rounded(f.N, kQueries) * ld);
    w.delta = take(rounded(f.N, kQueries));
    w.q = take(kQueries * ld), w.grad = take(kQueries * ld);
    w.q_rows = take(kQueries * ld), w.grad_rows = take(kQueries * ld);
    w.p = take(kKeys * kQueries), w.ds = take(kKeys * kQueries);
    w.k = take(keys * ld), w.v = take(keys * ld), w.dk = take(keys * ld), w.dv = take(keys * ld);
    w.lanes = take(3 * kQueries), w.scratch = take(2 * ld);
    for (int64_t head = begin; head < end; ++head) head_backward(a, head, head + 1 < end ? head + 1 : -1, w);
  });
  // Every head's part of the weights' gradients, added in order.
  for (int64_t c = 0; a.partial && c < f.d; ++c) {
    float q = 0, k = 0;
    for (int64_t head = 0; head < heads; ++head)
      q += a.partial[head * f.d + c], k += a.partial[(heads + head) * f.d + c];
    if (a.dq_weight) a.dq_weight[c] = q;
    if (a.dk_weight) a.dk_weight[c] = k;
  }
}

}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
