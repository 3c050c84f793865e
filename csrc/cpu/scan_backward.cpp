// Backward pass of the selective scan. With e the gradient of the state h (of everything later, and of y by C):
//   e <- e + C gy;  dC = sum_d gy h;  dB = sum_d e t u;  d(t u) = sum_n e B;  q = e a h_prev = d(t A);  e <- e a
//   dt = u sum_n e B + sum_n q A;  dA = sum q t;  du = t sum_n e B + D gy;  ddelta = dt softplus'(delta)
// and with a gate gy = gout silu(z), dz = gout y silu'(z).
//
// Floor: per state and step the exp (10 operations) and 2 multiply-adds that recompute h, then 8 for the gradients: 20
// operations on the FMA ports against 13 forward.
//
// Mapping: as forward, chunks of 32 steps taken from the last to the first, each recomputed from its saved state.
// Within a chunk the states go in groups whose h and a of all 32 steps stay in L1 (4 states: 32 KB with the sums
// below), so no exp is done twice. dB and dC are sums over channels: lanes of one vector and vectors of the task are
// added up per step and state first (L1), then over the lanes once per task and tile, into a workspace per task; a
// second pass adds the tasks of a sample in order. dA, dD and the gradient of the bias are summed over steps in the
// task, over samples, in order, in that second pass. Hence the same bits on every run and any number of threads.
#include "scan_tile.h"

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_ISA {
namespace {

constexpr int kGroup = 4;  // states at once
constexpr int kAhead =
    8;  // lines asked for per step: 32 of each of four inputs and three outputs, and the saved states
constexpr int kPerPass = 2;  // of these, in each of the first four groups of states

// One vector of channels over one chunk.
struct Sweep {
  int count;
  uint32_t resets;
  const float* dt;           // [kSteps, kWidth]
  const float* u;            // [kSteps, kWidth]
  const float* gy;           // [kSteps, kWidth]
  const float* a;            // [R, kWidth], R = N (* 2)
  const float* b;            // [kSteps, R], or constant: [R, kWidth]
  const float* c;            // likewise
  const float* h;            // [R, kWidth], before the chunk
  float* e;                  // [R, kWidth], the gradient of the state, carried
  float* da;                 // [R, kWidth], added to, as are all below
  float* db;                 // [kSteps, rows of the group, kWidth], or constant: [R, kWidth]
  float* dc;                 // likewise
  float* s1;                 // [kSteps, kWidth]: sum_n e B
  float* s2;                 // [kSteps, kWidth]: sum_n q a
  float* y;                  // [kSteps, kWidth]: sum_n C h, or null
  int ld;                    // R
  bool first;                // db and dc hold nothing yet
  const void* const* ahead;  // kPerPass lines per step
};

// States of the group in every step of the chunk.
struct Trail {
  alignas(64) float h[(kSteps + 1) * kGroup * kWidth];
  alignas(64) float a[kSteps * kGroup * kWidth];
};

template <bool kConstant>
inline vf coefficient(const float* p, int ld, int step, int n) {
  return kConstant ? load(p + n * kWidth) : splat(p[step * ld + n]);
}

template <int NB, bool kNear, bool kConstB, bool kConstC>
inline void replay(const Sweep& s, Trail* trail, int n) {
  vf h[NB], a[NB];
  for (int j = 0; j < NB; ++j) {
    h[j] = load(s.h + (n + j) * kWidth), a[j] = load(s.a + (n + j) * kWidth);
    store(trail->h + j * kWidth, h[j]);
  }
  for (int i = 0; i < s.count; ++i) {
    const vf d = load(s.dt + i * kWidth), x = d * load(s.u + i * kWidth);
    float *ph = trail->h + (i + 1) * NB * kWidth, *pa = trail->a + i * NB * kWidth;
    if (s.resets >> i & 1)
      for (int j = 0; j < NB; ++j) h[j] = vf{};
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) {
      const vf w = decay_of<kNear>(d, a[j]);
      h[j] = madd(w, h[j], x * coefficient<kConstB>(s.b, s.ld, i, n + j));
      store(pa + j * kWidth, w), store(ph + j * kWidth, h[j]);
    }
    if (s.y) {
      vf y = load(s.y + i * kWidth);
      for (int j = 0; j < NB; ++j) y = madd(coefficient<kConstC>(s.c, s.ld, i, n + j), h[j], y);
      store(s.y + i * kWidth, y);
    }
  }
}

template <int NB, bool kFirst, bool kConstB, bool kConstC>
inline void rewind(const Sweep& s, const Trail& trail, int n) {
  vf e[NB], da[NB], a[NB];
  for (int j = 0; j < NB; ++j) {
    e[j] = load(s.e + (n + j) * kWidth), da[j] = load(s.da + (n + j) * kWidth), a[j] = load(s.a + (n + j) * kWidth);
  }
  for (int i = s.count - 1; i >= 0; --i) {
    const vf d = load(s.dt + i * kWidth), x = d * load(s.u + i * kWidth), g = load(s.gy + i * kWidth);
    const float *before = trail.h + i * NB * kWidth, *h = before + NB * kWidth, *w = trail.a + i * NB * kWidth;
    const bool reset = s.resets >> i & 1;
    for (int j = 0; j < kPerPass; ++j) __builtin_prefetch(s.ahead[i * kPerPass + j]);
    vf s1 = load(s.s1 + i * kWidth), s2 = load(s.s2 + i * kWidth);
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) {
      const int r = n + j;
      float* pc = kConstC ? s.dc + r * kWidth : s.dc + (i * NB + j) * kWidth;
      float* pb = kConstB ? s.db + r * kWidth : s.db + (i * NB + j) * kWidth;
      const vf full = madd(coefficient<kConstC>(s.c, s.ld, i, r), g, e[j]);
      const vf hj = load(h + j * kWidth);
      store(pc, kFirst && !kConstC ? g * hj : madd(g, hj, load(pc)));
      store(pb, kFirst && !kConstB ? full * x : madd(full, x, load(pb)));
      s1 = madd(full, coefficient<kConstB>(s.b, s.ld, i, r), s1);
      e[j] = full * load(w + j * kWidth);
    }
    if (reset) {
      for (int j = 0; j < NB; ++j) e[j] = vf{};
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) {
        const vf q = e[j] * load(before + j * kWidth);
        s2 = madd(q, a[j], s2);
        da[j] = madd(q, d, da[j]);
      }
    }
    store(s.s1 + i * kWidth, s1), store(s.s2 + i * kWidth, s2);
  }
  for (int j = 0; j < NB; ++j) store(s.e + (n + j) * kWidth, e[j]), store(s.da + (n + j) * kWidth, da[j]);
}

