// The producer warp that adds dQ to the accumulator, or lets the consumers finish dq.
#pragma once

#include "instructions/dependent_launch.cuh"
#include "sm90/backward_layout.cuh"
#include "sm90/divided_sums.cuh"

namespace hf_flash::sm90 {

// Of a query tile's part of the accumulator, which ends with the sequence's last unit of rows.
template <class Traits>
__device__ __forceinline__ int dq_bytes(const Sequence& sequence, int i0) {
  const int rows = Traits::DqSums::rows_of(sequence, i0, Traits::kQueries);
  return rows * Traits::kHeadDim * static_cast<int>(sizeof(float));
}

// How many key tiles add to a query tile's dQ before this piece of work does. They have consecutive numbers, from that
// of the queries' first visible key on; where the pieces of work start at different steps, the first is the one that
// starts there, or the next above.
template <class Traits>
__device__ __forceinline__ int turn_of(const AttentionParams& p, const BackwardPlan& plan, int head, int i0,
                                       const BackwardGrid& grid) {
  const Sequence& sequence = plan.sequence;
  if (!grid.rotates) {
    const int begin = max(i0, sequence.query_begin), end = min(i0 + Traits::kQueries, sequence.query_end);
    return plan.j0 / Traits::kKeys - sequence.keys_of(p, begin, end).begin / Traits::kKeys;
  }
  const int tiles = (plan.end - plan.begin) / Traits::kQueries, heads = plan.heads;
  const int tile = (i0 - plan.begin) / Traits::kQueries, number = head - plan.first_head;
  const int step = plan.heads_first ? tile * heads + number : number * tiles + tile;
  const int reach = min(heads * tiles, grid.reach);
  const int above = (step * plan.turns + reach - 1) / reach;  // smallest turn that starts at `step` or above
  const int first = above < plan.turns ? above : 0;
  return plan.turn - first + (plan.turn < first ? plan.turns : 0);
}

// A step finishes dq of its queries.
template <class Traits>
__device__ __forceinline__ void aim_at_dq(const AttentionParams& p, const BackwardPlan& plan, int head, int i0,
                                          DqTarget& target) {
  const Sequence& sequence = plan.sequence;
  target.rows = static_cast<uint16_t*>(p.dq.data) + plan.batch() * p.dq.batch + head * p.dq.head +
                (sequence.first_q + i0) * p.dq.row;
  target.begin = sequence.query_begin - i0;
  target.end = sequence.query_end - i0;
  target.row = p.dq.row;
  target.factor = static_cast<float>(p.scale) * (Traits::kDropout ? 256.0f / p.dropout_keep : 1.0f);
}

// Gives the place for dQ to a step that finishes dq of its queries: once all others have had their turns, with what
// they have added.
template <class Traits>
__device__ __forceinline__ void give_place_to_finish(const AttentionParams& p,
                                                     const typename Traits::DqSums& accumulator,
                                                     const BackwardPlan& plan, int head, int i0, uint32_t step,
                                                     const BackwardShared<Traits>& shared) {
  const Sequence& sequence = plan.sequence;
  const uint32_t full = shared.dq.full(step);
  auto& target = shared.dq_target(step);
  aim_at_dq<Traits>(p, plan, head, i0, target);
  target.adds = plan.turns > 1;
  if (plan.turns == 1) {
    mbarrier_arrive(full);
  } else {
    const int32_t* turns = accumulator.counter(sequence, plan.batch(), head, i0);
    while (load_acquire(turns) < plan.turns - 1) {
    }
    fence_async_proxy_global();
    if constexpr (Traits::kDqOverDs) {
      target.sums = accumulator.rows(sequence, plan.batch(), head, i0);
      mbarrier_arrive(full);
      return;
    }
    const int bytes = dq_bytes<Traits>(sequence, i0);
    mbarrier_arrive_expect_bytes(full, bytes);
    bulk_load(shared.dq_tile(step), accumulator.rows(sequence, plan.batch(), head, i0), bytes, full);
  }
}

// Until the zeros that a piece of work's dQ is added to are there.
template <class Traits>
__device__ __forceinline__ void wait_for_zeros(const typename Traits::DqSums& accumulator, const BackwardPlan& plan) {
  const int pieces = Traits::DqSums::pieces_of(plan.sequence, Traits::kHeadDim);
  for (int n = 0; n < static_cast<int>(plan.heads); ++n)
    while (load_acquire(&accumulator.zeroed_pieces(plan.batch(), plan.first_head + n).done) < pieces) {
    }
  fence_async_proxy_global();
}

// Adds each step's dQ to the accumulator by TMA, which holds up nobody. Where the order is fixed the key tiles of a
// query tile take turns, and the last one may finish dq, which the consumers do. Otherwise they come as they come. The
// first to come stores, where nobody zeroes the accumulator.
template <class Traits>
__device__ __forceinline__ void add_dq(const AttentionParams& p, const typename Traits::DqSums& accumulator,
                                       const BackwardGrid& grid, const BackwardShared<Traits>& shared) {
  if (!elect_one()) return;
  wait_for_kernel_before();  // which has set the counters
  uint32_t step = 0;
  int32_t* arrived = nullptr;  // this counter grows by so much when what was added last has arrived
  int32_t count = 0;
  const auto end_turn = [&] {
    if (arrived == nullptr) return;
    bulk_wait<0>();
    fence_async_proxy_global();
    add_release(arrived, count);
    arrived = nullptr;
  };
  for (uint32_t n = 0;; ++n) {
    shared.planned.wait_full(n);
    const BackwardPlan& plan = shared.plan(n);
    if (plan.j0 < 0) break;
    const Sequence& sequence = plan.sequence;
    bool zeroed = accumulator.zeroed == nullptr;
    for (StepWalk<Traits::kQueries> walk(plan); walk.exists(); walk.next(), ++step) {
      if (walk.left <= plan.finishing) {
        end_turn();  // first: those that it waits for may wait for this one
        give_place_to_finish(p, accumulator, plan, walk.head, walk.i0, step, shared);
        shared.wait_for_dq(step);
        fence_async_proxy();
        shared.release_dq(step);
        continue;
      }
      const bool takes = plan.takes() && walk.last();
      if (!takes) mbarrier_arrive(shared.dq.full(step));
      end_turn();
      if (takes) {  // now: who gives may have waited for this CTA's turn to end
        DividedSums<Traits>{p, plan.place()}.wait();
        mbarrier_arrive(shared.dq.full(step));
      }
      if (!zeroed) wait_for_zeros<Traits>(accumulator, plan);
      zeroed = true;
      int32_t* const counter =
          accumulator.counters != nullptr ? accumulator.counter(sequence, plan.batch(), walk.head, walk.i0) : nullptr;
      // Asked for while nothing is waited for but this CTA's own products: so whoever is the first will store.
      const int32_t before = accumulator.stores_first() && !accumulator.ordered ? add_acquire(counter, 1) : 0;
      shared.wait_for_dq(step);
      bool stores = false;
      if (accumulator.ordered) {
        const int turn = turn_of<Traits>(p, plan, walk.head, walk.i0, grid);
        while (load_acquire(counter) < turn) {
        }
        arrived = counter;
        count = 1;
        stores = turn == 0;
      } else if (accumulator.stores_first()) {
        stores = before == 0;
        if (stores) {
          arrived = counter;
          count = Traits::DqSums::kStored;
        } else if (before < Traits::DqSums::kStored) {
          while (load_acquire(counter) < Traits::DqSums::kStored) {
          }
        }
      }
      if (counter != nullptr) fence_async_proxy_global();
      fence_async_proxy();  // here: it would hold up the consumers
      float* const rows = accumulator.rows(sequence, plan.batch(), walk.head, walk.i0);
      const int bytes = dq_bytes<Traits>(sequence, walk.i0);
      const auto add = [&](float* to, uint32_t tile, int bytes) {
        if (stores) {
          bulk_store(to, tile, bytes);
        } else {
          bulk_add_float(to, tile, bytes);
        }
      };
      if constexpr (Traits::kTall) {
        constexpr int kHalf = Traits::kDqBytesOverDs;
        add(rows, shared.ds_tile(step), min(bytes, kHalf));
        if (bytes > kHalf) add(rows + kHalf / sizeof(float), shared.dq_second_half(step), bytes - kHalf);
      } else {
        add(rows, shared.dq_tile(step), bytes);
      }
      bulk_commit();
      bulk_wait_read<0>();
      shared.release_dq(step);
    }
    // The consumers have stored dK and dV before their last dQ, but for the last plan, behind which none is made.
    mbarrier_arrive(shared.planned.empty(n));
  }
  end_turn();
  bulk_wait<0>();
}

}  // namespace hf_flash::sm90
