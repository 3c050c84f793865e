// Selective scan (Gu & Dao 2023, "Mamba", eq. 2 and algorithm 2): h <- exp(t A) h + t B u, y = <C, h> + D u, gated.
//
// Floor: per state and step one exp and three multiply-adds; the operands are read once. At N = 16 a channel's step
// costs 16 exps and four memory accesses, so it is the FMA ports that count: 8 + 2 operations for the exp (scan_tile.h)
// and 3 for the rest, 6.5 cycles per vector of states on two 512-bit ports.
//
// Mapping: a lane is a channel, its states stay in registers, and nothing is ever reduced over lanes. A task is 64
// channels of one group of one sample for all steps, in tiles of 32 steps that stay in L1: B and C of the tile are
// fetched once for the 64 channels, u and delta per vector (transposed in registers where the steps are what is
// contiguous), then N states run through the tile in groups that fit the registers. The order of the steps is a table
// of positions per tile: a permuted scan copies nothing. K directions follow one another within the task, each adding
// to what the one before left in `out`.
//
// Measured at (2, 768, 1024, 16), float32: 3.3 ms on two threads and 6.4 on one, where a loop of nothing but the exps
// and multiply-adds takes 4.3 to 4.7 on one (csrc/cpu/scan_tile.h, decay) and 13 operations at the peak of the FMA
// ports 3.3. What gained: asking for the next tile ahead (Ahead); with softplus and gate, an exp without the edge cases
// that cannot occur and a reciprocal without a division (9.5 -> 8.3 ms). What did not: scalef for the exponent (4 %,
// one instruction set), Estrin, more accumulators for y, smaller groups.
#include "scan_tile.h"

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_ISA {
namespace {

// States in registers at once. Measured at N = 16 with AVX-512 only, where 16 of the 32 registers beat 8 and 4; the 4
// for instruction sets of 16 registers follows from their number (4 states, 4 decays, temporaries) and was not
// measured.
constexpr int kGroup = kWidth == 16 ? 16 : 4;
constexpr int kAhead = 5;  // lines asked for in a step: 32 of each of u, delta, z and out, and a saved state

// One vector of channels over one tile.
struct Sweep {
  int count;
  uint32_t resets;
  const float* dt;           // [kSteps, kWidth]
  const float* u;            // [kSteps, kWidth]
  float* y;                  // [kSteps, kWidth], added to
  const float* a;            // [N (* 2), kWidth]
  const float* b;            // [kSteps, N (* 2)], or constant: [N (* 2), kWidth]
  const float* c;            // likewise
  float* h;                  // [N (* 2), kWidth]
  int ld;                    // N (* 2)
  const void* const* ahead;  // see Ahead
};

template <bool kConstant>
inline vf coefficient(const float* p, int ld, int step, int n) {
  return kConstant ? load(p + n * kWidth) : splat(p[step * ld + n]);
}

// States n .. n + NB.
template <int NB, bool kNear, bool kConstB, bool kConstC>
inline void sweep(const Sweep& s, int n) {
  vf h[NB], a[NB];
  for (int j = 0; j < NB; ++j) h[j] = load(s.h + (n + j) * kWidth), a[j] = load(s.a + (n + j) * kWidth);
  for (int i = 0; i < s.count; ++i) {
    const vf d = load(s.dt + i * kWidth), x = d * load(s.u + i * kWidth);
    vf y = load(s.y + i * kWidth);
    if (n == 0)
      for (int j = 0; j < kAhead; ++j) __builtin_prefetch(s.ahead[i * kAhead + j]);
    if (s.resets >> i & 1)
      for (int j = 0; j < NB; ++j) h[j] = vf{};
#pragma GCC unroll 16
    for (int j = 0; j < NB; ++j) {
      h[j] = madd(decay_of<kNear>(d, a[j]), h[j], x * coefficient<kConstB>(s.b, s.ld, i, n + j));
      y = madd(coefficient<kConstC>(s.c, s.ld, i, n + j), h[j], y);
    }
    store(s.y + i * kWidth, y);
  }
  for (int j = 0; j < NB; ++j) store(s.h + (n + j) * kWidth, h[j]);
}

template <int NB, bool kNear, bool kConstB, bool kConstC>
inline void sweep_all(const Sweep& s, int n = 0) {
  for (; n + NB <= s.ld; n += NB) sweep<NB, kNear, kConstB, kConstC>(s, n);
  if constexpr (NB > 1) sweep_all<NB / 2, kNear, kConstB, kConstC>(s, n);
}

// One complex state at a time; y doubles at the end, since <C, h> of the conjugate pair counts twice.
template <bool kNear>
inline void sweep_complex(const Sweep& s, bool const_b, bool const_c) {
  for (int r = 0; r < s.ld; r += 2) {
    const vf re = load(s.a + r * kWidth), im = load(s.a + (r + 1) * kWidth);
    vf hr = load(s.h + r * kWidth), hi = load(s.h + (r + 1) * kWidth);
    for (int i = 0; i < s.count; ++i) {
      const vf d = load(s.dt + i * kWidth), x = d * load(s.u + i * kWidth);
      const vf br = const_b ? coefficient<true>(s.b, s.ld, i, r) : coefficient<false>(s.b, s.ld, i, r);
      const vf bi = const_b ? coefficient<true>(s.b, s.ld, i, r + 1) : coefficient<false>(s.b, s.ld, i, r + 1);
      const vf cr = const_c ? coefficient<true>(s.c, s.ld, i, r) : coefficient<false>(s.c, s.ld, i, r);
      const vf ci = const_c ? coefficient<true>(s.c, s.ld, i, r + 1) : coefficient<false>(s.c, s.ld, i, r + 1);
      if (s.resets >> i & 1) hr = hi = vf{};
      const Complex a = decay_of<kNear>(d, re, im);
      const vf next = madd(a.re, hr, madd(-a.im, hi, x * br));
      hi = madd(a.re, hi, madd(a.im, hr, x * bi));
      hr = next;
      store(s.y + i * kWidth, madd(cr, hr, madd(-ci, hi, load(s.y + i * kWidth))));
    }
    store(s.h + r * kWidth, hr), store(s.h + (r + 1) * kWidth, hi);
  }
  for (int i = 0; i < s.count; ++i) store(s.y + i * kWidth, load(s.y + i * kWidth) * splat(2.0f));
}

template <bool kNear>
inline void sweep_tile(const Scan& a, const Sweep& s) {
  if (a.complex) return sweep_complex<kNear>(s, a.constant_b, a.constant_c);
  if (a.constant_b)
    a.constant_c ? sweep_all<kGroup, kNear, true, true>(s) : sweep_all<kGroup, kNear, true, false>(s);
  else
    a.constant_c ? sweep_all<kGroup, kNear, false, true>(s) : sweep_all<kGroup, kNear, false, false>(s);
}

inline void scan_task(const Scan& a, const Task& t, float* scratch) {
  const int rows = static_cast<int>(a.N) * (a.complex ? 2 : 1);
  const int64_t sums = kScanChannels * rows, tile = kScanSteps * rows;
  Scratch from{scratch};
  Parameters p;
  p.a = from.take(sums), p.b = from.take(sums), p.c = from.take(sums);
  float *h = from.take(sums), *b = from.take(tile), *c = from.take(tile);
  Ahead<kAhead> ahead;
  alignas(64) float raw[kTile] = {}, dt[kTile] = {}, u[kTile] = {}, y[kTile] = {}, z[kTile] = {};
  for (int64_t k = 0; k < a.K; ++k) {
    fetch_parameters(a, t, k, &p);
    if (a.initial.data)
      fetch_rows(h, a.initial, t.b * a.initial.s[0] + k * a.initial.s[1], a, a.initial.s[2], a.initial.s[3],
                 a.initial.s[4], t);
    else
      memset(h, 0, sizeof(float) * static_cast<size_t>(t.vectors * rows * kWidth));
    Steps s, next;
    visit(a, t.b, k, 0, &next);
    for (int64_t first = 0; first < a.L; first += kSteps) {
      s = next;
      if (first + kSteps < a.L) visit(a, t.b, k, first + kSteps, &next);
      if (!a.constant_b) fetch_projection(b, a.Bm, a, t, k, s);
      if (!a.constant_c) fetch_projection(c, a.C, a, t, k, s);
      for (int v = 0; v < t.vectors; ++v) {
        float* state = h + v * rows * kWidth;
        if (a.states)
          for (int r = 0; r < rows; ++r)
            put_channels(state_row(a, t, k, first / kSteps, r, v), load(state + r * kWidth), t.cols(v));
        const float step = fetch_delta(raw, dt, a, t, k, v, p.bias, s);
        fetch(u, a.u, t, v, s);
        memset(y, 0, sizeof y);
        ahead.count = 0;
        const int v1 = v + 1 < t.vectors ? v + 1 : 0;
        look_ahead(&ahead, {&a.u, &a.z, &a.out}, {&a.delta}, t, k, v1, v1 ? s : next);
        const int64_t chunk = first / kSteps + (v1 ? 0 : 1);
        if (a.states && chunk * kSteps < a.L)
          for (int r = 0; r < rows; ++r) ahead.add(state_row(a, t, k, chunk, r, v1));
        ahead.fill();
        const float* pa = p.a + v * rows * kWidth;
        const Sweep w{s.count,
                      s.resets,
                      dt,
                      u,
                      y,
                      pa,
                      a.constant_b ? p.b + v * rows * kWidth : b,
                      a.constant_c ? p.c + v * rows * kWidth : c,
                      state,
                      rows,
                      ahead.line};
        step* p.reach[v] < 125.0f ? sweep_tile<true>(a, w) : sweep_tile<false>(a, w);
        const vf skip = load(p.skip + v * kWidth);
        if (a.skip.data)
          for (int i = 0; i < s.count; ++i)
            store(y + i * kWidth, madd(skip, load(u + i * kWidth), load(y + i * kWidth)));
        if (a.z.data) {
          fetch(z, a.z, t, v, s);
          for (int i = 0; i < s.count; ++i) {
            const vf x = load(z + i * kWidth);
            store(y + i * kWidth, load(y + i * kWidth) * x * sigmoid(x));
          }
        }
        if (k > 0) {
          fetch(raw, a.out, t, v, s);
          for (int i = 0; i < s.count; ++i) store(y + i * kWidth, load(raw + i * kWidth) + load(y + i * kWidth));
        }
        scatter(a.out, t.b * a.out.s[0] + t.channel(v) * a.out.s[2], y, a.out.s[1], a.out.s[2], s, t.cols(v));
      }
    }
    const int parts = a.complex ? 2 : 1;
    for (int v = 0; v < t.vectors; ++v)
      for (int r = 0; r < rows; ++r)
        for (int i = 0; i < t.cols(v); ++i)
          a.last[(((t.b * a.K + k) * a.D + t.channel(v) + i) * a.N + r / parts) * parts + r % parts] =
              h[(v * rows + r) * kWidth + i];
  }
}

}  // namespace

void selective_scan(const Scan& a) {
  if (a.D == 0) return;
  on_threads(a.B * a.G * blocks_of(a), a.threads, a.B * a.K * a.D * a.L * (a.N + 1),
             [&](int64_t id, int64_t begin, int64_t end) {
               float* scratch = a.scratch + id * a.scratch_size;
               for (int64_t task = begin; task < end; ++task) scan_task(a, task_of(a, task), scratch);
             });
}

}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
