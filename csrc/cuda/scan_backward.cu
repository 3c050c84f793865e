// Backward pass of the selective scan on CUDA. With e the gradient of the state h (of everything later, and of y by C):
//   e <- e + C gy;  dC = sum_d gy h;  dB = sum_d e t u;  d(t u) = sum_n e B;  q = e a h_prev = d(t A);  e <- e a
//   dt = u sum_n e B + sum_n q A;  dA = sum q t;  du = t sum_n e B + D gy;  ddelta = dt softplus'(delta)
// and with a gate gy = gout silu(z), dz = gout y silu'(z).
//
// Floor: per state and step one exp to recompute h and 11 f32 operations; at B8 D1536 L4096 N16 0.31 ms of the f32
// pipes and 0.22 ms of the exp units, against 0.2 ms for the operands.
//
// Mapping: as forward (scan.cu), tiles of 32 steps from the last to the first, each from its saved state. A tile is
// walked twice: forward through all of it, keeping the state before every fourth step in shared memory, and then four
// steps at a time from the end, whose states and decays are computed once more into registers (36 of them) and undone.
// That doubles the exps, to 16 cycles of the exp unit per warp, beside some 25 instructions that have to be issued
// anyway; to keep all states would cost 64 KB of shared memory per 128 threads.
//
// dB and dC are sums over channels, which are the lanes of a warp: 16 values of a thread (four steps, four states),
// first of dC, for which the states are enough, then of dB, become sums over the block's 32 (8) channels in 16 (14)
// shuffles, of which all but the last halve what a lane still has to add, and go to a workspace per block of channels;
// a second kernel adds the blocks in order. dA, dD and the gradient of the bias are summed over the steps of a tile,
// then over tiles, then over samples, in order. What lanes of a channel contribute to du and ddelta meets in shared
// memory, as in the forward pass.
//
// As there, operands of the next tile come to a stage by cp.async while this one is computed: u, delta, z, the gradient
// of the output, B, C and the saved states. At N = 16: 128 threads, 128 registers, 62.1 KB of shared memory for 16-bit
// operands (50.1 without the stage) and 72.1 for float32: three blocks of an SM of sm_90, two of sm_80, one of sm_86
// and sm_89.
//
// L is not cut into segments: the gradient of the state would be carried from the last to the first as the state is,
// but training has batches.
//
// Predicted at B8 D1536 L4096 N16, bf16: 0.9 ms for the walk (28 instructions per state and step), 0.1 ms for the 0.4
// GB of partial sums of dB and dC. Performance: not measured.
#include "scan.cuh"

