// The backward's first pass over dO and O: one number a row. It also zeroes the float32 accumulator of dQ, its
// counters, or the rows of dq that nothing is added to, so that no launch of its own has to.
#include "attention/sequence.h"
#include "instructions/dependent_launch.cuh"
#include "portable/cuda_call.h"
#include "portable/portable.h"
#include "portable/vector.cuh"

namespace hf_flash::portable {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 8;  // threads of one row: 128 bytes of a 16-bit dtype, a whole cache line, at a time

// x is read again, where keeps_x while it is in the cache; y is not.
template <class Element, class Sum>
__device__ Sum dot(const Element* x, const Element* y, int32_t dim, int32_t lane, bool keeps_x) {
  using Vec = Vector<Element>;
  Sum sum = 0;
  for (int32_t d = lane * Vec::kSize; d < dim; d += kLanes * Vec::kSize) {
    const Vec a = keeps_x ? *reinterpret_cast<const Vec*>(x + d) : load_for_the_last_time(x + d);
    const Vec b = load_for_the_last_time(y + d);
#pragma unroll
    for (int e = 0; e < Vec::kSize; ++e) sum += widen<Sum>(a.element[e]) * widen<Sum>(b.element[e]);
  }
  return sum;
}

// One block: a tile of one query head of one sequence. Heads run fastest over the grid: their rows are neighbours.
template <class Element, class Accumulator>
__global__ void __launch_bounds__(kThreads) row_sum_kernel(const AttentionParams p, const Accumulator accumulator,
                                                           const int32_t row_blocks, const bool keeps_dout) {
  constexpr int kRows = Accumulator::kTileRows;
  using Sum = typename SumOf<Element>::type;
  let_next_kernel_start();
  const int32_t head = blockIdx.x % p.heads_q;
  const int32_t block = blockIdx.x / p.heads_q % row_blocks;
  const int32_t b = blockIdx.x / p.heads_q / row_blocks;
  const Sequence sequence(p, b);
  const int32_t first_row = block * kRows;
  if (first_row >= sequence.len_q) return;

  if (accumulator.data != nullptr && accumulator.zeroed_before()) {
    float4* tile = reinterpret_cast<float4*>(accumulator.rows(sequence, b, head, first_row));
    const int32_t rows = Accumulator::rows_of(sequence, first_row, kRows);
    for (int32_t n = threadIdx.x; n < rows * accumulator.columns / 4; n += kThreads) tile[n] = float4{0, 0, 0, 0};
  }
  if (accumulator.counters != nullptr && threadIdx.x < Accumulator::kCounters)
    accumulator.counter(sequence, b, head, first_row)[threadIdx.x] = 0;
  if (accumulator.zeroed != nullptr && block == 0 && threadIdx.x == 0) accumulator.zeroed_pieces(b, head) = {0, 0};
  if constexpr (sizeof(Element) == 2) {
    if (accumulator.divided.ctas > 0 && blockIdx.x == 0) accumulator.divided.lay_out(p);
  }
  const int32_t lane = threadIdx.x % kLanes;
  const auto* dout = static_cast<const Element*>(p.dout.data) + b * p.dout.batch + head * p.dout.head;
  const auto* out = static_cast<const Element*>(p.out.data) + b * p.out.batch + head * p.out.head;
#pragma unroll
  for (int32_t r = 0; r < kRows; r += kThreads / kLanes) {
    const int32_t i = first_row + r + threadIdx.x / kLanes;
    if (i - threadIdx.x / kLanes >= sequence.len_q) break;
    if (kRows % (kThreads / kLanes) != 0 && i - first_row >= kRows) break;  // whole warps
    const int64_t row = sequence.first_q + i;
    if constexpr (sizeof(Element) == 2) {  // what the kernels that finish dq take
      const bool reached = sequence.computes(i) && !sequence.keys_of(p, i, i + 1).empty();
      if (accumulator.finishes_dq && !reached && i < sequence.len_q) {
        auto* dq = static_cast<Element*>(p.dq.data) + b * p.dq.batch + head * p.dq.head + row * p.dq.row;
        for (int32_t d = lane * Vector<Element>::kSize; d < p.head_dim; d += kLanes * Vector<Element>::kSize)
          *reinterpret_cast<uint4*>(dq + d) = uint4{0, 0, 0, 0};
      }
    }
    Sum sum = 0;
    if (sequence.computes(i))
      sum = dot<Element, Sum>(dout + row * p.dout.row, out + row * p.out.row, p.head_dim_v, lane, keeps_dout);
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane != 0 || i >= sequence.len_q) continue;
    if (p.dlse.data != nullptr && sequence.computes(i))
      sum -= static_cast<const Sum*>(p.dlse.data)[b * p.dlse.batch + head * p.dlse.head + row];
    static_cast<Sum*>(p.row_sum.data)[b * p.row_sum.batch + head * p.row_sum.head + row] = sum;
  }
}

}  // namespace

template <class Accumulator>
void row_sum(const AttentionParams& p, const Accumulator& accumulator, cudaStream_t stream) {
  const int32_t row_blocks = (p.seqlen_q + Accumulator::kTileRows - 1) / Accumulator::kTileRows;
  const int64_t blocks = int64_t{p.batch} * p.heads_q * row_blocks;
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error("hf_flash: batch * heads * seqlen_q is too large for one launch");
  with_element(p.dtype, [&](auto element) {
    using Element = decltype(element);
    if constexpr (sizeof(Element) == 2 || std::is_same_v<Accumulator, DqAccumulator>) {
      row_sum_kernel<Element>
          <<<static_cast<uint32_t>(blocks), kThreads, 0, stream>>>(p, accumulator, row_blocks, stay_cached(p));
    } else {
      throw std::runtime_error("hf_flash: the backward's kernels serve 16-bit dtypes");
    }
  });
  check_launch("row_sum");
}

template void row_sum(const AttentionParams&, const DqAccumulator&, cudaStream_t);
template void row_sum(const AttentionParams&, const SlicedDqAccumulator&, cudaStream_t);
template void row_sum(const AttentionParams&, const TallDqAccumulator&, cudaStream_t);

}  // namespace hf_flash::portable
