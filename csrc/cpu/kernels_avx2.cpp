// Kernels for x86-64 CPUs with AVX2 and FMA (x86-64-v3).
#include "cpu/before_kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif

#define HF_FLASH_CPU_ISA avx2
#define HF_FLASH_CPU_ISA_NAME "avx2"
#define HF_FLASH_CPU_VECTOR_BYTES 32
#include "cpu/kernels_body.h"

HF_FLASH_CPU_KERNELS(kAvx2Kernels)

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
