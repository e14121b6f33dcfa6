// The sums of dK and dV of a piece of work that two CTAs share (attention/divided_work.h).
#pragma once

#include "attention/divided_work.h"
#include "instructions/arithmetic.cuh"
#include "tile/fragment.cuh"

namespace hf_flash::sm90 {

template <class Traits>
struct DividedSums {
  static constexpr int kColumns = Traits::kHeadDim;
  using Sum = Accumulator<16, kColumns>;

  const AttentionParams& p;
  const int place;

  // By a warp, of its 16 keys.
  __device__ __forceinline__ void give(const Sum& dk, const Sum& dv) const {
    float* const to = sums();
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      // By asm, as store_global_16_bytes() does, ptxas spills 1400 bytes.
      const float (&k)[4] = dk.x[0][n], (&v)[4] = dv.x[0][n];
      __stcg(reinterpret_cast<float4*>(to + 256 * n), float4{k[0], k[1], k[2], k[3]});
      __stcg(reinterpret_cast<float4*>(to + 256 * n + 128), float4{v[0], v[1], v[2], v[3]});
    }
    __syncwarp();
    if (threadIdx.x % kWarpThreads == 0) add_release(given(), 1);
  }
  // By a thread of the producers, before the consumers take: a loop among the accumulators makes ptxas spill them.
  __device__ __forceinline__ void wait() const {
    while (load_acquire(given()) < Traits::kWarps) {
    }
  }
  // By a warp, of its 16 keys.
  __device__ __forceinline__ void take(Sum& dk, Sum& dv) const {
    const float* const from = sums();
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      add(dk.x[0][n], from + 256 * n);
      add(dv.x[0][n], from + 256 * n + 128);
    }
  }

 private:
  __device__ __forceinline__ int32_t* given() const { return &DividedWork::memory(p).given[place]; }
  // This lane's four of the first block of 8 columns of dK; dV's stand beside them. Found where they are used: kept,
  // the address would cost registers all along.
  __device__ __forceinline__ float* sums() const {
    const int thread = opaque(threadIdx.x);
    return DividedWork::memory(p).sums + int64_t{place * Traits::kWarps + thread / 32} * (32 * kColumns) +
           thread % 32 * 4;
  }
  __device__ __forceinline__ static void add(float (&x)[4], const float* from) {
    float y[4];
    load_relaxed(y, from);
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] += y[e];
  }
};

}  // namespace hf_flash::sm90
