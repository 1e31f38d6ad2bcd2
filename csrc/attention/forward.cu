// Attention's forward pass: o = softmax(scale * norm(q) norm(k)^T) v, one head of one sequence at a time.
//
// A block stays on its multiprocessor and takes a unit of work after another: 64 * Consumers queries of a head. Its
// first warpgroup feeds the others: one thread has the copy engine bring q, and k and v in tiles of Keys rows through a
// ring of Stages; three warps normalise q and k where they lie in shared memory, two lanes a row. Each of the other
// warpgroups has 64 queries: scores by wgmma, both operands in shared memory; softmax in registers; p from registers
// times v. The next tile's scores are asked for before p v of this one. o leaves through the shared memory that held q,
// by the copy engine.
//
// The weights of both norms and the scale are folded into q, scores come out in units of log2: 2^(s - max). Where q and
// k are normalised no score exceeds D times the largest of those factors; if that is small, as with trained weights,
// 2^s is in range as it is: no maximum is looked for and nothing is rescaled.
//
// Where nothing is normalised, q is used as it is and the scale is applied to the scores: folded into q it would cost a
// rounding.
//
// Tiles: up to 160 keys, as training's small buckets have, what counts is memory: three consumers hold all queries of a
// sequence, 80 keys a tile waste least (144 = 2 * 80 - 16), and q is in threefold so that loads never wait for a unit's
// end. Longer: 128 queries by 128 keys or 192 by 96, which take as long a tile, whichever needs fewer tiles.
//
// Packed keys (cross attention over text): a block takes units of one head after each other, as many as make its share
// of the work, and keeps the head's keys and values in the ring meanwhile.

#include <algorithm>
#include <stdexcept>

#include "attention/shared.h"
#include "stdit/attention.h"
#include "stdit/attention_tiles.h"

namespace stdit {
namespace {

template <int D_, int Consumers_, int Keys_, int Stages_, int QueryStages_, bool Packed_ = false>
struct Forward {
  static constexpr bool kPacked = Packed_;
  static constexpr int D = D_, kConsumers = Consumers_, kKeys = Keys_, kStages = Stages_, kQueryStages = QueryStages_;
  static constexpr int kQueries = 64 * kConsumers, kThreads = 128 * (kConsumers + 1);
  using QueryTile = Tile<D, 64>;
  using KeyTile = Tile<D, kKeys>;
  static constexpr int kFeederRegisters = kConsumers == 2 ? 72 : kKeys == 128 ? 32 : 56;
  static constexpr int kConsumerRegisters = consumer_registers(kConsumers, kFeederRegisters);

  struct Shared {
    alignas(1024) char q[kQueryStages][kConsumers][QueryTile::kBytes];
    alignas(1024) char k[kStages][KeyTile::kBytes];
    alignas(1024) char v[kStages][KeyTile::kBytes];
    alignas(16) float weights[D];
    int range[2];  // packed: the block's first unit, and the next block's
    Barrier q_full[kQueryStages], q_ready[kQueryStages], q_empty[kQueryStages];
    Barrier k_full[kStages], v_full[kStages], k_ready[kStages], kv_empty[kStages];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;
};

struct ForwardArguments {
  TileMaps q, k, v, o;
  NormArguments norm;
  float score_factor;     // of scores, to units of log2
  const int* key_starts;  // packed keys: [sequences + 1]
  float* lse;
  int sequences, units, query_blocks, heads, queries, keys;
};

struct Unit {
  int first_query, head, sequence;
};

template <class F>
__device__ __forceinline__ Unit unit_of(const ForwardArguments& a, int unit) {
  const int item = unit / a.query_blocks;
  return {(unit - item * a.query_blocks) * F::kQueries, item % a.heads, item / a.heads};
}

template <class F>
__device__ __forceinline__ KeyRange keys_of(const ForwardArguments& a, const Unit& u) {
  return F::kPacked ? KeyRange::packed(a.key_starts, u.sequence) : KeyRange{0, a.keys, u.sequence};
}

// A block's units, one after another.
template <class F>
struct UnitCursor {
  int at, end;

