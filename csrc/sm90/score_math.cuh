// What Hopper's kernels do to raw scores, beside the products: softcap, ALiBi, and a bias that the TMA engine brought.
#pragma once

#include "attention/score.cuh"
#include "instructions/shared_memory.cuh"
#include "params.h"
#include "sm90/instances.h"
#include "sm90/tensor_map.h"
#include "tile/swizzled_tile.cuh"

namespace hf_flash::sm90 {

// What the host works out for the extra terms, all of it in double precision.
struct ScoreConstants {
  float scale;
  float cap, inner;  // softcap c, 0: none, and 2 log2(e) scale / c
  float factor;  // from the scores that the terms leave, natural units unless a mask at most is there, to log2 units
  bool copies_bias;  // by the TMA engine; a mask beside the bias has to be worked in by the threads

  explicit ScoreConstants(const AttentionParams& p) {
    constexpr double kLog2OfE = 1.4426950408889634;
    const bool natural = p.softcap != 0 || p.alibi_slopes != nullptr || p.bias.data != nullptr || !(p.scale > 0);
    scale = static_cast<float>(p.scale);
    cap = static_cast<float>(p.softcap);
    inner = p.softcap != 0 ? static_cast<float>(2 * kLog2OfE * p.scale / p.softcap) : 0;
    factor = static_cast<float>(natural ? kLog2OfE : kLog2OfE * p.scale);
    copies_bias = tma_reads_bias(p) && p.mask.data == nullptr;
  }
};

// The bias in boxes of so many rows and 64 columns.
inline CUtensorMap bias_map(const AttentionParams& p, int rows) {
  return tensor_map({p.bias.data, p.bias.batch, p.bias.row, p.bias.head}, p.dtype, p.batch, p.seqlen_q, p.heads_q,
                    p.seqlen_k, rows);
}

// c tanh(s / c) = c - 2 c / (exp(2 s / c) + 1), as exact as tanh_fast.
template <int COLS>
__device__ __forceinline__ void cap_scores(Accumulator<16, COLS>& s, const ScoreConstants& constants) {
  const float cap = constants.cap, inner = constants.inner;
  s.for_each([&](float& x, int, int) { x = cap - 2.0f * cap * reciprocal_fast(exp2_fast(x * inner) + 1.0f); });
}

// s * scale, and ALiBi. distance: position(i0) - j0. Positions below 2^24 are exact in float32. A row's second half,
// eight rows below the first, stands as far from a key as the first half from the key eight before it.
template <int COLS>
__device__ __forceinline__ void add_alibi(Accumulator<16, COLS>& s, float scale, float slope, int distance) {
  const float corner = static_cast<float>(opaque(distance) + lane_row() - lane_col());
#pragma unroll
  for (int e = 0; e < 2; ++e) {
#pragma unroll
    for (int n = -1; n < COLS / 8; ++n) {
      const float term = -slope * fabsf(corner - static_cast<float>(8 * n + e));
      if (n >= 0) s.x[0][n][e] = s.x[0][n][e] * scale + term;
      if (n + 1 < COLS / 8) s.x[0][n + 1][2 + e] = s.x[0][n + 1][2 + e] * scale + term;
    }
  }
}

// The first of this warp's 16 rows of a CTA's tile.
__device__ __forceinline__ int first_row_of_warp(int warpgroup) {
  return 64 * warpgroup + 16 * static_cast<int>(threadIdx.x / 32 % 4);
}

// f(n, e, pair): what belongs to elements e and e + 1 of an accumulator's x[0][n], of this warp's rows of the tile.
// warpgroup: a reference, or ptxas orders all of the forward otherwise.
template <class T, class Tile, class F>
__device__ __forceinline__ void for_each_score_pair(uint32_t tile, const int& warpgroup, F f) {
  const int lane = opaque(threadIdx.x % 32), row = first_row_of_warp(warpgroup) + lane % 16;
  const uint32_t address = tile + Tile::offset(row, lane / 16);
#pragma unroll
  for (int k = 0; k < Tile::kCols / 16; ++k) {
    uint32_t x[4];
    ldmatrix_x4(x, (address ^ (k % 4 * 32)) + k / 4 * Tile::kBlockBytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) f(2 * k + i / 2, 2 * (i % 2), unpack<T>(x[i]));
  }
}

}  // namespace hf_flash::sm90
