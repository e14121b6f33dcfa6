"""Builds hf_flash/_cpu.abi3.so, and hf_flash/_cuda.abi3.so where nvcc is found, with ninja.

Environment: HF_FLASH_CUDA=0|1 forces the CUDA library off or on; MAX_JOBS limits parallel compilers.
Both libraries use torch's stable ABI alone: one build serves every torch from 2.10 and every Python from 3.10 on.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
# mma.sync kernels: machine code for Ampere and Hopper, PTX for what comes later. Hopper's own kernels need sm_90a.
GENCODE = "-gencode arch=compute_80,code=[sm_80,compute_80] -gencode arch=compute_80,code=sm_90"
GENCODE_SM90 = "-gencode arch=compute_90a,code=sm_90a"


def say(text: str) -> None:
    print(f"hf_flash: {text}", file=sys.stderr, flush=True)


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, of the PATH, of /usr/local/cuda, or of PyPI's nvidia-cuda-nvcc."""
    candidates = [Path(os.environ["CUDA_HOME"]) / "bin/nvcc"] if "CUDA_HOME" in os.environ else []
    candidates += [Path(found) for found in [shutil.which("nvcc")] if found] + [Path("/usr/local/cuda/bin/nvcc")]
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        candidates += sorted(Path(folder).glob("cu*/bin/nvcc"))
    return next((path for path in candidates if path.exists()), None)


def wants_cuda() -> Path | None:
    """The nvcc to use, or None; says what was decided and why."""
    choice, nvcc = os.environ.get("HF_FLASH_CUDA", ""), find_nvcc()
    if choice == "0":
        say("building without CUDA: HF_FLASH_CUDA=0")
    elif nvcc is not None:
        say(f"building with CUDA: nvcc is {nvcc}")
        return nvcc
    elif choice == "1":
        sys.exit("hf_flash: HF_FLASH_CUDA=1, but no nvcc was found: set CUDA_HOME or pip install nvidia-cuda-nvcc")
    else:
        say("building without CUDA: no nvcc in CUDA_HOME, on the PATH, in /usr/local/cuda or from nvidia-cuda-nvcc")
    return None


def torch_folder() -> Path:
    return Path(importlib.util.find_spec("torch").submodule_search_locations[0])


def cutlass_include() -> Path | None:
    spec = importlib.util.find_spec("cutlass_library")
    return Path(spec.submodule_search_locations[0]) / "source/include" if spec else None


def jobs() -> int:
    """Compilers at once: MAX_JOBS, else one a core, held to one for each 3 GB of memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return int(os.environ.get("MAX_JOBS", 0)) or max(1, min(os.cpu_count() or 1, int(memory / 3)))


class NinjaFile:
    """Collects rules and build lines for one library."""

    def __init__(self, folder: Path, common: str):
        self.folder, self.lines, self.objects = folder, [f"common = {common}"], []

    def rule(self, name: str, command: str, deps: bool = True) -> None:
        depfile = "\n  depfile = $out.d\n  deps = gcc" if deps else ""
        self.lines.append(f"rule {name}\n  command = {command}{depfile}\n  description = {name} $out")

    def compile(self, rule: str, source: Path) -> None:
        target = self.folder / "objects" / (source.stem + "_" + rule + ".o")
        self.lines.append(f"build {target}: {rule} {source}")
        self.objects.append(str(target))

    def link(self, rule: str, library: Path) -> None:
        self.lines.append(f"build {library}: {rule} {' '.join(self.objects)}\n")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines))
        ninja = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
        subprocess.run([ninja, "-C", str(self.folder), "-j", str(jobs())], check=True)


def cpu_library(folder: Path, library: Path) -> None:
    torch = torch_folder()
    file = NinjaFile(folder, f"-O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -I{CSRC} -isystem {torch}/include")
    flags = f"-DHF_FLASH_CPU {TORCH_TARGET} -fno-math-errno -fno-trapping-math -ffp-contract=fast"
    cxx = os.environ.get("CXX", "c++")
    file.rule("cxx", f"{cxx} -MMD -MF $out.d $common {flags} -c $in -o $out")
    file.rule(
        "link", f"{cxx} -shared -s $in -o $out -L{torch}/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10", deps=False
    )
    for source in [CSRC / "bindings.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]:
        file.compile("cxx", source)
    file.link("link", library)


def cuda_library(folder: Path, library: Path, nvcc: Path) -> None:
    sys.path.insert(0, str(CSRC))
    import instances

    torch, cutlass = torch_folder(), cutlass_include()
    file = NinjaFile(folder, f"-I{CSRC} " + (f"-isystem {cutlass}" if cutlass else ""))
    cxx = os.environ.get("CXX", "c++")
    host = "-fPIC,-fvisibility=hidden"
    common = f"{nvcc} -MMD -MF $out.d -std=c++17 -O3 -lineinfo -Xcompiler {host} -Xptxas -v $common"
    file.rule(
        "cxx",
        f"{cxx} -MMD -MF $out.d -O2 -std=c++17 -fPIC -fvisibility=hidden -DHF_FLASH_CUDA {TORCH_TARGET} $common "
        f"-isystem {torch}/include -c $in -o $out",
    )
    file.rule("nvcc", f"{common} {GENCODE} -c $in -o $out > $out.log 2>&1 || (cat $out.log; false)")
    file.rule("nvcc_sm90", f"{common} {GENCODE_SM90} -c $in -o $out > $out.log 2>&1 || (cat $out.log; false)")
    file.rule(
        "link",
        f"{nvcc} -shared -cudart static $in -o $out -L{torch}/lib -Xlinker --no-as-needed -ltorch -Xlinker -s",
        deps=False,
    )
    for source in map(Path, instances.generate(folder)):
        file.compile("nvcc_sm90" if source.name.startswith("sm90") else "nvcc", source)
    for source in [CSRC / "dispatch.cu", *sorted((CSRC / "portable").glob("*.cu"))]:
        file.compile("nvcc", source)
    file.compile("cxx", CSRC / "bindings.cpp")
    file.link("link", library)


class Build(build_ext):
    """Each extension is a library of operators that hf_flash/ops.py loads; neither is a Python module."""

    def build_extension(self, extension: Extension) -> None:
        library = Path(self.get_ext_fullpath(extension.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        name = extension.name.rsplit("_", 1)[1]
        folder = ROOT / "build" / name
        if name == "cuda":
            cuda_library(folder, library, NVCC)
        else:
            cpu_library(folder, library)
        say(f"built {library.name}, {library.stat().st_size / 2**20:.1f} MiB; compiler output in {folder}")


NVCC = wants_cuda()
NAMES = ["hf_flash._cpu", *(["hf_flash._cuda"] if NVCC else [])]
setup(
    ext_modules=[Extension(name, sources=[], py_limited_api=True) for name in NAMES],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
