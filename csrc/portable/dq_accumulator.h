// Where a backward kernel sums dQ in float32 before it is converted: tiles of 64 rows and head_dim columns, in the order
// of m16n8 tensor-core accumulators, so that a warp adds 512 neighbouring bytes at a time. Every sequence of a packed
// batch starts a tile of its own.
#pragma once

#include <cstdint>

#include "attention/sequence.h"

namespace hf_flash {

struct DqAccumulator {
  static constexpr int kTileRows = 64;

  float* data = nullptr;     // tiles(p) tiles of kTileRows * columns
  int64_t batch_tiles = 0;   // tiles from one sequence to the next; 0 when packed
  int64_t head_tiles = 0;    // tiles from one query head to the next
  int32_t columns = 0;       // head_dim rounded up to what the kernel computes, a multiple of 32
  bool packed = false;

  DqAccumulator() = default;
  DqAccumulator(const AttentionParams& p, void* workspace, int32_t columns)
      : data(static_cast<float*>(workspace)), columns(columns), packed(p.packed()) {
    head_tiles = packed ? p.total_q / kTileRows + p.batch + 1 : (p.seqlen_q + kTileRows - 1) / kTileRows;
    batch_tiles = packed ? 0 : head_tiles * p.heads_q;
  }

  static int64_t bytes(const AttentionParams& p, int32_t columns) {
    const DqAccumulator layout(p, nullptr, columns);
    const int64_t tiles = layout.head_tiles * p.heads_q * (layout.packed ? 1 : p.batch);
    return tiles * kTileRows * columns * static_cast<int64_t>(sizeof(float));
  }

  // First float of the tile that holds row `row` (a multiple of 16) of sequence b, at that row.
  HF_FLASH_HOST_DEVICE float* rows(const Sequence& sequence, int32_t b, int32_t head, int32_t row) const {
    const int64_t first = packed ? sequence.first_q / kTileRows + b : 0;
    return data + ((b * batch_tiles + head * head_tiles + first) * kTileRows + row) * columns;
  }

  // Of 16 rows: offset of the four floats of a lane in the m16n8 block whose first column is 8 * block. They are
  // (row lane / 4, columns 2 (lane % 4) + {0, 1}) and the same of row lane / 4 + 8.
  HF_FLASH_HOST_DEVICE static int32_t fragment(int32_t block, int32_t lane) { return block * 128 + lane * 4; }
};

}  // namespace hf_flash
