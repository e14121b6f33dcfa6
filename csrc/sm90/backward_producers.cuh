// The backward's producer warps: one plans and writes the zeros that dQ is added to, one copies tiles by TMA, one
// brings lse and row sums, all ahead of the consumers as far as the rings allow; a fourth, behind them, adds dQ
// (dq_addition.cuh).
#pragma once

#include "attention/score_gradient.cuh"
#include "instructions/dependent_launch.cuh"
#include "sm90/backward_layout.cuh"

namespace hf_flash::sm90 {

// By a warp: dK and dV of a tile of keys that no query sees.
template <class Traits>
__device__ __forceinline__ void store_zero_gradients(const AttentionParams& p, const Sequence& sequence,
                                                     const PersistentSchedule::Work& work) {
  const int lane = threadIdx.x % 32, j0 = work.tile * Traits::kKeys, end = min(j0 + Traits::kKeys, sequence.len_k);
  const auto zero = [&](const Rows& x, int64_t row, int dim) {
    uint16_t* to = static_cast<uint16_t*>(x.data) + work.batch * x.batch + work.head * x.head + row * x.row;
    if (8 * lane < dim) *reinterpret_cast<uint4*>(to + 8 * lane) = uint4{0, 0, 0, 0};
  };
  for (int key = j0; key < end; ++key) {
    zero(p.dk, sequence.first_k + key, p.head_dim);
    zero(p.dv, sequence.first_k + key, p.head_dim_v);
  }
}

// By a warp: those of all tiles that are not on the list.
template <class Traits>
__device__ __forceinline__ void store_zeros_beside_list(const AttentionParams& p, const PersistentSchedule& schedule) {
  PersistentSchedule::ListWalk walk;
  for (int round = 0;; ++round) {
    const auto unseen_tiles = [&](int b) {
      const Sequence sequence(p, b);
      const int tiles = (sequence.len_k + Traits::kKeys - 1) / Traits::kKeys;
      return PersistentSchedule::Span{0, tiles - seen_tiles<Traits>(sequence).count};
    };
    PersistentSchedule::Work work = schedule.listed_work(round, walk, unseen_tiles, Traits::kTeam);
    if (work.tile < 0) return;
    const Sequence sequence(p, work.batch);
    const PersistentSchedule::Span seen = seen_tiles<Traits>(sequence);
    if (work.tile >= seen.first) work.tile += seen.count;
    store_zero_gradients<Traits>(p, sequence, work);
  }
}

// By a warp: writes the zeros that a piece of work's dQ is added to, as far as no other CTA has begun to. Who comes
// first to a head writes most of them; nobody waits for a CTA that does not run yet.
template <class Traits>
__device__ __forceinline__ void zero_sums(const typename Traits::DqSums& accumulator, const BackwardPlan& plan) {
  using Sums = typename Traits::DqSums;
  constexpr int kUnits = Sums::units_of_piece(Traits::kHeadDim), kUnitBytes = 4 * Sums::kUnitRows * Traits::kHeadDim;
  static_assert(kUnitBytes % 2048 == 0);
#pragma unroll 1
  for (int head = plan.first_head; head < plan.first_head + static_cast<int>(plan.heads); ++head) {
    for (;;) {
      // All lanes add, though all but one nothing: ptxas spills where one alone does.
      const bool leads = opaque(threadIdx.x % 32) == 0;
      int32_t* const begun = &accumulator.zeroed_pieces(plan.batch(), head).begun;
      const int first = kUnits * __shfl_sync(0xFFFFFFFF, add_acquire(begun, leads), 0);
      const int units = min(kUnits, Sums::units_of(plan.sequence.query_end) - first);
      if (units <= 0) break;
      const int unit = static_cast<int>(accumulator.unit(plan.sequence, plan.batch(), head, 0)) + first;
      char* to = reinterpret_cast<char*>(accumulator.data) + int64_t{unit} * kUnitBytes + 16 * opaque(threadIdx.x % 32);
#pragma unroll 1
      for (int left = units * kUnitBytes; left > 0; left -= 2048, to += 2048) {
#pragma unroll
        for (int x = 0; x < 2048; x += 512) *reinterpret_cast<float4*>(to + x) = float4{0, 0, 0, 0};
      }
      __syncwarp();
      if (leads) add_release(&accumulator.zeroed_pieces(plan.batch(), head).done, 1);
    }
  }
}

template <class Traits>
__device__ __forceinline__ void make_plans(const AttentionParams& p, const typename Traits::DqSums& accumulator,
                                           const PersistentSchedule& schedule, const BackwardGrid& grid,
                                           const BackwardShared<Traits>& shared) {
  uint32_t n = 0;       // pieces of work so far
  uint32_t zeroed = 0;  // of them
  PersistentSchedule::ListWalk walk;
  for (int round = 0;; ++round) {
    const auto spans = [&](int b) { return seen_tiles<Traits>(Sequence(p, b)); };
    const DividedWork::Part* part = nullptr;
    PersistentSchedule::Work work;
    if (round >= schedule.divided_round) {
      wait_for_kernel_before();  // which has written it
      part = &DividedWork::memory(p).parts[blockIdx.x][round - schedule.divided_round];
      work = {__ldcg(&part->tile), __ldcg(&part->head), __ldcg(&part->batch)};
    } else if (schedule.listed) {
      work = schedule.listed_work(round, walk, spans, Traits::kTeam);
    } else {
      work = schedule.work(round, Traits::kTeam);
    }
    const bool last = work.tile < 0;
    const Sequence sequence(p, last ? 0 : work.batch);
    if (!last && work.tile * Traits::kKeys >= sequence.len_k) continue;
    if (Traits::kRelays && !last) {  // the first CTA of a cluster has the first tile that is seen
      const int tiles = (sequence.len_k + Traits::kKeys - 1) / Traits::kKeys;
      work.tile += seen_tiles<Traits>(sequence).first;
      if (work.tile >= tiles) work.tile -= tiles;
    }
    shared.wait_for_plan_place(n);
    BackwardPlan& plan = shared.plan(n);
    make_plan<Traits>(plan, p, sequence, work, part, grid);
    __syncwarp();
    if (!last && plan.empty()) {
      store_zero_gradients<Traits>(p, sequence, work);
      __syncwarp();
      continue;
    }
    mbarrier_arrive(shared.planned.full(n));
    if constexpr (Traits::kZeroesAhead) {
      if (accumulator.zeroed != nullptr) {
        if (n == 0) wait_for_kernel_before();  // which has set the counters
        // Up to the piece of work behind the consumers': earlier, zeros leave the L2 cache before anything is added.
        const uint32_t end = last || n == 0 ? n : n - 1;
#pragma unroll 1
        for (; zeroed < end; ++zeroed) zero_sums<Traits>(accumulator, shared.plan(zeroed));
      }
    }
    if (last) break;
    ++n;
  }
  if (schedule.listed) store_zeros_beside_list<Traits>(p, schedule);
}

// For each plan K and V, then Q and dO of each step, and its bias.
template <class Traits>
__device__ __forceinline__ void copy_tiles(const AttentionParams& p, const BackwardMaps& maps,
                                           const BackwardShared<Traits>& shared) {
  using KeyTile = typename Traits::KeyTile;
  using QueryTile = typename Traits::QueryTile;
  uint32_t step = 0, landed_parity = 0;
  const bool leader = elect_one();

  // Tiles with rows of other sequences or of padding are cleaned before the consumers hear of them: 0 * NaN.
  const auto clean = [&](uint32_t full, auto&& zero) {
    mbarrier_wait(shared.landed, landed_parity);
    landed_parity ^= 1;
    zero();
    fence_async_proxy();
    __syncwarp();
    if (leader) mbarrier_arrive(full);
  };
  for (uint32_t n = 0;; ++n) {
    shared.planned.wait_full(n);
    const BackwardPlan& plan = shared.plan(n);
    if (plan.j0 < 0) return;
    const auto load_keys = [&](uint32_t tile, const CUtensorMap& map, const Rows& rows, uint32_t full) {
      const bool dirty = plan.j0 < plan.sequence.key_begin || plan.j0 + Traits::kKeys > plan.zero_keys_from;
      const uint32_t barrier = dirty ? shared.landed : full;
      __syncwarp();  // a lane that came late could find the phase over twice
      if (leader) {
        mbarrier_arrive_expect_bytes(barrier, KeyTile::kBytes);
        load_tile<KeyTile>(tile, map, barrier, plan.sequence.first_k + plan.j0,
                           coordinate_of(rows.head, plan.kv_head / p.key_head_parts),
                           coordinate_of(rows.batch, plan.batch()));
      }
      if (dirty) {
        clean(full, [&] {
          zero_rows_outside<KeyTile>(tile, plan.sequence.key_begin - plan.j0, plan.sequence.key_end - plan.j0);
        });
      }
    };
    const auto load_k = [&] {
      shared.k.wait_empty(n);
      load_keys(shared.k_tile(n), maps.k, p.k, shared.k.full(n));
    };
    // With fewer places for K the first Q and dO come before it: who must give a place back may wait for them.
    if (Traits::kKeyStages >= 3) load_k();
    bool has_v = false;
    for (typename Traits::Walk walk(plan); walk.exists(); walk.next(), ++step) {
      const int head = uniform(walk.head), i0 = uniform(walk.i0);
      const bool dirty = i0 < plan.sequence.query_begin || i0 + Traits::kQueries > plan.zero_queries_from;
      const uint32_t q_tile = shared.q_tile(step), dout_tile = shared.dout_tile(step), full = shared.steps.full(step);
      const uint32_t barrier = dirty ? shared.landed : full;
      const auto load = [&](uint32_t tile, const CUtensorMap& map, const Rows& rows) {
        load_tile<QueryTile>(tile, map, barrier, plan.sequence.first_q + i0, coordinate_of(rows.head, head),
                             coordinate_of(rows.batch, plan.batch()));
      };
      shared.steps.wait_empty(step);
      __syncwarp();
      if (leader) {
        mbarrier_arrive_expect_bytes(barrier, 2 * QueryTile::kBytes);
        load(q_tile, maps.q, p.q);
        load(dout_tile, maps.dout, p.dout);
      }
      if (dirty) {
        clean(full, [&] {
          zero_rows_outside<QueryTile>(q_tile, plan.sequence.query_begin - i0, plan.sequence.query_end - i0);
          zero_rows_outside<QueryTile>(dout_tile, plan.sequence.query_begin - i0, plan.sequence.query_end - i0);
        });
      }
      if (!has_v) {  // after the first Q: V has one place, which is free later
        if (Traits::kKeyStages < 3) load_k();
        shared.v.wait_empty(n);
        load_keys(shared.v_tile(), maps.v, p.v, shared.v.full(n));
        has_v = true;
      }
      if (Traits::kExtras && maps.terms.copies_bias) {
        shared.ds.wait_empty(step);
        __syncwarp();
        if (leader) {
          using Tile = typename Traits::ScoreTile;
          mbarrier_arrive_expect_bytes(shared.bias.full(step), Traits::kScoreBytes);
#pragma unroll 1
          for (int part = 0; part < Traits::kScoreTiles; ++part)
            load_tile<Tile>(shared.ds_tile(step) + part * Tile::kBytes, maps.bias, shared.bias.full(step),
                            i0 + part * Tile::kRows, coordinate_of(p.bias.head, head),
                            coordinate_of(p.bias.batch, plan.batch()), plan.j0);
        }
      }
    }
  }
}

template <int QUERIES>
__device__ __forceinline__ DqRoute route_of(const StepWalk<QUERIES>& walk, uint32_t&) {
  return DqRoute::of(walk.left <= walk.plan.finishing);
}
template <int QUERIES>
__device__ __forceinline__ DqRoute route_of(const RelayWalk<QUERIES>& walk, uint32_t& odd) {
  const int next = walk.next_turn(), bit = next == 0;
  const bool was_odd = odd >> bit & 1;
  if (!walk.ends()) odd ^= 1 << bit;
  return DqRoute::of(walk.ends(), !walk.begins(), next, was_odd);
}

// To relay_dq(), which cannot follow the steps' ring.
template <class Traits>
__device__ __forceinline__ void tell_of_first_step(const BackwardShared<Traits>& shared, uint32_t step) {
  if constexpr (Traits::kRelays) {
    if (step == 0) mbarrier_arrive(shared.dq.full(0));
  }
}

// What each step is, and lse, in log2 units, and row sums of its queries; rows that are not computed get probabilities
// of 0. In a fixed order the consumers of tall tiles hear of a step no earlier than dQ of the one but one before has
// been added: they have no registers to ask, as lay_out_dq() of the others does.
template <class Traits>
__device__ __forceinline__ void copy_row_values(const AttentionParams& p, const BackwardShared<Traits>& shared) {
  const float factor = Traits::kDropout ? p.dropout_keep / 256.0f : 1.0f;
  uint32_t step = 0, odd = 0;  // odd: bits for the next CTA and for the first
  wait_for_kernel_before();    // for the row sums
  for (uint32_t n = 0;; ++n) {
    shared.planned.wait_full(n);
    const BackwardPlan& plan = shared.plan(n);
    if (plan.j0 < 0) {
      shared.steps.wait_empty(step);
      if (threadIdx.x % 32 == 0) {
        shared.step(step).plan = -1;
        tell_of_first_step(shared, step);
        mbarrier_arrive(shared.steps.full(step));  // for the copying warp, which has no tiles for it
      }
      mbarrier_arrive(shared.steps.full(step));
      return;
    }
    // Each lane keeps them for one warpgroup's keys.
    const KeyRange all = plan.queries_of_all(p, Traits::kKeys == 128 ? threadIdx.x % 2 : 0);
    for (typename Traits::Walk walk(plan); walk.exists(); walk.next(), ++step) {
      const int head = walk.head, i0 = walk.i0;
      const float* lse = static_cast<const float*>(p.lse.data) + plan.batch() * p.lse.batch + head * p.lse.head;
      const float* row_sum =
          static_cast<const float*>(p.row_sum.data) + plan.batch() * p.row_sum.batch + head * p.row_sum.head;
      // All loads are under way before the first is needed: their latency counts once.
      constexpr int kRows = (Traits::kQueries + 31) / 32;
      const int64_t row0 = plan.sequence.first_q + i0;
      const int lane = threadIdx.x % 32, begin = plan.sequence.query_begin - i0, end = plan.sequence.query_end - i0;
      float row_lse[kRows], row_sums[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const bool computed = 32 * r + lane >= begin && 32 * r + lane < end;
        row_lse[r] = computed ? lse[row0 + 32 * r + lane] : -CUDART_INF_F;
        row_sums[r] = computed ? row_sum[row0 + 32 * r + lane] : 0.0f;
      }
      shared.steps.wait_empty(step);
      float* to = shared.row_values(step) + lane;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (32 * r + lane >= Traits::kQueries) continue;
        to[32 * r] = lse_for_gradient(row_lse[r]);
        to[Traits::kQueries + 32 * r] = row_sums[r] * factor;
      }
      bool lowest = false;
      float slope = 0;
      if constexpr (Traits::kExtras) {
        if (p.alibi_slopes != nullptr) slope = p.alibi_slopes[plan.batch() * p.alibi_batch_stride + head];
#pragma unroll
        for (int r = 0; r < kRows; ++r) lowest |= row_lse[r] < kLowestBias / 4 && row_lse[r] != -CUDART_INF_F;
        lowest = any_lane(lowest);
      }
      const uint32_t boundary = __ballot_sync(0xFFFFFFFF, i0 < all.begin || i0 + Traits::kQueries > all.end);
      int next = static_cast<int>(n);
      if (Traits::kPlansAhead && walk.last()) {
        shared.planned.wait_full(n + 1);
        next = shared.plan(n + 1).j0 < 0 ? -1 : next + 1;
      }
      if (lane == 0) {
        BackwardStep& at = shared.step(step);
        at.plan = static_cast<int>(n);
        at.next = next;
        at.head = head;
        at.i0 = i0;
        at.last = walk.last();
        for (int w = 0; w < 2; ++w) at.boundary[w] = boundary >> w & 1;
        at.route = route_of(walk, odd);
        at.lowest = lowest;
        at.slope = slope;
        tell_of_first_step(shared, step);
      }
      if constexpr (Traits::kTall) {
        if (p.deterministic && step > 0) shared.dq.wait_full(step - 1);
      }
      __syncwarp();
      mbarrier_arrive(shared.steps.full(step));
    }
  }
}

}  // namespace hf_flash::sm90
