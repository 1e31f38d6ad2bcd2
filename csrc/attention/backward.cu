// Attention's backward pass over up to 320 keys: gradients of q, k, v and of the norms' weights, repeating bit for bit.
// Of more keys: rounded_backward.cu, long_backward.cu. Heads that whole_backward.cu serves do not come here.
//
// A block keeps a block of keys (64 a consumer warpgroup), with its dk and dv in registers, and walks over tiles of
// queries:
//   s^T = k q^T, dp^T = v do^T      both operands in shared memory; columns are queries
//   p^T = 2^(s^T - lse), ds^T = p^T (dp^T - delta)      in registers
//   dv += p^T do, dk += ds^T q      p^T and ds^T from registers
//   dq = ds k                       ds^T through shared memory, all consumers' keys; one consumer a tile, in turn
//
// As in the forward pass the first warpgroup brings the tiles (one thread, the copy engine) and normalises q and k in
// place (three warps), which also bring lse and delta of a tile's queries. k and v are double-buffered, so that the
// next block of keys is there when this one ends. The norms' backward runs on the accumulators, from q and k as they
// came.
//
// Up to 192 keys one block of keys is all of a head, and dq is final at once. Longer heads: dq's partial sums (float32,
// in the order of the accumulators' registers, so that only threads of one number exchange them) are added in a fixed
// order. Either one block walks over all keys of a head after each other (few blocks of keys), or each block of keys is
// a unit of its own: blocks start at different tiles of queries, and a tile's counter says whose turn it is. Partial
// sums of so many heads as are under way lie in a ring, which stays in the L2 cache.
//
// Tiles: 129 to 192 keys take three consumers and 48 queries a tile (144 = 3 * 48), which is what their registers hold,
// of heads up to 72 wide; all other lengths, and heads of 80, two consumers and 64 queries. 128 queries a tile were not
// faster. Wider heads' sums leave no room for this kernel: long_backward.cu serves them at any length.
//
// delta = rowsum(do * o) comes from a small kernel before; the weights' gradients, summed by each block over its dq
// tiles, are added by one after. Each of the three begins while the one before it ends (launch_early).

#include <algorithm>

#include "attention/gradients.h"
#include "attention/head_dim.h"
#include "attention/shared.h"
#include "stdit/attention.h"
#include "stdit/attention_tiles.h"

namespace stdit {
namespace {

// Single: one block of keys is all.
template <int D_, int Consumers_, int Queries_, int Stages_, bool Single_>
struct Backward {
  static constexpr int D = D_, kConsumers = Consumers_, kQueries = Queries_, kStages = Stages_;
  static constexpr bool kSingle = Single_;
  static constexpr int kKeys = 64 * kConsumers, kThreads = 128 * (kConsumers + 1);
  static constexpr int kFeederRegisters = kConsumers == 3 ? 32 : 72;
  // Where registers allow it, partial sums are read before they are needed, and p is kept in 32 bits.
  static constexpr bool kEarly = kConsumers == 2 && D <= 72;
  static constexpr int kConsumerRegisters = consumer_registers(kConsumers, kFeederRegisters);
  using KeyTile = Tile<D, 64>;  // of one consumer
  using QueryTile = Tile<D, kQueries>;
  // ds^T of all consumers: chunks of 16 queries, each [keys][16]. The product's 64 rows may reach beyond the last
  // chunk.
  struct ScoreTile {
    static constexpr int kChunkBytes = kKeys * 32, kBytes = kQueries / 16 * kChunkBytes;

    static __device__ __forceinline__ int offset(int key, int eighth) {
      return (eighth >> 1) * kChunkBytes + key * 32 + (((eighth ^ (key >> 2)) & 1) << 4);
    }
  };
  static_assert(kQueries <= 64, "one consumer makes a tile's dq");
  static constexpr int kPartialFloats = 128 * D / 2;  // of a tile's dq

