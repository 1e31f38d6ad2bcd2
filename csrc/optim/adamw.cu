// AdamW with clipping by the global norm and the average of the weights, over all tensors of a model in two passes.
//
// 1. adamw_gradients_kernel   the addresses of this step's gradients ride in the launch's argument into a table on the
//                             device: no copy from the host, nothing that has to live until the kernel has run
// 2. adamw_squares_kernel     pass one, 2 bytes an element (bfloat16): a sum of squares for each tile
// 3. adamw_sum_kernel         one block adds the tiles' sums; several processes add theirs before going on
// 4. adamw_decide_kernel      one block: skip or not, the clip factor, and each tensor's count and bias corrections
// 5. adamw_update_kernel      pass two, 36 bytes an element: everything else
//
// A tile is kTile neighbouring elements of one tensor and the work of one block; which, the block reads from a list that
// was made once. Every thread takes four neighbours at a time, the same ones whatever the addresses allow as one access,
// and sums are made in one order: the result depends on neither schedule nor alignment.
//
// Squares, moments, weights and averages are computed in float64 and rounded once; only the quotient of the moments,
// a small part of the weight, is float32. Hopper has float64 units to spare here: about 14 operations an element in the
// time of its 36 bytes. Each operation is rounded by itself (no fused multiply-add), so that the plain definition in
// PyTorch gives the same bits.

#include "stdit/adamw.h"

#include <cuda_bf16.h>

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "stdit/launch_check.h"
#include "stdit/vector_access.h"

namespace stdit {
namespace {

constexpr int kThreads = 256;
constexpr int kStep = kThreads * kVector;
constexpr int kTile = STDIT_ADAMW_TILE;
constexpr int kUnroll = 2;
static_assert(kTile % (kUnroll * kStep) == 0, "a whole tile has no remainder");
constexpr int kSumThreads = 1024;
constexpr int kPointersPerLaunch = 480;
constexpr double kNormEpsilon = 1e-6;  // torch.nn.utils.clip_grad_norm_'s

struct Tile {
  int tensor, place;
};
static_assert(sizeof(Tile) == 2 * sizeof(int32_t), "tiles are pairs of int32");

struct Corrections {
  double step_size;     // lr / (1 - beta1^count)
  double inverse_root;  // 1 / sqrt(1 - beta2^count), to be rounded to float32
};

struct Decision {
  double clip;
  double skip;  // 0 or 1
};

// The parts of stdit_adamw::scratch.
struct Scratch {
  const void** grads;
  Decision* decision;
  Corrections* corrections;
  double* partial;
};

Scratch scratch_of(const stdit_adamw& optimizer) {
  auto* words = static_cast<double*>(optimizer.scratch);
  auto* decision = reinterpret_cast<Decision*>(words + optimizer.count);
  auto* corrections = reinterpret_cast<Corrections*>(decision + 1);
  static_assert(sizeof(void*) == sizeof(double) && sizeof(Decision) == 16 && sizeof(Corrections) == 16, "words of 8");
  return {reinterpret_cast<const void**>(words), decision, corrections,
          reinterpret_cast<double*>(corrections + optimizer.count)};
}

struct Pointers {
  const void* values[kPointersPerLaunch];
};
static_assert(sizeof(Pointers) <= 3900, "kernel arguments are limited to 4 KB");

__global__ void adamw_gradients_kernel(const void** table, int count, const __grid_constant__ Pointers pointers) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) table[i] = pointers.values[i];
}

// ------------------------------------------------------------------ pass one

// The sum over a block, in thread 0; always in the same order.
template <int kBlockThreads>
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double warps[kBlockThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x < 32) {
    value = threadIdx.x < kBlockThreads / 32 ? warps[threadIdx.x] : 0.0;
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
  }
  return value;
}

// Four neighbours, the first `left` of which exist; zeros for the others.
template <typename T>
__device__ __forceinline__ float4 load_some(const T* p, int left) {
  return make_float4(left > 0 ? to_float(p[0]) : 0.f, left > 1 ? to_float(p[1]) : 0.f, left > 2 ? to_float(p[2]) : 0.f,
                     left > 3 ? to_float(p[3]) : 0.f);
}

