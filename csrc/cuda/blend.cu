// Box masks and blending on CUDA: out = background; then, for every object in order, out = out (1 - m_k) + o_k m_k.
// Formulas: csrc/cpu/blend.cpp.
//
// Floor: background and masks read once, an object once where its mask is not 0, out written once. K = 8, one image
// [3, 1024, 1024] in float32, objects on the whole image: 126 MB, 29 us on an H200 (copy 4.3 TB/s); arithmetic is 4
// operations an element.
//
// Profiles. The mask of a box is an outer product. One block per box and axis makes the folded taps (gaussian.cuh),
// their suffix sums in float64, and from these the profile: three differences a pixel, for the box and its two mirror
// images, whatever sigma. Everything stays on the device: corners and sigma may be tensors of a captured graph.
//
// Blend. A block takes a tile of one plane: 32 lanes of 16 bytes across, eight warps of four rows (two of a 16-bit
// type) down. The background is asked for first; the profiles of the boxes that touch the tile go to shared memory,
// sixteen boxes at a time; then objects two by two, so that a thread has 128 bytes in flight (64 KB an SM at two
// blocks of 256 threads; 26 KB would cover the latency). Lanes where a box's profile is 0 do not read its object. Masks
// [K, H, W] are read beside the objects; neighbouring blocks take the same tile of all planes, so that a mask comes
// from memory once. Predicted: profiles 4 us (a launch and one chain of three barriers), blend 85 % of copy speed: 38
// us, 76 % in all for one image, 85 % for batches of four and more.
//
// Backward. With S_k = product over j > k of (1 - m_j), which no plane changes, the gradient that reaches object k is
// g S_k, and one sweep forward serves all: do_k = g S_k m_k, dm_k += g S_k (o_k - out_{k-1}), out_k as before. No
// intermediate result is kept. A thread owns two pixels and eight objects at a time, dm in registers, and walks the
// planes in order, so that dm is summed without atomics and written once; where no mask is learned, planes are tasks of
// their own. More than eight objects: out_{k-1} is computed again for every eight. Gradients to corners do not exist
// (they are cut to pixels); that to sigma goes through dm and box_mask_backward: one double per 32 rows, then in order.
//
// Performance: not measured.
#include "gaussian.cuh"