namespace fastdiff {
namespace cuda {
namespace {

constexpr int kQuarter = 4;                   // steps that are undone together
constexpr int kQuarters = kSteps / kQuarter;  // of a tile
constexpr int kValues = kQuarter * kOwn;      // parts of dB, or of dC, of a thread

// v of the block's channels, which are lanes of a warp, summed in trees over the channels. Each shuffle halves what a
// lane still has to add: lane c keeps values c kValues / kChannels and on, of which there are at least one; where there
// are fewer values than channels, kChannels / kValues lanes keep the same.
template <int kChannels>
FD_D void sum_channels(float (&v)[kValues]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int left = kValues;
#pragma unroll
  for (int offset = kChannels / 2; offset > 0; offset /= 2) {
    if (left == 1) {
      v[0] += __shfl_xor_sync(kFullWarp, v[0], offset);
      continue;
    }
    left /= 2;
    const bool upper = (lane & offset) != 0;
#pragma unroll
    for (int k = 0; k < kValues / 2; ++k) {
      if (k >= left) continue;
      const float send = upper ? v[k] : v[k + left], keep = upper ? v[k + left] : v[k];
      v[k] = keep + __shfl_xor_sync(kFullWarp, send, offset);
    }
  }
}

template <int kChannels, bool kComplex, bool kConstants>
__global__ void __launch_bounds__(kMaxThreads, kComplex || kConstants ? 1 : 2)
    scan_backward_kernel(ScanBackward a, Plan p) {
  constexpr int kPitch = kChannels + 1;
  FD_SHARED_DYNAMIC(float, memory);
  const int threads = static_cast<int>(blockDim.x);
  Steps* const steps = reinterpret_cast<Steps*>(memory);
  float* const tile_b = memory + sizeof(Steps) / sizeof(float);  // [kSteps, pitch]
  float* const tile_c = tile_b + kSteps * p.pitch;
  float* const marks = tile_c + kSteps * p.pitch;  // [kQuarters, threads, kOwn]: states before every fourth step
  float* const sums =
      marks + kQuarters * threads * kOwn;  // [2, 3, kQuarter, lanes, kChannels]: sum_n e B, sum_n q A, y
  float* const tile_u = sums + 2 * 3 * kQuarter * threads;  // later du
  float* const tile_t = tile_u + kSteps * kPitch;           // later ddelta
  float* const tile_g = tile_t + kSteps * kPitch;           // gy
  float* const tile_z = tile_g + kSteps * kPitch;           // gout silu'(z), later dz
  char* const stage = reinterpret_cast<char*>(tile_z + kSteps * kPitch);

  const int tid = static_cast<int>(threadIdx.x), c = tid % kChannels, s = tid / kChannels;
  const bool const_b = kConstants && a.constant_b, const_c = kConstants && a.constant_c;
  const float* const own_b = tile_b + s * kOwn + (const_b ? c * p.pitch : 0);
  const float* const own_c = tile_c + s * kOwn + (const_c ? c * p.pitch : 0);
  const int step_b = const_b ? 0 : p.pitch, step_c = const_c ? 0 : p.pitch;
  const int chunks = static_cast<int>((a.L + kSteps - 1) / kSteps);
  const bool gated = a.z.data != nullptr;
  int turn = 0;
  for (int64_t index = blockIdx.x; index < p.tasks; index += gridDim.x) {
    const Task t = task_of<kChannels>(a, p, index);
    const int64_t d = t.first + c;
    const bool here = c < t.cols;
    float e[kOwn] = {}, rate[kOwn], total_a[kOwn] = {}, total_b[kOwn] = {}, total_c[kOwn] = {};
    float total_skip = 0, total_bias = 0;
    load_rates<kComplex>(a, p, t, c, s, rate);
    if (a.grad_last.data != nullptr && here) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j)
        if (s * kOwn + j < p.rows) e[j] = element(a.grad_last, state_offset<kComplex>(a.grad_last, t, d, s * kOwn + j));
    }
    Strided du = a.du;
    if (a.partial_du != nullptr) du.data = a.partial_du + t.k * a.B * a.L * a.D;
    const float bias = of_channel(a.delta_bias, t, c);
    const auto count_at = [&](int chunk) {
      const int64_t left = a.L - static_cast<int64_t>(chunk) * kSteps;
      return left < kSteps ? static_cast<int>(left) : kSteps;
    };
    const auto ask_tile = [&](int chunk, const int64_t* position) {
      const int count = count_at(chunk);
      ask(stage, p.ahead_u, a.u, steps->base[kU], a.u.s[1], position, count, t.cols, kChannels);
      ask(stage, p.ahead_delta, a.delta, steps->base[kDelta], a.delta.s[2], position, count, t.cols, kChannels);
      ask(stage, p.ahead_z, a.z, steps->base[kZ], a.z.s[1], position, count, t.cols, kChannels);
      ask(stage, p.ahead_grad, a.grad_out, steps->base[kGrad], a.grad_out.s[1], position, count, t.cols, kChannels);
      ask(stage, p.ahead_b, a.Bm, steps->base[kB], a.Bm.s[3], position, count, p.rows, kOwn * p.lanes);
      ask(stage, p.ahead_c, a.C, steps->base[kC], a.C.s[3], position, count, p.rows, kOwn * p.lanes);
      if (p.ahead_state >= 0 && here) {
        const float* const saved = a.states + saved_offset(a, p, t, chunk, s * kOwn, d);
        float* const to = reinterpret_cast<float*>(stage + p.ahead_state) + tid;
#pragma unroll
        for (int j = 0; j < kOwn; ++j)
          if (s * kOwn + j < p.rows) copy_async<4>(to + j * threads, saved + j * a.D);
      }
      commit_copies();
    };
    begin_task(a, t, steps);
    if (tid == 0) {
      steps->base[kGrad] = t.b * a.grad_out.s[0] + t.first * a.grad_out.s[2];
      steps->base[kSums] = (((t.b * a.K + t.k) * a.G + t.g) * p.blocks + t.block) * a.L;
    }
    if (chunks > 0) visit(a, t, static_cast<int64_t>(chunks - 1) * kSteps, count_at(chunks - 1), turn, steps);
    __syncthreads();
    if (chunks > 0) ask_tile(chunks - 1, steps->position[turn]);

