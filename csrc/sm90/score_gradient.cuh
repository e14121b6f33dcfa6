// The mathematics of attention/score_gradient.cuh in two halves, for a warp's 16 keys: S is complete before dP. What
// dropout drops comes as bits, which a warp of the producers has drawn (dropout_bits.cuh).
#pragma once

#include "instructions/arithmetic.cuh"
#include "sm90/dropout_bits.cuh"
#include "tile/fragment.cuh"

namespace hf_flash::sm90 {

// Scores that count as s * factor in log2 units become probabilities; what is dropped comes out negative. lse: in log2
// units, from this lane's first query on.
template <bool DROPS, int COLS>
__device__ __forceinline__ void exponentiate(Accumulator<16, COLS>& s, const float* lse, float factor,
                                             const DroppedKeys<COLS>& dropped) {
#pragma unroll
  for (int n = 0; n < COLS / 8; ++n) {
    const float2 row_lse = *reinterpret_cast<const float2*>(lse + 8 * n);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float& x = s.x[0][n][e];
      x = exp2_fast(x * factor - (e % 2 ? row_lse.y : row_lse.x));
      if (DROPS) x = __uint_as_float(__float_as_uint(x) | dropped.sign(n, e));
    }
  }
}

// Leaves the probabilities that enter dV in s and the gradient of the scores in dp.
template <bool DROPOUT, int COLS>
__device__ __forceinline__ void differentiate(Accumulator<16, COLS>& s, Accumulator<16, COLS>& dp,
                                              const float* row_sum) {
#pragma unroll
  for (int n = 0; n < COLS / 8; ++n) {
    const float2 delta = *reinterpret_cast<const float2*>(row_sum + 8 * n);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float& probability = s.x[0][n][e];
      float& gradient = dp.x[0][n][e];
      const float row_delta = e % 2 ? delta.y : delta.x;
      if constexpr (DROPOUT) {
        const float lost = fabsf(probability) * row_delta;
        probability = fmaxf(probability, 0.0f);
        gradient = probability * gradient - lost;
      } else {
        gradient = probability * (gradient - row_delta);
      }
    }
  }
}

}  // namespace hf_flash::sm90
