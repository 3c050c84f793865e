// |FFT2(gray(image))|, log1p of it, or its mean over rings around the DC pixel, on CUDA.
//
//   gray = 0.299 R + 0.587 G + 0.114 B            images [B, 3 or 1, H, W]
//   out[b, shift(ky, kx)] = |sum gray[y, x] exp(-2 pi i (ky y / H + kx x / W))|            [B, H, W]
//   or out[b, r] = mean of that over the frequencies at distance r <= d < r + 1 from DC    [B, R]
//
// Floor: read the image, write the features; on an H200 (copy 4.3 TB/s) 4 us at 16 x 3 x 256 x 256 in float32 and 62 us
// at 64 x 3 x 512 x 512. The 2.5 H W log2(H W) operations are below a tenth of that; what comes close are the passes
// through shared memory, three a side and 16 bytes a number each: 2 us and 40 us, spread over 132 SMs.
//
// Mapping. Two launches over the half spectrum [H, K] in between:
//
//   rows     a block takes up to 16 pairs of rows: gray on load (16 bytes a channel, six loads in flight a thread), one
//            complex transform for two rows, separated by symmetry on the way out;
//   columns  a block takes up to 16 columns: they come by cp.async, are transformed in place, and the modulus, the
//            logarithm and the shift happen in the store, which writes row ky and, mirrored, row -ky.
//
// Images go through both in waves whose half spectra (24 MB) stay in the L2 cache. Where an image's half spectrum fits
// into 99 KB of shared memory (128 x 128 and below), one block can do all of it in one launch, to the same bits: the
// page (fastdiff/ops/spectrum.py) chooses that for small images and for many. Long sides take fewer columns per block
// and, beyond what shared memory holds, work in global memory.
//
// Or, on sm_90 and later, a cluster of 2, 4 or 8 blocks does an image in one launch, again to the same bits: its half
// spectrum lies in their shared memory (512 x 512: 1.05 MB, 131 KB a block) and never anywhere else. A block owns
// neighbouring columns, whole parts of rings; it transforms up to 16 pairs of rows at a time in what its columns leave
// (70 KB there), and hands every two columns, 16 bytes, to their owner: 16 threads write 256 bytes side by side. After
// a barrier of the cluster each transforms its columns in place. By size alone (SpectrumCluster, SpectrumLayout::
// cluster) it takes squares up to 640 x 640 whose radices are 2 to 8, up to 437 where one above 8 needs a second array,
// and up to 284 for Bluestein's method; what does not fit takes two launches.
//
// Rings: no table of bins. Along a column the rings follow one another, so a thread finds the part of its ring in four
// columns by a square root, adds it up, and the parts are added in order (a launch of its own, or the end of the
// block's): the same additions whatever the batch and the grid, no atomics.
//
// Predicted: 40 % of copy at [16, 3, 256, 256] (128 blocks: one wave, latency and two launches), 70 % at
// [64, 3, 512, 512]. Performance: not measured.
//
// Of a cluster, 45 % and 60 %. It saves a launch and the way through L2 (8 bytes a number there and back), but 7/8 of
// those bytes go from multiprocessor to multiprocessor instead, which is taken to do 12 bytes a clock. At 512 x 512,
// 1024 threads and one block a multiprocessor, an image costs its eight some 6 us for that, 7 us of passes, and 12 us
// (reads) and 4 us (writes) of memory at a multiprocessor's share of it, one after the other; 16 clusters at once, if
// the device's multiprocessors come in sixteens, hide memory behind work only as far as they drift apart. By these
// counts it wins where images are few, if anywhere, so it waits for a measurement: used only where asked for
// (FASTDIFF_SM90=1).
#include <map>
#include <mutex>

#include "async.cuh"
#include "spectrum.cuh"

