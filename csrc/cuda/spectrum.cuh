// What the forward and backward kernels of `spectrum` share: where things lie, how blocks are cut, modulus and phase.
//
// The half spectrum of an image in global memory, and `work` of the backward pass: [H, pitch] complex numbers, columns
// 0 .. K-1, K = (W+1) / 2, pitch = K rounded up to 16. For an even W column 0 is DC + i Nyquist, both transforms of
// real columns, told apart by symmetry.
#pragma once
#include "../common/spectrum.h"
#include "cluster.cuh"
#include "fft.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace fastdiff {
namespace cuda {
namespace {

constexpr float kRed = 0.299f, kGreen = 0.587f, kBlue = 0.114f;
constexpr int kMaxThreads = 512;
constexpr int kClusterThreads = 1024;  // of a block that has a multiprocessor to itself, or nearly

// What a launch knows besides its operands.
struct Job {
  FftPlan w, h;
  int32_t H, W, K, pitch, even;
  int32_t row_lanes, row_groups;  // pairs of rows of a block, and blocks of an image
  int32_t lanes, groups;          // columns, likewise; in a cluster: of a block, and blocks
  int32_t ring_columns, ring_parts;
  int32_t vec;           // pixels that are loaded or stored at once
  int64_t first, count;  // images of this launch
};

inline Job make_job(const SpectrumLayout& l, const FftPlan& w, const FftPlan& h) {
  Job j = {};
  j.w = w, j.h = h, j.H = h.n, j.W = w.n, j.K = static_cast<int32_t>(l.K), j.even = w.n % 2 == 0;
  j.pitch = (j.K + 15) / 16 * 16;
  j.row_lanes = static_cast<int32_t>(l.row_lanes), j.row_groups = static_cast<int32_t>(l.row_groups());
  j.lanes = static_cast<int32_t>(l.lanes), j.groups = static_cast<int32_t>(l.groups());
  j.ring_columns = static_cast<int32_t>(l.ring_columns()), j.ring_parts = static_cast<int32_t>(l.ring_parts());
  return j;
}

// Threads of a block: one for every butterfly of radix 8, 64 to `most`.
inline int threads_for(int64_t numbers, int most = kMaxThreads) {
  int threads = 64;
  while (threads < most && threads * 8 < numbers) threads *= 2;
  return threads;
}

// A block's memory for transforms: shared, or its part of `scratch`.
template <bool kShared>
FD_D float2* arrays(float* scratch, int64_t size) {
  if constexpr (kShared) {
    FD_SHARED_DYNAMIC(float2, memory);
    return memory;
  } else {
    return reinterpret_cast<float2*>(scratch + blockIdx.x * size);
  }
}

FD_D Lanes row_arrays(float2* p, const Job& j, int which) {
  const uint32_t lanes = j.row_lanes, pitch = lanes > 1 ? lanes + 1 : 1;
  return {p + which * (j.w.span * pitch + j.w.span / 8 + 1), lanes, pitch, 3};
}
FD_D Lanes column_arrays(float2* p, const Job& j, uint32_t lanes, int which) {
  return {p + which * ((j.h.span * lanes + 1) / 2 * 2), lanes, lanes, 31};
}

FD_D int32_t mirror(int32_t k, int32_t n) { return k == 0 ? 0 : n - k; }
FD_D int32_t shifted(int32_t k, int32_t n, int32_t shift) {
  const int32_t s = k + n / 2;
  return !shift ? k : s >= n ? s - n : s;
}

// DC and Nyquist columns from rows ky (z) and -ky (m) of their sum DC + i Nyquist.
FD_D float2 direct(float2 z, float2 m) { return make_float2(0.5f * (z.x + m.x), 0.5f * (z.y - m.y)); }
FD_D float2 nyquist(float2 z, float2 m) { return make_float2(0.5f * (z.y + m.y), 0.5f * (m.x - z.x)); }

// Squares in [1e-30, 1e30] neither overflow nor lose bits; outside (zero, huge, NaN) the slower way is taken.
FD_D bool in_range(float square) { return square >= 1e-30f && square <= 1e30f; }

// |z|; infinity where either part is infinite, even beside NaN.
FD_D float modulus(float2 z) {
  const float square = fmaf(z.x, z.x, z.y * z.y);
  return in_range(square) ? sqrtf(square) : hypotf(z.x, z.y);
}

// z / |z|, 0 for 0; *m = |z|.
FD_D float2 phase(float2 z, float* m) {
  const float square = fmaf(z.x, z.x, z.y * z.y);
  if (in_range(square)) {
    *m = sqrtf(square);
    const float inverse = 1.0f / *m;
    return make_float2(z.x * inverse, z.y * inverse);
  }
  *m = 0.0f;
  if (z.x == 0.0f && z.y == 0.0f) return make_float2(0.0f, 0.0f);
  const float larger = fmaxf(fabsf(z.x), fabsf(z.y)), x = z.x / larger, y = z.y / larger;
  const float length = sqrtf(fmaf(x, x, y * y));
  *m = larger * length;
  return make_float2(x / length, y / length);
}

// The smallest s >= 0 with s^2 >= v; v < 2^62.
template <typename Integer>
FD_D int32_t root_from(Integer s, Integer v) {
  while (s * s < v) ++s;
  while (s > 0 && (s - 1) * (s - 1) >= v) --s;
  return static_cast<int32_t>(s);
}
FD_D int32_t root_above(int64_t v) {
  if (v <= 0) return 0;
  const float s = sqrtf(static_cast<float>(v));  // off by less than 1 below 2^31, hence no square beyond 2^32
  if (v < 0x7fffffff) return root_from(static_cast<uint32_t>(s), static_cast<uint32_t>(v));
  return root_from(static_cast<int64_t>(s), v);
}

// Sum of v[0 .. n) by the first warp, in an order that does not depend on the block; in every thread. Barriers around.
FD_D float warp_total(const float* v, int64_t n, float* shared) {
  if (threadIdx.x < 32) {
    float sum[1] = {0.0f};
    for (int64_t i = threadIdx.x; i < n; i += 32) sum[0] += v[i];
    warp_sum(sum);
    if (threadIdx.x == 0) *shared = sum[0];
  }
  __syncthreads();
  const float total = *shared;
  __syncthreads();
  return total;
}

// A cluster's columns by owner: block `rank` has columns k0 .. k0 + count - 1, and two neighbours from an even column
// on lie side by side in one block's memory (the last of an odd number with room beside it).
struct Share {
  int32_t k0, count;
};
FD_D Share share_of(const Job& j, int32_t rank) {
  const int32_t k0 = rank * j.lanes, left = j.K - k0;
  return {k0, left < 0 ? 0 : left < j.lanes ? left : j.lanes};
}
FD_D uint32_t column_pairs(const Job& j) { return (j.K + (FD_MUTATED(kClusterOdd) ? 0 : 1)) / 2; }
FD_D Divider by_owner(const Job& j) { return divider(j.lanes, j.K + 1); }
// Column k of element y of the owner's array where this block's begins at `mine`.
FD_D float4* owned(const Job& j, Divider by, float2* mine, int32_t y, int32_t k) {
  const int32_t owner = quotient(k, by), next = owner + 1 < j.groups ? owner + 1 : 0;
  float2* there = shared_of(mine, FD_MUTATED(kClusterOwner) ? next : owner);
  return reinterpret_cast<float4*>(there + y * j.lanes + (k - owner * j.lanes));
}

// Blocks that work in global memory.
inline unsigned int few_blocks(int64_t tasks) {
  return grid_for(tasks < SpectrumLayout::kBlocks ? tasks : SpectrumLayout::kBlocks);
}

// Pixels at once: 16 bytes where every row of every channel allows.
inline int vector_of(const Strided& images, int64_t C, int64_t W) {
  const int64_t size = dtype_size(images.dtype);
  const int vec = static_cast<int>(16 / size);
  bool fits = W % vec == 0 && images.s[3] == 1 && reinterpret_cast<uintptr_t>(images.data) % 16 == 0;
  for (int i = 0; i < 3; ++i) fits = fits && ((i == 1 && C == 1) || images.s[i] * size % 16 == 0);
  return fits ? vec : 1;
}

// How a kernel of either direction is launched: FD_SHAPE(shape) are the first arguments of FD_LAUNCH.
struct Shape {
  unsigned grid;
  int threads;
  size_t bytes;
  int32_t column_numbers;  // of an image in one launch: what the columns take of the shared memory
};
#define FD_SHAPE(shape) (shape).grid, (shape).threads, (shape).bytes

template <typename Operands>
struct Launches {
  const Operands& a;
  SpectrumLayout l;
  Job j;

