"""Reads what ptxas wrote while the CUDA library was built: every kernel on every target, no spills, no warnings.

    python tests/build/check_cuda_build.py build/cuda

Prints one line a target with the number of kernels and the most registers; exits 1 with the kernels that spill, the
files that were not compiled for every target, Hopper's files without a wgmma in their machine code, and a library that
lacks a target or is larger than it may be.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

# Kernels that may spill, by a part of their mangled name, each with its reason. Head dimensions over 128 only.
ALLOWED: dict[str, str] = {
    "sm9014forward_kernelINS0_13ForwardTraitsI6__halfLi256ELb1ELb0E": "O of D 256 takes 128 of 240 registers, beside "
    "dropout's masks: 4 bytes are stored and 16 loaded",
    "sm9014forward_kernelINS0_13ForwardTraitsI13__nv_bfloat16Li256ELb1ELb0E": "as with float16",
}

# What each rule of setup.py compiles for; PTX for newer GPUs comes from the mma.sync kernels' compute_80.
TARGETS = {"nvcc": {"sm_80", "sm_90"}, "nvcc_once": {"sm_80", "sm_90"}, "nvcc_sm90": {"sm_90a"}}
LARGEST_MIB = 25

OBJECT = re.compile(r"^build (\S+\.o): (nvcc\w*) ", re.MULTILINE)
ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
# C7508: setmaxnreg ignored; C7510: wgmma serialised. ptxas calls both information.
WARNING = re.compile(r"warning|C75\d\d|Potential Performance Loss|setmaxnreg", re.IGNORECASE)


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


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit: on the PATH, in /usr/local/cuda, or from PyPI's nvidia-cuda-NAME."""
    places = [Path("/usr/local/cuda/bin")] + [p for folder in sys.path for p in Path(folder).glob("nvidia/cu*/bin")]
    return shutil.which(name) or next((str(place / name) for place in places if (place / name).exists()), None)


def library_faults(library: Path, targets: set[str]) -> list[str]:
    """The finished library: its size and, where cuobjdump is installed, machine code and PTX in it."""
    size = library.stat().st_size / 2**20
    print(f"{library.name}: {size:.1f} MiB")
    faults = [f"{library} is larger than {LARGEST_MIB} MiB"] if size > LARGEST_MIB else []
    tool = find_tool("cuobjdump")
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


def disassembled(tools: tuple[str, str], target: str) -> str:
    """The machine code of one object file as text; nvdisasm, which cuobjdump calls, must be on its PATH."""
    cuobjdump, nvdisasm = tools
    environment = os.environ | {"PATH": f"{Path(nvdisasm).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([cuobjdump, "-sass", target], capture_output=True, text=True, env=environment)
    return done.stdout


def wgmma_faults(source: str, sass: str) -> list[str]:
    """What is wrong with one Hopper file: its machine code holds no warpgroup product."""
    functions = re.split(r"^\s*Function : (\S+)", sass, flags=re.MULTILINE)
    names, bodies = functions[1::2], functions[2::2]
    if not names:
        return [f"{source}: no machine code to read: cuobjdump -sass shows no function"]
    if not any("HGMMA" in body for body in bodies):
        return [f"{source}: no HGMMA in the machine code of {', '.join(names)}"]
    # ptxas 13.0 guarded a reduction in a branch by a predicate that nothing had set: dropout's seed became 0 at times.
    guarded = [name for name, body in zip(names, bodies, strict=True) if re.search(r"@!?U?P\d+ REDUX", body)]
    return [f"{source}: a reduction under a predicate in {name}; move uniform() out of the branch" for name in guarded]


def hopper_faults(objects: list[str]) -> list[str]:
    """What is wrong with the machine code of Hopper's own files: each must multiply by wgmma."""
    if not objects:
        return []
    tools = (find_tool("cuobjdump"), find_tool("nvdisasm"))
    if None in tools:
        return ["Hopper's files cannot be read: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        texts = pool.map(lambda target: disassembled(tools, target), objects)
        found = [wgmma_faults(Path(target).stem, sass) for target, sass in zip(objects, texts, strict=True)]
    print(f"sm_90a: {len(objects)} files read for HGMMA")
    return [fault for faults in found for fault in faults]


def main(folder: Path) -> int:
    file = folder / "build.ninja"
    if not file.exists():
        print(f"{file} is missing: build the CUDA library first (HF_FLASH_CUDA=1 make build, with nvcc)")
        return 1
    by_target: dict[str, list[Kernel]] = defaultdict(list)
    faults, rules, hopper = [], set(), []
    for target, rule in OBJECT.findall(file.read_text()):
        log = Path(target + ".log")
        if not log.exists():
            faults.append(f"{log} is missing: {target} was not compiled")
            continue
        rules.add(rule)
        if rule == "nvcc_sm90":
            hopper.append(target)
        kernels, found = faults_of(Path(target).stem, rule, log.read_text())
        faults += found
        for kernel in kernels:
            by_target[kernel.target].append(kernel)
    for target, kernels in sorted(by_target.items()):
        print(f"{target}: {len(kernels)} kernels, at most {max(k.registers for k in kernels)} registers")
    library = folder / "_cuda.abi3.so"
    if not faults:  # a fault above means that the library is of another build, or none
        faults += hopper_faults(hopper)
        faults += library_faults(library, {target for rule in rules for target in TARGETS[rule]})
    print(
        "\n".join(faults)
        if faults
        else "every target, no spills, no warnings" + ", wgmma in every Hopper file" * bool(hopper)
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/cuda")))
