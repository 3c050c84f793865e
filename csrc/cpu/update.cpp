// Sampler updates: out = sum_i c_i t_i + k * clamp(sum_i a_i t_i), coefficients per sample (common/update.h).
//
// Floor: every term read once, out written once. Rows are cut into blocks that stay in L1; float32 terms are read in
// place, others are widened block by block. Up to four float32 terms without a clamp (every explicit solver step with
// guidance) go through one loop with no intermediate.
#include "../common/update.h"

#include "isa.h"
#include "parallel.h"
#include "vec.h"

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // floats: term, accumulator and x0 blocks together fill a third of a 48 KB L1

// The block's values of a term as floats: in place when it already is float32, else widened into `scratch`.
inline const float* block_of(const void* term, int32_t dtype, int64_t offset, int64_t n, float* scratch) {
  if (dtype == kF32) return static_cast<const float*>(term) + offset;
  widen(scratch, at(const_cast<void*>(term), dtype, offset), dtype, n, 1);
  return scratch;
}

// acc (+)= c * t. In a clamped step the first term, x, can be absent from the data or from the noise: its zero then
// means "not there", and an infinite x must not turn into NaN.
inline void accumulate(float* acc, const float* t, float c, int64_t n, bool first, bool zero_is_absent = false) {
  const vf vc = splat(c);
  int64_t i = 0;
  if (first && zero_is_absent && c == 0) {
    memset(acc, 0, static_cast<size_t>(n) * sizeof(float));
  } else if (first) {
    for (; i + kWidth <= n; i += kWidth) store(acc + i, vc * load(t + i));
    for (; i < n; ++i) acc[i] = c * t[i];
  } else {
    for (; i + kWidth <= n; i += kWidth) store(acc + i, load(acc + i) + vc * load(t + i));
    for (; i < n; ++i) acc[i] += c * t[i];
  }
}

template <int K>
inline void linear_f32(float* out, const float* const* t, const float* c, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    vf v = splat(c[0]) * load(t[0] + i);
    for (int j = 1; j < K; ++j) v += splat(c[j]) * load(t[j] + i);
    store(out + i, v);
  }
  for (; i < n; ++i) {
    float v = c[0] * t[0][i];
    for (int j = 1; j < K; ++j) v += c[j] * t[j][i];
    out[i] = v;
  }
}

// One range [begin, end) of one sample whose row starts at element `row`.
inline void update_range(const Update& u, const Terms& terms, int64_t row, int64_t begin, int64_t end) {
  bool plain = !terms.clamped && u.count <= 4 && u.out_dtype == kF32;
  const float* t[kMaxTerms];
  for (int i = 0; i < u.count; ++i) {
    plain = plain && u.term_dtype[i] == kF32;
    t[i] = static_cast<const float*>(u.term[i]) + row + begin;
  }
  if (plain) {
    float* out = static_cast<float*>(u.out) + row + begin;
    switch (u.count) {
      case 1:
        return linear_f32<1>(out, t, terms.c, end - begin);
      case 2:
        return linear_f32<2>(out, t, terms.c, end - begin);
      case 3:
        return linear_f32<3>(out, t, terms.c, end - begin);
      default:
        return linear_f32<4>(out, t, terms.c, end - begin);
    }
  }
  alignas(64) float scratch[kBlock], acc[kBlock], x0[kBlock];
  for (int64_t at0 = begin; at0 < end; at0 += kBlock) {
    const int64_t n = end - at0 < kBlock ? end - at0 : kBlock;
    for (int i = 0; i < u.count; ++i) {
      const float* v = block_of(u.term[i], u.term_dtype[i], row + at0, n, scratch);
      accumulate(acc, v, terms.c[i], n, i == 0, terms.clamped);
      if (terms.clamped && (i == 0 || terms.a[i] != 0)) accumulate(x0, v, terms.a[i], n, i == 0, true);
    }
    if (terms.clamped)
      for (int64_t i = 0; i < n; ++i) acc[i] += terms.k * fastdiff::clamp(x0[i], terms.clip);
    narrow(at(u.out, u.out_dtype, row + at0), acc, u.out_dtype, n, 1);
  }
}

inline void backward_range(const UpdateBackward& u, const Terms& terms, int64_t row, int64_t begin, int64_t end) {
  const Update& f = u.forward;
  alignas(64) float scratch[kBlock], grad[kBlock], x0[kBlock], inside[kBlock];
  for (int64_t at0 = begin; at0 < end; at0 += kBlock) {
    const int64_t n = end - at0 < kBlock ? end - at0 : kBlock;
    widen(grad, at(const_cast<void*>(u.grad), u.grad_dtype, row + at0), u.grad_dtype, n, 1);
    if (terms.clamped) {
      for (int i = 0; i < f.count; ++i)
        if (i == 0 || terms.a[i] != 0)
          accumulate(x0, block_of(f.term[i], f.term_dtype[i], row + at0, n, scratch), terms.a[i], n, i == 0, true);
      for (int64_t i = 0; i < n; ++i)
        inside[i] = x0[i] >= -terms.clip && x0[i] <= terms.clip ? terms.k * grad[i] : 0.0f;
    }
    for (int j = 0; j < f.count; ++j) {
      if (u.grad_term[j] == nullptr) continue;
      accumulate(scratch, grad, terms.c[j], n, true);
      if (terms.clamped && terms.a[j] != 0) accumulate(scratch, inside, terms.a[j], n, false);
      narrow(at(u.grad_term[j], f.term_dtype[j], row + at0), scratch, f.term_dtype[j], n, 1);
    }
  }
}

// Runs body(terms, row, begin, end) over every sample's row, cut into pieces so that one big sample also uses all
// threads. The cuts depend on M alone.
template <typename Body>
inline void over_rows(const Update& u, const Body& body) {
  constexpr int64_t kPiece = 16 * kBlock;
  const int64_t pieces = (u.M + kPiece - 1) / kPiece;
  parallel_ranges(u.B * pieces, u.B * u.M * (u.count + 1), [&](int64_t first, int64_t last) {
    int64_t resolved = -1;
    Terms terms;
    for (int64_t task = first; task < last; ++task) {
      const int64_t b = task / pieces, begin = task % pieces * kPiece;
      if (b != resolved) terms = resolve(u, b), resolved = b;
      body(terms, b * u.M, begin, begin + kPiece < u.M ? begin + kPiece : u.M);
    }
  });
}

}  // namespace

void update(const Update& u) {
  over_rows(u, [&](const Terms& t, int64_t row, int64_t begin, int64_t end) { update_range(u, t, row, begin, end); });
}

void update_backward(const UpdateBackward& u) {
  over_rows(u.forward,
            [&](const Terms& t, int64_t row, int64_t begin, int64_t end) { backward_range(u, t, row, begin, end); });
}

}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
