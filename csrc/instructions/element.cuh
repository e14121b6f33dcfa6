// The two 16-bit element types, and how a pair of them sits in one register.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace hf_flash {

using Half = __half;
using BFloat16 = __nv_bfloat16;

// Rounds two numbers to T; low goes to the low half, as the tensor-core fragments want it.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair);

template <>
__device__ __forceinline__ float2 unpack<Half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

template <>
__device__ __forceinline__ float2 unpack<BFloat16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)};
}

// Negative numbers of a pair become 0; NaN stays.
template <class T>
__device__ __forceinline__ uint32_t positive_part(uint32_t pair);

template <>
__device__ __forceinline__ uint32_t positive_part<Half>(uint32_t pair) {
  const __half2 x = __hmax2_nan(reinterpret_cast<const __half2&>(pair), __half2{0.0f, 0.0f});
  return reinterpret_cast<const uint32_t&>(x);
}

template <>
__device__ __forceinline__ uint32_t positive_part<BFloat16>(uint32_t pair) {
  const __nv_bfloat162 x = __hmax2_nan(reinterpret_cast<const __nv_bfloat162&>(pair), __nv_bfloat162{0.0f, 0.0f});
  return reinterpret_cast<const uint32_t&>(x);
}

__device__ __forceinline__ void round_to(float x, float& to) { to = x; }
__device__ __forceinline__ void round_to(float x, Half& to) { to = __float2half_rn(x); }
__device__ __forceinline__ void round_to(float x, BFloat16& to) { to = __float2bfloat16_rn(x); }

__device__ __forceinline__ float to_float(Half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(BFloat16 x) { return __bfloat162float(x); }

}  // namespace hf_flash
