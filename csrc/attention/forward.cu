// Attention's forward pass: o = softmax(scale * norm(q) norm(k)^T) v, one head of one sequence at a time.
//
// A block stays on its multiprocessor and takes a unit of work after another: 64 * Consumers queries of a head. Its
// first warpgroup feeds the others: one thread has the copy engine bring q, and k and v in tiles of Keys rows through a
// ring of Stages; three warps, or seven, normalise k where it lies, two lanes a row. Each of the other warpgroups has
// 64 queries, in registers, and normalises them there: scores by wgmma; softmax in registers; p from registers times v.
// The next tile's scores are asked for before p v of this one.
//
// More keys than stay in the ring: all that a unit would do for k is too much for those warps. k comes normalised then,
// as an image in scratch memory that a kernel before makes (key_image.h). Or, of heads that leave no columns for what
// the backward pass needs (kRoundsLongKeys), the warps only find the factors that would normalise k, by which the scores
// are multiplied.
//
// The consumers take turns at asking for products (turns.h): one has them made while the others exponentiate.
//
// o leaves by the copy engine through shared memory of its own, 16 rows a warp, and nothing waits for it but the next
// unit's o: stores queue behind the loads under way, 2,000 cycles and more.
//
// The weights of both norms and the scale are folded into q, scores come out in units of log2: 2^(s - max). Where q and
// k are normalised no score exceeds D times the largest of those factors; if that is small, as with trained weights,
// 2^s is in range as it is: no maximum is looked for and nothing is rescaled.
//
// Where nothing is normalised, q is used as it is and the scale is applied to the scores: folded into q it would cost a
// rounding.
//
// Tiles: up to 160 keys, as training's small buckets have, what counts is memory: three consumers hold all queries of a
// sequence, 80 keys a tile waste least (144 = 80 + 64). Longer: 128 queries by 128 keys or 192 by 96 (of heads up to 80
// wide), which take as long a tile, whichever needs fewer tiles. Of a last tile with few keys only a part is
// multiplied.
//
// Keys and values of a head stay in the ring for all its units that a block has, if they fit. Ahead: a unit's first
// scores are asked for with the last product of the one before, whose results leave meanwhile.
//
// Of few keys and many heads, blocks wait for each other before they load another head (pace.h).
//
// Packed keys (cross attention over text): they always fit; the order of units is in units.h.

#include <algorithm>
#include <type_traits>

#include "attention/head_dim.h"
#include "attention/key_image.h"
#include "attention/pace.h"
#include "attention/row_image.h"
#include "attention/shared.h"
#include "attention/turns.h"
#include "attention/units.h"
#include "stdit/attention.h"
#include "stdit/attention_tiles.h"

namespace stdit {
namespace {

// Feeders: warpgroups. Imaged: k comes from an image.
template <int D_, int Consumers_, int Keys_, int Stages_, bool Packed_ = false, bool Ahead_ = false, int Feeders_ = 1,
          bool Imaged_ = false>
struct Forward {
  static constexpr bool kPacked = Packed_, kAhead = Ahead_, kImaged = Imaged_;
  static constexpr int D = D_, kConsumers = Consumers_, kKeys = Keys_, kStages = Stages_, kQueryStages = 2;
  // Blocks keep together (pace.h). With so many registers in use as there are for what is kAhead of 128 keys, the compiler
  // would have products wait for each other, for the little that this adds.
  static constexpr bool kPaced = !kPacked && !kImaged && !(kAhead && kKeys == 128);
  static constexpr int kFeeders = Feeders_, kNormalisers = 4 * kFeeders - 1;  // warpgroups; warps
  static constexpr int kQueries = 64 * kConsumers, kThreads = 128 * (kConsumers + kFeeders);
  static constexpr int kTail = kKeys == 128 || (kKeys == 80 && !kPacked) ? 64 : 48;  // keys of a narrow last tile
  using QueryTile = Tile<D, 64>;
  using KeyTile = Tile<D, kKeys>;
  static constexpr int kFeederRegisters = kImaged           ? 24
                                          : kFeeders == 2   ? 56
                                          : kConsumers == 2 ? 72
                                          : kPacked || kKeys == 96 || D > 80 ? 32 : 56;
  static constexpr int kConsumerRegisters = consumer_registers(kConsumers, kFeederRegisters, kFeeders);

