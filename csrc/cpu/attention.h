// The whole contract on the CPU: float64, float32, bfloat16 and float16, block by block. No torch here: the bindings
// pass torch's thread pool in.
#pragma once

#include <cstdint>

#include "params.h"

namespace hf_flash::cpu {

// Runs body(begin, end, context) over pieces of [begin, end) on all cores.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                             void* context);

// Writes out and lse.
void forward(const AttentionParams& params, ParallelFor parallel_for);

// Bytes of params.workspace that backward() needs; params.row_sum comes on top of it.
int64_t backward_workspace(const AttentionParams& params);

// row_sum[b, h, i] = sum over Dv of dout * out, minus dlse.
void row_sum(const AttentionParams& params, ParallelFor parallel_for);

// mask (planes, rows, cols) of dropout.h, plane = batch * Hq + h; seed points to one value.
void dropout_mask(bool* mask, const int64_t* seed, int64_t planes, int64_t rows, int64_t cols, int keep,
                  ParallelFor parallel_for);

// Writes dq, dk, dv, and dbias and dsink where their pointers are set. The same bits on every run.
void backward(const AttentionParams& params, ParallelFor parallel_for);

}  // namespace hf_flash::cpu
