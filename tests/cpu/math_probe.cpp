// The vector functions of csrc/cpu/math.h against the C library in double precision, over floats of every kind: every
// 61st of the 2^32 bit patterns. Prints "name worst-error-in-ulp at", and "name EDGE ..." for a wrong NaN or infinity.
#include <cfloat>
#include <cstdio>

#include "../../csrc/cpu/math.h"

namespace probe = fastdiff::cpu::FASTDIFF_ISA;

template <typename Vector, typename Exact>
void check(const char* name, const Vector& vector, const Exact& exact) {
  double worst = 0;
  float at = 0;
  for (uint64_t bits = 0; bits < (1ull << 32); bits += 61 * probe::kWidth) {
    float x[probe::kWidth], y[probe::kWidth];
    for (int i = 0; i < probe::kWidth; ++i) {
      const uint32_t pattern = static_cast<uint32_t>(bits + 61 * i);
      memcpy(x + i, &pattern, 4);
    }
    probe::store(y, vector(probe::load(x)));
    for (int i = 0; i < probe::kWidth; ++i) {
      const double want = exact(static_cast<double>(x[i]));
      const float rounded = static_cast<float>(want);
      if (rounded != rounded || std::isinf(rounded)) {
        const bool same = rounded != rounded ? y[i] != y[i] : y[i] == rounded;
        if (!same) {
          std::printf("%s EDGE %a gives %a, not %a\n", name, x[i], y[i], rounded);
          return;
        }
        continue;
      }
      const double ulp = std::nextafterf(std::fabs(rounded), HUGE_VALF) - std::fabs(rounded);
      const double error = std::fabs(y[i] - want) / ulp;
      if (!(error <= worst)) worst = error, at = x[i];
    }
  }
  std::printf("%s %.3f %a\n", name, worst, at);
}

// x brought into the range of a function; NaN goes to its end.
static double inside(double x) { return x < -87 ? -87 : x < 87 ? x : 87; }
static probe::vf inside(probe::vf x) {
  const probe::vf limit = probe::splat(87.0f);
  return x < -limit ? -limit : x < limit ? x : limit;
}
static double exponent_at_most_125(double x) { return std::fabs(x) < 0x1p126 ? std::fabs(x) : 1; }
static probe::vf exponent_at_most_125(probe::vf x) {
  const probe::vf size = x < 0.0f ? -x : x;
  return size < 0x1p126f ? size : probe::splat(1.0f);
}

int main() {
  check("exp", [](probe::vf x) { return probe::exp(x); }, [](double x) { return std::exp(x); });
  check(
      "exp_inside", [](probe::vf x) { return probe::exp_inside(inside(x)); },
      [](double x) { return std::exp(inside(x)); });
  check(
      "exp_inside<-1>", [](probe::vf x) { return probe::exp_inside<-1>(inside(x)); },
      [](double x) { return std::exp(-inside(x)); });
  check(
      "log1p", [](probe::vf x) { return probe::log1p(x < 0.0f ? -x : x); },
      [](double x) { return std::log1p(std::fabs(x)); });
  check(
      "log1p_inside", [](probe::vf x) { return probe::log1p_inside(exponent_at_most_125(x)); },
      [](double x) { return std::log1p(exponent_at_most_125(x)); });
}
