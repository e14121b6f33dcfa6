// How the backward divides its work: tiles, shared memory, and what the planning warp tells the others about a piece of
// it.
#pragma once

#include <algorithm>
#include <climits>
#include <type_traits>

#include "attention/schedule.cuh"
#include "attention/sequence.h"
#include "portable/dq_accumulator.h"
#include "sm90/backward_grid.h"
#include "sm90/config.h"
#include "sm90/pipeline.cuh"
#include "sm90/score_math.cuh"
#include "sm90/tma_tile.cuh"

namespace hf_flash::sm90 {

// A piece of work: a tile of keys of one head of k, against the query tiles that see one of them, for each query head
// of the group.
struct BackwardPlan {
  int j0, kv_head;  // j0 = -1: there is no more
  int begin, end;   // queries, multiples of the tile
  int first_head, end_head;
  int start, steps;                       // number of the first step, counted from the lowest queries of the first head
  int shared;                             // with another CTA, see below
  int turn, turns;                        // among the key tiles that some query sees, of which there are `turns`
  int finishing;                          // so many of the last steps finish dq of their queries
  int zero_queries_from, zero_keys_from;  // rows from here on hold something else, if they lie inside the tensor
  Sequence sequence;
  uint32_t keys[4];  // their seen_keys()

  __device__ int batch() const { return sequence.number; }
  __device__ bool empty() const { return begin == end; }
  // Another CTA has the first steps or the others, and this one gives its sums or takes the other's.
  __device__ bool gives() const { return shared < 0; }
  __device__ bool takes() const { return shared > 0; }
  __device__ int place() const { return abs(shared) - 1; }
  // Of queries, of one head.
  template <int QUERIES>
  __device__ int tiles() const {
    return (end - begin) / QUERIES;
  }
  // The queries that see all of the 64 keys of a warpgroup.
  __device__ KeyRange queries_of_all(const AttentionParams& p, int warpgroup) const {
    const int from = j0 + 64 * warpgroup, to = from + 64;
    if ((keys[2 * warpgroup] & keys[2 * warpgroup + 1]) != 0xFFFFFFFF) return {0, 0};
    return {sequence.queries_of(p, to - 1, to).begin, sequence.queries_of(p, from, from + 1).end};
  }
  // seen_keys() of the 16 from key0 on.
  __device__ uint32_t seen_from(int key0) const { return reinterpret_cast<const uint16_t*>(keys)[(key0 - j0) / 16]; }
};

// The key tiles of a sequence that some query may see, as far as ranges tell.
template <class Traits>
__device__ __forceinline__ PersistentSchedule::Span seen_tiles(const Sequence& sequence) {
  if (sequence.query_begin >= sequence.query_end || sequence.key_begin >= sequence.key_end) return {0, 0};
  const int first = sequence.key_begin / Traits::kKeys;
  return {first, (sequence.key_end + Traits::kKeys - 1) / Traits::kKeys - first};
}

// The steps of a piece of work go down from its start, head by head, and round to the start again: under a causal mask
// or a window the key tiles of a head then come to a query tile in the order of their numbers.
template <int QUERIES>
struct StepWalk {
  const BackwardPlan& plan;
  int head, i0, left;

  __device__ explicit StepWalk(const BackwardPlan& plan)
      : plan(plan),
        head(plan.first_head + plan.start / plan.tiles<QUERIES>()),
        i0(plan.begin + plan.start % plan.tiles<QUERIES>() * QUERIES),
        left(plan.steps) {}
  __device__ bool exists() const { return left > 0; }
  __device__ bool last() const { return left == 1; }
  __device__ void next() {
    --left;
    i0 -= QUERIES;
    if (i0 < plan.begin) {
      i0 = plan.end - QUERIES;
      head = head > plan.first_head ? head - 1 : plan.end_head - 1;
    }
  }
};

// The same where sums of dQ go from CTA to CTA: of each head as many query tiles as there are key tiles, then the next
// ones; all CTAs go through them at the same time, each at a tile of its own, and a tile moves on by one with each
// step.
template <int QUERIES>
struct RelayWalk {
  const BackwardPlan& plan;
  int head, i0, round, left;  // round: the first of these query tiles

