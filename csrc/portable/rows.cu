// Rows that no tile reaches, the ranges of a mask of keys, the gradient of the sinks, and the dropout mask as a tensor.
#include <climits>
#include <cmath>

#include "attention/dropout.h"
#include "attention/sequence.h"
#include "dispatch.h"
#include "portable/cuda_call.h"
#include "portable/portable.h"

namespace hf_flash::portable {
namespace {

constexpr int kThreads = 256;

// Zeroes rows [begin, end) of a packed 16-bit tensor, 16 bytes at a time.
__device__ void zero_rows(const Rows& t, int64_t begin, int64_t end, int32_t heads, int32_t dim) {
  if (t.data == nullptr) return;
  const int64_t vectors = dim / 8, per_row = heads * vectors;
  for (int64_t n = threadIdx.x; n < (end - begin) * per_row; n += kThreads) {
    const int64_t row = begin + n / per_row, head = n % per_row / vectors, d = n % vectors * 8;
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(t.data) + row * t.row + head * t.head + d) = uint4{0, 0, 0, 0};
  }
}

struct Gap {
  int64_t begin, end;
};

// The rows between the end of sequence b - 1 and the start of sequence b; b = batch: up to the end of the storage.
__device__ Gap gap_before(const AttentionParams& p, int32_t b, bool keys) {
  Gap gap{0, keys ? p.total_k : p.total_q};
  if (b > 0) {
    const Sequence before(p, b - 1);
    gap.begin = keys ? before.first_k + before.len_k : before.first_q + before.len_q;
  }
  if (b < p.batch) {
    const Sequence after(p, b);
    gap.end = keys ? after.first_k : after.first_q;
  }
  return gap;
}

__global__ void __launch_bounds__(kThreads) gaps_forward_kernel(const AttentionParams p) {
  const Gap gap = gap_before(p, blockIdx.x, false);
  zero_rows(p.out, gap.begin, gap.end, p.heads_q, p.head_dim_v);
  const int64_t rows = gap.end - gap.begin;
  for (int64_t n = threadIdx.x; n < rows * p.heads_q; n += kThreads)
    static_cast<float*>(p.lse.data)[n / rows * p.lse.head + gap.begin + n % rows] = -INFINITY;
}

__global__ void __launch_bounds__(kThreads) gaps_backward_kernel(const AttentionParams p) {
  const Gap queries = gap_before(p, blockIdx.x, false), keys = gap_before(p, blockIdx.x, true);
  zero_rows(p.dq, queries.begin, queries.end, p.heads_q, p.head_dim);
  zero_rows(p.dk, keys.begin, keys.end, p.heads_k, p.head_dim);
  zero_rows(p.dv, keys.begin, keys.end, p.heads_k, p.head_dim_v);
}

// One block a sequence: from the first key that its mask shows to the last.
__global__ void __launch_bounds__(1024) key_ranges_kernel(const AttentionParams p, int32_t* ranges) {
  const uint8_t* const mask = p.key_mask + blockIdx.x * p.mask.batch;
  int32_t first = INT_MAX, last = -1;
#pragma unroll 4
  for (int32_t j = threadIdx.x; j < p.seqlen_k; j += blockDim.x) {
    if (mask[j] == 0) continue;
    first = min(first, j);
    last = j;
  }
  __shared__ int32_t firsts[32], lasts[32];
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  firsts[warp] = __reduce_min_sync(0xFFFFFFFF, first);
  lasts[warp] = __reduce_max_sync(0xFFFFFFFF, last);
  __syncthreads();
  if (warp > 0) return;
  first = __reduce_min_sync(0xFFFFFFFF, firsts[lane]);
  last = __reduce_max_sync(0xFFFFFFFF, lasts[lane]);
  if (lane < 2) ranges[2 * blockIdx.x + lane] = lane == 1 ? last + 1 : last < 0 ? 0 : first;
}

// One block a query head: its threads' partial sums are added in a fixed tree.
__global__ void __launch_bounds__(1024) sink_gradient_kernel(const AttentionParams p) {
  const int32_t head = blockIdx.x;
  const float sink = static_cast<const float*>(p.sink)[head];
  float sum = 0;
  for (int32_t b = 0; b < p.batch; ++b) {
    const Sequence sequence(p, b);
    const float* lse = static_cast<const float*>(p.lse.data) + b * p.lse.batch + head * p.lse.head + sequence.first_q;
    const float* row_sum =
        static_cast<const float*>(p.row_sum.data) + b * p.row_sum.batch + head * p.row_sum.head + sequence.first_q;
    for (int32_t i = sequence.query_begin + threadIdx.x; i < sequence.query_end; i += blockDim.x)
      if (lse[i] > -INFINITY) sum -= __expf(sink - lse[i]) * row_sum[i];  // a sink of -inf has lse -inf where alone
  }
  __shared__ float partial[1024];
  partial[threadIdx.x] = sum;
  for (int step = 512; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.x < step) partial[threadIdx.x] += partial[threadIdx.x + step];
  }
  if (threadIdx.x == 0) static_cast<float*>(p.dsink)[head] = partial[0];
}

