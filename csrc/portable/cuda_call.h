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

// A launch with what cudaLaunchKernelEx may be told besides.
class AttributedLaunch {
 public:
  AttributedLaunch(uint32_t grid, int threads, int shared_bytes, cudaStream_t stream)
      : config_{dim3(grid), dim3(threads), static_cast<size_t>(shared_bytes), stream, attributes_, 0} {}
  AttributedLaunch(const AttributedLaunch&) = delete;

  // It starts while the kernel before it on the stream ends, and calls wait_for_kernel_before()
  // (instructions/dependent_launch.cuh), which only code for Hopper does.
  void start_early() {
    if (compute_capability_major() != 9) return;
    cudaLaunchAttributeValue value{};
    value.programmaticStreamSerializationAllowed = 1;
    add(cudaLaunchAttributeProgrammaticStreamSerialization, value);
  }
  // All CTAs run at once.
  void make_cooperative() {
    cudaLaunchAttributeValue value{};
    value.cooperative = 1;
    add(cudaLaunchAttributeCooperative, value);
  }
  void make_clusters(int ctas) {
    cudaLaunchAttributeValue value{};
    value.clusterDim = {static_cast<unsigned>(ctas), 1, 1};
    add(cudaLaunchAttributeClusterDimension, value);
  }
  cudaLaunchConfig_t& config() { return config_; }

  template <class... Parameters>
  void operator()(const char* what, void (*kernel)(Parameters...), const Parameters&... parameters) {
    check(cudaLaunchKernelEx(&config_, kernel, parameters...), what);
  }

 private:
  void add(cudaLaunchAttributeID id, const cudaLaunchAttributeValue& value) {
    attributes_[config_.numAttrs].id = id;
    attributes_[config_.numAttrs++].val = value;
  }

  cudaLaunchAttribute attributes_[2];
  cudaLaunchConfig_t config_;
};

// How many clusters of `size` CTAs of a kernel run at once. A static object a kernel, as above.
template <int MAX_SIZE>
class ResidentClusters {
 public:
  template <class Kernel>
  int ask(Kernel* kernel, int size, const cudaLaunchConfig_t& config) {
    const int device = current_device();
    int value = device < kKnownDevices ? known_[device][size - 1].load(std::memory_order_relaxed) : 0;
    if (value != 0) return value;
    check(cudaOccupancyMaxActiveClusters(&value, kernel, &config), "cudaOccupancyMaxActiveClusters");
    if (value == 0)
      throw std::runtime_error("hf_flash: this device has no room for a cluster of " + std::to_string(size) + " CTAs");
    if (device < kKnownDevices) known_[device][size - 1].store(value, std::memory_order_relaxed);
    return value;
  }

 private:
  std::atomic<int> known_[kKnownDevices][MAX_SIZE] = {};
};

}  // namespace hf_flash
