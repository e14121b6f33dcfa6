#include "cpu/schedule.h"

#include <algorithm>

namespace hf_flash::cpu {

std::vector<RowBlock> row_blocks(const AttentionParams& p, Side side, int32_t rows) {
  std::vector<RowBlock> blocks;
  for (int32_t b = 0; b < p.batch; ++b) {
    const Sequence s(p, b);
    const int32_t begin = side == Side::kQueries ? s.query_begin : s.key_begin;
    const int32_t end = side == Side::kQueries ? s.query_end : s.key_end;
    for (int32_t i = begin; i < end; i = i - i % rows + rows)
      blocks.push_back({b, i, std::min(i - i % rows + rows, end)});
  }
  return blocks;
}

namespace {

// Rows a task takes: few enough that every worker gets some tasks, at most `most` tiles.
int32_t rows_per_task(const AttentionParams& p, Side side, int64_t heads, int64_t workers, int64_t most) {
  const int64_t tiles = heads * static_cast<int64_t>(row_blocks(p, side, kTile).size());
  return kTile * static_cast<int32_t>(std::clamp<int64_t>(tiles / (4 * workers), 1, most));
}

// Bytes that the workspace of a 16-bit call may take: an eighth of q.
int64_t dq_sum_budget(const AttentionParams& p) { return p.total_q * p.heads_q * p.head_dim * 2 / 8; }

// Keys that are loaded at once: k, v, dk and dv of a span fill about half of a core's second-level cache.
int32_t most_span(const AttentionParams& p) {
  const int32_t width = std::max(p.head_dim, p.head_dim_v);
  return std::max(kTile, 65536 / width / kTile * kTile);
}

int32_t longest(const AttentionParams& p, Side side) {
  int32_t length = 1;
  for (int32_t b = 0; b < p.batch; ++b) {
    const Sequence s(p, b);
    length = std::max(length, side == Side::kQueries ? s.query_end : s.key_end);
  }
  return (length + kTile - 1) / kTile * kTile;
}

}  // namespace

ForwardPlan plan_forward(const AttentionParams& p, int64_t workers) {
  const int32_t rows = rows_per_task(p, Side::kQueries, p.heads_q, workers, kMostTiles);
  const std::vector<RowBlock> blocks = row_blocks(p, Side::kQueries, rows);
  ForwardPlan plan{{}, rows / kTile};
  plan.tasks.reserve(blocks.size() * p.heads_q);
  for (size_t first = 0, end; first < blocks.size(); first = end) {
    for (end = first; end < blocks.size() && blocks[end].batch == blocks[first].batch;) ++end;
    for (int32_t head = 0; head < p.heads_q; ++head)
      for (size_t i = end; i-- > first;)  // causal: the longest first
        plan.tasks.push_back({blocks[i].batch, head, {blocks[i].begin, blocks[i].end}});
  }
  return plan;
}

BackwardPlan plan_backward(const AttentionParams& p, int64_t workers) {
  const bool dbias = p.dbias.data != nullptr;
  const Range all = {0, INT32_MAX};
  const auto ranges = [](int32_t count, bool shared) {
    std::vector<Range> result;
    for (int32_t i = 0; i < (shared ? 1 : count); ++i) result.push_back(shared ? Range{0, count} : Range{i, i + 1});
    return result;
  };
  const auto owners = [&](bool with_dbias) {
    std::vector<BackwardTask> result;
    for (const Range batches : ranges(p.batch, with_dbias && p.dbias.batch == 0))
      for (const Range heads : ranges(p.heads_k, with_dbias && p.dbias.head == 0))
        result.push_back({batches, heads, all, all, false, false, with_dbias});
    return result;
  };
  // Cuts each owner's rows or columns into blocks.
  const auto cut = [&](const std::vector<BackwardTask>& tasks, Side side, int32_t rows) {
    std::vector<BackwardTask> result;
    const std::vector<RowBlock> blocks = row_blocks(p, side, rows);
    const int32_t end = longest(p, side);
    for (BackwardTask task : tasks) {
      Range& range = side == Side::kQueries ? task.rows : task.columns;
      if (task.batches.end - task.batches.begin > 1) {
        for (int32_t i = 0; i < end; i += rows) range = {i, i + rows}, result.push_back(task);
      } else {
        for (const RowBlock& block : blocks)
          if (block.batch == task.batches.begin) range = {block.begin, block.end}, result.push_back(task);
      }
    }
    return result;
  };

  const int32_t span = std::min(most_span(p), longest(p, Side::kKeys));
  const int64_t rows = longest(p, Side::kQueries);
  const bool sums_apart = (p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16) && longest(p, Side::kKeys) > span;
  std::vector<BackwardTask> whole = owners(dbias);
  const int64_t pairs = static_cast<int64_t>(whole.size());
  const int64_t rounds = (pairs + workers - 1) / workers;
  const int64_t sums = sums_apart ? std::min(pairs, workers) * rows * p.head_dim * 4 * (p.heads_q / p.heads_k) : 0;
  if (7 * pairs >= 5 * rounds * workers && sums <= dq_sum_budget(p)) {
    for (BackwardTask& task : whole) task.dq = task.dkv = true;
    return {{whole, span, sums_apart ? rows : 0}};
  }
  const bool with_keys = dbias && p.dbias.row == 0 && p.dbias.col != 0;
  const bool with_queries = dbias && !with_keys;
  const int32_t key_rows = rows_per_task(p, Side::kKeys, p.heads_k, workers, span / kTile);
  BackwardPass keys{cut(owners(with_keys), Side::kKeys, key_rows), key_rows, 0};
  for (BackwardTask& task : keys.tasks) task.dkv = true;
  const int32_t query_rows = rows_per_task(p, Side::kQueries, p.heads_q, workers, kMostTiles);
  BackwardPass queries{owners(with_queries), span, sums_apart ? rows : 0};
  if (!with_queries || p.dbias.row != 0) {
    queries.tasks = cut(queries.tasks, Side::kQueries, query_rows);
    queries.dq_rows = sums_apart ? query_rows : 0;
  }
  for (BackwardTask& task : queries.tasks) task.dq = true;
  return {keys, queries};
}

}  // namespace hf_flash::cpu