  struct Shared {
    alignas(1024) char q[kQueryStages][kConsumers][QueryTile::kBytes];
    alignas(1024) char o[kConsumers][QueryTile::kBytes];
    alignas(1024) char k[kStages][kImaged ? static_cast<int>(Image<D>::bytes(kKeys)) : KeyTile::kBytes];
    alignas(1024) char v[kStages][KeyTile::kBytes];
    alignas(16) float k_factors[kStages][kKeys];
    alignas(16) float weights[Fragments<D>::kColumns];
    int range[2];  // packed: the block's first unit, and the next block's
    Barrier q_full[kQueryStages], q_empty[kQueryStages];
    Barrier k_full[kStages], v_full[kStages], k_ready[kStages], kv_empty[kStages];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;
  static_assert(kSharedBytes <= kMostSharedBytes, "what a block can have");
};

// A run's place among all: which of a head's, the head, the sequence.
struct RunPlace {
  int run, head, sequence;
};

// A unit is `kQueries` queries of a head. A run is some units of a head one after another whose keys and values stay in
// shared memory, if there are more than one.
struct ForwardArguments {
  TileMaps q, k, v, o;  // o: in boxes of 16 rows
  NormArguments norm;
  bool rounds_keys;       // normalised keys; else their factors scale the scores
  float score_factor;     // of scores, to units of log2
  const int* key_starts;  // packed keys: [sequences + 1]
  float* lse;
  int sequences, heads, queries, keys;
  int units;          // of a head of a sequence
  int runs;           // that they are cut into
  int run_units;      // of a run, at most
  RunPlace step;      // from a block's run to its next
  int heads_at_once;  // packed: that neighbouring blocks work on
  int* begun;         // of Pace, zero before; null: of more keys, or few heads
  const char* key_image;  // imaged: [sequences * heads] of key_length rows
  int key_length;
};

// A block's units where sequences have keys of their own: runs, each `step` after the one before.
struct Runs : Unit {
  int run, runs, heads, sequences, units, run_units;
  RunPlace step;

  __device__ __forceinline__ explicit Runs(const ForwardArguments& a)
      : runs(a.runs), heads(a.heads), sequences(a.sequences), units(a.units), run_units(a.run_units), step(a.step) {
    const int item = blockIdx.x / runs;
    run = blockIdx.x - item * runs;
    sequence = item / heads;
    head = item - sequence * heads;
    begin();
  }
  __device__ __forceinline__ bool valid() const { return sequence < sequences; }
  __device__ __forceinline__ void next() {
    first = false;
    if (++unit < end) return;
    run += step.run;
    head += step.head;
    sequence += step.sequence;
    if (run >= runs) {
      run -= runs;
      ++head;
    }
    if (head >= heads) {
      head -= heads;
      ++sequence;
    }
    begin();
  }

