// Backward for Hopper, head dimensions over 128, of calls with dropout or extra terms (for others:
// paired_backward.cuh), in the manner of backward.cuh. dK and dV of 128 keys would not fit the registers, so a CTA owns
// 64 keys, and its two warpgroups do not divide them: one computes S, P and dV, the other dP, dS and dK. P goes from
// the first to the second through shared memory, dS to both, for dQ, of which each computes half of the columns one
// step late. So the warpgroups run half a step apart, and one's exponentials or stores hide behind the other's
// products.
#pragma once

#include <cuda_runtime.h>

#include "instructions/warpgroup.cuh"
#include "portable/portable.h"
#include "sm90/backward_launch.cuh"
#include "sm90/gradient_terms.cuh"
#include "sm90/paired_backward.cuh"
#include "sm90/wide_backward_producers.cuh"
#include "tile/store.cuh"

namespace hf_flash::sm90 {

// What a consumer warpgroup holds in registers, and the steps of the algorithm on it.
template <class Traits, Role ROLE>
struct WideWarpgroup {
  using T = typename Traits::T;
  using KeyTile = typename Traits::KeyTile;
  using QueryTile = typename Traits::QueryTile;
  using Gradient = ScoreGradient<T, true, true>;
  static constexpr int kQueries = Traits::kQueries, kHeadDim = Traits::kHeadDim;
  static constexpr bool kOwnsDv = ROLE == Role::kDv;
  using Slices = typename Traits::Slices;
  static constexpr int kWarpgroup = kOwnsDv ? 0 : 1;

  const AttentionParams& p;
  const BackwardShared<Traits>& shared;
  const GradientTerms<Traits> terms;
  const int warp;                    // of the warpgroup
  Accumulator<16, kQueries> scores;  // S or dP
  Accumulator<16, kHeadDim> sum;     // dV or dK
  // Slices of dQ. Registers of one accumulator for both would be serialised where their widths differ.
  Accumulator<16, Slices::columns(0)> dq0;
  Accumulator<16, Slices::columns(1)> dq1;
  OperandA<16, kQueries> operand;  // P or dS

  __device__ WideWarpgroup(const AttentionParams& p, const BackwardMaps& maps, const BackwardShared<Traits>& shared)
      : p(p), shared(shared), terms{p, shared, maps.terms}, warp(uniform(threadIdx.x / 32 % 4)) {
    sum.clear();
  }

  // S = K Q^T or dP = V dO^T, keys as rows.
  __device__ __forceinline__ void start_scores(uint32_t step) {
    const uint32_t a = KeyTile::descriptor(kOwnsDv ? shared.k_tile() : shared.v_tile());
    const uint32_t b = QueryTile::descriptor(kOwnsDv ? shared.q_tile(step) : shared.dout_tile(step));
    wgmma_fence();
    start_multiply_by_transpose<T, kHeadDim, KeyTile, QueryTile>(scores, a, b);
    wgmma_commit();
  }
  // dV += P dO or dK += dS Q.
  __device__ __forceinline__ void start_sum(uint32_t step) {
    wgmma_fence();
    start_multiply<T, QueryTile>(sum, operand,
                                 QueryTile::descriptor(kOwnsDv ? shared.dout_tile(step) : shared.q_tile(step)));
    wgmma_commit();
  }
  template <int SLICE>
  __device__ __forceinline__ auto& slice() {
    if constexpr (SLICE == 0) {
      return dq0;
    } else {
      return dq1;
    }
  }
  // A slice of dQ = dS^T K.
  template <int SLICE>
  __device__ __forceinline__ void start_dq(uint32_t step) {
    using ByKey = typename Traits::ScoreColumns;
    constexpr int kColumn = Slices::first_column(kWarpgroup, SLICE), kColumns = Slices::columns(SLICE);
    static_assert(kColumn % 64 + kColumns <= 64 && kColumn + kColumns <= kHeadDim);
    const uint32_t a = ByKey::descriptor(shared.ds_tile(step));
    const uint32_t b = KeyTile::descriptor(shared.k_tile() + kColumn / 64 * KeyTile::kBlockBytes + 2 * (kColumn % 64));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Traits::kKeys / 16; ++k)
      wgmma_ss<T, kColumns, 1, 1>(wgmma_registers(slice<SLICE>()), a + ByKey::down(k), b + KeyTile::down(k), k > 0);
    wgmma_commit();
  }

  // The product of start_sum has ended: its tile's place is free.
  __device__ __forceinline__ void release_summand(uint32_t step) const {
    if constexpr (kOwnsDv) {
      shared.dout.release(step);
    } else {
      shared.steps.release(step);
    }
  }
  __device__ __forceinline__ int first_key(const BackwardPlan& plan) const {
    return plan.j0 + 16 * warp;
  }  // of the warp

  // A thread's part of the P of a step: four pairs for each 16 queries, in the order of the operand's registers.
  __device__ __forceinline__ uint32_t probability_place() const {
    return shared.probability_tile() + 16 * (opaque(threadIdx.x) % kWarpgroupThreads);
  }
  static constexpr uint32_t kNextPlace = 16 * kWarpgroupThreads;

