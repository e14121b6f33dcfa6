// Tiles in shared memory as TMA writes them and wgmma reads them: blocks of 64 columns (128 bytes), one block after the
// other; within a block each group of eight rows is 1024 bytes, its 16-byte chunks permuted (the 128-byte swizzle).
#pragma once

#include "instructions/arithmetic.cuh"
#include "instructions/wgmma.cuh"
#include "tile/fragment.cuh"

namespace hf_flash {

template <int ROWS, int COLS>
struct SwizzledTile {
  static_assert(ROWS % 8 == 0);
  static constexpr int kRows = ROWS;
  static constexpr int kCols = COLS;
  static constexpr int kBlocks = (COLS + 63) / 64;
  static constexpr int kBlockBytes = ROWS * 128;
  static constexpr int kBytes = kBlocks * kBlockBytes;

  // Byte of the 16-byte chunk (8 columns) of a row.
  __device__ static constexpr int offset(int row, int chunk) {
    return chunk / 8 * kBlockBytes + row * 128 + (((chunk ^ row) & 7) << 4);
  }

  // The lower word of wgmma's descriptor of a tile at a shared address that is a multiple of 1024; the address's upper
  // bits, which tell the CTA of a cluster, are no part of it. Leading: between blocks of 64 columns, read only where
  // the columns are the operand's rows. wgmma wants it in uniform registers. MOVED there: where ptxas does not see that
  // it is uniform it moves one descriptor after the other, which took half of the instructions. The move waits behind
  // what the warp has in the queue to shared memory, products too.
  template <bool MOVED = true>
  __device__ static uint32_t descriptor(uint32_t address) {
    if (kBlocks > 1) address &= 0x3FFFF;
    const uint32_t lower = uint32_t{kBlockBytes / 16 << 16} | address >> 4;
    return MOVED ? uniform(lower) : lower;
  }

  // Steps of 16 along the depth, to be added to a descriptor: across the columns where the tile's rows are the
  // operand's rows, down the rows where its columns are.
  __device__ static constexpr uint32_t across(int k) { return (k / 4 * kBlockBytes + k % 4 * 32) / 16; }
  __device__ static constexpr uint32_t down(int k) { return k * 16 * 128 / 16; }
};

// Accumulators and operands of a warp seen as the registers of one wgmma; a warpgroup has 64 rows, a warp 16 of them.
template <int COLS>
__device__ __forceinline__ float (&wgmma_registers(Accumulator<16, COLS>& c))
    [COLS / 2] { return reinterpret_cast<float (&)[COLS / 2]>(c.x); }

template <int COLS>
__device__ __forceinline__ void wgmma_settle(Accumulator<16, COLS>& c) {
#pragma unroll
  for (int i = 0; i < COLS / 2; ++i) wgmma_settle(wgmma_registers(c)[i]);
}
template <int COLS>
__device__ __forceinline__ void wgmma_forget(Accumulator<16, COLS>& c) {
#pragma unroll
  for (int i = 0; i < COLS / 2; ++i) wgmma_forget(wgmma_registers(c)[i]);
}

// c = A B^T (+ c): A's tile from row 0 of descriptor a on, B's tile has c's columns as rows; DEPTH columns of both.
template <class T, int DEPTH, class TileA, class TileB, int COLS>
__device__ __forceinline__ void start_multiply_by_transpose(Accumulator<16, COLS>& c, uint32_t a, uint32_t b) {
#pragma unroll
  for (int k = 0; k < DEPTH / 16; ++k) {
    wgmma_ss<T, COLS, 0, 0>(wgmma_registers(c), a + TileA::across(k), b + TileB::across(k), k > 0);
  }
}

// c += A B with A in registers: B's tile has the depth as rows.
template <class T, class TileB, int COLS, int DEPTH>
__device__ __forceinline__ void start_multiply(Accumulator<16, COLS>& c, const OperandA<16, DEPTH>& a, uint32_t b,
                                               bool accumulate = true) {
#pragma unroll
  for (int k = 0; k < DEPTH / 16; ++k) {
    wgmma_rs<T, COLS, 1>(wgmma_registers(c), a.x[0][k], b + TileB::down(k), accumulate || k > 0);
  }
}

}  // namespace hf_flash
