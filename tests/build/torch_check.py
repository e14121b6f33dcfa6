"""Runs the installed hf_flash under the installed torch: forward and backward against the float64 reference.

Used by torch_matrix.sh in an environment that has torch and the wheel alone. Prints one line a device.
"""

from __future__ import annotations

import sys

import torch

import hf_flash
from hf_flash import ops
from hf_flash.reference import reference_attention


def largest_error(device: str, dtype: torch.dtype) -> float:
    """Largest difference of out, dq, dk and dv from the reference: causal, padded, dropout 0.1, grouped heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 33, 4, 40), (2, 49, 2, 40), (2, 49, 2, 40)]
    exact = [torch.randn(s, generator=generator).to(dtype).double().requires_grad_() for s in shapes]
    given = [t.detach().to(device, dtype).requires_grad_() for t in exact]
    key_range, seed = torch.tensor([[0, 49], [5, 40]], dtype=torch.int32), torch.tensor([7])
    options = {"causal": True, "dropout_p": 0.1}
    wanted, _ = reference_attention(*exact, key_range=key_range, dropout_seed=seed, **options)
    got = hf_flash.flash_attention(*given, key_range=key_range.to(device), dropout_seed=seed.to(device), **options)
    wanted.sum().backward()
    got.sum().backward()
    pairs = [(got, wanted), *((g.grad, e.grad) for g, e in zip(given, exact, strict=True))]
    return max((a.detach().cpu().double() - b.detach()).abs().max().item() for a, b in pairs)


def main() -> int:
    print(f"torch {torch.__version__}, CUDA of torch {torch.version.cuda}, hf_flash {hf_flash.__version__}")
    print(f"  CPU library:  {ops.LIBRARIES['cpu']}")
    print(f"  CUDA library: {ops.LIBRARIES['cuda']}")
    runs = [("cpu", torch.float32, 1e-4), ("cpu", torch.bfloat16, 1e-1)]
    if torch.cuda.is_available() and ops.has_kernel("forward", "cuda"):
        runs.append(("cuda", torch.float16, 2e-2))
    good = torch.version.cuda is None or not ops.LIBRARIES["cuda"].startswith("not loaded: /")
    for device, dtype, limit in runs:
        error = largest_error(device, dtype)
        good &= error < limit
        print(f"  {device} {dtype}: largest error {error:.1e}, allowed {limit:.0e}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
