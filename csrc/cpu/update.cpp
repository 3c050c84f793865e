// Sampler updates: out = sum_i c_i t_i + k * clamp(sum_i a_i t_i), coefficients per sample (common/update.h).
//
// Noise to be drawn (noise.h) is made a block at a time and added like one more term.
//
// Floor: every term read once, out written once. Up to four terms of one type (every explicit solver step with
// guidance, clamped or not), and any number of float32 that are not clamped, go through one loop with no intermediate;
// anything else through blocks that stay in L1, widened to float32 where needed.
#include "../common/update.h"

#include <type_traits>

#include "isa.h"
#include "noise.h"
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

// Noise of elements begin .. begin + n - 1 of a sample; begin is a multiple of 4. `z` has room for a whole block.
inline void draw(float* z, const Stream& s, int64_t begin, int64_t n) {
  for (int64_t i = 0; i < n; i += 4 * kDrawn) draw_blocks(z + i, s, static_cast<uint32_t>((begin + i) / 4));
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
    for (; i + kWidth <= n; i += kWidth) store(acc + i, madd(vc, load(t + i), load(acc + i)));
    for (; i < n; ++i) acc[i] = madd(c, t[i], acc[i]);
  }
}

inline vf clamped(vf v, float bound) {  // NaN passes
  const vf low = v < -splat(bound) ? -splat(bound) : v;
  return low > splat(bound) ? splat(bound) : low;
}
inline float clamped(float v, float bound) { return fastdiff::clamp(v, bound); }

// K terms and the output of one type: one loop, nothing between memory and registers.
template <int K, bool kClamped, typename T, typename Out>
inline void uniform(Out out, const void* const* terms, const Terms& u, int64_t n) {
  const T* t[K];
  for (int j = 0; j < K; ++j) t[j] = static_cast<const T*>(terms[j]);
  const bool no_c = kClamped && u.c[0] == 0, no_a = u.a[0] == 0;  // see accumulate
  const auto step = [&](int64_t i, auto kind) {
    const auto x = pick(t[0], i, kind);
    const decltype(kind) zero = {};
    auto v = no_c ? zero : u.c[0] * x;
    auto x0 = no_a ? zero : u.a[0] * x;
    for (int j = 1; j < K; ++j) {
      const auto w = pick(t[j], i, kind);
      v = madd(zero + u.c[j], w, v);
      if (kClamped && u.a[j] != 0) x0 = madd(zero + u.a[j], w, x0);
    }
    if (kClamped) v += u.k * clamped(x0, u.clip);
    put(out, i, v);
  };
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) step(i, vf{});
  for (; i < n; ++i) step(i, 0.0f);
}

template <bool kClamped, typename T, typename Out>
inline bool uniform_of(int count, Out out, const void* const* t, const Terms& u, int64_t n) {
  switch (count) {
    case 1:
      return uniform<1, kClamped, T>(out, t, u, n), true;
    case 2:
      return uniform<2, kClamped, T>(out, t, u, n), true;
    case 3:
      return uniform<3, kClamped, T>(out, t, u, n), true;
    case 4:
      return uniform<4, kClamped, T>(out, t, u, n), true;
  }
  if constexpr (!kClamped && std::is_same<T, float>::value) switch (count) {
      case 5:
        return uniform<5, false, T>(out, t, u, n), true;
      case 6:
        return uniform<6, false, T>(out, t, u, n), true;
      case 7:
        return uniform<7, false, T>(out, t, u, n), true;
      case 8:
        return uniform<8, false, T>(out, t, u, n), true;
    }
  return false;
}

template <typename T, typename Out>
inline bool uniform_as(const Update& u, const Terms& terms, Out out, int64_t begin, int64_t n) {
  const void* t[kMaxTerms];
  for (int i = 0; i < u.count; ++i) t[i] = static_cast<const T*>(u.term[i]) + begin;
  return terms.clamped ? uniform_of<true, T>(u.count, out, t, terms, n)
                       : uniform_of<false, T>(u.count, out, t, terms, n);
}

// Written around the caches (vec.h), unless the output is one of the terms, whose lines are here already.
inline bool streams(const Update& u) {
  for (int i = 0; i < u.count; ++i)
    if (u.term[i] == u.out) return false;
  return worth_streaming(u.B * u.M * 4);
}

// Float32 all through, with noise to be drawn: block by block, the noise being one more term of the one loop.
template <typename Out>
inline void uniform_drawn(const Update& u, const Terms& terms, Out out, int64_t row, int64_t begin, int64_t end) {
  alignas(64) float z[kBlock];
  Terms with = terms;
  with.c[u.count] = terms.noise, with.a[u.count] = 0;
  for (int64_t at0 = begin; at0 < end; at0 += kBlock) {
    const int64_t n = end - at0 < kBlock ? end - at0 : kBlock;
    draw(z, terms.stream, at0, n);
    const void* t[kMaxTerms];
    for (int i = 0; i < u.count; ++i) t[i] = static_cast<const float*>(u.term[i]) + row + at0;
    t[u.count] = z;
    if (terms.clamped)
      uniform_of<true, float>(u.count + 1, out + (at0 - begin), t, with, n);
    else
      uniform_of<false, float>(u.count + 1, out + (at0 - begin), t, with, n);
  }
}

// One range [begin, end) of one sample whose row starts at element `row`.
inline void update_range(const Update& u, const Terms& terms, int64_t row, int64_t begin, int64_t end) {
  // Noise is a float32 term more.
  bool same = !u.draws || (u.out_dtype == kF32 && u.count < (terms.clamped ? 4 : kMaxTerms));
  for (int i = 0; i < u.count; ++i) same = same && u.term_dtype[i] == u.out_dtype;
  if (same) {
    const int64_t first = row + begin, n = end - begin;
    char* out = at(u.out, u.out_dtype, first);
    if (u.out_dtype == kF32) {
      auto* p = reinterpret_cast<float*>(out);
      if (u.draws) return uniform_drawn(u, terms, p, row, begin, end);
      if (streams(u) && can_stream(p)) {
        if (uniform_as<float>(u, terms, Streamed{p}, first, n)) return fence();
      } else if (uniform_as<float>(u, terms, p, first, n)) {
        return;
      }
    } else if (u.out_dtype == kF16) {
      if (uniform_as<f16>(u, terms, reinterpret_cast<f16*>(out), first, n)) return;
    } else {
      if (uniform_as<bf16>(u, terms, reinterpret_cast<bf16*>(out), first, n)) return;
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
    if (u.draws) {
      draw(scratch, terms.stream, at0, n);
      accumulate(acc, scratch, terms.noise, n, false);
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
