"""``python -m hf_flash doctor | bench | explain``: what is installed, how fast it is, what it does to a model."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from . import ops, support
from .version import __version__

# Feature -> keywords of flash_attention that use it, made for q of (1, 16, 4, D).
_FEATURES = {
    "head dim 64": lambda q: {},
    "head dim 128": lambda q: {},
    "head dim 256": lambda q: {},
    "head dim 40": lambda q: {},
    "causal, windows": lambda q: {"causal": True, "window": (8, 0)},
    "dropout": lambda q: {"dropout_p": 0.1},
    "key ranges": lambda q: {"key_range": q.new_tensor([[0, 9]], dtype=torch.int32)},
    "query ranges": lambda q: {"query_range": q.new_tensor([[0, 9]], dtype=torch.int32)},
    "packed batches": lambda q: {},
    "grouped-query heads": lambda q: {},
    "softcap": lambda q: {"softcap": 30.0},
    "ALiBi": lambda q: {"alibi_slopes": q.new_ones(4, dtype=torch.float32)},
    "bool mask": lambda q: {"mask": q.new_ones(1, 1, 16, 16, dtype=torch.bool)},
    "bias with gradient": lambda q: {"bias": q.new_zeros(1, 4, 16, 16)},
    "sink with gradient": lambda q: {"sink": q.new_zeros(4)},
    "deterministic backward": lambda q: {"deterministic": True},
}


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver_version() -> str:
    """The kernel module's own word, as nvidia-smi shows it; "version unknown" in containers that hide it."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "version unknown"
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else "version unknown"


def _served(feature: str, device: str, dtype: torch.dtype) -> str | support.Unsupported:
    """The folder of csrc whose kernels serve the feature, or the reason why none does."""
    head_dim = int(feature.split()[-1]) if feature.startswith("head dim") else 64
    q = torch.zeros(1, 16, 4, head_dim, device=device, dtype=dtype)
    k = q[:, :, :2] if feature.startswith("grouped") else q
    keywords = _FEATURES[feature](q)
    if feature == "packed batches":
        q, k = q[0], k[0]
        bounds = torch.tensor([0, 7, 16], dtype=torch.int32, device=device)
        keywords = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": 9, "max_seqlen_k": 9}
    return support.unsupported(q, k, k, **keywords) or support.kernel_name(q.device)


def doctor() -> int:
    """Prints versions, libraries, GPUs and which kernel serves which feature."""
    print(f"hf_flash      {__version__} ({Path(__file__).parent})")
    print(f"python        {platform.python_version()} on {platform.machine()}")
    for package in ("torch", "transformers", "accelerate"):
        print(f"{package:13} {_version_of(package)}")
    print(f"CPU library   {ops.LIBRARIES['cpu']}")
    print(f"CUDA library  {ops.LIBRARIES['cuda']}")
    built, driver = ops.cuda_versions()
    if built:
        print(f"  built with CUDA {built // 1000}.{built % 1000 // 10}, torch has CUDA {torch.version.cuda}")
        runs = (
            f"{_driver_version()}, runs CUDA up to {driver // 1000}.{driver % 1000 // 10}" if driver else "none found"
        )
        needs = "; CUDA 13 builds need 580 or newer" if built >= 13000 else ""
        print(f"  NVIDIA driver: {runs}{needs}")
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if len(devices) == 1:
        print("GPU           none that torch can see")
    for device in devices[1:]:
        major, minor = torch.cuda.get_device_capability(device)
        print(f"GPU {device:9} {torch.cuda.get_device_name(device)}, compute capability {major}.{minor}")
    if forced := os.environ.get("HF_FLASH_ARCH"):
        print(f"HF_FLASH_ARCH {forced} forces the kernels of one folder; a call that they cannot serve raises")
    for device in devices:
        _features_of(device)
    return 0


def _features_of(device: str) -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    print(f"\nfeature on {device:13}" + "".join(f"{str(d).removeprefix('torch.'):>10}" for d in dtypes))
    reasons: dict[str, str] = {}
    for feature in _FEATURES:
        cells = []
        for dtype in dtypes:
            served = _served(feature, device, dtype)
            if isinstance(served, support.Unsupported):
                reasons[served.code] = served.sentence
                served = served.code
            cells.append(served)
        print(f"{feature:24}" + "".join(f"{cell:>10}" for cell in cells))
    for code, sentence in reasons.items():
        print(f"  {code}: {sentence}")


def bench(arguments: list[str]) -> int:
    """Runs the repository's benchmark of this machine: the GPU's where there is one, else the CPU's."""
    folder = Path(__file__).parent.parent / "benchmarks"
    script = folder / ("benchmark_flash_attention.py" if torch.cuda.is_available() else "benchmark_cpu.py")
    if not script.exists():
        print(f"hf_flash: {script} is missing: benchmarks belong to the repository, not to the wheel; run from a clone")
        return 1
    return subprocess.run([sys.executable, str(script), *arguments]).returncode


def explain(name: str) -> int:
    """Loads a model and prints what patch_model does to each of its layers."""
    try:
        from transformers import AutoModel
    except ImportError:
        print("hf_flash: `explain` needs transformers; pip install 'hf_flash[transformers]'")
        return 1
    from . import explain as report
    from . import patch_model

    try:
        model = AutoModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        print(f"hf_flash: cannot load a model from {name!r}: {str(error).splitlines()[0]}")
        return 1
    print(report(patch_model(model)))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hf_flash", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="versions, GPU, libraries, and which kernel serves which feature")
    commands.add_parser("bench", help="run the benchmark; further arguments go to its script", add_help=False)
    commands.add_parser("explain", help="load a model and print its patch report").add_argument("model")
    arguments, rest = parser.parse_known_args()
    if arguments.command == "bench":
        return bench(rest)
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    return doctor() if arguments.command == "doctor" else explain(arguments.model)


if __name__ == "__main__":
    sys.exit(main())
