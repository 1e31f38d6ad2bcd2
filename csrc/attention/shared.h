// What attention's two passes share on the host, and their arguments' common part.
#pragma once

#include <cstdint>

#include "attention/head_dim.h"
#include "stdit/attention.h"
#include "stdit/attention_tiles.h"
#include "stdit/launch_check.h"

namespace stdit {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Shared memory that a block of compute capability 9.0 can have.
constexpr int kMostSharedBytes = 227 * 1024;

// Registers a thread that consumers can have when a block starts with as many as fit for all and the feeders keep
// `feeder`. Asking for more than there are would wait forever.
constexpr int consumer_registers(int consumers, int feeder, int feeders = 1) {
  const int at_start = 65536 / (128 * (consumers + feeders)) / 8 * 8;
  return (at_start * (consumers + feeders) - feeders * feeder) / consumers / 8 * 8;
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
  // Whether q is scaled in shared memory, by all that scores are scaled with.
  __host__ __device__ __forceinline__ bool folds() const {
    return normalise_q || normalise_k || q_weight != nullptr || k_weight != nullptr;
  }
  // What is left to multiply scores with, for units of log2.
  float score_factor() const { return folds() ? 1.0f : scale * kLog2E; }
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

// Kernels that begin while the one before them in the stream ends (programmatic dependent launch). Such a kernel waits
// before it touches what that one makes; that one says when no block of it is left to begin.
__device__ __forceinline__ void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_kernel_begin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
template <class... Parameters, class... Arguments>
void launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes, cudaStream_t stream,
                  const Arguments&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  STDIT_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
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

// Of the arrays that k and v are.
inline int64_t key_sequences(const stdit_attention& call) { return call.key_starts == nullptr ? call.sequences : 1; }
inline int64_t key_rows(const stdit_attention& call) {
  return call.key_starts == nullptr ? call.keys : call.packed_keys;
}

// A sequence's keys: rows from `first` on of a sequence of the array.
struct KeyRange {
  int first, count, sequence;

  static __device__ __forceinline__ KeyRange packed(const int* starts, int sequence) {
    const int first = __ldg(starts + sequence);
    return {first, __ldg(starts + sequence + 1) - first, 0};
  }
};

// A unit of work of a sequence.
struct Place {
  int sequence, unit;
};

// Where part `part` of `parts` of all work begins, which lies in the order of sequences: each has units(sequence) units
// that cost cost(sequence) each. All lanes of a warp ask, and get the answer.
template <class Units, class Cost>
__device__ __forceinline__ Place place_of(int part, int parts, int sequences, Units units, Cost cost) {
  const int lane = threadIdx.x % 32;
  int64_t total = 0;
  for (int s = lane; s < sequences; s += 32) total += static_cast<int64_t>(units(s)) * cost(s);
  for (int step = 1; step < 32; step *= 2) total += __shfl_xor_sync(~0u, total, step);
  const int64_t before = total / parts * part + total % parts * part / parts;  // floor(total * part / parts)
  int64_t seen = 0;
  for (int base = 0; base < sequences; base += 32) {
    const int s = base + lane;
    const int64_t own = s < sequences ? static_cast<int64_t>(units(s)) * cost(s) : 0;
    int64_t sum = own;  // up to this lane's
    for (int step = 1; step < 32; step *= 2) {
      const int64_t other = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += other;
    }
    const uint32_t found = __ballot_sync(~0u, before < seen + sum);
    if (found != 0) {
      const int source = __ffs(found) - 1;
      const int64_t within = before - __shfl_sync(~0u, seen + sum - own, source);
      const int each = cost(base + source), unit = static_cast<int>((within + each - 1) / each);
      if (unit == units(base + source)) return {base + source + 1, 0};
      return {base + source, unit};
    }
    seen += __shfl_sync(~0u, sum, 31);
  }
  return {sequences, 0};
}

// Barriers for a ring of places that one thread fills and all warps of `consumers` warpgroups empty.
template <int Places>
__device__ __forceinline__ void init_ring(Barrier (&full)[Places], Barrier (&empty)[Places], int consumers) {
  for (int i = 0; i < Places; ++i) {
    full[i].init(1);
    empty[i].init(4 * consumers * kWarpArrivals);
  }
}

__device__ __forceinline__ char* aligned_1024(char* p) {
  const uint32_t address = shared_address(p);
  return p + ((1024 - address % 1024) % 1024);
}

}  // namespace stdit
