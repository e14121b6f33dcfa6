// How a pair of CTAs divides the work of the backward of head dimensions over 128: tiles and shared memory. Plans,
// steps and maps are those of backward_layout.cuh.
#pragma once

#include "instructions/cluster.cuh"
#include "sm90/wide_backward_layout.cuh"

namespace hf_flash::sm90 {

template <class ELEMENT, int HEAD_DIM>
struct PairedTraits {
  using T = ELEMENT;
  static constexpr int kHeadDim = HEAD_DIM;  // bucket: D and Dv are at most this
  static constexpr bool kDropout = false, kExtras = false, kEveryTerm = false;
  static constexpr int kWarpgroups = 2, kWarps = 4 * kWarpgroups;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kTeam = 2;
  static constexpr int kKeys = kTeam * backward_keys(HEAD_DIM), kQueries = 64;
  static_assert(kKeys == 64 * kWarpgroups);
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  using KeyTile = SwizzledTile<kKeys, HEAD_DIM>;
  using QueryTile = SwizzledTile<kQueries, HEAD_DIM>;
  using ScoreColumns = SwizzledTile<kKeys, kQueries>;  // of dS
  using DqSums = SlicedDqAccumulator;
  using Slices = DqSlices<HEAD_DIM>;
  using Walk = StepWalk<kQueries>;
  static constexpr bool kRelays = false;
  static constexpr int kSliceBytes = kQueries * 64 * static_cast<int>(sizeof(float));

  // Shared memory of either CTA, in brackets of the second one: K (V) of a piece of work; of a step Q (dO), which the
  // scores are made of, and dO (Q), which is summed up; of two steps dS, which the second lays out and the first
  // multiplies; both slices of dQ of each warpgroup (P of two steps, as it enters dV); lse and row sums of two steps,
  // plans, barriers.
  static constexpr int kStages = 2, kScoreStages = 2, kPlans = 4, kSteps = 8;
  static constexpr bool kPlansAhead = false;
  static constexpr int kFactor = KeyTile::kBytes;
  static constexpr int kSummand = kFactor + QueryTile::kBytes;
  static constexpr int kDs = kSummand + QueryTile::kBytes;
  static constexpr int kDq = kDs + kScoreStages * ScoreColumns::kBytes;
  static constexpr int kProbabilities = kDq;
  static constexpr int kValues = kDq + kWarpgroups * Slices::kCount * kSliceBytes;
  static_assert(kProbabilities + kScoreStages * ScoreColumns::kBytes <= kValues);
  static constexpr int kStep = kValues + kStages * 2 * kQueries * static_cast<int>(sizeof(float));
  static constexpr int kPlan = kStep + kSteps * static_cast<int>(sizeof(BackwardStep));
  static_assert(kPlan % alignof(BackwardPlan) == 0);
};

// One lane arrives for its warp at a barrier of another CTA.
__device__ __forceinline__ void arrive_as_warp_at(uint32_t barrier, int cta) {
  __syncwarp();
  if (threadIdx.x % kWarpThreads < kLanesThatArrive) mbarrier_arrive_remote(shared_address_of(barrier, cta));
}

template <class T, int HEAD_DIM>
struct BackwardShared<PairedTraits<T, HEAD_DIM>> {
  using Traits = PairedTraits<T, HEAD_DIM>;
  static constexpr int kBarriers =
      (Traits::kPlan + Traits::kPlans * static_cast<int>(sizeof(BackwardPlan)) + 7) / 8 * 8;
  using Plans = Ring<Traits::kPlans>;
  using Pair = Ring<Traits::kStages>;
  using Scores = Ring<Traits::kScoreStages>;
  using SlicesOut = Ring<Traits::Slices::kCount>;
  using Single = Ring<1>;
  static constexpr int kBytes =
      kBarriers + Plans::kBytes + Pair::kBytes + 3 * Scores::kBytes + 2 * SlicesOut::kBytes + 3 * Single::kBytes + 8;
  static_assert(kBytes <= 227 * 1024);
  static constexpr int kWarpsProbabilities = kWarpThreads * Traits::kQueries / 16 * 16;  // bytes of a warp's P

