// Selective scan on CUDA: h <- exp(t A) h + t B u, y = <C, h> + D u, gated (Gu & Dao 2023, "Mamba", eq. 2).
//
// Floor: an exp per state and step. H200: 16 ex2 per clock and SM, 3.6e12 a second; B8 D1536 L4096 N16 has 8.1e8 of
// them, 0.22 ms. Beside each exp: dt A, x B and two multiply-adds, 0.11 ms of the f32 pipes. The operands of that call
// are read and written in 0.1 ms.
//
// Mapping. A thread holds four states of one channel in registers, `lanes` threads serve a channel, and a block serves
// 32 channels (8 where there are more than 32 floats of state, so that it stays within 256 threads): 384 blocks of four
// warps at the shape above, three for every SM. Lanes of a warp are neighbouring channels, so that B and C of a step,
// which the block's channels share, are a broadcast of 16 bytes and everything per channel is free of bank conflicts.
// More states per thread would save a third of what a step costs beside its states, and warps. The lanes of a channel
// meet in shared memory, their sums added in the order of the states: no shuffles, and since the number of lanes
// follows from N alone, a result does not depend on the batch or the device.
//
// Tiles of 32 steps. While one is computed, u, delta, B and C of the next one are on their way to the stage, a second
// part of shared memory, as they are stored (scan_stage.cuh), and so is z of this one, which is not needed before its
// end: nothing waits for memory but the first tile. That is where columns (channels, states) are neighbours in memory
// and aligned to at least 4 bytes; other operands are read when their tile is due, along whichever axis is contiguous
// (channels first: 32 steps of a channel, transposed in shared memory). From the stage a tile becomes float32: u, t
// (bias and softplus once per step and channel), B and C. The order of the steps is a list of positions per tile, that
// of the next made while this one is converted, so that a permuted scan copies nothing.
//
// At N = 16: 128 threads, 80 registers, 37.8 KB of shared memory for 16-bit operands (29.8 for the tiles, 8 for the
// stage) and 45.8 for float32: five and four blocks of an SM of sm_90, four and three of sm_80, two of sm_86 and sm_89.
// No block needs more than 99 KB: where the stage has no room, an operand is read when it is due (N > 112 in float32).
//
// K directions are K times as many blocks, each with an output of its own (float32, in a workspace), and a second
// kernel adds them in order: 2 K B L D floats of traffic more, for K times the parallelism and no atomics.
//
// Segments. One sample of a narrow model is few blocks (D = 384: 12), each of which walks all of L. Where a sample has
// at most 16 (eight of them do not fill an H200 then) and L at least 16 tiles, L is cut into up to 16 segments, all of
// them at once: one launch finds the end state of each from zeros, and the product of its decays, exp(A sum t) of every
// tile; a second one lets each segment carry the ends before it to its beginning, in order, and replays it. That is
// 2 - 1/S exps instead of one, and 1.7 times the instructions, for S times the blocks: with D = 384, L = 4096 and a
// batch of one, 1/9 of the time if a block alone on an SM is no faster than one of two. It is done while there are no
// more blocks than SMs. A larger batch takes the segments one after the other in one block, which computes both the
// state from zeros and the true one (a multiply-add per state and step, no exp: about a tenth more; 128 registers, four
// blocks of an SM of sm_90), and hands on the same float: whether L is cut depends on L, D, N, K and G alone, and how
// it is done does not show in a bit.
//
// Counted in the loop over steps (sm_90a, before restarts got a loop of their own): 9.4 instructions per exp, 6.9 of
// them arithmetic and shared memory, where the exp unit takes the time of 8. Softplus, gate, conversions, requests and
// stores are some 100 instructions per step and channel, 6 more per exp at N = 16. So instructions are what is short,
// not exps: moving exps to the multiply-add pipes (exp2.cuh) costs 14 of them for each and is off.
//
// Predicted at B8 D1536 L4096 N16, bf16: 0.36 to 0.45 ms (13 to 16 instructions per exp, one per clock and scheduler),
// now that memory is waited for no more. Performance: not measured.
#include <type_traits>

#include "scan.cuh"

