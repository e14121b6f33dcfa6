// Which tile of which head of which sequence a CTA works on. All tiles of one head lie side by side, so that its K and V
// (or Q and dO) stay in the L2 cache.
#pragma once

#include "params.h"

namespace hf_flash {

struct TileSchedule {
  int32_t tiles;  // tiles of the longest sequence
  int32_t heads;
  int32_t batch;

  unsigned grid() const { return static_cast<unsigned>(int64_t(tiles) * heads * batch); }

  struct Work {
    int tile, head, batch;
  };

  // reverse: last tile first. A causal head's last query tile sees the most keys: longest first keeps the end short.
  __device__ Work at(unsigned index, bool reverse) const {
    const unsigned row = index / tiles;
    const int tile = index - row * tiles;
    const unsigned b = row / heads;
    return {reverse ? tiles - 1 - tile : tile, static_cast<int>(row - b * heads), static_cast<int>(b)};
  }
};

}  // namespace hf_flash