  // S of a step, complete, becomes P: the operand, and what the other warpgroup waits for. What dropout drops is
  // negative there.
  __device__ __forceinline__ void exponentiate(uint32_t step) {
    const BackwardStep& at = shared.step(step);
    const BackwardPlan& plan = shared.plan(at.plan);
    const Gradient gradient(p, plan.sequence, plan.batch(), at.head);
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
    const uint32_t place = probability_place();
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
    const float* row_sum = shared.row_values(step) + kQueries + lane_col();
    shared.probabilities.wait_full(step);
    const uint32_t place = probability_place();
#pragma unroll
    for (int k = 0; k < kQueries / 16; ++k) {
      const uint4 x = load_shared_16_bytes(place + k * kNextPlace);
      const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
      Accumulator<16, 16> probability, gradient;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<T>(pairs[i]);
        probability.x[0][i / 2][2 * (i % 2)] = pair.x;
        probability.x[0][i / 2][2 * (i % 2) + 1] = pair.y;
      }
      const auto for_each = [&](auto&& f) {
#pragma unroll
        for (int i = 0; i < 8; ++i) f(gradient.x[0][i / 4][i % 4], scores.x[0][2 * k + i / 4][i % 4]);
      };
      for_each([](float& own, float whole) { own = whole; });
      Gradient::differentiate(probability, gradient, row_sum + 16 * k);
      for_each([](float own, float& whole) { whole = own; });
    }
    terms.finish(scores, plan, at, GradientTerms<Traits>::place(shared.term_tile()), first_key(plan));
    __syncwarp();
    shared.probabilities.release(step);
    if (at.last) shared.v.release(at.plan);
    to_operand<T>(operand, scores, 0);
    shared.ds.wait_empty(step);
    const int lane = threadIdx.x % 32, row = 16 * warp + lane % 16, chunk = lane / 16;
#pragma unroll
    for (int k = 0; k < kQueries / 16; ++k)
      stmatrix_x4(shared.ds_tile(step) + Traits::ScoreColumns::offset(row, 2 * k + chunk), operand.x[0][k]);
    fence_async_proxy();
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

  // Lays a slice of dQ out as the accumulator has it; a warp of the producers adds it.
  template <int SLICE>
  __device__ __forceinline__ void hand_over_dq(uint32_t step) {
    constexpr int kColumns = Slices::columns(SLICE);
    const uint32_t place = Slices::kCount * step + SLICE;
    const int lane = opaque(threadIdx.x % 32);  // found anew each time: kept, it would cost registers all along
    const uint32_t rows = shared.dq_tile(kWarpgroup, place) + 4 * (32 * 16 * warp + DqAccumulator::element(0, lane, 0));
    shared.dq(kWarpgroup).wait_empty(place);
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      const float (&x)[4] = slice<SLICE>().x[0][n];
      store_shared_16_bytes(
          rows + 4 * (n / 4 * 32 * kQueries + DqAccumulator::element(n % 4, 0, 0)),
          uint4{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])});
    }
    shared.dq(kWarpgroup).release_full(place);
  }
  // The step's slices one after the other, nothing else under way.
  __device__ __forceinline__ void finish_dq(uint32_t step) {
    shared.ds.wait_full(step);
    start_dq<0>(step);
    wgmma_wait<0>();
    wgmma_settle(dq0);
    hand_over_dq<0>(step);
    start_dq<1>(step);
    wgmma_wait<0>();
    wgmma_settle(dq1);
    shared.ds.release(step);
    hand_over_dq<1>(step);
  }

  // dV or dK of this warp's keys, rounded; it starts again at zero.
  __device__ __forceinline__ void store(const BackwardPlan& plan) {
    float factor = 256.0f / opaque(p.dropout_keep);
    if (!kOwnsDv) factor *= terms.constants.scale;
    sum.for_each([&](float& x, int, int) { x *= factor; });
    const Rows& rows = kOwnsDv ? p.dv : p.dk;
    const int key0 = first_key(plan);
    T* to = static_cast<T*>(rows.data) + plan.batch() * rows.batch + (plan.sequence.first_k + key0) * rows.row +
            plan.kv_head * rows.head;
    store_fragment<T>(to, rows.row, kOwnsDv ? p.head_dim_v : p.head_dim, sum, 0, plan.sequence.len_k - key0,
                      opaque(threadIdx.x % 4));
    sum.clear();
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
    shared.ds.release(step - 1);
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
  const uint32_t place = Traits::Slices::kCount * step;
  const auto dq = shared.dq(kOwnsDv ? 0 : 1);
  dq.wait_empty(place);
  dq.release_full(place);  // tells that the stream has ended
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
  if (threadIdx.x == 0) {
    shared.init();
    mbarrier_init_fence();
  }
  __syncthreads();
  if (warpgroup == Traits::kWarpgroups) {
    give_registers_back<Traits::kProducerRegisters>();
    const int warp = uniform(threadIdx.x / 32 % 4);
    switch (warp) {  // ifs would keep its number in a register
      case 0: copy_wide_tiles(p, maps, shared); break;
      case 1: make_plans(p, schedule, grid, shared); break;
      case 2: copy_row_values(p, shared); break;
      default: add_dq_slices(p, accumulator, grid.rotates, shared);
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

template <class T, int HEAD_DIM, bool DROPOUT, Terms TERMS>
void run_wide_backward(const AttentionParams& p, cudaStream_t stream) {
  if constexpr (pairs_ctas(HEAD_DIM, DROPOUT, TERMS != Terms::kNone)) {
    run_paired_backward<T, HEAD_DIM>(p, stream);
  } else {
    using Traits = WideTraits<T, HEAD_DIM>;
    static_assert(DROPOUT && TERMS == Terms::kEvery);
    const BackwardGrid grid(p, HEAD_DIM, multiprocessor_count());
    const SlicedDqAccumulator accumulator(p, p.workspace, HEAD_DIM);
    portable::row_sum(p, accumulator, stream);
    launch_backward<Traits>(wide_backward_kernel<Traits>, p, accumulator, grid, stream);
    portable::convert_dq(p, accumulator, static_cast<float>(p.scale) * (256.0f / p.dropout_keep), stream);
    if (p.dsink != nullptr) portable::sink_gradient(p, stream);
  }
}

}  // namespace hf_flash::sm90
