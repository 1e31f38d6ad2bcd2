// Four neighbouring values as one memory access, in float32 whatever the memory holds.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace stdit {

constexpr int kVector = 4;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// True where `p` may be read and written four values at a time.
template <typename T>
__device__ __forceinline__ bool is_vector_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (kVector * sizeof(T)) == 0;
}

__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }

__device__ __forceinline__ float4 load4(const __nv_bfloat16* p) {
  const uint2 bits = *reinterpret_cast<const uint2*>(p);
  // A bfloat16 is the upper half of a float32.
  return make_float4(__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xffff0000u),
                     __uint_as_float(bits.y << 16), __uint_as_float(bits.y & 0xffff0000u));
}

__device__ __forceinline__ void store4(float* p, float4 value) { *reinterpret_cast<float4*>(p) = value; }

__device__ __forceinline__ void store4(__nv_bfloat16* p, float4 value) {
  __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(value.x, value.y), __floats2bfloat162_rn(value.z, value.w)};
  *reinterpret_cast<uint2*>(p) = *reinterpret_cast<uint2*>(pairs);
}

__device__ __forceinline__ void store1(float* p, float value) { *p = value; }
__device__ __forceinline__ void store1(__nv_bfloat16* p, float value) { *p = __float2bfloat16_rn(value); }

}  // namespace stdit
