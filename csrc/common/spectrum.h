// How the CUDA kernels of `spectrum` divide an image between blocks: the host half, which also tells Python how much
// memory they need. From the sizes alone, so that an image's bits depend on nothing else.
#pragma once
#include <cstdint>

namespace fastdiff {
namespace {

// One axis: its transforms, from the integers of a plan (fastdiff/ops/spectrum.py: plan).
struct SpectrumAxis {
  int64_t n, span, buffers;  // length; numbers that the passes work on (Bluestein's length, or n); arrays of so many

  explicit SpectrumAxis(const int32_t* plan) : n(plan[0]), span(plan[1] ? plan[1] : plan[0]), buffers(plan[1] ? 2 : 1) {
    for (int32_t i = 0; i < plan[2]; ++i)
      if (plan[4 + i] > 8) buffers = 2;  // a direct sum does not work in place
  }
};

struct SpectrumLayout {
  static constexpr int64_t kShared = 99 << 10;  // bytes of shared memory that every GPU since sm_80 gives a block
  static constexpr int64_t kBlocks = 128;       // blocks that work in global memory, where shared does not do

  SpectrumAxis w, h;
  int64_t K;          // columns of the half spectrum, DC and Nyquist as one
  int64_t pairs;      // rows, two by two
  int64_t row_lanes;  // transforms of a block, along either axis
  int64_t lanes;
  bool fused;  // one block does an image
  bool shared_rows, shared_columns;

  static int64_t round_up(int64_t n) {  // to a power of two, 16 at most
    int64_t p = 1;
    while (p < n && p < 16) p *= 2;
    return p;
  }
  // Complex numbers of one array. Rows: lanes + 1 apart and one more after every eighth, against bank conflicts.
  static int64_t row_pitch(int64_t lanes) { return lanes > 1 ? lanes + 1 : 1; }
  static int64_t row_array(const SpectrumAxis& a, int64_t lanes) { return a.span * row_pitch(lanes) + a.span / 8 + 1; }
  static int64_t column_array(const SpectrumAxis& a, int64_t lanes) { return (a.span * lanes + 1) / 2 * 2; }

  int64_t row_bytes(int64_t l) const { return 8 * w.buffers * row_array(w, l); }
  int64_t column_bytes(int64_t l) const { return 8 * h.buffers * column_array(h, l); }

  SpectrumLayout(const int32_t* plan_w, const int32_t* plan_h)
      : w(plan_w), h(plan_h), K((w.n + 1) / 2), pairs((h.n + 1) / 2) {
    row_lanes = round_up(pairs), lanes = round_up(K);
    while (row_lanes > 1 && row_bytes(row_lanes) > kShared) row_lanes /= 2;
    while (lanes > 1 && column_bytes(lanes) > kShared) lanes /= 2;
    shared_rows = row_bytes(row_lanes) <= kShared, shared_columns = column_bytes(lanes) <= kShared;
    if (!shared_rows) row_lanes = round_up(pairs < 4 ? pairs : 4);
    if (!shared_columns) lanes = round_up(K < 4 ? K : 4);
    fused = shared_rows && shared_columns && row_bytes(row_lanes) + column_bytes(K) <= kShared;
  }

  int64_t groups() const { return (K + lanes - 1) / lanes; }  // of columns
  // Columns whose part of a ring one thread adds up, and how many such parts a ring has.
  int64_t ring_columns() const { return lanes < 4 ? lanes : 4; }
  int64_t ring_parts() const { return (K + ring_columns() - 1) / ring_columns(); }
  int64_t row_groups() const { return (pairs + row_lanes - 1) / row_lanes; }
  // Blocks of the cluster that should do an image, 0: no cluster can.
  inline int64_t cluster() const;
  // Floats that a block needs in global memory.
  int64_t scratch() const {
    const int64_t rows = shared_rows ? 0 : row_bytes(row_lanes) / 4,
                  columns = shared_columns ? 0 : column_bytes(lanes) / 4;
    return ((rows > columns ? rows : columns) + 3) / 4 * 4;
  }
};

// How a cluster of `ranks` blocks divides an image: each owns `columns` columns, all in its shared memory, and
// transforms row_lanes pairs of rows at a time beside them.
struct SpectrumCluster {
  static constexpr int64_t kShared =
      227 << 10;  // bytes of shared memory that data-centre GPUs since sm_90 give a block

  int64_t ranks, columns, row_lanes, row_groups, column_bytes, bytes;

  SpectrumCluster(const SpectrumLayout& l, int64_t n) : ranks(n) {
    columns = (up(l.K, ranks) + 3) / 4 * 4;  // whole parts of rings; two columns are 16 bytes
    column_bytes = l.column_bytes(columns);
    const int64_t pairs = up(l.pairs, ranks);  // of a block
    for (int64_t most = 16;; most /= 2) {
      row_lanes = up(pairs, up(pairs, most));
      row_lanes += row_lanes > 1 ? row_lanes % 2 : 0;
      bytes = column_bytes + l.row_bytes(row_lanes);
      if (bytes <= kShared || most == 4) break;
    }
    row_groups = up(l.pairs, row_lanes);
  }
  bool fits() const { return bytes <= kShared; }

 private:
  static int64_t up(int64_t n, int64_t d) { return (n + d - 1) / d; }
};

// As many blocks as have sixteen columns each (128 bytes of a row), more where these would not fit.
inline int64_t SpectrumLayout::cluster() const {
  int64_t ranks = K >= 128 ? 8 : K >= 64 ? 4 : 2;
  while (ranks < 8 && !SpectrumCluster(*this, ranks).fits()) ranks *= 2;
  return shared_rows && shared_columns && SpectrumCluster(*this, ranks).fits() ? ranks : 0;
}

}  // namespace
}  // namespace fastdiff
