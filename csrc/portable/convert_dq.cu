// The backward's last pass: dQ from the float32 accumulator's fragment order to rows of q's dtype.
#include "instructions/dependent_launch.cuh"
#include "portable/launch.h"
#include "portable/portable.h"
#include "tile/store.cuh"

namespace hf_flash::portable {
namespace {

constexpr int kThreads = 256;

// A warp converts 16 rows and 32 columns at a time: four coalesced loads, two 16-byte stores a lane.
template <class T, class Accumulator>
__global__ void __launch_bounds__(kThreads)
    convert_dq_kernel(const AttentionParams p, const Accumulator accumulator, const float scale,
                      const int32_t row_blocks, const bool cached) {
  constexpr int kRows = Accumulator::kTileRows;
  const int32_t head = blockIdx.x % p.heads_q;
  const int32_t block = blockIdx.x / p.heads_q % row_blocks;
  const int32_t b = blockIdx.x / p.heads_q / row_blocks;
  const Sequence sequence(p, b);
  const int32_t lane = threadIdx.x % 32, group = lane / 4, t = lane % 4;
  const int32_t column_groups = accumulator.columns / 32;
  T* dq = static_cast<T*>(p.dq.data) + b * p.dq.batch + head * p.dq.head;
  wait_for_kernel_before();

  for (int32_t item = threadIdx.x / 32; item < kRows / 16 * column_groups; item += kThreads / 32) {
    const int32_t row = block * kRows + item / column_groups * 16;
    const int32_t column = item % column_groups * 32;
    if (row >= sequence.len_q) return;
    const bool has_sums = accumulator.has_sums(sequence, b, head, row);
    // This lane's pairs of columns 8 n + 2 t of rows `group` and group + 8.
    uint32_t upper[4], lower[4];
    const auto load_pairs = [&](uint32_t& first, uint32_t& second, const float* from, bool exist = true) {
      float x[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float* const sum = from + DqAccumulator::element(0, 0, e);
        x[e] = has_sums && exist ? scale * (cached ? __ldcs(sum) : *sum) : 0.0f;
      }
      first = pack<T>(x[0], x[1]);
      second = pack<T>(x[2], x[3]);
    };
    if constexpr (Accumulator::kTransposed) {
      const float* rows = accumulator.rows(sequence, b, head, row);
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        const auto load_transposed = [&](uint32_t (&x)[4], int32_t unit) {
          const int32_t at = Accumulator::transposed_element(accumulator.columns, unit, column / 16 + n / 2, lane, 0);
          load_pairs(x[n], x[n + 1], rows + at, row + 8 * unit < sequence.len_q);
          x[n] = transpose_8x8(x[n]);
          x[n + 1] = transpose_8x8(x[n + 1]);
        };
        load_transposed(upper, 0);
        load_transposed(lower, 1);
      }
    } else {
      const float* first = accumulator.block(sequence, b, head, row, column);
#pragma unroll
      for (int n = 0; n < 4; ++n) load_pairs(upper[n], lower[n], first + Accumulator::element(n, lane, 0));
    }
    transpose_quad(upper, t);
    transpose_quad(lower, t);
    const int32_t d = column + 8 * t;
    if (d >= p.head_dim) continue;
    const auto store = [&](int32_t i, const uint32_t (&x)[4]) {
      if (i >= sequence.len_q) return;
      const uint4 value = sequence.computes(i) ? uint4{x[0], x[1], x[2], x[3]} : uint4{0, 0, 0, 0};
      *reinterpret_cast<uint4*>(dq + (sequence.first_q + i) * p.dq.row + d) = value;
    };
    store(row + group, upper);
    store(row + group + 8, lower);
  }
}

}  // namespace

template <class Accumulator>
void convert_dq(const AttentionParams& p, const Accumulator& accumulator, float scale, cudaStream_t stream) {
  const int32_t row_blocks = (p.seqlen_q + Accumulator::kTileRows - 1) / Accumulator::kTileRows;
  const int64_t blocks = int64_t{p.batch} * p.heads_q * row_blocks;
  if (blocks == 0) return;
  const bool cached = stay_cached(p);
  AttributedLaunch launch(static_cast<uint32_t>(blocks), kThreads, 0, stream);
  if (cached) launch.start_early();
  if (p.dtype == DType::kFloat16)
    launch("convert_dq", convert_dq_kernel<__half, Accumulator>, p, accumulator, scale, row_blocks, cached);
  else
    launch("convert_dq", convert_dq_kernel<__nv_bfloat16, Accumulator>, p, accumulator, scale, row_blocks, cached);
}

template void convert_dq(const AttentionParams&, const DqAccumulator&, float, cudaStream_t);
template void convert_dq(const AttentionParams&, const SlicedDqAccumulator&, float, cudaStream_t);
template void convert_dq(const AttentionParams&, const TallDqAccumulator&, float, cudaStream_t);

}  // namespace hf_flash::portable
