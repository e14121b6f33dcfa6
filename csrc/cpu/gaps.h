// The rows that no sequence computes: outside a padded batch's ranges, between or after a packed batch's sequences.
#pragma once

#include <cstdint>

#include "attention/sequence.h"
#include "params.h"

namespace hf_flash::cpu {

enum class Side { kQueries, kKeys };

// Calls visit(batch, begin, end) with rows of q's or k's storage; batch is 0 in a packed batch, whose stride is 0.
template <class Visit>
void for_each_gap(const AttentionParams& p, Side side, const Visit& visit) {
  const bool queries = side == Side::kQueries;
  int64_t covered = 0;
  for (int32_t b = 0; b < p.batch; ++b) {
    const Sequence s(p, b);
    const int64_t first = queries ? s.first_q : s.first_k;
    const int64_t begin = first + (queries ? s.query_begin : s.key_begin);
    const int64_t end = first + (queries ? s.query_end : s.key_end);
    if (p.packed()) {
      if (covered < begin) visit(0, covered, begin);
      covered = end > covered ? end : covered;
    } else {
      if (0 < begin) visit(b, int64_t{0}, begin);
      const int64_t length = queries ? s.len_q : s.len_k;
      if (end < length) visit(b, end, length);
    }
  }
  const int64_t total = queries ? p.total_q : p.total_k;
  if (p.packed() && covered < total) visit(0, covered, total);
}

}  // namespace hf_flash::cpu
