// Causal depthwise convolution along t on CUDA, with SiLU, forward and backward.
//
//   pre[b, d, t] = bias[d] + sum_k weight[d, k] past[b, d, t + k]         past = (state, x), so past[t + K - 1] = x[t]
//   out = pre, or silu(pre) = pre / (1 + exp(-pre))
//   dpre = grad, or grad s (1 + pre (1 - s)), s = 1 / (1 + exp(-pre))
//   dpast[p] = sum_k weight[k] dpre[p - k]     dweight[k] = sum_bt dpre[t] past[t + k]     dbias = sum_bt dpre
//
// Floor: x read once and out written once, backward x and grad read and dx written; some 25 instructions an element are
// less than the time of its four bytes (1.15e12 elements a second against 1.07e12 at 4.3 TB/s in bf16).
//
// Mapping: a block takes 32 channels of 64 steps. It brings the piece of the past it needs into shared memory as
// float32, along whichever axis is contiguous (four channels a load, or 32 steps of a channel, transposed on the way);
// then lanes are channels and a thread takes eight steps in a row, its window of K values in registers. So both
// layouts, and any strides, share one kernel and give the same bits. 2 KB are asked for at once by every warp's lanes
// together and six blocks fit an SM (17 KB, 40 registers a thread).
//
// Backward: dx at t needs dpre of t .. t + K - 1, so a block computes the K - 1 dpre of the next tile once more.
// dweight and dbias are summed over a thread's eight steps, over the eight warps, into a workspace per tile, and by a
// second kernel over the tiles of all samples: in 8 interleaved parts, then these in order. No atomics.
//
// Predicted at (2, 1536, 1024), K = 4, bf16: forward 12.6 MB, 4 us at best (75 % of copy), backward 19 MB, 8 us (shared
// memory: four accesses a value). Performance: not measured.
#include "mma.cuh"
#include "vec.cuh"