template <bool kWhole, typename T>
__device__ __forceinline__ float4 load(const T* p, int left, bool aligned) {
  if (aligned && (kWhole || left >= kVector)) return load4(p);
  return load_some(p, kWhole ? kVector : left);
}

__device__ __forceinline__ double add_square(double sum, float value) {
  return __dadd_rn(sum, __dmul_rn(value, value));
}

template <bool kWhole, typename Grad>
__device__ __forceinline__ double sum_of_squares(const Grad* grad, int size, bool aligned) {
  float4 values[kTile / kStep];
#pragma unroll
  for (int u = 0; u < kTile / kStep; ++u) {
    const int i = u * kStep + threadIdx.x * kVector;
    values[u] = load<kWhole>(grad + i, size - i, aligned);
  }
  double sum = 0;
#pragma unroll
  for (int u = 0; u < kTile / kStep; ++u) {
    sum = add_square(add_square(add_square(add_square(sum, values[u].x), values[u].y), values[u].z), values[u].w);
  }
  return sum;
}

template <typename Grad>
__global__ void __launch_bounds__(kThreads)
    adamw_squares_kernel(const stdit_adamw_tensor* tensors, const Tile* tiles, const void* const* grads,
                         double* partial) {
  const Tile tile = tiles[blockIdx.x];
  const Grad* grad = static_cast<const Grad*>(grads[tile.tensor]);
  double sum = 0;
  if (grad != nullptr) {
    const int64_t begin = static_cast<int64_t>(tile.place) * kTile;
    const int64_t left = tensors[tile.tensor].size - begin;
    grad += begin;
    const bool aligned = is_vector_aligned(grad);
    sum = left >= kTile ? sum_of_squares<true>(grad, kTile, aligned)
                        : sum_of_squares<false>(grad, static_cast<int>(left), aligned);
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kSumThreads)
    adamw_sum_kernel(const double* partial, int64_t count, double* square_sum) {
  double sum = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += partial[i];
  sum = block_sum<kSumThreads>(sum);
  if (threadIdx.x == 0) *square_sum = sum;
}

// ------------------------------------------------------------------ between

__global__ void adamw_decide_kernel(const double* square_sum, const double* loss, const void* const* grads,
                                    float* steps, int count, const __grid_constant__ stdit_adamw_settings settings,
                                    Decision* decision, Corrections* corrections) {
  const bool finite = isfinite(*square_sum) && (loss == nullptr || isfinite(*loss));
  if (threadIdx.x == 0) {
    decision->skip = finite ? 0 : 1;
    decision->clip = fmin(1.0, settings.max_norm / (sqrt(*square_sum) + kNormEpsilon));
  }
  if (!finite) return;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    if (grads[i] == nullptr) continue;
    const float step = steps[i] + 1;
    steps[i] = step;
    corrections[i].step_size = settings.lr / (1 - pow(settings.beta1, static_cast<double>(step)));
    corrections[i].inverse_root = 1 / sqrt(1 - pow(settings.beta2, static_cast<double>(step)));
  }
}

// ------------------------------------------------------------------ pass two

// What the elements of a tensor have in common.
struct Scalars {
  double clip, grad_weight, square_weight, keep, step_size, average_weight;
  float inverse_root, epsilon;
};

struct Element {
  float master, exp_avg, exp_avg_sq;
};

__device__ __forceinline__ double lerp(double from, double to, double weight) {
  return __dadd_rn(from, __dmul_rn(__dsub_rn(to, from), weight));
}

__device__ __forceinline__ Element step(const Element& old, float grad, const Scalars& s) {
  const double g = __dmul_rn(grad, s.clip);
  Element out;
  out.exp_avg = __double2float_rn(lerp(old.exp_avg, g, s.grad_weight));
  out.exp_avg_sq = __double2float_rn(lerp(old.exp_avg_sq, __dmul_rn(g, g), s.square_weight));
  const float root = __fadd_rn(__fmul_rn(__fsqrt_rn(out.exp_avg_sq), s.inverse_root), s.epsilon);
  const double direction = __fdiv_rn(out.exp_avg, root);
  out.master = __double2float_rn(__dsub_rn(__dmul_rn(old.master, s.keep), __dmul_rn(direction, s.step_size)));
  return out;
}

