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

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "stdit/launch_check.h"
#include "stdit/temporal.h"
#include "temporal/rows.h"

namespace stdit {
namespace {

constexpr int kFrames = 16, kWarps = kTemporalWarps, kThreads = 32 * kWarps;
constexpr int kQ = 0, kK = 1, kV = 2, kDo = 3;  // tiles

template <int D>
struct TemporalShared {
  static constexpr int kTileBytes = kFrames * D * 2;
  alignas(128) char tiles[kWarps][2][4][kTileBytes];
  alignas(16) float2 rotation[kFrames][D / 2];  // cosine, sine
  alignas(16) float weights[2][D];
  Barrier full[kWarps][2];
};

template <int D, bool RotateFirst>
__global__ void __launch_bounds__(kThreads, 1) temporal_backward_kernel(const __grid_constant__ TemporalArguments a) {
  extern __shared__ char dynamic[];
  auto& s = *reinterpret_cast<TemporalShared<D>*>(dynamic + (128 - shared_address(dynamic) % 128) % 128);
  // Rows of frames that are not there are zero, and stay it.
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(s.tiles) / 16); i += kThreads) {
    reinterpret_cast<uint4*>(s.tiles)[i] = make_uint4(0, 0, 0, 0);
  }
  load_tables<D>(a, kFrames, s.rotation, s.weights);
  if (threadIdx.x < 2 * kWarps) s.full[threadIdx.x / 2][threadIdx.x % 2].init(1);
  fence_barrier_init();
  fence_async_shared();
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int worker = blockIdx.x * kWarps + warp, part = worker / a.heads;
  if (part >= a.parts) return;
  const Tables<D> tables{s.rotation, s.weights};
  auto& tiles = s.tiles[warp];
  Walk<D> at{a, worker % a.heads, part};
  at.load(0, tiles[0][kQ], tiles[0][kK], tiles[0][kV], tiles[0][kDo], s.full[warp][0]);

  Sums<D> sums;
  const bool wanted = a.d_sums != nullptr;

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
    if (next.valid()) {
      auto& other = tiles[(n + 1) % 2];
      next.load(0, other[kQ], other[kK], other[kV], other[kDo], s.full[warp][(n + 1) % 2]);
    }

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
    sums.finish(g, tile[kV], 2, wanted);
    multiply_rows<D>(g, ds16[0][0], ds16[0][1], ds16[1][0], ds16[1][1], transposed<D>(k));
    {
      Matrices<D> raw;
      raw.load(tile[kQ]);
      through_norm<D, RotateFirst>(g, raw, rstd_q, tables, 0, sums.d_weights[0]);
    }
    sums.finish(g, tile[kQ], 0, wanted);
    multiply_rows<D>(g, ds_turned[0][0], ds_turned[1][0], ds_turned[0][1], ds_turned[1][1], transposed<D>(q));
    {
      Matrices<D> raw;
      raw.load(tile[kK]);
      through_norm<D, RotateFirst>(g, raw, rstd_k, tables, 1, sums.d_weights[1]);
    }
    sums.finish(g, tile[kK], 1, wanted);
    fence_async_shared();
    __syncwarp();
    at.store(0, tile[kQ], tile[kK], tile[kV]);
    at.next();
  }

  sums.write(a, part, worker % a.heads);
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
  if (call.head_dim != kHeadDim || call.frames < 1 || call.frames > kMostLongFrames) {
    throw std::invalid_argument("temporal attention: head dimension " + std::to_string(call.head_dim) + " and " +
                                std::to_string(call.frames) + " frames, where " + std::to_string(kHeadDim) +
                                " and at most " + std::to_string(kMostLongFrames) + " can be served");
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
  if (call.frames > kFrames) return temporal_long_parts(call.batch * call.positions, call.frames, call.heads);
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
  if (call.frames > kFrames) {
    temporal_long_backward(a, call.rotate_first, stream);
  } else if (call.rotate_first) {
    launch<kHeadDim, true>(a, stream);
  } else {
    launch<kHeadDim, false>(a, stream);
  }
}

}  // namespace stdit