namespace fastdiff {
namespace cuda {
namespace {

// ---------------------------------------------------------------------------------------------------------- profiles

struct ProfileWork : Boxes {
  int64_t K, H, W;
  bool slope;       // also the derivatives by sigma
  float* profiles;  // [K, H + W], with slopes [K, 2 (H + W)]
  int64_t* ranges;  // [K, 4] or null: first row and the one behind the last where the profile is not 0; columns
};

// Sum of the taps from `low` to `high`, from suffix sums T of the taps k >= 0 of radius r.
FD_D double between(const double* T, int64_t r, int64_t low, int64_t high) {
  const auto from = [&](int64_t k) { return k > r ? 0.0 : T[k]; };
  low = low > -r ? low : -r, high = high < r ? high : r;
  if (low > high) return 0;
  if (low >= 0) return from(low) - from(high + 1);
  if (high <= 0) return from(-high) - from(1 - low);
  return (from(0) - from(1 - low)) + (from(1) - from(high + 1));
}

// Profile at i of an axis of n: taps at positions i - r .. i + r whose mirrored index lies in [first, end).
FD_D double profile_at(const double* T, int64_t r, int64_t n, int64_t first, int64_t end, int64_t i) {
  if (first >= end) return 0;
  double s = between(T, r, first - i, end - 1 - i);
  const int64_t left = first > 1 ? first : 1, right = end - 1 < n - 2 ? end - 1 : n - 2;  // edges have no mirror image
  if (left < end) s += between(T, r, 1 - end - i, -left - i);
  if (first <= right) s += between(T, r, 2 * n - 2 - right - i, 2 * n - 2 - first - i);
  return s;
}

__global__ void __launch_bounds__(kThreads, 2) box_profiles(const ProfileWork a) {
  FD_SHARED(double, totals, kThreads);
  FD_SHARED(int64_t, found, 2 * kWarps);
  const int64_t entries = fold_entries(a.H, a.W);
  for (int64_t task = blockIdx.x; task < 2 * a.K; task += gridDim.x) {
    const int64_t k = task / 2;
    const bool along_x = task % 2 != 0;
    const int64_t n = along_x ? a.W : a.H;
    const Axis axis = axis_of(a, k, along_x, n, kReflect);
    double* const e = a.sums + (4 * k + (along_x ? 2 : 0)) * entries;
    double* const q = e + entries;
    const int64_t count = axis.reach + 1;
    fold(axis, kReflect, e, q, threadIdx.x, kThreads);
    __syncthreads();
    double sum = 0, spread = 0;
    for (int64_t j = threadIdx.x; j < count; j += kThreads) {
      sum += j == 0 ? e[j] : 2 * e[j];
      spread += j == 0 ? q[j] : 2 * q[j];
    }
    sum = block_sum_double<kThreads>(sum, totals), spread = block_sum_double<kThreads>(spread, totals);
    for (int64_t j = threadIdx.x; j < count; j += kThreads) {
      const double w = e[j];
      e[j] = tap(w, sum);
      q[j] = tap_slope(axis, w, q[j], sum, spread);
    }
    __syncthreads();
    suffix_sums<kThreads>(e, count, totals);
    if (a.slope) suffix_sums<kThreads>(q, count, totals);

    const double* const box = a.boxes + 4 * k;
    const double low = box[along_x ? 0 : 1], high = box[along_x ? 2 : 3];
    const auto cut = [n](double v) {
      v *= static_cast<double>(n);
      return v > 0 ? v < static_cast<double>(n) ? static_cast<int64_t>(v) : n : 0;
    };
    const int64_t first = cut(low), end = cut(high) - (FD_MUTATED(kBoxEnd) && along_x ? 1 : 0);
    const double none = axis.bad || low != low || high != high ? static_cast<double>(bits_float(0x7fc00000u)) : 0.0;
    float* const out = a.profiles + k * (a.slope ? 2 : 1) * (a.H + a.W) + (along_x ? a.H : 0);
    int64_t least = n, most = 0;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      const double s = profile_at(e, axis.reach, n, first, end, i);
      const float p = static_cast<float>(none + (s < 0 ? 0.0 : s));  // differences of sums may fall below by a rounding
      out[i] = p;
      if (p != 0) least = i < least ? i : least, most = i + 1;
      if (a.slope) out[a.H + a.W + i] = static_cast<float>(none + profile_at(q, axis.reach, n, first, end, i));
    }
    if (a.ranges != nullptr) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
        const int64_t l = __shfl_xor_sync(kFullWarp, least, offset), m = __shfl_xor_sync(kFullWarp, most, offset);
        least = l < least ? l : least, most = m > most ? m : most;
      }
      if (threadIdx.x % 32 == 0) found[2 * (threadIdx.x / 32)] = least, found[2 * (threadIdx.x / 32) + 1] = most;
      __syncthreads();
      if (threadIdx.x == 0) {
        for (int w = 1; w < kWarps; ++w) {
          least = found[2 * w] < least ? found[2 * w] : least;
          most = found[2 * w + 1] > most ? found[2 * w + 1] : most;
        }
        a.ranges[4 * k + (along_x ? 2 : 0)] = least, a.ranges[4 * k + (along_x ? 3 : 1)] = most;
      }
    }
    __syncthreads();
  }
}

void make_profiles(const Boxes& boxes, int64_t K, int64_t H, int64_t W, bool slope, float* profiles, int64_t* ranges,
                   void* stream) {
  ProfileWork work;
  static_cast<Boxes&>(work) = boxes;
  work.K = K, work.H = H, work.W = W, work.slope = slope, work.profiles = profiles, work.ranges = ranges;
  FD_LAUNCH(box_profiles, grid_for(2 * K), kThreads, 0, stream, work);
}

// ------------------------------------------------------------------------------------------------------------- tiles