  __device__ __forceinline__ UnitCursor(const ForwardArguments& a, const typename F::Shared& s)
      : at(F::kPacked ? s.range[0] : blockIdx.x), end(F::kPacked ? s.range[1] : a.units) {}
  __device__ __forceinline__ bool valid() const { return at < end; }
  __device__ __forceinline__ void next() { at += F::kPacked ? 1 : gridDim.x; }
  // Whether keys and values must be brought for this unit, and whether no unit after it needs them.
  __device__ __forceinline__ bool brings_keys(const ForwardArguments& a, const typename F::Shared& s) const {
    return !F::kPacked || at == s.range[0] || at % a.query_blocks == 0;
  }
  __device__ __forceinline__ bool leaves_keys(const ForwardArguments& a) const {
    return !F::kPacked || at + 1 == end || (at + 1) % a.query_blocks == 0;
  }
};

template <class F>
__device__ __forceinline__ int query_tiles(const ForwardArguments& a, const Unit& u) {
  return min(F::kConsumers, (a.queries - u.first_query + 63) / 64);
}

template <class F>
__device__ __forceinline__ void produce(const ForwardArguments& a, typename F::Shared& s) {
  constexpr int D = F::D;
  RingPlace<F::kQueryStages> q;
  RingPlace<F::kStages> kv;
  for (UnitCursor<F> at(a, s); at.valid(); at.next()) {
    const Unit u = unit_of<F>(a, at.at);
    s.q_empty[q.stage].wait(q.parity ^ 1);
    const int tiles = query_tiles<F>(a, u);
    s.q_full[q.stage].arrive_and_expect(tiles * F::QueryTile::kLoadBytes);
    for (int w = 0; w < tiles; ++w) {
      load_tile<D, 64>(a.q, s.q_full[q.stage], s.q[q.stage][w], u.first_query + 64 * w, u.head, u.sequence);
    }
    q.next();
    if (!at.brings_keys(a, s)) continue;
    const KeyRange keys = keys_of<F>(a, u);
    for (int key = 0; key < keys.count; key += F::kKeys) {
      s.kv_empty[kv.stage].wait(kv.parity ^ 1);
      s.k_full[kv.stage].arrive_and_expect(F::KeyTile::kLoadBytes);
      load_tile<D, F::kKeys>(a.k, s.k_full[kv.stage], s.k[kv.stage], keys.first + key, u.head, keys.sequence);
      s.v_full[kv.stage].arrive_and_expect(F::KeyTile::kLoadBytes);
      load_tile<D, F::kKeys>(a.v, s.v_full[kv.stage], s.v[kv.stage], keys.first + key, u.head, keys.sequence);
      kv.next();
    }
  }
}

template <class F>
__device__ __forceinline__ void normalise(const ForwardArguments& a, typename F::Shared& s, int warp) {
  constexpr int D = F::D;
  const auto ready = [](Barrier& barrier) {
    fence_async_shared();
    arrive_warp(barrier);
  };
  Dealer dealer{warp};
  RingPlace<F::kQueryStages> q;
  RingPlace<F::kStages> kv;
  for (UnitCursor<F> at(a, s); at.valid(); at.next()) {
    if (kForRacecheck) s.q_ready[q.stage].wait(q.parity ^ 1);
    s.q_full[q.stage].wait(q.parity);
    if (a.norm.folds()) {
      dealer.deal(4 * query_tiles<F>(a, unit_of<F>(a, at.at)), [&](int group) {
        scale_rows<D, 64>(s.q[q.stage][group / 4], group % 4 * 16, a.norm.normalise_q, a.norm.epsilon, s.weights);
      });
    }
    ready(s.q_ready[q.stage]);
    q.next();
    for (int key = 0; key < a.keys; key += F::kKeys) {
      if (kForRacecheck) s.k_ready[kv.stage].wait(kv.parity ^ 1);
      s.k_full[kv.stage].wait(kv.parity);
      if (a.norm.normalise_k) {
        dealer.deal((min(F::kKeys, a.keys - key) + 15) / 16, [&](int group) {
          scale_rows<D, F::kKeys>(s.k[kv.stage], group * 16, true, a.norm.epsilon, nullptr);
        });
      }
      ready(s.k_ready[kv.stage]);
      kv.next();
    }
  }
}

// Softmax of one row's part of a tile, as it is added to what is there.
struct RowState {
  float max;
  float sum = 0.0f;
};

// The largest of a row's scores of a tile, over the quad of lanes that share it.
template <int Keys>
__device__ __forceinline__ float row_max(const float (&s)[Keys / 2], int h) {
  float high = s[2 * h];
#pragma unroll
  for (int j = 0; j < Keys / 8; ++j) high = fmaxf(high, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
  high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
  return fmaxf(high, __shfl_xor_sync(~0u, high, 2));
}

// What 2^s may reach without a maximum taken off: sums of 2^32 such terms and their products with values stay in range.
constexpr float kLargestBound = 64.0f;

// Exponentials are taken relative to a row's largest score so far, or to one that is at most this much (log2) less:
// then what was summed needs no rescaling, and float32 holds 2^8 times as much as well.
constexpr float kSlack = 8.0f;

// Bounded: scores need no maximum.
template <class F, bool Bounded>
__device__ __forceinline__ void consume(const ForwardArguments& a, typename F::Shared& s, int consumer) {
  constexpr int D = F::D, kKeys = F::kKeys;
  using QueryTile = typename F::QueryTile;
  using KeyTile = typename F::KeyTile;
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  Barrier* const q_ready = F::kPacked ? s.q_full : s.q_ready;
  Barrier* const k_ready = F::kPacked ? s.k_full : s.k_ready;
  RingPlace<F::kQueryStages> q;
  RingPlace<F::kStages> first;  // of the unit's keys
  for (UnitCursor<F> at(a, s); at.valid(); at.next()) {
    const Unit u = unit_of<F>(a, at.at);
    const int keys = keys_of<F>(a, u).count, tiles = (keys + kKeys - 1) / kKeys;
    const bool leaves = at.leaves_keys(a);
    RingPlace<F::kStages> kv = first;
    if (u.first_query + 64 * consumer >= a.queries) {  // nothing to do but to let the others' tiles pass
      for (int tile = 0; tile < tiles; ++tile) {
        k_ready[kv.stage].wait(kv.parity);
        if (thread == 0 && leaves) s.kv_empty[kv.stage].arrive();
        kv.next();
      }
      if (thread == 0) s.q_empty[q.stage].arrive();
      q.next();
      if (leaves) first = kv;
      continue;
    }
    char* q_tile = s.q[q.stage][consumer];
    float scores[kKeys / 2], o[D / 2];
    uint32_t p[kKeys / 4];
    RowState rows[2];
    rows[0].max = rows[1].max = Bounded ? 0.0f : -INFINITY;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;

    const auto q_operand = ColumnsOperand::of<QueryTile>(q_tile);
    const auto ask_scores = [&](int stage) {
      wgmma_fence();
      multiply_columns<kKeys, QueryTile, KeyTile>(scores, q_operand, ColumnsOperand::of<KeyTile>(s.k[stage]));
      wgmma_commit();
    };
    // The product of the packed p with the values of a stage, on top of o.
    const auto ask_values = [&](const RingPlace<F::kStages>& place) {
      s.v_full[place.stage].wait(place.parity);
      const auto v_operand = RowsOperand::of<KeyTile>(s.v[place.stage]);
      hold(p);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i) {
        multiply_rows<KeyTile, kMajorK>(o, p + 4 * i, v_operand, 16 * i);
      }
      wgmma_commit();
    };
    // Scores become exponentials. Answers whether what was summed before has to be multiplied by `factors`.
    float factors[2];
    const auto exponentiate = [&](int tile) {
      if (tile == tiles - 1) {  // keys that are not there
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) {
          if (tile * kKeys + 8 * (i / 4) + 2 * (lane % 4) + i % 2 >= keys) scores[i] = -INFINITY;
        }
      }
      if (Bounded) {
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) {
          scores[i] = exp2_approx(scores[i]);
          rows[(i / 2) % 2].sum += scores[i];
        }
        return false;
      }
      const float high[2] = {row_max<kKeys>(scores, 0) * a.score_factor, row_max<kKeys>(scores, 1) * a.score_factor};
      const bool rescale = __any_sync(~0u, high[0] > rows[0].max + kSlack || high[1] > rows[1].max + kSlack);
      if (rescale) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float max = fmaxf(rows[h].max, high[h]);
          factors[h] = exp2_approx(rows[h].max - max);
          rows[h].max = max;
          rows[h].sum *= factors[h];
        }
      }
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        scores[i] = exp2_approx(fmaf(scores[i], a.score_factor, -rows[(i / 2) % 2].max));
        rows[(i / 2) % 2].sum += scores[i];
      }
      return rescale;
    };
    const auto pack_scores = [&] {
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) p[i] = pack(scores[2 * i], scores[2 * i + 1]);
    };

    q_ready[q.stage].wait(q.parity);
    k_ready[kv.stage].wait(kv.parity);
    ask_scores(kv.stage);
    wgmma_wait<0>();
    hold(scores);
    exponentiate(0);
    pack_scores();
    for (int tile = 1; tile < tiles; ++tile) {
      const RingPlace<F::kStages> before = kv;
      kv.next();
      k_ready[kv.stage].wait(kv.parity);
      ask_scores(kv.stage);
      ask_values(before);
      wgmma_wait<1>();
      hold(scores);
      const bool rescale = exponentiate(tile);
      wgmma_wait<0>();
      hold(o);
      if (thread == 0 && leaves) s.kv_empty[before.stage].arrive();
      if (rescale) {
#pragma unroll
        for (int i = 0; i < D / 2; ++i) o[i] *= factors[(i / 2) % 2];
      }
      pack_scores();
    }
    ask_values(kv);
    wgmma_wait<0>();
    hold(o);
    if (thread == 0 && leaves) s.kv_empty[kv.stage].arrive();
    kv.next();
    if (leaves) first = kv;

    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = rows[h].sum;
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      inverse[h] = 1.0f / sum;
      const int query = u.first_query + 64 * consumer + 16 * warp + lane / 4 + 8 * h;
      if (lane % 4 == 0 && query < a.queries) {
        const int64_t row = static_cast<int64_t>(u.sequence) * a.heads + u.head;
        a.lse[row * a.queries + query] = (rows[h].max + log2f(sum)) * kLn2;
      }
    }
    sync_threads(1 + consumer, 128);  // all warps have read their q
    store_accumulators<D, 64>(q_tile, 16 * warp, o, inverse[0], inverse[1]);
    fence_async_shared();
    sync_threads(1 + consumer, 128);
    if (thread == 0) {
      store_tile<D, 64>(a.o, q_tile, u.first_query + 64 * consumer, u.head, u.sequence);
      commit_stores();
      wait_stores_read<0>();
      s.q_empty[q.stage].arrive();
    }
    q.next();
  }
}

