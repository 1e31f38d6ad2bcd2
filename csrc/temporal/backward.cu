// Temporal attention's backward pass over at most 16 frames, repeating bit for bit: from packed qkv and the gradient of
// the output to that of qkv, of the norms' weights and, as sums over rows, of a bias in qkv.
//
// A warp is on its own: it takes one head at one position after another, 16 rows each of q, k, v and do, which the copy
// engine brings as they lie (rows of D values, which meet no bank twice where D / 8 is odd) while the head before is
// worked on. All products are those of one warp (m16n8k16), and each operand is where it stands already:
//   s = q k^T, dp = do v^T      rows of q and do as one operand; the same layout of k and v is the other
//   dv = p^T do                 p^T by transposing registers, do from shared memory, transposed on the way
//   dq = ds k, dk = ds^T q      normalised and rotated k and q by transposing registers
// Pairs of channels that turn together lie in one register, so norm, weight and rotation need no exchange but the row
// sums. Gradients replace q, k and v in shared memory, from where they are copied out, and from where the tensor cores
// sum their columns: by a matrix with a row of ones, whose sums stay in registers from position to position, since a
// warp keeps its head.
//
// Twelve warps a multiprocessor is what shared memory has room for, and 168 registers a thread.

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "attention/shared.h"
#include "stdit/attention_tiles.h"
#include "stdit/launch_check.h"
#include "stdit/temporal.h"

namespace stdit {
namespace {

constexpr int kFrames = 16, kWarps = 12, kThreads = 32 * kWarps;
constexpr int kQ = 0, kK = 1, kV = 2, kDo = 3;  // tiles

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

template <int D>
struct TemporalShared {
  static constexpr int kTileBytes = kFrames * D * 2;
  alignas(128) char tiles[kWarps][2][4][kTileBytes];
  alignas(16) float2 rotation[kFrames][D / 2];  // cosine, sine
  alignas(16) float weights[2][D];
  Barrier full[kWarps][2];
};

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
  const TemporalShared<D>& s;

  __device__ __forceinline__ float2 rotation(int e, int h) const {
    return s.rotation[threadIdx.x % 32 / 4 + 8 * h][4 * e + threadIdx.x % 4];
  }
  __device__ __forceinline__ float2 weight(int which, int e) const {
    return *reinterpret_cast<const float2*>(&s.weights[which][8 * e + 2 * (threadIdx.x % 4)]);
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

  // Starts the copies of all four tiles.
  __device__ __forceinline__ void load(char (&tiles)[4][TemporalShared<D>::kTileBytes], Barrier& full) const {
    const int lane = threadIdx.x % 32, frame = lane % 16;
    if (lane == 0) full.arrive_and_expect(4 * a.frames * D * 2);
    __syncwarp();
    if (frame >= a.frames) return;
    const int row = a.heads * D;
    const __nv_bfloat16* in = a.qkv + input() + frame * a.frame_stride;
    const __nv_bfloat16* d_o = a.d_o + output(1) + static_cast<int64_t>(frame) * a.positions * row;
    const bool upper = lane >= 16;
    load_bytes(in + (upper ? row : 0), full, tiles[upper ? kK : kQ] + frame * D * 2, D * 2);
    load_bytes(upper ? d_o : in + 2 * row, full, tiles[upper ? kDo : kV] + frame * D * 2, D * 2);
  }
  // Starts the copies of the first three tiles to where the gradients belong.
  __device__ __forceinline__ void store(const char (&tiles)[4][TemporalShared<D>::kTileBytes]) const {
    const int lane = threadIdx.x % 32;
    if (lane < a.frames) {
      const int row = a.heads * D;
      __nv_bfloat16* to = a.d_qkv + output(3) + static_cast<int64_t>(lane) * a.positions * 3 * row;
#pragma unroll
      for (int i = 0; i < 3; ++i) store_bytes(to + i * row, tiles[i] + lane * D * 2, D * 2);
    }
    commit_stores();
  }
};

template <int D, bool RotateFirst>
__global__ void __launch_bounds__(kThreads, 1) temporal_backward_kernel(const __grid_constant__ TemporalArguments a) {
  extern __shared__ char dynamic[];
  auto& s = *reinterpret_cast<TemporalShared<D>*>(dynamic + (128 - shared_address(dynamic) % 128) % 128);
  // Rows of frames that are not there are zero, and stay it.
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(s.tiles) / 16); i += kThreads) {
    reinterpret_cast<uint4*>(s.tiles)[i] = make_uint4(0, 0, 0, 0);
  }
  for (int i = threadIdx.x; i < kFrames * (D / 2); i += kThreads) {
    const int frame = i / (D / 2), pair = i % (D / 2);
    const float* from = a.rotation + frame * D + pair;
    s.rotation[frame][pair] = frame < a.frames ? make_float2(from[0], from[D / 2]) : make_float2(1.0f, 0.0f);
  }
  for (int i = threadIdx.x; i < 2 * D; i += kThreads) {
    const void* weight = i < D ? a.q_weight : a.k_weight;
    s.weights[i / D][i % D] = a.in_float32 ? static_cast<const float*>(weight)[i % D]
                                           : __bfloat162float(static_cast<const __nv_bfloat16*>(weight)[i % D]);
  }
  if (threadIdx.x < 2 * kWarps) s.full[threadIdx.x / 2][threadIdx.x % 2].init(1);
  fence_barrier_init();
  fence_async_shared();
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int worker = blockIdx.x * kWarps + warp, part = worker / a.heads;
  if (part >= a.parts) return;
  const Tables<D> tables{s};
  auto& tiles = s.tiles[warp];
  Walk<D> at{a, worker % a.heads, part};
  at.load(tiles[0], s.full[warp][0]);

