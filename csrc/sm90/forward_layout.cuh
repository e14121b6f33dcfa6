// How the forward divides its work: tiles, shared memory, and what the producer tells the consumers about a piece of
// it.
#pragma once

#include <algorithm>
#include <climits>

#include "attention/dropout_fragment.cuh"
#include "attention/schedule.cuh"
#include "attention/tile_range.cuh"
#include "sm90/config.h"
#include "sm90/pipeline.cuh"
#include "sm90/score_math.cuh"
#include "sm90/tma_tile.cuh"

namespace hf_flash::sm90 {

template <class ELEMENT, int HEAD_DIM, bool DROPOUT, Terms TERMS, bool SMALL, bool MASKED = true>
struct ForwardTraits {
  using T = ELEMENT;
  static constexpr bool kMasked = MASKED;  // calls may have a mask of keys
  static constexpr bool kExtras = TERMS != Terms::kNone, kEveryTerm = TERMS == Terms::kEvery;
  static constexpr ForwardConfig kConfig = forward_config(HEAD_DIM, DROPOUT, kExtras, SMALL);
  static constexpr int kHeadDim = HEAD_DIM;  // bucket: D and Dv are at most this
  static constexpr bool kDropout = DROPOUT;
  // A piece of work's range in uniform registers, instead of looked up in shared memory for each tile, where a warp's
  // loads stand behind its products. With dropout D 64, S 256 to 1024 +4 to +5 %, 2048 and 8192 +1, causal 512 to 2048
  // +1, +3, +4, D 128 -1 to +2 %; others were not measured. Without dropout 0 to +1.5 %, but tiles of 128 rows -2 to -6
  // under a causal mask, and D 128 S 512 -6 % with a mask of keys.
  static constexpr bool kKeepsRange = DROPOUT && !kExtras && (HEAD_DIM == 64 || HEAD_DIM == 128);
  // A tile's probabilities are of the maximum so far; the tile's own is asked for only where they become too large.
  static constexpr bool kTrustsMax = trusts_max(HEAD_DIM, kExtras, SMALL);
  // They are looked at while the next Q K^T runs, which D 64 has no registers for.
  static constexpr bool kChecksLate = kTrustsMax && HEAD_DIM > 64;
  static_assert(!kTrustsMax || (kConfig.q_stages >= 2 && kConfig.keys % 32 == 0));
  // So many scores, in units of 8 keys, are exponentiated before the end of P V is waited for.
  static constexpr int kFirst = kConfig.first_keys / 8;
  static_assert(kFirst == 0 || (kConfig.order == Order::kOutput && !DROPOUT && !kExtras));
  // K of a tile stays until the scores of the next one are there.
  static constexpr int kKStages = kConfig.stages + (kTrustsMax && kConfig.stages == 2 ? 1 : 0);
  // With three of them the ring has a fourth place that is skipped: no division by 3 a tile.
  static constexpr int kKPlaces = kKStages == 3 ? 4 : kKStages;
  // tiles: so far, which is the place itself where none is skipped.
  __device__ static uint32_t next_k(uint32_t place, uint32_t tiles) {
    return kKStages == 3 ? place + 1 + (place % 4 == 2) : tiles + 1;
  }
  static constexpr int kWarpgroups = kConfig.warpgroups;
  static constexpr int kRows = 64 * kWarpgroups;
  static constexpr int kKeys = kConfig.keys;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kProducerRegisters = producer_registers(kWarpgroups);
  static constexpr int kConsumerRegisters = consumer_registers(kWarpgroups);
  static_assert(!DROPOUT || kKeys % 32 == 0 || HEAD_DIM > 128);
  using QTile = SwizzledTile<kRows, HEAD_DIM>;
  using KVTile = SwizzledTile<kKeys, HEAD_DIM>;
  using QRing = Ring<kConfig.q_stages>;
  using KRing = Ring<kKPlaces>;
  using VRing = Ring<kConfig.stages>;
  // What is added to each score (score_terms.cuh).
  using ScoreTile = SwizzledTile<kRows, kKeys>;
  using ScoreRing = Ring<kConfig.bias_stages>;
  static constexpr int kScoreBytes = kExtras ? kConfig.bias_stages * ScoreTile::kBytes : 0;
  static_assert(!kExtras || kConfig.bias_stages >= 2);
  // A plan is in use until its rows are stored, which can be after Q of the piece of work behind it is released.
  static constexpr int kPlans = 4;

  // Shared memory: Q, K, V, bias, plans, barriers.
  static constexpr int kK = kConfig.q_stages * QTile::kBytes;
  static constexpr int kV = kK + kKStages * KVTile::kBytes;
  static constexpr int kScores = kV + kConfig.stages * KVTile::kBytes;
  static constexpr int kPlan = kScores + kScoreBytes;
};

// A piece of work: one tile of query rows of one head.
template <class Traits>
struct ForwardPlan {
  int row0, head, batch;  // row0 = -1: there is no more
  int zero_from;          // V's rows from here on hold something else, if they lie inside the tensor
  float slope;            // ALiBi
  Sequence sequence;
  TileRange tiles;  // of the CTA
  TileRange own[Traits::kWarpgroups];