// The largest magnitude of some values, the same for all threads of a warp.
__device__ __forceinline__ float largest(const float* values, int count) {
  float high = 0.0f;
  for (int i = threadIdx.x % 32; i < count; i += 32) high = fmaxf(high, fabsf(values[i]));
  for (int step = 1; step < 32; step *= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, step));
  return __shfl_sync(~0u, high, 0);
}

template <class F>
__global__ void __launch_bounds__(F::kThreads, 1) attention_forward_kernel(const __grid_constant__ ForwardArguments a) {
  extern __shared__ char dynamic[];
  auto& s = *reinterpret_cast<typename F::Shared*>(aligned_1024(dynamic));
  if (threadIdx.x == 0) {
    for (int i = 0; i < F::kQueryStages; ++i) {
      s.q_full[i].init(1);
      s.q_ready[i].init(kNormalisers * kWarpArrivals);
      s.q_empty[i].init(F::kConsumers);
    }
    for (int i = 0; i < F::kStages; ++i) {
      s.k_full[i].init(1);
      s.v_full[i].init(1);
      s.k_ready[i].init(kNormalisers * kWarpArrivals);
      s.kv_empty[i].init(F::kConsumers);
    }
    fence_barrier_init();
  }
  for (int i = threadIdx.x; i < F::D; i += F::kThreads) s.weights[i] = a.norm.weight(i) * a.norm.scale * kLog2E;
  if (F::kPacked && threadIdx.x < 64) {  // a unit costs what its keys' tiles cost, and as much as one for its queries
    const int units = a.heads * a.query_blocks, part = blockIdx.x + threadIdx.x / 32;
    const Place place = place_of(
        part, gridDim.x, a.sequences, [&](int) { return units; },
        [&](int sequence) { return (KeyRange::packed(a.key_starts, sequence).count + F::kKeys - 1) / F::kKeys + 1; });
    if (threadIdx.x % 32 == 0) s.range[threadIdx.x / 32] = place.sequence * units + place.unit;
  }
  __syncthreads();
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same for a warp, as the compiler can see
  if (group == 0) {
    leave_registers<F::kFeederRegisters>();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (warp > 0) {
      if (!F::kPacked) normalise<F>(a, s, warp - 1);
    } else if (threadIdx.x == 0) {
      produce<F>(a, s);
    }
  } else {
    take_registers<F::kConsumerRegisters>();
    if (!F::kPacked && a.norm.normalise_q && a.norm.normalise_k && F::D * largest(s.weights, F::D) <= kLargestBound) {
      consume<F, true>(a, s, group - 1);
    } else {
      consume<F, false>(a, s, group - 1);
    }
  }
}

