// The kernels of one instruction set. kernels_*.cpp each compile the same headers for their own; dispatch.cpp chooses.
#pragma once

#include <vector>

#include "cpu/attention.h"
#include "cpu/schedule.h"

namespace hf_flash::cpu {

struct Kernels {
  const char* name;
  void (*forward)(const AttentionParams&, const ForwardPlan&, ParallelFor);
  void (*row_sum)(const AttentionParams&, const std::vector<RowBlock>&, ParallelFor);
  void (*backward)(const AttentionParams&, const BackwardPlan&, ParallelFor);  // row_sum comes before it
};

extern const Kernels kGenericKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace hf_flash::cpu
