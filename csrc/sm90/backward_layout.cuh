// How the backward divides its work: tiles, shared memory, and how a piece of work is planned.
#pragma once

#include <algorithm>
#include <climits>
#include <type_traits>

#include "attention/score_gradient.cuh"
#include "portable/dq_accumulator.h"
#include "sm90/backward_grid.h"
#include "sm90/backward_plan.cuh"
#include "sm90/config.h"
#include "sm90/pipeline.cuh"
#include "sm90/score_math.cuh"
#include "sm90/tma_tile.cuh"

namespace hf_flash::sm90 {

template <class ELEMENT, int HEAD_DIM, bool DROPOUT, Terms TERMS,
          int QUERIES = backward_config(HEAD_DIM, TERMS).queries, bool RELAYS = false, bool MASKED = true>
struct BackwardTraits {
  using T = ELEMENT;
  static constexpr int kHeadDim = HEAD_DIM;  // bucket: D and Dv are at most this
  static constexpr bool kDropout = DROPOUT;
  static constexpr bool kExtras = TERMS != Terms::kNone, kEveryTerm = TERMS == Terms::kEvery;
  static constexpr int kWarpgroups = 2, kWarps = 4 * kWarpgroups;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kKeys = 64 * kWarpgroups;
  static_assert(kKeys == backward_keys(HEAD_DIM));
  static constexpr int kQueries = QUERIES;
  // dQ of a tile: each warpgroup computes 64 queries, or half of the columns of all 64; of tall tiles, which are no
  // multiple of 64, half of the columns as dQ^T.
  static constexpr bool kTall = kQueries == kTallQueries;
  static_assert(!kTall || (HEAD_DIM == 128 && !DROPOUT && !kExtras));
  static constexpr bool kSplitColumns = kQueries == 64;
  static constexpr int kDqColumns = kTall ? kQueries : kSplitColumns ? HEAD_DIM / 2 : HEAD_DIM;
  using DqSums = DqAccumulatorOf<kTall ? kQueries : 64>;
  static constexpr bool kRelays = RELAYS;  // sums of dQ go from CTA to CTA
  static constexpr bool kMasked = MASKED;  // calls may have a mask of keys
  static constexpr int kTeam = 1;
  static constexpr bool kZeroesAhead = !RELAYS;  // what dQ is added to, in a free order
  using Walk = std::conditional_t<kRelays, RelayWalk<kQueries>, StepWalk<kQueries>>;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  using KeyTile = SwizzledTile<kKeys, HEAD_DIM>;
  using QueryTile = SwizzledTile<kQueries, HEAD_DIM>;
  // Does dQ of a step leave from where its dS was, and need no place of its own to be free? With as many bytes as dS
  // each warpgroup's rows of both lie in a tile of their own; of tall tiles it is the first half.
  static constexpr bool kDqOverDs = kTall || (kQueries == 128 && !RELAYS && (kExtras || !kDropout));
  static constexpr int kDqBytes = kQueries * HEAD_DIM * static_cast<int>(sizeof(float));
  static constexpr int kDqBytesOverDs = kDqOverDs ? 2 * kQueries * kKeys : 0;
  static_assert(kDqBytes == kDqBytesOverDs || kDqBytes == 2 * kDqBytesOverDs || !kDqOverDs);
  using Target = std::conditional_t<kDqOverDs, DqTargetApart, DqTarget>;
  // Dropout beside linear terms: bytewise as fast, and it spills otherwise.
  using Gradient = ScoreGradient<T, kDropout, kEveryTerm, kEveryTerm || kDqOverDs>;
  // Of the bias, and with extras dS in its place; of dS where dQ^T is computed.
  using ScoreTile = SwizzledTile<kDqOverDs && kExtras ? 64 : kQueries, kKeys>;
  static constexpr int kScoreTiles = kQueries / ScoreTile::kRows, kScoreBytes = kScoreTiles * ScoreTile::kBytes;
  // Otherwise dS lies with keys as rows, as the fragments have it: 1 to 3 % faster.
  using ScoreColumns = SwizzledTile<kKeys, kQueries>;

