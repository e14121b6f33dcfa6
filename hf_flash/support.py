"""Can this call run here? ``None``, or a reason with a stable code and a sentence that says why not and what to do.

:func:`unsupported` is asked by :func:`hf_flash.flash_attention`, which raises, and by the Transformers backend, which
falls back and reports. ``csrc/bindings.h`` repeats the checks that protect memory.
"""

from __future__ import annotations

import functools
import numbers
import os
from typing import NamedTuple

import torch

from . import ops

MAX_HEAD_DIM = 256
_MOST = torch.finfo(torch.float32).max  # in which kernels have the numbers
_CUDA_DTYPES = (torch.float16, torch.bfloat16)
_CPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Unsupported(NamedTuple):
    """Why a call cannot run: a stable ``code``, a ``sentence`` for people, the exception type it deserves."""

    code: str
    sentence: str
    error: type[Exception] = NotImplementedError

    def exception(self) -> Exception:
        return self.error(f"hf_flash [{self.code}]: {self.sentence}")


def _value(sentence: str) -> Unsupported:
    return Unsupported("ARGUMENT", sentence, ValueError)


def _type(sentence: str) -> Unsupported:
    return Unsupported("ARGUMENT", sentence, TypeError)


@torch.compiler.assume_constant_result
def device_reason(device_type: str, device_index: int | None, dtype: torch.dtype) -> tuple[str, str] | None:
    """(code, sentence) when no kernel serves ``dtype`` on this device; None when one does."""
    return _device_reason(device_type, device_index, dtype)


@functools.cache  # asked at every call; torch takes microseconds to tell a device's capability
def _device_reason(device_type: str, device_index: int | None, dtype: torch.dtype) -> tuple[str, str] | None:
    name = str(dtype).removeprefix("torch.")
    if device_type == "cpu":
        if dtype in _CPU_DTYPES:
            return None
        return "DTYPE", f"q has dtype {name}; the CPU kernel takes float16, bfloat16, float32 and float64"
    if device_type != "cuda":
        return "DEVICE", f"q is on device {device_type!r}; kernels exist for 'cpu' and 'cuda'; move the tensors there"
    if not ops.has_kernel("forward", "cuda"):
        why = ops.LIBRARIES["cuda"]
        return "NO_KERNEL", (
            why if why.startswith("not loaded") else "this build has no attention kernel for CUDA tensors yet; use sdpa"
        )
    if dtype not in _CUDA_DTYPES:
        code = "FP32" if dtype == torch.float32 else "DTYPE"
        return code, (
            f"q has dtype {name}; the CUDA kernels take float16 and bfloat16: load the model in one of them or train "
            "under torch.autocast"
        )
    return gpu_reason(device_index)


def gpu_reason(device_index: int | None) -> tuple[str, str] | None:
    """(code, sentence) when this GPU or its driver cannot run the CUDA library; None when they can."""
    built, driver = ops.cuda_versions()
    if driver // 1000 < built // 1000:
        return "DRIVER", (
            f"the NVIDIA driver runs CUDA {driver // 1000}.{driver % 1000 // 10} and hf_flash was built with CUDA "
            f"{built // 1000}.{built % 1000 // 10}; install a newer driver (580 or newer for CUDA 13)"
        )
    capability = torch.cuda.get_device_capability(device_index)
    if capability < (8, 0):
        return "ARCH", (
            f"the GPU has compute capability {capability[0]}.{capability[1]}; the kernels need 8.0 (Ampere) or newer"
        )
    return None


def kernel_name(device: torch.device) -> str:
    """Which of csrc's folders serves calls on a device, as ``csrc/dispatch.cu`` chooses it: "cpu", "sm80" or "sm90".

    "none" where HF_FLASH_ARCH forces kernels that the device cannot run, and calls raise.
    """
    if device.type != "cuda":
        return "cpu"
    own = ("sm80", "sm90") if torch.cuda.get_device_capability(device)[0] == 9 else ("sm80",)
    chosen = os.environ.get("HF_FLASH_ARCH") or own[-1]
    return chosen if chosen in own else "none"


