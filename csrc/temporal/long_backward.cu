// Temporal attention's backward pass over 17 to 64 frames: what backward.cu does for 16, by a team of warps a head.
//
// Each of a team's W warps has 16 frames, as queries and as keys. Rows come as in backward.cu, one head after another;
// what the warps have to know of each other lies in shared memory:
//   1. q and k, normalised and rotated, beside the rows as they came, which the norm's gradient needs again
//   2. s = q k^T and dp = do v^T of own queries over all keys, a block of 16 keys after another; p, ds
//   3. p, in the place of v, and ds; dq = ds k meanwhile, from registers
//   4. dv = p^T do, dk = ds^T q of own keys over all queries, p and ds transposed on their way to registers
// with a barrier of the team between any two of them, and one before the next head's rows may come. While a team waits for
// those, the others of its multiprocessor work: three of four warps, four of three, six of two. Nothing is summed across
// warps but the norms' weights and columns, of which each warp writes a row of its own. It repeats bit for bit.

#include <algorithm>
#include <cstdint>

#include "stdit/launch_check.h"
#include "temporal/rows.h"

namespace stdit {
namespace {

constexpr int kThreads = 32 * kTemporalWarps;
enum LongTile { kQ, kK, kV, kDo, kNormalisedQ, kNormalisedK, kDs, kTiles };
constexpr int kP = kV, kDv = kNormalisedK;  // whose places they take

template <int D, int W>
struct LongShared {
  static constexpr int kRows = 16 * W, kTeams = kTemporalWarps / W;
  static_assert(kRows <= D, "p has a column for each frame, and a row's place is D values");
  alignas(128) char tiles[kTeams][kTiles][kRows * D * 2];
  alignas(16) float2 rotation[kRows][D / 2];  // cosine, sine
  alignas(16) float weights[2][D];
  Barrier full[kTeams];
};

// p or ds of 16 queries over 16 keys, as the first operand of products over keys.
struct Block {
  uint32_t x[2][2];  // [keys in eights][lower eight queries]

  __device__ __forceinline__ explicit Block(const float (&d)[2][4]) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) x[n][h] = pack(d[n][2 * h], d[n][2 * h + 1]);
    }
  }
};

// g[16, D] += a b over 16 rows of b, which come transposed.
template <int D>
__device__ __forceinline__ void add_rows(float (&g)[D / 8][4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         const Matrices<D>& b) {
#pragma unroll
  for (int e = 0; e < D / 8; ++e) multiply(g[e], a0, a1, a2, a3, b.x[e][0], b.x[e][1]);
}

template <int D>
__device__ __forceinline__ void clear(float (&g)[D / 8][4]) {
#pragma unroll
  for (int e = 0; e < D / 8; ++e) {
#pragma unroll
    for (int i = 0; i < 4; ++i) g[e][i] = 0.0f;
  }
}

// Adds to g[16 own keys, D] the product of the transpose of `scores` (p or ds, rows of D values of which the first are
// keys) and of `rows`, over all queries.
template <int D, int W>
__device__ __forceinline__ void add_over_queries(float (&g)[D / 8][4], const char* scores, const char* rows, int own) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  // Matrices in the order of the operand's registers: keys in eights, then queries in eights.
  const uint32_t from =
      shared_address(scores) + (8 * (matrix / 2) + lane % 8) * (D * 2) + (16 * own + 8 * (matrix % 2)) * 2;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    uint32_t x[4];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(from + i * 16 * D * 2)
                 : "memory");
    Matrices<D> b;
    b.load_transposed(rows + i * 16 * D * 2);
    add_rows<D>(g, x[0], x[1], x[2], x[3], b);
  }
}

