"""Builds hf_flash/_cpu.abi3.so, and hf_flash/_cuda.abi3.so where nvcc is found, with ninja.

Environment: HF_FLASH_CUDA=0|1 forces the CUDA library off or on; MAX_JOBS limits the compilers that run at once; CXX,
CUDA_HOME and, for nvcc's own, NVCC_CCBIN choose them. Both libraries use torch's stable ABI alone and no Python symbol:
one build serves every torch from 2.10 and every Python from 3.10 on. Objects stay in build/ for the next build.
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
CXX = os.environ.get("CXX", "c++")
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
HOST = "-std=c++17 -fPIC -fvisibility=hidden -Wall"
# fast-math's harmless parts only: infinities and NaN keep their meaning, which the contract needs.
CPU = "-O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast -DHF_FLASH_CPU"
# Line tables made the library three times as large, and what is left compresses to less than half.
NVCC = "-O3 -std=c++17 --compress-mode=size -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v"
# mma.sync kernels: machine code for Ampere and Hopper, PTX for what comes later. Hopper's own kernels need sm_90a.
GENCODE = "-gencode arch=compute_80,code=[sm_80,compute_80] -gencode arch=compute_90,code=sm_90"
GENCODE_ONCE = "-gencode arch=compute_80,code=[sm_80,sm_90,compute_80]"  # of those that use nothing of sm_90's own
PYPI_NVCC = ["nvidia-cuda-nvcc>=13", "nvidia-cuda-runtime>=13", "nvidia-cuda-cccl>=13"]


def say(text: str) -> None:
    print(f"hf_flash: {text}", file=sys.stderr, flush=True)


def package_folders(name: str) -> list[Path]:
    """Folders of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    return [Path(folder) for folder in spec.submodule_search_locations] if spec else []


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, of the PATH, of /usr/local/cuda, or of PyPI's nvidia-cuda-nvcc."""
    candidates = [Path(os.environ["CUDA_HOME"]) / "bin/nvcc"] if "CUDA_HOME" in os.environ else []
    candidates += [Path(found) for found in [shutil.which("nvcc")] if found] + [Path("/usr/local/cuda/bin/nvcc")]
    candidates += [nvcc for folder in package_folders("nvidia") for nvcc in sorted(folder.glob("cu*/bin/nvcc"))]
    return next((path for path in candidates if path.exists()), None)


def decide_cuda() -> tuple[bool, Path | None]:
    """(build the CUDA library, with which nvcc); says what was decided and why."""
    choice, nvcc = os.environ.get("HF_FLASH_CUDA", ""), find_nvcc()
    if choice not in ("", "0", "1"):
        sys.exit(f"hf_flash: HF_FLASH_CUDA is {choice!r}; it must be 0 (no CUDA library), 1 (must have it) or unset")
    if choice == "0":
        say("building without CUDA: HF_FLASH_CUDA=0")
    elif nvcc:
        say(f"building with CUDA: nvcc is {nvcc}")
    elif choice == "":
        say("building without CUDA: no nvcc in CUDA_HOME, on the PATH, in /usr/local/cuda or from nvidia-cuda-nvcc")
    return choice == "1" or (choice == "" and nvcc is not None), nvcc


def jobs() -> int:
    """Compilers at once: MAX_JOBS, else one a core, held to one for each 3 GB of memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return int(os.environ.get("MAX_JOBS", 0)) or max(1, min(len(os.sched_getaffinity(0)), int(memory / 3)))


class NinjaFile:
    """Rules and build lines of one library; its objects, logs and build.ninja lie in ``folder``."""

    def __init__(self, folder: Path):
        self.folder, self.lines, self.objects = folder, [], []

    def compiler(self, name: str, command: str, log: bool = False) -> None:
        """A rule that compiles one file; with ``log`` the compiler's words go to OBJECT.log, shown on failure."""
        command = f"{command} -MMD -MF $out.d -c $in -o $out"
        command += " > $out.log 2>&1 || (cat $out.log; false)" if log else ""
        self.lines.append(f"rule {name}\n  command = {command}\n  depfile = $out.d\n  deps = gcc")

    def compile(self, rule: str, source: Path) -> None:
        self.objects.append(str(self.folder / "objects" / f"{source.stem}_{rule}.o"))
        self.lines.append(f"build {self.objects[-1]}: {rule} {source}")

    def link(self, command: str, library: Path) -> None:
        self.lines.append(f"rule link\n  command = {command}\nbuild {library}: link {' '.join(self.objects)}\n")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines))
        ninja = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
        if subprocess.run([ninja, "-C", str(self.folder), "-j", str(jobs())]).returncode:
            sys.exit(f"hf_flash: {library.name} could not be built; the compiler's message stands above")


