// What the bindings call on a GPU. Chooses the architecture's folder from the device that is current.
#pragma once

#include <cstdint>

#include "params.h"

namespace hf_flash::cuda {

// stream is a cudaStream_t of the current device. Each throws std::runtime_error with CUDA's own words on failure.
void forward(const AttentionParams& params, void* stream);

// Bytes of params.workspace that backward() needs; params.row_sum comes on top of it.
int64_t backward_workspace(const AttentionParams& params);
void backward(const AttentionParams& params, void* stream);

// row_sum[b, h, i] = sum over Dv of dout * out, minus dlse.
void row_sum(const AttentionParams& params, void* stream);

// ranges (B, 2) on the device: the keys that params.key_mask shows lie within [begin, end), which is [0, 0) where it
// shows none.
void key_ranges(const AttentionParams& params, int32_t* ranges, void* stream);

// mask (planes, rows, cols) of dropout.h, plane = batch * Hq + h; seed points to one value on the device.
void dropout_mask(bool* mask, const int64_t* seed, int64_t planes, int64_t rows, int64_t cols, int keep, void* stream);

}  // namespace hf_flash::cuda
