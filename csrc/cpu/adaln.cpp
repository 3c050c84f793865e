// Adaptive layer norm, forward and backward (see AdalnForward and AdalnBackward in fastdiff.h for the formulas).
//
// Floor: x (and branch) read once, outputs written once; modulation rows stay in cache.
// Mapping: a row lives in L1 from its first touch on, when its sum is taken too; squared deviations and output read it
// there. Two exact passes for the variance instead of E[x^2] - E[x]^2, which loses everything when the mean is large.
// Modulation rows are widened once per sample. Large float32 outputs are written around the caches.
// Backward: one pass over the rows of a chunk (kChunk tokens of one sample) writes dx and dbranch and adds the chunk's
// share of every broadcast gradient to a workspace row; a second pass adds the chunks in order.
#include "isa.h"
#include "parallel.h"
#include "vec.h"

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_ISA {
namespace {

// What a row sum adds up: values, or products.
template <typename V>
struct Product {
  V a, b;
};
inline vf plus(vf s, vf v) { return s + v; }
inline float plus(float s, float v) { return s + v; }
template <typename V>
inline V plus(V s, Product<V> p) {
  return madd(p.a, p.b, s);
}

// Four independent sums hide the latency of the adds; they are combined in a fixed order.
template <typename Term>
inline float reduce_row(int64_t D, const Term& term) {
  vf s0 = {}, s1 = {}, s2 = {}, s3 = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= D; i += 4 * kWidth) {
    s0 = plus(s0, term(i, vf{}));
    s1 = plus(s1, term(i + kWidth, vf{}));
    s2 = plus(s2, term(i + 2 * kWidth, vf{}));
    s3 = plus(s3, term(i + 3 * kWidth, vf{}));
  }
  for (; i + kWidth <= D; i += kWidth) s0 = plus(s0, term(i, vf{}));
  float tail = 0;
  for (; i < D; ++i) tail = plus(tail, term(i, 0.0f));
  return sum((s0 + s1) + (s2 + s3)) + tail;
}

// Asks for the cache line that holds element i of a row that will be needed soon; never faults. Between the pass that
// brings a row in and the one that writes it, the passes over L1 would leave the memory idle: in adaln_modulate they
// ask for the next row instead (12 % there; with two rows to fetch it costs 8 %, so gate_residual_adaln leaves it
// alone).
struct Ahead {
  const char* row = nullptr;
  int64_t bytes = 0;  // per element

  void at(int64_t i) const { __builtin_prefetch(row + i * bytes); }
};

// Asks for what a pass over fresh rows will read a kilobyte later, into the next row where rows follow each other: 7 %
// in gate_residual_adaln from main memory, for the hardware's own prefetching stops at every page.
template <typename T>
inline void soon(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + 1024);
}

template <typename Step>
inline void each(int64_t D, const Step& step) {
  int64_t i = 0;
  for (; i + kWidth <= D; i += kWidth) step(i, vf{});
  for (; i < D; ++i) step(i, 0.0f);
}

// An operand read row by row as contiguous floats; a row that is the one before (broadcast) is not widened again.
struct RowReader {
  View view;
  float* scratch;
  int64_t cached = -1;

  const float* row(int64_t b, int64_t n, int64_t D) {
    if (view.data == nullptr) return nullptr;
    const int64_t offset = b * view.sb + n * view.sn;
    if (view.dtype == kF32 && view.sd == 1) return static_cast<const float*>(view.data) + offset;
    if (offset != cached) widen(scratch, at(view.data, view.dtype, offset), view.dtype, D, view.sd);
    cached = view.sn == 0 || view.sb == 0 ? offset : -1;
    return scratch;
  }
};

// Scratch rows of one thread. A failed allocation must not pass for a result.
struct Scratch {
  float* base;
  int64_t pitch;
  explicit Scratch(int rows, int64_t D) : pitch((D + 15) / 16 * 16) {
    base = static_cast<float*>(aligned_alloc(64, static_cast<size_t>(rows * (pitch ? pitch : 16)) * sizeof(float)));
    if (base == nullptr) abort();
  }
  ~Scratch() { free(base); }
  float* row(int i) const { return base + i * pitch; }
};

