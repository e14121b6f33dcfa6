// Backward for Hopper, head dimensions over 128, of calls without dropout and extra terms. As in wide_backward.cuh dK
// and dV have each a worker to itself, here a CTA of 128 keys instead of a warpgroup of 64: the first CTA of a pair
// computes S, P, dV and dQ, the second dP, dS and dK, and either's two warpgroups divide the keys. P goes from the
// first to the second through its shared memory, dS back. So dQ is summed over 128 keys before it leaves, and the
// float32 additions to global memory, which bind where 64 keys leave at a time, are half as many.
#pragma once

#include <cuda_runtime.h>

#include "sm90/backward_launch.cuh"
#include "sm90/paired_backward_producers.cuh"
#include "sm90/role_warpgroup.cuh"

namespace hf_flash::sm90 {

// The steps that are a warpgroup's own in a pair of CTAs. ROLE: its CTA's.
template <class Traits, Role ROLE>
struct PairedWarpgroup : RoleWarpgroup<Traits, ROLE> {
  using Base = RoleWarpgroup<Traits, ROLE>;
  using Base::first_key, Base::operand, Base::p, Base::scores, Base::shared, Base::warpgroup;
  using Base::kNextPlace, Base::kOwnsDv, Base::kQueries;
  using typename Base::T;
  static constexpr int kOther = kOwnsDv ? 1 : 0;  // the other CTA's number

  const float factor;  // scores count as s * factor in log2 units

  __device__ PairedWarpgroup(const AttentionParams& p, const BackwardShared<Traits>& shared, float factor,
                             int warpgroup)
      : Base(p, shared, warpgroup), factor(factor) {}

  // The warpgroups take turns at the tensor cores until dV of their step is done: so they stay half a round apart.
  __device__ __forceinline__ void wait_for_turn() const { named_barrier_wait(1 + warpgroup, 2 * kWarpgroupThreads); }
  __device__ __forceinline__ void pass_turn() const { named_barrier_arrive(2 - warpgroup, 2 * kWarpgroupThreads); }

  // S of a step, complete, becomes P: the operand, and what the other CTA waits for. start: of the product that runs
  // meanwhile, behind which reads of shared memory would wait. Returns whether the step is the last one of its piece of
  // work.
  template <class F>
  __device__ __forceinline__ bool exponentiate(uint32_t step, F start) {
    shared.steps.wait_full(step);
    const BackwardStep& at = shared.step(step);
    if (at.boundary[warpgroup]) {
      const BackwardPlan& plan = shared.plan(at.plan);
      hide_invisible<true>(scores, p, plan.sequence, at.i0, first_key(plan), plan.seen_from(first_key(plan)));
    }
    const bool last = at.last;
    const float* lse = shared.row_values(step) + lane_col();
    float2 row_lse[kQueries / 8];
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n) row_lse[n] = load_shared_float2(shared_address(lse + 8 * n));
    shared.probabilities.wait_empty(step);
    __syncwarp();
    shared.steps.release(step);
    start();
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& x = scores.x[0][n][e];
        x = exp2_fast(x * factor - (e % 2 ? row_lse[n].y : row_lse[n].x));
      }
    }
    to_operand<T>(operand, scores, 0);
    const uint32_t place = shared_address_of(this->probability_place(step), kOther);
    const uint32_t full = shared_address_of(shared.probabilities.full(step), kOther);
#pragma unroll
    for (int k = 0; k < kQueries / 16; ++k) {
      const uint32_t (&x)[4] = operand.x[0][k];
      store_remote_16_bytes(place + k * kNextPlace, uint4{x[0], x[1], x[2], x[3]}, full);
    }
    if (threadIdx.x % kWarpThreads == 0)
      mbarrier_arrive_expect_bytes_remote(full, BackwardShared<Traits>::kWarpsProbabilities);
    return last;
  }

  // dP of a step, complete, becomes dS: the operand, and what a producer warp hands to the other CTA. Returns as
  // exponentiate().
  __device__ __forceinline__ bool differentiate(uint32_t step) {
    shared.steps.wait_full(step);
    const BackwardStep& at = shared.step(step);
    const bool last = at.last;
    this->differentiate_scores(step);
    arrive_as_warp_at(shared.probabilities.empty(step), kOther);
    if (last) shared.keys.release(at.plan);
    shared.steps.release(step);
    this->lay_out_ds(step);
    shared.laid_out.release_full(step);
    return last;
  }
  // The product of a step's scores has ended.
  __device__ __forceinline__ bool finish_scores(uint32_t step) {
    wgmma_settle(scores);
    shared.factors.release(step);
    if constexpr (kOwnsDv) {
      return exponentiate(step, [] {});
    } else {
      return differentiate(step);
    }
  }

  __device__ __forceinline__ void store(const BackwardPlan& plan) {
    Base::store(plan, kOwnsDv ? 1.0f : static_cast<float>(p.scale));
  }
};

