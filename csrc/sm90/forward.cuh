// Forward for Hopper: FlashAttention-3 (Shah et al. 2024) with TMA and wgmma. A CTA stays on its SM and takes one tile
// of query rows after the other. One producer warp copies Q, K and V into rings of shared memory; each consumer
// warpgroup owns 64 of the rows. Q K^T of a key tile starts beside P V of the tile before, and the warpgroups take
// turns at the tensor cores, so that one's softmax hides behind the others' products; whether it also hides behind its
// own P V is a choice of the tile (config.h). Most tiles do without a maximum of their own (forward_again.cuh).
#pragma once

#include <cuda_runtime.h>

#include "attention/dropout_fragment.cuh"
#include "attention/schedule.cuh"
#include "attention/score.cuh"
#include "attention/softmax.cuh"
#include "instructions/warpgroup.cuh"
#include "portable/cuda_call.h"
#include "sm90/forward_again.cuh"
#include "sm90/forward_producers.cuh"
#include "sm90/forward_tiles.h"
#include "sm90/score_terms.cuh"
#include "tile/store.cuh"

namespace hf_flash::sm90 {

// What one consumer warpgroup holds in registers, and the steps of the algorithm on it.
template <class Traits>
struct ForwardWarpgroup {
  using T = typename Traits::T;
  static constexpr int kKeys = Traits::kKeys;

  const AttentionParams& p;
  const ForwardShared<Traits>& shared;
  const int warpgroup;
  const float factor;  // scores count as s * factor in log2 units
  const ScoreTerms<Traits> terms;
  Accumulator<16, kKeys> s;
  OperandA<16, kKeys> probabilities;
  Accumulator<16, Traits::kHeadDim> out;
  OnlineSoftmax<16> softmax;
  FragmentDropout<false> dropout;
  TileRange range;  // of the piece of work, where it is kept: the CTA's tiles, the keys that all of these rows see

  __device__ ForwardWarpgroup(const AttentionParams& p, const ForwardMaps& maps, const ForwardShared<Traits>& shared,
                              int warpgroup)
      : p(p),
        shared(shared),
        warpgroup(warpgroup),
        factor(Traits::kExtras ? maps.scores.factor : static_cast<float>(p.scale) * kLog2E),
        terms(p, shared, maps.scores, warpgroup),
        dropout(p, 0) {}

  // Turns at the tensor cores go round the warpgroups.
  __device__ __forceinline__ void wait_for_turn() const {
    if (Traits::kConfig.turns) named_barrier_wait(1 + warpgroup, 2 * kWarpgroupThreads);
  }
  __device__ __forceinline__ void pass_turn() const {
    // Beside the extras not even the barrier's number finds a register for the whole loop.
    const int own = Traits::kExtras ? opaque(warpgroup) : warpgroup;
    const int next = own + 1 < Traits::kWarpgroups ? own + 1 : 0;
    if (Traits::kConfig.turns) named_barrier_arrive(1 + next, 2 * kWarpgroupThreads);
  }

  // The rings' places of the tiles.
  __device__ __forceinline__ void start_scores(uint32_t q_place, uint32_t place) {
    constexpr bool kMoved = Traits::kConfig.moves_descriptors;
    const uint32_t q = Traits::QTile::template descriptor<kMoved>(shared.q_tile(q_place) + warpgroup * 64 * 128);
    const uint32_t k = Traits::KVTile::template descriptor<kMoved>(shared.k_tile(place));
    wgmma_fence();
    start_multiply_by_transpose<T, Traits::kHeadDim, typename Traits::QTile, typename Traits::KVTile>(s, q, k);
    wgmma_commit();
  }
  // fresh: out's old value does not count.
  __device__ __forceinline__ void start_output(uint32_t place, bool fresh) {
    const uint32_t v = Traits::KVTile::template descriptor<Traits::kConfig.moves_descriptors>(shared.v_tile(place));
    wgmma_fence();
    start_multiply<T, typename Traits::KVTile>(out, probabilities, v, !fresh);
    wgmma_commit();
  }

