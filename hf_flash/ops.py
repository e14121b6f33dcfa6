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
from torch.autograd import forward_ad

from .packing import is_traced

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


class Numbers(NamedTuple):
    """The numbers of an attention call, in the operators' order."""

    scale: float
    heads_first: bool = False  # q, k, v and their gradients are (B, H, S, D), out is not
    window_left: int = -1
    window_right: int = -1
    dropout_keep: int = 256
    dropout_seed_value: int = 0  # where the tensor dropout_seed is absent
    softcap: float = 0.0
    deterministic: bool = False
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0


_USUAL = tuple(Numbers(1.0))


def _shortened(numbers: tuple) -> tuple:
    """The first ones of :class:`Numbers`, if all others are as the operators assume."""
    if numbers[6:] != _USUAL[6:]:
        return numbers
    if numbers[4:] != _USUAL[4:]:
        return numbers[:6]
    return numbers[:4] if numbers[2:] != _USUAL[2:] else numbers[:2]


class Tensors(NamedTuple):
    """The tensors of a call beside q, k and v, in the operators' order after the numbers; None where absent.

    A tuple of the first ones does for a call without the rest. The last two take a gradient.
    """

    key_range: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    query_range: torch.Tensor | None = None
    query_offset: torch.Tensor | None = None
    dropout_seed: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    sink: torch.Tensor | None = None


def _compare_schemas() -> None:
    """Libraries of another version would take an argument for its neighbour."""
    for operator, first in ((_FORWARD, ()), (_BACKWARD, ("dout", "dlse"))):
        names = [argument.name for argument in operator._schema.arguments]
        own = [*first, "q", "k", "v", *(("out", "lse") if first else ()), *Numbers._fields, *Tensors._fields]
        if names[: len(own)] != own:
            raise ImportError(
                f"hf_flash: {LIBRARIES['cpu']} was built from another version than the Python code beside it; install "
                "both again with `pip install .`, or build in place with `pip install --no-build-isolation -e .`"
            )


_compare_schemas()


class _Attention(torch.autograd.Function):
    """Forward and backward of the operators; arguments as :func:`attention` has them, bias and sink by themselves.

    What the host spends here is what short sequences wait for: an argument, a result or a saved tensor takes autograd
    half a microsecond, a transposition that autograd sees five, an argument of an operator a tenth, an absent one too.
    So bias and sink are left out of a call without either, numbers that most calls leave alone too, None is not saved,
    and heads and rows change places in C++.
    """

    @staticmethod
    def forward(ctx, numbers, tensors, with_lse, q, k, v, *differentiable):
        tensors = (*tensors, *differentiable)
        out, lse = _FORWARD(q, k, v, *numbers, *tensors)
        ctx.numbers, ctx.present = numbers, None
        ctx.set_materialize_grads(False)
        if tensors:
            ctx.present = [t is not None for t in tensors]
            tensors = [t for t in tensors if t is not None]
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        return (out, lse) if with_lse else out

    @staticmethod
    def backward(ctx, dout, dlse=None):
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        needs, bias, sink = ctx.needs_input_grad[6:], None, None
        if ctx.present is not None:
            saved = iter(tensors)
            tensors = [next(saved) if present else None for present in ctx.present]
            if needs:
                bias, sink = tensors[-2:]
        gradients = _BACKWARD(dout, dlse, q, k, v, out, lse, *ctx.numbers, *tensors, *needs)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            gradients = _OnceDifferentiable.apply(5, *gradients, dout, dlse, q, k, v, bias, sink)
        return None, None, None, *gradients[: 3 + len(needs)]


# Function.apply without what it does for torch.func and for Dynamo first, which takes 2 us.
_record = super(torch.autograd.Function, _Attention).apply


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


def _refuse_tangents(*tensors):
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "hf_flash [FORWARD_MODE]: attention has no forward-mode derivative; use eager attention for it, or reverse "
            "mode (backward, torch.autograd.grad)"
        )


def _refuse_transforms():
    raise NotImplementedError(
        "hf_flash [TORCH_FUNC]: attention has no rule for torch.func's transforms (grad, vjp, vmap and so on); use "
        "eager attention inside them, or backward and torch.autograd.grad without them"
    )


def attention(
    q, k, v, numbers: tuple, tensors: tuple = (), with_lse: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the operator; differentiable in q, k, v, bias, sink and through both results.

    Shapes as in :func:`hf_flash.flash_attention`, but for ``heads_first``. numbers: as :class:`Numbers` has them, all.
    tensors: :class:`Tensors` or the first ones of it. Arguments are taken as they are, checks come before. Returns
    ``(out, lse)``; without ``with_lse``, lse may be None.
    """
    traced = is_traced()
    if not (tensors or traced):  # whoever traces would have to compare the numbers at each call
        numbers = _shortened(numbers)
    recorded, differentiable = q.requires_grad or k.requires_grad or v.requires_grad, ()
    if len(tensors) == len(Tensors._fields):
        bias, sink = tensors[-2:]
        tensors = tensors[:-2]
        if bias is not None or sink is not None:
            differentiable = bias, sink
            recorded = recorded or any(t is not None and t.requires_grad for t in differentiable)
    if forward_ad._current_level >= 0:  # tangents would be lost in silence
        _refuse_tangents(q, k, v, *differentiable)
    if not traced and torch._C._are_functorch_transforms_active():  # gradients too: vmap's tensors require none
        _refuse_transforms()
    if not (recorded and torch.is_grad_enabled()):
        return _FORWARD(q, k, v, *numbers, *tensors, *differentiable)
    apply = _record
    if traced:
        if torch.jit.is_tracing():
            raise NotImplementedError(
                "hf_flash [TRACE]: torch.jit.trace records no gradient of attention; trace under torch.no_grad()"
            )
        apply = _Attention.apply
        if q is k or q is v or k is v:  # a Function takes no tensor twice there
            k, v = k.view_as(k), v.view_as(v)
    results = apply(numbers, tensors, with_lse, q, k, v, *differentiable)
    return results if with_lse else (results, None)


def _row_values(q):
    """Shape of lse and of the row sums: (B, Hq, Sq), packed (Hq, T)."""
    return (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])


def _has_heads_first(rest) -> bool:
    place = Numbers._fields.index("heads_first")
    return place < len(rest) and rest[place]


def _accumulator(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@torch.library.register_fake("hf_flash::forward")
def _(q, k, v, *rest):
    q = q.transpose(1, 2) if _has_heads_first(rest) else q
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(_row_values(q), dtype=_accumulator(q))


@torch.library.register_fake("hf_flash::backward")
def _(dout, dlse, q, k, v, out, lse, *rest):
    absent = len(Numbers._fields) + len(Tensors._fields) + 2 - len(rest)  # torch leaves defaults at the end out
    bias, sink, need_dbias, need_dsink = (*rest, *(None,) * absent)[-4:]
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if need_dbias and bias is not None else None
    dsink = sink.new_empty(sink.shape) if need_dsink and sink is not None else None
    if _has_heads_first(rest):
        gradients = [t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (q, k, v)]
    else:
        gradients = [t.new_empty(t.shape) for t in (q, k, v)]
    return *gradients, dbias, dsink


@torch.library.register_fake("hf_flash::row_sum")
def _(dout, out, dlse):
    return out.new_empty(_row_values(out), dtype=_accumulator(out))


@torch.library.register_fake("hf_flash::dropout_mask")
def _(seed, batch, heads, seqlen_q, seqlen_k, keep):
    return seed.new_empty((batch, heads, seqlen_q, seqlen_k), dtype=torch.bool)
