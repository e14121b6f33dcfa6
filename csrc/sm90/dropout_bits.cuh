// Dropout's bits of a tile of scores in the backward: a warp of the producers draws them, which has the time, and the
// consumers read one word for 64 queries of a lane.
#pragma once

#include "attention/dropout_fragment.cuh"
#include "instructions/shared_memory.cuh"

namespace hf_flash::sm90 {

// What is dropped of a lane's elements of an accumulator with keys as rows. Block k of 16 queries has its bits at 7 - 2
// k of the four bytes for the even queries and one below for the odd ones, in the order of dropout.h's bytes.
template <int QUERIES>
struct DroppedKeys {
  static constexpr int kWords = QUERIES / 64;
  uint32_t word[kWords];

  __device__ __forceinline__ void load(uint32_t bits, int warp) {
#pragma unroll
    for (int w = 0; w < kWords; ++w)
      word[w] = load_shared(bits + 4 * ((warp * kWords + w) * 32 + static_cast<int>(threadIdx.x % 32)));
  }
  // The sign bit if element e of column tile n is dropped.
  __device__ __forceinline__ uint32_t sign(int n, int e) const {
    const int k = n / 2 % 4, byte = 2 * (n % 2) + e / 2;
    return word[n / 8] << (24 - 8 * byte + 2 * k + e % 2) & 0x80000000u;
  }
};

// By a warp: the bits of 16 WARPS keys from block j_block on and QUERIES queries from block
// i_block on. A lane's call serves two lanes of a consumer warp, whose keys differ in the last bit; its four calls of
// 64 queries make a word for each.
template <int QUERIES, int WARPS>
__device__ __forceinline__ void draw_dropped(const AttentionParams& p, uint32_t bits, int i_block, int j_block,
                                             uint32_t batch_head) {
  constexpr int kWords = QUERIES / 64;
  constexpr uint32_t kFlags = 0x80808080u;
  const DropoutLimit limit(p.dropout_keep);
  const uint64_t seed = uniform(*p.dropout_seed);
  const int lane = threadIdx.x % 32, pair = lane % 16;  // 4 a + b, in the names of dropout.h
#pragma unroll 1
  for (int n = 0; n < WARPS / 2 * kWords; ++n) {
    const int warp = 2 * (n / kWords) + lane / 16, w = n % kWords;
    uint32_t even = 0, odd = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Philox4 x = philox_7(seed, pair, i_block + 4 * w + k, j_block + warp, batch_head);
      even |= (limit.dropped(x.word[0]) & kFlags) >> 2 * k | (limit.dropped(x.word[2]) & kFlags) >> (2 * k + 1);
      odd |= (limit.dropped(x.word[1]) & kFlags) >> 2 * k | (limit.dropped(x.word[3]) & kFlags) >> (2 * k + 1);
    }
    const uint32_t to = bits + 4 * ((warp * kWords + w) * 32 + 8 * (pair % 4) + pair / 4);
    store_shared(to, even);
    store_shared(to + 16, odd);
  }
}

}  // namespace hf_flash::sm90