  // Completes the raw scores of a tile.
  __device__ __forceinline__ void complete_scores(const ForwardPlan<Traits>& plan, int tile, uint32_t place,
                                                  bool boundary) {
    const int j0 = tile * kKeys, row0 = first_row(plan);
    if constexpr (Traits::kExtras) terms.apply(s, plan, place, row0, j0);
    if (boundary)
      hide_invisible<false, Traits::kMasked>(s, p, plan.sequence, row0, j0, plan.own[warpgroup].has_holes());
  }
  // This lane's part of a tile's maxima.
  __device__ __forceinline__ RowVector<16> lane_max() {
    RowVector<16> top;
    take_lane_max(top, s, 0, kKeys / 8);
    if constexpr (Traits::kExtras) terms.keep_lowest_visible(s, top);
    return top;
  }

  // A tile's sums are added, where its maxima were not asked for once its probabilities are none too large.
  __device__ __forceinline__ void add_sums(RowVector<16>& sum, const ForwardPlan<Traits>& plan, int tile,
                                           uint32_t q_place, uint32_t k_place) {
    if (any_lane(sum.v[0] > kMostTrusted || sum.v[1] > kMostTrusted))
      exponentiate_again(*this, sum, plan, tile, q_place, k_place);
    softmax.add(sum);
  }

  // Scores become probabilities of the running maximum, summed up; meanwhile dropout draws. first: in units of 8 keys.
  __device__ __forceinline__ void exponentiate(const ForwardPlan<Traits>& plan, int tile, DropoutTile<Traits>& kept,
                                               RowVector<16>& sum, int first = 0) {
    const int j0 = tile * kKeys, row0 = first_row(plan);
    if (drops()) {
      dropout.batch_head = plan.batch * p.heads_q + plan.head;
      // Unrolled early those without other terms are 1 to 4 % slower.
      unrolled<DropoutTile<Traits>::kDraws, Traits::kEveryTerm>([&](int n) {
        // opaque: with every term ptxas spills at D 128 for what it works out ahead of the draws.
        kept.draw(dropout, row0 / 16, (Traits::kEveryTerm ? opaque(j0) : j0) / 16, n);
        softmax.exponentiate(s, factor, 4 * n, 4 * n + 4 < kKeys / 8 ? 4 : kKeys / 8 - 4 * n, sum);
      });
    } else {
      softmax.exponentiate(s, factor, first, kKeys / 8 - first, sum);
    }
  }
  // Those of the first keys, which shorten the wait for a product.
  __device__ __forceinline__ void exponentiate_first(RowVector<16>& sum) {
    softmax.exponentiate(s, factor, 0, Traits::kFirst, sum);
#pragma unroll
    for (float x : sum.v) wgmma_wait_after(x, shared.base);
  }

  // ptxas sinks the exponentials below the wait for the product that they should hide, but moves nothing across a
  // barrier's. place: of V, which is there.
  __device__ __forceinline__ void hold_exponentials(uint32_t place) {
    wgmma_settle(s);
#pragma unroll
    for (float& sum : softmax.sum.v) wgmma_settle(sum);
    shared.v.wait_full(place);
  }

  // While the products run: what the tile's scores need from global memory.
  __device__ __forceinline__ void stage_terms(const ForwardPlan<Traits>& plan, int tile) const {
    if constexpr (Traits::kExtras) terms.stage(plan, first_row(plan), tile * kKeys);
  }

  // A piece of work begins.
  __device__ __forceinline__ void keep_range(const ForwardPlan<Traits>& plan) {
    if constexpr (!Traits::kKeepsRange) return;
    range.begin = uniform(plan.tiles.begin);
    range.common_begin = uniform(plan.own[warpgroup].common_begin);
    range.common_end = uniform(plan.own[warpgroup].common_end);
  }
  __device__ __forceinline__ bool is_last(const ForwardPlan<Traits>& plan, int tile) const {
    return tile == (Traits::kKeepsRange ? range : plan.tiles).begin;
  }
  // Does something of the tile have to be hidden from some of this warpgroup's rows?
  __device__ __forceinline__ bool has_boundary(const ForwardPlan<Traits>& plan, int tile) const {
    return (Traits::kKeepsRange ? range : plan.own[warpgroup]).hides(tile * kKeys, (tile + 1) * kKeys);
  }

