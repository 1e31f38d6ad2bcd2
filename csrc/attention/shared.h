// What attention's two passes share on the host, and their arguments' common part.
#pragma once

#include <cstdint>

#include "stdit/attention.h"
#include "stdit/attention_tiles.h"
#include "stdit/launch_check.h"

namespace stdit {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Registers a thread that consumers can have when a block starts with as many as fit for all and the feeders keep
// `feeder`. Asking for more than there are would wait forever.
constexpr int consumer_registers(int consumers, int feeder) {
  const int at_start = 65536 / (128 * (consumers + 1)) / 8 * 8;
  return (at_start * (consumers + 1) - feeder) / consumers / 8 * 8;
}

// RMSNorm of q and k, and the scale of their product.
struct NormArguments {
  const void* q_weight;
  const void* k_weight;
  bool in_float32;  // the weights; else bfloat16
  bool normalise_q, normalise_k;
  float epsilon, scale;

  __device__ __forceinline__ float weight(const void* weights, int column) const {
    if (weights == nullptr) return 1.0f;
    if (in_float32) return static_cast<const float*>(weights)[column];
    return __bfloat162float(static_cast<const __nv_bfloat16*>(weights)[column]);
  }
  // The product of both weights, which is all that the scores know of them.
  __device__ __forceinline__ float weight(int column) const {
    return weight(q_weight, column) * weight(k_weight, column);
  }
};

inline NormArguments norm_of(const stdit_attention& call) {
  return {
      call.q_weight, call.k_weight, call.weight_dtype == STDIT_FLOAT32, call.normalise_q != 0, call.normalise_k != 0,
      call.epsilon,  call.scale};
}

inline HeadArray array_of(const stdit_heads& h) {
  return {static_cast<__nv_bfloat16*>(h.data), h.sequence_stride, h.row_stride, h.head_stride};
}

inline int multiprocessors() {
  int device = 0, count = 0;
  STDIT_CHECK(cudaGetDevice(&device));
  STDIT_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

__device__ __forceinline__ char* aligned_1024(char* p) {
  const uint32_t address = shared_address(p);
  return p + ((1024 - address % 1024) % 1024);
}

}  // namespace stdit
