// What the two passes of the selective scan share: which position a step visits, tiles of 32 steps by one vector of
// channels in either layout, the decay exp(t A), softplus, and sine and cosine for a complex A.
#pragma once
#include <initializer_list>
#include <utility>

#include "isa.h"
#include "math.h"
#include "parallel.h"

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_ISA {
namespace {

constexpr int kSteps = static_cast<int>(kScanSteps);
constexpr int kVectors = static_cast<int>(kScanChannels) / kWidth;  // vectors of channels in one task
constexpr int kRows = static_cast<int>(kScanStates);                // floats of state per channel, at most
constexpr int kTile = kSteps * kWidth;
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

// ------------------------------------------------------------------------------------------------------------- steps

// Steps [first, first + steps) of direction k of sample b: the positions they visit and where the state restarts.
struct Steps {
  int64_t position[kSteps];
  int count;
  int direction;    // positions ascend (1) or descend (-1) by one; 0: any permutation
  uint32_t resets;  // bit i: the state is zero before step i of the tile
};

inline void visit(const Scan& a, int64_t b, int64_t k, int64_t first, Steps* s) {
  s->count = static_cast<int>(a.L - first < kSteps ? a.L - first : kSteps);
  s->direction = a.order ? 0 : a.reverse ? -1 : 1;
  s->resets = 0;
  for (int i = 0; i < s->count; ++i) {
    const int64_t step = a.reverse ? a.L - 1 - first - i : first + i;
    s->position[i] = a.order ? a.order[k * a.L + step] : step;
    if (a.resets && a.resets[b * a.L + s->position[i]]) s->resets |= uint32_t{1} << i;
  }
}

// ------------------------------------------------------------------------------------------------------------- tiles

template <int S, int... I>
inline vf exchange_low(vf a, vf b, std::integer_sequence<int, I...>) {
  return shuffle<((I & S) ? kWidth + I - S : I)...>(a, b);
}
template <int S, int... I>
inline vf exchange_high(vf a, vf b, std::integer_sequence<int, I...>) {
  return shuffle<((I & S) ? kWidth + I : I + S)...>(a, b);
}
template <int S, int... I>
inline vf mix(vf a, vf b, std::integer_sequence<int, I...>) {
  return shuffle<((I & S) ? kWidth + I : I)...>(a, b);
}
template <int S, int... I>
inline vf mix_partner(vf a, vf b, std::integer_sequence<int, I...>) {
  return shuffle<((I & S) ? kWidth + I - S : I + S)...>(a, b);
}
using Lanes = std::make_integer_sequence<int, kWidth>;

// kWidth vectors as the rows of a square; log2(kWidth) rounds of exchanging off-diagonal blocks.
template <int S = kWidth / 2>
inline void transpose(vf* r) {
  for (int i = 0; i < kWidth; ++i) {
    if (i & S) continue;
    const vf a = r[i], b = r[i + S];
    r[i] = exchange_low<S>(a, b, Lanes{}), r[i + S] = exchange_high<S>(a, b, Lanes{});
  }
  if constexpr (S > 1) transpose<S / 2>(r);
}

// Lane i: the sum over the lanes of r[i], in a fixed tree. Three operations a vector; r is overwritten.
template <int S = kWidth / 2>
inline vf sum_each(vf* r) {
  for (int i = 0; i < S; ++i) r[i] = mix<S>(r[i], r[i + S], Lanes{}) + mix_partner<S>(r[i], r[i + S], Lanes{});
  if constexpr (S > 1) return sum_each<S / 2>(r);
  return r[0];
}

// dst[i * ld + c] = src[position[i] * sl + c * sc] for `cols` columns.
template <typename T>
inline void gather(float* dst, int ld, const T* src, int64_t sl, int64_t sc, const Steps& s, int cols) {
  if (sc == 1 || cols == 1) {
    for (int i = 0; i < s.count; ++i) {
      const T* row = src + s.position[i] * sl;
      if (cols == kWidth)
        store(dst + i * ld, load(row));
      else
        widen(dst + i * ld, row, cols);
    }
    return;
  }
  int i = 0;
  if (sl == 1 && s.direction != 0) {
    for (; i + kWidth <= s.count; i += kWidth) {
      const T* base = src + s.position[s.direction > 0 ? i : i + kWidth - 1];
      for (int c0 = 0; c0 < cols; c0 += kWidth) {
        vf r[kWidth];
        for (int c = 0; c < kWidth; ++c) r[c] = c0 + c < cols ? load(base + (c0 + c) * sc) : vf{};
        transpose(r);
        for (int j = 0; j < kWidth; ++j) {
          float* row = dst + (s.direction > 0 ? i + j : i + kWidth - 1 - j) * ld + c0;
          if (cols - c0 >= kWidth)
            store(row, r[j]);
          else
            memcpy(row, &r[j], static_cast<size_t>(cols - c0) * 4);
        }
      }
    }
  }
  for (; i < s.count; ++i)
    for (int c = 0; c < cols; ++c) dst[i * ld + c] = to_float(src[s.position[i] * sl + c * sc]);
}

inline void gather(float* dst, int ld, const Strided& v, int64_t offset, int64_t sl, int64_t sc, const Steps& s,
                   int cols) {
  const char* src = at(v.data, v.dtype, offset);
  if (v.dtype == kF32)
    gather(dst, ld, reinterpret_cast<const float*>(src), sl, sc, s, cols);
  else if (v.dtype == kF16)
    gather(dst, ld, reinterpret_cast<const f16*>(src), sl, sc, s, cols);
  else
    gather(dst, ld, reinterpret_cast<const bf16*>(src), sl, sc, s, cols);
}

// The way back, of a tile of one vector of channels.
template <typename T>
inline void scatter(T* dst, const float* src, int64_t sl, int64_t sc, const Steps& s, int cols) {
  if (sc == 1 || cols == 1) {
    for (int i = 0; i < s.count; ++i) {
      T* row = dst + s.position[i] * sl;
      if (cols == kWidth)
        store(row, load(src + i * kWidth));
      else
        narrow(row, src + i * kWidth, cols);
    }
    return;
  }
  int i = 0;
  if (sl == 1 && s.direction != 0) {
    for (; i + kWidth <= s.count; i += kWidth) {
      T* base = dst + s.position[s.direction > 0 ? i : i + kWidth - 1];
      vf r[kWidth];
      for (int j = 0; j < kWidth; ++j) r[j] = load(src + (s.direction > 0 ? i + j : i + kWidth - 1 - j) * kWidth);
      transpose(r);
      for (int c = 0; c < cols; ++c) store(base + c * sc, r[c]);
    }
  }
  for (; i < s.count; ++i)
    for (int c = 0; c < cols; ++c) dst[s.position[i] * sl + c * sc] = from_float<T>(src[i * kWidth + c]);
}

inline void scatter(const Strided& v, int64_t offset, const float* src, int64_t sl, int64_t sc, const Steps& s,
                    int cols) {
  char* dst = at(v.data, v.dtype, offset);
  if (v.dtype == kF32)
    scatter(reinterpret_cast<float*>(dst), src, sl, sc, s, cols);
  else if (v.dtype == kF16)
    scatter(reinterpret_cast<f16*>(dst), src, sl, sc, s, cols);
  else
    scatter(reinterpret_cast<bf16*>(dst), src, sl, sc, s, cols);
}

// Lines of memory that the next vector of channels will need. They are asked for a few at a time while the current one
// computes: rows far apart are a pattern that no hardware prefetcher follows (measured at (2, 768, 1024, 16), one
// thread, float32: channels last 7.7 -> 6.4 ms, channels first 8.3 -> 6.7; with softplus and gate 14.0 -> 9.8).
template <int kPerStep>
struct Ahead {
  static constexpr int kLines = kSteps * kPerStep;
  const void* line[kLines];
  int count = 0;
  void add(const void* p) {
    if (count < kLines) line[count++] = p;
  }
  // Columns `offset` + [0, cols) of the rows that the steps visit.
  void add(const Strided& m, int64_t offset, int64_t sl, int64_t sc, const Steps& s, int cols) {
    if (m.data == nullptr) return;
    if (sc == 1 || cols == 1) {
      for (int i = 0; i < s.count; ++i) add(at(m.data, m.dtype, offset + s.position[i] * sl));
    } else if (sl == 1 && s.direction != 0) {
      const int64_t low = s.direction > 0 ? s.position[0] : s.position[s.count - 1];
      const int64_t bytes = s.count * dtype_size(m.dtype);
      for (int c = 0; c < cols; ++c)
        for (int64_t o = 0; o < bytes; o += 64) add(at(m.data, m.dtype, offset + low + c * sc) + o);
    }
  }
  void fill() {  // so that asking needs no test
    while (count < kLines) line[count++] = this;
  }
};

// Up to kWidth channels, d apart, as one vector with zeros behind; and back.
inline vf channels(const Strided& v, int64_t offset, int64_t sd, int cols) {
  vf r = {};
  for (int c = 0; c < cols; ++c) r[c] = load_as_float(v.data, v.dtype, offset + c * sd);
  return r;
}
inline vf channels(const float* p, int cols) {
  vf r = {};
  if (cols == kWidth) return load(p);
  memcpy(&r, p, static_cast<size_t>(cols) * 4);
  return r;
}
inline void put_channels(float* p, vf v, int cols) {
  if (cols == kWidth)
    store(p, v);
  else
    memcpy(p, &v, static_cast<size_t>(cols) * 4);
}

// -------------------------------------------------------------------------------------------------------- functions

inline vf vabs(vf v) { return (vf)((vi)v & 0x7fffffff); }

// exp(d A) = 2^(d a2), a2 = A log2 e: n = round(d a2), r = d a2 - n (both from one product that is not rounded where
// there is FMA), a polynomial of degree 5 with p(0) = 1, so that d = 0 and A = 0 give exactly 1 and decays near 1 carry
// no bias, and n added to the exponent. Eight operations on the FMA ports and two integer ones. Relative error of the
// polynomial 9.2e-8; of the whole, measured, 2.1e-7 besides the 6e-8 |d A| that come from rounding a2.
// Needs |d a2| < 125; decay_any takes any d and a2 and returns the same bits there.
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
inline vf decay_polynomial(vf r) {
  vf p = madd(splat(0.001326472731307149f), r, splat(0.009671512991189957f));
  p = madd(p, r, splat(0.05550733581185341f));
  p = madd(p, r, splat(0.24022242426872253f));
  p = madd(p, r, splat(0.6931470036506653f));
  return madd(p, r, splat(1.0f));
}
inline vf decay(vf d, vf a2) {
  const vf shifted = madd(d, a2, splat(kMagic)), n = shifted - splat(kMagic);
  const vf p = decay_polynomial(madd(d, a2, -n));
  return (vf)((vi)p + ((vi)shifted << 23));
}
inline vf decay_any(vf d, vf a2) {
  const vf shifted = madd(d, a2, splat(kMagic)), n = shifted - splat(kMagic), x = d * a2;
  const vf p = decay_polynomial(madd(d, a2, -n));
  const vi k = (vi)shifted - (vi)splat(kMagic), half = k >> 1;
  vf y = p * (vf)((half + 127) << 23) * (vf)((k - half + 127) << 23);
  y = x < splat(-151.0f) ? vf{} : y;
  return x > splat(129.0f) ? splat(std::numeric_limits<float>::infinity()) : y;
}
template <bool kNear>
inline vf decay_of(vf d, vf a2) {
  return kNear ? decay(d, a2) : decay_any(d, a2);
}

// exp(x) for x <= 20, 0 below -86 (where it is less than 5e-38); NaN is left to the caller.
inline vf exp_low(vf x) {
  const vf e = decay(vmin(splat(20.0f), vmax(splat(-86.0f), x)), splat(kLog2e));
  return x < splat(-86.0f) ? vf{} : e;
}

// x where x > 20, else log(1 + exp x); NaN stays.
inline vf softplus(vf x) {
  const vf small = log1p_inside(exp_low(x));
  return x <= splat(20.0f) ? small : x;
}

// 1 / (1 + exp(-x)); NaN stays. The reciprocal of w in [1, 2] is a quadratic (off by 1/99 at most) and two Newton
// steps, 1 ulp: six operations, where the 512-bit division takes the time of 32.
inline vf sigmoid(vf x) {
  const vf e = exp_low(-vabs(x)), w = splat(1.0f) + e;
  vf r = madd(madd(splat(32.0f / 99.0f), w, splat(-144.0f / 99.0f)), w, splat(210.0f / 99.0f));
  r = madd(r, madd(-w, r, splat(1.0f)), r);
  r = madd(r, madd(-w, r, splat(1.0f)), r);
  const vf s = x < vf{} ? e * r : r;
  return x == x ? s : x;
}

// Sine and cosine. x = n pi/2 + r with three constants whose products with n are exact up to n = 2^13; beyond that, and
// for infinity and NaN, libm in double precision, lane by lane. Error about 1 ulp of 1.
inline void sincos(vf x, vf* s, vf* c) {
  constexpr float kFar = 12000.0f;
  const vf shifted = madd(x, splat(0.636619772367581343f), splat(kMagic)), n = shifted - splat(kMagic);
  vf r = madd(n, splat(-1.5703125f), x);
  r = madd(n, splat(-4.837512969970703125e-4f), r);
  r = madd(n, splat(-7.549789948768648e-8f), r);
  const vf rr = r * r;
  vf p = madd(splat(-1.9515295891e-4f), rr, splat(8.3321608736e-3f));
  p = madd(p, rr, splat(-1.6666654611e-1f));
  const vf sine = madd(p * rr, r, r);
  vf q = madd(splat(2.443315711809948e-5f), rr, splat(-1.388731625493765e-3f));
  q = madd(q, rr, splat(4.166664568298827e-2f));
  const vf cosine = madd(q * rr, rr, madd(splat(-0.5f), rr, splat(1.0f)));
  const vi k = (vi)shifted;
  const vi odd = -(k & 1);
  const vf swap_s = (vf)(((vi)cosine & odd) | ((vi)sine & ~odd));
  const vf swap_c = (vf)(((vi)sine & odd) | ((vi)cosine & ~odd));
  *s = (vf)((vi)swap_s ^ ((k & 2) << 30));
  *c = (vf)((vi)swap_c ^ (((k + 1) & 2) << 30));
  const vi far = ~(vabs(x) < splat(kFar));
  bool any = false;
  for (int i = 0; i < kWidth; ++i) any |= far[i] != 0;
  if (!any) return;
  for (int i = 0; i < kWidth; ++i) {
    if (!far[i]) continue;
    (*s)[i] = static_cast<float>(__builtin_sin(static_cast<double>(x[i])));
    (*c)[i] = static_cast<float>(__builtin_cos(static_cast<double>(x[i])));
  }
}

// exp(d A) for A = log2(e)^-1 re + i im.
struct Complex {
  vf re, im;
};
template <bool kNear>
inline Complex decay_of(vf d, vf re, vf im) {
  const vf size = decay_of<kNear>(d, re);
  vf s, c;
  sincos(d * im, &s, &c);
  return {size * c, size * s};
}

// The largest magnitude seen so far; NaN counts as infinite.
inline vf raise(vf most, vf v) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  v = vabs(v) < splat(kInfinity) ? vabs(v) : splat(kInfinity);
  return v > most ? v : most;
}
inline float largest(vf v) {
  float m = 0;
  for (int i = 0; i < kWidth; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// ------------------------------------------------------------------------------------------------------------- tasks

// One sample and up to kScanChannels channels of one group.
struct Task {
  int64_t b, g, block, first;  // first channel
  int count;                   // channels
  int vectors;
  int cols(int v) const { return count - v * kWidth < kWidth ? count - v * kWidth : kWidth; }
  int64_t channel(int v) const { return first + v * kWidth; }
};
inline int64_t blocks_of(const Scan& a) { return (a.D / a.G + kScanChannels - 1) / kScanChannels; }
inline Task task_of(const Scan& a, int64_t index) {
  const int64_t blocks = blocks_of(a), size = a.D / a.G;
  Task t;
  t.block = index % blocks, t.g = index / blocks % a.G, t.b = index / (blocks * a.G);
  t.first = t.g * size + t.block * kScanChannels;
  const int64_t left = size - t.block * kScanChannels;
  t.count = static_cast<int>(left < kScanChannels ? left : kScanChannels);
  t.vectors = (t.count + kWidth - 1) / kWidth;
  return t;
}

// Consecutive pieces of a thread's scratch, each on a line of its own where rows are kWidth or kSteps floats. What
// grows with the number of states lies there, not on the stack: a thread may have no more than a few hundred KB of it.
struct Scratch {
  float* next;
  float* take(int64_t count) {
    float* p = next;
    next += count;
    return p;
  }
};

// Parameters of direction k for one task, a vector per state and vector of channels: row (v * R + r), R = N (* 2).
struct Parameters {
  float* a;  // [vectors * R, kWidth]: A, its real part times log2 e
  float* b;  // constant B
  float* c;  // constant C
  alignas(64) float skip[kVectors * kWidth], bias[kVectors * kWidth];
  float reach[kVectors];  // largest |a| (of a real part)
};

inline void fetch_rows(float* dst, const Strided& m, int64_t offset, const Scan& a, int64_t sd, int64_t sn, int64_t sc,
                       const Task& t) {
  const int parts = a.complex ? 2 : 1, rows = static_cast<int>(a.N) * parts;
  for (int v = 0; v < t.vectors; ++v)
    for (int r = 0; r < rows; ++r)
      store(dst + (v * rows + r) * kWidth,
            channels(m, offset + t.channel(v) * sd + r / parts * sn + r % parts * sc, sd, t.cols(v)));
}

inline void fetch_parameters(const Scan& a, const Task& t, int64_t k, Parameters* p) {
  const int parts = a.complex ? 2 : 1, rows = static_cast<int>(a.N) * parts;
  fetch_rows(p->a, a.A, k * a.A.s[0], a, a.A.s[1], a.A.s[2], a.A.s[3], t);
  if (a.constant_b) fetch_rows(p->b, a.Bm, k * a.Bm.s[0], a, a.Bm.s[1], a.Bm.s[2], a.Bm.s[3], t);
  if (a.constant_c) fetch_rows(p->c, a.C, k * a.C.s[0], a, a.C.s[1], a.C.s[2], a.C.s[3], t);
  for (int v = 0; v < t.vectors; ++v) {
    vf reach = {};
    for (int r = 0; r < rows; r += parts) {
      float* row = p->a + (v * rows + r) * kWidth;
      const vf scaled = load(row) * splat(kLog2e);
      store(row, scaled);
      reach = raise(reach, scaled);
    }
    p->reach[v] = largest(reach);
    for (int which = 0; which < 2; ++which) {
      const Strided& m = which ? a.delta_bias : a.skip;
      const vf x = m.data ? channels(m, k * m.s[0] + t.channel(v) * m.s[1], m.s[1], t.cols(v)) : vf{};
      store((which ? p->bias : p->skip) + v * kWidth, x);
    }
  }
}

// B or C of one tile: [kSteps, N (* 2)].
inline void fetch_projection(float* dst, const Strided& m, const Scan& a, const Task& t, int64_t k, const Steps& s) {
  const int n = static_cast<int>(a.N);
  const int64_t offset = t.b * m.s[0] + k * m.s[1] + t.g * m.s[2];
  if (!a.complex) return gather(dst, n, m, offset, m.s[3], m.s[4], s, n);
  if (m.s[5] == 1 && m.s[4] == 2) return gather(dst, 2 * n, m, offset, m.s[3], 1, s, 2 * n);
  for (int i = 0; i < s.count; ++i)
    for (int r = 0; r < 2 * n; ++r)
      dst[i * 2 * n + r] =
          load_as_float(m.data, m.dtype, offset + s.position[i] * m.s[3] + r / 2 * m.s[4] + r % 2 * m.s[5]);
}

// delta (+ bias) of one vector's tile into raw, and the step size t into dt; returns the largest |t|.
inline float fetch_delta(float* raw, float* dt, const Scan& a, const Task& t, int64_t k, int v, const float* bias,
                         const Steps& s) {
  const Strided& m = a.delta;
  gather(raw, kWidth, m, t.b * m.s[0] + k * m.s[1] + t.channel(v) * m.s[3], m.s[2], m.s[3], s, t.cols(v));
  const vf shift = load(bias + v * kWidth);
  const bool add = a.delta_bias.data != nullptr;
  vf most = {};
  for (int i = 0; i < s.count; ++i) {
    vf x = load(raw + i * kWidth);
    if (add) x += shift;
    store(raw + i * kWidth, x);
    if (a.softplus) x = softplus(x);
    store(dt + i * kWidth, x);
    most = raise(most, x);
  }
  return largest(most);
}

// [B, L, D] operand of one vector's tile.
inline void fetch(float* dst, const Strided& m, const Task& t, int v, const Steps& s) {
  gather(dst, kWidth, m, t.b * m.s[0] + t.channel(v) * m.s[2], m.s[1], m.s[2], s, t.cols(v));
}

// Row n (of N * parts) of the saved states.
inline float* state_row(const Scan& a, const Task& t, int64_t k, int64_t chunk, int64_t row, int v) {
  const int64_t rows = a.N * (a.complex ? 2 : 1), chunks = (a.L + kScanSteps - 1) / kScanSteps;
  return a.states + (((t.b * a.K + k) * chunks + chunk) * rows + row) * a.D + t.channel(v);
}

// What the next tile of one vector of channels reads and writes of u, z, out and delta, or of their like.
template <int kPerStep>
inline void look_ahead(Ahead<kPerStep>* ahead, std::initializer_list<const Strided*> whole,
                       std::initializer_list<const Strided*> by_direction, const Task& t, int64_t k, int v,
                       const Steps& s) {
  for (const Strided* m : whole) ahead->add(*m, t.b * m->s[0] + t.channel(v) * m->s[2], m->s[1], m->s[2], s, t.cols(v));
  for (const Strided* m : by_direction)
    ahead->add(*m, t.b * m->s[0] + k * m->s[1] + t.channel(v) * m->s[3], m->s[2], m->s[3], s, t.cols(v));
}

}  // namespace
}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
