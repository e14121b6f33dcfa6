// The driver's encoder of tensor maps, found at run time: the library does not link the driver.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "portable/cuda_call.h"
#include "sm90/tensor_map.h"

namespace hf_flash::sm90 {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encoder() {
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess)
      throw std::runtime_error(
          "hf_flash: the NVIDIA driver has no tensor maps; Hopper's kernels need driver 525 or newer");
    return reinterpret_cast<Encode>(function);
  }();
  return encode;
}

}  // namespace

CUtensorMap tensor_map(const Rows& x, DType dtype, int batch, int64_t rows, int heads, int dim, int box_rows) {
  if (batch == 0 || rows == 0 || dim == 0) return CUtensorMap{};  // no tile is ever copied, and the strides may be any
  const auto type = dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const int64_t counts[3] = {rows, heads, batch}, steps[3] = {x.row, x.head, x.batch};
  cuuint64_t sizes[4] = {static_cast<cuuint64_t>(dim), 1, 1, 1}, strides[3];
  for (int d = 0; d < 3; ++d) {
    const bool used = counts[d] > 1 && steps[d] != 0;
    sizes[d + 1] = used ? counts[d] : 1;
    strides[d] = 2 * (used ? steps[d] : (dim + 7) / 8 * 8);  // of a dimension of size 1: any that the driver accepts
  }
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box_rows), 1, 1}, every[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encoder()(&map, type, 4, x.data, sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("hf_flash: cuTensorMapEncodeTiled failed with code " + std::to_string(result));
  return map;
}

}  // namespace hf_flash::sm90
