// Copies from global to shared memory that run while the thread goes on (cp.async, sm_80 and later).
#pragma once
#include "launch.cuh"

namespace fastdiff {
namespace cuda {
namespace {

// Ask for kBytes (4, 8 or 16; both ends aligned to it) of which the first `valid` are read and the rest becomes zero.
// 16 bytes go past L1, which nobody would read them from.
template <int kBytes>
FD_D void copy_async(void* shared, const void* global, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async can copy");
#ifdef __CUDA_ARCH__
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(global), "r"(valid), "n"(kBytes)
                 : "memory");
#elif !defined(__CUDACC__)
  emu::copy_async(shared, global, kBytes, static_cast<size_t>(valid));
#endif
}

// Everything asked for since the last call is one group.
FD_D void commit_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDACC__)
  emu::commit_copies();
#endif
}

// Until at most kLeft of this thread's groups are in flight. Other threads see the data after a barrier.
template <int kLeft>
FD_D void wait_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#elif !defined(__CUDACC__)
  emu::wait_copies(kLeft);
#endif
}

}  // namespace
}  // namespace cuda
}  // namespace fastdiff