  struct Shared {
    alignas(1024) char k[2][kConsumers][KeyTile::kBytes];
    alignas(1024) char v[2][kConsumers][KeyTile::kBytes];
    alignas(1024) char ds[2][ScoreTile::kBytes];
    alignas(1024) char q[kStages][QueryTile::kBytes];
    alignas(1024) char d_o[kStages][QueryTile::kBytes];
    alignas(16) float2 rows[kStages][kQueries];  // lse in units of log2, delta
    alignas(16) float weights[D];
    float weight_sums[4 * kConsumers][D];
    Barrier kv_full[2], k_ready[2], kv_empty[2];
    Barrier q_full[kStages], do_full[kStages], q_ready[kStages], q_empty[kStages];
    Barrier ds_full[2], ds_empty[2];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;
};

struct BackwardArguments {
  TileMaps q, k, v, d_o;
  HeadArray raw_q, raw_k, d_q, d_k, d_v;
  NormArguments norm;
  float score_factor;      // of scores, to units of log2
  const float2* rows;      // [sequences * heads, queries]
  float* partials;         // ring of [query_tiles] tiles of dq
  int* turns;              // [sequences * heads, query_tiles]: whose turn it is; then [sequences * heads]: tiles done
  float* weight_partials;  // [blocks, D]; null: the weights' gradients are not asked for
  int heads, items, queries, keys, query_tiles, key_blocks, ring;
  bool walks;  // a block walks over all keys of a head
};

// A block of keys of a head, and the order in which its tiles of queries come.
template <class B>
struct Unit {
  int item, head, sequence, key_block, first_tile;

  __device__ __forceinline__ Unit(const BackwardArguments& a, int item_, int key_block_)
      : item(item_), head(item_ % a.heads), sequence(item_ / a.heads), key_block(key_block_), first_tile(0) {
    if (!B::kSingle && !a.walks) first_tile = static_cast<uint32_t>(key_block) * a.query_tiles / a.key_blocks;
  }
  __device__ __forceinline__ int tile(const BackwardArguments& a, int step) const {
    if (B::kSingle) return step;
    const int t = first_tile + step;
    return t >= a.query_tiles ? t - a.query_tiles : t;
  }
  // The place of this block of keys in the order in which a tile's dq is summed: the order in which blocks come by.
  __device__ __forceinline__ int turn(const BackwardArguments& a, int tile) const {
    if (a.walks) return key_block;
    const auto n = static_cast<uint32_t>(tile + 1) * a.key_blocks;
    const int first = static_cast<int>((n + a.query_tiles - 1) / a.query_tiles) - 1;
    const int turn = first - key_block;
    return turn < 0 ? turn + a.key_blocks : turn;
  }
};

// A block's place in its sequence of units.
template <class B>
struct UnitCursor {
  int at = blockIdx.x, key_block = 0;

  __device__ __forceinline__ bool valid(const BackwardArguments& a) const {
    return at < (B::kSingle || a.walks ? a.items : a.items * a.key_blocks);
  }
  __device__ __forceinline__ Unit<B> unit(const BackwardArguments& a) const {
    if (B::kSingle) return Unit<B>(a, at, 0);
    if (a.walks) return Unit<B>(a, at, key_block);
    const int item = at / a.key_blocks;
    return Unit<B>(a, item, at - item * a.key_blocks);
  }
  __device__ __forceinline__ void next(const BackwardArguments& a) {
    if (!B::kSingle && a.walks && ++key_block < a.key_blocks) return;
    key_block = 0;
    at += gridDim.x;
  }
};

// A block's place in its sequence of tiles of queries, over all its units.
template <class B>
struct Cursor {
  UnitCursor<B> units;
  int step = 0;
  RingPlace<2> kv;
  RingPlace<B::kStages> q;

