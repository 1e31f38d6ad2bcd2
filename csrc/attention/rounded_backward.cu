// Attention's backward pass over long sequences of heads whose products leave columns (kRoundsLongKeys): gradients of
// q, k, v and of the norms' weights, repeating bit for bit. Other heads: long_backward.cu.
// Here is what consumers do; long_gradients.h has the rest of both files' kernels.
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

#include "attention/long_gradients.h"

namespace stdit {
namespace {

template <int Count>
__device__ __forceinline__ void scale_all(float (&values)[Count], float factor) {
#pragma unroll
  for (int i = 0; i < Count; ++i) values[i] *= factor;
}

}  // namespace

template <class G>
__device__ __forceinline__ void consume(const QueryArguments<G::D>& a, typename G::Shared& s, int consumer) {
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
      if (a.norm.left_scale != 1.0f) scale_all(p, a.norm.left_scale);
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) dp[i] = (dp[i] - rows[i / 2 % 2].y) * exp2_approx(p[i]);
    };
    const auto mask_end = [&] { mask_keys<kKeys>(dp, (tiles - 1) * kKeys, a.keys); };  // of the last tile

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
      pack_all(ds16, dp);
    };

    wgmma_wait<0>();
    clear(d_q);  // not before: the compiler would have products wait for each other
    differentiate();
    if (tiles == 1) mask_end();
    pack_all(ds16, dp);
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
    write_query_gradient<D, true>(d_q, raw, out, a.norm, s.weights, sums_weights, weight_sums);
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
__device__ __forceinline__ void consume(const KeyArguments<G::D>& a, typename G::Shared& s, int consumer) {
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
    multiply_columns<kQueries, D, true>(p, ImageColumns<D>(s.k[unit][consumer][0]), ImageColumns<D>(s.q[stage]));
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
      if (a.norm.left_scale != 1.0f) scale_all(p, a.norm.left_scale);
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
    keys.read_image(s.k[kv.stage][consumer][0] + 2 * warp * Image<D>::kGroupBytes, Image<D>::kGroupBytes);
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

namespace {

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