namespace fastdiff {
namespace cuda {
namespace {

// Half of the gray of kVec pixels: the row transforms are separated by sums that would otherwise be halved.
template <int kVec>
FD_D void gray(const Raw<kVec> (&raw)[3], int32_t dtype, bool rgb, float (&v)[kVec]) {
  float c[kVec];
  widen(raw[0], dtype, v);
#pragma unroll
  for (int k = 0; k < kVec; ++k) v[k] *= rgb ? 0.5f * kRed : 0.5f;
  if (!rgb) return;
  widen(raw[1], dtype, c);
#pragma unroll
  for (int k = 0; k < kVec; ++k) v[k] = fmaf(c[k], 0.5f * kGreen, v[k]);
  widen(raw[2], dtype, c);
#pragma unroll
  for (int k = 0; k < kVec; ++k) v[k] = fmaf(c[k], 0.5f * kBlue, v[k]);
}

// Rows y0 + 2 t (real) and y0 + 2 t + 1 (imaginary) of image b become transform t.
template <int kVec>
FD_D void load_rows(const Spectrum& a, const Job& j, int64_t b, int32_t y0, const Lanes& d) {
  // Eight pixels are 16 bytes: no float32, for which no registers need be kept.
  const int32_t dtype = kVec < 8 ? a.images.dtype : a.images.dtype == kBF16 ? kBF16 : kF16;
  const int64_t* s = a.images.s;
  const uint32_t vectors = j.W / kVec;
  const bool rgb = a.C == 3;
  for (uint32_t task = threadIdx.x; task < vectors * d.lanes; task += blockDim.x) {
    const uint32_t t = task / vectors, x = (task - t * vectors) * kVec;
    const int32_t y = y0 + 2 * static_cast<int32_t>(t);
    if (y >= j.H) continue;
    Raw<kVec> raw[2][3] = {};
#pragma unroll
    for (int part = 0; part < 2; ++part)
#pragma unroll
      for (int c = 0; c < 3; ++c) {
        if (y + part >= j.H || c >= a.C) continue;
        Row row = row_of(a.images.data, dtype, b * s[0] + c * s[1] + (y + part) * s[2]);
        row.sd = s[3];
        raw[part][c] = load<kVec, true>(row, x);
      }
    float re[kVec], im[kVec];
    gray(raw[0], dtype, rgb, re);
    gray(raw[1], dtype, rgb, im);
#pragma unroll
    for (int k = 0; k < kVec; ++k) d.at(place(j.w, x + k), t) = make_float2(re[k], im[k]);
  }
}

// Column k of two rows' transforms from their common one Z: A_k = Z_k + conj Z_{-k}, B_k = -i (Z_k - conj Z_{-k}).
FD_D void separated(const Job& j, const Lanes& d, uint32_t t, int32_t k, float2* first, float2* second) {
  const float2 z = d.at(k, t);
  if (k == 0 && j.even) {  // real at DC, and so is the Nyquist term, which takes the place
    const float2 n = d.at(j.W / 2, t);
    *first = make_float2(z.x + z.x, n.x + n.x), *second = make_float2(z.y + z.y, n.y + n.y);
  } else {
    const float2 m = d.at(mirror(k, j.W), t);
    *first = make_float2(z.x + m.x, z.y - m.y), *second = make_float2(z.y + m.y, m.x - z.x);
  }
}

// put(y, k, value) for the transforms of rows y0 ..
template <typename Put>
FD_D void separate(const Job& j, int32_t y0, const Lanes& d, const Put& put) {
  const Divider by_columns = divider(j.K, j.K * d.lanes);
  for (uint32_t task = threadIdx.x; task < j.K * d.lanes; task += blockDim.x) {
    const uint32_t t = quotient(task, by_columns);
    const int32_t k = task - t * j.K, y = y0 + 2 * static_cast<int32_t>(t);
    if (y >= j.H) continue;
    float2 first, second;
    separated(j, d, t, k, &first, &second);
    put(y, k, first);
    if (y + 1 < j.H) put(y + 1, k, second);
  }
}

// The transforms of rows y0 .. to the owners of their columns, two columns at once, where those keep element 0 of this
// block's `columns`.
FD_D void hand_over(const Job& j, int32_t y0, const Lanes& d, float2* columns) {
  const uint32_t vectors = column_pairs(j);
  const Divider by_vectors = divider(vectors, vectors * d.lanes), by = by_owner(j);
  for (uint32_t task = threadIdx.x; task < vectors * d.lanes; task += blockDim.x) {
    const uint32_t t = quotient(task, by_vectors);
    const int32_t k = 2 * (task - t * vectors), y = y0 + 2 * static_cast<int32_t>(t);
    if (y >= j.H) continue;
    float2 first[2] = {}, second[2] = {};
    separated(j, d, t, k, &first[0], &second[0]);
    if (k + 1 < j.K) separated(j, d, t, k + 1, &first[1], &second[1]);
    const auto put = [&](int32_t row, const float2(&v)[2]) {
      const int32_t at = FD_MUTATED(kClusterPlace) ? row : place(j.h, row);
      *owned(j, by, columns, at, k) = make_float4(v[0].x, v[0].y, v[1].x, v[1].y);
    };
    put(y, first);
    if (y + 1 < j.H) put(y + 1, second);
  }
}

FD_D void load_block(const Spectrum& a, const Job& j, int64_t b, int32_t y0, const Lanes& d) {
  if (j.vec == 8)
    load_rows<8>(a, j, b, y0, d);
  else if (j.vec == 4)
    load_rows<4>(a, j, b, y0, d);
  else
    load_rows<1>(a, j, b, y0, d);
}

FD_D float feature(const Spectrum& a, float2 z) {
  const float m = modulus(z);
  return a.log ? log1pf(m) : m;
}

// Columns k0 .. k0 + columns - 1 of the spectrum of image b to where the caller wants them: kept, and as features.
FD_D void emit(const Spectrum& a, const Job& j, int64_t b, int32_t k0, int32_t columns, const Lanes& d) {
  float2* half = reinterpret_cast<float2*>(a.half + b * a.half_size);
  const auto out = [&](int32_t ky, int32_t kx, float v) {
    const int64_t y = shifted(ky, j.H, a.shift), x = shifted(kx, j.W, FD_MUTATED(kUnshifted) ? 0 : a.shift);
    const float value[1] = {v};
    write(row_of(a.out.data, a.out.dtype, b * a.out.s[0] + y * a.out.s[1] + x * a.out.s[2]), 0, value);
  };
  const Divider by_columns = divider(columns, j.H * columns);
  for (uint32_t task = threadIdx.x; task < static_cast<uint32_t>(j.H * columns); task += blockDim.x) {
    const int32_t y = quotient(task, by_columns), t = task - y * columns, k = k0 + t;
    const float2 z = d.at(y, t);
    if (a.keep) half[static_cast<int64_t>(y) * j.pitch + k] = z;
    if (a.R > 0) continue;
    const int32_t other = FD_MUTATED(kMirrorRow) ? y : mirror(y, j.H);
    if (k == 0) {
      const float2 m = d.at(other, 0);
      out(y, 0, feature(a, j.even ? direct(z, m) : z));
      if (j.even) out(y, j.W / 2, feature(a, nyquist(z, m)));
    } else {
      const float v = feature(a, z);
      out(y, k, v);
      out(other, j.W - k, v);
    }
  }
}

// Features in place of their complex numbers (DC and Nyquist: both, as a pair).
FD_D void magnitudes(const Spectrum& a, const Job& j, int32_t k0, int32_t columns, const Lanes& d) {
  const Divider by_columns = divider(columns, j.H * columns);
  for (uint32_t task = threadIdx.x; task < static_cast<uint32_t>(j.H * columns); task += blockDim.x) {
    const int32_t y = quotient(task, by_columns), t = task - y * columns;
    if (k0 + t == 0 && j.even) {  // real columns: rows ky and -ky are alike
      const int32_t other = mirror(y, j.H);
      if (y > other) continue;
      const float2 z = d.at(y, 0), m = d.at(other, 0);
      d.at(y, 0) = d.at(other, 0) = make_float2(feature(a, direct(z, m)), feature(a, nyquist(z, m)));
    } else {
      d.at(y, t) = make_float2(feature(a, d.at(y, t)), 0.0f);
    }
  }
}

// The features of all rings in columns k0 .. k0 + columns - 1, by parts of a few columns: along a column the rings
// follow one another, and a thread adds up those of one ring, column by column.
FD_D void ring_sums(const Spectrum& a, const Job& j, int64_t b, int32_t k0, int32_t columns, const Lanes& d) {
  const uint32_t R = static_cast<uint32_t>(a.R), first = k0 / j.ring_columns;
  const uint32_t parts = (columns + j.ring_columns - 1) / j.ring_columns;
  for (uint32_t task = threadIdx.x; task < parts * R; task += blockDim.x) {
    const uint32_t part = task / R;
    const int64_t r = task - part * R;
    const auto along = [&](int64_t kx, uint32_t t, bool second) {
      const int32_t low = root_above(r * r - kx * kx), high = root_above((r + 1) * (r + 1) - kx * kx);
      float s = 0.0f;
      for (int32_t y = low; y < high && 2 * static_cast<int64_t>(y) <= j.H; ++y) {
        const int32_t other = mirror(y, j.H);
        const float2 v = d.at(y, t), m = d.at(other, t);
        s += second ? v.y : v.x;
        if (other != y) s += second ? m.y : m.x;
      }
      return s;
    };
    float total = 0.0f;
    for (int32_t i = 0; i < j.ring_columns; ++i) {
      const int32_t t = part * j.ring_columns + i, k = k0 + t;
      if (t >= columns || k > r) break;  // beyond, every distance is larger
      total = fmaf(along(k, t, false), k == 0 ? 1.0f : 2.0f, total);
    }
    if (k0 + part == 0 && j.even && j.W / 2 <= r) total += along(j.W / 2, 0, true);
    a.partial[(b * j.ring_parts + first + part) * a.R + r] = total;
  }
}

// Ring means of image b, and its output, from the sums of all groups of columns. `shared`: one number, which others may
// use until then.
FD_D void finish_rings(const Spectrum& a, const Job& j, int64_t b, float* shared) {
  float* profile = a.profile + b * a.R;
  const float* partial = a.partial + b * j.ring_parts * a.R;
  FD_BARRIER(kPartialBarrier);
  for (int64_t r = threadIdx.x; r < a.R; r += blockDim.x) {
    float sum = 0.0f;
#pragma unroll 8
    for (int32_t part = 0; part < j.ring_parts; ++part) sum += partial[part * a.R + r];
    profile[r] = sum / __ldg(a.ring_size + r);
  }
  __syncthreads();
  const float total = warp_total(profile, a.R, shared);
  const float norm = a.normalize && total > 0.0f ? total : 1.0f;
  for (int64_t r = threadIdx.x; r < a.R; r += blockDim.x) {
    const float value[1] = {profile[r] / norm};
    write(row_of(a.out.data, a.out.dtype, b * a.out.s[0] + r * a.out.s[1]), 0, value);
  }
}

// Columns of the half spectrum, `count` of them from `half` on, where the transforms want them.
template <bool kShared>
FD_D void load_columns(const Job& j, const float2* half, int32_t count, const Lanes& d) {
  // Two columns are 16 bytes; what there is not becomes zero.
  const uint32_t each = d.lanes % 2 == 0 ? 2 : 1, vectors = d.lanes / each;
  const Divider by_vectors = divider(vectors, j.H * vectors);
  for (uint32_t task = threadIdx.x; task < j.H * vectors; task += blockDim.x) {
    const uint32_t y = quotient(task, by_vectors), t = (task - y * vectors) * each;
    const float2* from = half + static_cast<int64_t>(y) * j.pitch + t;
    float2* to = &d.at(place(j.h, y), t);
    const int32_t left = count - static_cast<int32_t>(t), there = left < 0                            ? 0
                                                                  : left < static_cast<int32_t>(each) ? left
                                                                                                      : each;
    if constexpr (kShared) {
      if (each == 2)
        copy_async<16>(to, from, 8 * there);
      else
        copy_async<8>(to, from, 8 * there);
    } else {
      for (int32_t i = 0; i < there; ++i) to[i] = from[i];
    }
  }
  if constexpr (kShared) {
    commit_copies();
    wait_copies<0>();
  }
}

FD_D float2* half_of(const Spectrum& a, const Job& j, int64_t b) {
  return reinterpret_cast<float2*>(a.half + (a.keep ? b : b - j.first) * a.half_size);
}

template <bool kShared>
__global__ void __launch_bounds__(kMaxThreads, kShared ? 2 : 1) rows(const Spectrum a, const Job j) {
  float2* memory = arrays<kShared>(a.scratch, a.scratch_size);
  for (int64_t task = blockIdx.x; task < j.count * j.row_groups; task += gridDim.x) {
    const int64_t b = j.first + task / j.row_groups;
    const int32_t y0 = static_cast<int32_t>(task % j.row_groups) * 2 * j.row_lanes;
    Lanes d = row_arrays(memory, j, 0), other = row_arrays(memory, j, 1);
    load_block(a, j, b, y0, d);
    transform(j.w, d, other);
    float2* half = half_of(a, j, b);
    separate(j, y0, d, [&](int32_t y, int32_t k, float2 v) { half[static_cast<int64_t>(y) * j.pitch + k] = v; });
    FD_BARRIER(kRowsReuse);  // the next rows go to the same place
  }
}

template <bool kShared>
__global__ void __launch_bounds__(kMaxThreads, kShared ? 2 : 1) columns(const Spectrum a, const Job j) {
  float2* memory = arrays<kShared>(a.scratch, a.scratch_size);
  for (int64_t task = blockIdx.x; task < j.count * j.groups; task += gridDim.x) {
    const int64_t b = j.first + task / j.groups;
    const int32_t group = static_cast<int32_t>(task % j.groups), k0 = group * j.lanes;
    const int32_t count = j.K - k0 < j.lanes ? j.K - k0 : j.lanes;
    Lanes d = column_arrays(memory, j, j.lanes, 0), other = column_arrays(memory, j, j.lanes, 1);
    const float2* half = half_of(a, j, b) + k0;
    load_columns<kShared>(j, half, count, d);
    transform(j.h, d, other);
    emit(a, j, b, k0, count, d);
    if (a.R > 0) {
      __syncthreads();
      magnitudes(a, j, k0, count, d);
      FD_BARRIER(kMagnitudeBarrier);
      ring_sums(a, j, b, k0, count, d);
    }
    FD_BARRIER(kColumnsReuse);
  }
}

__global__ void __launch_bounds__(kMaxThreads) rings(const Spectrum a, const Job j) {
  FD_SHARED(float, shared, 1);
  for (int64_t b = j.first + blockIdx.x; b < j.first + j.count; b += gridDim.x) finish_rings(a, j, b, shared);
}

// A whole image in shared memory: its columns, all of them, and a group of rows at a time.
__global__ void __launch_bounds__(kMaxThreads, 2) whole(const Spectrum a, const Job j, int32_t column_numbers) {
  FD_SHARED_DYNAMIC(float2, memory);
  for (int64_t b = blockIdx.x; b < j.count; b += gridDim.x) {
    Lanes d = column_arrays(memory, j, j.K, 0), other = column_arrays(memory, j, j.K, 1);
    for (int32_t y0 = 0; y0 < j.H; y0 += 2 * j.row_lanes) {
      Lanes row = row_arrays(memory + column_numbers, j, 0), spare = row_arrays(memory + column_numbers, j, 1);
      load_block(a, j, b, y0, row);
      transform(j.w, row, spare);
      separate(j, y0, row, [&](int32_t y, int32_t k, float2 v) { d.at(place(j.h, y), k) = v; });
      FD_BARRIER(kGroupReuse);
    }
    transform(j.h, d, other);
    emit(a, j, b, 0, j.K, d);
    if (a.R > 0) {
      __syncthreads();
      magnitudes(a, j, 0, j.K, d);
      __syncthreads();
      ring_sums(a, j, b, 0, j.K, d);
      // No shared memory of its own: the dynamic part may be all that a block can have.
      finish_rings(a, j, b, reinterpret_cast<float*>(memory));
    }
    __syncthreads();
  }
}

// The same by a cluster: a block transforms rows, hands them over column by column, and transforms its own columns.
__global__ void __launch_bounds__(kClusterThreads) clusters(const Spectrum a, const Job j, int32_t column_numbers) {
  if constexpr (kClusters) {
    FD_SHARED_DYNAMIC(float2, memory);
    const int32_t rank = cluster_rank(), ranks = j.groups;
    const Share mine = share_of(j, rank);
    for (int64_t b = blockIdx.x / ranks; b < j.count; b += gridDim.x / ranks) {
      for (int32_t group = 0; group < j.row_groups; group += ranks) {
        const int32_t y0 = (group + rank) * 2 * j.row_lanes;
        Lanes row = row_arrays(memory + column_numbers, j, 0), spare = row_arrays(memory + column_numbers, j, 1);
        if (y0 < j.H) {
          load_block(a, j, b, y0, row);
          transform(j.w, row, spare);
        }
        // The others have started, and are done with the columns of the image before.
        if (group == 0) FD_CLUSTER_BARRIER(kClusterReuse);
        if (y0 < j.H) hand_over(j, y0, row, memory);
        FD_BARRIER(kClusterGroup);
      }
      FD_CLUSTER_BARRIER(kClusterColumns);
      Lanes d = column_arrays(memory, j, j.lanes, 0), other = column_arrays(memory, j, j.lanes, 1);
      d.lanes = other.lanes = mine.count;
      transform(j.h, d, other);
      emit(a, j, b, mine.k0, mine.count, d);
      if (a.R > 0) {
        __syncthreads();
        magnitudes(a, j, mine.k0, mine.count, d);
        __syncthreads();
        ring_sums(a, j, b, mine.k0, mine.count, d);
        FD_CLUSTER_BARRIER(kClusterPartial);
        if (rank == 0) finish_rings(a, j, b, reinterpret_cast<float*>(memory));
      }
    }
  }
}

}  // namespace

bool spectrum_clusters(int device) {
  if (!asked_for_sm90()) return false;
  static std::mutex mutex;
  static std::map<int, bool> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  return known[device] = can_launch_cluster(&clusters, 8, kClusterThreads, SpectrumCluster::kShared, device);
}

void spectrum(const Spectrum& a, int device, void* stream) {
  if (a.B == 0) return;
  const DeviceGuard guard(device);
  Launches<Spectrum> run(a, a.images);
  const Job& j = run.j;
  if (a.ranks > 1) {
    const Shape s = run.cluster();
    FD_LAUNCH_CLUSTER(clusters, a.ranks, FD_SHAPE(s), stream, a, j, s.column_numbers);
    return;
  }
  if (a.ranks == 1) {
    const Shape s = run.whole();
    FD_LAUNCH(whole, FD_SHAPE(s), stream, a, j, s.column_numbers);
    return;
  }
  run.waves([&] {
    const Shape r = run.rows();
    if (run.l.shared_rows)
      FD_LAUNCH((rows<true>), FD_SHAPE(r), stream, a, j);
    else
      FD_LAUNCH((rows<false>), FD_SHAPE(r), stream, a, j);
    const Shape c = run.columns();
    if (run.l.shared_columns)
      FD_LAUNCH((columns<true>), FD_SHAPE(c), stream, a, j);
    else
      FD_LAUNCH((columns<false>), FD_SHAPE(c), stream, a, j);
  });
  if (a.R > 0) FD_LAUNCH(rings, grid_for(a.B), 256, 0, stream, a, j);
}

}  // namespace cuda
}  // namespace fastdiff
