// ema += (1 - decay) * (param - ema) over all tensors of a model, in a handful of launches.
//
// A pass at the speed of memory: 12 bytes an element (float32 parameters) or 10 (bfloat16), read or written once.
// Every block owns kTile neighbouring elements of one tensor. The launch's argument holds the pointers and, for
// each tensor, the number of its first block; a block finds its tensor by bisection, uniformly for all threads.
// A thread has kUnroll independent loads of each array in flight before the first store. Nothing is reduced or
// shared, so the result does not depend on the schedule, and whole tiles, vectors and tails compute the same.

#include "stdit/ema_update.h"

#include <limits>
#include <stdexcept>

#include "stdit/launch_check.h"
#include "stdit/vector_access.h"

namespace stdit {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;
constexpr int kStep = kThreads * kVector;
constexpr int kTile = 2 * kUnroll * kStep;
constexpr int kTensorsPerLaunch = 140;

// Passed by value: no copy to the device, and nothing to keep alive until the kernel has run.
struct Batch {
  float* ema[kTensorsPerLaunch];
  const void* params[kTensorsPerLaunch];
  int64_t sizes[kTensorsPerLaunch];
  int first_block[kTensorsPerLaunch];
  int count;
  float weight;
};
static_assert(sizeof(Batch) <= 4096, "kernel arguments are limited to 4 KB");

// Three rounded operations, never a fused multiply-add: the plain definition in PyTorch gives the same bits.
__device__ __forceinline__ float lerp(float ema, float param, float weight) {
  return __fadd_rn(ema, __fmul_rn(weight, __fsub_rn(param, ema)));
}

__device__ __forceinline__ float4 lerp(float4 ema, float4 param, float weight) {
  return make_float4(lerp(ema.x, param.x, weight), lerp(ema.y, param.y, weight), lerp(ema.z, param.z, weight),
                     lerp(ema.w, param.w, weight));
}

__device__ __forceinline__ int tensor_of_block(const Batch& batch, int block) {
  int low = 0, high = batch.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (batch.first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <typename Param>
__device__ __forceinline__ void update_whole_tile(float* ema, const Param* param, float weight) {
#pragma unroll
  for (int base = 0; base < kTile; base += kUnroll * kStep) {
    const int first = base + threadIdx.x * kVector;
    float4 e[kUnroll], p[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) e[u] = load4(ema + first + u * kStep);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) p[u] = load4(param + first + u * kStep);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) store4(ema + first + u * kStep, lerp(e[u], p[u], weight));
  }
}

// A tile that its tensor's end cuts, or whose pointers do not allow vectors.
template <typename Param>
__device__ __forceinline__ void update_part(float* ema, const Param* param, int size, float weight, bool aligned) {
  const int vectors_end = aligned ? size / kVector * kVector : 0;
  for (int i = threadIdx.x * kVector; i < vectors_end; i += kStep) {
    store4(ema + i, lerp(load4(ema + i), load4(param + i), weight));
  }
  for (int i = vectors_end + threadIdx.x; i < size; i += kThreads) {
    ema[i] = lerp(ema[i], to_float(param[i]), weight);
  }
}

template <typename Param>
__global__ void __launch_bounds__(kThreads) ema_update_kernel(const __grid_constant__ Batch batch) {
  const int tensor = tensor_of_block(batch, blockIdx.x);
  const int64_t begin = static_cast<int64_t>(blockIdx.x - batch.first_block[tensor]) * kTile;
  const int64_t left = batch.sizes[tensor] - begin;
  float* ema = batch.ema[tensor] + begin;
  const Param* param = static_cast<const Param*>(batch.params[tensor]) + begin;
  const bool aligned = is_vector_aligned(ema) && is_vector_aligned(param);
  if (aligned && left >= kTile) {
    update_whole_tile(ema, param, batch.weight);
  } else {
    update_part(ema, param, static_cast<int>(left < kTile ? left : kTile), batch.weight, aligned);
  }
}

void launch(const Batch& batch, int blocks, stdit_dtype dtype, cudaStream_t stream) {
  if (dtype == STDIT_FLOAT32) {
    ema_update_kernel<float><<<blocks, kThreads, 0, stream>>>(batch);
  } else {
    ema_update_kernel<__nv_bfloat16><<<blocks, kThreads, 0, stream>>>(batch);
  }
  check_launch("ema_update_kernel");
}

}  // namespace

void ema_update(const EmaTensors& tensors, double decay, cudaStream_t stream) {
  constexpr int64_t kMaxBlocks = std::numeric_limits<int>::max();
  Batch batch{};
  batch.weight = static_cast<float>(1.0 - decay);
  int64_t blocks = 0;
  for (int64_t i = 0; i < tensors.count; ++i) {
    const int64_t size = tensors.sizes[i];
    if (size < 0) throw std::invalid_argument("ema_update: a tensor of negative size");
    if (size == 0) continue;
    const int64_t tensor_blocks = (size - 1) / kTile + 1;
    if (tensor_blocks > kMaxBlocks) throw std::invalid_argument("ema_update: a tensor too large for one grid");
    if (batch.count == kTensorsPerLaunch || blocks + tensor_blocks > kMaxBlocks) {
      launch(batch, static_cast<int>(blocks), tensors.param_dtype, stream);
      batch.count = 0;
      blocks = 0;
    }
    batch.ema[batch.count] = tensors.ema[i];
    batch.params[batch.count] = tensors.params[i];
    batch.sizes[batch.count] = size;
    batch.first_block[batch.count] = static_cast<int>(blocks);
    ++batch.count;
    blocks += tensor_blocks;
  }
  if (batch.count > 0) launch(batch, static_cast<int>(blocks), tensors.param_dtype, stream);
}

}  // namespace stdit
