// Backward for GPUs since Ampere: FlashAttention-2's outer loop (Dao 2023) with mma.sync and cp.async. One CTA owns a
// tile of keys and walks the query tiles that see them, for every query head of the group, so dK and dV need no
// reduction. Scores are computed transposed, keys as rows: P and dS come out of the tensor cores as the operands of dV
// and dK. Only dS goes through shared memory, for dQ, which is added to a float32 accumulator in global memory.
#pragma once

#include <cuda_runtime.h>

#include "attention/schedule.cuh"
#include "portable/cuda_call.h"
#include "portable/portable.h"
#include "sm80/backward_cta.cuh"

namespace hf_flash::sm80 {

// The algorithm of one CTA.
template <class Traits>
__device__ __forceinline__ void backward_tile(const AttentionParams& p, const DqAccumulator& accumulator,
                                              const TileSchedule& schedule) {
  constexpr int kStages = Traits::kConfig.stages;
  const TileSchedule::Work work = schedule.work(false);
  extern __shared__ __align__(128) char shared_memory[];
  auto& sequence = *reinterpret_cast<Sequence*>(shared_memory + Traits::kSequence);
  {
    const Sequence found(p, work.batch);
    if (work.tile * Traits::kKeys >= found.len_k) return;
    if (threadIdx.x == 0) sequence = found;
  }
  __syncthreads();
  BackwardCta<Traits> cta(p, accumulator, sequence, work, shared_memory);
  auto* const steps = reinterpret_cast<BackwardSteps*>(shared_memory + Traits::kSteps);
  BackwardStep current{work.head * (p.heads_q / p.heads_k), 0};
  {
    const BackwardSteps found(p, sequence, work.head, cta.j0, Traits::kKeys, Traits::kQueries);
    if (threadIdx.x == 0) *steps = found;
    current.i0 = found.begin;
    if (found.begin == found.end) current.head = found.end_head;
  }
  __syncthreads();
  if (current.head < steps->end_head) {
    cta.load_keys();
    if (!Traits::kLate) cta.load_bias(current, 0);
    cta.load_queries(current, 0);
    cta.store_row_value(cta.fetch_row_value(current), 0);
  }
  const auto before = [&](const BackwardStep& step) {
    const bool same_head = step.i0 > steps->begin;
    return BackwardStep{step.head - !same_head, (same_head ? step.i0 : steps->end) - Traits::kQueries};
  };
  int n = 0;
  for (; current.head < steps->end_head; ++n) {
    const int stage = kStages == 2 ? n & 1 : 0;
    const bool same_head = current.i0 + Traits::kQueries < steps->end;
    const BackwardStep next{current.head + !same_head, same_head ? current.i0 + Traits::kQueries : steps->begin};
    const bool more = next.head < steps->end_head;
    float next_row_value = 0;
    copy_async_wait<0>();
    __syncthreads();
    if (Traits::kLate && Traits::kExtras) {
      cta.load_bias(current, stage);
      copy_async_commit();
    }
    if (kStages == 2 && more) {
      cta.load_queries(next, stage ^ 1);
      next_row_value = cta.fetch_row_value(next);
    } else if (Traits::kLate && Traits::kExtras) {
      copy_async_commit();
    }
    if (Traits::kLate && Traits::kSplit == 1 && n > 0) cta.add_dq(before(current), stage ^ 1);
    if (Traits::kLate && Traits::kExtras) {  // the bias, but not the next step's queries
      copy_async_wait<1>();
      __syncwarp();
    }
#pragma unroll 1
    for (int block = 0; block < Traits::kWarpQueries / Traits::kBlock; ++block) cta.scores(current, stage, block);
    if constexpr (Traits::kSplit == 2) {
      // dQ of the step before fills the wait for the warp that shares these keys.
      if (Traits::kLate && n > 0) cta.add_dq(before(current), stage ^ 1);
      if (Traits::kLate) {
        barrier(1 + BackwardCta<Traits>::warp() / 2, 64);
      } else {
        __syncthreads();
      }
      cta.shared_gradients(stage);
    }
    if (kStages == 1) {
      __syncthreads();
      if (more) {
        cta.load_bias(next, 0);
        cta.load_queries(next, 0);
        next_row_value = cta.fetch_row_value(next);
      }
    }
    if (!Traits::kLate) cta.add_dq(current, stage);
    if (more) cta.store_row_value(next_row_value, kStages == 2 ? stage ^ 1 : 0);
    current = next;
  }
  if (Traits::kLate && n > 0) {
    __syncthreads();
    cta.add_dq(before(current), (n - 1) & 1);
  }
  cta.store_gradients();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kConfig.blocks_per_sm)
    backward_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ DqAccumulator accumulator,
                    const TileSchedule schedule) {
#if __CUDA_ARCH__ < 900
  if constexpr (Traits::kHopper)
    __trap();  // never launched
  else
#endif
    backward_tile<Traits>(p, accumulator, schedule);
}

template <class Traits>
void launch_backward(const AttentionParams& p, const DqAccumulator& accumulator, cudaStream_t stream) {
  const auto kernel = backward_kernel<Traits>;
  static SharedMemoryPermit permit;
  permit.ask(kernel, Traits::kSharedBytes);
  TileSchedule schedule{(p.seqlen_k + Traits::kKeys - 1) / Traits::kKeys, p.heads_k, p.batch};
  for (; schedule.tiles > 0 && schedule.first_batch < p.batch; schedule.first_batch += TileSchedule::kMaxBatch) {
    kernel<<<schedule.grid(), Traits::kThreads, Traits::kSharedBytes, stream>>>(p, accumulator, schedule);
    check_launch("backward");
  }
}

inline bool is_hopper() {
#ifdef HF_FLASH_NOT_HOPPER  // to test the other devices' kernels
  return false;
#endif
  return compute_capability_major() == 9;
}

template <class T, int HEAD_DIM, bool DROPOUT, Terms TERMS>
void run_backward(const AttentionParams& p, cudaStream_t stream) {
  const DqAccumulator accumulator(p, p.workspace, HEAD_DIM);
  portable::row_sum(p, accumulator, stream);
  constexpr bool kDepends = backward_depends_on_device(HEAD_DIM, TERMS != Terms::kNone);
  if (kDepends && is_hopper()) {
    launch_backward<BackwardTraits<T, HEAD_DIM, DROPOUT, TERMS, kDepends>>(p, accumulator, stream);
  } else {
    launch_backward<BackwardTraits<T, HEAD_DIM, DROPOUT, TERMS, false>>(p, accumulator, stream);
  }
  portable::convert_dq(p, accumulator, static_cast<float>(p.scale) * (256.0f / p.dropout_keep), stream);
  if (p.dsink != nullptr) portable::sink_gradient(p, stream);
}

}  // namespace hf_flash::sm80