    for (int chunk = chunks - 1; chunk >= 0; --chunk) {
      const int count = count_at(chunk), next = FD_MUTATED(kBackTurn) ? turn : turn ^ 1;
      const int64_t* const position = steps->position[turn];
      const uint32_t resets = steps->resets[turn];
      wait_copies<0>();
      FD_BARRIER(kBackStageBarrier);  // all of the tile has come, and nobody reads the last one any more
      if (chunk > 0) visit(a, t, static_cast<int64_t>(chunk - 1) * kSteps, kSteps, next, steps);
      if (FD_MUTATED(kBackTileBarrier)) __syncthreads();
      if (p.ahead_u.bytes > 0) {
        for (int i = s; i < padded4(count); i += p.lanes)
          tile_u[i * kPitch + c] = staged(stage, p.ahead_u, a.u.dtype, i * kChannels + c);
      } else {
        gather<false>(a.u, p.u, steps->base[kU], a.u.s[1], a.u.s[2], position, count, t.cols, kChannels,
                      [&](int i, int ch, float v) { tile_u[i * kPitch + ch] = v; });
      }
      if (p.ahead_delta.bytes > 0) {
#pragma unroll 1
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
      const auto enter = [&](int i, int ch, float v) {  // the gradient of the output
        if (gated) {
          float z = 0;
          if (p.ahead_z.bytes > 0)
            z = staged(stage, p.ahead_z, a.z.dtype, i * kChannels + ch);
          else if (i < count && ch < t.cols)
            z = element(a.z, steps->base[kZ] + position[i] * a.z.s[1] + ch * a.z.s[2]);
          const float gate = sigmoid(z);
          tile_z[i * kPitch + ch] = v * gate * fmaf(z, 1.0f - gate, 1.0f);
          v *= z * gate;
        }
        tile_g[i * kPitch + ch] = v;
      };
      if (p.ahead_grad.bytes > 0) {
#pragma unroll 1
        for (int i = s; i < padded4(count); i += p.lanes)
          enter(i, c, staged(stage, p.ahead_grad, a.grad_out.dtype, i * kChannels + c));
      } else {
        gather<false>(a.grad_out, p.grad, steps->base[kGrad], a.grad_out.s[1], a.grad_out.s[2], position, count, t.cols,
                      kChannels, enter);
      }
      bring_projection<kChannels, kComplex>(tile_b, stage, p.ahead_b, a.Bm, const_b, p.b, steps->base[kB], p, t,
                                            position, count, chunk == chunks - 1);
      bring_projection<kChannels, kComplex>(tile_c, stage, p.ahead_c, a.C, const_c, p.c, steps->base[kC], p, t,
                                            position, count, chunk == chunks - 1);
      float h[kOwn] = {};
      if (here) {
        const float* const saved = a.states + saved_offset(a, p, t, chunk, s * kOwn, d);
        const float* const came = reinterpret_cast<const float*>(stage + p.ahead_state) + tid;
#pragma unroll
        for (int j = 0; j < kOwn; ++j)
          if (s * kOwn + j < p.rows) h[j] = p.ahead_state >= 0 ? came[j * threads] : saved[j * a.D];
      }
      FD_BARRIER(kBackTileBarrier);
      if (chunk > 0) ask_tile(chunk - 1, steps->position[FD_MUTATED(kBackAhead) ? turn : next]);
      turn = next;

      // Forward, up to the last four steps.
      const int quarters = padded4(count) / kQuarter;
      for (int q = 0; q < quarters; ++q) {
        *reinterpret_cast<float4*>(marks + (q * threads + tid) * kOwn) = make_float4(h[0], h[1], h[2], h[3]);
        if (q + 1 == quarters) break;
#pragma unroll
        for (int j = 0; j < kQuarter; ++j) {
          const int i = q * kQuarter + j;
          const float dt = tile_t[i * kPitch + c], x = dt * tile_u[i * kPitch + c];
          float w[kOwn], b[kOwn];
          load_own(own_b + i * step_b, b);
          if (resets >> i & 1) {
#pragma unroll
            for (int n = 0; n < kOwn; ++n) h[n] = 0;
          }
          decays<kComplex>(dt, rate, w);
          advance<kComplex>(h, w, x, b);
        }
      }

      float da[kOwn] = {}, db[kOwn] = {}, dc[kOwn] = {}, dskip = 0, dbias = 0;
      for (int q = quarters - 1; q >= 0; --q) {
        float* const sum_e = sums + (FD_MUTATED(kBackSumTurn) ? 0 : q % 2) * 3 * kQuarter * threads;
        float* const sum_q = sum_e + kQuarter * threads;
        float* const sum_y = sum_q + kQuarter * threads;
        // Four steps forward, with all that the way back needs.
        float before[kOwn], after[kQuarter][kOwn], w[kQuarter][kOwn];
        load_own(marks + (q * threads + tid) * kOwn, before);
#pragma unroll
        for (int j = 0; j < kQuarter; ++j) {
          const int i = q * kQuarter + j;
          const float dt = tile_t[i * kPitch + c], x = dt * tile_u[i * kPitch + c];
          float b[kOwn];
          load_own(own_b + i * step_b, b);
#pragma unroll
          for (int n = 0; n < kOwn; ++n)
            after[j][n] = resets >> i & 1 ? 0.0f : j > 0 ? after[j > 0 ? j - 1 : 0][n] : before[n];
          decays<kComplex>(dt, rate, w[j]);
          advance<kComplex>(after[j], w[j], x, b);
          if (gated) {
            float cc[kOwn];
            load_own(own_c + i * step_c, cc);
            sum_y[j * threads + tid] = product<kComplex>(cc, after[j]);
          }
        }
        // Adds the values of all channels, and stores the sums of the quarter's steps.
        const auto sum_up = [&](float (&v)[kValues], float* to) {
          if (t.cols < kChannels && !here) {  // zero times an infinite B or C is not zero
#pragma unroll
            for (int k = 0; k < kValues; ++k) v[k] = 0;
          }
          sum_channels<kChannels>(v);
          constexpr int kLeft = kValues > kChannels ? kValues / kChannels : 1, kSame = kChannels * kLeft / kValues;
          const int value = c / kSame * kLeft, i = q * kQuarter + value / kOwn;
          if (i >= count || c % kSame != 0) return;
          float* const at = to + (steps->base[kSums] + position[i]) * p.rows + s * kOwn + value % kOwn;
#pragma unroll
          for (int k = 0; k < kLeft; ++k)
            if (s * kOwn + value % kOwn + k < p.rows) at[k] = v[k];
        };
        // dC needs the states only.
        float v[kValues];
#pragma unroll
        for (int j = 0; j < kQuarter; ++j) {
          const int i = q * kQuarter + j;
          const float g = i >= count ? 0.0f : kComplex ? 2.0f * tile_g[i * kPitch + c] : tile_g[i * kPitch + c];
#pragma unroll
          for (int n = 0; n < kOwn; ++n) {
            v[j * kOwn + n] = i >= count ? 0.0f : (kComplex && n % 2 ? -g : g) * after[j][n];
            if constexpr (kConstants) dc[n] += v[j * kOwn + n];
          }
        }
        if (!const_c) sum_up(v, a.partial_c);
        // And back.
#pragma unroll
        for (int j = kQuarter - 1; j >= 0; --j) {
          const int i = q * kQuarter + j;
          float* const vb = v + j * kOwn;
          if (i >= count) {
#pragma unroll
            for (int n = 0; n < kOwn; ++n) vb[n] = 0;
            continue;
          }
          const float dt = tile_t[i * kPitch + c], x = dt * tile_u[i * kPitch + c];
          const float g = kComplex ? 2.0f * tile_g[i * kPitch + c] : tile_g[i * kPitch + c];
          float b[kOwn], cc[kOwn], part_e = 0, part_q = 0;
          load_own(own_b + i * step_b, b);
          load_own(own_c + i * step_c, cc);
          const bool reset = resets >> i & 1;
#pragma unroll
          for (int n = 0; n < kOwn; ++n) {
            const float sign = kComplex && n % 2 ? -g : g;
            e[n] = fmaf(sign, cc[n], e[n]);
            vb[n] = e[n] * x;
            part_e = n ? fmaf(e[n], b[n], part_e) : e[n] * b[n];
          }
          const float (&past)[kOwn] = j > 0 ? after[j > 0 ? j - 1 : 0] : before;
          if (reset) {
#pragma unroll
            for (int n = 0; n < kOwn; ++n) e[n] = 0;
          } else if constexpr (kComplex) {
            // The gradient of h_prev is e conj(a); that of t A is e conj(a h_prev).
#pragma unroll
            for (int n = 0; n < kOwn; n += 2) {
              const float re = fmaf(e[n], w[j][n], e[n + 1] * w[j][n + 1]);
              e[n + 1] = fmaf(e[n + 1], w[j][n], -e[n] * w[j][n + 1]);
              e[n] = re;
              const float qr = fmaf(e[n], past[n], e[n + 1] * past[n + 1]);
              const float qi = fmaf(e[n + 1], past[n], -e[n] * past[n + 1]);
              // The real part of A carries log2 e, which is taken back out of the sum.
              part_q = fmaf(qr, rate[n], fmaf(qi, rate[n + 1] * kLog2e, part_q));
              da[n] = fmaf(qr, dt, da[n]), da[n + 1] = fmaf(qi, dt, da[n + 1]);
            }
          } else {
#pragma unroll
            for (int n = 0; n < kOwn; ++n) {
              e[n] *= w[j][n];
              const float qn = e[n] * past[n];
              part_q = fmaf(qn, rate[n], part_q);
              da[n] = fmaf(qn, dt, da[n]);
            }
          }
          sum_e[j * threads + tid] = part_e;
          sum_q[j * threads + tid] = part_q;
          if constexpr (kConstants) {
#pragma unroll
            for (int n = 0; n < kOwn; ++n) db[n] += vb[n];
          }
        }
        if (!const_b) sum_up(v, a.partial_b);
        FD_BARRIER(kBackSumBarrier);
        // One thread per step and channel; every thread always has the same channel.
        for (int o = tid; o < kQuarter * kChannels; o += threads) {
          const int j = o / kChannels, i = q * kQuarter + j, at = i * kPitch + c;
          if (i >= count || !here) continue;
          float part_e = 0, part_q = 0, y = 0;
          for (int l = 0; l < p.lanes; ++l) {
            const int from = j * threads + l * kChannels + c;
            part_e += sum_e[from], part_q += sum_q[from];
            if (gated) y += sum_y[from];
          }
          const float u = tile_u[at], dt = tile_t[at], g = tile_g[at];
          float grad_u = part_e * dt, grad_t = fmaf(part_e, u, part_q * kLn2);
          if (kComplex) y *= 2.0f;
          if (a.skip.data != nullptr) {
            const float skip = element(a.skip, t.k * a.skip.s[0] + d * a.skip.s[1]);
            grad_u = fmaf(skip, g, grad_u), y = fmaf(skip, u, y), dskip = fmaf(g, u, dskip);
          }
          // 1 - exp(-softplus(x)) is the sigmoid of x.
          if (a.softplus) grad_t *= -expm1f(-dt);
          dbias += grad_t;
          tile_u[at] = grad_u, tile_t[at] = grad_t;
          if (gated) tile_z[at] *= y;
        }
      }
#pragma unroll
      for (int n = 0; n < kOwn; ++n) {
        total_a[n] += da[n];
        if constexpr (kConstants) total_b[n] += db[n], total_c[n] += dc[n];
      }
      total_skip += dskip, total_bias += dbias;
      FD_BARRIER(kBackOutBarrier);
      scatter<kChannels>(du, p.du, t.b * du.s[0] + t.first * du.s[2], du.s[1], du.s[2], position, count, t.cols,
                         [&](int i, int ch) { return tile_u[i * kPitch + ch]; });
      scatter<kChannels>(a.ddelta, p.ddelta, t.b * a.ddelta.s[0] + t.k * a.ddelta.s[1] + t.first * a.ddelta.s[3],
                         a.ddelta.s[2], a.ddelta.s[3], position, count, t.cols,
                         [&](int i, int ch) { return tile_t[i * kPitch + ch]; });
      if (gated && a.dz.data != nullptr)
        scatter<kChannels>(a.dz, p.dz, t.b * a.dz.s[0] + t.first * a.dz.s[2], a.dz.s[1], a.dz.s[2], position, count,
                           t.cols, [&](int i, int ch) { return tile_z[i * kPitch + ch]; });
    }

    // Sums over steps, one sample's; reduce_rows adds the samples.
    const int64_t height = p.rows * (1 + a.constant_b + a.constant_c) + 2;
    float* const out = a.partial_rows + (t.b * a.K + t.k) * height * a.D + d;
    int64_t row = p.rows;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      const int r = s * kOwn + n;
      if (!here || r >= p.rows) continue;
      out[r * a.D] = total_a[n];
      if (const_b) out[(row + r) * a.D] = total_b[n];
      if (const_c) out[(row + (const_b ? p.rows : 0) + r) * a.D] = total_c[n];
      if (a.dinitial.data != nullptr) put_element(a.dinitial, state_offset<kComplex>(a.dinitial, t, d, r), e[n]);
    }
    __syncthreads();  // the last quarter's sums are still being read
    sums[tid] = total_skip, sums[threads + tid] = total_bias;
    __syncthreads();
    if (s == 0 && here) {
      const int lanes = p.lanes < kQuarter ? p.lanes : kQuarter;
      for (int l = 1; l < lanes; ++l)
        total_skip += sums[l * kChannels + c], total_bias += sums[threads + l * kChannels + c];
      out[(height - 2) * a.D] = total_skip;
      out[(height - 1) * a.D] = total_bias;
    }
  }
}

// [K, D, N (, 2)] from row `row` on of the sums of every sample, added in the order of the samples.
__global__ void __launch_bounds__(256)
    reduce_rows(ScanBackward a, Strided out, int64_t row, int64_t rows, int64_t parts) {
  const int64_t height = a.N * (a.complex ? 2 : 1) * (1 + a.constant_b + a.constant_c) + 2;
  const int64_t count = a.K * rows * a.D, step = static_cast<int64_t>(gridDim.x) * 256;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x; i < count; i += step) {
    int64_t d, r, k;
    split(i, a.D, &r, &d);
    split(r, rows, &k, &r);
    const float* from = a.partial_rows + (k * height + row + r) * a.D + d;
    float sum = 0;
#pragma unroll 4
    for (int64_t b = 0; b < a.B; ++b) sum += from[b * a.K * height * a.D];
    put_element(out, k * out.s[0] + d * out.s[1] + r / parts * out.s[2] + r % parts * out.s[3], sum);
  }
}