def _kinds(q, k, v) -> Unsupported | None:
    """q, k and v must be tensors of one dtype on one device."""
    tensor = torch.Tensor
    if not (isinstance(q, tensor) and isinstance(k, tensor) and isinstance(v, tensor)):
        name, t = next((name, t) for name, t in (("q", q), ("k", k), ("v", v)) if not isinstance(t, tensor))
        return _type(f"`{name}` is a {type(t).__name__}; it must be a torch.Tensor")
    device, dtype = q.device, q.dtype
    for name, t in (("k", k), ("v", v)):
        if t.device != device:
            return _value(f"`{name}` is on {t.device} but `q` on {device}; move them to one device")
        if t.dtype != dtype:
            return _type(f"`{name}` has dtype {t.dtype} but `q` {dtype}; cast them to one dtype")
    return None


def _shapes(shape_q, shape_k, shape_v, packed: bool, heads: int) -> Unsupported | None:
    """The shapes of q, k and v; ``heads``: where in them the heads stand."""
    dims = 3 if packed else 4
    if not len(shape_q) == len(shape_k) == len(shape_v) == dims:
        layout = "(T, H, D) as cu_seqlens are given" if packed else "(B, S, H, D), or (T, H, D) with cu_seqlens"
        shapes = (("q", shape_q), ("k", shape_k), ("v", shape_v))
        name, shape = next((name, shape) for name, shape in shapes if len(shape) != dims)
        return _value(f"`{name}` has shape {tuple(shape)}; it must be {layout}")
    if shape_k != shape_v and shape_k[:-1] != shape_v[:-1]:
        return _value(f"`k` {tuple(shape_k)} and `v` {tuple(shape_v)} must agree in all but the last dimension")
    if not packed and shape_k[0] != shape_q[0]:
        return _value(f"`k` has batch size {shape_k[0]} but `q` {shape_q[0]}; expand the smaller one")
    if shape_k[-1] != shape_q[-1]:
        return _value(f"`k` has head_dim {shape_k[-1]} but `q` {shape_q[-1]}; they must be equal")
    heads_q, heads_k = shape_q[heads], shape_k[heads]
    if heads_k == 0 or heads_q % heads_k:
        return _value(f"`q` has {heads_q} heads, which is not a multiple of the {heads_k} heads of `k` and `v`")
    for name, d in (("q", shape_q[-1]), ("v", shape_v[-1])):
        if d % 8 or not 0 < d <= MAX_HEAD_DIM:
            return Unsupported(
                "HEAD_DIM",
                f"`{name}` has head_dim {d}; allowed is a multiple of 8 from 8 to {MAX_HEAD_DIM}; pad the last "
                "dimension with zeros and pass the scale explicitly",
                ValueError,
            )
    return None


def _tensor(name, t, q, dtypes, hint="") -> Unsupported | None:
    """What every optional tensor argument must be: a tensor of an allowed dtype on q's device."""
    if not isinstance(t, torch.Tensor):
        return _type(f"`{name}` is a {type(t).__name__}; it must be a torch.Tensor or None")
    if t.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        return _type(f"`{name}` has dtype {t.dtype}; allowed is {allowed}{hint}")
    if t.device != q.device:
        return _value(f"`{name}` is on {t.device} but `q` on {q.device}; move it there")
    return None


def _vector(name, t, q, dtypes, shapes) -> Unsupported | None:
    """A small tensor argument: one of the allowed shapes."""
    if t is None:
        return None
    reason = _tensor(name, t, q, dtypes)
    if reason is None and tuple(t.shape) not in shapes:
        allowed = " or ".join(str(s) for s in shapes)
        return _value(f"`{name}` has shape {tuple(t.shape)}; allowed is {allowed}")
    return reason


