// How a pair of CTAs divides the work of the backward of head dimensions over 128: tiles and shared memory. Plans,
// steps and maps are those of backward_layout.cuh.
#pragma once

#include "instructions/cluster.cuh"
#include "sm90/wide_backward_layout.cuh"

namespace hf_flash::sm90 {

template <class ELEMENT, int HEAD_DIM>
struct PairedTraits : RoleTraits<ELEMENT, HEAD_DIM, 2> {
  using Base = RoleTraits<ELEMENT, HEAD_DIM, 2>;
  using typename Base::KeyTile;
  using typename Base::QueryTile;
  using typename Base::ScoreColumns;
  static constexpr bool kDropout = false, kExtras = false, kEveryTerm = false;
  static_assert(Base::kKeys == 64 * Base::kWarpgroups);

  // Shared memory of either CTA, in brackets of the second one: K (V) of a piece of work; of a step Q (dO), which the
  // scores are made of, and dO (Q), which is summed up; of two steps dS, which the second lays out and the first
  // multiplies; both slices of dQ of each warpgroup (P of two steps, as it enters dV); lse and row sums of two steps,
  // plans, barriers.
  static constexpr int kSlicePlaces = Base::Slices::kCount;
  static constexpr int kFactor = KeyTile::kBytes;
  static constexpr int kSummand = kFactor + QueryTile::kBytes;
  static constexpr int kDs = kSummand + QueryTile::kBytes;
  static constexpr int kDq = kDs + Base::kScoreStages * ScoreColumns::kBytes;
  static constexpr int kProbabilities = kDq;
  static constexpr int kValues = kDq + Base::kWarpgroups * kSlicePlaces * Base::kSliceBytes;
  static_assert(kProbabilities + Base::kScoreStages * ScoreColumns::kBytes <= kValues);
};

// One lane arrives for its warp at a barrier of another CTA.
__device__ __forceinline__ void arrive_as_warp_at(uint32_t barrier, int cta) {
  __syncwarp();
  if (threadIdx.x % kWarpThreads < kLanesThatArrive) mbarrier_arrive_remote(shared_address_of(barrier, cta));
}

template <class T, int HEAD_DIM>
struct BackwardShared<PairedTraits<T, HEAD_DIM>> : RoleShared<PairedTraits<T, HEAD_DIM>> {
  using Traits = PairedTraits<T, HEAD_DIM>;
  using Base = RoleShared<Traits>;
  using Base::base, Base::ds;
  using typename Base::Scores;
  using typename Base::Single;
  static constexpr int kBytes = Base::kOwnBarriers + 2 * Scores::kBytes + 3 * Single::kBytes;
  static_assert(kBytes <= 227 * 1024);
  static constexpr int kWarpsProbabilities = kWarpThreads * Traits::kQueries / 16 * 16;  // bytes of a warp's P

  Single keys;               // K or V
  Single factors, summands;  // Q and dO, or dO and Q
  // Of those between the CTAs one uses the full barriers, which the other ends, and the other the empty ones.
  Scores probabilities;  // full at the second CTA, empty at the first
  Scores laid_out;       // of dS at the second, only full barriers

  __device__ explicit BackwardShared(char* memory)
      : Base(memory),
        keys(base + Base::kOwnBarriers),
        factors(keys.barriers + Single::kBytes),
        summands(factors.barriers + Single::kBytes),
        probabilities(summands.barriers + Single::kBytes),
        laid_out(probabilities.barriers + Scores::kBytes) {}

  __device__ void init() const {
    Base::init(1);
    keys.init(warps(Traits::kWarps));
    factors.init(warps(Traits::kWarps));
    summands.init(warps(Traits::kWarps));
    probabilities.init(warps(Traits::kWarps), Traits::kWarps);
    laid_out.init(1, warps(Traits::kWarps));
  }
  // Of this CTA's role.
  __device__ uint32_t key_tile(Role) const { return base; }
  __device__ uint32_t factor_tile(Role, uint32_t) const { return base + Traits::kFactor; }
  __device__ uint32_t summand_tile(Role, uint32_t) const { return base + Traits::kSummand; }
  // By the first CTA.
  __device__ __forceinline__ void release_ds(uint32_t step) const { arrive_as_warp_at(ds.empty(step), 1); }
  // P of a step: each thread of the consumers reads 16 bytes for each 16 queries where the same thread of the other CTA
  // wrote them.
  __device__ uint32_t probability_tile(uint32_t step) const {
    return base + Traits::kProbabilities + Scores::stage(step) * Traits::ScoreColumns::kBytes;
  }
  // As wait_for_plan_place() of wide_backward_layout.cuh.
  __device__ __forceinline__ void wait_for_plan_place(uint32_t n) const {
    if (n >= 2) keys.wait_empty(n - 2);
  }
};

}  // namespace hf_flash::sm90
