// From raw products q.k in accumulators to scores in units of log2: scale, softcap, ALiBi, bias, bool mask; and what
// the ranges and the window hide. TRANSPOSED: the accumulator's rows are keys and its columns queries, as in the
// backward.
#pragma once

#include <math_constants.h>

#include "attention/tile_range.cuh"
#include "instructions/arithmetic.cuh"
#include "tile/fragment.cuh"

namespace hf_flash {

// Sets to -inf the columns of keys that range and mask hide. The accumulator's corner is at key j0.
template <int ROWS, int COLS>
__device__ __forceinline__ void hide_masked(Accumulator<ROWS, COLS>& s, const AttentionParams& p,
                                            const Sequence& sequence, int j0) {
#pragma unroll
  for (int k = 0; k < (COLS + 31) / 32; ++k) {
    uint32_t hidden = 0;  // bit 8 n + e: column 32 k + 8 n + e of this lane's
    if constexpr (ROWS <= 16) {
      hidden = ~seen_keys(p, sequence, j0 + 32 * k, 32) >> lane_col();
    } else {  // in fewer registers
      const uint8_t* const key_mask = sequence.key_mask(p);
#pragma unroll 1
      for (int n = 0; n < 8; ++n) {
        const int j = j0 + 32 * k + 8 * (n / 2) + lane_col() + n % 2;
        if (j < sequence.len_k && key_mask[j] == 0) hidden |= 1u << (8 * (n / 2) + n % 2);
      }
    }
#pragma unroll
    for (int n = 4 * k; n < 4 * k + 4 && n < COLS / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if ((hidden >> (8 * (n % 4) + e) & 1) == 0) continue;
#pragma unroll
        for (int r = 0; r < RowVector<ROWS>::kCount; ++r) s.x[r / 2][n][2 * (r % 2) + e] = -CUDART_INF_F;
      }
    }
  }
}

// Sets to -inf what lies outside the ranges and the window and what the mask of keys hides. The accumulator's corner is
// (query i0, key j0), relative to the sequence. Only tiles at a boundary need it. MASKED: there may be such a mask.
// seen: where rows are keys, their seen_keys(); otherwise whether the mask has holes.
template <bool TRANSPOSED, bool MASKED = true, int ROWS, int COLS>
__device__ __forceinline__ void hide_invisible(Accumulator<ROWS, COLS>& s, const AttentionParams& p,
                                               const Sequence& sequence, int i0, int j0, uint32_t seen = 0) {
  static_assert(!TRANSPOSED || ROWS <= 32);
  i0 = opaque(i0);
  j0 = opaque(j0);
#pragma unroll
  for (int r = 0; r < RowVector<ROWS>::kCount; ++r) {
    const int own = RowVector<ROWS>::row(r), row = (TRANSPOSED ? j0 : i0) + own;
    bool inside = sequence.computes(row);
    if (TRANSPOSED) inside = MASKED ? seen >> own & 1 : row >= sequence.key_begin && row < sequence.key_end;
    const KeyRange range = TRANSPOSED ? sequence.queries_of(p, row, row + 1) : sequence.keys_of(p, row, row + 1);
    const uint32_t count = inside && !range.empty() ? range.end - range.begin : 0;
    const int first = (TRANSPOSED ? i0 : j0) + lane_col() - range.begin;
#pragma unroll
    for (int n = 0; n < COLS / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (static_cast<uint32_t>(first + 8 * n + e) >= count) s.x[r / 2][n][2 * (r % 2) + e] = -CUDART_INF_F;
      }
    }
  }
  if (!TRANSPOSED && MASKED && seen != 0) hide_masked(s, p, sequence, opaque(j0));
}

// Does every query of [row_begin, row_end) see each of the KEYS keys from col_begin on? Then hide_invisible has nothing
// to do. By one thread, which may say no where it cannot tell.
template <int KEYS>
__device__ __forceinline__ bool all_visible(const AttentionParams& p, const Sequence& sequence, int row_begin,
                                            int row_end, int col_begin) {
  return row_begin >= sequence.query_begin && row_end <= sequence.query_end &&
         col_begin >= sequence.keys_of(p, row_end - 1, row_end).begin &&
         col_begin + KEYS <= sequence.keys_of(p, row_begin, row_begin + 1).end &&
         shows_all<KEYS>(sequence.key_mask(p), col_begin);
}

