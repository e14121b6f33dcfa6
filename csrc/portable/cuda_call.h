// CUDA's error codes as exceptions that carry CUDA's own words.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace hf_flash {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("hf_flash: ") + what + ": " + cudaGetErrorString(status));
}

inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

}  // namespace hf_flash
