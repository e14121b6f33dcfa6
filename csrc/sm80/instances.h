// The compiled variants of the mma.sync kernels: what dispatch.cu may call and what instances.py generates. Few axes
// are worth machine code of their own; everything else is decided at run time.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace hf_flash::sm80 {

// Head dimensions that are compiled; a call uses the smallest that holds both D and Dv.
constexpr int kHeadDims[] = {32, 64, 96, 128, 192, 256};

// DROPOUT: the call may drop. Terms::kEvery: softcap, ALiBi, bias or a mask of more than keys, and it may drop too.
// Above 128 one variant, (true, kEvery), does everything: such heads are rare, and code size and build time are not.
constexpr bool has_variants(int head_dim) { return head_dim <= 128; }
// Does Terms::kLinear have variants of its own, without and with dropout?
constexpr bool has_linear_terms(int head_dim) { return head_dim == 64 || head_dim == 128; }

// T: __half or __nv_bfloat16. Launches on the stream.
template <class T, int HEAD_DIM, bool DROPOUT, Terms TERMS>
void run_forward(const AttentionParams& p, cudaStream_t stream);

template <class T, int HEAD_DIM, bool DROPOUT, Terms TERMS>
void run_backward(const AttentionParams& p, cudaStream_t stream);

// dbias where params.dbias_sums: every element of it, in dbias's dtype. After the backward, whose row sums it reads;
// serves every head dimension, and Hopper what its own kernel does not.
template <class T, bool DROPOUT, Terms TERMS>
void run_bias_gradient(const AttentionParams& p, cudaStream_t stream);

}  // namespace hf_flash::sm80
