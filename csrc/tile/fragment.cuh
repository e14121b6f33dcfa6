// A warp's share of a matrix in registers, in the layouts of mma.m16n8k16.
#pragma once

#include "instructions/mma.cuh"
#include "tile/shared_tile.cuh"

namespace hf_flash {

__device__ __forceinline__ int lane_row() { return (threadIdx.x % 32) / 4; }  // g: first row this lane holds
__device__ __forceinline__ int lane_col() { return 2 * (threadIdx.x % 4); }   // 2t: first column

// ROWS x COLS float32 accumulators. Element x[m][n][e] stands at row 16 m + g + 8 (e / 2), column 8 n + 2 t + e % 2.
template <int ROWS, int COLS>
struct Accumulator {
  static constexpr int kRows = ROWS;
  static constexpr int kCols = COLS;
  static constexpr int kM = ROWS / 16;
  static constexpr int kN = COLS / 8;
  float x[kM][kN][4];

  __device__ void clear() {
    for_each([](float& value, int, int) { value = 0.0f; });
  }

  // f(value, row, col), row and col counted from the tile's corner.
  template <class F>
  __device__ __forceinline__ void for_each(F f) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) f(x[m][n][e], 16 * m + lane_row() + 8 * (e / 2), 8 * n + lane_col() + e % 2);
      }
    }
  }
};

// One value for each row that a lane holds part of: v[2 m + r] belongs to row 16 m + g + 8 r.
template <int ROWS>
struct RowVector {
  static constexpr int kCount = ROWS / 8;
  float v[kCount];

  // Row of v[i], counted from the tile's corner.
  __device__ static int row(int i) { return 16 * (i / 2) + lane_row() + 8 * (i % 2); }
  __device__ void fill(float value) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = value;
  }
};

// The A operand of a product: ROWS x DEPTH, DEPTH a multiple of 16.
template <int ROWS, int DEPTH>
struct OperandA {
  static constexpr int kM = ROWS / 16;
  static constexpr int kK = DEPTH / 16;
  uint32_t x[kM][kK][4];
};

// A operand from accumulators rounded to T: the layouts agree, no lane moves anything.
template <class T, int ROWS, int DEPTH, int COLS>
__device__ __forceinline__ void to_operand(OperandA<ROWS, DEPTH>& a, const Accumulator<ROWS, COLS>& s,
                                           int first_block) {
#pragma unroll
  for (int m = 0; m < ROWS / 16; ++m) {
#pragma unroll
    for (int k = 0; k < DEPTH / 16; ++k) {
      const int n = 2 * (first_block + k);
      a.x[m][k][0] = pack<T>(s.x[m][n][0], s.x[m][n][1]);
      a.x[m][k][1] = pack<T>(s.x[m][n][2], s.x[m][n][3]);
      a.x[m][k][2] = pack<T>(s.x[m][n + 1][0], s.x[m][n + 1][1]);
      a.x[m][k][3] = pack<T>(s.x[m][n + 1][2], s.x[m][n + 1][3]);
    }
  }
}

// A operand from a tile that stores A: rows are A's rows. Column block k of the tile becomes a.x[.][slot].
template <int ROWS, int DEPTH, class Tile>
__device__ __forceinline__ void load_operand(OperandA<ROWS, DEPTH>& a, int slot,
                                             const BlockReader<Tile, Order::kDown>& tile, int k, uint32_t bytes = 0) {
#pragma unroll
  for (int m = 0; m < ROWS / 16; ++m) ldmatrix_x4(a.x[m][slot], tile.address(m, k, bytes));
}

// A operand from a tile that stores A transposed: the tile's rows are A's columns. col_block is the tile's column block
// where A's rows start, k its row block.
template <int ROWS, int DEPTH, class Tile>
__device__ __forceinline__ void load_operand_transposed(OperandA<ROWS, DEPTH>& a, int slot,
                                                        const BlockReader<Tile, Order::kAcross>& tile, int k,
                                                        int col_block, uint32_t bytes = 0) {
#pragma unroll
  for (int m = 0; m < ROWS / 16; ++m) ldmatrix_x4_transposed(a.x[m][slot], tile.address(k, col_block + m, bytes));
}

}  // namespace hf_flash