namespace fastdiff {
namespace cuda {
namespace {

// What a block does with the steps it is given.
enum {
  kReplay,  // outputs and states, of all L or of one segment
  kEnds,    // the end state of a segment that begins with zeros, and the product of its decays
  kFused    // all L, segment by segment: both at once
};

// Where a segment's end begins: `rows` states, `rows` products of decays, and 1 where the state restarted.
FD_D int64_t carry_offset(const Scan& a, const Plan& p, const Task& t, int64_t segment, int row) {
  return (((t.b * a.K + t.k) * p.segments + segment) * (2 * p.rows + 1) + row) * a.D + t.first;
}

template <int kChannels, bool kComplex, int kMode>
__global__ void __launch_bounds__(kMaxThreads, kMode == kFused ? 2 : 3) scan_kernel(Scan a, Plan p) {
  constexpr int kPitch = kChannels + 1;
  FD_SHARED_DYNAMIC(float, memory);
  Steps* const steps = reinterpret_cast<Steps*>(memory);
  float* const tile_b = memory + sizeof(Steps) / sizeof(float);  // [kSteps, pitch]
  float* const tile_c = tile_b + kSteps * p.pitch;
  float* const sums = tile_c + kSteps * p.pitch;  // [kSteps, lanes, kChannels]: parts of <C, h>
  float* const tile_u = sums + kSteps * p.lanes * kChannels;
  float* const tile_t = tile_u + kSteps * kPitch;
  char* const stage = reinterpret_cast<char*>(tile_t + kSteps * kPitch);

  const int c = static_cast<int>(threadIdx.x) % kChannels, s = static_cast<int>(threadIdx.x) / kChannels;
  const float* const own_b = tile_b + s * kOwn + (a.constant_b ? c * p.pitch : 0);
  const float* const own_c = tile_c + s * kOwn + (a.constant_c ? c * p.pitch : 0);
  const int step_b = a.constant_b ? 0 : p.pitch, step_c = a.constant_c ? 0 : p.pitch;
  const int64_t tasks = p.tasks * (kMode == kFused ? 1 : kMode == kEnds ? p.segments - 1 : p.segments);
  int turn = 0;
  for (int64_t index = blockIdx.x; index < tasks; index += gridDim.x) {
    int64_t segment, task;
    split(index, p.tasks, &segment, &task);
    const Task t = task_of<kChannels>(a, p, task);
    const bool here = c < t.cols;
    const int64_t d = t.first + c, begin = kMode == kFused ? 0 : segment * p.segment;
    const int64_t end = kMode == kFused || a.L - begin < p.segment ? a.L : begin + p.segment;
    const float bias = of_channel(a.delta_bias, t, c), skip = of_channel(a.skip, t, c);
    float h[kOwn] = {}, rate[kOwn];
    load_rates<kComplex>(a, p, t, c, s, rate);
    if (kMode != kEnds && a.initial.data != nullptr && here) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j)
        if (s * kOwn + j < p.rows) h[j] = element(a.initial, state_offset<kComplex>(a.initial, t, d, s * kOwn + j));
    }
    if (kMode == kReplay && here) {
#pragma unroll 1
      for (int64_t before = 0; before < segment; ++before) {
        const float* const from = a.carries + carry_offset(a, p, t, before, 0) + c;
        float decay[kOwn], other[kOwn];
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          const int r = s * kOwn + j;
          const bool there = r < p.rows;
          other[j] = there ? from[r * a.D] : 0.0f, decay[j] = there ? from[(p.rows + r) * a.D] : 0.0f;
        }
        carry<kComplex>(h, decay, from[2 * p.rows * a.D] != 0, other);
      }
    }
    // Of the segment: its state without what came before (kEnds: h itself), the product of its decays, its entry.
    float own[kOwn] = {}, decay[kOwn], entry[kOwn];
    bool restarted = false;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) decay[j] = kComplex && j % 2 ? 0.0f : 1.0f, entry[j] = h[j];
    int64_t border = p.segment;