template <bool kWhole, typename T>
__device__ __forceinline__ void store(T* p, float4 value, int left, bool aligned) {
  if (aligned && (kWhole || left >= kVector)) {
    store4(p, value);
    return;
  }
  const float values[kVector] = {value.x, value.y, value.z, value.w};
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (kWhole || i < left) store1(p + i, values[i]);
  }
}

// One block's part of one tensor.
template <typename Grad>
struct Part {
  float *master, *exp_avg, *exp_avg_sq, *average;
  __nv_bfloat16* working;
  const Grad* grad;
  int size;
  bool aligned, grad_aligned;  // `aligned`: all others
};

struct Quad {
  float4 master, exp_avg, exp_avg_sq, average, grad;
};

template <bool kWhole, typename Grad>
__device__ __forceinline__ void update(const Part<Grad>& part, const Scalars& s) {
  const int steps = kWhole ? kTile / kStep : (part.size + kStep - 1) / kStep;
#pragma unroll 1
  for (int first = 0; first < steps; first += kUnroll) {
    Quad q[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = (first + u) * kStep + threadIdx.x * kVector, left = part.size - i;
      q[u].master = load<kWhole>(part.master + i, left, part.aligned);
      if (part.grad != nullptr) {
        q[u].grad = load<kWhole>(part.grad + i, left, part.grad_aligned);
        q[u].exp_avg = load<kWhole>(part.exp_avg + i, left, part.aligned);
        q[u].exp_avg_sq = load<kWhole>(part.exp_avg_sq + i, left, part.aligned);
      }
      if (part.average != nullptr) q[u].average = load<kWhole>(part.average + i, left, part.aligned);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = (first + u) * kStep + threadIdx.x * kVector, left = part.size - i;
      if (part.grad != nullptr) {
        const Element x = step({q[u].master.x, q[u].exp_avg.x, q[u].exp_avg_sq.x}, q[u].grad.x, s);
        const Element y = step({q[u].master.y, q[u].exp_avg.y, q[u].exp_avg_sq.y}, q[u].grad.y, s);
        const Element z = step({q[u].master.z, q[u].exp_avg.z, q[u].exp_avg_sq.z}, q[u].grad.z, s);
        const Element w = step({q[u].master.w, q[u].exp_avg.w, q[u].exp_avg_sq.w}, q[u].grad.w, s);
        q[u].master = make_float4(x.master, y.master, z.master, w.master);
        store<kWhole>(part.master + i, q[u].master, left, part.aligned);
        store<kWhole>(part.exp_avg + i, make_float4(x.exp_avg, y.exp_avg, z.exp_avg, w.exp_avg), left, part.aligned);
        store<kWhole>(part.exp_avg_sq + i, make_float4(x.exp_avg_sq, y.exp_avg_sq, z.exp_avg_sq, w.exp_avg_sq), left,
                      part.aligned);
        if (part.working != nullptr) store<kWhole>(part.working + i, q[u].master, left, part.aligned);
      }
      if (part.average != nullptr) {
        const float4 e = q[u].average, p = q[u].master;
        const float4 average = make_float4(__double2float_rn(lerp(e.x, p.x, s.average_weight)),
                                           __double2float_rn(lerp(e.y, p.y, s.average_weight)),
                                           __double2float_rn(lerp(e.z, p.z, s.average_weight)),
                                           __double2float_rn(lerp(e.w, p.w, s.average_weight)));
        store<kWhole>(part.average + i, average, left, part.aligned);
      }
    }
  }
}

