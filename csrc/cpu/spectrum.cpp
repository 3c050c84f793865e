// |FFT2(gray(image))|, log1p of it, or its mean over rings around the DC pixel.
//
//   gray = 0.299 R + 0.587 G + 0.114 B            images [B, 3 or 1, H, W]
//   out[b, shift(ky, kx)] = |sum gray[y, x] exp(-2 pi i (ky y / H + kx x / W))|            [B, H, W]
//   or out[b, r] = mean of that over the frequencies at distance r <= d < r + 1 from DC    [B, R]
//
// Floor: read the image, write the features (16 MB at 16 x 3 x 256 x 256, float32: memory-bound on a few cores), and
// some 2.5 H W log2(H W) operations. Mapping, for one image, in which no step shuffles except two transposes:
//
//   rows    32 at a time, two per lane: gray on load, transposed in registers, one complex transform for both (row l
//           real, row l + 16 imaginary), separated by symmetry while they are transposed back;
//   columns 16 at a time, one per lane, in place: rows were stored where the first pass wants them. Only half of the
//           columns exist, and the DC and the Nyquist column of an even width, both spectra of real data, share a lane;
//   output  row ky and row H - ky together: modulus, then each row of the output once, its right half from one and its
//           mirrored left half from the other; or into the rings, in a fixed order.
//
// One image's half spectrum (264 KB at 256 x 256) stays in L2, a group of rows or columns (32 KB) in L1. Threads take
// whole images; where there are fewer images than threads, they share the groups of one: the same bits either way.
//
// Measured at 16 x 3 x 256 x 256, float32, one thread of a Xeon with AVX-512: transposes unrolled, so that they stay in
// registers, 1.84 -> 1.47 ms; output around the caches, 4 to 8 % (20 to 30 % at 8 x 3 x 512 x 512). What did not help:
// asking for the next rows ahead (while rows are loaded, or while they are separated), and turning tiles in L1 that
// were read row by row. A third of the time is the image coming in at 20 GB/s, a third the butterflies.
#include "spectrum.h"

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_ISA {
namespace {

struct Image {
  const char* data;
  int32_t dtype;
  int64_t C, sc, sy, sx;
};

// Half of the gray of one vector of pixels: the row transforms are separated by sums that would otherwise be halved.
template <typename T>
inline vf gray(const T* p, int64_t sc, bool rgb) {
  if (!rgb) return load(p) * splat(0.5f);
  const vf red = load(p) * splat(0.5f * kRed);
  return madd(load(p + 2 * sc), splat(0.5f * kBlue), madd(load(p + sc), splat(0.5f * kGreen), red));
}

// Rows y0 .. y0 + 15 of the image, gray, into the real (part 0) or imaginary (16) lanes of `rows`.
template <typename T>
inline void load_rows(const Image& im, const Geometry& g, const Plan& plan, int64_t y0, int64_t part, float* rows) {
  const T* base = reinterpret_cast<const T*>(im.data);
  for (int64_t x0 = 0; x0 < g.W; x0 += kWidth) {
    const int64_t nx = g.W - x0 < kWidth ? g.W - x0 : kWidth;
    for (int64_t lane = 0; lane < kLanes; lane += kWidth) {
      vf r[kWidth];
      const int64_t y = y0 + lane;
      const T* p = base + y * im.sy + x0 * im.sx;
      const bool whole = nx == kWidth && im.sx == 1 && y + kWidth <= g.H;
      if (whole && im.C == 3) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) r[i] = gray(p + i * im.sy, im.sc, true);
      } else if (whole) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) r[i] = gray(p + i * im.sy, im.sc, false);
      } else {
        for (int i = 0; i < kWidth; ++i) {
          float px[3][kWidth] = {};
          for (int64_t c = 0; c < im.C; ++c)
            for (int64_t x = 0; x < nx && y + i < g.H; ++x) px[c][x] = to_float(p[i * im.sy + c * im.sc + x * im.sx]);
          r[i] = gray(px[0], kWidth, im.C == 3);
        }
      }
      transpose(r);
      float* to = rows + part + lane;
      if (nx == kWidth) {
#pragma GCC unroll 16
        for (int x = 0; x < kWidth; ++x) store(to + plan.place(x0 + x) * kStep, r[x]);
      } else {
        for (int64_t x = 0; x < nx; ++x) store(to + plan.place(x0 + x) * kStep, r[x]);
      }
    }
  }
}