  __device__ __forceinline__ bool drops() const {
    return Traits::kDropout && (!Traits::kEveryTerm || dropout.keep < 256);
  }

  // Rounds the probabilities for P V; zeroes what dropout drops.
  __device__ __forceinline__ void round_probabilities(const DropoutTile<Traits>& kept) {
    to_operand<T>(probabilities, s, 0);
    if (drops()) kept.apply(dropout, probabilities);
  }

  // The first of this warp's 16 rows.
  __device__ __forceinline__ int first_row(const ForwardPlan<Traits>& plan) const {
    return plan.row0 + 64 * warpgroup + 16 * static_cast<int>(threadIdx.x / 32 % 4);
  }

  // out / sum, rounded, and lse of this warp's rows; softmax is the rows' final state.
  __device__ __forceinline__ void store(const ForwardPlan<Traits>& plan, const OnlineSoftmax<16>& final) {
    const Sequence& sequence = plan.sequence;
    const int row0 = first_row(plan);
    const float sink = p.sink != nullptr ? static_cast<const float*>(p.sink)[plan.head] * kLog2E : -CUDART_INF_F;
    float* lse = static_cast<float*>(p.lse.data) + plan.batch * p.lse.batch + plan.head * p.lse.head + sequence.first_q;
    RowVector<16> inverse;
#pragma unroll
    for (int i = 0; i < RowVector<16>::kCount; ++i) {
      const int row = row0 + RowVector<16>::row(i);
      float row_lse;
      inverse.v[i] = final.finish(i, sink, row_lse);
      if (!sequence.computes(row)) inverse.v[i] = 0.0f, row_lse = -CUDART_INF_F;
      if (Traits::kDropout) inverse.v[i] *= 256.0f / p.dropout_keep;
      if (lane_col() == 0 && row < sequence.len_q) lse[row] = row_lse;
    }
    OnlineSoftmax<16>::rescale(out, inverse);
    if (any_lane(inverse.v[0] == 0.0f || inverse.v[1] == 0.0f)) {  // such a row may hold anything
      out.for_each([&](float& x, int row, int) { x = inverse.v[row < 8 ? 0 : 1] == 0.0f ? 0.0f : x; });
    }
    T* rows = static_cast<T*>(p.out.data) + plan.batch * p.out.batch + (sequence.first_q + row0) * p.out.row +
              plan.head * p.out.head;
    store_fragment<T>(rows, p.out.row, p.head_dim_v, out, 0, sequence.len_q - row0);
  }
};

// The tiles of all pieces of work form one stream; those of a piece come from its last keys, which a causal mask cuts,
// to its first. A step computes the scores of the next tile, be it of the next piece of work, while P V of the current
// one is under way:
//
//   S = Q K^T                        of the next tile, with this warpgroup's turn; K from its ring's k_place
//   O += P V                         of the current one, behind it; V from its ring's `tiles`
//   S: softcap, ALiBi, bias, masks   complete_scores(), once S is there
//   m = max(m, rowmax S)             unless the tiles before are trusted to have it (kTrusts)
//   P = exp(S - m), l += rowsum P    exponentiate(); a part of it, or all, before the wait for O (kFirst, kOrder)
//   O *= exp(m before - m)           finish_output(); where a piece of work ends O / l and lse leave instead
//   P = dropped and rounded          round_probabilities()
//   where kTrusts: l too large?      add_sums(), which then computes P again; kChecksLate: while the next S runs
//
// Between the start of a product and its wait no branch may hide another one: ptxas would let them run one after the
// other.
template <class Traits>
__device__ __forceinline__ void consume(const AttentionParams& p, const ForwardMaps& maps,
                                        const ForwardShared<Traits>& shared, int warpgroup) {
  constexpr bool kTrusts = Traits::kTrustsMax;
  ForwardWarpgroup<Traits> state(p, maps, shared, warpgroup);
  if (warpgroup == Traits::kWarpgroups - 1) state.pass_turn();  // the first turn is the first warpgroup's
  uint32_t n = 0, tiles = 0, k_place = 0;                       // pieces of work and key tiles: places in the rings
  shared.q.wait_full(n);
  const ForwardPlan<Traits>* plan = &shared.plan(n);
  if (plan->row0 < 0) return;  // there is no more work
  state.keep_range(*plan);
  int tile = plan->tiles.end - 1;
  RowVector<16> correction;

  shared.k.wait_full(k_place);
  state.wait_for_turn();
  state.start_scores(n, k_place);
  state.pass_turn();
  state.stage_terms(*plan, tile);
  wgmma_wait<0>();
  wgmma_settle(state.s);
  if constexpr (!kTrusts) {
    shared.k.release(k_place);
    if (state.is_last(*plan, tile)) shared.q.release(n);
  }
  {
    DropoutTile<Traits> kept;
    state.complete_scores(*plan, tile, tiles, state.has_boundary(*plan, tile));
    state.softmax.raise_max(state.lane_max(), state.factor, correction);
    state.exponentiate(*plan, tile, kept, state.softmax.sum);
    state.round_probabilities(kept);
  }

  bool fresh = true;  // out, of a piece of work's first tile
  RowVector<16> sum;  // of a tile's probabilities
  sum.fill(0.0f);
  for (;; ++tiles) {
    const ForwardPlan<Traits>* const current = plan;
    const bool ends = state.is_last(*plan, tile);
    const int tile_before = tile--;
    if (ends) {
      shared.q.wait_full(++n);
      plan = &shared.plan(n);
      if (plan->row0 < 0) break;
      tile = plan->tiles.end - 1;
      state.keep_range(*plan);
    }
    bool boundary, last;
    const auto look_up_tile = [&] {
      boundary = state.has_boundary(*plan, tile);
      last = state.is_last(*plan, tile);
    };
    if constexpr (Traits::kKeepsRange) look_up_tile();
    const uint32_t k_before = k_place;
    k_place = Traits::next_k(k_place, tiles);
    shared.k.wait_full(k_place);
    state.wait_for_turn();
    state.start_scores(n, k_place);
    // While Q K^T runs, behind which P V would wait anyway.
    if constexpr (Traits::kChecksLate) state.add_sums(sum, *current, tile_before, n - ends, k_before);
    shared.v.wait_full(tiles);
    state.start_output(tiles, fresh);
    fresh = ends;
    state.pass_turn();
    const OnlineSoftmax<16> final = state.softmax;
    if (ends) state.softmax = OnlineSoftmax<16>();
    const bool waits = kTrusts && state.softmax.waits_for_first();
    if constexpr (!Traits::kKeepsRange) look_up_tile();
    state.stage_terms(*plan, tile);
    wgmma_wait<1>();
    wgmma_settle(state.s);
    if constexpr (kTrusts) {  // of the tile before, whose scores are not needed again
      shared.k.release(k_before);
      if (ends) shared.q.release(n - 1);
    } else {
      shared.k.release(k_place);
      if (last) shared.q.release(n);
    }
    DropoutTile<Traits> kept;  // not carried round the loop: without dropout it would hold its registers all the time
    state.complete_scores(*plan, tile, tiles + 1, boundary);
    bool moved = false;  // then out must be multiplied by `correction`
    if constexpr (!kTrusts) {
      moved = state.softmax.raise_max(state.lane_max(), state.factor, correction);
    } else if (waits) {
      state.softmax.take_first_max(state.lane_max(), state.factor);
    }
    const auto finish_output = [&] {
      wgmma_wait<0>();
      wgmma_settle(state.out);
      shared.v.release(tiles);
      if (ends) {
        state.store(*current, final);
      } else if (moved) {
        OnlineSoftmax<16>::rescale(state.out, correction);
      }
    };
    constexpr Order kOrder = Traits::kConfig.order;
    RowVector<16>& sums = kTrusts ? sum : state.softmax.sum;
    if constexpr (kTrusts) sum.fill(0.0f);
    if constexpr (Traits::kFirst > 0) state.exponentiate_first(sums);
    if constexpr (kOrder == Order::kOutput) finish_output();
    state.exponentiate(*plan, tile, kept, sums, Traits::kFirst);
    if constexpr (kOrder == Order::kExponentials) state.hold_exponentials(tiles);
    if constexpr (kOrder != Order::kOutput) finish_output();
    state.round_probabilities(kept);
    if constexpr (kTrusts && !Traits::kChecksLate) state.add_sums(sum, *plan, tile, n, k_place);
  }

  if constexpr (Traits::kChecksLate) state.add_sums(sum, shared.plan(n - 1), tile + 1, n - 1, k_place);
  shared.v.wait_full(tiles);
  state.start_output(tiles, fresh);
  wgmma_wait<0>();
  wgmma_settle(state.out);
  state.store(shared.plan(n - 1), state.softmax);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    forward_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ ForwardMaps maps,
                   const __grid_constant__ PersistentSchedule schedule) {
  extern __shared__ __align__(1024) char shared_memory[];
  const ForwardShared<Traits> shared(shared_memory);
  const int warpgroup = uniform(threadIdx.x / kWarpgroupThreads);
  init_barriers(shared);
  __syncthreads();
  if (warpgroup == Traits::kWarpgroups) {
    give_registers_back<Traits::kProducerRegisters>();
    const int warp = uniform(threadIdx.x / 32 % 4);
    if (warp == 0) produce(p, maps, shared);
    if (warp == 1) make_plans(p, schedule, shared);
  } else {
    take_registers<Traits::kConsumerRegisters>();
    consume(p, maps, shared, warpgroup);
  }
}

template <class Traits>
void launch_forward(const AttentionParams& p, cudaStream_t stream) {
  const auto kernel = forward_kernel<Traits>;
  static SharedMemoryPermit permit;
  permit.ask(kernel, ForwardShared<Traits>::kBytes);
  const int multiprocessors = multiprocessor_count();
  const PersistentSchedule schedule = forward_schedule(p, Traits::kRows, multiprocessors);
  if (schedule.works() == 0) return;
  if (schedule.works() > INT32_MAX - (1 << 20))
    throw std::runtime_error("hf_flash: batch * heads * seqlen_q is too large for one launch");
  const ForwardMaps maps(p, Traits::kRows, Traits::kKeys);
  const int ctas = static_cast<int>(std::min<int64_t>(schedule.works(), multiprocessors));
  kernel<<<ctas, Traits::kThreads, ForwardShared<Traits>::kBytes, stream>>>(p, maps, schedule);
  check_launch("forward");
}

template <class T, int HEAD_DIM, bool DROPOUT, Terms TERMS, bool MASKED>
void run_forward(const AttentionParams& p, cudaStream_t stream) {
  if constexpr (has_small_tiles(HEAD_DIM, TERMS != Terms::kNone)) {
    if (prefers_small_tiles(p, small_tiles(DROPOUT, false), multiprocessor_count()))
      return launch_forward<ForwardTraits<T, HEAD_DIM, DROPOUT, TERMS, true, MASKED>>(p, stream);
  }
  launch_forward<ForwardTraits<T, HEAD_DIM, DROPOUT, TERMS, false, MASKED>>(p, stream);
}

template <class T, int HEAD_DIM, bool DROPOUT, Terms TERMS>
void run_forward(const AttentionParams& p, cudaStream_t stream) {
  if constexpr (masks_apart(HEAD_DIM, TERMS != Terms::kNone)) {
    if (p.key_mask == nullptr) return run_forward<T, HEAD_DIM, DROPOUT, TERMS, false>(p, stream);
  }
  run_forward<T, HEAD_DIM, DROPOUT, TERMS, true>(p, stream);
}

}  // namespace hf_flash::sm90
