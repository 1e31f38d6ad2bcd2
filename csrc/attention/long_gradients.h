// What the backward passes over long sequences share (long_backward.cu and rounded_backward.cu): their two kernels but
// for what consumers do with tiles, which each file has for its own head dimensions, and the host's part.
//
// Where keys are rounded as they are normalised (kRoundsLongKeys), k's image holds them so, and images have columns for
// lse and delta (row_image.h). Where not, keys' factors come with their tiles, and lse and delta with queries'.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "attention/gradients.h"
#include "attention/head_dim.h"
#include "attention/key_image.h"
#include "attention/row_image.h"
#include "attention/shared.h"
#include "attention/turns.h"
#include "stdit/attention_tiles.h"

namespace stdit {

__host__ __device__ constexpr int ceil_div(int n, int d) { return (n + d - 1) / d; }
__host__ __device__ constexpr int round_up(int n, int d) { return ceil_div(n, d) * d; }

// Rounded keys leave scores to be scaled, where the norms do not; else keys' factors do that.
struct ScaledNorm : NormArguments {
  float left_scale;  // of scores, to units of log2
};
template <int D>
using Norm = std::conditional_t<kRoundsLongKeys<D>, ScaledNorm, NormArguments>;

// What comes with each tile of a ring: nothing of rounded keys.
struct Nothing {};
template <int D, class T, int Count, int Stages>
using Beside = std::conditional_t<kRoundsLongKeys<D>, Nothing, T[Stages][Count]>;
template <int D>
constexpr int kBesideAlignment = kRoundsLongKeys<D> ? 1 : 128;

// ------------------------------------------------------------ dq

template <int D_, int Consumers_, int Keys_, int Stages_>
struct QueryGradient {
  static constexpr int D = D_, kConsumers = Consumers_, kKeys = Keys_, kStages = Stages_;
  static constexpr int kQueries = 64 * kConsumers, kThreads = 128 * (kConsumers + 1);
  static constexpr int kFeederRegisters = 32;
  static constexpr int kConsumerRegisters = consumer_registers(kConsumers, kFeederRegisters);
  using QueryTile = Tile<D, 64>;  // of one consumer
  using KeyTile = Tile<D, kKeys>;
  static constexpr int kKeyBytes = static_cast<int>(Image<D>::bytes(kKeys));

  struct Shared {
    alignas(1024) char q[2][kConsumers][QueryTile::kBytes];
    alignas(1024) char d_o[2][kConsumers][QueryTile::kBytes];
    alignas(1024) char o[kConsumers][QueryTile::kBytes];
    alignas(1024) char v[kStages][KeyTile::kBytes];
    alignas(128) char k[kStages][kKeyBytes];
    alignas(kBesideAlignment<D>) Beside<D, float, kKeys, kStages> factors;
    alignas(16) float2 rows[2][kQueries];  // lse in units of log2, delta
    alignas(16) float weights[D];
    float weight_sums[4 * kConsumers][D];
    Barrier q_full[2], q_empty[2], o_full, o_empty, kv_full[kStages], kv_empty[kStages];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;
  static_assert(kSharedBytes <= 232448, "what a block can have");
};

template <int D>
struct QueryArguments {
  TileMaps q, d_o, o, v;
  HeadArray raw_q, d_q;
  Norm<D> norm;
  const char* key_image;     // [sequences * heads] of key_length rows
  const float* key_factors;  // [sequences * heads, key_length]; null of rounded keys
  const float* lse;          // [sequences * heads, queries]
  char* query_image;       // [sequences * heads] of row_length rows: q as it is multiplied; written
  char* d_o_image;         // likewise of do; written
  float2* rows;            // [sequences * heads, row_length]: lse in units of log2, delta; written; or null
  float* weight_partials;  // [blocks, D]; null: the weights' gradients are not asked for
  int heads, units, queries, keys, query_blocks, key_tiles, key_length, row_length;
};

// A block's units: queries of a head, one after another.
template <class G>
struct QueryUnit {
  int at, item, head, sequence, first_query;

