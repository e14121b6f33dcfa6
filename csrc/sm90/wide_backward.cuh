// Backward for Hopper, head dimensions over 128, of calls with dropout or extra terms (for others:
// paired_backward.cuh), in the manner of backward.cuh. dK and dV of 128 keys would not fit the registers, so a CTA owns
// 64 keys, and its two warpgroups do not divide them: one computes S, P and dV, the other dP, dS and dK. P goes from
// the first to the second through shared memory, dS to both, for dQ, of which each computes half of the columns one
// step late. So the warpgroups run half a step apart, and one's exponentials or stores hide behind the other's
// products.
#pragma once

#include <cuda_runtime.h>

#include "sm90/backward_launch.cuh"
#include "sm90/gradient_terms.cuh"
#include "sm90/paired_backward.cuh"
#include "sm90/role_warpgroup.cuh"
#include "sm90/wide_backward_producers.cuh"

namespace hf_flash::sm90 {

// The steps that are a warpgroup's own where it has a role to itself.
template <class Traits, Role ROLE>
struct WideWarpgroup : RoleWarpgroup<Traits, ROLE> {
  using Base = RoleWarpgroup<Traits, ROLE>;
  using Base::first_key, Base::operand, Base::p, Base::scores, Base::shared;
  using Base::kNextPlace, Base::kOwnsDv, Base::kQueries;
  using typename Base::T;

  const GradientTerms<Traits> terms;

  __device__ WideWarpgroup(const AttentionParams& p, const BackwardMaps& maps, const BackwardShared<Traits>& shared)
      : Base(p, shared, kOwnsDv ? 0 : 1), terms{p, shared, maps.terms} {}

  // The product of start_sum has ended: its tile's place is free.
  __device__ __forceinline__ void release_summand(uint32_t step) const {
    if constexpr (kOwnsDv) {
      shared.dout.release(step);
    } else {
      shared.steps.release(step);
    }
  }

  // S of a step, complete, becomes P: the operand, and what the other warpgroup waits for. What dropout drops is
  // negative there.
  __device__ __forceinline__ void exponentiate(uint32_t step) {
    const BackwardStep& at = shared.step(step);
    const BackwardPlan& plan = shared.plan(at.plan);
    const typename Base::Gradient gradient(p, plan.sequence, plan.batch(), at.head);
    const int key0 = first_key(plan);
    terms.apply(scores, plan, at, step, GradientTerms<Traits>::place(shared.term_tile()), key0);
    if (terms.constants.copies_bias) {
      __syncwarp();
      shared.bias.release(step);
    }
    if (at.boundary[0]) hide_invisible<true>(scores, p, plan.sequence, at.i0, key0, plan.seen_from(key0));
    gradient.exponentiate(scores, shared.row_values(step) + lane_col(), terms.constants.factor, at.i0, key0);
    __syncwarp();
    shared.steps.release(step);
    to_operand<T>(operand, scores, 0);
    shared.probabilities.wait_empty(step);
    const uint32_t place = this->probability_place(step);
#pragma unroll
    for (int k = 0; k < kQueries / 16; ++k) {
      uint32_t (&x)[4] = operand.x[0][k];
      store_shared_16_bytes(place + k * kNextPlace, uint4{x[0], x[1], x[2], x[3]});
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = positive_part<T>(x[i]);
    }
    __syncwarp();
    shared.probabilities.release_full(step);
  }

  // dP of a step, complete, becomes dS: the operand, and in shared memory for dQ.
  __device__ __forceinline__ void differentiate(uint32_t step) {
    const BackwardStep& at = shared.step(step);
    const BackwardPlan& plan = shared.plan(at.plan);
    shared.dout.release(step);
    this->differentiate_scores(step);
    terms.finish(scores, plan, at, GradientTerms<Traits>::place(shared.term_tile()), first_key(plan));
    __syncwarp();
    shared.probabilities.release(step);
    if (at.last) shared.v.release(at.plan);
    this->lay_out_ds(step);
    __syncwarp();
    shared.ds.release_full(step);
  }
  __device__ __forceinline__ void finish_scores(uint32_t step) {
    if constexpr (kOwnsDv) {
      exponentiate(step);
    } else {
      differentiate(step);
    }
  }