// Times log2 e above softmax.cuh's kNothingSeen; a power of two, so that its products with constants are exact.
constexpr float kLowestBias = -0x1p127f;

// The lowest finite numbers, which callers use to mean "hardly visible", must not become -inf.
__device__ __forceinline__ float bias_to_log2(float bias) {
  return bias == -CUDART_INF_F ? bias : fmaxf(bias, kLowestBias) * kLog2E;
}
__device__ __forceinline__ float bias_to_log2(BFloat16 bias) { return bias_to_log2(to_float(bias)); }
__device__ __forceinline__ float bias_to_log2(Half bias) { return to_float(bias) * kLog2E; }  // none of them overflows

// The terms that most calls do without. EVERY: all of them; otherwise ALiBi alone.
template <class T, bool TRANSPOSED, bool EVERY = true>
struct ScoreExtras {
  const AttentionParams& p;
  const char* bias;             // of this batch and head; null: none
  const uint8_t* mask;          // TRANSPOSED: but for a mask of keys, which hide_invisible() knows
  float slope;                  // ALiBi, times log2 e; 0: none
  bool bias_pairs, mask_pairs;  // two neighbouring keys lie aligned side by side

  __device__ ScoreExtras(const AttentionParams& p, int b, int h) : p(p), bias(nullptr), mask(nullptr), slope(0) {
    bias_pairs = mask_pairs = false;
    if (EVERY && p.bias.data != nullptr) {
      const int size = p.bias.dtype == DType::kFloat32 ? 4 : 2;
      bias = static_cast<const char*>(p.bias.data) + size * (b * p.bias.batch + h * p.bias.head);
      bias_pairs = pairs(bias, p.bias, 2 * size);
    }
    const void* const hides = !TRANSPOSED && p.key_mask != nullptr ? p.key_mask : p.mask.data;
    if (EVERY && hides != nullptr) {
      mask = static_cast<const uint8_t*>(hides) + b * p.mask.batch + h * p.mask.head;
      mask_pairs = pairs(mask, p.mask, 2);
    }
    if (p.alibi_slopes != nullptr) slope = p.alibi_slopes[b * p.alibi_batch_stride + h] * kLog2E;
  }

  __device__ static bool pairs(const void* first, const Scores& s, int bytes) {
    return !TRANSPOSED && s.col == 1 && s.row % 2 == 0 && reinterpret_cast<uintptr_t>(first) % bytes == 0;
  }

  // Raw products to scores in log2 units, the softcap included. First step.
  template <int ROWS, int COLS>
  __device__ __forceinline__ void scale_and_cap(Accumulator<ROWS, COLS>& s) const {
    if (!EVERY || p.softcap == 0) {
      const float scale = static_cast<float>(p.scale) * kLog2E;
      s.for_each([&](float& x, int, int) { x *= scale; });
    } else {
      const float inner = static_cast<float>(p.scale / p.softcap);
      const float outer = static_cast<float>(p.softcap) * kLog2E;
      s.for_each([&](float& x, int, int) { x = outer * tanh_fast(x * inner); });
    }
  }

  // Second: adds ALiBi and bias and hides what the bool mask hides.
  template <int ROWS, int COLS>
  __device__ __forceinline__ void add(Accumulator<ROWS, COLS>& s, const Sequence& sequence, int i0, int j0) const {
    if (slope != 0) add_alibi(s, i0 + sequence.offset - j0);
    if (EVERY && bias != nullptr) {
      if (p.bias.dtype == DType::kFloat32) {
        add_bias<float>(s, sequence, i0, j0);
      } else {
        add_bias<T>(s, sequence, i0, j0);
      }
    }
    if (EVERY && mask != nullptr) hide_masked(s, sequence, i0, j0);
  }

