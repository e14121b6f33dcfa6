// What the host works out for the terms that most calls do without: softcap, ALiBi, bias, bool mask.
#pragma once

#include <cstdint>

#include "params.h"
#include "sm90/tensor_map.h"

namespace hf_flash::sm90 {

// All of it in double precision.
struct ScoreConstants {
  float scale;
  float cap, inner;  // softcap c, 0: none, and 2 log2(e) scale / c
  float factor;  // from the scores that the terms leave, natural units unless a mask at most is there, to log2 units
  bool copies_bias;  // by the TMA engine; a mask beside the bias has to be worked in by the threads

  explicit ScoreConstants(const AttentionParams& p) {
    constexpr double kLog2OfE = 1.4426950408889634;
    const Scores& b = p.bias;
    const bool natural = p.softcap != 0 || p.alibi_slopes != nullptr || b.data != nullptr || !(p.scale > 0);
    scale = static_cast<float>(p.scale);
    cap = static_cast<float>(p.softcap);
    inner = p.softcap != 0 ? static_cast<float>(2 * kLog2OfE * p.scale / p.softcap) : 0;
    factor = static_cast<float>(natural ? kLog2OfE : kLog2OfE * p.scale);
    const bool aligned = (reinterpret_cast<uintptr_t>(b.data) | 2 * (b.batch | b.head | b.row)) % 16 == 0;
    copies_bias = b.data != nullptr && p.mask.data == nullptr && b.dtype == p.dtype && aligned && b.col == 1 &&
                  (b.row > 0 || p.seqlen_q == 1);
  }
};

// Boxes of `rows` queries and 64 keys of a bias that the TMA engine can copy.
inline CUtensorMap bias_map(const AttentionParams& p, int rows) {
  return tensor_map({p.bias.data, p.bias.batch, p.bias.row, p.bias.head}, p.dtype, p.batch, p.seqlen_q, p.heads_q,
                    p.seqlen_k, rows);
}

}  // namespace hf_flash::sm90
