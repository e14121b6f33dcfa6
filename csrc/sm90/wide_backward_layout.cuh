// How the backward of head dimensions over 128 divides its work: what both of its kernels have in common, then the
// shared memory of the one whose warpgroups have a role each. Plans, steps and maps are those of backward_layout.cuh.
#pragma once

#include "sm90/backward_layout.cuh"

namespace hf_flash::sm90 {

// The two consumer warpgroups. dK and dV of 64 keys fill the registers of both: each warpgroup owns one of them. Or two
// CTAs, of 128 keys (paired_backward.cuh).
enum class Role { kDv, kDk };

// dQ of a tile leaves in four slices of 64 or 32 columns, two by each warpgroup: 32 registers are left for them, and a
// slice never straddles a block of 64 columns of K.
template <int HEAD_DIM>
struct DqSlices {
  static constexpr int kCount = 2;  // a warpgroup
  __host__ __device__ static constexpr int columns(int slice) { return HEAD_DIM == 256 || slice == 0 ? 64 : 32; }
  __host__ __device__ static constexpr int first_column(int warpgroup, int slice) {
    const int lower = 64 * slice, upper = slice == 0 ? HEAD_DIM - 64 : HEAD_DIM / 2;
    return warpgroup == 0 ? lower : upper;
  }
};

// What both kernels decide alike. TEAM: CTAs that share a tile of keys.
template <class ELEMENT, int HEAD_DIM, int TEAM>
struct RoleTraits {
  using T = ELEMENT;
  static constexpr int kHeadDim = HEAD_DIM;  // bucket: D and Dv are at most this
  static constexpr bool kRelays = false, kPlansAhead = false, kTall = false, kZeroesAhead = false;
  static constexpr int kTeam = TEAM, kWarpgroups = 2, kGroupWarps = 4, kWarps = kGroupWarps * kWarpgroups;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kKeys = kTeam * backward_keys(HEAD_DIM), kQueries = 64;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr int kStages = 2, kScoreStages = 2, kScoreTiles = 1, kPlans = 4, kSteps = 8;
  using KeyTile = SwizzledTile<kKeys, HEAD_DIM>;
  using QueryTile = SwizzledTile<kQueries, HEAD_DIM>;
  using ScoreColumns = SwizzledTile<kKeys, kQueries>;  // of dS
  using DqSums = SlicedDqAccumulator;
  using Slices = DqSlices<HEAD_DIM>;
  using Walk = StepWalk<kQueries>;
  static constexpr int kSliceBytes = kQueries * 64 * static_cast<int>(sizeof(float));
  static constexpr int kValueBytes = kStages * 2 * kQueries * static_cast<int>(sizeof(float));
};

// What both kernels have in shared memory behind their tiles; barriers of their own follow.
template <class Traits>
struct RoleShared {
  static constexpr int kStep = Traits::kValues + Traits::kValueBytes;
  static constexpr int kPlan = kStep + Traits::kSteps * static_cast<int>(sizeof(BackwardStep));
  static_assert(kPlan % alignof(BackwardPlan) == 0);
  static constexpr int kBarriers = (kPlan + Traits::kPlans * static_cast<int>(sizeof(BackwardPlan)) + 7) / 8 * 8;
  using Plans = Ring<Traits::kPlans>;
  using Pair = Ring<Traits::kStages>;
  using Scores = Ring<Traits::kScoreStages>;
  using SlicesOut = Ring<Traits::kSlicePlaces>;
  using Single = Ring<1>;
  static constexpr int kOwnBarriers =
      kBarriers + Plans::kBytes + Pair::kBytes + Scores::kBytes + 2 * SlicesOut::kBytes + 8;

  char* memory;
  uint32_t base;
  Plans planned;      // only its full barriers are used: a plan is free when its keys are
  Pair steps;         // lse and row sums; Q too where it has as many places
  Scores ds;          // between CTAs full at the first, empty at the second
  uint32_t first_dq;  // barriers, of each warpgroup's slices
  uint32_t landed;    // barrier of tiles that the producer must clean before anybody reads them

  __device__ explicit RoleShared(char* memory)
      : memory(memory),
        base(shared_address(memory)),
        planned(base + kBarriers),
        steps(planned.barriers + Plans::kBytes),
        ds(steps.barriers + Pair::kBytes),
        first_dq(ds.barriers + Scores::kBytes),
        landed(first_dq + 2 * SlicesOut::kBytes) {}

