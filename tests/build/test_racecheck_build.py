"""The library that racecheck needs, in which every lane of a warp arrives at barriers, compiles."""

import subprocess
import sys
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[2] / "build/cuda"


@pytest.mark.skipif(not (BUILD / "build.ninja").exists(), reason="the CUDA library was not built here")
@pytest.mark.parametrize("kernel", ["sm90_forward_64", "sm90_bias_gradient"])
def test_every_lane_arrives(kernel, tmp_path):
    target = str(BUILD / "objects" / f"{kernel}_nvcc_sm90.o")
    ninja = [sys.executable, "-m", "ninja", "-C", BUILD, "-t", "commands", target]
    command = subprocess.run(ninja, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    command = command.replace(target, str(tmp_path / "kernel.o")).replace(" -c ", " -DHF_FLASH_EVERY_LANE_ARRIVES -c ")
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "kernel.o").exists()
