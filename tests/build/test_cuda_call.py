"""csrc/portable/cuda_call.h and launch.h beside a CUDA runtime that counts: what is asked once a device, what again."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
CXX = os.environ.get("CXX", "c++")

RUNTIME = """#pragma once
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline int device = 0, questions = 0, permits = 0;
inline cudaError_t status = cudaSuccess;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "said by CUDA"; }
inline cudaError_t cudaGetDevice(int* d) { return *d = device, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int d) {
  return ++questions, *value = 1000 * (1 + attribute) + d, status;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) { return ++permits, status; }

struct dim3 {
  unsigned x, y = 1, z = 1;
  explicit dim3(unsigned x) : x(x) {}
};
using cudaStream_t = void*;
enum cudaLaunchAttributeID {
  cudaLaunchAttributeProgrammaticStreamSerialization,
  cudaLaunchAttributeCooperative,
  cudaLaunchAttributeClusterDimension
};
struct cudaLaunchAttributeValue {
  int programmaticStreamSerializationAllowed, cooperative;
  struct { unsigned x, y, z; } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  unsigned long dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
inline int clusters = 0;
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* value, Kernel*, const cudaLaunchConfig_t* config) {
  const auto size = static_cast<int>(config->attrs[config->numAttrs - 1].val.clusterDim.x);
  return ++questions, *value = clusters / size, status;
}
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t*, void (*kernel)()) { return kernel(), status; }
"""

PROGRAM = """#include "portable/cuda_call.h"
#include <cstdio>
using namespace hf_flash;
void kernel() {}
void launch() { static SharedMemoryPermit permit; permit.ask(kernel, 100000); }
#define EXPECT(x) if (!(x)) return std::printf("line %d: %s\\n", __LINE__, #x), 1
int main() {
  for (int round = 0; round < 3; ++round) {
    for (device = 0; device < 64; ++device) {
      EXPECT(compute_capability_major() == 1000 + device && multiprocessor_count() == 2000 + device);
      launch();
    }
  }
  EXPECT(questions == 128 && permits == 64);
  for (device = 64; device < 66; ++device) {
    for (int round = 0; round < 3; ++round) {
      EXPECT(compute_capability_major() == 1000 + device);
      launch();
    }
  }
  EXPECT(questions == 134 && permits == 70);
  static SharedMemoryPermit permit;
  device = 0, status = cudaErrorInvalidValue;
  bool raised = false;
  try { permit.ask(kernel, 1); } catch (const std::runtime_error& e) { raised = true, std::puts(e.what()); }
  EXPECT(raised);
  status = cudaSuccess;
  permit.ask(kernel, 1), permit.ask(kernel, 1);
  EXPECT(permits == 72);  // what failed is asked again
}
"""


CLUSTERS = """#include "portable/launch.h"
#include <cstdio>
using namespace hf_flash;
int launches = 0;
void kernel() { ++launches; }
#define EXPECT(x) if (!(x)) return std::printf("line %d: %s\\n", __LINE__, #x), 1
int main() {
  ResidentClusters<4> resident;
  const auto ask = [&](int size) {
    AttributedLaunch launch(132, 384, 0, nullptr);
    launch.make_clusters(size);
    return resident.ask(kernel, size, launch.config());
  };
  bool raised = false;
  try { ask(4); } catch (const std::runtime_error& e) { raised = true, std::puts(e.what()); }
  EXPECT(raised);
  clusters = 132;
  for (int round = 0; round < 3; ++round) {
    for (device = 0; device < 2; ++device) EXPECT(ask(2) == 66 && ask(4) == 33);
  }
  EXPECT(questions == 5);  // what found no room is asked again
  AttributedLaunch early(1, 32, 0, nullptr);
  early.start_early();  // the device says 1000
  EXPECT(early.config().numAttrs == 0);
  early.make_cooperative();
  EXPECT(early.config().numAttrs == 1 && early.config().attrs == &early.config().attrs[0]);
  early("kernel", kernel);
  EXPECT(launches == 1);
  status = cudaErrorInvalidValue, raised = false;
  try { early("kernel", kernel); } catch (const std::runtime_error& e) { raised = true, std::puts(e.what()); }
  EXPECT(raised);
}
"""


def said_by(program, folder) -> str:
    (folder / "cuda_runtime.h").write_text(RUNTIME)
    (folder / "main.cpp").write_text(program)
    flags = ["-std=c++17", "-Wall", "-Werror", f"-I{folder}", f"-I{CSRC}"]
    subprocess.run([CXX, *flags, folder / "main.cpp", "-o", folder / "main"], check=True)
    done = subprocess.run([folder / "main"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


pytestmark = pytest.mark.skipif(not CSRC.is_dir() or shutil.which(CXX) is None, reason="needs csrc/ and a C++ compiler")


def test_each_device_is_asked_once(tmp_path):
    assert "hf_flash: cudaFuncSetAttribute: said by CUDA" in said_by(PROGRAM, tmp_path)


def test_clusters_are_counted_once_a_size(tmp_path):
    said = said_by(CLUSTERS, tmp_path)
    assert "hf_flash: this device has no room for a cluster of 4 CTAs" in said
    assert "hf_flash: kernel: said by CUDA" in said
