// Wide Gaussians at a cost that does not depend on sigma: both numbers of sigma from kSlideSigma on, the support
// theirs.
//
// The taps, truncated and normalised as they are, are written as
//   w[k] = sum_m A_m cos(m theta k),  |k| <= r,  m < 6,  theta = pi / (1.24 (r + 1/2)),
// and F_m[n] = A_m sum_k cos(m theta k) x[n + k], D_m[n] = F_m[n] - F_m[n - 1] are advanced by four operations a step
// (the recurrence and why it is run as a difference: csrc/cpu/gaussian_sliding.h). A is the least squares fit of
// fastdiff/ops/_gaussian_plan.py, found on the device: the normal equations have a closed form (condition 135), and so
// does every other number of the table that a launch before makes in double precision.
//
// One pass does one axis: it reads columns of an image and writes them as rows of its transpose, so that the same
// kernel run twice blurs both axes and leaves the image as it was. A block takes eight columns (32 bytes of every row)
// and a part of the axis, 512 to 4096 samples, at least the support, in 32 segments, a thread per column and segment:
//   1. The state at the start of the part from its definition: the 2 r + 2 samples of the window dealt out to the
//      segments. Where the window is longer than the border's period, its weights are folded, so it is never more than
//      2 n samples; what the replicate border repeats is one sample with one weight.
//   2. Every segment from a state of zeros to its end. The recurrence is linear, a step takes the state s to M s + g:
//      a true state is M^L times the true state before, plus the segment's own. M^L is known in closed form (a rotation
//      by L m theta), hence segments are combined exactly: four of a warp by two rounds of shuffles, eight warps in
//      order through shared memory. M^L - 1 is kept instead of M^L, so that a carry rounds F once.
//   3. Every segment again, now from its true state, eight outputs at a time into shared memory, from where they go to
//      the transpose as 32 bytes of a row.
// Loads come four at a time; positions are mapped by the border only where a group of four meets an edge.
//
// A recurrence never forgets a NaN: a block that has found anything not finite computes its outputs again from the
// taps.
//
// Error, as a share of the largest |x|, an axis: the fit is off by 1.05e-6 at most (the sum of |errors| of the taps, at
// any sigma here). Rounding, u = 2^-24: sum_m |A_m| (2 r + 1) = 2.4 bounds all |F_m| together. A state is rounded L <=
// 128 times between two carries, which adds up like sqrt(L) u / 2, then once in each of 2 + 7 carries. A thread's
// starting sum has t <= 768 terms but holds a 32nd of the weights, so that 32 of them are off by sqrt(t / 32) u / 2.
// Together 2.4 u (9 + (sqrt(L) + sqrt(t / 32)) / 2): 1.8e-6 at L = 32 and t = 64, 2.5e-6 at worst. Two axes: 7e-6 at
// worst, and 1e-5 is promised. In the emulator, for five borders, sigma 16 to 900, noise and constants: 6.4e-7.
//
// Count, from the machine code for sm_90, in instructions per output and axis: 44 to reach the ends of segments (the
// recurrence takes 26 of them, two loads and their places the rest), 66 for the outputs, and per thread, so over L
// outputs: 330 for carries, 400 for what a task costs, and for the start 100 per four samples of its 32nd of the
// window and 100 to add the parts up. The direct sums take 1.75 per tap with all that they stage. 1024 x 1024, both
// axes, at 128 lanes, 132 SMs and 1.755 GHz:
//   sigma   direct            sliding
//      32    675   24 us     350   12 us    (L = 16)
//     128   2690   95 us     315   11 us    (L = 32)
//     512   7170  253 us     370   13 us    (taps beyond the image folded)
// They meet at sigma 16.7; the switch is at 16, for every size. The columns of a block stay in L1 between its reads, so
// memory is as for the direct path: read once and written once an axis, 16 bytes a pixel, 4 us. A part of 1024 on an
// image of 1024 columns gives a block to 128 of 132 SMs, two warps to a scheduler, with five independent chains each.
// Predicted: 60 % of issue, 20 us with three launches, 10 % of copy speed, at every sigma.
//
// Performance: not measured.
#pragma once
#include "gaussian_cosines.cuh"

