// The backward pass, block by block (Dao et al., FlashAttention-2, 2023): each tile's probabilities are computed again
// from lse, then  dV += P' dO,  dS = P * (dO V' - row_sum),  dK += dS' Q,  dQ += dS K.
//
// Every accumulator has one owner and one order of additions: schedule.h says whose.
#pragma once

#include "cpu/row_sum.h"
#include "cpu/score.h"

namespace hf_flash::cpu::HF_FLASH_CPU_ISA {
namespace {

template <class T>
struct BackwardScratch {
  BackwardScratch(const AttentionParams& p, int span, int64_t dq_rows)
      : width(round_up(p.head_dim, kLanes<T>)),
        width_v(round_up(p.head_dim_v, kLanes<T>)),
        span(span),
        dq_rows(dq_rows),
        keys(int64_t{span} * width),
        values(int64_t{span} * width_v),
        dkeys(int64_t{span} * width),
        dvalues(int64_t{span} * width_v),
        queries(int64_t{kTile} * width),
        douts(int64_t{kTile} * width_v),
        queries_t(int64_t{p.head_dim} * kTile),
        douts_t(int64_t{p.head_dim_v} * kTile),
        dqueries(int64_t{kTile} * width),
        dq_sum(dq_rows * (p.heads_q / p.heads_k) * width),
        scores(kTile * kTile),
        dscores(kTile * kTile),
        added(kTile * kTile),
        softcap_slope(p.softcap != 0 ? kTile * kTile : 0),
        dropout(p.dropout_keep < 256 ? kTile * kTile : 0) {}

