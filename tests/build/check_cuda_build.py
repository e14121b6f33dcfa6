"""Reads what ptxas wrote while the CUDA library was built: every kernel on every target, no spills, no warnings.

    python tests/build/check_cuda_build.py build/cuda

Prints one line a target with the number of kernels and the most registers; exits 1 with the kernels that spill.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

# Kernels that may spill, by a part of their name, each with its reason. Head dimensions over 128 only.
ALLOWED: dict[str, str] = {}

TARGETS = {"sm_80", "sm_90"}  # what the mma.sync kernels are compiled to; PTX for newer GPUs comes from sm_80's

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
WARNING = re.compile(r"warning|C7508|setmaxnreg", re.IGNORECASE)


def read(log: Path) -> tuple[dict[str, list[tuple[str, int, int]]], list[str]]:
    """Kernels by target as (name, spilled bytes, registers), and the lines that warn."""
    kernels, warnings, name, target, spilled = defaultdict(list), [], "", "", 0
    for line in log.read_text().splitlines():
        if match := ENTRY.search(line):
            name, target = match.groups()
        elif match := SPILL.search(line):
            spilled = int(match[1]) + int(match[2])
        elif match := REGISTERS.search(line):
            if name:
                kernels[target].append((name, spilled, int(match[1])))
            name, spilled = "", 0
        elif WARNING.search(line):
            warnings.append(f"{log.name}: {line}")
    return kernels, warnings


def main(folder: Path) -> int:
    logs = sorted(folder.glob("objects/*.log"))
    if not logs:
        print(f"no compiler logs under {folder}/objects: build the CUDA library first (make build, with nvcc)")
        return 1
    kernels, faults = defaultdict(list), []
    for log in logs:
        found, warnings = read(log)
        faults += warnings
        for target, entries in found.items():
            kernels[target] += entries
        if found and not log.name.startswith("sm90") and set(found) != TARGETS:
            faults.append(f"{log.name}: compiled for {sorted(found)}, expected {sorted(TARGETS)}")
    for target, entries in sorted(kernels.items()):
        print(f"{target}: {len(entries)} kernels, at most {max(r for *_, r in entries)} registers")
        for name, spilled, _ in entries:
            if spilled and not any(part in name for part in ALLOWED):
                faults.append(f"{target}: {spilled} bytes spilled by {name}")
    print("\n".join(faults) if faults else "no spills, no warnings")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
