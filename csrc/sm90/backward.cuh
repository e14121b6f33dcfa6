// Backward for Hopper (FlashAttention-3, Shah et al. 2024, in its outer shape): a CTA owns 128 keys, two warpgroups of
// 64, and walks the query tiles that see them, for every query head of the group, so dK and dV need no reduction.
// Scores are computed transposed, keys as rows: P and dS stay in registers as operands of dV and dK. Only dS goes
// through shared memory, for dQ, which leaves one step late: added in float32 to global memory, handed to another CTA
// of the cluster (dq_relay.cuh) or, where all others have added, written as dq. The warpgroups take turns at the tensor
// cores. Long calls of head dimension 128 have other consumers (tall_backward.cuh).
#pragma once

#include <cuda_runtime.h>

#include "sm90/backward_launch.cuh"
#include "sm90/backward_producers.cuh"
#include "sm90/backward_warpgroup.cuh"
#include "sm90/dq_addition.cuh"
#include "sm90/dq_relay.cuh"
#include "sm90/tall_backward.cuh"

namespace hf_flash::sm90 {

// The steps of all pieces of work form one stream. A round starts dV and dK of the current step, dQ of the step before
// and S of the next one; while these run dQ leaves, then the next step's P and dS are worked out. The warpgroups take
// turns at the tensor cores, so that one's mathematics hides behind the other's products.
template <class Traits>
__device__ __forceinline__ void consume(const AttentionParams& p, const BackwardMaps& maps,
                                        const BackwardShared<Traits>& shared, int warpgroup) {
  constexpr bool kRelays = Traits::kRelays;
  BackwardWarpgroup<Traits> state(p, maps, shared, warpgroup);
  if (warpgroup == 1) state.pass_turn();  // the first turn is the first warpgroup's
  uint32_t step = 0;                      // place in the rings
  shared.steps.wait_full(step);
  // Pieces of work of this step, the one before and the next one.
  int n = uniform(shared.step(step).plan), n_before = n, n_next = uniform(shared.step(step).next);
  if (n < 0) return;
  state.begin(n, step);
  state.lay_out_ds(step);
  const auto leave = [&](uint32_t step, const DqRoute& route) {
    if (Traits::kDqOverDs) named_barrier_wait(3 + warpgroup, kWarpgroupThreads);  // all of its warps have read dS
    if (kRelays) {
      state.pass_dq_on(step, route);
    } else {
      state.lay_out_dq(step, route.finishes());
    }
  };

  bool adds = false;  // dQ of the step before to what dq's registers hold
  if (kRelays) wgmma_forget(state.dq);
  for (;; ++step) {
    // While nothing is under way; otherwise they would wait behind products.
    step = uniform(step);
    n_before = uniform(n_before);
    const uint32_t keys_next = uniform(state.keys_of(n_next));
    state.publish_ds(step);
    if (n_next < 0) break;
    state.wait_for_turn();
    state.start_dk_dv(step);
    // At the very first step this multiplies what lies in memory, and nobody looks at it.
    if (step > 0) shared.ds.wait_full(step - 1);
    state.start_dq(n_before, step - 1, adds);
    shared.steps.wait_full(step + 1);
    wgmma_wait<1>();  // now the registers of P and dS are free for the next S
    wgmma_settle(state.dk);
    wgmma_settle(state.dv);
    shared.steps.release(step);
    // Where a piece of work has a single step, the K of three are in use: with two places one must be given back first.
    const bool early = Traits::kKeyStages < 3 && n_before != n && n_next != n;
    if (early) {
      wgmma_wait<0>();
      shared.k.release(n_before);
    }
    const bool moves = n_next != n;  // then the next K may have to wait for what the other warpgroup does in its turn
    if (moves) {
      state.pass_turn();
      shared.k.wait_full(n_next);
    }
    state.start_scores(keys_next, step + 1);
    if (!moves) state.pass_turn();
    const BackwardStep& next = shared.step(step + 1);
    const int n_after = uniform(next.next);
    const bool boundary = next.boundary[warpgroup];
    const DqRoute route = shared.step(step - 1).route;
    wgmma_wait<1>();
    if (step > 0) {
      wgmma_settle(state.dq);
      if (!Traits::kDqOverDs) shared.ds.release(step - 1);
      leave(step - 1, route);
      if (!early && n_before != n) shared.k.release(n_before);
    }
    if (moves) shared.v.wait_full(n_next);
    state.start_dp(step + 1);
    if (!kRelays && step > 0) shared.dq.release(step - 1);  // no earlier: the stores hold it up
    state.differentiate(n_next, step + 1, boundary);
    adds = kRelays && state.take_sums(step);
    state.lay_out_ds(step + 1);
    // No earlier: no product may be under way when the registers of dK and dV are cleared.
    if (moves) state.store(shared.plan(n));
    n_before = n;
    n = n_next;
    n_next = n_after;
  }

  state.start_dk_dv(step);
  if (step > 0) shared.ds.wait_full(step - 1);
  state.start_dq(n_before, step - 1, adds);
  wgmma_wait<0>();
  wgmma_settle(state.dk);
  wgmma_settle(state.dv);
  wgmma_settle(state.dq);
  if (step > 0) {
    leave(step - 1, shared.step(step - 1).route);
    if (!kRelays) shared.dq.release(step - 1);
  }
  adds = kRelays && state.take_sums(step);
  shared.ds.wait_full(step);
  state.start_dq(n, step, adds);
  wgmma_wait<0>();
  wgmma_settle(state.dq);
  leave(step, shared.step(step).route);
  if (!kRelays) shared.dq.release(step);
  if (Traits::kDqOverDs) shared.dq.wait_full(step);  // then the other CTA's sums are there
  state.template store<true>(shared.plan(n));
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    backward_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ BackwardMaps maps,
                    const __grid_constant__ typename Traits::DqSums accumulator,
                    const __grid_constant__ PersistentSchedule schedule, const __grid_constant__ BackwardGrid grid) {
  extern __shared__ __align__(1024) char shared_memory[];
  const BackwardShared<Traits> shared(shared_memory);
  const int warpgroup = uniform(threadIdx.x / kWarpgroupThreads);
  init_barriers(shared);
  if constexpr (Traits::kRelays) {
    cluster_barrier();
  } else {
    __syncthreads();
  }
  if (warpgroup == Traits::kWarpgroups) {
    give_registers_back<Traits::kProducerRegisters>();
    const int warp = uniform(threadIdx.x / 32 % 4);
    if (warp == 0) copy_tiles(p, maps, shared);
    if (warp == 1) make_plans(p, accumulator, schedule, grid, shared);
    if (warp == 2) copy_row_values(p, shared);
    if (warp == 3) {
      if constexpr (Traits::kRelays) {
        relay_dq(p, shared);
      } else {
        add_dq(p, accumulator, grid, shared);
      }
    }
  } else {
    take_registers<Traits::kConsumerRegisters>();
    if constexpr (Traits::kTall) {
      consume_tall(p, maps, shared, warpgroup);
    } else {
      consume(p, maps, shared, warpgroup);
    }
  }
  if constexpr (Traits::kRelays) cluster_barrier();  // the others may still write here
}

template <class Traits>
void run_backward(const AttentionParams& p, const BackwardGrid& grid, cudaStream_t stream) {
  using Sums = typename Traits::DqSums;
  Sums accumulator;
  if constexpr (Traits::kRelays) {
    accumulator.finishes_dq = true;
  } else {
    const int stored_rows = grid.stores_first ? Traits::kQueries : 0;
    accumulator = Sums(p, p.workspace, Traits::kHeadDim, grid.finishes_dq, stored_rows, grid.zeroes_ahead);
    accumulator.divided = grid.divided;
  }
  run_passes<Traits>(backward_kernel<Traits>, p, accumulator, grid, stream);
}

template <class T, int HEAD_DIM, bool DROPOUT, Terms TERMS>
void run_backward(const AttentionParams& p, cudaStream_t stream) {
  const BackwardGrid grid(p, HEAD_DIM, multiprocessor_count());
  if constexpr (TERMS == Terms::kNone && relayed_keys(HEAD_DIM, DROPOUT, false, 1) > 0) {
    constexpr int kQueries = backward_config(HEAD_DIM, Terms::kNone).queries;
    if (grid.relays())
      return run_backward<BackwardTraits<T, HEAD_DIM, DROPOUT, TERMS, kQueries, true>>(p, grid, stream);
  }
  if constexpr (HEAD_DIM == 128 && !DROPOUT && TERMS == Terms::kNone) {
    // One that knows no mask of keys, for which ptxas orders all else differently: S 2048 526 against 492 TFLOP/s.
    if (grid.tall && p.key_mask == nullptr)
      return run_backward<BackwardTraits<T, HEAD_DIM, DROPOUT, TERMS, kTallQueries, false, false>>(p, grid, stream);
    if (grid.tall) return run_backward<BackwardTraits<T, HEAD_DIM, DROPOUT, TERMS, kTallQueries>>(p, grid, stream);
  }
  run_backward<BackwardTraits<T, HEAD_DIM, DROPOUT, TERMS>>(p, grid, stream);
}

}  // namespace hf_flash::sm90