template <class F>
void launch(const stdit_attention& call, cudaStream_t stream) {
  ForwardArguments a{};
  a.q = make_tile_maps<F::D>(array_of(call.q), call.sequences, call.queries, call.heads, 64);
  a.k = make_tile_maps<F::D>(array_of(call.k), key_sequences(call), key_rows(call), call.heads, F::kKeys);
  a.v = make_tile_maps<F::D>(array_of(call.v), key_sequences(call), key_rows(call), call.heads, F::kKeys);
  a.o = make_tile_maps<F::D>(array_of(call.o), call.sequences, call.queries, call.heads, 64);
  a.norm = norm_of(call);
  a.score_factor = a.norm.score_factor();
  a.key_starts = call.key_starts;
  a.sequences = static_cast<int>(call.sequences);
  a.lse = call.lse;
  a.query_blocks = static_cast<int>((call.queries + F::kQueries - 1) / F::kQueries);
  a.heads = call.heads;
  a.queries = static_cast<int>(call.queries);
  a.keys = static_cast<int>(call.keys);
  a.units = static_cast<int>(call.sequences * call.heads * a.query_blocks);
  const auto kernel = attention_forward_kernel<F>;
  STDIT_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, F::kSharedBytes));
  kernel<<<std::min(a.units, multiprocessors()), F::kThreads, F::kSharedBytes, stream>>>(a);
  check_launch("attention_forward_kernel");
}

