"""compute-sanitizer over a small set of calls: memcheck, racecheck and initcheck, each in a process of its own."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_flash import ops


def sanitizer():
    """compute-sanitizer on the PATH, in CUDA_HOME or in /usr/local/cuda; None where there is none."""
    folders = [Path(os.environ["CUDA_HOME"]) / "bin"] if "CUDA_HOME" in os.environ else []
    candidates = [*(folder / "compute-sanitizer" for folder in folders), Path("/usr/local/cuda/bin/compute-sanitizer")]
    found = shutil.which("compute-sanitizer")
    return found or next((str(path) for path in candidates if path.exists()), None)


def sees_every_order():
    """Whether racecheck can follow the library's Hopper kernels.

    There one lane arrives at a barrier for its warp, behind a __syncwarp; racecheck does not see that, and calls each
    such use of shared memory a hazard. A library for it lets every lane arrive (csrc/sm90/pipeline.cuh):
    ``NVCC_APPEND_FLAGS=-DHF_FLASH_EVERY_LANE_ARRIVES make build``.
    """
    return bool(ctypes.CDLL(ops.LIBRARIES["cuda"]).hf_flash_every_lane_arrives())


@pytest.mark.sanitizer
@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(arch, tool):
    program = sanitizer()
    if program is None:
        pytest.skip("no compute-sanitizer")
    if tool == "racecheck" and arch == "sm90" and not sees_every_order():
        pytest.skip("this library is not built for racecheck")
    calls = Path(__file__).with_name("sanitized_calls.py")
    command = [program, "--tool", tool, "--error-exitcode", "86"]
    if tool != "initcheck":  # which must see torch's kernels write what ours read; the others judge ours alone
        command += ["--kernel-name", "kernel_substring=hf_flash"]
    elif arch == "sm90":  # it does not see the TMA engine store dQ, which this kernel reads; test_kernels.py poisons it
        command += ["--kernel-name-exclude", "kernel_substring=convert_dq"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # one allocation a tensor: overruns show
    # Nor does it see the TMA engine add up what a kernel that finishes dq reads: with more keys none does.
    command += [sys.executable, str(calls), "cuda", "653" if tool == "initcheck" and arch == "sm90" else "141"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment)
    said = done.stdout + done.stderr
    clean = "RACECHECK SUMMARY: 0 hazards" if tool == "racecheck" else "ERROR SUMMARY: 0 errors"
    assert done.returncode == 0 and clean in said, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert "calls done" in done.stdout
