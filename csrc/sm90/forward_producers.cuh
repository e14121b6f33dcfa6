// The forward's producer warps: one plans, one copies tiles by TMA, both ahead of the consumers as far as the rings
// allow.
#pragma once

#include <cuda_runtime.h>

#include "instructions/tma.cuh"
#include "sm90/forward_layout.cuh"

namespace hf_flash::sm90 {

// By a warp: the rows of a plan, which see no key.
template <class Traits>
__device__ __forceinline__ void store_nothing(const AttentionParams& p, const ForwardPlan<Traits>& plan) {
  const int lane = threadIdx.x % 32, end = min(plan.row0 + Traits::kRows, plan.sequence.len_q);
  const float sink = p.sink != nullptr ? static_cast<const float*>(p.sink)[plan.head] : -CUDART_INF_F;
  for (int row = plan.row0; row < end; ++row) {
    const int64_t place = plan.sequence.first_q + row;
    uint16_t* out = static_cast<uint16_t*>(p.out.data) + plan.batch * p.out.batch + plan.head * p.out.head;
    if (8 * lane < p.head_dim_v) *reinterpret_cast<uint4*>(out + place * p.out.row + 8 * lane) = uint4{0, 0, 0, 0};
    float* lse = static_cast<float*>(p.lse.data) + plan.batch * p.lse.batch + plan.head * p.lse.head;
    if (lane == 0) lse[place] = plan.sequence.computes(row) ? sink : -CUDART_INF_F;
  }
}

// The planning warp looks one or two pieces of work ahead: what it reads from memory costs nobody any time.
template <class Traits>
__device__ __forceinline__ void make_plans(const AttentionParams& p, const PersistentSchedule& schedule,
                                           const ForwardShared<Traits>& shared) {
  uint32_t n = 0;  // pieces of work so far
  PersistentSchedule::ListWalk walk;
  for (int round = 0;; ++round) {
    const auto rows_of = [&](int b) {
      return PersistentSchedule::Span{0, (Sequence(p, b).len_q + Traits::kRows - 1) / Traits::kRows};
    };
    const PersistentSchedule::Work work =
        schedule.listed ? schedule.listed_work(round, walk, rows_of) : schedule.work(round);
    const bool last = work.tile < 0;
    const Sequence sequence(p, last ? 0 : work.batch);
    // A shorter sequence than the longest, or no work in this round.
    if (!last && work.tile * Traits::kRows >= sequence.len_q) continue;
    const bool holes = ForwardPlan<Traits>::finds_holes(p, sequence, work);  // before the wait, which hides it
    shared.wait_for_plan_place(n);
    shared.plan(n).make(p, sequence, work, holes);
    __syncwarp();
    if (!last && shared.plan(n).tiles.empty()) {
      store_nothing(p, shared.plan(n));
      __syncwarp();
      continue;
    }
    mbarrier_arrive(shared.planned.full(n));
    if (last) return;
    ++n;
  }
}

// The producer warp: for each plan Q, then the key tiles from the last to the first. V of a tile follows K of the tile
// before it, and then comes that one's bias: the order in which the consumers need them.
template <class Traits>
__device__ __forceinline__ void produce(const AttentionParams& p, const ForwardMaps& maps,
                                        const ForwardShared<Traits>& shared) {
  using KVTile = typename Traits::KVTile;
  uint32_t tiles = 0, k_place = 0, landed_parity = 0;  // key tiles so far
  const bool leader = elect_one();

  for (uint32_t n = 0;; ++n) {
    shared.planned.wait_full(n);
    const ForwardPlan<Traits>& plan = shared.plan(n);
    const int begin = uniform(plan.tiles.begin), end = uniform(plan.tiles.end);
    if (plan.row0 < 0) {
      if (Traits::kTrustsMax) shared.q.wait_empty(n);
      if (leader) mbarrier_arrive(shared.q.full(n));
      return;
    }
    const auto load_q = [&] {
      if (Traits::kTrustsMax) shared.q.wait_empty(n);  // otherwise the plan's place was waited for with it
      __syncwarp();
      if (!leader) return;
      mbarrier_arrive_expect_bytes(shared.q.full(n), Traits::QTile::kBytes);
      load_tile<typename Traits::QTile>(shared.q_tile(n), maps.q, shared.q.full(n), plan.sequence.first_q + plan.row0,
                                        coordinate_of(p.q.head, plan.head), coordinate_of(p.q.batch, plan.batch));
    };

    const int kv_head = plan.head / (p.heads_q / p.heads_k);
    const auto load = [&](uint32_t tile, const CUtensorMap& map, const Rows& rows, uint32_t barrier, int j0) {
      __syncwarp();  // a lane that came late could find the phase over twice
      if (!leader) return;
      mbarrier_arrive_expect_bytes(barrier, KVTile::kBytes);
      load_tile<KVTile>(tile, map, barrier, plan.sequence.first_k + j0, coordinate_of(rows.head, kv_head),
                        coordinate_of(rows.batch, plan.batch));
    };
    const auto load_bias = [&](int tile, uint32_t place) {
      if (!Traits::kExtras || !maps.scores.copies_bias) return;
      shared.scores.wait_empty(place);
      __syncwarp();
      if (!leader) return;
      mbarrier_arrive_expect_bytes(shared.scores.full(place), Traits::ScoreTile::kBytes);
      load_tile<typename Traits::ScoreTile>(shared.score_tile(place), maps.bias, shared.scores.full(place), plan.row0,
                                            coordinate_of(p.bias.head, plan.head),
                                            coordinate_of(p.bias.batch, plan.batch), tile * Traits::kKeys);
    };
    const auto load_k = [&](int tile) {
      shared.k.wait_empty(k_place);
      load(shared.k_tile(k_place), maps.k, p.k, shared.k.full(k_place), tile * Traits::kKeys);
      k_place = Traits::next_k(k_place, k_place);
    };
    // Rows of other sequences or of padding must not reach P V: 0 * NaN. What lies past the tensor is zero already.
    const auto load_v = [&](int tile) {
      const int j0 = tile * Traits::kKeys;
      const bool clean = j0 < plan.sequence.key_begin || j0 + Traits::kKeys > plan.zero_from;
      shared.v.wait_empty(tiles);
      load(shared.v_tile(tiles), maps.v, p.v, clean ? shared.landed : shared.v.full(tiles), j0);
      if (clean) {
        mbarrier_wait(shared.landed, landed_parity);
        landed_parity ^= 1;
        zero_rows_outside<KVTile>(shared.v_tile(tiles), plan.sequence.key_begin - j0, plan.sequence.key_end - j0);
        fence_async_proxy();
        __syncwarp();
        if (leader) mbarrier_arrive(shared.v.full(tiles));
      }
      ++tiles;
    };
    if (!Traits::kTrustsMax) load_q();
    load_k(end - 1);
    if (Traits::kTrustsMax) load_q();
    load_bias(end - 1, tiles);
    for (int tile = end - 1; tile > begin; --tile) {
      load_k(tile - 1);
      load_v(tile);
      load_bias(tile - 1, tiles);
    }
    load_v(begin);
  }
}

}  // namespace hf_flash::sm90
