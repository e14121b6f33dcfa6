// The CPU's entry points: the kernels of the best instruction set that this machine has.
#include "cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "attention/dropout.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace hf_flash::cpu {
namespace {

// torch's own switch holds here too: ATEN_CPU_CAPABILITY=default or avx2 forbids what lies above.
const Kernels& choose_kernels() {
#if defined(__x86_64__)
  const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
  const bool only_generic = asked != nullptr && std::strcmp(asked, "default") == 0;
  const bool only_avx2 = asked != nullptr && std::strcmp(asked, "avx2") == 0;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && !only_generic;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && !only_avx2;
  if (avx2 && avx512) return kAvx512Kernels;
  if (avx2) return kAvx2Kernels;
#endif
  return kGenericKernels;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

}  // namespace

int64_t count_workers(ParallelFor parallel_for) {
  std::atomic<int64_t> workers{0};
  const auto body = [](int64_t, int64_t, void* context) { ++*static_cast<std::atomic<int64_t>*>(context); };
  parallel_for(0, kMostWorkers, 1, body, &workers);
  return std::max<int64_t>(1, workers.load());
}

void* allocate_scratch(int64_t bytes) {
  const size_t rounded = (static_cast<size_t>(bytes) + 63) / 64 * 64;
  if (rounded == 0) return nullptr;
  void* data = std::aligned_alloc(64, rounded);
  if (data == nullptr) throw std::bad_alloc();
  return std::memset(data, 0, rounded);
}

void forward(const AttentionParams& params, ParallelFor parallel_for) {
  kernels().forward(params, plan_forward(params, count_workers(parallel_for)), parallel_for);
}

// Each worker allocates its own scratch while it works: cpu/schedule.h bounds it.
int64_t backward_workspace(const AttentionParams&) { return 0; }

void row_sum(const AttentionParams& params, ParallelFor parallel_for) {
  kernels().row_sum(params, row_blocks(params, Side::kQueries, kTile), parallel_for);
}

void backward(const AttentionParams& params, ParallelFor parallel_for) {
  row_sum(params, parallel_for);
  kernels().backward(params, plan_backward(params, count_workers(parallel_for)), parallel_for);
}

void dropout_mask(bool* mask, const int64_t* seed, int64_t planes, int64_t rows, int64_t cols, int keep,
                  ParallelFor parallel_for) {
  const uint64_t key = static_cast<uint64_t>(*seed);
  run_tasks(parallel_for, planes * rows, [=](int64_t row) {
    const uint32_t plane = static_cast<uint32_t>(row / rows), i = static_cast<uint32_t>(row % rows);
    for (int64_t j = 0; j < cols; ++j)
      mask[row * cols + j] = dropout_keeps(key, plane, i, static_cast<uint32_t>(j), keep);
  });
}

}  // namespace hf_flash::cpu