  char* memory;
  uint32_t base;
  Plans planned;             // only its full barriers are used: a plan is free when its keys are
  Single keys;               // K or V
  Pair steps;                // lse and row sums
  Single factors, summands;  // Q and dO, or dO and Q
  // Of those between the CTAs one uses the full barriers, which the other ends, and the other the empty ones.
  Scores probabilities;  // full at the second CTA, empty at the first
  Scores ds;             // full at the first, empty at the second
  Scores laid_out;       // of dS at the second, only full barriers
  uint32_t first_dq;     // barriers, of each warpgroup's slices
  uint32_t landed;       // barrier of tiles that the producer must clean before anybody reads them

  __device__ explicit BackwardShared(char* memory)
      : memory(memory),
        base(shared_address(memory)),
        planned(base + kBarriers),
        keys(planned.barriers + Plans::kBytes),
        steps(keys.barriers + Single::kBytes),
        factors(steps.barriers + Pair::kBytes),
        summands(factors.barriers + Single::kBytes),
        probabilities(summands.barriers + Single::kBytes),
        ds(probabilities.barriers + Scores::kBytes),
        laid_out(ds.barriers + Scores::kBytes),
        first_dq(laid_out.barriers + Scores::kBytes),
        landed(first_dq + 2 * SlicesOut::kBytes) {}

  __device__ void init() const {
    planned.init(1, kWarpThreads);  // each lane has written a part of the plan
    keys.init(warps(Traits::kWarps));
    steps.init(warps(Traits::kWarps),
               1 + kWarpThreads);  // filled by each lane that brings row values, and by the copying warp
    factors.init(warps(Traits::kWarps));
    summands.init(warps(Traits::kWarps));
    probabilities.init(warps(Traits::kWarps), Traits::kWarps);
    ds.init(warps(Traits::kWarps));
    laid_out.init(1, warps(Traits::kWarps));
    for (int w = 0; w < 2; ++w) dq(w).init(1, warps(4));
    mbarrier_init(landed, 1);
  }
  __device__ BackwardPlan& plan(uint32_t n) const {
    return reinterpret_cast<BackwardPlan*>(memory + Traits::kPlan)[n % Traits::kPlans];
  }
  // Of this CTA's role.
  __device__ uint32_t key_tile(Role) const { return base; }
  __device__ uint32_t factor_tile(Role, uint32_t) const { return base + Traits::kFactor; }
  __device__ uint32_t summand_tile(Role, uint32_t) const { return base + Traits::kSummand; }
  __device__ uint32_t ds_tile(uint32_t step) const {
    return base + Traits::kDs + Scores::stage(step) * Traits::ScoreColumns::kBytes;
  }
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
  // A slice of dQ as the accumulator has it. Its place: 2 * step + slice.
  __device__ uint32_t dq_tile(int warpgroup, uint32_t place) const {
    return base + Traits::kDq + (SlicesOut::stage(place) + warpgroup * Traits::Slices::kCount) * Traits::kSliceBytes;
  }
  __device__ SlicesOut dq(int warpgroup) const { return SlicesOut(first_dq + warpgroup * SlicesOut::kBytes); }
  __device__ BackwardStep& step(uint32_t step) const {
    return reinterpret_cast<BackwardStep*>(memory + Traits::kStep)[step % Traits::kSteps];
  }
  // lse in log2 units, then row sums, of a step's queries.
  __device__ float* row_values(uint32_t step) const {
    return reinterpret_cast<float*>(memory + Traits::kValues) + Pair::stage(step) * 2 * Traits::kQueries;
  }
};

}  // namespace hf_flash::sm90