template <typename Grad>
__global__ void __launch_bounds__(kThreads)
    adamw_update_kernel(const stdit_adamw_tensor* tensors, const Tile* tiles, const void* const* grads,
                        const Decision* decision, const Corrections* corrections,
                        const __grid_constant__ stdit_adamw_settings settings) {
  if (decision->skip != 0) return;
  const Tile tile = tiles[blockIdx.x];
  const stdit_adamw_tensor tensor = tensors[tile.tensor];
  const auto* grad = static_cast<const Grad*>(grads[tile.tensor]);
  if (grad == nullptr && tensor.average == nullptr) return;

  const int64_t begin = static_cast<int64_t>(tile.place) * kTile;
  const int64_t left = tensor.size - begin;
  const auto at = [begin](auto* p) { return p == nullptr ? p : p + begin; };
  Part<Grad> part{at(tensor.master),  at(tensor.exp_avg), at(tensor.exp_avg_sq),
                  at(tensor.average), at(static_cast<__nv_bfloat16*>(tensor.working)),
                  at(grad),           static_cast<int>(left < kTile ? left : kTile),
                  false,              is_vector_aligned(grad)};
  // Null is aligned. A tile's first element is a multiple of four: what holds for the tensor holds for the tile.
  part.aligned = is_vector_aligned(part.master) && is_vector_aligned(part.exp_avg) &&
                 is_vector_aligned(part.exp_avg_sq) && is_vector_aligned(part.average) &&
                 is_vector_aligned(part.working);
  const Corrections correction = corrections[tile.tensor];
  const Scalars scalars{decision->clip,
                        1 - settings.beta1,
                        1 - settings.beta2,
                        __dsub_rn(1, __dmul_rn(settings.lr, settings.weight_decay)),
                        correction.step_size,
                        1 - settings.average_decay,
                        static_cast<float>(correction.inverse_root),
                        static_cast<float>(settings.epsilon)};
  if (left >= kTile && part.aligned) {
    update<true>(part, scalars);
  } else {
    update<false>(part, scalars);
  }
}

void check_sizes(const stdit_adamw& optimizer) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  if (optimizer.count < 1 || optimizer.count > kMost || optimizer.tile_count < 1 || optimizer.tile_count > kMost) {
    throw std::invalid_argument("adamw: no tensors, no elements, or too many for one grid");
  }
}

}  // namespace

void adamw_square_sum(const stdit_adamw& optimizer, const void* const* grads, stdit_dtype grad_dtype,
                      double* square_sum, cudaStream_t stream) {
  check_sizes(optimizer);
  const Scratch scratch = scratch_of(optimizer);
  for (int64_t first = 0; first < optimizer.count; first += kPointersPerLaunch) {
    const int count = static_cast<int>(std::min<int64_t>(kPointersPerLaunch, optimizer.count - first));
    Pointers pointers{};
    std::copy_n(grads + first, count, pointers.values);
    adamw_gradients_kernel<<<(count + 127) / 128, 128, 0, stream>>>(scratch.grads + first, count, pointers);
    check_launch("adamw_gradients_kernel");
  }
  const auto* tiles = reinterpret_cast<const Tile*>(optimizer.tiles);
  const auto squares = grad_dtype == STDIT_FLOAT32 ? adamw_squares_kernel<float> : adamw_squares_kernel<__nv_bfloat16>;
  const int blocks = static_cast<int>(optimizer.tile_count);
  squares<<<blocks, kThreads, 0, stream>>>(optimizer.tensors, tiles, scratch.grads, scratch.partial);
  check_launch("adamw_squares_kernel");
  adamw_sum_kernel<<<1, kSumThreads, 0, stream>>>(scratch.partial, optimizer.tile_count, square_sum);
  check_launch("adamw_sum_kernel");
}

void adamw_update(const stdit_adamw& optimizer, stdit_dtype grad_dtype, const double* square_sum, const double* loss,
                  const stdit_adamw_settings& settings, cudaStream_t stream) {
  check_sizes(optimizer);
  const Scratch scratch = scratch_of(optimizer);
  adamw_decide_kernel<<<1, kThreads, 0, stream>>>(square_sum, loss, scratch.grads, optimizer.steps,
                                                  static_cast<int>(optimizer.count), settings, scratch.decision,
                                                  scratch.corrections);
  check_launch("adamw_decide_kernel");
  const auto* tiles = reinterpret_cast<const Tile*>(optimizer.tiles);
  const auto update = grad_dtype == STDIT_FLOAT32 ? adamw_update_kernel<float> : adamw_update_kernel<__nv_bfloat16>;
  const int blocks = static_cast<int>(optimizer.tile_count);
  update<<<blocks, kThreads, 0, stream>>>(optimizer.tensors, tiles, scratch.grads, scratch.decision,
                                          scratch.corrections, settings);
  check_launch("adamw_update_kernel");
}

}  // namespace stdit
