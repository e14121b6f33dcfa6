// How the backward divides its work: a CTA's tiles and shared memory, and the query tiles that it walks.
#pragma once

#include "attention/tile_range.cuh"
#include "portable/dq_accumulator.h"
#include "sm80/backward_config.h"
#include "tile/shared_tile.cuh"

namespace hf_flash::sm80 {

template <class ELEMENT, int HEAD_DIM, bool DROPOUT, Terms TERMS, bool HOPPER>
struct BackwardTraits {
  using T = ELEMENT;
  static constexpr BackwardConfig kConfig = backward_config(HEAD_DIM, TERMS, HOPPER);
  static constexpr int kHeadDim = HEAD_DIM;  // bucket: D and Dv are at most this
  static constexpr bool kDropout = DROPOUT;
  static constexpr bool kExtras = TERMS != Terms::kNone, kEveryTerm = TERMS == Terms::kEvery;
  static constexpr bool kHopper = HOPPER;
  static constexpr int kThreads = 32 * kConfig.warps;
  static constexpr int kKeys = kConfig.keys;
  static constexpr int kQueries = kConfig.queries;
  static constexpr int kSplit = kConfig.split;
  static constexpr int kBlock = kConfig.block;
  static constexpr int kWarpKeys = kKeys * kSplit / kConfig.warps;
  static constexpr int kWarpQueries = kQueries / kSplit;  // whose scores a warp computes
  static constexpr int kWarpColumns = HEAD_DIM / kSplit;  // of dK and dV
  static constexpr int kDqRows = kQueries / kConfig.dq_warp_rows;
  static constexpr int kDqColumns = HEAD_DIM * kConfig.dq_warp_rows / kConfig.warps;
  static constexpr bool kLate = kConfig.late;
  static_assert(!kLate || kConfig.stages == 2);
  static_assert(kWarpKeys % 16 == 0 && kWarpQueries % kBlock == 0 && kDqRows % 16 == 0 && kDqColumns % 16 == 0);
  static_assert(kQueries <= DqAccumulator::kTileRows && kQueries >= 32 && 2 * kQueries <= kThreads);

  using KeyTile = SharedTile<kKeys, HEAD_DIM>;
  using QueryTile = SharedTile<kQueries, HEAD_DIM>;
  using ScoreTile = SharedTile<kKeys, kQueries>;
  // Shared memory: K, V, then for each stage Q and dO, then dS (and P where it is shared), twice where dQ comes late,
  // or once and a step's bias beside it, then for each stage lse and row_sum, then what each warp's keys are seen by,
  // then BackwardSteps and Sequence.
  static constexpr uint32_t kV = KeyTile::kBytes;
  static constexpr uint32_t kStages = 2 * KeyTile::kBytes;
  static constexpr uint32_t kStageBytes = 2 * QueryTile::kBytes;
  static constexpr uint32_t kScores = kStages + kConfig.stages * kStageBytes;
  static constexpr uint32_t kScoreBytes = kSplit * ScoreTile::kBytes;
  // Where dQ comes late a step's bias lies in the place of its dS, which nobody reads any more.
  static constexpr uint32_t kBias = kScores + kScoreBytes;
  static constexpr uint32_t kRowValues = kLate ? kBias + kScoreBytes : kBias + (kExtras ? ScoreTile::kBytes : 0);
  static constexpr uint32_t kVisible = kRowValues + kConfig.stages * 2 * kQueries * sizeof(float);
  static constexpr uint32_t kSeenKeys = kVisible + kConfig.warps * sizeof(int4);
  static constexpr uint32_t kSteps = kSeenKeys + (kConfig.warps + 3) / 4 * 4 * sizeof(uint32_t);
  static constexpr uint32_t kSequence = kSteps + sizeof(int4);
  static constexpr uint32_t kSharedBytes = kSequence + sizeof(Sequence);
};

// The queries that see some key of [key_begin, key_end).
__device__ inline KeyRange queries_seeing(const AttentionParams& p, const Sequence& sequence, int key_begin,
                                          int key_end) {
  key_begin = max(key_begin, sequence.key_begin);
  key_end = min(key_end, sequence.key_end);
  return key_begin < key_end ? sequence.queries_of(p, key_begin, key_end) : KeyRange{0, 0};
}

// The queries that see every key of [key_begin, key_end), if range and mask show them all: for those nothing has to be
// hidden.
__device__ inline KeyRange queries_seeing_all(const AttentionParams& p, const Sequence& sequence, int key_begin,
                                              int key_end) {
  return {sequence.queries_of(p, key_end - 1, key_end).begin, sequence.queries_of(p, key_begin, key_begin + 1).end};
}

// One query tile of one query head.
struct BackwardStep {
  int head;
  int i0;
};

// The steps of a CTA: query tiles that see one of its keys, for each head of the group. They lie in shared memory: the
// loop's registers are full.
struct BackwardSteps {
  int end_head;
  int begin, end;  // queries, multiples of the tile
  int unused;

  __device__ BackwardSteps(const AttentionParams& p, const Sequence& sequence, int kv_head, int j0, int keys,
                           int queries) {
    const KeyRange seen = queries_seeing(p, sequence, j0, j0 + keys);
    begin = seen.begin / queries * queries;
    end = seen.empty() ? begin : (seen.end + queries - 1) / queries * queries;
    end_head = (kv_head + 1) * (p.heads_q / p.heads_k);
    unused = 0;
  }
};

}  // namespace hf_flash::sm80
