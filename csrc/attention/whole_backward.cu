// Attention's backward pass where all of a head fits on chip: 65 to 128 and 193 to 320 queries and as many keys, in
// chunks of 64. Gradients of q, k, v and of the norms' weights, repeating bit for bit.
//
// A block takes a head after another. Each array moves once: q, k, v and do come by the copy engine, o into registers
// for delta = rowsum(do * o), and three gradients leave. Of a head's work each of two consumer warpgroups has every
// second unit, all of the chunk's sums in registers, so that no consumer waits for another's results:
//   n units of 64 queries, tiles of keys pass by:    s = q k^T, dp = do v^T, ds = 2^(s - lse) (dp - delta), dq += ds k
//   n units of 64 keys, tiles of queries pass by:    s^T, dp^T likewise, dv += p^T do, dk += ds^T q
// That is seven products where five would do with ds exchanged between warpgroups (backward.cu), which waits longer
// than the two take. lse and delta are taken off by the products themselves, as in rounded_backward.cu.
//
// A unit's first scores are asked for together with the last sums of the one before, whose results are written
// meanwhile. Consumers ask in turns (turns.h); each has as many.
//
// Chunks come as pairs, (k, v) and (q, do), into a ring of 11 places: up to 256 rows the next head's first are there
// before this one ends, since pairs are asked for in the order in which this head's leave: k and v by their unit, q and
// do by the last. Three warps normalise q and k where they lie. k's gradient goes back through the norm by what is on
// chip: normalised k and its rows' factors.

#include <algorithm>

#include "attention/gradients.h"
#include "attention/head_dim.h"
#include "attention/row_image.h"
#include "attention/shared.h"
#include "attention/turns.h"
#include "stdit/attention.h"
#include "stdit/attention_tiles.h"

namespace stdit {
namespace {

constexpr int kLeastChunks = 2, kMostChunks = 5;

int chunks_of(int64_t rows) { return static_cast<int>((rows + 63) / 64); }

template <int D_>
struct Whole {
  static constexpr int D = D_, kConsumers = 2, kThreads = 128 * (kConsumers + 1);
  static constexpr int kPlaces = 11;
  static constexpr int kFeederRegisters = 72;
  static constexpr int kConsumerRegisters = consumer_registers(kConsumers, kFeederRegisters);
  // Products over columns take sixteens. The eight that are left hold what has to be taken off: -lse beside q,
  // -delta beside do, in three parts each, and ones beside k and v, so that the products come out as s - lse and dp -
  // delta.
  static_assert(Image<D>::kPads, "columns for that");
  using T = Tile<D, 64>;

  struct Shared {
    alignas(1024) char pairs[kPlaces][2][T::kBytes];  // q and do, or k and v
    float key_factors[kPlaces][64];                   // by which k is normalised
    alignas(16) float weights[D];
    float weight_sums[4 * kConsumers][D];
    Barrier full[kPlaces], ready[kPlaces], empty[kPlaces];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;
  static constexpr bool kFits = kSharedBytes <= kMostSharedBytes && D >= 64;
};

struct WholeArguments {
  TileMaps q, k, v, d_o;
  HeadArray raw_q, o, d_q, d_k, d_v;
  NormArguments norm;
  float score_factor;      // of scores, to units of log2
  const float* lse;        // [sequences * heads, queries]
  float* weight_partials;  // [blocks, D]; null: the weights' gradients are not asked for
  int heads, items, queries, keys, chunks;
};

// A pair's place in the ring, by its number among all that the block brings.
struct PairPlace {
  int stage;
  uint32_t parity;

  template <class W>
  static __device__ __forceinline__ PairPlace of(int number) {
    const auto round = static_cast<uint32_t>(number) / W::kPlaces;
    return {static_cast<int>(number - round * W::kPlaces), round & 1};
  }
};

// A block's heads.
struct WholeHead {
  int item, head, sequence, number, chunks;  // number: of the heads before

