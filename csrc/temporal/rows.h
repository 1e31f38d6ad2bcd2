// What temporal attention's two backward kernels share: 16 rows of a head as registers of a warp, and what becomes of
// them. Nothing here waits for another warp.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "attention/shared.h"
#include "stdit/attention_tiles.h"

namespace stdit {

constexpr int kTemporalWarps = 12;  // of a block, one on each multiprocessor

struct TemporalArguments {
  const __nv_bfloat16* qkv;
  int64_t batch_stride, frame_stride, position_stride;
  const __nv_bfloat16* d_o;
  __nv_bfloat16* d_qkv;
  const void *q_weight, *k_weight;
  bool in_float32;  // the weights
  const float* rotation;
  float* d_weights;  // [parts * heads, 2, D]
  float* d_sums;     // [parts, 3, heads, D], or null
  float epsilon;
  int count, frames, positions, heads, parts;  // count: batch * positions
};

// Writes rotations [rows, D / 2], no turn for frames that are not there, and the weights of q and k. All threads.
template <int D>
__device__ __forceinline__ void load_tables(const TemporalArguments& a, int rows, float2 (*rotation)[D / 2],
                                            float (*weights)[D]) {
  for (int i = threadIdx.x; i < rows * (D / 2); i += blockDim.x) {
    const int frame = i / (D / 2), pair = i % (D / 2);
    const float* from = a.rotation + frame * D + pair;
    rotation[frame][pair] = frame < a.frames ? make_float2(from[0], from[D / 2]) : make_float2(1.0f, 0.0f);
  }
  for (int i = threadIdx.x; i < 2 * D; i += blockDim.x) {
    const void* weight = i < D ? a.q_weight : a.k_weight;
    weights[i / D][i % D] = a.in_float32 ? static_cast<const float*>(weight)[i % D]
                                         : __bfloat162float(static_cast<const __nv_bfloat16*>(weight)[i % D]);
  }
}

__device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b0));
}

__device__ __forceinline__ uint32_t transposed(uint32_t matrix) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
  return result;
}

__device__ __forceinline__ void store_bytes(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
               "r"(bytes)
               : "memory");
}

// The sum over the four lanes that share a row.
__device__ __forceinline__ float over_row(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Sums of values for each of a thread's columns of accumulators [16, D] over the eight lanes that share them. At every
// step a lane hands on the half of the values that its partner keeps: 17 exchanges for 18 values.
template <int D>
struct ColumnFold {
  static constexpr int k0 = D / 4, k1 = (k0 + 1) / 2, k2 = (k1 + 1) / 2, kKept = (k2 + 1) / 2;

  // Leaves the sums of kKept columns in v[0] to v[kKept - 1].
  static __device__ __forceinline__ void fold(float (&v)[k0]) {
    const int lane = threadIdx.x % 32;
    const auto halve = [&](int count, int kept, int step) {
      const bool upper = (lane & step) != 0;
#pragma unroll
      for (int i = 0; i < kept; ++i) {
        const float high = i + kept < count ? v[i + kept] : 0.0f;
        const float other = __shfl_xor_sync(~0u, upper ? v[i] : high, step);
        v[i] = (upper ? high : v[i]) + other;
      }
    };
    halve(k0, k1, 16);
    halve(k1, k2, 8);
    halve(k2, kKept, 4);
  }
  // Which column v[i] is the sum of; negative where it is none's, or another lane's.
  static __device__ __forceinline__ int column(int i) {
    const int lane = threadIdx.x % 32;
    const int at2 = (lane & 4 ? kKept : 0), at1 = (lane & 8 ? k2 : 0), at0 = (lane & 16 ? k1 : 0);
    const int k = at0 + at1 + at2 + i;
    const bool mine = at2 + i < k2 && at1 + at2 + i < k1 && k < k0;
    return mine ? 8 * (k / 2) + 2 * (lane % 4) + k % 2 : -1;
  }
};

// 16 rows of a head as matrices of 8 x 8: x[columns in eights][lower eight rows]. A thread has two neighbouring
// columns of row lane / 4 (transposed: two neighbouring rows of column lane / 4).
template <int D>
struct Matrices {
  static constexpr int kEights = D / 8;
  uint32_t x[kEights][2];

  static __device__ __forceinline__ uint32_t address(const char* tile, int eighth) {
    return shared_address(tile) + threadIdx.x % 16 * (D * 2) + eighth * 16;
  }
  __device__ __forceinline__ void load(const char* tile) {
    const int right = threadIdx.x % 32 / 16;
#pragma unroll
    for (int e = 0; e + 1 < kEights; e += 2) {
      load_matrices(address(tile, e + right), x[e][0], x[e][1], x[e + 1][0], x[e + 1][1]);
    }
    if constexpr (kEights % 2 != 0) {
      constexpr int e = kEights - 1;
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                   : "=r"(x[e][0]), "=r"(x[e][1])
                   : "r"(address(tile, e))
                   : "memory");
    }
  }
  __device__ __forceinline__ void load_transposed(const char* tile) {
    const int right = threadIdx.x % 32 / 16;
#pragma unroll
    for (int e = 0; e + 1 < kEights; e += 2) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x[e][0]), "=r"(x[e][1]), "=r"(x[e + 1][0]), "=r"(x[e + 1][1])
                   : "r"(address(tile, e + right))
                   : "memory");
    }
    if constexpr (kEights % 2 != 0) {
      constexpr int e = kEights - 1;
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                   : "=r"(x[e][0]), "=r"(x[e][1])
                   : "r"(address(tile, e))
                   : "memory");
    }
  }
  __device__ __forceinline__ void store(char* tile) const {
    const int right = threadIdx.x % 32 / 16;
#pragma unroll
    for (int e = 0; e + 1 < kEights; e += 2) {
      store_matrices(address(tile, e + right), x[e][0], x[e][1], x[e + 1][0], x[e + 1][1]);
    }
    if constexpr (kEights % 2 != 0) store_matrices(address(tile, kEights - 1), x[kEights - 1][0], x[kEights - 1][1]);
  }
};