template <int D, int W, bool RotateFirst>
__global__ void __launch_bounds__(kThreads, 1)
    temporal_long_backward_kernel(const __grid_constant__ TemporalArguments a) {
  using Shared = LongShared<D, W>;
  extern __shared__ char dynamic[];
  auto& s = *reinterpret_cast<Shared*>(dynamic + (128 - shared_address(dynamic) % 128) % 128);
  // Rows of frames that are not there are zero, and stay it, but for those of p.
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(s.tiles) / 16); i += kThreads) {
    reinterpret_cast<uint4*>(s.tiles)[i] = make_uint4(0, 0, 0, 0);
  }
  load_tables<D>(a, Shared::kRows, s.rotation, s.weights);
  if (threadIdx.x < Shared::kTeams) s.full[threadIdx.x].init(W);
  fence_barrier_init();
  fence_async_shared();
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, right = lane / 16;
  const int team = warp / W, own = warp % W, first = 16 * own;
  const int worker = blockIdx.x * Shared::kTeams + team, part = worker / a.heads;
  if (part >= a.parts) return;
  const auto meet = [&] { asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "n"(32 * W) : "memory"); };
  const Tables<D> tables{s.rotation + first, s.weights};
  auto& tiles = s.tiles[team];
  constexpr int kBlock = 16 * D * 2;  // bytes of 16 rows
  const auto rows = [&](int tile) { return tiles[tile] + own * kBlock; };
  Walk<D> at{a, worker % a.heads, part};
  at.load(first, rows(kQ), rows(kK), rows(kV), rows(kDo), s.full[team]);

  Sums<D> sums;
  const bool wanted = a.d_sums != nullptr;
  for (int n = 0; at.valid(); ++n) {
    s.full[team].wait(n % 2);
    // 1. Own rows of q and k
    Matrices<D> q;
    float rstd_q[2], rstd_k[2];
    q.load(rows(kQ));
    normalise<D, RotateFirst>(q, rstd_q, tables, 0, a.epsilon);
    q.store(rows(kNormalisedQ));
    {
      Matrices<D> k;
      k.load(rows(kK));
      normalise<D, RotateFirst>(k, rstd_k, tables, 1, a.epsilon);
      k.store(rows(kNormalisedK));
    }
    meet();

    // 2. p[block of keys][keys in eights][2 * (lower eight queries) + neighbour], then ds likewise
    float p[W][2][4], ds[W][2][4];
#pragma unroll
    for (int j = 0; j < W; ++j) {
      Matrices<D> k;
      k.load(tiles[kNormalisedK] + j * kBlock);
      multiply_columns<D>(p[j], q, k);
    }
    const float to_log2 = kLog2E * rsqrtf(static_cast<float>(D));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = -INFINITY, total = 0.0f;
#pragma unroll
      for (int i = 0; i < 4 * W; ++i) {
        float& score = p[i / 4][i / 2 % 2][2 * h + i % 2];
        score = 8 * (i / 2) + 2 * (lane % 4) + i % 2 < a.frames ? score * to_log2 : -INFINITY;
        most = fmaxf(most, score);
      }
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
#pragma unroll
      for (int i = 0; i < 4 * W; ++i) {
        float& score = p[i / 4][i / 2 % 2][2 * h + i % 2];
        score = exp2_approx(score - most);
        total += score;
      }
      const float inverse = 1.0f / over_row(total);
#pragma unroll
      for (int i = 0; i < 4 * W; ++i) p[i / 4][i / 2 % 2][2 * h + i % 2] *= inverse;
    }
    {
      Matrices<D> d_o;
      d_o.load(rows(kDo));
#pragma unroll
      for (int j = 0; j < W; ++j) {
        Matrices<D> v;
        v.load(tiles[kV] + j * kBlock);
        multiply_columns<D>(ds[j], d_o, v);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float delta = 0.0f;
#pragma unroll
      for (int i = 0; i < 4 * W; ++i) {
        delta = fmaf(p[i / 4][i / 2 % 2][2 * h + i % 2], ds[i / 4][i / 2 % 2][2 * h + i % 2], delta);
      }
      delta = over_row(delta);
#pragma unroll
      for (int i = 0; i < 4 * W; ++i) {
        float& d = ds[i / 4][i / 2 % 2][2 * h + i % 2];
        d = p[i / 4][i / 2 % 2][2 * h + i % 2] * (d - delta);
      }
    }
    meet();

    // 3. p and ds for the others; dq
    float g[D / 8][4];
    clear<D>(g);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const Block p16(p[j]), ds16(ds[j]);
      store_matrices(Matrices<D>::address(rows(kP), 2 * j + right), p16.x[0][0], p16.x[0][1], p16.x[1][0], p16.x[1][1]);
      store_matrices(Matrices<D>::address(rows(kDs), 2 * j + right), ds16.x[0][0], ds16.x[0][1], ds16.x[1][0],
                     ds16.x[1][1]);
      Matrices<D> k;
      k.load_transposed(tiles[kNormalisedK] + j * kBlock);
      add_rows<D>(g, ds16.x[0][0], ds16.x[0][1], ds16.x[1][0], ds16.x[1][1], k);
    }
    {
      Matrices<D> raw;
      raw.load(rows(kQ));
      through_norm<D, RotateFirst>(g, raw, rstd_q, tables, 0, sums.d_weights[0]);
    }
    sums.finish(g, rows(kQ), 0, wanted);
    meet();

    // 4. dv, dk
    clear<D>(g);
    add_over_queries<D, W>(g, tiles[kP], tiles[kDo], own);
    sums.finish(g, rows(kDv), 2, wanted);
    clear<D>(g);
    add_over_queries<D, W>(g, tiles[kDs], tiles[kNormalisedQ], own);
    {
      Matrices<D> raw;
      raw.load(rows(kK));
      through_norm<D, RotateFirst>(g, raw, rstd_k, tables, 1, sums.d_weights[1]);
    }
    sums.finish(g, rows(kK), 1, wanted);
    fence_async_shared();
    __syncwarp();
    at.store(first, rows(kQ), rows(kK), rows(kDv));
    at.next();
    wait_stores_read<0>();
    meet();  // nobody reads this head's rows any more
    if (at.valid()) at.load(first, rows(kQ), rows(kK), rows(kV), rows(kDo), s.full[team]);
  }
  sums.write(a, part * W + own, worker % a.heads);
}