template <int NB, bool kConstB, bool kConstC>
inline void both(const Sweep& s, Trail* trail, int n, bool near) {
  near ? replay<NB, true, kConstB, kConstC>(s, trail, n) : replay<NB, false, kConstB, kConstC>(s, trail, n);
  s.first ? rewind<NB, true, kConstB, kConstC>(s, *trail, n) : rewind<NB, false, kConstB, kConstC>(s, *trail, n);
}

template <int NB>
inline void group(const Scan& a, const Sweep& s, Trail* trail, int n, bool near) {
  if (a.constant_b)
    a.constant_c ? both<NB, true, true>(s, trail, n, near) : both<NB, true, false>(s, trail, n, near);
  else
    a.constant_c ? both<NB, false, true>(s, trail, n, near) : both<NB, false, false>(s, trail, n, near);
}

// One complex state, rows r and r + 1.
template <bool kNear>
inline void group_complex(const Scan& p, const Sweep& s, Trail* trail, int r) {
  const vf re = load(s.a + r * kWidth), im = load(s.a + (r + 1) * kWidth);
  const auto b = [&](int i, int part) {
    return p.constant_b ? coefficient<true>(s.b, s.ld, i, r + part) : coefficient<false>(s.b, s.ld, i, r + part);
  };
  const auto c = [&](int i, int part) {
    return p.constant_c ? coefficient<true>(s.c, s.ld, i, r + part) : coefficient<false>(s.c, s.ld, i, r + part);
  };
  const vf two = splat(2.0f);
  vf hr = load(s.h + r * kWidth), hi = load(s.h + (r + 1) * kWidth);
  store(trail->h, hr), store(trail->h + kWidth, hi);
  for (int i = 0; i < s.count; ++i) {
    const vf d = load(s.dt + i * kWidth), x = d * load(s.u + i * kWidth);
    if (s.resets >> i & 1) hr = hi = vf{};
    const Complex w = decay_of<kNear>(d, re, im);
    const vf next = madd(w.re, hr, madd(-w.im, hi, x * b(i, 0)));
    hi = madd(w.re, hi, madd(w.im, hr, x * b(i, 1)));
    hr = next;
    store(trail->a + i * 2 * kWidth, w.re), store(trail->a + (i * 2 + 1) * kWidth, w.im);
    store(trail->h + (i + 1) * 2 * kWidth, hr), store(trail->h + ((i + 1) * 2 + 1) * kWidth, hi);
    if (s.y) store(s.y + i * kWidth, madd(two * c(i, 0), hr, madd(-two * c(i, 1), hi, load(s.y + i * kWidth))));
  }
  vf er = load(s.e + r * kWidth), ei = load(s.e + (r + 1) * kWidth);
  vf dar = load(s.da + r * kWidth), dai = load(s.da + (r + 1) * kWidth);
  const auto add = [&](float* sums, bool constant, int i, int part, vf value) {
    float* at = constant ? sums + (r + part) * kWidth : sums + (i * 2 + part) * kWidth;
    store(at, s.first && !constant ? value : load(at) + value);
  };
  for (int i = s.count - 1; i >= 0; --i) {
    const vf d = load(s.dt + i * kWidth), x = d * load(s.u + i * kWidth), g = two * load(s.gy + i * kWidth);
    const float *before = trail->h + i * 2 * kWidth, *h = before + 2 * kWidth, *w = trail->a + i * 2 * kWidth;
    add(s.dc, p.constant_c, i, 0, g * load(h));
    add(s.dc, p.constant_c, i, 1, -g * load(h + kWidth));
    er = madd(g, c(i, 0), er), ei = madd(-g, c(i, 1), ei);
    add(s.db, p.constant_b, i, 0, er * x);
    add(s.db, p.constant_b, i, 1, ei * x);
    store(s.s1 + i * kWidth, madd(er, b(i, 0), madd(ei, b(i, 1), load(s.s1 + i * kWidth))));
    if (s.resets >> i & 1) {
      er = ei = vf{};
      continue;
    }
    // The gradient of h_prev is e conj(a); that of x = t A is e conj(a h_prev).
    const vf wr = load(w), wi = load(w + kWidth), pr = load(before), pi = load(before + kWidth);
    const vf next = madd(er, wr, ei * wi);
    ei = madd(ei, wr, -er * wi);
    er = next;
    const vf qr = madd(er, pr, ei * pi), qi = madd(ei, pr, -er * pi);
    dar = madd(qr, d, dar), dai = madd(qi, d, dai);
    // a's real part carries log2 e, which finish() takes back out of the sum.
    store(s.s2 + i * kWidth, madd(qr, re, madd(qi, im * splat(kLog2e), load(s.s2 + i * kWidth))));
  }
  store(s.e + r * kWidth, er), store(s.e + (r + 1) * kWidth, ei);
  store(s.da + r * kWidth, dar), store(s.da + (r + 1) * kWidth, dai);
}