namespace fastdiff {
namespace cuda {
namespace {

constexpr int kWide = 32;                                // channels of a tile
constexpr int kLong = static_cast<int>(kConvCudaSteps);  // steps of a tile
constexpr int kRun = 8;                                  // steps of a thread
constexpr int kWarps = kLong / kRun, kThreads = 32 * kWarps;
constexpr int kPitch = kWide + 1;

enum Path : int8_t { kAcross, kAcross4, kAlong };

struct Plan {
  int64_t strips, tiles, tasks;
  int8_t x, out, grad, dx;
};

int8_t path_of(const Strided& v) {
  if (v.data == nullptr) return kAcross;
  if (v.s[1] != 1) return v.s[2] == 1 ? kAlong : kAcross;
  const int64_t size = dtype_size(v.dtype), bytes = 4 * size;
  const bool aligned =
      reinterpret_cast<uintptr_t>(v.data) % bytes == 0 && v.s[0] * size % bytes == 0 && v.s[2] * size % bytes == 0;
  return aligned ? kAcross4 : kAcross;
}
Plan plan_of(const CausalConv1d& a) {
  Plan p = {};
  p.strips = (a.D + kWide - 1) / kWide, p.tiles = (a.L + kLong - 1) / kLong;
  p.tasks = a.B * p.tiles * p.strips;
  p.x = path_of(a.x), p.out = path_of(a.out);
  return p;
}

// 32 channels of 64 steps.
struct Task {
  int64_t b, tile, d, t;  // first channel and step
  int cols;
};
FD_D Task task_of(const CausalConv1d& a, const Plan& p, int64_t index) {
  Task task;
  int64_t strip, rest;
  split(index, p.strips, &rest, &strip);
  split(rest, p.tiles, &task.b, &task.tile);
  task.d = strip * kWide, task.t = task.tile * kLong;
  task.cols = static_cast<int>(a.D - task.d < kWide ? a.D - task.d : kWide);
  return task;
}

FD_D Row element_row(const Strided& m, int64_t offset) {
  return {static_cast<char*>(m.data) + offset * dtype_size(m.dtype), 1, m.dtype};
}
FD_D float element(const Strided& m, int64_t offset) {
  float v[1];
  read<1, true>(element_row(m, offset), 0, v);
  return v[0];
}
FD_D void put_element(const Strided& m, int64_t offset, float value) {
  const float v[1] = {value};
  write<1>(element_row(m, offset), 0, v);
}

// Rows [rows, kPitch]: steps first, first + 1, ... of an operand [B, D, L]; zero outside [0, L) and the task's
// channels.
FD_D void fetch(float* tile, const Strided& m, int path, const Task& task, int64_t first, int rows, int64_t L) {
  const int64_t base = task.b * m.s[0] + task.d * m.s[1];
  if (path == kAlong) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int c = static_cast<int>(threadIdx.x) / 32; c < kWide; c += kWarps) {
#pragma unroll 4
      for (int r = lane; r < rows; r += 32) {
        const int64_t t = first + r;
        tile[r * kPitch + c] = t >= 0 && t < L && c < task.cols ? element(m, base + c * m.s[1] + t) : 0.0f;
      }
    }
  } else if (path == kAcross4) {
#pragma unroll 2
    for (int e = static_cast<int>(threadIdx.x); e < rows * (kWide / 4); e += kThreads) {
      const int r = e / (kWide / 4), c = e % (kWide / 4) * 4;
      const int64_t t = first + r;
      float v[4] = {};
      if (t >= 0 && t < L) {
        const int64_t offset = base + t * m.s[2] + c;
        if (c + 4 <= task.cols) {
          read<4, true>(element_row(m, offset), 0, v);
        } else {
#pragma unroll
          for (int j = 0; j < 3; ++j)
            if (c + j < task.cols) v[j] = element(m, offset + j);
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) tile[r * kPitch + c + j] = v[j];
    }
  } else {
#pragma unroll 4
    for (int e = static_cast<int>(threadIdx.x); e < rows * kWide; e += kThreads) {
      const int r = e / kWide, c = e % kWide;
      const int64_t t = first + r;
      tile[r * kPitch + c] = t >= 0 && t < L && c < task.cols ? element(m, base + c * m.s[1] + t * m.s[2]) : 0.0f;
    }
  }
}

// The past from position task.t on: what `fetch` left zero because it lies before the first step comes from the state.
// Whoever wrote the zero may not be who writes the value, hence the barrier.
FD_D void fetch_past(float* tile, const CausalConv1d& a, const Plan& p, const Task& task, int rows) {
  const int64_t before = a.K - 1;
  fetch(tile, a.x, p.x, task, task.t - before, rows, a.L);
  if (task.t >= before || a.state.data == nullptr) return;
  FD_BARRIER(kConvStateBarrier);
  const int from_state = static_cast<int>(before - task.t < rows ? before - task.t : rows);
  for (int e = static_cast<int>(threadIdx.x); e < from_state * kWide; e += kThreads) {
    const int r = e / kWide, c = e % kWide;
    if (c < task.cols)
      tile[r * kPitch + c] =
          element(a.state, task.b * a.state.s[0] + (task.d + c) * a.state.s[1] + (task.t + r) * a.state.s[2]);
  }
}

// A tile [kLong, kPitch] to its place.
FD_D void store_tile(const Strided& m, int path, const float* tile, const Task& task, int count) {
  const int64_t base = task.b * m.s[0] + task.d * m.s[1];
  if (path == kAlong) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int c = static_cast<int>(threadIdx.x) / 32; c < task.cols; c += kWarps)
      for (int r = lane; r < count; r += 32) put_element(m, base + c * m.s[1] + task.t + r, tile[r * kPitch + c]);
  }
}

FD_D float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Weights and bias of a thread's channel; for any K the weights stay in shared memory [K, kWide].
template <int kTaps>
struct Taps {
  float w[kTaps > 0 ? kTaps : 1], bias;
  const float* shared;
};
template <int kTaps>
FD_D Taps<kTaps> load_taps(const CausalConv1d& a, const Task& task, float* shared) {
  const int c = static_cast<int>(threadIdx.x) % kWide;
  Taps<kTaps> taps;
  taps.shared = shared + c, taps.bias = 0;
  const bool here = c < task.cols;
  if (here && a.bias.data != nullptr) taps.bias = element(a.bias, (task.d + c) * a.bias.s[0]);
  if constexpr (kTaps > 0) {
#pragma unroll
    for (int k = 0; k < kTaps; ++k)
      taps.w[k] = here ? element(a.weight, (task.d + c) * a.weight.s[0] + k * a.weight.s[1]) : 0.0f;
  } else {
    for (int64_t k = threadIdx.x / 32; k < a.K; k += kWarps)
      shared[k * kWide + c] = here ? element(a.weight, (task.d + c) * a.weight.s[0] + k * a.weight.s[1]) : 0.0f;
  }
  return taps;
}