 private:
  __device__ __forceinline__ void begin() {
    unit = run * run_units;
    end = min(unit + run_units, units);
    first = true;
  }
};

template <class F>
__device__ __forceinline__ auto units_of(const ForwardArguments& a, const typename F::Shared& s) {
  if constexpr (F::kPacked) {
    return PackedUnits(s.range, a.units, a.heads, a.heads_at_once);
  } else {
    return Runs(a);
  }
}

template <class F>
__device__ __forceinline__ KeyRange keys_of(const ForwardArguments& a, const Unit& u) {
  return F::kPacked ? KeyRange::packed(a.key_starts, u.sequence) : KeyRange{0, a.keys, u.sequence};
}

template <class F>
__device__ __forceinline__ void produce(const ForwardArguments& a, typename F::Shared& s) {
  constexpr int D = F::D;
  RingPlace<F::kQueryStages> q;
  RingPlace<F::kStages> kv;
  Pace pace(a.begun);
  for (auto u = units_of<F>(a, s); u.valid(); u.next()) {
    if (F::kPaced && u.first) pace.next();
    const int first_query = u.unit * F::kQueries, tiles = min(F::kConsumers, (a.queries - first_query + 63) / 64);
    s.q_empty[q.stage].wait(q.parity ^ 1);
    s.q_full[q.stage].arrive_and_expect(tiles * F::QueryTile::kLoadBytes);
    for (int w = 0; w < tiles; ++w) {
      load_tile<D, 64>(a.q, s.q_full[q.stage], s.q[q.stage][w], first_query + 64 * w, u.head, u.sequence);
    }
    q.next();
    if (!u.first) continue;
    const KeyRange keys = keys_of<F>(a, u);
    for (int key = 0; key < keys.count; key += F::kKeys) {
      s.kv_empty[kv.stage].wait(kv.parity ^ 1);
      if constexpr (F::kImaged) {
        constexpr int kBytes = sizeof(s.k[0]);
        s.k_full[kv.stage].arrive_and_expect(kBytes);
        const int64_t row = (static_cast<int64_t>(u.sequence) * a.heads + u.head) * a.key_length + key;
        load_bytes(a.key_image + Image<D>::bytes(row), s.k_full[kv.stage], s.k[kv.stage], kBytes);
      } else {
        s.k_full[kv.stage].arrive_and_expect(F::KeyTile::kLoadBytes);
        load_tile<D, F::kKeys>(a.k, s.k_full[kv.stage], s.k[kv.stage], keys.first + key, u.head, keys.sequence);
      }
      s.v_full[kv.stage].arrive_and_expect(F::KeyTile::kLoadBytes);
      load_tile<D, F::kKeys>(a.v, s.v_full[kv.stage], s.v[kv.stage], keys.first + key, u.head, keys.sequence);
      kv.next();
    }
  }
}

// Normalises k in place, or finds the factors that would.
template <class F>
__device__ __forceinline__ void normalise(const ForwardArguments& a, typename F::Shared& s, int warp) {
  Dealer dealer{warp, F::kNormalisers};
  RingPlace<F::kStages> kv;
  for (auto u = units_of<F>(a, s); u.valid(); u.next()) {
    if (!u.first) continue;
    for (int key = 0; key < a.keys; key += F::kKeys) {
      if (kForRacecheck) {
        s.k_ready[kv.stage].wait(kv.parity ^ 1);
        s.kv_empty[kv.stage].wait(kv.parity ^ 1);
      }
      s.k_full[kv.stage].wait(kv.parity);
      if (a.norm.normalise_k) {
        dealer.deal((min(F::kKeys, a.keys - key) + 15) / 16, [&](int group) {
          if (kRoundsLongKeys<F::D> || (kHasShortBackward<F::D> && a.rounds_keys)) {
            scale_rows<F::D, F::kKeys>(s.k[kv.stage], group * 16, true, a.norm.epsilon, nullptr);
          } else {
            row_factors<F::D, F::kKeys>(s.k[kv.stage], group * 16, a.norm.epsilon, s.k_factors[kv.stage]);
          }
        });
        fence_async_shared();
      }
      arrive_warp(s.k_ready[kv.stage]);
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
__device__ __forceinline__ float row_max(const float* s, int h) {
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

// Bounded: q and k are normalised, and scores need no maximum.
template <class F, bool Bounded>
__device__ __forceinline__ void consume(const ForwardArguments& a, typename F::Shared& s, int consumer) {
  constexpr int D = F::D, kKeys = F::kKeys;
  constexpr bool kAhead = F::kAhead && Bounded;
  constexpr std::integral_constant<int, kKeys> whole;
  constexpr std::integral_constant<int, F::kTail> tail;
  using QueryTile = typename F::QueryTile;
  using KeyTile = typename F::KeyTile;
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  Barrier* const k_ready = F::kPacked || F::kImaged ? s.k_full : s.k_ready;
  char* const o_tile = s.o[consumer];
  const bool scales_scores = !kRoundsLongKeys<D> && !F::kPacked && a.norm.normalise_k && !a.rounds_keys;
  const Turns<F::kPacked ? 1 : F::kConsumers> turns{consumer};  // over packed keys they cost more than they bring
  RingPlace<F::kQueryStages> q_place;
  RingPlace<F::kStages> first;  // of the run's keys
  int keys = 0, tiles = 0;
  Fragments<D> q;
  float scores[kKeys / 2];
  // All of these take the width of a tile's products, kKeys or kTail.
  const auto ask_scores = [&](auto width, int stage) {
    constexpr int N = decltype(width)::value;
    hold(q.x);
    wgmma_fence();
    if constexpr (F::kImaged) {
      multiply_columns<N, D, kAhead>(front<N / 2>(scores), FragmentColumns{q.x}, ImageColumns<D>(s.k[stage]));
    } else {
      multiply_columns<N, KeyTile, kAhead>(front<N / 2>(scores), q.x, ColumnsOperand::of<KeyTile>(s.k[stage]));
    }
    wgmma_commit();
  };
  const auto bring_queries = [&] {
    if (kRoundsLongKeys<D> || kAhead) s.q_full[q_place.stage].wait(q_place.parity);
    q.template load<64>(s.q[q_place.stage][consumer], 16 * warp);
    arrive_warp(s.q_empty[q_place.stage]);
    q_place.next();
    if (!F::kPacked && a.norm.folds()) q.scale(a.norm.normalise_q, a.norm.epsilon, s.weights);
  };
  turns.begin();
  if constexpr (kAhead) {
    clear(scores);
    if (units_of<F>(a, s).valid()) {
      bring_queries();
      k_ready[0].wait(0);
      turns.take();
      ask_scores(whole, 0);
      turns.pass();
    }
  }
  for (auto u = units_of<F>(a, s); u.valid(); u.next()) {
    if (u.first) {
      keys = keys_of<F>(a, u).count;
      tiles = (keys + kKeys - 1) / kKeys;
    }
    const bool leaves = u.last();
    const int first_query = u.unit * F::kQueries + 64 * consumer;
    RingPlace<F::kStages> kv = first;
    if constexpr (!kAhead) s.q_full[q_place.stage].wait(q_place.parity);
    if (!kAhead && first_query >= a.queries) {  // nothing to do but to let the others' tiles pass
      arrive_warp(s.q_empty[q_place.stage]);
      q_place.next();
      for (int tile = 0; tile < tiles; ++tile) {
        k_ready[kv.stage].wait(kv.parity);
        s.v_full[kv.stage].wait(kv.parity);
        if (leaves) arrive_warp(s.kv_empty[kv.stage]);
        kv.next();
        turns.take();
        turns.pass();
      }
      if (leaves) first = kv;
      continue;
    }
    if constexpr (!kAhead && kRoundsLongKeys<D>) bring_queries();
    if constexpr (!kRoundsLongKeys<D>) {  // as above, without the wait, which has been made
      q.template load<64>(s.q[q_place.stage][consumer], 16 * warp);
      arrive_warp(s.q_empty[q_place.stage]);
      q_place.next();
      if (!F::kPacked && a.norm.folds()) q.scale(a.norm.normalise_q, a.norm.epsilon, s.weights);
    }

    float o[D / 2];
    uint32_t p[kKeys / 4];
    RowState rows[2];
    rows[0].max = rows[1].max = Bounded ? 0.0f : -INFINITY;
    if constexpr (!kAhead) {
#pragma unroll
      for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;
    }

    // The product of the packed p with the values of a stage, on top of o.
    const auto ask_values = [&](auto width, int stage) {
      constexpr int N = decltype(width)::value;
      const auto v_operand = RowsOperand::of<KeyTile>(s.v[stage]);
      hold(front<N / 4>(p));
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < N / 16; ++i) multiply_rows<KeyTile, kMajorK>(o, p + 4 * i, v_operand, 16 * i);
      wgmma_commit();
    };
    // Scores become exponentials. Answers whether what was summed before has to be multiplied by `factors`.
    float factors[2];
    const auto exponentiate = [&](auto width, int tile, int stage) {
      constexpr int N = decltype(width)::value;
      hold(front<N / 2>(scores));
      if (scales_scores) {
        const float2* k_factors = reinterpret_cast<const float2*>(s.k_factors[stage]) + lane % 4;
#pragma unroll
        for (int i = 0; i < N / 8; ++i) {
          const float2 factor = k_factors[4 * i];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            scores[4 * i + 2 * h] *= factor.x;
            scores[4 * i + 2 * h + 1] *= factor.y;
          }
        }
      }
      if (tile * kKeys + N > keys) {  // keys that are not there
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
          if (tile * kKeys + 8 * (i / 4) + 2 * (lane % 4) + i % 2 >= keys) scores[i] = -INFINITY;
        }
      }
      if (Bounded) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
          scores[i] = exp2_approx(scores[i]);
          rows[(i / 2) % 2].sum += scores[i];
        }
        return false;
      }
      const float high[2] = {row_max<N>(scores, 0) * a.score_factor, row_max<N>(scores, 1) * a.score_factor};
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
      for (int i = 0; i < N / 2; ++i) {
        scores[i] = exp2_approx(fmaf(scores[i], a.score_factor, -rows[(i / 2) % 2].max));
        rows[(i / 2) % 2].sum += scores[i];
      }
      return rescale;
    };
    const auto pack_scores = [&](auto width) {
#pragma unroll
      for (int i = 0; i < decltype(width)::value / 4; ++i) p[i] = pack(scores[2 * i], scores[2 * i + 1]);
    };
    const auto begin = [&] {
      if constexpr (!kAhead) {
        k_ready[kv.stage].wait(kv.parity);
        turns.take();
        ask_scores(whole, kv.stage);
        turns.pass();
      }
      wgmma_wait<0>();
      if constexpr (kAhead) clear(o);  // not before: the compiler would have products wait for each other
      exponentiate(whole, 0, kv.stage);
      pack_scores(whole);
    };
    const auto step = [&](auto width, int tile) {
      const RingPlace<F::kStages> before = kv;
      kv.next();
      s.v_full[before.stage].wait(before.parity);
      k_ready[kv.stage].wait(kv.parity);
      turns.take();
      ask_scores(width, kv.stage);
      ask_values(whole, before.stage);
      turns.pass();
      wgmma_wait<1>();
      const bool rescale = exponentiate(width, tile, kv.stage);
      if constexpr (!kRoundsLongKeys<D>) hold(front<decltype(width)::value / 2>(scores));  // before the wait
      wgmma_wait<0>();
      hold(o);
      if (leaves) arrive_warp(s.kv_empty[before.stage]);
      if (rescale) {
#pragma unroll
        for (int i = 0; i < D / 2; ++i) o[i] *= factors[(i / 2) % 2];
      }
      pack_scores(width);
    };

    // Each in one place: code that is run has to fit into the instructions' cache.
    const bool narrow = tiles > 1 && keys - (tiles - 1) * kKeys <= F::kTail;  // the last tile
    begin();
    for (int tile = 1; tile < tiles - narrow; ++tile) step(whole, tile);
    if (narrow) step(tail, tiles - 1);
    s.v_full[kv.stage].wait(kv.parity);
    if constexpr (kAhead) {
      // After the last unit the same again, which nobody looks at: one path, where the compiler sees what is under way.
      RingPlace<F::kStages> next = first;
      if (leaves) {
        next = kv;
        next.next();
      }
      auto after = u;
      after.next();
      if (after.valid()) {
        bring_queries();
        k_ready[next.stage].wait(next.parity);
      } else {
        next = first;
      }
      turns.take();
      if (narrow) {
        ask_values(tail, kv.stage);
      } else {
        ask_values(whole, kv.stage);
      }
      ask_scores(whole, next.stage);
      turns.pass();
    } else if (narrow) {
      ask_values(tail, kv.stage);
    } else {
      ask_values(whole, kv.stage);
    }
    if (lane == 0) wait_stores_read<0>();  // of the o before
    __syncwarp();
    float inverse[2], lse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = rows[h].sum;
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      inverse[h] = __fdividef(1.0f, sum);
      lse[h] = (rows[h].max + __log2f(sum)) * kLn2;
    }
    wgmma_wait<kAhead ? 1 : 0>();
    hold(o);
    if (leaves) arrive_warp(s.kv_empty[kv.stage]);
    kv.next();
    if (leaves) first = kv;
    if (kAhead && first_query >= a.queries) continue;
    store_accumulators<D, 64>(o_tile, 16 * warp, o, inverse[0], inverse[1]);
    fence_async_shared();
    __syncwarp();
    if (lane == 0) {
      store_rows<D, 64>(a.o, o_tile, 16 * warp, first_query + 16 * warp, u.head, u.sequence);
      commit_stores();
    }
    if (lane % 4 == 0) {  // not before the fence, which would wait until this has been written
      const int64_t item = static_cast<int64_t>(u.sequence) * a.heads + u.head;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int query = first_query + 16 * warp + lane / 4 + 8 * h;
        if (query < a.queries) a.lse[item * a.queries + query] = lse[h];
      }
    }
  }
  if constexpr (kAhead) {
    wgmma_wait<0>();
    hold(scores);
  }
  turns.end();
  if (lane == 0) wait_stores_read<0>();
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
      s.q_empty[i].init(4 * F::kConsumers * kWarpArrivals);
    }
    for (int i = 0; i < F::kStages; ++i) {
      s.k_full[i].init(1);
      s.v_full[i].init(1);
      s.k_ready[i].init(F::kNormalisers * kWarpArrivals);
      s.kv_empty[i].init(4 * F::kConsumers * kWarpArrivals);
    }
    fence_barrier_init();
  }
  for (int i = threadIdx.x; i < Fragments<F::D>::kColumns; i += F::kThreads) {
    s.weights[i] = i < F::D ? a.norm.weight(i) * a.norm.scale * kLog2E : 0.0f;
  }
  if (F::kPacked && threadIdx.x < 64) {
    find_range(s.range, a.key_starts, a.sequences, a.units, a.heads_at_once, F::kKeys);
  }
  __syncthreads();
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same for a warp, as the compiler can see
  if (kRoundsLongKeys<F::D> ? group < F::kFeeders : group == 0) {
    leave_registers<F::kFeederRegisters>();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (warp > 0) {
      if (!F::kPacked && !F::kImaged) normalise<F>(a, s, warp - 1);
    } else if (threadIdx.x == 0) {
      produce<F>(a, s);
    }
  } else {
    take_registers<F::kConsumerRegisters>();
    if (!F::kPacked && a.norm.normalise_q && a.norm.normalise_k && F::D * largest(s.weights, F::D) <= kLargestBound) {
      consume<F, true>(a, s, group - F::kFeeders);
    } else {
      consume<F, false>(a, s, group - F::kFeeders);
    }
  }
}

