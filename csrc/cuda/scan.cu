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
// Per exp a warp issues about 6.75 instructions (the exp, four f32, 1/2 for B and C, 5/4 for what comes once per step)
// where the exp unit needs 8 cycles: more states per thread would save instructions that are not the limit, and cost
// warps. The lanes of a channel meet in shared memory, their sums added in the order of the states: no shuffles, and
// since the number of lanes follows from N alone, a result does not depend on the batch or the device.
//
// A tile of 32 steps is staged as float32: u, t (bias and softplus once per step and channel), B and C. Loads follow
// whichever axis is contiguous (channels last: four channels a load; channels first: 32 steps of a channel, transposed
// in shared memory). The order of the steps is a list of positions per tile, so that a permuted scan copies nothing.
// What hides the latency of the loads is the other blocks of the SM (30 KB of shared memory and at most 64 registers a
// thread: seven blocks at N = 16), not a pipeline within the block.
//
// K directions are K times as many blocks, each with an output of its own (float32, in a workspace), and a second
// kernel adds them in order: 2 K B L D floats of traffic more, for K times the parallelism and no atomics.
//
// L is never split. A call with few channels (B D N / 128 blocks below the number of SMs) leaves SMs idle; what it
// would take is a second pass with as many exps.
//
// Predicted at B8 D1536 L4096 N16, bf16: 0.31 ms if other blocks hide the loads of a tile, which are not asked for
// ahead; staging, softplus, gate and stores cost some 60 instructions per step and channel beside the 108 of its 16
// states. Performance: not measured.
#include "scan.cuh"