// The steps of a piece of work. A round of the first CTA: dV of the current step and a slice of dQ of the step before;
// S of the next step; the other slice, beside its exponentials. The first slice leaves before S starts, the second when
// nothing is under way: what a warp asks of shared memory waits behind its own products. The tensor cores have the
// other warpgroup's, which is half a round behind. A round of the second CTA: dK of the current step beside dP of the
// next. Slices of a step before the first multiply what lies in memory, and nobody looks at them: a branch around a
// product would make ptxas run all of them one after the other.
template <Role ROLE, class Traits>
__device__ __forceinline__ void consume_pair(const AttentionParams& p, const BackwardShared<Traits>& shared,
                                             int warpgroup) {
  constexpr bool kOwnsDv = ROLE == Role::kDv;
  PairedWarpgroup<Traits, ROLE> state(p, shared, static_cast<float>(p.scale) * kLog2E, warpgroup);
  uint32_t step = 0;                                 // place in the rings
  if (kOwnsDv && warpgroup == 1) state.pass_turn();  // the first turn is the first warpgroup's
  for (;; ++step) {
    shared.steps.wait_full(step);
    const int n = shared.step(step).plan;
    if (n < 0) break;
    const uint32_t first = step;
    shared.keys.wait_full(n);
    shared.factors.wait_full(step);
    state.start_scores(step);
    wgmma_wait<0>();
    bool last = state.finish_scores(step);
    for (; !last; ++step) {
      shared.summands.wait_full(step);
      if constexpr (kOwnsDv) {
        if (step != first) shared.ds.wait_full(step - 1);
        state.wait_for_turn();
        state.start_sum(step);
        state.template start_dq<0>(step - 1);
        wgmma_wait<1>();  // now the operand's registers are free for the next step's
        wgmma_settle(state.sum);
        state.pass_turn();
        shared.summands.release(step);
        wgmma_wait<0>();
        wgmma_settle(state.dq0);
        if (step != first) state.template hand_over_dq<0>(step - 1);
        shared.factors.wait_full(step + 1);
        state.start_scores(step + 1);
        wgmma_wait<0>();
        wgmma_settle(state.scores);
        shared.factors.release(step + 1);
        last = state.exponentiate(step + 1, [&] { state.template start_dq<1>(step - 1); });
        wgmma_wait<0>();
        wgmma_settle(state.dq1);
        if (step == first) continue;
        shared.release_ds(step - 1);
        state.template hand_over_dq<1>(step - 1);
      } else {
        state.start_sum(step);
        shared.factors.wait_full(step + 1);
        state.start_scores(step + 1);
        wgmma_wait<1>();
        wgmma_settle(state.sum);
        shared.summands.release(step);
        wgmma_wait<0>();
        last = state.finish_scores(step + 1);
      }
    }
    shared.summands.wait_full(step);
    state.start_sum(step);
    wgmma_wait<0>();
    wgmma_settle(state.sum);
    shared.summands.release(step);
    if constexpr (kOwnsDv) {
      if (step != first) state.finish_dq(step - 1);
      state.finish_dq(step);
      shared.keys.release(n);
    }
    state.store(shared.plan(n));  // which stays until the keys of the next one but one are released
  }
  // That the stream has ended.
  if constexpr (kOwnsDv) {
    state.end_dq(step);
  } else {
    shared.ds.wait_empty(step);
    shared.laid_out.release_full(step);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    paired_backward_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ BackwardMaps maps,
                           const __grid_constant__ SlicedDqAccumulator accumulator,
                           const __grid_constant__ PersistentSchedule schedule,
                           const __grid_constant__ BackwardGrid grid) {
  extern __shared__ __align__(1024) char shared_memory[];
  const BackwardShared<Traits> shared(shared_memory);
  const int warpgroup = uniform(threadIdx.x / kWarpgroupThreads);
  const bool owns_dv = blockIdx.x % Traits::kTeam == 0;
  init_barriers(shared);
  cluster_barrier();
  if (warpgroup == Traits::kWarpgroups) {
    give_registers_back<Traits::kProducerRegisters>();
    const int warp = uniform(threadIdx.x / 32 % 4);
    switch (warp) {  // ifs would keep its number in a register
      case 0: copy_paired_tiles(p, maps, owns_dv, shared); break;
      case 1: make_plans(p, accumulator, schedule, grid, shared); break;
      case 2: copy_row_values(p, shared); break;
      default:
        if (owns_dv) {
          add_dq_slices(p, accumulator, grid, shared);
        } else {
          send_ds(shared);
        }
    }
  } else {
    take_registers<Traits::kConsumerRegisters>();
    if (owns_dv) {
      consume_pair<Role::kDv>(p, shared, warpgroup);
    } else {
      consume_pair<Role::kDk>(p, shared, warpgroup);
    }
  }
  cluster_barrier();  // the other may still write here
}

}  // namespace hf_flash::sm90
