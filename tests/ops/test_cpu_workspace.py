"""The CPU kernels work block by block: at S 8192 a call's extra memory stays under a quarter of q's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own: the peak resident size counts everything that touches memory meanwhile. The threshold makes
# glibc give freed blocks back to the system, so that none is reused unseen.
ENVIRONMENT = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
MEASURE = """
import sys, torch
from hf_flash import flash_attention

def resident(field, reset=False):
    if reset:
        open("/proc/self/clear_refs", "w").write("5")
    return 1024 * int(open("/proc/self/status").read().split(field + ":")[1].split()[0])

def measure(seqlen, dtype):
    shape = (2, seqlen, 12, 64)
    q, k, v, dout = (torch.full(shape, 0.1, dtype=dtype).requires_grad_(i < 3) for i in range(4))
    calls = {"window": {"window": (256, 0)}, "key_range": {"key_range": torch.tensor([[0, 900], [0, 700]]).int()}}
    options = calls[sys.argv[2]]
    before = resident("VmRSS", reset=True)
    out, lse = flash_attention(q, k, v, return_lse=True, **options)
    forward = resident("VmHWM") - before - out.nbytes - lse.nbytes
    before = resident("VmRSS", reset=True)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    backward = resident("VmHWM") - before - sum(t.nbytes for t in gradients)
    return forward, backward, q.nbytes

dtype = getattr(torch, sys.argv[1])
measure(128, dtype)
print(*measure(8192, dtype))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's record of resident memory")
@pytest.mark.parametrize("call", ["window", "key_range"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_extra_memory_is_under_a_quarter_of_q(dtype, call):
    run = subprocess.run([sys.executable, "-c", MEASURE, dtype, call], env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    forward, backward, q = map(int, run.stdout.split())
    assert forward < q / 4, f"forward took {forward / 2**20:.1f} MiB beyond its results, q has {q / 2**20:.1f}"
    assert backward < q / 4, f"backward took {backward / 2**20:.1f} MiB beyond its results, q has {q / 2**20:.1f}"
