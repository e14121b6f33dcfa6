// The producer warps of a pair of CTAs (paired_backward.cuh): one copies tiles; in the second CTA one hands dS to the
// first. Those that plan and that bring row values are backward_producers.cuh's; the one that adds dQ and the loading
// of a tile are wide_backward_producers.cuh's.
#pragma once

#include "sm90/paired_backward_layout.cuh"
#include "sm90/wide_backward_producers.cuh"

namespace hf_flash::sm90 {

// For each plan K and of each step Q and dO; in the second CTA V, dO and Q.
template <class Traits>
__device__ __forceinline__ void copy_paired_tiles(const AttentionParams& p, const BackwardMaps& maps, bool owns_dv,
                                                  const BackwardShared<Traits>& shared) {
  TileCopier<Traits> copier{p, shared};
  const Role role = owns_dv ? Role::kDv : Role::kDk;
  uint32_t step = 0;
  for (uint32_t n = 0;; ++n) {
    shared.planned.wait_full(n);
    const BackwardPlan& plan = shared.plan(n);
    if (plan.j0 < 0) return;
    bool has_keys = false;
    for (typename Traits::Walk walk(plan); walk.exists(); walk.next(), ++step) {
      const int head = uniform(walk.head), i0 = uniform(walk.i0);
      const auto load_queries = [&](uint32_t tile, bool dout, uint32_t full) {
        copier.load_queries(plan, head, i0, tile, dout ? maps.dout : maps.q, dout ? p.dout : p.q, full);
      };
      shared.steps.wait_empty(step);
      if (copier.leader) mbarrier_arrive(shared.steps.full(step));
      shared.factors.wait_empty(step);
      load_queries(shared.factor_tile(role, step), !owns_dv, shared.factors.full(step));
      if (!has_keys) {
        shared.keys.wait_empty(n);
        copier.load_keys(plan, shared.key_tile(role), owns_dv ? maps.k : maps.v, owns_dv ? p.k : p.v,
                         shared.keys.full(n));
        has_keys = true;
      }
      shared.summands.wait_empty(step);
      load_queries(shared.summand_tile(role, step), owns_dv, shared.summands.full(step));
    }
  }
}

// dS of each step, as the warps of the second CTA have laid it out, to the same place of the first one, which is free:
// they have waited for that.
template <class Traits>
__device__ __forceinline__ void send_ds(const BackwardShared<Traits>& shared) {
  if (!elect_one()) return;
  for (uint32_t step = 0;; ++step) {
    shared.laid_out.wait_full(step);
    if (shared.step(step).plan < 0) return;
    const uint32_t tile = shared.ds_tile(step), full = shared_address_of(shared.ds.full(step), 0);
    constexpr int kBytes = Traits::ScoreColumns::kBytes;
    mbarrier_arrive_expect_bytes_remote(full, kBytes);
    bulk_copy_remote(shared_address_of(tile, 0), tile, kBytes, full);
  }
}

}  // namespace hf_flash::sm90
