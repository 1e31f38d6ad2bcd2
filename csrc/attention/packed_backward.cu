// Attention's backward pass over packed keys (cross attention over text): gradients of q, k and v, repeating bit for
// bit. A video's queries are many and a caption's keys are few, so that neither gradient needs the other's products
// kept: two kernels, each with seven eighths of its operands in shared memory already.
//
// attention_packed_dq_kernel: a block takes units of 128 queries of one head after each other, 64 a consumer warpgroup,
// and keeps the head's keys and values in shared memory meanwhile, in tiles of 80.
//   s = q k^T, dp = do v^T          q and do from registers
//   ds = 2^(s - lse) (dp - delta)   in registers; delta = rowsum(do * o), found before
//   dq += ds k                      ds from registers
// The next tile's products are asked for before ds k of this one; of a last tile with few keys only a part is
// multiplied. q, do and o are in registers from a unit's beginning, when the next unit's are asked for. dq leaves
// through shared memory of its own, 16 rows a warp. lse and delta are written down for the other kernel.
//
// attention_packed_dkv_kernel: a block keeps 128 keys of a head, 64 a consumer, and walks over tiles of 64 queries, five
// of which are on their way; their lse and delta come with them.
//   s^T = k q^T, dp^T = v do^T      k from registers, of heads up to 80 wide
//   dv += p^T do, dk += ds^T q      p^T and ds^T from registers
// The consumers take turns at asking for products (turns.h). In dq they do not: there memory is the limit.
// All tiles of all blocks of keys of a head, in a row, are cut into equal parts. Where a cut falls into a block of keys,
// its parts' sums are kept in float32 and added by attention_packed_sum_kernel, in order. Blocks beside each other work
// on the same part of different heads (units.h).
//
// One thread has the copy engine bring all tiles. The lengths are known on the device alone, where the work is cut.

#include <algorithm>
#include <type_traits>

#include "attention/gradients.h"
#include "attention/head_dim.h"
#include "attention/shared.h"
#include "attention/turns.h"
#include "attention/units.h"
#include "stdit/attention_tiles.h"

namespace stdit {
namespace {

// ------------------------------------------------------------ dq

template <int D_>
struct QueryGradient {
  static constexpr int D = D_, kConsumers = 2, kKeys = 80, kTail = 48, kStages = 4;
  static constexpr int kQueries = 64 * kConsumers, kThreads = 128 * (kConsumers + 1);
  static constexpr int kFeederRegisters = 40;
  static constexpr int kConsumerRegisters = consumer_registers(kConsumers, kFeederRegisters);
  using QueryTile = Tile<D, 64>;
  using KeyTile = Tile<D, kKeys>;
  static_assert(kKeys * kStages >= kMostPackedKeys, "a head's keys stay");

