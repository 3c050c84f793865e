// Runs .cu files on the host: the part of CUDA C++ that csrc/cuda uses, with one fiber per CUDA thread (emu.cpp).
//
// What it notices and a CPU port of the kernel would not: threads run one at a time from one synchronisation to the
// next, in an order drawn from a seed (random warps, random bursts, blocks in random order), so that a missing barrier
// shows as a wrong result; shared memory is filled with NaN before every block and is allocated at its exact size, so
// that AddressSanitizer sees an overrun; a barrier or shuffle that not all of its threads reach is an error that says
// who waits where. What it cannot notice: races within one stretch between synchronisations, memory ordering between
// blocks, and anything about speed.
//
// Instructions without a C++ form (mma, ldmatrix, cp.async, ...) get a wrapper in csrc/cuda with a device body under
// __CUDA_ARCH__ and a host body beside it; a host body that involves other lanes is built on emu::collective.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
// Loads and stores with a caching hint.
template <typename T>
inline T __ldg(const T* p) {
  return *p;
}
template <typename T>
inline T __ldcs(const T* p) {
  return *p;
}
template <typename T>
inline void __stcs(T* p, T v) {
  *p = v;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

namespace fastdiff {
namespace emu {

// The running thread's coordinates.
struct Position {
  dim3 thread, block, block_dim, grid_dim;
};
extern Position here;

extern int mutation;         // the deliberate mistake in force (csrc/cuda/mutate.cuh)
extern int64_t grid_limit;   // blocks per launch, so that a test can make a grid loop
extern int multiprocessors;  // that the device is said to have
extern bool hopper;          // kernels of sm_90a are to be used where they can

void seed(uint64_t value);   // of the schedule; FASTDIFF_EMU_SEED sets the first
void set_lockstep(bool on);  // threads in index order instead of random order: what a naive emulator would do
const char* last_kernel();   // launched
void record(bool on);        // launches are written down instead of run; `on` begins a new list
const char* recorded();      // a line per launch: file, instantiation, grid, block, dynamic shared memory, cluster
void name_launch(const char* instantiation, const char* file);  // of the launch that follows
int64_t switches();  // how often a thread was resumed, since the library was loaded

// Runs `body` for every thread of every block. Throws std::runtime_error naming the kernel when the configuration is
// impossible or when threads wait for each other for ever.
// `cluster`: blocks that run together, neighbours along x, and may use each other's shared memory. They drift apart: at
// barriers of its own a block waits until those before it cannot go on, in an order drawn at every barrier of all.
// `sm90`: the kernel is for sm_90 and later, as those in clusters are anyway, and may use the shared memory of a block
// there; all others must do with what sm_86 and sm_89 give.
void launch(const char* kernel, dim3 grid, dim3 block, size_t smem, const std::function<void()>& body, int cluster = 1,
            bool sm90 = false);

// The block's array of `bytes` bytes declared at `tag`, poisoned when a block first meets it.
void* shared(const void* tag, size_t bytes);
void* dynamic_shared();

void syncthreads(const char* file, int line);

// Of clusters: the calling block's rank, a barrier for all threads of the cluster, and the place in another block's
// shared memory that corresponds to `mine` in this one's.
int cluster_rank();
void cluster_sync(const char* file, int line);
void* shared_of(const void* mine, int rank);

void fault(const char* what);  // ends the launch with an error

// Meets all lanes of `mask`, which must call with the same mask and site, and returns what lane `source` brought.
// `source` must be one of them.
uint64_t collective(unsigned mask, uint64_t value, int source, const char* file, int line);

// Meets all lanes of `mask` and returns what each of them brought: lane i's `bytes` bytes (at most kBlob) are at
// i * kBlob, as they were when it came, until the lane's next call.
constexpr size_t kBlob = 64;
const unsigned char* gather(unsigned mask, const void* mine, size_t bytes, const char* file, int line);

// Copies from global to shared memory that are done some time before the thread waits for their group: until then the
// destination holds NaN. Bytes of the destination from `valid` on become zero.
void copy_async(void* to, const void* from, size_t bytes, size_t valid);
void commit_copies();
void wait_copies(int groups_left);

// Barriers that live in 8 bytes of shared memory (mbarrier): a phase ends when `arrivals` threads have arrived and all
// bytes they announced are there. `parity` names the phase that a thread waits for: the phases are 0, 1, 0, 1, ...
void init_barrier(void* barrier, int arrivals);
void arrive(void* barrier, int bytes_to_come);
void wait_phase(const void* barrier, int parity, const char* file, int line);

// Waits for `threads` threads of the block at the barrier of that number (bar.sync).
void named_barrier(int number, int threads, const char* file, int line);

// A tensor as the copy engine sees it: 16-bit elements, the first axis contiguous; a box of it goes to shared memory,
// what lies outside the tensor as zeros, with bits 4 to 6 of the address changed by bits 7 to 9 as `span` says.
struct TensorMap {
  const char* data;
  int rank;
  int64_t size[5], stride[5];  // elements; bytes
  int box[5];
  int span;  // bytes over which 16-byte chunks are permuted: 0, 32, 64 or 128
};
uintptr_t swizzled(uintptr_t address, int span);
// Starts the copy of the box at `at`; it is done some time later and then counts on the barrier.
void copy_box(const TensorMap& map, void* to, void* barrier, const int* at);

// Products that run while the warp goes on (wgmma). `compute` adds to the accumulators it is given; it runs at once or
// not before the wait, and until then the `count` floats at `d` are NaN.
void start_product(float* d, int count, std::function<void(float*)> compute);
void commit_products();
void wait_products(int groups_left);

template <typename T>
T exchange(unsigned mask, T value, int source, const char* file, int line) {
  static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = collective(mask, bits, source, file, line);
  memcpy(&value, &bits, sizeof value);
  return value;
}

unsigned ballot(unsigned mask, int predicate, const char* file, int line);

inline int lane() {
  return static_cast<int>((here.thread.x + here.block_dim.x * (here.thread.y + here.block_dim.y * here.thread.z)) % 32);
}
inline int warp() {
  return static_cast<int>((here.thread.x + here.block_dim.x * (here.thread.y + here.block_dim.y * here.thread.z)) / 32);
}
// Lanes outside the warp keep their own value, as the hardware does.
inline int inside(int source) { return source >= 0 && source < 32 ? source : lane(); }

}  // namespace emu
}  // namespace fastdiff

#define threadIdx (::fastdiff::emu::here.thread)
#define blockIdx (::fastdiff::emu::here.block)
#define blockDim (::fastdiff::emu::here.block_dim)
#define gridDim (::fastdiff::emu::here.grid_dim)

#define __syncthreads() ::fastdiff::emu::syncthreads(__FILE__, __LINE__)
#define __syncwarp() ((void)::fastdiff::emu::collective(0xffffffffu, 0, ::fastdiff::emu::lane(), __FILE__, __LINE__))
#define __ballot_sync(mask, predicate) ::fastdiff::emu::ballot(mask, (predicate) ? 1 : 0, __FILE__, __LINE__)
#define __any_sync(mask, predicate) (__ballot_sync(mask, predicate) != 0)
#define __all_sync(mask, predicate) (__ballot_sync(mask, predicate) == (mask))
#define __shfl_sync(mask, v, source) ::fastdiff::emu::exchange(mask, v, (source) & 31, __FILE__, __LINE__)
#define __shfl_xor_sync(mask, v, bits) \
  ::fastdiff::emu::exchange(mask, v, ::fastdiff::emu::lane() ^ (bits), __FILE__, __LINE__)
#define __shfl_down_sync(mask, v, delta)                                                                         \
  ::fastdiff::emu::exchange(mask, v, ::fastdiff::emu::inside(::fastdiff::emu::lane() + static_cast<int>(delta)), \
                            __FILE__, __LINE__)
#define __shfl_up_sync(mask, v, delta)                                                                           \
  ::fastdiff::emu::exchange(mask, v, ::fastdiff::emu::inside(::fastdiff::emu::lane() - static_cast<int>(delta)), \
                            __FILE__, __LINE__)

// Shared arrays (the CUDA forms are in csrc/cuda/launch.cuh). The tag is one per place and template instantiation.
#define FD_SHARED(type, name, count) \
  static const char name##_tag = 0;  \
  type* const name = static_cast<type*>(::fastdiff::emu::shared(&name##_tag, sizeof(type) * (count)))
#define FD_SHARED_DYNAMIC(type, name) type* const name = static_cast<type*>(::fastdiff::emu::dynamic_shared())
