// The producer warps of the backward of head dimensions over 128: those that plan and that bring row values are
// backward_producers.cuh's; here are the one that copies tiles and the one that adds dQ.
#pragma once

#include "sm90/backward_producers.cuh"
#include "sm90/dq_addition.cuh"
#include "sm90/wide_backward_layout.cuh"

namespace hf_flash::sm90 {

// Brings tiles of rows, for a warp. Those with rows of other sequences or of padding are cleaned before the consumers
// hear of them: 0 * NaN.
template <class Traits>
struct TileCopier {
  const AttentionParams& p;
  const BackwardShared<Traits>& shared;
  const bool leader = elect_one();
  uint32_t landed_parity = 0;

  // The keys of a piece of work, of K or V.
  __device__ __forceinline__ void load_keys(const BackwardPlan& plan, uint32_t tile, const CUtensorMap& map,
                                            const Rows& rows, uint32_t full) {
    const Sequence& sequence = plan.sequence;
    const bool dirty = plan.j0 < sequence.key_begin || plan.j0 + Traits::kKeys > plan.zero_keys_from;
    load<typename Traits::KeyTile>(
        tile, map, full, dirty, sequence.first_k + plan.j0, coordinate_of(rows.head, plan.kv_head / p.key_head_parts),
        coordinate_of(rows.batch, plan.batch()), sequence.key_begin - plan.j0, sequence.key_end - plan.j0);
  }
  // The queries of a step, of Q or dO.
  __device__ __forceinline__ void load_queries(const BackwardPlan& plan, int head, int i0, uint32_t tile,
                                               const CUtensorMap& map, const Rows& rows, uint32_t full) {
    const Sequence& sequence = plan.sequence;
    const bool dirty = i0 < sequence.query_begin || i0 + Traits::kQueries > plan.zero_queries_from;
    load<typename Traits::QueryTile>(tile, map, full, dirty, sequence.first_q + i0, coordinate_of(rows.head, head),
                                     coordinate_of(rows.batch, plan.batch()), sequence.query_begin - i0,
                                     sequence.query_end - i0);
  }

