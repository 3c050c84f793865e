// Attention on Hopper's own instructions (attention_sm90.cu).
#pragma once
#include "../fastdiff.h"

namespace fastdiff {
namespace cuda {

// Enqueues the call and returns true, or returns false when this path cannot serve it: another GPU, float32, a head dim
// other than 64, 72 and 128, norms or rotations, a scale that is not positive, rows that are not aligned to 16 bytes.
bool attention_forward_sm90(const AttentionForward& a, int device, void* stream);

// What attention_forward_sm90 does for up to 256 keys (attention_short_sm90.cu); the device and the call, but for the
// layout of q, k and v, have been looked at.
bool attention_short_sm90(const AttentionForward& a, int device, void* stream);

}  // namespace cuda
}  // namespace fastdiff