  struct Shared {
    alignas(1024) char q[kConsumers][QueryTile::kBytes];
    alignas(1024) char d_o[kConsumers][QueryTile::kBytes];
    alignas(1024) char o[kConsumers][QueryTile::kBytes];
    alignas(1024) char d_q[kConsumers][QueryTile::kBytes];
    alignas(1024) char k[kStages][KeyTile::kBytes];
    alignas(1024) char v[kStages][KeyTile::kBytes];
    int range[2];  // the block's first unit, and the next block's
    Barrier q_full, q_empty, kv_full[kStages], kv_empty[kStages];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;
  static_assert(kSharedBytes <= kMostSharedBytes, "what a block can have");
};

struct QueryArguments {
  TileMaps q, d_o, o, k, v;
  TileMaps d_q;  // in boxes of 16 rows
  const int* key_starts;
  const float* lse;
  float2* rows;  // [sequences * heads, row_length]: lse in units of log2, delta; zeroes beyond the queries
  float score_factor, scale;
  int sequences, heads, queries, units, heads_at_once, row_length;
};

template <class G>
__device__ __forceinline__ PackedUnits units_of(const QueryArguments& a, const typename G::Shared& s) {
  return PackedUnits(s.range, a.units, a.heads, a.heads_at_once);
}

template <class G>
__device__ __forceinline__ void produce(const QueryArguments& a, typename G::Shared& s) {
  constexpr int D = G::D;
  RingPlace<1> q;
  RingPlace<G::kStages> kv;
  for (PackedUnits u = units_of<G>(a, s); u.valid(); u.next()) {
    const int tiles = min(G::kConsumers, (a.queries - u.unit * G::kQueries + 63) / 64);  // that have queries
    s.q_empty.wait(q.parity ^ 1);
    s.q_full.arrive_and_expect(3 * tiles * G::QueryTile::kLoadBytes);
    for (int w = 0; w < tiles; ++w) {
      const int query = u.unit * G::kQueries + 64 * w;
      load_tile<D, 64>(a.q, s.q_full, s.q[w], query, u.head, u.sequence);
      load_tile<D, 64>(a.d_o, s.q_full, s.d_o[w], query, u.head, u.sequence);
      load_tile<D, 64>(a.o, s.q_full, s.o[w], query, u.head, u.sequence);
    }
    q.next();
    if (!u.first) continue;
    const KeyRange keys = KeyRange::packed(a.key_starts, u.sequence);
    for (int key = 0; key < keys.count; key += G::kKeys) {
      s.kv_empty[kv.stage].wait(kv.parity ^ 1);
      s.kv_full[kv.stage].arrive_and_expect(2 * G::KeyTile::kLoadBytes);
      load_tile<D, G::kKeys>(a.k, s.kv_full[kv.stage], s.k[kv.stage], keys.first + key, u.head, keys.sequence);
      load_tile<D, G::kKeys>(a.v, s.kv_full[kv.stage], s.v[kv.stage], keys.first + key, u.head, keys.sequence);
      kv.next();
    }
  }
}

template <class G>
__device__ __forceinline__ void consume(const QueryArguments& a, typename G::Shared& s, int consumer) {
  constexpr int D = G::D, kKeys = G::kKeys;
  constexpr std::integral_constant<int, kKeys> whole;
  constexpr std::integral_constant<int, G::kTail> tail;
  using KeyTile = typename G::KeyTile;
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  RingPlace<1> q_place;
  RingPlace<G::kStages> first;  // of the sequence's keys
  int keys = 0, tiles = 0;
  for (PackedUnits u = units_of<G>(a, s); u.valid(); u.next()) {
    if (u.first) {
      keys = KeyRange::packed(a.key_starts, u.sequence).count;
      tiles = (keys + kKeys - 1) / kKeys;
    }
    const bool leaves = u.last();
    RingPlace<G::kStages> kv = first;
    const int query0 = u.unit * G::kQueries + 64 * consumer;
    s.q_full.wait(q_place.parity);
    q_place.next();
    if (query0 >= a.queries) {  // nothing to do but to let the others' tiles pass
      arrive_warp(s.q_empty);
      for (int tile = 0; tile < tiles; ++tile) {
        s.kv_full[kv.stage].wait(kv.parity);
        if (leaves) arrive_warp(s.kv_empty[kv.stage]);
        kv.next();
      }
      if (leaves) first = kv;
      continue;
    }
    Fragments<D> q, d_o;
    q.template load<64>(s.q[consumer], 16 * warp);
    d_o.template load<64>(s.d_o[consumer], 16 * warp);
    float2 rows[2];  // lse in units of log2, delta
    {
      Fragments<D> o;
      o.template load<64>(s.o[consumer], 16 * warp);
      arrive_warp(s.q_empty);
      const int64_t item = static_cast<int64_t>(u.sequence) * a.heads + u.head;
      const float2 delta = row_dots(o, d_o);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int query = query0 + 16 * warp + lane / 4 + 8 * h;
        rows[h].x = query < a.queries ? __ldg(a.lse + item * a.queries + query) * kLog2E : 0.0f;
        rows[h].y = h == 0 ? delta.x : delta.y;
        if (lane % 4 == 0) a.rows[item * a.row_length + query] = rows[h];
      }
    }
    float p[kKeys / 2], dp[kKeys / 2], d_q[D / 2];
    uint32_t ds16[kKeys / 4];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) d_q[i] = 0.0f;

