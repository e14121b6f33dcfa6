// Kernels around the architecture's own that need no tensor core. All run on the given stream and throw
// std::runtime_error on failure.
#pragma once

#include <cuda_runtime.h>

#include "params.h"
#include "portable/dq_accumulator.h"

namespace hf_flash::portable {

// Do dout and what is summed of dQ stay in the L2 cache, of 50 MB on Hopper, until the next kernel reads them? Then the
// kernel before leaves them there, and the next one starts while it ends: B 8, H 12, D 64 and S 512 / 1024 / 2048, up
// to 25 MB, gain 6 / 5 / 2 %; 67 MB lose 1 to 2 %.
inline bool stay_cached(const AttentionParams& p) {
  return p.total_q * p.heads_q * int64_t{p.head_dim_v} * 2 <= (32 << 20);
}

// row_sum[b, h, i] = sum over Dv of dout * out, minus dlse; 0 for rows that are not computed, whose dout is not read.
// Also zeroes the accumulator, where one is given that nobody else sees to, and its counters; where it finishes dq, the
// rows of dq that it does not reach.
template <class Accumulator>
void row_sum(const AttentionParams& p, const Accumulator& accumulator, cudaStream_t stream);

// dq = scale * accumulator in q's dtype, 0 for rows that are not computed. float16 and bfloat16.
template <class Accumulator>
void convert_dq(const AttentionParams& p, const Accumulator& accumulator, float scale, cudaStream_t stream);

// dk and dv of `whole` from those of p, whose heads of k are parts of its (p.key_head_parts). Writes every row,
// those of a packed batch's gaps too. float16 and bfloat16.
void add_key_head_parts(const AttentionParams& p, const AttentionParams& whole, cudaStream_t stream);

// dsink[h] = -sum over rows of exp(sink - lse) * row_sum, in a fixed order.
void sink_gradient(const AttentionParams& p, cudaStream_t stream);

// ranges (B, 2): from the first key that p.key_mask shows to behind the last; [0, 0) where it shows none.
void key_ranges(const AttentionParams& p, int32_t* ranges, cudaStream_t stream);

// In a packed batch, rows that belong to no sequence: out 0 and lse -inf, or dq, dk and dv 0.
void fill_gaps_forward(const AttentionParams& p, cudaStream_t stream);
void fill_gaps_backward(const AttentionParams& p, cudaStream_t stream);

}  // namespace hf_flash::portable