def _scores(name, t, q, dtypes, full) -> Unsupported | None:
    """bias and mask: broadcasting to (B, Hq, Sq, Sk)."""
    if t is None:
        return None
    other = "mask" if name == "bias" else "bias"
    reason = _tensor(name, t, q, dtypes, hint=f"; other dtypes may belong into `{other}`")
    if reason is not None:
        return reason
    missing = 4 - t.dim()
    if missing < 0 or any(size != 1 and size != want for size, want in zip(t.shape, full[missing:], strict=True)):
        hint = "; one of keys alone is mask[:, None, None]" if name == "mask" and t.dim() == 2 else ""
        return _value(
            f"`{name}` has shape {tuple(t.shape)}, which does not broadcast to (B, Hq, Sq, Sk) = {full}{hint}"
        )
    return None


def is_integer(x) -> bool:
    """True is none here, and a tensor neither: reading it would make the host wait for the device."""
    return type(x) is int or (isinstance(x, (numbers.Integral, torch.SymInt)) and not isinstance(x, bool))


def is_number(x) -> bool:
    """True is none here, and a tensor neither, whose gradient would be lost, but where torch.jit.trace makes some."""
    if type(x) is float or is_integer(x) or (isinstance(x, (numbers.Real, torch.SymFloat)) and not isinstance(x, bool)):
        return True
    return torch.jit.is_tracing() and isinstance(x, torch.Tensor) and x.dim() == 0


def unclear(name: str, flag) -> Unsupported | None:
    """A flag that is neither True nor False; "False" would mean True."""
    if flag is True or flag is False or type(flag).__name__ in ("bool_", "bool"):  # NumPy's
        return None
    return _type(f"`{name}` is {flag!r}; it must be True or False")


def _scalars(window, softcap, scale, dropout_p, causal, deterministic) -> Unsupported | None:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        return _type(f"`window` is {window!r}; it must be a pair (left, right) of integers, -1 meaning unlimited")
    left, right = window
    if not (is_integer(left) and is_integer(right)):
        return _type(f"`window` is {tuple(window)}; left and right must be integers, -1 meaning unlimited")
    if left < -1 or right < -1:
        return _value(f"`window` is {tuple(window)}; left and right must be -1 (unlimited) or at least 0")
    for name, x in (("softcap", softcap), ("scale", 1.0 if scale is None else scale), ("dropout_p", dropout_p)):
        if not is_number(x):
            return _type(f"`{name}` is {x!r}; it must be a number, and gets no gradient")
    if not 0 <= softcap <= _MOST:
        return _value(f"`softcap` is {softcap}; it must be positive and at most {_MOST:.2g}, or 0 for none")
    if scale is not None and not 0 < scale <= _MOST:
        return _value(f"`scale` is {scale}; it must be positive and at most {_MOST:.2g} (None: 1 / sqrt(head_dim))")
    if not 0 <= dropout_p < 1:
        sentence = f"`dropout_p` is {dropout_p}; it must be at least 0 and less than 1"
        return Unsupported("DROPOUT", sentence, ValueError) if dropout_p == 1 else _value(sentence)
    return unclear("causal", causal) or (None if deterministic is None else unclear("deterministic", deterministic))


def _longest(name, longest, packed: bool) -> Unsupported | None:
    """max_seqlen_q and max_seqlen_k."""
    if longest is None:
        return None
    if not packed:
        return _value(f"`max_seqlen_{name}` is {longest} without cu_seqlens; it is for packed batches, leave it out")
    if not is_integer(longest):
        return _type(f"`max_seqlen_{name}` is {longest!r}; it must be an int or None, which reads it from the device")
    if longest < 0:
        return _value(f"`max_seqlen_{name}` is {longest}; it must be at least 0 and no less than the longest sequence")
    return None


