// What one consumer warpgroup of the backward for head dimensions up to 128 holds in registers, and the steps of the
// algorithm on it.
#pragma once

#include "instructions/cluster.cuh"
#include "instructions/warpgroup.cuh"
#include "sm90/backward_layout.cuh"
#include "sm90/divided_sums.cuh"
#include "sm90/gradient_terms.cuh"
#include "tile/store.cuh"

namespace hf_flash::sm90 {

template <class Traits>
struct BackwardWarpgroup {
  using T = typename Traits::T;
  using KeyTile = typename Traits::KeyTile;
  using QueryTile = typename Traits::QueryTile;
  using Shared = BackwardShared<Traits>;
  static constexpr int kQueries = Traits::kQueries, kHeadDim = Traits::kHeadDim, kDqColumns = Traits::kDqColumns;
  // Of K for dQ: do the warpgroups take different columns, and how far apart do these lie?
  static constexpr bool kDqAcross = Traits::kTall || Traits::kSplitColumns;
  static constexpr int kColumnsEach = Traits::kTall ? 64 : kDqColumns;
  static constexpr int kColumnBytes =
      kColumnsEach % 64 == 0 ? kColumnsEach / 64 * KeyTile::kBlockBytes : 2 * kColumnsEach;

  const AttentionParams& p;
  const BackwardShared<Traits>& shared;
  const GradientTerms<Traits> terms;
  const int warpgroup, warp;  // warp of the warpgroup
  uint32_t ds_lane = 0;       // this lane's place in a tile of dS
  Accumulator<16, kQueries> s, dp;
  Accumulator<16, kHeadDim> dk, dv;
  Accumulator<16, kDqColumns> dq;
  OperandA<16, kQueries> probabilities, ds;

  // Descriptors of the first place of each ring, in uniform registers from here on: found where a product starts, they
  // would wait behind the products before it.
  const uint32_t k_rows, k_columns, v_rows, q_tiles, dout_tiles, ds_tiles;

  __device__ BackwardWarpgroup(const AttentionParams& p, const BackwardMaps& maps, const BackwardShared<Traits>& shared,
                               int warpgroup)
      : p(p),
        shared(shared),
        terms{p, shared, maps.terms},
        warpgroup(warpgroup),
        warp(uniform(threadIdx.x / 32 % 4)),
        k_rows(KeyTile::descriptor(shared.k_tile(0) + warpgroup * 64 * 128)),
        k_columns(KeyTile::descriptor(shared.k_tile(0) + (kDqAcross ? warpgroup * kColumnBytes : 0))),
        v_rows(KeyTile::descriptor(shared.v_tile() + warpgroup * 64 * 128)),
        q_tiles(QueryTile::descriptor(shared.q_tile(0))),
        dout_tiles(QueryTile::descriptor(shared.dout_tile(0))),
        ds_tiles(ds_descriptor()) {
    dk.clear();
    dv.clear();
    const int lane = threadIdx.x % 32;
    ds_lane = Traits::kTall ? GradientTerms<Traits>::place(0)
                            : Traits::ScoreColumns::offset(64 * warpgroup + 16 * warp + lane % 16, lane / 16);
  }
  template <class Tile>
  __device__ static __forceinline__ uint32_t at(uint32_t first, uint32_t stage) {
    return first + stage * (Tile::kBytes / 16);
  }

  // Turns at the tensor cores.
  __device__ __forceinline__ void wait_for_turn() const { named_barrier_wait(1 + warpgroup, 2 * kWarpgroupThreads); }
  __device__ __forceinline__ void pass_turn() const { named_barrier_arrive(2 - warpgroup, 2 * kWarpgroupThreads); }

