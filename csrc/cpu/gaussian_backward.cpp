// Gradients of gaussian_blur. To x: the adjoint operator, by the forward kernel (its header says why). To sigma:
//   dsigma[b] = sum g (Ay' x Ax^T + Ay x Ax'^T),
// on the direct path: two vertical passes, the two horizontal ones in one loop, and the product with g at once, so
// that no image is stored. Sums run over a row in vectors, then over rows and channels in double, in order.
#include "gaussian_rows.h"

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_ISA {

void gaussian_blur(const GaussianBlur& a);

namespace {

// sum over one row of g times the derivative; plain and slope: the two vertical passes, halo filled, from column -rx.
inline double row_product(const float* g, const float* plain, const float* slope, const Blur& b, int64_t W) {
  double total = 0;
  int64_t x = 0;
  vf part = vf{};
  for (; x + kWidth <= W; x += kWidth) {
    vf d0 = vf{}, d1 = vf{};
    for (int64_t t = 0; t < b.Kx; ++t) {
      d0 = madd(splat(b.dwx[t]), load(plain + x + t), d0);
      d1 = madd(splat(b.wx[t]), load(slope + x + t), d1);
    }
    part = madd(load(g + x), d0 + d1, part);
  }
  for (int i = 0; i < kWidth; ++i) total += static_cast<double>(part[i]);
  for (; x < W; ++x) {
    float d0 = 0, d1 = 0;
    for (int64_t t = 0; t < b.Kx; ++t) {
      d0 = madd(b.dwx[t], plain[x + t], d0);
      d1 = madd(b.wx[t], slope[x + t], d1);
    }
    total += static_cast<double>(g[x]) * static_cast<double>(d0 + d1);
  }
  return total;
}

inline void sigma_rows(const GaussianBlurBackward& a, Blur& b, int64_t plane, int64_t y0, int64_t n) {
  b.in.prepare(y0 - b.ry, y0 + kRows + b.ry);
  for (int64_t j = 0; j < b.Ky + kRows - 1; ++j) b.rows[j] = b.in.row(y0 - b.ry + j);
  float* plain = b.line + b.pad;
  float* slope = plain + kRows * b.pitch;
  vertical(b.rows, b.wy, b.Ky, a.W, b.in.direct, plain, b.pitch);
  vertical(b.rows, b.dwy, b.Ky, a.W, b.in.direct, slope, b.pitch);
  const int64_t bi = plane / a.C, c = plane - bi * a.C;
  for (int64_t o = 0; o < n; ++o) {
    const int64_t y = y0 + o;
    extend(plain + o * b.pitch, a.W, b.rx, a.border);
    extend(slope + o * b.pitch, a.W, b.rx, a.border);
    const Strided& g = a.grad;
    widen_any(b.scratch, element(g.data, g.dtype, bi * g.s[0] + c * g.s[1] + y * g.s[2]), g.dtype, a.W, g.s[3]);
    a.partial[plane * a.H + y] = row_product(b.scratch, plain + o * b.pitch - b.rx, slope + o * b.pitch - b.rx, b, a.W);
  }
}

}  // namespace

void gaussian_blur_backward(const GaussianBlurBackward& a) {
  if (a.dx.data != nullptr) {
    GaussianBlur adjoint = a;
    adjoint.x = a.grad, adjoint.out = a.dx, adjoint.adjoint = 1;
    gaussian_blur(adjoint);
  }
  if (a.dsigma == nullptr) return;
  const int64_t units = (a.H + kRows - 1) / kRows, total = a.B * a.C * units;
  parallel_ranges(a.slots, 4 * a.B * a.C * a.H * a.W, [&](int64_t first_slot, int64_t last_slot) {
    for (int64_t slot = first_slot; slot < last_slot; ++slot) {
      int64_t task = total * slot / a.slots;
      const int64_t end = total * (slot + 1) / a.slots;
      while (task < end) {
        const int64_t plane = task / units, bi = plane / a.C, c = plane - bi * a.C;
        const int64_t last = least(end, (plane + 1) * units);
        Blur blur(a, bi, a.workspace + slot * a.workspace_stride);
        blur.in.start(element(a.x.data, a.x.dtype, bi * a.x.s[0] + c * a.x.s[1]));
        for (; task < last; ++task) {
          const int64_t y = (task - plane * units) * kRows;
          sigma_rows(a, blur, plane, y, least(kRows, a.H - y));
        }
      }
    }
  });
  for (int64_t b = 0; b < a.B; ++b) {
    double sum = 0;
    for (int64_t i = 0; i < a.C * a.H; ++i) sum += a.partial[b * a.C * a.H + i];
    a.dsigma[b] = sum;
  }
}

}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