// How many runs a head's units are cut into: those that end soonest, when a run costs one more than its units.
int count_runs(int64_t items, int units, int multiprocessors) {
  int best = 1;
  int64_t least = INT64_MAX;
  for (int runs = 1; runs <= units; ++runs) {
    const int64_t cost = ceil_div(items * runs, multiprocessors) * (ceil_div(units, runs) + 1);
    if (cost < least) {
      least = cost;
      best = runs;
    }
  }
  return best;
}

template <class F>
bool is_paced(const stdit_attention& call) {
  return F::kPaced && keeps_pace<F::D>(call);
}

// Of a head's keys, in whole tiles.
template <class F>
int64_t image_rows(const stdit_attention& call) {
  return ceil_div(call.keys, F::kKeys) * F::kKeys;
}

template <class F>
void launch(const stdit_attention& call, void* scratch, cudaStream_t stream) {
  ForwardArguments a{};
  a.q = make_tile_maps<F::D>(array_of(call.q), call.sequences, call.queries, call.heads, 64);
  a.k = make_tile_maps<F::D>(array_of(call.k), key_sequences(call), key_rows(call), call.heads, F::kKeys);
  a.v = make_tile_maps<F::D>(array_of(call.v), key_sequences(call), key_rows(call), call.heads, F::kKeys);
  a.o = make_tile_maps<F::D>(array_of(call.o), call.sequences, call.queries, call.heads, 16);
  a.norm = norm_of(call);
  a.score_factor = a.norm.score_factor();
  a.rounds_keys = rounds_keys<F::D>(call);
  a.key_starts = call.key_starts;
  a.sequences = static_cast<int>(call.sequences);
  a.lse = call.lse;
  a.heads = call.heads;
  a.queries = static_cast<int>(call.queries);
  a.keys = static_cast<int>(call.keys);
  a.units = static_cast<int>(ceil_div(call.queries, F::kQueries));
  int blocks = multiprocessors();
  if (F::kPacked) {
    a.heads_at_once = heads_at_once(call.heads, blocks);
    const int64_t groups = std::min<int64_t>(blocks / a.heads_at_once, call.sequences * a.units);
    blocks = static_cast<int>(groups) * a.heads_at_once;
  } else {
    const int64_t items = call.sequences * call.heads;
    const bool keys_stay = call.keys <= F::kKeys * F::kStages;
    const int runs = keys_stay ? count_runs(items, a.units, blocks) : a.units;
    a.run_units = static_cast<int>(ceil_div(a.units, runs));
    a.runs = static_cast<int>(ceil_div(a.units, a.run_units));
    blocks = static_cast<int>(std::min<int64_t>(items * a.runs, blocks));
    a.step = {blocks % a.runs, blocks / a.runs % a.heads, blocks / a.runs / a.heads};
  }
  if constexpr (F::kImaged) {
    a.key_length = static_cast<int>(image_rows<F>(call));
    a.key_image = static_cast<char*>(scratch);
    make_key_image<F::D>(call, static_cast<char*>(scratch), nullptr, a.key_length, stream);
  }
  if (is_paced<F>(call) && memory_lags()) {
    a.begun = static_cast<int*>(scratch);
    STDIT_CHECK(cudaMemsetAsync(a.begun, 0, sizeof(int), stream));
  }
  const auto kernel = attention_forward_kernel<F>;
  STDIT_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, F::kSharedBytes));
  kernel<<<blocks, F::kThreads, F::kSharedBytes, stream>>>(a);
  check_launch("attention_forward_kernel");
}