namespace fastdiff {
namespace cuda {
namespace {

static_assert(kSlideColumns == 8 && kSegments == 32 && kSlideSide >= 2 * kSegments, "how lanes are dealt out");
constexpr int kRun = 8, kRunPitch = kRun + 1;  // outputs of a thread on their way through shared memory

// -------------------------------------------------------------------------------------------------------------- pass

// One column as it is read. A place p is a position along the axis, where there is a period in 0 .. period - 1.
template <bool kFloat>
struct Column {
  const char* data;
  int64_t step;  // bytes
  int32_t dtype;
  int n, period, flip, inside, end;  // places inside .. end - 1 are samples as they are stored
  bool zeros;                        // beyond the ends, where there is no period
  Edges edges;

  FD_D float read(int64_t at) const {
    if constexpr (kFloat) return *reinterpret_cast<const float*>(data + at * step);
    return widen_any(fetch_any(data + at * step, dtype), dtype);
  }
  FD_D int place(int position) const {
    const int p = period > 0 ? position % period : position;
    return period > 0 && p < 0 ? p + period : p;
  }
  FD_D int later(int p, int by) const {  // by <= kSlideSide, the shortest period
    p += by;
    return period > 0 && p >= period ? p - period : p;
  }
  FD_D float value(int p) const {
    if (period == 0 && zeros && (p < 0 || p >= n)) return 0;
    const int at = period > 0 ? (p < n ? p : flip - p) : p < 0 ? 0 : p < n ? p : n - 1;
    return read(at) * edges.doubled(at, n);
  }
  // Four places from p on.
  FD_D void four(int p, float (&v)[4]) const {
    const bool up = p >= inside && p + 3 < end, down = p >= n && p + 3 < period;
    if (up || down) {
      const char* from = data + (up ? p : flip - p) * step;
      const int64_t by = up ? step : -step;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const char* const at = from + q * by;
        if constexpr (kFloat)
          v[q] = *reinterpret_cast<const float*>(at);
        else
          v[q] = widen_any(fetch_any(at, dtype), dtype);
      }
    } else if (period == 0 && (p >= n || p < -3)) {
      v[0] = v[1] = v[2] = v[3] = value(p);
    } else {
#pragma unroll
      for (int q = 0; q < 4; ++q) v[q] = value(later(p, q));
    }
  }
};

// F_0 .. F_5, D_1 .. D_5.
using State = float[kCarried];

// to += M^k from; `power`: M^k - 1 as the table has it.
FD_D void carry(State& to, const State& from, const float* power) {
  to[0] += from[0];
#pragma unroll
  for (int m = 0; m < kWaves; ++m) {
    const float4 p = *reinterpret_cast<const float4*>(power + 4 * m);
    const float f = from[1 + m], d = from[kCosines + m];
    to[1 + m] += f + fmaf(p.x, f, p.y * d);
    to[kCosines + m] += d + fmaf(p.z, f, p.w * d);
  }
}

struct Recurrence {
  float A0, s[kWaves], a[kWaves], ab[kWaves];
  FD_D explicit Recurrence(const float* table) {
    A0 = table[0];
#pragma unroll
    for (int m = 0; m < kWaves; ++m) s[m] = table[1 + m], a[m] = table[6 + m], ab[m] = table[11 + m];
  }
  // From output n to the next: new_in = x[n + r + 1], new_out = x[n - r - 1], in = x[n + r], out = x[n - r]. What F_0
  // changes by is gathered in `recent`: a sum of many equal terms would drift, rounded one way.
  FD_D void advance(State& state, float& recent, float new_in, float new_out, float in, float out) const {
    const float change = (new_in - in) + (new_out - out), v = in + out;
    recent = fmaf(A0, new_in - out, recent);
#pragma unroll
    for (int m = 0; m < kWaves; ++m) {
      const float d = fmaf(a[m], change, fmaf(ab[m], v, state[kCosines + m]));
      state[kCosines + m] = fmaf(-s[m], state[1 + m], d);
      state[1 + m] += state[kCosines + m];
    }
  }
};

// Up to kRun steps from `state`, `head` and `tail` being the places of x[n + r + 1] and x[n - r], `in` and `new_out`
// what stands before them; emit(i, output before step i).
template <bool kFloat, typename Emit>
FD_D void slide_run(const Column<kFloat>& x, const Recurrence& q, State& state, int count, int& head, int& tail,
                    float& in, float& new_out, const Emit& emit) {
  float recent = 0;
  for (int i = 0; i < count; i += 4) {
    float heads[4], tails[4];
    x.four(head, heads), x.four(tail, tails);
    head = x.later(head, 4), tail = x.later(tail, 4);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (i + k >= count) break;
      emit(i + k, (((state[0] + recent) + state[1]) + (state[2] + state[3])) + (state[4] + state[5]));
      q.advance(state, recent, heads[k], new_out, in, tails[k]);
      in = heads[k], new_out = tails[k];
    }
  }
  state[0] += recent;
}

// v[i] <- sum over the threads of a column, in threads 0 .. kSlideColumns kCount - 1: that of value t / 8 and column
// t % 8. `parts`: [kWarps][kCount][kSlideColumns].
template <int kCount>
FD_D float over_segments(float (&v)[kCount], float* parts) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    v[i] += __shfl_xor_sync(kFullWarp, v[i], 8);
    v[i] += __shfl_xor_sync(kFullWarp, v[i], 16);
    if (lane < kSlideColumns) parts[(warp * kCount + i) * kSlideColumns + lane] = v[i];
  }
  FD_BARRIER(kSlideStart);
  float sum = 0;
  if (threadIdx.x < kSlideColumns * kCount)
    for (int w = 0; w < kWarps; ++w) sum += parts[w * kCount * kSlideColumns + threadIdx.x];
  return sum;
}

