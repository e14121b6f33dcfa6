// The backward's first step: row_sum = sum over Dv of dout * out, minus dlse; and the sink's gradient, which needs no
// more than that: the sink is a key of probability exp(sink - lse) whose value is zero.
#pragma once

#include "cpu/tile.h"

namespace hf_flash::cpu::HF_FLASH_CPU_ISA {
namespace {

template <class T>
T* row_value(const RowValues& values, const Sequence& sequence, int32_t batch, int32_t head) {
  return static_cast<T*>(values.data) + batch * values.batch + head * values.head + sequence.first_q;
}

// One tile of queries. The products are added in the order of dO V' in the backward, so that a row whose output is one
// key's value gets gradients of exactly zero.
template <class Element, class T>
void row_sum_of_tile(const AttentionParams& p, const Sequence& sequence, int32_t batch, int32_t head, int32_t row0,
                     Range rows, T* out_t, T* dout_t) {
  const int64_t row = sequence.first_q + row0;
  load_transposed<Element, T>(out_t, row_pointer<Element>(p.out, batch, row, head), p.out.row, rows, p.head_dim_v,
                              T(1));
  load_transposed<Element, T>(dout_t, row_pointer<Element>(p.dout, batch, row, head), p.dout.row, rows, p.head_dim_v,
                              T(1));
  T sums[kTile] = {};
  for (int i = 0; i < kTile; i += kLanes<T>) {
    Vector<T> sum = {};
    for (int d = 0; d < p.head_dim_v; ++d) sum += load(out_t + d * kTile + i) * load(dout_t + d * kTile + i);
    store<T>(sums + i, sum);
  }
  T* to = row_value<T>(p.row_sum, sequence, batch, head) + row0;
  const T* dlse = p.dlse.data != nullptr ? row_value<T>(p.dlse, sequence, batch, head) + row0 : nullptr;
  for (int i = rows.begin; i < rows.end; ++i) to[i] = sums[i] - (dlse != nullptr ? dlse[i] : T(0));
}

template <class Element>
void row_sum(const AttentionParams& p, const std::vector<RowBlock>& blocks, ParallelFor parallel_for) {
  using T = ComputeType<Element>;
  run_workers(parallel_for, static_cast<int64_t>(blocks.size()) * p.heads_q, [&](TaskQueue& queue) {
    Scratch<T> out_t(int64_t{p.head_dim_v} * kTile), dout_t(int64_t{p.head_dim_v} * kTile);
    for (int64_t task; queue.take(&task);) {
      const RowBlock& block = blocks[task / p.heads_q];
      const int32_t row0 = round_down(block.begin, kTile), head = static_cast<int32_t>(task % p.heads_q);
      row_sum_of_tile<Element, T>(p, Sequence(p, block.batch), block.batch, head, row0,
                                  {block.begin - row0, block.end - row0}, out_t, dout_t);
    }
  });
}

// One row's sum in float64: the sink's gradient is one value of all rows, where the rounding of each would show.
template <class Element, class T>
double exact_row_sum(const AttentionParams& p, const Sequence& sequence, int32_t batch, int32_t head, int32_t i) {
  const Element* out = row_pointer<Element>(p.out, batch, sequence.first_q + i, head);
  const Element* dout = row_pointer<Element>(p.dout, batch, sequence.first_q + i, head);
  double sum = p.dlse.data != nullptr ? -double{row_value<T>(p.dlse, sequence, batch, head)[i]} : 0.0;
  for (int d = 0; d < p.head_dim_v; ++d) sum += double{to_compute(out[d])} * double{to_compute(dout[d])};
  return sum;
}

template <class Element>
void sink_gradient(const AttentionParams& p, ParallelFor parallel_for) {
  using T = ComputeType<Element>;
  run_tasks(parallel_for, p.heads_q, [&](int64_t task) {
    const int32_t head = static_cast<int32_t>(task);
    const double sink = static_cast<const T*>(p.sink)[head];
    double sum = 0;
    for (int32_t b = 0; b < p.batch; ++b) {
      const Sequence sequence(p, b);
      const T* lse = row_value<T>(p.lse, sequence, b, head);
      for (int32_t i = sequence.query_begin; i < sequence.query_end; ++i)
        if (lse[i] != T(-kInfinity))
          sum -= std::exp(sink - double{lse[i]}) * exact_row_sum<Element, T>(p, sequence, b, head, i);
    }
    static_cast<T*>(p.dsink)[head] = static_cast<T>(sum);
  });
}

}  // namespace
}  // namespace hf_flash::cpu::HF_FLASH_CPU_ISA