  // Shared memory: K of three pieces of work (dQ is one step late, S one early) or at least two, of one where dQ is not
  // late, V of one, Q, dO and dS of two steps, dQ on its way out, lse and row sums of two steps, plans, barriers. A
  // third tile of dS lets a step's bias come while the step before is at work, and where dQ goes there too the two
  // before. A plan's place is free when the warp that adds dQ is done with it.
  static constexpr int kStages = 2, kKeyStages = HEAD_DIM <= 64 ? 3 : kTall ? 1 : 2, kPlans = 4;
  // The warpgroup behind may look three steps back. Where sums go from CTA to CTA their barriers take the room of more.
  static constexpr int kSteps = kRelays || kDqOverDs ? 4 : 8, kTargets = kRelays ? 4 : 1;
  static constexpr bool kPlansAhead = true;  // a step's word tells of the next one
  // Single steps: while dQ of one piece of work leaves, the words of the next two are out and name a fourth.
  static_assert(kPlans >= 4);
  static constexpr int kScoreStages = HEAD_DIM <= 64 && (kDqOverDs || kExtras) ? 3 : 2;
  static constexpr int kV = kKeyStages * KeyTile::kBytes;
  static constexpr int kQ = kV + KeyTile::kBytes;
  static constexpr int kDout = kQ + kStages * QueryTile::kBytes;
  static constexpr int kDs = kDout + kStages * QueryTile::kBytes;
  static constexpr int kDq = kDs + kScoreStages * kScoreBytes;
  static constexpr int kValues = kDq + (kDqOverDs ? kScoreStages * (kDqBytes - kDqBytesOverDs) : kDqBytes);
  static constexpr int kTarget = kValues + kStages * 2 * kQueries * static_cast<int>(sizeof(float));
  static constexpr int kStep = kTarget + kTargets * static_cast<int>(sizeof(Target));
  static constexpr int kPlan = kStep + kSteps * static_cast<int>(sizeof(BackwardStep));
  static_assert(kPlan % alignof(BackwardPlan) == 0);
};

// By a warp: each lane works out a part.
template <class Traits>
__device__ __forceinline__ void make_plan(BackwardPlan& plan, const AttentionParams& p, const Sequence& sequence,
                                          const PersistentSchedule::Work& work, const DividedWork::Part* part,
                                          const BackwardGrid& grid) {
  const int lane = threadIdx.x % 32, j0 = work.tile * Traits::kKeys;
#pragma unroll 1
  for (int n = 0; n < Traits::kKeys / 32; ++n) {
    const uint32_t seen = seen_keys(p, sequence, j0 + 32 * n, 32);
    if (lane == n) plan.keys[n] = seen;
  }
  if (lane == Traits::kWarpgroups) {
    const int from = max(j0, sequence.key_begin), to = min(j0 + Traits::kKeys, sequence.key_end);
    const KeyRange seen = from < to ? sequence.queries_of(p, from, to) : KeyRange{0, 0};
    const int group = p.heads_q / p.heads_k;
    plan.begin = seen.begin / Traits::kQueries * Traits::kQueries;
    plan.end = seen.empty() ? plan.begin : (seen.end + Traits::kQueries - 1) / Traits::kQueries * Traits::kQueries;
    plan.first_head = work.head * group;
    plan.heads = group;
    plan.heads_first = grid.heads_first;
    const int first_tile = sequence.key_begin / Traits::kKeys;
    plan.turn = work.tile - first_tile;
    plan.turns = max(1, (sequence.key_end + Traits::kKeys - 1) / Traits::kKeys - first_tile);
    // At the last step or, spread, each key tile of a head somewhere else: so few or, where all see the same queries
    // and run side by side, none waits for another's addition. In that case the last steps, down to where the next turn
    // started, meet queries that all others have been at.
    const int steps = group * ((plan.end - plan.begin) / Traits::kQueries);
    const int reach = min(steps, grid.reach), start = grid.spreads ? plan.turn * reach / plan.turns : steps - 1;
    const int next_start = plan.turn + 1 < plan.turns ? (plan.turn + 1) * reach / plan.turns : steps;
    plan.finishing = grid.finishes_dq ? next_start - start : 0;  // not read where sums go from CTA to CTA
    plan.start = start;
    plan.steps = steps;
    plan.shared = 0;
    if (part != nullptr) {
      plan.start -= part->first;
      if (plan.start < 0) plan.start += steps;
      plan.steps = part->count;
      plan.shared = part->gives >= 0 ? -part->gives - 1 : part->takes + 1;
    }
  } else if (lane == Traits::kWarpgroups + 1) {
    plan.j0 = work.tile < 0 ? -1 : j0;
    plan.kv_head = work.head;
    const bool packed = p.cu_seqlens_q != nullptr;
    plan.zero_queries_from = sequence.query_end < p.seqlen_q || packed ? sequence.query_end : INT_MAX;
    plan.zero_keys_from = sequence.key_end < p.seqlen_k || packed ? sequence.key_end : INT_MAX;
    plan.sequence = sequence;
  }
}

template <class Traits>
struct BackwardShared {
  using Pair = Ring<Traits::kStages>;
  static constexpr int kBarriers =
      (Traits::kPlan + Traits::kPlans * static_cast<int>(sizeof(BackwardPlan)) + 7) / 8 * 8;
  using Plans = Ring<Traits::kPlans>;
  using Keys = Ring<Traits::kKeyStages>;
  using Scores = Ring<Traits::kScoreStages>;
  using Single = Ring<1>;
  static constexpr int kDqStages = Traits::kDqOverDs ? Traits::kScoreStages : 1;
  using Dq = Ring<kDqStages>;
  static constexpr int kBytes = kBarriers + Plans::kBytes + Keys::kBytes + Single::kBytes + Dq::kBytes + Pair::kBytes +
                                Scores::kBytes + 8 + (Traits::kRelays ? 4 * Single::kBytes : Scores::kBytes);
  static_assert(kBytes <= 227 * 1024);

