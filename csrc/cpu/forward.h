// The forward pass, block by block (Dao et al., FlashAttention, 2022; Milakov and Gimelshein, 2018, for the online
// softmax). A task is some tiles of 64 queries of one head: it walks over the keys that they see, 64 at a time, and
// keeps each row's running maximum, sum of exponentials and unnormalised output.
#pragma once

#include "cpu/score.h"

namespace hf_flash::cpu::HF_FLASH_CPU_ISA {
namespace {

// One tile of queries and the state of its rows.
template <class T>
struct QueryTile {
  T* queries;  // [head_dim][query], scaled
  T* out;      // [query][width_v], not yet divided by the row's sum
  T* maximum;  // [query]
  T* sum;      // [query]
  int32_t row0;
  Range rows;  // within 0..kTile, those that are computed
};

template <class T>
struct ForwardScratch {
  explicit ForwardScratch(const AttentionParams& p, int tiles)
      : width(round_up(p.head_dim, kLanes<T>)),
        width_v(round_up(p.head_dim_v, kLanes<T>)),
        queries(int64_t{tiles} * p.head_dim * kTile),
        out(int64_t{tiles} * kTile * width_v),
        row_state(int64_t{tiles} * 2 * kTile),
        keys(int64_t{kTile} * width),
        values(int64_t{kTile} * width_v),
        scores(kTile * kTile),
        added(kTile * kTile),
        dropout(p.dropout_keep < 256 ? kTile * kTile : 0) {}