  float d_weights[2][ColumnFold<D>::kKept] = {};
  float sums[D / 8][4] = {};  // rows 0, 1, 2: of the gradients of q, k, v
  // A matrix whose only row of ones is row `row`: in registers, its left and right eight columns.
  const auto ones = [&](int row) { return lane / 4 == row ? 0x3f803f80u : 0u; };
  // Gradients become a tile.
  const auto finish = [&](const float (&g)[D / 8][4], char* tile, int row) {
    Matrices<D> m;
#pragma unroll
    for (int e = 0; e < D / 8; ++e) {
#pragma unroll
      for (int h = 0; h < 2; ++h) m.x[e][h] = pack(g[e][2 * h], g[e][2 * h + 1]);
    }
    __syncwarp();
    m.store(tile);
    if (a.d_sums == nullptr) return;
    __syncwarp();
    m.load_transposed(tile);
    const uint32_t one = ones(row);
#pragma unroll
    for (int e = 0; e < D / 8; ++e) multiply(sums[e], one, 0u, one, 0u, m.x[e][0], m.x[e][1]);
  };

  for (int n = 0; at.valid(); ++n) {
    auto& tile = tiles[n % 2];
    s.full[warp][n % 2].wait(n / 2 % 2);
    Matrices<D> q, k;
    float rstd_q[2], rstd_k[2];
    q.load(tile[kQ]);
    k.load(tile[kK]);
    normalise<D, RotateFirst>(q, rstd_q, tables, 0, a.epsilon);
    normalise<D, RotateFirst>(k, rstd_k, tables, 1, a.epsilon);

    // Probabilities. p[keys in eights][2 * (lower eight queries) + neighbour]
    float p[2][4], ds[2][4];
    multiply_columns<D>(p, q, k);
    const float to_log2 = kLog2E * rsqrtf(static_cast<float>(D));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = -INFINITY, total = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = p[i / 2][2 * h + i % 2];
        score = 8 * (i / 2) + 2 * (lane % 4) + i % 2 < a.frames ? score * to_log2 : -INFINITY;
        most = fmaxf(most, score);
      }
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = p[i / 2][2 * h + i % 2];
        score = exp2_approx(score - most);
        total += score;
      }
      const float inverse = 1.0f / over_row(total);
#pragma unroll
      for (int i = 0; i < 4; ++i) p[i / 2][2 * h + i % 2] *= inverse;
    }

    // The next head's tiles come meanwhile, where the gradients of the head before have left.
    Walk<D> next = at;
    next.next();
    wait_stores_read<0>();
    __syncwarp();
    if (next.valid()) next.load(tiles[(n + 1) % 2], s.full[warp][(n + 1) % 2]);

    // Gradients of the scores
    {
      Matrices<D> d_o, v;
      d_o.load(tile[kDo]);
      v.load(tile[kV]);
      multiply_columns<D>(ds, d_o, v);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float delta = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) delta = fmaf(p[i / 2][2 * h + i % 2], ds[i / 2][2 * h + i % 2], delta);
      delta = over_row(delta);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& d = ds[i / 2][2 * h + i % 2];
        d = p[i / 2][2 * h + i % 2] * (d - delta);
      }
    }
    uint32_t p_turned[2][2], ds16[2][2], ds_turned[2][2];  // [keys in eights][lower eight queries]
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        p_turned[i][h] = transposed(pack(p[i][2 * h], p[i][2 * h + 1]));
        ds16[i][h] = pack(ds[i][2 * h], ds[i][2 * h + 1]);
        ds_turned[i][h] = transposed(ds16[i][h]);
      }
    }

    float g[D / 8][4];
    {
      Matrices<D> d_o;
      d_o.load_transposed(tile[kDo]);
      multiply_rows<D>(g, p_turned[0][0], p_turned[1][0], p_turned[0][1], p_turned[1][1], d_o);
    }
    finish(g, tile[kV], 2);
    multiply_rows<D>(g, ds16[0][0], ds16[0][1], ds16[1][0], ds16[1][1], transposed<D>(k));
    {
      Matrices<D> raw;
      raw.load(tile[kQ]);
      through_norm<D, RotateFirst>(g, raw, rstd_q, tables, 0, d_weights[0]);
    }
    finish(g, tile[kQ], 0);
    multiply_rows<D>(g, ds_turned[0][0], ds_turned[1][0], ds_turned[0][1], ds_turned[1][1], transposed<D>(q));
    {
      Matrices<D> raw;
      raw.load(tile[kK]);
      through_norm<D, RotateFirst>(g, raw, rstd_k, tables, 1, d_weights[1]);
    }
    finish(g, tile[kK], 1);
    fence_async_shared();
    __syncwarp();
    at.store(tile);
    at.next();
  }

  float* d_weights_at = a.d_weights + static_cast<int64_t>(worker) * 2 * D;
