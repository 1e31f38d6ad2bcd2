// The backward pass over packed keys, which attention_backward hands on.
#pragma once

#include <cuda_runtime_api.h>

#include "stdit/attention.h"

namespace stdit {

void packed_backward(const stdit_attention& call, const stdit_attention_gradients& gradients, cudaStream_t stream);
int64_t packed_backward_scratch(const stdit_attention& call);

}  // namespace stdit
