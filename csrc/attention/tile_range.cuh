// Which key tiles a tile of query rows has to visit, and for which of them nothing needs to be hidden.
#pragma once

#include "attention/sequence.h"

namespace hf_flash {

// Key tiles [begin, end) that some of the rows see, and the keys [common_begin, common_end) that all of them see.
struct TileRange {
  int begin, end;
  int common_begin, common_end;

  TileRange() = default;
  __device__ TileRange(const AttentionParams& p, const Sequence& sequence, int row_begin, int row_end, int keys) {
    begin = end = common_begin = common_end = 0;
    row_begin = max(row_begin, sequence.query_begin);
    row_end = min(row_end, sequence.query_end);
    if (row_begin >= row_end) return;
    const KeyRange seen = sequence.keys_of(p, row_begin, row_end);
    if (seen.empty()) return;
    begin = seen.begin / keys;
    end = (seen.end + keys - 1) / keys;
    common_begin = sequence.keys_of(p, row_end - 1, row_end).begin;
    common_end = sequence.keys_of(p, row_begin, row_begin + 1).end;
  }
  __device__ bool empty() const { return begin >= end; }
  __device__ bool has(int tile) const { return tile >= begin && tile < end; }
  // Does some row not see some key of the tile [key_begin, key_end)?
  __device__ bool hides(int key_begin, int key_end) const { return key_begin < common_begin || key_end > common_end; }
};

}  // namespace hf_flash