  __device__ explicit RelayWalk(const BackwardPlan& plan)
      : plan(plan),
        head(plan.first_head),
        round(plan.begin),
        left((plan.end_head - plan.first_head) * ((plan.end - plan.begin) / QUERIES)) {
    i0 = start();
  }
  __device__ bool exists() const { return left > 0; }
  __device__ bool last() const { return left == 1; }
  __device__ void next() {
    --left;
    i0 = (i0 == round ? round_end() : i0) - QUERIES;
    if (i0 != start() || left == 0) return;
    round = round_end();
    if (round == plan.end) {
      round = plan.begin;
      ++head;
    }
    i0 = start();
  }
  // Is this CTA the first to add to dQ of these queries, or the last?
  __device__ bool begins() const { return i0 == round + plan.turn * QUERIES; }
  __device__ bool ends() const { return i0 == round + next_turn() * QUERIES; }
  __device__ int next_turn() const { return plan.turn + 1 < plan.turns ? plan.turn + 1 : 0; }

 private:
  __device__ int round_end() const { return min(round + plan.turns * QUERIES, plan.end); }
  __device__ int start() const { return min(round + plan.turn * QUERIES, round_end() - QUERIES); }
};

// What becomes of a step's dQ.
struct DqRoute {
  uint32_t bits;

  // finishes: dq of its queries. Where sums go from CTA to CTA: adds to what comes from another one; goes on to `next`,
  // if not into dq; odd: was the number of sums that went to the next CTA before, or to the first.
  __device__ static DqRoute of(bool finishes, bool adds = false, int next = 0, bool odd = false) {
    return {static_cast<uint32_t>(finishes | adds << 1 | odd << 2 | next << 3)};
  }
  __device__ bool finishes() const { return bits & 1; }
  __device__ bool adds() const { return bits & 2; }
  __device__ bool odd() const { return bits & 4; }
  __device__ uint32_t next() const { return bits >> 3; }
};

// One query tile of one query head of a piece of work. The warp that brings its lse and row sums says what it is, and
// its word stays while any warp may look back.
struct BackwardStep {
  int plan;  // the piece of work's place; -1: there are no more steps
  int next;  // the next step's, where plans are made so early
  int head, i0;
  DqRoute route;
  bool last;         // of the piece of work
  bool boundary[2];  // has something to be hidden from some of this warpgroup's keys?
  bool lowest;       // some query sees nothing above the lowest finite numbers
  float slope;       // ALiBi
};

// Where dQ of a step goes. The warp that adds dQ says so when it gives the step the place in shared memory: all of it,
// for the consumers have no registers for what they would read of the parameters.
struct DqTarget {
  void* rows;      // dq of the tile's first query, of a step that finishes it
  int64_t row;     // stride
  int begin, end;  // rows of the tile that are computed
  float factor;    // of the sums
  bool adds;       // the place holds what the other key tiles have added
};

template <class ELEMENT, int HEAD_DIM, bool DROPOUT, Terms TERMS,
          int QUERIES = backward_config(HEAD_DIM, TERMS != Terms::kNone).queries, bool RELAYS = false,
          bool MASKED = true>
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
  using Walk = std::conditional_t<kRelays, RelayWalk<kQueries>, StepWalk<kQueries>>;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  using KeyTile = SwizzledTile<kKeys, HEAD_DIM>;
  using QueryTile = SwizzledTile<kQueries, HEAD_DIM>;
  // Of the bias, and with extras dS in its place; of dS where dQ^T is computed.
  using ScoreTile = SwizzledTile<kQueries, kKeys>;
  // Otherwise dS lies with keys as rows, as the fragments have it: 1 to 3 % faster.
  using ScoreColumns = SwizzledTile<kKeys, kQueries>;

