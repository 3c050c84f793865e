// What the paths of the blur share: its arguments, who serves a sample, what the adjoint does at the edges, tables.
#pragma once
#include "gaussian.cuh"

namespace fastdiff {
namespace cuda {
namespace {

constexpr int kMost = static_cast<int>(kBlurRadius);

struct Work : GaussianBlurBackward {
  bool several = false;  // launches of more than one path are made: each sample is taken by one
  bool sliding = false;  // the sliding path may be among them
};

// A sample goes to the one launch where it can, then to the sliding path (gaussian_sliding.cuh), else to direct sums.
FD_D bool is_small(const Axis& y, const Axis& x) { return y.reach <= kMost && x.reach <= kMost; }
FD_D bool is_sliding(const Work& a, const Axis& y, const Axis& x) {
  return a.sliding && !y.bad && !x.bad && slide_range(y.sigma) && slide_range(x.sigma);
}

// How a pass treats the edges: the border that fills the halo, and what the adjoint does besides.
struct Edges {
  int32_t border;
  bool reflect, replicate;  // of the adjoint
  FD_D Edges(int32_t given, bool adjoint)
      : border(adjoint && given == kReplicate ? static_cast<int32_t>(kConstant) : given),
        reflect(adjoint && given == kReflect),
        replicate(adjoint && given == kReplicate) {}
  FD_D float doubled(int64_t i, int64_t n) const { return reflect && (i == 0 || i == n - 1) ? 2.0f : 1.0f; }
  FD_D float halved(int64_t i, int64_t n) const {
    return reflect && (i == 0 || i == n - 1) && !FD_MUTATED(kEdgeHalf) ? 0.5f : 1.0f;
  }
};

FD_D char* plane_of(const Strided& t, int64_t b, int64_t c) {
  return static_cast<char*>(t.data) + (b * t.s[0] + c * t.s[1]) * size_any(t.dtype);
}

// A sample's tables, in Work::sums: e and q [2 axes][2][entries] doubles, then floats [2 axes][3][entries]: taps
// k >= 0, their derivatives, tails. Those of the sliding path come after those of all samples.
FD_HD int64_t samples_of(const Work& a) { return a.sigma_stride == 0 ? 1 : a.B; }
FD_D double* sums_of(const Work& a, int64_t b) {
  return a.sums + (a.sigma_stride == 0 ? 0 : b) * 7 * fold_entries(a.H, a.W);
}
FD_D const float* table_of(const Work& a, int64_t b, bool along_x) {
  const int64_t n = fold_entries(a.H, a.W);
  return reinterpret_cast<const float*>(sums_of(a, b) + 4 * n) + (along_x ? 3 * n : 0);
}
FD_D float* slide_table_of(const Work& a, int64_t b, bool along_x) {
  const int64_t first = (samples_of(a) * 7 * fold_entries(a.H, a.W) + 1) / 2 * 2;  // aligned to 16 bytes
  return reinterpret_cast<float*>(a.sums + first) +
         ((a.sigma_stride == 0 ? 0 : 2 * b) + (along_x ? 1 : 0)) * slide_floats(a.H, a.W);
}

}  // namespace
}  // namespace cuda
}  // namespace fastdiff
