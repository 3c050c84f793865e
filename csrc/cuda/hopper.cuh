// Hopper's own instructions (sm_90a): barriers in shared memory, the copy engine, products of a warpgroup. Each with
// the body that csrc/emu runs.
//
// Layouts of operands in shared memory, in chunks of 16 bytes (8 elements); a tile's rows span kSpan bytes, and the
// hardware exchanges chunks within 8 rows by address: bits 4 to 6 ^= bits 7 to 9 (128 bytes; 64 and 32 use fewer bits).
//   rows: the operand's M or N index, chunks along K ("K-major"). 8 rows x kSpan bytes, then the next 8 rows.
//   rows: K, chunks along N ("MN-major"): only as wide as one row here, so that the distance between such tiles is
//   never looked at.
#pragma once
#ifdef __CUDACC__
#include <cuda.h>
#endif

#include "../common/dtype.h"
#include "launch.cuh"

// Device code of this file exists in the pass for sm_90a only.
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FD_HOPPER 1
#endif

namespace fastdiff {
namespace cuda {
namespace {

#ifdef FD_HOPPER
constexpr bool kHopper = true;
#else
constexpr bool kHopper = false;  // a kernel's body for other targets is left out by this
#endif

// ----------------------------------------------------------------------------------------------- barriers (mbarrier)

using Barrier = uint64_t;

FD_D unsigned shared_address(const void* p) {
#ifdef __CUDA_ARCH__
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
#else
  (void)p;
  return 0;
#endif
}

FD_D void init_barrier(Barrier* b, int arrivals) {
#if defined(__CUDA_ARCH__) && defined(FD_HOPPER)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
#elif !defined(__CUDACC__)
  emu::init_barrier(b, arrivals);
#endif
}

// After the initialisation, before the block's barrier: the copy engine too shall see the barriers.
FD_D void publish_barriers() {
#if defined(__CUDA_ARCH__) && defined(FD_HOPPER)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

FD_D void arrive(Barrier* b) {
#if defined(__CUDA_ARCH__) && defined(FD_HOPPER)
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
#elif !defined(__CUDACC__)
  emu::arrive(b, 0);
#endif
}

// Arrives, and lets the phase wait for so many bytes of the copy engine.
FD_D void arrive_expecting(Barrier* b, int bytes) {
#if defined(__CUDA_ARCH__) && defined(FD_HOPPER)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
#elif !defined(__CUDACC__)
  emu::arrive(b, bytes);
#endif
}

// Until the phase of this parity is over; a fresh barrier is in phase 0, and the one before it, 1, counts as over.
FD_D void wait_phase(Barrier* b, int parity) {
#if defined(__CUDA_ARCH__) && defined(FD_HOPPER)
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra again;\n"
      "}" ::"r"(shared_address(b)),
      "r"(parity)
      : "memory");
#elif !defined(__CUDACC__)
  emu::wait_phase(b, parity, __FILE__, __LINE__);
#endif
}

// ---------------------------------------------------------------------------------------------- the copy engine (TMA)

#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
using TensorMap = emu::TensorMap;
#endif

// A box [rows, columns] of 16-bit elements from a tensor [outer2, outer1, rows, columns], at these coordinates. `to`
// is aligned to 8 rows of the box at least. Elements outside the tensor become zero.
FD_D void copy_box(void* to, const TensorMap* map, Barrier* b, int column, int row, int outer1, int outer2) {
#if defined(__CUDA_ARCH__) && defined(FD_HOPPER)
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(b)), "r"(column), "r"(row), "r"(outer1), "r"(outer2)
      : "memory");
#elif !defined(__CUDACC__)
  const int at[4] = {column, row, outer1, outer2};
  emu::copy_box(*map, to, b, at);
#endif
}

// The tensor [outer2, outer1, rows, columns] of 16-bit elements at `data`, strides in elements, read in boxes of
// box_rows x box_columns whose 16-byte chunks are permuted over `span` bytes (0: not at all). Along an outer axis of
// stride 0 the only coordinate is 0. False: the copy engine cannot (a stride or address that is no multiple of 16
// bytes, columns apart, rows that are one).
inline bool make_map(TensorMap* map, const void* data, bool is_bf16, const int64_t (&size)[4],
                     const int64_t (&stride)[4], int box_rows, int box_columns, int span) {
  // Axes from the innermost on; an axis of one element never moves, so any valid stride will do.
  int64_t sizes[4] = {size[3], size[2], size[1], size[0]};
  int64_t bytes[4] = {2, 2 * stride[2], 2 * stride[1], 2 * stride[0]};
  if (stride[3] != 1 && size[3] != 1) return false;
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) return false;
  for (int i = 1; i < 4; ++i) {
    if (i > 1 && bytes[i] == 0) sizes[i] = 1;
    if (sizes[i] == 1) bytes[i] = 16;
    if (bytes[i] <= 0 || bytes[i] % 16 != 0 || bytes[i] >= int64_t{1} << 40) return false;
  }
  for (int i = 0; i < 4; ++i)
    if (sizes[i] < 1 || sizes[i] >= int64_t{1} << 32) return false;
#ifdef __CUDACC__
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {  // from the driver, so that the library links without it
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return status == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (encode == nullptr) return false;
  const cuuint64_t extent[4] = {static_cast<cuuint64_t>(sizes[0]), static_cast<cuuint64_t>(sizes[1]),
                                static_cast<cuuint64_t>(sizes[2]), static_cast<cuuint64_t>(sizes[3])};
  const cuuint64_t steps[3] = {static_cast<cuuint64_t>(bytes[1]), static_cast<cuuint64_t>(bytes[2]),
                               static_cast<cuuint64_t>(bytes[3])};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t ones[4] = {1, 1, 1, 1};
  const CUtensorMapSwizzle swizzle = span == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : span == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : span == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                  : CU_TENSOR_MAP_SWIZZLE_NONE;
  return encode(map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
                const_cast<void*>(data), extent, steps, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
#else
  (void)is_bf16;
  *map = {static_cast<const char*>(data), 4, {}, {}, {box_columns, box_rows, 1, 1, 1}, span};
  for (int i = 0; i < 4; ++i) map->size[i] = sizes[i], map->stride[i] = bytes[i];
  return true;
#endif
}

// ------------------------------------------------------------------------------------ products of a warpgroup (wgmma)

// Where an operand tile lies: rows of kSpan bytes (16: no permutation), `group` bytes from 8 rows to the next 8. The
// instruction's descriptor; csrc/emu has its address beside it.
#ifdef __CUDACC__
using Tile = uint64_t;
#else
struct Tile {
  const char* base;
  uint64_t shape;
};
#endif

template <int kSpan>
FD_D Tile make_tile(const void* base, int group) {
  static_assert(kSpan == 128 || kSpan == 64 || kSpan == 32 || kSpan == 16, "what the tensor core can read");
  // Distances in 16 bytes. Of the two (bits 16 to 29, 32 to 45) one is not looked at in every layout used here (which
  // one depends on the layout), so both are the same.
  constexpr uint64_t kMode = kSpan == 128 ? 1 : kSpan == 64 ? 2 : kSpan == 32 ? 3 : 0;
  const uint64_t step = static_cast<uint64_t>((group & 0x3ffff) >> 4), shape = step << 16 | step << 32 | kMode << 62;
#ifdef __CUDACC__
  return static_cast<uint64_t>((shared_address(base) & 0x3ffff) >> 4) | shape;
#else
  return {static_cast<const char*>(base), shape};
#endif
}

// The same tile from a byte further on: within a row, or whole groups of rows.
FD_D Tile advance(Tile t, int bytes) {
#ifdef __CUDACC__
  return t + static_cast<uint64_t>(bytes >> 4);
#else
  t.base += bytes;
  return t;
#endif
}

#ifndef __CUDACC__
// What the instruction reads as element `k` of row (or column) `i`, from the bits of its descriptor: PTX ISA, "Matrix
// descriptor" and "Strides" of wgmma. Permutations start where the address says, which the bits for another start (49
// to 51, never set here) would move.
inline uint16_t tile_element(const Tile& t, bool k_major, int i, int k) {
  const int leading = static_cast<int>(t.shape >> 16 & 0x3fff) * 16,
            stride = static_cast<int>(t.shape >> 32 & 0x3fff) * 16;
  const int mode = static_cast<int>(t.shape >> 62), span = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 16;
  const uintptr_t base = reinterpret_cast<uintptr_t>(t.base);
  if (base % 16 != 0 || (mode != 0 && base / span * span % (8 * span) != 0))
    emu::fault("a product: an operand does not start where its permutation does");
  uintptr_t at = base;
  if (k_major)
    at += i % 8 * span + i / 8 * stride + (mode == 0 ? k / 8 * leading + k % 8 * 2 : 2 * k);
  else if (mode == 0)
    at += 2 * (i % 8) + i / 8 * stride + k % 8 * 16 + k / 8 * leading;
  else
    at += 2 * (i % (span / 2)) + i / (span / 2) * leading + k % 8 * span + k / 8 * stride;
  uint16_t bits;
  memcpy(&bits, reinterpret_cast<const void*>(emu::swizzled(at, mode == 0 ? 0 : span)), 2);
  return bits;
}
inline float element_value(uint16_t bits, bool is_bf16) { return is_bf16 ? to_float(bf16{bits}) : to_float(f16{bits}); }
#endif

// Before the first product, and whenever registers that products use were written by other instructions.
FD_D void fence_products() {
#if defined(__CUDA_ARCH__) && defined(FD_HOPPER)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
FD_D void commit_products() {
#if defined(__CUDA_ARCH__) && defined(FD_HOPPER)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#elif !defined(__CUDACC__)
  emu::commit_products();
#endif
}
// Until at most kLeft groups of products are running. Accumulators may not be touched before.
template <int kLeft>
FD_D void wait_products() {
#if defined(__CUDA_ARCH__) && defined(FD_HOPPER)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#elif !defined(__CUDACC__)
  emu::wait_products(kLeft);
#endif
}
// Ties registers to this place in the program: the compiler must not move their use across.
template <int kCount>
FD_D void pin(float (&d)[kCount]) {
#ifdef __CUDA_ARCH__
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
#else
  (void)d;
#endif
}

// Operands of the instructions below: registers d[i...] as inputs and outputs, and where they stand in the text.
#define FD_ACC_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FD_ACC_16(i) FD_ACC_4(i), FD_ACC_4(i + 4), FD_ACC_4(i + 8), FD_ACC_4(i + 12)
#define FD_ACC_32(i) FD_ACC_16(i), FD_ACC_16(i + 16)
#define FD_TEXT_4 "%0, %1, %2, %3"
#define FD_TEXT_32                                                                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define FD_TEXT_64                                                                                              \
  FD_TEXT_32                                                                                                    \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// The predicate p says whether d is added to; the rest are signs and, last, which operand is transposed.
#define FD_WGMMA(n, type, accumulators, operands, flag)                                                         \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " flag ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type \
  " {" accumulators "}, " operands ";\n}"

// d = A B^T (+ d where `add`): A [64, 16] and B [128, 16] in shared memory, 16 elements of a row each. Warp w of the
// group gets rows 16 w to 16 w + 15, as fragments [16, 8] of mma.cuh side by side.
template <bool kBf16>
FD_D void start_product(float (&d)[64], Tile a, Tile b, int add) {
#if defined(__CUDA_ARCH__) && defined(FD_HOPPER)
  if constexpr (kBf16)
    asm volatile(FD_WGMMA("128", "bf16", FD_TEXT_64, "%64, %65, p, 1, 1, 0, 0", "%66")
                 : FD_ACC_32(0), FD_ACC_32(32)
                 : "l"(a), "l"(b), "r"(add));
  else
    asm volatile(FD_WGMMA("128", "f16", FD_TEXT_64, "%64, %65, p, 1, 1, 0, 0", "%66")
                 : FD_ACC_32(0), FD_ACC_32(32)
                 : "l"(a), "l"(b), "r"(add));
#elif !defined(__CUDACC__)
  const int row = emu::warp() % 4 * 16 + emu::lane() / 4, column = 2 * (emu::lane() % 4);
  emu::start_product(d, 64, [=](float* sum) {
    for (int i = 0; i < 64; ++i) {
      const int r = row + i % 4 / 2 * 8, c = i / 4 * 8 + column + i % 2;
      double s = add ? sum[i] : 0.0f;
      for (int k = 0; k < 16; ++k)
        s += static_cast<double>(element_value(tile_element(a, true, r, k), kBf16)) *
             element_value(tile_element(b, true, c, k), kBf16);
      sum[i] = static_cast<float>(s);
    }
  });
#endif
}

// d = A B (+ d where `add`): A [16 of the warp, 16] in registers, as fragments of mma.cuh, B [16, 64] (or [16, 8]) in
// shared memory, rows along K, one tile wide.
template <bool kBf16, int kCount>
FD_D void start_product(float (&d)[kCount], const uint32_t (&a)[4], Tile b, int add) {
  static_assert(kCount == 32 || kCount == 4, "64 or 8 columns");
#if defined(__CUDA_ARCH__) && defined(FD_HOPPER)
  if constexpr (kCount == 32 && kBf16)
    asm volatile(FD_WGMMA("64", "bf16", FD_TEXT_32, "{%32, %33, %34, %35}, %36, p, 1, 1, 1", "%37")
                 : FD_ACC_32(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
  else if constexpr (kCount == 32)
    asm volatile(FD_WGMMA("64", "f16", FD_TEXT_32, "{%32, %33, %34, %35}, %36, p, 1, 1, 1", "%37")
                 : FD_ACC_32(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
  else if constexpr (kBf16)
    asm volatile(FD_WGMMA("8", "bf16", FD_TEXT_4, "{%4, %5, %6, %7}, %8, p, 1, 1, 1", "%9")
                 : FD_ACC_4(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
  else
    asm volatile(FD_WGMMA("8", "f16", FD_TEXT_4, "{%4, %5, %6, %7}, %8, p, 1, 1, 1", "%9")
                 : FD_ACC_4(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
#elif !defined(__CUDACC__)
  const unsigned char* all = emu::gather(0xffffffffu, a, sizeof a, __FILE__, __LINE__);
  float rows[2][16];  // rows g and g + 8 of A
  const int g = emu::lane() / 4, column = 2 * (emu::lane() % 4);
  for (int k = 0; k < 16; ++k)
    for (int half = 0; half < 2; ++half) {
      uint32_t word;
      memcpy(&word, all + (4 * g + k % 8 / 2) * emu::kBlob + 4 * (2 * (k / 8) + half), 4);
      rows[half][k] = element_value(static_cast<uint16_t>(word >> 16 * (k % 2)), kBf16);
    }
  std::vector<float> values(&rows[0][0], &rows[0][0] + 32);
  emu::start_product(d, kCount, [=](float* sum) {
    for (int i = 0; i < kCount; ++i) {
      double s = add ? sum[i] : 0.0f;
      for (int k = 0; k < 16; ++k)
        s += static_cast<double>(values[i % 4 / 2 * 16 + k]) *
             element_value(tile_element(b, false, i / 4 * 8 + column + i % 2, k), kBf16);
      sum[i] = static_cast<float>(s);
    }
  });
#endif
}

// ------------------------------------------------------------------------------------------------------------ threads

// `threads` threads of the block meet at barrier `number` (1 to 15; 0 is __syncthreads).
FD_D void meet(int number, int threads) {
#if defined(__CUDA_ARCH__)
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
#elif !defined(__CUDACC__)
  emu::named_barrier(number, threads, __FILE__, __LINE__);
#endif
}

// Registers per thread of the calling warpgroup from here on: given back, or taken.
template <int kCount>
FD_D void give_registers() {
#if defined(__CUDA_ARCH__) && defined(FD_HOPPER)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
template <int kCount>
FD_D void take_registers() {
#if defined(__CUDA_ARCH__) && defined(FD_HOPPER)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

}  // namespace
}  // namespace cuda
}  // namespace fastdiff
