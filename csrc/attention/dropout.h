// Dropout's mask: a function of (seed, batch, q head, i, j) alone, so that every kernel on every device drops the same
// elements whatever its tiles are. One Philox4x32-7 call (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011) gives 16 bytes, one for each element of a tensor-core fragment's share of a 16 x 16 block:
//   counter = (4 a + b, i / 16, j / 16, batch * Hq + h),  a = (i % 8) / 2,  b = (j % 8) / 2
//   word    = 2 (i % 2) + (j % 2)
//   byte    = 2 ((i / 8) % 2) + ((j / 8) % 2), kept when byte < keep.
#pragma once

#include <cstdint>

#include "attention/platform.h"
#include "params.h"

namespace hf_flash {

HF_FLASH_HOST_DEVICE uint64_t dropout_seed(const AttentionParams& p) {
  return static_cast<uint64_t>(p.dropout_seed != nullptr ? *p.dropout_seed : p.dropout_seed_value);
}

struct Philox4 {
  uint32_t word[4];
};

HF_FLASH_HOST_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
#endif
}

HF_FLASH_HOST_DEVICE Philox4 philox_7(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(seed >> 32);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < 7; ++round) {
    const uint32_t high0 = multiply_high(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = multiply_high(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The four words shared by the 16 elements (i, j) of one fragment's share of a block.
HF_FLASH_HOST_DEVICE Philox4 dropout_words(uint64_t seed, uint32_t batch_head, uint32_t i, uint32_t j) {
  return philox_7(seed, 4 * ((i % 8) / 2) + (j % 8) / 2, i / 16, j / 16, batch_head);
}

// One element; the kernels draw 16 at a time and pick bytes from registers.
HF_FLASH_HOST_DEVICE bool dropout_keeps(uint64_t seed, uint32_t batch_head, uint32_t i, uint32_t j, int keep) {
  const Philox4 words = dropout_words(seed, batch_head, i, j);
  const uint32_t word = words.word[2 * (i % 2) + (j % 2)];
  const uint32_t byte = 2 * ((i / 8) % 2) + ((j / 8) % 2);
  return static_cast<int>((word >> (8 * byte)) & 0xFF) < keep;
}

}  // namespace hf_flash