namespace fastdiff {
namespace cuda {
namespace {

template <int kChannels, bool kComplex>
__global__ void __launch_bounds__(kMaxThreads, kComplex ? 3 : 4) scan_kernel(Scan a, Plan p) {
  constexpr int kPitch = kChannels + 1;
  FD_SHARED_DYNAMIC(float, memory);
  Steps* const steps = reinterpret_cast<Steps*>(memory);
  float* const tile_b = memory + sizeof(Steps) / sizeof(float);  // [kSteps, pitch]
  float* const tile_c = tile_b + kSteps * p.pitch;
  float* const sums = tile_c + kSteps * p.pitch;  // [kSteps, lanes, kChannels]: parts of <C, h>
  float* const tile_u = sums + kSteps * p.lanes * kChannels;
  float* const tile_t = tile_u + kSteps * kPitch;

  const int c = static_cast<int>(threadIdx.x) % kChannels, s = static_cast<int>(threadIdx.x) / kChannels;
  const float* const own_b = tile_b + s * kOwn + (a.constant_b ? c * p.pitch : 0);
  const float* const own_c = tile_c + s * kOwn + (a.constant_c ? c * p.pitch : 0);
  const int step_b = a.constant_b ? 0 : p.pitch, step_c = a.constant_c ? 0 : p.pitch;
  int turn = 0;
  for (int64_t index = blockIdx.x; index < p.tasks; index += gridDim.x) {
    const Task t = task_of<kChannels>(a, p, index);
    const int64_t d = t.first + c;
    float h[kOwn] = {}, rate[kOwn];
    load_rates<kComplex>(a, p, t, c, s, rate);
    if (a.initial.data != nullptr && c < t.cols) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j)
        if (s * kOwn + j < p.rows) h[j] = element(a.initial, state_offset<kComplex>(a.initial, t, d, s * kOwn + j));
    }
    Strided out = a.out;
    if (a.partial_out != nullptr) out.data = a.partial_out + t.k * a.B * a.L * a.D;
    for (int64_t first = 0; first < a.L; first += kSteps) {
      const int count = static_cast<int>(a.L - first < kSteps ? a.L - first : kSteps);
      turn ^= FD_MUTATED(kScanTurn) ? 0 : 1;
      const int64_t* const position = steps->position[turn];
      visit(a, t, first, count, turn, steps);
      __syncthreads();  // and nobody reads the last tile any more
      gather(a.u, p.u, t.b * a.u.s[0] + t.first * a.u.s[2], a.u.s[1], a.u.s[2], position, count, t.cols, kChannels,
             [&](int i, int ch, float v) { tile_u[i * kPitch + ch] = v; });
      gather(a.delta, p.delta, t.b * a.delta.s[0] + t.k * a.delta.s[1] + t.first * a.delta.s[3], a.delta.s[2],
             a.delta.s[3], position, count, t.cols, kChannels, [&](int i, int ch, float v) {
               if (i < count && ch < t.cols) {
                 if (a.delta_bias.data != nullptr)
                   v += element(a.delta_bias, t.k * a.delta_bias.s[0] + (t.first + ch) * a.delta_bias.s[1]);
                 if (a.softplus) v = softplus(v);
               }
               tile_t[i * kPitch + ch] = v;
             });
      if (!a.constant_b)
        gather_projection<kChannels, kComplex>(tile_b, a.Bm, p.b, a, p, t, position, count);
      else if (first == 0)
        gather_constant<kChannels, kComplex>(tile_b, a.Bm, p, t);
      if (!a.constant_c)
        gather_projection<kChannels, kComplex>(tile_c, a.C, p.c, a, p, t, position, count);
      else if (first == 0)
        gather_constant<kChannels, kComplex>(tile_c, a.C, p, t);
      if (a.states != nullptr && c < t.cols) {
        float* const saved = a.states + saved_offset(a, p, t, first / kSteps, s * kOwn, d);
#pragma unroll
        for (int j = 0; j < kOwn; ++j)
          if (s * kOwn + j < p.rows) saved[j * a.D] = h[j];
      }
      FD_BARRIER(kScanTileBarrier);
      const uint32_t resets = steps->resets[turn];
      // Beyond `count` a tile holds t = u = B = C = 0, which leaves h as it is.
      for (int base = 0; base < count; base += 4) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const int i = base + q;
          const float dt = tile_t[i * kPitch + c], x = dt * tile_u[i * kPitch + c];
          float w[kOwn], b[kOwn], cc[kOwn];
          load_own(own_b + i * step_b, b);
          load_own(own_c + i * step_c, cc);
          if (resets >> i & 1 && !FD_MUTATED(kScanReset)) {
#pragma unroll
            for (int j = 0; j < kOwn; ++j) h[j] = 0;
          }
          decays<kComplex>(dt, rate, w);
          advance<kComplex>(h, w, x, b);
          sums[(i * p.lanes + s) * kChannels + c] = product<kComplex>(cc, h);
        }
      }
      FD_BARRIER(kScanSumBarrier);
      // y takes the place of u; the thread that writes an element here is the one that stores it unless the steps are
      // what is contiguous.
      const bool direct = p.out == kAcross;
      for (int e = static_cast<int>(threadIdx.x); e < count * kChannels; e += static_cast<int>(blockDim.x)) {
        const int i = e / kChannels, ch = e % kChannels;
        const float* const parts = sums + i * p.lanes * kChannels + ch;
        float y = parts[0];
        for (int l = 1; l < p.lanes; ++l) y += parts[l * kChannels];
        if (kComplex) y *= 2.0f;
        if (a.skip.data != nullptr && ch < t.cols)
          y = fmaf(element(a.skip, t.k * a.skip.s[0] + (t.first + ch) * a.skip.s[1]), tile_u[i * kPitch + ch], y);
        tile_u[i * kPitch + ch] = y;
      }
      if (!direct) FD_BARRIER(kScanOutBarrier);
      const int64_t base_z = t.b * a.z.s[0] + t.first * a.z.s[2];
      scatter<kChannels>(out, p.out, t.b * out.s[0] + t.first * out.s[2], out.s[1], out.s[2], position, count, t.cols,
                         [&](int i, int ch) {
                           const float y = tile_u[i * kPitch + ch];
                           if (a.z.data == nullptr) return y;
                           const float z = element(a.z, base_z + position[i] * a.z.s[1] + ch * a.z.s[2]);
                           return y * z * sigmoid(z);
                         });
    }
    if (c < t.cols) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j)
        if (s * kOwn + j < p.rows) a.last[((t.b * a.K + t.k) * a.D + d) * p.rows + s * kOwn + j] = h[j];
    }
  }
}

size_t forward_memory(const Plan& p, int channels) {
  const int64_t floats = 2 * kSteps * p.pitch + kSteps * p.lanes * channels + 2 * kSteps * (channels + 1);
  return sizeof(Steps) + sizeof(float) * static_cast<size_t>(floats);
}

template <int kChannels, bool kComplex>
void run(const Scan& a, const Plan& p, void* stream) {
  FD_LAUNCH((scan_kernel<kChannels, kComplex>), grid_for(p.tasks), static_cast<unsigned>(kChannels * p.lanes),
            forward_memory(p, kChannels), stream, a, p);
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
  if (scan_cuda_channels(p.rows) == 32)
    a.complex ? run<32, true>(a, p, stream) : run<32, false>(a, p, stream);
  else
    a.complex ? run<8, true>(a, p, stream) : run<8, false>(a, p, stream);
  const int64_t count = a.B * a.L * a.D;
  if (a.partial_out != nullptr && count > 0)
    FD_LAUNCH(add_parts, grid_for((count + 255) / 256), 256u, 0, stream, a.partial_out, static_cast<float*>(a.out.data),
              count, a.K);
}

}  // namespace cuda
}  // namespace fastdiff
