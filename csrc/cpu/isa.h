// The table of CPU kernels. Every kernel file in this folder is compiled once per instruction set, with FASTDIFF_ISA
// naming the set (base, avx2, avx512), and defines its kernels in namespace fastdiff::cpu::<isa>; helpers sit in
// anonymous namespaces so that no weak symbol of a wide build can end up in a narrow one. dispatch.cpp picks at run
// time. avx512_bf16 is avx512 but for the kernels that gain from the dot product of bf16 pairs, FD_BF16_KERNELS, which
// have files of their own.
#pragma once
#include "../fastdiff.h"

// name, argument type: one line per kernel, and all that dispatch.cpp and the tables need to know of it.
#define FD_ADALN_KERNELS(X)      \
  X(adaln_forward, AdalnForward) \
  X(adaln_backward, AdalnBackward)

#define FD_UPDATE_KERNELS(X) \
  X(update, Update)          \
  X(update_backward, UpdateBackward)

#define FD_GELU_KERNELS(X) \
  X(gelu_forward, Gelu)    \
  X(gelu_backward, Gelu)

#define FD_ATTENTION_KERNELS(X)          \
  X(attention_forward, AttentionForward) \
  X(attention_backward, AttentionBackward)

#define FD_SCAN_KERNELS(X) \
  X(selective_scan, Scan)  \
  X(selective_scan_backward, ScanBackward)

#define FD_CONV_KERNELS(X)       \
  X(causal_conv1d, CausalConv1d) \
  X(causal_conv1d_backward, CausalConv1dBackward)

#define FD_GAUSSIAN_KERNELS(X)                    \
  X(gaussian_blur, GaussianBlur)                  \
  X(gaussian_blur_backward, GaussianBlurBackward) \
  X(box_mask, BoxMask)                            \
  X(box_mask_backward, BoxMaskBackward)           \
  X(gaussian_blend, GaussianBlend)                \
  X(gaussian_blend_backward, GaussianBlendBackward)

#define FD_SPECTRUM_KERNELS(X) \
  X(spectrum, Spectrum)        \
  X(spectrum_backward, SpectrumBackward)

#define FD_BF16_KERNELS(X) X(attention_forward, AttentionForward)

#define FD_CPU_KERNELS(X) \
  FD_ADALN_KERNELS(X)     \
  FD_UPDATE_KERNELS(X)    \
  FD_GELU_KERNELS(X)      \
  FD_ATTENTION_KERNELS(X) \
  FD_SCAN_KERNELS(X)      \
  FD_CONV_KERNELS(X)      \
  FD_GAUSSIAN_KERNELS(X)  \
  FD_SPECTRUM_KERNELS(X)
