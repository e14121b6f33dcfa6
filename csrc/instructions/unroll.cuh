// Loops that are unrolled before the compiler optimises anything.
#pragma once

#include <type_traits>

namespace hf_flash {

// f(integral_constant<int, 0>()) and so on, N times. For the outer loops over blocks of fragments: under `#pragma
// unroll` they are unrolled late, and as long as a block's number is a variable all registers of an accumulator that
// it picks are an array in memory, which the compiler's search for redundant loads takes three quarters of its time
// for (benchmarks/FACTS.md).
template <int N, class F>
__device__ __forceinline__ void unrolled(F&& f) {
  if constexpr (N > 0) {
    unrolled<N - 1>(f);
    f(std::integral_constant<int, N - 1>());
  }
}

}  // namespace hf_flash
