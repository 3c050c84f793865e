// Gradient of `spectrum` to the image on CUDA. With F the spectrum that the forward pass kept, P = F / |F| (0 where F
// is 0) and u the gradient of |F|, made symmetric, U(k) = (u(k) + u(-k)) / 2,
//
//   d gray = sum_k U(k) P(k) exp(+2 pi i (ky y / H + kx x / W))         (the unnormalised inverse transform, real)
//   d red = 0.299 d gray, ...
//
// log: u / (1 + |F|). Rings: u(k) is the ring's gradient over its size, after the derivative of the normalisation.
//
// Floor: the gradient of the features (H W numbers) and the half spectrum (8 H W bytes) read, the gradient of the image
// written: 5 us at [16, 3, 256, 256] in float32 (copy at 4.3 TB/s on an H200), 94 us at [64, 3, 512, 512]. The forward
// pass in reverse (spectrum.cu), with the same mappings: columns, then rows two by two; in one launch where an image
// fits into the shared memory of a block or, where asked for, a cluster. There the blocks fetch rows from the owners of
// the columns, 16 bytes a thread, and may go once all have. The gradient of the rings comes from a launch of its own (R
// numbers).
//
// Predicted: 40 % of copy at [16, 3, 256, 256], 65 % at [64, 3, 512, 512]; of a cluster 45 % and 60 %, for the same
// reasons as forward. Performance: not measured.
#include "spectrum.cuh"

namespace fastdiff {
namespace cuda {
namespace {

// The gradients of the features of image b.
struct Upstream {
  const SpectrumBackward& a;
  const Job& j;
  int64_t b;

