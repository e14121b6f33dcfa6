"""Which attention modules a model has, which of them ``patch_model`` can patch, and why not the others."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from . import registry, report
from .report import RECORD, logger
from .support import Unsupported


@dataclass
class Found:
    """An attention module of a model, with the module that holds its config."""

    name: str
    module: nn.Module
    holder: nn.Module | None
    reason: Unsupported | None

    @property
    def config(self) -> PreTrainedConfig | None:
        return None if self.holder is None else self.holder.config


def original_class(module: nn.Module) -> type:
    record = getattr(module, RECORD, None)
    return type(module) if record is None or record.original_class is None else record.original_class


def attentions_of(model: nn.Module) -> list[Found]:
    """Every module that attends: those on the list, and innermost ones whose class is named so."""
    found = []

    def visit(name: str, module: nn.Module, holder: nn.Module | None, seen: set) -> bool:
        if module in seen:
            return False
        seen.add(module)
        if isinstance(module.__dict__.get("config"), PreTrainedConfig):
            holder = module
        here = len(found)
        inner = [visit(f"{name}.{child}".lstrip("."), m, holder, seen) for child, m in module.named_children()]
        cls = original_class(module)
        known = registry.behaviour_of(cls) is not None
        if known or ("Attention" in cls.__name__ and not any(inner)):
            reason = registry.class_reason(cls)
            if reason is None and not registry.through_interface(cls):
                reason = bound_reason(name, module)
            found.insert(here, Found(name, module, holder, reason))
            return True
        return any(inner)

    visit("", model, None, set())
    return found


def bound_forwards(module: nn.Module) -> list[str]:
    """Names under which a module holds its class's forward, bound: where accelerate's hooks keep the one that they
    call, and where it stays when such a hook is removed."""
    bound = ((name, module.__dict__.get(name)) for name in ("forward", "_old_forward"))
    return [name for name, method in bound if getattr(method, "__func__", None) is type(module).forward]


def bound_reason(name: str, module: nn.Module) -> Unsupported | None:
    """Why a replacement class would not change what a module does, or None."""
    if "forward" not in module.__dict__ or bound_forwards(module) or original_class(module) is not type(module):
        return None
    return Unsupported(
        "BOUND_FORWARD",
        f"{name or type(module).__name__} has a forward of its own in place of its class's: a replacement class would "
        "not be called; call patch_model before that forward is set",
    )


def padding_stacks(model: nn.Module, left_out: set[int]) -> tuple[list[nn.Module], Unsupported | None]:
    """The stacks of layers that can drop padding, and why ``padding_free=True`` would be in vain somewhere, or None.

    left_out: id of each attention module that is left out of a patch; it would attend to all tokens of a batch at once.
    """
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if getattr(registry.rule_of(type(module)), "padding_free", None) is not None
        and not any(id(part) in left_out for part in module.modules())
    ]
    if not stacks:
        return [], Unsupported(
            "PADDING_FREE",
            f"{type(model).__name__} has no stack of layers like BertEncoder's that is patched as a whole, and only "
            "those drop padding; leave padding_free out",
        )
    reasons = [bound_reason(name, module) for name, module in stacks]
    good = [module for (_, module), reason in zip(stacks, reasons, strict=True) if reason is None]
    return good, next(filter(None, reasons), None)


def selected(found: Found, include, exclude) -> bool:
    def matches(patterns) -> bool:
        if callable(patterns):
            return bool(patterns(found.name, found.module))
        return any(fnmatch.fnmatchcase(found.name, pattern) for pattern in patterns)

    return (include is None or matches(include)) and (exclude is None or not matches(exclude))


def patterns_of(given) -> tuple[str, ...] | Callable | None:
    """include or exclude: what is read more than once."""
    if given is None or callable(given):
        return given
    several = isinstance(given, Iterable) and not isinstance(given, str)
    patterns = tuple(given) if several else (given,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            f"hf_flash: include or exclude is {given!r}; it must be a glob pattern of module names, several, or a "
            "function (name, module) -> bool"
        )
    return patterns


_ALL_WEIGHTS = Unsupported(
    "OUTPUT_ATTENTIONS",
    "its config has output_attentions=True, and a fused kernel stores no weights; set it to False, and pass "
    "output_attentions=True to the calls that need them, which then fall back",
)


def judge(attentions: list[Found], wanted: set[int]) -> dict[int, Unsupported | None]:
    """id of each attention module -> why it stays as it is, None where it can be patched.

    Modules of one config share one mask, so they are patched together or not at all. A user's own module that was left
    out is taken not to have that mask.
    """
    blocked: dict[int, Found] = {}
    useful: set[int] = set()
    for found in attentions:
        if found.holder is None:
            found.reason = found.reason or Unsupported("NO_CONFIG", "no module above it holds a Transformers config")
        elif found.reason is not None:
            if id(found.module) in wanted or _is_of_transformers(found.module):
                blocked.setdefault(id(found.config), found)
        elif id(found.module) in wanted:
            useful.add(id(found.config))
            if getattr(found.config, "output_attentions", False):  # Transformers would save no such config
                found.reason = _ALL_WEIGHTS
    reasons = {}
    for found in attentions:
        reason = found.reason
        if reason is None and id(found.config) in blocked:
            other = blocked[id(found.config)]
            sentence = f"it shares its mask with {other.name}: {other.reason.sentence}"
            if not _is_of_transformers(other.module):
                sentence += f"; exclude={other.name!r} leaves that module alone, if the model does not hand it its mask"
            reason = Unsupported(other.reason.code, sentence)
        if reason is None and id(found.config) not in useful:
            reason = Unsupported("EXCLUDED", "patch_model was told to leave this module out")
        reasons[id(found.module)] = reason
    return reasons


def _is_of_transformers(module: nn.Module) -> bool:
    return original_class(module).__module__.partition(".")[0] == "transformers"


def complain(model, attentions, wanted, reasons, padding: Unsupported | None, on_unsupported: str) -> None:
    """Warn or raise where something that was asked for will not be done. padding: about padding_free."""
    skipped = [f for f in attentions if reasons[id(f.module)] is not None and reasons[id(f.module)].code != "EXCLUDED"]
    if attentions and wanted and not skipped and padding is None:
        return
    if attentions and not wanted:
        text = f"include and exclude leave none of the {len(attentions)} attention modules of {type(model).__name__}"
        text += f" [EXCLUDED]; the first one's name is {attentions[0].name!r}"
    elif skipped:
        reason = reasons[id(skipped[0].module)]
        text = f"{len(skipped)} of {len(attentions)} attention modules of {type(model).__name__} stay as they are"
        text += f" [{reason.code}]: {reason.sentence}"
    elif attentions:
        text = f"padding_free=True cannot be done [{padding.code}]: {padding.sentence}"
    else:
        text = f"{type(model).__name__} has no attention module that hf_flash knows [MODEL]"
    if on_unsupported == "error" or report.strict():
        raise NotImplementedError(f"hf_flash: {text}")
    if on_unsupported == "warn":
        logger.warning("%s", text)
