// Picks the instruction set: the widest this machine has, or what FASTDIFF_ISA in the environment names.
#include <cstdlib>
#include <cstring>

#include "isa.h"

namespace fastdiff {
namespace cpu {

#define FD_DECLARE(name, Args) void name(const Args&);
namespace base {
FD_CPU_KERNELS(FD_DECLARE)
}
#ifdef FASTDIFF_X86
namespace avx2 {
FD_CPU_KERNELS(FD_DECLARE)
}
namespace avx512 {
FD_CPU_KERNELS(FD_DECLARE)
}
#endif
// Here a name that is not declared is found in the set that the directive names.
#ifdef FASTDIFF_BF16
namespace avx512_bf16 {
using namespace avx512;
FD_BF16_KERNELS(FD_DECLARE)
}  // namespace avx512_bf16
#endif
#ifdef FASTDIFF_SOFT_BF16
namespace soft_bf16 {
using namespace base;
FD_BF16_KERNELS(FD_DECLARE)
}  // namespace soft_bf16
#endif
#ifdef FASTDIFF_SOFT_BF16_WIDE
namespace soft_bf16_wide {
using namespace base;
FD_BF16_KERNELS(FD_DECLARE)
}  // namespace soft_bf16_wide
#endif
#undef FD_DECLARE

namespace {

struct Kernels {
  const char* isa;
#define FD_MEMBER(name, Args) void (*name)(const Args&);
  FD_CPU_KERNELS(FD_MEMBER)
#undef FD_MEMBER
};

#define FD_ENTRY(name, Args) FD_NAMESPACE::name,
const Kernels kTables[] = {
#define FD_NAMESPACE base
    {"base", FD_CPU_KERNELS(FD_ENTRY)},
#undef FD_NAMESPACE
#ifdef FASTDIFF_X86
#define FD_NAMESPACE avx2
    {"avx2", FD_CPU_KERNELS(FD_ENTRY)},
#undef FD_NAMESPACE
#define FD_NAMESPACE avx512
    {"avx512", FD_CPU_KERNELS(FD_ENTRY)},
#undef FD_NAMESPACE
#endif
#ifdef FASTDIFF_BF16
#define FD_NAMESPACE avx512_bf16
    {"avx512_bf16", FD_CPU_KERNELS(FD_ENTRY)},
#undef FD_NAMESPACE
#endif
// Tests only (csrc/emu/emu.cmake): the kernels of avx512_bf16 over a body of its instruction.
#ifdef FASTDIFF_SOFT_BF16
#define FD_NAMESPACE soft_bf16
    {"soft_bf16", FD_CPU_KERNELS(FD_ENTRY)},
#undef FD_NAMESPACE
#endif
#ifdef FASTDIFF_SOFT_BF16_WIDE
#define FD_NAMESPACE soft_bf16_wide
    {"soft_bf16_wide", FD_CPU_KERNELS(FD_ENTRY)},
#undef FD_NAMESPACE
#endif
};
#undef FD_ENTRY

#if defined(FASTDIFF_X86) || defined(FASTDIFF_SOFT_BF16_WIDE)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

// How many of kTables, from the first on, this machine can run.
int supported() {
  int n = 1;
#if defined(FASTDIFF_X86)
  n += has_avx2() + has_avx512();
#if defined(FASTDIFF_BF16)
  n += has_avx512() && __builtin_cpu_supports("avx512bf16");
#endif
#endif
#if defined(FASTDIFF_SOFT_BF16)
  ++n;
#endif
#if defined(FASTDIFF_SOFT_BF16_WIDE)
  n += has_avx512();
#endif
  return n;
}

const Kernels* find(const char* name) {
  for (int i = 0; i < supported(); ++i)
    if (std::strcmp(kTables[i].isa, name) == 0) return &kTables[i];
  return nullptr;
}

const Kernels* initial() {
  const char* wanted = std::getenv("FASTDIFF_ISA");
  const Kernels* found = wanted ? find(wanted) : nullptr;
  return found ? found : &kTables[supported() - 1];
}

const Kernels* current = initial();

}  // namespace

#define FD_FORWARD(name, Args) \
  void name(const Args& a) { current->name(a); }
FD_CPU_KERNELS(FD_FORWARD)
#undef FD_FORWARD

int isa_count() { return supported(); }
const char* isa_name(int i) { return kTables[i].isa; }
const char* isa_current() { return current->isa; }
bool isa_select(const char* name) {
  const Kernels* found = find(name);
  if (found) current = found;
  return found != nullptr;
}

}  // namespace cpu
}  // namespace fastdiff
