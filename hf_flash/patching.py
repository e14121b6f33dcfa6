"""``patch_model`` and its way back: a loaded Transformers model computes its attention with our kernels, in place.

A patched model holds private copies of its configs, with ``attn_implementation`` switched, so a second model built from
the same config object is not touched. Modules that do not go through Transformers' attention interface get a subclass
with the same parameters. Each module that changed carries a small record of what it was, which deepcopy and pickle
take along.
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from . import backend, ops, registry, report, support
from .fallback import Options, options_of
from .judgement import (
    Found,
    attentions_of,
    bound_forwards,
    complain,
    judge,
    original_class,
    padding_stacks,
    patterns_of,
    selected,
)
from .record import ConfigCopy, Record
from .report import RECORD, Report, Row, logger
from .support import Unsupported

__all__ = ["explain", "is_patched", "patch_model", "patched", "unpatch_model"]

_CHOICES = {
    "on_unsupported": ("warn", "error", "ignore"),
    "on_fallback": ("warn", "error", "ignore"),
    "fp32": ("fallback", "error", "bfloat16", "float16"),
}


def _copy_configs(model: nn.Module) -> dict[int, ConfigCopy]:
    """Private copies of all configs in a model: id of the original -> copy. Put in place by _use_configs."""
    originals: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, PreTrainedConfig):
                originals[id(value)] = value
    memo: dict = {}
    copies = {}
    for key, original in originals.items():
        private = copy.deepcopy(original, memo)
        before = {n: copy.deepcopy(v) for n, v in private.__dict__.items() if not isinstance(v, PreTrainedConfig)}
        copies[key] = ConfigCopy(original, private, before)
    return copies


def _record(module: nn.Module) -> Record:
    return module.__dict__.setdefault(RECORD, Record())


def check_arguments(given: dict) -> None:
    """Raises where one of :func:`patch_model`'s arguments is none that it takes."""
    for name, allowed in _CHOICES.items():
        if name in given and given[name] not in allowed:
            raise ValueError(f"hf_flash: {name}={given[name]!r}; allowed is one of {', '.join(map(repr, allowed))}")
    for name in ("padding_free", "deterministic"):
        flag = given.get(name, False)
        reason = None if name == "deterministic" and flag is None else support.unclear(name, flag)
        if reason is not None:
            raise reason.exception()


def _check_model(model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"hf_flash: `model` is a {type(model).__name__}; it must be a torch.nn.Module: load a checkpoint first, as "
            "with AutoModel.from_pretrained(name)"
        )


def patch_model(
    model: nn.Module,
    *,
    include: str | Iterable[str] | Callable | None = None,
    exclude: str | Iterable[str] | Callable | None = None,
    on_unsupported: str = "warn",
    on_fallback: str = "warn",
    fp32: str = "fallback",
    padding_free: bool = False,
    deterministic: bool | None = None,
) -> nn.Module:
    """Let a loaded Transformers model compute its attention with hf_flash, in place.

    Weights, state_dict keys, dtype, mode, hooks and the random state stay as they are. Calling again with the same
    arguments changes nothing; with others it patches anew.

    Args:
        model: any module that holds Transformers models (a task model, a PEFT or DDP wrapper, ...).
        include, exclude: glob patterns of module names (``"encoder.layer.0.*"``), or a function
            ``(name, module) -> bool``; default: every attention module on the list. Modules left out of a model that
            is otherwise patched run in Transformers' eager attention where that is what they had, else in its sdpa.
        on_unsupported: "warn", "error" or "ignore", for modules that cannot be patched, and for padding_free=True where
            it would drop no padding.
        on_fallback: "warn" (once for each class and reason), "error" or "ignore", for calls that our kernels do not
            serve; they run in Transformers' own attention.
        fp32: for float32 tensors outside autocast on devices whose kernels take half precision: "fallback" to
            Transformers' attention, raise an "error", or attend in "bfloat16" or "float16" and cast the result back.
        padding_free: drop padding tokens before the first layer of BERT-like encoders and put them back after the
            last. The results at padding tokens are then zeros.
        deterministic: gradients with the same bits on every run; None follows torch.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: an argument is wrong. NotImplementedError: something cannot be done and
        ``on_unsupported`` is "error" or HF_FLASH_STRICT=1 is set; the model is as it was. HF_FLASH_DISABLE=1 makes this
        function do nothing.
    """
    _check_model(model)
    include, exclude = patterns_of(include), patterns_of(exclude)
    request = {
        "include": include, "exclude": exclude, "on_unsupported": on_unsupported, "on_fallback": on_fallback,
        "fp32": fp32, "padding_free": padding_free, "deterministic": deterministic,
    }  # fmt: skip
    check_arguments(request)
    if report.disabled():
        logger.warning("HF_FLASH_DISABLE=1 is set: %s stays as it is", type(model).__name__)
        return model
    attentions, wanted, reasons = _judged(model, request)
    served = [id(found.module) for found in attentions if _uses_us(found)]
    as_asked = served == [key for key, reason in reasons.items() if reason is None and key in wanted]
    if served and as_asked and getattr(getattr(model, RECORD, None), "request", None) == request:
        return model
    left_out = {key for key, reason in reasons.items() if reason is None} - wanted
    stacks, padding = padding_stacks(model, left_out) if padding_free else ([], None)
    complain(model, attentions, wanted, reasons, padding, on_unsupported)  # may raise: the old patch stands until here
    unpatch_model(model, _keep_counts=True)
    if any(reason is None for reason in reasons.values()):
        options = Options(on_fallback=on_fallback, fp32=fp32, deterministic=deterministic)
        _apply(model, attentions, reasons, wanted, options)
        for stack in stacks:
            _swap(stack, registry.rule_of(type(stack)).padding_free)
        record = _record(model)
        record.called, record.request = True, request
    _warn_without_cuda_library()
    logger.info("%s", str(explain(model)).splitlines()[0])
    return model