// The transforms of 16 + 16 rows from their common one, Z: A_k = Z_k + conj Z_{-k}, B_k = -i (Z_k - conj Z_{-k}), into
// the half spectrum.
inline void separate(const float* rows, const Geometry& g, const Plan& column, int64_t y0, float* half) {
  for (int64_t k0 = 0; k0 < g.blocks * kLanes; k0 += kWidth)
    for (int64_t lane = 0; lane < kLanes; lane += kWidth)
      for (int what = 0; what < 4; ++what) {  // A.re, A.im, B.re, B.im
        const int64_t first = y0 + (what < 2 ? 0 : kLanes) + lane;
        if (first >= g.H) break;
        // A.re and B.im come from the real part of Z, B.re and A.im from the imaginary part.
        const bool from_re = what == 0 || what == 3;
        const float* z = rows + (from_re ? 0 : kLanes) + lane;
        vf r[kWidth];
        if (k0 > 0 && k0 + kWidth <= g.K) {
          const float *up = z + k0 * kStep, *down = z + (g.W - k0) * kStep;
          if (what == 0 || what == 2) {
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; ++i) r[i] = load(up + i * kStep) + load(down - i * kStep);
          } else {
            const vf sign = splat(what == 1 ? 1.0f : -1.0f);
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; ++i) r[i] = (load(up + i * kStep) - load(down - i * kStep)) * sign;
          }
        } else {
          for (int i = 0; i < kWidth; ++i) {
            const int64_t k = k0 + i, mirror = k == 0 ? 0 : g.W - k;
            if (k >= g.K) {
              r[i] = vf{};
            } else if (k == 0 && g.even && what % 2 == 1) {  // real at DC; the Nyquist term takes the place
              const vf v = load(rows + (what == 1 ? 0 : kLanes) + lane + g.W / 2 * kStep);
              r[i] = v + v;
            } else {
              const vf a = load(z + k * kStep), b = load(z + mirror * kStep);
              r[i] = what == 0 || what == 2 ? a + b : what == 1 ? a - b : b - a;
            }
          }
        }
        transpose(r);
        float* to = half + k0 / kLanes * g.block_size() + k0 % kLanes + (what % 2 ? kLanes : 0);
        if (first + kWidth <= g.H) {
#pragma GCC unroll 16
          for (int i = 0; i < kWidth; ++i) store(to + column.place(first + i) * kStep, r[i]);
        } else {
          for (int64_t i = 0; first + i < g.H; ++i) store(to + column.place(first + i) * kStep, r[i]);
        }
      }
}

// Separates the two real columns that share lane 0 of block 0.
inline void unpack(const Geometry& g, float* half) {
  float *re = g.nyquist(half), *im = re + g.nyquist_pitch, *magnitude = im + g.nyquist_pitch;
  for (int64_t i = 0; i < 3 * g.nyquist_pitch; ++i) re[i] = 0;
  if (!g.even) return;
  for (int64_t ky = 0; ky <= g.H / 2; ++ky) {
    const int64_t mirror = ky == 0 ? 0 : g.H - ky;
    float *z = half + ky * kStep, *m = half + mirror * kStep;
    const float zr = 0.5f * z[0], zi = 0.5f * z[kLanes], mr = 0.5f * m[0], mi = 0.5f * m[kLanes];
    const float dr = zr + mr, di = zi - mi, nr = zi + mi, ni = mr - zr;
    z[0] = dr, z[kLanes] = di, m[0] = dr, m[kLanes] = ky == mirror ? di : -di;
    re[ky] = nr, im[ky] = ni, re[mirror] = nr, im[mirror] = ky == mirror ? ni : -ni;
  }
  for (int64_t i = 0; i < g.nyquist_pitch; i += kWidth) store(magnitude + i, modulus(load(re + i), load(im + i)));
}

