// Which of two tiles of query rows a forward of head dimension 64 or less takes.
#pragma once

#include <cstdint>

#include "params.h"
#include "sm90/config.h"

namespace hf_flash::sm90 {

// Those of 128 rows, where they fit a short causal triangle better, or where they are done earlier: the CTAs take a
// tile each, in as many rounds as it needs.
inline bool prefers_small_tiles(const AttentionParams& p, const SmallTiles& small, int multiprocessors) {
  if (p.window_right >= 0 && p.seqlen_q <= small.up_to_causal) return true;
  const auto rows_in_turn = [&](int64_t rows) {
    const int64_t tiles = (p.seqlen_q + rows - 1) / rows * p.batch * p.heads_q;
    return (tiles + multiprocessors - 1) / multiprocessors * rows;
  };
  return small.row_cost * static_cast<float>(rows_in_turn(128)) < static_cast<float>(rows_in_turn(192));
}

}  // namespace hf_flash::sm90