// A block's tile: 32 lanes of kVec pixels, kDown warps of kRows rows. Tasks of the same tile are neighbours.
template <int kVec, int kRows, int kDown = kWarps>
struct Tile {
  int64_t plane, y, x;  // of the thread: its first row, its first column
  int64_t y0, x0;
  FD_D Tile(int64_t task, int64_t planes, int64_t W) {
    const int64_t across = (W + 32 * kVec - 1) / (32 * kVec);
    int64_t tile;
    split(task, planes, &tile, &plane);
    split(tile, across, &y0, &x0);
    y0 *= kDown * kRows, x0 *= 32 * kVec;
    y = y0 + threadIdx.x / 32 * kRows, x = x0 + threadIdx.x % 32 * kVec;
  }
};
int64_t tiles(int64_t H, int64_t W, int64_t vec, int64_t rows) {  // rows: of a tile
  return ((H + rows - 1) / rows) * ((W + 32 * vec - 1) / (32 * vec));
}

// A row of an operand whose last stride is sd, from element `offset`.
FD_D Row row_at(const Strided& t, int64_t offset, int64_t sd) {
  return {static_cast<char*>(t.data) + offset * dtype_size(t.dtype), sd, t.dtype};
}

// Whether rows along the last of `axes` axes can be read `vec` elements at a time, W of them.
bool vectorizes(const Strided& t, int axes, int64_t W, int vec) {
  if (t.data == nullptr || vec == 1) return true;
  const int64_t size = dtype_size(t.dtype), bytes = vec * size < 16 ? vec * size : 16;
  bool fits = W % vec == 0 && t.s[axes - 1] == 1 && reinterpret_cast<uintptr_t>(t.data) % bytes == 0;
  for (int i = 0; i + 1 < axes; ++i) fits = fits && t.s[i] * size % bytes == 0;
  return fits;
}

// --------------------------------------------------------------------------------------------------------- box masks

template <int kVec>
__global__ void __launch_bounds__(kThreads) outer_products(const BoxMask a) {
  constexpr int kRows = 4;
  const int64_t total = a.K * ((a.H + kWarps * kRows - 1) / (kWarps * kRows)) * ((a.W + 32 * kVec - 1) / (32 * kVec));
  for (int64_t task = blockIdx.x; task < total; task += gridDim.x) {
    const Tile<kVec, kRows> t(task, a.K, a.W);
    if (t.x >= a.W) continue;
    const float* const p = a.profiles + t.plane * (a.H + a.W);
    float columns[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) columns[i] = p[a.H + t.x + i];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (t.y + r >= a.H) break;
      float v[kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) v[i] = p[t.y + r] * columns[i];
      write(row_at(a.out, (t.plane * a.H + t.y + r) * a.W, 1), t.x, v);
    }
  }
}

__global__ void __launch_bounds__(kThreads) mask_slopes(const BoxMaskBackward a) {
  FD_SHARED(double, sums, kWarps);
  const int64_t chunks = mask_chunks(a.H), stride = a.H + a.W;
  for (int64_t task = blockIdx.x; task < a.K * chunks; task += gridDim.x) {
    int64_t k, chunk;
    split(task, chunks, &k, &chunk);
    const float *rows = a.profiles + 2 * k * stride, *columns = rows + a.H;
    const float *row_slopes = rows + stride, *column_slopes = row_slopes + a.H;
    double total = 0;
    for (int r = threadIdx.x / 32; r < kMaskRows; r += kWarps) {
      const int64_t y = chunk * kMaskRows + r;
      if (y >= a.H) break;
      const Row g = row_at(a.grad, k * a.grad.s[0] + y * a.grad.s[1], a.grad.s[2]);
      float plain = 0, slope = 0;
#pragma unroll 4
      for (int64_t x = threadIdx.x % 32; x < a.W; x += 32) {
        float v[1];
        read<1, true>(g, x, v);
        plain = fmaf(v[0], columns[x], plain), slope = fmaf(v[0], column_slopes[x], slope);
      }
      total += static_cast<double>(plain) * static_cast<double>(row_slopes[y]) +
               static_cast<double>(slope) * static_cast<double>(rows[y]);
    }
    total = block_sum_double<kThreads>(total, sums);
    if (threadIdx.x == 0) a.partial[task] = total;
  }
}

// ------------------------------------------------------------------------------------------------------------- blend

constexpr int kGroup = 16;  // boxes whose profiles are in shared memory together

