"""Reads what ptxas wrote while the CUDA library was built: every kernel on every target, no spills, no warnings.

    python tests/build/check_cuda_build.py build/cuda

Prints one line a target with the number of kernels and the most registers; exits 1 with the kernels that spill, the
files that were not compiled for every target, and a library that lacks one or is larger than it may be.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

# Kernels that may spill, by a part of their mangled name, each with its reason. Head dimensions over 128 only.
ALLOWED: dict[str, str] = {}

# What each rule of setup.py compiles for; PTX for newer GPUs comes from the mma.sync kernels' compute_80.
TARGETS = {"nvcc": {"sm_80", "sm_90"}, "nvcc_sm90": {"sm_90a"}}
LARGEST_MIB = 25

OBJECT = re.compile(r"^build (\S+\.o): (nvcc\w*) ", re.MULTILINE)
ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
WARNING = re.compile(r"warning|C7508|setmaxnreg", re.IGNORECASE)


class Kernel(NamedTuple):
    name: str
    target: str
    spilled: int  # bytes stored and loaded
    registers: int


def read(log: str) -> tuple[list[Kernel], list[str]]:
    """Kernels in ptxas's words, and the lines that warn."""
    kernels, warnings, name, target, spilled = [], [], "", "", 0
    for line in log.splitlines():
        if match := ENTRY.search(line):
            name, target = match.groups()
            spilled = 0
        elif match := SPILL.search(line):
            spilled = int(match[1]) + int(match[2])
        elif match := REGISTERS.search(line):
            if name:
                kernels.append(Kernel(name, target, spilled, int(match[1])))
            name = ""
        elif WARNING.search(line):
            warnings.append(line)
    return kernels, warnings


def faults_of(source: str, rule: str, log: str) -> tuple[list[Kernel], list[str]]:
    """Kernels of one compiled file, and what is wrong with it."""
    kernels, faults = read(log)
    faults = [f"{source}: {line}" for line in faults]
    found = {kernel.target for kernel in kernels}
    if kernels and found != TARGETS[rule]:
        faults.append(f"{source}: kernels for {sorted(found)}, expected {sorted(TARGETS[rule])}")
    for kernel in kernels:
        if kernel.spilled and not any(part in kernel.name for part in ALLOWED):
            faults.append(f"{source}: {kernel.target}: {kernel.spilled} bytes spilled by {kernel.name}")
    return kernels, faults


def library_faults(library: Path, targets: set[str]) -> list[str]:
    """The finished library: its size and, where cuobjdump is installed, machine code and PTX in it."""
    size = library.stat().st_size / 2**20
    print(f"{library.name}: {size:.1f} MiB")
    faults = [f"{library} is larger than {LARGEST_MIB} MiB"] if size > LARGEST_MIB else []
    tool = shutil.which("cuobjdump") or find_cuobjdump()
    if tool is None:
        print(
            "cuobjdump is not installed (pip install nvidia-cuda-cuobjdump): the library's own targets are not listed"
        )
        return faults
    for flag, wanted in (("-lelf", targets), ("-lptx", {"sm_80"})):
        listed = subprocess.run([tool, flag, str(library)], check=True, capture_output=True, text=True).stdout
        missing = wanted - set(re.findall(r"\.(sm_\w+)\.", listed))
        faults += [f"{library.name}: cuobjdump {flag} shows nothing for {target}" for target in sorted(missing)]
    return faults


def find_cuobjdump() -> str | None:
    places = [Path(folder) / "nvidia" for folder in sys.path]
    return next((str(tool) for place in places for tool in place.glob("cu*/bin/cuobjdump")), None)


def main(folder: Path) -> int:
    file = folder / "build.ninja"
    if not file.exists():
        print(f"{file} is missing: build the CUDA library first (HF_FLASH_CUDA=1 make build, with nvcc)")
        return 1
    by_target: dict[str, list[Kernel]] = defaultdict(list)
    faults, rules = [], set()
    for target, rule in OBJECT.findall(file.read_text()):
        log = Path(target + ".log")
        if not log.exists():
            faults.append(f"{log} is missing: {target} was not compiled")
            continue
        rules.add(rule)
        kernels, found = faults_of(Path(target).stem, rule, log.read_text())
        faults += found
        for kernel in kernels:
            by_target[kernel.target].append(kernel)
    for target, kernels in sorted(by_target.items()):
        print(f"{target}: {len(kernels)} kernels, at most {max(k.registers for k in kernels)} registers")
    library = folder / "_cuda.abi3.so"
    if not faults:  # a fault above means that the library is of another build, or none
        faults += library_faults(library, {target for rule in rules for target in TARGETS[rule]})
    print("\n".join(faults) if faults else "every target, no spills, no warnings")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/cuda")))
