// Small kernels, right and wrong, that test the emulator itself (tests/test_emulator.py calls them through ctypes).
#include <cstdio>
#include <type_traits>

#include "../../csrc/cuda/async.cuh"
#include "../../csrc/cuda/cluster.cuh"
#include "../../csrc/cuda/exp2.cuh"
#include "../../csrc/cuda/hopper.cuh"
#include "../../csrc/cuda/mma.cuh"

namespace fastdiff {
namespace {

// ------------------------------------------------------------------------------------------------- right kernels

__global__ void reverse_in_block(float* data) {
  FD_SHARED_DYNAMIC(float, copy);
  copy[threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  data[threadIdx.x] = copy[blockDim.x - 1 - threadIdx.x];
}

// Every kind of shuffle; the second within half warps, each under its own mask. Four results per thread.
__global__ void shuffles(float* data) {
  const int lane = threadIdx.x % 32;
  float* out = data + 4 * threadIdx.x;
  out[0] = __shfl_sync(0xffffffffu, static_cast<float>(lane), (lane + 1) % 32);
  out[1] = static_cast<float>(__shfl_xor_sync(lane < 16 ? 0x0000ffffu : 0xffff0000u, lane, 1));
  out[2] = static_cast<float>(__shfl_down_sync(0xffffffffu, static_cast<double>(lane), 3));  // the last 3 keep theirs
  __syncwarp();
  out[3] = static_cast<float>(__shfl_up_sync(0xffffffffu, lane, 1));
}

// Blocks in two dimensions, threads in three: every position once.
__global__ void positions(float* data) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * blockIdx.y;
  data[block * blockDim.x * blockDim.y * blockDim.z + thread] += static_cast<float>(block * 1000 + thread);
}

// What an unwritten shared array holds.
__global__ void unwritten_shared(float* data) {
  FD_SHARED(float, array, 32);
  data[threadIdx.x] = array[threadIdx.x];
  array[threadIdx.x] = 1.0f;  // the next block must not see it
}

// Correct only in index order: a thread reads what the previous one stored, without a barrier.
__global__ void racy_chain(float* data) {
  FD_SHARED(float, chain, 64);
  chain[threadIdx.x] = static_cast<float>(threadIdx.x);
  data[threadIdx.x] = threadIdx.x == 0 ? 0.0f : chain[threadIdx.x - 1];
}

// data: A [16, 16], B [16, 8], then D [16, 8]. The operands go through shared memory and ldmatrix.
template <bool kBf16>
__global__ void product_16(float* data) {
  using T = std::conditional_t<kBf16, bf16, f16>;
  FD_SHARED(T, a, 16 * 16);
  FD_SHARED(T, b, 16 * 8);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) a[i] = from_float<T>(data[i]);
  for (int i = lane; i < 128; i += 32) b[i] = from_float<T>(data[256 + i]);
  __syncwarp();
  uint32_t fa[4], fb[2], twice[2], single[1], turned[1];
  cuda::load_matrices<4>(fa, a + 16 * (lane % 16) + 8 * (lane / 16));
  cuda::load_matrices<2, true>(fb, b + 8 * (lane % 16));
  cuda::load_matrices<2>(twice, a + 16 * (lane % 16));
  cuda::load_matrices<1>(single, a + 16 * (lane % 8) + 8);
  cuda::load_matrices<1, true>(turned, b + 8 * (lane % 8));
  float d[4] = {};
  cuda::mma_16<kBf16>(d, fa, fb);
  const bool same = twice[0] == fa[0] && twice[1] == fa[1] && single[0] == fa[2] && turned[0] == fb[0];
  for (int i = 0; i < 4; ++i) data[384 + 8 * (lane / 4 + i / 2 * 8) + 2 * (lane % 4) + i % 2] = same ? d[i] : -1.0f;
}

// data: A [16, 8], B [8, 8], then D [16, 8].
__global__ void product_tf32(float* data) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = cuda::to_tf32(data[8 * (g + i % 2 * 8) + t + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) b[i] = cuda::to_tf32(data[128 + 8 * (t + 4 * i) + g]);
  float d[4] = {};
  cuda::mma_tf32(d, a, b);
  for (int i = 0; i < 4; ++i) data[192 + 8 * (g + i / 2 * 8) + 2 * t + i % 2] = d[i];
}

// data: [64] to copy; then what is seen before the copy is waited for, and after; the second half is cut to 8 bytes.
__global__ void copies(float* data) {
  FD_SHARED_DYNAMIC(float, to);
  const int i = 4 * threadIdx.x;
  cuda::copy_async<16>(to + i, data + i, i < 32 ? 16 : 8);
  cuda::commit_copies();
  cuda::copy_async<4>(to + 64 + threadIdx.x, data);
  cuda::commit_copies();
  for (int k = 0; k < 4; ++k) data[64 + i + k] = to[i + k];
  cuda::wait_copies<1>();
  for (int k = 0; k < 4; ++k) data[128 + i + k] = to[i + k];
  data[192 + threadIdx.x] = to[64 + threadIdx.x];
  cuda::wait_copies<0>();
}

// data[block * 32 + thread] = what the next block of the cluster (of 4) wrote there.
__global__ void around_the_cluster(float* data) {
  FD_SHARED(float, mine, 32);
  mine[threadIdx.x] = static_cast<float>(100 * blockIdx.x + threadIdx.x);
  cuda::cluster_sync();
  const int next = (cuda::cluster_rank() + 1) % 4;
  data[32 * blockIdx.x + threadIdx.x] = cuda::shared_of(mine, next)[threadIdx.x];
  cuda::cluster_sync();
}

// data: k [40, 72], p [64, 16] of numbers that bfloat16 holds; then d = k[0:64] k[0:64]^T, zeros beyond row 40, by the
// tensor cores of a warpgroup, and p k[0:16]. The copy engine brings k in two tiles, with the third thread's help.
__global__ void hopper_products(float* data) {
  FD_SHARED(char, a, 64 * 128);
  FD_SHARED(char, rest, 64 * 32);
  FD_SHARED(char, narrow, 16 * 16);
  FD_SHARED(cuda::Barrier, full, 1);
  FD_SHARED(cuda::Barrier, again, 1);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = 2 * (lane % 4);
  static bf16 k[40 * 72];
  static cuda::TensorMap map, tail, strip;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 40 * 72; ++i) k[i] = from_float<bf16>(data[i]);
    const int64_t size[4] = {1, 1, 40, 72}, stride[4] = {40 * 72, 40 * 72, 72, 1};
    if (!cuda::make_map(&map, k, true, size, stride, 64, 64, 128) ||
        !cuda::make_map(&tail, k, true, size, stride, 64, 16, 32) ||
        !cuda::make_map(&strip, k, true, size, stride, 16, 8, 0))
      return;
    cuda::init_barrier(full, 2);
    cuda::init_barrier(again, 1);
    cuda::publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x == 2) {
    cuda::arrive_expecting(full, 64 * 128 + 64 * 32);
    cuda::copy_box(a, &map, full, 0, 0, 0, 0);
    cuda::copy_box(rest, &tail, full, 64, 0, 0, 0);
    cuda::arrive_expecting(again, 16 * 16);
    cuda::copy_box(narrow, &strip, again, 64, 0, 0, 0);
  }
  if (threadIdx.x == 3) cuda::arrive(full);
  cuda::wait_phase(full, 0);
  cuda::wait_phase(again, 0);
  float d[64] = {};
  const cuda::Tile tile = cuda::make_tile<128>(a, 1024), other = cuda::make_tile<32>(rest, 256);
  // The second operand has 128 rows; those beyond 64 are whatever lies there, and are not looked at.
  FD_SHARED(char, both, 128 * 128);
  FD_SHARED(char, both_rest, 128 * 32);
  for (int i = threadIdx.x; i < 128 * 128; i += 128) both[i] = i < 64 * 128 ? a[i] : 0;
  for (int i = threadIdx.x; i < 128 * 32; i += 128) both_rest[i] = i < 64 * 32 ? rest[i] : 0;
  __syncthreads();
  const cuda::Tile wide = cuda::make_tile<128>(both, 1024), wide_rest = cuda::make_tile<32>(both_rest, 256);
  cuda::fence_products();
  for (int step = 0; step < 4; ++step)
    cuda::start_product<true>(d, cuda::advance(tile, 32 * step), cuda::advance(wide, 32 * step), step > 0);
  cuda::start_product<true>(d, other, wide_rest, 1);
  cuda::commit_products();
  const bool hidden = d[0] != d[0];  // NaN: nobody may look yet
  float e[32] = {}, f[4] = {};
  uint32_t p[4];
  const float* const q = data + 40 * 72;
  for (int i = 0; i < 4; ++i) {
    const int row = 16 * warp + g + i % 2 * 8, column = t + i / 2 * 8;
    p[i] = from_float<bf16>(q[16 * row + column]).bits |
           static_cast<uint32_t>(from_float<bf16>(q[16 * row + column + 1]).bits) << 16;
  }
  cuda::start_product<true>(e, p, cuda::make_tile<128>(a, 1024), 1);
  cuda::start_product<true>(f, p, cuda::make_tile<16>(narrow, 128), 1);
  cuda::commit_products();
  cuda::wait_products<1>();
  float* out = data + 40 * 72 + 64 * 16;
  for (int i = 0; i < 32; ++i)
    out[64 * (16 * warp + g + i % 4 / 2 * 8) + i / 4 * 8 + t + i % 2] = hidden ? d[i] : -1.0f;
  cuda::wait_products<0>();
  out += 64 * 64;
  for (int i = 0; i < 32; ++i) out[72 * (16 * warp + g + i % 4 / 2 * 8) + i / 4 * 8 + t + i % 2] = e[i];
  for (int i = 0; i < 4; ++i) out[72 * (16 * warp + g + i / 2 * 8) + 64 + t + i % 2] = f[i];
  cuda::meet(1, 128);
}

