// The backward's first step: row_sum = sum over Dv of dout * out, minus dlse; and the sink's gradient, which needs no
// more than that: the sink is a key of probability exp(sink - lse) whose value is zero.
#pragma once

#include "cpu/tile.h"

namespace hf_flash::cpu::HF_FLASH_CPU_ISA {
namespace {

template <class T>
T dot(const T* a, const T* b, int width) {
  Vector<T> sum = {};
  for (int d = 0; d < width; d += kLanes<T>) sum += load(a + d) * load(b + d);
  T total = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) total += sum[lane];
  return total;
}

template <class T>
T* row_value(const RowValues& values, const Sequence& sequence, int32_t batch, int32_t head) {
  return static_cast<T*>(values.data) + batch * values.batch + head * values.head + sequence.first_q;
}

template <class Element>
void row_sum(const AttentionParams& p, const std::vector<RowBlock>& blocks, ParallelFor parallel_for) {
  using T = ComputeType<Element>;
  const int width = round_up(p.head_dim_v, kLanes<T>);
  run_workers(parallel_for, static_cast<int64_t>(blocks.size()), [&](TaskQueue& queue) {
    Scratch<T> dout(width), out(width);
    for (int64_t task; queue.take(&task);) {
      const RowBlock& block = blocks[task];
      const Sequence sequence(p, block.batch);
      for (int32_t head = 0; head < p.heads_q; ++head) {
        T* sums = row_value<T>(p.row_sum, sequence, block.batch, head);
        const T* dlse = p.dlse.data ? row_value<T>(p.dlse, sequence, block.batch, head) : nullptr;
        for (int32_t i = block.begin; i < block.end; ++i) {
          const int64_t row = sequence.first_q + i;
          load_rows<Element, T>(dout, width, row_pointer<Element>(p.dout, block.batch, row, head), 0, {0, 1},
                                p.head_dim_v);
          load_rows<Element, T>(out, width, row_pointer<Element>(p.out, block.batch, row, head), 0, {0, 1},
                                p.head_dim_v);
          sums[i] = dot<T>(dout, out, width) - (dlse != nullptr ? dlse[i] : T(0));
        }
      }
    }
  });
}

template <class T>
void sink_gradient(const AttentionParams& p, ParallelFor parallel_for) {
  run_tasks(parallel_for, p.heads_q, [&](int64_t head) {
    const double sink = static_cast<const T*>(p.sink)[head];
    double sum = 0;
    for (int32_t b = 0; b < p.batch; ++b) {
      const Sequence sequence(p, b);
      const T* lse = row_value<T>(p.lse, sequence, b, static_cast<int32_t>(head));
      const T* sums = row_value<T>(p.row_sum, sequence, b, static_cast<int32_t>(head));
      for (int32_t i = sequence.query_begin; i < sequence.query_end; ++i)
        if (lse[i] != T(-kInfinity)) sum -= std::exp(sink - static_cast<double>(lse[i])) * static_cast<double>(sums[i]);
    }
    static_cast<T*>(p.dsink)[head] = static_cast<T>(sum);
  });
}

}  // namespace
}  // namespace hf_flash::cpu::HF_FLASH_CPU_ISA
