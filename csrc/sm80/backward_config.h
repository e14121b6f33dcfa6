// Tile sizes of the mma.sync backward: one table, the reason beside each number.
#pragma once

#include "params.h"

namespace hf_flash::sm80 {

struct BackwardConfig {
  int keys;     // keys a CTA owns; dK and dV of them stay in registers
  int queries;  // queries a tile
  int warps;
  int split;   // 1: P and dS stay in the registers of the warp that made them. 2: two warps share their keys, each
               // computes half of the queries' scores and half of the columns of dK and dV
  int stages;  // buffers of Q and dO
  bool late;   // dQ of a tile is computed one step later: one barrier of the CTA a step, two buffers of dS
  int block;   // queries whose scores a warp holds at a time
  int dq_warp_rows;   // warps along the queries when dQ is computed
  int blocks_per_sm;  // caps the registers
};

// hopper: a block has up to 227 KB of shared memory; otherwise 99 KB must do (sm_86, sm_89).
constexpr BackwardConfig backward_config(int head_dim, Terms terms, bool hopper) {
  const bool extras = terms != Terms::kNone;
#ifdef HF_FLASH_BACKWARD_CONFIG  // for sweeps
  return HF_FLASH_BACKWARD_CONFIG;
#endif
  // 32 keys a warp: a fragment of Q or dO read from shared memory feeds two mma. Most of the terms need registers for
  // themselves: blocks of 16 queries, which cost linear ones 12 % (a bias) to 17 % (ALiBi, S 2048).
  if (head_dim <= 64) return {128, 64, 4, 1, 2, true, terms == Terms::kEvery ? 16 : 32, 2, 2};
  if (head_dim <= 96) return {64, 64, 4, 1, 2, true, 32, 2, 2};
  // 16 keys a warp read shared memory a third more often than 32 keys in a pair of warps: 0.93 against 1.05 of the
  // speed of PyTorch's flash backend. The pair's buffers need 193 KB.
  if (head_dim <= 128 && hopper && !extras) return {128, 64, 8, 2, 2, true, 32, 2, 1};
  if (head_dim <= 128) return {64, 32, 4, 1, 1, false, 16, 2, 2};
  // dK and dV of 16 keys would fill a warp's registers: two warps share them.
  if (head_dim <= 192 || hopper) return {64, 32, 8, 2, 1, false, 16, 2, 1};
  return {32, 32, 4, 2, 1, false, 16, 2, 1};
}

// Do the two kinds of device need kernels of their own?
constexpr bool backward_depends_on_device(int head_dim, bool extras) {
  return head_dim > 192 || (head_dim > 96 && head_dim <= 128 && !extras);
}

}  // namespace hf_flash::sm80
