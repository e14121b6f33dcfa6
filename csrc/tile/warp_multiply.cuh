// A product of two tiles that TMA has brought, by a single warp: for what happens too rarely to hold up a warpgroup.
#pragma once

#include "instructions/shared_memory.cuh"
#include "tile/fragment.cuh"
#include "tile/swizzled_tile.cuh"

namespace hf_flash {

// c = A B^T: the 16 rows of A's tile from `row_a` on, those of B's from `row_b` on; DEPTH columns of both. a, b: shared
// addresses.
template <class T, int DEPTH, class TileA, class TileB, int COLS>
__device__ __forceinline__ void multiply_by_transpose(Accumulator<16, COLS>& c, uint32_t a, int row_a, uint32_t b,
                                                      int row_b) {
  const int lane = opaque(threadIdx.x % 32);
  c.clear();
#pragma unroll 1
  for (int k = 0; k < DEPTH / 16; ++k) {
    uint32_t x[4];
    ldmatrix_x4(x, a + TileA::offset(row_a + lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int n = 0; n < COLS / 16; ++n) {
      uint32_t y[4];
      ldmatrix_x4(y, b + TileB::offset(row_b + 16 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
      mma_m16n8k16<T>(c.x[0][2 * n], x, y[0], y[1]);
      mma_m16n8k16<T>(c.x[0][2 * n + 1], x, y[2], y[3]);
    }
  }
}

}  // namespace hf_flash
