// Accumulators straight from registers to rows in global memory: the four lanes of a quad swap what they hold, so that
// each writes 16 neighbouring bytes, or as they are. No shared memory, no barrier, and any row may be the last.
#pragma once

#include "tile/fragment.cuh"

namespace hf_flash {

// Four lanes hold a 4 x 4 matrix, lane t its column t; afterwards lane t holds row t.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4], int t) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
#pragma unroll
    for (int low = 0; low < 4; ++low) {
      if (low & step) continue;
      const bool upper = t & step;
      const uint32_t sent = upper ? x[low] : x[low | step];
      const uint32_t got = __shfl_xor_sync(0xffffffffu, sent, step);
      (upper ? x[low] : x[low | step]) = got;
    }
  }
}

// Rounds to T and writes rows [row_begin, row_end) of a warp's 16 rows and columns below head_dim; `rows` points at the
// warp's row 0, row_elements is the stride of a row. t: the lane of the quad, from callers that keep the compiler from
// working ahead with it.
template <class T, int COLS>
__device__ __forceinline__ void store_fragment(void* rows, int64_t row_elements, int head_dim,
                                               const Accumulator<16, COLS>& c, int row_begin, int row_end,
                                               int t = threadIdx.x % 4) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane_row() + 8 * r;
    const bool inside = row >= row_begin && row < row_end;
    char* to = static_cast<char*>(rows) + 2 * (row * row_elements + 8 * t);
#pragma unroll
    for (int n = 0; n < COLS / 8; n += 4) {
      uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = pack<T>(c.x[0][n + i][2 * r], c.x[0][n + i][2 * r + 1]);
      transpose_quad(x, t);
      if (inside && 8 * (n + t) < head_dim) store_global_16_bytes(to + 16 * n, uint4{x[0], x[1], x[2], x[3]});
    }
  }
}

// Rounds to B, which may be float, and writes rows before row_end and columns before col_end, both counted from the
// accumulator's corner, where `corner` points. Columns lie side by side; neither they nor rows need be aligned.
template <class B, int ROWS, int COLS>
__device__ __forceinline__ void store_pairs(B* corner, int64_t row_elements, const Accumulator<ROWS, COLS>& c,
                                            int row_end, int col_end) {
  struct alignas(2 * sizeof(B)) Pair {
    B x[2];
  };
  const bool aligned = row_elements % 2 == 0 && reinterpret_cast<uintptr_t>(corner) % sizeof(Pair) == 0;
#pragma unroll
  for (int r = 0; r < RowVector<ROWS>::kCount; ++r) {
    const int row = RowVector<ROWS>::row(r);
    if (row >= row_end) continue;
    B* const to = corner + row * row_elements;
#pragma unroll
    for (int n = 0; n < COLS / 8; ++n) {
      const int col = 8 * n + lane_col();
      Pair pair;
      round_to(c.x[r / 2][n][2 * (r % 2)], pair.x[0]);
      round_to(c.x[r / 2][n][2 * (r % 2) + 1], pair.x[1]);
      if (aligned && col + 1 < col_end) {
        *reinterpret_cast<Pair*>(to + col) = pair;
      } else {
        if (col < col_end) to[col] = pair.x[0];
        if (col + 1 < col_end) to[col + 1] = pair.x[1];
      }
    }
  }
}

}  // namespace hf_flash