FD_D int lowest_bit(unsigned m) {
#ifdef __CUDA_ARCH__
  return __ffs(static_cast<int>(m)) - 1;
#else
  return __builtin_ctz(m);
#endif
}

template <int kVec>
constexpr int kBlendRows = kVec == 8 ? 2 : 4;

// v = v (1 - w) + o w; where a box's mask is 0, its object has no say.
template <int kVec, bool kBoxed>
FD_D void blend_in(float (&v)[kVec], const float (&o)[kVec], const float (&w)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) v[i] = fmaf(kBoxed && w[i] == 0 ? 0.0f : o[i], w[i], v[i] * (1.0f - w[i]));
}

template <int kVec, bool kBoxed>
__global__ void __launch_bounds__(kThreads, 2) blend_tiles(const GaussianBlend a) {
  constexpr int kRows = kBlendRows<kVec>, kHigh = kWarps * kRows, kWide = 32 * kVec, kProfile = kHigh + kWide;
  FD_SHARED(float4, staged4, (kBoxed ? kGroup * kProfile : 4) / 4);
  float* const staged = reinterpret_cast<float*>(staged4);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t planes = a.B * a.C;
  const int64_t total = planes * ((a.H + kHigh - 1) / kHigh) * ((a.W + kWide - 1) / kWide);
  for (int64_t task = blockIdx.x; task < total; task += gridDim.x) {
    const Tile<kVec, kRows> t(task, planes, a.W);
    int64_t b, c;
    split(t.plane, a.C, &b, &c);
    const Strided &from = a.background, &o = a.objects;
    const bool inside = t.x < a.W;
    float v[kRows][kVec];
    {
      Raw<kVec> raw[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (inside && t.y + r < a.H)
          raw[r] =
              load<kVec, false>(row_at(from, b * from.s[0] + c * from.s[1] + (t.y + r) * from.s[2], from.s[3]), t.x);
        else
          raw[r] = {};
#pragma unroll
      for (int r = 0; r < kRows; ++r) widen(raw[r], from.dtype, v[r]);
    }
    const int64_t object = b * o.s[1] + c * o.s[2] + t.y * o.s[3];
    if constexpr (kBoxed) {
      for (int64_t k0 = 0; k0 < a.K; k0 += kGroup) {
        // Boxes of the group that touch the tile.
        bool touches = false;
        if (lane < kGroup && k0 + lane < a.K) {
          const int64_t* const range = a.ranges + 4 * (k0 + lane);
          touches = range[0] < t.y0 + kHigh && range[1] - (FD_MUTATED(kSkippedBox) ? 1 : 0) > t.y0 &&
                    range[2] < t.x0 + kWide && range[3] > t.x0;
        }
        unsigned mask = __ballot_sync(kFullWarp, touches);
        if (mask == 0) continue;  // the same for every warp
#pragma unroll 4
        for (int i = threadIdx.x; i < kGroup * kProfile; i += kThreads) {
          const int g = i / kProfile, j = i % kProfile;
          if ((mask >> g & 1) == 0) continue;
          const float* const p = a.profiles + (k0 + g) * (a.H + a.W);
          const int64_t y = t.y0 + j, x = t.x0 + j - kHigh;
          staged[i] = j < kHigh ? (y < a.H ? p[y] : 0.0f) : x < a.W ? p[a.H + x] : 0.0f;
        }
        FD_BARRIER(kProfileBarrier);
        while (mask != 0) {
          int g[2];
          g[0] = lowest_bit(mask), mask &= mask - 1;
          g[1] = mask != 0 ? lowest_bit(mask) : -1, mask &= mask - 1;
          Raw<kVec> raw[2][kRows];
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            bool wanted = inside && g[s] >= 0;
            const float* const p = staged + (wanted ? g[s] : 0) * kProfile;
            if (wanted) {
              bool any = false;
#pragma unroll
              for (int i = 0; i < kVec; ++i) any = any || p[kHigh + lane * kVec + i] != 0;
              wanted = any;
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              if (wanted && t.y + r < a.H && p[warp * kRows + r] != 0)
                raw[s][r] = load<kVec, true>(row_at(o, (k0 + g[s]) * o.s[0] + object + r * o.s[3], o.s[4]), t.x);
              else
                raw[s][r] = {};
            }
          }
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            if (g[s] < 0) break;
            const float* const p = staged + g[s] * kProfile;
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              const float height = p[warp * kRows + r];
              float x[kVec], w[kVec];
              widen(raw[s][r], o.dtype, x);
#pragma unroll
              for (int i = 0; i < kVec; ++i) w[i] = p[kHigh + lane * kVec + i] * height;
              blend_in<kVec, true>(v[r], x, w);
            }
          }
        }
        __syncthreads();  // the next group's, or tile's, profiles go to the same place
      }
    } else {
      const Strided& m = a.masks;
#pragma unroll 2
      for (int64_t k = 0; k < a.K; ++k) {
        Raw<kVec> raw[kRows], mask[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (inside && t.y + r < a.H) {
            raw[r] = load<kVec, true>(row_at(o, k * o.s[0] + object + r * o.s[3], o.s[4]), t.x);
            mask[r] = load<kVec, true>(row_at(m, k * m.s[0] + (t.y + r) * m.s[1], m.s[2]), t.x);
          } else {
            raw[r] = {}, mask[r] = {};
          }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float x[kVec], w[kVec];
          widen(raw[r], o.dtype, x), widen(mask[r], m.dtype, w);
          blend_in<kVec, false>(v[r], x, w);
        }
      }
    }
    const Strided& out = a.out;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (inside && t.y + r < a.H)
        write(row_at(out, b * out.s[0] + c * out.s[1] + (t.y + r) * out.s[2], out.s[3]), t.x, v[r]);
  }
}