  // n: place of the piece of work; step: place of the step. V has one place alone.
  __device__ __forceinline__ uint32_t keys_of(uint32_t n) const { return at<KeyTile>(k_rows, Shared::Keys::stage(n)); }
  __device__ __forceinline__ uint32_t q_of(uint32_t step) const {
    return at<QueryTile>(q_tiles, Shared::Pair::stage(step));
  }
  __device__ __forceinline__ uint32_t dout_of(uint32_t step) const {
    return at<QueryTile>(dout_tiles, Shared::Pair::stage(step));
  }
  __device__ __forceinline__ uint32_t ds_of(uint32_t step) const {
    return ds_tiles + Shared::Scores::stage(step) * (Traits::kScoreBytes / 16);
  }
  // keys: of the piece of work.
  __device__ __forceinline__ void start_scores(uint32_t keys, uint32_t step) {
    const uint32_t q = q_of(step);
    wgmma_fence();
    start_multiply_by_transpose<T, kHeadDim, KeyTile, QueryTile>(s, keys, q);
    wgmma_commit();
  }
  __device__ __forceinline__ void start_dp(uint32_t step) {
    const uint32_t dout = dout_of(step);
    wgmma_fence();
    start_multiply_by_transpose<T, kHeadDim, KeyTile, QueryTile>(dp, v_rows, dout);
    wgmma_commit();
  }
  __device__ __forceinline__ void start_dk_dv(uint32_t step) {
    wgmma_fence();
    start_multiply<T, QueryTile>(dv, probabilities, dout_of(step));
    start_multiply<T, QueryTile>(dk, ds, q_of(step));
    wgmma_commit();
  }
  // dQ = dS K (+ dQ).
  __device__ __forceinline__ void start_dq(uint32_t n, uint32_t step, bool accumulate = false) {
    using ByQuery = typename Traits::ScoreTile;
    using ByKey = typename Traits::ScoreColumns;
    const uint32_t a = ds_of(step), b = at<KeyTile>(k_columns, Shared::Keys::stage(n));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Traits::kKeys / 16; ++k)
      wgmma_ss<T, kDqColumns, !Traits::kExtras, 1>(wgmma_registers(dq),
                                                   a + (Traits::kExtras ? ByQuery::across(k) : ByKey::down(k)),
                                                   b + KeyTile::down(k), accumulate || k > 0);
    wgmma_commit();
  }

  __device__ __forceinline__ uint32_t ds_place(uint32_t step) const {
    return GradientTerms<Traits>::place(shared.ds_tile(step));
  }
  __device__ __forceinline__ int first_key(const BackwardPlan& plan) const {
    return plan.j0 + 64 * warpgroup + 16 * warp;  // of this warp
  }

  // S and dP of a step, both under way and S first, become P and dS. n: its piece of work's place.
  __device__ __forceinline__ void differentiate(uint32_t n, uint32_t step, bool boundary) {
    const BackwardStep& at = shared.step(step);
    const BackwardPlan& plan = shared.plan(n);
    const typename Traits::Gradient gradient(p, plan.sequence, plan.batch(), at.head);
    const float* lse = shared.row_values(step) + lane_col();
    wgmma_wait<1>();
    wgmma_settle(s);
    if constexpr (Traits::kExtras) terms.apply(s, plan, at, step, ds_place(step), first_key(plan));
    if (boundary)
      hide_invisible<true, Traits::kMasked>(s, p, plan.sequence, at.i0, first_key(plan),
                                            plan.seen_from(first_key(plan)));
    // Not read where nobody asks: a load on its way holds up what follows.
    const int key0 = Traits::kDropout ? first_key(plan) : 0, i0 = Traits::kDropout ? at.i0 : 0;
    gradient.exponentiate(s, lse, terms.constants.factor, i0, key0);
    wgmma_wait<0>();
    wgmma_settle(dp);
    gradient.differentiate(s, dp, lse + kQueries);
    if constexpr (Traits::kExtras) terms.finish(dp, plan, at, ds_place(step), first_key(plan));
    if (at.last) shared.v.release(n);
    to_operand<T>(probabilities, s, 0);
    to_operand<T>(ds, dp, 0);
  }

  // The first of all steps.
  __device__ __forceinline__ void begin(uint32_t n, uint32_t step) {
    shared.k.wait_full(n);
    start_scores(keys_of(n), step);
    shared.v.wait_full(n);
    const bool boundary = shared.step(step).boundary[warpgroup];
    start_dp(step);
    differentiate(n, step, boundary);
  }

