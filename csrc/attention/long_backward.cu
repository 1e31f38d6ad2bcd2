// Attention's backward pass over long sequences of heads that rounded_backward.cu does not serve: gradients of q, k, v
// and of the norms' weights, repeating bit for bit.
// Here is what consumers do; long_gradients.h has the rest of both files' kernels.
//
// Two kernels, each of which keeps its sums in registers, so that no consumer warpgroup waits for another and nothing
// is summed in memory. That takes seven products where one kernel needs five (backward.cu), which costs less than the
// exchange of ds between warpgroups and the partial sums of dq did (docs/kernels.md).
//
// attention_dq_kernel: a block takes units of 64 queries a consumer, of one head, and walks over tiles of keys:
//   s = q k^T, dp = do v^T          both operands in shared memory
//   ds = 2^(s - lse) (dp - delta)   in registers
//   dq += ds k                      ds from registers
// attention_dkv_kernel: a block takes units of 64 keys a consumer, of one head, and walks over tiles of queries:
//   s^T = k q^T, dp^T = v do^T      both operands in shared memory
//   dv += p^T do, dk += ds^T q      p^T and ds^T from registers
// In both the next tile's scores are asked for before this tile's sums, as in the forward pass.
//
// What passes by many times lies in scratch memory as the tensor cores read it (row_image.h): k by a kernel before;
// normalised q, scaled as in the forward pass, and do by the dq kernel, for the dkv kernel, with lse and delta =
// rowsum(do * o). k is not normalised: a key's reciprocal root mean square scales its scores, as in the forward pass of
// so many keys (rounds_keys), and ds, where that is multiplied with k as it came.
//
// One thread of the first warpgroup has the copy engine bring all tiles; a unit's queries come while the one before is
// worked on, and are normalised by their consumers. Consumers ask for products in turns (turns.h).
//
// Tiles: 64 keys for three consumers, 80 queries for two, which is what their registers hold; of heads of 96 two
// consumers, which is what shared memory holds, and 64 queries.

#include "attention/long_gradients.h"