// ---------------------------------------------------------------------------------------------------------- backward

constexpr int kBack = 8;       // objects of a sweep
constexpr int kBackWarps = 4;  // small blocks: a thread needs some 140 registers

struct BackWork : GaussianBlendBackward {
  int64_t planes;  // per task: all where dmasks are wanted, else one
};

template <int kVec, bool kBoxed>
struct Masks {
  const GaussianBlend& a;
  int64_t y, x;
  FD_D void operator()(int64_t k, float (&w)[kVec]) const {
    if constexpr (kBoxed) {
      const float* const p = a.profiles + k * (a.H + a.W);
      const float height = p[y];
#pragma unroll
      for (int i = 0; i < kVec; ++i) w[i] = p[a.H + x + i] * height;
    } else {
      read<kVec, true>(row_at(a.masks, k * a.masks.s[0] + y * a.masks.s[1], a.masks.s[2]), x, w);
    }
  }
};

template <int kVec, bool kBoxed>
__global__ void __launch_bounds__(32 * kBackWarps, 3) blend_backward(const BackWork a) {
  const int64_t all = a.B * a.C, tasks_of_tile = all / a.planes;
  const int64_t total = tasks_of_tile * ((a.H + kBackWarps - 1) / kBackWarps) * ((a.W + 32 * kVec - 1) / (32 * kVec));
  const Strided &from = a.background, &o = a.objects, &grad = a.grad;
  for (int64_t task = blockIdx.x; task < total; task += gridDim.x) {
    const Tile<kVec, 1, kBackWarps> t(task, tasks_of_tile, a.W);
    if (t.x >= a.W || t.y >= a.H) continue;
    const Masks<kVec, kBoxed> mask{a, t.y, t.x};
    for (int64_t k0 = 0; k0 == 0 || k0 < a.K; k0 += kBack) {
      float later[kVec];  // product of 1 - m over the objects after this sweep's
#pragma unroll
      for (int i = 0; i < kVec; ++i) later[i] = 1;
      for (int64_t k = a.K - 1; k >= k0 + kBack; --k) {
        float w[kVec];
        mask(k, w);
#pragma unroll
        for (int i = 0; i < kVec; ++i) later[i] *= 1.0f - w[i];
      }
      float m[kBack][kVec], S[kBack][kVec], dm[kBack][kVec] = {};
#pragma unroll
      for (int g = kBack - 1; g >= 0; --g) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) m[g][i] = 0;
        if (k0 + g < a.K) mask(k0 + g, m[g]);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          S[g][i] = FD_MUTATED(kLaterMasks) ? 1.0f : later[i];
          later[i] *= 1.0f - m[g][i];
        }
      }
      for (int64_t plane = t.plane * a.planes; plane < (t.plane + 1) * a.planes; ++plane) {
        int64_t b, c;
        split(plane, a.C, &b, &c);
        const int64_t object = b * o.s[1] + c * o.s[2] + t.y * o.s[3];
        Raw<kVec> raw[kBack], background = {};
        const Raw<kVec> raw_g =
            load<kVec, true>(row_at(grad, b * grad.s[0] + c * grad.s[1] + t.y * grad.s[2], grad.s[3]), t.x);
        if (a.dmasks != nullptr) {
          background = load<kVec, true>(row_at(from, b * from.s[0] + c * from.s[1] + t.y * from.s[2], from.s[3]), t.x);
#pragma unroll
          for (int g = 0; g < kBack; ++g) {
            bool any = !kBoxed;
#pragma unroll
            for (int i = 0; i < kVec; ++i) any = any || m[g][i] != 0;
            if (k0 + g < a.K && any)
              raw[g] = load<kVec, true>(row_at(o, (k0 + g) * o.s[0] + object, o.s[4]), t.x);
            else
              raw[g] = {};
          }
        }
        float g[kVec], v[kVec];
        widen(raw_g, grad.dtype, g);
        if (a.dmasks != nullptr) {
          widen(background, from.dtype, v);
          for (int64_t k = 0; k < k0; ++k) {
            float w[kVec], x[kVec];
            mask(k, w);
            read<kVec, true>(row_at(o, k * o.s[0] + object, o.s[4]), t.x, x);
            blend_in<kVec, kBoxed>(v, x, w);
          }
#pragma unroll
          for (int j = 0; j < kBack; ++j) {
            float x[kVec];
            widen(raw[j], o.dtype, x);
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
              const float difference = kBoxed && m[j][i] == 0 ? 0.0f : x[i] - v[i];
              if (k0 + j < a.K) dm[j][i] = fmaf(g[i] * S[j][i], difference, dm[j][i]);
            }
            if (k0 + j < a.K) blend_in<kVec, kBoxed>(v, x, m[j]);
          }
        }
        const int64_t pixel = (plane * a.H + t.y) * a.W;
        if (a.dobjects.data != nullptr) {
#pragma unroll
          for (int j = 0; j < kBack; ++j) {
            if (k0 + j >= a.K) continue;
            float x[kVec];
#pragma unroll
            for (int i = 0; i < kVec; ++i) x[i] = g[i] * S[j][i] * m[j][i];
            write(row_at(a.dobjects, (k0 + j) * all * a.H * a.W + pixel, 1), t.x, x);
          }
        }
        if (a.dbackground.data != nullptr && k0 == 0) {
          float x[kVec];
#pragma unroll
          for (int i = 0; i < kVec; ++i) x[i] = g[i] * later[i];
          write(row_at(a.dbackground, pixel, 1), t.x, x);
        }
      }
      if (a.dmasks != nullptr) {
#pragma unroll
        for (int j = 0; j < kBack; ++j)
          if (k0 + j < a.K) write(row_of(a.dmasks, kF32, ((k0 + j) * a.H + t.y) * a.W), t.x, dm[j]);
      }
    }
  }
}