#pragma unroll
  for (int i = 0; i < ColumnFold<D>::kKept; ++i) {
    const int column = ColumnFold<D>::column(i);
    if (column >= 0) {
      d_weights_at[column] = d_weights[0][i];
      d_weights_at[D + column] = d_weights[1][i];
    }
  }
  if (a.d_sums != nullptr && lane / 4 < 3) {
    float* to = a.d_sums + ((static_cast<int64_t>(part) * 3 + lane / 4) * a.heads + worker % a.heads) * D;
#pragma unroll
    for (int e = 0; e < D / 8; ++e) {
      *reinterpret_cast<float2*>(to + 8 * e + 2 * (lane % 4)) = make_float2(sums[e][0], sums[e][1]);
    }
  }
  wait_stores_read<0>();
}

template <int D, bool RotateFirst>
void launch(const TemporalArguments& a, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(TemporalShared<D>) + 128;
  static_assert(kSharedBytes <= kMostSharedBytes, "what a block can have");
  const auto kernel = temporal_backward_kernel<D, RotateFirst>;
  STDIT_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  const int blocks = (a.parts * a.heads + kWarps - 1) / kWarps;
  kernel<<<blocks, kThreads, kSharedBytes, stream>>>(a);
  check_launch("temporal_backward_kernel");
}

void check_address(const char* name, const void* address) {
  if (address == nullptr || reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    throw std::invalid_argument(std::string("temporal attention: ") + name +
                                " is null or does not begin at a multiple of 16 bytes");
  }
}

}  // namespace

constexpr int kHeadDim = 72;

void check_temporal(const stdit_temporal& call) {
  check_address("qkv", call.qkv);
  check_address("d_o", call.d_o);
  check_address("d_qkv", call.d_qkv);
  if (call.head_dim != kHeadDim || call.frames < 1 || call.frames > kFrames) {
    throw std::invalid_argument("temporal attention: head dimension " + std::to_string(call.head_dim) + " and " +
                                std::to_string(call.frames) + " frames, where " + std::to_string(kHeadDim) +
                                " and at most " + std::to_string(kFrames) + " can be served");
  }
  for (const int64_t stride : {call.batch_stride, call.frame_stride, call.position_stride}) {
    if (stride % 8 != 0 || stride <= 0) {
      throw std::invalid_argument("temporal attention: a stride of qkv is " + std::to_string(stride) +
                                  " elements, where multiples of 8 can be served");
    }
  }
  if (call.weight_dtype != STDIT_FLOAT32 && call.weight_dtype != STDIT_BFLOAT16) {
    throw std::invalid_argument("temporal attention: unknown dtype of the weights");
  }
  if (call.batch < 1 || call.positions < 1 || call.heads < 1 || call.batch * call.positions > (int64_t{1} << 30)) {
    throw std::invalid_argument("temporal attention: an empty dimension, or more than 2^30 positions");
  }
}

// As many as keep all multiprocessors' warps busy with a head each.
int temporal_parts(const stdit_temporal& call) {
  const int64_t most = std::max(1, multiprocessors() * kWarps / call.heads);
  return static_cast<int>(std::min<int64_t>(most, call.batch * call.positions));
}

void temporal_backward(const stdit_temporal& call, cudaStream_t stream) {
  const TemporalArguments a{static_cast<const __nv_bfloat16*>(call.qkv),
                            call.batch_stride,
                            call.frame_stride,
                            call.position_stride,
                            static_cast<const __nv_bfloat16*>(call.d_o),
                            static_cast<__nv_bfloat16*>(call.d_qkv),
                            call.q_weight,
                            call.k_weight,
                            call.weight_dtype == STDIT_FLOAT32,
                            call.rotation,
                            call.d_weights,
                            call.d_sums,
                            call.epsilon,
                            static_cast<int>(call.batch * call.positions),
                            call.frames,
                            static_cast<int>(call.positions),
                            call.heads,
                            temporal_parts(call)};
  if (call.rotate_first) {
    launch<kHeadDim, true>(a, stream);
  } else {
    launch<kHeadDim, false>(a, stream);
  }
}

}  // namespace stdit