  __device__ __forceinline__ void store(const BackwardPlan& plan) {
    const float factor = 256.0f / opaque(p.dropout_keep);
    Base::store(plan, kOwnsDv ? factor : factor * terms.constants.scale);
  }
};

// The steps of a piece of work. A round starts dV or dK of the current step, the first slice of dQ of the step before,
// S or dP of the next step, the second slice: each as soon as the one before the last is done, so that one is always
// under way while P or dS is worked out and dQ leaves. Slices of a step before the first multiply what lies in memory,
// and nobody looks at them: a branch around a product would make ptxas run all of them one after the other.
template <Role ROLE, class Traits>
__device__ __forceinline__ void consume_wide(const AttentionParams& p, const BackwardMaps& maps,
                                             const BackwardShared<Traits>& shared) {
  constexpr bool kOwnsDv = ROLE == Role::kDv;
  WideWarpgroup<Traits, ROLE> state(p, maps, shared);
  uint32_t step = 0;  // place in the rings
  // The second slice of the step before.
  const auto finish_second_slice = [&](uint32_t first) {
    wgmma_wait<0>();
    wgmma_settle(state.dq1);
    if (step == first) return;
    shared.release_ds(step - 1);
    state.template hand_over_dq<1>(step - 1);
  };
  for (;; ++step) {
    shared.steps.wait_full(step);
    const int n = shared.step(step).plan;
    if (n < 0) break;
    const uint32_t first = step;
    shared.k.wait_full(n);
    if (!kOwnsDv) {
      shared.v.wait_full(n);
      shared.dout.wait_full(step);
    }
    state.start_scores(step);
    wgmma_wait<0>();
    wgmma_settle(state.scores);
    state.finish_scores(step);
    for (; !shared.step(step).last; ++step) {
      if (kOwnsDv) shared.dout.wait_full(step);
      state.start_sum(step);
      if (step != first) shared.ds.wait_full(step - 1);
      state.template start_dq<0>(step - 1);
      wgmma_wait<1>();  // now the operand's registers are free for the next step's
      wgmma_settle(state.sum);
      state.release_summand(step);
      shared.steps.wait_full(step + 1);
      if (!kOwnsDv) shared.dout.wait_full(step + 1);
      state.start_scores(step + 1);
      wgmma_wait<1>();
      wgmma_settle(state.dq0);
      if (step != first) state.template hand_over_dq<0>(step - 1);
      state.template start_dq<1>(step - 1);
      wgmma_wait<0>();
      wgmma_settle(state.scores);
      finish_second_slice(first);  // before the terms need the registers
      state.finish_scores(step + 1);
    }
    if (kOwnsDv) shared.dout.wait_full(step);
    state.start_sum(step);
    wgmma_wait<0>();
    wgmma_settle(state.sum);
    state.release_summand(step);
    if (step != first) state.finish_dq(step - 1);
    state.finish_dq(step);
    shared.k.release(n);
    state.store(shared.plan(n));  // which stays until the next K is released too
  }
  state.end_dq(step);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    wide_backward_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ BackwardMaps maps,
                         const __grid_constant__ SlicedDqAccumulator accumulator,
                         const __grid_constant__ PersistentSchedule schedule,
                         const __grid_constant__ BackwardGrid grid) {
  extern __shared__ __align__(1024) char shared_memory[];
  const BackwardShared<Traits> shared(shared_memory);
  const int warpgroup = uniform(threadIdx.x / kWarpgroupThreads);
  init_barriers(shared);
  __syncthreads();
  if (warpgroup == Traits::kWarpgroups) {
    give_registers_back<Traits::kProducerRegisters>();
    const int warp = uniform(threadIdx.x / 32 % 4);
    switch (warp) {  // ifs would keep its number in a register
      case 0: copy_wide_tiles(p, maps, shared); break;
      case 1: make_plans(p, accumulator, schedule, grid, shared); break;
      case 2: copy_row_values(p, shared); break;
      default: add_dq_slices(p, accumulator, grid, shared);
    }
  } else {
    take_registers<Traits::kConsumerRegisters>();
    if (warpgroup == 0) {
      consume_wide<Role::kDv>(p, maps, shared);
    } else {
      consume_wide<Role::kDk>(p, maps, shared);
    }
  }
}

// Chooses between this kernel and that of pairs.
template <class T, int HEAD_DIM, bool DROPOUT, Terms TERMS>
void run_wide_backward(const AttentionParams& p, cudaStream_t stream) {
  const BackwardGrid grid(p, HEAD_DIM, multiprocessor_count());
  const SlicedDqAccumulator accumulator(p, p.workspace, HEAD_DIM);
  if constexpr (pairs_ctas(HEAD_DIM, DROPOUT, TERMS != Terms::kNone)) {
    using Traits = PairedTraits<T, HEAD_DIM>;
    run_passes<Traits>(paired_backward_kernel<Traits>, p, accumulator, grid, stream);
  } else {
    using Traits = WideTraits<T, HEAD_DIM>;
    static_assert(DROPOUT && TERMS == Terms::kEvery);
    run_passes<Traits>(wide_backward_kernel<Traits>, p, accumulator, grid, stream);
  }
}

}  // namespace hf_flash::sm90