    // All of these take the width of a tile's products, kKeys or kTail.
    const auto ask_scores = [&](auto width, int stage) {
      constexpr int N = decltype(width)::value;
      hold(q.x);
      hold(d_o.x);
      wgmma_fence();
      multiply_columns<N, KeyTile>(front<N / 2>(p), q.x, ColumnsOperand::of<KeyTile>(s.k[stage]));
      multiply_columns<N, KeyTile>(front<N / 2>(dp), d_o.x, ColumnsOperand::of<KeyTile>(s.v[stage]));
      wgmma_commit();
    };
    const auto ask_gradient = [&](auto width, int stage) {
      constexpr int N = decltype(width)::value;
      const auto k_operand = RowsOperand::of<KeyTile>(s.k[stage]);
      hold(front<N / 4>(ds16));
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < N / 16; ++i) multiply_rows<KeyTile, kMajorK>(d_q, ds16 + 4 * i, k_operand, 16 * i);
      wgmma_commit();
    };
    // dp becomes ds.
    const auto differentiate = [&](auto width, int tile) {
      constexpr int N = decltype(width)::value;
      hold(front<N / 2>(p));
      hold(front<N / 2>(dp));
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        const float2 row = rows[i / 2 % 2];
        dp[i] = exp2_approx(fmaf(p[i], a.score_factor, -row.x)) * (dp[i] - row.y);
      }
      if (tile * kKeys + N > keys) {  // keys that are not there
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
          if (tile * kKeys + 8 * (i / 4) + 2 * (lane % 4) + i % 2 >= keys) dp[i] = 0.0f;
        }
      }
    };
    const auto pack_gradient = [&](auto width) {
#pragma unroll
      for (int i = 0; i < decltype(width)::value / 4; ++i) ds16[i] = pack(dp[2 * i], dp[2 * i + 1]);
    };
    const auto begin = [&] {
      s.kv_full[kv.stage].wait(kv.parity);
      ask_scores(whole, kv.stage);
      wgmma_wait<0>();
      differentiate(whole, 0);
      pack_gradient(whole);
    };
    const auto step = [&](auto width, int tile) {
      const int before = kv.stage;
      kv.next();
      s.kv_full[kv.stage].wait(kv.parity);
      ask_scores(width, kv.stage);
      ask_gradient(whole, before);
      wgmma_wait<1>();
      differentiate(width, tile);
      hold(front<decltype(width)::value / 2>(dp));  // while ds k of the tile before is made, not after
      wgmma_wait<0>();
      hold(d_q);
      if (leaves) arrive_warp(s.kv_empty[before]);
      pack_gradient(width);
    };

    const bool narrow = tiles > 1 && keys - (tiles - 1) * kKeys <= G::kTail;  // the last tile
    begin();
    for (int tile = 1; tile < tiles - narrow; ++tile) step(whole, tile);
    if (narrow) step(tail, tiles - 1);
    if (narrow) {
      ask_gradient(tail, kv.stage);
    } else {
      ask_gradient(whole, kv.stage);
    }
    if (lane == 0) wait_stores_read<0>();  // of the d_q before
    __syncwarp();
    wgmma_wait<0>();
    hold(d_q);
    if (leaves) arrive_warp(s.kv_empty[kv.stage]);
    kv.next();
    if (leaves) first = kv;
    store_accumulators<D, 64>(s.d_q[consumer], 16 * warp, d_q, a.scale, a.scale);
    fence_async_shared();
    __syncwarp();
    if (lane == 0) {
      store_rows<D, 64>(a.d_q, s.d_q[consumer], 16 * warp, query0 + 16 * warp, u.head, u.sequence);
      commit_stores();
    }
  }
  if (lane == 0) wait_stores_read<0>();
}

