// Sampler updates on CUDA: out = sum_i c_i t_i + noise * z + k * clamp(sum_i a_i t_i), coefficients per sample
// (common/update.h).
//
// Floor: each of the `count` terms [B, M] read once, out written once. One launch for any solver, with guidance, clamp
// and fresh noise folded in; eager code needs 8 to 12 launches and often a host read.
//
// Mapping. A thread owns vectors of 16 bytes and asks for all terms of a vector before it uses the first. When every
// coefficient is a number known to the host, they are resolved there and the batch is one long row. When some live in
// device memory (one per sample, or a table of them with the step's number beside it), a block serves one sample, its
// first thread resolves them in float64 into shared memory, and nothing travels to the host: the launch can be captured
// in a CUDA graph and replayed with new values. So do calls that draw noise (common/philox.h): a Philox block makes
// four normals, the vector's own. Every output element depends on one element of each term, so `out` may be a term, and
// the grid never shows in a result.
//
// Performance: not measured.
#include "../common/update.h"
#include "vec.cuh"

namespace fastdiff {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// c.data of any coefficient: the host cannot know it.
bool on_device(const Update& u) {
  if (u.draws) return true;  // the noise is the sample's own
  if (u.kind != kLinear) return u.alpha_bar.data != nullptr || u.alpha_bar_next.data != nullptr;
  for (int i = 0; i < u.count; ++i)
    if (u.c[i].data != nullptr) return true;
  return false;
}

// What a launch needs besides the tensors.
struct Plan {
  Terms terms;      // resolved, unless `per_sample`
  bool per_sample;  // resolve in the kernel
  int64_t blocks;   // blocks that share one sample
};

// A DDIM step has at most four terms. Said to the compiler, which else keeps all eight until the clamp.
template <int kTerms>
constexpr bool kMayClamp = kTerms <= 4;

// x0 = sum of a_i t_i; a term with a_i = 0 does not count, not even when it is infinite.
template <int kVec, int kTerms>
FD_D void data_estimate(const Update& u, const Terms& t, const float (&v)[kTerms][kVec], float (&x0)[kVec]) {
#pragma unroll
  for (int i = 0; i < kTerms; ++i) {
    if (i >= u.count || t.a[i] == 0) continue;
#pragma unroll
    for (int k = 0; k < kVec; ++k) x0[k] += t.a[i] * v[i][k];
  }
}

template <int kVec, int kTerms, bool kConst>
FD_D void read_terms(const Update& u, int64_t row, int64_t i, float (&v)[kTerms][kVec]) {
  Raw<kVec> raw[kTerms];
#pragma unroll
  for (int j = 0; j < kTerms; ++j)
    if (j < u.count)
      raw[j] = load<kVec, kConst>(row_of(const_cast<void*>(u.term[j]), u.term_dtype[j], row), i);
    else
      raw[j] = {};
#pragma unroll
  for (int j = 0; j < kTerms; ++j) widen(raw[j], u.term_dtype[j], v[j]);
}

// out += noise * z for elements i .. i + kVec - 1 of the sample.
template <int kVec>
FD_D void add_noise(const Terms& t, int64_t i, float (&out)[kVec]) {
  float z[4];
  if constexpr (kVec == 1) {
    normals(t.stream, static_cast<uint32_t>(i / 4), z);
    const int lane = FD_MUTATED(kNoiseLane) ? 0 : static_cast<int>(i & 3);
    out[0] += t.noise * (lane < 2 ? (lane == 0 ? z[0] : z[1]) : (lane == 2 ? z[2] : z[3]));
  } else {
#pragma unroll
    for (int j = 0; j < kVec; j += 4) {
      normals(t.stream, static_cast<uint32_t>((i + (FD_MUTATED(kNoiseBlock) ? 0 : j)) / 4), z);
#pragma unroll
      for (int k = 0; k < 4; ++k) out[j + k] += t.noise * z[k];
    }
  }
}

// kVec elements of one sample, from element i of the row that starts at element `row`.
template <bool kDraws>
struct Forward {
  static constexpr int kBlocks = kDraws ? 2 : 3;  // per multiprocessor at least, with up to four terms
  Update u;

  template <int kVec, int kTerms>
  FD_D void apply(const Terms& t, int64_t row, int64_t i) const {
    const bool clamped = kMayClamp<kTerms> && t.clamped;
    float v[kTerms][kVec], out[kVec] = {};
    read_terms<kVec, kTerms, false>(u, row, i, v);
#pragma unroll
    for (int j = 0; j < kTerms; ++j) {
      // In a clamped step x can be absent from the noise: its zero means "not there", also to an infinite x.
      if (j >= u.count || (j == 0 && clamped && t.c[0] == 0)) continue;
#pragma unroll
      for (int k = 0; k < kVec; ++k) out[k] += t.c[j] * v[j][k];
    }
    if constexpr (kDraws) add_noise<kVec>(t, i, out);
    if (clamped) {
      float x0[kVec] = {};
      data_estimate<kVec, kTerms>(u, t, v, x0);
#pragma unroll
      for (int k = 0; k < kVec; ++k) out[k] += t.k * clamp(x0[k], t.clip);
    }
    write(row_of(u.out, u.out_dtype, row), i, out);
  }
};

struct Backward {
  static constexpr int kBlocks = 3;
  UpdateBackward b;
  Update u;  // b.forward