// Sums over the lanes of [kSteps, width, kWidth], into rows r .. r + width of partial [L, rows].
inline void flush(float* sums, int width, const Steps& s, float* partial, int rows, int r) {
  alignas(64) float flat[kSteps * kGroup];
  const int used = (s.count * width + kWidth - 1) / kWidth * kWidth;
  for (int j = s.count * width; j < used; ++j) store(sums + j * kWidth, vf{});
  for (int j = 0; j < used; j += kWidth) {
    vf v[kWidth];
    for (int i = 0; i < kWidth; ++i) v[i] = load(sums + (j + i) * kWidth);
    store(flat + j, sum_each(v));
  }
  for (int i = 0; i < s.count; ++i)
    for (int j = 0; j < width; ++j) partial[s.position[i] * rows + r + j] = flat[i * width + j];
}

// Tiles of one vector of channels.
struct Tiles {
  alignas(64) float raw[kTile], dt[kTile], u[kTile], gy[kTile], z[kTile], gout[kTile], y[kTile], s1[kTile], s2[kTile];
  bool near;
};

inline void prepare(const ScanBackward& a, const Task& t, int64_t k, int v, const Parameters& p, const Steps& s,
                    Tiles* w) {
  w->near = fetch_delta(w->raw, w->dt, a, t, k, v, p.bias, s) * p.reach[v] < 125.0f;
  fetch(w->u, a.u, t, v, s);
  fetch(w->gout, a.grad_out, t, v, s);
  if (a.z.data) fetch(w->z, a.z, t, v, s);
  for (int i = 0; i < s.count; ++i) {
    vf g = load(w->gout + i * kWidth);
    if (a.z.data) {
      const vf x = load(w->z + i * kWidth);
      g *= x * sigmoid(x);
    }
    store(w->gy + i * kWidth, g);
  }
  memset(w->s1, 0, sizeof w->s1), memset(w->s2, 0, sizeof w->s2), memset(w->y, 0, sizeof w->y);
}