// kFirst: the columns of x into the transposed workspace; else those of the workspace into the output.
template <bool kFirst, bool kFloat>
__global__ void __launch_bounds__(kThreads, 2) blur_slide(const Work a) {
  FD_SHARED(float, parts, kWarps * kCarried * kSlideColumns);
  FD_SHARED(float, totals, kWarps * kCarried * kSlideColumns);
  FD_SHARED(float, start, kCarried* kSlideColumns);
  FD_SHARED(float, gathered, 2 * kSlideColumns);  // what the adjoint of replicate has at both ends
  FD_SHARED(float, runs, kThreads* kRunPitch);
  FD_SHARED(int, spoiled, 1);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = threadIdx.x % kSlideColumns, segment = threadIdx.x / kSlideColumns, in_warp = segment % 4;
  const Edges edges(a.border, a.adjoint != 0);
  const int64_t n = kFirst ? a.H : a.W, lines = kFirst ? a.W : a.H;
  const int64_t groups = (lines + kSlideColumns - 1) / kSlideColumns, most_parts = slide_parts(n);
  const int64_t total = a.B * a.C * groups * most_parts;
  for (int64_t task = blockIdx.x; task < total; task += gridDim.x) {
    int64_t plane, b, c, group, rest, part;
    split(task, groups * most_parts, &plane, &rest);
    split(rest, groups, &part, &group);
    split(plane, a.C, &b, &c);
    const Axis ay = axis_of(a, b, false, a.H, a.border), ax = axis_of(a, b, true, a.W, a.border);
    if (a.several && !is_sliding(a, ay, ax)) continue;
    const Axis& axis = kFirst ? ay : ax;
    const Slide s = make_slide(axis, a.border);
    const int64_t first = part * s.part;
    if (first >= n) continue;
    const int n0 = static_cast<int>(first), here = n0 + segment * s.rows;  // outputs of the block, of the thread
    const float* const table = slide_table_of(a, b, !kFirst);
    const float* const taps = table_of(a, b, !kFirst);
    const int64_t entries = fold_entries(a.H, a.W), line = group * kSlideColumns + column;
    const int64_t read = line < lines ? line : lines - 1;
    const int64_t size = kFirst ? size_any(a.x.dtype) : 4;
    const char* const data = kFirst ? plane_of(a.x, b, c) + read * a.x.s[3] * size
                                    : reinterpret_cast<const char*>(a.workspace + plane * n * lines + read);
    const Column<kFloat> x = {data,
                              kFirst ? a.x.s[2] * size : lines * size,
                              kFirst ? a.x.dtype : kF32,
                              s.n,
                              s.period,
                              s.flip,
                              edges.reflect ? 1 : 0,
                              edges.reflect ? s.n - 1 : s.n,
                              edges.border == kConstant,
                              edges};
    if (threadIdx.x == 0) *spoiled = 0;

    State state = {};
    {                                  // 1: at the start of the part
      const int begin = n0 - s.r - 1;  // of the window
      const int from = s.period == 0 && begin < 0 ? -begin : s.first;
      const int last = s.period > 0 ? s.count : s.n - begin < s.window ? s.n - begin : s.window;
      const float* weights = table + weights_at(a) + 12 * static_cast<int64_t>(from + 4 * segment - s.first);
      const auto add = [&](const float* w, float v) {
        const float4 p = *reinterpret_cast<const float4*>(w), q = *reinterpret_cast<const float4*>(w + 4),
                     t = *reinterpret_cast<const float4*>(w + 8);
        state[0] = fmaf(p.x, v, state[0]), state[1] = fmaf(p.y, v, state[1]), state[2] = fmaf(p.z, v, state[2]);
        state[3] = fmaf(p.w, v, state[3]), state[4] = fmaf(q.x, v, state[4]), state[5] = fmaf(q.y, v, state[5]);
        state[6] = fmaf(q.z, v, state[6]), state[7] = fmaf(q.w, v, state[7]), state[8] = fmaf(t.x, v, state[8]);
        state[9] = fmaf(t.y, v, state[9]), state[10] = fmaf(t.z, v, state[10]);
      };
      int p = x.place(begin + from + 4 * segment);
      for (int e = from + 4 * segment; e < last; e += 4 * kSegments) {
        float v[4];
        x.four(p, v);
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (e + k < last) add(weights + 12 * k, v[k]);
        p = x.later(x.later(p, 2 * kSegments), 2 * kSegments), weights += 12 * 4 * kSegments;
      }
      if (edges.border == kReplicate && segment < 2 && !FD_MUTATED(kSlideEnds))
        add(table + ends_at() + 12 * (2 * part + segment), x.value(segment == 0 ? 0 : s.n - 1));
      const float sum = over_segments(state, parts);
      if (threadIdx.x < kCarried * kSlideColumns) start[threadIdx.x] = sum;
    }
    const Recurrence q(table);
    const int before = x.place(here - s.r - 1), ahead = x.place(here + s.r);
    const bool mine = here < s.n;
    {  // 2: every segment from zeros
      State own = {};
      if (mine) {
        int head = x.later(ahead, 1), tail = x.later(before, 1);
        float in = x.value(ahead), new_out = x.value(before);
        for (int i = 0; i < s.rows; i += kRun)
          slide_run(x, q, own, s.rows - i < kRun ? s.rows - i : kRun, head, tail, in, new_out, [](int, float) {});
      }
#pragma unroll
      for (int k = 1; k <= 2; ++k) {
        State other;
#pragma unroll
        for (int i = 0; i < kCarried; ++i) other[i] = __shfl_up_sync(kFullWarp, own[i], kSlideColumns * k);
        if (in_warp >= k) carry(own, other, table + 16 + 20 * (FD_MUTATED(kSlidePower) ? 0 : k - 1));
      }
      if (in_warp == 3) {
#pragma unroll
        for (int i = 0; i < kCarried; ++i) totals[(warp * kCarried + i) * kSlideColumns + column] = own[i];
      }
#pragma unroll
      for (int i = 0; i < kCarried; ++i) {
        own[i] = __shfl_up_sync(kFullWarp, own[i], kSlideColumns);
        if (in_warp == 0) own[i] = 0;
      }
      FD_BARRIER(kSlideCarry);
#pragma unroll
      for (int i = 0; i < kCarried; ++i) state[i] = start[i * kSlideColumns + column];
      for (int w = 0; w < warp; ++w) {
        State next;
#pragma unroll
        for (int i = 0; i < kCarried; ++i) next[i] = totals[(w * kCarried + i) * kSlideColumns + column];
        carry(next, state, table + 16 + 20 * 3);
#pragma unroll
        for (int i = 0; i < kCarried; ++i) state[i] = next[i];
      }
      if (in_warp > 0) {
        carry(own, state, table + 16 + 20 * (in_warp - 1));
#pragma unroll
        for (int i = 0; i < kCarried; ++i) state[i] = own[i];
      }
    }
    if (edges.replicate && (n0 == 0 || n0 + s.part >= s.n)) {  // the edges gather the tails
      const int64_t most = axis.reach < n - 1 ? axis.reach : n - 1;
      float sums[2] = {};
      for (int64_t i = segment; i <= most; i += kSegments) {
        sums[0] = fmaf(taps[2 * entries + i], x.read(i), sums[0]);
        sums[1] = fmaf(taps[2 * entries + i], x.read(n - 1 - i), sums[1]);
      }
      const float sum = over_segments(sums, parts);
      if (threadIdx.x < 2 * kSlideColumns) gathered[threadIdx.x] = sum;
      __syncthreads();
    }

    // 3: outputs. `give` puts those of a run, `count` a thread, where they belong.
    float* const run = runs + warp * 32 * kRunPitch;
    // In a warp's store a lane has output `at` of a run of every fourth thread: column `to` or the fourth after it.
    const int at = lane % kRun, to = lane / kRun, left = static_cast<int>(lines - group * kSlideColumns) - to;
    const int64_t corner = (plane * lines + group * kSlideColumns + to) * n;
    const auto give = [&](int from, int count) {
      __syncwarp();
      const int m0 = n0 + 4 * warp * s.rows + from + at;
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        const int m = m0 + k / 2 * s.rows, across = k % 2 * 4;
        if (at >= count || m >= s.n || across >= left) continue;
        float v = run[(4 * k + to) * kRunPitch + at];
        if (edges.reflect) v *= edges.halved(m, n);
        if (edges.replicate && (m == 0 || m == s.n - 1)) v = gathered[(m == 0 ? 0 : kSlideColumns) + to + across];
        const int64_t place = corner + across * n + m;
        if constexpr (kFirst)
          a.workspace[place] = v;
        else if (a.out.dtype == kF32)
          static_cast<float*>(a.out.data)[place] = v;
        else
          put_two(static_cast<char*>(a.out.data) + place * size_any(a.out.dtype), a.out.dtype, v, 0.0f, false, 1);
      }
      if (!FD_MUTATED(kSlideTurn)) __syncwarp();
    };
    float check = 0;  // NaN where anything is not finite
    int head = x.later(ahead, 1), tail = x.later(before, 1);
    float in = mine ? x.value(ahead) : 0.0f, new_out = mine ? x.value(before) : 0.0f;
    for (int i = 0; i < s.rows; i += kRun) {
      const int count = s.rows - i < kRun ? s.rows - i : kRun;
      if (mine)
        slide_run(x, q, state, count, head, tail, in, new_out, [&](int k, float v) {
          run[lane * kRunPitch + k] = v;
          if (here + i + k < s.n) check = fmaf(v, 0.0f, check);
        });
      give(i, count);
    }
    if (check != 0) *spoiled = 1;
    FD_BARRIER(kSlideSpoiled);
    if (*spoiled != 0 && !FD_MUTATED(kSlideForget)) {
      for (int i = 0; i < s.rows; i += kRun) {
        const int count = s.rows - i < kRun ? s.rows - i : kRun;
        for (int k = 0; k < count && here + i + k < s.n; ++k) {
          float sum = 0, few = 0;
          for (int64_t t = -axis.reach; t <= axis.reach; ++t) {
            const int64_t at = border_index(here + i + k + t, n, edges.border);
            few = fmaf(taps[t < 0 ? -t : t], at < 0 ? 0.0f : x.read(at) * edges.doubled(at, n), few);
            if ((t & 63) == 63) sum += few, few = 0;
          }
          run[lane * kRunPitch + k] = sum + few;
        }
        give(i, count);
      }
    }
    FD_BARRIER(kSlideReuse);
  }
}

inline void run_sliding(const Work& a, void* stream) {
  const auto tasks = [&](int64_t n, int64_t lines) {
    return grid_for(a.B * a.C * slide_parts(n) * ((lines + kSlideColumns - 1) / kSlideColumns));
  };
  if (a.x.dtype == kF32)
    FD_LAUNCH((blur_slide<true, true>), tasks(a.H, a.W), kThreads, 0, stream, a);
  else
    FD_LAUNCH((blur_slide<true, false>), tasks(a.H, a.W), kThreads, 0, stream, a);
  FD_LAUNCH((blur_slide<false, true>), tasks(a.W, a.H), kThreads, 0, stream, a);
}

}  // namespace
}  // namespace cuda
}  // namespace fastdiff