 private:
  // Rows first .. of the storage, of which [begin, end) are the sequence's.
  template <class Tile>
  __device__ __forceinline__ void load(uint32_t tile, const CUtensorMap& map, uint32_t full, bool dirty, int first,
                                       int head, int batch, int begin, int end) {
    const uint32_t barrier = dirty ? shared.landed : full;
    __syncwarp();  // a lane that came late could find the phase over twice
    if (leader) {
      mbarrier_arrive_expect_bytes(barrier, Tile::kBytes);
      load_tile<Tile>(tile, map, barrier, first, head, batch);
    }
    if (!dirty) return;
    mbarrier_wait(shared.landed, landed_parity);
    landed_parity ^= 1;
    zero_rows_outside<Tile>(tile, begin, end);
    fence_async_proxy();
    __syncwarp();
    if (leader) mbarrier_arrive(full);
  }
};

// For each plan Q, the bias and dO of each step; K and V beside the first step's, in the order in which the piece of
// work before gives their places back.
template <class Traits>
__device__ __forceinline__ void copy_wide_tiles(const AttentionParams& p, const BackwardMaps& maps,
                                                const BackwardShared<Traits>& shared) {
  TileCopier<Traits> copier{p, shared};
  uint32_t step = 0;
  for (uint32_t n = 0;; ++n) {
    shared.planned.wait_full(n);
    const BackwardPlan& plan = shared.plan(n);
    if (plan.j0 < 0) return;
    bool has_keys = false;
    for (StepWalk<Traits::kQueries> walk(plan); walk.exists(); walk.next(), ++step) {
      const int head = uniform(walk.head), i0 = uniform(walk.i0);
      shared.steps.wait_empty(step);
      copier.load_queries(plan, head, i0, shared.q_tile(step), maps.q, p.q, shared.steps.full(step));
      if (maps.terms.copies_bias) {
        shared.bias.wait_empty(step);
        __syncwarp();
        if (copier.leader) {
          mbarrier_arrive_expect_bytes(shared.bias.full(step), Traits::ScoreTile::kBytes);
          load_tile<typename Traits::ScoreTile>(shared.term_tile(), maps.bias, shared.bias.full(step), i0,
                                                coordinate_of(p.bias.head, head),
                                                coordinate_of(p.bias.batch, plan.batch()), plan.j0);
        }
      }
      if (!has_keys) {
        shared.v.wait_empty(n);
        copier.load_keys(plan, shared.v_tile(), maps.v, p.v, shared.v.full(n));
      }
      shared.dout.wait_empty(step);
      copier.load_queries(plan, head, i0, shared.dout_tile(step), maps.dout, p.dout, shared.dout.full(step));
      if (!has_keys) {
        shared.k.wait_empty(n);
        copier.load_keys(plan, shared.k_tile(), maps.k, p.k, shared.k.full(n));
        has_keys = true;
      }
    }
  }
}

// Adds the slices of dQ to the accumulator by TMA, those of either warpgroup as they come; the next one is started
// while one is read. In deterministic mode the key tiles of a query tile take turns, which end when all additions of
// the step are complete, long after they have been read. Nobody waits here for a turn: while one warpgroup's slice is
// early the other's may be the one that another CTA waits for. One thread has to keep up with all slices: four pieces
// of 4 KB each, read one after the other, had it bind.
template <class Traits>
__device__ __forceinline__ void add_dq_slices(const AttentionParams& p, const SlicedDqAccumulator& accumulator,
                                              const BackwardGrid& grid, const BackwardShared<Traits>& shared) {
  using Slices = typename Traits::Slices;
  if (!elect_one()) return;
  wait_for_kernel_before();  // which zeroed the accumulator
  bool has_ended = false;
  uint32_t place = 0, other_place = 0;           // slices so far of the warpgroup that is looked at, and of the other
  float *rows = nullptr, *other_rows = nullptr;  // of their steps
  uint32_t begun = 0;                            // steps whose turn has come
  // Of the last addition: barrier of the place that is read, and the counter of turns where it ends one. Both are seen
  // to later, when `newer` others have started; plan and step may be over then.
  uint32_t under_way = 0;
  int32_t* ends_turn = nullptr;
  const auto give_place_back = [&](auto newer) {
    bulk_wait_read<newer>();
    if (under_way != 0) mbarrier_arrive(under_way);
    under_way = 0;
  };
  const auto end_turn = [&](auto newer) {
    if (ends_turn == nullptr) return;
    bulk_wait<newer>();
    fence_async_proxy_global();
    add_release(ends_turn, 1);
    ends_turn = nullptr;
  };
  using None = std::integral_constant<int, 0>;
  using One = std::integral_constant<int, 1>;
  for (int warpgroup = 1;;) {
    warpgroup ^= 1;
    const uint32_t last_place = place;
    place = other_place;
    other_place = last_place;
    float* const last_rows = rows;
    rows = other_rows;
    other_rows = last_rows;
    const auto ring = shared.dq(warpgroup);
    const uint32_t slice = place % Slices::kCount, step = place / Slices::kCount;
    const bool arrived = mbarrier_ends_now(ring.full(place), ring.parity(place));
    // A step's turn is asked for as soon as its word is there, while nobody waits for the answer.
    const bool asks = accumulator.ordered && step >= begun &&
                      (arrived || mbarrier_ends_now(shared.steps.full(step), shared.steps.parity(step)));
    int32_t* turn = nullptr;
    bool exists = false;
    if (arrived || asks) {
      const BackwardStep& at = shared.step(step);
      exists = at.plan >= 0;
      if (exists) {
        const BackwardPlan& plan = shared.plan(at.plan);
        if (accumulator.ordered) turn = accumulator.counter(plan.sequence, plan.batch(), at.head, at.i0);
        if (asks && load_acquire(turn) >= turn_of<Traits>(p, plan, at.head, at.i0, grid)) {
          fence_async_proxy_global();
          ++begun;
        }
        if (slice == 0) rows = accumulator.rows(plan.sequence, plan.batch(), at.head, at.i0);
      } else if (arrived) {
        if (has_ended) break;
        has_ended = true;
        ++place;
        continue;
      }
    }
    const bool starts = arrived && exists && (!accumulator.ordered || step < begun);
    if (!starts) {
      give_place_back(None());
      end_turn(None());  // others may wait for that
      continue;
    }
    fence_async_proxy();  // here: it would hold up the consumers
    bulk_add_float(rows + Traits::kQueries * Slices::first_column(warpgroup, slice), shared.dq_tile(warpgroup, place),
                   Traits::kQueries * Slices::columns(slice) * static_cast<int>(sizeof(float)));
    bulk_commit();
    give_place_back(One());
    under_way = ring.empty(place);
    end_turn(One());
    if (slice == Slices::kCount - 1 && other_place > place) ends_turn = turn;
    ++place;
  }
  give_place_back(None());
  end_turn(None());
  bulk_wait<0>();
}

}  // namespace hf_flash::sm90
