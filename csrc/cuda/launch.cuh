// What a .cu file needs around its kernels: launches that throw, the device guard, grid sizes. Includes the CUDA
// runtime, or its stand-in that runs the same file on the host (csrc/emu).
#pragma once
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "../fastdiff.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define FD_SHARED(type, name, count) __shared__ type name[count]
#define FD_SHARED_DYNAMIC(type, name)                \
  extern __shared__ __align__(16) char name##_raw[]; \
  type* const name = reinterpret_cast<type*>(name##_raw)
#else
#include "../emu/emu.h"
#endif

#include "mutate.cuh"

#define FD_D __device__ __forceinline__

namespace fastdiff {
namespace cuda {
namespace {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes `device` current and puts the previous one back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device) check(cudaSetDevice(device), "cudaSetDevice"), changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Blocks for `tasks` > 0 tasks, one each, or fewer blocks that loop when the grid would be too large.
inline unsigned int grid_for(int64_t tasks) {
#ifdef __CUDACC__
  constexpr int64_t limit = 0x7fffffff;
#else
  const int64_t limit = emu::grid_limit;
#endif
  return static_cast<unsigned int>(tasks < limit ? tasks : limit);
}

// Streaming multiprocessors of a device.
inline int multiprocessors(int device) {
#ifdef __CUDACC__
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
#else
  (void)device;
  return emu::multiprocessors;
#endif
}

#ifdef __CUDACC__
// Lets a kernel have that much dynamic shared memory on the current device; more than 48 KB is given only to who asks.
// The limit is the kernel's, not the launch's: it never goes down, since another thread may be about to launch.
inline cudaError_t allow_shared(const void* kernel, size_t smem) {
  if (smem <= (48 << 10)) return cudaSuccess;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{kernel, device}];
  if (smem <= most) return cudaSuccess;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem));
  if (status == cudaSuccess) most = smem;
  return status;
}
#endif

// kSm90: the kernel is for sm_90 and later, and may use the shared memory of a block there (227 KB instead of 99).
template <bool kSm90 = false, typename... Params, typename... Args>
inline void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem, void* stream,
                   Args&&... args) {
#ifdef __CUDACC__
  check(allow_shared(reinterpret_cast<const void*>(kernel), smem), name);
  kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(std::forward<Args>(args)...);
  check(cudaGetLastError(), name);
#else
  (void)stream;
  emu::launch(name, grid, block, smem, [&] { kernel(args...); }, 1, kSm90);
#endif
}

// The same in clusters of blocks (sm_90 and later), neighbours along x: csrc/cuda/cluster.cuh.
template <typename... Params, typename... Args>
inline void launch_cluster(const char* name, void (*kernel)(Params...), int cluster, dim3 grid, dim3 block, size_t smem,
                           void* stream, Args&&... args) {
#ifdef __CUDACC__
  check(allow_shared(reinterpret_cast<const void*>(kernel), smem), name);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = smem;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute, config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, Params(std::forward<Args>(args))...), name);
#else
  (void)stream;
  emu::launch(name, grid, block, smem, [&] { kernel(args...); }, cluster);
#endif
}

// FD_LAUNCH((kernel<8, 1>), grid, block, dynamic shared memory bytes, stream, arguments...)
// FD_LAUNCH_SM90: the same for a kernel of sm_90 and later.
// FD_LAUNCH_CLUSTER((kernel<8, 1>), blocks of a cluster, grid, ...)
#ifdef __CUDACC__
#define FD_LAUNCH(kernel, ...) ::fastdiff::cuda::launch(#kernel, &kernel, __VA_ARGS__)
#define FD_LAUNCH_SM90(kernel, ...) ::fastdiff::cuda::launch<true>(#kernel, &kernel, __VA_ARGS__)
#define FD_LAUNCH_CLUSTER(kernel, ...) ::fastdiff::cuda::launch_cluster(#kernel, &kernel, __VA_ARGS__)
#else
// Tells the emulator the instantiation, which the compiler spells out in the name of this function, and the file.
template <auto kKernel>
inline void announce(const char* file) {
  emu::name_launch(__PRETTY_FUNCTION__, file);
}
#define FD_LAUNCH(kernel, ...) \
  (::fastdiff::cuda::announce<&kernel>(__FILE__), ::fastdiff::cuda::launch(#kernel, &kernel, __VA_ARGS__))
#define FD_LAUNCH_SM90(kernel, ...) \
  (::fastdiff::cuda::announce<&kernel>(__FILE__), ::fastdiff::cuda::launch<true>(#kernel, &kernel, __VA_ARGS__))
#define FD_LAUNCH_CLUSTER(kernel, ...) \
  (::fastdiff::cuda::announce<&kernel>(__FILE__), ::fastdiff::cuda::launch_cluster(#kernel, &kernel, __VA_ARGS__))
#endif

// row = b * N + n. The 64-bit division (some hundred instructions) only where it is needed.
FD_D void split(int64_t row, int64_t N, int64_t* b, int64_t* n) {
  if (((row | N) >> 32) == 0) {
    const uint32_t r = static_cast<uint32_t>(row), d = static_cast<uint32_t>(N);
    *b = r / d, *n = r % d;
  } else {
    *b = row / N, *n = row % N;
  }
}

}  // namespace
}  // namespace cuda
}  // namespace fastdiff
