// dot() and rounded_pair() of csrc/cpu/bf16_dot.h on operands of every kind, one "name operands... result" a line, all
// in hexadecimal bits, NaN as one pattern. tests/test_bf16_dot.py knows what they should be, and compares the
// instruction with its software body where a machine has both.
#include <cstdio>

#include "../../csrc/cpu/bf16_dot.h"

namespace probe = fastdiff::cpu::FASTDIFF_ISA;

static uint64_t state = 1;
static uint32_t random_bits() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<uint32_t>(state >> 32);
}
// A float: of any kind, near 1, near the subnormals, or special.
static uint32_t any_float() {
  static const uint32_t special[] = {0,          0x80000000, 0x7f800000, 0xff800000, 0x7fc00000, 0x00010000,
                                     0x807f0000, 0x00800000, 0x80800000, 0x7f7f0000, 0xff7fffff, 0x3f800000,
                                     0x3f808000, 0x3f818000, 0x007fffff, 0x7f7fffff};
  const uint32_t bits = random_bits();
  switch (random_bits() % 8) {
    case 0:
      return bits;
    case 1:
      return special[bits % 16];
    case 2:
      return (bits & 0x83ffffff) | (bits % 3 << 23);  // exponents that make subnormals
    case 3:
      return (bits & 0x807fffff) | (64u - 8 + bits % 16) << 23;  // whose products are about 2^-126
    default:
      return (bits & 0x807fffff) | (127u - 4 + bits % 9) << 23;
  }
}
static uint32_t printed(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return f != f ? 0x7fc00000 : bits;
}
static uint32_t quiet_half(uint32_t half) { return (half & 0x7fff) > 0x7f80 ? 0x7fc0 : half; }

int main() {
  constexpr int n = probe::kWidth;
  for (int round = 0; round < 16384 / n; ++round) {
    uint32_t a[n], b[n], c[n], high[n], low[n];
    for (int i = 0; i < n; ++i) {
      a[i] = (any_float() & 0xffff0000) | any_float() >> 16, b[i] = (any_float() & 0xffff0000) | any_float() >> 16;
      c[i] = any_float();
      if (random_bits() % 4 == 0) {  // an accumulator that cancels the first product, or nearly
        float x, y;
        const uint32_t bits[2] = {a[i] & 0xffff0000, b[i] & 0xffff0000};
        memcpy(&x, bits, 4), memcpy(&y, bits + 1, 4);
        x = -x * y;
        memcpy(c + i, &x, 4);
        c[i] ^= random_bits() & 1;
      }
      high[i] = any_float(), low[i] = any_float();
    }
    probe::vf acc, x, y;
    probe::vu p, q;
    memcpy(&acc, c, sizeof acc), memcpy(&p, a, sizeof p), memcpy(&q, b, sizeof q);
    memcpy(&x, low, sizeof x), memcpy(&y, high, sizeof y);
    probe::dot(acc, p, q);
    const probe::vu pair = probe::rounded_pair(x, y);
    for (int i = 0; i < n; ++i) {
      std::printf("dot %08x %08x %08x %08x\n", c[i], a[i], b[i], printed(acc[i]));
      std::printf("pair %08x %08x %04x%04x\n", low[i], high[i], quiet_half(pair[i] >> 16),
                  quiet_half(pair[i] & 0xffff));
    }
  }
}
