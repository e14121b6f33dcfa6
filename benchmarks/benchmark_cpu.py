"""Measure hf_flash's CPU kernel against PyTorch's scaled_dot_product_attention on the same cores.

    python benchmarks/benchmark_cpu.py                      # everything, a few minutes on 2 cores
    python benchmarks/benchmark_cpu.py --only plain causal  # some cells

Forward and backward are timed apart, peers taking turns, medians of the rounds. Gflop/s count 4 B H Sq Sk D for the
forward, half of it when causal, and 2.5 times that for the backward. The last lines are the memory that a call of
B2 H12 S8192 D64 takes beyond its inputs, outputs and gradients, read from the process's peak resident size (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from hf_flash import flash_attention


class Case(NamedTuple):
    """One cell: q, k and v of (B, S, H, D), and what else the call has."""

    name: str
    batch: int = 2
    seqlen: int = 1024
    heads: int = 12
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    causal: bool = False
    dropout: float = 0.0
    padding: bool = False
    bias: bool = False

    def flops(self) -> float:
        """Operations of the forward's two products; padding is counted as if it were computed."""
        return 4.0 * self.batch * self.heads * self.seqlen**2 * self.head_dim / (2 if self.causal else 1)


CASES = [
    Case("plain"),
    Case("causal", causal=True),
    Case("short", batch=8, seqlen=128),
    Case("long", batch=1, seqlen=4096),
    Case("one head", batch=1, heads=1, seqlen=4096),
    Case("D 128", heads=6, head_dim=128),
    Case("bfloat16", dtype=torch.bfloat16),
    Case("float16", dtype=torch.float16),
    Case("float64", seqlen=512, dtype=torch.float64),
    Case("padding", padding=True),
    Case("dropout", dropout=0.1),
    Case("bias", bias=True),
]


def tensors_of(case: Case) -> dict[str, torch.Tensor]:
    """Inputs with gradients, dout, and what the case asks for beside them."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(case.dtype)

    shape = (case.batch, case.seqlen, case.heads, case.head_dim)
    tensors = {name: random(*shape).requires_grad_() for name in "qkv"} | {"dout": random(*shape)}
    if case.bias:
        tensors["bias"] = random(1, case.heads, case.seqlen, case.seqlen).requires_grad_()
    if case.padding:  # lengths S/2 to S
        tensors["lengths"] = torch.linspace(case.seqlen // 2, case.seqlen, case.batch).int()
    return tensors


def ours(case: Case, t: dict[str, torch.Tensor]) -> torch.Tensor:
    """hf_flash, padding as a key range."""
    ranges = None
    if case.padding:
        ranges = torch.stack([torch.zeros_like(t["lengths"]), t["lengths"]], dim=1)
    return flash_attention(
        t["q"], t["k"], t["v"], causal=case.causal, bias=t.get("bias"), dropout_p=case.dropout, key_range=ranges
    )


def torchs(case: Case, t: dict[str, torch.Tensor]) -> torch.Tensor:
    """scaled_dot_product_attention as PyTorch dispatches it, padding as a mask."""
    mask = t.get("bias")
    if case.padding:
        mask = (torch.arange(case.seqlen) < t["lengths"][:, None])[:, None, None, :]
    q, k, v = (t[name].transpose(1, 2) for name in "qkv")
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=case.causal, dropout_p=case.dropout)
    return out.transpose(1, 2)


PEERS = {"hf_flash": ours, "sdpa": torchs}


def measure(case: Case, rounds: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of forward and backward for each peer, which take turns."""
    tensors = tensors_of(case)
    leaves = [t for t in tensors.values() if t.requires_grad]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in PEERS}
    for turn in range(rounds + 1):  # the first warms up
        for name, call in PEERS.items():
            start = time.perf_counter()
            out = call(case, tensors)
            middle = time.perf_counter()
            torch.autograd.grad(out, leaves, tensors["dout"])
            if turn:
                times[name].append((1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)))
    return {name: tuple(statistics.median(t) for t in zip(*runs, strict=True)) for name, runs in times.items()}


def report(case: Case, rounds: int) -> dict:
    """Prints a row and returns it."""
    result = measure(case, rounds)
    row = {"case": case.name, "dtype": str(case.dtype).removeprefix("torch.")}
    row |= {key: getattr(case, key) for key in ("batch", "seqlen", "heads", "head_dim", "causal", "dropout")}
    for name, (forward, backward) in result.items():
        row |= {f"{name}_fwd_ms": forward, f"{name}_bwd_ms": backward}
    (our_fwd, our_bwd), (their_fwd, their_bwd) = result["hf_flash"], result["sdpa"]
    print(
        f"{case.name:10}{our_fwd:9.2f}{their_fwd:9.2f}{their_fwd / our_fwd:7.2f}{case.flops() / our_fwd / 1e6:8.0f}  "
        f"{our_bwd:9.2f}{their_bwd:9.2f}{their_bwd / our_bwd:7.2f}{2.5 * case.flops() / our_bwd / 1e6:8.0f}",
        flush=True,
    )
    return row


def peak_bytes(start: bool = False) -> int:
    """Peak resident bytes of this process since the last ``start`` (Linux)."""
    if start:
        Path("/proc/self/clear_refs").write_text("5")
    field = "VmRSS" if start else "VmHWM"
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def workspace(dtype: torch.dtype) -> None:
    """Prints what forward and backward of B2 H12 S8192 D64 take beyond inputs, outputs and gradients."""
    q, k, v, dout = (torch.randn(2, 8192, 12, 64).to(dtype).requires_grad_(i < 3) for i in range(4))
    flash_attention(*(t[:, :64] for t in (q, k, v))).sum()  # threads and libraries
    before = peak_bytes(start=True)
    out = flash_attention(q, k, v, causal=True)
    forward = peak_bytes() - before - out.nbytes - 4 * out.numel() // 64
    before = peak_bytes(start=True)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    backward = peak_bytes() - before - sum(t.nbytes for t in gradients)
    name = str(dtype).removeprefix("torch.")
    print(f"{name:10} q {q.nbytes / 2**20:.1f} MiB, forward {forward / 2**20:.1f}, backward {backward / 2**20:.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--only", nargs="+", choices=names, metavar="CASE", help=f"some of: {', '.join(names)}")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each cell (default 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch's pool")
    parser.add_argument("--memory-only", choices=("float32", "bfloat16"), help="no times, memory in one dtype")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    options = parser.parse_args()
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    torch.set_num_threads(options.threads)
    if options.memory_only:
        workspace(getattr(torch, options.memory_only))
        return 0
    print(f"torch {torch.__version__}, {options.threads} threads, {platform.processor() or platform.machine()}")
    print("ms of hf_flash and of scaled_dot_product_attention, how many times as fast hf_flash is, its Gflop/s")
    columns = "".join(f"{name:>9}{'sdpa':>9}{'ratio':>7}{'Gflop/s':>8}  " for name in ("forward", "backward"))
    print(f"{'':10}{columns}")
    rows = [report(case, options.rounds) for case in CASES if case.name in (options.only or names)]
    if not options.only and Path("/proc/self/clear_refs").exists():
        print("\nextra memory of one call, causal, B2 H12 S8192 D64", flush=True)
        # In processes of their own, where glibc gives freed blocks back, so that none is reused unseen.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        for dtype in ("float32", "bfloat16"):
            command = [sys.executable, __file__, "--memory-only", dtype, "--threads", str(options.threads)]
            subprocess.run(command, env=environment, check=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
