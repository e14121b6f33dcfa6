// Which of Hopper's kernels a call's extra terms need.
#pragma once

#include <cstdint>

#include "params.h"

namespace hf_flash::sm90 {

// Can the TMA engine bring tiles of the bias? Of the inputs' dtype, aligned, with rows and columns of its own.
inline bool tma_reads_bias(const AttentionParams& p) {
  const Scores& b = p.bias;
  const bool aligned = (reinterpret_cast<uintptr_t>(b.data) | 2 * (b.batch | b.head | b.row)) % 16 == 0;
  return b.data != nullptr && b.dtype == p.dtype && aligned && b.col == 1 && (b.row > 0 || p.seqlen_q == 1);
}

// Terms::kLinear serves a call, which has ALiBi and such a bias at most: kernels without the rest are 3 to 40 % faster.
// The gradient of a bias that broadcasts nowhere counts as a term. A smaller scale's reciprocal could overflow.
inline bool linear_terms_alone(const AttentionParams& p) {
  const bool own_gradient = p.dbias.data != nullptr && !p.dbias_sums;
  return p.softcap == 0 && p.scale > 0x1p-20 && p.mask.data == nullptr && !own_gradient &&
         (p.bias.data == nullptr || tma_reads_bias(p));
}

inline Terms terms_of(const AttentionParams& p) {
  return !p.has_extras() ? Terms::kNone : linear_terms_alone(p) ? Terms::kLinear : Terms::kEvery;
}

}  // namespace hf_flash::sm90
