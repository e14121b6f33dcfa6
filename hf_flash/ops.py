"""The compiled operators as torch sees them: loading, shapes without data, and autograd.

``torch.ops.hf_flash.forward`` and ``backward`` come from ``csrc/bindings.cpp``. ``attention`` below puts one
``torch.autograd.Function`` around them, which costs a call less host time than ``torch.library.register_autograd``.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import torch

_FOLDER = Path(__file__).parent
LIBRARIES: dict[str, str] = {}  # which library was loaded, or the sentence why not, under "cpu" and "cuda"


def _load() -> None:
    cpu = _FOLDER / "_cpu.abi3.so"
    if not cpu.exists():
        raise ImportError(
            f"hf_flash is not built: {cpu} is missing. Install it with `pip install .` from the repository, or build "
            "in place with `pip install --no-build-isolation -e .`."
        )
    torch.ops.load_library(cpu)
    LIBRARIES["cpu"] = str(cpu)
    cuda = _FOLDER / "_cuda.abi3.so"
    if torch.version.cuda is None:
        LIBRARIES["cuda"] = "not loaded: this torch was built without CUDA"
    elif not cuda.exists():
        LIBRARIES["cuda"] = (
            "not loaded: hf_flash was built without CUDA; install a CUDA toolkit (nvcc) or `pip install "
            "nvidia-cuda-nvcc`, then `HF_FLASH_CUDA=1 pip install --force-reinstall --no-deps .`"
        )
    else:
        try:
            torch.ops.load_library(cuda)
            LIBRARIES["cuda"] = str(cuda)
        except OSError as error:
            LIBRARIES["cuda"] = f"not loaded: {error}"


_load()
# Looked up once: each lookup goes through three objects' attributes.
_FORWARD = torch.ops.hf_flash.forward.default
_BACKWARD = torch.ops.hf_flash.backward.default


def has_kernel(name: str, device_type: str) -> bool:
    """Whether operator ``name`` has a compiled kernel for ``device_type`` ("cpu" or "cuda")."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"hf_flash::{name}", device_type.upper())


@functools.cache
def cuda_versions() -> tuple[int, int]:
    """(CUDA that the loaded library was built with, newest CUDA that the driver runs), as 1000 major + 10 minor.

    (0, 0) when no CUDA library is loaded; the second is 0 without a driver.
    """
    runtime, driver = ctypes.c_int(0), ctypes.c_int(0)
    if not LIBRARIES["cuda"].startswith("not loaded"):
        ctypes.CDLL(LIBRARIES["cuda"]).hf_flash_cuda_versions(ctypes.byref(runtime), ctypes.byref(driver))
    return runtime.value, driver.value


class Call(NamedTuple):
    """What an attention call has besides q, k, v, bias and sink; in the operator schema's order.

    ``None`` tensors are absent. Everything here takes no gradient.
    """

    mask: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    key_range: torch.Tensor | None = None
    query_range: torch.Tensor | None = None
    query_offset: torch.Tensor | None = None
    dropout_seed: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    window_left: int = -1
    window_right: int = -1
    dropout_keep: int = 256
    dropout_seed_value: int = 0  # where dropout_seed is absent
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    deterministic: bool = False


_TENSORS = 8  # the leading fields of Call that are tensors: saved, so that a change in place before backward raises
_NOTHING = (None,) * (2 + _TENSORS)


def _forward(q, k, v, bias, sink, call):
    mask, alibi_slopes, *rest = call
    return _FORWARD(q, k, v, bias, mask, alibi_slopes, sink, *rest)


