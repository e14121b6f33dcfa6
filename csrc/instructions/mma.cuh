// mma.sync m16n8k16: D (16 x 8, float32) += A (16 x 16) B (16 x 8). With g = lane / 4 and t = lane % 4 a lane holds
//   D: d[0], d[1] = (g, 2t), (g, 2t + 1)      d[2], d[3] = (g + 8, 2t), (g + 8, 2t + 1)
//   A: a[0] = (g, 2t..)   a[1] = (g + 8, 2t..)   a[2] = (g, 2t + 8..)   a[3] = (g + 8, 2t + 8..)
//   B: b0 = (2t.., g)     b1 = (2t + 8.., g)
#pragma once

#include "instructions/element.cuh"

namespace hf_flash {

template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                       uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A warp's 8 x 8 matrix of 16-bit elements, (g, 2t), (g, 2t + 1) in lane 4 g + t, transposed.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

}  // namespace hf_flash
