// Matrix products of a warp, one depth block of 16 at a time, so that a kernel can weave other work between them.
#pragma once

#include "tile/fragment.cuh"

namespace hf_flash {

// c[:, columns of n_block ..] += A[:, depth block `slot`] * tile[rows, depth block k]^T. The tile's rows are c's
// columns (Q K^T: the tile is K). BLOCKS blocks of 16 columns starting at c's block c_block and the tile's row block
// row_block.
template <class T, int BLOCKS, int ROWS, int COLS, int DEPTH, class Tile>
__device__ __forceinline__ void multiply_by_transpose(Accumulator<ROWS, COLS>& c, int c_block,
                                                      const OperandA<ROWS, DEPTH>& a, int slot,
                                                      const BlockReader<Tile, Order::kAcross>& tile, int row_block,
                                                      int k, uint32_t bytes = 0) {
#pragma unroll
  for (int n = 0; n < BLOCKS; ++n) {
    const Block16 b = tile.load(row_block + n, k, bytes);
#pragma unroll
    for (int m = 0; m < ROWS / 16; ++m) {
      mma_m16n8k16<T>(c.x[m][2 * (c_block + n)], a.x[m][slot], b.x[0], b.x[1]);
      mma_m16n8k16<T>(c.x[m][2 * (c_block + n) + 1], a.x[m][slot], b.x[2], b.x[3]);
    }
  }
}

// c[:, columns of c_block ..] += A[:, depth block `slot`] * tile[depth block k, columns]. The tile's rows are the depth
// (P V: the tile is V). BLOCKS blocks of 16 columns starting at c's block c_block and the tile's column block
// col_block.
template <class T, int BLOCKS, int ROWS, int COLS, int DEPTH, class Tile>
__device__ __forceinline__ void multiply(Accumulator<ROWS, COLS>& c, int c_block, const OperandA<ROWS, DEPTH>& a,
                                         int slot, const BlockReader<Tile, Order::kDown>& tile, int k, int col_block,
                                         uint32_t bytes = 0) {
#pragma unroll
  for (int n = 0; n < BLOCKS; ++n) {
    const Block16 b = tile.load_transposed(k, col_block + n, bytes);
#pragma unroll
    for (int m = 0; m < ROWS / 16; ++m) {
      mma_m16n8k16<T>(c.x[m][2 * (c_block + n)], a.x[m][slot], b.x[0], b.x[1]);
      mma_m16n8k16<T>(c.x[m][2 * (c_block + n) + 1], a.x[m][slot], b.x[2], b.x[3]);
    }
  }
}

}  // namespace hf_flash