inline void features_row(const Geometry& g, const float* half, int64_t ky, bool log, float* line) {
  for (int64_t block = 0; block < g.blocks; ++block)
    for (int64_t lane = 0; lane < kLanes; lane += kWidth) {
      const float* p = half + block * g.block_size() + ky * kStep + lane;
      const vf m = modulus(load(p), load(p + kLanes));
      store(line + block * kLanes + lane, log ? log1p(m) : m);
    }
  if (g.even) {
    const vf m = splat(g.nyquist(half)[2 * g.nyquist_pitch + ky]);
    line[g.K] = log ? log1p(m)[0] : m[0];
  }
}

// One row of the output: `own` is row ky of the half spectrum, `mirrored` row -ky.
inline void write_row(const Spectrum& a, const Geometry& g, int64_t b, int64_t ky, const float* own,
                      const float* mirrored, float* row, bool stream) {
  const int64_t start = a.shift ? g.W / 2 : 0, positive = (g.W + 1) / 2;
  memcpy(row + start, own, static_cast<size_t>(positive) * 4);
  float* end = row + (a.shift ? start : g.W);  // of the negative frequencies
  int64_t x = 1;
  for (; x + kWidth <= positive; x += kWidth) {
    const vf v = load(mirrored + x);
    vf back;
    for (int i = 0; i < kWidth; ++i) back[i] = v[kWidth - 1 - i];
    store(end - x - kWidth + 1, back);
  }
  for (; x < positive; ++x) end[-x] = mirrored[x];
  if (g.even) row[a.shift ? 0 : g.W / 2] = own[g.K];
  const int64_t y = a.shift ? (ky + g.H / 2) % g.H : ky;
  char* out = at(a.out.data, a.out.dtype, b * a.out.s[0] + y * a.out.s[1]);
  if (stream && can_stream(out)) {
    const Streamed to = {reinterpret_cast<float*>(out)};
    x = 0;
    for (; x + kWidth <= g.W; x += kWidth) store(to, x, load(row + x));
    for (; x < g.W; ++x) to.p[x] = row[x];
  } else {
    narrow(out, row, a.out.dtype, g.W, a.out.s[2]);
  }
}

// Rings of rows ky and -ky together, kx >= 0 only: all but the first and the Nyquist column stand for two frequencies.
// Four sums per ring, taken in turns, so that an addition need not wait for the last.
inline void add_to_rings(const Geometry& g, const int32_t* bins, const float* own, const float* mirrored, float* line,
                         float* const* sums) {
  int64_t x = 0;
  for (; x < g.pitch(); x += kWidth) {
    vf s = load(own + x);
    if (mirrored != nullptr) s = s + load(mirrored + x);
    store(line + x, s);
  }
  line[0] *= 0.5f;
  const int64_t n = g.W / 2 + 1;
  if (g.even) line[g.K] *= 0.5f;
  for (x = 0; x + 4 <= n; x += 4)
    for (int i = 0; i < 4; ++i) sums[i][bins[x + i]] += line[x + i];
  for (; x < n; ++x) sums[0][bins[x]] += line[x];
}

struct Job {
  const Spectrum& a;
  Geometry g;
  Plan w, h;

  explicit Job(const Spectrum& a)
      : a(a), g(a.H, a.W), w(read_plan(a.plan_w, a.table_w)), h(read_plan(a.plan_h, a.table_h)) {}
  Scratch scratch(int64_t id) const { return Scratch(a.scratch + id * a.scratch_size, g, a.R, w, h); }

