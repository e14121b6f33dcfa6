// How the mma.sync kernel of a broadcast bias's gradient lays its work out: grid, shared memory, and where a task's
// rows lie.
#pragma once

#include "attention/bias_walk.cuh"
#include "attention/schedule.cuh"
#include "tile/shared_tile.cuh"

namespace hf_flash::sm80 {

struct BiasSources : BiasTask {
  const char *q, *dout, *k, *v;  // the sequence's first row at this head
  const float *lse, *row_sum;    // of the sequence's first row

  __device__ void prepare(const AttentionParams& p) {
    const int kv_head = head / (p.heads_q / p.heads_k);
    q = head_of(p.q, sequence.first_q, head);
    dout = head_of(p.dout, sequence.first_q, head);
    k = head_of(p.k, sequence.first_k, kv_head);
    v = head_of(p.v, sequence.first_k, kv_head);
    lse = values_of(p.lse);
    row_sum = values_of(p.row_sum);
  }

 private:
  __device__ const char* head_of(const Rows& x, int64_t first_row, int h) const {
    return static_cast<const char*>(x.data) + 2 * (batch * x.batch + first_row * x.row + h * x.head);
  }
  __device__ const float* values_of(const RowValues& x) const {
    return static_cast<const float*>(x.data) + batch * x.batch + head * x.head + sequence.first_q;
  }
};

// The tile of scores is as large as the registers allow: all four tensors change with every task, and at 128 x 128 they
// come from the L2 cache about as fast as mma.sync multiplies them. Places for pairs of tiles (Q and K or dO and V, 64
// columns of them): while one is used the next is filled. All tasks have the same tile of the bias, which is copied
// once where it can be. All that fits the 99 KB of sm_86 and sm_89.
struct BiasConfig {
  static constexpr int kQueries = BiasTiles::kQueries, kKeys = BiasTiles::kKeys;
  static constexpr int kColumns = 64;  // of the head dimension, a chunk
  static constexpr int kWarpQueries = 32, kWarpKeys = 64;
  static constexpr int kRowWarps = kQueries / kWarpQueries, kKeyWarps = kKeys / kWarpKeys;
  static constexpr int kThreads = 32 * kRowWarps * kKeyWarps;
  using Tile = SharedTile<128, kColumns>;
  static_assert(Tile::kRows == kQueries && Tile::kRows == kKeys);
  using BiasTile = SharedTile<kQueries, kKeys>;
  static constexpr int kPlaces = 2;  // three gain 2 %, where they fit
  static constexpr uint32_t kPlaceBytes = 2 * Tile::kBytes;
  static constexpr uint32_t kBias = kPlaces * kPlaceBytes;
  // Listed in halves, of which one is at work while a warp lists the next.
  static constexpr int kTasks = 16;
  static constexpr uint32_t kTaskPlace = kBias + BiasTile::kBytes;
  static constexpr uint32_t kNext = kTaskPlace + kTasks * sizeof(BiasSources);
  static constexpr uint32_t kSharedBytes = kNext + sizeof(int64_t);
  static_assert(kSharedBytes <= 99 * 1024);

  __host__ __device__ static constexpr int chunks(int head_dim) { return (head_dim + kColumns - 1) / kColumns; }
};

// CTAs: one for each tile.
struct BiasGrid : BiasTiles {
  int32_t first_batch = 0;  // the grid's z dimension ends at 65535; larger batches take several launches

  explicit BiasGrid(const AttentionParams& p) : BiasTiles(p) {}
  dim3 blocks() const {
    const int left = batch - first_batch;
    return dim3(tiles, heads, left < TileSchedule::kMaxBatch ? left : TileSchedule::kMaxBatch);
  }
  __device__ BiasWalk walk(const AttentionParams& p) const {
    return BiasWalk(p, key_tiles, opaque(blockIdx.x), opaque(blockIdx.y), first_batch + opaque(blockIdx.z));
  }
};

}  // namespace hf_flash::sm80
