// The consumers of the backward with query tiles of 80, for head dimension 128: what a tile of 64 leaves of shared
// memory's bandwidth and of the registers. The steps are the paper's, one after the other: the warpgroups lay out dS,
// meet, and compute dQ at once, so that K needs one place; S and dP of the next step start when dK has ended. No
// product can have 80 rows, so it is dQ^T = K^T dS^T, and dQ is summed transposed.
#pragma once

#include "sm90/backward_warpgroup.cuh"

namespace hf_flash::sm90 {

template <class Traits>
struct TallWarpgroup : BackwardWarpgroup<Traits> {
  using Base = BackwardWarpgroup<Traits>;
  using typename Base::KeyTile;
  using typename Base::QueryTile;
  using typename Base::T;
  using ScoreTile = typename Traits::ScoreTile;
  using Base::Base, Base::kQueries;
  using Base::dk, Base::dq, Base::ds, Base::dv, Base::probabilities, Base::shared, Base::warpgroup;

  __device__ __forceinline__ void start_dv(uint32_t step) {
    wgmma_fence();
    start_multiply<T, QueryTile>(dv, probabilities, this->dout_of(step));
    wgmma_commit();
  }
  __device__ __forceinline__ void start_dk(uint32_t step) {
    wgmma_fence();
    start_multiply<T, QueryTile>(dk, ds, this->q_of(step));
    wgmma_commit();
  }
  // This warpgroup's 64 columns of dQ as rows.
  __device__ __forceinline__ void start_dq(uint32_t step) {
    const uint32_t b = this->ds_of(step);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Traits::kKeys / 16; ++k)
      wgmma_ss<T, kQueries, 1, 0>(wgmma_registers(dq), this->k_columns + KeyTile::down(k), b + ScoreTile::across(k),
                                  k > 0);
    wgmma_commit();
  }

  // dS, queries as rows, to shared memory, until both warpgroups have.
  __device__ __forceinline__ void share_ds(uint32_t step) const {
    shared.ds.wait_empty(step);
    this->lay_out_ds_by_query(shared.ds_tile(step) + this->ds_lane);
    fence_async_proxy();
    named_barrier_wait(1, 2 * kWarpgroupThreads);
  }

  // dQ^T of a step, laid out as the accumulator has it, for a warp of the producers to add: the first half where dS
  // was, once the other warpgroup has read that too.
  __device__ __forceinline__ void lay_out_dq(uint32_t step) const {
    using Sums = typename Traits::DqSums;
    const int lane = opaque(threadIdx.x % 32);  // found anew each time: kept, it would cost a register all along
    constexpr int kColumns = Traits::kHeadDim, kUnits = kQueries / 8;
    const uint32_t to =
        shared.ds_tile(step) + 4 * Sums::transposed_element(kColumns, 0, 4 * warpgroup + this->warp, lane, 0);
    const auto lay_out = [&](int first, uint32_t apart) {
#pragma unroll
      for (int n = 0; n < kUnits / 2; ++n) {
        const float (&x)[4] = dq.x[0][first + n];
        store_shared_16_bytes(
            to + apart + 4 * Sums::transposed_element(kColumns, n, 0, 0, 0),
            uint4{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])});
      }
    };
    named_barrier_arrive(3 - warpgroup, 2 * kWarpgroupThreads);
    lay_out(kUnits / 2, Traits::kDq - Traits::kDs);
    named_barrier_wait(2 + warpgroup, 2 * kWarpgroupThreads);
    lay_out(0, 0);
  }
};

// Each round ends with nothing under way and P and dS of the next step in registers: ptxas keeps products apart from
// what it sees cross a round's end. dK comes after dQ, which leaves while it runs.
template <class Traits>
__device__ __forceinline__ void consume_tall(const AttentionParams& p, const BackwardMaps& maps,
                                             const BackwardShared<Traits>& shared, int warpgroup) {
  TallWarpgroup<Traits> state(p, maps, shared, warpgroup);
  uint32_t step = 0;  // place in the rings
  shared.steps.wait_full(step);
  int n = uniform(shared.step(step).plan), n_next = uniform(shared.step(step).next);  // pieces of work
  if (n < 0) return;
  state.begin(n, step);

  const auto round = [&](uint32_t step) {
    state.start_dv(step);
    state.share_ds(step);
    state.start_dq(step);
    wgmma_wait<1>();
    wgmma_settle(state.dv);
    state.start_dk(step);
    shared.steps.wait_full(step + 1);
    const BackwardStep& next = shared.step(step + 1);
    const bool moves = n_next != n, boundary = next.boundary[warpgroup];
    const int after = next.next;
    wgmma_wait<1>();
    wgmma_settle(state.dq);
    if (moves) shared.k.release(n);
    state.lay_out_dq(step);
    wgmma_wait<0>();
    wgmma_settle(state.dk);
    shared.steps.release(step);
    if (moves) {  // while the next K comes
      state.store(shared.plan(n));
      shared.k.wait_full(n_next);
    }
    state.start_scores(state.k_rows, step + 1);
    if (moves) shared.v.wait_full(n_next);
    state.start_dp(step + 1);
    const int n_after = uniform(after);
    shared.dq.release(step);  // no earlier: the stores hold it up
    state.differentiate(n_next, step + 1, boundary);
    n = n_next;
    n_next = n_after;
  };
  // Two at a time: so ptxas knows each round's places in the rings.
  for (;; step += 2) {
    if (n_next < 0) break;
    round(step);
    if (n_next < 0) {
      ++step;
      break;
    }
    round(step + 1);
  }

  state.start_dv(step);
  state.start_dk(step);
  state.share_ds(step);
  wgmma_wait<0>();
  wgmma_settle(state.dv);
  wgmma_settle(state.dk);
  shared.dq.wait_full(step);  // then the other CTA's sums are there
  state.template store<true>(shared.plan(n));
  state.start_dq(step);
  wgmma_wait<0>();
  wgmma_settle(state.dq);
  state.lay_out_dq(step);
  shared.dq.release(step);
}

}  // namespace hf_flash::sm90