  FD_D float of(int32_t ky, int32_t kx) const {
    const int64_t y = shifted(ky, j.H, a.shift), x = shifted(kx, j.W, a.shift);
    float v[1];
    read<1, true>(row_of(a.grad.data, a.grad.dtype, b * a.grad.s[0] + y * a.grad.s[1] + x * a.grad.s[2]), 0, v);
    return v[0];
  }
  // U at (ky, kx), kx <= W / 2.
  FD_D float symmetric(int32_t ky, int32_t kx) const {
    if (a.R == 0) return 0.5f * (of(ky, kx) + of(mirror(ky, j.H), mirror(kx, j.W)));
    const int64_t other = mirror(ky, j.H), y = ky < other ? ky : other, v = y * y + static_cast<int64_t>(kx) * kx;
    return a.ring_grad[b * a.R + root_above(v + 1) - 1];  // floor(sqrt(v))
  }
};

FD_D float2 slope(const SpectrumBackward& a, float2 z, float u) {
  float m;
  const float2 p = phase(z, &m);
  if (a.log) u /= 1.0f + m;
  return make_float2(p.x * u, p.y * u);
}

// U P of columns k0 .. k0 + columns - 1 where the transforms want them, exchanged: these are inverse ones. The Nyquist
// column goes with the DC column, whose inverse transform is real too.
FD_D void load_slopes(const SpectrumBackward& a, const Job& j, int64_t b, int32_t k0, int32_t columns, const Lanes& d) {
  const Upstream up = {a, j, b};
  const float2* half = reinterpret_cast<const float2*>(a.half + b * a.half_size);
  const Divider by_columns = divider(columns, j.H * columns);
#pragma unroll 2
  for (uint32_t task = threadIdx.x; task < static_cast<uint32_t>(j.H) * columns; task += blockDim.x) {
    const int32_t y = quotient(task, by_columns), t = task - y * columns, k = k0 + t;
    const float2 z = __ldg(half + static_cast<int64_t>(y) * j.pitch + k);
    float2 v;
    if (k == 0 && j.even) {
      const float2 m = __ldg(half + static_cast<int64_t>(mirror(y, j.H)) * j.pitch);
      v = slope(a, direct(z, m), up.symmetric(y, 0));
      if (!FD_MUTATED(kNyquistSlope)) {
        const float2 n = slope(a, nyquist(z, m), up.symmetric(y, j.W / 2));
        v = make_float2(v.x - n.y, v.y + n.x);
      }
    } else {
      v = slope(a, z, up.symmetric(y, k));
    }
    d.at(place(j.h, y), t) = exchanged(v);
  }
}

// Column k of two rows, p and q, as part of the transform t of one complex row: Z_k = A_k + i B_k, Z_{-k} = conj A_k +
// i conj B_k, exchanged.
FD_D void joined(const Job& j, const Lanes& d, uint32_t t, int32_t k, float2 p, float2 q) {
  if (k == 0 && j.even) {  // DC + i Nyquist, both real
    d.at(place(j.w, 0), t) = make_float2(q.x, p.x);
    d.at(place(j.w, j.W / 2), t) = make_float2(q.y, p.y);
    return;
  }
  d.at(place(j.w, k), t) = make_float2(p.y + q.x, p.x - q.y);
  if (k > 0) d.at(place(j.w, j.W - k), t) = make_float2(q.x - p.y, p.x + q.y);
}

// Rows y0 + 2 t and y0 + 2 t + 1 as one. get(y, k): what the inverse column transforms gave.
template <typename Get>
FD_D void join(const Job& j, int32_t y0, const Lanes& d, const Get& get) {
  const Divider by_columns = divider(j.K, j.K * d.lanes);
#pragma unroll 2
  for (uint32_t task = threadIdx.x; task < j.K * d.lanes; task += blockDim.x) {
    const uint32_t t = quotient(task, by_columns);
    const int32_t k = task - t * j.K, y = y0 + 2 * static_cast<int32_t>(t);
    if (y >= j.H) continue;
    joined(j, d, t, k, get(y, k), y + 1 < j.H ? get(y + 1, k) : make_float2(0.0f, 0.0f));
  }
}

// The same from the owners of the columns in a cluster, two columns at once; this block's are at `columns`, exchanged.
FD_D void fetch(const Job& j, int32_t y0, const Lanes& d, float2* columns) {
  const uint32_t vectors = column_pairs(j);
  const Divider by_vectors = divider(vectors, vectors * d.lanes), by = by_owner(j);
  for (uint32_t task = threadIdx.x; task < vectors * d.lanes; task += blockDim.x) {
    const uint32_t t = quotient(task, by_vectors);
    const int32_t k = 2 * (task - t * vectors), y = y0 + 2 * static_cast<int32_t>(t);
    if (y >= j.H) continue;
    const float4 p = *owned(j, by, columns, y, k);
    const float4 q = y + 1 < j.H ? *owned(j, by, columns, y + 1, k) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    joined(j, d, t, k, make_float2(p.y, p.x), make_float2(q.y, q.x));
    if (k + 1 < j.K) joined(j, d, t, k + 1, make_float2(p.w, p.z), make_float2(q.w, q.z));
  }
}

template <int kVec>
FD_D void store_rows(const SpectrumBackward& a, const Job& j, int64_t b, int32_t y0, const Lanes& d) {
  const int32_t dtype = kVec < 8 ? a.dimages.dtype : a.dimages.dtype == kBF16 ? kBF16 : kF16;
  const int64_t* s = a.dimages.s;
  const uint32_t vectors = j.W / kVec;
  for (uint32_t task = threadIdx.x; task < vectors * d.lanes; task += blockDim.x) {
    const uint32_t t = task / vectors, x = (task - t * vectors) * kVec;
    const int32_t y = y0 + 2 * static_cast<int32_t>(t);
    if (y >= j.H) continue;
    float2 pixels[kVec];
#pragma unroll
    for (int k = 0; k < kVec; ++k) pixels[k] = d.at(x + k, t);
#pragma unroll
    for (int part = 0; part < 2; ++part)
      for (int c = 0; c < a.C; ++c) {
        if (y + part >= (FD_MUTATED(kOddRow) ? j.H / 2 * 2 : j.H)) continue;
        const float weight = a.C == 1 ? 1.0f : c == 0 ? kRed : c == 1 ? kGreen : kBlue;
        float v[kVec];
#pragma unroll
        for (int k = 0; k < kVec; ++k) v[k] = weight * (part ? pixels[k].x : pixels[k].y);
        Row row = row_of(a.dimages.data, dtype, b * s[0] + c * s[1] + (y + part) * s[2]);
        row.sd = s[3];
        write(row, x, v);
      }
  }
}

FD_D void store_block(const SpectrumBackward& a, const Job& j, int64_t b, int32_t y0, const Lanes& d) {
  if (j.vec == 8)
    store_rows<8>(a, j, b, y0, d);
  else if (j.vec == 4)
    store_rows<4>(a, j, b, y0, d);
  else
    store_rows<1>(a, j, b, y0, d);
}

// ring_grad[r] = d ring r / its size.
__global__ void __launch_bounds__(kMaxThreads) ring_gradients(const SpectrumBackward a) {
  FD_SHARED(float, shared, 1);
  for (int64_t b = blockIdx.x; b < a.B; b += gridDim.x) {
    const float* profile = a.profile + b * a.R;
    float* coefficient = a.ring_grad + b * a.R;
    const float total = warp_total(profile, a.R, shared);
    const bool normalize = a.normalize && total > 0.0f;
    for (int64_t r = threadIdx.x; r < a.R; r += blockDim.x) {
      float v[1];
      read<1, true>(row_of(a.grad.data, a.grad.dtype, b * a.grad.s[0] + r * a.grad.s[1]), 0, v);
      coefficient[r] = normalize ? v[0] * (profile[r] / total) : v[0];
    }
    __syncthreads();
    const float dot = warp_total(coefficient, a.R, shared);
    for (int64_t r = threadIdx.x; r < a.R; r += blockDim.x) {
      float v[1];
      read<1, true>(row_of(a.grad.data, a.grad.dtype, b * a.grad.s[0] + r * a.grad.s[1]), 0, v);
      coefficient[r] = (normalize ? (v[0] - dot) / total : v[0]) / a.ring_size[r];
    }
    __syncthreads();
  }
}

template <bool kShared>
__global__ void __launch_bounds__(kMaxThreads, kShared ? 2 : 1) columns(const SpectrumBackward a, const Job j) {
  float2* memory = arrays<kShared>(a.scratch, a.scratch_size);
  for (int64_t task = blockIdx.x; task < j.count * j.groups; task += gridDim.x) {
    const int64_t slot = task / j.groups;
    const int32_t k0 = static_cast<int32_t>(task % j.groups) * j.lanes;
    const int32_t count = j.K - k0 < j.lanes ? j.K - k0 : j.lanes;
    Lanes d = column_arrays(memory, j, j.lanes, 0), other = column_arrays(memory, j, j.lanes, 1);
    load_slopes(a, j, j.first + slot, k0, count, d);
    transform(j.h, d, other);
    float2* work = reinterpret_cast<float2*>(a.work + slot * a.half_size);
    const Divider by_columns = divider(count, j.H * count);
    for (uint32_t i = threadIdx.x; i < static_cast<uint32_t>(j.H) * count; i += blockDim.x) {
      const int32_t y = quotient(i, by_columns), t = i - y * count;
      work[static_cast<int64_t>(y) * j.pitch + k0 + t] = exchanged(d.at(y, t));
    }
    FD_BARRIER(kColumnsReuse);
  }
}

template <bool kShared>
__global__ void __launch_bounds__(kMaxThreads, kShared ? 2 : 1) rows(const SpectrumBackward a, const Job j) {
  float2* memory = arrays<kShared>(a.scratch, a.scratch_size);
  for (int64_t task = blockIdx.x; task < j.count * j.row_groups; task += gridDim.x) {
    const int64_t slot = task / j.row_groups;
    const int32_t y0 = static_cast<int32_t>(task % j.row_groups) * 2 * j.row_lanes;
    Lanes d = row_arrays(memory, j, 0), other = row_arrays(memory, j, 1);
    const float2* work = reinterpret_cast<const float2*>(a.work + slot * a.half_size);
    join(j, y0, d, [&](int32_t y, int32_t k) { return __ldg(work + static_cast<int64_t>(y) * j.pitch + k); });
    transform(j.w, d, other);
    store_block(a, j, j.first + slot, y0, d);
    FD_BARRIER(kRowsReuse);
  }
}

// A whole image in shared memory, as in the forward pass.
__global__ void __launch_bounds__(kMaxThreads, 2) whole(const SpectrumBackward a, const Job j, int32_t column_numbers) {
  FD_SHARED_DYNAMIC(float2, memory);
  for (int64_t b = blockIdx.x; b < j.count; b += gridDim.x) {
    Lanes d = column_arrays(memory, j, j.K, 0), other = column_arrays(memory, j, j.K, 1);
    load_slopes(a, j, b, 0, j.K, d);
    transform(j.h, d, other);
    for (int32_t y0 = 0; y0 < j.H; y0 += 2 * j.row_lanes) {
      Lanes row = row_arrays(memory + column_numbers, j, 0), spare = row_arrays(memory + column_numbers, j, 1);
      join(j, y0, row, [&](int32_t y, int32_t k) { return exchanged(d.at(y, k)); });
      transform(j.w, row, spare);
      store_block(a, j, b, y0, row);
      FD_BARRIER(kGroupReuse);
    }
  }
}

// The same by a cluster: a block transforms its columns, then rows that it fetches from all.
__global__ void __launch_bounds__(kClusterThreads)
    clusters(const SpectrumBackward a, const Job j, int32_t column_numbers) {
  if constexpr (kClusters) {
    FD_SHARED_DYNAMIC(float2, memory);
    const int32_t ranks = j.groups, rank = blockIdx.x % ranks;  // cluster_rank() would take a register
    for (int64_t b = blockIdx.x / ranks; b < j.count; b += gridDim.x / ranks) {
      const Share mine = share_of(j, rank);
      Lanes d = column_arrays(memory, j, j.lanes, 0), other = column_arrays(memory, j, j.lanes, 1);
      d.lanes = other.lanes = mine.count;
      load_slopes(a, j, b, mine.k0, mine.count, d);
      transform(j.h, d, other);  // also where there are no columns, so that `d` is where the others' are
      FD_CLUSTER_BARRIER(kClusterGather);
      for (int32_t group = 0; group < j.row_groups; group += ranks) {
        const int32_t y0 = (group + rank) * 2 * j.row_lanes;
        Lanes row = row_arrays(memory + column_numbers, j, 0), spare = row_arrays(memory + column_numbers, j, 1);
        if (y0 < j.H) fetch(j, y0, row, d.p);
        // Nobody needs the columns any more: the next image may come, or this block may leave.
        if (group + ranks >= j.row_groups) FD_CLUSTER_BARRIER(kClusterLeave);
        if (y0 < j.H) {
          transform(j.w, row, spare);
          store_block(a, j, b, y0, row);
        }
        FD_BARRIER(kClusterBackGroup);
      }
    }
  }
}

}  // namespace

void spectrum_backward(const SpectrumBackward& a, int device, void* stream) {
  if (a.B == 0) return;
  const DeviceGuard guard(device);
  Launches<SpectrumBackward> run(a, a.dimages);
  const Job& j = run.j;
  if (a.R > 0) FD_LAUNCH(ring_gradients, grid_for(a.B), 256, 0, stream, a);
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
    const Shape c = run.columns();
    if (run.l.shared_columns)
      FD_LAUNCH((columns<true>), FD_SHAPE(c), stream, a, j);
    else
      FD_LAUNCH((columns<false>), FD_SHAPE(c), stream, a, j);
    const Shape r = run.rows();
    if (run.l.shared_rows)
      FD_LAUNCH((rows<true>), FD_SHAPE(r), stream, a, j);
    else
      FD_LAUNCH((rows<false>), FD_SHAPE(r), stream, a, j);
  });
}

}  // namespace cuda
}  // namespace fastdiff