template <class G>
__global__ void __launch_bounds__(G::kThreads, 1) attention_packed_dq_kernel(const __grid_constant__ QueryArguments a) {
  extern __shared__ char dynamic[];
  auto& s = *reinterpret_cast<typename G::Shared*>(aligned_1024(dynamic));
  if (threadIdx.x == 0) {
    s.q_full.init(1);
    s.q_empty.init(4 * G::kConsumers * kWarpArrivals);
    init_ring(s.kv_full, s.kv_empty, G::kConsumers);
    fence_barrier_init();
  }
  if (threadIdx.x < 64) find_range(s.range, a.key_starts, a.sequences, a.units, a.heads_at_once, G::kKeys);
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

template <int D_>
struct KeyGradient {
  static constexpr int D = D_, kConsumers = 2, kQueries = 64, kStages = 5;
  static constexpr int kKeys = 64 * kConsumers, kThreads = 128 * (kConsumers + 1);
  static constexpr int kFeederRegisters = 40;
  static constexpr int kConsumerRegisters = consumer_registers(kConsumers, kFeederRegisters);
  static constexpr bool kKeysInRegisters = D <= 80;  // wider heads leave no room for k; none leave it for v as well
  using KeyTile = Tile<D, 64>;                       // of one consumer
  using QueryTile = Tile<D, kQueries>;
  static constexpr int kPartialFloats = 128 * D / 2;  // of a consumer's dk or dv

  struct Shared {
    alignas(1024) char k[2][kConsumers][KeyTile::kBytes];
    alignas(1024) char v[2][kConsumers][KeyTile::kBytes];
    alignas(1024) char q[kStages][QueryTile::kBytes];
    alignas(1024) char d_o[kStages][QueryTile::kBytes];
    alignas(128) float2 rows[kStages][kQueries];  // lse in units of log2, delta
    Place range[2];                               // where the block's part begins and ends
    Barrier kv_full[2], kv_empty[2], q_full[kStages], q_empty[kStages];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;
  static_assert(kSharedBytes <= kMostSharedBytes, "what a block can have");
};

struct KeyArguments {
  TileMaps q, d_o, k, v;
  HeadArray d_k, d_v;
  const int* key_starts;
  const float2* rows;  // [sequences * heads, row_length]
  float4* partials;    // [heads, parts, 2, 2, consumers, D / 8, 128]
  float score_factor, scale;
  int sequences, heads, queries, query_tiles, row_length;
  int parts, heads_at_once;
};

__device__ __forceinline__ int key_blocks(const KeyRange& keys, int size) { return (keys.count + size - 1) / size; }

// Where a part of a head's work begins; a unit is a tile of queries of a block of keys. Asked by whole warps.
template <class G>
__device__ __forceinline__ Place begin_of(const KeyArguments& a, int part) {
  return place_of(
      part, a.parts, a.sequences,
      [&](int sequence) { return key_blocks(KeyRange::packed(a.key_starts, sequence), G::kKeys) * a.query_tiles; },
      [](int) { return 1; });
}

// A block of keys of a head.
struct Panel {
  int sequence, head, key_block;
  KeyRange keys;

  // The panel of a place in a head's work.
  static __device__ __forceinline__ Panel of(const KeyArguments& a, const Place& place, int head) {
    return {place.sequence, head, place.unit / a.query_tiles, KeyRange::packed(a.key_starts, place.sequence)};
  }
  // How many of its keys a consumer has.
  template <class G>
  __device__ __forceinline__ int inside(int consumer) const {
    return min(64, keys.count - key_block * G::kKeys - 64 * consumer);
  }
  // Rows of the packed arrays: the consumer's first, and the end of the sequence's.
  template <class G>
  __device__ __forceinline__ int first_row(int consumer) const {
    return keys.first + key_block * G::kKeys + 64 * consumer;
  }
  __device__ __forceinline__ int end_row() const { return keys.first + keys.count; }
};

// A block's segments: tiles of queries that it has of one panel after another, of a head, then of the next.
template <class G>
struct SegmentCursor {
  Place at, begin, end;
  int head;

  __device__ __forceinline__ SegmentCursor(const KeyArguments& a, const typename G::Shared& s)
      : at(s.range[0]), begin(s.range[0]), end(s.range[1]), head(blockIdx.x % a.heads_at_once) {
    if (done()) head = a.heads;
  }
  __device__ __forceinline__ bool valid(const KeyArguments& a) const { return head < a.heads; }
  __device__ __forceinline__ int first_tile(const KeyArguments& a) const { return at.unit % a.query_tiles; }
  __device__ __forceinline__ int end_tile(const KeyArguments& a) const {
    const bool ends_here = at.sequence == end.sequence && at.unit / a.query_tiles == end.unit / a.query_tiles;
    return ends_here ? end.unit % a.query_tiles : a.query_tiles;
  }
  __device__ __forceinline__ void next(const KeyArguments& a, const Panel& panel) {
    at.unit = (at.unit / a.query_tiles + 1) * a.query_tiles;
    if (at.unit == key_blocks(panel.keys, G::kKeys) * a.query_tiles) at = {at.sequence + 1, 0};
    if (done()) {
      at = begin;
      head += a.heads_at_once;
    }
  }

 private:
  __device__ __forceinline__ bool done() const {
    return at.sequence > end.sequence || (at.sequence == end.sequence && at.unit >= end.unit);
  }
};

template <class G>
__device__ __forceinline__ void produce(const KeyArguments& a, typename G::Shared& s) {
  constexpr int D = G::D, kQueries = G::kQueries;
  RingPlace<2> kv;
  RingPlace<G::kStages> q;
  Panel p;
  for (SegmentCursor<G> at(a, s); at.valid(a); at.next(a, p)) {
    p = Panel::of(a, at.at, at.head);
    const int consumers = p.inside<G>(1) > 0 ? 2 : 1;
    s.kv_empty[kv.stage].wait(kv.parity ^ 1);
    s.kv_full[kv.stage].arrive_and_expect(2 * consumers * G::KeyTile::kLoadBytes);
    for (int w = 0; w < consumers; ++w) {
      const int row = p.first_row<G>(w);
      load_tile<D, 64>(a.k, s.kv_full[kv.stage], s.k[kv.stage][w], row, p.head, p.keys.sequence);
      load_tile<D, 64>(a.v, s.kv_full[kv.stage], s.v[kv.stage][w], row, p.head, p.keys.sequence);
    }
    kv.next();
    const int item = p.sequence * a.heads + p.head;
    for (int tile = at.first_tile(a), end = at.end_tile(a); tile < end; ++tile) {
      const int query = tile * kQueries;
      Barrier& full = s.q_full[q.stage];
      s.q_empty[q.stage].wait(q.parity ^ 1);
      full.arrive_and_expect(2 * G::QueryTile::kLoadBytes + sizeof(s.rows[0]));
      load_tile<D, kQueries>(a.q, full, s.q[q.stage], query, p.head, p.sequence);
      load_tile<D, kQueries>(a.d_o, full, s.d_o[q.stage], query, p.head, p.sequence);
      load_bytes(a.rows + static_cast<int64_t>(item) * a.row_length + query, full, s.rows[q.stage], sizeof(s.rows[0]));
      q.next();
    }
  }
}

// Where a segment's sums lie until they are added: a part has at most two of a head that are not a whole panel, the one
// that it goes on with at its beginning (which = 0) and the one that it does not finish (1).
template <class G>
__device__ __forceinline__ float4* partial_of(const KeyArguments& a, int head, int part, int which, int gradient,
                                              int consumer) {
  const int64_t segment = 2 * (static_cast<int64_t>(head) * a.parts + part) + which;
  const int64_t index = (2 * segment + gradient) * G::kConsumers + consumer;
  return a.partials + index * (G::kPartialFloats / 4) + threadIdx.x % 128;
}

template <int D>
__device__ __forceinline__ void keep(float4* partial, const float (&d)[D / 2]) {
#pragma unroll
  for (int i = 0; i < D / 8; ++i) {
    __stcg(partial + 128 * i, make_float4(d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]));
  }
}

// Writes a consumer's finished sums.
template <class G>
__device__ __forceinline__ void write_gradients(const KeyArguments& a, const Panel& p, int consumer,
                                                float (&d_k)[G::D / 2], const float (&d_v)[G::D / 2]) {
  const int row = p.first_row<G>(consumer) + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
  for (int i = 0; i < G::D / 2; ++i) d_k[i] *= a.scale;
  write_rows<G::D>(d_k, RowPair(a.d_k, 0, p.head, row, p.end_row()));
  write_rows<G::D>(d_v, RowPair(a.d_v, 0, p.head, row, p.end_row()));
}

template <class G>
__device__ __forceinline__ void consume(const KeyArguments& a, typename G::Shared& s, int consumer) {
  constexpr int D = G::D, kQueries = G::kQueries;
  using KeyTile = typename G::KeyTile;
  using QueryTile = typename G::QueryTile;
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const Turns<G::kConsumers> turns{consumer};
  RingPlace<2> kv;
  RingPlace<G::kStages> q;
  Panel panel;
  // Every warp, when its lanes have read their rows.
  const auto leave_queries = [&](int stage) { arrive_warp(s.q_empty[stage]); };
  turns.begin();
  for (SegmentCursor<G> at(a, s); at.valid(a); at.next(a, panel)) {
    panel = Panel::of(a, at.at, at.head);
    const int first_tile = at.first_tile(a), tiles = at.end_tile(a) - first_tile;
    s.kv_full[kv.stage].wait(kv.parity);
    if (panel.inside<G>(consumer) <= 0) {  // nothing to do but to let the other's tiles pass
      arrive_warp(s.kv_empty[kv.stage]);
      kv.next();
      for (int tile = 0; tile < tiles; ++tile) {
        s.q_full[q.stage].wait(q.parity);
        leave_queries(q.stage);
        q.next();
        turns.take();
        turns.pass();
      }
      continue;
    }
    Fragments<D> k;
    if constexpr (G::kKeysInRegisters) k.template load<64>(s.k[kv.stage][consumer], 16 * warp);
    const auto k_operand = ColumnsOperand::of<KeyTile>(s.k[kv.stage][consumer]);
    const auto v_operand = ColumnsOperand::of<KeyTile>(s.v[kv.stage][consumer]);
    float d_k[D / 2], d_v[D / 2], p[kQueries / 2], dp[kQueries / 2];
    uint32_t p16[kQueries / 4], ds16[kQueries / 4];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) d_k[i] = d_v[i] = 0.0f;
    const auto ask_scores = [&](int stage) {
      const auto q_operand = ColumnsOperand::of<QueryTile>(s.q[stage]);
      if constexpr (G::kKeysInRegisters) {
        hold(k.x);
        wgmma_fence();
        multiply_columns<kQueries, QueryTile>(p, k.x, q_operand);
      } else {
        wgmma_fence();
        multiply_columns<kQueries, KeyTile, QueryTile>(p, k_operand, q_operand);
      }
      multiply_columns<kQueries, KeyTile, QueryTile>(dp, v_operand, ColumnsOperand::of<QueryTile>(s.d_o[stage]));
      wgmma_commit();
    };
    const auto ask_gradients = [&](int stage) {
      const auto do_operand = RowsOperand::of<QueryTile>(s.d_o[stage]);
      const auto q_operand = RowsOperand::of<QueryTile>(s.q[stage]);
      hold(p16);
      hold(ds16);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kQueries / 16; ++i) {
        multiply_rows<QueryTile, kMajorK>(d_v, p16 + 4 * i, do_operand, 16 * i);
      }
#pragma unroll
      for (int i = 0; i < kQueries / 16; ++i) {
        multiply_rows<QueryTile, kMajorK>(d_k, ds16 + 4 * i, q_operand, 16 * i);
      }
      wgmma_commit();
    };
    // Scores become p, and dp becomes ds. Keys that are not there only reach rows of dk and dv that are not either;
    // queries that are not there have zeroes for q, do, lse and delta.
    const auto differentiate = [&](int stage) {
      hold(p);
      hold(dp);
      const float4* rows = reinterpret_cast<const float4*>(s.rows[stage]) + lane % 4;  // two queries each
#pragma unroll
      for (int i = 0; i < kQueries / 2; i += 2) {
        const float4 row = rows[i / 4 * 4];
        p[i] = exp2_approx(fmaf(p[i], a.score_factor, -row.x));
        p[i + 1] = exp2_approx(fmaf(p[i + 1], a.score_factor, -row.z));
        dp[i] = p[i] * (dp[i] - row.y);
        dp[i + 1] = p[i + 1] * (dp[i + 1] - row.w);
      }
    };
    const auto pack_both = [&] {
#pragma unroll
      for (int i = 0; i < kQueries / 4; ++i) {
        p16[i] = pack(p[2 * i], p[2 * i + 1]);
        ds16[i] = pack(dp[2 * i], dp[2 * i + 1]);
      }
    };

    s.q_full[q.stage].wait(q.parity);
    turns.take();
    ask_scores(q.stage);
    turns.pass();
    wgmma_wait<0>();
    differentiate(q.stage);
    pack_both();
    for (int tile = 1; tile < tiles; ++tile) {
      const int before = q.stage;
      q.next();
      s.q_full[q.stage].wait(q.parity);
      turns.take();
      ask_scores(q.stage);
      ask_gradients(before);
      turns.pass();
      wgmma_wait<1>();
      differentiate(q.stage);
      // While the gradients of the tile before are made: the compiler would put most of it after them, but not beyond a
      // branch, as this wait is one.
      hold(p);
      hold(dp);
      if (tile + 1 < tiles) {
        RingPlace<G::kStages> after = q;
        after.next();
        s.q_full[after.stage].wait(after.parity);
      }
      wgmma_wait<0>();
      hold(d_v);
      hold(d_k);
      leave_queries(before);
      pack_both();
    }
    ask_gradients(q.stage);
    wgmma_wait<0>();
    hold(d_v);
    hold(d_k);
    leave_queries(q.stage);
    q.next();
    arrive_warp(s.kv_empty[kv.stage]);
    kv.next();

    if (tiles == a.query_tiles) {
      write_gradients<G>(a, panel, consumer, d_k, d_v);
    } else {
      const int which = first_tile == 0 ? 1 : 0, part = blockIdx.x / a.heads_at_once;
      keep<D>(partial_of<G>(a, at.head, part, which, 0, consumer), d_k);
      keep<D>(partial_of<G>(a, at.head, part, which, 1, consumer), d_v);
    }
  }
  turns.end();
}

