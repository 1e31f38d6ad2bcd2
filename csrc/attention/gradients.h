// What the backward kernels share: sums of do * o before, and what becomes of finished accumulators.
#pragma once

#include <cstdint>

#include "attention/shared.h"
#include "stdit/attention_tiles.h"

namespace stdit {

constexpr int kRowThreads = 256;

// rows[item, query] = (lse in units of log2, sum of do * o); items are heads of sequences.
struct RowArguments {
  HeadArray o, d_o;
  const float* lse;
  float2* rows;  // [sequences * heads, row_length]
  int heads, queries;
  int row_length;  // queries, or more: then the rest is zero
  int64_t count;   // sequences * row_length * heads
};

// Few threads a row, each some pieces of 16 bytes.
template <int D>
struct RowThreads {
  static constexpr int kPieces = D / 8, kLanes = kPieces % 3 == 0 ? 3 : kPieces % 4 == 0 ? 4 : 2;
  static constexpr int kEach = kPieces / kLanes, kRows = 32 / kLanes;  // kRows: of a warp
};

template <int D>
unsigned row_blocks(const RowArguments& a) {
  constexpr int kEach = kRowThreads / 32 * RowThreads<D>::kRows;
  return static_cast<unsigned>((a.count + kEach - 1) / kEach);
}

template <int D>
__device__ __forceinline__ void write_row_sums(const RowArguments& a, int64_t block) {
  using T = RowThreads<D>;
  constexpr int kEach = T::kEach, kLanes = T::kLanes;
  const int lane = threadIdx.x % 32, part = lane % kLanes;
  const int64_t index = (block * (kRowThreads / 32) + threadIdx.x / 32) * T::kRows + lane / kLanes;
  const bool own = lane < T::kRows * kLanes && index < a.count;
  const int head = static_cast<int>(index % a.heads);
  const int64_t token = index / a.heads;
  const int query = static_cast<int>(token % a.row_length), sequence = static_cast<int>(token / a.row_length);
  const bool there = own && query < a.queries;
  float sum = 0.0f;
  if (there) {
    const auto* x = reinterpret_cast<const uint4*>(a.o.head(sequence, head) + query * a.o.row_stride) + part * kEach;
    const auto* y =
        reinterpret_cast<const uint4*>(a.d_o.head(sequence, head) + query * a.d_o.row_stride) + part * kEach;
    uint4 u[kEach], w[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) u[i] = __ldg(x + i);
#pragma unroll
    for (int i = 0; i < kEach; ++i) w[i] = __ldg(y + i);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const uint32_t left[4] = {u[i].x, u[i].y, u[i].z, u[i].w}, right[4] = {w[i].x, w[i].y, w[i].z, w[i].w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        sum = fmaf(low_half(left[k]), low_half(right[k]), sum);
        sum = fmaf(high_half(left[k]), high_half(right[k]), sum);
      }
    }
  }
  float total = sum;
#pragma unroll
  for (int i = 1; i < kLanes; ++i) total += __shfl_down_sync(~0u, sum, i);
  if (own && part == 0) {
    const int64_t item = static_cast<int64_t>(sequence) * a.heads + head;
    const float lse = there ? a.lse[item * a.queries + query] * kLog2E : 0.0f;
    a.rows[item * a.row_length + query] = make_float2(lse, total);
  }
}

// Accumulators as an operand of the next product.
template <int Count>
__device__ __forceinline__ void pack_all(uint32_t (&to)[Count], const float (&from)[2 * Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) to[i] = pack(from[2 * i], from[2 * i + 1]);
}

// Two rows of an array, of which each thread has the columns that it has of accumulators.
struct RowPair {
  __nv_bfloat16* row[2];
  bool there[2];

  // Rows `first` and `first` + 8 of `count`; a row beyond stands for the last one, and is not there.
  __device__ __forceinline__ RowPair(const HeadArray& array, int sequence, int head, int first, int count) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      there[h] = first + 8 * h < count;
      row[h] = array.head(sequence, head) + (there[h] ? first + 8 * h : count - 1) * array.row_stride;
    }
  }
};

