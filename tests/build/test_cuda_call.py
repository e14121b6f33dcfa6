"""csrc/portable/cuda_call.h beside a CUDA runtime that counts: what is asked once a device, and what again."""

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


@pytest.mark.skipif(not CSRC.is_dir() or shutil.which(CXX) is None, reason="needs csrc/ and a C++ compiler")
def test_each_device_is_asked_once(tmp_path):
    (tmp_path / "cuda_runtime.h").write_text(RUNTIME)
    (tmp_path / "main.cpp").write_text(PROGRAM)
    flags = ["-std=c++17", "-Wall", "-Werror", f"-I{tmp_path}", f"-I{CSRC}"]
    subprocess.run([CXX, *flags, tmp_path / "main.cpp", "-o", tmp_path / "main"], check=True)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "hf_flash: cudaFuncSetAttribute: said by CUDA" in done.stdout
