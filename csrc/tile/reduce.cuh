// Row reductions of accumulators. A row lies in the four lanes of a quad.
#pragma once

#include "instructions/arithmetic.cuh"
#include "tile/fragment.cuh"

namespace hf_flash {

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// max takes in this lane's part of columns [8 first_n, 8 (first_n + count)); quad_max of each value completes it.
template <int ROWS, int COLS>
__device__ __forceinline__ void take_lane_max(RowVector<ROWS>& max, const Accumulator<ROWS, COLS>& s, int first_n,
                                              int count) {
#pragma unroll
  for (int i = 0; i < RowVector<ROWS>::kCount; ++i) {
    if (first_n == 0) max.v[i] = s.x[i / 2][0][2 * (i % 2)];
#pragma unroll
    for (int n = first_n; n < first_n + count; ++n) {
      max.v[i] = fmaxf(max.v[i], fmaxf(s.x[i / 2][n][2 * (i % 2)], s.x[i / 2][n][2 * (i % 2) + 1]));
    }
  }
}

template <int ROWS, int COLS>
__device__ __forceinline__ RowVector<ROWS> lane_row_sum(const Accumulator<ROWS, COLS>& s) {
  RowVector<ROWS> sum;
#pragma unroll
  for (int i = 0; i < RowVector<ROWS>::kCount; ++i) {
    sum.v[i] = 0.0f;
#pragma unroll
    for (int n = 0; n < COLS / 8; ++n) {
      sum.v[i] += s.x[i / 2][n][2 * (i % 2)] + s.x[i / 2][n][2 * (i % 2) + 1];
    }
  }
  return sum;
}

}  // namespace hf_flash