namespace stdit {

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
  turns.begin();
  for (QueryUnit<G> u(a); u.valid(a); u.next(a)) {
    const bool all = u.tiles(a) == G::kConsumers;  // where not, consumers ask as they come
    const int query0 = u.first_query + 64 * consumer;
    s.q_full[q.stage].wait(q.parity);
    s.o_full.wait(o.parity);
    if (query0 >= a.queries) {  // nothing to do but to let the others' tiles pass
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
    prepare_rows<G>(a, s, u, q.stage, 4 * consumer + warp);
    if (consumer == 0) clear_rest<G>(a, u, threadIdx.x % 128, 128);
    arrive_warp(s.o_empty);
    fence_async_shared();
    sync_threads(1 + G::kConsumers + consumer, 128);  // the named barriers before are for turns
    o.next();
    const float2* own = s.rows[q.stage] + 64 * consumer + 16 * warp + lane / 4;
    const float2 rows[2] = {own[0], own[8]};
    float p[kKeys / 2], dp[kKeys / 2], d_q[D / 2];
    uint32_t ds16[kKeys / 4];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) d_q[i] = 0.0f;

    const TileColumns<QueryTile> q_operand(s.q[q.stage][consumer]);
    const TileColumns<QueryTile> do_operand(s.d_o[q.stage][consumer]);
    const auto ask_scores = [&](const RingPlace<G::kStages>& place) {
      s.kv_full[place.stage].wait(place.parity);
      if (all) turns.take();
      wgmma_fence();
      multiply_columns<kKeys, D>(p, q_operand, ImageColumns<D>(s.k[place.stage]));
      multiply_columns<kKeys, D>(dp, do_operand, TileColumns<KeyTile>(s.v[place.stage]));
      wgmma_commit();
    };
    const auto ask_gradient = [&](int stage) {
      hold(ds16);
      wgmma_fence();
      add_rows<D, kKeys>(d_q, ds16, ImageRows<D>(s.k[stage]));
      wgmma_commit();
    };
    // dp becomes ds times the keys' factors, since the product that follows has k as it came.
    const auto differentiate = [&](int stage) {
      hold(p);
      hold(dp);
      const float2* factors = reinterpret_cast<const float2*>(s.factors[stage]) + lane % 4;  // two keys each
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        const float2 factor = factors[4 * j];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int i = 4 * j + 2 * h;
          dp[i] = (dp[i] - rows[h].y) * factor.x * exp2_approx(fmaf(p[i], factor.x, -rows[h].x));
          dp[i + 1] = (dp[i + 1] - rows[h].y) * factor.y * exp2_approx(fmaf(p[i + 1], factor.y, -rows[h].x));
        }
      }
    };
    const auto mask_end = [&] { mask_keys<kKeys>(dp, (tiles - 1) * kKeys, a.keys); };  // of the last tile

    // Asks for a tile's scores and the sums of the one before. The last tile's mask is kept out of the loop.
    const auto next_tile = [&](bool last) {
      const int before = kv.stage;
      kv.next();
      ask_scores(kv);
      ask_gradient(before);
      if (all) turns.pass();
      wgmma_wait<1>();
      differentiate(kv.stage);
      if (last) mask_end();
      wgmma_wait<0>();
      hold(d_q);
      arrive_warp(s.kv_empty[before]);
      pack_all(ds16, dp);
    };

    ask_scores(kv);
    if (all) turns.pass();
    wgmma_wait<0>();
    differentiate(kv.stage);
    if (tiles == 1) mask_end();
    pack_all(ds16, dp);
    for (int tile = 1; tile < tiles - 1; ++tile) next_tile(false);
    if (tiles > 1) next_tile(true);
    if (all) turns.take();
    ask_gradient(kv.stage);
    if (all) turns.pass();
    arrive_warp(s.q_empty[q.stage]);
    q.next();
    const int query = query0 + 16 * warp + lane / 4;
    RawRows<D> raw;
    raw.read(RowPair(a.raw_q, u.sequence, u.head, query, a.queries));
    wgmma_wait<0>();
    hold(d_q);
    arrive_warp(s.kv_empty[kv.stage]);
    kv.next();
    // Without weights the keys' factors hold the scale.
    const RowPair out(a.d_q, u.sequence, u.head, query, a.queries);
    write_query_gradient<D, true>(d_q, raw, out, a.norm, s.weights, sums_weights, weight_sums);
  }
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
  turns.begin();
  for (KeyUnit<G> u(a); u.valid(a); u.next(a)) {
    const bool all = u.tiles(a) == G::kConsumers;  // where not, consumers ask as they come
    s.kv_full[kv.stage].wait(kv.parity);
    if (u.first_key + 64 * consumer >= a.keys) {  // nothing to do but to let the other's tiles pass
      for (int tile = 0; tile < a.query_tiles; ++tile) {
        s.q_full[q.stage].wait(q.parity);
        arrive_warp(s.q_empty[q.stage]);
        q.next();
      }
      arrive_warp(s.kv_empty[kv.stage]);
      kv.next();
      continue;
    }
    const int own = 64 * consumer + 16 * warp + lane / 4;  // this thread's key, and eight more
    const float* factors = a.key_factors + static_cast<int64_t>(u.item) * a.key_length + u.first_key + own;
    const float factor[2] = {__ldg(factors), __ldg(factors + 8)};
    float d_k[D / 2], d_v[D / 2], p[kQueries / 2], dp[kQueries / 2];
    uint32_t p16[kQueries / 4], ds16[kQueries / 4];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) d_k[i] = d_v[i] = 0.0f;
    const ImageColumns<D> k_operand(s.k[kv.stage][consumer][0]);
    const TileColumns<KeyTile> v_operand(s.v[kv.stage][consumer]);
    const auto ask_scores = [&](const RingPlace<G::kStages>& place) {
      s.q_full[place.stage].wait(place.parity);
      if (all) turns.take();
      wgmma_fence();
      multiply_columns<kQueries, D>(p, k_operand, ImageColumns<D>(s.q[place.stage]));
      multiply_columns<kQueries, D>(dp, v_operand, ImageColumns<D>(s.d_o[place.stage]));
      wgmma_commit();
    };
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
    const auto differentiate = [&](int stage) {
      hold(p);
      hold(dp);
      const float4* rows = reinterpret_cast<const float4*>(s.rows[stage]) + lane % 4;  // two queries each
#pragma unroll
      for (int i = 0; i < kQueries / 2; i += 2) {
        const float4 row = rows[i / 4 * 4];
        p[i] = exp2_approx(fmaf(p[i], factor[i / 2 % 2], -row.x));
        p[i + 1] = exp2_approx(fmaf(p[i + 1], factor[i / 2 % 2], -row.z));
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

    ask_scores(q);
    if (all) turns.pass();
    wgmma_wait<0>();
    differentiate(q.stage);
    pack_both();
    for (int tile = 1; tile < a.query_tiles; ++tile) {
      const int before = q.stage;
      q.next();
      ask_scores(q);
      ask_gradients(before);
      if (all) turns.pass();
      wgmma_wait<2>();
      differentiate(q.stage);
      wgmma_wait<0>();
      hold(d_v);
      hold(d_k);
      arrive_warp(s.q_empty[before]);  // every warp, when its lanes have read their rows
      pack_both();
    }
    if (all) turns.take();
    ask_gradients(q.stage);
    if (all) turns.pass();
    RawRows<D> raw;
    const int key = u.first_key + own;
    raw.read_image(s.k[kv.stage][consumer][2 * warp], Image<D>::kGroupBytes);
    arrive_warp(s.kv_empty[kv.stage]);
    kv.next();
    wgmma_wait<1>();
    hold(d_v);
    write_rows<D, true>(d_v, RowPair(a.d_v, u.sequence, u.head, key, a.keys));
    wgmma_wait<0>();
    hold(d_k);
    arrive_warp(s.q_empty[q.stage]);
    q.next();
    // Where q is scaled, it is in units of log2.
    const float scale = a.norm.folds() ? kLn2 : a.norm.scale;
    through_norm<D>(d_k, raw, a.norm.normalise_k, a.norm.epsilon, nullptr, scale, false, nullptr);
    write_rows<D, true>(d_k, RowPair(a.d_k, u.sequence, u.head, key, a.keys));
  }
  turns.end();
}

namespace {

template <int D>
using Queries = QueryGradient<D, D <= 80 ? 3 : 2, 64, 3>;
template <int D>
using Keys = KeyGradient<D, D <= 80 ? 80 : 64, 4>;

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