// d[16, 16] = a b^T over all columns; d[b's eight rows][2 * (a's lower eight) + neighbour].
template <int D>
__device__ __forceinline__ void multiply_columns(float (&d)[2][4], const Matrices<D>& a, const Matrices<D>& b) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[n][i] = 0.0f;
#pragma unroll
    for (int e = 0; e + 1 < D / 8; e += 2) {
      multiply(d[n], a.x[e][0], a.x[e][1], a.x[e + 1][0], a.x[e + 1][1], b.x[e][n], b.x[e + 1][n]);
    }
    if constexpr (D / 8 % 2 != 0) multiply(d[n], a.x[D / 8 - 1][0], a.x[D / 8 - 1][1], b.x[D / 8 - 1][n]);
  }
}

__device__ __forceinline__ float2 turned(float2 v, float2 cs) {
  return make_float2(v.x * cs.x - v.y * cs.y, v.y * cs.x + v.x * cs.y);
}
__device__ __forceinline__ float2 turned_back(float2 v, float2 cs) {
  return make_float2(v.x * cs.x + v.y * cs.y, v.y * cs.x - v.x * cs.y);
}
__device__ __forceinline__ float2 both(uint32_t pair) { return make_float2(low_half(pair), high_half(pair)); }

// What a thread reads of the rotation and of a weight for its columns of eights `e`.
template <int D>
struct Tables {
  const float2 (*rotations)[D / 2];  // from the first of the 16 rows on
  const float (*weights)[D];

  __device__ __forceinline__ float2 rotation(int e, int h) const {
    return rotations[threadIdx.x % 32 / 4 + 8 * h][4 * e + threadIdx.x % 4];
  }
  __device__ __forceinline__ float2 weight(int which, int e) const {
    return *reinterpret_cast<const float2*>(&weights[which][8 * e + 2 * (threadIdx.x % 4)]);
  }
};

// q or k as it enters the scores, in place; the reciprocal root mean squares of its rows into rstd.
template <int D, bool RotateFirst>
__device__ __forceinline__ void normalise(Matrices<D>& m, float (&rstd)[2], const Tables<D>& tables, int which,
                                          float epsilon) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum = 0.0f;
#pragma unroll
    for (int e = 0; e < D / 8; ++e) {
      const float2 v = both(m.x[e][h]);
      sum = fmaf(v.x, v.x, sum);
      sum = fmaf(v.y, v.y, sum);
    }
    rstd[h] = rsqrtf(over_row(sum) * (1.0f / D) + epsilon);
  }
