// Tiles of a bias on their way through shared memory: each warp copies its own, 16 bytes at a time, while it has other
// work, and reads them by ldmatrix as its scores lie. Read from global memory instead, by pairs or, where rows are
// keys, by elements, a bias had made the backward of D 64 half as fast again.
#pragma once

#include "attention/score.cuh"
#include "tile/shared_tile.cuh"

namespace hf_flash::sm80 {

// Are a call's tiles of the bias copied? Of the inputs' dtype, aligned, with columns side by side. Others are read
// element by element (attention/score.cuh). A kernel of linear terms gets no others.
template <bool EVERY>
__device__ bool copies_bias(const AttentionParams& p) {
  const Scores& x = p.bias;
  if (!EVERY) return x.data != nullptr;
  const bool aligned = ((reinterpret_cast<uintptr_t>(x.data) | 2 * (x.batch | x.head | x.row)) & 15) == 0;
  return x.data != nullptr && x.dtype == p.dtype && x.col == 1 && aligned;
}

// A warp starts copying QUERIES x KEYS elements, from query i0 and key j0 (a multiple of 8) on, of one batch and head.
// place(query, chunk): the shared address of 8 keys. What lies past len_q and len_k becomes zeros and is not read.
template <int QUERIES, int KEYS, class Place>
__device__ __forceinline__ void start_bias_copy(const AttentionParams& p, int b, int h, int i0, int len_q, int j0,
                                                int len_k, const Place& place) {
  constexpr int kChunks = KEYS / 8, kRowStep = 32 / kChunks;
  static_assert(QUERIES % kRowStep == 0);
  const int lane = opaque(threadIdx.x % 32), row = lane / kChunks, chunk = lane % kChunks;
  const int64_t first = b * p.bias.batch + h * p.bias.head + (i0 + row) * p.bias.row + j0 + 8 * chunk;
  const char* source = static_cast<const char*>(p.bias.data) + 2 * first;
  const int bytes = min(max(2 * (len_k - j0 - 8 * chunk), 0), 16);
#pragma unroll
  for (int i = 0; i < QUERIES / kRowStep; ++i) {
    const bool inside = i0 + row + i * kRowStep < len_q;
    copy_async_16_bytes(place(row + i * kRowStep, chunk), source, inside ? bytes : 0);
    source += 2 * kRowStep * p.bias.row;
  }
}

// Adds a 16 x 16 block, the registers that ldmatrix brought in the accumulator's order, to scores in log2 units.
template <class T, int ROWS, int COLS>
__device__ __forceinline__ void add_bias_block(Accumulator<ROWS, COLS>& s, int m, int block, const uint32_t (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float* const to = s.x[m][2 * block + i / 2] + 2 * (i % 2);
    to[0] += bias_to_log2(reinterpret_cast<const T(&)[2]>(x[i])[0]);
    to[1] += bias_to_log2(reinterpret_cast<const T(&)[2]>(x[i])[1]);
  }
}

// Adds a whole tile, as the reader finds it from its first block on.
template <class T, int ROWS, int COLS, class Tile>
__device__ __forceinline__ void add_bias_tile(Accumulator<ROWS, COLS>& s,
                                              const BlockReader<Tile, Order::kDown>& reader) {
#pragma unroll
  for (int m = 0; m < ROWS / 16; ++m) {
#pragma unroll
    for (int block = 0; block < COLS / 16; ++block) add_bias_block<T>(s, m, block, reader.load(m, block).x);
  }
}

}  // namespace hf_flash::sm80
