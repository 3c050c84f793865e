// Clusters of blocks and each other's shared memory (sm_90 and later).
#pragma once
#include <cstdlib>

#include "launch.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FD_CLUSTERS 1
#endif

namespace fastdiff {
namespace cuda {
namespace {

#ifdef FD_CLUSTERS
constexpr bool kClusters = true;
#else
constexpr bool kClusters = false;  // a kernel's body for other targets is left out by this
#endif

// Kernels for sm_90 and later that have not been measured are used only where asked for.
inline bool asked_for_sm90() {
  static const bool asked = [] {
    const char* text = std::getenv("FASTDIFF_SM90");
    return text != nullptr && text[0] == '1';
  }();
#ifdef __CUDACC__
  return asked;
#else
  return asked || emu::hopper;
#endif
}

// Whether a device can run a cluster of so many blocks of this kernel, and this build holds it for such a device.
template <typename... Params>
inline bool can_launch_cluster(void (*kernel)(Params...), int cluster, int threads, size_t smem, int device) {
#ifdef __CUDACC__
  int major = 0, shared = 0, clusters = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  if (major < 9 || smem > static_cast<size_t>(shared)) return false;
  const DeviceGuard guard(device);
  cudaFuncAttributes found = {};
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(cluster)), config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = smem, config.attrs = &attribute, config.numAttrs = 1;
  // What was compiled for less has no body (kClusters), wherever it runs.
  const bool can = cudaFuncGetAttributes(&found, kernel) == cudaSuccess && found.ptxVersion >= 90 &&
                   allow_shared(reinterpret_cast<const void*>(kernel), smem) == cudaSuccess &&
                   cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0;
  if (!can) cudaGetLastError();  // nobody else's concern
  return can;
#else
  (void)kernel, (void)cluster, (void)threads, (void)smem, (void)device;
  return true;
#endif
}

// The calling block's number in its cluster.
FD_D int cluster_rank() {
#if defined(__CUDA_ARCH__) && defined(FD_CLUSTERS)
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
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

// cluster_sync() that the named mutation removes.
#define FD_CLUSTER_BARRIER(name)                             \
  do {                                                       \
    if (!FD_MUTATED(name)) ::fastdiff::cuda::cluster_sync(); \
  } while (false)

// Where block `rank` of the cluster keeps what this one keeps at `mine` in shared memory: to be read and written like
// any memory.
template <typename T>
FD_D T* shared_of(T* mine, int rank) {
#if defined(__CUDA_ARCH__) && defined(FD_CLUSTERS)
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(reinterpret_cast<uint64_t>(mine)), "r"(rank));
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
