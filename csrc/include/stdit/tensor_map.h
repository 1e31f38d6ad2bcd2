// Tensor maps: how the copy engine (TMA) finds tiles of an array in global memory.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "stdit/barrier.h"
#include "stdit/launch_check.h"

namespace stdit {

// One dimension of an array, its innermost first: elements, bytes from one to the next, elements of a box.
struct MapDimension {
  uint64_t size;
  uint64_t stride;
  uint32_t box;
};

// A map of a bfloat16 array; the innermost dimension's elements are neighbours. What a box has outside of the array is
// read as zero and not written. The base must be a multiple of 16 bytes, as must the strides.
template <int Rank>
CUtensorMap make_tensor_map(const void* base, const MapDimension (&dimensions)[Rank], CUtensorMapSwizzle swizzle) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    STDIT_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("this driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  cuuint64_t sizes[Rank], strides[Rank];
  cuuint32_t boxes[Rank], steps[Rank];
  for (int i = 0; i < Rank; ++i) {
    sizes[i] = dimensions[i].size;
    strides[i] = dimensions[i].stride;
    boxes[i] = dimensions[i].box;
    steps[i] = 1;
  }
  CUtensorMap map;
  const CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, Rank, const_cast<void*>(base), sizes,
                                 strides + 1, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    std::string text = "cuTensorMapEncodeTiled: status " + std::to_string(static_cast<int>(status)) + " for";
    for (const MapDimension& d : dimensions) {
      text += " [" + std::to_string(d.size) + ", stride " + std::to_string(d.stride) + ", box " +
              std::to_string(d.box) + "]";
    }
    throw std::runtime_error(text);
  }
  return map;
}

__device__ __forceinline__ void prefetch(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Starts the copy of a box to shared memory; its bytes count on `barrier`.
__device__ __forceinline__ void load_box(const CUtensorMap& map, Barrier& barrier, void* to, int c0, int c1, int c2,
                                         int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier.state)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
__device__ __forceinline__ void load_box(const CUtensorMap& map, Barrier& barrier, void* to, int c0, int c1, int c2,
                                         int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier.state)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// Starts the copy of contiguous bytes to shared memory, a multiple of 16 from a multiple of 16; they count on
// `barrier`.
__device__ __forceinline__ void load_bytes(const void* from, Barrier& barrier, void* to, uint32_t bytes) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(&barrier.state))
               : "memory");
}

// Starts the copy of a box from shared memory; what lies outside of the array is left out.
__device__ __forceinline__ void store_box(const CUtensorMap& map, const void* from, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
__device__ __forceinline__ void store_box(const CUtensorMap& map, const void* from, int c0, int c1, int c2, int c3,
                                          int c4) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map),
               "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until at most `Groups` groups of this thread's stores still read shared memory.
template <int Groups>
__device__ __forceinline__ void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Groups) : "memory");
}

}  // namespace stdit