  __device__ void init(int ds_producers) const {
    planned.init(1, kWarpThreads);  // each lane has written a part of the plan
    // Filled by the copying warp and by each lane that brings row values.
    steps.init(warps(Traits::kWarps), 1 + kWarpThreads);
    ds.init(warps(Traits::kWarps), ds_producers);
    for (int w = 0; w < 2; ++w) dq(w).init(1, warps(Traits::kGroupWarps));
    mbarrier_init(landed, 1);
  }
  __device__ BackwardPlan& plan(uint32_t n) const {
    return reinterpret_cast<BackwardPlan*>(memory + kPlan)[n % Traits::kPlans];
  }
  __device__ BackwardStep& step(uint32_t step) const {
    return reinterpret_cast<BackwardStep*>(memory + kStep)[step % Traits::kSteps];
  }
  // lse in log2 units, then row sums, of a step's queries.
  __device__ float* row_values(uint32_t step) const {
    return reinterpret_cast<float*>(memory + Traits::kValues) + Pair::stage(step) * 2 * Traits::kQueries;
  }
  __device__ uint32_t ds_tile(uint32_t step) const {
    return base + Traits::kDs + Scores::stage(step) * Traits::ScoreColumns::kBytes;
  }
  // A slice of dQ as the accumulator has it. Its place: 2 * step + slice.
  __device__ uint32_t dq_tile(int warpgroup, uint32_t place) const {
    return base + Traits::kDq + (SlicesOut::stage(place) + warpgroup * Traits::kSlicePlaces) * Traits::kSliceBytes;
  }
  __device__ SlicesOut dq(int warpgroup) const { return SlicesOut(first_dq + warpgroup * SlicesOut::kBytes); }
};

template <class ELEMENT, int HEAD_DIM>
struct WideTraits : RoleTraits<ELEMENT, HEAD_DIM, 1> {
  using Base = RoleTraits<ELEMENT, HEAD_DIM, 1>;
  using typename Base::KeyTile;
  using typename Base::QueryTile;
  using ScoreTile = SwizzledTile<Base::kQueries, Base::kKeys>;  // of the bias or the softcap's slopes
  static constexpr bool kDropout = true, kExtras = true, kEveryTerm = true;

  // Shared memory: K and V of a piece of work, Q of two steps, dO of one or two (both warpgroups read it at about the
  // same time), dS of two, the bias of a step or its softcap's slopes (a call has not both here), P on its way from one
  // warpgroup to the other, rounded as it enters dV, a slice of dQ for each warpgroup, lse and row sums, plans,
  // barriers.
  static constexpr int kDoutStages = HEAD_DIM <= 192 ? 2 : 1, kSlicePlaces = 1;
  static constexpr int kV = KeyTile::kBytes;
  static constexpr int kQ = kV + KeyTile::kBytes;
  static constexpr int kDout = kQ + Base::kStages * QueryTile::kBytes;
  static constexpr int kDs = kDout + kDoutStages * QueryTile::kBytes;
  static constexpr int kTerms = kDs + Base::kScoreStages * ScoreTile::kBytes;
  static constexpr int kProbabilities = kTerms + ScoreTile::kBytes;
  static constexpr int kDq = kProbabilities + ScoreTile::kBytes;
  static constexpr int kValues = kDq + Base::kWarpgroups * Base::kSliceBytes;
};

template <class T, int HEAD_DIM>
struct BackwardShared<WideTraits<T, HEAD_DIM>> : RoleShared<WideTraits<T, HEAD_DIM>> {
  using Traits = WideTraits<T, HEAD_DIM>;
  using Base = RoleShared<Traits>;
  using Base::base, Base::ds;
  using typename Base::Pair;
  using typename Base::Single;
  using Douts = Ring<Traits::kDoutStages>;
  static constexpr int kBytes = Base::kOwnBarriers + Douts::kBytes + 4 * Single::kBytes;
  static_assert(kBytes <= 227 * 1024);

  Single k, v;
  Douts dout;
  Single probabilities, bias;

  __device__ explicit BackwardShared(char* memory)
      : Base(memory),
        k(base + Base::kOwnBarriers),
        v(k.barriers + Single::kBytes),
        dout(v.barriers + Single::kBytes),
        probabilities(dout.barriers + Douts::kBytes),
        bias(probabilities.barriers + Single::kBytes) {}

  __device__ void init() const {
    Base::init(warps(Traits::kGroupWarps));
    k.init(warps(Traits::kWarps));
    v.init(warps(Traits::kGroupWarps));
    dout.init(warps(Traits::kWarps));
    probabilities.init(warps(Traits::kGroupWarps), warps(Traits::kGroupWarps));
    bias.init(warps(Traits::kGroupWarps));
  }
  __device__ uint32_t k_tile() const { return base; }
  __device__ uint32_t v_tile() const { return base + Traits::kV; }
  __device__ uint32_t q_tile(uint32_t step) const {
    return base + Traits::kQ + Pair::stage(step) * Traits::QueryTile::kBytes;
  }
  __device__ uint32_t dout_tile(uint32_t step) const {
    return base + Traits::kDout + Douts::stage(step) * Traits::QueryTile::kBytes;
  }
  // What a role's scores are made of, and what it sums up.
  __device__ uint32_t key_tile(Role role) const { return role == Role::kDv ? k_tile() : v_tile(); }
  __device__ uint32_t factor_tile(Role role, uint32_t step) const {
    return role == Role::kDv ? q_tile(step) : dout_tile(step);
  }
  __device__ uint32_t summand_tile(Role role, uint32_t step) const {
    return role == Role::kDv ? dout_tile(step) : q_tile(step);
  }
  __device__ __forceinline__ void release_ds(uint32_t step) const { ds.release(step); }
  // A plan may be made before its keys have a place: they come when the piece of work two before gives its own back,
  // and that one waits for this plan's first step where it has a single step itself.
  __device__ __forceinline__ void wait_for_plan_place(uint32_t n) const {
    if (n >= 2) k.wait_empty(n - 2);
  }
  // A step's bias, or the slopes that its softcap left: these have P's barriers.
  __device__ uint32_t term_tile() const { return base + Traits::kTerms; }
  __device__ __forceinline__ void wait_for_slopes(uint32_t step) const { probabilities.wait_empty(step); }
  // P as pairs: a thread reads 16 bytes for each 16 queries where the same thread of the other warpgroup wrote them.
  __device__ uint32_t probability_tile(uint32_t) const { return base + Traits::kProbabilities; }
};

}  // namespace hf_flash::sm90
