// Attention of many heads over many sequences, with RMSNorm of q and k inside.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "stdit/c_api.h"

namespace stdit {

// Packed keys of a sequence stay in shared memory; this is how many fit.
constexpr int kMostPackedKeys = 320;

// What both passes compute, on the current device: o = softmax(scale * norm(q) norm(k)^T) v for each sequence and head,
// norm(x) = x / sqrt(mean(x^2) + epsilon) * weight. See stdit_attention in c_api.h.
void attention_forward(const stdit_attention& call, void* scratch, cudaStream_t stream);
void attention_backward(const stdit_attention& call, const stdit_attention_gradients& gradients, cudaStream_t stream);

// Bytes of scratch memory that the passes need for such a call.
int64_t attention_forward_scratch(const stdit_attention& call);
int64_t attention_backward_scratch(const stdit_attention& call);

// Throws std::invalid_argument where the kernels cannot serve a call, with the reason. Needs no GPU; both passes expect
// that it has been asked.
void check_attention(const stdit_attention& call);
void check_attention(const stdit_attention& call, const stdit_attention_gradients& gradients);
void check_attention_scratch(const stdit_attention& call, const void* scratch);  // the forward pass's

}  // namespace stdit
