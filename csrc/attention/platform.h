// Functions of attention/ run on the host and on the device.
#pragma once

#ifdef __CUDACC__
#define HF_FLASH_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HF_FLASH_HOST_DEVICE inline
#endif
