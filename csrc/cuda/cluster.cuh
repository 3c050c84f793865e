// Clusters of blocks and each other's shared memory (sm_90 and later).
#pragma once
#include "launch.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FD_CLUSTERS 1
#endif

namespace fastdiff {
namespace cuda {
namespace {

// The calling block's number in its cluster.
FD_D int cluster_rank() {
#if defined(__CUDA_ARCH__) && defined(FD_CLUSTERS)
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#elif !defined(__CUDACC__)
  return emu::cluster_rank();
#else
  return 0;
#endif
}

// All threads of all blocks of the cluster meet, and see what the others wrote to any shared memory. A block must not
// return while others still use its memory: meet once more before the end.
FD_D void cluster_sync() {
#if defined(__CUDA_ARCH__) && defined(FD_CLUSTERS)
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#elif !defined(__CUDACC__)
  emu::cluster_sync(__FILE__, __LINE__);
#endif
}

// Where block `rank` of the cluster keeps what this one keeps at `mine` in shared memory: to be read and written like
// any memory.
template <typename T>
FD_D T* shared_of(T* mine, int rank) {
#if defined(__CUDA_ARCH__) && defined(FD_CLUSTERS)
  uint64_t there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(reinterpret_cast<uint64_t>(mine)), "r"(rank));
  return reinterpret_cast<T*>(there);
#elif !defined(__CUDACC__)
  return static_cast<T*>(emu::shared_of(mine, rank));
#else
  (void)rank;
  return mine;
#endif
}

}  // namespace
}  // namespace cuda
}  // namespace fastdiff