  __device__ __forceinline__ explicit QueryUnit(const QueryArguments<G::D>& a) : at(blockIdx.x) { find(a); }
  __device__ __forceinline__ bool valid(const QueryArguments<G::D>& a) const { return at < a.units; }
  __device__ __forceinline__ void next(const QueryArguments<G::D>& a) {
    at += gridDim.x;
    find(a);
  }
  __device__ __forceinline__ void find(const QueryArguments<G::D>& a) {
    item = at / a.query_blocks;
    first_query = (at - item * a.query_blocks) * G::kQueries;
    sequence = item / a.heads;
    head = item - sequence * a.heads;
  }
  // Consumers that have queries of it.
  __device__ __forceinline__ int tiles(const QueryArguments<G::D>& a) const {
    return min(G::kConsumers, ceil_div(a.queries - first_query, 64));
  }
};

// Brings a unit's queries, a tile at a time.
template <class G>
struct QueryLoader {
  QueryUnit<G> u;
  int tiles = 0, loaded = 0, loads = 0;
  RingPlace<1> o;
  RingPlace<2> q;

  __device__ __forceinline__ explicit QueryLoader(const QueryArguments<G::D>& a) : u(a) { begin(a); }
  __device__ __forceinline__ void begin(const QueryArguments<G::D>& a) {
    tiles = u.valid(a) ? u.tiles(a) : 0;
    loads = 3 * tiles;
    loaded = 0;
  }
  __device__ __forceinline__ void load(const QueryArguments<G::D>& a, typename G::Shared& s) {
    constexpr int D = G::D;
    const int part = loaded / tiles, w = loaded - part * tiles, query = u.first_query + 64 * w;
    if (loaded == 0) {
      s.q_empty[q.stage].wait(q.parity ^ 1);
      s.q_full[q.stage].arrive_and_expect(2 * tiles * G::QueryTile::kLoadBytes);
      s.o_empty.wait(o.parity ^ 1);
      s.o_full.arrive_and_expect(tiles * G::QueryTile::kLoadBytes);
    }
    if (part == 0) load_tile<D, 64>(a.q, s.q_full[q.stage], s.q[q.stage][w], query, u.head, u.sequence);
    if (part == 1) load_tile<D, 64>(a.d_o, s.q_full[q.stage], s.d_o[q.stage][w], query, u.head, u.sequence);
    if (part == 2) load_tile<D, 64>(a.o, s.o_full, s.o[w], query, u.head, u.sequence);
    if (++loaded == loads) {
      q.next();
      o.next();
      u.next(a);
    }
  }
};

template <class G>
__device__ __forceinline__ void produce(const QueryArguments<G::D>& a, typename G::Shared& s) {
  constexpr int D = G::D;
  RingPlace<G::kStages> kv;
  QueryLoader<G> ahead(a);
  while (ahead.loaded < ahead.loads) ahead.load(a, s);
  for (QueryUnit<G> u(a); u.valid(a); u.next(a)) {
    ahead.begin(a);
    const int64_t row0 = static_cast<int64_t>(u.item) * a.key_length;
    for (int tile = 0; tile < a.key_tiles; ++tile) {
      Barrier& full = s.kv_full[kv.stage];
      const int64_t row = row0 + tile * G::kKeys;
      s.kv_empty[kv.stage].wait(kv.parity ^ 1);
      full.arrive_and_expect(G::KeyTile::kLoadBytes + G::kKeyBytes +
                             (kRoundsLongKeys<D> ? 0 : G::kKeys * sizeof(float)));
      load_bytes(a.key_image + Image<D>::bytes(row), full, s.k[kv.stage], G::kKeyBytes);
      load_tile<D, G::kKeys>(a.v, full, s.v[kv.stage], tile * G::kKeys, u.head, u.sequence);
      if constexpr (!kRoundsLongKeys<D>) {
        load_bytes(a.key_factors + row, full, s.factors[kv.stage], sizeof(s.factors[0]));
      }
      kv.next();
      // The next unit's queries, no more at a time than lets keys through.
      if (tile >= min(G::kStages, a.key_tiles) - 1) {
        const int left = a.key_tiles - tile;
        for (int n = ceil_div(ahead.loads - ahead.loaded, left); n > 0; --n) ahead.load(a, s);
      }
    }
  }
}

// Normalises 16 queries, by a warp, and makes what is known of them but for their scores, for the other kernel too.
template <class G>
__device__ __forceinline__ void prepare_rows(const QueryArguments<G::D>& a, typename G::Shared& s,
                                             const QueryUnit<G>& u, int stage, int group) {
  constexpr int D = G::D;
  using T = typename G::QueryTile;
  const int lane = threadIdx.x % 32;
  const int row = group % 4 * 16 + lane / 2, in_unit = group * 16 + lane / 2, query = u.first_query + in_unit;
  const int64_t row0 = static_cast<int64_t>(u.item) * a.row_length + u.first_query;
  char* const query_image = a.query_image + Image<D>::bytes(row0);
  char* const d_o_image = a.d_o_image + Image<D>::bytes(row0);
  float lse = 0.0f;
  if (query < a.queries) lse = __ldg(a.lse + static_cast<int64_t>(u.item) * a.queries + query) * kLog2E;
  uint4 pieces[HalfRow<D, 64>::kEach];
  const HalfRow<D, 64> share = HalfRow<D, 64>::read(s.q[stage][group / 4], row, pieces);
  float sums[2] = {};
#pragma unroll
  for (int i = 0; i < share.kEach; ++i) {
    if (!share.there(i)) continue;
    const int at = T::offset(row, share.piece(i));
    const uint4 x = *reinterpret_cast<const uint4*>(s.d_o[stage][group / 4] + at);
    const uint4 y = *reinterpret_cast<const uint4*>(s.o[group / 4] + at);
    *reinterpret_cast<uint4*>(d_o_image + Image<D>::offset(in_unit, share.piece(i))) = x;
    const uint32_t left[4] = {x.x, x.y, x.z, x.w}, right[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sums[0] = fmaf(low_half(left[j]), low_half(right[j]), sums[0]);
      sums[1] = fmaf(high_half(left[j]), high_half(right[j]), sums[1]);
    }
  }
  const float sum = sums[0] + sums[1], delta = sum + __shfl_xor_sync(~0u, sum, 1);
  if (a.norm.folds()) scale_row<D, 64>(pieces, share, a.norm.normalise_q, a.norm.epsilon, s.weights);
#pragma unroll
  for (int i = 0; i < share.kEach; ++i) {
    if (!share.there(i)) continue;
    *reinterpret_cast<uint4*>(s.q[stage][group / 4] + T::offset(row, share.piece(i))) = pieces[i];
    *reinterpret_cast<uint4*>(query_image + Image<D>::offset(in_unit, share.piece(i))) = pieces[i];
  }
  // Zeroes for a query that is not there: its do is zero too, so nothing comes of it.
  if constexpr (kRoundsLongKeys<D>) {
    if (lane % 2 == 0) {
      const uint4 parts = in_parts(-lse / a.norm.left_scale);
      *reinterpret_cast<uint4*>(s.q[stage][group / 4] + T::offset(row, D / 8)) = parts;
      *reinterpret_cast<uint4*>(query_image + Image<D>::offset(in_unit, D / 8)) = parts;
    } else {
      *reinterpret_cast<uint4*>(d_o_image + Image<D>::offset(in_unit, D / 8)) = in_parts(-delta);
    }
  }
  if (lane % 2 == 0) {
    s.rows[stage][in_unit] = make_float2(lse, delta);
    if constexpr (!kRoundsLongKeys<D>) a.rows[row0 + in_unit] = make_float2(lse, delta);
  }
}

// Zeroes for what is left of a head's last tile of the other kernel, by `threads` threads.
template <class G>
__device__ __forceinline__ void clear_rest(const QueryArguments<G::D>& a, const QueryUnit<G>& u, int thread,
                                           int threads) {
  constexpr int D = G::D;
  const int end = u.first_query + 64 * u.tiles(a), rows = a.row_length - end;
  if (end < a.queries) return;
  const int64_t row0 = static_cast<int64_t>(u.item) * a.row_length + end;
  const int pieces = kRoundsLongKeys<D> ? rows / 8 * (Image<D>::kGroupBytes / 16) : rows * (D / 8);
  for (int i = thread; i < pieces; i += threads) {
    const int64_t at = Image<D>::bytes(row0) + 16 * i;
    *reinterpret_cast<uint4*>(a.query_image + at) = make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(a.d_o_image + at) = make_uint4(0, 0, 0, 0);
  }
  if constexpr (!kRoundsLongKeys<D>) {
    for (int i = thread; i < rows; i += threads) a.rows[row0 + i] = make_float2(0.0f, 0.0f);
  }
}

// Zeroes for keys that are not there, `keys` and those that follow, of a tile that begins with key `first`.
template <int Keys>
__device__ __forceinline__ void mask_keys(float (&ds)[Keys / 2], int first, int keys) {
#pragma unroll
  for (int i = 0; i < Keys / 2; ++i) {
    if (first + 8 * (i / 4) + 2 * static_cast<int>(threadIdx.x % 4) + i % 2 >= keys) ds[i] = 0.0f;
  }
}

// What a consumer does with its units, normalising their queries itself: each file's own.
template <class G>
__device__ __forceinline__ void consume(const QueryArguments<G::D>& a, typename G::Shared& s, int consumer);

template <class G>
__global__ void __launch_bounds__(G::kThreads, 1) attention_dq_kernel(const __grid_constant__ QueryArguments<G::D> a) {
  extern __shared__ char dynamic[];
  auto& s = *reinterpret_cast<typename G::Shared*>(aligned_1024(dynamic));
  if (threadIdx.x == 0) {
    init_ring(s.q_full, s.q_empty, G::kConsumers);
    s.o_full.init(1);
    s.o_empty.init(4 * G::kConsumers * kWarpArrivals);
    init_ring(s.kv_full, s.kv_empty, G::kConsumers);
    fence_barrier_init();
  }
  for (int i = threadIdx.x; i < G::D; i += G::kThreads) {
    s.weights[i] = kRoundsLongKeys<G::D> || a.norm.folds() ? a.norm.weight(i) * a.norm.scale * kLog2E : 1.0f;
  }
  for (int i = threadIdx.x; i < 4 * G::kConsumers * G::D; i += G::kThreads) (&s.weight_sums[0][0])[i] = 0.0f;
  __syncthreads();
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same for a warp, as the compiler can see
  if (group == 0) {
    leave_registers<G::kFeederRegisters>();
    if (threadIdx.x == 0) produce<G>(a, s);
  } else {
    take_registers<G::kConsumerRegisters>();
    consume<G>(a, s, group - 1);
  }
}

// ------------------------------------------------------------ dk and dv

template <int D_, int Queries_, int Stages_>
struct KeyGradient {
  static constexpr int D = D_, kConsumers = 2, kQueries = Queries_, kStages = Stages_;
  static constexpr int kKeys = 64 * kConsumers, kThreads = 128 * (kConsumers + 1);
  static constexpr int kFeederRegisters = 40;
  static constexpr int kConsumerRegisters = consumer_registers(kConsumers, kFeederRegisters);
  using KeyTile = Tile<D, 64>;  // of one consumer
  static constexpr int kQueryBytes = static_cast<int>(Image<D>::bytes(kQueries));
  static constexpr int kGroups = 64 / 8, kKeyBytes = kGroups * Image<D>::kGroupBytes;