  template <int kVec, int kTerms>
  FD_D void apply(const Terms& t, int64_t row, int64_t i) const {
    const bool clamped = kMayClamp<kTerms> && t.clamped;
    float grad[kVec], inside[kVec] = {};  // inside: the gradient of x0, zero where the clamp cut
    const Raw<kVec> raw = load<kVec, false>(row_of(const_cast<void*>(b.grad), b.grad_dtype, row), i);
    if (clamped) {
      float v[kTerms][kVec], x0[kVec] = {};
      read_terms<kVec, kTerms, false>(u, row, i, v);
      data_estimate<kVec, kTerms>(u, t, v, x0);
      widen(raw, b.grad_dtype, grad);
#pragma unroll
      for (int k = 0; k < kVec; ++k) inside[k] = x0[k] >= -t.clip && x0[k] <= t.clip ? t.k * grad[k] : 0.0f;
    } else {
      widen(raw, b.grad_dtype, grad);
    }
#pragma unroll
    for (int j = 0; j < kTerms; ++j) {
      if (j >= u.count || b.grad_term[j] == nullptr) continue;
      float g[kVec];
#pragma unroll
      for (int k = 0; k < kVec; ++k) g[k] = t.c[j] * grad[k];
      if (clamped && t.a[j] != 0) {
#pragma unroll
        for (int k = 0; k < kVec; ++k) g[k] += t.a[j] * inside[k];
      }
      write(row_of(b.grad_term[j], u.term_dtype[j], row), i, g);
    }
  }
};

template <typename Work, int kVec, int kTerms>
__global__ void __launch_bounds__(kThreads, kTerms <= 4 ? Work::kBlocks : Work::kBlocks - 1)
    elementwise(const Work work, const Plan plan) {
  FD_SHARED(Terms, resolved, 1);
  const Update& u = work.u;
  for (int64_t task = blockIdx.x; task < u.B * plan.blocks; task += gridDim.x) {
    const int64_t b = task / plan.blocks, part = task % plan.blocks;
    if (threadIdx.x == 0) resolved[0] = plan.per_sample ? resolve(u, b) : plan.terms;
    FD_BARRIER(kTermsBarrier);
    const int64_t step = plan.blocks * kThreads * kVec;
    for (int64_t i = (part * kThreads + threadIdx.x) * kVec; i < u.M; i += step) {
      if (i + kVec <= u.M) {
        work.template apply<kVec, kTerms>(resolved[0], b * u.M, i);
      } else if (!FD_MUTATED(kUpdateTail)) {
        for (int64_t e = i; e < u.M; ++e) work.template apply<1, kTerms>(resolved[0], b * u.M, e);
      }
    }
    FD_BARRIER(kTermsReuse);  // the next sample's coefficients go to the same place
  }
}

template <typename Work, int kVec>
void launch_vec(const Work& work, const Plan& plan, void* stream) {
  const unsigned int grid = grid_for(work.u.B * plan.blocks);
  if (work.u.count > 4) return FD_LAUNCH((elementwise<Work, kVec, kMaxTerms>), grid, kThreads, 0, stream, work, plan);
  FD_LAUNCH((elementwise<Work, kVec, 4>), grid, kThreads, 0, stream, work, plan);
}

// `tensors`: every tensor of the call, with its type.
template <typename Work>
void run(Work work, const View* tensors, int count, int device, void* stream) {
  Update& u = work.u;
  if (u.B * u.M == 0) return;
  const DeviceGuard guard(device);
  Plan plan = {};
  plan.per_sample = on_device(u);
  if (!plan.per_sample) {
    plan.terms = resolve(u, 0);
    u.M *= u.B, u.B = 1;
  }
  // Rows that start at a whole vector; what is left after the last one is done element by element.
  int vec = 8;
  for (int i = 0; i < count; ++i)
    if (tensors[i].data != nullptr && tensors[i].dtype == kF32) vec = 4;
  for (int i = 0; i < count; ++i) {
    View row = tensors[i];
    row.sb = u.B > 1 ? u.M : 0, row.sn = 0, row.sd = 1;
    if (!vectorizes(row, vec, vec)) vec = 1;
  }
  // Enough blocks to fill any GPU, not more: a block resolves its sample's coefficients once.
  constexpr int64_t kEnough = 4096;
  const int64_t span = static_cast<int64_t>(kThreads) * vec, pieces = (u.M + span - 1) / span;
  const int64_t wanted = plan.per_sample ? (kEnough + u.B - 1) / u.B : pieces;
  plan.blocks = wanted < pieces ? wanted : pieces;
  if (vec == 8)
    launch_vec<Work, 8>(work, plan, stream);
  else if (vec == 4)
    launch_vec<Work, 4>(work, plan, stream);
  else
    launch_vec<Work, 1>(work, plan, stream);
}

View tensor(const void* data, int32_t dtype) {
  View v;
  v.data = const_cast<void*>(data), v.dtype = dtype;
  return v;
}

}  // namespace

void update(const Update& u, int device, void* stream) {
  View tensors[kMaxTerms + 1] = {tensor(u.out, u.out_dtype)};
  for (int i = 0; i < u.count; ++i) tensors[i + 1] = tensor(u.term[i], u.term_dtype[i]);
  if (u.draws)
    run(Forward<true>{u}, tensors, u.count + 1, device, stream);
  else
    run(Forward<false>{u}, tensors, u.count + 1, device, stream);
}

void update_backward(const UpdateBackward& b, int device, void* stream) {
  const Update& u = b.forward;
  const bool clamped = u.kind == kDdim && u.clip >= 0;  // only then are the terms read
  View tensors[2 * kMaxTerms + 1] = {tensor(b.grad, b.grad_dtype)};
  int count = 1;
  for (int i = 0; i < u.count; ++i) {
    tensors[count++] = tensor(b.grad_term[i], u.term_dtype[i]);
    if (clamped) tensors[count++] = tensor(u.term[i], u.term_dtype[i]);
  }
  run(Backward{b, u}, tensors, count, device, stream);
}

}  // namespace cuda
}  // namespace fastdiff
