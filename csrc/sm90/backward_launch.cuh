// What runs around a backward kernel, and its launch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "portable/launch.h"
#include "portable/portable.h"
#include "sm90/backward_grid.h"
#include "sm90/backward_layout.cuh"

namespace hf_flash::sm90 {

// Under a causal mask the first keys are seen by the most queries. Heads come in sections whose Q, dO and float32
// accumulators lie in the L2 cache together, and which fill a round: with 64 MB of them S 1024 at D 64 ran at 202
// instead of 278 TFLOP/s; D 128, S 2048 with 32 MB instead of 16 -1 to -3 %. 8 CTAs, 16 where tiles of 64 keys move as
// many bytes for half of the keys, share a head if that takes no more than 32 MB: D 128, S 4096 468 -> 488. Beyond, as
// few heads as fill a round: with 16 at S 8192 and 16384 the memory moves three times as much, and at the power limit
// that is 3 to 4 % of the speed. In a fixed order of the additions CTAs that share one wait for each other: fewer do.
inline PersistentSchedule backward_schedule(const AttentionParams& p, int keys, int ctas, const BackwardGrid& grid) {
  PersistentSchedule schedule{(p.seqlen_k + keys - 1) / keys, p.heads_k, p.batch * p.heads_k};
  if (grid.divided.ctas > 0) {
    schedule.divided_round = grid.divided.before / ctas;
    return schedule;
  }
  schedule.listed = p.ragged() && !grid.rotates && !grid.relays();
  if (grid.relays()) schedule.side = grid.cluster;
  if (p.window_right >= 0 && p.window_left < 0 && schedule.listed) {
    schedule.by_tile = schedule.first_is_longest = true;
  } else if (p.window_right >= 0 && p.window_left < 0 && schedule.works() > 0) {
    const int64_t rows = int64_t{std::max(1, p.seqlen_q)} * (p.heads_q / p.heads_k);
    const int64_t loaded = 2 * rows * (p.head_dim + p.head_dim_v), summed = 4 * rows * p.head_dim;
    const int64_t few = ctas / 16, many = ctas / (keys < 128 ? 16 : 8), fit = (16 << 20) / (loaded + summed);
    const int64_t cached = fit < few && 2 * fit >= few ? 2 * fit : fit;
    int64_t heads = schedule.planes_that_fill(std::max(cached, int64_t{ctas / schedule.tiles}), many, ctas);
    if (p.deterministic) heads = std::max<int64_t>((32 << 20) / loaded, ctas / 4);
    schedule.first_is_longest = true;
    schedule.sort_by_length(heads, ctas);
    if (p.deterministic) schedule.shift = 0;  // -1 %
  }
  return schedule;
}

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
    if (grid.rotates) {  // all key tiles of a head are at work at once, or would wait for each other in a circle
      const int whole = size * ((p.seqlen_k + Traits::kKeys - 1) / Traits::kKeys);
      launch.config().gridDim.x -= launch.config().gridDim.x % whole;
      if (launch.config().gridDim.x == 0)
        throw std::runtime_error(
            "hf_flash: this device runs too few clusters at once for a backward in a fixed order at this "
            "length; leave deterministic out");
    }
    if (!Traits::kRelays) teams = clusters;
  }
  const PersistentSchedule schedule = backward_schedule(p, Traits::kKeys, teams, grid);
  if (schedule.works() > INT32_MAX - (1 << 20))
    throw std::runtime_error("hf_flash: batch * heads * seqlen_k is too large for one launch");
  const BackwardMaps maps(p, Traits::kQueries, Traits::kKeys, Traits::kQueries / Traits::kScoreTiles);
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
