// What runs around a backward kernel, and its launch.
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
  if (grid.ctas == 0) return;
  AttributedLaunch launch(grid.ctas, Traits::kThreads, BackwardShared<Traits>::kBytes, stream);
  int teams = multiprocessor_count();
  if constexpr (Traits::kRelays || Traits::kTeam > 1) {
    static ResidentClusters<kMaxCluster> resident;
    const int size = Traits::kRelays ? grid.cluster : Traits::kTeam;
    launch.make_clusters(size);
    const int clusters = resident.ask(kernel, size, launch.config());
    launch.config().gridDim.x = std::min(grid.ctas, size * clusters);
    if (!Traits::kRelays) teams = clusters;
  }
  const PersistentSchedule schedule = backward_schedule(p, Traits::kKeys, teams, grid);
  if (schedule.works() > INT32_MAX - (1 << 20))
    throw std::runtime_error("hf_flash: batch * heads * seqlen_k is too large for one launch");
  const BackwardMaps maps(p, Traits::kQueries, Traits::kKeys);
  if (accumulator.ordered && schedule.tiles > 1) {
    launch.make_cooperative();  // who waits for turns needs the others to be there
  } else if (portable::stay_cached(p) && p.seqlen_q > 0) {
    launch.start_early();  // while the row sums end; without queries there are none to wait for
  }
  launch("backward", kernel, p, maps, accumulator, schedule, grid);
}

// All passes of a call.
template <class Traits, class Kernel>
void run_passes(Kernel* kernel, const AttentionParams& p, const typename Traits::DqSums& accumulator,
                const BackwardGrid& grid, cudaStream_t stream) {
  portable::row_sum(p, accumulator, stream);
  launch_backward<Traits>(kernel, p, accumulator, grid, stream);
  if (!accumulator.finishes_dq)
    portable::convert_dq(p, accumulator, static_cast<float>(p.scale) * (256.0f / p.dropout_keep), stream);
  if (p.dsink != nullptr) portable::sink_gradient(p, stream);
}

}  // namespace hf_flash::sm90
