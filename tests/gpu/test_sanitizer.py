"""compute-sanitizer over a small set of calls: memcheck, racecheck and initcheck, each in a process of its own."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TOOLS = ("memcheck", "racecheck", "initcheck")


def sanitizer():
    """compute-sanitizer on the PATH, in CUDA_HOME or in /usr/local/cuda; None where there is none."""
    folders = [Path(os.environ["CUDA_HOME"]) / "bin"] if "CUDA_HOME" in os.environ else []
    candidates = [*(folder / "compute-sanitizer" for folder in folders), Path("/usr/local/cuda/bin/compute-sanitizer")]
    found = shutil.which("compute-sanitizer")
    return found or next((str(path) for path in candidates if path.exists()), None)


def sanitize(program, tool):
    """(tool, finished process) of one tool over all calls; HF_FLASH_ARCH comes with the environment."""
    calls = Path(__file__).with_name("sanitized_calls.py")
    command = [program, "--tool", tool, "--error-exitcode", "86"]
    if tool != "initcheck":  # which must see torch's kernels write what ours read; the others judge ours alone
        command += ["--kernel-name", "kernel_substring=hf_flash"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # one allocation a tensor: overruns show
    command += [sys.executable, str(calls)]
    return tool, subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment)


@pytest.mark.sanitizer
@pytest.mark.gpu
def test_compute_sanitizer_finds_nothing():
    """The tools run at once: most of their time they wait for the host."""
    program = sanitizer()
    if program is None:
        pytest.skip("no compute-sanitizer")
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        for tool, done in pool.map(lambda tool: sanitize(program, tool), TOOLS):
            clean = done.returncode == 0 and "ERROR SUMMARY: 0 errors" in done.stdout + done.stderr
            assert clean, f"{tool}:\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
            assert "calls done" in done.stdout, tool
