// The producer warps of a pair of CTAs (paired_backward.cuh): one copies tiles; in the second CTA one hands dS to the
// first. Those that plan and that bring row values are backward_producers.cuh's, the one that adds dQ is
// wide_backward_producers.cuh's.
#pragma once

#include "sm90/paired_backward_layout.cuh"
#include "sm90/wide_backward_producers.cuh"

namespace hf_flash::sm90 {

// For each plan K and of each step Q and dO; in the second CTA V, dO and Q.
template <class Traits>
__device__ __forceinline__ void copy_paired_tiles(const AttentionParams& p, const BackwardMaps& maps, bool owns_dv,
                                                  const BackwardShared<Traits>& shared) {
  using KeyTile = typename Traits::KeyTile;
  using QueryTile = typename Traits::QueryTile;
  uint32_t step = 0, landed_parity = 0;
  const bool leader = elect_one();
  const Role role = owns_dv ? Role::kDv : Role::kDk;

  // A tile of rows first .. of the storage. Tiles with rows of other sequences or of padding, outside [begin, end), are
  // cleaned before the consumers hear of them: 0 * NaN.
  const auto load = [&](auto tile_type, uint32_t tile, const CUtensorMap& map, uint32_t full, bool dirty, int first,
                        int head, int batch, int begin, int end) {
    using Tile = decltype(tile_type);
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
  };
  for (uint32_t n = 0;; ++n) {
    shared.planned.wait_full(n);
    const BackwardPlan& plan = shared.plan(n);
    if (plan.j0 < 0) return;
    bool has_keys = false;
    for (typename Traits::Walk walk(plan); walk.exists(); walk.next(), ++step) {
      const int head = uniform(walk.head), i0 = uniform(walk.i0);
      const auto load_queries = [&](uint32_t tile, bool dout, uint32_t full) {
        const Rows& rows = dout ? p.dout : p.q;
        const bool dirty = i0 < plan.sequence.query_begin || i0 + Traits::kQueries > plan.zero_queries_from;
        load(QueryTile(), tile, dout ? maps.dout : maps.q, full, dirty, plan.sequence.first_q + i0,
             coordinate_of(rows.head, head), coordinate_of(rows.batch, plan.batch()), plan.sequence.query_begin - i0,
             plan.sequence.query_end - i0);
      };
      shared.steps.wait_empty(step);
      if (leader) mbarrier_arrive(shared.steps.full(step));
      shared.factors.wait_empty(step);
      load_queries(shared.factor_tile(role, step), !owns_dv, shared.factors.full(step));
      if (!has_keys) {
        const Rows& rows = owns_dv ? p.k : p.v;
        const bool dirty = plan.j0 < plan.sequence.key_begin || plan.j0 + Traits::kKeys > plan.zero_keys_from;
        shared.keys.wait_empty(n);
        load(KeyTile(), shared.key_tile(role), owns_dv ? maps.k : maps.v, shared.keys.full(n), dirty,
             plan.sequence.first_k + plan.j0, coordinate_of(rows.head, plan.kv_head),
             coordinate_of(rows.batch, plan.batch()), plan.sequence.key_begin - plan.j0,
             plan.sequence.key_end - plan.j0);
        has_keys = true;
      }
      shared.summands.wait_empty(step);
      load_queries(shared.summand_tile(role, step), owns_dv, shared.summands.full(step));
    }
  }
}

// dS of each step, as the warps of the second CTA have laid it out, to the same place of the first one, which is free:
// they have waited for that.
template <class Traits>
__device__ __forceinline__ void send_ds(const BackwardShared<Traits>& shared) {
  if (!elect_one()) return;
  for (uint32_t step = 0;; ++step) {
    shared.laid_out.wait_full(step);
    if (shared.step(step).plan < 0) return;
    const uint32_t tile = shared.ds_tile(step), full = shared_address_of(shared.ds.full(step), 0);
    constexpr int kBytes = Traits::ScoreColumns::kBytes;
    mbarrier_arrive_expect_bytes_remote(full, kBytes);
    bulk_copy_remote(shared_address_of(tile, 0), tile, kBytes, full);
  }
}

}  // namespace hf_flash::sm90