  __device__ __forceinline__ bool valid(const BackwardArguments& a) const { return units.valid(a); }
  __device__ __forceinline__ void next(const BackwardArguments& a) {
    q.next();
    if (++step == a.query_tiles) {
      step = 0;
      kv.next();
      units.next(a);
    }
  }
};

template <class B>
__device__ __forceinline__ void produce(const BackwardArguments& a, typename B::Shared& s) {
  constexpr int D = B::D, kQueries = B::kQueries;
  for (Cursor<B> at; at.valid(a); at.next(a)) {
    const Unit<B> u = at.units.unit(a);
    if (at.step == 0) {
      const int stage = at.kv.stage;
      s.kv_empty[stage].wait(at.kv.parity ^ 1);
      s.kv_full[stage].arrive_and_expect(2 * B::kConsumers * B::KeyTile::kLoadBytes);
      for (int w = 0; w < B::kConsumers; ++w) {
        const int key = u.key_block * B::kKeys + 64 * w;
        load_tile<D, 64>(a.k, s.kv_full[stage], s.k[stage][w], key, u.head, u.sequence);
        load_tile<D, 64>(a.v, s.kv_full[stage], s.v[stage][w], key, u.head, u.sequence);
      }
    }
    const int stage = at.q.stage, query = u.tile(a, at.step) * kQueries;
    s.q_empty[stage].wait(at.q.parity ^ 1);
    s.q_full[stage].arrive_and_expect(B::QueryTile::kLoadBytes);
    load_tile<D, kQueries>(a.q, s.q_full[stage], s.q[stage], query, u.head, u.sequence);
    s.do_full[stage].arrive_and_expect(B::QueryTile::kLoadBytes);
    load_tile<D, kQueries>(a.d_o, s.do_full[stage], s.d_o[stage], query, u.head, u.sequence);
  }
}

// Normalises q and k, and brings lse and delta of a tile's queries.
template <class B>
__device__ __forceinline__ void normalise(const BackwardArguments& a, typename B::Shared& s, int warp) {
  constexpr int D = B::D, kQueries = B::kQueries, kRows = (kQueries + 32 * kNormalisers - 1) / (32 * kNormalisers);
  const int helper = 32 * warp + threadIdx.x % 32;
  const auto ready = [](Barrier& barrier) {
    fence_async_shared();
    arrive_warp(barrier);
  };
  wait_for_kernel_before();  // for the rows' sums, which nobody else reads
  Dealer dealer{warp};
  for (Cursor<B> at; at.valid(a); at.next(a)) {
    const Unit<B> u = at.units.unit(a);
    const int first_query = u.tile(a, at.step) * kQueries;
    float2 rows[kRows];
#pragma unroll
    for (int i = 0; i < kRows;
         ++i) {  // zeroes for a query that is not there: its do is zero too, so nothing comes of it
      const int query = first_query + helper + 32 * kNormalisers * i;
      rows[i] = make_float2(0.0f, 0.0f);
      if (query < a.queries) rows[i] = __ldcg(a.rows + static_cast<int64_t>(u.item) * a.queries + query);
    }
    if (at.step == 0) {
      if (kForRacecheck) s.k_ready[at.kv.stage].wait(at.kv.parity ^ 1);
      s.kv_full[at.kv.stage].wait(at.kv.parity);
      if (a.norm.normalise_k) {
        dealer.deal((min(B::kKeys, a.keys - u.key_block * B::kKeys) + 15) / 16, [&](int group) {
          scale_rows<D, 64>(s.k[at.kv.stage][group / 4], group % 4 * 16, true, a.norm.epsilon, nullptr);
        });
      }
      ready(s.k_ready[at.kv.stage]);
    }
    const int stage = at.q.stage;
    if (kForRacecheck) {
      s.q_empty[stage].wait(at.q.parity ^ 1);
      s.q_ready[stage].wait(at.q.parity ^ 1);
    }
    s.q_full[stage].wait(at.q.parity);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = helper + 32 * kNormalisers * i;
      if (row < kQueries) s.rows[stage][row] = rows[i];
    }
    if (a.norm.folds()) {
      dealer.deal(kQueries / 16, [&](int group) {
        scale_rows<D, kQueries>(s.q[stage], group * 16, a.norm.normalise_q, a.norm.epsilon, s.weights);
      });
    }
    ready(s.q_ready[stage]);
  }
}

// Waits, all 128 threads of a consumer, until a counter has reached `value`.
__device__ __forceinline__ void wait_for(const int* counter, int value, int barrier) {
  if (threadIdx.x % 128 == 0) {
    int seen;
    do {
      asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (seen < value);
  }
  sync_threads(barrier, 128);
}

// Adds one to a counter after what all 128 threads of a consumer did before.
__device__ __forceinline__ void count(int* counter, int barrier) {
  sync_threads(barrier, 128);  // what comes before it is released with the one thread's release
  if (threadIdx.x % 128 == 0) asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

// Where a tile's dq is summed over blocks of keys.
template <class B>
struct PartialPlace {
  int turn = 0;
  int* turns = nullptr;
  float4* partial = nullptr;

  __device__ __forceinline__ void find(const BackwardArguments& a, const Unit<B>& u, int tile) {
    if constexpr (!B::kSingle) {
      turn = u.turn(a, tile);
      const int slot = a.walks ? blockIdx.x : u.item % a.ring;
      turns = a.turns + static_cast<int64_t>(u.item) * a.query_tiles + tile;
      partial = reinterpret_cast<float4*>(a.partials +
                                          (static_cast<int64_t>(slot) * a.query_tiles + tile) * B::kPartialFloats) +
                threadIdx.x % 128;
    }
  }
  // What is summed so far, when it is this block's turn.
  __device__ __forceinline__ void load(const BackwardArguments& a, float (&d_q)[B::D / 2], int barrier) {
    if (!B::kSingle && turn > 0) {
      if (!a.walks) wait_for(turns, turn, barrier);
#pragma unroll
      for (int i = 0; i < B::D / 8; ++i) {
        const float4 four = __ldcg(partial + 128 * i);
        d_q[4 * i] = four.x;
        d_q[4 * i + 1] = four.y;
        d_q[4 * i + 2] = four.z;
        d_q[4 * i + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < B::D / 2; ++i) d_q[i] = 0.0f;
    }
  }
  // The sum has been read for the last time.
  __device__ __forceinline__ void leave(const BackwardArguments& a, const Unit<B>& u, int barrier) {
    if (!B::kSingle && !a.walks && turn > 0) count(done(a) + u.item, barrier);
  }
  // Keeps the sum for the next block.
  __device__ __forceinline__ void keep(const BackwardArguments& a, const Unit<B>& u, const float (&d_q)[B::D / 2],
                                       int barrier) {
    // The ring's place must have been left by the item that had it before.
    if (!a.walks && turn == 0 && u.item >= a.ring) {
      wait_for(done(a) + u.item - a.ring, a.query_tiles, barrier);
    }
#pragma unroll
    for (int i = 0; i < B::D / 8; ++i) {
      __stcg(partial + 128 * i, make_float4(d_q[4 * i], d_q[4 * i + 1], d_q[4 * i + 2], d_q[4 * i + 3]));
    }
    if (!a.walks) count(turns, barrier);
  }
  // How many tiles of each item are done.
  static __device__ __forceinline__ int* done(const BackwardArguments& a) {
    return a.turns + static_cast<int64_t>(a.items) * a.query_tiles;
  }
};

template <class B>
__device__ __forceinline__ void consume(const BackwardArguments& a, typename B::Shared& s, int consumer) {
  constexpr int D = B::D, kQueries = B::kQueries, kSteps = kQueries / 16;
  using KeyTile = typename B::KeyTile;
  using QueryTile = typename B::QueryTile;
  using ScoreTile = typename B::ScoreTile;
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int barrier = 1 + consumer;
  RingPlace<2> kv, ds;
  RingPlace<B::kStages> q;
  const bool sums_weights = a.weight_partials != nullptr;
  float* weight_sums = s.weight_sums[4 * consumer + warp];

  for (UnitCursor<B> cursor; cursor.valid(a); cursor.next(a)) {
    const Unit<B> u = cursor.unit(a);
    float d_k[D / 2], d_v[D / 2];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) d_k[i] = d_v[i] = 0.0f;
    const int key0 = u.key_block * B::kKeys + 64 * consumer + 16 * warp + lane / 4;  // this thread's, and 8 more
    const bool keys_end = u.key_block == a.key_blocks - 1;
    s.kv_full[kv.stage].wait(kv.parity);
    s.k_ready[kv.stage].wait(kv.parity);
    float p[kQueries / 2], dp[kQueries / 2];

    const auto k_operand = ColumnsOperand::of<KeyTile>(s.k[kv.stage][consumer]);
    const auto v_operand = ColumnsOperand::of<KeyTile>(s.v[kv.stage][consumer]);

    // s^T and dp^T of a stage's queries
    const auto ask_scores = [&](const RingPlace<B::kStages>& place) {
      s.q_ready[place.stage].wait(place.parity);
      wgmma_fence();
      multiply_columns<kQueries, KeyTile, QueryTile>(p, k_operand, ColumnsOperand::of<QueryTile>(s.q[place.stage]));
      wgmma_commit();
      s.do_full[place.stage].wait(place.parity);
      multiply_columns<kQueries, KeyTile, QueryTile>(dp, v_operand, ColumnsOperand::of<QueryTile>(s.d_o[place.stage]));
      wgmma_commit();
    };

    for (int step = 0; step < a.query_tiles; ++step) {
      const int tile = u.tile(a, step);
      const bool mine = tile % B::kConsumers == consumer;  // this consumer's dq
      const int stage = q.stage;
      float d_q[D / 2];
      PartialPlace<B> place;
      if (mine) {
        place.find(a, u, tile);
        if (B::kEarly) place.load(a, d_q, barrier);
      }
      uint32_t p16[kQueries / 4], ds16[kQueries / 4];
      ask_scores(q);
      wgmma_wait<1>();
      hold(p);
      const float4* rows = reinterpret_cast<const float4*>(s.rows[stage]) + lane % 4;  // two queries each
#pragma unroll
      for (int j = 0; j < kQueries / 8; ++j) {
        const float4 row = rows[4 * j];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          p[4 * j + 2 * h] = exp2_approx(fmaf(p[4 * j + 2 * h], a.score_factor, -row.x));
          p[4 * j + 2 * h + 1] = exp2_approx(fmaf(p[4 * j + 2 * h + 1], a.score_factor, -row.z));
        }
      }
      if (keys_end) {  // keys that are not there
#pragma unroll
        for (int i = 0; i < kQueries / 2; ++i) {
          if (key0 + 8 * (i / 2 % 2) >= a.keys) p[i] = 0.0f;
        }
      }
#pragma unroll
      for (int i = 0; i < kQueries / 4; ++i) p16[i] = pack(p[2 * i], p[2 * i + 1]);
      hold(p16);
      const auto do_operand = RowsOperand::of<QueryTile>(s.d_o[stage]);
      const auto q_operand = RowsOperand::of<QueryTile>(s.q[stage]);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        multiply_rows<QueryTile, kMajorK>(d_v, p16 + 4 * i, do_operand, 16 * i);
      }
      wgmma_commit();
      wgmma_wait<1>();
      hold(dp);
#pragma unroll
      for (int j = 0; j < kQueries / 8; ++j) {
        const float4 row = rows[4 * j];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          // Where registers are scarce, p comes back from its 16 bits.
          const float low = !B::kEarly ? low_half(p16[2 * j + h]) : p[4 * j + 2 * h];
          const float high = !B::kEarly ? high_half(p16[2 * j + h]) : p[4 * j + 2 * h + 1];
          ds16[2 * j + h] = pack(low * (dp[4 * j + 2 * h] - row.y), high * (dp[4 * j + 2 * h + 1] - row.w));
        }
      }
      hold(ds16);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        multiply_rows<QueryTile, kMajorK>(d_k, ds16 + 4 * i, q_operand, 16 * i);
      }
      wgmma_commit();

      // ds^T to where all consumers' lies
      s.ds_empty[ds.stage].wait(ds.parity ^ 1);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int row = 64 * consumer + 16 * warp + lane % 16;
        store_matrices(shared_address(s.ds[ds.stage] + ScoreTile::offset(row, 2 * i + lane / 16)), ds16[4 * i],
                       ds16[4 * i + 1], ds16[4 * i + 2], ds16[4 * i + 3]);
      }
      fence_async_shared();
      arrive_warp(s.ds_full[ds.stage]);
      if (!B::kSingle && !B::kEarly && mine) place.load(a, d_q, barrier);

