"""Where tests run: every test that asks for ``device`` runs on the CPU and, marked ``gpu``, on CUDA.

A test that asks for ``dtype`` too runs in each dtype that the device has kernels for. Nothing here needs the source
tree, so the folder also tests an installed wheel.
"""

import sys
from pathlib import Path

import pytest
import torch

import hf_flash

sys.path.insert(0, str(Path(__file__).parent))  # what tests share: attention_rule, attention_fuzz
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_DTYPES = (torch.bfloat16, torch.float16)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device and the CUDA kernels")
    config.addinivalue_line("markers", "sanitizer: runs compute-sanitizer; needs a CUDA device and the tool")


def pytest_generate_tests(metafunc):
    if "device" not in metafunc.fixturenames:
        return
    gpu = (pytest.mark.gpu,)
    if "dtype" in metafunc.fixturenames:
        places = [pytest.param("cpu", t, id=f"cpu-{_name(t)}") for t in CPU_DTYPES]
        places += [pytest.param("cuda", t, id=f"cuda-{_name(t)}", marks=gpu) for t in CUDA_DTYPES]
        metafunc.parametrize("device, dtype", places)
    else:
        metafunc.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") or item.get_closest_marker("sanitizer"):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if not hf_flash.ops.has_kernel("forward", "cuda"):
            pytest.fail(f"a CUDA device but no CUDA kernels: {hf_flash.ops.LIBRARIES['cuda']}")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def plain_dtype(device):
    """One dtype for tests that are not about precision: the widest that the device's kernels take."""
    return torch.float32 if device == "cpu" else torch.float16
