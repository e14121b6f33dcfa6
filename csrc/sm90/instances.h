// The compiled variants of the wgmma kernels: the same as those of the mma.sync kernels (sm80/instances.h).
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace hf_flash::sm90 {

// T: __half or __nv_bfloat16. Launches on the stream.
template <class T, int HEAD_DIM, bool DROPOUT, bool EXTRAS>
void run_forward(const AttentionParams& p, cudaStream_t stream);

}  // namespace hf_flash::sm90