  void image(int64_t b, int64_t slot, int64_t inner) const {
    float* half = a.half + (a.keep ? b : slot) * a.half_size;
    const int64_t size = g.H * g.W;
    // A thread alone uses its own scratch; threads that share an image theirs.
    const auto mine = [&](int64_t id) { return scratch(inner > 1 ? id : slot); };
    const Image im = {at(a.images.data, a.images.dtype, b * a.images.s[0]),
                      a.images.dtype,
                      a.C,
                      a.images.s[1],
                      a.images.s[2],
                      a.images.s[3]};
    on_threads(g.groups(), inner, a.C * size, [&](int64_t id, int64_t begin, int64_t end) {
      const Scratch s = mine(id);
      for (int64_t group = begin; group < end; ++group) {
        for (int64_t part = 0; part < kStep; part += kLanes) {
          const int64_t y0 = group * kStep + part;
          if (im.dtype == kF32)
            load_rows<float>(im, g, w, y0, part, s.rows);
          else if (im.dtype == kF16)
            load_rows<f16>(im, g, w, y0, part, s.rows);
          else
            load_rows<bf16>(im, g, w, y0, part, s.rows);
        }
        transform(w, s.rows, false, s.bluestein);
        separate(s.rows, g, h, group * kStep, half);
      }
    });
    on_threads(g.blocks, inner, size, [&](int64_t id, int64_t begin, int64_t end) {
      const Scratch s = mine(id);
      for (int64_t block = begin; block < end; ++block) transform(h, half + block * g.block_size(), false, s.bluestein);
    });
    unpack(g, half);
    const bool stream = a.out.dtype == kF32 && a.out.s[2] == 1 && worth_streaming(a.B * size * 4);
    float* partial = a.bins ? a.partial + slot * ring_chunks(g.H) * a.R : nullptr;
    on_threads(ring_chunks(g.H), inner, size, [&](int64_t id, int64_t begin, int64_t end) {
      const Scratch s = mine(id);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t last = (chunk + 1) * kRingRows < g.pairs() ? (chunk + 1) * kRingRows : g.pairs();
        float* sums[4] = {partial ? partial + chunk * a.R : nullptr};
        // The other three sums are where the group of rows was.
        for (int i = 1; i < 4; ++i) sums[i] = s.rows + i * a.R;
        if (partial)
          for (auto* sum : sums) memset(sum, 0, static_cast<size_t>(a.R) * 4);
        for (int64_t ky = chunk * kRingRows; ky < last; ++ky) {
          const int64_t mirror = ky == 0 ? 0 : g.H - ky;
          features_row(g, half, ky, a.log, s.line[0]);
          const float* other = s.line[0];
          if (mirror != ky) features_row(g, half, mirror, a.log, s.line[1]), other = s.line[1];
          if (partial) {
            add_to_rings(g, a.bins + ky * (g.W / 2 + 1), s.line[0], mirror != ky ? other : nullptr, s.line[2], sums);
          } else {
            write_row(a, g, b, ky, s.line[0], other, s.line[2], stream);
            if (mirror != ky) write_row(a, g, b, mirror, other, s.line[0], s.line[2], stream);
          }
        }
        if (partial)
          for (int64_t r = 0; r < a.R; ++r) sums[0][r] = (sums[0][r] + sums[1][r]) + (sums[2][r] + sums[3][r]);
      }
      if (stream) fence();
    });
    if (partial) rings(b, partial);
  }

  void rings(int64_t b, const float* partial) const {
    float* profile = a.profile + b * a.R;
    double total = 0;
    for (int64_t r = 0; r < a.R; ++r) {
      float sum = 0;
      for (int64_t chunk = 0; chunk < ring_chunks(g.H); ++chunk) sum += partial[chunk * a.R + r];
      profile[r] = 2.0f * sum / a.ring_size[r];
      total += profile[r];
    }
    const double norm = a.normalize && total > 0 ? total : 1.0;
    for (int64_t r = 0; r < a.R; ++r)
      store_from_float(a.out.data, a.out.dtype, b * a.out.s[0] + r * a.out.s[1], static_cast<float>(profile[r] / norm));
  }
};

}  // namespace

void spectrum(const Spectrum& a) {
  const Job job(a);
  over_images(a.B, a.threads, a.C * a.H * a.W,
              [&](int64_t b, int64_t slot, int64_t inner) { job.image(b, slot, inner); });
}

}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