  char* memory;
  uint32_t base;
  Plans planned;
  Keys k;
  Single v;
  // Filled when the place is given to a step, perhaps with sums; empty when all warps are done with it. Where dQ leaves
  // from where dS was it has its place anyway, and filled means that sums are there, if any are. Where sums go from CTA
  // to CTA: filled once, when there is a first step's word.
  Dq dq;
  Pair steps;           // Q, dO, lse and row sums of a step arrive together
  Scores ds, bias;      // of bias only the full barriers are used: it lies where dS of its step will
  uint32_t landed;      // barrier of tiles that the producer must clean before anybody reads them
  uint32_t first_sums;  // barriers, where sums of dQ go from CTA to CTA; there is no bias then

  __device__ explicit BackwardShared(char* memory)
      : memory(memory),
        base(shared_address(memory)),
        planned(base + kBarriers),
        k(planned.barriers + Plans::kBytes),
        v(k.barriers + Keys::kBytes),
        dq(v.barriers + Single::kBytes),
        steps(dq.barriers + Dq::kBytes),
        ds(steps.barriers + Pair::kBytes),
        bias(ds.barriers + Scores::kBytes),
        landed(bias.barriers + (Traits::kRelays ? 0 : Scores::kBytes)),
        first_sums(landed + 8) {}