    Strided out = a.out;
    if (a.partial_out != nullptr) out.data = a.partial_out + t.k * a.B * a.L * a.D;
    const auto count_at = [&](int64_t first) { return static_cast<int>(end - first < kSteps ? end - first : kSteps); };
    const auto ask_tile = [&](int64_t first, const int64_t* position) {
      const int count = count_at(first);
      ask(stage, p.ahead_u, a.u, steps->base[kU], a.u.s[1], position, count, t.cols, kChannels);
      ask(stage, p.ahead_delta, a.delta, steps->base[kDelta], a.delta.s[2], position, count, t.cols, kChannels);
      ask(stage, p.ahead_b, a.Bm, steps->base[kB], a.Bm.s[3], position, count, p.rows, kOwn * p.lanes);
      if (kMode != kEnds)
        ask(stage, p.ahead_c, a.C, steps->base[kC], a.C.s[3], position, count, p.rows, kOwn * p.lanes);
    };
    begin_task(a, t, steps);
    visit(a, t, begin, count_at(begin), turn, steps);
    __syncthreads();
    ask_tile(begin, steps->position[turn]);
    commit_copies();
    for (int64_t first = begin; first < end; first += kSteps) {
      const int count = count_at(first), next = FD_MUTATED(kScanTurn) ? turn : turn ^ 1;
      const bool more = first + kSteps < end;
      const int64_t* const position = steps->position[turn];
      const uint32_t resets = steps->resets[turn];
      wait_copies<0>();
      FD_BARRIER(kScanStageBarrier);  // all of the tile has come, and nobody reads the last one any more
      if (more) visit(a, t, first + kSteps, count_at(first + kSteps), next, steps);
      if (FD_MUTATED(kScanTileBarrier)) __syncthreads();
      if (p.ahead_u.bytes > 0) {
        for (int i = s; i < padded4(count); i += p.lanes)
          tile_u[i * kPitch + c] = staged(stage, p.ahead_u, a.u.dtype, i * kChannels + c);
      } else {
        gather<false>(a.u, p.u, steps->base[kU], a.u.s[1], a.u.s[2], position, count, t.cols, kChannels,
                      [&](int i, int ch, float v) { tile_u[i * kPitch + ch] = v; });
      }
      if (p.ahead_delta.bytes > 0) {
#pragma unroll 2
        for (int i = s; i < padded4(count); i += p.lanes) {
          const float v = staged(stage, p.ahead_delta, a.delta.dtype, i * kChannels + c);
          tile_t[i * kPitch + c] = i < count && here ? step_size(a, v, bias) : 0.0f;
        }
      } else {
        gather<false>(a.delta, p.delta, steps->base[kDelta], a.delta.s[2], a.delta.s[3], position, count, t.cols,
                      kChannels, [&](int i, int ch, float v) {
                        tile_t[i * kPitch + ch] =
                            i < count && ch < t.cols ? step_size(a, v, of_channel(a.delta_bias, t, ch)) : 0.0f;
                      });
      }
      bring_projection<kChannels, kComplex>(tile_b, stage, p.ahead_b, a.Bm, a.constant_b, p.b, steps->base[kB], p, t,
                                            position, count, first == begin);
      if (kMode != kEnds)
        bring_projection<kChannels, kComplex>(tile_c, stage, p.ahead_c, a.C, a.constant_c, p.c, steps->base[kC], p, t,
                                              position, count, first == begin);
      if (kMode != kEnds && a.states != nullptr && here) {
        float* const saved = a.states + saved_offset(a, p, t, first / kSteps, s * kOwn, d);
#pragma unroll
        for (int j = 0; j < kOwn; ++j)
          if (s * kOwn + j < p.rows) saved[j * a.D] = h[j];
      }
      FD_BARRIER(kScanTileBarrier);
      if (kMode != kEnds) ask(stage, p.ahead_z, a.z, steps->base[kZ], a.z.s[1], position, count, t.cols, kChannels);
      commit_copies();
      if (more) ask_tile(first + kSteps, steps->position[FD_MUTATED(kScanAhead) ? turn : next]);
      commit_copies();
      // Beyond `count` a tile holds t = u = B = C = 0, which leaves h as it is.
      float passed = 0;  // the time of the tile: four steps, then the fours, added in ten roundings at most
      const auto walk = [&](auto fresh) {  // whether the state restarts within the tile: a choice per state and step
#pragma unroll 1
        for (int base = 0; base < count; base += 4) {
          float times[4];
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            const int i = base + q;
            const float dt = tile_t[i * kPitch + c], x = dt * tile_u[i * kPitch + c];
            float w[kOwn], b[kOwn];
            times[q] = dt;
            load_own(own_b + i * step_b, b);
            if (decltype(fresh)::value && resets >> i & 1) {
              restarted = true;
#pragma unroll
              for (int j = 0; j < kOwn; ++j) h[j] = own[j] = 0;
            }
            decays<kComplex>(dt, rate, w);
            advance<kComplex>(h, w, x, b);
            if (kMode == kFused) advance<kComplex>(own, w, x, b);
            if (kMode != kEnds) {
              float cc[kOwn];
              load_own(own_c + i * step_c, cc);
              sums[(i * p.lanes + s) * kChannels + c] = product<kComplex>(cc, h);
            }
          }
          passed += (times[0] + times[1]) + (times[2] + times[3]);
        }
      };
      if (resets != 0 && !FD_MUTATED(kScanReset))
        walk(std::true_type());
      else
        walk(std::false_type());
      if (kMode != kReplay) {
        float w[kOwn];
        const float nothing[kOwn] = {};
        decays<kComplex>(passed, rate, w);
        advance<kComplex>(decay, w, 0.0f, nothing);
      }
      if (kMode == kFused && first + kSteps == border && more) {
        carry<kComplex>(entry, decay, restarted, own);
        restarted = FD_MUTATED(kScanRestarted) && restarted, border += p.segment;
#pragma unroll
        for (int j = 0; j < kOwn; ++j) h[j] = entry[j], own[j] = 0, decay[j] = kComplex && j % 2 ? 0.0f : 1.0f;
      }
      turn = next;
      if (kMode == kEnds) continue;
      if (!FD_MUTATED(kScanGateWait)) wait_copies<1>();  // for z
      FD_BARRIER(kScanSumBarrier);
      // y takes the place of u; the thread that writes an element here is the one that stores it unless the steps are
      // what is contiguous.
#pragma unroll 2
      for (int i = s; i < count; i += p.lanes) {
        const float* const parts = sums + i * p.lanes * kChannels + c;
        float y = parts[0];
        for (int l = 1; l < p.lanes; ++l) y += parts[l * kChannels];
        if (kComplex) y *= 2.0f;
        if (a.skip.data != nullptr) y = fmaf(skip, tile_u[i * kPitch + c], y);
        if (p.ahead_z.bytes > 0) y = gated(y, staged(stage, p.ahead_z, a.z.dtype, i * kChannels + c));
        tile_u[i * kPitch + c] = y;
      }
      if (p.out != kAcross) FD_BARRIER(kScanOutBarrier);
      const int64_t base_z = t.b * a.z.s[0] + t.first * a.z.s[2];
      scatter<kChannels>(out, p.out, t.b * out.s[0] + t.first * out.s[2], out.s[1], out.s[2], position, count, t.cols,
                         [&](int i, int ch) {
                           const float y = tile_u[i * kPitch + ch];
                           if (a.z.data == nullptr || p.ahead_z.bytes > 0) return y;
                           return gated(y, element(a.z, base_z + position[i] * a.z.s[1] + ch * a.z.s[2]));
                         });
    }
    if (kMode == kEnds && here) {
      float* const to = a.carries + carry_offset(a, p, t, segment, 0) + c;
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const int r = s * kOwn + j;
        if (r < p.rows) to[r * a.D] = h[j], to[(p.rows + r) * a.D] = decay[j];
      }
      if (s == 0) to[2 * p.rows * a.D] = restarted ? 1.0f : 0.0f;
    }
    if (kMode != kEnds && here && end == a.L) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j)
        if (s * kOwn + j < p.rows) a.last[((t.b * a.K + t.k) * a.D + d) * p.rows + s * kOwn + j] = h[j];
    }
  }
}

