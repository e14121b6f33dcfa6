// A tile of ROWS x COLS 16-bit elements in shared memory, its 16-byte chunks permuted within each row so that the eight
// rows that one ldmatrix reads, and the chunks that one cp.async warp writes, fall into different banks.
#pragma once

#include "instructions/arithmetic.cuh"
#include "instructions/shared_memory.cuh"

namespace hf_flash {

template <int ROWS, int COLS>
struct SharedTile {
  static_assert(ROWS % 16 == 0 && COLS % 32 == 0);
  static constexpr int kRows = ROWS;
  static constexpr int kCols = COLS;
  static constexpr int kRowBytes = 2 * COLS;
  static constexpr int kBytes = ROWS * kRowBytes;
  static constexpr int kChunks = COLS / 8;  // 16-byte chunks a row
  // Rows of 128 bytes repeat the banks every row: permute 8 chunks. Rows of 64 (or 192) bytes cover half the banks
  // alternately: permute 4 chunks, by the pair of rows.
  static constexpr int kPermuted = COLS % 64 == 0 ? 8 : 4;

  __device__ static constexpr int offset(int row, int chunk) {
    const int key = kPermuted == 8 ? row & 7 : (row >> 1) & 3;
    return row * kRowBytes + ((chunk ^ key) << 4);
  }
};

// The order in which ldmatrix x4 brings the quarters of a 16 x 16 block. mma wants neighbouring registers for its
// operands: the wrong order costs a move a register.
//   kDown:   x[0] rows 0-7 cols 0-7, x[1] rows 8-15 cols 0-7, x[2] rows 0-7 cols 8-15, x[3] rows 8-15 cols 8-15
//   kAcross: x[1] and x[2] the other way round.
// Each quarter may be transposed in itself. kDown serves A stored as it is and B stored transposed (depth in the rows);
// kAcross serves B stored as it is (depth in the columns) and A stored transposed.
enum class Order { kDown, kAcross };

struct Block16 {
  uint32_t x[4];
};

// This lane's addresses into a tile. The permutation repeats every kPermuted chunks and every 8 rows, so two or four
// registers reach every block; the rest is an immediate of the instruction.
template <class Tile, Order ORDER>
struct BlockReader {
  static constexpr int kPeriod = Tile::kPermuted / 2;  // blocks
  uint32_t base[kPeriod];

  BlockReader() = default;
  // tile: shared address of the tile (128-byte aligned), first_row a multiple of 16; column blocks count from
  // first_block.
  __device__ explicit BlockReader(uint32_t tile, int first_row = 0, int first_block = 0) {
    const int lane = threadIdx.x % 32, low = lane / 8 % 2, high = lane / 16;
    const int row = lane % 8 + 8 * (ORDER == Order::kDown ? low : high), chunk = ORDER == Order::kDown ? high : low;
#pragma unroll
    for (int i = 0; i < kPeriod; ++i) {
      base[i] = tile + first_row * Tile::kRowBytes + Tile::offset(row, 2 * (first_block + i) + chunk);
    }
  }

  // A reader that begins at block 0, from its first register alone: what a kernel keeps while registers are short.
  __device__ __forceinline__ static BlockReader from(uint32_t first) {
    static_assert(Tile::kRowBytes % 128 == 0);
    BlockReader reader;
    first = opaque(first);
#pragma unroll
    for (int i = 0; i < kPeriod; ++i) reader.base[i] = first ^ (32 * i);
    return reader;
  }

  // Goes to another tile, bytes further on.
  __device__ __forceinline__ void advance(int bytes) {
#pragma unroll
    for (int i = 0; i < kPeriod; ++i) base[i] = opaque(base[i] + bytes);  // one addition, not one a block
  }

  // row_block and col_block count blocks of 16; bytes is the way to another tile.
  __device__ __forceinline__ uint32_t address(int row_block, int col_block, uint32_t bytes = 0) const {
    return base[col_block % kPeriod] + bytes + row_block * 16 * Tile::kRowBytes + (col_block / kPeriod) * kPeriod * 32;
  }
  __device__ __forceinline__ Block16 load(int row_block, int col_block, uint32_t bytes = 0) const {
    Block16 block;
    ldmatrix_x4(block.x, address(row_block, col_block, bytes));
    return block;
  }
  __device__ __forceinline__ Block16 load_transposed(int row_block, int col_block, uint32_t bytes = 0) const {
    Block16 block;
    ldmatrix_x4_transposed(block.x, address(row_block, col_block, bytes));
    return block;
  }
};

}  // namespace hf_flash
