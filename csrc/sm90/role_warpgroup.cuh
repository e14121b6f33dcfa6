// What a consumer warpgroup of the backward for head dimensions over 128 holds in registers, and those steps of the
// algorithm on it that are the same whether dV and dK are two warpgroups' (wide_backward.cuh) or two CTAs'
// (paired_backward.cuh).
#pragma once

#include "attention/score_gradient.cuh"
#include "instructions/warpgroup.cuh"
#include "sm90/wide_backward_layout.cuh"
#include "tile/store.cuh"

namespace hf_flash::sm90 {

template <class Traits, Role ROLE>
struct RoleWarpgroup {
  using T = typename Traits::T;
  using KeyTile = typename Traits::KeyTile;
  using QueryTile = typename Traits::QueryTile;
  using Slices = typename Traits::Slices;
  using Gradient = ScoreGradient<T, Traits::kDropout, Traits::kEveryTerm>;
  static constexpr int kQueries = Traits::kQueries, kHeadDim = Traits::kHeadDim;
  static constexpr bool kOwnsDv = ROLE == Role::kDv;
  static constexpr int kApart = Traits::kKeys - 64;  // from the first warpgroup's keys to the second's

  const AttentionParams& p;
  const BackwardShared<Traits>& shared;
  const int warpgroup, warp;         // warp of the warpgroup
  Accumulator<16, kQueries> scores;  // S or dP
  Accumulator<16, kHeadDim> sum;     // dV or dK
  // Slices of dQ. Registers of one accumulator for both would be serialised where their widths differ.
  Accumulator<16, Slices::columns(0)> dq0;
  Accumulator<16, Slices::columns(1)> dq1;
  OperandA<16, kQueries> operand;  // P or dS

  __device__ RoleWarpgroup(const AttentionParams& p, const BackwardShared<Traits>& shared, int warpgroup)
      : p(p), shared(shared), warpgroup(warpgroup), warp(uniform(threadIdx.x / 32 % 4)) {
    sum.clear();
  }

  // S = K Q^T or dP = V dO^T, keys as rows.
  __device__ __forceinline__ void start_scores(uint32_t step) {
    const uint32_t a = KeyTile::descriptor(shared.key_tile(ROLE) + warpgroup * kApart * 128);
    const uint32_t b = QueryTile::descriptor(shared.factor_tile(ROLE, step));
    wgmma_fence();
    start_multiply_by_transpose<T, kHeadDim, KeyTile, QueryTile>(scores, a, b);
    wgmma_commit();
  }
  // dV += P dO or dK += dS Q.
  __device__ __forceinline__ void start_sum(uint32_t step) {
    wgmma_fence();
    start_multiply<T, QueryTile>(sum, operand, QueryTile::descriptor(shared.summand_tile(ROLE, step)));
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
  // A slice of dQ = dS^T K, of all keys of the CTA.
  template <int SLICE>
  __device__ __forceinline__ void start_dq(uint32_t step) {
    using ByKey = typename Traits::ScoreColumns;
    constexpr int kColumns = Slices::columns(SLICE), kUpper = Slices::first_column(1, SLICE);
    static_assert(kUpper % 64 + kColumns <= 64 && kUpper + kColumns <= kHeadDim);
    const int column = warpgroup == 0 ? Slices::first_column(0, SLICE) : kUpper;
    const uint32_t a = ByKey::descriptor(shared.ds_tile(step));
    const uint32_t k_tile = shared.key_tile(Role::kDv);
    const uint32_t b = KeyTile::descriptor(k_tile + column / 64 * KeyTile::kBlockBytes + 2 * (column % 64));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Traits::kKeys / 16; ++k)
      wgmma_ss<T, kColumns, 1, 1>(wgmma_registers(slice<SLICE>()), a + ByKey::down(k), b + KeyTile::down(k), k > 0);
    wgmma_commit();
  }

  // This warp's first key, among the tile's and in the sequence.
  __device__ __forceinline__ int first_row() const { return kApart * warpgroup + 16 * warp; }
  __device__ __forceinline__ int first_key(const BackwardPlan& plan) const { return plan.j0 + first_row(); }

  // A thread's part of the P of a step: four pairs for each 16 queries, in the order of the operand's registers.
  __device__ __forceinline__ uint32_t probability_place(uint32_t step) const {
    return shared.probability_tile(step) +
           16 * (kApart > 0 ? opaque(threadIdx.x) : opaque(threadIdx.x) % kWarpgroupThreads);
  }
  static constexpr uint32_t kNextPlace = 32 * Traits::kKeys;  // from 16 queries to the next 16

  // dP becomes dS once P of the step is there.
  __device__ __forceinline__ void differentiate_scores(uint32_t step) {
    const float* row_sum = shared.row_values(step) + kQueries + lane_col();
    shared.probabilities.wait_full(step);
    const uint32_t place = probability_place(step);
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
  }
  // dS, complete, rounded: the operand, and in shared memory.
  __device__ __forceinline__ void lay_out_ds(uint32_t step) {
    to_operand<T>(operand, scores, 0);
    shared.ds.wait_empty(step);
    const int lane = threadIdx.x % 32, row = first_row() + lane % 16, chunk = lane / 16;
#pragma unroll
    for (int k = 0; k < kQueries / 16; ++k)
      stmatrix_x4(shared.ds_tile(step) + Traits::ScoreColumns::offset(row, 2 * k + chunk), operand.x[0][k]);
    fence_async_proxy();
  }

  // Lays a slice of dQ out as the accumulator has it; a warp of the producers adds it.
  template <int SLICE>
  __device__ __forceinline__ void hand_over_dq(uint32_t step) {
    constexpr int kColumns = Slices::columns(SLICE);
    const uint32_t place = Slices::kCount * step + SLICE;
    const int lane = opaque(threadIdx.x % 32);  // found anew each time: kept, it would cost registers all along
    const uint32_t rows = shared.dq_tile(warpgroup, place) + 4 * (32 * 16 * warp + DqAccumulator::element(0, lane, 0));
    shared.dq(warpgroup).wait_empty(place);
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      const float (&x)[4] = slice<SLICE>().x[0][n];
      store_shared_16_bytes(
          rows + 4 * (n / 4 * 32 * kQueries + DqAccumulator::element(n % 4, 0, 0)),
          uint4{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])});
    }
    shared.dq(warpgroup).release_full(place);
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
    shared.release_ds(step);
    hand_over_dq<1>(step);
  }
  // Tells that the stream has ended before a step.
  __device__ __forceinline__ void end_dq(uint32_t step) const {
    const uint32_t place = Slices::kCount * step;
    shared.dq(warpgroup).wait_empty(place);
    shared.dq(warpgroup).release_full(place);
  }

  // dV or dK of this warp's keys, multiplied and rounded; it starts again at zero.
  __device__ __forceinline__ void store(const BackwardPlan& plan, float factor) {
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

}  // namespace hf_flash::sm90