 private:
  // distance: position(i0) - j0. Positions below 2^24 are exact in float32.
  template <int ROWS, int COLS>
  __device__ __forceinline__ void add_alibi(Accumulator<ROWS, COLS>& s, int distance) const {
    const int lane = TRANSPOSED ? lane_col() - lane_row() : lane_row() - lane_col();
    const float corner = static_cast<float>(distance + lane);
#pragma unroll
    for (int m = 0; m < ROWS / 16; ++m) {
#pragma unroll
      for (int n = 0; n < COLS / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int step = 16 * m + 8 * (e / 2) - 8 * n - e % 2;
          s.x[m][n][e] -= slope * fabsf(corner + (TRANSPOSED ? -step : step));
        }
      }
    }
  }

  template <class B, int ROWS, int COLS>
  __device__ __forceinline__ void add_bias(Accumulator<ROWS, COLS>& s, const Sequence& sequence, int i0, int j0) const {
    if (bias_pairs && j0 + COLS <= sequence.len_k) {
      struct alignas(2 * sizeof(B)) Pair {
        B low, high;
      };
      for_each_pair(s, sequence, i0, [&](float& low, float& high, int i, int col) {
        const Pair pair =
            *reinterpret_cast<const Pair*>(reinterpret_cast<const B*>(bias) + i * p.bias.row + (j0 + col));
        low += bias_to_log2(pair.low);
        high += bias_to_log2(pair.high);
      });
    } else {
      for_each_element(s, sequence, i0, j0, [&](float& x, int i, int j) {
        x += bias_to_log2(reinterpret_cast<const B*>(bias)[i * p.bias.row + j * p.bias.col]);
      });
    }
  }

  template <int ROWS, int COLS>
  __device__ __forceinline__ void hide_masked(Accumulator<ROWS, COLS>& s, const Sequence& sequence, int i0,
                                              int j0) const {
    if (mask_pairs && j0 + COLS <= sequence.len_k) {
      for_each_pair(s, sequence, i0, [&](float& low, float& high, int i, int col) {
        const uint16_t pair = *reinterpret_cast<const uint16_t*>(mask + i * p.mask.row + (j0 + col));
        low = (pair & 0xFF) != 0 ? low : -CUDART_INF_F;
        high = pair > 0xFF ? high : -CUDART_INF_F;
      });
    } else {
      for_each_element(s, sequence, i0, j0, [&](float& x, int i, int j) {
        x = mask[i * p.mask.row + j * p.mask.col] != 0 ? x : -CUDART_INF_F;
      });
    }
  }

  // f(x(i, j), x(i, j + 1), i, j - j0), plain orientation, tile inside [0, len_k).
  template <int ROWS, int COLS, class F>
  __device__ static __forceinline__ void for_each_pair(Accumulator<ROWS, COLS>& s, const Sequence& sequence, int i0,
                                                       F f) {
#pragma unroll
    for (int r = 0; r < RowVector<ROWS>::kCount; ++r) {
      const int i = min(i0 + RowVector<ROWS>::row(r), sequence.len_q - 1);
#pragma unroll
      for (int n = 0; n < COLS / 8; ++n) {
        float (&x)[4] = s.x[r / 2][n];
        f(x[2 * (r % 2)], x[2 * (r % 2) + 1], i, 8 * n + lane_col());
      }
    }
  }

  // f(x(i, j), i, j) with i and j clamped into the sequence: what lies outside is hidden later.
  template <int ROWS, int COLS, class F>
  __device__ static __forceinline__ void for_each_element(Accumulator<ROWS, COLS>& s, const Sequence& sequence, int i0,
                                                          int j0, F f) {
    s.for_each([&](float& x, int row, int col) {
      const int i = i0 + (TRANSPOSED ? col : row), j = j0 + (TRANSPOSED ? row : col);
      f(x, min(i, sequence.len_q - 1), min(j, sequence.len_k - 1));
    });
  }
};

}  // namespace hf_flash