int64_t forward_memory(const Plan& p, int64_t channels) {  // without the stage
  const int64_t floats = 2 * kSteps * p.pitch + kSteps * p.lanes * channels + 2 * kSteps * (channels + 1);
  return static_cast<int64_t>(sizeof(Steps)) + static_cast<int64_t>(sizeof(float)) * floats;
}

template <int kChannels, bool kComplex>
void run(const Scan& a, const Plan& p, bool apart, void* stream) {
  const unsigned threads = static_cast<unsigned>(kChannels * p.lanes);
  const size_t bytes = static_cast<size_t>(forward_memory(p, kChannels) + p.stage);
  if (p.segments > 1 && !apart)
    return FD_LAUNCH((scan_kernel<kChannels, kComplex, kFused>), grid_for(p.tasks), threads, bytes, stream, a, p);
  if (p.segments > 1)
    FD_LAUNCH((scan_kernel<kChannels, kComplex, kEnds>), grid_for(p.tasks * (p.segments - 1)), threads, bytes, stream,
              a, p);
  FD_LAUNCH((scan_kernel<kChannels, kComplex, kReplay>), grid_for(p.tasks * p.segments), threads, bytes, stream, a, p);
}

}  // namespace

void selective_scan(const Scan& a, int device, void* stream) {
  if (a.B == 0 || a.D == 0) return;
  const DeviceGuard guard(device);
  Plan p = plan_of(a);
  if (a.partial_out != nullptr) {  // instead of a.out, and each of the K must be aligned
    Strided parts = a.out;
    parts.data = a.partial_out;
    p.out = path_of(parts, a.out.s[1], a.out.s[2], (a.G == 1 || p.size % 4 == 0) && a.B * a.L * a.D % 4 == 0);
  }
  const int64_t channels = scan_cuda_channels(p.rows);
  plan_ahead(a, nullptr, forward_memory(p, channels), &p);
  const bool apart = a.carries != nullptr && p.tasks <= multiprocessors(device);
  if (channels == 32)
    a.complex ? run<32, true>(a, p, apart, stream) : run<32, false>(a, p, apart, stream);
  else
    a.complex ? run<8, true>(a, p, apart, stream) : run<8, false>(a, p, apart, stream);
  const int64_t count = a.B * a.L * a.D;
  if (a.partial_out != nullptr && count > 0)
    FD_LAUNCH(add_parts, grid_for((count + 255) / 256), 256u, 0, stream, a.partial_out, static_cast<float*>(a.out.data),
              count, a.K);
}

}  // namespace cuda
}  // namespace fastdiff