// What the rows held, as pairs of neighbours.
template <int D>
struct RawRows {
  uint32_t x[2][D / 8];

  __device__ __forceinline__ void read(const RowPair& from) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        x[h][j] = __ldg(reinterpret_cast<const uint32_t*>(from.row[h] + 8 * j + threadIdx.x % 4 * 2));
      }
    }
  }

  // From 16 rows of a tile in shared memory, from `first_row` on.
  template <class T>
  __device__ __forceinline__ void read_tile(const char* tile, int first_row) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        const int row = first_row + static_cast<int>(threadIdx.x % 32 / 4) + 8 * h;
        x[h][j] = *reinterpret_cast<const uint32_t*>(tile + T::offset(row, j) + threadIdx.x % 4 * 4);
      }
    }
  }

  // From 16 rows of an image (row_image.h) in shared memory, eight of which take group_bytes.
  __device__ __forceinline__ void read_image(const char* image, int group_bytes) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        x[h][j] = *reinterpret_cast<const uint32_t*>(image + h * group_bytes + 128 * j + threadIdx.x % 32 * 4);
      }
    }
  }
};

// Writes a warp's accumulators [16, D] as bfloat16. Neighbouring lanes exchange halves, so that a row is written in
// pieces of 32 bytes. AtOnce: all exchanges come before all stores, which takes D / 4 registers more; with a branch
// around each store an exchange is waited for alone.
template <int D, bool AtOnce = false>
__device__ __forceinline__ void write_rows(const float (&d)[D / 2], const RowPair& to) {
  constexpr int kPairs = D / 16;  // of eights of columns
  const int quarter = threadIdx.x % 4;
  const bool odd = quarter % 2 != 0;
  // Lanes 0 and 2 write the left eight columns of two eights, 1 and 3 the right.
  const int column = (odd ? 8 : 0) + quarter / 2 * 4;
  const auto exchange = [&](int h, int j) {
    const float* v = d + 8 * j + 2 * h;
    const uint32_t left = pack(v[0], v[1]), right = pack(v[4], v[5]);
    const uint32_t other = __shfl_xor_sync(~0u, odd ? left : right, 1);
    return odd ? make_uint2(other, right) : make_uint2(left, other);
  };
  uint2 fours[2][kPairs];
  if constexpr (AtOnce) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) fours[h][j] = exchange(h, j);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const uint2 four = AtOnce ? fours[h][j] : exchange(h, j);
      if (to.there[h]) *reinterpret_cast<uint2*>(to.row[h] + 16 * j + column) = four;
    }
    if constexpr (D / 8 % 2 != 0) {
      const float* v = d + 8 * kPairs + 2 * h;
      const uint32_t two = pack(v[0], v[1]);
      if (to.there[h]) *reinterpret_cast<uint32_t*>(to.row[h] + 16 * kPairs + 2 * quarter) = two;
    }
  }
}

// Adds `v`, a value for each of this thread's columns, over the eight lanes that share them, to sums[D]. At every step
// a lane hands on the half of the values that its partner keeps: 17 exchanges for 18 values.
template <int D>
__device__ __forceinline__ void add_columns(float (&v)[D / 4], float* sums) {
  constexpr int k0 = D / 4, k1 = (k0 + 1) / 2, k2 = (k1 + 1) / 2, k3 = (k2 + 1) / 2;
  const int lane = threadIdx.x % 32;
  const auto halve = [&](auto& values, int count, int kept, int step) {
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < kept; ++i) {
      const float high = i + kept < count ? values[i + kept] : 0.0f;
      const float other = __shfl_xor_sync(~0u, upper ? values[i] : high, step);
      values[i] = (upper ? high : values[i]) + other;
    }
  };
  halve(v, k0, k1, 16);
  halve(v, k1, k2, 8);
  halve(v, k2, k3, 4);
  const int at2 = (lane & 4 ? k3 : 0), at1 = (lane & 8 ? k2 : 0), at0 = (lane & 16 ? k1 : 0);