__global__ void votes(float* data) {
  data[threadIdx.x] = static_cast<float>(__ballot_sync(0xffffffffu, threadIdx.x % 3 == 0) & 0xffffu);
}

// ------------------------------------------------------------------------------------------------- wrong kernels

__global__ void phase_that_never_ends(float* data) {
  FD_SHARED(cuda::Barrier, b, 1);
  if (threadIdx.x == 0) cuda::init_barrier(b, 2);
  __syncthreads();
  if (threadIdx.x == 0) cuda::arrive(b);
  cuda::wait_phase(b, 0);
  data[0] = 1.0f;
}

__global__ void barrier_of_too_few(float* data) {
  if (threadIdx.x < 31) cuda::meet(2, 32);
  data[0] = 1.0f;
}

__global__ void product_not_waited_for(float* data) {
  FD_SHARED(char, tile, 16 * 128);
  float d[4] = {};
  const uint32_t a[4] = {};
  cuda::start_product<true>(d, a, cuda::make_tile<16>(tile, 128), 1);
  data[threadIdx.x] = d[0];
}

__global__ void half_a_cluster(float* data) {
  if (blockIdx.x == 0) cuda::cluster_sync();
  data[threadIdx.x] = 1.0f;
}

__global__ void copy_not_waited_for(float* data) {
  FD_SHARED(float, to, 32);
  cuda::copy_async<4>(to + threadIdx.x, data + threadIdx.x);
}