// What follows once all states of the chunk are through: du, ddelta, dz, and the sums over steps.
inline void finish(const ScanBackward& a, const Task& t, int64_t k, int v, const Parameters& p, const Steps& s,
                   Tiles* w, float* dskip, float* dbias) {
  const vf skip = load(p.skip + v * kWidth);
  vf sum_skip = {}, sum_bias = {};
  for (int i = s.count - 1; i >= 0; --i) {
    const int o = i * kWidth;
    const vf s1 = load(w->s1 + o), u = load(w->u + o), g = load(w->gy + o), d = load(w->dt + o), raw = load(w->raw + o);
    if (a.z.data) {
      vf y = load(w->y + o);
      if (a.skip.data) y = madd(skip, u, y);
      const vf z = load(w->z + o), gate = sigmoid(z);
      store(w->z + o, load(w->gout + o) * y * gate * madd(z, splat(1.0f) - gate, splat(1.0f)));
    }
    vf du = s1 * d;
    if (a.skip.data) du = madd(skip, g, du), sum_skip = madd(g, u, sum_skip);
    vf dd = madd(s1, u, load(w->s2 + o) * splat(kLn2));
    if (a.softplus) dd = raw > splat(20.0f) ? dd : dd * sigmoid(raw);
    sum_bias += dd;
    store(w->s1 + o, du), store(w->s2 + o, dd);
  }
  store(dskip + v * kWidth, load(dskip + v * kWidth) + sum_skip);
  store(dbias + v * kWidth, load(dbias + v * kWidth) + sum_bias);
  const auto back = [&](const Strided& m, int64_t extra, int l, const float* tile) {
    scatter(m, t.b * m.s[0] + extra + t.channel(v) * m.s[l + 1], tile, m.s[l], m.s[l + 1], s, t.cols(v));
  };
  if (a.z.data && a.dz.data) back(a.dz, 0, 1, w->z);
  back(a.ddelta, k * a.ddelta.s[1], 2, w->s2);
  if (k > 0) {  // every direction adds to what those before left
    fetch(w->z, a.du, t, v, s);
    for (int i = 0; i < s.count; ++i) store(w->s1 + i * kWidth, load(w->z + i * kWidth) + load(w->s1 + i * kWidth));
  }
  back(a.du, 0, 1, w->s1);
}

