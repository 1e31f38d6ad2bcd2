// The exponential moving average of a model's parameters.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "stdit/c_api.h"

namespace stdit {

// The tensors of one update: `count` pairs of contiguous arrays of sizes[i] elements, on one device.
struct EmaTensors {
  float* const* ema;
  const void* const* params;
  const int64_t* sizes;
  int64_t count;
  stdit_dtype param_dtype;
};

// ema += (1 - decay) * (param - ema) in float32, each operation rounded. Works on the current device.
void ema_update(const EmaTensors& tensors, double decay, cudaStream_t stream);

}  // namespace stdit