      q.next();
      wgmma_wait<0>();
      hold(d_v);
      hold(d_k);
      arrive_warp(s.q_empty[stage]);  // every warp, when its lanes have read their rows

      if (mine) {
        s.ds_full[ds.stage].wait(ds.parity);
        const Operand scores(shared_address(s.ds[ds.stage]), Swizzle::k32, ScoreTile::kChunkBytes, 256);
        const auto keys = RowsOperand::of<KeyTile>(s.k[kv.stage][0]);
        if (!B::kSingle) hold(d_q);
        wgmma_fence();
        multiply_rows<KeyTile, kMajorMN, B::kSingle>(d_q, scores, keys, 0);
#pragma unroll
        for (int i = 1; i < B::kKeys / 16; ++i) {  // 16 keys of ds^T, its queries as rows, and of k
          multiply_rows<KeyTile, kMajorMN>(d_q, scores.moved(i * 16 * 32), keys.moved(i / 4 * KeyTile::kBytes),
                                           i % 4 * 16);
        }
        wgmma_commit();
        // Rows of d_q beyond the tile's may be anything, and are none of this tile's.
        const int query = tile * kQueries + 16 * warp + lane / 4;
        const int queries = min(a.queries, tile * kQueries + kQueries);
        const bool whole = B::kSingle || place.turn == a.key_blocks - 1;
        RawRows<D> raw;
        if (whole) raw.read(RowPair(a.raw_q, u.sequence, u.head, query, queries));
        wgmma_wait<0>();
        hold(d_q);
        if (thread == 0) s.ds_empty[ds.stage].arrive();
        if (whole) {
          place.leave(a, u, barrier);
          const RowPair out(a.d_q, u.sequence, u.head, query, queries);
#pragma unroll
          for (int i = 0; i < D / 2; ++i) {
            if (!out.there[i / 2 % 2]) d_q[i] = 0.0f;
          }
          // The weights in shared memory hold the scale, in units of log2.
          through_norm<D>(d_q, raw, a.norm.normalise_q, a.norm.epsilon, s.weights, kLn2, sums_weights, weight_sums);
          write_rows<D>(d_q, out);
        } else {
          place.keep(a, u, d_q, barrier);
        }
      }
      ds.next();
    }
    if (thread == 0) s.kv_empty[kv.stage].arrive();
    kv.next();