  __device__ __forceinline__ explicit WholeHead(const WholeArguments& a)
      : item(blockIdx.x), number(0), chunks(a.chunks) {
    find(a);
  }
  __device__ __forceinline__ bool valid(const WholeArguments& a) const { return item < a.items; }
  __device__ __forceinline__ void next(const WholeArguments& a) {
    item += gridDim.x;
    ++number;
    find(a);
  }
  __device__ __forceinline__ void find(const WholeArguments& a) {
    sequence = item / a.heads;
    head = item - sequence * a.heads;
  }
  // Pairs come as k and v 0, 1; q and do 0, 1; k and v from 2 on; q and do from 2 on.
  template <class W>
  __device__ __forceinline__ PairPlace keys(int chunk) const {
    return PairPlace::of<W>(2 * chunks * number + (chunk < 2 ? chunk : chunk + 2));
  }
  template <class W>
  __device__ __forceinline__ PairPlace queries(int chunk) const {
    return PairPlace::of<W>(2 * chunks * number + (chunk < 2 ? 2 + chunk : chunks + chunk));
  }
  // Calls f(chunk, of queries) for each, in that order.
  template <class F>
  __device__ __forceinline__ void each_pair(F f) const {
    for (int i = 0; i < 2 * chunks; ++i) {
      const bool of_queries = i < 4 ? i >= 2 : i >= chunks + 2;
      f(i < 4 ? i % 2 : i - (of_queries ? chunks : 2), of_queries);
    }
  }
};

template <class W>
__device__ __forceinline__ void produce(const WholeArguments& a, typename W::Shared& s) {
  constexpr int D = W::D;
  for (WholeHead h(a); h.valid(a); h.next(a)) {
    h.each_pair([&](int chunk, bool of_queries) {
      const PairPlace place = of_queries ? h.template queries<W>(chunk) : h.template keys<W>(chunk);
      Barrier& full = s.full[place.stage];
      s.empty[place.stage].wait(place.parity ^ 1);
      full.arrive_and_expect(2 * W::T::kLoadBytes);
      load_tile<D, 64>(of_queries ? a.q : a.k, full, s.pairs[place.stage][0], 64 * chunk, h.head, h.sequence);
      load_tile<D, 64>(of_queries ? a.d_o : a.v, full, s.pairs[place.stage][1], 64 * chunk, h.head, h.sequence);
    });
  }
}

// Normalises 16 queries, and finds delta. Zeroes for a query that is not there: its do is zero too, so nothing comes of
// it.
template <class W>
__device__ __forceinline__ void prepare_queries(const WholeArguments& a, typename W::Shared& s, const WholeHead& h,
                                                int chunk, const PairPlace& place, int group) {
  constexpr int D = W::D;
  using T = typename W::T;
  const int lane = threadIdx.x % 32, row = group * 16 + lane / 2, query = 64 * chunk + row;
  const HalfRow<D, 64> share{lane % 2};
  const bool there = query < a.queries;
  uint4 pieces[share.kEach];
  const auto* o = reinterpret_cast<const uint4*>(a.o.head(h.sequence, h.head) + query * a.o.row_stride);
#pragma unroll
  for (int i = 0; i < share.kEach; ++i) {
    pieces[i] = make_uint4(0, 0, 0, 0);
    if (share.there(i) && there) pieces[i] = __ldg(o + share.piece(i));
  }
  float lse = 0.0f;
  if (there) lse = __ldg(a.lse + static_cast<int64_t>(h.item) * a.queries + query) * kLog2E;
  s.full[place.stage].wait(place.parity);
  float sums[2] = {};
#pragma unroll
  for (int i = 0; i < share.kEach; ++i) {
    if (!share.there(i)) continue;
    const uint4 x = *reinterpret_cast<const uint4*>(s.pairs[place.stage][1] + T::offset(row, share.piece(i)));
    const uint32_t left[4] = {x.x, x.y, x.z, x.w};
    const uint32_t right[4] = {pieces[i].x, pieces[i].y, pieces[i].z, pieces[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sums[0] = fmaf(low_half(left[j]), low_half(right[j]), sums[0]);
      sums[1] = fmaf(high_half(left[j]), high_half(right[j]), sums[1]);
    }
  }
  const float sum = sums[0] + sums[1], delta = sum + __shfl_xor_sync(~0u, sum, 1);
  const uint4 parts = in_parts(lane % 2 == 0 ? -lse / a.score_factor : -delta);  // one lane of a row each
  *reinterpret_cast<uint4*>(s.pairs[place.stage][lane % 2] + T::offset(row, D / 8)) = parts;
  if (a.norm.folds()) {
    scale_rows<D, 64>(s.pairs[place.stage][0], group * 16, a.norm.normalise_q, a.norm.epsilon, s.weights);
  }
}

template <class W>
__device__ __forceinline__ void normalise(const WholeArguments& a, typename W::Shared& s, int warp) {
  constexpr int D = W::D;
  Dealer dealer{warp};
  for (WholeHead h(a); h.valid(a); h.next(a)) {
    h.each_pair([&](int chunk, bool of_queries) {
      const PairPlace place = of_queries ? h.template queries<W>(chunk) : h.template keys<W>(chunk);
      if (kForRacecheck) {
        s.empty[place.stage].wait(place.parity ^ 1);
        s.ready[place.stage].wait(place.parity ^ 1);
      }
      if (of_queries) {
        dealer.deal(4, [&](int group) { prepare_queries<W>(a, s, h, chunk, place, group); });
      } else {
        s.full[place.stage].wait(place.parity);
        dealer.deal((min(64, a.keys - 64 * chunk) + 15) / 16, [&](int group) {
          if (a.norm.normalise_k) {
            scale_rows<D, 64>(s.pairs[place.stage][0], group * 16, true, a.norm.epsilon, nullptr,
                              s.key_factors[place.stage]);
          }
          const int lane = threadIdx.x % 32;
          char* const tile = s.pairs[place.stage][lane % 2];
          *reinterpret_cast<uint4*>(tile + W::T::offset(group * 16 + lane / 2, D / 8)) = ones();
        });
      }
      s.full[place.stage].wait(place.parity);  // where this warp had nothing to do, too
      fence_async_shared();
      arrive_warp(s.ready[place.stage]);
    });
  }
}

// A consumer's units of a head: of queries, then of keys, two consumers in turn.
template <class W>
struct WholeUnit {
  WholeHead h;
  int consumer, unit;

  __device__ __forceinline__ WholeUnit(const WholeArguments& a, int consumer_)
      : h(a), consumer(consumer_), unit(consumer_) {}
  __device__ __forceinline__ bool valid(const WholeArguments& a) const { return h.valid(a); }
  __device__ __forceinline__ void next(const WholeArguments& a) {
    unit += W::kConsumers;
    if (unit < 2 * h.chunks) return;
    unit = consumer;
    h.next(a);
  }
  __device__ __forceinline__ bool of_keys() const { return unit >= h.chunks; }
  __device__ __forceinline__ int chunk() const { return of_keys() ? unit - h.chunks : unit; }
  // No more of this kind in this head.
  __device__ __forceinline__ bool last() const {
    return unit + W::kConsumers >= (of_keys() ? 2 : 1) * h.chunks;
  }
  __device__ __forceinline__ PairPlace own() const {
    return of_keys() ? h.template keys<W>(chunk()) : h.template queries<W>(chunk());
  }
  // What passes by.
  __device__ __forceinline__ PairPlace tile(int i) const {
    return of_keys() ? h.template queries<W>(i) : h.template keys<W>(i);
  }
};

template <class W>
__device__ __forceinline__ void consume(const WholeArguments& a, typename W::Shared& s, int consumer) {
  constexpr int D = W::D;
  using T = typename W::T;
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, tiles = a.chunks;
  const bool sums_weights = a.weight_partials != nullptr;
  float* weight_sums = s.weight_sums[4 * consumer + warp];
  const int own_row = 16 * warp + lane / 4;  // this thread's, and eight more
  const Turns<W::kConsumers> turns{consumer};
  float p[32], dp[32];
  clear(p);
  clear(dp);

  // s and dp of a unit with a tile; both must be ready.
  Fragments<D> own_second;
  const auto ask_scores = [&](int own, int tile) {
    hold(own_second.x);
    wgmma_fence();
    multiply_columns<64, D, true>(p, TileColumns<T>(s.pairs[own][0]), TileColumns<T>(s.pairs[tile][0]));
    multiply_columns<64, D, true>(dp, FragmentColumns{own_second.x}, TileColumns<T>(s.pairs[tile][1]));
    wgmma_commit();
  };
  const auto bring_second = [&](int own) {
    own_second.template load<64>(s.pairs[own][1], 16 * warp);
  };
  const auto await = [&](const PairPlace& place) { s.ready[place.stage].wait(place.parity); };

  WholeUnit<W> at(a, consumer);
  turns.begin();
  if (at.valid(a)) {
    const PairPlace own = at.own(), tile = at.tile(0);
    await(own);
    bring_second(own.stage);
    await(tile);
    turns.take();
    ask_scores(own.stage, tile.stage);
    turns.pass();
  }

  // A unit whose first scores have been asked for; asks for the next one's.
  const auto work = [&](auto of_keys_) {
    constexpr bool kOfKeys = decltype(of_keys_)::value;
    float d_first[D / 2], d_second[kOfKeys ? D / 2 : 1];  // dq, or dk and dv
    uint32_t ds16[16], p16[kOfKeys ? 16 : 1];
    const WholeHead h = at.h;
    const int chunk = at.chunk(), first_row = 64 * chunk + own_row;
    const PairPlace own = at.own();
    const bool last = at.last();
    const auto differentiate = [&](int tile) {
      hold(p);
      hold(dp);
      if (a.score_factor != 1.0f) {
#pragma unroll
        for (int i = 0; i < 32; ++i) p[i] *= a.score_factor;
      }
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        p[i] = exp2_approx(p[i]);
        dp[i] *= p[i];
      }
      if constexpr (!kOfKeys) {
        if (64 * tile + 64 > a.keys) {  // keys that are not there
#pragma unroll
          for (int i = 0; i < 32; ++i) {
            if (64 * tile + 8 * (i / 4) + 2 * (lane % 4) + i % 2 >= a.keys) dp[i] = 0.0f;
          }
        }
      }
    };
    const auto pack_both = [&] {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        if constexpr (kOfKeys) p16[i] = pack(p[2 * i], p[2 * i + 1]);
        ds16[i] = pack(dp[2 * i], dp[2 * i + 1]);
      }
    };
    const auto ask_gradients = [&](int tile) {
      if constexpr (kOfKeys) hold(p16);
      hold(ds16);
      wgmma_fence();
      if constexpr (kOfKeys) {
        const RowsOperand d_o = RowsOperand::of<T>(s.pairs[tile][1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) multiply_rows<T, kMajorK>(d_second, p16 + 4 * i, d_o, 16 * i);
        wgmma_commit();
      }
      const RowsOperand other = RowsOperand::of<T>(s.pairs[tile][0]);
#pragma unroll
      for (int i = 0; i < 4; ++i) multiply_rows<T, kMajorK>(d_first, ds16 + 4 * i, other, 16 * i);
      wgmma_commit();
    };

    PairPlace tile = at.tile(0);
    wgmma_wait<0>();
    clear(d_first);  // not before: the compiler would have products wait for each other
    if constexpr (kOfKeys) clear(d_second);
    differentiate(0);
    pack_both();
    for (int i = 1; i < tiles; ++i) {
      const int before = tile.stage;
      tile = at.tile(i);
      await(tile);
      turns.take();
      ask_scores(own.stage, tile.stage);
      ask_gradients(before);
      turns.pass();
      wgmma_wait<kOfKeys ? 2 : 1>();
      differentiate(i);
      wgmma_wait<0>();
      hold(d_first);
      if constexpr (kOfKeys) {
        hold(d_second);
        if (last) arrive_warp(s.empty[before]);
      }
      pack_both();
    }
    at.next(a);
    RawRows<D> raw;  // of keys: as they were normalised
    float factor[2];
    if constexpr (!kOfKeys) raw.read(RowPair(a.raw_q, h.sequence, h.head, first_row, a.queries));
    // After the last unit the same again, which nobody waits for: one path, where the compiler sees what is under way.
    PairPlace next_own = own, next_tile = tile;
    if (at.valid(a)) {
      next_own = at.own();
      next_tile = at.tile(0);
      await(next_own);
      bring_second(next_own.stage);
      await(next_tile);
    }
    turns.take();
    ask_gradients(tile.stage);
    ask_scores(next_own.stage, next_tile.stage);
    turns.pass();
    if constexpr (kOfKeys) {
      wgmma_wait<2>();
      hold(d_second);
      raw.template read_tile<T>(s.pairs[own.stage][0], 16 * warp);
      const float* of_unit = s.key_factors[own.stage] + own_row;
      factor[0] = of_unit[0];
      factor[1] = of_unit[8];
      arrive_warp(s.empty[own.stage]);
      write_rows<D, true>(d_second, RowPair(a.d_v, h.sequence, h.head, first_row, a.keys));
    }
    wgmma_wait<1>();
    hold(d_first);
    if constexpr (kOfKeys) {
      if (last) arrive_warp(s.empty[tile.stage]);
      // Where q is scaled, it is in units of log2.
      const float scale = a.norm.folds() ? kLn2 : a.norm.scale;
      back_through_norm<D>(d_first, raw, a.norm.normalise_k, factor, scale);
      write_rows<D, true>(d_first, RowPair(a.d_k, h.sequence, h.head, first_row, a.keys));
    } else {
      if (last) {  // the other consumer's keys have been used here
        for (int other = 0; other < tiles; ++other) {
          if ((h.chunks + other) % W::kConsumers != consumer) arrive_warp(s.empty[h.template keys<W>(other).stage]);
        }
      }
      const RowPair out(a.d_q, h.sequence, h.head, first_row, a.queries);
      write_query_gradient<D, true>(d_first, raw, out, a.norm, s.weights, sums_weights, weight_sums);
    }
  };
  while (at.valid(a)) {
    if (at.of_keys()) {
      work(std::true_type{});
    } else {
      work(std::false_type{});
    }
  }
  wgmma_wait<0>();
  hold(p);
  hold(dp);
  turns.end();
  if (a.weight_partials != nullptr) {
    sync_threads(1 + W::kConsumers, 128 * W::kConsumers);
    for (int i = threadIdx.x - 128; i < D; i += 128 * W::kConsumers) {
      float sum = 0.0f;
      for (int w = 0; w < 4 * W::kConsumers; ++w) sum += s.weight_sums[w][i];
      a.weight_partials[static_cast<int64_t>(blockIdx.x) * D + i] = sum;
    }
  }
}

template <class W>
__global__ void __launch_bounds__(W::kThreads, 1) attention_whole_kernel(const __grid_constant__ WholeArguments a) {
  extern __shared__ char dynamic[];
  auto& s = *reinterpret_cast<typename W::Shared*>(aligned_1024(dynamic));
  if (threadIdx.x == 0) {
    for (int i = 0; i < W::kPlaces; ++i) {
      s.full[i].init(1);
      s.ready[i].init(kNormalisers * kWarpArrivals);
      s.empty[i].init(4 * W::kConsumers * kWarpArrivals);
    }
    fence_barrier_init();
  }
  begin_weights<W::kThreads>(s.weights, s.weight_sums, a.norm);
  __syncthreads();
  let_next_kernel_begin();
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same for a warp, as the compiler can see
  if (group == 0) {
    leave_registers<W::kFeederRegisters>();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (warp > 0) {
      normalise<W>(a, s, warp - 1);
    } else if (threadIdx.x == 0) {
      produce<W>(a, s);
    }
  } else {
    take_registers<W::kConsumerRegisters>();
    consume<W>(a, s, group - 1);
  }
}

int blocks_of(const stdit_attention& call) {
  return static_cast<int>(std::min<int64_t>(call.sequences * call.heads, multiprocessors()));
}

}  // namespace

template <int D>
bool whole_backward_serves(const stdit_attention& call) {
  const int chunks = chunks_of(call.keys);
  // Of three chunks the third is mostly empty in training's buckets (144 rows), which 48 rows a tile suit better.
  return Whole<D>::kFits && call.key_starts == nullptr && chunks_of(call.queries) == chunks &&
         chunks >= kLeastChunks && chunks <= kMostChunks && chunks != 3;
}

template <int D>
int64_t whole_backward_scratch(const stdit_attention& call) {
  return int64_t{blocks_of(call)} * D * 4;
}

template <int D>
void whole_backward(const stdit_attention& call, const stdit_attention_gradients& g, cudaStream_t stream) {
  using W = Whole<D>;
  if constexpr (W::kFits) {
    const int blocks = blocks_of(call);
    WholeArguments a{};
    const auto maps = [&](const stdit_heads& array, int64_t rows) {
      return make_tile_maps<D>(array_of(array), call.sequences, rows, call.heads, 64);
    };
    a.q = maps(call.q, call.queries);
    a.k = maps(call.k, call.keys);
    a.v = maps(call.v, call.keys);
    a.d_o = maps(g.d_o, call.queries);
    a.raw_q = array_of(call.q);
    a.o = array_of(call.o);
    a.d_q = array_of(g.d_q);
    a.d_k = array_of(g.d_k);
    a.d_v = array_of(g.d_v);
    a.norm = norm_of(call);
    a.score_factor = a.norm.score_factor();
    a.lse = call.lse;
    a.weight_partials = g.d_weights == nullptr ? nullptr : static_cast<float*>(g.scratch);
    a.heads = call.heads;
    a.items = static_cast<int>(call.sequences * call.heads);
    a.queries = static_cast<int>(call.queries);
    a.keys = static_cast<int>(call.keys);
    a.chunks = chunks_of(call.keys);
    const auto kernel = attention_whole_kernel<W>;
    STDIT_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, W::kSharedBytes));
    kernel<<<blocks, W::kThreads, W::kSharedBytes, stream>>>(a);
    check_launch("attention_whole_kernel");
    sum_weights<D>(a.weight_partials, blocks, a.norm, g.d_weights, stream);
  }
}

template bool whole_backward_serves<STDIT_HEAD_DIM>(const stdit_attention&);
template int64_t whole_backward_scratch<STDIT_HEAD_DIM>(const stdit_attention&);
template void whole_backward<STDIT_HEAD_DIM>(const stdit_attention&, const stdit_attention_gradients&, cudaStream_t);

}  // namespace stdit