#pragma unroll
  for (int i = 0; i < k3; ++i) {
    const int k = at0 + at1 + at2 + i;
    const bool mine = at2 + i < k2 && at1 + at2 + i < k1 && k < k0;
    if (mine) sums[8 * (k / 2) + 2 * (lane % 4) + k % 2] += v[i];
  }
}

// From the gradient of a normalised (and weighted) row to that of the row as it came, in place.
//   d: a warp's accumulators [16, D]; raw: the rows as they came.
//   weights: what the normalised row was multiplied by, times `scale` (null: 1).
//   weight_sums: where the sums over rows of d * normalised row are added, if `sums_weights`. (Not a pointer that may
//   be null: the compiler would not see that all lanes decide alike, and keep addresses out of uniform registers.)
template <int D>
__device__ __forceinline__ void through_norm(float (&d)[D / 2], const RawRows<D>& raw, bool normalised, float epsilon,
                                             const float* weights, float scale, bool sums_weights, float* weight_sums) {
  float factor[2] = {1.0f, 1.0f};
  if (normalised) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        sum = fmaf(low_half(raw.x[h][j]), low_half(raw.x[h][j]), sum);
        sum = fmaf(high_half(raw.x[h][j]), high_half(raw.x[h][j]), sum);
      }
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      factor[h] = rsqrtf(sum * (1.0f / D) + epsilon);
    }
  }
  if (sums_weights) {
    float sums[D / 4];
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      sums[2 * j] = d[4 * j] * (low_half(raw.x[0][j]) * factor[0]) + d[4 * j + 2] * (low_half(raw.x[1][j]) * factor[1]);
      sums[2 * j + 1] =
          d[4 * j + 1] * (high_half(raw.x[0][j]) * factor[0]) + d[4 * j + 3] * (high_half(raw.x[1][j]) * factor[1]);
    }
    add_columns<D>(sums, weight_sums);
  }
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    float2 w{scale, scale};
    if (weights != nullptr) {
      w = *reinterpret_cast<const float2*>(weights + 8 * j + threadIdx.x % 4 * 2);
      w.x *= scale;
      w.y *= scale;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      d[4 * j + 2 * h] *= w.x;
      d[4 * j + 2 * h + 1] *= w.y;
    }
  }
  if (normalised) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float dot = 0.0f;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        dot = fmaf(d[4 * j + 2 * h], low_half(raw.x[h][j]), dot);
        dot = fmaf(d[4 * j + 2 * h + 1], high_half(raw.x[h][j]), dot);
      }
      dot += __shfl_xor_sync(~0u, dot, 1);
      dot += __shfl_xor_sync(~0u, dot, 2);
      const float share = dot * factor[h] * factor[h] * (1.0f / D);
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        d[4 * j + 2 * h] = factor[h] * (d[4 * j + 2 * h] - share * low_half(raw.x[h][j]));
        d[4 * j + 2 * h + 1] = factor[h] * (d[4 * j + 2 * h + 1] - share * high_half(raw.x[h][j]));
      }
    }
  }
}

// The same for rows without weights that are there as they were normalised, by `factor`.
template <int D>
__device__ __forceinline__ void back_through_norm(float (&d)[D / 2], const RawRows<D>& normal, bool normalised,
                                                  const float (&factor)[2], float scale) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float share = 0.0f;
    if (normalised) {
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        share = fmaf(d[4 * j + 2 * h], low_half(normal.x[h][j]), share);
        share = fmaf(d[4 * j + 2 * h + 1], high_half(normal.x[h][j]), share);
      }
      share += __shfl_xor_sync(~0u, share, 1);
      share += __shfl_xor_sync(~0u, share, 2);
      share *= 1.0f / D;
    }
    const float by = normalised ? factor[h] * scale : scale;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      d[4 * j + 2 * h] = by * (d[4 * j + 2 * h] - share * low_half(normal.x[h][j]));
      d[4 * j + 2 * h + 1] = by * (d[4 * j + 2 * h + 1] - share * high_half(normal.x[h][j]));
    }
  }
}