// dB or dC from the sums of every block of channels, added in the order of the blocks.
__global__ void __launch_bounds__(256)
    reduce_blocks(ScanBackward a, Strided out, const float* partial, int64_t blocks) {
  const int64_t parts = a.complex ? 2 : 1, rows = a.N * parts, size = a.L * rows;
  const int64_t count = a.B * a.K * a.G * size, step = static_cast<int64_t>(gridDim.x) * 256;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x; i < count; i += step) {
    int64_t r, l, g, k, b;
    split(i, rows, &l, &r);
    split(l, a.L, &g, &l);
    const float* from = partial + g * blocks * size + l * rows + r;
    split(g, a.G, &k, &g);
    split(k, a.K, &b, &k);
    float sum = 0;
#pragma unroll 8
    for (int64_t j = 0; j < blocks; ++j) sum += from[j * size];
    put_element(out,
                b * out.s[0] + k * out.s[1] + g * out.s[2] + l * out.s[3] + r / parts * out.s[4] + r % parts * out.s[5],
                sum);
  }
}

int64_t backward_memory(const Plan& p, int64_t channels) {  // without the stage
  const int64_t threads = p.lanes * channels;
  const int64_t floats = 2 * kSteps * p.pitch + kQuarters * threads * kOwn + (2 * 3 * kQuarter + 2) * threads +
                         4 * kSteps * (channels + 1);
  return static_cast<int64_t>(sizeof(Steps)) + static_cast<int64_t>(sizeof(float)) * floats;
}

