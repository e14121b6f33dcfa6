// The backward's last pass: dQ from the float32 accumulator's fragment order to rows of q's dtype.
#include "instructions/arithmetic.cuh"
#include "instructions/dependent_launch.cuh"
#include "portable/launch.h"
#include "portable/portable.h"
#include "tile/store.cuh"

namespace hf_flash::portable {
namespace {

constexpr int kThreads = 256;

// 16 rows and 32 columns of dQ, by a warp. All of its sums are loaded before the first is rounded.
template <class T, class Accumulator>
struct ConvertedBlock {
  const Sequence& sequence;
  const int32_t row, column;
  float sums[4][4];

  // Four coalesced loads of a lane.
  __device__ __forceinline__ void load(const Accumulator& accumulator, int32_t b, int32_t head) {
    const int32_t lane = threadIdx.x % 32;
    const bool has_sums = accumulator.has_sums(sequence, b, head, row);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float* from;
      bool exist = has_sums;
      if constexpr (Accumulator::kTransposed) {
        exist = exist && row + n / 2 * 8 < sequence.len_q;
        from = accumulator.rows(sequence, b, head, row) +
               Accumulator::transposed_element(accumulator.columns, n / 2, column / 16 + n % 2, lane, 0);
      } else {
        from = accumulator.block(sequence, b, head, row, column) + Accumulator::element(n, lane, 0);
      }
      if (Accumulator::element(0, 0, 1) == 1) {
        const uint4 bits = load_global_16_bytes_if(exist, from);
        memcpy(sums[n], &bits, sizeof(sums[n]));
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[n][e] = load_global_if(exist, from + Accumulator::element(0, 0, e));
      }
    }
  }

  // Two stores of 16 bytes a lane. dq: the head's first row of this batch.
  __device__ __forceinline__ void store(const AttentionParams& p, T* dq, float scale) const {
    const int32_t lane = threadIdx.x % 32, group = lane / 4, t = lane % 4;
    uint32_t upper[4], lower[4];  // this lane's pairs of columns 8 n + 2 t of rows `group` and group + 8
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float (&x)[4] = sums[n];
      const uint32_t first = pack<T>(scale * x[0], scale * x[1]), second = pack<T>(scale * x[2], scale * x[3]);
      if constexpr (Accumulator::kTransposed) {
        uint32_t (&to)[4] = n / 2 == 0 ? upper : lower;
        to[n % 2 * 2] = transpose_8x8(first);
        to[n % 2 * 2 + 1] = transpose_8x8(second);
      } else {
        upper[n] = first;
        lower[n] = second;
      }
    }
    transpose_quad(upper, t);
    transpose_quad(lower, t);
    const int32_t d = column + 8 * t;
    if (d >= p.head_dim) return;
    const auto store_row = [&](int32_t i, const uint32_t (&x)[4]) {
      if (i >= sequence.len_q) return;
      const uint4 value = sequence.computes(i) ? uint4{x[0], x[1], x[2], x[3]} : uint4{0, 0, 0, 0};
      *reinterpret_cast<uint4*>(dq + (sequence.first_q + i) * p.dq.row + d) = value;
    };
    store_row(row + group, upper);
    store_row(row + group + 8, lower);
  }
};

// A block: a tile of one query head of one sequence.
template <class T, class Accumulator>
__global__ void __launch_bounds__(kThreads) convert_dq_kernel(const AttentionParams p, const Accumulator accumulator,
                                                              const float scale, const int32_t row_blocks) {
  constexpr int kRows = Accumulator::kTileRows;
  const int32_t head = blockIdx.x % p.heads_q;
  const int32_t block = blockIdx.x / p.heads_q % row_blocks;
  const int32_t b = blockIdx.x / p.heads_q / row_blocks;
  const Sequence sequence(p, b);
  const int32_t column_groups = accumulator.columns / 32;
  T* const dq = static_cast<T*>(p.dq.data) + b * p.dq.batch + head * p.dq.head;
  wait_for_kernel_before();

  for (int32_t item = threadIdx.x / 32; item < kRows / 16 * column_groups; item += kThreads / 32) {
    ConvertedBlock<T, Accumulator> own{sequence, block * kRows + item / column_groups * 16, item % column_groups * 32};
    if (own.row >= sequence.len_q) return;
    own.load(accumulator, b, head);
    own.store(p, dq, scale);
  }
}

}  // namespace

template <class Accumulator>
void convert_dq(const AttentionParams& p, const Accumulator& accumulator, float scale, cudaStream_t stream) {
  const int32_t row_blocks = (p.seqlen_q + Accumulator::kTileRows - 1) / Accumulator::kTileRows;
  const int64_t blocks = int64_t{p.batch} * p.heads_q * row_blocks;
  if (blocks == 0) return;
  AttributedLaunch launch(static_cast<uint32_t>(blocks), kThreads, 0, stream);
  if (stay_cached(p)) launch.start_early();
  if (p.dtype == DType::kFloat16)
    launch("convert_dq", convert_dq_kernel<__half, Accumulator>, p, accumulator, scale, row_blocks);
  else
    launch("convert_dq", convert_dq_kernel<__nv_bfloat16, Accumulator>, p, accumulator, scale, row_blocks);
}

template void convert_dq(const AttentionParams&, const DqAccumulator&, float, cudaStream_t);
template void convert_dq(const AttentionParams&, const SlicedDqAccumulator&, float, cudaStream_t);
template void convert_dq(const AttentionParams&, const TallDqAccumulator&, float, cudaStream_t);

}  // namespace hf_flash::portable