    RawRows<D> raw;
    raw.read(RowPair(a.raw_k, u.sequence, u.head, key0, a.keys));
    write_rows<D>(d_v, RowPair(a.d_v, u.sequence, u.head, key0, a.keys));
    // Where q is scaled, it is in units of log2.
    const float scale = a.norm.folds() ? kLn2 : a.norm.scale;
    through_norm<D>(d_k, raw, a.norm.normalise_k, a.norm.epsilon, nullptr, scale, false, nullptr);
    write_rows<D>(d_k, RowPair(a.d_k, u.sequence, u.head, key0, a.keys));
  }

  if (a.weight_partials != nullptr) {
    sync_threads(1 + B::kConsumers, 128 * B::kConsumers);
    for (int i = threadIdx.x - 128; i < D; i += 128 * B::kConsumers) {
      float sum = 0.0f;
      for (int w = 0; w < 4 * B::kConsumers; ++w) sum += s.weight_sums[w][i];
      a.weight_partials[static_cast<int64_t>(blockIdx.x) * D + i] = sum;
    }
  }
}

template <class B>
__global__ void __launch_bounds__(B::kThreads, 1)
    attention_backward_kernel(const __grid_constant__ BackwardArguments a) {
  extern __shared__ char dynamic[];
  auto& s = *reinterpret_cast<typename B::Shared*>(aligned_1024(dynamic));
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      s.kv_full[i].init(1);
      s.k_ready[i].init(kNormalisers * kWarpArrivals);
      s.kv_empty[i].init(B::kConsumers);
      s.ds_full[i].init(4 * B::kConsumers * kWarpArrivals);
      s.ds_empty[i].init(1);
    }
    for (int i = 0; i < B::kStages; ++i) {
      s.q_full[i].init(1);
      s.do_full[i].init(1);
      s.q_ready[i].init(kNormalisers * kWarpArrivals);
      s.q_empty[i].init(4 * B::kConsumers * kWarpArrivals);
    }
    fence_barrier_init();
  }
  for (int i = threadIdx.x; i < B::D; i += B::kThreads) s.weights[i] = a.norm.weight(i) * a.norm.scale * kLog2E;
  for (int i = threadIdx.x; i < 4 * B::kConsumers * B::D; i += B::kThreads) (&s.weight_sums[0][0])[i] = 0.0f;
  __syncthreads();
  let_next_kernel_begin();
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same for a warp, as the compiler can see
  if (group == 0) {
    leave_registers<B::kFeederRegisters>();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (warp > 0) {
      normalise<B>(a, s, warp - 1);
    } else if (threadIdx.x == 0) {
      produce<B>(a, s);
    }
  } else {
    take_registers<B::kConsumerRegisters>();
    consume<B>(a, s, group - 1);
  }
}