template <int kChannels, bool kComplex>
void run(const ScanBackward& a, const Plan& p, void* stream) {
  const unsigned threads = static_cast<unsigned>(kChannels * p.lanes);
  const size_t bytes = static_cast<size_t>(backward_memory(p, kChannels) + p.stage);
  if (a.constant_b || a.constant_c)
    FD_LAUNCH((scan_backward_kernel<kChannels, kComplex, true>), grid_for(p.tasks), threads, bytes, stream, a, p);
  else
    FD_LAUNCH((scan_backward_kernel<kChannels, kComplex, false>), grid_for(p.tasks), threads, bytes, stream, a, p);
}

void rows(const ScanBackward& a, const Strided& out, int64_t row, int64_t rows, int64_t parts, void* stream) {
  const int64_t count = a.K * rows * a.D;
  if (out.data != nullptr && count > 0)
    FD_LAUNCH(reduce_rows, grid_for((count + 255) / 256), 256u, 0, stream, a, out, row, rows, parts);
}
void blocks(const ScanBackward& a, const Strided& out, const float* partial, int64_t blocks, void* stream) {
  const int64_t count = a.B * a.K * a.G * a.L * a.N * (a.complex ? 2 : 1);
  if (out.data != nullptr && count > 0)
    FD_LAUNCH(reduce_blocks, grid_for((count + 255) / 256), 256u, 0, stream, a, out, partial, blocks);
}

}  // namespace

