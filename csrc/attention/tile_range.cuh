// Which key tiles a tile of query rows has to visit, and for which of them nothing needs to be hidden.
#pragma once

#include <climits>

#include "attention/sequence.h"

namespace hf_flash {

// Does the mask hide a key of [begin, end), inside a sequence of len_k? By `threads` threads that look at a part each;
// this one is number `thread`. In few registers.
__device__ inline bool hides_some(const uint8_t* key_mask, int len_k, int begin, int end, int thread, int threads) {
  bool hides = false;
  if (reinterpret_cast<uintptr_t>(key_mask) % 4 != 0 || len_k % 4 != 0) {
#pragma unroll 1
    for (int j = begin + thread; j < end; j += threads) hides |= key_mask[j] == 0;
    return hides;
  }
#pragma unroll 1
  for (int j = begin / 4 * 4 + 4 * thread; j < end; j += 4 * threads) {
    uint32_t four = *reinterpret_cast<const uint32_t*>(key_mask + j);
    if (j < begin) four |= ~(0xFFFFFFFFu << 8 * (begin - j));
    if (end - j < 4) four |= 0xFFFFFFFFu << 8 * (end - j);
    hides |= __vcmpeq4(four, 0) != 0;
  }
  return hides;
}

// Does it show all keys of [begin, begin + KEYS), inside the sequence, as far as one thread can tell by 16 bytes a
// load?
template <int KEYS>
__device__ __forceinline__ bool shows_all(const uint8_t* key_mask, int begin) {
  if (key_mask == nullptr) return true;
  if (reinterpret_cast<uintptr_t>(key_mask + begin) % 16 != 0) return false;
  const uint4* const x = reinterpret_cast<const uint4*>(key_mask + begin);
  uint32_t hidden = 0;
#pragma unroll 4
  for (int n = 0; n < KEYS / 16; ++n)
    hidden |= __vcmpeq4(x[n].x, 0) | __vcmpeq4(x[n].y, 0) | __vcmpeq4(x[n].z, 0) | __vcmpeq4(x[n].w, 0);
  return hidden == 0;
}

// By a warp: which of the up to 32 keys from j0 on may a query see, as far as range and mask tell? A bit a key.
__device__ __forceinline__ uint32_t seen_keys(const AttentionParams& p, const Sequence& sequence, int j0, int count) {
  const int lane = threadIdx.x % 32, j = j0 + lane;
  bool seen = lane < count && j >= sequence.key_begin && j < sequence.key_end;
  if (seen && p.key_mask != nullptr) seen = sequence.key_mask(p)[j] != 0;
  return __ballot_sync(0xFFFFFFFF, seen);
}

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
  // Something is hidden in every tile, as far as anybody has looked: a mask of keys has holes.
  __device__ void hide_in_all() { common_begin = INT_MAX; }
  __device__ bool has_holes() const { return common_begin == INT_MAX; }
  __device__ bool empty() const { return begin >= end; }
  __device__ bool has(int tile) const { return tile >= begin && tile < end; }
  // Does some row not see some key of the tile [key_begin, key_end)?
  __device__ bool hides(int key_begin, int key_end) const { return key_begin < common_begin || key_end > common_end; }
};

}  // namespace hf_flash