def _judged(model: nn.Module, request: dict) -> tuple[list[Found], set[int], dict[int, Unsupported | None]]:
    """A model's attention modules, the ids of those that a request selects, and what judge() says."""
    attentions = attentions_of(model)
    wanted = {id(found.module) for found in attentions if selected(found, request["include"], request["exclude"])}
    return attentions, wanted, judge(attentions, wanted)


def _apply(model, attentions, reasons, wanted, options: Options) -> None:
    good = {id(found.config) for found in attentions if reasons[id(found.module)] is None}
    bad = {id(found.config) for found in attentions if reasons[id(found.module)] is not None}
    copies = _copy_configs(model)
    for found in attentions:
        if reasons[id(found.module)] is None:
            original = found.config._attn_implementation or "sdpa"
            excluded = id(found.module) not in wanted
            calls, record = report.calls_of(found.module), _record(found.module)
            record.calls = calls
            record.options = options._replace(excluded=excluded, original=original)
            record.config = copies[id(found.config)]
            record.config.attentions += 1
            behaviour = registry.behaviour_of(type(found.module))
            if not registry.through_interface(type(found.module)):
                _swap(found.module, behaviour.replacement)
    for module in model.modules():
        for name, value in list(module.__dict__.items()):
            if isinstance(value, PreTrainedConfig):
                _record(module).configs[name] = copies[id(value)]
                module.__dict__[name] = copies[id(value)].private
    for key, config in copies.items():
        # A config without attention modules of its own (a composite's) follows when nothing below it was refused.
        if key in good or (key not in bad and not bad):
            config.private._attn_implementation_internal = backend.NAME
    backend.attach_rules(model)


def _swap(module: nn.Module, mixin: type) -> None:
    _record(module).original_class = type(module)
    _change_class(module, registry.swapped_class(mixin, type(module)))


def _change_class(module: nn.Module, cls: type) -> None:
    for name in bound_forwards(module):
        module.__dict__[name] = types.MethodType(cls.forward, module)
    module.__class__ = cls


_warned_cuda = False


def _warn_without_cuda_library() -> None:
    """pip hides what a build prints, so a machine with a GPU hears here that it got no CUDA kernels."""
    global _warned_cuda
    if _warned_cuda or not torch.cuda.is_available() or ops.has_kernel("forward", "cuda"):
        return
    _warned_cuda = True
    why = ops.LIBRARIES["cuda"] if ops.LIBRARIES["cuda"].startswith("not loaded") else "this build has no kernel yet"
    logger.warning("this machine has a GPU, but hf_flash has no CUDA kernels and attention there falls back: %s", why)


def unpatch_model(model: nn.Module, *, _keep_counts: bool = False) -> nn.Module:
    """Undo :func:`patch_model` on a model: the same config objects, classes and attention as before.

    Settings changed on the patched model's config in the meantime (``use_cache``, ``problem_type``, ...) are kept.
    Does nothing on a model that is not patched. Returns the same model.

    Raises:
        ValueError: this is a part of a patched model, and other attention modules share its config and its mask.
    """
    _check_model(model)
    records = [(module, module.__dict__[RECORD]) for module in model.modules() if RECORD in module.__dict__]
    _refuse_part(model, records)
    configs = {id(config): config for _, record in records for config in record.configs.values()}
    changes = [(config, config.changes()) for config in configs.values()]
    for config, names in changes:
        config.write_back(names)
    for module, record in records:
        if record.original_class is not None:
            _change_class(module, record.original_class)
        if record.calls is not None:
            report.keep(module, record.calls)
        del module.__dict__[RECORD]
    if records:
        originals = {id(config.private): config.original for config in configs.values()}
        for module in model.modules():  # those made from a private config since then too
            for name, value in module.__dict__.items():
                if id(value) in originals:
                    module.__dict__[name] = originals[id(value)]
        backend.detach_rules(model)
    if not _keep_counts:
        for module in model.modules():
            report.forget(module)
    return model