// A sum of as many terms as there are steps loses a digit for every factor of ten: what accumulated over kFold chunks
// is added to a total and starts from zero again, so that no sum is longer than 32 kFold or L / (32 kFold).
constexpr int64_t kFold = 8;

inline void fold(float* total, float* sums, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    store(total + i, load(total + i) + load(sums + i));
    store(sums + i, vf{});
  }
}

inline void backward_task(const ScanBackward& a, const Task& t, float* scratch) {
  const int parts = a.complex ? 2 : 1, rows = static_cast<int>(a.N) * parts;
  const int64_t chunks = (a.L + kScanSteps - 1) / kScanSteps, blocks = blocks_of(a);
  const int64_t used = static_cast<int64_t>(t.vectors) * rows * kWidth, full = kScanChannels * rows;
  const size_t bytes = sizeof(float) * static_cast<size_t>(used);
  // Pieces that are powers of two long would share the low bits of their addresses, where a load waits for a store it
  // has nothing to do with: they lie five lines apart. The room for it is what vectors of fewer than 16 lanes leave of
  // the tiles, and those of more than 4 of the lists of lines.
  static_assert((sizeof(Trail) + kVectors * (sizeof(Tiles) + sizeof(Ahead<kAhead>))) / sizeof(float) +
                        2 * kSteps * kGroup * kWidth + 4 * kScanChannels + 21 * 80 <=
                    scan_backward_scratch(0),
                "too little scratch");
  Scratch from{scratch};
  const auto take = [&](int64_t count) { return from.take(count + 80); };
  Parameters p;
  p.a = take(full), p.b = take(full), p.c = take(full);
  float *e = take(full), *da = take(full), *db = take(full), *dc = take(full);
  float *total_a = take(full), *total_b = take(full), *total_c = take(full);
  float *b = take(kScanSteps * rows), *c = take(kScanSteps * rows), *h = take(rows * 16);
  Trail& trail = *reinterpret_cast<Trail*>(take(sizeof(Trail) / sizeof(float)));
  float *sum_b = take(kSteps * kGroup * kWidth), *sum_c = take(kSteps * kGroup * kWidth);
  Tiles* tiles = reinterpret_cast<Tiles*>(take(kVectors * sizeof(Tiles) / sizeof(float)));
  float *dskip = take(kScanChannels), *dbias = take(kScanChannels);
  float *total_skip = take(kScanChannels), *total_bias = take(kScanChannels);
  auto* ahead = reinterpret_cast<Ahead<kAhead>*>(from.next);
  const void* nothing[kSteps * kPerPass];
  for (const void*& line : nothing) line = nothing;
  memset(tiles, 0, sizeof(Tiles) * static_cast<size_t>(t.vectors));  // lanes without a channel stay zero
  for (int64_t k = 0; k < a.K; ++k) {
    fetch_parameters(a, t, k, &p);
    if (a.grad_last.data)
      fetch_rows(e, a.grad_last, t.b * a.grad_last.s[0] + k * a.grad_last.s[1], a, a.grad_last.s[2], a.grad_last.s[3],
                 a.grad_last.s[4], t);
    else
      memset(e, 0, bytes);
    for (float* sums : {da, total_a, db, total_b, dc, total_c}) memset(sums, 0, bytes);
    for (float* sums : {dskip, total_skip, dbias, total_bias}) memset(sums, 0, sizeof(float) * kScanChannels);
    const int64_t slot = (((t.b * a.K + k) * a.G + t.g) * blocks + t.block) * a.L * rows;
    Steps s, next;
    if (a.L > 0) visit(a, t.b, k, (chunks - 1) * kScanSteps, &next);
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      s = next;
      if (chunk > 0) visit(a, t.b, k, (chunk - 1) * kScanSteps, &next);
      for (int v = 0; v < t.vectors; ++v) {
        ahead[v].count = 0;
        if (chunk > 0) {
          look_ahead(&ahead[v], {&a.u, &a.grad_out, &a.z, &a.du, &a.dz}, {&a.delta, &a.ddelta}, t, k, v, next);
          for (int r = 0; r < rows; ++r) ahead[v].add(state_row(a, t, k, chunk - 1, r, v));
        }
        ahead[v].fill();
      }
      if (!a.constant_b) fetch_projection(b, a.Bm, a, t, k, s);
      if (!a.constant_c) fetch_projection(c, a.C, a, t, k, s);
      for (int v = 0; v < t.vectors; ++v) prepare(a, t, k, v, p, s, &tiles[v]);
      for (int r = 0, pass = 0; r < rows; ++pass) {
        const int left = rows - r, width = a.complex ? 2 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        for (int v = 0; v < t.vectors; ++v) {
          Tiles& w = tiles[v];
          for (int j = r; j < r + width; ++j)
            store(h + j * kWidth, channels(state_row(a, t, k, chunk, j, v), t.cols(v)));
          const int o = v * rows * kWidth;
          const Sweep sweep{s.count,
                            s.resets,
                            w.dt,
                            w.u,
                            w.gy,
                            p.a + o,
                            a.constant_b ? p.b + o : b,
                            a.constant_c ? p.c + o : c,
                            h,
                            e + o,
                            da + o,
                            a.constant_b ? db + o : sum_b,
                            a.constant_c ? dc + o : sum_c,
                            w.s1,
                            w.s2,
                            a.z.data ? w.y : nullptr,
                            rows,
                            v == 0,
                            pass < kAhead / kPerPass ? ahead[v].line + pass * kSteps * kPerPass : nothing};
          if (a.complex)
            w.near ? group_complex<true>(a, sweep, &trail, r) : group_complex<false>(a, sweep, &trail, r);
          else if (width == 4)
            group<4>(a, sweep, &trail, r, w.near);
          else if (width == 2)
            group<2>(a, sweep, &trail, r, w.near);
          else
            group<1>(a, sweep, &trail, r, w.near);
        }
        if (!a.constant_b) flush(sum_b, width, s, a.partial_b + slot, rows, r);
        if (!a.constant_c) flush(sum_c, width, s, a.partial_c + slot, rows, r);
        r += width;
      }
      for (int v = 0; v < t.vectors; ++v) finish(a, t, k, v, p, s, &tiles[v], dskip, dbias);
      if (chunk % kFold != 0) continue;
      fold(total_a, da, used);
      if (a.constant_b) fold(total_b, db, used);
      if (a.constant_c) fold(total_c, dc, used);
      fold(total_skip, dskip, kScanChannels), fold(total_bias, dbias, kScanChannels);
    }
    // Rows of sums over steps, one sample's; reduce_rows adds the samples.
    const int64_t height = rows * (1 + a.constant_b + a.constant_c) + 2;
    for (int v = 0; v < t.vectors; ++v) {
      float* out = a.partial_rows + (t.b * a.K + k) * height * a.D + t.channel(v);
      const auto put_rows = [&](const float* sums, int count) {
        for (int r = 0; r < count; ++r, out += a.D) put_channels(out, load(sums + (v * count + r) * kWidth), t.cols(v));
      };
      put_rows(total_a, rows);
      if (a.constant_b) put_rows(total_b, rows);
      if (a.constant_c) put_rows(total_c, rows);
      put_rows(total_skip, 1);
      put_rows(total_bias, 1);
      if (a.dinitial.data)
        for (int r = 0; r < rows; ++r)
          for (int i = 0; i < t.cols(v); ++i)
            store_from_float(a.dinitial.data, a.dinitial.dtype,
                             t.b * a.dinitial.s[0] + k * a.dinitial.s[1] + (t.channel(v) + i) * a.dinitial.s[2] +
                                 r / parts * a.dinitial.s[3] + r % parts * a.dinitial.s[4],
                             e[(v * rows + r) * kWidth + i]);
    }
  }
}

