// Gaussian blur on CUDA: out = Ay x Ax^T, its transpose, and its derivative by sigma. Formulas: csrc/cpu/gaussian.cpp.
//
// Floor: x read once, out written once: 8 bytes a pixel in float32, 2.0 us for 1024 x 1024 on an H200 (copy 4.3 TB/s);
// 2 (2 r + 1) multiply-adds a pixel.
//
// Radii of up to 16 (sigma < 5.7): one launch, no memory besides. A block takes 64 x 64 outputs. It reads them with
// their halo into shared memory as float32, whatever the type, strides and border, 12 loads in flight a thread; the
// taps are made meanwhile, in float64, by as many threads as there are taps, from sigma itself: no table, nothing for
// the host to know, and a captured graph may be replayed with another sigma. Rows pass in place: eight neighbouring
// outputs a thread, eight threads a row, so that a warp that has read its four rows may overwrite them (the row pitch
// is 4 mod 8 floats: two rows by four 32-byte steps hit every bank once). Columns pass into registers, 2 x 8 outputs a
// thread, a window of rows sliding past the taps, and out. At sigma 2 (r = 6): 29 FMAs a pixel (halo included) against
// 128 a clock, 45 bytes of shared memory against 128 a clock, 36 KB of loads in flight an SM: arithmetic 1.1 us and
// shared memory 1.5 us of the floor's 2.0 for 1024 x 1024, overlapped over six blocks an SM; launch and ramp about 2
// us. Predicted: 45 % of copy speed for one such image (256 blocks, less than one wave), 60 to 70 % for batches.
//
// Wide Gaussians, sigma of 16 and more with the support that follows from it, on images of 64 x 64 and more: a
// recurrence at a cost that does not grow with sigma, within 1e-5 of the largest |x| (gaussian_sliding.cuh).
//
// Other radii, and the gradient to any sigma: rows into a float32 image, then columns, each in chunks of 64 taps from
// shared memory, register blocked as above, the columns through a ring of 128 rows so that a row is read once per 64
// outputs; sums of a chunk are added to the total, so that rounding does not grow with the support. The radius never
// exceeds the image (gaussian.cuh), so this is exact for every sigma that is served. sigma 8 (K = 49): 2 K = 98 FMAs a
// pixel, 170 instructions with what is staged (1.75 per FMA in the machine code for sm_90), 6 us at 128 a clock and SM;
// predicted 12 us, 16 % of copy speed.
//
// Where sigma lives in device memory and the support follows from it, a block finds out for itself whether its sample
// is its business, and the launches of every path are made.
//
// Gradient to sigma: both row passes (taps, derivatives) of a tile, two column passes into one register block, product
// with g; one double per tile, then one sum per sample in fixed order. No atomics; a sample's result depends on its own
// sizes alone.
//
// Performance: not measured.
#include "gaussian_sliding.cuh"