inline char* element(const View& v, int64_t b, int64_t n) { return at(v.data, v.dtype, b * v.sb + n * v.sn); }
inline bool direct(const View& v) { return v.dtype == kF32 && v.sd == 1; }

// Outputs that are written around the caches (vec.h).
inline bool streams(const View& v, int64_t elements) {
  return v.data != nullptr && v.dtype == kF32 && v.sd == 1 && worth_streaming(elements * 4);
}

// A number the compiler may not take apart again: it would otherwise fuse r - first * inv_d into one rounding on some
// paths and not on others, and the same row would come out with different last bits.
inline float settled(float v) {
  __asm__ volatile("" : "+m"(v));
  return v;
}

template <bool kSquare, typename V>
inline auto square_if(V v) {
  if constexpr (kSquare)
    return Product<V>{v, v};
  else
    return v;
}

// Calls write(out) with `out` of the row's own type, so that results are stored as they are computed; a row with a
// stride goes through scratch.
template <typename Write>
inline void write_row(const View& v, int64_t b, int64_t n, int64_t D, bool stream, float* scratch, const Write& write) {
  char* row = element(v, b, n);
  if (stream && can_stream(row)) {
    write(Streamed{reinterpret_cast<float*>(row)});
  } else if (v.sd != 1) {
    write(scratch);
    narrow(row, scratch, v.dtype, D, v.sd);
  } else if (v.dtype == kF32) {
    write(reinterpret_cast<float*>(row));
  } else if (v.dtype == kF16) {
    write(reinterpret_cast<f16*>(row));
  } else {
    write(reinterpret_cast<bf16*>(row));
  }
}

// Calls read(x, branch) with the two rows in their own 16-bit type where they share one, else as floats.
template <typename Read>
inline void read_rows(const View& x, const View& branch, RowReader* in, int64_t b, int64_t n, int64_t D,
                      const Read& read) {
  const bool plain = x.dtype == branch.dtype && x.sd == 1 && branch.sd == 1;
  if (plain && x.dtype == kBF16) {
    read(reinterpret_cast<const bf16*>(element(x, b, n)), reinterpret_cast<const bf16*>(element(branch, b, n)));
  } else if (plain && x.dtype == kF16) {
    read(reinterpret_cast<const f16*>(element(x, b, n)), reinterpret_cast<const f16*>(element(branch, b, n)));
  } else {
    read(in[0].row(b, n, D), in[1].row(b, n, D));
  }
}

// The value as it was stored.
template <typename V>
inline V stored(V v, Streamed, int64_t) {
  return v;
}
inline vf stored(vf v, float*, int64_t) { return v; }
inline float stored(float v, float*, int64_t) { return v; }
template <typename T>
inline vf stored(vf, T* out, int64_t i) {
  return load(out + i);
}
template <typename T>
inline float stored(float, T* out, int64_t i) {
  return to_float(out[i]);
}

inline Ahead ahead(const View& v, int64_t b, int64_t n) { return Ahead{element(v, b, n), dtype_size(v.dtype)}; }

