// Tiles brought by TMA, and what a producer does about rows that must not be seen.
#pragma once

#include "instructions/tma.cuh"
#include "sm90/tensor_map.h"
#include "tile/swizzled_tile.cuh"

namespace hf_flash::sm90 {

// Starts the copy of a tile, from a row and a column on, one box for each 64 columns.
template <class Tile>
__device__ __forceinline__ void load_tile(uint32_t tile, const CUtensorMap& map, uint32_t barrier, int row, int head,
                                          int batch, int column = 0) {
#pragma unroll 1  // the producers' registers are few
  for (int block = 0; block < Tile::kBlocks; ++block)
    tma_load_4d(tile + block * Tile::kBlockBytes, &map, barrier, column + 64 * block, row, head, batch);
}

// A warp zeroes the rows of a tile outside [begin, end).
template <class Tile>
__device__ __forceinline__ void zero_rows_outside(uint32_t tile, int begin, int end) {
  for (int n = threadIdx.x % 32; n < Tile::kBytes / 16; n += 32) {
    const int row = n / 8 % Tile::kRows;
    if (row < begin || row >= end) store_shared_16_bytes(tile + 16 * n, uint4{0, 0, 0, 0});
  }
}

}  // namespace hf_flash::sm90
