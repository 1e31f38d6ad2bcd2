// AdamW over all tensors of a model.
#pragma once

#include <cuda_runtime_api.h>

#include "stdit/c_api.h"

namespace stdit {

// Both work on the current device; `grads` holds an address on the device for each tensor, or null.
void adamw_square_sum(const stdit_adamw& optimizer, const void* const* grads, stdit_dtype grad_dtype,
                      double* square_sum, cudaStream_t stream);
void adamw_update(const stdit_adamw& optimizer, stdit_dtype grad_dtype, const double* square_sum, const double* loss,
                  const stdit_adamw_settings& settings, cudaStream_t stream);

}  // namespace stdit