  struct Shared {
    alignas(1024) char v[2][kConsumers][KeyTile::kBytes];
    alignas(128) char k[2][kConsumers][kGroups][Image<D>::kGroupBytes];
    alignas(128) char q[kStages][kQueryBytes];
    alignas(128) char d_o[kStages][kQueryBytes];
    alignas(kBesideAlignment<D>) Beside<D, float2, kQueries, kStages> rows;  // lse in units of log2, delta
    Barrier kv_full[2], kv_empty[2], q_full[kStages], q_empty[kStages];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;
  static_assert(kSharedBytes <= 232448, "what a block can have");
};

template <int D>
struct KeyArguments {
  TileMaps v;
  HeadArray d_k, d_v;
  Norm<D> norm;
  const char* key_image;     // [sequences * heads] of key_length rows
  const float* key_factors;  // [sequences * heads, key_length]
  const char* query_image;  // [sequences * heads] of row_length rows
  const char* d_o_image;
  const float2* rows;  // [sequences * heads, row_length]; or null
  int heads, units, keys, query_tiles, key_blocks, key_length, row_length;
};

// A block's units: keys of a head, one after another.
template <class G>
struct KeyUnit {
  int at, item, head, sequence, first_key;

  __device__ __forceinline__ explicit KeyUnit(const KeyArguments<G::D>& a) : at(blockIdx.x) { find(a); }
  __device__ __forceinline__ bool valid(const KeyArguments<G::D>& a) const { return at < a.units; }
  __device__ __forceinline__ void next(const KeyArguments<G::D>& a) {
    at += gridDim.x;
    find(a);
  }
  __device__ __forceinline__ void find(const KeyArguments<G::D>& a) {
    item = at / a.key_blocks;
    first_key = (at - item * a.key_blocks) * G::kKeys;
    sequence = item / a.heads;
    head = item - sequence * a.heads;
  }
  // Consumers that have keys of it.
  __device__ __forceinline__ int tiles(const KeyArguments<G::D>& a) const {
    return min(G::kConsumers, ceil_div(a.keys - first_key, 64));
  }
};

template <class G>
__device__ __forceinline__ void produce(const KeyArguments<G::D>& a, typename G::Shared& s) {
  constexpr int D = G::D, kQueries = G::kQueries;
  RingPlace<2> kv;
  RingPlace<G::kStages> q;
  for (KeyUnit<G> u(a); u.valid(a); u.next(a)) {
    Barrier& kv_full = s.kv_full[kv.stage];
    s.kv_empty[kv.stage].wait(kv.parity ^ 1);
    const int tiles = u.tiles(a);
    kv_full.arrive_and_expect(tiles * (G::kKeyBytes + G::KeyTile::kLoadBytes));
    const char* key_image = a.key_image + Image<D>::bytes(static_cast<int64_t>(u.item) * a.key_length + u.first_key);
    for (int w = 0; w < tiles; ++w) {
      if constexpr (kRoundsLongKeys<D>) {
        load_bytes(key_image + Image<D>::bytes(64 * w), kv_full, s.k[kv.stage][w], G::kKeyBytes);
      } else {
        for (int i = 0; i < G::kGroups; ++i) {
          load_bytes(key_image + Image<D>::bytes(64 * w + 8 * i), kv_full, s.k[kv.stage][w][i], Image<D>::kGroupBytes);
        }
      }
      load_tile<D, 64>(a.v, kv_full, s.v[kv.stage][w], u.first_key + 64 * w, u.head, u.sequence);
    }
    kv.next();
    const int64_t row0 = static_cast<int64_t>(u.item) * a.row_length;
    for (int tile = 0; tile < a.query_tiles; ++tile) {
      Barrier& full = s.q_full[q.stage];
      const int64_t row = row0 + tile * kQueries;
      s.q_empty[q.stage].wait(q.parity ^ 1);
      full.arrive_and_expect(2 * G::kQueryBytes + (kRoundsLongKeys<D> ? 0 : kQueries * sizeof(float2)));
      load_bytes(a.query_image + Image<D>::bytes(row), full, s.q[q.stage], G::kQueryBytes);
      load_bytes(a.d_o_image + Image<D>::bytes(row), full, s.d_o[q.stage], G::kQueryBytes);
      if constexpr (!kRoundsLongKeys<D>) load_bytes(a.rows + row, full, s.rows[q.stage], sizeof(s.rows[0]));
      q.next();
    }
  }
}

template <class G>
__device__ __forceinline__ void consume(const KeyArguments<G::D>& a, typename G::Shared& s, int consumer);

template <class G>
__global__ void __launch_bounds__(G::kThreads, 1) attention_dkv_kernel(const __grid_constant__ KeyArguments<G::D> a) {
  extern __shared__ char dynamic[];
  auto& s = *reinterpret_cast<typename G::Shared*>(aligned_1024(dynamic));
  if (threadIdx.x == 0) {
    init_ring(s.kv_full, s.kv_empty, G::kConsumers);
    init_ring(s.q_full, s.q_empty, G::kConsumers);
    fence_barrier_init();
  }
  __syncthreads();
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same for a warp, as the compiler can see
  if (group == 0) {
    leave_registers<G::kFeederRegisters>();
    if (threadIdx.x == 0) produce<G>(a, s);
  } else {
    take_registers<G::kConsumerRegisters>();
    consume<G>(a, s, group - 1);
  }
}

// ------------------------------------------------------------ the host's part

// Where the parts of the scratch memory begin.
template <class Q, class K>
struct Plan {
  int64_t items, query_units, key_units;
  int64_t key_image_at, key_factors_at, query_image_at, d_o_image_at, rows_at, weights_at, bytes;
  int query_blocks, key_blocks, query_tiles, key_tiles, row_length, key_length, query_grid, key_grid;

