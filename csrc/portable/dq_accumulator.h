// Where a backward kernel sums dQ in float32 before it is converted: tiles of 64 or 80 rows and head_dim columns, in
// the order of m16n8 tensor-core accumulators, so that a warp adds 512 neighbouring bytes at a time. Every sequence of
// a packed batch starts a tile of its own. Behind the tiles stand counters of the additions: of the turns of a fixed
// order, which the deterministic mode has and kernels whose last addition to a tile writes dq itself, and of kernels
// whose first addition stores, so that the tiles need not be zeroed.
#pragma once

#include <cstdint>

#include "attention/sequence.h"

namespace hf_flash {

template <int TILE_ROWS>
struct DqAccumulatorOf {
  static constexpr int kTileRows = TILE_ROWS;
  // No product has 80 rows of dQ: such a tile holds dQ transposed, whole as one kernel's products leave it.
  static constexpr bool kTransposed = TILE_ROWS % 64 != 0;
  static constexpr int kCounters = 2;  // a tile: one for each 32 rows, the shortest query tile of a kernel

  float* data = nullptr;        // tiles of kTileRows * columns
  int32_t* counters = nullptr;  // kCounters for each tile; null where nobody counts
  int64_t batch_tiles = 0;      // tiles from one sequence to the next; 0 when packed
  int64_t head_tiles = 0;       // tiles from one query head to the next
  int32_t columns = 0;          // head_dim rounded up to what the kernel computes, a multiple of 32
  bool packed = false;
  // The last turn writes dq, of rows that are computed and see keys; the kernel of the row sums writes zeros to the
  // other rows of dq.
  bool finishes_dq = false;
  // The first addition to a query tile, of so many rows, stores, and nobody has to zero the tiles; those that nothing
  // was added to have no sums. 0: they are zeroed before, and the additions just add.
  int32_t stored_rows = 0;
  bool ordered = false;                        // the additions are
  static constexpr int32_t kStored = 1 << 24;  // more than there are key tiles

  DqAccumulatorOf() = default;
  DqAccumulatorOf(const AttentionParams& p, void* workspace, int32_t columns, bool finishes_dq = false,
                  int32_t stored_rows = 0)
      : data(static_cast<float*>(workspace)),
        columns(columns),
        packed(p.packed()),
        finishes_dq(finishes_dq),
        stored_rows(stored_rows),
        ordered(p.deterministic || finishes_dq) {
    head_tiles = packed ? p.total_q / kTileRows + p.batch + 1 : (p.seqlen_q + kTileRows - 1) / kTileRows;
    batch_tiles = packed ? 0 : head_tiles * p.heads_q;
    if (counts()) counters = reinterpret_cast<int32_t*>(data + tiles(p) * kTileRows * columns);
  }

  HF_FLASH_HOST_DEVICE bool stores_first() const { return stored_rows > 0; }
  bool counts() const { return ordered || stores_first(); }
  int64_t tiles(const AttentionParams& p) const { return head_tiles * p.heads_q * (packed ? 1 : p.batch); }
  int64_t bytes(const AttentionParams& p) const {
    return tiles(p) * 4 * (int64_t{kTileRows} * columns + (counts() ? kCounters : 0));
  }

  HF_FLASH_HOST_DEVICE int64_t tile(const Sequence& sequence, int32_t b, int32_t head, int32_t row) const {
    const int64_t first = packed ? sequence.first_q / kTileRows + b : 0;
    return b * batch_tiles + head * head_tiles + first + row / kTileRows;
  }

  // The 16 rows from `row` (a multiple of 16; of the tile's rows, where it is transposed) on of sequence b.
  HF_FLASH_HOST_DEVICE float* rows(const Sequence& sequence, int32_t b, int32_t head, int32_t row) const {
    return data + (tile(sequence, b, head, row) * kTileRows + row % kTileRows) * columns;
  }

  // How many key tiles have added to the rows from `row` (a multiple of 32) on; or how many have come, plus kStored
  // once the first one's sums are there.
  HF_FLASH_HOST_DEVICE int32_t* counter(const Sequence& sequence, int32_t b, int32_t head, int32_t row) const {
    return counters + tile(sequence, b, head, row) * kCounters + row % kTileRows / 32;
  }

  // Are there sums of the rows from `row` on?
  HF_FLASH_HOST_DEVICE bool has_sums(const Sequence& sequence, int32_t b, int32_t head, int32_t row) const {
    return !stores_first() || *counter(sequence, b, head, row / stored_rows * stored_rows) != 0;
  }

#ifdef __CUDACC__
  // Where a lane's element e = 0 .. 3 of the m16n8 block with first column 8 * block lies within its 16 rows. e = 0, 1
  // stand at row lane / 4, columns 2 (lane % 4) + {0, 1}, e = 2, 3 at the same columns of row lane / 4 + 8. One red
  // instruction adds all four where the architecture has vectors of them, otherwise it adds the same e of all lanes.
  __device__ static int32_t element(int32_t block, int32_t lane, int32_t e) {
#if __CUDA_ARCH__ >= 900
    return block * 128 + lane * 4 + e;
#else
    return block * 128 + e * 32 + lane;
#endif
  }
  // The same of a transposed tile, whose m16n8 blocks have 16 columns of dQ as rows and 8 of its rows as columns.
  __device__ static int32_t transposed_element(int32_t column_block, int32_t row_block, int32_t lane, int32_t e) {
    return element(column_block * (TILE_ROWS / 8) + row_block, lane, e);
  }
#endif
};

using DqAccumulator = DqAccumulatorOf<64>;
using TallDqAccumulator = DqAccumulatorOf<80>;

}  // namespace hf_flash