  const int width, width_v;
  const int span;                     // keys that are loaded at once
  const int64_t dq_rows;              // query rows of dq_sum
  Scratch<T> keys, values;            // [key][width]
  Scratch<T> dkeys, dvalues;          // [key][width]
  Scratch<T> queries, douts;          // [query][width]
  Scratch<T> queries_t, douts_t;      // [dim][query]; queries_t is scaled
  Scratch<T> dqueries;                // [query][width]
  Scratch<T> dq_sum;                  // [head of the group][row][width], see DqSums
  Scratch<T> scores, dscores, added;  // [key][query]
  Scratch<T> softcap_slope, dropout;  // [key][query]
  T lse[kTile] __attribute__((aligned(64)));
  T row_sum[kTile] __attribute__((aligned(64)));
};

// dbias += dS; a broadcast dimension has stride 0, and its sum over the tile is taken first.
template <class T>
void add_dbias(const Scores& dbias, const T* dscores, const TilePlace& t) {
  T* to = static_cast<T*>(dbias.data) + t.batch * dbias.batch + t.head * dbias.head + t.row0 * dbias.row +
          t.col0 * dbias.col;
  if (dbias.row == 0) {
    T total = 0;
    for (int j = t.keys.begin; j < t.keys.end; ++j) {
      T sum = 0;
      for (int i = t.queries.begin; i < t.queries.end; ++i) sum += dscores[j * kTile + i];
      if (dbias.col == 0)
        total += sum;
      else
        to[j * dbias.col] += sum;
    }
    if (dbias.col == 0) *to += total;
    return;
  }
  if (dbias.col == 1) {
    // Read by keys and visited by queries: a vector holds one query's neighbouring keys.
    for_each_column<T>(
        t.keys, t.queries, [=](int j, int i) { return dscores[j * kTile + i]; },
        [=](int i, int j, Vector<T> x) {
          T* row = to + i * dbias.row;
          if (j >= t.keys.begin && j + kLanes<T> <= t.keys.end)
            store<T>(row + j, load(row + j) + x);
          else
            for (int c = j < t.keys.begin ? t.keys.begin : j; c < j + kLanes<T> && c < t.keys.end; ++c)
              row[c] += x[c - j];
        });
    return;
  }
  for (int i = t.queries.begin; i < t.queries.end; ++i) {
    T* row = to + i * dbias.row;
    T sum = 0;
    for (int j = t.keys.begin; j < t.keys.end; ++j) {
      if (dbias.col == 0)
        sum += dscores[j * kTile + i];
      else
        row[j * dbias.col] += dscores[j * kTile + i];
    }
    if (dbias.col == 0) *row += sum;
  }
}

// scores: products become (dropped) probabilities P; dscores: dO V' becomes dS, before softcap's derivative.
template <class T>
void softmax_gradient(BackwardScratch<T>& s, bool dropout, Range keys, Range queries) {
  for (int j = keys.begin; j < keys.end; ++j) {
    for (int i = 0; i < round_up(queries.end, kLanes<T>); i += kLanes<T>) {
      const int at = j * kTile + i;
      const Vector<T> probability = exp<T>(load(s.scores + at) - load(s.lse + i));
      Vector<T> dprobability = load(s.dscores + at);
      Vector<T> dropped = probability;
      if (dropout) {
        const Vector<T> factor = load(s.dropout + at);
        dropped *= factor;
        dprobability *= factor;
      }
      const Vector<T> gradient = probability * (dprobability - load(s.row_sum + i));
      store<T>(s.scores + at, dropped);
      // Where nothing is seen the gradient is 0 whatever dO V' is.
      store<T>(s.dscores + at, probability == T(0) ? Vector<T>{} : gradient);
    }
  }
}

// The chain rule from the added score back to q.k.
template <class T>
void scale_gradient(BackwardScratch<T>& s, T scale, bool softcap, Range keys) {
  for (int x = keys.begin * kTile; x < keys.end * kTile; x += kLanes<T>) {
    Vector<T> gradient = load(s.dscores + x) * scale;
    if (softcap) gradient *= load(s.softcap_slope + x);
    store<T>(s.dscores + x, gradient);
  }
}

template <class T>
void zero_keys(T* tile, Range keys) {
  if (!keys.empty()) std::memset(tile + keys.begin * kTile, 0, sizeof(T) * kTile * (keys.end - keys.begin));
}

// One tile of queries meets one tile of keys; `first` is the tile's first row in the span's arrays.
template <class Element, class T>
void backward_tile(const AttentionParams& p, const Sequence& sequence, const BackwardTask& task, const TilePlace& place,
                   int first, BackwardScratch<T>& s) {
  const Range keys = place.keys, queries = place.queries;
  const Range padded = {round_down(keys.begin, kRegisterRows), round_up(keys.end, kRegisterRows)};
  const Added added = fill_added<Element>(s.added, p, sequence, place);
  if (added == Added::kHidesAll) return;
  const T* k = s.keys + int64_t{first} * s.width;
  const T* v = s.values + int64_t{first} * s.width_v;
  multiply_keys_by_queries<T>(k, s.width, s.queries_t, s.scores, padded, queries.end, p.head_dim);
  multiply_keys_by_queries<T>(v, s.width_v, s.douts_t, s.dscores, padded, queries.end, p.head_dim_v);
  if (p.softcap != 0) apply_softcap<T>(s.scores, static_cast<T>(p.softcap), keys, s.softcap_slope);
  if (added == Added::kSome) apply_added<T>(s.scores, s.added, keys);
  if (p.dropout_keep < 256) fill_dropout<T>(s.dropout, p, place);
  softmax_gradient(s, p.dropout_keep < 256, keys, queries);
  if (task.dbias) add_dbias<T>(p.dbias, s.dscores, place);
  scale_gradient(s, static_cast<T>(p.scale), p.softcap != 0, keys);
  if (task.dkv) {
    for (T* tile : {static_cast<T*>(s.scores), static_cast<T*>(s.dscores)}) {
      zero_keys(tile, {padded.begin, keys.begin});
      zero_keys(tile, {keys.end, padded.end});
    }
    accumulate_over_queries<T>(s.scores, s.douts, s.width_v, s.dvalues + int64_t{first} * s.width_v, padded, queries);
    accumulate_over_queries<T>(s.dscores, s.queries, s.width, s.dkeys + int64_t{first} * s.width, padded, queries);
  }
  if (task.dq) accumulate_over_keys<T>(s.dscores, k, s.width, s.dqueries, queries, keys);
}

template <class Element, class T>
void load_queries(const AttentionParams& p, const Sequence& sequence, const TilePlace& t, BackwardScratch<T>& s) {
  const int64_t row0 = sequence.first_q + t.row0;
  const Element* q = row_pointer<Element>(p.q, t.batch, row0, t.head);
  const Element* dout = row_pointer<Element>(p.dout, t.batch, row0, t.head);
  load_rows<Element, T>(s.queries, s.width, q, p.q.row, t.queries, p.head_dim);
  load_rows<Element, T>(s.douts, s.width_v, dout, p.dout.row, t.queries, p.head_dim_v);
  load_transposed<Element, T>(s.queries_t, q, p.q.row, t.queries, p.head_dim, static_cast<T>(p.scale));
  load_transposed<Element, T>(s.douts_t, dout, p.dout.row, t.queries, p.head_dim_v, T(1));
  const T* lse = static_cast<const T*>(p.lse.data) + t.batch * p.lse.batch + t.head * p.lse.head + row0;
  const T* row_sum = static_cast<const T*>(p.row_sum.data) + t.batch * p.row_sum.batch + t.head * p.row_sum.head + row0;
  for (int i = t.queries.begin; i < t.queries.end; ++i) {
    // exp(score - inf) = 0 for a row that saw nothing.
    s.lse[i] = lse[i] == T(-kInfinity) ? T(kInfinity) : lse[i];
    s.row_sum[i] = row_sum[i];
  }
}

// dq's partial sums between two spans of keys: in dq itself where it has the compute type, else in scratch.
template <class T>
struct DqSums {
  T* data;
  int64_t stride;
};

template <class Element, class T>
DqSums<T> dq_sums(const AttentionParams& p, const Sequence& sequence, const TilePlace& t, int row_in_task,
                  BackwardScratch<T>& s) {
  if constexpr (std::is_same_v<Element, T>) {
    return {row_pointer<T>(p.dq, t.batch, sequence.first_q + t.row0, t.head), p.dq.row};
  } else {
    const int64_t head_in_group = t.head % (p.heads_q / p.heads_k);
    return {s.dq_sum + (head_in_group * s.dq_rows + row_in_task) * s.width, s.width};
  }
}

// Where one span of keys stands in a task: dq starts at zero in the first and leaves in the last.
struct Span {
  Range keys;  // columns of the sequence
  int32_t col0;
  bool first, last;
};

// All query tiles of one head that see some key of a loaded span.
template <class Element, class T>
void backward_span(const AttentionParams& p, const Sequence& sequence, const BackwardTask& task, const Span& span,
                   int32_t batch, int32_t head, BackwardScratch<T>& s) {
  const Range rows = intersect(task.rows, {sequence.query_begin, sequence.query_end});
  const int32_t first_row = round_down(rows.begin, kTile);
  for (int32_t row0 = first_row; row0 < rows.end; row0 += kTile) {
    const Range queries = intersect({0, kTile}, {rows.begin - row0, rows.end - row0});
    const KeyRange seen = sequence.keys_of(p, row0 + queries.begin, row0 + queries.end);
    Range columns = intersect(span.keys, {seen.begin, seen.end});
    if (columns.empty()) columns = {0, 0};  // a window before the first key ends before it begins
    if (columns.empty() && !(task.dq && (span.first || span.last))) continue;
    TilePlace place{batch, head, row0, 0, queries, {0, 0}};
    DqSums<T> sums{};
    if (task.dq) {
      sums = dq_sums<Element, T>(p, sequence, place, row0 - first_row, s);
      if (span.first)
        std::memset(s.dqueries, 0, sizeof(T) * kTile * s.width);
      else
        load_rows<T, T>(s.dqueries, s.width, sums.data, sums.stride, queries, p.head_dim);
    }
    if (!columns.empty()) load_queries<Element>(p, sequence, place, s);
    for (int32_t col0 = round_down(columns.begin, kTile); col0 < columns.end; col0 += kTile) {
      place.col0 = col0;
      place.keys = intersect({0, kTile}, {columns.begin - col0, columns.end - col0});
      backward_tile<Element>(p, sequence, task, place, col0 - span.col0, s);
    }
    const T* dqueries = s.dqueries;
    if (task.dq && span.last)
      store_rows(row_pointer<Element>(p.dq, batch, sequence.first_q + row0, head), p.dq.row, dqueries, s.width, queries,
                 p.head_dim);
    else if (task.dq)
      store_rows(sums.data, sums.stride, dqueries, s.width, queries, p.head_dim);
  }
}

// One sequence and one key head of a task, with the query heads that share it: span after span of keys.
template <class Element, class T>
void run_backward_pair(const AttentionParams& p, const BackwardTask& task, int32_t batch, int32_t head_k,
                       BackwardScratch<T>& s) {
  const Sequence sequence(p, batch);
  const int32_t group = p.heads_q / p.heads_k;
  Range columns = intersect(task.columns, {sequence.key_begin, sequence.key_end});
  if (columns.empty()) columns = {0, 0};
  if (columns.empty() && !task.dq) return;
  Span span{{0, 0}, round_down(columns.begin, kTile), true, false};
  // A sequence without keys still has zeros to write to dq.
  for (; span.first || span.col0 < columns.end; span.first = false, span.col0 += s.span) {
    span.keys = intersect(columns, {span.col0, span.col0 + s.span});
    span.last = span.col0 + s.span >= columns.end;
    const Range loaded = {span.keys.begin - span.col0, span.keys.end - span.col0};
    const int64_t row0 = sequence.first_k + span.col0;
    load_rows<Element, T>(s.keys, s.width, row_pointer<Element>(p.k, batch, row0, head_k), p.k.row, loaded, p.head_dim);
    load_rows<Element, T>(s.values, s.width_v, row_pointer<Element>(p.v, batch, row0, head_k), p.v.row, loaded,
                          p.head_dim_v);
    if (task.dkv) {
      std::memset(s.dkeys, 0, sizeof(T) * s.span * s.width);
      std::memset(s.dvalues, 0, sizeof(T) * s.span * s.width_v);
    }
    for (int32_t head = head_k * group; head < (head_k + 1) * group; ++head)
      backward_span<Element>(p, sequence, task, span, batch, head, s);
    if (task.dkv) {
      const T *dkeys = s.dkeys, *dvalues = s.dvalues;
      store_rows(row_pointer<Element>(p.dk, batch, row0, head_k), p.dk.row, dkeys, s.width, loaded, p.head_dim);
      store_rows(row_pointer<Element>(p.dv, batch, row0, head_k), p.dv.row, dvalues, s.width_v, loaded, p.head_dim_v);
    }
  }
}

template <class Element>
void run_backward_tasks(const AttentionParams& p, const BackwardPass& pass, ParallelFor parallel_for) {
  using T = ComputeType<Element>;
  run_workers(parallel_for, static_cast<int64_t>(pass.tasks.size()), [&](TaskQueue& queue) {
    const bool dq_itself = std::is_same_v<Element, T>;
    BackwardScratch<T> scratch(p, pass.span, dq_itself ? 0 : pass.dq_rows);
    for (int64_t next; queue.take(&next);) {
      const BackwardTask& task = pass.tasks[next];
      for (int32_t b = task.batches.begin; b < task.batches.end; ++b)
        for (int32_t head = task.heads_k.begin; head < task.heads_k.end; ++head)
          run_backward_pair<Element>(p, task, b, head, scratch);
    }
  });
}

template <class Element>
void clear_gradients(const AttentionParams& p) {
  const auto clear = [](const Rows& rows, int32_t heads, int dim) {
    return [=](int32_t batch, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int32_t head = 0; head < heads; ++head)
          std::memset(row_pointer<Element>(rows, batch, i, head), 0, sizeof(Element) * dim);
    };
  };
  for_each_gap(p, Side::kQueries, clear(p.dq, p.heads_q, p.head_dim));
  for_each_gap(p, Side::kKeys, clear(p.dk, p.heads_k, p.head_dim));
  for_each_gap(p, Side::kKeys, clear(p.dv, p.heads_k, p.head_dim_v));
}

template <class Element>
void backward(const AttentionParams& p, const BackwardPlan& plan, ParallelFor parallel_for) {
  clear_gradients<Element>(p);
  if (p.dsink != nullptr) sink_gradient<Element>(p, parallel_for);
  for (const BackwardPass& pass : plan) run_backward_tasks<Element>(p, pass, parallel_for);
}

}  // namespace
}  // namespace hf_flash::cpu::HF_FLASH_CPU_ISA
