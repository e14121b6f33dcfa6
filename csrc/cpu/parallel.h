// Tasks on all cores: each worker takes the next task when it is done with one, so uneven tasks (causal rows, ragged
// sequences) balance. A task owns what it writes, so the results do not depend on who ran it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "cpu/attention.h"

namespace hf_flash::cpu {

constexpr int64_t kMostWorkers = 1024;

class TaskQueue {
 public:
  explicit TaskQueue(int64_t tasks) : tasks_(tasks) {}
  bool take(int64_t* task) { return (*task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_; }
  bool empty() const { return next_.load(std::memory_order_relaxed) >= tasks_; }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t tasks_;
};

// Calls work(queue) once for each worker.
template <class Work>
void run_workers(ParallelFor parallel_for, int64_t tasks, const Work& work) {
  struct Shared {
    TaskQueue queue;
    const Work& work;
  } shared{TaskQueue(tasks), work};
  const auto body = [](int64_t, int64_t, void* context) {
    Shared& s = *static_cast<Shared*>(context);
    if (!s.queue.empty()) s.work(s.queue);
  };
  if (tasks > 0) parallel_for(0, std::min(tasks, kMostWorkers), 1, body, &shared);
}

// Calls run(task) for each task that needs no scratch memory.
template <class Run>
void run_tasks(ParallelFor parallel_for, int64_t tasks, const Run& run) {
  run_workers(parallel_for, tasks, [&](TaskQueue& queue) {
    for (int64_t task; queue.take(&task);) run(task);
  });
}

// How many workers a wide loop gets.
int64_t count_workers(ParallelFor parallel_for);

// Zeroed memory, aligned for every vector width; throws std::bad_alloc.
void* allocate_scratch(int64_t bytes);

// A worker's scratch array.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<T*>(allocate_scratch(count * int64_t{sizeof(T)}))) {}
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

}  // namespace hf_flash::cpu