  const int width, width_v;
  Scratch<T> queries, out, row_state;
  Scratch<T> keys, values;            // [key][width]
  Scratch<T> scores, added, dropout;  // [key][query]
};

// Each row's new maximum; the scores become exponentials, sums and outputs move to the new maximum.
template <class T>
void softmax_step(T* scores, QueryTile<T>& tile, int width_v, Range keys) {
  constexpr int kStep = kLanes<T>;
  T rescale[kTile] __attribute__((aligned(64)));
  bool moved = false;
  for (int i = 0; i < round_up(tile.rows.end, kStep); i += kStep) {
    const Vector<T> before = load(tile.maximum + i);
    Vector<T> largest = before, largest_odd = before;
    int j = keys.begin;
    for (; j + 2 <= keys.end; j += 2) {
      largest = max<T>(load(scores + j * kTile + i), largest);
      largest_odd = max<T>(load(scores + (j + 1) * kTile + i), largest_odd);
    }
    if (j < keys.end) largest = max<T>(load(scores + j * kTile + i), largest);
    largest = max<T>(largest, largest_odd);
    // A row that has seen nothing keeps -inf; subtracting 0 instead gives exp(-inf) = 0 and no NaN.
    const Vector<T> reference = largest == -kInfinity ? Vector<T>{} : largest;
    Vector<T> sum = {}, sum_odd = {};
    for (j = keys.begin; j + 2 <= keys.end; j += 2) {
      const Vector<T> even = exp<T>(load(scores + j * kTile + i) - reference);
      const Vector<T> odd = exp<T>(load(scores + (j + 1) * kTile + i) - reference);
      store<T>(scores + j * kTile + i, even);
      store<T>(scores + (j + 1) * kTile + i, odd);
      sum += even;
      sum_odd += odd;
    }
    if (j < keys.end) {
      const Vector<T> last = exp<T>(load(scores + j * kTile + i) - reference);
      store<T>(scores + j * kTile + i, last);
      sum += last;
    }
    const Vector<T> factor = exp<T>(before - reference);
    store<T>(tile.maximum + i, largest);
    store<T>(tile.sum + i, load(tile.sum + i) * factor + (sum + sum_odd));
    store<T>(rescale + i, factor);
  }
  for (int i = tile.rows.begin; i < tile.rows.end; ++i) moved |= rescale[i] != T(1);
  if (!moved) return;
  for (int i = tile.rows.begin; i < tile.rows.end; ++i) {
    T* row = tile.out + int64_t{i} * width_v;
    for (int d = 0; d < width_v; d += kStep) store<T>(row + d, load(row + d) * rescale[i]);
  }
}

// One tile of queries meets one tile of keys, columns col0 + keys.
template <class Element, class T>
void attend(const AttentionParams& p, const Sequence& sequence, QueryTile<T>& tile, const TilePlace& place,
            ForwardScratch<T>& s) {
  const Range keys = place.keys;
  const Range padded = {round_down(keys.begin, kRegisterRows), round_up(keys.end, kRegisterRows)};
  const Added added = fill_added<Element>(s.added, p, sequence, place);
  if (added == Added::kHidesAll) return;
  multiply_keys_by_queries<T>(s.keys, s.width, tile.queries, s.scores, padded, tile.rows.end, p.head_dim);
  if (p.softcap != 0) apply_softcap<T>(s.scores, static_cast<T>(p.softcap), keys, nullptr);
  if (added == Added::kSome) apply_added<T>(s.scores, s.added, keys);
  softmax_step<T>(s.scores, tile, s.width_v, keys);
  if (p.dropout_keep < 256) {
    fill_dropout<T>(s.dropout, p, place);
    apply_dropout<T>(s.scores, s.dropout, keys);
  }
  accumulate_over_keys<T>(s.scores, s.values, s.width_v, tile.out, tile.rows, keys);
}

// A sink is one more logit of the denominator, without a value.
template <class Element, class T>
void begin_tile(const AttentionParams& p, const Sequence& sequence, int32_t batch, int32_t head, QueryTile<T>& tile,
                int width_v) {
  const Element* q = row_pointer<Element>(p.q, batch, sequence.first_q + tile.row0, head);
  load_transposed<Element, T>(tile.queries, q, p.q.row, tile.rows, p.head_dim, static_cast<T>(p.scale));
  const T sink = p.sink != nullptr ? static_cast<const T*>(p.sink)[head] : T(-kInfinity);
  for (int i = 0; i < kTile; ++i) {
    tile.maximum[i] = sink;
    tile.sum[i] = sink == T(-kInfinity) ? T(0) : T(1);
  }
  std::memset(tile.out, 0, sizeof(T) * kTile * width_v);
}

template <class Element, class T>
void finish_tile(const AttentionParams& p, const Sequence& sequence, int32_t batch, int32_t head, QueryTile<T>& tile,
                 int width_v) {
  T* lse = static_cast<T*>(p.lse.data) + batch * p.lse.batch + head * p.lse.head + sequence.first_q + tile.row0;
  for (int i = tile.rows.begin; i < tile.rows.end; ++i) {
    const bool sees_nothing = tile.sum[i] == T(0);
    const T inverse = sees_nothing ? T(0) : T(1) / tile.sum[i];
    T* row = tile.out + int64_t{i} * width_v;
    for (int d = 0; d < width_v; ++d) row[d] *= inverse;
    lse[i] = sees_nothing ? T(-kInfinity) : tile.maximum[i] + std::log(tile.sum[i]);
  }
  Element* out = row_pointer<Element>(p.out, batch, sequence.first_q + tile.row0, head);
  store_rows(out, p.out.row, tile.out, width_v, tile.rows, p.head_dim_v);
}

template <class Element, class T>
void run_forward_task(const AttentionParams& p, const ForwardTask& task, ForwardScratch<T>& s) {
  const Sequence sequence(p, task.batch);
  const Range rows = task.rows;
  const int32_t first_tile = rows.begin / kTile;
  const int tile_count = (rows.end - 1) / kTile + 1 - first_tile;
  QueryTile<T> tiles[kMostTiles];
  for (int t = 0; t < tile_count; ++t) {
    const int32_t row0 = (first_tile + t) * kTile;
    tiles[t] = {s.queries + int64_t{t} * p.head_dim * kTile,
                s.out + int64_t{t} * kTile * s.width_v,
                s.row_state + 2 * t * kTile,
                s.row_state + (2 * t + 1) * kTile,
                row0,
                intersect({0, kTile}, {rows.begin - row0, rows.end - row0})};
    begin_tile<Element>(p, sequence, task.batch, task.head, tiles[t], s.width_v);
  }
  const KeyRange keys = sequence.keys_of(p, rows.begin, rows.end);
  const int32_t head_k = task.head / (p.heads_q / p.heads_k);
  for (int32_t col0 = round_down(keys.begin, kTile); col0 < keys.end; col0 += kTile) {
    const Range loaded = intersect({0, kTile}, {keys.begin - col0, keys.end - col0});
    const Element* k = row_pointer<Element>(p.k, task.batch, sequence.first_k + col0, head_k);
    const Element* v = row_pointer<Element>(p.v, task.batch, sequence.first_k + col0, head_k);
    load_rows<Element, T>(s.keys, s.width, k, p.k.row, loaded, p.head_dim);
    load_rows<Element, T>(s.values, s.width_v, v, p.v.row, loaded, p.head_dim_v);
    for (int t = 0; t < tile_count; ++t) {
      const int32_t row0 = tiles[t].row0;
      const KeyRange seen = sequence.keys_of(p, row0 + tiles[t].rows.begin, row0 + tiles[t].rows.end);
      const Range visible = intersect(loaded, {seen.begin - col0, seen.end - col0});
      if (visible.empty()) continue;
      attend<Element>(p, sequence, tiles[t], {task.batch, task.head, row0, col0, tiles[t].rows, visible}, s);
    }
  }
  for (int t = 0; t < tile_count; ++t) finish_tile<Element>(p, sequence, task.batch, task.head, tiles[t], s.width_v);
}

// Rows that no task computes: out 0, lse -inf.
template <class Element>
void clear_rows(const AttentionParams& p, int32_t batch, int64_t begin, int64_t end) {
  using T = ComputeType<Element>;
  for (int32_t head = 0; head < p.heads_q; ++head) {
    T* lse = static_cast<T*>(p.lse.data) + batch * p.lse.batch + head * p.lse.head;
    for (int64_t i = begin; i < end; ++i) {
      std::memset(row_pointer<Element>(p.out, batch, i, head), 0, sizeof(Element) * p.head_dim_v);
      lse[i] = T(-kInfinity);
    }
  }
}

template <class Element>
void forward(const AttentionParams& p, const ForwardPlan& plan, ParallelFor parallel_for) {
  using T = ComputeType<Element>;
  for_each_gap(p, Side::kQueries,
               [&](int32_t b, int64_t begin, int64_t end) { clear_rows<Element>(p, b, begin, end); });
  run_workers(parallel_for, static_cast<int64_t>(plan.tasks.size()), [&](TaskQueue& queue) {
    ForwardScratch<T> scratch(p, plan.most_tiles);
    for (int64_t task; queue.take(&task);) run_forward_task<Element>(p, plan.tasks[task], scratch);
  });
}

}  // namespace
}  // namespace hf_flash::cpu::HF_FLASH_CPU_ISA