  Launches(const Operands& operands, const Strided& images)
      : a(operands),
        l(a.plan_w, a.plan_h),
        j(make_job(l, fft_plan(a.plan_w, a.pos_w, a.table_w), fft_plan(a.plan_h, a.pos_h, a.table_h))) {
    j.vec = vector_of(images, a.C, a.W);
    j.count = a.B;
  }

  // Images by one block each.
  Shape whole() const {
    const int64_t column_bytes = l.column_bytes(l.K), bytes = column_bytes + l.row_bytes(l.row_lanes);
    return {grid_for(a.B), threads(l.row_lanes, l.K, kMaxThreads), static_cast<size_t>(bytes),
            static_cast<int32_t>(column_bytes / 8)};
  }

  // Images by one cluster each; the job is divided accordingly.
  Shape cluster() {
    const SpectrumCluster c(l, a.ranks);
    const auto ranks = static_cast<unsigned>(a.ranks), most = 0x7fffffffu / ranks, images = grid_for(a.B);
    j.row_lanes = static_cast<int32_t>(c.row_lanes), j.row_groups = static_cast<int32_t>(c.row_groups);
    j.lanes = static_cast<int32_t>(c.columns), j.groups = a.ranks;
    return {ranks * (images < most ? images : most), threads(c.row_lanes, c.columns, kClusterThreads),
            static_cast<size_t>(c.bytes), static_cast<int32_t>(c.column_bytes / 8)};
  }

  // Rows or columns of the images of this wave, in shared memory (l.shared_rows, l.shared_columns) or global.
  Shape rows() const { return part(l.shared_rows, j.row_groups, l.w.span * l.row_lanes, l.row_bytes(l.row_lanes)); }
  Shape columns() const { return part(l.shared_columns, j.groups, l.h.span * l.lanes, l.column_bytes(l.lanes)); }

  template <typename Both>
  void waves(const Both& both) {
    for (j.first = 0; j.first < a.B; j.first += j.count) {
      j.count = a.B - j.first < a.wave ? a.B - j.first : a.wave;
      both();
    }
    j.first = 0, j.count = a.B;
  }

 private:
  int threads(int64_t row_lanes, int64_t columns, int most) const {
    const int64_t row_numbers = l.w.span * row_lanes, column_numbers = l.h.span * columns;
    return threads_for(row_numbers > column_numbers ? row_numbers : column_numbers, most);
  }
  Shape part(bool shared, int32_t blocks, int64_t numbers, int64_t bytes) const {
    const int64_t tasks = j.count * blocks;
    return {shared ? grid_for(tasks) : few_blocks(tasks), threads_for(numbers), shared ? static_cast<size_t>(bytes) : 0,
            0};
  }
};

}  // namespace
}  // namespace cuda
}  // namespace fastdiff
