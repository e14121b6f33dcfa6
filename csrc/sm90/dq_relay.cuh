// The producers' side of dQ where the key tiles of a head are a cluster's: its float32 sums go from one CTA's shared
// memory to the next one's and never see global memory. In each step every CTA is at another query tile; the tile moves
// on with what has been added, and the CTA that it reaches last writes dq. So the order of the additions is fixed.
#pragma once

#include "instructions/cluster.cuh"
#include "sm90/backward_producers.cuh"

namespace hf_flash::sm90 {

// Where the sums of dQ go from CTA to CTA: gives each step the place for them and tells the CTA that they come from.
// The consumers have seen a step's word before they give back the place that the step before had.
template <class Traits>
__device__ __forceinline__ void relay_dq(const AttentionParams& p, const BackwardShared<Traits>& shared) {
  if (!elect_one()) return;
  shared.dq.wait_full(0);      // for the first step's word; its ring could be twice round before this warp looks
  int before = 0, stored = 0;  // the piece of work of the step before; those whose dK and dV are stored
  for (uint32_t step = 0;; ++step) {
    const BackwardStep& at = shared.step(step);
#pragma unroll 1
    for (int w = 0; w < 2; ++w) {
      shared.sums(w).wait_empty(step);
      if (at.plan < 0) return;
      const BackwardPlan& plan = shared.plan(at.plan);
      if (w == 0 && at.route.finishes()) aim_at_dq<Traits>(p, plan, at.head, at.i0, shared.dq_target(step));
      if (at.route.adds()) {
        mbarrier_arrive_expect_bytes(shared.sums(w).full(step), Traits::kDqBytes / 2);
        const int cta = (plan.turn > 0 ? plan.turn : plan.turns) - 1;
        mbarrier_arrive_remote(shared_address_of(shared.has_place(w, plan.turn == 0), cta));
      } else {
        mbarrier_arrive(shared.sums(w).full(step));
      }
    }
    for (; stored < before; ++stored) mbarrier_arrive(shared.planned.empty(stored));
    before = at.plan;
    if (at.next < 0) return;
  }
}

}  // namespace hf_flash::sm90
