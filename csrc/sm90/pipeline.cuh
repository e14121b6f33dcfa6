// Rings of stages in shared memory between warps that fill them, most by TMA, and warps that empty them.
#pragma once

#include "instructions/mbarrier.cuh"
#include "instructions/warpgroup.cuh"

namespace hf_flash::sm90 {

// One lane arrives for its warp, behind a __syncwarp. compute-sanitizer's racecheck does not see what that orders; for
// it a build with HF_FLASH_EVERY_LANE_ARRIVES lets all of them.
#ifdef HF_FLASH_EVERY_LANE_ARRIVES
constexpr int kLanesThatArrive = kWarpThreads;
#else
constexpr int kLanesThatArrive = 1;
#endif
__device__ constexpr int warps(int count) { return count * kLanesThatArrive; }
__device__ __forceinline__ void arrive_as_warp(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % kWarpThreads < kLanesThatArrive) mbarrier_arrive(barrier);
}

// STAGES pairs of barriers at a shared address: full, empty, full, empty ... A place in the ring is the number of
// stages that were filled before it: one register says which stage, and whether the round is odd.
template <int STAGES>
struct Ring {
  static constexpr int kBytes = 16 * STAGES;
  uint32_t barriers;

  __device__ explicit Ring(uint32_t barriers) : barriers(barriers) {}
  __device__ static uint32_t stage(uint32_t place) { return place % STAGES; }
  __device__ static uint32_t parity(uint32_t place) { return place / STAGES & 1; }
  __device__ __forceinline__ uint32_t full(uint32_t place) const { return barriers + 16 * stage(place); }
  __device__ __forceinline__ uint32_t empty(uint32_t place) const { return full(place) + 8; }

  // By one thread, before anybody uses the ring. How many arrive; what warps release or fill counts as warps(n).
  __device__ void init(int consumers, int producers = 1) const {
    for (int stage = 0; stage < STAGES; ++stage) {
      mbarrier_init(barriers + 16 * stage, producers);
      mbarrier_init(barriers + 16 * stage + 8, consumers);
    }
  }
  __device__ __forceinline__ void wait_empty(uint32_t place) const { mbarrier_wait(empty(place), parity(place) ^ 1); }
  __device__ __forceinline__ void wait_full(uint32_t place) const { mbarrier_wait(full(place), parity(place)); }
  // A warp says that it has done its part of filling a stage.
  __device__ __forceinline__ void release_full(uint32_t place) const { arrive_as_warp(full(place)); }
  // A warp says that it is done with a stage.
  __device__ __forceinline__ void release(uint32_t place) const { arrive_as_warp(empty(place)); }
};

// By all threads of a CTA, which then wait for each other.
template <class Shared>
__device__ __forceinline__ void init_barriers(const Shared& shared) {
  if (threadIdx.x != 0) return;
  shared.init();
  mbarrier_init_fence();
}

}  // namespace hf_flash::sm90
