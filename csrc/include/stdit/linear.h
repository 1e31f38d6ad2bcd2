// GEMMs of a linear layer with what surrounds them in cuBLASLt's epilogues.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>

#include "stdit/c_api.h"

namespace stdit {

class LinearPlan {
 public:
  virtual ~LinearPlan() = default;
  virtual int64_t workspace_bytes() const = 0;
  virtual void run(const stdit_linear_arrays& arrays, cudaStream_t stream) const = 0;
};

// Throws std::invalid_argument for a layer that cannot be, std::runtime_error where cuBLASLt is missing or proposes
// nothing.
std::unique_ptr<LinearPlan> plan_linear(const stdit_linear& layer, int device, int rank);

int64_t cublaslt_version();

}  // namespace stdit
