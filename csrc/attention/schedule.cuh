// Which tile of which head of which sequence a CTA works on. All tiles of one head lie side by side, so that its K and
// V (or Q and dO) stay in the L2 cache.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace hf_flash {

struct TileSchedule {
  int32_t tiles;  // tiles of the longest sequence
  int32_t heads;
  int32_t batch;
  int32_t first_batch = 0;  // the grid's z dimension ends at 65535; larger batches take several launches

  static constexpr int kMaxBatch = 65535;

  dim3 grid() const { return dim3(tiles, heads, batch - first_batch < kMaxBatch ? batch - first_batch : kMaxBatch); }

  struct Work {
    int tile, head, batch;
  };

  // This CTA's work. reverse: last tile first. A causal head's last query tile sees the most keys, and what takes
  // longest should start first.
  __device__ Work work(bool reverse) const {
    const int tile = blockIdx.x;
    return {reverse ? tiles - 1 - tile : tile, static_cast<int>(blockIdx.y),
            first_batch + static_cast<int>(blockIdx.z)};
  }
};

}  // namespace hf_flash
