// The table of CPU kernels. Every kernel file in this folder is compiled once per instruction set, with FASTDIFF_ISA
// naming the set (base, avx2, avx512), and defines its kernels in namespace fastdiff::cpu::<isa>; helpers sit in
// anonymous namespaces so that no weak symbol of a wide build can end up in a narrow one. dispatch.cpp picks at run
// time.
#pragma once
#include "../fastdiff.h"

// name, argument type: one line per kernel, and all that dispatch.cpp and the tables need to know of it.
#define FD_CPU_KERNELS(X)          \
  X(adaln_forward, AdalnForward)   \
  X(adaln_backward, AdalnBackward) \
  X(update, Update)                \
  X(update_backward, UpdateBackward)