template <bool kRms>
inline void forward_row(const AdalnForward& a, int64_t token, int64_t next, RowReader* in, float* r_scratch,
                        float* y_scratch) {
  const int64_t D = a.D, b = token / a.N, n = token % a.N;
  const bool gated = a.gate.data != nullptr;
  const Ahead next_x = gated ? Ahead{} : ahead(a.x, next / a.N, next % a.N);
  const Ahead next_y = gated ? Ahead{} : ahead(a.y, next / a.N, next % a.N);
  float first = 0;  // sum of the row (LayerNorm) or of its squares (RMSNorm), taken while the row is first touched
  bool summed = false;
  const float* r;
  if (gated) {
    const float* gate = in[2].row(b, n, D);
    // When the residual is stored in 16 bits the norm sees the rounded value: what gate_residual followed by
    // adaln_modulate computes, and what the backward pass reads.
    const bool stream = streams(a.residual, a.B * a.N * D), in_place = direct(a.residual) && !stream;
    float* kept = in_place ? reinterpret_cast<float*>(element(a.residual, b, n)) : r_scratch;
    read_rows(a.x, a.branch, in, b, n, D, [&](auto x, auto branch) {
      write_row(a.residual, b, n, D, stream, y_scratch, [&](auto out) {
        first = reduce_row(D, [&](int64_t i, auto k) {
          soon(x + i), soon(branch + i);
          const auto v = pick(x, i, k) + pick(gate, i, k) * pick(branch, i, k);
          put(out, i, v);
          const auto s = stored(v, out, i);
          if (!in_place) put(kept, i, s);
          return square_if<kRms>(s);
        });
      });
    });
    summed = true;
    if (a.residual.sd != 1 && a.residual.dtype != kF32) {
      widen(kept, element(a.residual, b, n), a.residual.dtype, D, a.residual.sd);
      summed = false;  // those were the values before they were rounded
    }
    r = kept;
  } else if (a.x.dtype != kF32 && a.x.sd == 1) {
    read_rows(a.x, a.x, in, b, n, D, [&](auto x, auto) {
      first = reduce_row(D, [&](int64_t i, auto k) {
        const auto v = pick(x, i, k);
        put(r_scratch, i, v);
        return square_if<kRms>(v);
      });
    });
    summed = true;
    r = r_scratch;
  } else {
    r = in[0].row(b, n, D);
  }
  if (a.scale.data == nullptr) return;
  const float inv_d = 1.0f / static_cast<float>(D);
  if (!summed)
    first = reduce_row(D, [&](int64_t i, auto k) {
      const auto v = pick(r, i, k);
      return square_if<kRms>(v);
    });
  const float mean = kRms ? 0.0f : settled(first * inv_d);
  float square = first;
  if (!kRms)
    square = reduce_row(D, [&](int64_t i, auto k) {
      if (!gated) next_x.at(i);
      const auto v = pick(r, i, k) - mean;
      return Product<decltype(k)>{v, v};
    });
  const float rstd = 1.0f / __builtin_sqrtf(settled(square * inv_d) + a.eps);
  if (a.mean != nullptr) a.mean[b * a.N + n] = mean, a.rstd[b * a.N + n] = rstd;
  const float *shift = in[3].row(b, n, D), *scale = in[4].row(b, n, D);
  const float *weight = in[5].row(0, 0, D), *bias = in[6].row(0, 0, D);
  const bool stream = streams(a.y, a.B * a.N * D);
  write_row(a.y, b, n, D, stream, y_scratch, [&](auto y) {
    if (weight == nullptr && bias == nullptr) {
      each(D, [&](int64_t i, auto k) {
        if (!gated && !stream) next_y.at(i);  // a streamed line must not be cached first
        put(y, i, (pick(r, i, k) - mean) * rstd * (1.0f + pick(scale, i, k)) + pick(shift, i, k));
      });
    } else {
      each(D, [&](int64_t i, auto k) {
        auto v = (pick(r, i, k) - mean) * rstd;
        if (weight != nullptr) v *= pick(weight, i, k);
        if (bias != nullptr) v += pick(bias, i, k);
        put(y, i, v * (1.0f + pick(scale, i, k)) + pick(shift, i, k));
      });
    }
  });
}

// A gradient of a broadcast operand, for one row: a pointer to add to (chunk workspace) or to write (per token).
struct GradRow {
  float* add = nullptr;
  float* set = nullptr;
};

