// A tile whose probabilities, by the maximum of the tiles before, became too large for float16: by each warp for
// itself, from K and Q, which are still there. It happens to few tiles, mostly where a row first meets a key that it
// likes much more than all others.
#pragma once

#include "attention/score.cuh"
#include "attention/softmax.cuh"
#include "instructions/unroll.cuh"
#include "sm90/forward_layout.cuh"
#include "tile/warp_multiply.cuh"

namespace hf_flash::sm90 {

template <class Traits>
struct ForwardWarpgroup;

// The rows with such probabilities get them again, by the tile's own maximum, and their sums; no other row changes by a
// bit.
template <class Traits>
__device__ __forceinline__ void exponentiate_again(ForwardWarpgroup<Traits>& state, RowVector<16>& sum,
                                                   const ForwardPlan<Traits>& plan, int tile, uint32_t q_place,
                                                   uint32_t k_place) {
  using T = typename Traits::T;
  constexpr int kKeys = Traits::kKeys;
  // Fewer keys at a time where the registers of all scores are in use.
  constexpr int kPart = Traits::kChecksLate || Traits::kDropout ? 32 : 64;
  const int j0 = tile * kKeys, row0 = state.first_row(plan);
  Accumulator<16, kPart> part;
  const auto score = [&](int key) {
    const auto& shared = state.shared;
    multiply_by_transpose<T, Traits::kHeadDim, typename Traits::QTile, typename Traits::KVTile>(
        part, shared.q_tile(q_place), first_row_of_warp(state.warpgroup), shared.k_tile(k_place), key);
    const TileRange& range = plan.own[state.warpgroup];
    if (range.hides(j0, j0 + kKeys))
      hide_invisible<false, Traits::kMasked>(part, state.p, plan.sequence, row0, j0 + key, range.has_holes());
  };

  bool again[2];
  RowVector<16> top, correction;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    again[i] = quad_max(sum.v[i]) > kMostTrusted;
    if (again[i]) sum.v[i] = 0.0f;
    top.v[i] = -CUDART_INF_F;
  }
#pragma unroll 1
  for (int key = 0; key < kKeys; key += kPart) {
    RowVector<16> part_top;
    score(key);
    take_lane_max(part_top, part, 0, kPart / 8);
    if (again[0]) top.v[0] = fmaxf(top.v[0], part_top.v[0]);
    if (again[1]) top.v[1] = fmaxf(top.v[1], part_top.v[1]);
  }
  if (state.softmax.raise_max(top, state.factor, correction, 0.0f)) OnlineSoftmax<16>::rescale(state.out, correction);

  unrolled<kKeys / kPart>([&](int number) {
    const int key = kPart * number;
    RowVector<16> part_sum;
    OperandA<16, kPart> rounded;
    score(key);
    part_sum.fill(0.0f);
    state.softmax.exponentiate(part, state.factor, 0, kPart / 8, part_sum);
    to_operand<T>(rounded, part, 0);
    if constexpr (Traits::kDropout) {
      DropoutTile<Traits> kept;
      state.dropout.batch_head = plan.batch * state.p.heads_q + plan.head;
      kept.draw(state.dropout, row0 / 16, j0 / 16, key / 32);
      kept.apply(state.dropout, rounded, key / 16);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!again[i]) continue;
      sum.v[i] += part_sum.v[i];
#pragma unroll
      for (int block = 0; block < kPart / 16; ++block) {
        uint32_t (&to)[4] = state.probabilities.x[0][key / 16 + block];
        to[i] = rounded.x[0][block][i];
        to[2 + i] = rounded.x[0][block][2 + i];
      }
    }
  });
}

}  // namespace hf_flash::sm90
