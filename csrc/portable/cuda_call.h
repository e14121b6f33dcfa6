// Calls of the CUDA runtime: its error codes as exceptions in its own words, and what it is asked once a device, since
// a launch takes microseconds and each question a part of one.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace hf_flash {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("hf_flash: ") + what + ": " + cudaGetErrorString(status));
}

inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

constexpr int kKnownDevices = 64;  // devices from here on are asked every time

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// Of the current device; for attributes that are never 0, which here means not asked yet.
template <cudaDeviceAttr ATTRIBUTE>
int device_attribute() {
  static std::atomic<int> known[kKnownDevices] = {};
  const int device = current_device();
  int value = device < kKnownDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (value != 0) return value;
  check(cudaDeviceGetAttribute(&value, ATTRIBUTE, device), "cudaDeviceGetAttribute");
  if (device < kKnownDevices) known[device].store(value, std::memory_order_relaxed);
  return value;
}

inline int compute_capability_major() { return device_attribute<cudaDevAttrComputeCapabilityMajor>(); }
inline int multiprocessor_count() { return device_attribute<cudaDevAttrMultiProcessorCount>(); }

// The devices on which a kernel may use its dynamic shared memory. A static object a kernel; threads that come at the
// same time both ask CUDA, which does no harm.
class SharedMemoryPermit {
 public:
  template <class Kernel>
  void ask(Kernel* kernel, int bytes) {
    const int device = current_device();
    const uint64_t bit = device < kKnownDevices ? uint64_t{1} << device : 0;
    if (devices_.load(std::memory_order_acquire) & bit) return;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
    devices_.fetch_or(bit, std::memory_order_release);
  }

 private:
  std::atomic<uint64_t> devices_{0};
};

}  // namespace hf_flash