#pragma unroll
  for (int e = 0; e < D / 8; ++e) {
    const float2 w = tables.weight(which, e);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float2 v = both(m.x[e][h]);
      if (!RotateFirst) v = make_float2(v.x * w.x, v.y * w.y);
      v = turned(v, tables.rotation(e, h));
      v = make_float2(v.x * rstd[h], v.y * rstd[h]);
      if (RotateFirst) v = make_float2(v.x * w.x, v.y * w.y);
      m.x[e][h] = pack(v.x, v.y);
    }
  }
}

// From the gradient of that, but for the scores' scale, to the gradient of the rows as they came, `raw`; adds the
// weight's gradient to d_weight, as ColumnFold leaves it. With n = x * rstd and g the gradient of n, x's is
// rstd * (g - n * mean(g * n)).
template <int D, bool RotateFirst>
__device__ __forceinline__ void through_norm(float (&g)[D / 8][4], const Matrices<D>& raw, const float (&rstd)[2],
                                             const Tables<D>& tables, int which,
                                             float (&d_weight)[ColumnFold<D>::kKept]) {
  const float scale = rsqrtf(static_cast<float>(D));
  float sums[D / 4], dot[2] = {0.0f, 0.0f};
#pragma unroll
  for (int e = 0; e < D / 8; ++e) {
    const float2 w = tables.weight(which, e);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 cs = tables.rotation(e, h), x = both(raw.x[e][h]);
      float2 v = make_float2(g[e][2 * h], g[e][2 * h + 1]), n = x;
      if (RotateFirst) {
        n = turned(x, cs);
      } else {
        v = turned_back(v, cs);
      }
      const float factor = rstd[h] * scale;
      v = make_float2(v.x * factor, v.y * factor);
      sums[2 * e] = h == 0 ? v.x * n.x : fmaf(v.x, n.x, sums[2 * e]);
      sums[2 * e + 1] = h == 0 ? v.y * n.y : fmaf(v.y, n.y, sums[2 * e + 1]);
      v = make_float2(v.x * w.x, v.y * w.y);
      if (RotateFirst) v = turned_back(v, cs);
      dot[h] = fmaf(v.x, x.x, dot[h]);
      dot[h] = fmaf(v.y, x.y, dot[h]);
      g[e][2 * h] = v.x;
      g[e][2 * h + 1] = v.y;
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float mean = over_row(dot[h]) * (1.0f / D) * rstd[h] * rstd[h];
#pragma unroll
    for (int e = 0; e < D / 8; ++e) {
      const float2 x = both(raw.x[e][h]);
      g[e][2 * h] -= x.x * mean;
      g[e][2 * h + 1] -= x.y * mean;
    }
  }
  ColumnFold<D>::fold(sums);
#pragma unroll
  for (int i = 0; i < ColumnFold<D>::kKept; ++i) d_weight[i] += sums[i];
}