// pre of one step, `past` being its first value: column of a tile.
template <int kTaps>
FD_D float convolve(const float* past, int K, const Taps<kTaps>& taps) {
  float v = taps.bias;
  if constexpr (kTaps > 0) {
#pragma unroll
    for (int k = 0; k < kTaps; ++k) v = fmaf(taps.w[k], past[k * kPitch], v);
  } else {
    for (int k = 0; k < K; ++k) v = fmaf(taps.shared[k * kWide], past[k * kPitch], v);
  }
  return v;
}
// pre of kRun steps; `window` receives what they read where K is known.
template <int kTaps>
FD_D void convolve_run(const float* past, int K, const Taps<kTaps>& taps,
                       float (&window)[kRun + (kTaps > 0 ? kTaps - 1 : 0)], float (&pre)[kRun]) {
  if constexpr (kTaps > 0) {
#pragma unroll
    for (int i = 0; i < kRun + kTaps - 1; ++i) window[i] = past[i * kPitch];
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      pre[i] = taps.bias;
#pragma unroll
      for (int k = 0; k < kTaps; ++k) pre[i] = fmaf(taps.w[k], window[i + k], pre[i]);
    }
  } else {
    (void)window;
#pragma unroll 1
    for (int i = 0; i < kRun; ++i) {
      const float v = convolve<0>(past + i * kPitch, K, taps);
#pragma unroll
      for (int j = 0; j < kRun; ++j)
        if (j == i) pre[j] = v;
    }
  }
}

template <int kTaps>
__global__ void __launch_bounds__(kThreads, kTaps > 0 ? 6 : 2) conv_kernel(CausalConv1d a, Plan p) {
  FD_SHARED_DYNAMIC(float, past);  // [kLong + K - 1, kPitch]
  const int K = kTaps > 0 ? kTaps : static_cast<int>(a.K), rows = kLong + K - 1;
  float* const result = past + rows * kPitch;      // [kLong, kPitch]
  float* const weights = result + kLong * kPitch;  // [K, kWide], any K
  const int c = static_cast<int>(threadIdx.x) % kWide, run = static_cast<int>(threadIdx.x) / kWide * kRun;
  for (int64_t index = blockIdx.x; index < p.tasks; index += gridDim.x) {
    const Task task = task_of(a, p, index);
    const int count = static_cast<int>(a.L - task.t < kLong ? a.L - task.t : kLong);
    const Taps<kTaps> taps = load_taps<kTaps>(a, task, weights);
    fetch_past(past, a, p, task, rows);
    FD_BARRIER(kConvTileBarrier);
    float window[kRun + (kTaps > 0 ? kTaps - 1 : 0)], pre[kRun];
    if (run < count) {
      convolve_run<kTaps>(past + run * kPitch + c, K, taps, window, pre);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        float v = pre[i];
        if (a.silu) v = v / (1.0f + expf(-v));
        if (p.out == kAlong) {
          result[(run + i) * kPitch + c] = v;
        } else if (run + i < count && c < task.cols) {
          put_element(a.out, task.b * a.out.s[0] + (task.d + c) * a.out.s[1] + (task.t + run + i) * a.out.s[2], v);
        }
      }
    }
    FD_BARRIER(kConvOutBarrier);  // also: the past and the weights are no longer read
    store_tile(a.out, p.out, result, task, count);
  }
}