  // place: of this lane in the step's tile.
  __device__ __forceinline__ void lay_out_ds_by_query(uint32_t place) const {
#pragma unroll
    for (int k = 0; k < kQueries / 16; ++k)
      stmatrix_x4_transposed(place + GradientTerms<Traits>::from_first(k), ds.x[0][k]);
  }
  // dS to shared memory, where both warpgroups read it for dQ once publish_ds() says that it is there.
  __device__ __forceinline__ void lay_out_ds(uint32_t step) const {
    shared.ds.wait_empty(step);
    if constexpr (Traits::kExtras) {
      lay_out_ds_by_query(ds_place(step));
    } else {
      const uint32_t row = shared.ds_tile(step) + ds_lane;
#pragma unroll
      for (int k = 0; k < kQueries / 16; ++k)
        stmatrix_x4((row ^ (k % 4 * 32)) + k / 4 * Traits::ScoreColumns::kBlockBytes, ds.x[0][k]);
    }
  }
  __device__ __forceinline__ void publish_ds(uint32_t step) const {
    fence_async_proxy();
    shared.ds.release_full(step);
  }

  // This warpgroup's part of dQ: blocks of 16 rows with all columns, or half of the columns of each.
  __device__ __forceinline__ int dq_block() const { return Traits::kSplitColumns ? warp : 4 * warpgroup + warp; }
  __device__ __forceinline__ int dq_column_block() const {
    return Traits::kSplitColumns ? warpgroup * (kDqColumns / 8) : 0;
  }
  // This lane's part. It is found anew each time: kept, it would cost registers all along.
  __device__ __forceinline__ static int lane_of_dq() { return opaque(threadIdx.x % 32); }
  __device__ __forceinline__ int dq_element(int lane) const {
    return dq_block() * 16 * kHeadDim + DqAccumulator::element(dq_column_block(), lane, 0);
  }
  __device__ __forceinline__ uint32_t dq_place(int lane, uint32_t step = 0) const {
    return shared.dq_tile(step) + 4 * dq_element(lane);
  }
  __device__ __forceinline__ uint4 dq_bits(int n) const {
    const float (&x)[4] = dq.x[0][n];
    return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
  }

  // Where sums of dQ go from CTA to CTA: takes those that came for a step, to which its product is added. Returns
  // whether any came.
  __device__ __forceinline__ bool take_sums(uint32_t step) {
    const bool adds = shared.step(step).route.adds();
    wgmma_forget(dq);
    shared.sums(warpgroup).wait_full(step);
    if (adds) {
      const uint32_t place = dq_place(lane_of_dq());
#pragma unroll
      for (int n = 0; n < kDqColumns / 8; ++n) {
        const uint4 sum = load_shared_16_bytes(place + 4 * DqAccumulator::element(n, 0, 0));
        float (&x)[4] = dq.x[0][n];
        x[0] = __uint_as_float(sum.x);
        x[1] = __uint_as_float(sum.y);
        x[2] = __uint_as_float(sum.z);
        x[3] = __uint_as_float(sum.w);
      }
    }
    shared.sums(warpgroup).release(step);
    return adds;
  }
  // dQ of a step goes on to another CTA, or to its end.
  __device__ __forceinline__ void pass_dq_on(uint32_t step, const DqRoute& route) const {
    const int lane = lane_of_dq();
    const uint32_t own = dq_place(lane);
    if (route.finishes()) return write_dq(shared.dq_target(step), own, lane, false);
    const uint32_t place = shared_address_of(own, route.next());
    const uint32_t full = shared_address_of(shared.sums(warpgroup).full(0), route.next());
    mbarrier_wait(shared.has_place(warpgroup, route.next() == 0), route.odd());
#pragma unroll
    for (int n = 0; n < kDqColumns / 8; ++n)
      store_remote_16_bytes(place + 4 * DqAccumulator::element(n, 0, 0), dq_bits(n), full);
  }

