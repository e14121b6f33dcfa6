// Tile sizes of the mma.sync kernels: one table a pass, the reason beside each number. Every choice fits the 99 KB of
// shared memory a block that sm_86 and sm_89 have, so one instance serves every GPU.
#pragma once

#include "params.h"

namespace hf_flash::sm80 {

struct ForwardConfig {
  int warp_rows;  // query rows a warp: with 32, a K or V fragment read from shared memory feeds two mma
  int warps;
  int keys;                   // keys a tile
  int block;                  // keys whose exponentials, QK^T of the next tile and PV are woven together
  bool queries_in_registers;  // else read from shared memory for each block
  int blocks_per_sm;          // caps the registers
};

constexpr ForwardConfig forward_config(int head_dim, bool dropout, Terms terms) {
#ifdef HF_FLASH_FORWARD_CONFIG  // for sweeps
  return HF_FLASH_FORWARD_CONFIG;
#endif
  // Measured on an H200 (benchmarks/FACTS.md). 64 keys a tile spread the cost of a step's barrier, copies and maxima;
  // 32 rows a warp halve the reads of K and V. What does not fit 255 registers gets smaller in one of the two.
  // Linear terms alone, S 512 and 2048: ALiBi 42 and 439 us at 32 keys, 36 and 355 at 64. Blocks of 16 keys there spill
  // where the bias lies over Q.
  if (head_dim <= 64 && terms == Terms::kEvery) return {32, 4, 32, 16, true, 2};
  if (head_dim <= 64 && (dropout || terms == Terms::kLinear)) return {32, 4, 64, 32, true, 2};
  if (head_dim <= 64) return {32, 4, 64, 16, true, 2};
  if (head_dim <= 96) return {32, 4, 32, 16, false, 2};
  if (head_dim <= 128 && dropout) return {16, 4, 64, 32, true, 2};
  if (head_dim <= 128) return {32, 4, 32, 32, false, 2};
  return {16, 4, 32, 32, false, 2};
}

}  // namespace hf_flash::sm80