template <int kTaps>
__global__ void __launch_bounds__(kThreads, kTaps > 0 ? 4 : 2) conv_backward_kernel(CausalConv1dBackward a, Plan p) {
  FD_SHARED_DYNAMIC(float, past);  // [kLong + 2 (K - 1), kPitch], later dx
  const int K = kTaps > 0 ? kTaps : static_cast<int>(a.K), ahead = K - 1, rows = kLong + ahead;
  float* const dpre = past + (rows + ahead) * kPitch;  // [kLong + K - 1, kPitch], at first the gradient
  float* const sums = dpre + rows * kPitch;            // [kWarps, K + 1, kWide]; any K: [K, kWide] weights
  const int c = static_cast<int>(threadIdx.x) % kWide, warp = static_cast<int>(threadIdx.x) / kWide, run = warp * kRun;
  for (int64_t index = blockIdx.x; index < p.tasks; index += gridDim.x) {
    const Task task = task_of(a, p, index);
    const int count = static_cast<int>(a.L - task.t < kLong ? a.L - task.t : kLong);
    const Taps<kTaps> taps = load_taps<kTaps>(a, task, sums);
    fetch_past(past, a, p, task, rows + ahead);
    fetch(dpre, a.grad, p.grad, task, task.t, rows, a.L);
    FD_BARRIER(kConvBackTileBarrier);

    // dpre of the tile, and of the K - 1 steps behind it. Beyond L the gradient is zero, and so is dpre.
    const auto slope = [&](float pre, float g) {
      if (!a.silu) return g;
      const float s = sigmoid(pre);
      // Below -87 s is 0, and so is the slope, but not pre (1 - s).
      const float v = pre < -87.0f && pre > -3.0e38f ? 0.0f : s * fmaf(pre, 1.0f - s, 1.0f);
      return g * v;
    };
    float window[kRun + (kTaps > 0 ? kTaps - 1 : 0)], pre[kRun] = {}, mine[kRun];
    if (a.silu || kTaps > 0) convolve_run<kTaps>(past + run * kPitch + c, K, taps, window, pre);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      float* const at = dpre + (run + i) * kPitch + c;
      mine[i] = run + i < count ? slope(pre[i], *at) : 0.0f;
      *at = mine[i];
    }
    for (int r = kLong + warp; r < rows; r += kWarps)
      if (task.t + r < a.L && !FD_MUTATED(kConvHalo)) {
        float* const at = dpre + r * kPitch + c;
        *at = slope(a.silu ? convolve<kTaps>(past + r * kPitch + c, K, taps) : 0.0f, *at);
      }
    float sum[(kTaps > 0 ? kTaps : 0) + 1] = {};
    if constexpr (kTaps > 0) {
      if (a.partial != nullptr) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          if (run + i >= count) continue;  // a zero of dpre would meet an infinite x
#pragma unroll
          for (int k = 0; k < kTaps; ++k) sum[k] = fmaf(mine[i], window[i + k], sum[k]);
          sum[kTaps] += mine[i];
        }
#pragma unroll
        for (int k = 0; k <= kTaps; ++k) sums[(warp * (kTaps + 1) + k) * kWide + c] = sum[k];
      }
    }
    FD_BARRIER(kConvBackSumBarrier);
    if (a.partial != nullptr) {
      for (int e = static_cast<int>(threadIdx.x); e < (K + 1) * kWide; e += kThreads) {
        const int k = e / kWide;
        float total = 0;
        if constexpr (kTaps > 0) {
          for (int w = 0; w < kWarps; ++w) total += sums[(w * (kTaps + 1) + k) * kWide + c];
        } else {
          for (int r = 0; r < count; ++r) {
            const float g = dpre[r * kPitch + c];
            total = k < K ? fmaf(g, past[(r + k) * kPitch + c], total) : total + g;
          }
        }
        if (c < task.cols) a.partial[((task.b * p.tiles + task.tile) * (K + 1) + k) * a.D + task.d + c] = total;
      }
    }
    // The first tile's state. dpast[p] = sum of the taps k <= p.
    if (a.dstate.data != nullptr && task.t == 0 && c < task.cols) {
      for (int at = warp; at < ahead; at += kWarps) {
        float v = 0;
        for (int k = 0; k <= at; ++k) {
          const float g = at - k < rows ? dpre[(at - k) * kPitch + c] : 0.0f;
          v = fmaf(
              kTaps > 0 ? element(a.weight, (task.d + c) * a.weight.s[0] + k * a.weight.s[1]) : taps.shared[k * kWide],
              g, v);
        }
        put_element(a.dstate, task.b * a.dstate.s[0] + (task.d + c) * a.dstate.s[1] + at * a.dstate.s[2], v);
      }
    }
    if (a.dx.data != nullptr) {
      // dx[t] = dpast[t + K - 1]: dpre of t + K - 1 first, as the taps go.
      float dx[kRun] = {};
      if constexpr (kTaps > 0) {
        float next[kRun + kTaps - 1];
#pragma unroll
        for (int i = 0; i < kRun + kTaps - 1; ++i) next[i] = dpre[(run + i) * kPitch + c];
#pragma unroll
        for (int i = 0; i < kRun; ++i)
#pragma unroll
          for (int k = 0; k < kTaps; ++k) dx[i] = fmaf(taps.w[k], next[i + kTaps - 1 - k], dx[i]);
      } else {
        __syncthreads();  // dweight has been summed from the past, which dx overwrites
#pragma unroll
        for (int i = 0; i < kRun; ++i)
          for (int k = 0; k < K; ++k)
            dx[i] = fmaf(taps.shared[k * kWide], dpre[(run + i + ahead - k) * kPitch + c], dx[i]);
      }
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (p.dx == kAlong)
          past[(run + i) * kPitch + c] = dx[i];
        else if (run + i < count && c < task.cols)
          put_element(a.dx, task.b * a.dx.s[0] + (task.d + c) * a.dx.s[1] + (task.t + run + i) * a.dx.s[2], dx[i]);
      }
    }
    FD_BARRIER(kConvBackOutBarrier);
    if (a.dx.data != nullptr && p.dx == kAlong) {
      store_tile(a.dx, p.dx, past, task, count);
      __syncthreads();  // the next task writes the past
    }
  }
}

