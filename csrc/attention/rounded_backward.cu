// Attention's backward pass over long sequences of heads whose products leave columns (kRoundsLongKeys): gradients of
// q, k, v and of the norms' weights, repeating bit for bit. Other heads: long_backward.cu.
//
// Two kernels, each of which keeps its sums in registers, so that no consumer warpgroup waits for another and nothing
// is summed in memory. That takes seven products where one kernel needs five (backward.cu), which costs less than the
// exchange of ds between warpgroups and the partial sums of dq did (docs/kernels.md).
//
// attention_dq_kernel: a block takes units of 64 queries a consumer, of one head, and walks over tiles of keys:
//   s - lse = q k^T, dp = do v^T           both operands in shared memory
//   ds = 2^(s - lse) (dp - delta)          in registers
//   dq += ds k                             ds from registers
// attention_dkv_kernel: a block takes units of 64 keys a consumer, of one head, and walks over tiles of queries:
//   s^T - lse = k q^T, dp^T - delta = v do^T     both operands in shared memory
//   dv += p^T do, dk += ds^T q                   p^T and ds^T from registers
// In both the next tile's scores are asked for before this tile's sums, as in the forward pass.
//
// Products over columns take sixteens; the eight that are left hold -lse beside q and -delta beside do, in parts, and
// ones beside k and v (row_image.h), so that lse and delta are taken off by the tensor cores.
//
// What passes by many times lies in scratch memory as the tensor cores read it (row_image.h): normalised k by a kernel
// before (key_image.h); normalised q, scaled as in the forward pass, and do by the dq kernel, for the dkv kernel.
//
// One thread of the first warpgroup has the copy engine bring all tiles; a unit's queries come while the one before is
// worked on, and are normalised by their consumers. Consumers ask for products in turns (turns.h).
//
// Tiles: 64 keys for three consumers, 80 queries for two, which is what their registers hold.

#include <algorithm>

#include "attention/gradients.h"
#include "attention/head_dim.h"
#include "attention/key_image.h"
#include "attention/row_image.h"
#include "attention/shared.h"
#include "attention/turns.h"
#include "stdit/attention_tiles.h"

namespace stdit {
namespace {

__host__ __device__ constexpr int ceil_div(int n, int d) { return (n + d - 1) / d; }
__host__ __device__ constexpr int round_up(int n, int d) { return ceil_div(n, d) * d; }

template <int Count>
__device__ __forceinline__ void scale_all(float (&values)[Count], float factor) {
#pragma unroll
  for (int i = 0; i < Count; ++i) values[i] *= factor;
}

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
    // Unused, as other spares below: all else lies where it lay when these kernels were checked and timed.
    alignas(128) char spare[kStages][128];
    alignas(16) float2 rows[2][kQueries];  // lse in units of log2, delta
    alignas(16) float weights[D];
    float weight_sums[4 * kConsumers][D];
    Barrier q_full[2], q_empty[2], o_full, o_empty, kv_full[kStages], kv_empty[kStages];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;
  static_assert(kSharedBytes <= 232448, "what a block can have");
};

struct QueryArguments {
  TileMaps q, d_o, o, v;
  HeadArray raw_q, d_q;
  NormArguments norm;
  float score_factor;       // of scores, to units of log2
  const char* key_image;    // [sequences * heads] of key_length rows
  const void* spare0;
  const float* lse;         // [sequences * heads, queries]
  char* query_image;       // [sequences * heads] of row_length rows: q as it is multiplied; written
  char* d_o_image;         // likewise of do; written
  void* spare1;
  float* weight_partials;  // [blocks, D]; null: the weights' gradients are not asked for
  int heads, units, queries, keys, query_blocks, key_tiles, key_length, row_length;
};

// A block's units: queries of a head, one after another.
template <class G>
struct QueryUnit {
  int at, item, head, sequence, first_query;

