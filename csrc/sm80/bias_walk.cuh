// How the gradient of a broadcast bias divides its work: the tile of the gradient that a CTA owns, and the score tiles
// that are summed there.
#pragma once

#include "attention/schedule.cuh"
#include "attention/score.cuh"
#include "attention/sequence.h"
#include "tile/shared_tile.cuh"

namespace hf_flash::sm80 {

// One score tile: a query tile and a key tile of one head of one sequence. In shared memory, for all threads.
struct BiasTask {
  bool exists;
  bool boundary;  // some query does not see some key: the rest of the tile has to be hidden
  int batch, head;
  int i0, j0;  // from the sequence's start
  Sequence sequence;
  const char *q, *dout, *k, *v;  // the sequence's first row at this head
  const float *lse, *row_sum;    // of the sequence's first row
};

// The tile of scores is as large as the registers allow: all four tensors change with every task, and at 128 x 128 they
// come from the L2 cache about as fast as mma.sync multiplies them. Three places for a pair of tiles (Q and K or dO and
// V, 64 columns of them) let two chunks be under way while one is used, and fit the 99 KB of sm_86 and sm_89.
struct BiasConfig {
  static constexpr int kQueries = 128, kKeys = 128;
  static constexpr int kColumns = 64;  // of the head dimension, a chunk
  static constexpr int kWarpQueries = 32, kWarpKeys = 64;
  static constexpr int kRowWarps = kQueries / kWarpQueries, kKeyWarps = kKeys / kWarpKeys;
  static constexpr int kThreads = 32 * kRowWarps * kKeyWarps;
  using Tile = SharedTile<128, kColumns>;
  static_assert(Tile::kRows == kQueries && Tile::kRows == kKeys);
  static constexpr uint32_t kPlaceBytes = 2 * Tile::kBytes;
  static constexpr int kTasks = 4;  // one for slow warps' last step, the one computed, the next ones; a power of two
  static constexpr uint32_t kTaskPlace = 3 * kPlaceBytes;
  static constexpr uint32_t kSharedBytes = kTaskPlace + kTasks * sizeof(BiasTask);
  static_assert(kSharedBytes <= 99 * 1024);

  __host__ __device__ static constexpr int chunks(int head_dim) { return (head_dim + kColumns - 1) / kColumns; }
};

// CTAs: one for each tile of the bias's own gradient. Tiles of one head lie side by side, so that its rows stay in the
// L2 cache.
struct BiasGrid {
  int32_t key_tiles;
  int32_t tiles;
  int32_t heads;
  int32_t batch;
  int32_t first_batch;  // the grid's z dimension ends at 65535; larger batches take several launches

  explicit BiasGrid(const AttentionParams& p)
      : key_tiles(p.dbias.col == 0 ? 1 : (p.seqlen_k + BiasConfig::kKeys - 1) / BiasConfig::kKeys),
        tiles(key_tiles * (p.dbias.row == 0 ? 1 : (p.seqlen_q + BiasConfig::kQueries - 1) / BiasConfig::kQueries)),
        heads(p.dbias.head == 0 ? 1 : p.heads_q),
        batch(p.dbias.batch == 0 ? 1 : p.batch),
        first_batch(0) {}
  dim3 blocks() const {
    const int left = batch - first_batch;
    return dim3(tiles, heads, left < TileSchedule::kMaxBatch ? left : TileSchedule::kMaxBatch);
  }
};

// What a CTA sums: all of a dimension where the bias has size 1, otherwise the one place or tile that it owns.
struct BiasWalk {
  int batch_begin, batch_end, head_begin, head_end;
  int i_begin, i_end, j_begin, j_end;

  __device__ BiasWalk(const AttentionParams& p, const BiasGrid& grid) {
    batch_begin = p.dbias.batch == 0 ? 0 : grid.first_batch + static_cast<int>(blockIdx.z);
    batch_end = p.dbias.batch == 0 ? p.batch : batch_begin + 1;
    head_begin = p.dbias.head == 0 ? 0 : static_cast<int>(blockIdx.y);
    head_end = p.dbias.head == 0 ? p.heads_q : head_begin + 1;
    const int tile = blockIdx.x;
    i_begin = p.dbias.row == 0 ? 0 : tile / grid.key_tiles * BiasConfig::kQueries;
    i_end = p.dbias.row == 0 ? p.seqlen_q : i_begin + BiasConfig::kQueries;
    j_begin = p.dbias.col == 0 ? 0 : tile % grid.key_tiles * BiasConfig::kKeys;
    j_end = p.dbias.col == 0 ? p.seqlen_k : j_begin + BiasConfig::kKeys;
  }

  __device__ void find_first(const AttentionParams& p, BiasTask& task) const {
    find(p, task, batch_begin, head_begin, i_begin, j_begin);
  }
  __device__ void find_next(const AttentionParams& p, const BiasTask& after, BiasTask& task) const {
    if (after.exists) {
      find(p, task, after.batch, after.head, after.i0, after.j0 + BiasConfig::kKeys);
    } else {
      task.exists = false;
    }
  }

 private:
  // The first task from this place on of which anything is visible: keys before queries, heads, batch.
  __device__ void find(const AttentionParams& p, BiasTask& task, int b, int h, int i0, int j0) const {
    for (;; j0 += BiasConfig::kKeys) {
      if (j0 >= j_end) j0 = j_begin, i0 += BiasConfig::kQueries;
      if (i0 >= i_end) i0 = i_begin, ++h;
      if (h >= head_end) h = head_begin, ++b;
      if (b >= batch_end) break;
      const Sequence sequence(p, b);
      if (sees(p, sequence, i0, j0)) return fill(p, task, sequence, b, h, i0, j0);
    }
    task.exists = false;
  }

  __device__ static bool sees(const AttentionParams& p, const Sequence& sequence, int i0, int j0) {
    const int row_begin = max(i0, sequence.query_begin), row_end = min(i0 + BiasConfig::kQueries, sequence.query_end);
    if (row_begin >= row_end) return false;
    const KeyRange seen = sequence.keys_of(p, row_begin, row_end);
    return max(seen.begin, j0) < min(seen.end, j0 + BiasConfig::kKeys);
  }

  __device__ static const char* head_of(const Rows& x, int b, int64_t first_row, int head) {
    return static_cast<const char*>(x.data) + 2 * (b * x.batch + first_row * x.row + head * x.head);
  }
  __device__ static const float* values_of(const RowValues& x, int b, int64_t first_row, int head) {
    return static_cast<const float*>(x.data) + b * x.batch + head * x.head + first_row;
  }
  __device__ static void fill(const AttentionParams& p, BiasTask& task, const Sequence& sequence, int b, int h, int i0,
                              int j0) {
    const int kv_head = h / (p.heads_q / p.heads_k);
    task.exists = true;
    task.boundary = !all_visible(p, sequence, i0, i0 + BiasConfig::kQueries, j0, j0 + BiasConfig::kKeys);
    task.batch = b;
    task.head = h;
    task.i0 = i0;
    task.j0 = j0;
    task.sequence = sequence;
    task.q = head_of(p.q, b, sequence.first_q, h);
    task.dout = head_of(p.dout, b, sequence.first_q, h);
    task.k = head_of(p.k, b, sequence.first_k, kv_head);
    task.v = head_of(p.v, b, sequence.first_k, kv_head);
    task.lse = values_of(p.lse, b, sequence.first_q, h);
    task.row_sum = values_of(p.row_sum, b, sequence.first_q, h);
  }
};

}  // namespace hf_flash::sm80
