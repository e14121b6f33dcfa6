// Loops that are unrolled before the compiler optimises anything.
#pragma once

namespace hf_flash {

// f(0) .. f(N - 1). For the outer loops over blocks of fragments: under `#pragma unroll` they are unrolled late, and as
// long as a block's number is a variable all registers of an accumulator that it picks are an array in memory, for
// which the compiler's search for redundant loads takes up to three quarters of its time (benchmarks/FACTS.md). EARLY:
// or late after all, where ptxas makes more of that.
template <int N, bool EARLY = true, class F>
__device__ __forceinline__ void unrolled(F&& f) {
  if constexpr (!EARLY) {
#pragma unroll
    for (int n = 0; n < N; ++n) f(n);
  } else if constexpr (N > 0) {
    unrolled<N - 1>(f);
    f(N - 1);
  }
}

}  // namespace hf_flash