template <int D>
__global__ void __launch_bounds__(kRowThreads) attention_rows_kernel(RowArguments a) {
  let_next_kernel_begin();
  write_row_sums<D>(a, blockIdx.x);
}

// How a call is cut, and where its parts of the scratch memory begin.
struct Plan {
  int key_blocks, query_tiles, blocks, ring;
  bool walks;
  int64_t items, rows_at, turns_at, turns_bytes, weights_at, partials_at, bytes;
};

template <class B>
Plan plan_of(const stdit_attention& call) {
  const auto ceil = [](int64_t n, int64_t d) { return (n + d - 1) / d; };
  const auto aligned = [&](int64_t n) { return ceil(n, 256) * 256; };
  Plan p{};
  p.items = call.sequences * call.heads;
  p.key_blocks = static_cast<int>(ceil(call.keys, B::kKeys));
  p.query_tiles = static_cast<int>(ceil(call.queries, B::kQueries));
  const int most = multiprocessors();
  // Walking costs nothing but balance: at least four rounds, or as many items as there are blocks.
  p.walks = p.key_blocks == 1 || (p.key_blocks <= 4 && p.items >= 4 * most) || p.key_blocks > most;
  const int64_t units = p.walks ? p.items : p.items * p.key_blocks;
  p.blocks = static_cast<int>(std::min<int64_t>(units, most));
  p.ring = p.walks ? p.blocks : static_cast<int>(std::min<int64_t>(p.items, p.blocks / p.key_blocks + 3));
  p.rows_at = 0;
  p.turns_at = aligned(p.items * call.queries * 8);
  p.turns_bytes = p.walks ? 0 : p.items * (p.query_tiles + 1) * 4;
  p.weights_at = p.turns_at + aligned(p.turns_bytes);
  p.partials_at = p.weights_at + aligned(int64_t{p.blocks} * B::D * 4);
  p.bytes = p.partials_at + (p.key_blocks == 1 ? 0 : int64_t{p.ring} * p.query_tiles * B::kPartialFloats * 4);
  return p;
}