  __device__ void init() const {
    planned.init(1, kWarpThreads);  // emptied by the warp that adds dQ; each lane has written a part of the plan
    k.init(warps(Traits::kWarps));
    v.init(warps(Traits::kWarps));
    dq.init(warps(Traits::kWarps));
    steps.init(warps(Traits::kWarps),
               1 + kWarpThreads);  // filled by the copying warp and by each lane that brings row values
    ds.init(Traits::kDqOverDs ? 1 : warps(Traits::kWarps), warps(Traits::kWarps));
    if (!Traits::kRelays) bias.init(1);
    mbarrier_init(landed, 1);
    for (int w = 0; Traits::kRelays && w < 2; ++w) {
      sums(w).init(warps(Traits::kWarps / 2));
      mbarrier_init(has_place(w, false), 1);
      mbarrier_init(has_place(w, true), 1);
    }
  }
  __device__ BackwardPlan& plan(uint32_t n) const {
    return reinterpret_cast<BackwardPlan*>(memory + Traits::kPlan)[n % Traits::kPlans];
  }
  // Tiles by place in their rings: pieces of work for K and V, steps for the others.
  __device__ uint32_t k_tile(uint32_t n) const { return base + Keys::stage(n) * Traits::KeyTile::kBytes; }
  __device__ uint32_t v_tile() const { return base + Traits::kV; }
  __device__ uint32_t q_tile(uint32_t step) const {
    return base + Traits::kQ + Pair::stage(step) * Traits::QueryTile::kBytes;
  }
  __device__ uint32_t dout_tile(uint32_t step) const {
    return base + Traits::kDout + Pair::stage(step) * Traits::QueryTile::kBytes;
  }
  __device__ uint32_t ds_tile(uint32_t step) const {
    return base + Traits::kDs + Scores::stage(step) * Traits::kScoreBytes;
  }
  __device__ __forceinline__ void wait_for_plan_place(uint32_t n) const { planned.wait_empty(n); }
  // The softcap's slopes of a step have a place: that of its dS.
  __device__ __forceinline__ void wait_for_slopes(uint32_t step) const { ds.wait_empty(step); }
  // dQ of a step as the accumulator has it (portable/dq_accumulator.h): blocks of 16 rows, transposed of 8, one after
  // the other.
  __device__ uint32_t dq_tile(uint32_t step) const {
    return Traits::kDqBytesOverDs == Traits::kDqBytes ? ds_tile(step) : base + Traits::kDq;
  }
  // Its second half where the first one is over dS.
  __device__ uint32_t dq_second_half(uint32_t step) const {
    return base + Traits::kDq + Scores::stage(step) * Traits::kDqBytesOverDs;
  }
  // Until all warps have laid out or written dQ of a step.
  __device__ __forceinline__ void wait_for_dq(uint32_t step) const { dq.wait_empty(step + kDqStages); }
  // By the warp that adds dQ, when nobody needs a step's any more.
  __device__ __forceinline__ void release_dq(uint32_t step) const {
    if (Traits::kDqOverDs) mbarrier_arrive(ds.empty(step));
  }
  // Where sums of dQ come from another CTA each warpgroup has its own part of the place, filled when they are there;
  // and a barrier for each CTA that they go on to, the next one or the first, which ends it when it has a place.
  __device__ Single sums(int warpgroup) const { return Single(first_sums + 2 * Single::kBytes * warpgroup); }
  __device__ uint32_t has_place(int warpgroup, bool first) const {
    return sums(warpgroup).barriers + Single::kBytes + (first ? 8 : 0);
  }
  __device__ typename Traits::Target& dq_target(uint32_t step) const {
    return reinterpret_cast<typename Traits::Target*>(memory + Traits::kTarget)[step % Traits::kTargets];
  }
  __device__ BackwardStep& step(uint32_t step) const {
    return reinterpret_cast<BackwardStep*>(memory + Traits::kStep)[step % Traits::kSteps];
  }
  // lse in log2 units, then row sums, of a step's queries.
  __device__ float* row_values(uint32_t step) const {
    return reinterpret_cast<float*>(memory + Traits::kValues) + Pair::stage(step) * 2 * Traits::kQueries;
  }
};

// What the host works out for the extra terms (gradient_terms.cuh).
struct GradientConstants : ScoreConstants {
  bool reads_scores;  // bias or mask, element by element: the TMA engine cannot, or the softcap needs dS's place

  explicit GradientConstants(const AttentionParams& p) : ScoreConstants(p) {
    if (p.softcap != 0) copies_bias = false;
    reads_scores = p.mask.data != nullptr || (p.bias.data != nullptr && !copies_bias);
    if (reads_scores) factor = 1;
  }
};

struct BackwardMaps {
  CUtensorMap q, k, v, dout, bias;
  GradientConstants terms;

  BackwardMaps(const AttentionParams& p, int queries, int keys, int score_rows) : bias{}, terms(p) {
    const int batch = p.packed() ? 1 : p.batch;
    const int64_t rows_q = p.packed() ? p.total_q : p.seqlen_q, rows_k = p.packed() ? p.total_k : p.seqlen_k;
    q = tensor_map(p.q, p.dtype, batch, rows_q, p.heads_q, p.head_dim, queries);
    dout = tensor_map(p.dout, p.dtype, batch, rows_q, p.heads_q, p.head_dim_v, queries);
    const int32_t heads_k = p.heads_k / p.key_head_parts;
    k = tensor_map(p.k, p.dtype, batch, rows_k, heads_k, p.head_dim, keys);
    v = tensor_map(p.v, p.dtype, batch, rows_k, heads_k, p.head_dim_v, keys);
    if (terms.copies_bias) bias = bias_map(p, score_rows);
  }
};

}  // namespace hf_flash::sm90
