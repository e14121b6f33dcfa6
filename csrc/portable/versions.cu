// The CUDA versions that decide whether this library can run, for hf_flash/ops.py through ctypes: a driver older than
// the runtime's major version loads no kernel of it.
#include <cuda_runtime.h>

extern "C" __attribute__((visibility("default"))) int hf_flash_cuda_versions(int* runtime, int* driver) {
  // Neither call needs a GPU; without a driver the second gives 0.
  return cudaRuntimeGetVersion(runtime) != cudaSuccess || cudaDriverGetVersion(driver) != cudaSuccess;
}

// Was it built for racecheck (sm90/pipeline.cuh)?
extern "C" __attribute__((visibility("default"))) int hf_flash_every_lane_arrives() {
#ifdef HF_FLASH_EVERY_LANE_ARRIVES
  return 1;
#else
  return 0;
#endif
}