  __device__ __forceinline__ explicit QueryUnit(const QueryArguments& a) : at(blockIdx.x) { find(a); }
  __device__ __forceinline__ bool valid(const QueryArguments& a) const { return at < a.units; }
  __device__ __forceinline__ void next(const QueryArguments& a) {
    at += gridDim.x;
    find(a);
  }
  __device__ __forceinline__ void find(const QueryArguments& a) {
    item = at / a.query_blocks;
    first_query = (at - item * a.query_blocks) * G::kQueries;
    sequence = item / a.heads;
    head = item - sequence * a.heads;
  }
  // Consumers that have queries of it.
  __device__ __forceinline__ int tiles(const QueryArguments& a) const {
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

  __device__ __forceinline__ explicit QueryLoader(const QueryArguments& a) : u(a) { begin(a); }
  __device__ __forceinline__ void begin(const QueryArguments& a) {
    tiles = u.valid(a) ? u.tiles(a) : 0;
    loads = 3 * tiles;
    loaded = 0;
  }
  __device__ __forceinline__ void load(const QueryArguments& a, typename G::Shared& s) {
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
__device__ __forceinline__ void produce(const QueryArguments& a, typename G::Shared& s) {
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
      full.arrive_and_expect(G::KeyTile::kLoadBytes + G::kKeyBytes);
      load_bytes(a.key_image + Image<D>::bytes(row), full, s.k[kv.stage], G::kKeyBytes);
      load_tile<D, G::kKeys>(a.v, full, s.v[kv.stage], tile * G::kKeys, u.head, u.sequence);
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
__device__ __forceinline__ void prepare_rows(const QueryArguments& a, typename G::Shared& s, const QueryUnit<G>& u,
                                             int stage, int group) {
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
  if (lane % 2 == 0) {
    const uint4 parts = in_parts(-lse / a.score_factor);
    *reinterpret_cast<uint4*>(s.q[stage][group / 4] + T::offset(row, D / 8)) = parts;
    *reinterpret_cast<uint4*>(query_image + Image<D>::offset(in_unit, D / 8)) = parts;
  } else {
    *reinterpret_cast<uint4*>(d_o_image + Image<D>::offset(in_unit, D / 8)) = in_parts(-delta);
  }
  if (lane % 2 == 0) s.rows[stage][in_unit] = make_float2(lse, delta);
}

// Zeroes for what is left of a head's last tile of the other kernel, by `threads` threads.
template <class G>
__device__ __forceinline__ void clear_rest(const QueryArguments& a, const QueryUnit<G>& u, int thread, int threads) {
  constexpr int D = G::D;
  const int end = u.first_query + 64 * u.tiles(a), rows = a.row_length - end;
  if (end < a.queries) return;
  const int64_t row0 = static_cast<int64_t>(u.item) * a.row_length + end;
  for (int i = thread; i < rows / 8 * (Image<D>::kGroupBytes / 16); i += threads) {
    const int64_t at = Image<D>::bytes(row0) + 16 * i;
    *reinterpret_cast<uint4*>(a.query_image + at) = make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(a.d_o_image + at) = make_uint4(0, 0, 0, 0);
  }
}

template <class G>
__device__ __forceinline__ void consume(const QueryArguments& a, typename G::Shared& s, int consumer) {
  constexpr int D = G::D, kKeys = G::kKeys;
  using QueryTile = typename G::QueryTile;
  using KeyTile = typename G::KeyTile;
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, tiles = a.key_tiles;
  const bool sums_weights = a.weight_partials != nullptr;
  float* weight_sums = s.weight_sums[4 * consumer + warp];
  RingPlace<1> o;
  RingPlace<2> q;
  RingPlace<G::kStages> kv;
  const Turns<G::kConsumers> turns{consumer};
  float p[kKeys / 2], dp[kKeys / 2];
  // Makes a unit's queries ready.
  const auto prepare = [&](const QueryUnit<G>& u) {
    s.q_full[q.stage].wait(q.parity);
    s.o_full.wait(o.parity);
    prepare_rows<G>(a, s, u, q.stage, 4 * consumer + warp);
    if (consumer == 0) clear_rest<G>(a, u, threadIdx.x % 128, 128);
    arrive_warp(s.o_empty);
    fence_async_shared();
    sync_threads(1 + G::kConsumers + consumer, 128);  // the named barriers before are for turns
    o.next();
  };
  const auto ask_scores = [&](int stage) {
    wgmma_fence();
    multiply_columns<kKeys, D, true>(p, TileColumns<QueryTile>(s.q[q.stage][consumer]), ImageColumns<D>(s.k[stage]));
    multiply_columns<kKeys, D, true>(dp, TileColumns<QueryTile>(s.d_o[q.stage][consumer]),
                                     TileColumns<KeyTile>(s.v[stage]));
    wgmma_commit();
  };
  turns.begin();
  clear(p);
  clear(dp);
  QueryUnit<G> after(a);
  while (after.valid(a)) {
    const bool all = after.tiles(a) == G::kConsumers;  // where not, consumers ask as they come
    const QueryUnit<G> u = after;
    after.next(a);
    const int query0 = u.first_query + 64 * consumer;
    if (query0 >= a.queries) {  // nothing to do but to let the others' tiles pass
      s.q_full[q.stage].wait(q.parity);
      s.o_full.wait(o.parity);
      arrive_warp(s.o_empty);  // before keys, which may come after the next unit's o
      for (int tile = 0; tile < tiles; ++tile) {
        s.kv_full[kv.stage].wait(kv.parity);
        arrive_warp(s.kv_empty[kv.stage]);
        kv.next();
      }
      arrive_warp(s.q_empty[q.stage]);
      q.next();
      o.next();
      continue;
    }
    prepare(u);
    s.kv_full[kv.stage].wait(kv.parity);
    if (all) turns.take();
    ask_scores(kv.stage);
    if (all) turns.pass();
    const float2* own = s.rows[q.stage] + 64 * consumer + 16 * warp + lane / 4;
    const float2 rows[2] = {own[0], own[8]};
    float d_q[D / 2];
    uint32_t ds16[kKeys / 4];

    const auto ask_gradient = [&](int stage) {
      hold(ds16);
      wgmma_fence();
      add_rows<D, kKeys>(d_q, ds16, ImageRows<D>(s.k[stage]));
      wgmma_commit();
    };
    const auto differentiate = [&] {  // dp becomes ds
      hold(p);
      hold(dp);
      if (a.score_factor != 1.0f) scale_all(p, a.score_factor);
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) dp[i] = (dp[i] - rows[i / 2 % 2].y) * exp2_approx(p[i]);
    };
    const auto mask_end = [&] {  // keys that are not there, of the last tile
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        if ((tiles - 1) * kKeys + 8 * (i / 4) + 2 * (lane % 4) + i % 2 >= a.keys) dp[i] = 0.0f;
      }
    };
    const auto pack_gradient = [&] {
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) ds16[i] = pack(dp[2 * i], dp[2 * i + 1]);
    };

    // Asks for a tile's scores and the sums of the one before. The last tile's mask is kept out of the loop.
    const auto next_tile = [&](bool last) {
      const int before = kv.stage;
      kv.next();
      s.kv_full[kv.stage].wait(kv.parity);
      if (all) turns.take();
      ask_scores(kv.stage);
      ask_gradient(before);
      if (all) turns.pass();
      wgmma_wait<1>();
      differentiate();
      if (last) mask_end();
      wgmma_wait<0>();
      hold(d_q);
      arrive_warp(s.kv_empty[before]);
      pack_gradient();
    };

    wgmma_wait<0>();
    clear(d_q);  // not before: the compiler would have products wait for each other
    differentiate();
    if (tiles == 1) mask_end();
    pack_gradient();
    for (int tile = 1; tile < tiles - 1; ++tile) next_tile(false);
    if (tiles > 1) next_tile(true);
    arrive_warp(s.q_empty[q.stage]);
    q.next();
    const int query = query0 + 16 * warp + lane / 4;
    RawRows<D> raw;
    raw.read(RowPair(a.raw_q, u.sequence, u.head, query, a.queries));
    const int last_stage = kv.stage;
    kv.next();
    if (all) turns.take();
    ask_gradient(last_stage);
    if (all) turns.pass();
    wgmma_wait<0>();
    hold(d_q);
    arrive_warp(s.kv_empty[last_stage]);
    const RowPair out(a.d_q, u.sequence, u.head, query, a.queries);
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      if (!out.there[i / 2 % 2]) d_q[i] = 0.0f;
    }
    // The weights in shared memory hold the scale, in units of log2.
    through_norm<D>(d_q, raw, a.norm.normalise_q, a.norm.epsilon, s.weights, kLn2, sums_weights, weight_sums);
    write_rows<D, true>(d_q, out);
  }
  wgmma_wait<0>();
  hold(p);
  hold(dp);
  turns.end();
  if (a.weight_partials != nullptr) {
    sync_threads(1 + 2 * G::kConsumers, 128 * G::kConsumers);
    for (int i = threadIdx.x - 128; i < D; i += 128 * G::kConsumers) {
      float sum = 0.0f;
      for (int w = 0; w < 4 * G::kConsumers; ++w) sum += s.weight_sums[w][i];
      a.weight_partials[static_cast<int64_t>(blockIdx.x) * D + i] = sum;
    }
  }
}

template <class G>
__global__ void __launch_bounds__(G::kThreads, 1) attention_dq_kernel(const __grid_constant__ QueryArguments a) {
  extern __shared__ char dynamic[];
  auto& s = *reinterpret_cast<typename G::Shared*>(aligned_1024(dynamic));
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      s.q_full[i].init(1);
      s.q_empty[i].init(4 * G::kConsumers * kWarpArrivals);
    }
    s.o_full.init(1);
    s.o_empty.init(4 * G::kConsumers * kWarpArrivals);
    for (int i = 0; i < G::kStages; ++i) {
      s.kv_full[i].init(1);
      s.kv_empty[i].init(4 * G::kConsumers * kWarpArrivals);
    }
    fence_barrier_init();
  }
  for (int i = threadIdx.x; i < G::D; i += G::kThreads) {
    s.weights[i] = a.norm.weight(i) * a.norm.scale * kLog2E;
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
  static constexpr int kKeyBytes = static_cast<int>(Image<D>::bytes(64));

  struct Shared {
    alignas(1024) char v[2][kConsumers][KeyTile::kBytes];
    alignas(128) char k[2][kConsumers][kKeyBytes];
    alignas(128) char q[kStages][kQueryBytes];
    alignas(128) char d_o[kStages][kQueryBytes];
    alignas(128) char spare[kStages][128];
    Barrier kv_full[2], kv_empty[2], q_full[kStages], q_empty[kStages];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;
  static_assert(kSharedBytes <= 232448, "what a block can have");
};

struct KeyArguments {
  TileMaps v;
  HeadArray d_k, d_v;
  NormArguments norm;
  float score_factor;        // of scores, to units of log2
  const char* key_image;     // [sequences * heads] of key_length rows
  const float* key_factors;  // [sequences * heads, key_length]
  const char* query_image;  // [sequences * heads] of row_length rows
  const char* d_o_image;
  const void* spare;
  int heads, units, keys, query_tiles, key_blocks, key_length, row_length;
};

// A block's units: keys of a head, one after another.
template <class G>
struct KeyUnit {
  int at, item, head, sequence, first_key;

  __device__ __forceinline__ explicit KeyUnit(const KeyArguments& a) : at(blockIdx.x) { find(a); }
  __device__ __forceinline__ bool valid(const KeyArguments& a) const { return at < a.units; }
  __device__ __forceinline__ void next(const KeyArguments& a) {
    at += gridDim.x;
    find(a);
  }
  __device__ __forceinline__ void find(const KeyArguments& a) {
    item = at / a.key_blocks;
    first_key = (at - item * a.key_blocks) * G::kKeys;
    sequence = item / a.heads;
    head = item - sequence * a.heads;
  }
  // Consumers that have keys of it.
  __device__ __forceinline__ int tiles(const KeyArguments& a) const {
    return min(G::kConsumers, ceil_div(a.keys - first_key, 64));
  }
};

template <class G>
__device__ __forceinline__ void produce(const KeyArguments& a, typename G::Shared& s) {
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
      load_bytes(key_image + Image<D>::bytes(64 * w), kv_full, s.k[kv.stage][w], G::kKeyBytes);
      load_tile<D, 64>(a.v, kv_full, s.v[kv.stage][w], u.first_key + 64 * w, u.head, u.sequence);
    }
    kv.next();
    const int64_t row0 = static_cast<int64_t>(u.item) * a.row_length;
    for (int tile = 0; tile < a.query_tiles; ++tile) {
      Barrier& full = s.q_full[q.stage];
      const int64_t row = row0 + tile * kQueries;
      s.q_empty[q.stage].wait(q.parity ^ 1);
      full.arrive_and_expect(2 * G::kQueryBytes);
      load_bytes(a.query_image + Image<D>::bytes(row), full, s.q[q.stage], G::kQueryBytes);
      load_bytes(a.d_o_image + Image<D>::bytes(row), full, s.d_o[q.stage], G::kQueryBytes);
      q.next();
    }
  }
}

