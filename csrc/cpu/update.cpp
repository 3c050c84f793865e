// Sampler updates: out = sum_i c_i t_i + k * clamp(sum_i a_i t_i), coefficients per sample (common/update.h).
//
// Noise to be drawn (common/philox.h) is made a block at a time and added like one more term.
//
// Floor: every term read once, out written once. Up to four terms of one type (every explicit solver step with
// guidance, clamped or not) go through one loop with no intermediate; anything else through blocks that stay in L1,
// widened to float32 where needed.
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

// `normals` (common/philox.h) over many blocks at once, in loops that compilers turn into vectors: z[4 j + i] is word i
// of block first + j.
constexpr int kDrawn = 32;
inline void draw_blocks(float* z, const Stream& s, uint32_t first) {
  alignas(64) uint32_t c[4][kDrawn];
  for (int j = 0; j < kDrawn; ++j)
    c[0][j] = first + static_cast<uint32_t>(j), c[1][j] = s.sample, c[2][j] = s.offset[0], c[3][j] = s.offset[1];
  uint32_t k0 = s.key[0], k1 = s.key[1];
  for (int round = 0; round < 10; ++round) {
    for (int j = 0; j < kDrawn; ++j) {
      const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c[0][j], b = static_cast<uint64_t>(0xCD9E8D57u) * c[2][j];
      c[0][j] = static_cast<uint32_t>(b >> 32) ^ c[1][j] ^ k0, c[1][j] = static_cast<uint32_t>(b);
      c[2][j] = static_cast<uint32_t>(a >> 32) ^ c[3][j] ^ k1, c[3][j] = static_cast<uint32_t>(a);
    }
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  alignas(64) float flat[4][kDrawn];
  const int32_t* const table = &kNormalTable[0].c[0];
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < kDrawn; ++j) {
      const uint32_t word = c[i][j], v = word << 1 | 1u;
      // Leading zeros from the exponent of a float; without the bit below its leading one, v is not rounded up.
      const int32_t half = static_cast<int32_t>((v & ~(v >> 1)) >> 1);
      const int32_t zeros = 157 - static_cast<int32_t>(float_bits(static_cast<float>(half)) >> 23);
      const int32_t octave = zeros > 31 ? 31 : zeros;
      const uint32_t m = v << octave << 1;
      const int32_t row = octave * 64 + static_cast<int32_t>(m >> 28) * 4;
      const int32_t t = static_cast<int32_t>(m << 4 ^ 0x80000000u);
      int32_t q = table[row + 3];
      q = table[row + 2] + static_cast<int32_t>(static_cast<int64_t>(t) * q >> 32);
      q = table[row + 1] + static_cast<int32_t>(static_cast<int64_t>(t) * q >> 32);
      q = table[row] + static_cast<int32_t>(static_cast<int64_t>(t) * q >> 32);
      const int32_t sign = static_cast<int32_t>(word) >> 31;
      flat[i][j] = static_cast<float>((q ^ sign) - sign) * (1.0f / (1 << 28));
    }
  }
  for (int j = 0; j < kDrawn; ++j)
    for (int i = 0; i < 4; ++i) z[4 * j + i] = flat[i][j];
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
    for (; i + kWidth <= n; i += kWidth) store(acc + i, load(acc + i) + vc * load(t + i));
    for (; i < n; ++i) acc[i] += c * t[i];
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
    auto v = no_c ? decltype(x){} : u.c[0] * x;
    auto x0 = no_a ? decltype(x){} : u.a[0] * x;
    for (int j = 1; j < K; ++j) {
      const auto w = pick(t[j], i, kind);
      v += u.c[j] * w;
      if (kClamped && u.a[j] != 0) x0 += u.a[j] * w;
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
    default:
      return false;
  }
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
  bool same = !u.draws || u.out_dtype == kF32;
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