template <int D, int W, bool RotateFirst>
void launch(const TemporalArguments& a, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(LongShared<D, W>) + 128;
  static_assert(kSharedBytes <= kMostSharedBytes, "what a block can have");
  const auto kernel = temporal_long_backward_kernel<D, W, RotateFirst>;
  STDIT_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  constexpr int kTeams = LongShared<D, W>::kTeams;
  kernel<<<(a.parts * a.heads + kTeams - 1) / kTeams, kThreads, kSharedBytes, stream>>>(a);
  check_launch("temporal_long_backward_kernel");
}

int team_of(int frames) { return (frames + 15) / 16; }

template <int W>
void launch(const TemporalArguments& a, bool rotate_first, cudaStream_t stream) {
  if (rotate_first) {
    launch<72, W, true>(a, stream);
  } else {
    launch<72, W, false>(a, stream);
  }
}

}  // namespace

int temporal_long_parts(int64_t positions, int frames, int heads) {
  const int team = team_of(frames);
  const int64_t most = std::max(1, multiprocessors() * (kTemporalWarps / team) / heads);
  return team * static_cast<int>(std::min<int64_t>(most, positions));
}

void temporal_long_backward(const TemporalArguments& a, bool rotate_first, cudaStream_t stream) {
  TemporalArguments own = a;
  const int team = team_of(a.frames);
  own.parts = a.parts / team;  // of work; each warp of a team has a row of sums
  if (team == 2) {
    launch<2>(own, rotate_first, stream);
  } else if (team == 3) {
    launch<3>(own, rotate_first, stream);
  } else {
    launch<4>(own, rotate_first, stream);
  }
}

}  // namespace stdit