// A thread draws once and writes the 16 elements that share the draw.
__global__ void __launch_bounds__(kThreads)
    dropout_mask_kernel(bool* mask, const int64_t* seed, int64_t planes, int64_t rows, int64_t cols, int keep) {
  const int64_t row_blocks = (rows + 15) / 16, col_blocks = (cols + 15) / 16;
  const int64_t n = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 16;
  const int32_t part = threadIdx.x % 16;
  if (n >= planes * row_blocks * col_blocks) return;
  const int64_t plane = n / (row_blocks * col_blocks);
  const int64_t i = n / col_blocks % row_blocks * 16 + part / 4 * 2, j = n % col_blocks * 16 + part % 4 * 2;
  const Philox4 words = dropout_words(static_cast<uint64_t>(*seed), static_cast<uint32_t>(plane),
                                      static_cast<uint32_t>(i), static_cast<uint32_t>(j));
#pragma unroll
  for (int e = 0; e < 16; ++e) {
    const int word = e / 4, byte = e % 4;
    const int64_t row = i + word / 2 + byte / 2 * 8, col = j + word % 2 + byte % 2 * 8;
    if (row < rows && col < cols)
      mask[(plane * rows + row) * cols + col] = static_cast<int>(words.word[word] >> (8 * byte) & 0xFF) < keep;
  }
}

}  // namespace

void fill_gaps_forward(const AttentionParams& p, cudaStream_t stream) {
  gaps_forward_kernel<<<p.batch + 1, kThreads, 0, stream>>>(p);
  check_launch("fill_gaps_forward");
}

void fill_gaps_backward(const AttentionParams& p, cudaStream_t stream) {
  gaps_backward_kernel<<<p.batch + 1, kThreads, 0, stream>>>(p);
  check_launch("fill_gaps_backward");
}

void key_ranges(const AttentionParams& p, int32_t* ranges, cudaStream_t stream) {
  key_ranges_kernel<<<p.batch, 1024, 0, stream>>>(p, ranges);
  check_launch("key_ranges");
}

void sink_gradient(const AttentionParams& p, cudaStream_t stream) {
  sink_gradient_kernel<<<p.heads_q, 1024, 0, stream>>>(p);
  check_launch("sink_gradient");
}

}  // namespace hf_flash::portable

namespace hf_flash::cuda {

void dropout_mask(bool* mask, const int64_t* seed, int64_t planes, int64_t rows, int64_t cols, int keep, void* stream) {
  const int64_t threads = planes * ((rows + 15) / 16) * ((cols + 15) / 16) * 16;
  const int64_t blocks = (threads + portable::kThreads - 1) / portable::kThreads;
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error("hf_flash: the dropout mask is too large for one launch");
  portable::
      dropout_mask_kernel<<<static_cast<uint32_t>(blocks), portable::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          mask, seed, planes, rows, cols, keep);
  check_launch("dropout_mask");
}

}  // namespace hf_flash::cuda
