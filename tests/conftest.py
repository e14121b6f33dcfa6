"""Where tests run: every test that asks for ``device`` runs on the CPU and, marked ``gpu``, on CUDA.

A test that asks for ``dtype`` too runs in each dtype that the device has kernels for. On CUDA it runs once with the
kernels of each architecture that the GPU can run, ``HF_FLASH_ARCH`` set meanwhile; so do tests marked ``gpu`` that name
the device themselves. Nothing here needs the source tree, so the folder also tests an installed wheel.
"""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch

import hf_flash

for shared in (
    "",
    "gpu",
):  # what tests share: attention_rule, attention_fuzz, and the scripts that they run in processes
    sys.path.insert(0, str(Path(__file__).parent / shared))
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_DTYPES = (torch.bfloat16, torch.float16)
MARKERS = """
gpu: needs a CUDA device and the CUDA kernels
large: takes tens of GB of the GPU; runs alone on it
sanitizer: runs compute-sanitizer; needs a CUDA device and the tool
architectures(*names): the kernels to run with on CUDA, instead of all that the GPU runs; "default": the GPU chooses
"""


def pytest_configure(config):
    for line in MARKERS.strip().splitlines():
        config.addinivalue_line("markers", line)


def architectures() -> tuple[str, ...]:
    """Folders of csrc whose kernels this GPU runs, or the one that HF_FLASH_ARCH names; without a GPU all of them."""
    if forced := os.environ.get("HF_FLASH_ARCH"):
        return (forced,)
    hopper = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] == 9
    return ("sm80", "sm90") if hopper else ("sm80",)


HERE = architectures()  # before any test changes the environment


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("architectures")
    names = marker.args if marker else HERE
    if "device" not in metafunc.fixturenames:
        if metafunc.definition.get_closest_marker("gpu"):
            metafunc.parametrize("arch", names, indirect=True)
        return
    cuda = [(arch, "cuda" if arch == "default" else f"cuda-{arch}") for arch in names]
    gpu = (pytest.mark.gpu,)
    if "dtype" in metafunc.fixturenames:
        places = [pytest.param("cpu", None, t, id=f"cpu-{_name(t)}") for t in CPU_DTYPES]
        places += [
            pytest.param("cuda", arch, t, id=f"{place}-{_name(t)}", marks=gpu)
            for arch, place in cuda
            for t in CUDA_DTYPES
        ]
        metafunc.parametrize("device, arch, dtype", places, indirect=["arch"])
    else:
        places = [pytest.param("cuda", arch, id=place, marks=gpu) for arch, place in cuda]
        metafunc.parametrize("device, arch", [pytest.param("cpu", None, id="cpu"), *places], indirect=["arch"])


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") or item.get_closest_marker("sanitizer"):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if not hf_flash.ops.has_kernel("forward", "cuda"):
            pytest.fail(f"a CUDA device but no CUDA kernels: {hf_flash.ops.LIBRARIES['cuda']}")
        arch = item.callspec.params["arch"] if hasattr(item, "callspec") else "default"
        if arch not in (*HERE, "default"):
            pytest.skip(f"the {arch} kernels need another GPU, or another HF_FLASH_ARCH than {' or '.join(HERE)}")


def pytest_collection_finish(session):
    """No collection of garbage goes through the half a million objects of the tests themselves, which takes 0.4 s."""
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown(item):
    """Where several processes share the GPU none keeps much of what its tests have freed."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        gc.collect()
        if torch.cuda.memory_reserved() > 2**30:
            torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def arch(request):
    """The architecture whose kernels serve this test's CUDA calls, its subprocesses' too; None on the CPU."""
    name = getattr(request, "param", None)
    with pytest.MonkeyPatch.context() as environment:
        if name not in (None, "default"):
            environment.setenv("HF_FLASH_ARCH", name)
        yield name


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def plain_dtype(device):
    """One dtype for tests that are not about precision: the widest that the device's kernels take."""
    return torch.float32 if device == "cpu" else torch.float16
