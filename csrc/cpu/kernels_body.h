// The kernels for one instruction set, namespace HF_FLASH_CPU_ISA, vectors of HF_FLASH_CPU_VECTOR_BYTES.
#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/row_sum.h"
#include "cpu/score.h"
#include "cpu/tile.h"
#include "cpu/vector.h"

namespace hf_flash::cpu::HF_FLASH_CPU_ISA {
namespace {

template <class Call>
void with_element(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::kFloat16: return call(Float16{});
    case DType::kBFloat16: return call(BFloat16{});
    case DType::kFloat32: return call(float{});
    case DType::kFloat64: return call(double{});
  }
}

void forward_any(const AttentionParams& p, const ForwardPlan& plan, ParallelFor parallel_for) {
  with_element(p.dtype, [&](auto element) { forward<decltype(element)>(p, plan, parallel_for); });
}

void row_sum_any(const AttentionParams& p, const std::vector<RowBlock>& blocks, ParallelFor parallel_for) {
  with_element(p.dtype, [&](auto element) { row_sum<decltype(element)>(p, blocks, parallel_for); });
}

void backward_any(const AttentionParams& p, const BackwardPlan& plan, ParallelFor parallel_for) {
  with_element(p.dtype, [&](auto element) { backward<decltype(element)>(p, plan, parallel_for); });
}

}  // namespace
}  // namespace hf_flash::cpu::HF_FLASH_CPU_ISA

#define HF_FLASH_CPU_KERNELS(NAME)                                                                          \
  const hf_flash::cpu::Kernels hf_flash::cpu::NAME = {HF_FLASH_CPU_ISA_NAME, HF_FLASH_CPU_ISA::forward_any, \
                                                      HF_FLASH_CPU_ISA::row_sum_any, HF_FLASH_CPU_ISA::backward_any};
