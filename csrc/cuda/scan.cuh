// What the two passes of the selective scan on CUDA share: who holds which states, tiles of 32 steps in shared memory,
// decays, softplus, and sine and cosine for a complex A. scan.cu says why it is done this way.
#pragma once
#include "exp2.cuh"
#include "reduce.cuh"
#include "scan_stage.cuh"

namespace fastdiff {
namespace cuda {
namespace {

constexpr int kSteps = static_cast<int>(kScanSteps);
constexpr int kOwn = 4;           // floats of state that a thread holds
constexpr int kMaxThreads = 256;  // of a block
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

// How an operand's tile comes in, decided from strides and alignment alone.
enum Path : int8_t {
  kAcross,   // neighbouring threads take neighbouring channels (or states)
  kAcross4,  // so do they, four at a time with one load
  kAlong     // neighbouring threads take neighbouring steps
};

// A block serves `channels` channels of one group, one direction and one sample, with `lanes` threads per channel.
struct Plan {
  int rows;                   // floats of state per channel
  int lanes;                  // threads per channel
  int pitch;                  // floats from one row of B or C to the next in shared memory: 4 lanes + 4
  int64_t size, blocks;       // channels of a group, blocks that share them
  int64_t tasks;              // blocks in all
  int64_t segments, segment;  // forward: of L, see scan.cu; steps of one
  int8_t u, delta, z, out, b, c, grad, du, ddelta, dz;
  Ahead ahead_u, ahead_delta, ahead_z, ahead_b, ahead_c, ahead_grad;
  int32_t ahead_state;  // backward: where the next saved state stands in the stage; -1: it is read when it is due
  int32_t stage;        // bytes
  int32_t across;       // lanes, as row_and_column takes them
};

inline int8_t path_of(const Strided& v, int64_t sl, int64_t sc, bool whole) {
  if (v.data == nullptr) return kAcross;
  const int64_t size = dtype_size(v.dtype), bytes = 4 * size;
  if (sc != 1) return sl == 1 ? kAlong : kAcross;
  if (!whole || reinterpret_cast<uintptr_t>(v.data) % bytes != 0) return kAcross;
  int ones = 0;  // more than one: another axis moves by single elements too
  for (const int64_t s : v.s) {
    ones += s == 1;
    if (s != 1 && s * size % bytes != 0) return kAcross;
  }
  return ones == 1 ? kAcross4 : kAcross;
}

// B or C, of a complex A with its pairs, where they are whole, as so many columns.
inline bool pairs(const Scan& a, const Strided& m) { return a.complex && m.s[4] == 2 && m.s[5] == 1; }
inline Strided flat(const Scan& a, Strided m) {
  if (pairs(a, m)) m.s[4] = 1, m.s[5] = 0;
  return m;
}
inline int64_t states_apart(const Scan& a, const Strided& m) {  // 0: not columns at all
  return pairs(a, m) ? 1 : m.s[4] == 1 && a.complex ? 0 : m.s[4];
}

inline Plan plan_of(const Scan& a) {
  Plan p = {};
  p.rows = static_cast<int>(a.N) * (a.complex ? 2 : 1);
  const int channels = static_cast<int>(scan_cuda_channels(p.rows)), per_warp = 32 / channels;
  p.lanes = p.rows > 0 ? (p.rows + kOwn - 1) / kOwn : 1;
  p.lanes = (p.lanes + per_warp - 1) / per_warp * per_warp;
  p.pitch = kOwn * p.lanes + 4;
  p.size = a.D / a.G, p.blocks = (p.size + channels - 1) / channels;
  p.tasks = a.B * a.K * a.G * p.blocks;
  const int64_t tiles = (a.L + kSteps - 1) / kSteps;
  p.segments = scan_cuda_segments(a.L, a.K * a.G * p.blocks),
  p.segment = (tiles + p.segments - 1) / p.segments * kSteps;
  const bool whole = a.G == 1 || p.size % 4 == 0;  // a group's first channel is aligned like the first of all
  p.u = path_of(a.u, a.u.s[1], a.u.s[2], whole), p.delta = path_of(a.delta, a.delta.s[2], a.delta.s[3], whole);
  p.z = path_of(a.z, a.z.s[1], a.z.s[2], whole), p.out = path_of(a.out, a.out.s[1], a.out.s[2], whole);
  const auto projection = [&](const Strided& m, bool constant) {
    return constant ? static_cast<int8_t>(kAcross) : path_of(flat(a, m), m.s[3], states_apart(a, m), p.rows % 4 == 0);
  };
  p.b = projection(a.Bm, a.constant_b), p.c = projection(a.C, a.constant_c);
  return p;
}

// What comes ahead, beside `used` bytes of shared memory. `grad`: the backward pass, which needs the saved states too.
inline void plan_ahead(const Scan& a, const Strided* grad, int64_t used, Plan* p) {
  const int64_t channels = scan_cuda_channels(p->rows), states = kOwn * p->lanes, start = a.G == 1 ? 0 : p->size;
  const auto whole = [&](const Strided& v, int64_t sc) {
    return reserve(v, piece_of(v, sc, start, channels), channels, used, &p->stage);
  };
  p->ahead_u = whole(a.u, a.u.s[2]), p->ahead_delta = whole(a.delta, a.delta.s[3]);
  p->ahead_z = whole(a.z, a.z.s[2]);
  p->ahead_state = -1, p->across = across_of(p->lanes);
  if (grad != nullptr) {
    p->ahead_grad = whole(*grad, grad->s[2]);
    const int64_t bytes = channels * states * static_cast<int64_t>(sizeof(float));
    if (used + p->stage + bytes <= kStageLimit) p->ahead_state = p->stage, p->stage += static_cast<int32_t>(bytes);
  }
  const auto projection = [&](const Strided& m, bool constant) {
    const int bytes = constant ? 0 : piece_of(flat(a, m), states_apart(a, m), 0, states);
    return reserve(m, bytes, states, used, &p->stage);
  };
  p->ahead_b = projection(a.Bm, a.constant_b), p->ahead_c = projection(a.C, a.constant_c);
}

// ------------------------------------------------------------------------------------------------------------- tasks

struct Task {
  int64_t b, k, g, block, first;  // first channel
  int cols;                       // channels
};
template <int kChannels>
FD_D Task task_of(const Scan& a, const Plan& p, int64_t index) {
  Task t;
  int64_t rest;
  split(index, p.blocks, &rest, &t.block);
  split(rest, a.G, &rest, &t.g);
  split(rest, a.K, &t.b, &t.k);
  t.first = t.g * p.size + t.block * kChannels;
  const int64_t left = p.size - t.block * kChannels;
  t.cols = static_cast<int>(left < kChannels ? left : kChannels);
  return t;
}

// Positions of the steps of a tile, and where the state restarts. Two of each, taking turns from tile to tile: the end
// of one tile and the beginning of the next overlap. And where the operands of a task begin, which would cost
// registers.
enum Operand { kU, kDelta, kZ, kB, kC, kGrad, kSums, kOperands };  // kSums: steps in partial_b and partial_c
struct Steps {
  int64_t position[2][kSteps];
  int64_t base[kOperands];
  uint32_t resets[2];
};
static_assert(sizeof(Steps) % 16 == 0, "tiles are read 16 bytes at a time");

// By the first thread. B and C only where they depend on the step.
FD_D void begin_task(const Scan& a, const Task& t, Steps* s) {
  if (threadIdx.x != 0) return;
  s->base[kU] = t.b * a.u.s[0] + t.first * a.u.s[2], s->base[kZ] = t.b * a.z.s[0] + t.first * a.z.s[2];
  s->base[kDelta] = t.b * a.delta.s[0] + t.k * a.delta.s[1] + t.first * a.delta.s[3];
  s->base[kB] = t.b * a.Bm.s[0] + t.k * a.Bm.s[1] + t.g * a.Bm.s[2];
  s->base[kC] = t.b * a.C.s[0] + t.k * a.C.s[1] + t.g * a.C.s[2];
}

// By the first warp. A position outside [0, L), which no permutation holds, is moved to the nearest end: nothing is
// read or written outside the tensors whatever `order` holds, and the host need not look at it.
FD_D void visit(const Scan& a, const Task& t, int64_t first, int count, int turn, Steps* s) {
  if (threadIdx.x >= 32) return;
  const int i = static_cast<int>(threadIdx.x);
  bool fresh = false;
  if (i < count) {
    int64_t at = a.reverse ? a.L - 1 - first - i : first + i;
    if (a.order != nullptr) {
      at = a.order[t.k * a.L + at];
      at = at < 0 ? 0 : at < a.L ? at : a.L - 1;
    }
    s->position[turn][i] = at;
    fresh = a.resets != nullptr && a.resets[t.b * a.L + at] != 0;
  }
  const uint32_t mask = __ballot_sync(kFullWarp, fresh);
  if (i == 0) s->resets[turn] = mask;
}

// ------------------------------------------------------------------------------------------------------------- tiles

FD_D int padded4(int count) { return (count + 3) & ~3; }

FD_D Row element_row(const Strided& m, int64_t offset, int64_t stride) {
  return {static_cast<char*>(m.data) + offset * dtype_size(m.dtype), stride, m.dtype};
}
FD_D float element(const Strided& m, int64_t offset) {
  float v[1];
  read<1, true>(element_row(m, offset, 1), 0, v);
  return v[0];
}
FD_D void put_element(const Strided& m, int64_t offset, float value) {
  const float v[1] = {value};
  write<1>(element_row(m, offset, 1), 0, v);
}

// Calls put(i, c, value) for `width` columns of every step of the tile and, with zeros, of the steps up to a multiple
// of four and the columns from `cols` on. Element (i, c) is at base + position[i] sl + c sc.
// What `ask` can bring comes ahead if there is room; kFours: if not, four columns with one load.
template <bool kFours, typename Put>
FD_D void gather(const Strided& m, int path, int64_t base, int64_t sl, int64_t sc, const int64_t* position, int count,
                 int cols, int width, Put put) {
  const int threads = static_cast<int>(blockDim.x), rows = padded4(count);
  if (kFours && path == kAcross4) {
    const int across = width / 4;
#pragma unroll 2
    for (int e = static_cast<int>(threadIdx.x); e < rows * across; e += threads) {
      const int i = e / across, c = e % across * 4;
      float v[4] = {};
      if (i < count) {
        const int64_t offset = base + position[i] * sl + c;
        if (c + 4 <= cols) {
          read<4, true>(element_row(m, offset, 1), 0, v);
        } else {
#pragma unroll
          for (int j = 0; j < 3; ++j)
            if (c + j < cols) v[j] = element(m, offset + j);
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) put(i, c + j, v[j]);
    }
  } else if (path == kAlong) {
#pragma unroll 4
    for (int e = static_cast<int>(threadIdx.x); e < kSteps * width; e += threads) {
      const int i = e % kSteps, c = e / kSteps;
      if (i < rows) put(i, c, i < count && c < cols ? element(m, base + position[i] * sl + c * sc) : 0.0f);
    }
  } else {
#pragma unroll 4
    for (int e = static_cast<int>(threadIdx.x); e < rows * width; e += threads) {
      const int i = e / width, c = e % width;
      put(i, c, i < count && c < cols ? element(m, base + position[i] * sl + c * sc) : 0.0f);
    }
  }
}

// The place of B or C of a task's first state.
FD_D int64_t projection_base(const Strided& m, const Task& t) { return t.b * m.s[0] + t.k * m.s[1] + t.g * m.s[2]; }

// B or C into shared memory. Of every step, [kSteps, pitch]; constant: of every channel, [channels, pitch].
template <int kChannels, bool kComplex>
FD_D void gather_projection(float* to, const Strided& m, int path, int64_t base, const Plan& p, const int64_t* position,
                            int count) {
  const auto put = [&](int i, int r, float v) { to[i * p.pitch + r] = v; };
  if constexpr (kComplex) {
    if (path == kAcross4) return gather<true>(m, path, base, m.s[3], 1, position, count, p.rows, kOwn * p.lanes, put);
    const int width = kOwn * p.lanes;
    for (int e = static_cast<int>(threadIdx.x); e < padded4(count) * width; e += static_cast<int>(blockDim.x)) {
      const int i = e / width, r = e % width;
      const bool there = i < count && r < p.rows;
      put(i, r, there ? element(m, base + position[i] * m.s[3] + r / 2 * m.s[4] + r % 2 * m.s[5]) : 0.0f);
    }
  } else {
    gather<true>(m, path, base, m.s[3], m.s[4], position, count, p.rows, kOwn * p.lanes, put);
  }
}
template <int kChannels, bool kComplex>
FD_D void gather_constant(float* to, const Strided& m, const Plan& p, const Task& t) {
  const int width = kOwn * p.lanes;
  for (int e = static_cast<int>(threadIdx.x); e < kChannels * width; e += static_cast<int>(blockDim.x)) {
    const int c = e / width, r = e % width, n = kComplex ? r / 2 : r, part = kComplex ? r % 2 : 0;
    const bool there = c < t.cols && r < p.rows;
    to[c * p.pitch + r] = there ? element(m, t.k * m.s[0] + (t.first + c) * m.s[1] + n * m.s[2] + part * m.s[3]) : 0.0f;
  }
}

// What of B or C a tile needs, from the stage or from memory.
template <int kChannels, bool kComplex>
FD_D void bring_projection(float* to, const char* stage, const Ahead& ahead, const Strided& m, bool constant, int path,
                           int64_t base, const Plan& p, const Task& t, const int64_t* position, int count, bool first) {
  if (ahead.bytes > 0)
    unpack(stage, ahead, m.dtype, padded4(count), p.lanes, p.across, to, p.pitch);
  else if (!constant)
    gather_projection<kChannels, kComplex>(to, m, path, base, p, position, count);
  else if (first)
    gather_constant<kChannels, kComplex>(to, m, p, t);
}

// The other way: get(i, c) of every step and channel of the tile to its place.
template <int kChannels, typename Get>
FD_D void scatter(const Strided& m, int path, int64_t base, int64_t sl, int64_t sc, const int64_t* position, int count,
                  int cols, Get get) {
  const int threads = static_cast<int>(blockDim.x);
  if (path == kAcross4 && cols == kChannels) {
    constexpr int kAcrossTile = kChannels / 4;
    for (int e = static_cast<int>(threadIdx.x); e < count * kAcrossTile; e += threads) {
      const int i = e / kAcrossTile, c = e % kAcrossTile * 4;
      float v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = get(i, c + j);
      write<4>(element_row(m, base + position[i] * sl + c, 1), 0, v);
    }
  } else if (path == kAlong) {
    for (int e = static_cast<int>(threadIdx.x); e < kSteps * cols; e += threads) {
      const int i = e % kSteps, c = e / kSteps;
      if (i < count) put_element(m, base + position[i] * sl + c * sc, get(i, c));
    }
  } else {
    for (int e = static_cast<int>(threadIdx.x); e < count * kChannels; e += threads) {
      const int i = e / kChannels, c = e % kChannels;
      if (c < cols) put_element(m, base + position[i] * sl + c * sc, get(i, c));
    }
  }
}

// -------------------------------------------------------------------------------------------------------- functions

// log(1 + exp x) = max(x, 0) + log(1 + e), e = exp -|x|; the logarithm is e times a polynomial that is 1 at 0. Relative
// error 7 + 4/3 |x| units of 2^-24 for negative x, where rounding x itself is |x| units; less for positive, and above
// 17 it is x. Below -87 it is 0. NaN stays.
FD_D float softplus(float x) {
  const float e = exp2_fast(-kLog2e * fabsf(x));
  float p = fmaf(0.005364824552088976f, e, -0.03006579354405403f);
  p = fmaf(p, e, 0.07920453697443008f);
  p = fmaf(p, e, -0.13753803074359894f);
  p = fmaf(p, e, 0.191536545753479f);
  p = fmaf(p, e, -0.24857163429260254f);
  p = fmaf(p, e, 0.3332132399082184f);
  p = fmaf(p, e, -0.49999648332595825f);
  p = fmaf(p, e, 1.0f);
  return fmaf(p, e, x > 0.0f ? x : 0.0f);
}

FD_D float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

FD_D float gated(float y, float z) { return y * z * sigmoid(z); }

// Sine and cosine. x = n pi/2 + r with three constants whose products with n are exact up to n = 2^13; beyond that in
// double, where r is right to 2^-52 |x|, much less than the last place of x. Error about 1 ulp of 1. (CUDA's sincosf
// keeps a table of 1 / (2 pi) on the stack for large arguments.)
FD_D void sine_cosine(float x, float* s, float* c) {
  float r;
  int k;
  if (fabsf(x) < 12000.0f) {
    const float n = rintf(x * 0.636619772367581343f);
    r = fmaf(n, -1.5703125f, x);
    r = fmaf(n, -4.837512969970703125e-4f, r);
    r = fmaf(n, -7.549789948768648e-8f, r);
    k = static_cast<int>(n);
  } else if (fabsf(x) < 1e18f) {
    const double n = rint(static_cast<double>(x) * 0.63661977236758134308);
    r = static_cast<float>(fma(n, -6.123233995736766e-17, fma(n, -1.5707963267948966, static_cast<double>(x))));
    k = static_cast<int>(static_cast<int64_t>(n) & 3);
  } else {
    // Neighbouring floats are more than 2^36 turns apart; infinity and NaN have no sine.
    r = x - x, k = 0;
  }
  const float rr = r * r;
  float p = fmaf(-1.9515295891e-4f, rr, 8.3321608736e-3f);
  p = fmaf(p, rr, -1.6666654611e-1f);
  const float sine = fmaf(p * rr, r, r);
  float q = fmaf(2.443315711809948e-5f, rr, -1.388731625493765e-3f);
  q = fmaf(q, rr, 4.166664568298827e-2f);
  const float cosine = fmaf(q * rr, rr, fmaf(-0.5f, rr, 1.0f));
  const float first = k & 1 ? cosine : sine, second = k & 1 ? sine : cosine;
  *s = k & 2 ? -first : first;
  *c = (k + 1) & 2 ? -second : second;
}

// The step size that delta and its bias make.
FD_D float step_size(const Scan& a, float delta, float bias) {
  if (a.delta_bias.data != nullptr) delta += bias;
  return a.softplus ? softplus(delta) : delta;
}
// Of [K, D] an element, or 0.
FD_D float of_channel(const Strided& m, const Task& t, int c) {
  return m.data != nullptr && c < t.cols ? element(m, t.k * m.s[0] + (t.first + c) * m.s[1]) : 0.0f;
}

// Of a thread's four states, whose decays leave the special function unit alone (exp2.cuh). The scan is short of issue
// slots before it is short of that unit (scan.cu), so none by default; -DFASTDIFF_SCAN_RELIEF=1 ... 4 is for a device
// that a measurement shows to be otherwise.
#ifndef FASTDIFF_SCAN_RELIEF
#define FASTDIFF_SCAN_RELIEF 0
#endif
constexpr int kRelief = FASTDIFF_SCAN_RELIEF;

// exp(dt A) of a thread's states; `rate` is A times log2 e, of a complex A only the real part.
template <bool kComplex>
FD_D void decays(float dt, const float (&rate)[kOwn], float (&w)[kOwn]) {
  if constexpr (kComplex) {
#pragma unroll
    for (int j = 0; j < kOwn; j += 2) {
      const float size = exp2_fast(dt * rate[j]);
      float s, c;
      sine_cosine(dt * rate[j + 1], &s, &c);
      w[j] = size * c, w[j + 1] = size * s;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kOwn; ++j) w[j] = j < kRelief ? exp2_poly<5>(dt * rate[j]) : exp2_fast(dt * rate[j]);
  }
}

// h <- w h + x b
template <bool kComplex>
FD_D void advance(float (&h)[kOwn], const float (&w)[kOwn], float x, const float (&b)[kOwn]) {
  if constexpr (kComplex) {
#pragma unroll
    for (int j = 0; j < kOwn; j += 2) {
      const float re = fmaf(w[j], h[j], fmaf(-w[j + 1], h[j + 1], x * b[j]));
      h[j + 1] = fmaf(w[j], h[j + 1], fmaf(w[j + 1], h[j], x * b[j + 1]));
      h[j] = re;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kOwn; ++j) h[j] = fmaf(w[j], h[j], x * b[j]);
  }
}

// The thread's part of <c, h>, or of its real part.
template <bool kComplex>
FD_D float product(const float (&c)[kOwn], const float (&h)[kOwn]) {
  float y = c[0] * h[0];
#pragma unroll
  for (int j = 1; j < kOwn; ++j) y = fmaf(kComplex && j % 2 ? -c[j] : c[j], h[j], y);
  return y;
}

FD_D void load_own(const float* p, float (&v)[kOwn]) {
  const float4 w = *reinterpret_cast<const float4*>(p);
  v[0] = w.x, v[1] = w.y, v[2] = w.z, v[3] = w.w;
}

// A of the thread's states, scaled for `decays`; zero beyond the last state and channel.
template <bool kComplex>
FD_D void load_rates(const Scan& a, const Plan& p, const Task& t, int c, int s, float (&rate)[kOwn]) {
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const int r = s * kOwn + j, n = kComplex ? r / 2 : r, part = kComplex ? r % 2 : 0;
    rate[j] = 0;
    if (r < p.rows && c < t.cols)
      rate[j] = element(a.A, t.k * a.A.s[0] + (t.first + c) * a.A.s[1] + n * a.A.s[2] + part * a.A.s[3]) *
                (part ? 1.0f : kLog2e);
    // The steps beyond the last one take t = 0: 0 times minus infinity would not leave the state as it is.
    if (part == 0 && rate[j] < -3e38f) rate[j] = -3e38f;
  }
}

// Offset of state r of channel d in an operand [B, K, D, N (, 2)].
template <bool kComplex>
FD_D int64_t state_offset(const Strided& m, const Task& t, int64_t d, int r) {
  const int n = kComplex ? r / 2 : r, part = kComplex ? r % 2 : 0;
  return t.b * m.s[0] + t.k * m.s[1] + d * m.s[2] + n * m.s[3] + part * m.s[4];
}

// h <- end, the state after a segment that began with zeros, plus what of h the segment leaves; `decay` is the product
// of its decays.
template <bool kComplex>
FD_D void carry(float (&h)[kOwn], const float (&decay)[kOwn], bool restarted, const float (&end)[kOwn]) {
  if ((restarted && !FD_MUTATED(kScanCarryReset)) || FD_MUTATED(kScanCarry)) {  // an infinite h goes no further
#pragma unroll
    for (int j = 0; j < kOwn; ++j) h[j] = end[j];
  } else {
    advance<kComplex>(h, decay, 1.0f, end);
  }
}

// Where the saved state of a chunk begins for a thread: states r, r + 1, ... are D apart.
FD_D int64_t saved_offset(const Scan& a, const Plan& p, const Task& t, int64_t chunk, int64_t r, int64_t d) {
  const int64_t chunks = (a.L + kScanSteps - 1) / kScanSteps;
  return (((t.b * a.K + t.k) * chunks + chunk) * p.rows + r) * a.D + d;
}

// sum over k of parts[k], both in the order of their memory.
__global__ void __launch_bounds__(256) add_parts(const float* parts, float* out, int64_t count, int64_t K) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * 256;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x; i < count; i += step) {
    float sum = parts[i];
    for (int64_t k = 1; k < K; ++k) sum += parts[k * count + i];
    out[i] = sum;
  }
}

}  // namespace
}  // namespace cuda
}  // namespace fastdiff