  // By a warp: does a mask hide some key of those that the rows of a piece of work see otherwise?
  __device__ static bool finds_holes(const AttentionParams& p, const Sequence& s,
                                     const PersistentSchedule::Work& work) {
    if (!Traits::kMasked || p.key_mask == nullptr || work.tile < 0) return false;
    const KeyRange seen = s.keys_of(p, work.tile * Traits::kRows, (work.tile + 1) * Traits::kRows);
    return any_lane(hides_some(s.key_mask(p), s.len_k, seen.begin, seen.end, threadIdx.x % 32, kWarpThreads));
  }
  // By a warp: each lane works out a part.
  __device__ void make(const AttentionParams& p, const Sequence& s, const PersistentSchedule::Work& work, bool holes) {
    const int lane = threadIdx.x % 32;
    const int begin = work.tile * Traits::kRows;
    const bool all = lane == Traits::kWarpgroups;
    if (lane <= Traits::kWarpgroups) {
      const int from = begin + (all ? 0 : 64 * lane);
      TileRange range(p, s, from, from + (all ? Traits::kRows : 64), Traits::kKeys);
      if (work.tile < 0) range = TileRange();
      if (holes) range.hide_in_all();
      // Rows that are not computed may become anything: nothing is hidden from them.
      if (from >= s.query_end || from + 64 <= s.query_begin) range.common_begin = INT_MIN, range.common_end = INT_MAX;
      (all ? tiles : own[lane]) = range;
    }
    if (lane == 0) {
      row0 = work.tile < 0 ? -1 : begin;
      head = work.head;
      batch = work.batch;
      sequence = s;
      if (Traits::kExtras && p.alibi_slopes != nullptr && row0 >= 0)
        slope = p.alibi_slopes[batch * p.alibi_batch_stride + head];
      zero_from = s.key_end < p.seqlen_k || p.cu_seqlens_k != nullptr ? s.key_end : INT_MAX;
    }
  }
};

template <class Traits>
struct ForwardShared {
  using Plans = Ring<Traits::kPlans>;
  static constexpr int kBarriers = (Traits::kPlan + Traits::kPlans * sizeof(ForwardPlan<Traits>) + 7) / 8 * 8;
  static constexpr int kBytes = kBarriers + Traits::QRing::kBytes + Plans::kBytes + Traits::KRing::kBytes +
                                Traits::VRing::kBytes + Traits::ScoreRing::kBytes + 8;
  static_assert(kBytes <= 227 * 1024);

  char* memory;
  uint32_t base;
  typename Traits::QRing q;
  Plans planned;  // only the full barriers are used
  typename Traits::KRing k;
  typename Traits::VRing v;
  typename Traits::ScoreRing scores;
  uint32_t landed;  // barrier of V tiles that the producer must clean before anybody reads them

  __device__ explicit ForwardShared(char* memory)
      : memory(memory),
        base(shared_address(memory)),
        q(base + kBarriers),
        planned(q.barriers + Traits::QRing::kBytes),
        k(planned.barriers + Plans::kBytes),
        v(k.barriers + Traits::KRing::kBytes),
        scores(v.barriers + Traits::VRing::kBytes),
        landed(scores.barriers + Traits::ScoreRing::kBytes) {}

  __device__ void init() const {
    q.init(warps(4 * Traits::kWarpgroups));
    planned.init(1, kWarpThreads);  // each lane has written a part of the plan
    k.init(warps(4 * Traits::kWarpgroups));
    v.init(warps(4 * Traits::kWarpgroups));
    scores.init(warps(4 * Traits::kWarpgroups));
    mbarrier_init(landed, 1);
  }
  // A plan waits for the place of its Q, which is given back when no later plan can be at its own place. Where Q stays
  // until the next piece of work has begun, its plan comes sooner, or it would not be known in time: when the Q three
  // before is given back.
  __device__ __forceinline__ void wait_for_plan_place(uint32_t work) const {
    if (!Traits::kTrustsMax) q.wait_empty(work);
    if (Traits::kTrustsMax && work > 0) q.wait_empty(work - 1);
  }
  // Of the work that is the work-th of this CTA.
  __device__ ForwardPlan<Traits>& plan(uint32_t work) const {
    return reinterpret_cast<ForwardPlan<Traits>*>(memory + Traits::kPlan)[work % Traits::kPlans];
  }
  __device__ uint32_t q_tile(uint32_t place) const {
    return base + Traits::QRing::stage(place) * Traits::QTile::kBytes;
  }
  __device__ uint32_t k_tile(uint32_t place) const {
    return base + Traits::kK + Traits::KRing::stage(place) * Traits::KVTile::kBytes;
  }
  __device__ uint32_t v_tile(uint32_t place) const {
    return base + Traits::kV + Traits::VRing::stage(place) * Traits::KVTile::kBytes;
  }
  __device__ uint32_t score_tile(uint32_t place) const {
    return base + Traits::kScores + Traits::ScoreRing::stage(place) * Traits::ScoreTile::kBytes;
  }
};

// What dropout drops of one tile of a warp, two 16 x 16 blocks side by side a draw: as masks of packed pairs, or beside
// every extra term, to save registers, as the words that the masks are made from.
template <class Traits>
struct DropoutTile {
  static constexpr int kBlocks = Traits::kKeys / 16, kDraws = (kBlocks + 1) / 2;
  static constexpr bool kMasks = !Traits::kEveryTerm;
  uint32_t mask[Traits::kDropout && kMasks ? 2 * kDraws : 1][4];
  DropoutWords words[Traits::kDropout && !kMasks ? kDraws : 1];

