"""Which attention modules are known to be computed right, and how each behaves. Filled by the files of ``patches/``.

A module off this list is never computed by our kernel: it falls back, or raises, with the code ``MODEL``.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from .support import Unsupported

__all__ = ["Behaviour", "ModelRule", "behaviour_of", "interface_reason", "load_patches", "register", "register_model"]


def _never(module: nn.Module) -> bool:
    return False


def through_interface(cls: type) -> bool:
    """Whether a class's forward looks its attention function up, which is what ``attn_implementation`` switches."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(cls.forward).__code__.co_names


@dataclass(frozen=True)
class Behaviour:
    """How one kind of attention module behaves; an instance stands in each file of ``patches/``.

    name: for reports. is_cross: whether a module's keys come from another sequence than its queries. no_bias: whether
    a module's ``position_bias`` is known to be all zeros. relative_bias: whether it depends on the distance of query
    and key alone, so that a packed batch can use its corner. refuse: why a module of this kind cannot be served, or
    None. replacement: for classes that do not go through Transformers' attention interface: a mixin whose forward
    does; ``patch_model`` swaps it in (``swapped_class``).
    """

    name: str
    is_cross: Callable[[nn.Module], bool] = _never
    no_bias: Callable[[nn.Module], bool] = _never
    replacement: type | None = None
    refuse: Callable[[nn.Module], Unsupported | None] | None = None
    relative_bias: bool = False


@dataclass(frozen=True)
class ModelRule:
    """What a whole model (not its attention modules) needs.

    prepare: a forward pre-hook ``(module, args, kwargs) -> None | (args, kwargs)``, for models that do not pass
    ``position_ids`` on to their attention. padding_free: on a stack of layers, the mixin (see ``swapped_class``) that
    drops padding tokens.
    """

    prepare: Callable | None = None
    padding_free: type | None = None


@dataclass
class _Tables:
    attention: dict[str, Behaviour] = field(default_factory=dict)
    models: dict[str, ModelRule] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)


_TABLES = _Tables()


def _full_name(short: str) -> str:
    """ "bert.BertSelfAttention" -> "transformers.models.bert.modeling_bert.BertSelfAttention"; full names stay."""
    if short.count(".") > 1:
        return short
    folder, name = short.split(".")
    return f"transformers.models.{folder}.modeling_{folder}.{name}"


def register(behaviour: Behaviour, *classes: str) -> None:
    """Put attention classes on the list: ``"folder.Class"`` for Transformers' own, a full dotted name for others."""
    for name in map(_full_name, classes):
        _TABLES.attention[name] = behaviour
        _TABLES.folders.add(name.rpartition(".")[0])


def register_model(rule: ModelRule, *classes: str) -> None:
    """Attach a rule to model classes, named as in :func:`register`."""
    for name in map(_full_name, classes):
        _TABLES.models[name] = rule


@functools.cache
def swapped_class(mixin: type, cls: type) -> type:
    """The subclass of ``cls`` whose forward is ``mixin``'s. Parameters, state_dict and isinstance stay as they are."""
    return type(cls.__name__, (mixin, cls), {"__reduce_ex__": _reduce, "__module__": cls.__module__})


def _reduce(self, protocol):
    """Pickle and deepcopy a swapped module by its two classes: the subclass itself has no importable name."""
    mixin, cls = type(self).__bases__
    return _rebuild, (mixin, cls), self.__dict__


def _rebuild(mixin: type, cls: type):
    swapped = swapped_class(mixin, cls)
    return swapped.__new__(swapped)


def load_patches() -> None:
    """Import every file of ``hf_flash.patches``; each registers itself."""
    from . import patches

    for file in pkgutil.iter_modules(patches.__path__):
        importlib.import_module(f"{patches.__name__}.{file.name}")


def behaviour_of(cls: type) -> Behaviour | None:
    """The behaviour of an attention class; a subclass counts as its parent while it keeps the parent's forward."""
    for parent in cls.__mro__:
        found = _TABLES.attention.get(f"{parent.__module__}.{parent.__qualname__}")
        if found is not None:
            return found
        if "forward" in parent.__dict__:
            return None
    return None


def rule_of(cls: type) -> ModelRule | None:
    for parent in cls.__mro__:
        found = _TABLES.models.get(f"{parent.__module__}.{parent.__qualname__}")
        if found is not None:
            return found
    return None


def modeling_file(cls: type) -> str | None:
    """The nearest modeling module of Transformers among a class's parents."""
    for parent in cls.__mro__:
        if parent.__module__.startswith("transformers.models.") or parent.__module__ in _TABLES.folders:
            return parent.__module__
    return None


def attention_classes(python_module) -> list[type]:
    """The attention classes that a modeling file defines."""
    return [
        value
        for value in vars(python_module).values()
        if isinstance(value, type)
        and issubclass(value, nn.Module)
        and "Attention" in value.__name__
        and value.__module__ == python_module.__name__
    ]


# What is lost by treating these as plain attention; other models off the list get the general sentence.
KNOWN_REASONS = {
    "mpnet": ("REL_POS_BIAS", "adds a learned bias of its own to the scores"),
    "deberta": ("REL_POS_BIAS", "mixes content and position in its scores"),
    "deberta_v2": ("REL_POS_BIAS", "mixes content and position in its scores"),
    "bloom": ("ALIBI", "adds ALiBi slopes in a formula of its own"),
    "mpt": ("ALIBI", "adds ALiBi slopes in a formula of its own"),
    "falcon": ("ALIBI", "adds ALiBi slopes in a formula of its own"),
    "longformer": ("SPARSE_ATTN", "has windows and global tokens, not one softmax over all keys"),
}


def class_reason(cls: type) -> Unsupported | None:
    """Why an attention class cannot be patched, or None."""
    name, file = cls.__name__, cls.__module__
    folder = file.split(".")[2] if file.startswith("transformers.models.") else ""
    behaviour = behaviour_of(cls)
    if behaviour is not None:
        if behaviour.replacement is not None or through_interface(cls):
            return None
        return Unsupported(
            "NO_INTERFACE",
            f"{name} of this Transformers release does not go through the attention interface; use a newer release",
        )
    if folder in KNOWN_REASONS:
        code, what = KNOWN_REASONS[folder]
        return Unsupported(code, f"{name} {what}; no patch for it exists: keep attn_implementation='sdpa' or 'eager'")
    return Unsupported(
        "MODEL",
        f"{name} is not on the list of attention classes that hf_flash is tested on; keep attn_implementation='sdpa' "
        "or 'eager' for this model, or add it to the list (CONTRIBUTING.md tells how)",
    )


def interface_reason(cls: type) -> Unsupported | None:
    """Why ``attn_implementation="hf_flash"`` cannot serve a model class, or None.

    Judges the file that the model stands in: one of its attention classes must be on the list, and those that are must
    go through the interface; others fall back when they are called. A file without attention (composite models) leaves
    the judgement to the models inside.
    """
    file = modeling_file(cls)
    if file is None:
        return None
    classes = attention_classes(importlib.import_module(file))
    if file not in _TABLES.folders:
        return class_reason(classes[0]) if classes else None
    for attention in classes:
        if behaviour_of(attention) is not None and not through_interface(attention):
            return Unsupported(
                "NO_INTERFACE",
                f"{attention.__name__} of this Transformers release does not go through the attention interface; call "
                "hf_flash.patch_model(model) on the loaded model instead, or use a newer release",
            )
    return None