// Tiles that a call makes of F, those of half a size counted whole.
template <class F>
int64_t tiles_of(const stdit_attention& call) {
  const auto ceil = [](int64_t n, int64_t d) { return (n + d - 1) / d; };
  return ceil(call.queries, F::kQueries) * ceil(call.keys, F::kKeys);
}

template <int D>
void choose(const stdit_attention& call, cudaStream_t stream) {
  using Short = Forward<D, 3, 80, 4, 3>;
  using Middle = Forward<D, 2, 128, 4, 2>;
  using Long = Forward<D, 3, 96, 4, 2>;
  using Packed = Forward<D, 3, 80, 4, 3, true>;
  static_assert(Packed::kKeys * Packed::kStages == kMostPackedKeys, "they stay in the ring");
  if (call.key_starts != nullptr) {
    launch<Packed>(call, stream);
  } else if (call.keys <= 2 * Short::kKeys) {
    launch<Short>(call, stream);
  } else if (tiles_of<Middle>(call) <= tiles_of<Long>(call)) {  // a tile of either takes as long
    launch<Middle>(call, stream);
  } else {
    launch<Long>(call, stream);
  }
}

}  // namespace

void attention_forward(const stdit_attention& call, cudaStream_t stream) { choose<72>(call, stream); }

}  // namespace stdit
