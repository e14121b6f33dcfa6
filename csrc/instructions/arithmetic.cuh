// Single instructions of the special-function unit and of the reduction units.
#pragma once

#include <cstdint>

namespace hf_flash {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger one, where fmaxf would hide a NaN.
__device__ __forceinline__ float max_or_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// tanh(x) = 1 - 2 / (exp(2x) + 1): absolute error about 1e-7, where tanh.approx has 5e-4.
__device__ __forceinline__ float tanh_fast(float x) {
  return 1.0f - 2.0f * reciprocal_fast(exp2_fast(2.0f * kLog2E * x) + 1.0f);
}

// Bytes of low and high by a selector of four digits, the lowest byte's digit last: 8 + i is the sign of low's byte i
// eight times, 12 + i that of high's.
template <uint32_t SELECTOR>
__device__ __forceinline__ uint32_t copy_signs(uint32_t low, uint32_t high = 0) {
  uint32_t y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(low), "r"(high), "n"(SELECTOR));
  return y;
}

// The value of lane ^ mask.
template <class T>
__device__ __forceinline__ T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, x, mask);
}

__device__ __forceinline__ bool any_lane(bool x) { return __any_sync(0xFFFFFFFFu, x); }

// A value that all lanes share, moved to uniform registers: what is computed from it leaves the vector units alone, and
// the vector registers to the fragments.
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __reduce_or_sync(0xFFFFFFFFu, x); }
__device__ __forceinline__ int32_t uniform(int32_t x) { return uniform(static_cast<uint32_t>(x)); }
__device__ __forceinline__ int64_t uniform(int64_t x) {
  return static_cast<int64_t>(uniform(static_cast<uint32_t>(x >> 32))) << 32 | uniform(static_cast<uint32_t>(x));
}
template <class T>
__device__ __forceinline__ T* uniform(T* x) {
  return reinterpret_cast<T*>(uniform(reinterpret_cast<int64_t>(x)));
}

// The same value, but the compiler cannot compute ahead with it: keeps what a rare branch needs out of the registers of
// the loop around it.
template <class T>
__device__ __forceinline__ T opaque(T x) {
  asm volatile("" : "+r"(x));
  return x;
}

// To a 16-byte aligned address, at once: nvcc has made four stores of 4 bytes of an assignment to a uint4.
__device__ __forceinline__ void store_global_16_bytes(void* address, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

// What lies there where `exists`, otherwise zeros, and nobody reads it again for long: it makes room in the L2 cache
// before anything else does. Given an if instead, the compiler puts what follows into its branch too, so that of
// several loads one waits for the other.
__device__ __forceinline__ uint4 load_global_16_bytes_if(bool exists, const void* address) {
  uint4 x;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
      "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.global.cs.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w)
      : "l"(__cvta_generic_to_global(address)), "r"(static_cast<int>(exists))
      : "memory");
  return x;
}
__device__ __forceinline__ float load_global_if(bool exists, const float* address) {
  float x;
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\nmov.b32 %0, 0;\n@p ld.global.cs.f32 %0, [%1];\n}"
               : "=&f"(x)
               : "l"(__cvta_generic_to_global(address)), "r"(static_cast<int>(exists))
               : "memory");
  return x;
}

// *address += x in global memory, without waiting for the old value.
__device__ __forceinline__ void add_global(float* address, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "f"(x) : "memory");
}

// A counter that orders what CTAs do to global memory: what was done before add_release is seen after load_acquire.
__device__ __forceinline__ int32_t load_acquire(const int32_t* address) {
  int32_t x;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(__cvta_generic_to_global(address)) : "memory");
  return x;
}
// What another CTA wrote before.
__device__ __forceinline__ void load_relaxed(float (&x)[4], const float* address) {
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
               : "l"(__cvta_generic_to_global(address))
               : "memory");
}
__device__ __forceinline__ int32_t add_acquire(int32_t* address, int32_t x) {
  int32_t old;
  asm volatile("atom.acquire.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(__cvta_generic_to_global(address)), "r"(x)
               : "memory");
  return old;
}
__device__ __forceinline__ void add_release(int32_t* address, int32_t x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "r"(x) : "memory");
}

// Four neighbouring floats at a 16-byte aligned address at once.
__device__ __forceinline__ void add_global_4(float* address, const float (&x)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(address)), "f"(x[0]),
               "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
#else
#pragma unroll
  for (int e = 0; e < 4; ++e) add_global(address + e, x[e]);
#endif
}

}  // namespace hf_flash