__global__ void return_before_barrier(float* data) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  data[threadIdx.x] = 1.0f;
}

__global__ void different_barriers(float* data) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  data[threadIdx.x] = 1.0f;
}

__global__ void absent_lane(float* data) {
  if (threadIdx.x % 32 == 31) return;
  data[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void unnamed_caller(float* data) { data[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 1); }

__global__ void unnamed_source(float* data) {
  if (threadIdx.x % 32 < 16) data[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 16);
}

__global__ void shuffle_against_barrier(float* data) {
  if (threadIdx.x < 16)
    data[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  else
    __syncthreads();
}

__global__ void shared_overrun(float* data) {
  FD_SHARED(float, array, 32);
  const float* volatile p = array;
  data[threadIdx.x] = p[threadIdx.x + 1];
}

// 128 bytes of its own besides what the launch asks for.
__global__ void static_and_dynamic(float* data) {
  FD_SHARED(float, own, 32);
  FD_SHARED_DYNAMIC(float, more);
  own[threadIdx.x] = more[threadIdx.x] = data[threadIdx.x];
}

__global__ void deep_stack(float* data) {
  volatile char frame[1024] = {};
  data[threadIdx.x] = static_cast<float>(frame[threadIdx.x % 1024]);
}

// 4096 numbers x, then 2^x of each by every way of csrc/cuda/exp2.cuh.
__global__ void powers_of_two(float* data) {
  float* const at = data + blockIdx.x * blockDim.x + threadIdx.x;
  at[4096] = cuda::exp2_poly<3>(*at), at[2 * 4096] = cuda::exp2_poly<4>(*at), at[3 * 4096] = cuda::exp2_poly<5>(*at);
}

struct Probe {
  const char* name;
  void (*kernel)(float*);
  dim3 grid, block;
  size_t smem;
  int cluster = 1;
};

const Probe kProbes[] = {
    {"reverse_in_block", reverse_in_block, 1, 96, 96 * sizeof(float)},
    {"shuffles", shuffles, 1, 64, 0},
    {"positions", positions, dim3(3, 2), dim3(4, 3, 2), 0},
    {"unwritten_shared", unwritten_shared, 2, 32, 0},
    {"racy_chain", racy_chain, 1, 64, 0},
    {"product_bf16", product_16<true>, 1, 32, 0},
    {"product_f16", product_16<false>, 1, 32, 0},
    {"product_tf32", product_tf32, 1, 32, 0},
    {"powers_of_two", powers_of_two, 32, 128, 0},
    {"copies", copies, 1, 16, 80 * sizeof(float)},
    {"votes", votes, 1, 32, 0},
    {"around_the_cluster", around_the_cluster, 8, 32, 0, 4},
    {"hopper_products", hopper_products, 1, 128, 0},
    {"phase_that_never_ends", phase_that_never_ends, 1, 32, 0},
    {"barrier_of_too_few", barrier_of_too_few, 1, 32, 0},
    {"product_not_waited_for", product_not_waited_for, 1, 32, 0},
    {"half_a_cluster", half_a_cluster, 4, 32, 0, 4},
    {"uneven_clusters", around_the_cluster, 6, 32, 0, 4},
    {"copy_not_waited_for", copy_not_waited_for, 1, 32, 0},
    {"return_before_barrier", return_before_barrier, 1, 64, 0},
    {"different_barriers", different_barriers, 1, 64, 0},
    {"absent_lane", absent_lane, 1, 32, 0},
    {"unnamed_caller", unnamed_caller, 1, 32, 0},
    {"unnamed_source", unnamed_source, 1, 32, 0},
    {"shuffle_against_barrier", shuffle_against_barrier, 1, 32, 0},
    {"shared_overrun", shared_overrun, 1, 32, 0},
    {"deep_stack", deep_stack, 1, 1024, 0},
    {"too_many_threads", deep_stack, 1, 1025, 0},
    {"no_blocks", deep_stack, 0, 32, 0},
    {"all_shared", reverse_in_block, 1, 32, 99 << 10},
    {"all_shared_sm90", reverse_in_block, 4, 32, 227 << 10, 4},
    {"too_much_shared", reverse_in_block, 1, 32, (99 << 10) + 1},
    {"too_much_shared_sm90", reverse_in_block, 4, 32, (227 << 10) + 1, 4},
    {"too_much_together", static_and_dynamic, 1, 32, (99 << 10) - 124},
    {"too_much_together_sm90", static_and_dynamic, 4, 32, (227 << 10) - 124, 4},
};

}  // namespace
}  // namespace fastdiff

// 0: ran; 1: an error, its text in `message`; 2: no such probe.
extern "C" __attribute__((visibility("default"))) int fastdiff_probe(const char* name, float* data, char* message,
                                                                     int size) {
  using namespace fastdiff;
  for (const Probe& p : kProbes) {
    if (std::string(p.name) != name) continue;
    try {
      cuda::launch_cluster(p.name, p.kernel, p.cluster, p.grid, p.block, p.smem, nullptr, data);
      return 0;
    } catch (const std::exception& e) {
      snprintf(message, static_cast<size_t>(size), "%s", e.what());
      return 1;
    }
  }
  return 2;
}