  // The draw that serves keys 32 n .. 32 n + 31 of the tile.
  __device__ __forceinline__ void draw(const FragmentDropout<false>& dropout, int i_block, int j_block, int n) {
    const DropoutWords drawn = dropout.draw(i_block, j_block + 2 * n, i_block, j_block + 2 * n + 1);
    if constexpr (kMasks) {
      make_masks(mask[2 * n], dropout, drawn, 0);
      make_masks(mask[2 * n + 1], dropout, drawn, 1);
    } else {
      words[n] = drawn;
    }
  }
  // To the probabilities of the blocks of 16 keys from `first` on.
  template <int KEYS>
  __device__ __forceinline__ void apply(const FragmentDropout<false>& dropout, OperandA<16, KEYS>& probabilities,
                                        int first = 0) const {
#pragma unroll
    for (int n = 0; n < KEYS / 16; ++n) {
      const int block = first + n;
      uint32_t made[4];
      if constexpr (!kMasks) make_masks(made, dropout, words[block / 2], block % 2);
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        if constexpr (kMasks) {
          probabilities.x[0][n][x] &= ~mask[block][x];
        } else {
          probabilities.x[0][n][x] &= ~made[x];
        }
      }
    }
  }

 private:
  // As FragmentDropout::masks, but 0xFFFF where dropped, from four bytes compared at once: two instructions less a
  // block, a register more.
  __device__ static __forceinline__ void make_masks(uint32_t (&made)[4], const FragmentDropout<false>& dropout,
                                                    const DropoutWords& words, int block) {
    const uint2 dropped = dropout.dropped(words, block);
    made[0] = copy_signs<0xCC88>(dropped.x, dropped.y);
    made[1] = copy_signs<0xEEAA>(dropped.x, dropped.y);
    made[2] = copy_signs<0xDD99>(dropped.x, dropped.y);
    made[3] = copy_signs<0xFFBB>(dropped.x, dropped.y);
  }
};

struct ForwardMaps {
  CUtensorMap q, k, v, bias;
  ScoreConstants scores;

  ForwardMaps(const AttentionParams& p, int rows, int keys) : bias{}, scores(p) {
    const int batch = p.packed() ? 1 : p.batch;
    const int64_t rows_q = p.packed() ? p.total_q : p.seqlen_q, rows_k = p.packed() ? p.total_k : p.seqlen_k;
    q = tensor_map(p.q, p.dtype, batch, rows_q, p.heads_q, p.head_dim, rows);
    k = tensor_map(p.k, p.dtype, batch, rows_k, p.heads_k, p.head_dim, keys);
    v = tensor_map(p.v, p.dtype, batch, rows_k, p.heads_k, p.head_dim_v, keys);
    if (scores.copies_bias) bias = bias_map(p, rows);
  }
};

inline PersistentSchedule forward_schedule(const AttentionParams& p, int rows, int ctas) {
  PersistentSchedule schedule{(p.seqlen_q + rows - 1) / rows, p.heads_q, p.batch * p.heads_q};
  schedule.by_head = p.bias.data != nullptr && p.bias.batch == 0 && p.bias.row != 0;
  schedule.listed = p.packed() && !schedule.by_head;
  if (p.window_right >= 0 && p.window_left < 0 && schedule.listed) {
    schedule.by_tile = true;
  } else if (p.window_right >= 0 && p.window_left < 0 && schedule.works() > 0) {
    // As many heads as have their keys in the L2 cache beside what passes through it: with 32 MB of them instead of 8 S
    // 512 ran at 212 instead of 227 TFLOP/s, D 128 at 257 for 278. A fourth of the CTAs' number, if these take little
    // more; if not, so many that they fill rounds: with a fourth D 128, S 4096 / 8192 / 16384 -5, -9, -4 %, for what
    // comes from memory takes power from the rest.
    const int64_t group = p.heads_q / p.heads_k;
    const int64_t bytes = 2 * int64_t{std::max(1, p.seqlen_k)} * (p.head_dim + p.head_dim_v);
    const int64_t cached = (8 << 20) / bytes * group, fourth = ctas / 4;
    const bool little_more = fourth * bytes <= (17 << 20) * group;
    schedule.sort_by_length(little_more ? std::max(cached, fourth) : schedule.planes_that_fill(cached, fourth, ctas),
                            ctas);
  }
  return schedule;
}

}  // namespace hf_flash::sm90
