// The whole native API of fastdiff: one declaration per kernel, raw pointers, no torch, no Python.
//
// Every kernel exists twice: `cpu::name` (csrc/cpu, compiled once per instruction set and picked at run time) and
// `cuda::name` (csrc/cuda, enqueued on `stream`). Arguments are validated above this line, in fastdiff/ops; the native
// side may assume that shapes, dtypes and pointers agree. Outputs and workspaces belong to the caller.
#pragma once
#include <cstdint>

namespace fastdiff {

enum Dtype : int32_t { kF32 = 0, kF16 = 1, kBF16 = 2, kF64 = 3 };  // kF64: per-sample coefficients only

// One operand read or written as [B, N, D]. Strides are in elements; 0 along an axis that is broadcast.
// data == nullptr means the operand is absent.
struct View {
  void* data = nullptr;
  int64_t sb = 0, sn = 0, sd = 0;
  int32_t dtype = kF32;
};

// residual = x + gate * branch                      (skipped when gate is absent: residual = x)
// y = norm(residual) * weight + bias                (norm skipped when scale is absent)
// y = y * (1 + scale) + shift
struct AdalnForward {
  int64_t B = 0, N = 0, D = 0;
  int32_t rms = 0;        // 0: LayerNorm (biased variance), 1: RMSNorm
  float eps = 0;          // added to the variance / mean square
  View x;                 // [B, N, D]
  View branch, gate;      // [B, N, D]; gate broadcasts
  View shift, scale;      // [B, N, D], broadcast
  View weight, bias;      // [D] (sb = sn = 0), each may be absent
  View residual;          // out [B, N, D], dtype of x; present exactly when gate is
  View y;                 // out [B, N, D], dtype of x; present exactly when scale is
  float* mean = nullptr;  // out [B, N] or null; zeros for RMSNorm
  float* rstd = nullptr;  // out [B, N] or null
};

// Where the gradient of a broadcast operand goes.
enum Reduce : int32_t { kAbsent = 0, kPerToken = 1, kPerSample = 2, kShared = 3 };
struct ParamGrad {
  void* data = nullptr;  // out: [B, N, D] per token, [B, D] per sample, [D] shared; contiguous
  int32_t dtype = kF32;
  int32_t reduce = kAbsent;
  float* partial = nullptr;  // workspace [B, chunks, D] for the two-stage sum (per sample, shared)
};

// Rows of one sample are summed in chunks of this many tokens, then the chunks in order: the same additions in the
// same order whatever the batch, the thread count or the grid, hence bitwise repeatable and batch-invariant.
constexpr int64_t kChunk = 16;
static constexpr int64_t chunks(int64_t N) { return (N + kChunk - 1) / kChunk; }

struct AdalnBackward {
  int64_t B = 0, N = 0, D = 0;
  int32_t rms = 0;
  View r;                           // [B, N, D] what was normalised: x, or the residual of the forward pass
  View branch, gate;                // as in the forward pass
  View scale, weight, bias;         // as in the forward pass
  View grad_y;                      // [B, N, D], absent when only gate*branch was applied
  View grad_residual;               // [B, N, D] or absent
  const float* mean = nullptr;      // [B, N], null when grad_y is absent
  const float* rstd = nullptr;      // [B, N]
  View dx;                          // out [B, N, D] or absent
  View dbranch;                     // out [B, N, D] or absent
  ParamGrad dgate, dshift, dscale;  // out
  ParamGrad dweight, dbias;         // out, reduce is kAbsent or kShared
};

// A step-constant number: `value`, or entry b of `data` [B] (f32 or f64, on the device of the tensors).
struct Coefficient {
  double value = 0;
  const void* data = nullptr;
  int32_t dtype = kF32;
};

enum Prediction : int32_t { kEpsilon = 0, kV = 1, kSample = 2, kFlow = 3 };
enum UpdateKind : int32_t { kLinear = 0, kDdim = 1 };
constexpr int kMaxTerms = 8;

// out[b, :] = sum_i c_i[b] * term_i[b, :]                                                       (kLinear)
// out[b, :] = one DDIM step of terms x, pred, [uncond], [noise]; see common/update.h            (kDdim)
struct Update {
  int64_t B = 0, M = 0;  // every tensor is [B, M], rows contiguous and adjacent
  int32_t kind = kLinear;
  int32_t count = 0;                 // number of terms, 1..kMaxTerms
  const void* term[kMaxTerms] = {};  // [B, M]
  int32_t term_dtype[kMaxTerms] = {};
  void* out = nullptr;  // out [B, M]; may be one of the terms
  int32_t out_dtype = kF32;
  Coefficient c[kMaxTerms];               // kLinear
  Coefficient alpha_bar, alpha_bar_next;  // kDdim, from here on
  int32_t prediction = kEpsilon;
  int32_t has_uncond = 0, has_noise = 0;
  double eta = 0, guidance = 1;
  double clip = -1;  // x0 is clamped to [-clip, clip]; negative: not clamped
};

// grad_i[b, :] = d out / d term_i * grad[b, :]; the clamp's derivative is 1 inside and on its bounds, else 0.
struct UpdateBackward {
  Update forward;              // `out` is ignored; terms are read only when clip >= 0
  const void* grad = nullptr;  // [B, M]
  int32_t grad_dtype = kF32;
  void* grad_term[kMaxTerms] = {};  // out [B, M] each, null where not wanted; dtype term_dtype[i]
};

namespace cpu {
void adaln_forward(const AdalnForward& a);
void adaln_backward(const AdalnBackward& a);
void update(const Update& a);
void update_backward(const UpdateBackward& a);

// Instruction sets compiled into this library that this machine can run, slowest first, and the one in use.
int isa_count();
const char* isa_name(int i);
const char* isa_current();
bool isa_select(const char* name);  // false: unknown here, nothing changed
}  // namespace cpu

#ifdef FASTDIFF_CUDA
// Throw std::runtime_error when the launch fails. `device` is made current for the call and restored.
namespace cuda {
void adaln_forward(const AdalnForward& a, int device, void* stream);
void adaln_backward(const AdalnBackward& a, int device, void* stream);
void update(const Update& a, int device, void* stream);
void update_backward(const UpdateBackward& a, int device, void* stream);
}  // namespace cuda
#endif

}  // namespace fastdiff
