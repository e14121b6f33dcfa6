// What the backward's planning warp tells the others about a piece of work, and how its steps follow each other.
#pragma once

#include <cstdint>

#include "attention/schedule.cuh"
#include "attention/sequence.h"
#include "params.h"

namespace hf_flash::sm90 {

// A piece of work: a tile of keys of one head of k, against the query tiles that see one of them, for each query head
// of the group.
struct BackwardPlan {
  int j0, kv_head;  // j0 = -1: there is no more
  int begin, end;   // queries, multiples of the tile
  int first_head;
  uint32_t heads : 31, heads_first : 1;   // of q; do the steps go through all of them before the next query tile?
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

// The steps of a piece of work go down from its start, head by head or query tile by query tile, and round to the start
// again: under a causal mask or a window the key tiles of a head then come to a query tile in the order of their
// numbers.
template <int QUERIES>
struct StepWalk {
  const BackwardPlan& plan;
  const bool heads_first;  // read once: a step should not wait for it
  int head, i0, left;

  __device__ explicit StepWalk(const BackwardPlan& plan) : plan(plan), heads_first(plan.heads_first), left(plan.steps) {
    const int count = heads_first ? plan.heads : (plan.end - plan.begin) / QUERIES;
    const int outer = plan.start / count, inner = plan.start % count;
    head = plan.first_head + (heads_first ? inner : outer);
    i0 = plan.begin + (heads_first ? outer : inner) * QUERIES;
  }
  __device__ bool exists() const { return left > 0; }
  __device__ bool last() const { return left == 1; }
  __device__ void next() {
    --left;
    if (!heads_first) {
      if (lower_queries()) lower_head();
    } else {
      if (lower_head()) lower_queries();
    }
  }

 private:
  // Returns whether it goes round, to the highest.
  __device__ bool lower_queries() {
    i0 -= QUERIES;
    const bool round = i0 < plan.begin;
    if (round) i0 = plan.end - QUERIES;
    return round;
  }
  __device__ bool lower_head() {
    --head;
    const bool round = head < plan.first_head;
    if (round) head += plan.heads;
    return round;
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
      : plan(plan), head(plan.first_head), round(plan.begin), left(plan.heads * ((plan.end - plan.begin) / QUERIES)) {
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

// Where the place has no room for them.
struct DqTargetApart : DqTarget {
  const float* sums;  // what the others have added
};

}  // namespace hf_flash::sm90