// Tiles that a call makes of F.
template <class F>
int64_t tiles_of(const stdit_attention& call) {
  return ceil_div(call.queries, F::kQueries) * ceil_div(call.keys, F::kKeys);
}

// Up to so many keys, which stay in the ring, seven warps normalise them where they lie; of more an image is made.
constexpr int64_t kMostKeysWithoutImage = 512;
static_assert(kMostPacedKeys <= kMostKeysWithoutImage, "scratch memory is for one of both");

// Calls f(a kernel) with the one that serves a call.
template <int D, class F>
void choose(const stdit_attention& call, F f) {
  using Packed = Forward<D, D <= 80 ? 3 : 2, 80, 4, true>;
  using Short = Forward<D, 3, 80, D <= 80 ? 4 : 3>;
  using Middle = Forward<D, 2, 128, D <= 80 ? 4 : 3>;
  static_assert(Packed::kKeys * Packed::kStages == kMostPackedKeys, "they stay in the ring");
  if (call.key_starts != nullptr) return f(Packed{});
  if constexpr (kRoundsLongKeys<D> && D <= 80) {
    // Ahead where all consumers have queries in all units: those that have none do as if.
    const int64_t chunks = ceil_div(call.queries, 64);
    if (call.keys <= 2 * Short::kKeys) {
      if (chunks % 3 == 0) return f(Forward<D, 3, 80, 4, false, true>{});
      return f(Short{});
    }
    if (call.keys <= 320) {
      if (chunks % 2 == 0) return f(Forward<D, 2, 128, 4, false, true>{});
      return f(Middle{});
    }
    if (call.keys <= kMostKeysWithoutImage) {
      if (chunks % 2 == 0) return f(Forward<D, 2, 128, 4, false, true, 2>{});
      return f(Forward<D, 2, 128, 4, false, false, 2>{});
    }
    return f(Forward<D, 3, 96, 4, false, false, 1, true>{});
  } else {
    if (call.keys <= 2 * Short::kKeys) return f(Short{});
    if constexpr (D <= 80) {  // wider heads' registers leave no room for a third consumer of so many keys
      using Long = Forward<D, 3, 96, 4>;
      // A tile of either takes as long; in the ring, once more, it costs nothing.
      const bool stay = call.keys <= Middle::kKeys * Middle::kStages && call.keys > 2 * Long::kKeys;
      if (!stay && tiles_of<Long>(call) < tiles_of<Middle>(call)) return f(Long{});
    }
    f(Middle{});
  }
}

}  // namespace

template <int D>
void forward(const stdit_attention& call, void* scratch, cudaStream_t stream) {
  choose<D>(call, [&](auto kernel) { launch<decltype(kernel)>(call, scratch, stream); });
}

template <int D>
int64_t forward_scratch(const stdit_attention& call) {
  int64_t bytes = 0;
  choose<D>(call, [&](auto kernel) {
    using F = decltype(kernel);
    if (is_paced<F>(call)) bytes = kPaceBytes;
    if (F::kImaged) bytes = call.sequences * call.heads * Image<D>::bytes(image_rows<F>(call));
  });
  return bytes;
}

template void forward<STDIT_HEAD_DIM>(const stdit_attention&, void*, cudaStream_t);
template int64_t forward_scratch<STDIT_HEAD_DIM>(const stdit_attention&);

}  // namespace stdit