template <class G>
__device__ __forceinline__ void consume(const KeyArguments& a, typename G::Shared& s, int consumer) {
  constexpr int D = G::D, kQueries = G::kQueries;
  using KeyTile = typename G::KeyTile;
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  RingPlace<2> kv;
  RingPlace<G::kStages> q;
  const Turns<G::kConsumers> turns{consumer};
  const int own = 64 * consumer + 16 * warp + lane / 4;  // this thread's key, and eight more
  float p[kQueries / 2], dp[kQueries / 2];
  const auto await_keys = [&](const RingPlace<2>& place) {
    s.kv_full[place.stage].wait(place.parity);
    if (lane < 16) {
      *reinterpret_cast<uint4*>(s.v[place.stage][consumer] + KeyTile::offset(16 * warp + lane, D / 8)) = ones();
    }
    fence_async_shared();
    sync_threads(1 + G::kConsumers + consumer, 128);  // the named barriers before are for turns
  };
  const auto ask_scores = [&](int unit, int stage) {
    wgmma_fence();
    multiply_columns<kQueries, D, true>(p, ImageColumns<D>(s.k[unit][consumer]), ImageColumns<D>(s.q[stage]));
    multiply_columns<kQueries, D, true>(dp, TileColumns<KeyTile>(s.v[unit][consumer]), ImageColumns<D>(s.d_o[stage]));
    wgmma_commit();
  };
  turns.begin();
  clear(p);
  clear(dp);
  KeyUnit<G> after(a);
  while (after.valid(a)) {
    const bool all = after.tiles(a) == G::kConsumers;  // where not, consumers ask as they come
    const KeyUnit<G> u = after;
    after.next(a);
    if (u.first_key + 64 * consumer >= a.keys) {  // nothing to do but to let the other's tiles pass
      s.kv_full[kv.stage].wait(kv.parity);
      for (int tile = 0; tile < a.query_tiles; ++tile) {
        s.q_full[q.stage].wait(q.parity);
        arrive_warp(s.q_empty[q.stage]);
        q.next();
      }
      arrive_warp(s.kv_empty[kv.stage]);
      kv.next();
      continue;
    }
    await_keys(kv);
    s.q_full[q.stage].wait(q.parity);
    if (all) turns.take();
    ask_scores(kv.stage, q.stage);
    if (all) turns.pass();
    float d_k[D / 2], d_v[D / 2];
    uint32_t p16[kQueries / 4], ds16[kQueries / 4];
    const auto ask_gradients = [&](int stage) {
      hold(p16);
      hold(ds16);
      wgmma_fence();
      add_rows<D, kQueries>(d_v, p16, ImageRows<D>(s.d_o[stage]));
      wgmma_commit();
      add_rows<D, kQueries>(d_k, ds16, ImageRows<D>(s.q[stage]));
      wgmma_commit();
    };
    // Scores become p, and dp becomes ds. Keys that are not there only reach rows of dk and dv that are not either;
    // queries that are not there have zeroes for q, do, lse and delta.
    const auto differentiate = [&] {
      hold(p);
      hold(dp);
      if (a.score_factor != 1.0f) scale_all(p, a.score_factor);
#pragma unroll
      for (int i = 0; i < kQueries / 2; ++i) {
        p[i] = exp2_approx(p[i]);
        dp[i] *= p[i];
      }
    };
    const auto pack_both = [&] {
#pragma unroll
      for (int i = 0; i < kQueries / 4; ++i) {
        p16[i] = pack(p[2 * i], p[2 * i + 1]);
        ds16[i] = pack(dp[2 * i], dp[2 * i + 1]);
      }
    };

    wgmma_wait<0>();
    clear(d_k);  // not before: the compiler would have products wait for each other
    clear(d_v);
    differentiate();
    pack_both();
    for (int tile = 1; tile < a.query_tiles; ++tile) {
      const int before = q.stage;
      q.next();
      s.q_full[q.stage].wait(q.parity);
      if (all) turns.take();
      ask_scores(kv.stage, q.stage);
      ask_gradients(before);
      if (all) turns.pass();
      wgmma_wait<2>();
      differentiate();
      wgmma_wait<0>();
      hold(d_v);
      hold(d_k);
      arrive_warp(s.q_empty[before]);  // every warp, when its lanes have read their rows
      pack_both();
    }
    const float* factors = a.key_factors + static_cast<int64_t>(u.item) * a.key_length + u.first_key + own;
    const float factor[2] = {__ldg(factors), __ldg(factors + 8)};
    RawRows<D> keys;
    keys.read_image(s.k[kv.stage][consumer] + 2 * warp * Image<D>::kGroupBytes, Image<D>::kGroupBytes);
    arrive_warp(s.kv_empty[kv.stage]);
    kv.next();
    const int last_stage = q.stage;
    q.next();
    if (all) turns.take();
    ask_gradients(last_stage);
    if (all) turns.pass();
    const int key = u.first_key + own;
    wgmma_wait<1>();
    hold(d_v);
    write_rows<D, true>(d_v, RowPair(a.d_v, u.sequence, u.head, key, a.keys));
    wgmma_wait<0>();
    hold(d_k);
    arrive_warp(s.q_empty[last_stage]);
    // Where q is scaled, it is in units of log2.
    const float scale = a.norm.folds() ? kLn2 : a.norm.scale;
    back_through_norm<D>(d_k, keys, a.norm.normalise_k, factor, scale);
    write_rows<D, true>(d_k, RowPair(a.d_k, u.sequence, u.head, key, a.keys));
  }
  wgmma_wait<0>();
  hold(p);
  hold(dp);
  turns.end();
}

