// How many CTAs a backward kernel gets, and its launch.
#pragma once

#include <cuda_runtime.h>

#include "portable/cuda_call.h"
#include "sm90/backward_layout.cuh"

namespace hf_flash::sm90 {

// KERNEL(p, maps, accumulator, schedule, rotates), persistent CTAs.
template <class Traits, class Kernel>
void launch_backward(Kernel* kernel, const AttentionParams& p, const DqAccumulator& accumulator, cudaStream_t stream) {
  static SharedMemoryPermit permit;
  permit.ask(kernel, BackwardShared<Traits>::kBytes);
  const int multiprocessors = multiprocessor_count();
  const PersistentSchedule schedule = backward_schedule(p, Traits::kKeys, multiprocessors);
  if (schedule.works() > INT32_MAX - (1 << 20))
    throw std::runtime_error("hf_flash: batch * heads * seqlen_k is too large for one launch");
  if (schedule.works() == 0) return;
  const BackwardMaps maps(p, Traits::kQueries, Traits::kKeys);
  int ctas = static_cast<int>(std::min<int64_t>(schedule.works(), multiprocessors));
  // Who waits for turns needs the others to be there. Where all key tiles of a head see the same queries, all of them
  // start in the same round, each at a query tile of its own; not if that left more than a third of the SMs idle.
  const bool deterministic = accumulator.turns != nullptr;
  const bool rotates = deterministic && p.window_left < 0 && p.window_right < 0 && schedule.tiles <= ctas &&
                       3 * (ctas % schedule.tiles) <= ctas;
  if (rotates) ctas -= ctas % schedule.tiles;
  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = deterministic;
  cudaLaunchConfig_t config{dim3(ctas), dim3(Traits::kThreads), BackwardShared<Traits>::kBytes,
                            stream,     &cooperative,           1};
  check(cudaLaunchKernelEx(&config, kernel, p, maps, accumulator, schedule, rotates), "backward");
}

}  // namespace hf_flash::sm90
