// Sums over a warp and over a block in a fixed order, the result in every thread.
#pragma once
#include "launch.cuh"

namespace fastdiff {
namespace cuda {
namespace {

constexpr unsigned kFullWarp = 0xffffffffu;

template <int kValues>
FD_D void warp_sum(float (&v)[kValues]) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    if (FD_MUTATED(kShortShuffle) && offset == 1) break;
#pragma unroll
    for (int k = 0; k < kValues; ++k) v[k] += __shfl_xor_sync(kFullWarp, v[k], offset);
  }
}

// `buffers`: 2 * kValues * warps floats of shared memory; blockDim.x a multiple of 32. The two halves take turns, so
// that one barrier per sum is enough: a thread that writes a half again has passed the barrier of the sum in between,
// hence every thread has read the half's previous content.
template <int kValues>
FD_D void block_sum(float (&v)[kValues], float* buffers, int warps, int* turn) {
  warp_sum(v);
  float* buffer = buffers + (FD_MUTATED(kSumTurn) ? 0 : *turn) * kValues * warps;
  *turn ^= 1;
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int k = 0; k < kValues; ++k) buffer[k * warps + warp] = v[k];
  }
  FD_BARRIER(kSumBarrier);
#pragma unroll
  for (int k = 0; k < kValues; ++k) {
    v[k] = buffer[k * warps];
    for (int w = 1; w < warps; ++w) v[k] += buffer[k * warps + w];
  }
}

}  // namespace
}  // namespace cuda
}  // namespace fastdiff
