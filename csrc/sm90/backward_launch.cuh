// The launch of a backward kernel.
#pragma once

#include <cuda_runtime.h>

#include "portable/launch.h"
#include "portable/portable.h"
#include "sm90/backward_grid.h"
#include "sm90/backward_layout.cuh"

namespace hf_flash::sm90 {

// kernel(p, maps, accumulator, schedule, grid), persistent CTAs.
template <class Traits, class Kernel>
void launch_backward(Kernel* kernel, const AttentionParams& p, const typename Traits::DqSums& accumulator,
                     const BackwardGrid& grid, cudaStream_t stream) {
  static SharedMemoryPermit permit;
  permit.ask(kernel, BackwardShared<Traits>::kBytes);
  const PersistentSchedule schedule = backward_schedule(p, Traits::kKeys, multiprocessor_count(), grid);
  if (schedule.works() > INT32_MAX - (1 << 20))
    throw std::runtime_error("hf_flash: batch * heads * seqlen_k is too large for one launch");
  if (schedule.works() == 0) return;
  const BackwardMaps maps(p, Traits::kQueries, Traits::kKeys);
  AttributedLaunch launch(grid.ctas, Traits::kThreads, BackwardShared<Traits>::kBytes, stream);
  if constexpr (Traits::kRelays) {
    static ResidentClusters<kMaxCluster> resident;
    launch.make_clusters(grid.cluster);
    const int clusters = resident.ask(kernel, grid.cluster, launch.config());
    launch.config().gridDim.x = std::min(grid.ctas, grid.cluster * clusters);
  }
  if (accumulator.ordered && schedule.tiles > 1) {
    launch.make_cooperative();  // who waits for turns needs the others to be there
  } else if (portable::stay_cached(p) && p.seqlen_q > 0) {
    launch.start_early();  // while the row sums end; without queries there are none to wait for
  }
  launch("backward", kernel, p, maps, accumulator, schedule, grid);
}

}  // namespace hf_flash::sm90