// dweight [D, K] and dbias [D] from the sums of every tile: eight interleaved parts, then these in order.
__global__ void __launch_bounds__(256) reduce_tiles(CausalConv1dBackward a, int64_t tiles) {
  FD_SHARED(float, parts, 8 * 32);
  const int lane = static_cast<int>(threadIdx.x) % 32, part = static_cast<int>(threadIdx.x) / 32;
  const int64_t strips = (a.D + 31) / 32, count = a.B * tiles, row = (a.K + 1) * a.D;
  for (int64_t task = blockIdx.x; task < (a.K + 1) * strips; task += gridDim.x) {
    const int64_t k = task / strips, d = task % strips * 32 + lane;
    float sum = 0;
    if (d < a.D) {
      const float* const from = a.partial + k * a.D + d;
#pragma unroll 8
      for (int64_t i = part; i < count; i += 8) sum += from[i * row];
    }
    parts[part * 32 + lane] = sum;
    FD_BARRIER(kConvPartBarrier);
    const Strided& to = k < a.K ? a.dweight : a.dbias;
    if (part == 0 && d < a.D && to.data != nullptr) {
      for (int i = 1; i < 8; ++i) sum += parts[i * 32 + lane];
      put_element(to, d * to.s[0] + (k < a.K ? k * to.s[1] : 0), sum);
    }
    __syncthreads();
  }
}

template <int kTaps>
void forward(const CausalConv1d& a, const Plan& p, void* stream) {
  const int64_t rows = kLong + a.K - 1 + kLong;
  const size_t bytes = 4 * static_cast<size_t>(rows * kPitch + (kTaps > 0 ? 0 : a.K * kWide));
  FD_LAUNCH((conv_kernel<kTaps>), grid_for(p.tasks), static_cast<unsigned>(kThreads), bytes, stream, a, p);
}
template <int kTaps>
void backward(const CausalConv1dBackward& a, const Plan& p, void* stream) {
  const int64_t rows = 2 * kLong + 3 * (a.K - 1);
  const size_t bytes =
      4 * static_cast<size_t>(rows * kPitch + (kTaps > 0 ? kWarps * (kTaps + 1) * kWide : a.K * kWide));
  FD_LAUNCH((conv_backward_kernel<kTaps>), grid_for(p.tasks), static_cast<unsigned>(kThreads), bytes, stream, a, p);
}

}  // namespace

void causal_conv1d(const CausalConv1d& a, int device, void* stream) {
  const DeviceGuard guard(device);
  const Plan p = plan_of(a);
  if (p.tasks == 0) return;
  if (a.K == 4) return forward<4>(a, p, stream);
  if (a.K == 3) return forward<3>(a, p, stream);
  if (a.K == 2) return forward<2>(a, p, stream);
  forward<0>(a, p, stream);
}

void causal_conv1d_backward(const CausalConv1dBackward& a, int device, void* stream) {
  const DeviceGuard guard(device);
  Plan p = plan_of(a);
  p.grad = path_of(a.grad), p.dx = path_of(a.dx);
  if (p.tasks == 0) return;
  if (a.K == 4)
    backward<4>(a, p, stream);
  else if (a.K == 3)
    backward<3>(a, p, stream);
  else if (a.K == 2)
    backward<2>(a, p, stream);
  else
    backward<0>(a, p, stream);
  if (a.partial != nullptr)
    FD_LAUNCH(reduce_tiles, grid_for((a.K + 1) * ((a.D + 31) / 32)), 256u, 0, stream, a, p.tiles);
}

}  // namespace cuda
}  // namespace fastdiff