void selective_scan_backward(const ScanBackward& a, int device, void* stream) {
  const DeviceGuard guard(device);
  Plan p = plan_of(a);
  const bool whole = a.G == 1 || p.size % 4 == 0;
  Strided du = a.du;
  if (a.partial_du != nullptr) du.data = a.partial_du, du.dtype = kF32;
  p.grad = path_of(a.grad_out, a.grad_out.s[1], a.grad_out.s[2], whole);
  p.du = path_of(du, du.s[1], du.s[2], whole && a.B * a.L * a.D % 4 == 0);
  p.ddelta = path_of(a.ddelta, a.ddelta.s[2], a.ddelta.s[3], whole);
  p.dz = path_of(a.dz, a.dz.s[1], a.dz.s[2], whole);
  if (p.tasks > 0) {
    const int64_t channels = scan_cuda_channels(p.rows);
    plan_ahead(a, &a.grad_out, backward_memory(p, channels), &p);
    if (channels == 32)
      a.complex ? run<32, true>(a, p, stream) : run<32, false>(a, p, stream);
    else
      a.complex ? run<8, true>(a, p, stream) : run<8, false>(a, p, stream);
  }
  const int64_t parts = a.complex ? 2 : 1, r = p.rows;
  int64_t row = r;
  rows(a, a.dA, 0, r, parts, stream);
  if (a.constant_b) rows(a, a.dB, row, r, parts, stream), row += r;
  if (a.constant_c) rows(a, a.dC, row, r, parts, stream), row += r;
  rows(a, a.dskip, row, 1, 1, stream);
  rows(a, a.dbias, row + 1, 1, 1, stream);
  if (!a.constant_b) blocks(a, a.dB, a.partial_b, p.blocks, stream);
  if (!a.constant_c) blocks(a, a.dC, a.partial_c, p.blocks, stream);
  const int64_t count = a.B * a.L * a.D;
  if (a.partial_du != nullptr && count > 0)
    FD_LAUNCH(add_parts, grid_for((count + 255) / 256), 256u, 0, stream, a.partial_du, static_cast<float*>(a.du.data),
              count, a.K);
}

}  // namespace cuda
}  // namespace fastdiff
