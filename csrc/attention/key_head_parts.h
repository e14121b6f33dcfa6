// A piece of work of the backward is a key tile with all heads of q that share its head of k, so that dK and dV need no
// second sum. Where that leaves SMs idle, as few heads of k do, the longest tiles of causal ones above all, or where so
// many heads share one that its key tiles hurry ahead of each other, the heads of q are split into parts. Each is a
// head of k of its own to the kernels, with K and V of the real one, and a pass behind them adds the parts of dk and dv
// up. D 128, causal, TFLOP/s: S 4096, 28 heads of q for 4 of k 294 -> 478, 16 for one 85 -> 484; S 2048, 16 for 2 300
// -> 393.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

namespace hf_flash {

// Seconds of a backward whose heads are split into so many parts, as far as that choice needs to know. keys: of a piece
// of work; ctas: so many pieces are at work at once, each by a CTA or a team of them.
inline double seconds_in_parts(const AttentionParams& p, int keys, int ctas, int parts) {
  constexpr double kFlopsPerSecond = 4.5e14, kBytesPerSecond = 2e12;  // an H100's; others have the same ratio
  const bool triangle = p.window_right >= 0 && p.window_left < 0;
  const double rows = double(p.total_k), length = rows / p.batch;
  const double works =
      (p.packed() ? rows / keys + p.batch : double((p.seqlen_k + keys - 1) / keys) * p.batch) * p.heads_k;

  double seen = triangle ? length / 2 : length;  // keys of a query
  if (p.window_left >= 0 && p.window_right >= 0) seen = std::min(seen, 1.0 + p.window_left + p.window_right);
  const double flops = 10.0 * p.total_q * p.heads_q * seen * (p.head_dim + p.head_dim_v) / 2;
  // In units of the mean piece of work with all heads: the longest causal one takes two.
  const double mean = works / ctas, rounds = double((int64_t(works * parts) + ctas - 1) / ctas);
  double slowest = triangle ? std::max(mean + 0.25 / parts, 2.0 / parts) : rounds / parts;
  // Key tiles that hurry ahead of each other (sm90/backward_grid.h).
  if (triangle && !p.deterministic && p.heads_q / p.heads_k / parts >= 8) slowest *= 1.25;
  const double bytes = parts == 1 ? 0 : 4.0 * rows * p.heads_k * parts * (p.head_dim + p.head_dim_v);
  return slowest / mean * flops / kFlopsPerSecond + bytes / kBytesPerSecond;
}

// Into how many parts; 1 unless more are 5 % faster, and more again, which take more memory, only for another 2 %.
inline int key_head_parts(const AttentionParams& p, int keys, int ctas) {
  const int group = p.heads_k > 0 ? p.heads_q / p.heads_k : 1;
  if (group <= 1 || p.total_q == 0 || p.total_k == 0 || p.batch == 0) return 1;
  int best = 1;
  double limit = 0.95 * seconds_in_parts(p, keys, ctas, 1);
  for (int parts = 2; parts <= group; ++parts) {
    if (group % parts != 0) continue;
    const double seconds = seconds_in_parts(p, keys, ctas, parts);
    if (seconds < limit) {
      limit = 0.98 * seconds;
      best = parts;
    }
  }
  return best;
}

}  // namespace hf_flash
