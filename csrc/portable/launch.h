// Launches that say more than how many threads there are.
#pragma once

#include "portable/cuda_call.h"

namespace hf_flash {

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

// How many clusters of `size` CTAs of a kernel run at once. A static object a kernel, as SharedMemoryPermit.
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