  // Shared memory: K of three pieces of work (dQ is one step late, S one early) or at least two, of one where dQ is not
  // late, V of one, Q, dO and dS of two steps, dQ on its way out, lse and row sums of two steps, plans, barriers. A
  // third tile of dS lets a step's bias come while the step before is at work. A plan's place is free when the warp
  // that adds dQ is done with it.
  static constexpr int kStages = 2, kKeyStages = HEAD_DIM <= 64 ? 3 : kTall ? 1 : 2, kPlans = 4;
  // The warpgroup behind may look three steps back. Where sums go from CTA to CTA their barriers take the room of more.
  static constexpr int kSteps = kRelays ? 4 : 8, kTargets = kRelays ? 4 : 1;
  static constexpr bool kPlansAhead = true;  // a step's word tells of the next one
  // Single steps: while dQ of one piece of work leaves, the words of the next two are out and name a fourth.
  static_assert(kPlans >= 4);
  static constexpr int kScoreStages = kExtras && HEAD_DIM <= 64 ? 3 : 2;
  static constexpr int kV = kKeyStages * KeyTile::kBytes;
  static constexpr int kQ = kV + KeyTile::kBytes;
  static constexpr int kDout = kQ + kStages * QueryTile::kBytes;
  static constexpr int kDs = kDout + kStages * QueryTile::kBytes;
  static constexpr int kDq = kDs + kScoreStages * ScoreTile::kBytes;
  static constexpr int kDqBytes = kQueries * HEAD_DIM * static_cast<int>(sizeof(float));
  static constexpr int kValues = kDq + kDqBytes;
  static constexpr int kTarget = kValues + kStages * 2 * kQueries * static_cast<int>(sizeof(float));
  static constexpr int kStep = kTarget + kTargets * static_cast<int>(sizeof(DqTarget));
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
    plan.end_head = plan.first_head + group;
    const int first_tile = sequence.key_begin / Traits::kKeys, tiles = (plan.end - plan.begin) / Traits::kQueries;
    plan.turn = work.tile - first_tile;
    plan.turns = max(1, (sequence.key_end + Traits::kKeys - 1) / Traits::kKeys - first_tile);
    // At the last query tile of the last head, or, spread, each key tile of a head somewhere else: so few or, where all
    // see the same queries and run side by side, none waits for another's addition. In that case the last steps, down
    // to where the next turn started, meet queries that all others have been at.
    const int steps = group * tiles, start = grid.spreads ? plan.turn * steps / plan.turns : steps - 1;
    plan.finishing = grid.finishes_dq ? (plan.turn + 1) * steps / plan.turns - start : 0;
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
  static constexpr int kBytes = kBarriers + Plans::kBytes + Keys::kBytes + 2 * Single::kBytes + Pair::kBytes +
                                Scores::kBytes + 8 + (Traits::kRelays ? 4 * Single::kBytes : Scores::kBytes);
  static_assert(kBytes <= 227 * 1024);

  char* memory;
  uint32_t base;
  Plans planned;
  Keys k;
  Single v;
  // Filled when the place is given to a step, perhaps with sums; empty when all warps are done with it. Where sums go
  // from CTA to CTA: filled once, when there is a first step's word.
  Single dq;
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
        steps(dq.barriers + Single::kBytes),
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
    ds.init(warps(Traits::kWarps), warps(Traits::kWarps));
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
    return base + Traits::kDs + Scores::stage(step) * Traits::ScoreTile::kBytes;
  }
  __device__ __forceinline__ void wait_for_plan_place(uint32_t n) const { planned.wait_empty(n); }
  // The softcap's slopes of a step have a place: that of its dS.
  __device__ __forceinline__ void wait_for_slopes(uint32_t step) const { ds.wait_empty(step); }
  // dQ of a step as the accumulator has it (portable/dq_accumulator.h): blocks of 16 rows, transposed of 8, one after
  // the other.
  __device__ uint32_t dq_tile() const { return base + Traits::kDq; }
  // Where sums of dQ come from another CTA each warpgroup has its own part of the place, filled when they are there;
  // and a barrier for each CTA that they go on to, the next one or the first, which ends it when it has a place.
  __device__ Single sums(int warpgroup) const { return Single(first_sums + 2 * Single::kBytes * warpgroup); }
  __device__ uint32_t has_place(int warpgroup, bool first) const {
    return sums(warpgroup).barriers + Single::kBytes + (first ? 8 : 0);
  }
  __device__ DqTarget& dq_target(uint32_t step) const {
    return reinterpret_cast<DqTarget*>(memory + Traits::kTarget)[step % Traits::kTargets];
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

  BackwardMaps(const AttentionParams& p, int queries, int keys) : bias{}, terms(p) {
    const int batch = p.packed() ? 1 : p.batch;
    const int64_t rows_q = p.packed() ? p.total_q : p.seqlen_q, rows_k = p.packed() ? p.total_k : p.seqlen_k;
    q = tensor_map(p.q, p.dtype, batch, rows_q, p.heads_q, p.head_dim, queries);
    dout = tensor_map(p.dout, p.dtype, batch, rows_q, p.heads_q, p.head_dim_v, queries);
    k = tensor_map(p.k, p.dtype, batch, rows_k, p.heads_k, p.head_dim, keys);
    v = tensor_map(p.v, p.dtype, batch, rows_k, p.heads_k, p.head_dim_v, keys);
    if (terms.copies_bias) bias = bias_map(p, queries);
  }
};

}  // namespace hf_flash::sm90
