// The terms that most calls do without, in Hopper's backward: softcap, ALiBi, bias, bool mask. A bias that the TMA
// engine can read comes to the place where dS of the same tile will lie: each warp takes its keys' elements out as
// fragments and later writes dS over them. Anything else is read element by element. Heads over 128 have a tile of
// their own for bias or slopes (wide_backward_layout.cuh).
#pragma once

#include "attention/score_gradient.cuh"
#include "sm90/backward_layout.cuh"

namespace hf_flash::sm90 {

template <class Traits>
struct GradientTerms {
  using T = typename Traits::T;
  static constexpr int kQueries = Traits::kQueries;
  static constexpr bool kEveryTerm = Traits::kEveryTerm;
  using Scores = Accumulator<16, kQueries>;

  const AttentionParams& p;
  const BackwardShared<Traits>& shared;
  const GradientConstants& constants;

  // Raw products of a step, keys key0 .. of this warp, become scores that count as s * factor in log2 units. place:
  // this warp's part of the step's tile of dS.
  __device__ __forceinline__ void apply(Scores& s, const BackwardPlan& plan, const BackwardStep& at, uint32_t step,
                                        uint32_t place, int key0) const {
    float scale = constants.scale;
    if (kEveryTerm && constants.cap != 0) {
      shared.wait_for_slopes(step);
      cap(s, place);
      scale = 1.0f;
    } else if (kEveryTerm && !(scale > 0)) {
      s.for_each([&](float& x, int, int) { x *= constants.scale; });
      scale = 1.0f;
    }
    if (p.alibi_slopes != nullptr) {
      add_alibi(s, scale, at.slope, at.i0 + plan.sequence.offset - key0);
      scale = 1.0f;
    }
    if (constants.copies_bias) {
      shared.bias.wait_full(step);
      add_bias(s, scale, place);
      if (at.lowest) keep_lowest_visible(s);
    } else if (kEveryTerm && constants.reads_scores) {
      scale *= kLog2E;
      s.for_each([&](float& x, int, int) { x *= scale; });
      ScoreExtras<T, true> elements(p, plan.batch(), at.head);
      elements.slope = 0;
      elements.add(s, plan.sequence, at.i0, key0);
    }
  }

  // The gradient of the scores: to the gradient of a bias that broadcasts nowhere, then back through the softcap.
  __device__ __forceinline__ void finish(Scores& ds, const BackwardPlan& plan, const BackwardStep& at, uint32_t place,
                                         int key0) const {
    if constexpr (!kEveryTerm) return;
    const BiasGradient bias(p, plan.batch(), at.head);
    if (bias.data != nullptr) bias.store(ds, plan.sequence, at.i0, key0);
    if (constants.cap != 0) multiply_by_slopes(ds, place);
  }

  // This lane's address in this warp's part of a tile of dS, and from the first 16 queries to the k-th.
  __device__ static __forceinline__ uint32_t place(uint32_t tile) {
    const int thread = opaque(threadIdx.x), lane = thread % 32;  // found anew each time: registers are short
    const int key_chunk = 8 * (Traits::kKeys > 64 ? thread / 128 : 0) + 2 * (thread / 32 % 4) + lane / 8 % 2;
    return tile + Traits::ScoreTile::offset(lane / 16 * 8 + lane % 8, key_chunk);
  }
  __device__ static constexpr uint32_t from_first(int k) {
    return k * (16 * 128) + (Traits::kScoreTiles > 1 ? k / 4 * (Traits::ScoreTile::kBytes - 64 * 128) : 0);
  }

 private:
  // The softcap. Its slope, 1 - (s / c)^2, waits where dS will lie.
  __device__ __forceinline__ void cap(Scores& s, uint32_t place) const {
    const float inverse = 1.0f / constants.cap;
    cap_scores(s, constants);
    const auto slope = [&](float x) { return 1.0f - (x * inverse) * (x * inverse); };
#pragma unroll
    for (int k = 0; k < kQueries / 16; ++k) {
      uint32_t slopes[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&x)[4] = s.x[0][2 * k + i / 2];
        slopes[i] = pack<Half>(slope(x[2 * (i % 2)]), slope(x[2 * (i % 2) + 1]));
      }
      stmatrix_x4_transposed(place + from_first(k), slopes);
    }
    __syncwarp();
  }
  __device__ __forceinline__ void multiply_by_slopes(Scores& ds, uint32_t place) const {
    for_each_pair<Half>(
        place,
        [&](float (&x)[4], int e, float2 slope) {
          x[e] *= slope.x;
          x[e + 1] *= slope.y;
        },
        ds);
  }

  __device__ __forceinline__ void add_bias(Scores& s, float scale, uint32_t place) const {
    for_each_pair<T>(
        place,
        [&](float (&x)[4], int e, float2 bias) {
          x[e] = x[e] * scale + bias.x;
          x[e + 1] = x[e + 1] * scale + bias.y;
        },
        s);
  }

  // f(x[n], e, pair): what the tile has for elements e and e + 1.
  template <class Element, class F>
  __device__ __forceinline__ void for_each_pair(uint32_t place, F f, Scores& x) const {
#pragma unroll
    for (int k = 0; k < kQueries / 16; ++k) {
      uint32_t pairs[4];
      ldmatrix_x4_transposed(pairs, place + from_first(k));
#pragma unroll
      for (int i = 0; i < 4; ++i) f(x.x[0][2 * k + i / 2], 2 * (i % 2), unpack<Element>(pairs[i]));
    }
  }

  // Positions below 2^24 are exact in float32. distance: of the first query and the first key. A row's second half,
  // eight keys on, stands as far from a query as the first half from the query eight before it.
  __device__ __forceinline__ void add_alibi(Scores& s, float scale, float slope, int distance) const {
    const float corner = static_cast<float>(opaque(distance) + lane_col() - lane_row());
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int n = -1; n < kQueries / 8; ++n) {
        const float term = -slope * fabsf(corner + static_cast<float>(8 * n + e));
        if (n >= 0) s.x[0][n][e] = s.x[0][n][e] * scale + term;
        if (n + 1 < kQueries / 8) s.x[0][n + 1][2 + e] = s.x[0][n + 1][2 + e] * scale + term;
      }
    }
  }

  // The lowest finite numbers, which callers use to mean "hardly visible", overflow in log2 units. That matters where a
  // row has nothing above them.
  __device__ __forceinline__ void keep_lowest_visible(Scores& s) const {
    s.for_each([&](float& x, int, int) { x = x < kLowestBias && x != -CUDART_INF_F ? kLowestBias : x; });
  }
};

}  // namespace hf_flash::sm90
