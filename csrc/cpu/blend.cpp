// Box masks and blending: out = background; then, for every object in order, out = out (1 - m_k) + o_k m_k.
//
// A blurred axis-aligned box is the outer product of two profiles. A profile is the box's indicator convolved with the
// taps under the reflect border, i.e. differences of partial sums of the taps at the ends of the box and of its mirror
// images: O(H + W) for a box, and no mask is stored.
//
// Floor: background and masks read once, objects once where their mask is not 0, out written once. A row is blended at
// a time. Through masks, up to four objects per sweep, the accumulator in registers. Through boxes, object by object,
// the row in L1, each object only on the rows and columns where its profiles are not 0; elsewhere it is not read at
// all. Arithmetic is in whole vectors, the last one filled up, so that every element sees the same instructions.
// Measured on AVX-512, one thread, K = 4 boxes, (2, 4, 128, 128): 98 us with parts of vectors at the ends of every box,
// 61 in whole vectors, 36 by strips of rows instead of row by row.
//
// Backward: pixels in blocks of a row. The intermediate results out_0 .. out_{K-1} of a block are computed again and
// stay in L1; then, from the last object to the first, do_k = g m_k, dm_k += g (o_k - out_{k-1}), g = g (1 - m_k).
// A block adds dm over batch and channels in order and writes it once.
#include "gaussian_rows.h"

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_ISA {
namespace {

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// [first, end) of int(from n) : int(to n), cut to the image.
inline void bounds(double from, double to, int64_t n, int64_t* first, int64_t* end) {
  const auto cut = [n](double v) {
    v *= static_cast<double>(n);
    return v > 0 ? v < static_cast<double>(n) ? static_cast<int64_t>(v) : n : 0;
  };
  *first = cut(from), *end = cut(to);
}

// out[i] = sum of the taps at positions v = i - r .. i + r whose mirrored index lies in [first, end). P: partial sums.
inline void profile(float* out, int64_t n, int64_t first, int64_t end, int64_t r, const double* P) {
  const double none = 0 * P[2 * r + 1];  // NaN where the taps are
  const int64_t period = 2 * n - 2;
  const auto part = [&](int64_t low, int64_t high, int64_t i) {  // taps at [low, high]
    const int64_t a = low > i - r ? low : i - r, b = high < i + r ? high : i + r;
    return a <= b ? P[b - (i - r) + 1] - P[a - (i - r)] : 0.0;
  };
  for (int64_t i = 0; i < n; ++i) {
    double s = none;
    if (first >= end) {
      // empty
    } else if (i - r >= 0 && i + r < n) {
      s += part(first, end - 1, i);
    } else if (n == 1) {
      s += P[2 * r + 1];
    } else {
      for (int64_t q = floor_div(i - r, period) - 1; q <= floor_div(i + r, period) + 1; ++q) {
        s += part(first + q * period, end - 1 + q * period, i);
        // Sample j of 1 .. n - 2 also stands at -j.
        const int64_t low = first > 1 ? first : 1, high = end - 1 < n - 2 ? end - 1 : n - 2;
        if (low <= high) s += part(-high + q * period, -low + q * period, i);
      }
    }
    out[i] = static_cast<float>(s);
  }
}

// Profiles of box k: rows [H], columns [W]; of the taps, or (slope) of their derivatives.
inline void profiles_of(const Boxes& a, int64_t k, int64_t H, int64_t W, bool slope, float* rows, float* columns) {
  const int64_t r = a.radius[k * a.radius_stride];
  const double* P = a.prefix + k * a.prefix_stride + (slope ? 2 * r + 2 : 0);
  const double* box = a.boxes + 4 * k;
  int64_t first, end, x_first, x_end;
  bounds(box[1], box[3], H, &first, &end);
  bounds(box[0], box[2], W, &x_first, &x_end);
  profile(rows, H, first, end, r, P);
  profile(columns, W, x_first, x_end, r, P);
}

// The first n < kWidth elements, zeros behind them.
#if defined(__AVX512F__)
inline __mmask16 lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline vf load_part(const float* p, int64_t n) { return (vf)_mm512_maskz_loadu_ps(lanes(n), p); }
inline void store_part(float* p, vf v, int64_t n) { _mm512_mask_storeu_ps(p, lanes(n), (__m512)v); }
#else
inline vf load_part(const float* p, int64_t n) {
  vf v = vf{};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
inline void store_part(float* p, vf v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}
#endif

// step(x, get, put) over n columns in whole vectors, the last one filled up.
template <typename Step>
inline void each_vector(int64_t n, const Step& step) {
  int64_t x = 0;
  for (; x + kWidth <= n; x += kWidth)
    step(x, [](const float* p) { return load(p); }, [](float* p, vf v) { store(p, v); });
  if (x < n)
    step(x, [&](const float* p) { return load_part(p, n - x); }, [&](float* p, vf v) { store_part(p, v, n - x); });
}

// G objects onto base, through G rows of masks.
template <int G>
inline void blend_masks(const float* base, const float* const* objects, const float* const* m, float* out, int64_t n) {
  each_vector(n, [&](int64_t x, auto get, auto put) {
    vf v = get(base + x);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const vf w = get(m[g] + x);
      v = madd(get(objects[g] + x), w, v * (splat(1.0f) - w));
    }
    put(out + x, v);
  });
}

// One object onto out through a box: height times its column profile. Where the product is 0 the object has no say,
// be it NaN or infinite there.
inline void blend_box(float* out, const float* object, const float* columns, float height, int64_t n) {
  const vf h = splat(height);
  each_vector(n, [&](int64_t x, auto get, auto put) {
    const vf w = get(columns + x) * h, v = get(out + x);
    const vf o = w == vf{} ? vf{} : get(object + x);
    put(out + x, madd(o, w, v * (splat(1.0f) - w)));
  });
}

constexpr int kGroup = 4;        // masked objects per sweep
constexpr int64_t kSpan = 1024;  // columns per sweep: the accumulator and four staged objects and masks are 36 KB

// The values [n] of an operand from element `offset` as floats: in place, or widened into scratch.
inline const float* values(const Strided& t, int64_t offset, int64_t step, int64_t n, float* scratch) {
  const char* p = element(t.data, t.dtype, offset);
  if (t.dtype == kF32 && (step == 1 || n == 1)) return reinterpret_cast<const float*>(p);
  widen(scratch, p, t.dtype, n, step);
  return scratch;
}

// The columns on which a profile is not 0.
struct Range {
  int64_t first, end;
};
inline Range support_of(const float* columns, int64_t n) {
  Range r{0, n};
  while (r.first < n && columns[r.first] == 0) ++r.first;
  while (r.end > r.first && columns[r.end - 1] == 0) --r.end;
  return r;
}

// Columns x0 .. x0 + n of row (b, c, y), through boxes: an object is read on the rows and columns of its mask alone.
inline void blend_boxes_span(const GaussianBlend& a, const Range* ranges, int64_t b, int64_t c, int64_t y, int64_t x0,
                             int64_t n) {
  alignas(64) float staged[kSpan], result[kSpan];
  const Strided &from = a.background, &o = a.objects;
  const bool in_place = a.out.dtype == kF32 && (a.out.s[3] == 1 || n == 1);
  char* to = element(a.out.data, a.out.dtype, b * a.out.s[0] + c * a.out.s[1] + y * a.out.s[2] + x0 * a.out.s[3]);
  float* out = in_place ? reinterpret_cast<float*>(to) : result;
  const char* base = element(from.data, from.dtype, b * from.s[0] + c * from.s[1] + y * from.s[2] + x0 * from.s[3]);
  if (reinterpret_cast<const char*>(out) != base) widen(out, base, from.dtype, n, from.s[3]);
  for (int64_t k = 0; k < a.K; ++k) {
    const float* p = a.profiles + k * (a.H + a.W);
    const Range columns = ranges[2 * k + 1];
    if (p[y] == 0 || columns.first >= x0 + n || columns.end <= x0) continue;
    // Whole vectors, where the row has them: a part of one costs as much as two.
    const int64_t skipped = columns.first > x0 ? (columns.first - x0) / kWidth * kWidth : 0;
    const int64_t first = x0 + skipped, reach = (columns.end - x0 + kWidth - 1) / kWidth * kWidth;
    const int64_t end = x0 + least(reach, n);
    const int64_t offset = k * o.s[0] + b * o.s[1] + c * o.s[2] + y * o.s[3] + first * o.s[4];
    const float* object = values(o, offset, o.s[4], end - first, staged);
    blend_box(out + (first - x0), object, p + a.H + first, p[y], end - first);
  }
  if (!in_place) narrow(to, out, a.out.dtype, n, a.out.s[3]);
}

// The same for rows [y0, y1) of a plane where everything is float32 of unit stride: object by object over strips that
// stay in L1, which leaves a row nothing to do but its vectors.
inline void blend_boxes_strip(const GaussianBlend& a, const Range* ranges, int64_t b, int64_t c, int64_t y0,
                              int64_t y1) {
  const Strided &from = a.background, &o = a.objects, &to = a.out;
  const auto* base = static_cast<const float*>(from.data) + b * from.s[0] + c * from.s[1];
  auto* out = static_cast<float*>(to.data) + b * to.s[0] + c * to.s[1];
  const int64_t strip = a.W < 4096 ? 4096 / a.W : 1;
  for (int64_t top = y0; top < y1; top += strip) {
    const int64_t bottom = least(top + strip, y1);
    if (base == out && from.s[2] == to.s[2]) {
      // in place
    } else if (from.s[2] == a.W && to.s[2] == a.W) {
      memcpy(out + top * a.W, base + top * a.W, static_cast<size_t>((bottom - top) * a.W) * sizeof(float));
    } else {
      for (int64_t y = top; y < bottom; ++y)
        memcpy(out + y * to.s[2], base + y * from.s[2], static_cast<size_t>(a.W) * sizeof(float));
    }
    for (int64_t k = 0; k < a.K; ++k) {
      const Range rows = ranges[2 * k], columns = ranges[2 * k + 1];
      const float* p = a.profiles + k * (a.H + a.W);
      const int64_t first = columns.first / kWidth * kWidth;
      const int64_t end = least((columns.end + kWidth - 1) / kWidth * kWidth, a.W);
      const auto* object = static_cast<const float*>(o.data) + k * o.s[0] + b * o.s[1] + c * o.s[2] + first;
      for (int64_t y = rows.first > top ? rows.first : top; y < least(rows.end, bottom); ++y)
        if (first < end) blend_box(out + y * to.s[2] + first, object + y * o.s[3], p + a.H + first, p[y], end - first);
    }
  }
}

inline void blend_masks_span(const GaussianBlend& a, int64_t b, int64_t c, int64_t y, int64_t x0, int64_t n) {
  alignas(64) float staged[kGroup][kSpan], mask[kGroup][kSpan], result[kSpan];
  const auto offset = [&](const Strided& t, int axis) {
    return b * t.s[axis] + c * t.s[axis + 1] + y * t.s[axis + 2] + x0 * t.s[axis + 3];
  };
  const bool in_place = a.out.dtype == kF32 && (a.out.s[3] == 1 || n == 1);
  char* to = element(a.out.data, a.out.dtype, offset(a.out, 0));
  float* out = in_place ? reinterpret_cast<float*>(to) : result;
  const float* base = values(a.background, offset(a.background, 0), a.background.s[3], n, result);
  for (int64_t k0 = 0; k0 < a.K; k0 += kGroup) {
    const int64_t count = least(kGroup, a.K - k0);
    const float *objects[kGroup], *m[kGroup];
    for (int64_t g = 0; g < count; ++g) {
      const int64_t k = k0 + g;
      objects[g] = values(a.objects, k * a.objects.s[0] + offset(a.objects, 1), a.objects.s[4], n, staged[g]);
      const Strided& t = a.masks;
      m[g] = values(t, k * t.s[0] + y * t.s[1] + x0 * t.s[2], t.s[2], n, mask[g]);
    }
    if (count == 1)
      blend_masks<1>(base, objects, m, out, n);
    else if (count == 2)
      blend_masks<2>(base, objects, m, out, n);
    else if (count == 3)
      blend_masks<3>(base, objects, m, out, n);
    else
      blend_masks<4>(base, objects, m, out, n);
    base = out;
  }
  if (!in_place) narrow(to, out, a.out.dtype, n, a.out.s[3]);
}

// One block of pixels of row y through the backward pass; buffers [K, kBlendBlock] each, [kBlendBlock] for g, object.
inline void backward_block(const GaussianBlendBackward& a, int64_t y, int64_t x0, int64_t n, float* workspace) {
  const int64_t K = a.K, S = kBlendBlock, padded = (n + kWidth - 1) / kWidth * kWidth;
  float *before = workspace, *m = before + K * S, *dm = m + K * S, *g = dm + K * S, *object = g + S;
  for (int64_t i = 0; i < (3 * K + 2) * S; ++i) workspace[i] = 0;
  for (int64_t k = 0; k < K; ++k) {
    if (a.boxes != nullptr) {
      const float* p = a.profiles + k * (a.H + a.W);
      for (int64_t x = 0; x < n; ++x) m[k * S + x] = p[y] * p[a.H + x0 + x];
    } else {
      const Strided& t = a.masks;
      widen(m + k * S, element(t.data, t.dtype, k * t.s[0] + y * t.s[1] + x0 * t.s[2]), t.dtype, n, t.s[2]);
    }
  }
  for (int64_t b = 0; b < a.B; ++b)
    for (int64_t c = 0; c < a.C; ++c) {
      const auto offset = [&](const Strided& t, int axis) {
        return b * t.s[axis] + c * t.s[axis + 1] + y * t.s[axis + 2] + x0 * t.s[axis + 3];
      };
      const auto object_of = [&](int64_t k) {
        const Strided& t = a.objects;
        widen(object, element(t.data, t.dtype, k * t.s[0] + offset(t, 1)), t.dtype, n, t.s[4]);
      };
      if (a.dmasks != nullptr && K > 0) {
        const Strided& t = a.background;
        widen(before, element(t.data, t.dtype, offset(t, 0)), t.dtype, n, t.s[3]);
        for (int64_t k = 0; k + 1 < K; ++k) {
          object_of(k);
          for (int64_t x = 0; x < padded; x += kWidth) {
            const vf w = load(m + k * S + x), v = load(before + k * S + x);
            vf o = load(object + x);
            if (a.boxes != nullptr) o = w == vf{} ? vf{} : o;
            store(before + (k + 1) * S + x, madd(o, w, v * (splat(1.0f) - w)));
          }
        }
      }
      widen(g, element(a.grad.data, a.grad.dtype, offset(a.grad, 0)), a.grad.dtype, n, a.grad.s[3]);
      for (int64_t k = K - 1; k >= 0; --k) {
        if (a.dmasks != nullptr) {
          object_of(k);
          for (int64_t x = 0; x < padded; x += kWidth) {
            vf difference = load(object + x) - load(before + k * S + x);
            if (a.boxes != nullptr) difference = load(m + k * S + x) == vf{} ? vf{} : difference;  // as in blend_box
            store(dm + k * S + x, madd(load(g + x), difference, load(dm + k * S + x)));
          }
        }
        if (a.dobjects.data != nullptr) {
          for (int64_t x = 0; x < padded; x += kWidth) store(object + x, load(g + x) * load(m + k * S + x));
          const Strided& t = a.dobjects;
          narrow(element(t.data, t.dtype, k * t.s[0] + offset(t, 1)), object, t.dtype, n, 1);
          for (int64_t x = n; x < padded; ++x) object[x] = 0;
        }
        for (int64_t x = 0; x < padded; x += kWidth) store(g + x, load(g + x) * (splat(1.0f) - load(m + k * S + x)));
      }
      if (a.dbackground.data != nullptr)
        narrow(element(a.dbackground.data, a.dbackground.dtype, offset(a.dbackground, 0)), g, a.dbackground.dtype, n,
               1);
    }
  if (a.dmasks != nullptr)
    for (int64_t k = 0; k < K; ++k)
      memcpy(a.dmasks + (k * a.H + y) * a.W + x0, dm + k * S, static_cast<size_t>(n) * sizeof(float));
}

inline void all_profiles(const Boxes& a, int64_t K, int64_t H, int64_t W, float* profiles) {
  if (a.boxes == nullptr) return;
  for (int64_t k = 0; k < K; ++k) {
    float* p = profiles + k * (H + W);
    profiles_of(a, k, H, W, false, p, p + H);
  }
}

}  // namespace

void box_mask(const BoxMask& a) {
  all_profiles(a, a.K, a.H, a.W, a.profiles);
  parallel_ranges(a.K * a.H, a.K * a.H * a.W, [&](int64_t first, int64_t last) {
    alignas(64) float row[kSpan];
    for (int64_t i = first; i < last; ++i) {
      const float* p = a.profiles + i / a.H * (a.H + a.W);
      const float height = p[i % a.H];
      const float* columns = p + a.H;
      for (int64_t x0 = 0; x0 < a.W; x0 += kSpan) {
        const int64_t n = least(kSpan, a.W - x0);
        char* to = element(a.out.data, a.out.dtype, i * a.W + x0);
        float* out = a.out.dtype == kF32 ? reinterpret_cast<float*>(to) : row;
        for (int64_t x = 0; x < n; ++x) out[x] = height * columns[x0 + x];
        if (out == row) narrow(to, row, a.out.dtype, n, 1);
      }
    }
  });
}

void box_mask_backward(const BoxMaskBackward& a) {
  parallel_ranges(a.K, a.K * a.H * a.W, [&](int64_t first, int64_t last) {
    alignas(64) float staged[kSpan];
    for (int64_t k = first; k < last; ++k) {
      float *rows = a.profiles + k * 2 * (a.H + a.W), *columns = rows + a.H;
      float *row_slopes = columns + a.W, *column_slopes = row_slopes + a.H;
      profiles_of(a, k, a.H, a.W, false, rows, columns);
      profiles_of(a, k, a.H, a.W, true, row_slopes, column_slopes);
      double total = 0;
      for (int64_t y = 0; y < a.H; ++y) {
        double plain = 0, slope = 0;
        for (int64_t x0 = 0; x0 < a.W; x0 += kSpan) {
          const int64_t n = least(kSpan, a.W - x0);
          const Strided& t = a.grad;
          const float* g = values(t, k * t.s[0] + y * t.s[1] + x0 * t.s[2], t.s[2], n, staged);
          vf p = vf{}, q = vf{};
          int64_t x = 0;
          for (; x + kWidth <= n; x += kWidth) {
            p = madd(load(g + x), load(columns + x0 + x), p);
            q = madd(load(g + x), load(column_slopes + x0 + x), q);
          }
          for (int i = 0; i < kWidth; ++i) plain += static_cast<double>(p[i]), slope += static_cast<double>(q[i]);
          for (; x < n; ++x) {
            plain += static_cast<double>(g[x]) * static_cast<double>(columns[x0 + x]);
            slope += static_cast<double>(g[x]) * static_cast<double>(column_slopes[x0 + x]);
          }
        }
        total += plain * static_cast<double>(row_slopes[y]) + slope * static_cast<double>(rows[y]);
      }
      a.dsigma[k] = total;
    }
  });
}

void gaussian_blend(const GaussianBlend& a) {
  all_profiles(a, a.K, a.H, a.W, a.profiles);
  auto* ranges = reinterpret_cast<Range*>(a.ranges);  // rows and columns of every box
  if (a.boxes != nullptr)
    for (int64_t k = 0; k < a.K; ++k) {
      const float* p = a.profiles + k * (a.H + a.W);
      ranges[2 * k] = support_of(p, a.H), ranges[2 * k + 1] = support_of(p + a.H, a.W);
    }
  const bool masked = a.boxes == nullptr && a.K > 0;
  const auto plain = [&](const Strided& t, int last) { return t.dtype == kF32 && (t.s[last] == 1 || a.W == 1); };
  const bool strips = !masked && plain(a.background, 3) && plain(a.objects, 4) && plain(a.out, 3);
  parallel_ranges(a.B * a.C * a.H, a.B * a.C * a.H * a.W * (a.K + 2), [&](int64_t first, int64_t last) {
    while (first < last) {
      const int64_t plane = first / a.H, b = plane / a.C, c = plane - b * a.C;
      const int64_t y0 = first - plane * a.H, y1 = least(a.H, y0 + last - first);
      if (strips) {
        blend_boxes_strip(a, ranges, b, c, y0, y1);
      } else {
        for (int64_t y = y0; y < y1; ++y)
          for (int64_t x0 = 0; x0 < a.W; x0 += kSpan) {
            const int64_t n = least(kSpan, a.W - x0);
            if (masked)
              blend_masks_span(a, b, c, y, x0, n);
            else
              blend_boxes_span(a, ranges, b, c, y, x0, n);
          }
      }
      first += y1 - y0;
    }
  });
}

void gaussian_blend_backward(const GaussianBlendBackward& a) {
  all_profiles(a, a.K, a.H, a.W, a.profiles);
  const int64_t blocks = (a.W + kBlendBlock - 1) / kBlendBlock, total = a.H * blocks;
  parallel_ranges(a.slots, a.B * a.C * a.H * a.W * (a.K + 2), [&](int64_t first_slot, int64_t last_slot) {
    for (int64_t slot = first_slot; slot < last_slot; ++slot)
      for (int64_t i = total * slot / a.slots; i < total * (slot + 1) / a.slots; ++i) {
        const int64_t x0 = i % blocks * kBlendBlock;
        backward_block(a, i / blocks, x0, least(kBlendBlock, a.W - x0), a.workspace + slot * a.workspace_stride);
      }
  });
}

}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
