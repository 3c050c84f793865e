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

// One operand with up to six axes; which they are is said where it is used. Strides in elements, 0 along an axis that
// is broadcast; data == nullptr means the operand is absent.
struct Strided {
  void* data = nullptr;
  int64_t s[6] = {};
  int32_t dtype = kF32;
};

// ------------------------------------------------------------------------------------------------------------- adaln

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

// ------------------------------------------------------------------------------------------------------------ update

// A step-constant number: `value`, or entry [row, b] of `data` [rows, B] (f32 or f64, on the device of the tensors),
// the row being Update::row.
struct Coefficient {
  double value = 0;
  const void* data = nullptr;
  int32_t dtype = kF32;
  int64_t row_stride = 0, sample_stride = 1;
};

// Where noise comes from: `value`, or {seed, offset} of sample b at `data` (common/philox.h).
struct Seed {
  int64_t value = 0;
  const int64_t* data = nullptr;  // [1], [2] or [B, 2], on the device of the tensors
  int32_t has_offset = 0;
  int32_t per_sample = 0;  // [B, 2]: every sample draws what sample 0 would
};

enum Prediction : int32_t { kEpsilon = 0, kV = 1, kSample = 2, kFlow = 3 };
enum UpdateKind : int32_t { kLinear = 0, kDdim = 1 };
constexpr int kMaxTerms = 8;