template <class G>
__global__ void __launch_bounds__(G::kThreads, 1) attention_packed_dkv_kernel(const __grid_constant__ KeyArguments a) {
  extern __shared__ char dynamic[];
  auto& s = *reinterpret_cast<typename G::Shared*>(aligned_1024(dynamic));
  if (threadIdx.x == 0) {
    init_ring(s.kv_full, s.kv_empty, G::kConsumers);
    init_ring(s.q_full, s.q_empty, G::kConsumers);
    fence_barrier_init();
  }
  if (threadIdx.x < 64) {
    const Place place = begin_of<G>(a, blockIdx.x / a.heads_at_once + threadIdx.x / 32);
    if (threadIdx.x % 32 == 0) s.range[threadIdx.x / 32] = place;
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

// A block adds the segments of the panel of a head that the cut before a part falls into, if it is the panel's first
// cut; blockIdx.y is the consumer whose keys it adds.
template <class G>
__global__ void __launch_bounds__(128) attention_packed_sum_kernel(const __grid_constant__ KeyArguments a) {
  constexpr int D = G::D;
  const int head = blockIdx.x / (a.parts - 1), cut = blockIdx.x % (a.parts - 1) + 1, consumer = blockIdx.y;
  const Place at = begin_of<G>(a, cut), before = begin_of<G>(a, cut - 1);
  if (at.sequence >= a.sequences || at.unit % a.query_tiles == 0) return;
  const auto in_panel = [&](const Place& place) {
    return place.sequence == at.sequence && place.unit / a.query_tiles == at.unit / a.query_tiles;
  };
  if (in_panel(before) && before.unit % a.query_tiles != 0) return;
  const Panel panel = Panel::of(a, at, head);
  if (panel.inside<G>(consumer) <= 0) return;
  float d_k[D / 2] = {}, d_v[D / 2] = {};
  const auto add = [](float (&d)[D / 2], const float4* partial) {
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      const float4 four = __ldcg(partial + 128 * i);
      d[4 * i] += four.x;
      d[4 * i + 1] += four.y;
      d[4 * i + 2] += four.z;
      d[4 * i + 3] += four.w;
    }
  };
  Place from = before;
  for (int part = cut - 1; part < a.parts; ++part) {
    const Place to = part < cut ? at : begin_of<G>(a, part + 1);
    if (part >= cut && !in_panel(from)) break;
    if (from.sequence != to.sequence || from.unit != to.unit) {  // not a part of nothing
      const int which = part < cut ? 1 : 0;
      add(d_k, partial_of<G>(a, head, part, which, 0, consumer));
      add(d_v, partial_of<G>(a, head, part, which, 1, consumer));
    }
    from = to;
  }
  write_gradients<G>(a, panel, consumer, d_k, d_v);
}

// ------------------------------------------------------------ the host's part

// How the work is cut, and where the parts of the scratch memory begin.
template <class Keys>
struct Plan {
  int query_tiles, row_length, heads_at_once, parts;
  int64_t partials_at, bytes;

  explicit Plan(const stdit_attention& call) {
    query_tiles = static_cast<int>(ceil_div(call.queries, Keys::kQueries));
    row_length = query_tiles * Keys::kQueries;  // so that a tile's rows can be copied whole
    heads_at_once = stdit::heads_at_once(call.heads, multiprocessors());
    parts = multiprocessors() / heads_at_once;
    partials_at = call.sequences * call.heads * row_length * static_cast<int64_t>(sizeof(float2));
    bytes = partials_at + int64_t{2} * call.heads * parts * 2 * Keys::kConsumers * Keys::kPartialFloats * 4;
  }
};

template <class Kernel>
void allow_shared(Kernel kernel, int bytes) {
  STDIT_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

template <class Queries, class Keys>
void launch(const stdit_attention& call, const stdit_attention_gradients& g, cudaStream_t stream) {
  constexpr int D = Queries::D;
  const Plan<Keys> plan(call);
  char* scratch = static_cast<char*>(g.scratch);
  auto* rows = reinterpret_cast<float2*>(scratch);
  const auto query_maps = [&](const stdit_heads& array) {
    return make_tile_maps<D>(array_of(array), call.sequences, call.queries, call.heads, 64);
  };
  const auto key_maps = [&](const stdit_heads& array, int box_rows) {
    return make_tile_maps<D>(array_of(array), 1, call.packed_keys, call.heads, box_rows);
  };
  const int sequences = static_cast<int>(call.sequences), queries = static_cast<int>(call.queries);
  const float score_factor = norm_of(call).score_factor();

  KeyArguments k{};
  k.q = query_maps(call.q);
  k.d_o = query_maps(g.d_o);
  k.k = key_maps(call.k, 64);
  k.v = key_maps(call.v, 64);
  k.d_k = array_of(g.d_k);
  k.d_v = array_of(g.d_v);
  k.key_starts = call.key_starts;
  k.rows = rows;
  k.partials = reinterpret_cast<float4*>(scratch + plan.partials_at);
  k.score_factor = score_factor;
  k.scale = call.scale;
  k.sequences = sequences;
  k.heads = call.heads;
  k.queries = queries;
  k.query_tiles = plan.query_tiles;
  k.row_length = plan.row_length;
  k.parts = plan.parts;
  k.heads_at_once = plan.heads_at_once;

  QueryArguments q{};
  q.q = k.q;
  q.d_o = k.d_o;
  q.o = query_maps(call.o);
  q.k = key_maps(call.k, Queries::kKeys);
  q.v = key_maps(call.v, Queries::kKeys);
  q.d_q = make_tile_maps<D>(array_of(g.d_q), call.sequences, call.queries, call.heads, 16);
  q.key_starts = call.key_starts;
  q.lse = call.lse;
  q.rows = rows;
  q.score_factor = score_factor;
  q.scale = call.scale;
  q.sequences = sequences;
  q.heads = call.heads;
  q.queries = queries;
  q.units = static_cast<int>(ceil_div(queries, Queries::kQueries));
  q.heads_at_once = plan.heads_at_once;
  q.row_length = plan.row_length;

  allow_shared(attention_packed_dq_kernel<Queries>, Queries::kSharedBytes);
  const int groups = static_cast<int>(std::min<int64_t>(plan.parts, call.sequences * q.units));
  attention_packed_dq_kernel<Queries>
      <<<groups * plan.heads_at_once, Queries::kThreads, Queries::kSharedBytes, stream>>>(q);
  check_launch("attention_packed_dq_kernel");

  allow_shared(attention_packed_dkv_kernel<Keys>, Keys::kSharedBytes);
  attention_packed_dkv_kernel<Keys>
      <<<plan.parts * plan.heads_at_once, Keys::kThreads, Keys::kSharedBytes, stream>>>(k);
  check_launch("attention_packed_dkv_kernel");
  if (plan.parts > 1) {
    const dim3 grid((plan.parts - 1) * call.heads, Keys::kConsumers);
    attention_packed_sum_kernel<Keys><<<grid, 128, 0, stream>>>(k);
    check_launch("attention_packed_sum_kernel");
  }
}

}  // namespace

template <int D>
int64_t packed_backward_scratch(const stdit_attention& call) {
  return Plan<KeyGradient<D>>(call).bytes;
}

template <int D>
void packed_backward(const stdit_attention& call, const stdit_attention_gradients& gradients, cudaStream_t stream) {
  launch<QueryGradient<D>, KeyGradient<D>>(call, gradients, stream);
}

template int64_t packed_backward_scratch<STDIT_HEAD_DIM>(const stdit_attention&);
template void packed_backward<STDIT_HEAD_DIM>(const stdit_attention&, const stdit_attention_gradients&, cudaStream_t);

}  // namespace stdit
