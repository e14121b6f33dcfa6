// How the gradient of a broadcast bias divides its work: the tiles of the gradient, and the score tiles that are summed
// in each of them.
#pragma once

#include "attention/score.cuh"
#include "attention/sequence.h"

namespace hf_flash {

// One score tile: a query tile and a key tile of one head of one sequence. In shared memory, for all threads.
struct BiasTask {
  bool exists;
  bool boundary;  // some query does not see some key: the rest of the tile has to be hidden
  int batch, head;
  int i0, j0;  // from the sequence's start
  Sequence sequence;
};

// Tiles of the bias's own gradient. Those of one head lie side by side, so that its rows stay in the L2 cache.
struct BiasTiles {
  static constexpr int kQueries = 128, kKeys = 128;
  int32_t key_tiles;
  int32_t tiles;  // of a head
  int32_t heads;
  int32_t batch;

  explicit BiasTiles(const AttentionParams& p)
      : key_tiles(p.dbias.col == 0 ? 1 : (p.seqlen_k + kKeys - 1) / kKeys),
        tiles(key_tiles * (p.dbias.row == 0 ? 1 : (p.seqlen_q + kQueries - 1) / kQueries)),
        heads(p.dbias.head == 0 ? 1 : p.heads_q),
        batch(p.dbias.batch == 0 ? 1 : p.batch) {}
  __host__ __device__ int64_t count() const { return int64_t{tiles} * heads * batch; }
};

// What is summed for a tile: all of a dimension where the bias has size 1, otherwise the one place or tile.
struct BiasWalk {
  int batch_begin, batch_end, head_begin, head_end;
  int i_begin, i_end, j_begin, j_end;

  __device__ BiasWalk(const AttentionParams& p, int key_tiles, int tile, int head, int batch) {
    batch_begin = p.dbias.batch == 0 ? 0 : batch;
    batch_end = p.dbias.batch == 0 ? p.batch : batch_begin + 1;
    head_begin = p.dbias.head == 0 ? 0 : head;
    head_end = p.dbias.head == 0 ? p.heads_q : head_begin + 1;
    i_begin = p.dbias.row == 0 ? 0 : tile / key_tiles * BiasTiles::kQueries;
    i_end = p.dbias.row == 0 ? p.seqlen_q : i_begin + BiasTiles::kQueries;
    j_begin = p.dbias.col == 0 ? 0 : tile % key_tiles * BiasTiles::kKeys;
    j_end = p.dbias.col == 0 ? p.seqlen_k : j_begin + BiasTiles::kKeys;
  }

  // Task: a BiasTask and what a kernel adds to it in prepare(p). One after the other, by one thread:
  template <class Task>
  __device__ void find_first(const AttentionParams& p, Task& task) const {
    find(p, task, batch_begin, head_begin, i_begin, j_begin);
  }
  template <class Task>
  __device__ void find_next(const AttentionParams& p, const Task& after, Task& task) const {
    if (after.exists) {
      find(p, task, after.batch, after.head, after.i0, after.j0 + BiasTiles::kKeys);
    } else {
      task.exists = false;
    }
  }

  // Or many, by a whole warp: the next `count` tasks, at most 32, to tasks[0 ..]; those past the last do not exist.
  // next: the score tile to go on from, of all that the walk goes through, first 0; in shared memory.
  template <class Task>
  __device__ __noinline__ void list(const AttentionParams& p, Task* tasks, int count, int64_t& next) const {
    const int lane = threadIdx.x % 32;
    const uint32_t columns = (j_end - j_begin + BiasTiles::kKeys - 1) / BiasTiles::kKeys;
    const uint32_t rows = (i_end - i_begin + BiasTiles::kQueries - 1) / BiasTiles::kQueries;
    const uint32_t heads = head_end - head_begin;
    int64_t place = next + lane;
    int listed = 0;
    while (listed < count) {
      const uint32_t plane = static_cast<uint32_t>(place / (columns * rows));
      const uint32_t tile = static_cast<uint32_t>(place % (columns * rows));
      const int b = batch_begin + plane / heads, h = head_begin + plane % heads;
      const int i0 = i_begin + tile / columns * BiasTiles::kQueries, j0 = j_begin + tile % columns * BiasTiles::kKeys;
      const bool exists = b < batch_end && columns * rows > 0;
      if (!__any_sync(0xffffffffu, exists)) break;
      const Sequence sequence(p, exists ? b : batch_begin);
      const bool seen = exists && sees(p, sequence, i0, j0);
      const uint32_t found = __ballot_sync(0xffffffffu, seen);
      const int slot = listed + __popc(found & ((1u << lane) - 1));
      if (seen && slot < count) {
        fill(p, tasks[slot], sequence, b, h, i0, j0);
        tasks[slot].prepare(p);
      }
      // On behind the last that had a place.
      const int left = count - listed;
      place += __popc(found) <= left ? 32 : __fns(found, 0, left) + 1;
      listed += min(__popc(found), left);
    }
    for (int slot = listed + lane; slot < count; slot += 32) tasks[slot].exists = false;
    __syncwarp();
    if (lane == 0) next = place;
  }

 private:
  // The first task from this place on of which anything is visible: keys before queries, heads, batch.
  template <class Task>
  __device__ void find(const AttentionParams& p, Task& task, int b, int h, int i0, int j0) const {
    for (;; j0 += BiasTiles::kKeys) {
      if (j0 >= j_end) j0 = j_begin, i0 += BiasTiles::kQueries;
      if (i0 >= i_end) i0 = i_begin, ++h;
      if (h >= head_end) h = head_begin, ++b;
      if (b >= batch_end) break;
      const Sequence sequence(p, b);
      if (sees(p, sequence, i0, j0)) {
        fill(p, task, sequence, b, h, i0, j0);
        return task.prepare(p);
      }
    }
    task.exists = false;
  }

  __device__ static bool sees(const AttentionParams& p, const Sequence& sequence, int i0, int j0) {
    const int row_begin = max(i0, sequence.query_begin), row_end = min(i0 + BiasTiles::kQueries, sequence.query_end);
    if (row_begin >= row_end) return false;
    const KeyRange seen = sequence.keys_of(p, row_begin, row_end);
    return max(seen.begin, j0) < min(seen.end, j0 + BiasTiles::kKeys);
  }

  __device__ static void fill(const AttentionParams& p, BiasTask& task, const Sequence& sequence, int b, int h, int i0,
                              int j0) {
    task.exists = true;
    task.boundary = !all_visible<BiasTiles::kKeys>(p, sequence, i0, i0 + BiasTiles::kQueries, j0);
    task.batch = b;
    task.head = h;
    task.i0 = i0;
    task.j0 = j0;
    task.sequence = sequence;
  }
};

}  // namespace hf_flash