class _Attention(torch.autograd.Function):
    """Forward and backward of the operator, with lse among the results, and its gradient, where somebody asks for it.

    Each argument, result and saved tensor takes autograd half a microsecond or more, an absent one too: so bias and
    sink are left out of a call without either, and None is not saved.
    """

    @staticmethod
    def forward(ctx, call, with_lse, q, k, v, bias=None, sink=None):
        out, lse = _forward(q, k, v, bias, sink, call)
        optional = (bias, sink, *call[:_TENSORS])
        ctx.present = [t is not None for t in optional]
        ctx.save_for_backward(q, k, v, out, lse, *[t for t in optional if t is not None])
        ctx.scalars = call[_TENSORS:]
        ctx.set_materialize_grads(False)
        return (out, lse) if with_lse else out

    @staticmethod
    def backward(ctx, dout, dlse=None):
        q, k, v, out, lse, *saved = ctx.saved_tensors
        optional = _NOTHING
        if saved:
            saved = iter(saved)
            optional = [next(saved) if present else None for present in ctx.present]
        bias, sink, mask, alibi_slopes, *rest = optional
        if dout is None:
            dout = torch.zeros_like(out)
        needs = ctx.needs_input_grad
        need_dbias, need_dsink = needs[5:] or (False, False)
        gradients = _BACKWARD(
            dout, dlse, q, k, v, out, lse, bias, mask, alibi_slopes, sink, *rest, *ctx.scalars, need_dbias, need_dsink
        )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            gradients = _OnceDifferentiable.apply(5, *gradients, dout, dlse, q, k, v, bias, sink)
        return None, None, *gradients[: len(needs) - 2]


class _OnceDifferentiable(torch.autograd.Function):
    """Passes gradients through and raises when somebody differentiates them: a silent zero would be wrong."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(
            "hf_flash [DOUBLE_BACKWARD]: attention is differentiable once; use eager attention where gradients of "
            "gradients are needed"
        )


def attention(q, k, v, bias, sink, call: Call, with_lse: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the operator; differentiable in q, k, v, bias, sink and through both results.

    Shapes as in :func:`hf_flash.flash_attention`; arguments are taken as they are, its checks come before.
    Returns ``(out, lse)``; without ``with_lse``, lse may be None.
    """
    if bias is None and sink is None:
        differentiable = (q, k, v)
        recorded = q.requires_grad or k.requires_grad or v.requires_grad
    else:
        differentiable = (q, k, v, bias, sink)
        recorded = any(t is not None and t.requires_grad for t in differentiable)
    if not (recorded and torch.is_grad_enabled()):
        return _forward(q, k, v, bias, sink, call)
    results = _Attention.apply(call, with_lse, *differentiable)
    return results if with_lse else (results, None)


def _row_values(q, cu_seqlens_q):
    """Shape of lse and of the row sums: (B, Hq, Sq), packed (Hq, T)."""
    return (q.shape[1], q.shape[0]) if cu_seqlens_q is not None else (q.shape[0], q.shape[2], q.shape[1])


def _accumulator(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@torch.library.register_fake("hf_flash::forward")
def _(q, k, v, bias, mask, alibi_slopes, sink, cu_seqlens_q, *rest):
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(_row_values(q, cu_seqlens_q), dtype=_accumulator(q))


@torch.library.register_fake("hf_flash::backward")
def _(dout, dlse, q, k, v, out, lse, bias, mask, alibi_slopes, sink, *rest):
    need_dbias, need_dsink = rest[-2:]
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if need_dbias and bias is not None else None
    dsink = sink.new_empty(sink.shape) if need_dsink and sink is not None else None
    return *(t.new_empty(t.shape) for t in (q, k, v)), dbias, dsink


@torch.library.register_fake("hf_flash::row_sum")
def _(dout, out, dlse):
    packed = out.dim() == 3
    shape = (out.shape[1], out.shape[0]) if packed else (out.shape[0], out.shape[2], out.shape[1])
    return out.new_empty(shape, dtype=_accumulator(out))


@torch.library.register_fake("hf_flash::dropout_mask")
def _(seed, batch, heads, seqlen_q, seqlen_k, keep):
    return seed.new_empty((batch, heads, seqlen_q, seqlen_k), dtype=torch.bool)
