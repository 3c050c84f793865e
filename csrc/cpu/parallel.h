// Threads. OpenMP through the libgomp that torch already loaded (never a second runtime), so torch.set_num_threads
// holds here too. Tasks write disjoint outputs and never depend on how many threads share them.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif
#include <cstdint>

namespace fastdiff {
namespace cpu {
namespace FASTDIFF_ISA {
namespace {

// Below this many elements touched, waking a second thread costs more than it saves (a passive OpenMP team takes
// tens of microseconds to wake, one core moves this much in about ten).
constexpr int64_t kGrain = 1 << 17;

// body(begin, end) over [0, count), one contiguous range per thread.
template <typename Body>
inline void parallel_ranges(int64_t count, int64_t elements, const Body& body) {
#ifdef _OPENMP
  if (elements >= kGrain && count > 1 && omp_get_max_threads() > 1 && !omp_in_parallel()) {
#pragma omp parallel
    {
      const int64_t threads = omp_get_num_threads(), id = omp_get_thread_num();
      const int64_t begin = count * id / threads, end = count * (id + 1) / threads;
      if (begin < end) body(begin, end);
    }
    return;
  }
#else
  (void)elements;
#endif
  if (count > 0) body(0, count);
}

// body(id, begin, end) over [0, count) on at most `threads` threads, one contiguous range each: for work that needs
// memory of its own, of which there is room for so many.
template <typename Body>
inline void on_threads(int64_t count, int64_t threads, int64_t elements, const Body& body) {
#ifdef _OPENMP
  if (threads > omp_get_max_threads()) threads = omp_get_max_threads();
  if (threads > count) threads = count;
  if (threads > 1 && elements >= kGrain && !omp_in_parallel()) {
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
      const int64_t all = omp_get_num_threads(), id = omp_get_thread_num();
      const int64_t begin = count * id / all, end = count * (id + 1) / all;
      if (begin < end) body(id, begin, end);
    }
    return;
  }
#else
  (void)threads, (void)elements;
#endif
  if (count > 0) body(0, 0, count);
}

}  // namespace
}  // namespace FASTDIFF_ISA
}  // namespace cpu
}  // namespace fastdiff
