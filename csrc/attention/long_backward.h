// Attention's backward pass over sequences of more than a few hundred keys. See long_backward.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "stdit/attention.h"

namespace stdit {

void long_backward(const stdit_attention& call, const stdit_attention_gradients& gradients, cudaStream_t stream);
int64_t long_backward_scratch(const stdit_attention& call);

}  // namespace stdit
