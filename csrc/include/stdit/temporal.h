// Attention over the frames at one position, with RMSNorm of q and k and rotary embedding inside: the backward pass.
#pragma once

#include <cuda_runtime_api.h>

#include "stdit/c_api.h"

namespace stdit {

// See stdit_temporal in c_api.h. Throws std::invalid_argument where the kernels cannot serve a call, with the reason.
void check_temporal(const stdit_temporal& call);
int temporal_parts(const stdit_temporal& call);  // on the current device
void temporal_backward(const stdit_temporal& call, cudaStream_t stream);

}  // namespace stdit