template <class B>
void launch(const stdit_attention& call, const stdit_attention_gradients& g, cudaStream_t stream) {
  constexpr int D = B::D;
  const Plan plan = plan_of<B>(call);
  char* scratch = static_cast<char*>(g.scratch);
  BackwardArguments a{};
  const auto maps = [&](const stdit_heads& array, int64_t rows, int box_rows) {
    return make_tile_maps<D>(array_of(array), call.sequences, rows, call.heads, box_rows);
  };
  a.q = maps(call.q, call.queries, B::kQueries);
  a.k = maps(call.k, call.keys, 64);
  a.v = maps(call.v, call.keys, 64);
  a.d_o = maps(g.d_o, call.queries, B::kQueries);
  a.raw_q = array_of(call.q);
  a.raw_k = array_of(call.k);
  a.d_q = array_of(g.d_q);
  a.d_k = array_of(g.d_k);
  a.d_v = array_of(g.d_v);
  a.norm = norm_of(call);
  a.score_factor = a.norm.score_factor();
  auto* rows = reinterpret_cast<float2*>(scratch + plan.rows_at);
  a.rows = rows;
  a.turns = reinterpret_cast<int*>(scratch + plan.turns_at);
  a.weight_partials = g.d_weights == nullptr ? nullptr : reinterpret_cast<float*>(scratch + plan.weights_at);
  a.partials = reinterpret_cast<float*>(scratch + plan.partials_at);
  a.heads = call.heads;
  a.items = static_cast<int>(plan.items);
  a.queries = static_cast<int>(call.queries);
  a.keys = static_cast<int>(call.keys);
  a.query_tiles = plan.query_tiles;
  a.key_blocks = plan.key_blocks;
  a.ring = plan.ring;
  a.walks = plan.walks;

  if (plan.turns_bytes > 0) STDIT_CHECK(cudaMemsetAsync(a.turns, 0, plan.turns_bytes, stream));
  const RowArguments row_sums{array_of(call.o), array_of(g.d_o), call.lse,  rows,
                              call.heads,       a.queries,       a.queries, plan.items * call.queries};
  attention_rows_kernel<D><<<row_blocks<D>(row_sums), kRowThreads, 0, stream>>>(row_sums);
  check_launch("attention_rows_kernel");
  const auto kernel = attention_backward_kernel<B>;
  STDIT_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, B::kSharedBytes));
  launch_early(kernel, dim3(plan.blocks), dim3(B::kThreads), B::kSharedBytes, stream, a);
  check_launch("attention_backward_kernel");
  sum_weights<D>(a.weight_partials, plan.blocks, a.norm, g.d_weights, stream);
}

template <int D>
using Narrow = Backward<D, 2, 64, 3, false>;
template <int D>
using Wide = Backward<D, 3, 48, 3, true>;

// Calls f(a kernel) with the one that serves a call.
template <int D, class F>
void choose(const stdit_attention& call, F f) {
  if constexpr (D <= 72) {
    if (call.keys > Narrow<D>::kKeys && call.keys <= Wide<D>::kKeys) return f(Wide<D>{});
  }
  f(Narrow<D>{});
}

}  // namespace

template <int D>
int64_t short_backward_scratch(const stdit_attention& call) {
  int64_t bytes = 0;
  choose<D>(call, [&](auto kernel) { bytes = plan_of<decltype(kernel)>(call).bytes; });
  return bytes;
}

template <int D>
void short_backward(const stdit_attention& call, const stdit_attention_gradients& gradients, cudaStream_t stream) {
  choose<D>(call, [&](auto kernel) { launch<decltype(kernel)>(call, gradients, stream); });
}

template int64_t short_backward_scratch<STDIT_HEAD_DIM>(const stdit_attention&);
template void short_backward<STDIT_HEAD_DIM>(const stdit_attention&, const stdit_attention_gradients&, cudaStream_t);

}  // namespace stdit
