// Tensor maps: how the TMA engine sees a tensor of rows. Made on the host for each call; the kernel gets them as
// parameters.
#pragma once

#include <cuda.h>

#include "params.h"

namespace hf_flash::sm90 {

// The map of x, (batch, rows, heads, dim) or packed (1, rows, heads, dim), in boxes of box_rows rows and 64 columns
// with the 128-byte swizzle; columns past dim and rows past the end arrive as zeros. A dimension with stride 0 has
// size 1 in the map: its coordinate must be 0 (coordinate_of).
CUtensorMap tensor_map(const Rows& x, DType dtype, int batch, int64_t rows, int heads, int dim, int box_rows);

#ifdef __CUDACC__
// Coordinate of head or batch `index` in a dimension with this stride.
__device__ __forceinline__ int coordinate_of(int64_t stride, int index) { return stride == 0 ? 0 : index; }
#endif

}  // namespace hf_flash::sm90