// [K, D, N (, 2)] from row `row` on of the sums of every sample, added in the order of the samples.
inline void reduce_rows(const ScanBackward& a, const Strided& out, int64_t row, int64_t rows, int64_t parts) {
  if (out.data == nullptr) return;
  const int64_t height = a.N * (a.complex ? 2 : 1) * (1 + a.constant_b + a.constant_c) + 2;
  for (int64_t k = 0; k < a.K; ++k)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < a.D; ++d) {
        float sum = 0;
        for (int64_t b = 0; b < a.B; ++b) sum += a.partial_rows[((b * a.K + k) * height + row + r) * a.D + d];
        store_from_float(out.data, out.dtype, k * out.s[0] + d * out.s[1] + r / parts * out.s[2] + r % parts * out.s[3],
                         sum);
      }
}

// Bm or C from the sums of every block of channels, added in the order of the blocks.
inline void reduce_blocks(const ScanBackward& a, const Strided& out, const float* partial) {
  if (out.data == nullptr || a.L == 0) return;
  const int64_t parts = a.complex ? 2 : 1, rows = a.N * parts, blocks = blocks_of(a), size = a.L * rows;
  parallel_ranges(a.B * a.K * a.G * a.L, a.B * a.K * a.G * size * (blocks + 1), [&](int64_t begin, int64_t end) {
    alignas(64) float sum[kRows];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t l = i % a.L, g = i / a.L % a.G, k = i / (a.L * a.G) % a.K, b = i / (a.L * a.G * a.K);
      const float* from = partial + i / a.L * blocks * size + l * rows;
      memset(sum, 0, sizeof(float) * static_cast<size_t>(rows));
      for (int64_t j = 0; j < blocks; ++j, from += size)
        for (int64_t r = 0; r < rows; ++r) sum[r] += from[r];
      const int64_t to = b * out.s[0] + k * out.s[1] + g * out.s[2] + l * out.s[3];
      if (parts == 1) {
        narrow(at(out.data, out.dtype, to), sum, out.dtype, rows, out.s[4]);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r)
        store_from_float(out.data, out.dtype, to + r / 2 * out.s[4] + r % 2 * out.s[5], sum[r]);
    }
  });
}

}  // namespace

