// CUDA errors as exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace stdit {

// Throws with the failed call and CUDA's own text. Clears the error, so that the next launch is not blamed for it.
inline void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorName(status) + ": " + cudaGetErrorString(status));
}

// After a kernel launch: reports a launch that the driver refused.
inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

}  // namespace stdit

#define STDIT_CHECK(call) ::stdit::check((call), #call)
