// Gradient of `spectrum` to the image. With F the spectrum that the forward pass kept, P = F / |F| (0 where F is 0) and
// u the gradient of |F|, made symmetric, U(k) = (u(k) + u(-k)) / 2,
//
//   d gray = sum_k U(k) P(k) exp(+2 pi i (ky y / H + kx x / W))         (the unnormalised inverse transform, real)
//   d red = 0.299 d gray, ...
//
// log: u / (1 + |F|). Rings: u(k) is the ring's gradient over its size, after the derivative of the normalisation.
//
// The forward pass in reverse, with the same mapping (spectrum.cpp): phases row by row, written where the column
// transforms want them; columns in place, 16 at a time; rows 32 at a time, transposed on load and on store.
#include "spectrum.h"

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_ISA {
namespace {

struct Job {
  const SpectrumBackward& a;
  Geometry g;
  Plan w, h;

  explicit Job(const SpectrumBackward& a)
      : a(a), g(a.H, a.W), w(read_plan(a.plan_w, a.table_w)), h(read_plan(a.plan_h, a.table_h)) {}
  Scratch scratch(int64_t id) const { return Scratch(a.scratch + id * a.scratch_size, g, a.R, w, h); }

  // The gradients of row ky of |F|, in the order of frequencies: 0 .. W-1.
  void upstream(int64_t b, int64_t ky, float* line) const {
    const int64_t y = a.shift ? (ky + g.H / 2) % g.H : ky, split = a.shift ? g.W / 2 : 0;
    const int64_t row = b * a.grad.s[0] + y * a.grad.s[1], sx = a.grad.s[2];
    widen(line, at(a.grad.data, a.grad.dtype, row + split * sx), a.grad.dtype, g.W - split, sx);
    widen(line + g.W - split, at(a.grad.data, a.grad.dtype, row), a.grad.dtype, split, sx);
  }

  // U of row ky, kx = 0 .. W/2, from the gradients of rows ky (own) and -ky.
  void symmetric(const float* own, const float* mirrored, float* u) const {
    u[0] = 0.5f * (own[0] + mirrored[0]);
    const float* back = mirrored + g.W;
    for (int64_t x = 1; x <= g.W / 2; ++x) u[x] = 0.5f * (own[x] + back[-x]);
  }

  // Gradients of a ring's frequencies: coefficient[r] = d ring r / its size.
  void ring_coefficients(int64_t b, float* coefficient) const {
    const float* profile = a.profile + b * a.R;
    double total = 0, dot = 0;
    for (int64_t r = 0; r < a.R; ++r) total += profile[r];
    const bool normalize = a.normalize && total > 0;
    for (int64_t r = 0; r < a.R; ++r) {
      coefficient[r] = load_as_float(a.grad.data, a.grad.dtype, b * a.grad.s[0] + r * a.grad.s[1]);
      if (normalize) dot += static_cast<double>(coefficient[r]) * profile[r] / total;
    }
    for (int64_t r = 0; r < a.R; ++r) {
      const double d = normalize ? (coefficient[r] - dot) / total : coefficient[r];
      coefficient[r] = static_cast<float>(d / a.ring_size[r]);
    }
  }

  // Row ky of U P into `work`; u[kx] for kx = 0 .. W/2, padded with zeros.
  void phases(const float* half, int64_t ky, const float* u, float* work) const {
    const auto value = [&](vf* re, vf* im, vf up) {
      const vf m = phase(re, im);
      if (a.log) up = up / (splat(1.0f) + m);
      *re *= up, *im *= up;
    };
    for (int64_t block = 0; block < g.blocks; ++block)
      for (int64_t lane = 0; lane < kLanes; lane += kWidth) {
        const float* from = half + block * g.block_size() + ky * kStep + lane;
        float* to = work + block * g.block_size() + h.place(ky) * kStep + lane;
        vf re = load(from), im = load(from + kLanes);
        value(&re, &im, load(u + block * kLanes + lane));
        store(to, re), store(to + kLanes, im);
      }
    if (!g.even) return;
    // The Nyquist column shares the lane of the DC column, whose inverse transform is real too.
    const float* nyquist = g.nyquist(half);
    vf re = splat(nyquist[ky]), im = splat(nyquist[g.nyquist_pitch + ky]);
    value(&re, &im, splat(u[g.W / 2]));
    float* to = work + h.place(ky) * kStep;
    to[0] -= im[0], to[kLanes] += re[0];
  }

  // Rows y0 .. y0 + 31 as the transform of one complex row per lane: Z_k = A_k + i B_k, Z_{-k} = conj A_k + i conj B_k.
  void join(const float* work, int64_t y0, float* rows) const {
    for (int64_t k0 = 0; k0 < g.K; k0 += kWidth)
      for (int64_t lane = 0; lane < kLanes; lane += kWidth)
        for (int from_re = 0; from_re < 2; ++from_re) {
          // Re Z takes A.re and B.im, Im Z takes A.im and B.re.
          vf p[kWidth], q[kWidth];
          const float* block = work + k0 / kLanes * g.block_size() + k0 % kLanes;
          const float* first = block + (y0 + lane) * kStep + (from_re ? 0 : kLanes);
          const float* second = block + (y0 + lane + kLanes) * kStep + (from_re ? kLanes : 0);
          if (y0 + lane + kLanes + kWidth <= g.H) {
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; ++i) p[i] = load(first + i * kStep);
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; ++i) q[i] = load(second + i * kStep);
          } else {
            for (int64_t i = 0; i < kWidth; ++i) {
              const int64_t y = y0 + lane + i;
              p[i] = y < g.H ? load(first + i * kStep) : vf{};
              q[i] = y + kLanes < g.H ? load(second + i * kStep) : vf{};
            }
          }
          transpose(p);
          transpose(q);
          float* to = rows + (from_re ? 0 : kLanes) + lane;
          if (k0 > 0 && k0 + kWidth <= g.K) {
            const vf sign = splat(from_re ? -1.0f : 1.0f);
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; ++i) {
              store(to + w.place(k0 + i) * kStep, madd(q[i], sign, p[i]));
              store(to + w.place(g.W - k0 - i) * kStep, from_re ? p[i] + q[i] : q[i] - p[i]);
            }
            continue;
          }
          for (int64_t i = 0; i < kWidth && k0 + i < g.K; ++i) {
            const int64_t k = k0 + i;
            if (k == 0 && g.even) {  // A.im and B.im are the Nyquist terms: Z_{W/2} = A.im + i B.im
              store(to, from_re ? p[i] : q[i]);
              store(rows + w.place(g.W / 2) * kStep + (from_re ? kLanes : 0) + lane, from_re ? q[i] : p[i]);
              continue;
            }
            store(to + w.place(k) * kStep, from_re ? p[i] - q[i] : p[i] + q[i]);
            if (k > 0) store(to + w.place(g.W - k) * kStep, from_re ? p[i] + q[i] : q[i] - p[i]);
          }
        }
  }

  template <typename T>
  void store_rows(int64_t b, int64_t y0, int64_t part, const float* rows, bool stream) const {
    T* base = static_cast<T*>(a.dimages.data) + b * a.dimages.s[0];
    const float weight[3] = {a.C == 3 ? kRed : 1.0f, kGreen, kBlue};
    for (int64_t x0 = 0; x0 < g.W; x0 += kWidth) {
      const int64_t nx = g.W - x0 < kWidth ? g.W - x0 : kWidth;
      for (int64_t lane = 0; lane < kLanes; lane += kWidth) {
        vf r[kWidth];
        const float* from = rows + x0 * kStep + part + lane;
        if (nx == kWidth) {
#pragma GCC unroll 16
          for (int i = 0; i < kWidth; ++i) r[i] = load(from + i * kStep);
        } else {
          for (int64_t i = 0; i < kWidth; ++i) r[i] = i < nx ? load(from + i * kStep) : vf{};
        }
        transpose(r);
        for (int64_t i = 0; i < kWidth && y0 + lane + i < g.H; ++i)
          for (int64_t c = 0; c < a.C; ++c) {
            const vf v = r[i] * splat(weight[c]);
            T* to = base + c * a.dimages.s[1] + (y0 + lane + i) * a.dimages.s[2] + x0;
            if (nx == kWidth && stream && can_stream(to)) {
              store(Streamed{reinterpret_cast<float*>(to)}, 0, v);
            } else if (nx == kWidth) {
              store(to, v);
            } else {
              for (int64_t x = 0; x < nx; ++x) to[x] = from_float<T>(v[x]);
            }
          }
      }
    }
  }

  void image(int64_t b, int64_t slot, int64_t inner) const {
    const float* half = a.half + b * a.half_size;
    float* work = a.work + slot * a.half_size;
    const int64_t size = g.H * g.W;
    const auto mine = [&](int64_t id) { return scratch(inner > 1 ? id : slot); };
    float* coefficient = mine(0).rows;  // overwritten only once all rows of the spectrum are done
    if (a.bins) ring_coefficients(b, coefficient);
    on_threads(g.pairs(), inner, size, [&](int64_t id, int64_t begin, int64_t end) {
      const Scratch s = mine(id);
      float *own = s.line[0], *mirrored = s.line[1], *u = s.line[2];
      for (int64_t i = 0; i < g.pitch(); ++i) u[i] = 0;
      for (int64_t ky = begin; ky < end; ++ky) {
        const int64_t mirror = ky == 0 ? 0 : g.H - ky;
        if (a.bins) {
          const int32_t* bins = a.bins + ky * (g.W / 2 + 1);
          for (int64_t x = 0; x <= g.W / 2; ++x) u[x] = coefficient[bins[x]];
          phases(half, ky, u, work);
          if (mirror != ky) phases(half, mirror, u, work);
          continue;
        }
        upstream(b, ky, own);
        if (mirror != ky) upstream(b, mirror, mirrored);
        const float* other = mirror != ky ? mirrored : own;
        symmetric(own, other, u);
        phases(half, ky, u, work);
        if (mirror == ky) continue;
        symmetric(other, own, u);
        phases(half, mirror, u, work);
      }
    });
    on_threads(g.blocks, inner, size, [&](int64_t id, int64_t begin, int64_t end) {
      const Scratch s = mine(id);
      for (int64_t block = begin; block < end; ++block) transform(h, work + block * g.block_size(), true, s.bluestein);
    });
    const bool stream = a.dimages.dtype == kF32 && worth_streaming(a.B * a.C * size * 4);
    on_threads(g.groups(), inner, a.C * size, [&](int64_t id, int64_t begin, int64_t end) {
      const Scratch s = mine(id);
      for (int64_t group = begin; group < end; ++group) {
        join(work, group * kStep, s.rows);
        transform(w, s.rows, true, s.bluestein);
        for (int64_t part = 0; part < kStep; part += kLanes) {
          const int64_t y0 = group * kStep + part;
          if (a.dimages.dtype == kF32)
            store_rows<float>(b, y0, part, s.rows, stream);
          else if (a.dimages.dtype == kF16)
            store_rows<f16>(b, y0, part, s.rows, false);
          else
            store_rows<bf16>(b, y0, part, s.rows, false);
        }
      }
      if (stream) fence();
    });
  }
};

}  // namespace

void spectrum_backward(const SpectrumBackward& a) {
  const Job job(a);
  over_images(a.B, a.threads, a.C * a.H * a.W,
              [&](int64_t b, int64_t slot, int64_t inner) { job.image(b, slot, inner); });
}

}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
