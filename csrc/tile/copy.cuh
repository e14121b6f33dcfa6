// Tiles between global and shared memory, 16 bytes a thread and step.
#pragma once

#include "instructions/arithmetic.cuh"
#include "instructions/element.cuh"
#include "tile/fragment.cuh"
#include "tile/shared_tile.cuh"

namespace hf_flash {

// The rows of one head of q, k, v or dout as a CTA of THREADS threads reads or writes them, tile by tile.
template <class Tile, int THREADS>
struct TileCopy {
  // A row is covered in groups of a power of two of chunks: 4 for 96 columns, 8 for 192, at most 16.
  static constexpr int kPowerOfTwo = Tile::kChunks & -Tile::kChunks;
  static constexpr int kGroup = kPowerOfTwo < 16 ? kPowerOfTwo : 16;
  static constexpr int kGroups = Tile::kChunks / kGroup;
  static constexpr int kRowStep = THREADS / kGroup;
  // A thread keeps its chunk, and its row modulo 8: one permuted address serves all its copies.
  static_assert(THREADS % kGroup == 0 && kRowStep % 8 == 0 && kGroup % Tile::kPermuted == 0);
  static constexpr int kSteps = (Tile::kRows + kRowStep - 1) / kRowStep;

  const char* head;    // the sequence's first row at this head: the same in all threads
  int64_t row_stride;  // bytes
  int row_bytes;       // 2 D

  // row_elements: stride of a row; head_dim: D or Dv.
  __device__ TileCopy(const void* head, int64_t row_elements, int head_dim)
      : head(static_cast<const char*>(head)), row_stride(2 * row_elements), row_bytes(2 * head_dim) {}

  // Starts copying rows [first_row, first_row + kRows) into the tile at shared address `tile`. Rows outside
  // [begin, end) and columns past the head dimension become zeros and are not read: 0 * NaN must never arise.
  // Each thread finds its place anew, a dozen instructions a tile: kept, it would cost registers all along.
  __device__ __forceinline__ void start_load(uint32_t tile, int first_row, int begin, int end) const {
    const uint32_t thread = opaque(threadIdx.x), row = thread / kGroup, chunk = thread % kGroup;
    const char* source = head + (first_row + row) * static_cast<uint64_t>(row_stride) + 16 * chunk;
    const int columns = row_bytes - 16 * static_cast<int>(chunk);
    const uint32_t count = end - begin;
    tile += Tile::offset(row, chunk);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (Tile::kRows % kRowStep != 0 && row + i * kRowStep >= Tile::kRows) break;
      const bool inside = static_cast<uint32_t>(first_row + row + i * kRowStep - begin) < count;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int bytes = inside && g * kGroup * 16 < columns ? 16 : 0;
        copy_async_16_bytes(tile + i * kRowStep * Tile::kRowBytes + g * kGroup * 16, source + g * kGroup * 16, bytes);
      }
      source += kRowStep * row_stride;
    }
  }
};

// Writes accumulators, rounded to T, into a tile: rows from first_row (a multiple of 16) on.
template <class T, class Tile, int ROWS, int COLS>
__device__ __forceinline__ void store_to_tile(uint32_t tile, int first_row, const Accumulator<ROWS, COLS>& c,
                                              int first_col = 0) {
#pragma unroll
  for (int m = 0; m < ROWS / 16; ++m) {
#pragma unroll
    for (int n = 0; n < COLS / 8; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first_row + 16 * m + 8 * r + lane_row();
        store_shared(tile + Tile::offset(row, first_col / 8 + n) + 2 * lane_col(),
                     pack<T>(c.x[m][n][2 * r], c.x[m][n][2 * r + 1]));
      }
    }
  }
}

// A warp writes rows [first_row, first_row + ROWS) of the tile to global memory, 16 bytes a lane; `global` points at
// the tile's row 0, row_elements is the stride of a row. Rows at or past end_row and columns past head_dim stay
// unwritten.
template <int ROWS, class Tile>
__device__ __forceinline__ void store_rows(void* global, int64_t row_elements, int head_dim, uint32_t tile,
                                           int first_row, int end_row) {
  constexpr int kTotal = ROWS * Tile::kChunks;
#pragma unroll
  for (int i = 0; i < kTotal / 32; ++i) {
    const int index = 32 * i + threadIdx.x % 32;
    const int row = first_row + index / Tile::kChunks, chunk = index % Tile::kChunks;
    if (row < end_row && 8 * chunk < head_dim) {
      *reinterpret_cast<uint4*>(static_cast<char*>(global) + 2 * (row * row_elements + 8 * chunk)) =
          load_shared_16_bytes(tile + Tile::offset(row, chunk));
    }
  }
}

}  // namespace hf_flash
