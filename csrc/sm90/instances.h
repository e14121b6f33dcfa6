// The compiled variants of the wgmma kernels, by the same axes as those of the mma.sync kernels (sm80/instances.h).
#pragma once

#include <cuda_runtime.h>

#include "params.h"
#include "sm90/tensor_map.h"

namespace hf_flash::sm90 {

// T: __half or __nv_bfloat16. Launches on the stream.
template <class T, int HEAD_DIM, bool DROPOUT, bool EXTRAS>
void run_forward(const AttentionParams& p, cudaStream_t stream);

// What the backward serves of a head dimension, 64 or 128. Beside dK and dV of 128 columns extras find registers only
// without dropout, and no pointers to what is read or written element by element: masks, most biases beside a softcap
// or that the TMA engine cannot read, gradients of biases that broadcast nowhere.
constexpr bool extras_drop(int head_dim) { return head_dim <= 64; }
constexpr bool extras_by_element(int head_dim) { return head_dim <= 64; }

// The backward's head dimension for a call; 0: none, the mma.sync kernels serve it.
inline int backward_head_dim(const AttentionParams& p, bool extras) {
  const int needed = p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v;
  const bool by_element = p.mask.data != nullptr || (p.dbias.data != nullptr && !p.dbias_sums) ||
                          (p.bias.data != nullptr && (p.softcap != 0 || !tma_reads_bias(p)));
  if (needed <= 64) return 64;
  if (needed > 128 || (extras && p.dropout_keep < 256) || by_element) return 0;
  return 128;
}

template <class T, int HEAD_DIM, bool DROPOUT, bool EXTRAS>
void run_backward(const AttentionParams& p, cudaStream_t stream);

// Of the biases whose gradients are sums those with rows and columns of their own that the TMA engine can read, no mask
// beside them; the mma.sync kernel serves the others.
inline bool has_bias_gradient(const AttentionParams& p) {
  return tma_reads_bias(p) && p.mask.data == nullptr && p.dbias.row != 0 && p.dbias.col != 0 &&
         p.dbias.dtype == p.dtype && p.total_q > 0 && p.total_k > 0;
}

// As sm80's: every element of dbias, after the backward; one instance for every head dimension.
template <class T>
void run_bias_gradient(const AttentionParams& p, cudaStream_t stream);

}  // namespace hf_flash::sm90
