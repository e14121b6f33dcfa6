// The online softmax (Milakov and Gimelshein 2018; Dao et al. 2022) of a warp's rows. It runs in base 2: a score x
// counts as x * factor in log2 units, and the subtraction of the maximum is one fused multiply-add.
#pragma once

#include <math_constants.h>

#include "tile/reduce.cuh"

namespace hf_flash {

// A row's maximum is replaced, and its output rescaled, only when a new score exceeds it by more than this many powers
// of two: until then probabilities grow to at most 2^8, far inside float16, and most tiles rescale nothing.
constexpr float kMaximumSlack = 8.0f;

// Where a tile's maxima are not asked for, its probabilities are of the maximum so far, whatever they become. A lane's
// sum of a row's tells: up to this much no probability is larger, far inside float16.
constexpr float kMostTrusted = 8192.0f;

// Stands for "nothing visible yet": finite, so that exp2(-inf - it) is 0 and never NaN, and below every finite score.
constexpr float kNothingSeen = -3.0e38f;

template <int ROWS>
struct OnlineSoftmax {
  RowVector<ROWS> max;  // reference maximum in log2 units
  RowVector<ROWS> sum;  // this lane's part of the row's sum of exponentials

  __device__ OnlineSoftmax() {
    max.fill(kNothingSeen);
    sum.fill(0.0f);
  }

  // Takes a tile's maxima, this lane's part, into account. Returns whether a maximum of the warp's rows moved; then sum
  // is rescaled, and out must be multiplied by `correction`. factor > 0.
  __device__ __forceinline__ bool raise_max(RowVector<ROWS> top, float factor, RowVector<ROWS>& correction,
                                            float slack = kMaximumSlack) {
    bool moved = false;
#pragma unroll
    for (int i = 0; i < RowVector<ROWS>::kCount; ++i) {
      top.v[i] *= factor;
      moved |= top.v[i] > max.v[i] + slack;
    }
    moved = any_lane(moved);
    if (!moved) return false;
#pragma unroll
    for (int i = 0; i < RowVector<ROWS>::kCount; ++i) {
      const float row_top = quad_max(top.v[i]);
      const float new_max = row_top > max.v[i] + slack ? row_top : max.v[i];
      correction.v[i] = exp2_fast(max.v[i] - new_max);
      max.v[i] = new_max;
      sum.v[i] *= correction.v[i];
    }
    return true;
  }

  // Is there a row of the warp that has seen nothing?
  __device__ __forceinline__ bool waits_for_first() const {
    bool waits = false;
#pragma unroll
    for (int i = 0; i < RowVector<ROWS>::kCount; ++i) waits |= max.v[i] == kNothingSeen;
    return any_lane(waits);
  }
  // The rows that have seen nothing take a tile's maxima, this lane's part; no other row changes by a bit.
  __device__ __forceinline__ void take_first_max(const RowVector<ROWS>& top, float factor) {
#pragma unroll
    for (int i = 0; i < RowVector<ROWS>::kCount; ++i) {
      const float row_top = quad_max(top.v[i] * factor);
      if (max.v[i] == kNothingSeen && row_top > kNothingSeen) max.v[i] = row_top;
    }
  }

  template <int COLS>
  __device__ __forceinline__ static void rescale(Accumulator<ROWS, COLS>& out, const RowVector<ROWS>& correction) {
#pragma unroll
    for (int i = 0; i < RowVector<ROWS>::kCount; ++i) {
#pragma unroll
      for (int n = 0; n < COLS / 8; ++n) {
        out.x[i / 2][n][2 * (i % 2)] *= correction.v[i];
        out.x[i / 2][n][2 * (i % 2) + 1] *= correction.v[i];
      }
    }
  }

  // Both at once, for kernels that may touch out right away; in one loop, which holds fewer registers.
  template <int COLS>
  __device__ __forceinline__ void update_max(RowVector<ROWS> top, Accumulator<ROWS, COLS>& out, float factor) {
    bool moved = false;
#pragma unroll
    for (int i = 0; i < RowVector<ROWS>::kCount; ++i) {
      top.v[i] *= factor;
      moved |= top.v[i] > max.v[i] + kMaximumSlack;
    }
    if (!any_lane(moved)) return;
#pragma unroll
    for (int i = 0; i < RowVector<ROWS>::kCount; ++i) {
      const float row_top = quad_max(top.v[i]);
      const float new_max = row_top > max.v[i] + kMaximumSlack ? row_top : max.v[i];
      const float correction = exp2_fast(max.v[i] - new_max);
      max.v[i] = new_max;
      sum.v[i] *= correction;
#pragma unroll
      for (int n = 0; n < COLS / 8; ++n) {
        out.x[i / 2][n][2 * (i % 2)] *= correction;
        out.x[i / 2][n][2 * (i % 2) + 1] *= correction;
      }
    }
  }

  // Scores of columns [8 first_n, 8 (first_n + count)) become probabilities (of the reference maximum), which are added
  // to `sum`.
  template <int KEYS>
  __device__ __forceinline__ void exponentiate(Accumulator<ROWS, KEYS>& s, float factor, int first_n, int count) {
    exponentiate(s, factor, first_n, count, sum);
  }
  template <int KEYS>
  __device__ __forceinline__ void exponentiate(Accumulator<ROWS, KEYS>& s, float factor, int first_n, int count,
                                               RowVector<ROWS>& sum) const {
#pragma unroll
    for (int i = 0; i < RowVector<ROWS>::kCount; ++i) {
#pragma unroll
      for (int n = first_n; n < first_n + count; ++n) {
#pragma unroll
        for (int e = 2 * (i % 2); e < 2 * (i % 2) + 2; ++e) {
          s.x[i / 2][n][e] = exp2_fast(s.x[i / 2][n][e] * factor - max.v[i]);
          sum.v[i] += s.x[i / 2][n][e];
        }
      }
    }
  }

  __device__ __forceinline__ void add(const RowVector<ROWS>& part) {
#pragma unroll
    for (int i = 0; i < RowVector<ROWS>::kCount; ++i) sum.v[i] += part.v[i];
  }

  // Ends the row's sum and takes the sink in (its logit in log2 units, -inf for none). Returns what to multiply row i
  // of the output with, 0 where nothing is visible, and sets lse (natural logarithm).
  __device__ __forceinline__ float finish(int i, float sink_log2, float& lse) const {
    const float total = quad_sum(sum.v[i]);
    const bool sees = total != 0.0f;  // true for NaN
    const float top = sees ? fmaxf(max.v[i], sink_log2) : sink_log2;
    const float own = sees ? exp2_fast(max.v[i] - top) : 0.0f;
    const float denominator = total * own + (sink_log2 == -CUDART_INF_F ? 0.0f : exp2_fast(sink_log2 - top));
    lse = denominator == 0.0f ? -CUDART_INF_F : (top + log2_fast(denominator)) * kLn2;
    return sees ? own * reciprocal_fast(denominator) : 0.0f;
  }
};

}  // namespace hf_flash