inline GradRow grad_row(const ParamGrad& g, int64_t workspace_row, int64_t D, float* scratch) {
  GradRow r;
  if (g.reduce == kPerToken) r.set = scratch;
  if (g.reduce == kPerSample || g.reduce == kShared) r.add = g.partial + workspace_row * D;
  return r;
}
inline void finish_row(const ParamGrad& g, const GradRow& r, int64_t token, int64_t D) {
  if (r.set != nullptr) narrow(at(g.data, g.dtype, token * D), r.set, g.dtype, D, 1);
}
template <typename V>
inline void give(const GradRow& r, int64_t i, V v) {
  if (r.add != nullptr)
    put(r.add, i, pick(r.add, i, v) + v);
  else if (r.set != nullptr)
    put(r.set, i, v);
}

enum { kR, kBranch, kGate, kScale, kWeight, kBias, kGradY, kGradResidual, kReaders };
enum { kDn = kReaders, kDshift, kDscale, kDgate, kDx, kDbranch, kScratchRows };

inline void backward_row(const AdalnBackward& a, int64_t b, int64_t n, int64_t workspace_row, RowReader* in,
                         const Scratch& s) {
  const int64_t D = a.D, token = b * a.N + n;
  float* dx = direct(a.dx) ? reinterpret_cast<float*>(element(a.dx, b, n)) : s.row(kDx);
  if (a.dx.data == nullptr) dx = s.row(kDx);
  const float* grad_residual = in[kGradResidual].row(b, n, D);
  if (a.grad_y.data != nullptr) {
    const float *r = in[kR].row(b, n, D), *gy = in[kGradY].row(b, n, D), *scale = in[kScale].row(b, n, D);
    const float *weight = in[kWeight].row(0, 0, D), *bias = in[kBias].row(0, 0, D);
    const float mean = a.mean[token], rstd = a.rstd[token];
    const GradRow dshift = grad_row(a.dshift, workspace_row, D, s.row(kDshift));
    const GradRow dscale = grad_row(a.dscale, workspace_row, D, s.row(kDscale));
    const GradRow dweight = grad_row(a.dweight, workspace_row, D, nullptr);
    const GradRow dbias = grad_row(a.dbias, workspace_row, D, nullptr);
    float* dn = s.row(kDn);
    each(D, [&](int64_t i, auto k) {
      const auto g = pick(gy, i, k), hat = (pick(r, i, k) - mean) * rstd;
      auto affine = hat;
      if (weight != nullptr) affine *= pick(weight, i, k);
      if (bias != nullptr) affine += pick(bias, i, k);
      auto d = g * (1.0f + pick(scale, i, k));
      give(dshift, i, g);
      give(dscale, i, g * affine);
      give(dweight, i, d * hat);
      give(dbias, i, d);
      if (weight != nullptr) d *= pick(weight, i, k);
      put(dn, i, d);
    });
    finish_row(a.dshift, dshift, token, D);
    finish_row(a.dscale, dscale, token, D);
    const float inv_d = 1.0f / static_cast<float>(D);
    const float m1 = a.rms ? 0.0f : settled(reduce_row(D, [&](int64_t i, auto k) { return pick(dn, i, k); }) * inv_d);
    const float m2 = settled(inv_d * reduce_row(D, [&](int64_t i, auto k) {
                               return Product<decltype(k)>{pick(dn, i, k), (pick(r, i, k) - mean) * rstd};
                             }));
    each(D, [&](int64_t i, auto k) {
      auto v = (pick(dn, i, k) - m1 - (pick(r, i, k) - mean) * rstd * m2) * rstd;
      if (grad_residual != nullptr) v += pick(grad_residual, i, k);
      put(dx, i, v);
    });
  } else {
    memcpy(dx, grad_residual, static_cast<size_t>(D) * sizeof(float));
  }
  if (a.gate.data != nullptr) {
    const float *branch = in[kBranch].row(b, n, D), *gate = in[kGate].row(b, n, D);
    const GradRow dgate = grad_row(a.dgate, workspace_row, D, s.row(kDgate));
    if (dgate.add != nullptr || dgate.set != nullptr)
      each(D, [&](int64_t i, auto k) { give(dgate, i, pick(dx, i, k) * pick(branch, i, k)); });
    finish_row(a.dgate, dgate, token, D);
    if (a.dbranch.data != nullptr) {
      float* out = direct(a.dbranch) ? reinterpret_cast<float*>(element(a.dbranch, b, n)) : s.row(kDbranch);
      each(D, [&](int64_t i, auto k) { put(out, i, pick(dx, i, k) * pick(gate, i, k)); });
      if (!direct(a.dbranch)) narrow(element(a.dbranch, b, n), out, a.dbranch.dtype, D, a.dbranch.sd);
    }
  }
  if (a.dx.data != nullptr && !direct(a.dx)) narrow(element(a.dx, b, n), dx, a.dx.dtype, D, a.dx.sd);
}

