"""Tensors of more than 2^31 elements. `make gpu-test` runs them when nothing else is on the GPU."""

import pytest
import torch

from hf_flash import flash_attention

pytestmark = [pytest.mark.gpu, pytest.mark.large]


def large_enough(gib):
    free, _ = torch.cuda.mem_get_info()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory, {free / 2**30:.0f} are free")


@pytest.mark.parametrize("where", ["rows", "batch", "packed"])
def test_tensors_of_more_than_two_to_the_31_elements(where):
    """Offsets beyond 32 bits: the last rows of a huge tensor agree with the same rows alone."""
    large_enough(24)
    heads, dim = 16, 64
    if where == "batch":  # 2.2e9 elements in short sequences
        shape, last = (2100 * 8, 128, heads, dim), (slice(-1, None),)
    elif where == "rows":  # stride 0 in the heads of k and v: one long sequence, few keys
        shape, last = (1, 2**21 + 2**17, heads, dim), (slice(None), slice(-200, None))
    else:
        shape, last = (2**21 + 2**17, heads, dim), (slice(-200, None),)
    q = torch.empty(shape, device="cuda", dtype=torch.float16).normal_()
    assert q.numel() > 2**31
    tail = q[last]
    if where == "batch":
        got, want = flash_attention(q, q, q)[last], flash_attention(tail, tail, tail)
    elif where == "rows":
        k = torch.randn(1, 200, heads, dim, device="cuda", dtype=torch.float16)
        got, want = flash_attention(q, k, k)[last], flash_attention(tail, k, k)
    else:
        count = shape[0] // 200 * 200
        starts = torch.arange(0, count + 1, 200, device="cuda", dtype=torch.int32) + (shape[0] - count)
        lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 200, "max_seqlen_k": 200}
        got, want = flash_attention(q, q, q, **lengths)[last], flash_attention(tail[None], tail[None], tail[None])[0]
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)


def test_gradients_of_more_than_two_to_the_31_elements():
    large_enough(40)
    shape = (2100 * 8, 128, 16, 64)
    q = torch.empty(shape, device="cuda", dtype=torch.float16).normal_().requires_grad_()
    flash_attention(q, q, q, causal=True).sum().backward()
    tail = q.detach()[-1:].clone().requires_grad_()
    flash_attention(tail, tail, tail, causal=True).sum().backward()
    torch.testing.assert_close(q.grad[-1:], tail.grad, rtol=2e-2, atol=2e-2)
