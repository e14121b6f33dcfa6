// dk and dv of a head of k that several pieces of work have given parts of.
#include "portable/cuda_call.h"
#include "portable/portable.h"
#include "portable/vector.cuh"

namespace hf_flash::portable {
namespace {

constexpr int kThreads = 256;

// to (rows, heads, dim) = sum over the parts of from (rows, heads, parts, dim), in float32 and in their order. A thread
// has 16 bytes.
template <class T>
__device__ void add_up(const T* from, T* to, int64_t rows, int32_t heads, int32_t parts, int32_t dim) {
  using Vec = Vector<T>;
  const int32_t pieces = dim / Vec::kSize;
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= rows * heads * pieces) return;
  const int64_t row_head = n / pieces;
  const int32_t d = n % pieces * Vec::kSize;
  const T* part = from + row_head * parts * dim + d;
  float sum[Vec::kSize] = {};
#pragma unroll 4
  for (int32_t i = 0; i < parts; ++i, part += dim) {
    const Vec x = load_for_the_last_time(part);
#pragma unroll
    for (int e = 0; e < Vec::kSize; ++e) sum[e] += widen<float>(x.element[e]);
  }
  Vec result;
#pragma unroll
  for (int e = 0; e < Vec::kSize; ++e) result.element[e] = static_cast<T>(sum[e]);
  *reinterpret_cast<Vec*>(to + row_head * dim + d) = result;
}

template <class T>
__global__ void __launch_bounds__(kThreads) add_parts_kernel(const AttentionParams p, const AttentionParams whole) {
  const bool is_dv = blockIdx.y;  // dk and dv are contiguous, those in parts too
  const Rows &from = is_dv ? p.dv : p.dk, &to = is_dv ? whole.dv : whole.dk;
  add_up(static_cast<const T*>(from.data), static_cast<T*>(to.data), p.total_k, whole.heads_k, p.key_head_parts,
         is_dv ? p.head_dim_v : p.head_dim);
}

}  // namespace

void add_key_head_parts(const AttentionParams& p, const AttentionParams& whole, cudaStream_t stream) {
  const int64_t pieces = p.total_k * whole.heads_k * (std::max(p.head_dim, p.head_dim_v) / 8);
  const int64_t blocks = (pieces + kThreads - 1) / kThreads;
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error("hf_flash: batch * heads * seqlen_k is too large for one launch");
  const dim3 grid(static_cast<uint32_t>(blocks), 2);
  if (p.dtype == DType::kFloat16)
    add_parts_kernel<__half><<<grid, kThreads, 0, stream>>>(p, whole);
  else
    add_parts_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(p, whole);
  check_launch("add_key_head_parts");
}

}  // namespace hf_flash::portable
