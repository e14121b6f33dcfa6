"""Hashes of the bits that deterministic calls give, one a line; run in a second process by test_architectures.py."""

import hashlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from attention_rule import int32, make_qkv, run, seed_tensor


def calls(device, dtype):
    """(q, k, v, options) with many tiles a row, so that another order of the sums would show."""
    dropout = {"dropout_p": 0.1, "dropout_seed": seed_tensor(5, device)}
    generator = torch.Generator().manual_seed(3)
    bias = torch.randn(2, 8, 900, 1000, generator=generator).to(device)
    sink = torch.randn(8, generator=generator).to(device)
    for head_dim in (64, 128, 256):
        qkv = make_qkv(device, dtype, 2, 900, 1000, heads=8, heads_k=2, head_dim=head_dim)
        yield *qkv, {"causal": True} | dropout
        yield *qkv, {"bias": bias, "sink": sink, "key_range": int32([[3, 700], [0, 1000]], device)}
    q, k, v = make_qkv(device, dtype, None, 1500, 1500, heads=8, heads_k=2, head_dim=64)
    starts = int32([0, 700, 703, 1500], device)
    yield q, k, v, {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 797, "max_seqlen_k": 797} | dropout


def hashes(device):
    """One hash for each result and gradient of each call."""
    found = []
    for q, k, v, options in calls(device, torch.bfloat16):
        results = run(q, k, v, options | {"deterministic": True})
        found += [hashlib.sha256(t.float().cpu().numpy().tobytes()).hexdigest() for t in results.values()]
    return found


if __name__ == "__main__":
    print("\n".join(hashes(sys.argv[1] if len(sys.argv) > 1 else "cuda")))