def build_cpu(folder: Path, torch: Path, library: Path) -> None:
    file = NinjaFile(folder)
    file.compiler("cxx", f"{CXX} {HOST} {CPU} {TORCH_TARGET} -I{CSRC} -isystem {torch}/include")
    for source in [CSRC / "bindings.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]:
        file.compile("cxx", source)
    # torch's symbols are not global when Python loads it, so the library itself must name torch's libraries.
    file.link(f"{CXX} -shared -s $in -o $out -Wl,-z,defs -L{torch}/lib -Wl,--no-as-needed -ltorch -ltorch_cpu", library)


def build_cuda(folder: Path, torch: Path, library: Path, nvcc: Path) -> None:
    sys.path.insert(0, str(CSRC))
    import instances

    file = NinjaFile(folder)
    toolkit = nvcc.resolve().parent.parent  # PyPI's toolkit has lib where nvcc looks for lib64
    file.compiler("cxx", f"{CXX} {HOST} -O2 -DHF_FLASH_CUDA {TORCH_TARGET} -I{CSRC} -isystem {torch}/include")
    flags = f"{NVCC} {os.environ.get('NVCC_APPEND_FLAGS', '')}".rstrip()  # which nvcc reads: ninja must see them
    file.compiler("nvcc", f"{nvcc} {flags} -I{CSRC} {GENCODE}", log=True)
    file.compiler("nvcc_sm90", f"{nvcc} {flags} -I{CSRC} -gencode arch=compute_90a,code=sm_90a", log=True)
    file.compiler("nvcc_once", f"{nvcc} {flags} -I{CSRC} {GENCODE_ONCE}", log=True)
    for path in map(Path, instances.generate(folder)):
        file.compile("nvcc_sm90" if "sm90" in path.name else "nvcc" if "backward" in path.name else "nvcc_once", path)
    for source in [CSRC / "dispatch.cu", *sorted(CSRC.glob("portable/*.cu")), *sorted(CSRC.glob("sm90/*.cu"))]:
        file.compile("nvcc", source)
    file.compile("cxx", CSRC / "bindings.cpp")
    libraries = f"-L{toolkit}/lib -L{torch}/lib -Xlinker --no-as-needed -ltorch -ltorch_cpu -Xlinker -z,defs,-s"
    file.link(f"{nvcc} -shared -nodlink -cudart static $in -o $out {libraries}", library)


class Build(build_ext):
    """Each extension is a library of operators that hf_flash/ops.py loads; neither is a Python module."""

    def run(self) -> None:
        for library in Path(self.build_lib).glob("hf_flash/_*.so"):
            library.unlink()  # an earlier build's: with HF_FLASH_CUDA=0 its CUDA library must not get into the wheel
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".abi3.so"

    def build_extension(self, extension: Extension) -> None:
        name = extension.name.rsplit("_", 1)[1]
        if name == "cuda" and NVCC_PATH is None:
            sys.exit(f"hf_flash: HF_FLASH_CUDA=1, but no nvcc: set CUDA_HOME or pip install {' '.join(PYPI_NVCC)}")
        folder, torch = ROOT / "build" / name, package_folders("torch")[0]
        library = folder / f"_{name}.abi3.so"
        build_cpu(folder, torch, library) if name == "cpu" else build_cuda(folder, torch, library, NVCC_PATH)
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a running process keeps the file that it has mapped
        shutil.copy2(library, target)
        say(f"built {target.name}, {target.stat().st_size / 2**20:.1f} MiB; objects and compiler output in {folder}")


if sys.platform != "linux":
    sys.exit(f"hf_flash: builds on Linux only, and this is {sys.platform}")
WITH_CUDA, NVCC_PATH = decide_cuda()
setup(
    ext_modules=[
        Extension(f"hf_flash._{name}", sources=[], py_limited_api=True) for name in ["cpu", "cuda"][: 1 + WITH_CUDA]
    ],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    setup_requires=PYPI_NVCC if WITH_CUDA and NVCC_PATH is None else [],  # isolated builds; beside pyproject.toml's
)