// Writes rows of dq: d holds the gradient of the normalised rows, whose weights in shared memory hold the scale, in
// units of log2. `weight_sums` as in through_norm.
template <int D, bool AtOnce = false>
__device__ __forceinline__ void write_query_gradient(float (&d)[D / 2], const RawRows<D>& raw, const RowPair& out,
                                                     const NormArguments& norm, const float* weights,
                                                     bool sums_weights, float* weight_sums) {
#pragma unroll
  for (int i = 0; i < D / 2; ++i) {
    if (!out.there[i / 2 % 2]) d[i] = 0.0f;
  }
  through_norm<D>(d, raw, norm.normalise_q, norm.epsilon, weights, kLn2, sums_weights, weight_sums);
  write_rows<D, AtOnce>(d, out);
}

// What queries are multiplied with, and zeroes for the sums of each consumer warp, by all threads of a block.
template <int Threads, int D, int Warps>
__device__ __forceinline__ void begin_weights(float (&weights)[D], float (&sums)[Warps][D], const NormArguments& norm) {
  for (int i = threadIdx.x; i < D; i += Threads) weights[i] = norm.weight(i) * norm.scale * kLog2E;
  for (int i = threadIdx.x; i < Warps * D; i += Threads) (&sums[0][0])[i] = 0.0f;
}

// d_weights[0] = sum over blocks * k_weight * factor, d_weights[1] likewise with q_weight: both norms' weights only
// appear as their product.
template <int D>
__global__ void __launch_bounds__(128)
    attention_weights_kernel(const float* partials, int blocks, NormArguments norm, float factor, float* d_weights) {
  const int i = threadIdx.x;
  if (i >= D) return;
  float sum = 0.0f;
  for (int b = 0; b < blocks; ++b) sum += partials[static_cast<int64_t>(b) * D + i];
  sum *= factor;
  d_weights[i] = sum * norm.weight(norm.k_weight, i);
  d_weights[D + i] = sum * norm.weight(norm.q_weight, i);
}

constexpr int kWeightShares = 14;

// The same with more loads on their way: one block of D x kWeightShares threads, each with every 14th of `blocks`. It
// begins while the kernel that makes `partials` ends.
template <int D>
__global__ void __launch_bounds__(D * kWeightShares)
    attention_weight_shares_kernel(const float* partials, int blocks, NormArguments norm, float factor,
                                   float* d_weights) {
  __shared__ float shares[kWeightShares][D];
  const int i = threadIdx.x;
  float q_weight = 0.0f, k_weight = 0.0f;
  if (threadIdx.y == 0) {
    q_weight = norm.weight(norm.q_weight, i);
    k_weight = norm.weight(norm.k_weight, i);
  }
  wait_for_kernel_before();
  float sum = 0.0f;
#pragma unroll 10
  for (int b = threadIdx.y; b < blocks; b += kWeightShares) sum += __ldcg(partials + static_cast<int64_t>(b) * D + i);
  shares[threadIdx.y][i] = sum;
  __syncthreads();
  if (threadIdx.y > 0) return;
#pragma unroll
  for (int share = 1; share < kWeightShares; ++share) sum += shares[share][i];
  sum *= factor;
  d_weights[i] = sum * k_weight;
  d_weights[D + i] = sum * q_weight;
}

// The gradients of the weights from their sums over each block's rows; none, where they are not asked for (null).
template <int D>
void sum_weights(const float* partials, int blocks, const NormArguments& norm, float* d_weights, cudaStream_t stream) {
  if (d_weights == nullptr) return;
  if constexpr (D == 72) {
    launch_early(attention_weight_shares_kernel<D>, dim3(1), dim3(D, kWeightShares), 0, stream, partials, blocks, norm,
                 norm.scale, d_weights);
  } else {  // which have not run with it
    attention_weights_kernel<D><<<1, 128, 0, stream>>>(partials, blocks, norm, norm.scale, d_weights);
  }
  check_launch("attention_weights_kernel");
}

}  // namespace stdit