template <int kVec>
void launch_blend(const GaussianBlend& a, bool boxed, void* stream) {
  const unsigned int grid = grid_for(a.B * a.C * tiles(a.H, a.W, kVec, kWarps * kBlendRows<kVec>));
  if (boxed)
    FD_LAUNCH((blend_tiles<kVec, true>), grid, kThreads, 0, stream, a);
  else
    FD_LAUNCH((blend_tiles<kVec, false>), grid, kThreads, 0, stream, a);
}

template <int kVec>
void launch_backward(const BackWork& a, bool boxed, void* stream) {
  const unsigned int grid = grid_for(a.B * a.C / a.planes * tiles(a.H, a.W, kVec, kBackWarps));
  if (boxed)
    FD_LAUNCH((blend_backward<kVec, true>), grid, 32 * kBackWarps, 0, stream, a);
  else
    FD_LAUNCH((blend_backward<kVec, false>), grid, 32 * kBackWarps, 0, stream, a);
}

}  // namespace

void box_mask(const BoxMask& a, int device, void* stream) {
  if (a.K * a.H * a.W == 0) return;
  const DeviceGuard guard(device);
  make_profiles(a, a.K, a.H, a.W, false, a.profiles, nullptr, stream);
  const int vec = a.out.dtype == kF32 ? 4 : 8;
  const auto grid = [&](int v) { return grid_for(a.K * tiles(a.H, a.W, v, 4 * kWarps)); };
  if (a.W % vec != 0 || reinterpret_cast<uintptr_t>(a.out.data) % 16 != 0)
    FD_LAUNCH(outer_products<1>, grid(1), kThreads, 0, stream, a);
  else if (vec == 4)
    FD_LAUNCH(outer_products<4>, grid(4), kThreads, 0, stream, a);
  else
    FD_LAUNCH(outer_products<8>, grid(8), kThreads, 0, stream, a);
}

