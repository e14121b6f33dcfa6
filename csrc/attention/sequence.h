// Where one sequence of the batch lies, which of its rows count and which keys each query sees. Everything read from
// device memory is clamped here, never trusted, so a wrong cu_seqlens or range cannot reach outside the tensors.
#pragma once

#include <cstdint>

#include "attention/platform.h"
#include "params.h"

namespace hf_flash {

HF_FLASH_HOST_DEVICE int32_t clamp(int32_t value, int32_t low, int32_t high) {
  return value < low ? low : (value > high ? high : value);
}

// Lengths stay within this, offsets and windows below the numbers in Sequence and the bindings: then sums of positions,
// offsets and windows fit 32 bits.
constexpr int32_t kLongest = 1 << 28;

// Half-open range of key columns.
struct KeyRange {
  int32_t begin;
  int32_t end;
  HF_FLASH_HOST_DEVICE bool empty() const { return begin >= end; }
};

struct Sequence {
  int64_t first_q;  // row of q's storage where this sequence starts; 0 in a padded batch
  int64_t first_k;
  int32_t len_q;  // rows of this sequence, Sq in a padded batch
  int32_t len_k;
  int32_t query_begin;  // rows outside [query_begin, query_end) are not computed
  int32_t query_end;
  int32_t key_begin;
  int32_t key_end;
  int32_t offset;  // query i stands at key position i + offset
  int32_t number;  // in the batch

  HF_FLASH_HOST_DEVICE Sequence(const AttentionParams& p, int32_t b) : number(b) {
    if (p.cu_seqlens_q != nullptr) {
      const int32_t total_q = static_cast<int32_t>(p.total_q), total_k = static_cast<int32_t>(p.total_k);
      const int32_t begin_q = clamp(p.cu_seqlens_q[b], 0, total_q);
      const int32_t begin_k = clamp(p.cu_seqlens_k[b], 0, total_k);
      first_q = begin_q;
      first_k = begin_k;
      len_q = clamp(clamp(p.cu_seqlens_q[b + 1], begin_q, total_q) - begin_q, 0, p.seqlen_q);
      len_k = clamp(clamp(p.cu_seqlens_k[b + 1], begin_k, total_k) - begin_k, 0, p.seqlen_k);
    } else {
      first_q = first_k = 0;
      len_q = p.seqlen_q;
      len_k = p.seqlen_k;
    }
    query_begin = p.query_range ? clamp(p.query_range[2 * b], 0, len_q) : 0;
    query_end = p.query_range ? clamp(p.query_range[2 * b + 1], query_begin, len_q) : len_q;
    key_begin = p.key_range ? clamp(p.key_range[2 * b], 0, len_k) : 0;
    key_end = p.key_range ? clamp(p.key_range[2 * b + 1], key_begin, len_k) : len_k;
    // An offset beyond the two lengths shows the same keys as the nearest one that is still in reach of every sum.
    offset = p.query_offset ? clamp(p.query_offset[b], -(1 << 29), 1 << 29) : len_k - len_q;
  }

  // A byte for each key of this sequence, 0 = hidden; null: no mask of keys.
  HF_FLASH_HOST_DEVICE const uint8_t* key_mask(const AttentionParams& p) const {
    return p.key_mask ? p.key_mask + number * p.mask.batch : nullptr;
  }

  HF_FLASH_HOST_DEVICE bool computes(int32_t i) const { return i >= query_begin && i < query_end; }

  // The keys that rows [row_begin, row_end) can see between them; with row_end = row_begin + 1, those of one row.
  HF_FLASH_HOST_DEVICE KeyRange keys_of(const AttentionParams& p, int32_t row_begin, int32_t row_end) const {
    int32_t begin = key_begin, end = key_end;
    if (p.window_left >= 0) {
      const int32_t first = row_begin + offset - p.window_left;
      begin = first > begin ? first : begin;
    }
    if (p.window_right >= 0) {
      const int32_t last = row_end + offset + p.window_right;
      end = last < end ? last : end;
    }
    return {clamp(begin, 0, len_k), clamp(end, 0, len_k)};
  }

  // The rows that can see some key of [col_begin, col_end).
  HF_FLASH_HOST_DEVICE KeyRange queries_of(const AttentionParams& p, int32_t col_begin, int32_t col_end) const {
    int32_t begin = query_begin, end = query_end;
    if (p.window_right >= 0) {  // j <= i + offset + right
      const int32_t first = col_begin - offset - p.window_right;
      begin = first > begin ? first : begin;
    }
    if (p.window_left >= 0) {  // j >= i + offset - left
      const int32_t last = col_end - offset + p.window_left;
      end = last < end ? last : end;
    }
    return {clamp(begin, 0, len_q), clamp(end, 0, len_q)};
  }
};

}  // namespace hf_flash
