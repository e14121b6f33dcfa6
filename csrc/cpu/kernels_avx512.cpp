// Kernels for x86-64 CPUs with AVX-512 (x86-64-v4).
#include "cpu/before_kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#endif

#define HF_FLASH_CPU_ISA avx512
#define HF_FLASH_CPU_ISA_NAME "avx512"
#define HF_FLASH_CPU_VECTOR_BYTES 64
#include "cpu/kernels_body.h"

HF_FLASH_CPU_KERNELS(kAvx512Kernels)

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