def unsupported(
    q, k, v, scale=None, causal=False, window=(-1, -1), softcap=0.0, bias=None, mask=None, alibi_slopes=None,
    sink=None, dropout_p=0.0, dropout_seed=None, key_range=None, query_range=None, query_offset=None,
    cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=None, heads_first=False,
) -> Unsupported | None:  # fmt: skip
    """Reason why :func:`hf_flash.flash_attention` cannot take this call, or None. Arguments as there.

    heads_first: q, k and v are ``(B, H, S, D)``; not in a packed batch.
    """
    packed = cu_seqlens_q is not None
    if packed != (cu_seqlens_k is not None):
        return _value("`cu_seqlens_q` and `cu_seqlens_k` go together; self-attention passes one tensor twice")
    reason = _kinds(q, k, v)
    if reason:
        return reason
    shape_q, shape_k = q.shape, k.shape  # each look at a tensor's shape costs a call into torch
    place = 1 if heads_first else -2
    reason = _shapes(shape_q, shape_k, v.shape, packed, place)
    reason = reason or _scalars(window, softcap, scale, dropout_p, causal, deterministic)
    if reason:
        return reason
    device = q.device
    why = device_reason(device.type, device.index, q.dtype)
    if why is not None:
        return Unsupported(*why)
    # `is`, one by one: a generator over them would take as long as all the rest here.
    if (
        bias is mask is alibi_slopes is sink is dropout_seed is None
        and key_range is query_range is query_offset is cu_seqlens_q is max_seqlen_q is max_seqlen_k is None
    ):
        return None
    reason = _longest("q", max_seqlen_q, packed) or _longest("k", max_seqlen_k, packed)
    if reason:
        return reason
    ints, longs, floats = (torch.int32,), (torch.int64,), (torch.float32,)
    reason = _tensor("cu_seqlens_q", cu_seqlens_q, q, ints) if packed else None
    if reason:
        return reason
    batch = cu_seqlens_q.numel() - 1 if packed else shape_q[0]
    if packed:
        if key_range is not None or query_range is not None:
            return _value("`key_range` and `query_range` do not go with `cu_seqlens_q`: shorten the sequences instead")
        if batch < 0 or cu_seqlens_q.dim() != 1:
            return _value(f"`cu_seqlens_q` has shape {tuple(cu_seqlens_q.shape)}; it must be (B + 1,)")
        reason = _vector("cu_seqlens_k", cu_seqlens_k, q, ints, ((batch + 1,),))
    reason = (
        reason
        or _vector("key_range", key_range, q, ints, ((batch, 2),))
        or _vector("query_range", query_range, q, ints, ((batch, 2),))
        or _vector("query_offset", query_offset, q, ints, ((batch,),))
        or _vector("dropout_seed", dropout_seed, q, longs, ((1,), ()))
    )
    if reason or bias is mask is alibi_slopes is sink is None:
        return reason
    heads = shape_q[place]
    own = (torch.float32,) if q.dtype == torch.float32 else (q.dtype, torch.float32)
    rows = 2 if heads_first else 1
    full = (batch, heads, max_seqlen_q if packed else shape_q[rows], max_seqlen_k if packed else shape_k[rows])
    if packed and (max_seqlen_q is None or max_seqlen_k is None):
        full = (batch, heads, "max_seqlen_q", "max_seqlen_k")
        if bias is not None or mask is not None:
            return _value("`bias` and `mask` in a packed batch need `max_seqlen_q` and `max_seqlen_k`; pass both")
    if isinstance(alibi_slopes, torch.Tensor) and alibi_slopes.requires_grad and torch.is_grad_enabled():
        return _value("`alibi_slopes` requires grad, but gets no gradient; pass alibi_slopes.detach(), or a `bias`")
    return (
        _vector("alibi_slopes", alibi_slopes, q, floats, ((heads,), (batch, heads)))
        or _vector("sink", sink, q, own, ((heads,),))
        or _scores("bias", bias, q, own, full)
        or _scores("mask", mask, q, (torch.bool,), full)
    )
