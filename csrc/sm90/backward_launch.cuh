// The launch of a backward kernel.
#pragma once

#include <cuda_runtime.h>

#include "portable/cuda_call.h"
#include "sm90/backward_grid.h"
#include "sm90/backward_layout.cuh"

namespace hf_flash::sm90 {

// kernel(p, maps, accumulator, schedule, grid), persistent CTAs.
template <class Traits, class Kernel>
void launch_backward(Kernel* kernel, const AttentionParams& p, const typename Traits::DqSums& accumulator,
                     const BackwardGrid& grid, cudaStream_t stream) {
  static SharedMemoryPermit permit;
  permit.ask(kernel, BackwardShared<Traits>::kBytes);
  const PersistentSchedule schedule = backward_schedule(p, Traits::kKeys, multiprocessor_count(), grid.rotates);
  if (schedule.works() > INT32_MAX - (1 << 20))
    throw std::runtime_error("hf_flash: batch * heads * seqlen_k is too large for one launch");
  if (schedule.works() == 0) return;
  const BackwardMaps maps(p, Traits::kQueries, Traits::kKeys);
  cudaLaunchAttribute cooperative;  // who waits for turns needs the others to be there
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = accumulator.ordered && schedule.tiles > 1;
  cudaLaunchConfig_t config{dim3(grid.ctas), dim3(Traits::kThreads), BackwardShared<Traits>::kBytes,
                            stream,          &cooperative,           1};
  check(cudaLaunchKernelEx(&config, kernel, p, maps, accumulator, schedule, grid), "backward");
}

}  // namespace hf_flash::sm90
