// Which task computes what. Every element of an output has one owner and one order of additions, so the same bits come
// out on every run and for any number of workers.
#pragma once

#include <cstdint>
#include <vector>

#include "attention/sequence.h"
#include "cpu/gaps.h"
#include "params.h"

namespace hf_flash::cpu {

constexpr int kTile = 64;      // queries and keys of a score tile
constexpr int kMostTiles = 4;  // tiles of queries that share one loading of the keys

struct Range {
  int begin;
  int end;
  bool empty() const { return begin >= end; }
};

struct RowBlock {
  int32_t batch;
  int32_t begin, end;  // rows of the sequence, cut at multiples of the block's size
};

// The computed rows of every sequence in blocks of `rows`, which is a multiple of kTile.
std::vector<RowBlock> row_blocks(const AttentionParams& p, Side side, int32_t rows);

// ---- Forward: blocks of queries ---------------------------------------------------------------------------------

struct ForwardTask {
  int32_t batch, head;
  Range rows;
};

struct ForwardPlan {
  std::vector<ForwardTask> tasks;
  int most_tiles;
};

ForwardPlan plan_forward(const AttentionParams& p, int64_t workers);

// ---- Backward ---------------------------------------------------------------------------------------------------

// What a task computes, and over which part of the problem. Rows and columns count from each sequence's start.
struct BackwardTask {
  Range batches, heads_k;
  Range rows, columns;
  bool dq, dkv, dbias;
};

struct BackwardPass {
  std::vector<BackwardTask> tasks;
  int32_t span;     // keys that are loaded at once
  int64_t dq_rows;  // query rows whose dq a task sums at once
};

// Where there are enough (batch, key head) pairs, one task does all of a pair, with 5 products a tile. Otherwise two
// passes share the work more finely, with 7: blocks of keys for dK and dV, then blocks of queries for dQ. The elements
// of a dbias that is summed over batch or heads belong to one task, which takes all of those; the pass over keys owns
// them where they are summed over the rows too.
using BackwardPlan = std::vector<BackwardPass>;
BackwardPlan plan_backward(const AttentionParams& p, int64_t workers);

}  // namespace hf_flash::cpu