  explicit Plan(const stdit_attention& call) {
    constexpr int D = Q::D;
    const int queries = static_cast<int>(call.queries), keys = static_cast<int>(call.keys);
    const auto aligned = [](int64_t n) { return (n + 255) / 256 * 256; };
    const int most = multiprocessors();
    items = call.sequences * call.heads;
    query_blocks = ceil_div(queries, Q::kQueries);
    key_blocks = ceil_div(keys, K::kKeys);
    query_tiles = ceil_div(queries, K::kQueries);
    key_tiles = ceil_div(keys, Q::kKeys);
    // So that tiles of either kernel can be copied whole.
    row_length = std::max(query_tiles * K::kQueries, round_up(queries, 64));
    key_length = std::max(key_tiles * Q::kKeys, round_up(keys, 64));
    query_units = items * query_blocks;
    key_units = items * key_blocks;
    query_grid = static_cast<int>(std::min<int64_t>(query_units, most));
    key_grid = static_cast<int>(std::min<int64_t>(key_units, most));
    key_image_at = 0;
    key_factors_at = aligned(Image<D>::bytes(items * key_length));
    query_image_at = key_factors_at + aligned(items * key_length * 4);
    d_o_image_at = query_image_at + aligned(Image<D>::bytes(items * row_length));
    rows_at = d_o_image_at + aligned(Image<D>::bytes(items * row_length));
    weights_at = rows_at + (kRoundsLongKeys<D> ? 0 : aligned(items * row_length * 8));
    bytes = weights_at + aligned(int64_t{query_grid} * D * 4);
  }
};

template <class Kernel, class Arguments>
void start(Kernel kernel, const char* name, int grid, int threads, int shared, const Arguments& a,
           cudaStream_t stream) {
  STDIT_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  kernel<<<grid, threads, shared, stream>>>(a);
  check_launch(name);
}

template <class Q, class K>
void launch(const stdit_attention& call, const stdit_attention_gradients& g, cudaStream_t stream) {
  constexpr int D = Q::D;
  const Plan<Q, K> plan(call);
  char* scratch = static_cast<char*>(g.scratch);
  const auto query_maps = [&](const stdit_heads& array) {
    return make_tile_maps<D>(array_of(array), call.sequences, call.queries, call.heads, 64);
  };
  const auto key_maps = [&](const stdit_heads& array, int box_rows) {
    return make_tile_maps<D>(array_of(array), call.sequences, call.keys, call.heads, box_rows);
  };
  Norm<D> norm{norm_of(call)};
  if constexpr (kRoundsLongKeys<D>) norm.left_scale = norm.score_factor();
  const int keys = static_cast<int>(call.keys);

  char* const key_image = scratch + plan.key_image_at;
  auto* const key_factors = reinterpret_cast<float*>(scratch + plan.key_factors_at);
  make_key_image<D>(call, key_image, key_factors, plan.key_length, stream);

  QueryArguments<D> q{};
  q.q = query_maps(call.q);
  q.d_o = query_maps(g.d_o);
  q.o = query_maps(call.o);
  q.v = key_maps(call.v, Q::kKeys);
  q.raw_q = array_of(call.q);
  q.d_q = array_of(g.d_q);
  q.norm = norm;
  q.key_image = key_image;
  q.lse = call.lse;
  q.query_image = scratch + plan.query_image_at;
  q.d_o_image = scratch + plan.d_o_image_at;
  if constexpr (!kRoundsLongKeys<D>) {
    q.key_factors = key_factors;
    q.rows = reinterpret_cast<float2*>(scratch + plan.rows_at);
  }
  q.weight_partials = g.d_weights == nullptr ? nullptr : reinterpret_cast<float*>(scratch + plan.weights_at);
  q.heads = call.heads;
  q.units = static_cast<int>(plan.query_units);
  q.queries = static_cast<int>(call.queries);
  q.keys = keys;
  q.query_blocks = plan.query_blocks;
  q.key_tiles = plan.key_tiles;
  q.key_length = plan.key_length;
  q.row_length = plan.row_length;
  start(attention_dq_kernel<Q>, "attention_dq_kernel", plan.query_grid, Q::kThreads, Q::kSharedBytes, q, stream);

  KeyArguments<D> k{};
  k.v = key_maps(call.v, 64);
  k.d_k = array_of(g.d_k);
  k.d_v = array_of(g.d_v);
  k.norm = norm;
  k.key_image = q.key_image;
  k.key_factors = key_factors;
  k.query_image = q.query_image;
  k.d_o_image = q.d_o_image;
  k.rows = q.rows;
  k.heads = call.heads;
  k.units = static_cast<int>(plan.key_units);
  k.keys = keys;
  k.query_tiles = plan.query_tiles;
  k.key_blocks = plan.key_blocks;
  k.key_length = plan.key_length;
  k.row_length = plan.row_length;
  start(attention_dkv_kernel<K>, "attention_dkv_kernel", plan.key_grid, K::kThreads, K::kSharedBytes, k, stream);

  sum_weights<D>(q.weight_partials, plan.query_grid, norm, g.d_weights, stream);
}

}  // namespace stdit