void selective_scan_backward(const ScanBackward& a) {
  if (a.D == 0) {
    // No channel: dB and dC are sums of nothing.
    if (!a.constant_b) reduce_blocks(a, a.dB, nullptr);
    if (!a.constant_c) reduce_blocks(a, a.dC, nullptr);
    return;
  }
  on_threads(a.B * a.G * blocks_of(a), a.threads, a.B * a.K * a.D * a.L * (a.N + 1),
             [&](int64_t id, int64_t begin, int64_t end) {
               float* scratch = a.scratch + id * a.scratch_size;
               for (int64_t task = begin; task < end; ++task) backward_task(a, task_of(a, task), scratch);
             });
  const int64_t parts = a.complex ? 2 : 1, rows = a.N * parts;
  int64_t row = rows;
  reduce_rows(a, a.dA, 0, rows, parts);
  if (a.constant_b) reduce_rows(a, a.dB, row, rows, parts), row += rows;
  if (a.constant_c) reduce_rows(a, a.dC, row, rows, parts), row += rows;
  reduce_rows(a, a.dskip, row, 1, 1);
  reduce_rows(a, a.dbias, row + 1, 1, 1);
  if (!a.constant_b) reduce_blocks(a, a.dB, a.partial_b);
  if (!a.constant_c) reduce_blocks(a, a.dC, a.partial_c);
}

}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
