// The compiled variants of the wgmma kernels, by the same axes as those of the mma.sync kernels (sm80/instances.h).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "params.h"
#include "sm90/terms.h"

namespace hf_flash::sm90 {

// T: __half or __nv_bfloat16. Launches on the stream. Terms::kEvery drops where the call
// asks for it. Terms::kLinear: head dimension 64.
template <class T, int HEAD_DIM, bool DROPOUT, Terms TERMS>
void run_forward(const AttentionParams& p, cudaStream_t stream);

// The backward's head dimensions.
constexpr int backward_head_dim(int needed) {
  return needed <= 64 ? 64 : (needed <= 128 ? 128 : (needed <= 192 ? 192 : 256));
}

// Head dimensions 64 and 128. Terms::kLinear with dropout: 64.
template <class T, int HEAD_DIM, bool DROPOUT, Terms TERMS>
void run_backward(const AttentionParams& p, cudaStream_t stream);

// 192 and 256, (false, kNone) or (true, kEvery): dropout alone is rare there and has no machine code of its own.
template <class T, int HEAD_DIM, bool DROPOUT, Terms TERMS>
void run_wide_backward(const AttentionParams& p, cudaStream_t stream);

// Of the biases whose gradients are sums those with rows and columns of their own that the TMA engine can read, no mask
// but of keys alone beside them; the mma.sync kernel serves the others.
inline bool has_bias_gradient(const AttentionParams& p) {
  return tma_reads_bias(p) && p.mask.data == nullptr && p.dbias.row != 0 && p.dbias.col != 0 &&
         p.dbias.dtype == p.dtype && p.total_q > 0 && p.total_k > 0;
}

// As sm80's: every element of dbias, after the backward; one instance for every head dimension.
template <class T, bool DROPOUT, Terms TERMS>
void run_bias_gradient(const AttentionParams& p, cudaStream_t stream);

}  // namespace hf_flash::sm90
