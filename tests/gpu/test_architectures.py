"""The kernels of every architecture agree: the same dropout masks, results by the rule, and bits across processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_fuzz import Draw
from attention_rule import Pass, dropped, judge, random_like, run, seed_tensor, unavoidable
from reproducible_gradients import hashes

from hf_flash import flash_attention

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
ON_HOPPER = pytest.mark.architectures("sm90")  # these tests run the others' kernels beside its own


@pytest.fixture
def with_kernels(monkeypatch):
    """with_kernels(arch, function, *arguments): the call with that architecture's kernels."""

    def call(arch, function, *arguments, **options):
        monkeypatch.setenv("HF_FLASH_ARCH", arch)
        return function(*arguments, **options)

    return call


def dropped_in_backward(seed, rows, cols, head_dim, dtype):
    """dv (H, rows, cols) != 0 with dout a slice of the unit matrix: the backward's own mask."""
    q = torch.zeros(1, rows, 2, head_dim, device="cuda", dtype=dtype)
    k = torch.zeros(1, cols, 2, head_dim, device="cuda", dtype=dtype)
    parts = []
    for first in range(0, rows, head_dim):
        v = torch.zeros(1, cols, 2, head_dim, device="cuda", dtype=dtype, requires_grad=True)
        dout = torch.eye(rows + head_dim, device="cuda", dtype=dtype)[:rows, first : first + head_dim]
        out = flash_attention(q, k, v, dropout_p=0.3, dropout_seed=seed)
        out.backward(dout[None, :, None].expand_as(out))
        parts.append(v.grad[0].permute(1, 2, 0)[:, : rows - first])
    return torch.cat(parts, 1) != 0


@ON_HOPPER
@DTYPES
@pytest.mark.parametrize("rows, cols", [(1, 700), (300, 257), (129, 512)])
def test_dropout_masks_are_equal(with_kernels, dtype, rows, cols):
    for value in (1, -(2**63), 0x0123456789ABCDEF):
        arguments = (seed_tensor(value, "cuda"), 2, 3, rows, cols, 0.3, dtype, "cuda")
        assert torch.equal(with_kernels("sm90", dropped, *arguments), with_kernels("sm80", dropped, *arguments))


@ON_HOPPER
@DTYPES
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
def test_dropout_masks_of_the_backward_are_equal(with_kernels, dtype, head_dim):
    arguments = (seed_tensor(99, "cuda"), 300, 210, head_dim, dtype)
    other = with_kernels("sm80", dropped_in_backward, *arguments)
    assert 0.6 < other.float().mean() < 0.8
    assert torch.equal(with_kernels("sm90", dropped_in_backward, *arguments), other)


@ON_HOPPER
@DTYPES
def test_results_agree_by_the_rule(with_kernels, dtype):
    """sm90 is at most twice as far from sm80 as PyTorch's own attention is; 150 random calls of each dtype."""
    for seed in range(10_000, 10_150):
        call = Draw(seed, "cuda", dtype, longest=260)
        qkv, options = (call.q, call.k, call.v), call.options
        exact, plain = (Pass(*qkv, options, precision) for precision in (torch.float64, dtype))
        dout = random_like(exact.results["out"], dtype, 1)
        dlse = random_like(exact.results["lse"], torch.float32, 2)
        theirs = with_kernels("sm80", run, *qkv, options, dout=dout, dlse=dlse)
        ours = with_kernels("sm90", run, *qkv, options, dout=dout, dlse=dlse)
        own = plain.results | plain.gradients(dout, dlse)
        floor = unavoidable(exact, plain, options, dout, dlse)
        for name in ours:
            try:  # twice the floor: either side may be off by it
                judge(name, ours[name], theirs[name].double(), own[name], 2 * floor.get(name, 0.0))
            except AssertionError as error:
                raise AssertionError(f"{error}\nseed {seed}: {call}") from error


def test_deterministic_gradients_have_the_same_bits_in_another_process():
    script = Path(__file__).with_name("reproducible_gradients.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == hashes("cuda")