template <class G>
__global__ void __launch_bounds__(G::kThreads, 1) attention_dkv_kernel(const __grid_constant__ KeyArguments a) {
  extern __shared__ char dynamic[];
  auto& s = *reinterpret_cast<typename G::Shared*>(aligned_1024(dynamic));
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      s.kv_full[i].init(1);
      s.kv_empty[i].init(4 * G::kConsumers * kWarpArrivals);
    }
    for (int i = 0; i < G::kStages; ++i) {
      s.q_full[i].init(1);
      s.q_empty[i].init(4 * G::kConsumers * kWarpArrivals);
    }
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
  int64_t key_image_at, key_factors_at, query_image_at, d_o_image_at, weights_at, bytes;
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
    weights_at = d_o_image_at + aligned(Image<D>::bytes(items * row_length));
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
  const NormArguments norm = norm_of(call);
  const int keys = static_cast<int>(call.keys);

  char* const key_image = scratch + plan.key_image_at;
  auto* const key_factors = reinterpret_cast<float*>(scratch + plan.key_factors_at);
  make_key_image<D>(call, key_image, key_factors, plan.key_length, stream);

  QueryArguments q{};
  q.q = query_maps(call.q);
  q.d_o = query_maps(g.d_o);
  q.o = query_maps(call.o);
  q.v = key_maps(call.v, Q::kKeys);
  q.raw_q = array_of(call.q);
  q.d_q = array_of(g.d_q);
  q.norm = norm;
  q.key_image = key_image;
  q.score_factor = norm.score_factor();
  q.lse = call.lse;
  q.query_image = scratch + plan.query_image_at;
  q.d_o_image = scratch + plan.d_o_image_at;
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

  KeyArguments k{};
  k.v = key_maps(call.v, 64);
  k.d_k = array_of(g.d_k);
  k.d_v = array_of(g.d_v);
  k.norm = norm;
  k.key_image = q.key_image;
  k.key_factors = key_factors;
  k.score_factor = q.score_factor;
  k.query_image = q.query_image;
  k.d_o_image = q.d_o_image;
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

template <int D>
using Queries = QueryGradient<D, 3, 64, 3>;
template <int D>
using Keys = KeyGradient<D, 80, 4>;

}  // namespace

template <int D>
int64_t long_backward_scratch(const stdit_attention& call) {
  return Plan<Queries<D>, Keys<D>>(call).bytes;
}

template <int D>
void long_backward(const stdit_attention& call, const stdit_attention_gradients& gradients, cudaStream_t stream) {
  launch<Queries<D>, Keys<D>>(call, gradients, stream);
}

template int64_t long_backward_scratch<STDIT_HEAD_DIM>(const stdit_attention&);
template void long_backward<STDIT_HEAD_DIM>(const stdit_attention&, const stdit_attention_gradients&, cudaStream_t);

}  // namespace stdit
