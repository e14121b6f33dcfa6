// Dropout in the fragments of tensor-core accumulators. One Philox call serves 16 elements that lie in lanes l and l ^
// 4 of one 16 x 16 block. So each of the two lanes draws for one of two blocks, and two shuffles swap the halves.
#pragma once

#include "attention/dropout.h"
#include "instructions/arithmetic.cuh"
#include "params.h"
#include "tile/fragment.cuh"

namespace hf_flash {

// This lane's random words of two 16 x 16 blocks. In the plain orientation (rows are queries) element e of accumulator
// column tile n % 2 takes byte 2 (e / 2) + n % 2 of word[block][e % 2]; in the transposed one (rows are keys) byte
// 2 (n % 2) + e / 2.
struct DropoutWords {
  uint32_t word[2][2];
};

// Compares the four bytes of a random word with the limit at once.
struct DropoutLimit {
  uint32_t complement, below_128;

  __device__ explicit DropoutLimit(uint32_t keep)
      : complement((128 - keep % 128) * 0x01010101u), below_128(keep < 128 ? 0xFFFFFFFFu : 0u) {}

  // Bit 7 of each byte: is it dropped, not below keep? The other bits mean nothing. Carries of the low seven bits do
  // not reach the next byte; they decide where bit 7 alone does not.
  __device__ __forceinline__ uint32_t dropped(uint32_t word) const {
    const uint32_t carry = (word & 0x7F7F7F7Fu) + complement;
    return (word & carry) | (below_128 & (word | carry));
  }
};

template <bool TRANSPOSED>
struct FragmentDropout {
  uint32_t seed_low, seed_high;
  uint32_t batch_head;
  uint32_t keep;

  // batch_head = batch * Hq + head. One seed for all: kept in uniform registers.
  __device__ FragmentDropout(const AttentionParams& p, uint32_t batch_head)
      : seed_low(0), seed_high(0), batch_head(batch_head), keep(p.dropout_keep) {
    const uint64_t seed = keep < 256 ? dropout_seed(p) : 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    seed_low = static_cast<uint32_t>(seed);  // with the reductions sm_80's bias gradient spills
    seed_high = static_cast<uint32_t>(seed >> 32);
#else
    // Outside the condition: ptxas 13.0 has been seen to guard these by a predicate that nothing sets, for sm_90a.
    seed_low = uniform(static_cast<uint32_t>(seed));
    seed_high = uniform(static_cast<uint32_t>(seed >> 32));
#endif
  }

  // Block x covers queries 16 i_block[x] .. + 15 and keys 16 j_block[x] .. + 15.
  __device__ __forceinline__ DropoutWords draw(int i_block0, int j_block0, int i_block1, int j_block1) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const bool odd = g & 1;
    const uint32_t c0 = TRANSPOSED ? 4 * t + g / 2 : 4 * (g / 2) + t;
    const uint64_t seed = (static_cast<uint64_t>(seed_high) << 32) | seed_low;
    const Philox4 w = philox_7(seed, c0, odd ? i_block1 : i_block0, odd ? j_block1 : j_block0, batch_head);
    // The even lane uses the words of its own parity: {0, 1} plain, {0, 2} transposed; the odd lane the other two.
    constexpr int kEven1 = TRANSPOSED ? 2 : 1, kOdd0 = TRANSPOSED ? 1 : 2;
    const uint32_t own0 = odd ? w.word[kOdd0] : w.word[0];
    const uint32_t own1 = odd ? w.word[3] : w.word[kEven1];
    const uint32_t other0 = shuffle_xor(odd ? w.word[0] : w.word[kOdd0], 4);
    const uint32_t other1 = shuffle_xor(odd ? w.word[kEven1] : w.word[3], 4);
    return {{{odd ? other0 : own0, odd ? other1 : own1}, {odd ? own0 : other0, odd ? own1 : other1}}};
  }

  // Is element e of column tile n of block `block` kept?
  __device__ __forceinline__ bool keeps(const DropoutWords& words, int block, int n, int e) const {
    const int byte = TRANSPOSED ? 2 * (n % 2) + e / 2 : 2 * (e / 2) + n % 2;
    return __byte_perm(words.word[block][e % 2], 0, 0x4440 + byte) < keep;
  }

  // What is dropped of a block, bit 7 of each byte: for e % 2 = 0 and 1.
  __device__ __forceinline__ uint2 dropped(const DropoutWords& words, int block) const {
    const DropoutLimit limit(keep);
    return {limit.dropped(words.word[block][0]), limit.dropped(words.word[block][1])};
  }
  // The sign bit if element e of column tile n is.
  __device__ static __forceinline__ uint32_t sign_if_dropped(uint2 dropped, int n, int e) {
    const int byte = TRANSPOSED ? 2 * (n % 2) + e / 2 : 2 * (e / 2) + n % 2;
    return (e % 2 ? dropped.y : dropped.x) << (24 - 8 * byte) & 0x80000000u;
  }

  // The same as masks of the packed pairs (e % 2 = 0 low, 1 high): 0xFFFF where kept. mask[q] belongs to register q of
  // an A operand: e / 2 = q % 2, n % 2 = q / 2. A byte is a subnormal float16, so one half2 comparison tests two.
  __device__ __forceinline__ void masks(uint32_t (&mask)[4], const DropoutWords& words, int block) const {
    const uint32_t limit = keep * 0x00010001u;
    const uint32_t low = __byte_perm(words.word[block][0], words.word[block][1], 0x5410);   // bytes 0, 1 of both words
    const uint32_t high = __byte_perm(words.word[block][0], words.word[block][1], 0x7632);  // bytes 2, 3
    const uint32_t byte[4] = {low & 0x00FF00FFu, (low >> 8) & 0x00FF00FFu, high & 0x00FF00FFu,
                              (high >> 8) & 0x00FF00FFu};
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const uint32_t b = byte[TRANSPOSED ? 2 * (q / 2) + q % 2 : 2 * (q % 2) + q / 2];
      mask[q] = __hlt2_mask(reinterpret_cast<const __half2&>(b), reinterpret_cast<const __half2&>(limit));
    }
  }
};

}  // namespace hf_flash