namespace fastdiff {
namespace cuda {
namespace {

constexpr int kTile = static_cast<int>(kBlurTile);
constexpr int kEntries = kMost + 2;  // folded taps, with those that the constant border drops
constexpr int kOut = 8;              // outputs of a thread along the axis of a pass
constexpr int kSlopePitch = kTile + 4;

// A row of the tile: the outputs, the halo, and four floats that a window may run over; 4 mod 8 (see above).
FD_HD int pitch_of(int reach) { return (kTile + 2 * reach + 7) / 8 * 8 + 4; }

FD_D float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
FD_D float2 load2(const float* p) { return *reinterpret_cast<const float2*>(p); }

// acc[o] += sum over t < count of w[t] in[o + t], t in order. `in` and w are aligned to 16 bytes; up to 11 + count
// floats of `in` are read, of which 7 + count count.
FD_D void row_taps(float (&acc)[kOut], const float* in, const float* w, int count) {
  float v[kOut + 4];
  const auto fill = [&](int i, const float4 x) { v[i] = x.x, v[i + 1] = x.y, v[i + 2] = x.z, v[i + 3] = x.w; };
  fill(0, load4(in)), fill(4, load4(in + 4));
  int t = 0;
  for (; t + 4 <= count; t += 4) {
    fill(8, load4(in + t + 8));
    const float4 k = load4(w + t);
#pragma unroll
    for (int o = 0; o < kOut; ++o) {
      acc[o] = fmaf(k.x, v[o], acc[o]);
      acc[o] = fmaf(k.y, v[o + 1], acc[o]);
      acc[o] = fmaf(k.z, v[o + 2], acc[o]);
      acc[o] = fmaf(k.w, v[o + 3], acc[o]);
    }
#pragma unroll
    for (int i = 0; i < kOut; ++i) v[i] = v[i + 4];
  }
  if (t == count || FD_MUTATED(kTailTap)) return;
  fill(8, load4(in + t + 8));
#pragma unroll
  for (int s = 0; s < 3; ++s)  // not as zeros: what lies beyond the support may be infinite
    if (t + s < count) {
#pragma unroll
      for (int o = 0; o < kOut; ++o) acc[o] = fmaf(w[t + s], v[o + s], acc[o]);
    }
}

// The same down two columns: row(j) is where row j of them lies.
template <typename Row>
FD_D void column_taps(float2 (&acc)[kOut], const float* w, int count, const Row& row) {
  float2 v[kOut + 3];
#pragma unroll
  for (int i = 0; i < kOut - 1; ++i) v[i] = load2(row(i));
  const auto add = [&](float k, int s) {
#pragma unroll
    for (int o = 0; o < kOut; ++o) {
      acc[o].x = fmaf(k, v[o + s].x, acc[o].x);
      acc[o].y = fmaf(k, v[o + s].y, acc[o].y);
    }
  };
  int t = 0;
  for (; t + 4 <= count; t += 4) {
#pragma unroll
    for (int s = 0; s < 4; ++s) v[kOut - 1 + s] = load2(row(t + kOut - 1 + s));
    const float4 k = load4(w + t);
    add(k.x, 0), add(k.y, 1), add(k.z, 2), add(k.w, 3);
#pragma unroll
    for (int i = 0; i < kOut - 1; ++i) v[i] = v[i + 4];
  }
#pragma unroll
  for (int s = 0; s < 3; ++s)
    if (t + s < count) {
      v[kOut - 1 + s] = load2(row(t + s + kOut - 1));
      add(w[t + s], s);
    }
}

// Where a task works: the plane and the corner of its tile.
struct Place {
  int64_t plane, b, c, y0, x0;
  FD_D Place(int64_t task, const Work& a, int height, int width) {
    const int64_t across = (a.W + width - 1) / width, down = (a.H + height - 1) / height;
    int64_t tile;
    split(task, across * down, &plane, &tile);
    split(tile, across, &y0, &x0);
    split(plane, a.C, &b, &c);
    y0 *= height, x0 *= width;
  }
};
int64_t tasks_of(const Work& a, int64_t height, int64_t width) {
  return a.B * a.C * ((a.H + height - 1) / height) * ((a.W + width - 1) / width);
}
// Outputs of a thread into the image, or their product with g: the sum of a tile into `partial`.
template <bool kSlope>
FD_D void finish(const Work& a, const Place& p, const Edges& edges, float2 (&acc)[kOut], double* sums) {
  const int64_t y = p.y0 + threadIdx.x / 32 * kOut, x = p.x0 + threadIdx.x % 32 * 2;
  const int columns = x + 1 < a.W ? 2 : x < a.W ? 1 : 0;
  if constexpr (kSlope) {
    float part = 0;
    const int64_t sy = a.grad.s[2] * size_any(a.grad.dtype), sx = a.grad.s[3] * size_any(a.grad.dtype);
    const char* g = plane_of(a.grad, p.b, p.c) + x * sx;
    for (int o = 0; o < kOut; ++o) {
      if (y + o >= a.H) break;
      if (columns > 0) part = fmaf(widen_any(fetch_any(g + (y + o) * sy, a.grad.dtype), a.grad.dtype), acc[o].x, part);
      if (columns > 1)
        part = fmaf(widen_any(fetch_any(g + (y + o) * sy + sx, a.grad.dtype), a.grad.dtype), acc[o].y, part);
    }
    const double sum = block_sum_double<kThreads>(part, sums);
    const int64_t across = (a.W + kTile - 1) / kTile;
    if (threadIdx.x == 0) a.partial[p.plane * blur_tiles(a.H, a.W) + p.y0 / kTile * across + p.x0 / kTile] = sum;
  } else {
    if (columns == 0) return;
    const bool pair = a.W % 2 == 0 && reinterpret_cast<uintptr_t>(a.out.data) % 8 == 0;
#pragma unroll
    for (int o = 0; o < kOut; ++o) {
      if (y + o >= a.H) break;
      const float half = edges.halved(y + o, a.H);
      put_two(static_cast<char*>(a.out.data) + ((p.plane * a.H + y + o) * a.W + x) * size_any(a.out.dtype), a.out.dtype,
              acc[o].x * (half * edges.halved(x, a.W)), acc[o].y * (half * edges.halved(x + 1, a.W)), pair, columns);
    }
  }
}

// ------------------------------------------------------------------------------------------------------- small radii

struct Taps {  // of one axis, in shared memory
  float w[2 * kMost + 4], slope[2 * kMost + 4];
  float tail[kEntries];  // tail[i]: the sum of the taps k >= i
};

// Tap j from what fold() left, by thread j.
template <bool kSlope>
FD_D void make_taps(const Axis& a, int32_t border, const double* e, const double* q, Taps* taps, int j) {
  if (j > a.reach) return;
  const int entries = static_cast<int>(a.entries(border)), r = static_cast<int>(a.reach);
  double sum = 0, spread = 0, tail = 0;
  for (int i = entries - 1; i > 0; --i) {
    sum += 2 * e[i];
    if constexpr (kSlope) spread += 2 * q[i];
    if (i >= j) tail += e[i];
  }
  sum += e[0], spread += q[0];
  if (j == 0) tail += e[0];
  const float w = static_cast<float>(tap(e[j], sum));
  taps->w[r + j] = w, taps->w[r - j] = w;
  if constexpr (kSlope) {
    const float slope = static_cast<float>(tap_slope(a, e[j], q[j], sum, spread));
    taps->slope[r + j] = slope, taps->slope[r - j] = slope;
  } else {
    taps->tail[j] = static_cast<float>(tap(tail, sum));
  }
}

// kSlope: the gradient to sigma; else the blur, or its transpose.
template <bool kSlope>
__global__ void __launch_bounds__(kThreads, kSlope ? 2 : 3) blur_tile(const Work a) {
  FD_SHARED_DYNAMIC(float, tile);  // [kTile + 2 ry][pitch], then for kSlope [kTile + 2 ry][kSlopePitch]
  FD_SHARED(float4, taps_memory, (sizeof(Taps) + 15) / 16 * 2);
  FD_SHARED(double, folded, 4 * kEntries);
  FD_SHARED(double, sums, kWarps);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Taps* const taps_y = reinterpret_cast<Taps*>(taps_memory);
  Taps* const taps_x = reinterpret_cast<Taps*>(taps_memory + (sizeof(Taps) + 15) / 16);
  const Edges edges(a.border, !kSlope && a.adjoint != 0);
  const int64_t total = a.B * a.C * blur_tiles(a.H, a.W);
  for (int64_t task = blockIdx.x; task < total; task += gridDim.x) {
    const Place p(task, a, kTile, kTile);
    const Axis ay = axis_of(a, p.b, false, a.H, a.border), ax = axis_of(a, p.b, true, a.W, a.border);
    if (ay.reach > kMost || ax.reach > kMost) continue;  // the same for the whole block
    const int ry = static_cast<int>(ay.reach), rx = static_cast<int>(ax.reach), pitch = pitch_of(rx);
    const int64_t high = a.H - p.y0, wide = a.W - p.x0;
    const int rows = static_cast<int>(high < kTile ? high : kTile) + 2 * ry;
    const int columns = static_cast<int>(wide < kTile ? wide : kTile) + 2 * rx;

    // The tile with its halo: lanes along a row, warps down.
    constexpr int kAcross = (kTile + 2 * kMost + 31) / 32, kDown = 4;
    const int64_t size = size_any(a.x.dtype);
    int64_t at[kAcross];
    float scale[kAcross];
#pragma unroll
    for (int i = 0; i < kAcross; ++i) {
      const int64_t m = lane + 32 * i < columns ? border_index(p.x0 - rx + lane + 32 * i, a.W, edges.border) : -1;
      at[i] = m < 0 ? -1 : m * a.x.s[3] * size, scale[i] = edges.doubled(m, a.W);
    }
    const char* image = plane_of(a.x, p.b, p.c);
    for (int first = warp; first < rows; first += kWarps * kDown) {
      uint32_t raw[kDown][kAcross];
      float twice[kDown];
#pragma unroll
      for (int d = 0; d < kDown; ++d) {
        const int j = first + kWarps * d;
        const int64_t m = j < rows ? border_index(p.y0 - ry + j, a.H, edges.border) : -1;
        twice[d] = edges.doubled(m, a.H);
#pragma unroll
        for (int i = 0; i < kAcross; ++i)
          raw[d][i] = m < 0 || at[i] < 0 ? 0u : fetch_any(image + m * a.x.s[2] * size + at[i], a.x.dtype);
      }
#pragma unroll
      for (int d = 0; d < kDown; ++d) {
        const int j = first + kWarps * d;
#pragma unroll
        for (int i = 0; i < kAcross; ++i)
          if (j < rows && lane + 32 * i < columns)
            tile[j * pitch + lane + 32 * i] = widen_any(raw[d][i], a.x.dtype) * (twice[d] * scale[i]);
      }
    }
    const bool along_x = warp >= kWarps / 2;
    const int half = kThreads / 2, part = threadIdx.x % half;
    const Axis own = axis_of(a, p.b, along_x, along_x ? a.W : a.H, a.border);
    double* const e = folded + (along_x ? 2 * kEntries : 0);
    fold(own, a.border, e, e + kEntries, part, half);
    __syncthreads();
    make_taps<kSlope>(own, a.border, e, e + kEntries, along_x ? taps_x : taps_y, part);
    FD_BARRIER(kTileBarrier);

    // Rows, in place: what a warp reads it alone overwrites.
    float* const slopes = tile + (kTile + 2 * ry) * pitch;
    for (int first = 4 * warp; first < rows; first += 4 * kWarps) {
      const int j = first + (lane & 1) + 2 * (lane >> 4), segment = kOut * (lane >> 1 & 7);
      float* const row = tile + j * pitch;
      const bool mine = j < rows && p.x0 + segment < a.W;
      float acc[kOut] = {}, change[kOut] = {};
      if (mine) {
        row_taps(acc, row + segment, taps_x->w, 2 * rx + 1);
        if constexpr (kSlope) row_taps(change, row + segment, taps_x->slope, 2 * rx + 1);
        if (edges.replicate) {  // the edges gather the tails
          const int last = static_cast<int>(wide - 1) - segment;
          const int64_t most = rx < a.W - 1 ? rx : a.W - 1;
          float from_first = 0, from_last = 0;
          if (p.x0 + segment == 0)
            for (int i = 0; i <= most; ++i) from_first = fmaf(taps_x->tail[i], row[rx + i], from_first);
          if (last >= 0 && last < kOut)
            for (int i = 0; i <= most; ++i) from_last = fmaf(taps_x->tail[i], row[segment + last + rx - i], from_last);
          if (p.x0 + segment == 0) acc[0] = from_first;
#pragma unroll
          for (int o = 0; o < kOut; ++o)
            if (o == last) acc[o] = from_last;
        }
      }
      if (!FD_MUTATED(kRowsInPlace)) __syncwarp();
      if (mine) {
        *reinterpret_cast<float4*>(row + segment) = make_float4(acc[0], acc[1], acc[2], acc[3]);
        *reinterpret_cast<float4*>(row + segment + 4) = make_float4(acc[4], acc[5], acc[6], acc[7]);
        if constexpr (kSlope) {
          float* const to = slopes + j * kSlopePitch + segment;
          *reinterpret_cast<float4*>(to) = make_float4(change[0], change[1], change[2], change[3]);
          *reinterpret_cast<float4*>(to + 4) = make_float4(change[4], change[5], change[6], change[7]);
        }
      }
    }
    FD_BARRIER(kRowsBarrier);

    float2 acc[kOut] = {};
    const float* const column = tile + kOut * warp * pitch + 2 * lane;
    if constexpr (kSlope) {
      const float* const change = slopes + kOut * warp * kSlopePitch + 2 * lane;
      column_taps(acc, taps_y->slope, 2 * ry + 1, [&](int j) { return column + j * pitch; });
      column_taps(acc, taps_y->w, 2 * ry + 1, [&](int j) { return change + j * kSlopePitch; });
    } else {
      column_taps(acc, taps_y->w, 2 * ry + 1, [&](int j) { return column + j * pitch; });
      if (edges.replicate) {
        const int64_t most = ry < a.H - 1 ? ry : a.H - 1;
#pragma unroll
        for (int o = 0; o < kOut; ++o) {
          const int64_t y = p.y0 + kOut * warp + o;
          if (y != 0 && y != a.H - 1) continue;
          float2 s = make_float2(0, 0);
          for (int i = 0; i <= most; ++i) {
            const float2 v = load2(column + (o + ry + (y == 0 ? i : -i)) * pitch);
            s.x = fmaf(taps_y->tail[i], v.x, s.x), s.y = fmaf(taps_y->tail[i], v.y, s.y);
          }
          acc[o] = s;
        }
      }
    }
    finish<kSlope>(a, p, edges, acc, sums);
    FD_BARRIER(kTileReuse);
  }
}

// ------------------------------------------------------------------------------------------------------- large radii

constexpr int kChunk64 = 64;                       // taps at a time
constexpr int kBandRows = 16, kBandColumns = 128;  // outputs of a block in the row pass
constexpr int kBandPitch = kBandColumns + kChunk64 + 4;
constexpr int kRing = 2 * kTile;  // rows of the column pass

__global__ void __launch_bounds__(kThreads, 1) blur_tables(const Work a, int64_t samples) {
  FD_SHARED(double, totals, kThreads);
  FD_SHARED(double, system, kCosines*(kCosines + 1));
  const int64_t n = fold_entries(a.H, a.W);
  for (int64_t task = blockIdx.x; task < (a.sliding ? 4 : 2) * samples; task += gridDim.x) {
    const int64_t b = task % (2 * samples) / 2;
    const bool along_x = task % 2 != 0;
    const Axis axis = axis_of(a, b, along_x, along_x ? a.W : a.H, a.border);
    if (task >= 2 * samples) {
      const Axis other = axis_of(a, b, !along_x, along_x ? a.H : a.W, a.border);
      if (is_sliding(a, axis, other))
        slide_table(axis, make_slide(axis, a.border), weights_at(a), slide_table_of(a, b, along_x), totals, system);
      __syncthreads();
      continue;
    }
    double* const e = sums_of(a, b) + (along_x ? 2 * n : 0);
    double* const q = e + n;
    float* const taps = reinterpret_cast<float*>(sums_of(a, b) + 4 * n) + (along_x ? 3 * n : 0);
    const int64_t entries = axis.entries(a.border);
    fold(axis, a.border, e, q, threadIdx.x, kThreads);
    __syncthreads();
    double sum = 0, spread = 0;
    for (int64_t j = threadIdx.x; j < entries; j += kThreads) {
      sum += j == 0 ? e[j] : 2 * e[j];
      spread += j == 0 ? q[j] : 2 * q[j];
    }
    sum = block_sum_double<kThreads>(sum, totals), spread = block_sum_double<kThreads>(spread, totals);
    for (int64_t j = threadIdx.x; j < entries; j += kThreads) {
      taps[j] = static_cast<float>(tap(e[j], sum));
      taps[n + j] = static_cast<float>(tap_slope(axis, e[j], q[j], sum, spread));
    }
    __syncthreads();
    suffix_sums<kThreads>(e, entries, totals);
    for (int64_t j = threadIdx.x; j < entries; j += kThreads) taps[2 * n + j] = static_cast<float>(tap(e[j], sum));
    __syncthreads();
  }
}

// Taps t0 .. t0 + count - 1 of 2 r + 1, from the half that a table holds.
FD_D void stage_taps(float* to, const float* half, int64_t r, int64_t t0, int count) {
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int64_t k = t0 + i - r;
    to[i] = half[k < 0 ? -k : k];
  }
}

template <bool kSlope>
__global__ void __launch_bounds__(kThreads, 2) blur_rows(const Work a) {
  FD_SHARED(float4, band4, kBandRows * kBandPitch / 4);
  FD_SHARED(float4, taps4, 2 * kChunk64 / 4);
  float* const band = reinterpret_cast<float*>(band4);
  float* const taps = reinterpret_cast<float*>(taps4);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Edges edges(a.border, !kSlope && a.adjoint != 0);
  const int64_t total = a.B * a.C * ((a.H + kBandRows - 1) / kBandRows) * ((a.W + kBandColumns - 1) / kBandColumns);
  const int64_t size = size_any(a.x.dtype), image = a.B * a.C * a.H * a.W;
  for (int64_t task = blockIdx.x; task < total; task += gridDim.x) {
    const Place p(task, a, kBandRows, kBandColumns);
    const Axis ay = axis_of(a, p.b, false, a.H, a.border), axis = axis_of(a, p.b, true, a.W, a.border);
    if (a.several && (is_small(ay, axis) || is_sliding(a, ay, axis))) continue;
    const int64_t r = axis.reach, n = fold_entries(a.H, a.W);
    const float* const table = table_of(a, p.b, true);
    const char* const from = plane_of(a.x, p.b, p.c);
    const int j = warp % 4 * 4 + (lane & 1) + 2 * (lane >> 4), segment = warp / 4 * 64 + kOut * (lane >> 1 & 7);
    float sum[kOut] = {}, slope[kOut] = {};
    for (int64_t t0 = 0; t0 < 2 * r + 1; t0 += kChunk64) {
      const int64_t left = 2 * r + 1 - t0;
      const int count = left < kChunk64 ? static_cast<int>(left) : kChunk64;
      constexpr int kAcross = (kBandColumns + kChunk64 + 31) / 32;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t y = p.y0 + 2 * warp + half;
        uint32_t raw[kAcross];
        float scale[kAcross];
#pragma unroll
        for (int i = 0; i < kAcross; ++i) {
          const int64_t v = p.x0 - r + t0 + lane + 32 * i;
          const bool needed = y < a.H && v < a.W + r && lane + 32 * i < kBandColumns + count;
          const int64_t m = needed ? border_index(v, a.W, edges.border) : -1;
          scale[i] = edges.doubled(m, a.W) * edges.doubled(y, a.H);
          raw[i] = m < 0 ? 0u : fetch_any(from + (y * a.x.s[2] + m * a.x.s[3]) * size, a.x.dtype);
        }
#pragma unroll
        for (int i = 0; i < kAcross; ++i)
          band[(2 * warp + half) * kBandPitch + lane + 32 * i] = widen_any(raw[i], a.x.dtype) * scale[i];
      }
      stage_taps(taps, table, r, t0, count);
      if constexpr (kSlope) stage_taps(taps + kChunk64, table + n, r, t0, count);
      __syncthreads();
      float part[kOut] = {};
      row_taps(part, band + j * kBandPitch + segment, taps, count);
#pragma unroll
      for (int o = 0; o < kOut; ++o) sum[o] += part[o];
      if constexpr (kSlope) {
        float change[kOut] = {};
        row_taps(change, band + j * kBandPitch + segment, taps + kChunk64, count);
#pragma unroll
        for (int o = 0; o < kOut; ++o) slope[o] += change[o];
      }
      __syncthreads();
    }
    const int64_t y = p.y0 + j, x = p.x0 + segment;
    if (y < a.H) {
      float* const to = a.workspace + (p.plane * a.H + y) * a.W + x;
      if (a.W % 4 == 0) {
#pragma unroll
        for (int h = 0; h < kOut; h += 4)
          if (x + h < a.W) {
            *reinterpret_cast<float4*>(to + h) = make_float4(sum[h], sum[h + 1], sum[h + 2], sum[h + 3]);
            if constexpr (kSlope)
              *reinterpret_cast<float4*>(to + image + h) =
                  make_float4(slope[h], slope[h + 1], slope[h + 2], slope[h + 3]);
          }
      } else {
#pragma unroll
        for (int o = 0; o < kOut; ++o)
          if (x + o < a.W) {
            to[o] = sum[o];
            if constexpr (kSlope) to[image + o] = slope[o];
          }
      }
    }
    if (edges.replicate && (p.x0 == 0 || p.x0 + kBandColumns >= a.W)) {  // the edges gather the tails
      __syncthreads();
      const int64_t most = r < a.W - 1 ? r : a.W - 1;
      for (int half = 0; half < 2; ++half) {
        const int64_t row = p.y0 + 2 * warp + half;
        if (row >= a.H) continue;
        for (int side = 0; side < 2; ++side) {
          if (side == 0 ? p.x0 != 0 : p.x0 + kBandColumns < a.W) continue;
          float s[1] = {};
          for (int64_t i = lane; i <= most; i += 32) {
            const int64_t m = side == 0 ? i : a.W - 1 - i;
            const float v = widen_any(fetch_any(from + (row * a.x.s[2] + m * a.x.s[3]) * size, a.x.dtype), a.x.dtype);
            s[0] = fmaf(table[2 * n + i], v, s[0]);
          }
          warp_sum(s);
          if (lane == 0) a.workspace[(p.plane * a.H + row) * a.W + (side == 0 ? 0 : a.W - 1)] = s[0];
        }
      }
    }
  }
}

// Adds the column pass of one image [H, W] to acc.
FD_D void column_pass(float2 (&acc)[kOut], const Work& a, const Place& p, int32_t border, const float* image, int64_t r,
                      const float* half_taps, float* ring, float* taps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t x = p.x0 + 2 * lane;
  const bool pair = a.W % 2 == 0 && x < a.W;
  const auto stage = [&](int64_t from) {  // rows from .. from + kTile of the window, which starts at y0 - r
    float2 v[kTile / kWarps];
#pragma unroll
    for (int i = 0; i < kTile / kWarps; ++i) {
      const int64_t at = p.y0 - r + from + warp + kWarps * i;
      const int64_t m = at < a.H + r ? border_index(at, a.H, border) : -1;
      v[i] = make_float2(0, 0);
      const float* const row = image + m * a.W + x;
      if (m >= 0 && pair)
        v[i] = load2(row);
      else if (m >= 0)
        v[i] = make_float2(x < a.W ? row[0] : 0.0f, x + 1 < a.W ? row[1] : 0.0f);
    }
#pragma unroll
    for (int i = 0; i < kTile / kWarps; ++i)
      *reinterpret_cast<float2*>(ring + ((from + warp + kWarps * i) & (kRing - 1)) * kTile + 2 * lane) = v[i];
  };
  stage(0);
  for (int64_t t0 = 0; t0 < 2 * r + 1; t0 += kChunk64) {
    const int64_t left = 2 * r + 1 - t0;
    const int count = left < kChunk64 ? static_cast<int>(left) : kChunk64;
    stage(t0 + kTile);
    stage_taps(taps, half_taps, r, t0, count);
    __syncthreads();
    const int base = static_cast<int>(t0 & (kRing - 1)) + kOut * warp;
    float2 part[kOut] = {};
    column_taps(part, taps, count, [&](int j) { return ring + ((base + j) & (kRing - 1)) * kTile + 2 * lane; });
#pragma unroll
    for (int o = 0; o < kOut; ++o) acc[o].x += part[o].x, acc[o].y += part[o].y;
    FD_BARRIER(kRingBarrier);
  }
}

template <bool kSlope>
__global__ void __launch_bounds__(kThreads, 2) blur_columns(const Work a) {
  FD_SHARED(float4, ring4, kRing * kTile / 4);
  FD_SHARED(float4, taps4, kChunk64 / 4);
  FD_SHARED(double, sums, kWarps);
  float* const ring = reinterpret_cast<float*>(ring4);
  float* const taps = reinterpret_cast<float*>(taps4);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Edges edges(a.border, !kSlope && a.adjoint != 0);
  const int64_t total = a.B * a.C * blur_tiles(a.H, a.W), n = fold_entries(a.H, a.W);
  for (int64_t task = blockIdx.x; task < total; task += gridDim.x) {
    const Place p(task, a, kTile, kTile);
    const Axis axis = axis_of(a, p.b, false, a.H, a.border), ax = axis_of(a, p.b, true, a.W, a.border);
    if (a.several && (is_small(axis, ax) || is_sliding(a, axis, ax))) continue;
    const int64_t r = axis.reach;
    const float* const table = table_of(a, p.b, false);
    const float* const image = a.workspace + p.plane * a.H * a.W;
    float2 acc[kOut] = {};
    if constexpr (kSlope) {
      column_pass(acc, a, p, edges.border, image, r, table + n, ring, taps);
      column_pass(acc, a, p, edges.border, image + a.B * a.C * a.H * a.W, r, table, ring, taps);
    } else {
      column_pass(acc, a, p, edges.border, image, r, table, ring, taps);
      for (int side = 0; edges.replicate && side < 2; ++side) {
        const int64_t y = side == 0 ? 0 : a.H - 1, row = y - p.y0;
        if (row < 0 || row >= kTile) continue;
        // The edge gathers the tails: warps take every eighth, and one of them adds what they found.
        const int64_t most = r < a.H - 1 ? r : a.H - 1, x = p.x0 + 2 * lane;
        float2 s = make_float2(0, 0);
        for (int64_t i = warp; i <= most; i += kWarps) {
          const float* const v = image + (side == 0 ? i : a.H - 1 - i) * a.W + x;
          const float w = table[2 * n + i];
          if (x < a.W) s.x = fmaf(w, v[0], s.x);
          if (x + 1 < a.W) s.y = fmaf(w, v[1], s.y);
        }
        *reinterpret_cast<float2*>(ring + warp * kTile + 2 * lane) = s;
        __syncthreads();
        if (row / kOut == warp) {
          s = make_float2(0, 0);
          for (int w = 0; w < kWarps; ++w) {
            const float2 v = load2(ring + w * kTile + 2 * lane);
            s.x += v.x, s.y += v.y;
          }
#pragma unroll
          for (int o = 0; o < kOut; ++o)
            if (o == row % kOut) acc[o] = s;
        }
        __syncthreads();
      }
    }
    finish<kSlope>(a, p, edges, acc, sums);
    __syncthreads();
  }
}

template <bool kSlope>
void run(Work a, void* stream) {
  // The largest radius that a block may meet, as far as the host knows.
  const auto most = [&](double sigma, int64_t size, int64_t n) {
    if (a.sigma == nullptr) return make_axis(sigma, size, n, a.border).reach;
    return fold_reach(size > 0 ? size / 2 : kMaxSupport / 2, n, a.border);
  };
  const int64_t ry = most(a.sigma_y, a.size_y, a.H), rx = most(a.sigma_x, a.size_x, a.W);
  const bool large = ry > kMost || rx > kMost;
  a.several = large && a.sigma != nullptr;
  a.sliding = large && !kSlope && may_slide(a, a.H, a.W);
  if (!large || a.several) {
    const int64_t y = ry < kMost ? ry : kMost, x = rx < kMost ? rx : kMost;
    const size_t pitch = static_cast<size_t>(pitch_of(static_cast<int>(x))) + (kSlope ? kSlopePitch : 0);
    FD_LAUNCH(blur_tile<kSlope>, grid_for(tasks_of(a, kTile, kTile)), kThreads,
              (kTile + 2 * static_cast<size_t>(y)) * pitch * sizeof(float), stream, a);
  }
  if (!large) return;
  const int64_t samples = samples_of(a);
  FD_LAUNCH(blur_tables, grid_for((a.sliding ? 4 : 2) * samples), kThreads, 0, stream, a, samples);
  if (a.sliding) run_sliding(a, stream);
  if (a.sliding && !a.several) return;
  FD_LAUNCH(blur_rows<kSlope>, grid_for(tasks_of(a, kBandRows, kBandColumns)), kThreads, 0, stream, a);
  FD_LAUNCH(blur_columns<kSlope>, grid_for(tasks_of(a, kTile, kTile)), kThreads, 0, stream, a);
}

}  // namespace

void gaussian_blur(const GaussianBlur& a, int device, void* stream) {
  if (a.B * a.C * a.H * a.W == 0) return;
  const DeviceGuard guard(device);
  Work work;
  static_cast<GaussianBlur&>(work) = a;
  run<false>(work, stream);
}

void gaussian_blur_backward(const GaussianBlurBackward& a, int device, void* stream) {
  if (a.B * a.C * a.H * a.W == 0) return;
  const DeviceGuard guard(device);
  if (a.dx.data != nullptr) {
    GaussianBlur adjoint = a;
    adjoint.x = a.grad, adjoint.out = a.dx, adjoint.adjoint = 1;
    Work work;
    static_cast<GaussianBlur&>(work) = adjoint;
    run<false>(work, stream);
  }
  if (a.dsigma == nullptr) return;
  Work work;
  static_cast<GaussianBlurBackward&>(work) = a;
  run<true>(work, stream);
  sum_parts(a.partial, a.dsigma, a.B, a.C * blur_tiles(a.H, a.W), stream);
}

}  // namespace cuda
}  // namespace fastdiff