// g[16, D] = a b over 16 rows of b, which come transposed.
template <int D>
__device__ __forceinline__ void multiply_rows(float (&g)[D / 8][4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                              const Matrices<D>& b) {
#pragma unroll
  for (int e = 0; e < D / 8; ++e) {
#pragma unroll
    for (int i = 0; i < 4; ++i) g[e][i] = 0.0f;
    multiply(g[e], a0, a1, a2, a3, b.x[e][0], b.x[e][1]);
  }
}

template <int D>
__device__ __forceinline__ Matrices<D> transposed(const Matrices<D>& m) {
  Matrices<D> result;
#pragma unroll
  for (int e = 0; e < D / 8; ++e) {
#pragma unroll
    for (int h = 0; h < 2; ++h) result.x[e][h] = transposed(m.x[e][h]);
  }
  return result;
}

// One head at one position after another.
template <int D>
struct Walk {
  const TemporalArguments& a;
  int head, position;  // of all samples' positions

  // Element of the first frame's row of q, of packed qkv as it came.
  __device__ __forceinline__ int64_t input() const {
    const int sample = position / a.positions, s = position - sample * a.positions;
    return sample * a.batch_stride + s * a.position_stride + head * D;
  }
  // The same of an output of `parts` times heads * D values a token, contiguous.
  __device__ __forceinline__ int64_t output(int parts) const {
    const int sample = position / a.positions, s = position - sample * a.positions;
    const int64_t token = static_cast<int64_t>(sample) * a.frames * a.positions + s;
    return token * parts * a.heads * D + head * D;
  }
  __device__ __forceinline__ bool valid() const { return position < a.count; }
  __device__ __forceinline__ void next() { position += a.parts; }

  // Starts the copies of 16 frames' rows, from frame `first` on, by a warp.
  __device__ __forceinline__ void load(int first, char* q, char* k, char* v, char* d_o, Barrier& full) const {
    const int lane = threadIdx.x % 32, own = lane % 16, count = min(16, a.frames - first);
    if (lane == 0) full.arrive_and_expect(4 * count * D * 2);
    __syncwarp();
    if (own >= count) return;
    const int row = a.heads * D;
    const __nv_bfloat16* in = a.qkv + input() + (first + own) * a.frame_stride;
    const __nv_bfloat16* d_o_in = a.d_o + output(1) + static_cast<int64_t>(first + own) * a.positions * row;
    const bool upper = lane >= 16;
    load_bytes(in + (upper ? row : 0), full, (upper ? k : q) + own * D * 2, D * 2);
    load_bytes(upper ? d_o_in : in + 2 * row, full, (upper ? d_o : v) + own * D * 2, D * 2);
  }
  // Starts the copies of the gradients of q, k and v in these rows to where they belong.
  __device__ __forceinline__ void store(int first, const char* d_q, const char* d_k, const char* d_v) const {
    const int lane = threadIdx.x % 32;
    if (lane < min(16, a.frames - first)) {
      const int row = a.heads * D;
      __nv_bfloat16* to = a.d_qkv + output(3) + static_cast<int64_t>(first + lane) * a.positions * 3 * row;
      store_bytes(to, d_q + lane * D * 2, D * 2);
      store_bytes(to + row, d_k + lane * D * 2, D * 2);
      store_bytes(to + 2 * row, d_v + lane * D * 2, D * 2);
    }
    commit_stores();
  }
};

// What a warp adds up over all positions of its head, and hands over at the end.
template <int D>
struct Sums {
  float d_weights[2][ColumnFold<D>::kKept] = {};
  float columns[D / 8][4] = {};  // rows 0, 1, 2: of the gradients of q, k, v

  // Gradients [16, D] become the rows `tile`, whose columns are added to row `row`, if wanted.
  __device__ __forceinline__ void finish(const float (&g)[D / 8][4], char* tile, int row, bool wanted) {
    Matrices<D> m;
#pragma unroll
    for (int e = 0; e < D / 8; ++e) {
#pragma unroll
      for (int h = 0; h < 2; ++h) m.x[e][h] = pack(g[e][2 * h], g[e][2 * h + 1]);
    }
    __syncwarp();
    m.store(tile);
    if (!wanted) return;
    __syncwarp();
    m.load_transposed(tile);
    // A matrix whose only row of ones is row `row`: in registers, its left and right eight columns.
    const uint32_t one = threadIdx.x % 32 / 4 == row ? 0x3f803f80u : 0u;
#pragma unroll
    for (int e = 0; e < D / 8; ++e) multiply(columns[e], one, 0u, one, 0u, m.x[e][0], m.x[e][1]);
  }
  // Writes them as row `part` of head `head` of both outputs.
  __device__ __forceinline__ void write(const TemporalArguments& a, int part, int head) const {
    const int lane = threadIdx.x % 32;
    const int64_t row = static_cast<int64_t>(part) * a.heads + head;
    float* d_weights_at = a.d_weights + row * 2 * D;
#pragma unroll
    for (int i = 0; i < ColumnFold<D>::kKept; ++i) {
      const int column = ColumnFold<D>::column(i);
      if (column >= 0) {
        d_weights_at[column] = d_weights[0][i];
        d_weights_at[D + column] = d_weights[1][i];
      }
    }
    if (a.d_sums != nullptr && lane / 4 < 3) {
      float* to = a.d_sums + ((static_cast<int64_t>(part) * 3 + lane / 4) * a.heads + head) * D;
#pragma unroll
      for (int e = 0; e < D / 8; ++e) {
        *reinterpret_cast<float2*>(to + 8 * e + 2 * (lane % 4)) = make_float2(columns[e][0], columns[e][1]);
      }
    }
  }
};

// For clips of 17 to 64 frames; see long_backward.cu. The parts of all work that its output has a row of sums for.
int temporal_long_parts(int64_t positions, int frames, int heads);
void temporal_long_backward(const TemporalArguments& a, bool rotate_first, cudaStream_t stream);
constexpr int kMostLongFrames = 64;

}  // namespace stdit