void box_mask_backward(const BoxMaskBackward& a, int device, void* stream) {
  if (a.K * a.H * a.W == 0) return;
  const DeviceGuard guard(device);
  make_profiles(a, a.K, a.H, a.W, true, a.profiles, nullptr, stream);
  FD_LAUNCH(mask_slopes, grid_for(a.K * mask_chunks(a.H)), kThreads, 0, stream, a);
  sum_parts(a.partial, a.dsigma, a.K, mask_chunks(a.H), stream);
}

void gaussian_blend(const GaussianBlend& a, int device, void* stream) {
  if (a.B * a.C * a.H * a.W == 0) return;
  const DeviceGuard guard(device);
  const bool boxed = a.boxes != nullptr || a.K == 0;
  if (a.boxes != nullptr && a.K > 0) make_profiles(a, a.K, a.H, a.W, false, a.profiles, a.ranges, stream);
  // Any float32 among them: 16 bytes are four of its elements.
  const bool wide = a.background.dtype == kF32 || a.objects.dtype == kF32 || !boxed;
  int vec = wide ? 4 : 8;
  if (!vectorizes(a.background, 4, a.W, vec) || !vectorizes(a.out, 4, a.W, vec) || !vectorizes(a.masks, 3, a.W, vec) ||
      (a.K > 0 && !vectorizes(a.objects, 5, a.W, vec)))
    vec = 1;
  if (vec == 8)
    launch_blend<8>(a, boxed, stream);
  else if (vec == 4)
    launch_blend<4>(a, boxed, stream);
  else
    launch_blend<1>(a, boxed, stream);
}

void gaussian_blend_backward(const GaussianBlendBackward& a, int device, void* stream) {
  if (a.B * a.C * a.H * a.W == 0) return;
  const DeviceGuard guard(device);
  const bool boxed = a.boxes != nullptr || a.K == 0;
  if (a.boxes != nullptr && a.K > 0) make_profiles(a, a.K, a.H, a.W, false, a.profiles, nullptr, stream);
  BackWork work;
  static_cast<GaussianBlendBackward&>(work) = a;
  work.planes = a.dmasks != nullptr ? a.B * a.C : 1;
  Strided dmasks;
  dmasks.data = a.dmasks, dmasks.s[0] = a.H * a.W, dmasks.s[1] = a.W, dmasks.s[2] = 1;
  const bool learned = a.dmasks != nullptr && a.K > 0;
  const bool pairs = vectorizes(a.grad, 4, a.W, 2) && vectorizes(a.masks, 3, a.W, 2) && vectorizes(dmasks, 3, a.W, 2) &&
                     vectorizes(a.dbackground, 4, a.W, 2) && (a.K == 0 || vectorizes(a.dobjects, 5, a.W, 2)) &&
                     (!learned || (vectorizes(a.background, 4, a.W, 2) && vectorizes(a.objects, 5, a.W, 2)));
  if (pairs)
    launch_backward<2>(work, boxed, stream);
  else
    launch_backward<1>(work, boxed, stream);
}

}  // namespace cuda
}  // namespace fastdiff