  // dq of a step that finishes it: its own and, where they lie apart, at this lane's place, the others' sums, scaled
  // and rounded.
  __device__ __forceinline__ void write_dq(const DqTarget& target, uint32_t place, int lane, bool apart) const {
    const int t = lane % 4, block = dq_block(), column_block = dq_column_block();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * block + lane / 4 + 8 * r;
      const bool inside = row >= target.begin && row < target.end;
      T* const to = static_cast<T*>(target.rows) + row * target.row + 8 * t;
#pragma unroll
      for (int n = 0; n < kDqColumns / 8; n += 4) {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float2 sum{0, 0};
          if (apart) sum = load_shared_float2(place + 4 * DqAccumulator::element(n + i, 0, 2 * r));
          const float factor = target.factor, (&own)[4] = dq.x[0][n + i];
          x[i] = pack<T>((sum.x + own[2 * r]) * factor, (sum.y + own[2 * r + 1]) * factor);
        }
        transpose_quad(x, t);
        if (inside && 8 * (column_block + n + t) < p.head_dim)
          store_global_16_bytes(to + 8 * n + 8 * column_block, uint4{x[0], x[1], x[2], x[3]});
      }
    }
  }

  // To dQ what other CTAs have added up in global memory; from: this lane's place there. Rows beyond the sequence's
  // last unit of 64 get what lies there, the next head's or nobody's (DqAccumulator::bytes), and are not written.
  __device__ __forceinline__ void add_sums(const float* from) {
#pragma unroll
    for (int n = 0; n < kDqColumns / 8; ++n) {
      float x[4];
      load_relaxed(x, from + DqAccumulator::element(n, 0, 0));
#pragma unroll
      for (int e = 0; e < 4; ++e) dq.x[0][n][e] += x[e];
    }
  }

  // dq of a step: to its end, or laid out as the accumulator has it, for a warp of the producers to add once the place
  // is released.
  __device__ __forceinline__ void lay_out_dq(uint32_t step, bool finishes) {
    const int lane = lane_of_dq();
    const uint32_t place = dq_place(lane, step);
    // In a fixed order a CTA that hurries ahead waits all the longer for its turn, at a worse place: D 64 -3 to -5 %, D
    // 128 -5 to -8 %.
    if (!Traits::kDqOverDs || finishes || p.deterministic) shared.dq.wait_full(step);
    if (finishes) {
      const auto& target = shared.dq_target(step);
      if constexpr (Traits::kDqOverDs) {
        if (target.adds) add_sums(target.sums + dq_element(lane));
      }
      write_dq(target, place, lane, !Traits::kDqOverDs && target.adds);
    } else {
#pragma unroll
      for (int n = 0; n < kDqColumns / 8; ++n)
        store_shared_16_bytes(place + 4 * DqAccumulator::element(n, 0, 0), dq_bits(n));
    }
  }

  // dS of the first place, as an operand of dQ.
  __device__ __forceinline__ uint32_t ds_descriptor() const {
    using ByQuery = typename Traits::ScoreTile;
    using ByKey = typename Traits::ScoreColumns;
    constexpr int kQueries64 = Traits::kScoreTiles > 1 ? ByQuery::kBytes
                               : Traits::kExtras       ? 64 * 128
                                                       : ByKey::kBlockBytes;
    constexpr int kOwn = kDqAcross ? 0 : kQueries64;
    const uint32_t own = shared.ds_tile(0) + warpgroup * kOwn;
    return Traits::kExtras || Traits::kTall ? ByQuery::descriptor(own) : ByKey::descriptor(own);
  }

  // dK and dV of this warp's keys, rounded; both start again at zero. Of a piece of work that two CTAs share the sums
  // go to the other one instead, or its sums are added. LAST: of the CTA's pieces, the only one that takes, and none
  // gives.
  template <bool LAST = false>
  __device__ __forceinline__ void store(const BackwardPlan& plan) {
    if constexpr (!Traits::kRelays) {
      if (LAST && plan.takes()) DividedSums<Traits>{p, plan.place()}.take(dk, dv);
      if (!LAST && plan.gives()) {
        DividedSums<Traits>{p, plan.place()}.give(dk, dv);
        dk.clear();
        dv.clear();
        return;
      }
    }
    // opaque: found before the loop, it would hold a register all along.
    const float dropout_factor = Traits::kDropout ? 256.0f / opaque(p.dropout_keep) : 1.0f;
    const float dk_factor = terms.constants.scale * dropout_factor;
    dk.for_each([&](float& x, int, int) { x *= dk_factor; });
    if (Traits::kDropout) dv.for_each([&](float& x, int, int) { x *= dropout_factor; });
    const int key0 = first_key(plan), rows = plan.sequence.len_k - key0;
    const auto head_of = [&](const Rows& x) {
      return static_cast<T*>(x.data) + plan.batch() * x.batch + (plan.sequence.first_k + key0) * x.row +
             plan.kv_head * x.head;
    };
    store_fragment<T>(head_of(p.dk), p.dk.row, p.head_dim, dk, 0, rows);
    store_fragment<T>(head_of(p.dv), p.dv.row, p.head_dim_v, dv, 0, rows);
    dk.clear();
    dv.clear();
  }
};

}  // namespace hf_flash::sm90