def _refuse_part(model: nn.Module, records: list[tuple[nn.Module, Record]]) -> None:
    """Raise where attention modules get their mask from outside, from a model that stays patched.

    A model of Transformers makes its masks itself, so its layers may have been cut, added or taken from another patched
    model; and what patch_model was called with is taken for whole.
    """
    whole: set[int] = set()
    for module in model.modules():
        called = RECORD in module.__dict__ and module.__dict__[RECORD].called
        if id(module) not in whole and (called or isinstance(module, PreTrainedModel)):
            whole |= {id(part) for part in module.modules()}
    inside = Counter(id(record.config) for _, record in records if record.config is not None)
    for module, record in records:
        config = record.config
        if config is not None and inside[id(config)] < config.attentions and id(module) not in whole:
            raise ValueError(
                f"hf_flash: `model` is a {type(model).__name__} with {inside[id(config)]} of the {config.attentions} "
                "attention modules that share a config and a mask; unpatch the whole model"
            )


@contextlib.contextmanager
def patched(model: nn.Module, **arguments):
    """``with hf_flash.patched(model): ...`` patches for a block of code and restores, after an exception too.

    Arguments as for :func:`patch_model`. A model that was patched before, or a part of it, is so again afterwards.

    Raises:
        ValueError: which of its attention modules are patched is not what patch_model was asked for with the model or
        with a part of it: the model is a part of what it was called with, or parts were unpatched since.
    """
    _check_model(model)
    records = [(module, getattr(module, RECORD, None)) for module in model.modules()]
    before = [(module, record.request) for module, record in records if record is not None and record.request]
    recorded = {id(module) for module, record in records if record is not None and record.options is not None}
    again = {key for part, request in before for key, reason in _judged(part, request)[2].items() if reason is None}
    if recorded != again:
        raise ValueError(
            f"hf_flash: `model` is a {type(model).__name__} whose attention modules are not those that one patch_model "
            "call patched, so they could not be patched again afterwards; call patched() with that call's model"
        )
    patch_model(model, **arguments)
    try:
        yield model
    finally:
        unpatch_model(model)
        for module, request in before:
            patch_model(module, **request)


def is_patched(model: nn.Module) -> bool:
    """Whether any attention module of the model uses hf_flash, through patch_model or attn_implementation."""
    _check_model(model)
    return any(_uses_us(found) for found in attentions_of(model))


def _uses_us(found: Found) -> bool:
    uses = found.reason is None and found.config is not None and found.config._attn_implementation == backend.NAME
    return uses and not options_of(found.module).excluded


def explain(model: nn.Module) -> Report:
    """What hf_flash does for each attention module of a model: print the result.

    Each row says "patched", "fallback" (patched, but calls went to Transformers' attention) or "skipped", the reason's
    code, and how many calls our kernel served; ``Report.share`` is the share over all calls so far.
    """
    _check_model(model)
    rows, request = [], getattr(model.__dict__.get(RECORD), "request", None)
    for found in attentions_of(model):
        row = Row(found.name, original_class(found.module).__name__, "patched")
        if not _uses_us(found):
            left_out = request is not None and not selected(found, request["include"], request["exclude"])
            reason = found.reason or (
                Unsupported("EXCLUDED", "patch_model was told to leave this module out")
                if left_out or options_of(found.module).excluded
                else Unsupported("NOT_PATCHED", "hf_flash.patch_model(model) or attn_implementation='hf_flash' uses it")
            )
            row.status, row.code, row.sentence = "skipped", reason.code, reason.sentence
        else:
            calls = report.calls_of(found.module)
            row.served, row.fallbacks = calls.served, dict(calls.fallbacks)
            if calls.fallbacks:
                row.status, row.code = "fallback", calls.fallbacks.most_common(1)[0][0]
                row.sentence = calls.reasons[row.code]
        rows.append(row)
    kernel, notes = _kernel(model)
    notes += report.compiled_notes({row.attention for row in rows})
    return Report(type(model).__name__, rows, kernel, notes)


def _kernel(model: nn.Module) -> tuple[str, list[str]]:
    """Which kernel serves the model's device and dtype, and notes about it."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return "no parameters", []
    device, dtype = parameter.device, str(parameter.dtype).removeprefix("torch.")
    reason = support.device_reason(device.type, device.index, parameter.dtype)
    if reason is None:
        return f"{device.type} kernel, {dtype}", []
    return f"no {device.type} kernel for {dtype} [{reason[0]}]", [reason[1]]