// out[b, :] = sum_i c_i[b] * term_i[b, :] [+ noise_scale[b] * noise]                            (kLinear)
// out[b, :] = one DDIM step of terms x, pred, [uncond], [noise]; see common/update.h            (kDdim)
// noise is drawn here from `seed` (draws), M <= 2^34, or, for kDdim, a term (has_noise), or absent.
struct Update {
  int64_t B = 0, M = 0;  // every tensor is [B, M], rows contiguous and adjacent
  int32_t kind = kLinear;
  int32_t count = 0;                 // number of terms, 1..kMaxTerms
  const void* term[kMaxTerms] = {};  // [B, M]
  int32_t term_dtype[kMaxTerms] = {};
  void* out = nullptr;  // out [B, M]; may be one of the terms
  int32_t out_dtype = kF32;
  const int64_t* row = nullptr;  // [1]: the row of the coefficients' tables; below 0 it means 0,
  int64_t rows = 1;              // from `rows` on the last; null: 0
  int32_t draws = 0;
  Seed seed;
  Coefficient c[kMaxTerms];               // kLinear
  Coefficient noise_scale;                // kLinear, where it draws
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

// -------------------------------------------------------------------------------------------------------------- gelu

// out = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3), the tanh form of GELU; or its derivative times grad.
struct Gelu {
  int64_t M = 0;
  const void* x = nullptr;     // [M]
  const void* grad = nullptr;  // [M], backward only
  void* out = nullptr;         // out [M]; may be x or grad
  int32_t dtype = kF32;        // of all three
};

// --------------------------------------------------------------------------------------------------------- attention

// out = softmax(scale q k^T) v per head. q_weight, k_weight: q and k first become x rsqrt(mean(x^2) + eps) weight;
// then, with cos and sin, x cos + partner(x) sin, the partner of (x1, x2) being (-x2, x1), for pairs (i, i + d/2) or,
// where interleaved, (2 i, 2 i + 1).
struct AttentionForward {
  int64_t B = 0, H = 0, N = 0, M = 0, d = 0;
  float scale = 0, eps = 0;
  int32_t interleaved = 0;
  Strided q;                                             // [B, H, N, d]
  Strided k, v;                                          // [B, H, M, d], M >= 1
  Strided out;                                           // out [B, H, N, d]
  const float *q_weight = nullptr, *k_weight = nullptr;  // [d] or null
  const float *cos = nullptr, *sin = nullptr;            // [N, d] or null; N == M then
  float* stats = nullptr;                                // out [B, H, N, 2] or null: m = max(log2(e) scores), and
                                                         // sum(2^(log2(e) scores - m))
  float* workspace = nullptr;                            // CPU: [slots, per_slot], see attention_workspace
  int64_t slots = 0, per_slot = 0;                       // CPU: at most `slots` threads take part
};

constexpr int64_t kAttentionChunk = 512;  // keys that a run of query tiles goes through together
constexpr int64_t kAttentionRun = 768;    // queries in such a run, at most

// Floats of workspace for one thread, on any instruction set: query tiles transposed and their results, chunks of k and
// v as float32, a tile of rows, of scores, and a row.
static constexpr int64_t attention_workspace(int64_t N, int64_t M, int64_t d) {
  const int64_t ld = (d + 15) / 16 * 16, padded = (N + 47) / 48 * 48;
  const int64_t held = padded < kAttentionRun ? padded : kAttentionRun,
                chunk = M < kAttentionChunk ? M : kAttentionChunk;
  return 2 * held * ld + 2 * held + 48 * ld + 64 * 48 + 2 * chunk * ld + ld;
}

struct AttentionBackward : AttentionForward {        // as it was, `out` and `stats` being its results
  Strided grad;                                      // [B, H, N, d]
  Strided dq, dk, dv;                                // out, shapes of q, k, v; each may be absent
  float *dq_weight = nullptr, *dk_weight = nullptr;  // out [d] or null
  float* partial = nullptr;                          // workspace [2, B H, d], null when neither is wanted; CUDA:
                                                     // [2 B H attention_parts(N) + 2 B H, d]
};

// On CUDA the forward pass needs no workspace and the backward pass [B, H, N] for sum(grad out) of every query. Rows
// are summed in parts of 16 for the weights' gradients. Larger head dims than this have no CUDA kernel.
static constexpr int64_t attention_parts(int64_t N) { return (N + 15) / 16; }
constexpr int64_t kAttentionHeadDim = 256;

constexpr int64_t kAttentionBackChunk = 256;  // keys whose gradients are summed together

// Likewise for the backward kernel: dq of a head in float32, chunks of k, v, dk and dv, tiles.
static constexpr int64_t attention_backward_workspace(int64_t N, int64_t M, int64_t d) {
  const int64_t ld = (d + 15) / 16 * 16, padded = (N + 47) / 48 * 48;
  const int64_t chunk = M < kAttentionBackChunk ? M : kAttentionBackChunk;
  return padded * ld + padded + 4 * 48 * ld + 2 * 64 * 48 + 4 * chunk * ld + 3 * 48 + 2 * ld;
}

// ---------------------------------------------------------------------------------------------------- selective scan

// Steps between two saved states, and channels that one task walks and sums dB and dC over.
constexpr int64_t kScanSteps = 32;
constexpr int64_t kScanChannels = 64;
constexpr int64_t kScanStates = 256;      // the most floats of state per channel that the kernels serve
constexpr int64_t kScanCudaStates = 128;  // and on CUDA
// Channels that one block walks and sums dB and dC over on CUDA, for `rows` = N (* 2).
static constexpr int64_t scan_cuda_channels(int64_t rows) { return rows <= 32 ? 32 : 8; }

// Segments that CUDA cuts L into where the tasks of one sample (K G ceil(D / G / scan_cuda_channels)) are few: at most
// 16, of at least four tiles, so that they can run side by side. The batch must not decide: it would show in the bits.
static constexpr int64_t scan_cuda_segments(int64_t L, int64_t tasks) {
  const int64_t tiles = (L + kScanSteps - 1) / kScanSteps, most = tiles / 4 < 16 ? tiles / 4 : 16;
  if (tasks > 16 || most < 4) return 1;
  const int64_t each = (tiles + most - 1) / most;
  return (tiles + each - 1) / each;
}

// K scans over the same input u, their outputs summed; for one scan K = 1. In direction k, channel d, state n:
//   t = delta + delta_bias, then softplus if asked for; a = exp(t A); h <- a h + t B u; y = <C, h> + skip u
// and out = (sum over k of y) * silu(z). A complex A makes h complex and y = 2 Re <C, h> + skip u; complex operands are
// pairs of floats on the last axis. The group of channel d is d / (D / G).
struct Scan {
  int64_t B = 0, K = 0, G = 0, L = 0, D = 0, N = 0;
  int32_t complex = 0, softplus = 0, reverse = 0;
  int32_t constant_b = 0, constant_c = 0;  // Bm, C do not depend on the step but on the channel
  int32_t threads = 1;                     // at most so many; `scratch` has room for no more
  int64_t scratch_size = 0;                // floats per thread, see scan_scratch, scan_backward_scratch
  float* scratch = nullptr;                // workspace [threads, scratch_size]
  Strided u;                               // [B, L, D]
  Strided delta;                           // [B, K, L, D]
  Strided A;                               // [K, D, N] or, complex, [K, D, N, 2]
  Strided Bm, C;                           // [B, K, G, L, N (, 2)]; constant: [K, D, N (, 2)]
  Strided skip, delta_bias;                // [K, D], each may be absent
  Strided z;                               // [B, L, D] or absent; K = 1
  Strided initial;                         // [B, K, D, N (, 2)] or absent: zeros
  const int64_t* order = nullptr;          // [K, L] or null: step i visits position order[k, i]
  const uint8_t* resets = nullptr;         // [B, L] or null: the state is zero before the step at a marked position
  Strided out;                             // out [B, L, D]; float32 where K > 1
  float* last = nullptr;                   // out [B, K, D, N (, 2)]
  float* states = nullptr;                 // out [B, K, ceil(L / kScanSteps), N (* 2), D] or null: every 32nd state
  float* partial_out = nullptr;            // CUDA: workspace [K, B L D] in the order of out's memory, null for K = 1;
                                           // threads and scratch are for the CPU
  float* carries = nullptr;                // CUDA: workspace [B, K, segments, 2 N (* 2) + 1, D], or null: segments are
                                           // taken one after the other
};

// Floats that one thread works in, forward and backward, for `rows` = N (* 2): per channel of a task A, constant B and
// C and the state, backward also the gradients of these and their sums over time; then B and C of a tile.
static constexpr int64_t scan_scratch(int64_t rows) { return (4 * kScanChannels + 2 * kScanSteps) * rows; }
// Besides: a state vector of up to 16 lanes, the states and sums over channels of a group of four in every step (up to
// 16 lanes each), nine tiles and eight floats for every channel, and lines to ask for (up to 16 lists of 264 pointers).
static constexpr int64_t scan_backward_scratch(int64_t rows) {
  return (10 * kScanChannels + 16 + 2 * kScanSteps) * rows + (4 * kScanSteps + 1) * 4 * 16 +
         (9 * kScanSteps + 8) * kScanChannels + 16 * 264 * 2;
}

struct ScanBackward : Scan {      // `out` and `last` are ignored, `states` is an input
  Strided grad_out;               // [B, L, D]
  Strided grad_last;              // [B, K, D, N (, 2)] or absent
  Strided du;                     // out [B, L, D]; float32 where K > 1
  Strided ddelta;                 // out [B, K, L, D]
  Strided dz;                     // out [B, L, D] or absent
  Strided dA;                     // out, as A; this and all below may be absent
  Strided dB, dC;                 // out, as Bm and C
  Strided dskip, dbias;           // out [K, D]
  Strided dinitial;               // out [B, K, D, N (, 2)]
  float* partial_rows = nullptr;  // workspace [B, K, rows, D]: N (* 2) rows of dA, then of dB and of dC where
                                  // these are constant, then one of dskip and one of ddelta_bias
  float* partial_b = nullptr;     // workspace [B, K, G, blocks, L, N (* 2)], blocks = ceil(D / G / kScanChannels),
  float* partial_c = nullptr;     // on CUDA / scan_cuda_channels; null where constant
  float* partial_du = nullptr;    // CUDA: workspace [K, B L D] in the order of du's memory, null for K = 1
};

// ---------------------------------------------------------------------------------------------------- causal conv1d

constexpr int64_t kConvCudaTaps = 128;  // the largest K that the CUDA kernels serve: what shared memory holds
constexpr int64_t kConvCudaSteps = 64;  // steps of a tile there

// out[b, d, t] = act(bias[d] + sum_k weight[d, k] * past[b, d, t + k]), past being `state` followed by x along t.
struct CausalConv1d {
  int64_t B = 0, D = 0, L = 0, K = 0;
  int32_t silu = 0;
  int32_t threads = 1;       // at most so many; `scratch` has room for no more
  int64_t scratch_size = 0;  // floats per thread, see conv_scratch
  Strided x;                 // [B, D, L]
  Strided weight;            // [D, K]
  Strided bias;              // [D], may be absent
  Strided state;             // [B, D, K - 1], zeros if absent
  Strided out;               // out [B, D, L]
  float* taps = nullptr;     // CPU: workspace [K + 1, D']: weights by tap, then bias; D' = D rounded up to 16
  float* scratch = nullptr;  // CPU: workspace [threads, scratch_size]
};

struct CausalConv1dBackward : CausalConv1d {  // without out
  Strided grad;                               // [B, D, L]
  Strided dx;                                 // out [B, D, L] or absent
  Strided dstate;                             // out [B, D, K - 1] or absent
  Strided dweight, dbias;                     // out [D, K], [D], each may be absent
  float* partial = nullptr;                   // workspace [B, K + 1, D']: sums over t; CUDA: [B, tiles, K + 1, D],
                                              // tiles = ceil(L / kConvCudaSteps); null if no sum is wanted
};

// ---------------------------------------------------------------------------------------------------------- gaussian

constexpr int32_t kU8 = 4;  // images of gaussian_blur only

enum Border : int32_t { kReflect = 0, kReplicate = 1, kConstant = 2, kCircular = 3, kSymmetric = 4 };

// Cosines that a wide Gaussian is made of (sliding path).
constexpr int kCosines = 6;

constexpr int64_t kMaxSupport = (int64_t{1} << 17) + 1;

#ifdef __CUDACC__
#define FD_CONSTEXPR static __host__ __device__ constexpr  // on the device too
#else
#define FD_CONSTEXPR static constexpr
#endif

// What the CUDA kernels make the taps of, on the device; the CPU kernels are given tables. Where a sigma in device
// memory is not finite, or its support exceeds kMaxSupport, the sample is NaN.
struct Sigma {
  const void* sigma = nullptr;  // [B] or [1] with sigma_stride 0, kF64 too; null: the numbers sigma_y and sigma_x
  int32_t sigma_dtype = kF64;
  int64_t sigma_stride = 0;
  double sigma_y = 0, sigma_x = 0;
  int64_t size_y = 0, size_x = 0;  // supports; 0: int(6 |sigma|) | 1
  double* sums = nullptr;          // workspace, see where it is used; null where no table is needed
};
// Radius of the taps once those beyond the image have been folded back, or dropped where they act on nothing.
FD_CONSTEXPR int64_t fold_reach(int64_t radius, int64_t n, int32_t border) {
  const int64_t most = border == kCircular ? n / 2 : border == kReflect || border == kConstant ? n - 1 : n;
  return n == 1 && border != kConstant ? 0 : radius < most ? radius : most;
}
// Values per axis in a table of folded taps (csrc/cuda/gaussian.cuh).
FD_CONSTEXPR int64_t fold_entries(int64_t H, int64_t W) {
  return (H > W ? H : W) + 2 < kMaxSupport / 2 + 2 ? (H > W ? H : W) + 2 : kMaxSupport / 2 + 2;
}

// Which wide Gaussians the CUDA kernels blur at a cost that does not depend on sigma (csrc/cuda/gaussian_sliding.cuh),
// and the floats of a table of theirs: kSlideHead coefficients; per part of an axis 2 x 12 weights of what lies beyond
// the image; 12 starting weights per entry.
constexpr double kSlideSigma = 16, kSlideLargest = 4096;
constexpr int64_t kSlideSide = 64;   // the shortest side of an image
constexpr int64_t kSlidePart = 512;  // the shortest part of an axis that starts afresh
constexpr int64_t kSlideHead = 96;
FD_CONSTEXPR bool slide_range(double sigma) {
  return (sigma < 0 ? -sigma : sigma) >= kSlideSigma && (sigma < 0 ? -sigma : sigma) <= kSlideLargest;
}
FD_CONSTEXPR bool may_slide(const Sigma& s, int64_t H, int64_t W) {
  return s.size_y == 0 && s.size_x == 0 && H >= kSlideSide && W >= kSlideSide &&
         (s.sigma != nullptr || (slide_range(s.sigma_y) && slide_range(s.sigma_x)));
}
FD_CONSTEXPR int64_t slide_parts(int64_t n) { return (n + kSlidePart - 1) / kSlidePart; }
FD_CONSTEXPR int64_t slide_floats(int64_t H, int64_t W) {
  const int64_t n = H > W ? H : W, most = 6 * static_cast<int64_t>(kSlideLargest) + 2;
  return kSlideHead + 24 * slide_parts(n) + 12 * (2 * n < most ? 2 * n : most);
}

// out[b, c] = Ay x[b, c] Ax^T, a separable Gaussian with normalised taps over a finite support.
// plan[b] = {ry, rx, sliding, restart_y, restart_x}: radii; 1 where the sliding path serves; every how many rows and
// columns its recurrences start afresh. table[b] holds, one after the other,
//   taps [2 ry + 1], [2 rx + 1]; their derivatives by sigma [2 ry + 1], [2 rx + 1]; tails [ry + 1], [rx + 1], where
//   tail i is the sum of the taps k >= i; and, where sliding, per axis [16] coefficients (csrc/cpu/gaussian_sliding.h)
//   and [2 r + 2, 12] starting weights.
// CUDA: radii of up to kBlurRadius are served by one kernel without memory of its own. Others need `sums`, 7
// fold_entries doubles per sigma, and as workspace a float32 image [B, C, H, W], two for the gradient to sigma. The
// caller leaves both null where it knows that no radius is larger. Where may_slide(), `sums` has one double more, and
// then slide_floats doubles per sigma.
struct GaussianBlur : Sigma {
  int64_t B = 0, C = 0, H = 0, W = 0;
  int32_t border = kReflect;
  int32_t adjoint = 0;            // 1: the transpose of the operator
  Strided x;                      // [B, C, H, W], kU8 too
  Strided out;                    // out [B, C, H, W], contiguous, dtype of x
  const int64_t* plan = nullptr;  // [B, 5], or [1, 5] with plan_stride 0
  const float* table = nullptr;   // [B, table_stride]
  int64_t plan_stride = 0, table_stride = 0;
  float* workspace = nullptr;  // [slots, workspace_stride]
  int64_t slots = 1, workspace_stride = 0;
};

struct GaussianBlurBackward : GaussianBlur {
  Strided grad;               // [B, C, H, W]
  Strided dx;                 // out [B, C, H, W] contiguous, or absent
  double* partial = nullptr;  // workspace [B, C, H], CUDA: [B, C, blur_tiles], present exactly when dsigma is
  double* dsigma = nullptr;   // out [B]: sum of grad * d out / d sigma, or absent
};

constexpr int64_t kBlurTile = 64;    // pixels along a side of the tile of a block
constexpr int64_t kBlurRadius = 16;  // the largest radius of taps that one kernel serves
FD_CONSTEXPR int64_t blur_tiles(int64_t H, int64_t W) {
  return ((H + kBlurTile - 1) / kBlurTile) * ((W + kBlurTile - 1) / kBlurTile);
}

// mask[k] = outer product of two profiles: the indicator of rows int(y1 H) .. int(y2 H), blurred as gaussian_blur does
// with the reflect border, and likewise the columns. prefix[k] = {P [2 r + 2], Q [2 r + 2]}: sums of the first taps and
// of their derivatives by sigma. CUDA: Sigma in their place, and `sums` [K, 4, fold_entries].
struct Boxes : Sigma {
  const double* boxes = nullptr;    // [K, 4] (x1, y1, x2, y2) as fractions of the image
  const int64_t* radius = nullptr;  // [K], or [1] with radius_stride 0
  const double* prefix = nullptr;   // [K, prefix_stride]
  int64_t radius_stride = 0, prefix_stride = 0;
};

struct BoxMask : Boxes {
  int64_t K = 0, H = 0, W = 0;
  Strided out;                // out [K, H, W], contiguous
  float* profiles = nullptr;  // workspace [K, H + W]
};

struct BoxMaskBackward : Boxes {
  int64_t K = 0, H = 0, W = 0;
  Strided grad;               // [K, H, W]
  float* profiles = nullptr;  // workspace [K, 2 (H + W)]
  double* dsigma = nullptr;   // out [K]
  double* partial = nullptr;  // workspace [K, mask_chunks(H)], CUDA only
};
constexpr int64_t kMaskRows = 32;  // of a mask, whose gradient to sigma a block of threads sums
FD_CONSTEXPR int64_t mask_chunks(int64_t H) { return (H + kMaskRows - 1) / kMaskRows; }

// out = background, then for every k in order: out = out (1 - m_k) + objects[k] m_k, with m_k from masks or boxes.
// Where the mask of a box is exactly 0, so is objects[k], whatever it holds.
struct GaussianBlend : Boxes {
  int64_t K = 0, B = 0, C = 0, H = 0, W = 0;
  Strided background;         // [B, C, H, W]
  Strided objects;            // [K, B, C, H, W]
  Strided masks;              // [K, H, W] float32, contiguous rows; absent where boxes are given
  float* profiles = nullptr;  // workspace [K, H + W] for boxes
  int64_t* ranges = nullptr;  // workspace [K, 4] for boxes
  Strided out;                // out [B, C, H, W], dtype of background; may be background
};

struct GaussianBlendBackward : GaussianBlend {
  Strided grad;                // [B, C, H, W]
  Strided dbackground;         // out [B, C, H, W] contiguous, or absent
  Strided dobjects;            // out [K, B, C, H, W] contiguous, or absent
  float* dmasks = nullptr;     // out [K, H, W] or null
  float* workspace = nullptr;  // [slots, workspace_stride], workspace_stride = (3 K + 2) kBlendBlock; not for CUDA
  int64_t slots = 1, workspace_stride = 0;
};
constexpr int64_t kBlendBlock = 256;  // pixels that a thread of the backward pass takes at a time

// ---------------------------------------------------------------------------------------------------------- spectrum

// out = |FFT2(gray)| or log1p of it, whole (bins absent) or averaged over rings around the DC pixel.
// gray = 0.299 R + 0.587 G + 0.114 B, or the only channel.
// `half` holds the spectrum of one image: [blocks, H, 2, 16] columns 0 .. (W-1)/2 in blocks of sixteen (real parts,
// then imaginary ones), then the Nyquist column of an even W, [2, H'] and its magnitudes [H'], H' = H rounded up to 16.
struct Spectrum {
  int64_t B = 0, C = 0, H = 0, W = 0;  // C: 1 or 3
  int64_t R = 0;                       // number of rings
  int64_t half_size = 0;               // floats per image in `half`
  int64_t scratch_size = 0;            // floats per thread in `scratch`
  int32_t threads = 1;                 // at most so many; `scratch` has room for no more
  int32_t keep = 0;                    // half has room for every image, and is kept; else for min(B, threads)
  int32_t log = 0, shift = 0, normalize = 0;
  Strided images;                   // [B, C, H, W]
  Strided out;                      // out [B, H, W] or [B, R], dtype of images
  const int32_t* plan_w = nullptr;  // how to transform a row: cpu/fft.h
  const float* table_w = nullptr;
  const int32_t* plan_h = nullptr;  // and a column
  const float* table_h = nullptr;
  const int32_t* bins = nullptr;     // [H/2 + 1, W/2 + 1] ring of each frequency, null: the whole spectrum
  const float* ring_size = nullptr;  // [R] frequencies per ring, of all H W
  float* half = nullptr;             // workspace or out, see above
  float* scratch = nullptr;          // workspace [threads, scratch_size]
  float* partial = nullptr;          // workspace [min(B, threads), ring_chunks(H), R], rings only
  float* profile = nullptr;          // out [B, R] ring means before normalisation, rings only
  // CUDA: plan_w and plan_h are read on the host, and all other pointers on the device; no bins; `half`, of another
  // order (cuda/spectrum.cuh), has room for `wave` images where it is not kept; scratch [128, scratch_size] and
  // partial [B, ring parts, R] as spectrum_layout says.
  const int32_t *pos_w = nullptr, *pos_h = nullptr;  // the positions of the plans
  int64_t wave = 0;                                  // images that are transformed together in two launches
  // Or blocks that do an image, in one launch: 1 where spectrum_layout allows, 2, 4 or 8 where spectrum_clusters does
  // and SpectrumCluster fits; 0: two launches.
  int32_t ranks = 0;
};

// Rows of frequencies are summed into rings in chunks of so many, then the chunks in order.
constexpr int64_t kRingRows = 16;
static constexpr int64_t ring_chunks(int64_t H) { return (H / 2 + 1 + kRingRows - 1) / kRingRows; }

// d images, from what the forward pass kept (`half`, and `profile` for rings).
struct SpectrumBackward {
  int64_t B = 0, C = 0, H = 0, W = 0, R = 0;
  int64_t half_size = 0, scratch_size = 0;
  int32_t threads = 1, log = 0, shift = 0, normalize = 0;
  Strided grad;                     // [B, H, W] or [B, R]
  Strided dimages;                  // out [B, C, H, W]
  const int32_t* plan_w = nullptr;  // as in Spectrum
  const float* table_w = nullptr;
  const int32_t* plan_h = nullptr;
  const float* table_h = nullptr;
  const int32_t* bins = nullptr;
  const float* ring_size = nullptr;
  const float* half = nullptr;     // [B, half_size]
  const float* profile = nullptr;  // [B, R] or null
  float* work = nullptr;           // workspace [min(B, threads), half_size]
  float* scratch = nullptr;        // workspace [threads, scratch_size]
  // CUDA: as in Spectrum; work [wave, half_size]
  const int32_t *pos_w = nullptr, *pos_h = nullptr;
  int64_t wave = 0;
  int32_t ranks = 0;
  float* ring_grad = nullptr;  // workspace [B, R], rings only
};

// ---------------------------------------------------------------------------------------------------------- kernels

namespace cpu {
// adaln
void adaln_forward(const AdalnForward& a);
void adaln_backward(const AdalnBackward& a);

// update
void update(const Update& a);
void update_backward(const UpdateBackward& a);

// gelu
void gelu_forward(const Gelu& a);
void gelu_backward(const Gelu& a);

// attention
void attention_forward(const AttentionForward& a);
void attention_backward(const AttentionBackward& a);

// selective scan
void selective_scan(const Scan& a);
void selective_scan_backward(const ScanBackward& a);

// causal conv1d
void causal_conv1d(const CausalConv1d& a);
void causal_conv1d_backward(const CausalConv1dBackward& a);

// gaussian
void gaussian_blur(const GaussianBlur& a);
void gaussian_blur_backward(const GaussianBlurBackward& a);
void box_mask(const BoxMask& a);
void box_mask_backward(const BoxMaskBackward& a);
void gaussian_blend(const GaussianBlend& a);
void gaussian_blend_backward(const GaussianBlendBackward& a);

// spectrum
void spectrum(const Spectrum& a);
void spectrum_backward(const SpectrumBackward& a);

// Instruction sets compiled into this library that this machine can run, slowest first, and the one in use.
int isa_count();
const char* isa_name(int i);
const char* isa_current();
bool isa_select(const char* name);  // false: unknown here, nothing changed
}  // namespace cpu

#ifdef FASTDIFF_CUDA
// Throw std::runtime_error when the launch fails. `device` is made current for the call and restored.
namespace cuda {
// adaln
void adaln_forward(const AdalnForward& a, int device, void* stream);
void adaln_backward(const AdalnBackward& a, int device, void* stream);

// update
void update(const Update& a, int device, void* stream);
void update_backward(const UpdateBackward& a, int device, void* stream);

// gelu
void gelu_forward(const Gelu& a, int device, void* stream);
void gelu_backward(const Gelu& a, int device, void* stream);

// attention
void attention_forward(const AttentionForward& a, int device, void* stream);
void attention_backward(const AttentionBackward& a, int device, void* stream);

// selective scan
void selective_scan(const Scan& a, int device, void* stream);
void selective_scan_backward(const ScanBackward& a, int device, void* stream);

// causal conv1d
void causal_conv1d(const CausalConv1d& a, int device, void* stream);
void causal_conv1d_backward(const CausalConv1dBackward& a, int device, void* stream);

// gaussian
void gaussian_blur(const GaussianBlur& a, int device, void* stream);
void gaussian_blur_backward(const GaussianBlurBackward& a, int device, void* stream);
void box_mask(const BoxMask& a, int device, void* stream);
void box_mask_backward(const BoxMaskBackward& a, int device, void* stream);
void gaussian_blend(const GaussianBlend& a, int device, void* stream);
void gaussian_blend_backward(const GaussianBlendBackward& a, int device, void* stream);

// spectrum
void spectrum(const Spectrum& a, int device, void* stream);
void spectrum_backward(const SpectrumBackward& a, int device, void* stream);
bool spectrum_clusters(int device);  // whether clusters of blocks may do an image: asked for, and possible there
}  // namespace cuda
#endif

}  // namespace fastdiff