inline const ParamGrad* reduced(const AdalnBackward& a, int i) {
  const ParamGrad* all[] = {&a.dgate, &a.dshift, &a.dscale, &a.dweight, &a.dbias};
  const ParamGrad* g = all[i];
  return g->reduce == kPerSample || g->reduce == kShared ? g : nullptr;
}

}  // namespace

void adaln_forward(const AdalnForward& a) {
  parallel_ranges(a.B * a.N, a.B * a.N * a.D, [&](int64_t first, int64_t last) {
    const Scratch s(9, a.D);
    RowReader in[] = {{a.x, s.row(0)},     {a.branch, s.row(1)}, {a.gate, s.row(2)}, {a.shift, s.row(3)},
                      {a.scale, s.row(4)}, {a.weight, s.row(5)}, {a.bias, s.row(6)}};
    const auto row = a.rms ? forward_row<true> : forward_row<false>;
    for (int64_t t = first; t < last; ++t) row(a, t, t + 1 < last ? t + 1 : t, in, s.row(7), s.row(8));
    fence();
  });
}

void adaln_backward(const AdalnBackward& a) {
  const int64_t per_sample = chunks(a.N), rows = a.B * per_sample;
  parallel_ranges(rows, a.B * a.N * a.D, [&](int64_t first, int64_t last) {
    const Scratch s(kScratchRows, a.D);
    RowReader in[kReaders] = {{a.r, s.row(kR)},           {a.branch, s.row(kBranch)},
                              {a.gate, s.row(kGate)},     {a.scale, s.row(kScale)},
                              {a.weight, s.row(kWeight)}, {a.bias, s.row(kBias)},
                              {a.grad_y, s.row(kGradY)},  {a.grad_residual, s.row(kGradResidual)}};
    for (int64_t c = first; c < last; ++c) {
      for (int i = 0; i < 5; ++i)
        if (const ParamGrad* g = reduced(a, i))
          memset(g->partial + c * a.D, 0, static_cast<size_t>(a.D) * sizeof(float));
      const int64_t b = c / per_sample, begin = c % per_sample * kChunk;
      for (int64_t n = begin; n < begin + kChunk && n < a.N; ++n) backward_row(a, b, n, c, in, s);
    }
  });
  // Second stage: the chunks of a sample (or of all samples) in order.
  for (int i = 0; i < 5; ++i) {
    const ParamGrad* g = reduced(a, i);
    if (g == nullptr) continue;
    const int64_t outputs = g->reduce == kPerSample ? a.B : 1, terms = g->reduce == kPerSample ? per_sample : rows;
    parallel_ranges(outputs, outputs * terms * a.D, [&](int64_t first, int64_t last) {
      const Scratch s(1, a.D);
      for (int64_t o = first; o < last; ++o) {
        float* total = s.row(0);
        memset(total, 0, static_cast<size_t>(a.D) * sizeof(float));
        for (int64_t t = 0; t < terms; ++t) {
          const float* part = g->partial + (o * terms + t) * a.D;
          each(a.D, [&](int64_t i, auto k) { put(total, i, pick(total, i, k) + pick(part, i, k)); });
        }
        narrow(at(g->data, g->dtype, o * a.D), total, g->dtype, a.D, 1);
      }
    });
  }
}

}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
