// Kernels for any CPU: 16-byte vectors, which x86-64 (SSE2) and 64-bit ARM (NEON) always have.
#include "cpu/before_kernels.h"

#define HF_FLASH_CPU_ISA generic
#define HF_FLASH_CPU_ISA_NAME "generic"
#define HF_FLASH_CPU_VECTOR_BYTES 16
#include "cpu/kernels_body.h"

HF_FLASH_CPU_KERNELS(kGenericKernels)
